// Turning is geometry: plane homographies and their gains in a fragment shader, as in radrotator/geometry.py and
// radrotator/model/heads.py.
import LOOK from "./shaders/look.glsl"
import SOFT from "./shaders/soft.glsl"
import VIEW from "./shaders/view.glsl"

/** R = Rz·Ry·Rx about fixed patient axes, degrees. */
function rotation(angles) {
  const [[a, p], [b, q], [c, r]] = angles.map(x => x*Math.PI/180).map(x => [Math.cos(x), Math.sin(x)])
  return [[c*b, c*q*p - r*a, c*q*a + r*p], [r*b, r*q*p + c*a, r*q*a - c*p], [-q, b*p, b*a]]
}

const cross = (a, b) => [a[1]*b[2] - a[2]*b[1], a[2]*b[0] - a[0]*b[2], a[0]*b[1] - a[1]*b[0]]
const dot = (a, b) => a[0]*b[0] + a[1]*b[1] + a[2]*b[2]

/** For each plane y = d: rotated image → input image, both in units of `half` mm; column by column, for WebGL. */
function planeHomographies(R, depths, half, sod) {
  return Float32Array.from(depths.flatMap(d => {
    const f = half*(sod - d)/sod
    const [x, y, z] = R.map(row => [-f*row[0], -f*row[2], d*row[1]])
    const rows = [x.map(v => -sod/half*v), z.map(v => -sod/half*v), [-y[0], -y[1], sod - y[2]]]
    const columns = [0, 1, 2].map(i => rows.map(row => row[i]))
    const inverse = [[1, 2], [2, 0], [0, 1]].map(([i, j]) => cross(columns[i], columns[j]))
    const det = dot(columns[0], inverse[0])
    return [0, 1, 2].flatMap(i => inverse.map(row => row[i]/det))
  }))
}

/** Where the detail of each pixel of the view comes from: S × S of (du, dw, gain, 0). */
function detailField(R, depth, size, half, sod, rounds) {
  const field = new Float32Array(4*size*size), h = half/sod, last = size - 1
  const source = R[1].map(v => sod*v)
  const at = (row, column) => depth[Math.min(Math.max(row, 0), last)*size + Math.min(Math.max(column, 0), last)]
  const bilinear = (u, w) => {
    const [x, y] = [u, w].map(v => Math.min(Math.max(((v + 1)*size - 1)/2, 0), last))
    const column = Math.floor(x), row = Math.floor(y), s = x - column, t = y - row
    const line = r => at(r, column)*(1 - s) + at(r, column + 1)*s
    return line(row)*(1 - t) + line(row + 1)*t
  }
  for (let i = 0; i < size*size; i++) {
    const u = (2*(i % size) + 1)/size - 1, w = (2*Math.floor(i/size) + 1)/size - 1, out = [-h*u, -1, -h*w]
    const ray = [0, 1, 2].map(j => R[0][j]*out[0] + R[1][j]*out[1] + R[2][j]*out[2])
    let [x, y] = [u, w]
    for (let round = 0; round < rounds; round++) {
      const d = bilinear(x, y), way = (d - source[1])/ray[1]
      x = -(source[0] + way*ray[0])*sod/(sod - d)/half
      y = -(source[2] + way*ray[2])*sod/(sod - d)/half
    }
    const oblique = Math.hypot(...out)/Math.abs(dot(out, R.map(row => row[1])))
    field.set([x - u, y - w, oblique/Math.sqrt(1 + h*h*(x*x + y*y)), 0], 4*i)
  }
  return field
}

const VERTEX = `#version 300 es
void main() { gl_Position = vec4(vec2(gl_VertexID & 1, gl_VertexID >> 1)*4. - 1., 0., 1.); }`

/** Draws views of one radiograph on a canvas. */
export class Turner {
  constructor(canvas, about) {
    const gl = this.gl = canvas.getContext("webgl2", {alpha: false, antialias: false, preserveDrawingBuffer: true})
    if (!gl?.getExtension("EXT_color_buffer_float")) throw new Error("no WebGL2 with floating-point targets")
    const [soft, small, buffer] = [gl.createFramebuffer(), gl.createFramebuffer(), gl.createRenderbuffer()]
    Object.assign(this, {canvas, about, soft, small, buffer, textures: {}, cost: {}})
    this.coarse = this.program(SOFT)
    this.view = this.program(VIEW)
  }

  program(main) {
    const {gl} = this, program = gl.createProgram()
    const fragment = `#version 300 es\n#define K ${this.about.slabs}\n${LOOK}${main}`
    for (const [kind, source] of [[gl.VERTEX_SHADER, VERTEX], [gl.FRAGMENT_SHADER, fragment]]) {
      const shader = gl.createShader(kind)
      gl.shaderSource(shader, source)
      gl.compileShader(shader)
      gl.attachShader(program, shader)
    }
    gl.linkProgram(program)
    if (!gl.getProgramParameter(program, gl.LINK_STATUS)) throw new Error("a shader does not compile")
    return program
  }

