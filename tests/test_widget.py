"""The sliders in a real browser, in Voila and in JupyterLab: they are moved as people move them, and what is seen is
compared with what the model gives."""
import base64, io, json, os, re, subprocess, sys, time
from functools import cache
from pathlib import Path

import numpy as np
import psutil
import pydicom
import pytest
from imageio_ffmpeg import read_frames
from PIL import Image

from radrotator.radiograph.image import Radiograph
from radrotator.rotate.rotator import RadRotator

PELVIS = Path(__file__).resolve().parents[1]/"nbs"/"images"/"pelvis.png"
DESK = dict(width=1200, height=900)
PATIENCE = 120  # seconds: a busy machine takes its time, and no test asserts any
CELL = """from radrotator.app.widget import RotationExplorer
RotationExplorer("pelvis.png")"""
DECODE = """async img => {
    for (let tries = 0; ; tries++) {
        try { await img.decode(); break; }  // fails where the picture changes meanwhile
        catch (error) { if (tries == 100) throw error; await new Promise(done => setTimeout(done, 50)); }
    }
    const canvas = document.createElement('canvas');
    [canvas.width, canvas.height] = [img.naturalWidth, img.naturalHeight];
    canvas.getContext('2d').drawImage(img, 0, 0);
    return canvas.toDataURL('image/png').split(',')[1];
}"""


JUPYTER_FOLDERS = """
JUPYTER_DATA_DIR JUPYTER_CONFIG_DIR JUPYTER_RUNTIME_DIR JUPYTERLAB_SETTINGS_DIR JUPYTERLAB_WORKSPACES_DIR IPYTHONDIR
""".split()


def write_kernel(folder):
    "A kernel named here, of this very Python"
    command = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    folder.mkdir(parents=True)
    (folder/"kernel.json").write_text(json.dumps(dict(argv=command, display_name="here", language="python")))


def write_notebook(path, *sources):
    kernel = dict(name="here", display_name="here", language="python")
    fields = dict(cell_type="code", metadata={}, outputs=[], execution_count=None)
    cells = [dict(id=f"cell{n}", source=source, **fields) for n, source in enumerate(sources)]
    path.write_text(json.dumps(dict(cells=cells, metadata=dict(kernelspec=kernel), nbformat=4, nbformat_minor=5)))


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    "Starts Voila or JupyterLab on a folder with notebooks, on a port that it finds; ends it with all its kernels"
    folder, running = tmp_path_factory.mktemp("served"), []
    (folder/"pelvis.png").write_bytes(PELVIS.read_bytes())
    write_kernel(folder/"jupyter"/"kernels"/"here")
    write_notebook(folder/"two.ipynb", CELL, CELL.replace("pelvis", "missing"))
    write_notebook(folder/"one.ipynb", CELL)
    places = {name: str(folder/name.lower()) for name in JUPYTER_FOLDERS} | dict(JUPYTER_PATH=str(folder/"jupyter"))

    def start(*words):
        log = folder/f"{words[0]}.log"
        command = [sys.executable, "-m", *words]
        with open(log, "w") as file:
            server = subprocess.Popen(command, cwd=folder, stdout=file, stderr=file, env=os.environ | places)
        running.append(server)
        def address():
            "What the server says once it listens"
            assert server.poll() is None, f"{words[0]} did not start:\n{log.read_text()[-2000:]}"
            return re.search(r"running at:.*?:(\d+)/", log.read_text(), re.DOTALL)
        return f"http://127.0.0.1:{wait(address, f'{words[0]} did not start')[1]}"

    yield start
    for server in running:
        parent = psutil.Process(server.pid)
        for process in (*parent.children(recursive=True), parent): process.kill()
        server.wait()


