// A file → {pixels, width, height, notes}: grey values 0 … 1, bone bright, as radrotator/radiograph/read.py gives them.
// What is not done here is refused in a sentence: nothing about values, polarity or side is guessed.
import dicomParser from "dicom-parser"
import {convertIndexedToRgb, decode} from "fast-png"
import {inflateSync} from "fflate"
import {Decoder} from "jpeg-lossless-decoder-js"

globalThis.pako = {inflateRaw: inflateSync}  // by this name dicom-parser asks for what inflates a deflated file
export class Refusal extends Error {}
const refuse = reason => { throw new Refusal(`Cannot read this file: ${reason}`) }

export async function readRadiograph(bytes, about) {
  const starts = (...mark) => mark.every((byte, i) => bytes[i] == byte)
  const read = String.fromCharCode(...bytes.subarray(128, 132)) == "DICM" ? readDicom
    : starts(0x89, 0x50, 0x4e, 0x47) ? readPng
    : starts(0xff, 0xd8, 0xff) ? async () => ({...await decodeJpeg(bytes, about), notes: PICTURE})
    : refuse("it is no DICOM file (with DICM after 128 bytes), PNG or JPEG. Give one of these.")
  try {
    const {values, width, height, notes} = await read(bytes, about)
    if (Math.min(width, height) < 16) refuse("it has too few pixels for a radiograph. Give all of it.")
    const [low, high] = ends(values)
    if (!(high > low)) refuse("it is one even grey, or holds values that are no numbers. Give another export of it.")
    return {pixels: Float32Array.from(values, v => (v - low)/(high - low)), width, height, notes}
  } catch (error) {
    if (error instanceof Refusal) throw error
    refuse("it is damaged or cut short. Export it again.")
  }
}

function ends(values) {
  let low = Infinity, high = -Infinity
  for (const v of values) {
    if (!Number.isFinite(v)) return [NaN, NaN]
    if (v < low) low = v
    if (v > high) high = v
  }
  return [low, high]
}

function checkSize(width, height, about) {
  if (width*height > about.most_pixels) refuse("it has more pixels than any radiograph. Scale it down.")
}

function luminance(data, channels, count, weights) {
  const grey = new Float64Array(count)
  for (let i = 0; i < count; i++) {
    const at = i*channels
    grey[i] = channels < 3 ? data[at] : weights[0]*data[at] + weights[1]*data[at + 1] + weights[2]*data[at + 2]
  }
  return grey
}

const PICTURE = ["A picture does not say whether bone is bright, nor which side is which: it is taken for a frontal " +
  "view with bone bright and the patient's right on the left."]

function readPng(bytes, about) {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.length)
  checkSize(view.getUint32(16), view.getUint32(20), about)
  const image = decode(bytes, {checkCrc: true}), {width, height, depth, palette} = image
  if (depth < 8 && !palette) refuse(`its pixels have ${depth} bits, too few to show anatomy. Export it with 8 or 16.`)
  const [data, channels] = palette ? [convertIndexedToRgb(image), palette[0].length] : [image.data, image.channels]
  return {values: luminance(data, channels, width*height, about.luminance), width, height, notes: PICTURE}
}

/** A JPEG stream's process (0: baseline … 3: lossless), bits and size; throws where it has no end. */
function jpegHeader(bytes) {
  const word = i => bytes[i] << 8 | bytes[i + 1]
  let frame = {}
  for (let i = 2; i + 9 < bytes.length && bytes[i] == 0xff; i += 2 + word(i + 2)) {
    const marker = bytes[i + 1]
    if (marker >= 0xc0 && marker <= 0xcf && ![0xc4, 0xc8, 0xcc].includes(marker))
      frame = {process: marker - 0xc0, bits: bytes[i + 4], height: word(i + 5), width: word(i + 7)}
    if (marker != 0xda) continue
    for (let end = bytes.length - 2; end > i; end--) if (word(end) == 0xffd9) return frame
  }
  throw new Error("a JPEG without an end")
}