  /** Put numbers where shaders can look them up; `layers` of them, or one image of one or four numbers a pixel. */
  load(name, values, width, height, layers = 0, four = false) {
    const {gl} = this, kind = layers ? gl.TEXTURE_2D_ARRAY : gl.TEXTURE_2D
    const [inside, format] = four ? [gl.RGBA32F, gl.RGBA] : [gl.R32F, gl.RED]
    const texture = this.textures[name] ??= {kind, id: gl.createTexture()}
    gl.bindTexture(kind, texture.id)
    for (const filter of [gl.TEXTURE_MIN_FILTER, gl.TEXTURE_MAG_FILTER]) gl.texParameteri(kind, filter, gl.NEAREST)
    if (layers) gl.texImage3D(kind, 0, inside, width, height, layers, 0, format, gl.FLOAT, values)
    else gl.texImage2D(kind, 0, inside, width, height, 0, format, gl.FLOAT, values)
  }

  get largest() { return this.gl.getParameter(this.gl.MAX_TEXTURE_SIZE) }

  /** Take a lifted radiograph. */
  take({pixels, width, height}, lifted) {
    const {size: S, canvas: C, slabs: K, rim} = this.about, rows = Math.ceil(lifted.back.table.length/128)
    const table = new Float32Array(128*(rows + 1)).fill(lifted.back.table.at(-1))
    table.set(lifted.back.table)
    Object.assign(this.canvas, {width, height})
    Object.assign(this, {lifted, wide: S + 2*rim})
    this.load("soft", lifted.soft, C, C, K)
    this.load("shares", lifted.shares, S, S, K)
    this.load("fine", lifted.fine, width, height)
    this.load("before", pixels, width, height)
    this.load("table", table, 128, rows + 1)
    this.load("coarse", null, this.wide, this.wide)
  }

  /** One pass over all pixels of a target. */
  pass(program, half, R, size, numbers) {
    const {gl, about} = this, place = name => gl.getUniformLocation(program, name)
    gl.useProgram(program)
    gl.viewport(0, 0, ...size)
    gl.uniformMatrix3fv(place("planes"), false, planeHomographies(R, this.lifted.depths, half, about.sod))
    gl.uniform3fv(place("normal"), R.map(row => row[1]))
    for (const [name, value] of Object.entries({h: half/about.sod, ...numbers})) gl.uniform1f(place(name), value)
    Object.entries(this.textures).filter(([name]) => place(name)).forEach(([name, {kind, id}], unit) => {
      gl.activeTexture(gl.TEXTURE0 + unit)
      gl.bindTexture(kind, id)
      gl.uniform1i(place(name), unit)
    })
    gl.drawArrays(gl.TRIANGLES, 0, 3)
  }

  /** Make ready to paint a view: {angles, detail, split: share of the width, at the left, that stays as it was}. */
  prepare({angles}) {
    const {gl, about, wide, lifted} = this, half = about.fov/2, R = rotation(angles)
    gl.activeTexture(gl.TEXTURE0)
    const field = detailField(R, lifted.detail_depth, about.size, half, about.sod, about.rounds)
    this.load("field", field, about.size, about.size, 0, true)
    gl.bindFramebuffer(gl.FRAMEBUFFER, this.soft)
    gl.framebufferTexture2D(gl.FRAMEBUFFER, gl.COLOR_ATTACHMENT0, gl.TEXTURE_2D, this.textures.coarse.id, 0)
    this.pass(this.coarse, half*wide/about.size, R, [wide, wide], {wide})
  }

  /** Paint rows of the view that was made ready, or all of it `grain` times as coarse; measure what a pixel costs. */
  paint({angles, detail, split}, grain, from = 0, rows = this.canvas.height) {
    const {gl, about, canvas: {width, height}} = this, size = [width, height].map(n => Math.ceil(n/grain))
    const {low, scale} = this.lifted.back, start = performance.now()
    const numbers = {detail, low, scale, steps: about.steps_back, split: angles.some(x => x) ? split : 1, grain}
    gl.bindFramebuffer(gl.FRAMEBUFFER, grain > 1 ? this.small : null)
    if (grain > 1) {
      gl.bindRenderbuffer(gl.RENDERBUFFER, this.buffer)
      gl.renderbufferStorage(gl.RENDERBUFFER, gl.RGBA8, ...size)
      gl.framebufferRenderbuffer(gl.FRAMEBUFFER, gl.COLOR_ATTACHMENT0, gl.RENDERBUFFER, this.buffer)
    } else {
      gl.enable(gl.SCISSOR_TEST)
      gl.scissor(0, height - from - rows, width, rows)
    }
    this.pass(this.view, about.fov/2, rotation(angles), size, numbers)
    gl.disable(gl.SCISSOR_TEST)
    gl.readPixels(0, 0, 1, 1, gl.RGBA, gl.UNSIGNED_BYTE, new Uint8Array(4))  // waits until it is done
    this.cost[detail < 1] = (performance.now() - start)/(grain > 1 ? size[0]*size[1] : width*rows)
    if (grain == 1) return
    gl.bindFramebuffer(gl.DRAW_FRAMEBUFFER, null)
    gl.blitFramebuffer(0, 0, ...size, 0, 0, width, height, gl.COLOR_BUFFER_BIT, gl.LINEAR)
  }

  /** How many pixels can be painted in so many milliseconds; before any was, few. */
  pixelsIn(milliseconds, detail) { return milliseconds/(this.cost[detail < 1] ?? 1e-3) }
}
