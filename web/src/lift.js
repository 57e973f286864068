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

/** Mix, along an axis of an n × m picture, the pixels at `places(i)`: [[index, weight], …]; the border goes on. */
function along(image, n, m, axis, length, places) {
  const out = new Float64Array(axis == 0 ? length*m : n*length), last = (axis == 0 ? n : m) - 1
  for (let i = 0; i < length; i++) for (const [place, weight] of places(i)) {
    const at = Math.min(Math.max(place, 0), last)
    if (axis == 0) for (let j = 0; j < m; j++) out[i*m + j] += weight*image[at*m + j]
    else for (let j = 0; j < n; j++) out[j*length + i] += weight*image[j*m + at]
  }
  return Float32Array.from(out)
}

/** As scikit-image shrinks: along each axis blurred, then linear between pixel centres. */
function resize(pixels, height, width, rows, columns) {
  const soften = factor => {
    const sigma = (factor - 1)/2, reach = Math.floor(4*sigma + 0.5)
    const taps = Array.from({length: 2*reach + 1}, (_, k) => [k - reach, Math.exp(-((k - reach)**2)/(2*sigma**2))])
    const sum = taps.reduce((total, [, weight]) => total + weight, 0)
    return i => taps.map(([k, weight]) => [i + k, weight/sum])
  }
  const linear = factor => i => {
    const place = (i + 0.5)*factor - 0.5, left = Math.floor(place)
    return [[left, 1 - place + left], [left + 1, place - left]]
  }
  let image = pixels
  if (rows < height) image = along(image, height, width, 0, height, soften(height/rows))
  if (columns < width) image = along(image, height, width, 1, width, soften(width/columns))
  if (rows < height) image = along(image, height, width, 0, rows, linear(height/rows))
  return columns < width ? along(image, rows, width, 1, columns, linear(width/columns)) : image
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

/** {soft, shares, depths, detail_depth, fine, back}: see `Lifted` in Python; null where the picture is too narrow. */
export async function liftRadiograph({pixels, width, height}, networks, about) {
  const {size: S, canvas: C} = about
  const known = shrink(new Float32Array(width*height).fill(1), width, height, S).map(x => x > 0.99 ? 1 : 0)
  if (!known.includes(1)) return null
  const ranks = midRanks(shrink(pixels, width, height, S), known)
  const {quantiles} = await ask(networks.tone, {ranks, known}, S)
  const factor = Math.min(1, about.curve_side/Math.max(width, height))
  const [rows, columns] = [height, width].map(n => Math.max(1, roundHalfEven(n*factor)))
  const curve = curveFromRanks(resize(pixels, height, width, rows, columns), quantiles, about.levels)
  const integrals = toIntegrals(curve, pixels)
  const told = await ask(networks.shares, {picture: shrink(integrals, width, height, S), known}, S)
  const enlarged = enlarge(told.blurred, C, S, height, width), fine = integrals.map((x, i) => x - enlarged[i])
  return {...told, depths: [...told.depths], fine, back: wayBack(curve, about.steps_back)}
}
