"""Render the documentation into _docs/ without Quarto: the same notebooks, made ready by nbdev, through pandoc.

    python .ci/docs.py                the pages that _quarto.yml names, into _docs/
    python .ci/docs.py --to FOLDER    elsewhere
    python .ci/docs.py --prepare      nbdev's part alone, into _proc/: what Quarto then renders

Navigation and titles come from _quarto.yml and the notebooks, links to the source from settings.ini. No cell runs
but those that nbdev runs to know the signatures: imports and definitions. The pages need neither network nor server.
"""
import argparse, ast, base64, html, itertools, json, os, re, shutil, sys, tempfile
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from string import Template

import yaml
from bs4 import BeautifulSoup
from nbdev.config import get_config
from nbdev.doclinks import _nbpath2html

ROOT, SITE = Path(__file__).resolve().parents[1], Path(__file__).resolve().parent/"site"
NOTEBOOKS = ROOT/"nbs"
PICTURES = {"image/png": ".png", "image/jpeg": ".jpg", "image/gif": ".gif", "image/webp": ".webp"}
DIRECTIVE = re.compile(r"#\s*\|\s*([\w-]+):?\s*(.*)")
METHOD = re.compile(r"^#\s*\|\s*exporti\b(?=[^@]*\n@patch\b[^\n]*\ndef [a-z])")  # one that a class is given by @patch


# ---- the menu --------------------------------------------------------------------------------------------------------

def linked(item):
    "The page that an entry of _quarto.yml leads to, and what it is called there where that is not its title"
    return (item, "") if isinstance(item, str) else (item["href"], item.get("text", ""))


def sections_of(sidebar):
    "The sections of the sidebar, (title, entries), as Quarto makes them: a glob is its files in order of their names"
    for item in sidebar["contents"]:
        if isinstance(item, str) or "href" in item: yield "", [linked(item)]
        elif isinstance(item["contents"], str):
            found = sorted(path.relative_to(NOTEBOOKS).as_posix() for path in NOTEBOOKS.glob(item["contents"]))
            yield item["section"], [(name, "") for name in found]
        else: yield item["section"], [linked(entry) for entry in item["contents"]]


# ---- nbdev's part ----------------------------------------------------------------------------------------------------

def outward(text, folder, settings):
    "Links from a notebook to what lies in the repository and not among the pages (../CITATION.cff) go to GitHub"
    def link(found):
        path = (ROOT/"nbs"/folder/found[1]).resolve()
        if path.is_relative_to(ROOT/"nbs") or not path.is_relative_to(ROOT): return found[0]
        return f"]({settings.git_url}/blob/{settings.branch}/{path.relative_to(ROOT).as_posix()}"
    return re.sub(r"\]\(((?:\.\./)+[^)#\s]+)", link, text)


