// The page: a file in, sliders, a view, a file out.
import {encode} from "fast-png"
import {liftRadiograph, loadNetworks} from "./lift.js"
import {Refusal, readRadiograph} from "./read.js"
import {Turner} from "./turn.js"

const about = globalThis.ROTATOR_ABOUT, AXES = ["x", "y", "z"]
const $ = id => document.getElementById(id)
const tell = (sentence, wrong = "") => { $("status").textContent = sentence; $("error").textContent = wrong }
const refuse = error => tell("", error instanceof Refusal ? error.message : `Cannot turn this: ${error.message}.`)
const signed = x => `${x < 0 ? "−" : "+"}${Math.abs(x)}`
let turner, networks, shown = null, latest = 0, views = 0

/** The content of one of the page's big files: scripts, because a page in a folder may load nothing else. */
const load = name => new Promise((done, failed) => {
  const script = Object.assign(document.createElement("script"), {src: `rotate/${name}.js`, onerror: failed})
  script.onload = () => done(globalThis[`ROTATOR_${name.toUpperCase()}`])
  document.head.append(script)
})
const pause = milliseconds => new Promise(done => setTimeout(done, milliseconds))
const painted = () => new Promise(done => requestAnimationFrame(() => setTimeout(done)))

// ---- a radiograph in ------------------------------------------------------------------------------------------------

function checkPicture({pixels, width, height}) {
  const counts = new Uint32Array(256)
  for (const v of pixels) counts[Math.trunc(v*255)]++
  const even = Math.max(...counts)/pixels.length
  if (even > about.even) throw new Refusal("Cannot turn this: it is one even grey. Give one that shows a patient.")
  if (Math.max(width, height) > turner.largest)
    throw new Refusal(`Cannot turn this: the graphics here hold ${turner.largest} pixels a side. Scale it down.`)
}

/** Read, lift and show; of two files given in haste the later is shown. */
async function take(bytes, notes) {
  const turn = ++latest
  tell("Reading …")
  await painted()
  try {
    const read = await readRadiograph(bytes, about)
    checkPicture(read)
    if (turn == latest) await show({...read, notes: notes ?? read.notes}, turn)
  } catch (error) { if (turn == latest) refuse(error) }
}

async function show(read, turn) {
  const pixels = $("negative").checked ? read.pixels.map(v => 1 - v) : read.pixels, picture = {...read, pixels}
  tell("Asking the network at which depth everything lies …")
  const ready = await networks
  await painted()
  const start = performance.now(), lifted = await liftRadiograph(picture, ready, about)
  if (turn != latest) return
  if (!lifted) throw new Refusal("Cannot turn a strip so narrow: it shows no anatomy. Give the whole radiograph.")
  turner.take(picture, lifted)
  shown = read
  $("work").hidden = false
  const lines = read.notes.map(note => Object.assign(document.createElement("li"), {textContent: note}))
  $("notes").replaceChildren(...lines)
  draw()
  tell(`${read.width} × ${read.height} pixels, lifted in ${((performance.now() - start)/1000).toFixed(1)} s.`)
}

// ---- views ----------------------------------------------------------------------------------------------------------

const angles = () => AXES.map(axis => $(axis).valueAsNumber)
const describe = () => `x ${signed(angles()[0])}°, y ${signed(angles()[1])}°, z ${signed(angles()[2])}°`

/** Paint the view that the sliders ask for; where the machine is slow, coarsely at once and all of it soon. */
async function draw(split = Number(document.querySelector("[name=show]:checked").value)) {
  const number = ++views, canvas = $("picture"), {width, height} = canvas
  const view = {angles: angles(), detail: $("detail").valueAsNumber, split}
  const write = (id, words) => { document.querySelector(`output[for=${id}]`).textContent = words }
  for (const axis of AXES) write(axis, `${signed($(axis).valueAsNumber)}°`)
  write("detail", $("detail").value)
  const turned = split < 1 && view.angles.some(a => a)
  const words = turned ? `Computed view: ${describe()}` : "The radiograph"
  canvas.ariaLabel = $("caption").textContent = words + (turned && split ? "; left half as it was" : "")
  canvas.ariaBusy = true
  turner.prepare(view)
  const grain = Math.ceil(Math.sqrt(width*height/turner.pixelsIn(30, view.detail)))
  if (grain > 1) turner.paint(view, grain)
  if (grain > 1) await pause(150)
  for (let from = 0, rows; from < height && number == views; from += rows) {
    rows = grain > 1 ? Math.min(height - from, Math.ceil(turner.pixelsIn(50, view.detail)/width)) : height
    turner.paint(view, 1, from, rows)
    if (grain > 1) await pause(0)
  }
  if (number == views) canvas.ariaBusy = false
  return number == views
}