@pytest.fixture(scope="module")
def opened(browser):
    "Opens a page, and fails in the end where the page complained"
    complaints, pages = [], []

    def listen(message):
        if message.type == "error": complaints.append(f"{message.text} {message.location.get('url')}")

    def open_page(address, **options):
        page = browser.new_page(accept_downloads=True, **options)
        page.set_default_timeout(PATIENCE*1000)
        # Voila asks the network for a font
        page.route(lambda url: "127.0.0.1" not in url, lambda route: route.fulfill(body=""))
        page.on("console", listen)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.goto(address)
        pages.append(page)
        return page

    yield open_page
    for page in pages: page.close()
    assert not complaints, "\n".join(complaints)


@pytest.fixture(scope="module")
def voila(served, opened):
    "The explorers of the notebook, in Voila"
    managers = '["@jupyter-widgets/jupyterlab-manager", "@voila-dashboards/widgets-manager8"]'
    allowed = f"--VoilaConfiguration.extension_allowlist={managers}"
    page = opened(served("voila", "two.ipynb", "--no-browser", allowed), viewport=DESK)
    page.locator(".radrotator").nth(1).wait_for()
    return page.locator(".radrotator")


@pytest.fixture
def explorer(voila):
    "The first of them, as it was at the beginning"
    explorer = voila.first
    explorer.get_by_role("button", name="Reset").click()
    shows(explorer, turned())
    return explorer


@cache
def model(): return RadRotator.from_pretrained(device="cpu")


@cache
def turned(invert=False, **asked):
    "Levels of grey that a view should have; without angles, of the radiograph"
    radiograph = Radiograph.read(PELVIS, invert)
    return np.rint((model().rotate(radiograph, **asked) if asked else radiograph).pixels*255).astype(int)


def picture(explorer, pane=0):
    "The pixels that the browser has decoded"
    data = explorer.locator("img.widget-image").nth(pane).evaluate(DECODE)
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB")).astype(int)


def wait(check, what):
    "What `check` gives as soon as it is true"
    end = time.monotonic() + PATIENCE
    while not (found := check()):
        assert time.monotonic() < end, what() if callable(what) else what
        time.sleep(0.1)
    return found


def shows(explorer, levels, pane=0):
    "Wait until a picture has these levels of grey, but for a rounding"
    def same():
        seen = picture(explorer, pane)
        return seen.shape[:2] == levels.shape and abs(seen - levels[..., None]).max() <= 2
    wait(same, lambda: f"another picture is shown; the widget says: {explorer.inner_text()}")


def slider(explorer, axis): return explorer.get_by_role("slider", name=f"{axis}: ")
def value(explorer, axis): return float(slider(explorer, axis).get_attribute("aria-valuenow"))


def left_of(explorer, pane): return explorer.locator("img.widget-image").nth(pane).bounding_box()["x"]


def drag(explorer, axis, share):
    "Take a slider's handle with the mouse to a share of its way"
    handle, way = slider(explorer, axis), explorer.locator(".noUi-target").nth("xyz".index(axis))
    handle.scroll_into_view_if_needed()
    here, there = handle.bounding_box(), way.bounding_box()
    page, height = explorer.page, here["y"] + here["height"]/2
    page.mouse.move(here["x"] + here["width"]/2, height)
    page.mouse.down()
    for part in np.linspace(0.5, share, 12): page.mouse.move(there["x"] + part*there["width"], height)
    page.mouse.up()


def test_a_slider_dragged_by_the_mouse_turns_the_picture(explorer):
    drag(explorer, "z", 0.9)
    z = value(explorer, "z")
    assert 9 <= z <= 15 and z*2 == round(z*2)
    shows(explorer, turned(z=z))
    assert abs(turned(z=z) - turned()).mean() > 2  # and that is another picture
    assert explorer.get_by_label("z °").input_value() == f"{z:g}"


def test_arrow_keys_go_by_half_a_degree(explorer):
    slider(explorer, "y").focus()
    for key in ("ArrowRight", "ArrowRight", "ArrowRight", "ArrowLeft"): explorer.page.keyboard.press(key)
    shows(explorer, turned(y=1.0))
    explorer.page.keyboard.press("End")
    shows(explorer, turned(y=15.0))


