"""The checkout holds together: what is generated is what its source generates, and the notebooks are fit to be read."""
import json, re, shutil, subprocess, sys
from pathlib import Path

import pytest
from nbdev.config import get_config

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted(p for p in (ROOT/"nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: str(p.relative_to(ROOT/"nbs")))


@pytest.fixture
def copy(tmp_path):
    "A copy of what nbdev reads, to let it write without touching the checkout"
    shutil.copy(ROOT/"settings.ini", tmp_path)
    shutil.copy(ROOT/"_quarto.yml", tmp_path)
    shutil.copytree(ROOT/"nbs", tmp_path/"nbs", symlinks=True, ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    return tmp_path


def nbdev(command, folder):
    "Run one of nbdev's commands in `folder`"
    subprocess.run([Path(sys.executable).parent/command], cwd=folder, check=True, timeout=300)


def contents(folder, pattern):
    "The files under `folder` that match, by relative path"
    files = [path for path in sorted(folder.rglob(pattern)) if ".ipynb_checkpoints" not in path.parts]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def differing(a, b):
    "The names of the files that differ or are missing on one side"
    return sorted(name for name in a.keys() | b.keys() if a.get(name) != b.get(name))


def test_notebooks_are_clean(copy):
    nbdev("nbdev_clean", copy)
    changed = differing(contents(ROOT/"nbs", "*.ipynb"), contents(copy/"nbs", "*.ipynb"))
    assert not changed, f"not clean (run nbdev_clean): {changed}"


def test_package_is_what_the_notebooks_export(copy):
    # Nothing is copied into the new package: a module whose notebook is gone shows as a difference.
    nbdev("nbdev_export", copy)
    changed = differing(contents(ROOT/"radrotator", "*.py"), contents(copy/"radrotator", "*.py"))
    by_hand = {"__init__.py", "radiograph/__init__.py"}   # the public face, and a wing that opens as a whole
    assert set(changed) <= by_hand, f"not what the notebooks export (run make export): {changed}"


def test_readme_is_the_index_notebook():
    subprocess.run([sys.executable, ROOT/".ci"/"readme.py", "--check"], check=True, timeout=300)


def test_slow_and_gpu_cells_are_left_out():
    # A | between the flags would skip nothing, silently.
    assert get_config(path=ROOT).tst_flags.split() == ["slow", "gpu"]


@each_notebook
def test_exported_cells_are_short(path):
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        if re.match(r"\s*#\s*\|\s*exporti?s?\b", source):
            assert len(source.splitlines()) <= 40, f"too long to be one thought:\n{source[:300]}"


@each_notebook
def test_stored_outputs_are_fit_to_publish(path):
    "No error, no folder of the author's machine, and small enough to load"
    outputs = [o for c in json.loads(path.read_text(encoding="utf-8"))["cells"] for o in c.get("outputs", [])]
    assert not [o for o in outputs if o["output_type"] == "error"]
    def without_pictures(data): return {kind: value for kind, value in data.items() if not kind.startswith("image/")}
    text = json.dumps([o.get("text", "") or without_pictures(o["data"]) for o in outputs])
    assert not re.search(r"(?<![\w.])/(home|root|Users|tmp)/", text) and f"{ROOT}/" not in text
    assert path.stat().st_size < 500_000