let waiting = false
function drawSoon() {
  if (waiting || !shown) return
  waiting = true
  requestAnimationFrame(() => { waiting = false; draw() })
}

/** The view with its mark, as PNG: the words stand in the picture and in the file. */
async function save() {
  if (!await draw(0)) return
  const {width, height} = $("picture"), page = new OffscreenCanvas(width, height), pen = page.getContext("2d")
  pen.drawImage($("picture"), 0, 0)
  const lines = [`computed view: ${describe()}`, about.title]  // from below
  const size = Math.max(9, Math.min(height/24, width/22))
  Object.assign(pen, {font: `${size}px sans-serif`, fillStyle: "white", lineWidth: size/5, lineJoin: "round"})
  lines.forEach((line, i) => {
    const place = [line, width/50, height - height/50 - 1.25*size*i, 0.96*width]
    pen.strokeText(...place)
    pen.fillText(...place)
  })
  const data = pen.getImageData(0, 0, width, height).data.filter((_, i) => i % 4 == 0)
  const plain = describe().replaceAll("°", "").replaceAll("−", "-")
  const made = `detail ${$("detail").value}, ${$("made").textContent}`
  const text = {Description: `${about.title}. ${plain} degrees; ${made}`}
  const url = URL.createObjectURL(new Blob([encode({width, height, data, channels: 1, text})], {type: "image/png"}))
  const name = `radrotator_${plain.replaceAll(" ", "").replaceAll(",", "_")}.png`
  Object.assign(document.createElement("a"), {href: url, download: name}).click()
  setTimeout(() => URL.revokeObjectURL(url), 60_000)
  drawSoon()
}

// ---- begin ----------------------------------------------------------------------------------------------------------

function listen() {
  for (const axis of AXES) Object.assign($(axis), {min: -about.limit, max: about.limit, value: 0})
  $("detail").value = about.detail
  $("controls").onsubmit = event => event.preventDefault()
  $("controls").oninput = ({target}) => target.id == "negative" ? show(shown, ++latest).catch(refuse) : drawSoon()
  $("reset").onclick = () => { for (const id of [...AXES, "detail"]) $(id).value = about[id] ?? 0; drawSoon() }
  $("save").onclick = save
  const open = async file => file && take(new Uint8Array(await file.arrayBuffer()))
  $("file").onchange = ({target}) => { open(target.files[0]); target.value = "" }
  $("example").onclick = async () => {
    const bytes = Uint8Array.from(atob(await load("example")), letter => letter.charCodeAt(0))
    take(bytes, ["The example is computed from a phantom: it shows nobody."])
  }
  for (const name of ["dragover", "dragleave", "drop"]) addEventListener(name, event => {
    event.preventDefault()
    $("drop").classList.toggle("over", name == "dragover")
    if (name == "drop") open(event.dataTransfer.files[0])
  })
}

async function begin() {
  document.documentElement.dataset.theme = localStorage.theme  // as it was chosen on the site's other pages
  $("made").textContent = `radrotator ${about.version} in the browser, weights ${about.weights}`
  listen()
  if (location.protocol.startsWith("http")) navigator.serviceWorker?.register("rotate-offline.js", {scope: "rotate"})
  try {
    turner = new Turner($("picture"), about)
    networks = Promise.all([load("runtime"), load("model")]).then(([runtime, files]) => loadNetworks(runtime, files))
    await networks
    if (!shown && !latest) tell("Ready: open a radiograph, or take the example.")
  } catch (error) {
    $("drop").hidden = true
    tell("", `Cannot turn pictures in this browser: ${error.message ?? "a file of this page is missing"}.`)
  }
}

begin()
