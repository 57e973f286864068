"The scripts of .ci as modules, and what they build for many tests."
import contextlib, fcntl, importlib.util, os, sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def load_script(name):
    "A script of .ci as a module"
    spec = importlib.util.spec_from_file_location(name, ROOT/".ci"/f"{name}.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def one_folder(tmp_path_factory, name):
    "A folder that all workers of pytest-xdist share; one of them has it for itself in this block"
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    with open(base/f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield base/name
