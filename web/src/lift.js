// From a radiograph to what can be turned: the network is asked once a picture. As in radrotator/rotate/lifted.py and
// radrotator/model/heads.py.
import * as ort from "onnxruntime-web/wasm"
import {curveFromRanks, midRanks, toIntegrals, wayBack} from "./tone.js"

ort.env.wasm.numThreads = 1  // more need headers that a plain file server does not send

const bytesOf = text => Uint8Array.from(atob(text), letter => letter.charCodeAt(0))

/** The two networks, from base64: {tone, shares}. */
export async function loadNetworks(runtime, files) {
  ort.env.wasm.wasmBinary = bytesOf(runtime)
  const session = text => ort.InferenceSession.create(bytesOf(text))
  return {tone: await session(files.tone), shares: await session(files.shares)}
}

async function ask(session, given, side) {
  const tensor = values => new ort.Tensor("float32", values, [1, 1, side, side])
  const told = await session.run(Object.fromEntries(Object.entries(given).map(([name, v]) => [name, tensor(v)])))
  return Object.fromEntries(Object.entries(told).map(([name, {data}]) => [name, data]))
}

/** A picture padded to a square, each pixel of the small one the mean of what it covers. */
export function shrink(pixels, width, height, size) {
  const side = Math.max(width, height), small = new Float32Array(size*size)
  const left = Math.floor((side - width)/2), top = Math.floor((side - height)/2)
  const ends = i => [Math.floor(i*side/size), Math.ceil((i + 1)*side/size)]
  for (let i = 0; i < size; i++) for (let j = 0; j < size; j++) {
    const [y0, y1] = ends(i), [x0, x1] = ends(j)
    let sum = 0
    for (let y = Math.max(y0 - top, 0); y < Math.min(y1 - top, height); y++)
      for (let x = Math.max(x0 - left, 0); x < Math.min(x1 - left, width); x++) sum += pixels[y*width + x]
    small[i*size + j] = sum/((y1 - y0)*(x1 - x0))
  }
  return small
}

const clamp = (x, low, high) => Math.min(Math.max(x, low), high)

/** Combine, along one axis of an n × m picture, the pixels at `places(i)`, [[index, weight], …]; beyond the border, its own. */
function along(image, n, m, axis, length, places) {
  const [rows, columns] = axis == 0 ? [length, m] : [n, length], out = new Float64Array(rows*columns)
  for (let i = 0; i < length; i++) for (const [place, weight] of places(i)) {
    const at = clamp(place, 0, (axis == 0 ? n : m) - 1)
    if (axis == 0) for (let j = 0; j < m; j++) out[i*m + j] += weight*image[at*m + j]
    else for (let j = 0; j < n; j++) out[j*length + i] += weight*image[j*m + at]
  }
  return Float32Array.from(out)
}

function blur(image, n, m, sigmas, reach) {
  const taps = sigma => {
    const far = reach(sigma), all = Array.from({length: 2*far + 1}, (_, k) => Math.exp(-((k - far)**2)/(2*sigma**2)))
    const sum = all.reduce((a, b) => a + b)
    return i => all.map((tap, k) => [i + k - far, tap/sum])
  }
  const down = sigmas[0] ? along(image, n, m, 0, n, taps(sigmas[0])) : image
  return sigmas[1] ? along(down, n, m, 1, m, taps(sigmas[1])) : down
}

/** As scikit-image shrinks: blurred, then linear between pixel centres. */
function resize(pixels, height, width, rows, columns) {
  if (rows == height && columns == width) return pixels
  const factors = [height/rows, width/columns]
  const soft = blur(pixels, height, width, factors.map(f => Math.max(0, (f - 1)/2)), s => Math.floor(4*s + 0.5))
  const linear = factor => i => {
    const place = (i + 0.5)*factor - 0.5, left = Math.floor(place)
    return [[left, 1 - place + left], [left + 1, place - left]]
  }
  return along(along(soft, height, width, 0, rows, linear(factors[0])), rows, width, 1, columns, linear(factors[1]))
}