TYPED = [
    ("-7,3", -7.5, None),
    ("99", 15, "99"),
    ("ten", 15, "'ten'"),
    ("<img src=x>", 15, "'<img src=x>'"),
    ("2", 2, None),
]


def test_typed_values(explorer):
    "What is typed, the degrees that come of it, and the value that an alert must quote"
    box, alert = explorer.get_by_label("x °"), explorer.get_by_role("alert")
    for text, degrees, quoted in TYPED:
        box.fill(text)
        box.press("Enter")
        shows(explorer, turned(x=float(degrees)))
        wait(lambda: box.input_value() == f"{degrees:g}", "the box keeps what was typed")
        def is_told(): return quoted in alert.inner_text() if quoted else not alert.count()
        wait(is_told, f"after {text!r} the widget should quote {quoted!r}")


def test_ways_to_look(explorer):
    drag(explorer, "z", 0.1)
    z = value(explorer, "z")
    def show(mode): explorer.get_by_role("button", name=mode, exact=True).click()
    show("before")
    shows(explorer, turned())
    show("side by side")
    shows(explorer, turned(), 0)
    shows(explorer, turned(z=z), 1)
    assert left_of(explorer, 1) > left_of(explorer, 0) + 100
    show("blink")
    wait(lambda: left_of(explorer, 1) == left_of(explorer, 0), "the pictures should lie on top of each other")
    show("difference")
    change = turned(z=z) - turned()
    wait(lambda: np.ptp(picture(explorer), axis=2).max() > 50, "the difference should have colours")
    red, _, blue = np.moveaxis(picture(explorer), -1, 0)
    assert (red > blue)[change > 25].mean() > 0.99 and (blue > red)[change < -25].mean() > 0.99
    assert explorer.locator(".rr-ends").inner_text().split()[1] == "0"
    samples = model().samples  # these weights may know the mean alone: then there is no map, and no seed
    maps = explorer.get_by_role("button", name="uncertainty", exact=True).count()
    assert maps == samples == explorer.get_by_label("seed").is_visible()


def test_sharp_or_mean(explorer):
    explorer.get_by_label("x °").fill("8"); explorer.get_by_label("x °").press("Enter")
    choose = lambda way: explorer.get_by_role("button", name=way, exact=True).click()
    for way, detail in (("mean", 0), ("sharp", 1)):
        choose(way)
        shows(explorer, turned(x=8.0, detail=detail))
    assert abs(turned(x=8.0, detail=0) - turned(x=8.0, detail=1)).max() > 2
    choose("mean")
    explorer.get_by_role("button", name="Reset").click()
    shows(explorer, turned())
    slider(explorer, "x").focus(); explorer.page.keyboard.press("End")
    shows(explorer, turned(x=15.0))                               # sharp again


def test_a_negative_is_turned_over_first(explorer):
    explorer.get_by_label("negative").check()
    shows(explorer, turned(invert=True))
    drag(explorer, "y", 0.8)
    shows(explorer, turned(invert=True, y=value(explorer, "y")))


def saved(explorer, button, suffix, folder):
    "The file that a button makes"
    explorer.get_by_role("button", name=button, exact=True).click()
    with explorer.page.expect_download() as download: explorer.locator(f".rr-link[download$='{suffix}']").click()
    path = folder/download.value.suggested_filename
    download.value.save_as(path)
    return path


