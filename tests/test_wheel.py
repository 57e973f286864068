"""A wheel built from the source distribution works where there is no checkout."""
import os, shutil, subprocess, sys, zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
MADE = ".git", ".venv", "runs", "demo", "build", "dist", "_proc", "_docs", "*.egg-info", "__pycache__"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    "The wheel of this checkout, built from its sdist, in a copy that the build may litter"
    folder = tmp_path_factory.mktemp("wheel")
    shutil.copytree(ROOT, folder/"checkout", ignore=shutil.ignore_patterns(*MADE), symlinks=True)
    subprocess.run([sys.executable, "-m", "build", "--no-isolation", "--outdir", folder/"dist", folder/"checkout"],
                   check=True, stdout=subprocess.DEVNULL, timeout=300)
    return next((folder/"dist").glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    "An empty folder and an environment in which only the wheel provides radrotator"
    site, empty = tmp_path_factory.mktemp("site"), tmp_path_factory.mktemp("empty")
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", site, wheel]
    subprocess.run(install, check=True, timeout=300)
    env = {**os.environ, "PYTHONPATH": str(site)}  # comes before an editable install of the checkout

    def run(*command):
        done = subprocess.run(command, cwd=empty, env=env, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    assert run(sys.executable, "-c", "import radrotator; print(radrotator.__file__)").startswith(str(site))
    return run, site, empty


def test_wheel_holds_the_package_and_its_weights(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert any(n.startswith("radrotator/weights/") and n.endswith(".safetensors") for n in names)
    templates = {f"radrotator/templates/{path.name}" for path in (ROOT/"radrotator"/"templates").iterdir()}
    assert templates and templates | {"radrotator/app/widget.css", "radrotator/app/widget.js"} <= set(names)
    assert {n.split("/")[0].split("-")[0] for n in names} == {"radrotator"}


def test_installed_wheel_rotates_an_image(installed):
    run, _, folder = installed
    row, column = np.mgrid[-1:1:96j, -1:1:80j]
    body = 0.4*(row**2 + column**2 < 0.9) + 0.5*((row - 0.2)**2 + (abs(column) - 0.4)**2 < 0.04)
    Image.fromarray((255*body).astype(np.uint8)).save(folder/"in.png")
    run(sys.executable, "-m", "radrotator.cli", "rotate", "in.png", "-o", "out.png", "--z", "5")
    before, after = (np.asarray(Image.open(folder/f"{name}.png").convert("F")) for name in ("in", "out"))
    assert after.shape == before.shape
    assert not np.allclose(after/max(after.max(), 1), before/max(before.max(), 1), atol=0.01)


def test_installed_wheel_writes_a_page(installed):
    write = "from radrotator.html import render_page; print(render_page('overview.html', overview=[], bins=['0–2']))"
    assert "<th>0–2°</th>" in installed[0](sys.executable, "-c", write)


def test_installed_wheel_has_the_command(installed):
    run, site, _ = installed
    assert "rotate" in run(site/"bin"/"radrotator", "--help")
