"""Make README.md and MODEL_CARD.md from their notebooks, with nothing executed and the same bytes every time.

nbdev's own `nbdev_readme` needs Quarto, which is in no package registry.
"""
import argparse, re, sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = {"README.md": "index.ipynb", "MODEL_CARD.md": "model_card.ipynb"}


def readme(notebook):
    "The text of a page for the notebook at this path"
    import nbformat
    from nbconvert import MarkdownExporter
    nb = nbformat.read(notebook, as_version=4)
    cells = []
    for cell in nb.cells:
        if cell.cell_type == "raw": continue  # front matter for the documentation site
        lines = cell.source.splitlines()
        directives = [l.replace(" ", "") for l in lines if re.match(r"\s*#\s*\|", l)]
        if any(d in ("#|hide", "#|include:false") for d in directives): continue
        cell.source = "\n".join(l for l in lines if not re.match(r"\s*#\s*\|", l)).strip()
        for output in cell.get("outputs", []):
            # A picture inside the notebook has no file that a README could point to.
            if any(kind.startswith("image/") for kind in output.get("data", {})):
                sys.exit(f"{notebook.name} stores a figure: save it in nbs/images/ and show it with ![…](images/….png)")
        if "#|echo:false" in directives:  # what it shows, not how
            shown = [output.data["text/markdown"] for output in cell.outputs if "text/markdown" in output.get("data", {})]
            cells += [nbformat.v4.new_markdown_cell("".join(text)) for text in shown]
        elif cell.source: cells.append(cell)
    nb.cells = cells
    nb.metadata["language_info"] = {"name": "python"}  # colours for the code
    text, _ = MarkdownExporter().from_notebook_node(nb)
    # Links are written from nbs/, where the notebook lies; the README lies one folder above.
    text = re.sub(r'(\]\(|src="|href=")(?!https?:|mailto:|#|/)', r"\1nbs/", text)
    text = text.replace("nbs/../", "")
    for page, of in PAGES.items(): text = text.replace(f"(nbs/{of})", f"({page})")
    # Three blank lines in a row are nbconvert's, not the author's.
    return re.sub(r"\n{3,}", "\n\n", re.sub(r"[ \t]+\n", "\n", text)).strip() + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; fail where a page differs")
    check = parser.parse_args().check
    for name, notebook in PAGES.items():
        path, text = ROOT/name, readme(ROOT/"nbs"/notebook)
        if not check: path.write_text(text, encoding="utf-8")
        elif path.read_text(encoding="utf-8") != text: sys.exit(f"{name} differs from nbs/{notebook}: run make readme")


if __name__ == "__main__": main()
