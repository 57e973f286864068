// Search, the switch between light and dark, and the drawer of pages on a phone. No library, no network.
const by = id => document.getElementById(id)

by("theme").addEventListener("click", () => {
  const now = document.documentElement.dataset.theme
  const dark = now == "dark" || now == "auto" && matchMedia("(prefers-color-scheme: dark)").matches
  localStorage.setItem("theme", document.documentElement.dataset.theme = dark ? "light" : "dark")
})

by("open-sidebar").addEventListener("click", event => {
  const open = document.body.classList.toggle("drawer")
  event.currentTarget.setAttribute("aria-expanded", open)
})

document.addEventListener("click", event => {
  if (!event.target.closest("search")) show([])
})

// ---- search: the index is read when somebody first looks for something
let index = null
const read = () => index ??= new Promise(done => {
  const script = document.createElement("script")
  script.src = ROOT + "search.js"
  script.onload = () => done(SEARCH)
  document.head.append(script)
})

const plain = text => text.toLowerCase().normalize("NFD").replace(/[\u0300-\u036f]/g, "")

// Every word must occur; a heading counts more than a title, a title more than the text, the beginning of a word more than its middle.
function score([, title, heading, text], words) {
  let total = 0
  for (const word of words) {
    const worth = (where, weight) => {
      const at = plain(where).indexOf(word)
      return at < 0 ? 0 : weight*(at == 0 || /\W/.test(where[at - 1]) ? 2 : 1)*(plain(where) == word ? 3 : 1)
    }
    const best = Math.max(worth(heading || title, 8), worth(title, 4), worth(text, 1))
    if (!best) return 0
    total += best
  }
  return total
}

function excerpt(text, word) {
  const at = Math.max(0, plain(text).indexOf(word) - 40)
  return (at ? "…" : "") + text.slice(at, at + 140)
}

function marked(text, words) {
  const pattern = new RegExp("(" + words.map(w => w.replace(/[.*+?^${}()|[\]\\]/g, "\\$&")).join("|") + ")", "gi")
  return text.split(pattern).map((part, i) => i % 2 ? Object.assign(document.createElement("mark"), {textContent: part}) : part)
}

function show(found, words = []) {
  by("results").hidden = !words.length
  by("search").setAttribute("aria-expanded", words.length > 0)
  by("results").replaceChildren(...found.map(([href, title, heading, text]) => {
    const link = Object.assign(document.createElement("a"), {href: ROOT + href, tabIndex: -1}), line = document.createElement("small"), row = document.createElement("li")
    line.append(...marked(excerpt(text, words[0]), words))
    link.append(...marked(heading ? `${title} › ${heading}` : title, words), line)
    row.setAttribute("role", "option")
    row.append(link)
    return row
  }))
  if (words.length && !found.length) by("results").append(Object.assign(document.createElement("li"), {textContent: "Nothing found", className: "none"}))
}

by("search").addEventListener("input", async () => {
  const words = plain(by("search").value).split(/\s+/).filter(Boolean), entries = await read()
  if (plain(by("search").value).split(/\s+/).filter(Boolean).join() != words.join()) return  // typed on meanwhile
  const scored = words.length ? entries.map(entry => [score(entry, words), entry]).filter(([points]) => points) : []
  show(scored.sort((a, b) => b[0] - a[0]).slice(0, 12).map(([, entry]) => entry), words)
})

document.addEventListener("keydown", event => {
  const typing = event.target.matches("input, textarea"), rows = [...by("results").querySelectorAll("a")]
  if (event.key == "/" && !typing) { event.preventDefault(); by("search").focus() }
  if (event.key == "Escape") { show([]); document.body.classList.remove("drawer") }
  if (!event.target.closest("search") || !rows.length) return
  const at = rows.indexOf(document.activeElement)
  if (event.key == "ArrowDown") { event.preventDefault(); rows[Math.min(at + 1, rows.length - 1)].focus() }
  if (event.key == "ArrowUp") { event.preventDefault(); (rows[at - 1] || by("search")).focus() }
  if (event.key == "Enter" && at < 0) rows[0].click()
})

const here = document.querySelector("#sidebar [aria-current]")
if (here) by("sidebar").scrollTop = here.offsetTop - by("sidebar").clientHeight/2

// ---- the section that is being read, in the table of contents
const seen = new IntersectionObserver(entries => {
  for (const entry of entries) if (entry.isIntersecting) {
    for (const link of document.querySelectorAll("#contents a")) link.toggleAttribute("aria-current", link.hash == "#" + entry.target.id)
  }
}, {rootMargin: "-80px 0px -75% 0px"})
for (const heading of document.querySelectorAll("main :is(h2, h3)[id]")) seen.observe(heading)