const A = -0.75  // of the cubic convolution, as in PyTorch
const near = t => ((A + 2)*t - A - 3)*t*t + 1
const far = t => ((A*t - 5*A)*t + 8*A)*t - 4*A

/** Enlarge the middle of a canvas to a picture's pixels, by cubic convolution. */
function enlarge(image, canvas, size, height, width) {
  const cubic = length => i => {
    const place = (((i - (length - 1)/2)*2/Math.max(height, width)*size/canvas + 1)*canvas - 1)/2
    const left = Math.floor(place), t = place - left
    return [[left - 1, far(t + 1)], [left, near(t)], [left + 1, near(1 - t)], [left + 2, far(2 - t)]]
  }
  return along(along(image, canvas, canvas, 0, height, cubic(height)), height, canvas, 1, width, cubic(width))
}

function roundHalfEven(x) {
  const whole = Math.round(x)
  return Math.abs(x % 1) == 0.5 && whole % 2 ? whole - 1 : whole
}

/** {soft, shares, fine, detailDepth, depths, back}: see `Lifted` in Python; null where the picture is too narrow. */
export async function liftRadiograph({pixels, width, height}, networks, about) {
  const {size: S, canvas: C, slabs: K} = about, off = (C - S)/2
  const known = shrink(new Float32Array(width*height).fill(1), width, height, S).map(x => x > 0.99 ? 1 : 0)
  if (!known.includes(1)) return null
  const ranks = midRanks(shrink(pixels, width, height, S), known)
  const {quantiles} = await ask(networks.tone, {ranks, known}, S)
  const factor = Math.min(1, about.curve_side/Math.max(width, height))
  const [rows, columns] = [height, width].map(n => Math.max(1, roundHalfEven(n*factor)))
  const curve = curveFromRanks(resize(pixels, height, width, rows, columns), quantiles, about.levels)
  const integrals = toIntegrals(curve, pixels)
  const small = shrink(integrals, width, height, S)
  const told = await ask(networks.shares, {picture: small, known}, S)

  const seen = [...known.keys()].filter(i => known[i])  // a rectangle: its first and its last pixel are corners
  const corner = [seen[0], seen[seen.length - 1]], [first, last] = corner.map(i => [Math.floor(i/S), i % S])
  const inside = new Uint8Array(C*C)
  const wide = Float32Array.from(inside, (_, i) => {
    const [row, column] = [Math.floor(i/C) - off, i % C - off]
    const [r, c] = [clamp(row, first[0], last[0]), clamp(column, first[1], last[1])]
    inside[i] = r == row && c == column
    return small[r*S + c]
  })
  const blurred = blur(wide, C, C, [about.split, about.split], s => Math.ceil(3*s))
  const soft = new Float32Array(K*C*C), balance = [0, 0]
  for (let k = 0; k < K; k++) for (let i = 0; i < C*C; i++) {
    const row = Math.floor(i/C) - off, column = i % C - off, at = k*C*C + i
    soft[at] = blurred[i]*(inside[i] ? told.tissue[k*S*S + row*S + column] : told.rim[at]*told.gate[i])
    if (Math.min(row, column) < 0 || Math.max(row, column) >= S) continue
    balance[0] += soft[at]*about.depths[k]
    balance[1] += soft[at]
  }
  const depths = about.depths.map(d => d - balance[0]/Math.max(balance[1], 1e-9))
  const share = (k, i) => told.detail[k*S*S + i]
  const detailDepth = Float32Array.from(known, (_, i) => depths.reduce((sum, d, k) => sum + d*share(k, i), 0))
  const enlarged = enlarge(blurred, C, S, height, width), fine = integrals.map((x, i) => x - enlarged[i])
  return {soft, fine, shares: told.detail, depths, detailDepth, back: wayBack(curve, about.steps_back)}
}