/** Pixels of a JPEG that browsers decode, upright. */
async function decodeJpeg(bytes, about) {
  const {process, bits, width: w, height: h} = jpegHeader(bytes)
  checkSize(w, h, about)
  if (process > 2 || bits != 8) refuse("it is a JPEG of a kind that browsers do not decode. Export it as PNG.")
  const image = await createImageBitmap(new Blob([bytes]), {colorSpaceConversion: "none"}), {width, height} = image
  const context = new OffscreenCanvas(width, height).getContext("2d")
  context.drawImage(image, 0, 0)
  const {data} = context.getImageData(0, 0, width, height)
  return {values: luminance(data, 4, width*height, about.luminance), width, height}
}

// ---- DICOM ----------------------------------------------------------------------------------------------------------

const PLAIN = ["1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.1.99", "1.2.840.10008.1.2.2"]
const JPEG = ["1.2.840.10008.1.2.4.50", "1.2.840.10008.1.2.4.51", "1.2.840.10008.1.2.4.57", "1.2.840.10008.1.2.4.70"]

async function readDicom(bytes, about) {
  const ds = dicomParser.parseDicom(bytes)
  const text = tag => (ds.string(tag) ?? "").trim().toUpperCase()
  const numbers = tag => text(tag).replaceAll(",", ".").split("\\").map(parseFloat)  // commas are not allowed, but met
  const whole = tag => ds.elements[tag]?.length ? ds.uint16(tag) : undefined
  const [modality, tone, shape] = ["x00080060", "x00280004", "x20500020"].map(text)
  if (/^[A-Z]{1,9}$/.test(modality) && !about.modalities.includes(modality))
    refuse(`its modality is ${modality}, not a plain radiograph. Give a CR, DX or RF picture.`)
  const [height, width, samples, allocated] = ["x00280010", "x00280011", "x00280002", "x00280100"].map(whole)
  if (!height || !width || !ds.elements.x7fe00010) refuse("it holds no image, or is cut short. Give the image itself.")
  checkSize(width, height, about)
  if (numbers("x00280008")[0] > 1) refuse("it holds several pictures. Save one as a file of its own.")
  if (samples != 1 || !["MONOCHROME1", "MONOCHROME2"].includes(tone)) refuse("it is in colour. Export it in grey.")
  if (["MONOCHROME1 IDENTITY", "MONOCHROME2 INVERSE"].includes(`${tone} ${shape}`))
    refuse("its header contradicts itself on whether bone is bright. Export it as PNG, and look at it.")
  const [row, column] = ["x00280030", "x00181164", "x00182010"].map(numbers).find(pair => pair[1] > 0) ?? []
  const aspect = numbers("x00280034")
  if (Math.abs(row/column - 1) > 0.01 || Math.abs(aspect[0]/aspect[1] - 1) > 0.01)
    refuse("its pixels are not square, and would be turned askew. Turn it with the command radrotator rotate.")
  if (ds.elements.x00283000?.items?.length)
    refuse("it has a modality look-up table, which is not applied here. Export it as PNG.")

  const stored = await storedValues(ds, allocated, width, height, about)
  const [slope, intercept] = [numbers("x00281053")[0] || 1, numbers("x00281052")[0] || 0]
  const shown = display(ds, stored.map(v => v*slope + intercept), text, numbers)
  const values = tone == "MONOCHROME1" ? shown.map(v => -v) : shown
  hidePadding(values, stored, ds)
  const notes = tone == "MONOCHROME1" ? ["MONOCHROME1: turned over, so that bone is bright."] : []
  const sign = ds.elements.x00281041?.length ? ds.int16("x00281041") : 0, rising = (tone == "MONOCHROME2") == slope > 0
  if (sign == (rising ? 1 : -1))
    notes.push("The header says that air is brighter than bone: if bone is dark here, tick the box for a negative.")
  if (text("x0008001c") == "YES" && text("x00280301") == "YES")
    notes.push("It is a synthetic picture, and the word that is burnt into it is taken for anatomy.")
  return {...upright(values, width, height, text("x00200020").split("\\"), notes), notes}
}

