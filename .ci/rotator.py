"""Build the page that turns a radiograph in the browser: rotate.html and what it needs, from web/ and the shipped weights.

    python .ci/rotator.py --to FOLDER

npm fetches the packages that web/package-lock.json names, once; the page itself loads nothing from elsewhere. Where npm
is missing, or cannot fetch them, the page is left out, and a sentence says so.
"""
import argparse, shutil, subprocess, sys, tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WEB = ROOT/"web"
EXAMPLE = ROOT/"nbs"/"images"/"pelvis.png"


def fetch_packages(npm):
    "Fetch what the lock file names, unless it is here; why that cannot be done, or an empty string"
    sys.path.insert(0, str(ROOT))
    from radrotator.files import folder_lock
    lock, fetched = WEB/"package-lock.json", WEB/"node_modules"/".package-lock.json"
    with folder_lock(WEB):  # tests that run side by side build side by side
        if fetched.exists() and fetched.stat().st_mtime >= lock.stat().st_mtime: return ""
        quiet = "--ignore-scripts", "--no-audit", "--no-fund"
        done = subprocess.run([npm, "ci", *quiet], cwd=WEB, capture_output=True, text=True, timeout=600)
        if done.returncode: return f"npm cannot fetch its packages: {(done.stderr.strip().splitlines() or ['?'])[0]}"
        fetched.touch()
    return ""


def build_page(folder):
    "Write the page into `folder`; why it is left out, or an empty string"
    npm = shutil.which("npm")
    missing = fetch_packages(npm) if npm else "npm is missing"
    if missing: return missing
    from radrotator.rotate.browser import export_model
    from radrotator.rotate.rotator import RadRotator
    with tempfile.TemporaryDirectory() as place:
        model = Path(place)/"model.onnx"
        export_model(RadRotator.from_pretrained(device="cpu"), model)
        script = [shutil.which("node"), WEB/"build.mjs", model, EXAMPLE, Path(folder).resolve()]
        subprocess.run(script, cwd=WEB, check=True, timeout=300)
    return ""


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--to", type=Path, default=ROOT/"_docs", help="default: _docs/")
    folder = parser.parse_args().to
    folder.mkdir(parents=True, exist_ok=True)
    missing = build_page(folder)
    print(f"the page rotate.html is left out: {missing}" if missing else folder/"rotate.html")


if __name__ == "__main__": main()