def ready(notebook):
    """A notebook that nbdev takes as it is meant: only the title goes into the front matter, methods are shown with
    their class, and no cell runs for the import in it if it does more than import"""
    nb = json.loads(notebook)
    first = next(cell for cell in nb["cells"] if cell["cell_type"] == "markdown")
    title, rest = re.match(r"(#[^\n]*\n*(?:>[^\n]*\n*)?)(.*)", "".join(first["source"]), re.DOTALL).groups()
    first["source"] = title
    if rest: nb["cells"].insert(nb["cells"].index(first) + 1, dict(cell_type="markdown", metadata={}, source=rest))
    for cell in nb["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] != "code": continue
        if METHOD.match(source): cell["source"] = METHOD.sub("#| export", source)
        if "import" not in source or re.search(r"^#\s*\|\s*export", source, re.MULTILINE): continue
        if not all(isinstance(line, (ast.Import, ast.ImportFrom)) for line in ast.parse(source).body):
            cell["source"] = "#| eval: false\n" + source
    return json.dumps(nb)


def prepare(sections, to):
    "Process copies of these sections' notebooks as nbdev does for Quarto, so that the checkout stays as it is; settings"
    from nbdev.serve import proc_nbs
    notebooks = [name for _, entries in sections for name, _ in entries]
    made = {}
    if to.exists(): shutil.rmtree(to)
    with tempfile.TemporaryDirectory() as folder:
        copy, home = Path(folder), Path.cwd()
        settings = (ROOT/"settings.ini").read_text(encoding="utf-8")
        settings = settings.replace("[DEFAULT]", "[DEFAULT]\nrenderer = signatures.Signature", 1)
        (copy/"settings.ini").write_text(settings, encoding="utf-8")
        shutil.copytree(ROOT/"nbs", copy/"nbs", ignore=shutil.ignore_patterns("*.ipynb", ".*"))
        for name in notebooks:
            (copy/"nbs"/name).write_text(ready((NOTEBOOKS/name).read_text(encoding="utf-8")), encoding="utf-8")
        os.chdir(copy)
        try:
            proc_nbs(n_workers=0)
            settings = get_config()
        finally: os.chdir(home)
        shutil.move(copy/"_proc", to)
    for name in notebooks:
        nb = json.loads((to/name).read_text(encoding="utf-8"))
        for cell in nb["cells"]:
            if cell["cell_type"] == "markdown":
                cell["source"] = outward("".join(cell["source"]), PurePosixPath(name).parent, settings)
        made[name] = nb
    add_names(made, sections)
    for name, nb in made.items(): (to/name).write_text(json.dumps(nb), encoding="utf-8")
    return settings


def defined(nb):
    "What a processed notebook shows the signature of, classes first: {name: (its first line, {method: anchor})}"
    names = {}
    for output in itertools.chain.from_iterable(cell.get("outputs", []) for cell in nb["cells"]):
        text = "".join(output.get("data", {}).get("text/markdown", ""))
        if "::: {.signature}" not in text: continue
        heading, *parts = text.split("\n\n")
        symbol = heading.lstrip("# ")
        name, _, method = symbol.partition(".")
        words = (part for part in parts if not re.match(r":::|```|\[source\]|\[[^]]*\]\{", part))
        if name in names: names[name][1][method] = symbol.lower()
        else: names[symbol] = next(words, "").replace("\n", " "), {}  # or a method of a class of another room
        anchors = re.findall(r"\{\.parameter #(\S+)\}", text)  # of the methods that stand in the class's own cell
        for anchor in anchors: names[name][1][anchor.partition(".")[2]] = anchor
    return dict(sorted(names.items(), key=lambda found: found[0][0].islower()))


def rows_of(names):
    "The list of names for the top of their page"
    for symbol, (summary, methods) in names.items():
        more = " ".join(f"[`.{method}`](#{anchor})" for method, anchor in methods.items())
        yield f"[`{symbol}`](#{symbol.lower()})\n:   {f'{summary} {more}'.strip() or '&nbsp;'}"


def name_list(rows): return markdown_cell("\n\n".join(["::: {.names}", *rows, ":::"]))


def add_names(made, sections):
    "Put a list of its public names at the top of every page that has some, and all of them on the page of the API"
    for title, entries in sections:
        rooms = []
        for name, _ in entries:
            cells, names = made[name]["cells"], defined(made[name])
            if not names: continue
            cells.insert(1, name_list(rows_of(names)))
            front = yaml.safe_load("".join(cells[0]["source"]).strip().strip("-"))
            links = " ".join(f"[`{symbol}`]({name}#{symbol.lower()})" for symbol in names)
            rooms.append(f"[{front['title']}]({name})\n:   {links}")
        if rooms: made.get("api.ipynb", dict(cells=[]))["cells"] += [markdown_cell(f"## {title}"), name_list(rooms)]


def markdown_cell(text): return dict(cell_type="markdown", metadata={}, source=text)


# ---- from notebook to page -------------------------------------------------------------------------------------------

@dataclass
class Page:
    "A notebook on its way to HTML"
    notebook: str        # below nbs/
    group: str = ""      # section of the sidebar
    label: str = ""      # in the sidebar, where it is not the title
    title: str = ""
    description: str = ""
    sections: list = field(default_factory=list)  # anchor, heading, class, words

    @property
    def href(self):
        "Where Quarto, by nbdev's rule, would put it"
        return str(_nbpath2html(PurePosixPath(self.notebook)))

    def to(self, href):
        "The way from here to another file of the site"
        return os.path.relpath(href, PurePosixPath(self.href).parent)


def fence(text, kind):
    "A block of code, whatever it holds"
    ticks = "`"*max(3, *(len(run) + 1 for run in re.findall("`+", text)), 3)
    return f"{ticks} {{.{kind}}}\n{text}\n{ticks}"


def directives(source):
    "A cell's `#| name: value` lines, and the rest of it"
    lines = source.splitlines()
    found = dict(match.groups() for match in map(DIRECTIVE.match, lines) if match)
    rest = "\n".join(line for line in lines if not DIRECTIVE.match(line))
    return {name: yaml.safe_load(value) for name, value in found.items()}, rest.strip("\n")


def shown(output, options, save):
    "An output as Markdown"
    data = {kind: "".join(value) for kind, value in output.get("data", {}).items() if not isinstance(value, dict)}
    label = f"#{options['label']}" if "label" in options else ""
    if output["output_type"] == "error": return fence("\n".join(output["traceback"]), "error")
    if "text" in output: return fence("".join(output["text"]).rstrip(), "output")
    for kind in PICTURES.keys() & data.keys():
        alt = f" fig-alt={json.dumps(options['fig-alt'])}" if "fig-alt" in options else ""
        file = save(base64.b64decode(data[kind]), PICTURES[kind])
        return f"![{options.get('fig-cap', '')}]({file}){{{label}{alt}}}".removesuffix("{}")
    if "text/html" in data: return f"```{{=html}}\n{data['text/html']}\n```"
    caption = f"\n\n: {options['tbl-cap']} {{{label}}}" if "tbl-cap" in options else ""
    if "text/markdown" in data: return data["text/markdown"] + caption
    return fence(data.get("text/plain", ""), "output")


def markdown(page, nb, folder):
    "The whole notebook as Markdown; pictures go into files beside the page"
    def save(picture, suffix):
        place = folder/PurePosixPath(page.href).with_suffix("")
        place.mkdir(parents=True, exist_ok=True)
        path = place/f"{len(list(place.iterdir())) + 1}{suffix}"
        path.write_bytes(picture)
        return page.to(path.relative_to(folder))
    for cell in nb["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "raw":  # nbdev's front matter
            about = yaml.safe_load(source.strip().strip("-"))
            page.title, page.description = about["title"], about.get("description", "")
            yield f"::: {{.lead}}\n{page.description}\n:::"
        elif cell["cell_type"] == "markdown": yield source
        else:
            options, source = directives(source)
            if options.get("include") is False: continue
            if source and options.get("echo") is not False: yield fence(source, "python")
            if options.get("output") is False: continue
            for output in cell["outputs"]: yield shown(output, options, save)


def number(soup, prefix, word):
    "Number the figures or tables, and let what refers to them say so"
    for n, place in enumerate(soup.select(f"[id^={prefix}-]"), 1):
        label, caption = f"{word}\N{NO-BREAK SPACE}{n}", place.find(["figcaption", "caption"])
        if caption: caption.insert(0, f"{label}: ")
        for cite in soup.select(f"span.citation[data-cites={place['id']}]"):
            cite.name, cite.attrs, cite.string = "a", {"href": f"#{place['id']}"}, label


def relink(soup, page, site):
    "Links to notebooks, and nbdev's links to definitions, lead to the pages of this folder"
    for link in soup.select("a[href]"):
        target, mark, anchor = link["href"].partition("#")
        if target.startswith(site): target = page.to(target.removeprefix(site))
        elif target.endswith(".ipynb") and "://" not in target: target = str(_nbpath2html(PurePosixPath(target)))
        link["href"] = target + mark + anchor


def unlink_missing(pages, texts):
    "nbdev links every name to a definition, also to those that a page does not show: such a link leads to the page"
    anchors = {page.href: {part["id"] for part in soup.select("[id]")} for page, soup in zip(pages, texts)}
    for page, soup in zip(pages, texts):
        for link in soup.select("a[href*='#']:has(code)"):
            target, _, anchor = link["href"].partition("#")
            if "://" in target: continue
            there = os.path.normpath(os.path.join(os.path.dirname(page.href), target)) if target else page.href
            if there in anchors and anchor not in anchors[there]: link["href"] = target or "#"


def call_out(soup, box):
    "Quarto's boxes: the title is an attribute, or the first heading, or the kind of box"
    kind, heading = re.search(r"callout-(\w+)", " ".join(box["class"]))[1], box.find(re.compile("^h[1-6]$"))
    title = soup.new_tag("p", attrs={"class": "callout-title"})
    title.string = box.attrs.pop("title", None) or (heading.extract().get_text() if heading else kind.capitalize())
    box["class"] += ["callout"]
    box.insert(0, title)


def sections(soup):
    "The headings, each with its anchor, its level, whether it names a definition, and the words up to the next"
    for heading in soup.select("h2[id], h3[id]"):
        following = list(itertools.takewhile(lambda part: part.name not in ("h2", "h3"), heading.find_next_siblings()))
        symbol = bool(following) and "signature" in following[0].get("class", [])
        words = " ".join(part.get_text() for part in following).removeprefix("\nsource")
        yield heading["id"], heading.get_text(), heading.name + " symbol"*symbol, " ".join(words.split())


def body_of(page, nb, folder, settings):
    "The page's text as HTML, with what pandoc leaves to Quarto done"
    import pypandoc
    made = pypandoc.convert_text("\n\n".join(markdown(page, nb, folder)), "html5", format="markdown+autolink_bare_uris",
                                 extra_args=["--mathml", "--wrap=none", "--columns=9999"])
    soup = BeautifulSoup(made, "html.parser")
    for anchor in soup.select("pre a[aria-hidden]"): anchor.decompose()  # one for each line of code
    for caption in soup.select("figcaption"): del caption["aria-hidden"]
    for prefix, word in (("fig", "Figure"), ("tbl", "Table")): number(soup, prefix, word)
    relink(soup, page, settings.doc_host + settings.doc_baseurl + "/")
    for box in soup.select("[class*=callout-]"): call_out(soup, box)
    for wide in soup.select("table, math[display=block]"):
        wide.wrap(soup.new_tag("div" if wide.name == "table" else "span", attrs={"class": "scroll"}))
    page.sections = list(sections(soup))
    return soup


# ---- around the text -------------------------------------------------------------------------------------------------

def link(page, other, words=""):
    "A link from one page to another"
    current = " aria-current=page"*(other is page)
    return f'<a href="{page.to(other.href)}"{current}>{html.escape(words or other.label or other.title)}</a>'


def place(page, at, href, words):
    "A link of the bar: to a page, or to a file that is no notebook"
    return link(page, at[href], words) if href in at else f'<a href="{page.to(href)}">{html.escape(words)}</a>'


def sidebar_of(page, groups):
    "The sections of the menu, folded but for the one that the page is in"
    for title, pages in groups:
        rows = "".join(f"<li>{link(page, other)}</li>" for other in pages)
        if not title: yield f"<ul>{rows}</ul>"
        else: yield f"<details{' open'*(page in pages)}><summary>{title}</summary><ul>{rows}</ul></details>"


def contents(page):
    "The page's own table of contents"
    rows = (f'<li class="{kind}"><a href="#{id}">{html.escape(text)}</a></li>' for id, text, kind, _ in page.sections)
    return f"<ul>{''.join(rows)}</ul>"


def step(page, pages, by, name):
    "A link to the page before or after"
    at = pages.index(page) + by
    return link(page, pages[at]).replace("<a ", f"<a class={name} rel={name} ", 1) if 0 <= at < len(pages) else ""


def write_page(page, groups, soup, website, settings, folder):
    "The text in its frame"
    pages = [other for _, others in groups for other in others]
    at = {other.notebook: other for other in pages}
    bar = [linked(item) for item in website["navbar"]["left"]]
    home = page.title == website["title"]
    text = Template((SITE/"page.html").read_text(encoding="utf-8")).substitute(
        name=html.escape(page.title if home else f"{page.title} – {website['title']}"),
        title=html.escape(page.title), site=html.escape(website["title"]), group="" if home else page.group,
        description=html.escape(page.description), root="../"*page.href.count("/"), home=page.to("index.html"),
        bar="".join(place(page, at, *item) for item in bar), sidebar="".join(sidebar_of(page, groups)),
        contents=contents(page), body=soup, repo=website["repo-url"],
        source=f"{settings.git_url}/blob/{settings.branch}/nbs/{page.notebook}",
        previous=step(page, pages, -1, "prev"), next=step(page, pages, 1, "next"))
    path = folder/page.href
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def search_entries(pages):
    "What a search looks through: (address, title, heading, words)"
    for page in pages:
        yield page.href, page.title, "", page.description
        for id, heading, _, words in page.sections: yield f"{page.href}#{id}", page.title, heading, words[:2000]


def write_rotator(folder):
    "The page that turns a radiograph in the browser, where npm can build it; otherwise say that it is left out"
    sys.path.insert(0, str(ROOT/".ci"))
    from rotator import build_page
    missing = build_page(folder)
    if missing: print(f"the page rotate.html is left out: {missing}")
    return not missing


def unlink_rotator(texts, bar):
    "No links to a page that was left out"
    bar[:] = [item for item in bar if linked(item)[0] != "rotate.html"]
    for soup in texts:
        for link in soup.select('a[href$="rotate.html"]'): link.unwrap()


def render(sections, website, proc, folder, settings):
    "Every page, and what a search looks through"
    groups = [(title, [Page(name, title, label) for name, label in entries]) for title, entries in sections]
    pages = [page for _, others in groups for page in others]
    notebooks = [json.loads((proc/page.notebook).read_text(encoding="utf-8")) for page in pages]
    texts = [body_of(page, nb, folder, settings) for page, nb in zip(pages, notebooks)]
    unlink_missing(pages, texts)
    if not write_rotator(folder): unlink_rotator(texts, website["navbar"]["left"])
    for page, soup in zip(pages, texts): write_page(page, groups, soup, website, settings, folder)
    found = json.dumps([*search_entries(pages)], ensure_ascii=False)
    (folder/"search.js").write_text(f"const SEARCH = {found}", encoding="utf-8")
    shutil.copy(SITE/"site.js", folder)
    style = (SITE/"site.css").read_text(encoding="utf-8") + (proc/"styles.css").read_text(encoding="utf-8")
    (folder/"site.css").write_text(style, encoding="utf-8")
    shutil.copytree(proc/"images", folder/"images", dirs_exist_ok=True)
    return pages


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--to", type=Path, default=ROOT/"_docs", help="default: _docs/")
    parser.add_argument("--prepare", action="store_true", help="write _proc/ for Quarto and stop")
    args = parser.parse_args()
    website = yaml.safe_load((ROOT/"_quarto.yml").read_text(encoding="utf-8"))["website"]
    sections = list(sections_of(website["sidebar"]))
    if args.prepare:
        prepare(sections, ROOT/"_proc")
        return write_rotator(ROOT/"_proc")
    with tempfile.TemporaryDirectory() as folder:
        settings = prepare(sections, Path(folder)/"proc")
        if (args.to/"search.js").exists(): shutil.rmtree(args.to)  # an older site, and nothing else
        args.to.mkdir(parents=True, exist_ok=True)
        pages = render(sections, website, Path(folder)/"proc", args.to.resolve(), settings)
    print(f"{len(pages)} pages: {args.to/'index.html'}")


if __name__ == "__main__": main()