/** The samples as numbers: only the bits that the header calls stored, with their sign. */
async function storedValues(ds, allocated, width, height, about) {
  const count = width*height, element = ds.elements.x7fe00010, syntax = (ds.string("x00020010") ?? "").trim()
  const bits = ds.uint16("x00280101") ?? allocated, high = ds.uint16("x00280102") ?? bits - 1
  let raw
  if (PLAIN.includes(syntax)) {
    if (![8, 16].includes(allocated)) refuse(`its samples have ${allocated} bits. Export it with 8 or 16.`)
    if (element.length*8 < count*allocated) refuse("its pixel data are cut short. Export the file again.")
    const {buffer, byteOffset} = ds.byteArray, little = !syntax.endsWith(".2.2")
    const view = new DataView(buffer, byteOffset + element.dataOffset)
    raw = Float64Array.from({length: count}, (_, i) => allocated == 8 ? view.getUint8(i) : view.getUint16(2*i, little))
  } else if (JPEG.includes(syntax)) {
    const stream = dicomParser.readEncapsulatedPixelDataFromFragments(ds, element, 0, element.fragments.length)
    const {process, width: w, height: h} = jpegHeader(stream)
    if (w != width || h != height) refuse("the compressed image has another size than its header says. Export it.")
    if (process == 3) raw = Float64Array.from(new Decoder().decode(stream.slice().buffer))
    else raw = (await decodeJpeg(stream, about)).values
  } else refuse("its pixels are compressed in a way that this page does not know. Export it uncompressed.")
  const shift = high - bits + 1, span = 2**bits, signed = ds.uint16("x00280103") == 1
  return raw.map(v => {
    const value = (v >> shift) & span - 1
    return signed && value >= span/2 ? value - span : value
  })
}

/** The VOI LUT or the first window, as in PS3.3 C.11.2; the values themselves where that would leave nothing to see. */
function display(ds, values, text, numbers) {
  const lut = ds.elements.x00283010?.items?.[0]?.dataSet, {x00283006: table, x00283002: size} = lut?.elements ?? {}
  const [centre, width] = [numbers("x00281050")[0], numbers("x00281051")[0]], way = text("x00281056")
  const exact = way == "LINEAR_EXACT", least = exact || way == "SIGMOID" ? 0 : 1
  let shown = values
  if (table?.length && size?.length) {
    const count = lut.uint16("x00283002", 0) || 65536, wide = table.length >= 2*count
    const signed = size.vr == "SS" || ds.uint16("x00280103") == 1
    const first = signed ? lut.int16("x00283002", 1) : lut.uint16("x00283002", 1)
    const entry = i => wide ? lut.uint16("x00283006", i) : lut.byteArray[table.dataOffset + i]
    if (table.length < count) refuse("its look-up table is cut short. Export it again.")
    shown = values.map(v => entry(Math.min(Math.max(Math.round(v) - first, 0), count - 1)))
  } else if (Number.isFinite(centre) && width > 0 && width >= least) {
    const [middle, across] = exact ? [centre, width] : [centre - 0.5, width - 1]
    shown = way == "SIGMOID" ? values.map(v => 1/(1 + Math.exp(-4*(v - centre)/width)))
      : values.map(v => v <= middle - across/2 ? 0 : v > middle + across/2 ? 1 : (v - middle)/across + 0.5)
  }
  const [low, high] = ends(shown)
  return high > low ? shown : values
}

/** Make dark what the header calls padding: the same bits, whatever sign the attribute was written with. */
function hidePadding(values, stored, ds) {
  if (!ds.elements.x00280120?.length) return
  const read = tag => ds.uint16("x00280103") == 1 ? ds.int16(tag) : ds.uint16(tag)
  const first = read("x00280120"), last = ds.elements.x00280121?.length ? read("x00280121") : first
  const padding = stored.map(v => v >= Math.min(first, last) && v <= Math.max(first, last))
  const darkest = values.reduce((least, v, i) => padding[i] ? least : Math.min(least, v), Infinity)
  if (darkest < Infinity) padding.forEach((hide, i) => { if (hide) values[i] = darkest })
}

/** Mirror a picture whose rows run to the patient's right, or columns to the head. */
function upright(values, width, height, way, notes) {
  const [along, down] = way.map(letters => letters[0])
  const mirror = ["LH", "RF", "RH"].includes(`${along}${down}`)
  if (!/^[LR][FH]$/.test(`${along}${down}`))
    notes.push("The header does not say that this is a frontal view, the patient's right on the left: it is taken so.")
  if (!mirror) return {values, width, height}
  notes.push("Stored mirrored: turned, so that the patient's right is on the left.")
  const x = j => along == "R" ? width - 1 - j : j, y = i => down == "H" ? height - 1 - i : i
  return {values: values.map((_, at) => values[y(Math.floor(at/width))*width + x(at % width)]), width, height}
}
