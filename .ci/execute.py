"""Execute notebooks by nbdev's flag rules and store what they print and draw.

    python .ci/execute.py                               every notebook
    python .ci/execute.py nbs/12_drr/05_render.ipynb              these notebooks
    python .ci/execute.py --flags slow nbs/21_train/09_trainer.ipynb    with the cells marked `#| slow`, too

Tests do not store outputs and the documentation does not execute, so without this the figures would go stale.
A cell that is left out (`#| eval: false`, or a flag among `tst_flags`) keeps the outputs it has. A notebook that
fails stays as it was. Two runs give the same bytes, as long as the notebook itself does not print times.
"""
import argparse, multiprocessing, os, sys
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def skipped(cell, flags):
    "Whether a test would leave this cell out: the rule of `nbdev.test.test_nb`"
    from nbdev.process import extract_directives
    if cell.cell_type != "code" or "nbdev_export(" in cell.source: return True
    directives = extract_directives(cell, remove=False)
    return directives.get("eval:", [""])[0].lower() == "false" or bool(flags & directives.keys())


def worth_storing(output):
    "Not widgets (dead without a kernel), not warnings (they name folders of this machine)"
    if output["output_type"] == "stream": return output["name"] == "stdout" and output["text"]
    return "application/vnd.jupyter.widget-view+json" not in output.get("data", {})


def execute(path, flags):
    "Execute the notebook at `path` where the tests do, in its own folder; True where every cell ran"
    from execnb.nbio import read_nb, write_nb
    from execnb.shell import CaptureShell
    from fastprogress import fastprogress
    from nbdev.clean import nbdev_clean
    fastprogress.NO_BAR = True  # a bar ends in the seconds it took
    sys.path.insert(0, str(ROOT))
    os.chdir(path.parent)
    nb, shell = read_nb(path), CaptureShell(path, mpl_format="png")

    def before(cell):
        if skipped(cell, flags): return True
        cell.outputs = []  # or a cell that has fallen silent would keep its old words

    def after(cell):
        for o in cell.outputs:
            if o["output_type"] != "stream": continue
            if o["name"] == "stderr": sys.stderr.write("".join(o["text"]))
            o["text"] = [t for t in o["text"] if not t.endswith("\r")]  # what a terminal would have written over
        cell.outputs = [o for o in cell.outputs if worth_storing(o)]

    try: shell.run_all(nb, exc_stop=True, preproc=before, postproc=after)
    except Exception:
        sys.stderr.write(shell.prettytb(path.name) + "\n")
        return False
    nb.metadata.pop("jupytext", None)  # left by the editor
    nb.metadata["kernelspec"] = dict(display_name="python3", language="python", name="python3")  # Quarto asks for one
    write_nb(nb, path)
    nbdev_clean(str(path))
    return True


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notebooks", nargs="*", type=Path, help="default: all")
    parser.add_argument("--flags", default="", help="flags whose cells run although tests skip them, such as 'slow'")
    args = parser.parse_args()
    os.environ["PYTHONHASHSEED"] = "0"              # the order of a printed set
    os.environ.setdefault("OMP_NUM_THREADS", "1")   # the order of a sum
    from nbdev.config import get_config
    from nbdev.doclinks import nbglob
    paths = [p.resolve() for p in args.notebooks] or [p.resolve() for p in sorted(nbglob(as_path=True))]
    flags = set(get_config(path=ROOT).tst_flags.split()) - set(args.flags.split())
    failed = []
    for path in paths:
        print(path.relative_to(ROOT), flush=True)
        # One process for each: nothing that a notebook leaves behind reaches the next.
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            try: done = pool.submit(execute, path, flags).result()
            except BrokenProcessPool: done = False  # killed, perhaps for its memory
        if not done: failed.append(path.name)
    if failed: sys.exit(f"Not executed to the end: {', '.join(failed)}")


if __name__ == "__main__": main()
