// node build.mjs MODEL.onnx EXAMPLE.png FOLDER: writes FOLDER/rotate.html and what it needs, from MODEL.onnx,
// MODEL-tone.onnx and MODEL.json (`radrotator export`). All of it is scripts and a style sheet, so that the page opens
// from a plain folder, too.
import {build} from "esbuild"
import {createHash} from "node:crypto"
import {existsSync, mkdirSync, readdirSync, readFileSync, writeFileSync} from "node:fs"

const [model, example, out] = process.argv.slice(2), here = new URL(".", import.meta.url).pathname
const base64 = path => readFileSync(path).toString("base64")
const beside = ending => model.replace(/\.onnx$/, ending)
const folder = `${out}/rotate`, packages = `${here}node_modules`
mkdirSync(folder, {recursive: true})
const write = (name, value, place) =>
  writeFileSync(`${folder}/${name}`, `globalThis.${place} = ${JSON.stringify(value)}\n`)

const about = JSON.parse(readFileSync(beside(".json")))
write("about.js", about, "ROTATOR_ABOUT")
write("model.js", {shares: base64(model), tone: base64(beside("-tone.onnx"))}, "ROTATOR_MODEL")
write("example.js", base64(example), "ROTATOR_EXAMPLE")
write("runtime.js", base64(`${packages}/onnxruntime-web/dist/ort-wasm-simd-threaded.wasm`), "ROTATOR_RUNTIME")
for (const [from, to] of [["rotate.html", "rotate.html"], ["rotate.css", "rotate/rotate.css"]])
  writeFileSync(`${out}/${to}`, readFileSync(here + from))

const options = {bundle: true, minify: true, format: "iife", target: "es2022", logLevel: "warning", metafile: true,
  loader: {".glsl": "text"}}
const {metafile} = await build({...options, entryPoints: [`${here}src/page.js`], outfile: `${folder}/rotate.js`})
const used = new Set(Object.keys(metafile.inputs).map(path => path.match(/node_modules\/((?:@[^/]+\/)?[^/]+)/)?.[1]))
const texts = [...used].filter(Boolean).sort().map(name => {
  const licence = readdirSync(`${packages}/${name}`).find(file => /^licen[cs]e/i.test(file))
  const {version, license} = JSON.parse(readFileSync(`${packages}/${name}/package.json`))
  return `${name} ${version} (${license})\n\n${licence ? readFileSync(`${packages}/${name}/${licence}`) : ""}`
})
writeFileSync(`${folder}/LICENSES.txt`, texts.join(`\n${"-".repeat(80)}\n\n`))

const files = ["rotate.html", ...readdirSync(folder).sort().map(name => `rotate/${name}`)]
const hash = createHash("sha256")
for (const file of files) hash.update(readFileSync(`${out}/${file}`))
const define = {CACHE: JSON.stringify(`rotate-${hash.digest("hex").slice(0, 12)}`), FILES: JSON.stringify(files)}
await build({...options, entryPoints: [`${here}src/offline.js`], outfile: `${out}/rotate-offline.js`, define})
