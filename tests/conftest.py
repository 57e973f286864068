"""What `make quick` leaves out; a real browser, for the tests that look at what people see; and Mediffusion, which the
paper trained with."""
import importlib, importlib.util, os, shutil, subprocess, sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parents[1]
NAMES = "chromium", "chromium-browser", "google-chrome"
SLOW = {  # rooms of tests/ that take more than some seconds
    "test_batch", "test_cli", "test_ct_headers", "test_evaluate", "test_evaluate_registration", "test_ingest",
    "test_known", "test_page", "test_pairs", "test_site", "test_stdio", "test_sweep", "test_train", "test_wheel", "test_widget",
}


def pytest_addoption(parser):
    words = "leave out slow tests, and notebooks that are as they were committed"
    parser.addoption("--quick", action="store_true", help=words)


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes more than some seconds; left out by --quick")


def changed_notebooks():
    "Names of the notebooks that differ from the last commit"
    command = ["git", "status", "--porcelain", "-z", "--untracked-files=all", "nbs"]
    told = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return {entry[3:].removeprefix("nbs/") for entry in told.stdout.split("\0")}


def pytest_collection_modifyitems(config, items):
    if not config.getoption("quick"): return
    changed = changed_notebooks()
    def is_quick(item):
        room = item.path.stem
        if item.originalname == "test_notebook": return item.callspec.id in changed
        return room not in SLOW and not item.get_closest_marker("slow")
    left_out = [item for item in items if not is_quick(item)]
    config.hook.pytest_deselected(items=left_out)
    items[:] = filter(is_quick, items)


@pytest.fixture(scope="session")
def browser():
    "Headless Chromium under Playwright; without one the tests are skipped, or fail where RADROTATOR_BROWSER=required"
    path = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
    if path is None:
        words = f"there is no browser here ({', '.join(NAMES)}, or the file that CHROMIUM names)"
        (pytest.fail if os.environ.get("RADROTATOR_BROWSER") == "required" else pytest.skip)(words)
    from playwright.sync_api import sync_playwright
    with sync_playwright() as playwright:
        patience = 120_000  # milliseconds: a busy machine takes its time
        chromium = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"], timeout=patience)
        yield chromium
        chromium.close()


@pytest.fixture(scope="session")
def mediffusion():
    "Modules of the original; its own __init__, which imports Lightning, wandb and more, is left out"
    found = importlib.util.find_spec("mediffusion")
    if found is None: pytest.skip("the original is not installed: pip install --no-deps mediffusion==0.7.1")
    sys.modules["mediffusion"] = package = ModuleType("mediffusion")
    package.__path__ = list(found.submodule_search_locations)
    def load(name): return importlib.import_module(f"mediffusion.{name}")
    return SimpleNamespace(
        base=load("diffusion.base"),
        solvers=load("diffusion.solvers"),
        schedule=load("utils.diffusion"),
        losses=load("losses.diffusion"),
        unet=load("models.unet"),
    )
