"""Every notebook runs from top to bottom. As `nbdev_test` does it, but with tracebacks, with one process
for each notebook so that none leans on what another left behind, and with a failure where there is nothing to run."""
import contextlib, io, multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
from nbdev.config import get_config

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted(p for p in (ROOT/"nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
SKIP = get_config(path=ROOT).tst_flags.split()


def run(path):
    "Whether the notebook ran, and its traceback; called in a process of its own"
    from nbdev.test import test_nb
    with contextlib.redirect_stderr(io.StringIO()) as err:
        passed, _ = test_nb(path, skip_flags=SKIP, basepath=ROOT)
    return passed, err.getvalue()


def test_there_are_notebooks():
    assert len(NOTEBOOKS) > 1


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: str(p.relative_to(ROOT/"nbs")))
def test_notebook(path):
    # An executor, not a Pool: a Pool waits for ever for a process that was killed.
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        passed, traceback = pool.submit(run, path).result()
    if not passed: pytest.fail(traceback, pytrace=False)
