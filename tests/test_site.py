"""The documentation: what `make docs` renders is opened page by page in a real browser, on a phone's width; what Quarto
publishes (_quarto.yml and the workflow) is checked as far as that goes without Quarto."""
import json, re, subprocess, sys
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from types import SimpleNamespace

import pytest
import yaml
from nbdev.config import get_config
from PIL import Image
from scripts import load_script, one_folder

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted(p.relative_to(ROOT/"nbs").as_posix() for p in (ROOT/"nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
QUARTO = yaml.safe_load((ROOT/"_quarto.yml").read_text(encoding="utf-8"))
PHONE, DESK = dict(width=390, height=844), dict(width=1280, height=900)

# What is wrong with a page, in words. Code may hold whatever it likes but nbdev's and Quarto's directives.
LOOK = r"""() => {
  const wrong = []
  const say = (words, thing) => wrong.push(`${words}: ${String(thing).slice(0, 120)}`)
  const text = [...document.querySelectorAll("main :not(pre, code, pre *, code *, math *, annotation)")].flatMap(e => [...e.childNodes]).filter(n => n.nodeType == 3).map(n => n.data).join(" ⏎ ")
  for (const raw of [":::", /@(fig|tbl|sec|eq)-\w+/, /\{[#.][\w-]+/, /\$[^$ ][^$]*\$/, /\\\(|\\\[/, /\]\([^)]*\)/, /\*\*\w[^*⏎]*\*\*/, /\S+\.ipynb/]) { const found = text.match(raw); if (found) say("raw markup", found[0]) }
  for (const pre of document.querySelectorAll("main pre")) { const found = pre.innerText.match(/^\s*#\s*\|.*/m); if (found) say("raw directive", found[0]) }
  for (const raw of [/Traceback \(most recent call last\)/, /<[\w.]+ object at 0x\w+>/, /<matplotlib\.[^>]*>/, /<Figure size[^>]*>/]) { const found = document.querySelector("main").innerText.match(raw); if (found) say("stored output", found[0]) }
  for (const pre of document.querySelectorAll("pre.error")) say("stored error", pre.innerText)
  for (const img of document.images) {
    if (!img.complete || !img.naturalWidth) say("missing picture", img.getAttribute("src"))
    if (!(img.alt || "").trim()) say("picture without words for those who cannot see it (fig-cap or fig-alt)", img.getAttribute("src"))
  }
  for (const math of document.querySelectorAll("math")) if (math.querySelector("merror") || math.getBoundingClientRect().width < 2) say("equation not drawn", math.textContent)
  for (const math of document.querySelectorAll("span.math")) say("equation left as TeX", math.textContent)
  const wide = document.documentElement.scrollWidth
  if (wide > innerWidth) say("wider than the screen", `${wide} pixels of ${innerWidth}, ` + [...document.querySelectorAll("main *")].filter(e => e.getBoundingClientRect().right > innerWidth + 1 && !e.closest("pre, .scroll")).map(e => e.tagName + " " + e.className).slice(0, 3))
  const names = document.querySelector("main .names"), signature = document.querySelector("main .signature")
  if (signature && !(names && names.compareDocumentPosition(signature) & Node.DOCUMENT_POSITION_FOLLOWING)) say("no list of names above", signature.previousElementSibling?.id)
  for (const link of document.querySelectorAll(".names a[href='#']")) say("a name that leads nowhere", link.innerText)
  if (document.querySelectorAll("h1").length != 1) say("not one title", document.querySelectorAll("h1").length)
  for (const thing of document.querySelectorAll("button, input, nav")) if (!(thing.getAttribute("aria-label") || thing.innerText || [...thing.labels ?? []].map(label => label.innerText).join("")).trim()) say("no name for a screen reader", thing.outerHTML)
  for (const link of document.querySelectorAll("a[href]")) if (!(link.innerText || link.textContent || link.getAttribute("aria-label") || "").trim() && !link.querySelector("img[alt]")) say("link without words", link.href)
  const ids = [...document.querySelectorAll("[id]")].map(e => e.id), twice = ids.filter((id, i) => ids.indexOf(id) != i)
  if (twice.length) say("the same anchor twice", twice)
  return {wrong, ids, links: [...document.querySelectorAll("a[href]")].map(a => a.href)}
}"""

# What a reader cannot see without scrolling sideways.
CUT = """selector => [...document.querySelectorAll(selector)].filter(e => e.scrollWidth > e.clientWidth + 1)
  .map(e => `cut at ${innerWidth} pixels: ${e.tagName} ${e.className}, ${e.innerText.slice(0, 60).replace(/\\s+/g, " ")}`)"""
CODE, ALL_THAT_IS_WIDE = "main pre", "main pre, main .scroll"  # on a phone a large table or equation may scroll in its box

# The lowest contrast of text and ground among the elements that match, by WCAG 2.
CONTRAST = """selector => {
  const parse = c => { const x = document.createElement("canvas").getContext("2d"); x.fillStyle = c; x.fillRect(0, 0, 1, 1); return [...x.getImageData(0, 0, 1, 1).data] }
  const light = c => parse(c).slice(0, 3).map(v => v/255).map(v => v <= 0.04045 ? v/12.92 : ((v + 0.055)/1.055)**2.4).reduce((sum, v, i) => sum + v*[0.2126, 0.7152, 0.0722][i], 0)
  const ground = e => { for (; e; e = e.parentElement) { const c = getComputedStyle(e).backgroundColor; if (parse(c)[3] == 255) return c } return "white" }
  const ratio = e => { const [a, b] = [light(getComputedStyle(e).color), light(ground(e))]; return (Math.max(a, b) + 0.05)/(Math.min(a, b) + 0.05) }
  return Math.min(...[...document.querySelectorAll(selector)].map(ratio))
}"""


@pytest.fixture(scope="session")
def docs():
    "`.ci/docs.py` as a module"
    return load_script("docs")


@pytest.fixture(scope="session")
def site(tmp_path_factory):
    "The whole site, rendered once for all workers of pytest-xdist"
    with one_folder(tmp_path_factory, "site") as site:
        if not (site/"search.js").exists():
            command = sys.executable, ROOT/".ci"/"docs.py", "--to", site
            done = subprocess.run(command, capture_output=True, text=True, timeout=900)
            assert done.returncode == 0, done.stdout + done.stderr
    return site


@pytest.fixture
def screen(browser):
    "A page of the browser, which notes what it complains of and whatever it asks of the network"
    context = browser.new_context(viewport=PHONE, color_scheme="light")
    context.set_default_timeout(120_000)
    page = context.new_page()
    page.wrong = []
    page.on("console", lambda message: message.type == "error" and page.wrong.append(f"console: {message.text}"))
    page.on("pageerror", lambda error: page.wrong.append(f"script: {error}"))
    page.on("request", lambda request: request.url.startswith(("file:", "data:")) or page.wrong.append(f"asks the network for {request.url}"))
    yield page
    context.close()


def look(screen, path):
    "What is wrong with the page at `path`, its anchors, and its links"
    screen.wrong.clear()
    screen.goto(path.as_uri(), wait_until="load")
    seen = screen.evaluate(LOOK)
    cut = screen.evaluate(CUT, CODE)
    screen.set_viewport_size(DESK)
    cut += screen.evaluate(CUT, ALL_THAT_IS_WIDE)
    screen.set_viewport_size(PHONE)
    return screen.wrong + seen["wrong"] + cut, set(seen["ids"]), seen["links"]


def broken(seen):
    "The links to files or anchors that are not there, from {path: (wrong, ids, links)}"
    for path, (_, _, links) in seen.items():
        for link in links:
            if not link.startswith("file:"): continue
            target, _, anchor = link.removeprefix("file://").partition("#")
            if Path(target) in seen:
                if anchor and anchor not in seen[Path(target)][1]: yield f"{path.name}: no anchor {target.rpartition('/')[2]}#{anchor}"
            elif not Path(target).is_file(): yield f"{path.name}: no page {link}"


# ---- in the browser --------------------------------------------------------------------------------------------------

def test_every_page_is_fit_to_be_read(site, screen):
    pages = sorted(site.rglob("*.html"))
    assert len(pages) == len(NOTEBOOKS) + (site/"rotate.html").exists()
    seen = {path: look(screen, path) for path in pages}
    wrong = [f"{path.relative_to(site)}: {words}" for path, (found, *_) in seen.items() for words in found]
    assert not wrong + list(broken(seen)), "\n".join(wrong + list(broken(seen)))


def test_what_is_wrong_is_seen(tmp_path, screen):
    "The checks above, on a page with every fault that they know"
    (tmp_path/"bad.html").write_text(f"""<!doctype html><h1>a</h1><h1>b</h1><main><p>::: {{.callout-note}} as @fig-one shows, $x_t$ and see 03_drr.ipynb</p>
        <pre>#| export\nx = 1</pre><pre class=error>E</pre><pre>Traceback (most recent call last)</pre><p>&lt;matplotlib.axes&gt;</p><img src=gone.png><div style="width: 900px">wide</div>
        <pre style="white-space: pre; overflow: auto">{"x"*400}</pre><div class=scroll style="overflow: auto"><p style="width: 2000px">t</div><h3 id=f>f</h3><div class=signature></div><p class=names><a href="#">g</a></p>
        <span class=math>x</span><button></button><p id=a><p id=a><a href=#nowhere>x</a><a href=gone.html>y</a><a href=http://localhost:9/>z</a></main><script>nonsense()</script>""", encoding="utf-8")
    seen = {tmp_path/"bad.html": look(screen, tmp_path/"bad.html")}
    words = "\n".join(seen[tmp_path/"bad.html"][0] + list(broken(seen)))
    for fault in ("raw markup: :::", "raw markup: @fig-one", "raw markup: $x_t$", "raw markup: 03_drr.ipynb", "raw directive: #| export", "stored error", "stored output: Traceback", "stored output: <matplotlib",
                  "missing picture: gone.png", "picture without words", "wider than the screen", "equation left as TeX", "no name for a screen reader", "the same anchor twice", "not one title: 2",
                  "cut at 390 pixels: PRE", "cut at 1280 pixels: PRE", "cut at 1280 pixels: DIV scroll", "no list of names above: f", "a name that leads nowhere: g", "no anchor bad.html#nowhere", "no page", "script: ", "console: "):
        assert fault in words, fault
    assert "localhost" not in words  # links to elsewhere are nobody's promise


def test_equations_pictures_and_signatures_are_there(site, screen):
    "The checks of every page could pass on empty ones"
    screen.goto((site/"20_model"/"sample.html").as_uri())
    count = lambda selector: screen.locator(selector).count()
    assert count("math[display=block]") >= 2 and count("figure img") >= 2 and count(".signature") >= 5 and count("pre .kw") > 10
    assert screen.locator("figcaption").first.inner_text().startswith("Figure\N{NO-BREAK SPACE}1: ")
    assert screen.locator(".signature .source").first.get_attribute("href").startswith(get_config(path=ROOT).git_url)
    assert "(x_t, t) → clean image" in screen.locator("#ddim + .signature dl").inner_text()
    screen.goto((site/"index.html").as_uri())
    assert "make demo" in screen.locator("main").inner_text()
    moving = site/screen.locator("main img[src$=\"sweep.webp\"]").get_attribute("src")
    assert Image.open(moving).n_frames > 20 and moving.stat().st_size < 1_500_000


def test_an_api_page_begins_with_its_names(site, screen):
    "Those that the module exports, and what its classes do; the page of the API has them all"
    from radrotator.rotate import rotator
    screen.goto((site/"31_rotate"/"rotator.html").as_uri())
    names = screen.locator("main .names")
    assert sorted(names.locator("dt").all_inner_texts()) == sorted(rotator.__all__) and names.locator("dt").first.inner_text() == "RadRotator"
    assert {"#radrotator.from_pretrained", "#radrotator.rotate", "#radrotator.write_sweep"} <= {link.get_attribute("href") for link in names.locator("dd a").all()}
    assert screen.locator("[id='radrotator.rotate'] + .signature dl").inner_text().count("degrees")
    screen.goto((site/"api.html").as_uri())
    linked = {link.get_attribute("href") for link in screen.locator("main .names a").all()}
    assert {"31_rotate/rotator.html#radrotator", "10_ct/volume.html#ct", "core.html#radrotatorerror"} <= linked


def test_search_finds_and_leads_there(site, screen):
    screen.goto((site/"tutorials"/"rotate_a_radiograph.html").as_uri())
    screen.keyboard.press("/")
    screen.keyboard.type("dpm_solver")
    screen.locator("#results a").first.wait_for()
    assert "dpm_solver" in screen.locator("#results a").first.inner_text()
    screen.keyboard.press("Enter")
    screen.wait_for_url("**/sample.html#dpm_solver")
    screen.locator("#search").fill("xylophone")
    screen.get_by_text("Nothing found").wait_for()
    assert not screen.wrong


def test_light_dark_and_contrast(site, screen):
    screen.goto((site/"20_model"/"sample.html").as_uri())
    paper = lambda: screen.evaluate("getComputedStyle(document.body).backgroundColor")
    readable = lambda: {s: screen.evaluate(CONTRAST, s) for s in ("main p", "main a", ".lead", "figcaption", "#sidebar summary, #sidebar a", "pre code", "pre .kw", "pre .st", "pre .dv", "pre .co", "pre .fu, pre .bu")}
    light, found = paper(), readable()
    assert min(found.values()) >= 4.5, found
    screen.click("#theme")
    dark, found = paper(), readable()
    assert dark != light and min(found.values()) >= 4.5, found
    for _ in range(20):  # Chromium hands what is stored from page to page in its own time
        screen.wait_for_timeout(100)
        screen.goto((site/"index.html").as_uri())
        if paper() == dark: break
    assert paper() == dark  # the choice is kept
    screen.click("#theme")
    assert paper() == light
    screen.evaluate("localStorage.clear()")
    screen.emulate_media(color_scheme="dark")
    screen.reload()
    assert paper() == dark  # and without one the system's is taken


def test_with_the_keyboard_and_on_a_phone(site, screen):
    screen.goto((site/"20_model"/"sample.html").as_uri())
    screen.keyboard.press("Tab")
    assert screen.evaluate("document.activeElement.className") == "skip" and screen.locator(".skip").bounding_box()["x"] >= 0
    for _ in range(6):
        screen.keyboard.press("Tab")
        assert screen.evaluate("parseFloat(getComputedStyle(document.activeElement).outlineWidth)") >= 1, screen.evaluate("document.activeElement.outerHTML.slice(0, 200)")
    pages = screen.locator("#sidebar")
    assert not pages.is_visible()
    screen.click("#open-sidebar")
    assert pages.is_visible() and pages.locator("a").count() == len(NOTEBOOKS) and pages.locator("[aria-current=page]").inner_text() == "Sample"
    screen.keyboard.press("Escape")
    assert not pages.is_visible()
    screen.set_viewport_size(DESK)
    assert pages.is_visible() and screen.locator("#contents").is_visible() and not screen.locator("#open-sidebar").is_visible()
    here = [item["text"] for item in QUARTO["website"]["navbar"]["left"] if (site/item["href"]).with_suffix(".html").exists()]
    assert screen.locator(".places a").all_inner_texts() == here
    folded = pages.locator("details", has=screen.get_by_text("Phantom", exact=True))
    assert not folded.locator("a").first.is_visible() and pages.locator("details[open]").count() == 1
    folded.locator("summary").press("Enter")
    assert folded.locator("a").all_inner_texts()[0] == "Grid and labels" and folded.locator("a").first.is_visible()
    assert not screen.wrong


# ---- without one -----------------------------------------------------------------------------------------------------

def cell(kind, source, *outputs): return dict(cell_type=kind, metadata={}, source=source, outputs=list(outputs))


def test_a_notebook_becomes_a_page(docs, tmp_path):
    "Directives, captions, cross references, callouts, links, errors: each as Quarto would show it"
    page = docs.Page("tutorials/one.ipynb", "Tutorials")
    settings = SimpleNamespace(doc_host="https://a.example", doc_baseurl="/b")
    png = dict(output_type="display_data", data={"image/png": "iVBORw0KGgo=", "text/plain": "<Figure>"})
    said = dict(output_type="stream", name="stdout", text=["three ``` ticks\n"])
    soup = docs.body_of(page, dict(cells=[
        cell("raw", "---\ntitle: One\ndescription: With `code`\n---"),
        cell("markdown", "## Part\n\nAs @fig-one shows, $x^2$; [other](../03_drr.ipynb#walk), [`f`](https://a.example/b/drr.html#f).\n\n::: {.callout-important}\n## Mind\nthis\n:::\n\n::: {.callout-note}\nthat\n:::"),
        cell("code", '#| label: fig-one\n#| fig-cap: "A: *curve*"\nplot()', png), cell("code", "#| echo: false\nhidden()", said),
        cell("code", "nothing()", dict(output_type="error", traceback=["Oh"]))]), tmp_path, settings)
    one = lambda selector: soup.select_one(selector)
    assert (page.href, page.title, one(".lead code").text) == ("tutorials/one.html", "One", "code")
    assert one('a[href="#fig-one"]').text == "Figure\N{NO-BREAK SPACE}1" and one("#fig-one figcaption").text == "Figure\N{NO-BREAK SPACE}1: A: curve" and one("#fig-one img")["alt"] == "A: curve"
    assert (tmp_path/"tutorials"/one("#fig-one img")["src"]).read_bytes() == b"\x89PNG\r\n\x1a\n"
    assert one('a[href="../drr.html#walk"]') and one('a[href="../drr.html#f"]')
    assert [title.text for title in soup.select(".callout > .callout-title")] == ["Mind", "Note"]
    assert "plot()" in soup.text and "#|" not in soup.text and "hidden()" not in soup.text and "three ``` ticks" in one("pre.output").text and one("pre.error")
    assert one("math") and [entry[:3] for entry in page.sections] == [("part", "Part", "h2")]


def test_what_goes_to_nbdev_is_ready_for_it(docs):
    "The introduction is not taken for front matter, and nothing runs for an import in it"
    cells = [cell("markdown", "# T\n\n> d\n\nIntro\n\n- a: b"), cell("code", "import os\nfrom pathlib import Path"), cell("code", "import os\nos.abort()"), cell("code", "#| export\nimport os\nx = 1")]
    made = json.loads(docs.ready(json.dumps(dict(cells=cells))))["cells"]
    assert [c["source"] for c in made] == ["# T\n\n> d\n\n", "Intro\n\n- a: b", cells[1]["source"], "#| eval: false\n" + cells[2]["source"], cells[3]["source"]]
    settings = get_config(path=ROOT)
    assert docs.outward("[c](../../CITATION.cff) [d](../02_phantom.ipynb)", PurePosixPath("tutorials"), settings) == f"[c]({settings.git_url}/blob/{settings.branch}/CITATION.cff) [d](../02_phantom.ipynb)"


class Turned:
    "Kept *as is*."
    def __init__(self,
        picture: Path,       # (H, W) in [0, 1], from `read`
        angle: float = 1.5, unit: str = "°",  # how far
        **sampling,          # steps
    ):
        "Not a docment:"
        assert picture  # of the input
    @property
    def inverse(self): "Turned back."


@dataclass
class Held:
    "One."
    size: int = 3             # pixels
    names: list[Path] = None  # of files


def test_a_definition_shows_its_docments(monkeypatch):
    monkeypatch.syspath_prepend(ROOT/".ci")
    from signatures import Signature
    monkeypatch.chdir(ROOT)  # where nbdev finds its settings
    text = Signature(Turned)._repr_markdown_()
    assert text.startswith("### Turned\n\n::: {.signature}") and "Turned(picture, angle=1.5, unit='°', **sampling)" in text and r"Kept \*as is\*." in text
    for name, kind, words in (("picture", "`Path`", "(H, W) in [0, 1], from `read`"), ("angle", "`float = 1.5`", "how far"), ("unit", "`str = '°'`", "how far")): assert f"[{name}]{{.parameter}} {kind}\n:   {words}" in text
    assert "[\\*\\*sampling]{.parameter}\n:   steps" in text and "[inverse]{.parameter #turned.inverse} `property`\n:   Turned back." in text and "returns" not in text
    text = Signature(Held)._repr_markdown_()
    assert "[size]{.parameter} `int = 3`\n:   pixels" in text and "[names]{.parameter} `list[Path] = None`\n:   of files" in text


def test_the_menu_is_the_house(docs):
    "Every notebook stands in it once; a wing is a section, whole and in the order of its numbers; few places in the bar"
    sections = [(title, [name for name, _ in entries]) for title, entries in docs.sections_of(QUARTO["website"]["sidebar"])]
    assert sorted(name for _, names in sections for name in names) == NOTEBOOKS
    folders = {title: {str(PurePosixPath(name).parent) for name in names} for title, names in sections if title}
    assert all(len(found) == 1 for found in folders.values()), folders
    wings = [(next(iter(folders[title])), names) for title, names in sections if title and title != "Tutorials"]
    assert wings == sorted((folder, sorted(names)) for folder, names in wings) and wings[0][0] == "."
    alone = [names[0] for title, names in sections if not title]
    assert alone[0] == "index.ipynb" and {docs.linked(item)[0] for item in QUARTO["website"]["navbar"]["left"]} <= {*alone, *dict(sections)["Tutorials"], "rotate.html"}


def test_addresses_are_those_of_the_published_site(docs):
    "nbdev's index of symbols says where they will be"
    scope = {}
    exec((ROOT/"radrotator"/"_modidx.py").read_text(encoding="utf-8"), scope)
    published = {link.partition("#")[0] for symbols in scope["d"]["syms"].values() for link, _ in symbols.values()}
    local = {docs.Page(name).href for name in NOTEBOOKS}
    assert len(published) > 50 and published <= local


def test_methods_are_shown_with_their_class(docs):
    "What @patch gives to a class is not in __all__, and a reader looks for it all the same; what begins with _ stays inside"
    cells = [cell("markdown", "# T\n\n> d")] + [cell("code", f"#| exporti\n{text}") for text in ("@patch\ndef turn(self: A): 1", "@patch(as_prop=True)\ndef sharp(self: A): 1", "@patch\ndef __repr__(self: A): 1", "def inner(): 1")]
    made = json.loads(docs.ready(json.dumps(dict(cells=cells))))["cells"]
    assert [c["source"].partition("\n")[0] for c in made[1:]] == ["#| export", "#| export", "#| exporti", "#| exporti"]


def test_quarto_configuration_is_what_quarto_knows():
    "Its schema closes these objects to other keys; a misspelt one would end the publishing"
    known = dict(project={"type", "output-dir", "render", "resources"}, execute={"enabled"}, format={"html"}, website={"title", "description", "repo-url", "repo-subdir", "repo-branch", "repo-actions",
                 "page-navigation", "search", "navbar", "sidebar", "favicon"})
    assert {key: set(value) - known[key] for key, value in QUARTO.items()} == dict.fromkeys(known, set())
    site, html = QUARTO["website"], QUARTO["format"]["html"]
    assert set(site["navbar"]) <= {"search", "left", "right", "tools"} and set(site["sidebar"]) <= {"style", "search", "collapse-level", "contents"} and site["sidebar"]["style"] in ("docked", "floating")
    assert set(html) <= {"theme", "css", "toc", "code-line-numbers", "code-overflow", "fig-cap-location", "respect-user-color-scheme"} and (ROOT/"nbs"/html["css"]).is_file()
    entries = [entry for item in site["sidebar"]["contents"] if "section" in item and isinstance(item["contents"], list) for entry in item["contents"]]
    items = site["navbar"]["left"] + site["navbar"]["tools"] + site["sidebar"]["contents"] + entries
    assert all(isinstance(item, str) or set(item) <= {"href", "text", "icon", "aria-label"} or set(item) == {"section", "contents"} for item in items)
    assert set(site["repo-actions"]) <= {"none", "edit", "source", "issue"}
    assert not any(isinstance(token, (yaml.AnchorToken, yaml.AliasToken)) for token in yaml.scan((ROOT/"_quarto.yml").read_text(encoding="utf-8")))
    settings = get_config(path=ROOT)
    assert (site["repo-url"], site["repo-branch"], ROOT/site["repo-subdir"], site["title"]) == (settings.git_url, settings.branch, settings.nbs_path, settings.title)
    assert all(any(PurePosixPath(name).match(pattern) for pattern in QUARTO["project"]["render"]) for name in NOTEBOOKS)


def test_workflow_publishes_what_was_prepared():
    workflow = yaml.safe_load((ROOT/".github"/"workflows"/"docs.yml").read_text(encoding="utf-8"))
    steps = workflow["jobs"]["docs"]["steps"]
    assert all(re.fullmatch(r"[\w-]+/[\w-]+(/[\w-]+)?@v\d+", step["uses"]) for step in steps if "uses" in step)
    runs = [step["run"] for step in steps if "run" in step]
    assert runs == ["make .venv/.installed-dev", ".venv/bin/python .ci/docs.py --prepare", "cd _proc && quarto render --no-execute"]
    assert [step["with"]["path"] for step in steps if "upload-pages-artifact" in step.get("uses", "")] == [f"_proc/{QUARTO['project']['output-dir']}"]
    assert workflow["permissions"] == {"contents": "read", "pages": "write", "id-token": "write"}