def test_files_are_saved(explorer, tmp_path):
    drag(explorer, "z", 0.9)
    z = value(explorer, "z")
    shows(explorer, turned(z=z))
    png = saved(explorer, "PNG", ".png", tmp_path)
    assert png.name == f"radrotator_x+0_y+0_z{z:+g}.png"
    apart = abs(np.asarray(Image.open(png))/257 - turned(z=z)) > 2
    assert 0 < apart.mean() < 0.02                                        # the mark, and nothing else
    dicom = saved(explorer, "DICOM", ".dcm", tmp_path)
    ds = pydicom.dcmread(dicom)
    assert dicom.name == f"radrotator_x+0_y+0_z{z:+g}.dcm"
    assert (ds.SyntheticData, ds.PatientID) == ("YES", "SYNTHETIC") and f"z = {z:+g}°" in ds.DerivationDescription
    assert 0 < (abs(np.rint(ds.pixel_array/65535*255) - turned(z=z)) > 2).mean() < 0.02  # the mark in the corner


def test_a_sweep_is_saved_or_stopped(explorer, tmp_path):
    explorer.get_by_label("frames").fill("6"); explorer.get_by_label("frames").press("Enter")
    video = saved(explorer, "Sweep", ".mp4", tmp_path)
    about, *frames = read_frames(video)
    frames = np.array([np.frombuffer(frame, np.uint8).reshape(*about["size"][::-1], 3) for frame in frames])
    assert video.name == "radrotator_sweep_z.mp4" and len(frames) == 6
    first, last = frames[[0, -1], ..., 0].astype(int)
    assert abs(last - turned(z=15.0)).mean() < 6 < abs(first - last).mean()
    explorer.get_by_label("frames").fill("3000"); explorer.get_by_label("frames").press("Enter")
    explorer.get_by_role("button", name="Sweep", exact=True).click()
    drag(explorer, "y", 0.7)
    shows(explorer, turned(y=value(explorer, "y")))  # the sliders stay free
    explorer.get_by_role("button", name="Stop").click()
    explorer.get_by_role("button", name="Stop").wait_for(state="hidden")
    assert explorer.get_by_role("button", name="Sweep", exact=True).is_enabled()
    assert not explorer.locator(".rr-link").count()


def test_what_is_wrong_is_said(voila):
    assert "missing.png" in voila.nth(1).get_by_role("alert").inner_text()
    assert not voila.nth(1).get_by_role("button", name="PNG").is_enabled()
    assert "not for diagnosis" in voila.first.inner_text()


def test_a_phone_is_wide_enough(explorer):
    explorer.page.set_viewport_size(dict(width=390, height=800))
    drag(explorer, "y", 0.3)
    shows(explorer, turned(y=value(explorer, "y")))
    wide = explorer.evaluate("""e => [...e.querySelectorAll('*')]
        .filter(c => c.getBoundingClientRect().right > 391)
        .map(c => c.className)""")
    explorer.page.set_viewport_size(DESK)
    assert not wide


def test_jupyterlab_before_and_after_a_restart(served, opened):
    # One cell, since JupyterLab takes what is scrolled out of sight out of the page.
    open_to_us = "--allow-root", "--ServerApp.token=", "--ServerApp.password="
    address = served("jupyterlab", "--no-browser", *open_to_us)
    page = opened(f"{address}/lab/tree/one.ipynb", viewport=DESK)
    page.get_by_text("here | Idle").wait_for()  # before, JupyterLab would ask which kernel to take
    def menu(command):
        page.locator(".lm-MenuBar-itemLabel", has_text="Run").click()
        page.locator(f'.lm-Menu-item[data-command="{command}"]').click()
    explorer = page.locator(".radrotator").first
    menu("runmenu:run-all")
    for axis in "zx":
        shows(explorer, turned())
        drag(explorer, axis, 0.8)
        assert value(explorer, axis) > 5
        shows(explorer, turned(**{axis: value(explorer, axis)}))
        if axis == "x": break
        menu("runmenu:restart-and-run-all")
        page.locator(".jp-Dialog button.jp-mod-accept").click()
        def is_new(): return explorer.count() and value(explorer, "z") == 0
        wait(is_new, "the widget should be new after a restart")
