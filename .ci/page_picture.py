"""Make the landing page's first picture: the page that turns a radiograph in the browser, with its example turned.

    python .ci/page_picture.py                        needs npm, and chromium or the file that CHROMIUM names
    python .ci/page_picture.py --to /tmp/page.webp
"""
import argparse, io, os, shutil, sys, tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
VIEW = dict(width=1120, height=980)  # pixels of the window
TURN = """() => {
    document.getElementById("z").value = 12
    document.getElementById("x").dispatchEvent(new Event("input", {bubbles: true}))
}"""


def photograph(page_file, chromium):
    "PNG of the page in light colours, once its example is turned and painted"
    from playwright.sync_api import sync_playwright
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport=VIEW, color_scheme="light", device_scale_factor=1.5)
        page.goto(page_file.as_uri())
        page.get_by_text("Ready").wait_for()
        page.get_by_role("button", name="Take the example").click()
        page.locator("#status:has-text('lifted')").wait_for()
        page.evaluate(TURN)
        page.locator("#caption:has-text('12')").wait_for()
        page.locator("#picture[aria-busy=false]").wait_for()
        return page.locator("main").screenshot()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--to", type=Path, default=ROOT/"nbs"/"images"/"rotate_page.webp")
    args = parser.parse_args()
    sys.path[:0] = [str(ROOT), str(ROOT/".ci")]
    from PIL import Image
    from radrotator.files import atomic_file
    from rotator import build_page
    chromium = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    with tempfile.TemporaryDirectory() as folder:
        missing = build_page(folder)
        if missing: sys.exit(f"the page cannot be built: {missing}")
        image = Image.open(io.BytesIO(photograph(Path(folder)/"rotate.html", chromium)))
    with atomic_file(args.to) as beside: image.convert("RGB").save(beside, "WEBP", quality=82, method=6)
    print(f"{args.to}: {image.width} × {image.height} pixels, {args.to.stat().st_size/1000:.0f} kB")


if __name__ == "__main__": main()
