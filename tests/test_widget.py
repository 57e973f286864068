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


COLUMNS, SPACING = 600, 0.3  # pixels, and mm at the detector, of a picture wider than the screen shows whole


def write_dicom(path):
    "A radiograph that says where its sides are and what a pixel measures"
    pixels = np.kron(Radiograph.read(PELVIS).pixels, np.ones((4, 4)))[:800, 200:200 + COLUMNS]
    Radiograph(pixels, (SPACING, SPACING), at_detector=True).write(path)
    ds = pydicom.dcmread(path)
    del ds.SyntheticData
    ds.PatientOrientation = ["R", "F"]  # stored mirrored: it is turned to the patient's right on the left
    ds.PixelData = (pixels*65535).astype(np.uint16).tobytes()  # without the mark
    ds.save_as(path)


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    "Starts Voila or JupyterLab on a folder with notebooks, on a port that it finds; ends it with all its kernels"
    folder, running = tmp_path_factory.mktemp("served"), []
    (folder/"pelvis.png").write_bytes(PELVIS.read_bytes())
    write_dicom(folder/"pelvis.dcm")
    write_kernel(folder/"jupyter"/"kernels"/"here")
    write_notebook(folder/"three.ipynb", CELL, CELL.replace("pelvis", "missing"), CELL.replace(".png", ".dcm"))
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
    page = opened(served("voila", "three.ipynb", "--no-browser", allowed), viewport=DESK)
    page.locator(".radrotator").nth(2).wait_for()
    page.locator(".rr-tool-row").nth(2).wait_for()
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


def box(explorer, axis): return explorer.get_by_role("textbox", name=f"{axis}: ")
def press(explorer, name): explorer.get_by_role("button", name=name, exact=True).click()
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
    assert box(explorer, "z").input_value() == f"{z:g}"


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
    field, alert = box(explorer, "x"), explorer.get_by_role("alert")
    for text, degrees, quoted in TYPED:
        field.fill(text)
        field.press("Enter")
        shows(explorer, turned(x=float(degrees)))
        wait(lambda: field.input_value() == f"{degrees:g}", "the box keeps what was typed")
        def is_told(): return quoted in alert.inner_text() if quoted else not alert.count()
        wait(is_told, f"after {text!r} the widget should quote {quoted!r}")


def test_ways_to_look(explorer):
    drag(explorer, "z", 0.1)
    z = value(explorer, "z")
    assert not explorer.get_by_text("compared with").is_visible()
    press(explorer, "before")
    shows(explorer, turned())
    press(explorer, "side by side")
    shows(explorer, turned(x=1e-6), 0)  # like beside like: the network's own 0°
    shows(explorer, turned(z=z), 1)
    assert left_of(explorer, 1) > left_of(explorer, 0) + 100
    press(explorer, "input")
    shows(explorer, turned(), 0)
    press(explorer, "blink")
    wait(lambda: left_of(explorer, 1) == left_of(explorer, 0), "the pictures should lie on top of each other")
    press(explorer, "difference")
    change = turned(z=z) - turned()
    wait(lambda: np.ptp(picture(explorer), axis=2).max() > 50, "the difference should have colours")
    red, _, blue = np.moveaxis(picture(explorer), -1, 0)
    assert (red > blue)[change > 25].mean() > 0.99 and (blue > red)[change < -25].mean() > 0.99
    assert explorer.locator(".rr-ends").inner_text().split()[1] == "0"
    samples = model().samples  # these weights may know the mean alone: then there is no map, and no seed
    maps = explorer.get_by_role("button", name="uncertainty", exact=True).count()
    assert maps == samples == explorer.get_by_label("seed").is_visible()


def test_sharp_or_mean(explorer):
    box(explorer, "x").fill("8")
    box(explorer, "x").press("Enter")
    for way, detail in (("mean", 0), ("sharp", 1)):
        press(explorer, way)
        shows(explorer, turned(x=8.0, detail=detail))
    assert abs(turned(x=8.0, detail=0) - turned(x=8.0, detail=1)).max() > 2
    press(explorer, "mean")
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
    press(explorer, button)
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
    assert not voila.nth(1).get_by_role("button", name="Original").is_visible()
    assert "not for diagnosis" in voila.first.inner_text()


def test_a_phone_is_wide_enough(explorer):
    explorer.page.set_viewport_size(dict(width=390, height=800))
    assert len(rows_of_views(explorer)) == 1
    drag(explorer, "y", 0.3)
    shows(explorer, turned(y=value(explorer, "y")))
    wide = explorer.evaluate("""e => [...e.querySelectorAll('*')]
        .filter(c => c.getBoundingClientRect().right > 391)
        .map(c => c.className)""")
    explorer.page.set_viewport_size(DESK)
    assert not wide and len(rows_of_views(explorer)) == 1


def rows_of_views(explorer):
    "Heights at which the buttons for the views stand"
    return {button.bounding_box()["y"] for button in explorer.locator(".rr-modes button").all()}


def stage(explorer): return explorer.locator(".rr-stage").first


def seen(explorer):
    "Grey values on the screen, of the middle of the picture's frame"
    area = stage(explorer).bounding_box()
    clip = dict(x=area["x"] + 100, y=area["y"] + 100, width=area["width"] - 200, height=area["height"] - 200)
    return np.asarray(Image.open(io.BytesIO(explorer.page.screenshot(clip=clip))).convert("RGB")).astype(float)


def sweep_mouse(explorer, dx, dy, button="left", key=None):
    "Drag on the picture from its middle, by shares of its frame"
    stage(explorer).scroll_into_view_if_needed()
    area, mouse = stage(explorer).bounding_box(), explorer.page.mouse
    x, y = area["x"] + area["width"]/2, area["y"] + area["height"]/2
    mouse.move(x, y)
    if key: explorer.page.keyboard.down(key)
    mouse.down(button=button)
    mouse.move(x + dx*area["width"], y + dy*area["height"], steps=4)
    mouse.up(button=button)
    if key: explorer.page.keyboard.up(key)


def window(explorer):
    "Width and level, in % of the greys"
    return tuple(float(explorer.get_by_label(f"window {name}").input_value()) for name in ("width", "level"))


def place(explorer):
    "The picture on the screen, in and beyond its frame"
    return explorer.locator(".rr-stage img").first.bounding_box()


def test_window_and_level(explorer):
    "What is dragged, typed or pressed is what is seen: the straight line through the window's ends"
    plain = seen(explorer)
    def is_seen(width, level):
        expected = np.clip((plain/255 - (level - width/2)/100)*100/width, 0, 1)*255
        assert window(explorer) == (width, level)
        wait(lambda: abs(seen(explorer) - expected).max() <= 3, f"window {width}, level {level} is not what is seen")
    sweep_mouse(explorer, -0.5, 0.1)
    is_seen(50, 60)
    stage(explorer).focus()
    for key in ("ArrowRight", "ArrowRight", "ArrowUp"): explorer.page.keyboard.press(key)
    is_seen(60, 55)
    explorer.get_by_label("window width").fill("150")
    explorer.get_by_label("window width").press("Enter")
    is_seen(150, 55)
    explorer.get_by_label("window level").fill("-7")
    explorer.get_by_label("window level").press("Enter")
    is_seen(150, 0)
    press(explorer, "difference")                    # colours have a scale of their own
    explorer.locator(".rr-ends").wait_for()
    wait(lambda: explorer.get_by_label("window width").is_disabled(), "colours should have no window")
    assert not explorer.locator(".rr-stage img").first.evaluate("img => img.style.filter")
    press(explorer, "after")
    press(explorer, "Original")
    is_seen(100, 50)


def test_zoom_and_place(explorer):
    stage(explorer).scroll_into_view_if_needed()
    whole, mouse = place(explorer), explorer.page.mouse
    x, y = whole["x"] + 0.75*whole["width"], whole["y"] + 0.25*whole["height"]
    mouse.move(x, y)
    mouse.wheel(0, -400)
    zoomed = wait(lambda: place(explorer)["width"] > 1.5*whole["width"] and place(explorer), "the wheel should zoom")
    assert abs((x - zoomed["x"])/zoomed["width"] - 0.75) < 0.01         # what lay under the pointer lies there
    assert abs((y - zoomed["y"])/zoomed["height"] - 0.25) < 0.01
    for how in (dict(button="right"), dict(key="Shift")):
        before = place(explorer)
        sweep_mouse(explorer, 0.1, -0.1, **how)
        moved = place(explorer)
        assert abs(moved["x"] - before["x"] - 0.1*whole["width"]) < 2
        assert abs(moved["y"] - before["y"] + 0.1*whole["height"]) < 2
    assert window(explorer) == (100, 50)
    press(explorer, "Move")
    sweep_mouse(explorer, 3, 0)
    assert abs(place(explorer)["x"] - whole["x"]) < 1                    # the frame stays filled
    stage(explorer).focus()
    explorer.page.keyboard.press("-")
    assert place(explorer)["width"] < zoomed["width"]
    drag(explorer, "z", 0.8)                                             # another picture, at the same place
    before = place(explorer)
    shows(explorer, turned(z=value(explorer, "z")))
    assert place(explorer) == before
    stage(explorer).focus()
    explorer.page.keyboard.press("0")
    assert abs(place(explorer)["width"] - whole["width"]) < 1
    press(explorer, "Window")


def test_side_and_scale(voila):
    "They stand where the file says so, and stay true"
    bare, told = voila.nth(0), voila.nth(2)
    assert "no marker" in bare.inner_text() and "no scale" in bare.inner_text()
    assert not bare.locator(".rr-scale").first.is_visible() and not bare.locator(".rr-left").first.inner_text()
    overlay = told.locator(".rr-overlay").first
    assert [overlay.locator(f".rr-{side}").inner_text() for side in ("left", "right")] == ["R", "L"]
    assert overlay.locator(".rr-left").bounding_box()["x"] < overlay.locator(".rr-right").bounding_box()["x"]
    assert "700×525 pixels of 800×600" in told.inner_text() and "at the detector" in told.inner_text()
    lengths = set()
    for _ in range(3):
        length = float(re.fullmatch(r"([\d.]+) mm at the detector", overlay.locator(".rr-scale b").inner_text())[1])
        share = overlay.locator(".rr-scale i").bounding_box()["width"]/place(told)["width"]
        assert abs(share*COLUMNS*SPACING/length - 1) < 0.02  # the bar is as long as it says
        lengths.add(length)
        for _ in range(4): press(told, "zoom in")
    assert len(lengths) > 1
    press(told, "Original")


UNNAMED = """explorer => [...explorer.querySelectorAll('button, input, select, img.widget-image, [tabindex="0"]')]
    .filter(e => e.checkVisibility() && e.type != 'checkbox' && !e.closest('.widget-checkbox'))
    .filter(e => !(e.getAttribute('aria-label') || e.labels?.[0]?.textContent || e.textContent.trim()))
    .map(e => e.outerHTML)"""


def test_everything_has_a_name_and_is_reached_by_keyboard(explorer):
    assert explorer.evaluate(UNNAMED) == []
    explorer.locator(".rr-modes button").last.focus()
    explorer.page.keyboard.press("Tab")
    assert stage(explorer).evaluate("e => e == document.activeElement")
    reached = []
    for _ in range(8):
        explorer.page.keyboard.press("Tab")
        reached.append(explorer.page.evaluate("(e => e.ariaLabel || e.textContent.trim())(document.activeElement)"))
    assert reached[:7] == ["Window", "Move", "zoom out", "zoom in", "window width, %", "window level, %", "Original"]
    pressed = explorer.locator(".rr-modes [aria-pressed=true]")
    assert pressed.all_inner_texts() == ["after"]


def test_the_first_picture_waits_for_nothing():
    "The radiograph is shown before PyTorch is imported: in 3 seconds of an idle machine, by its processor's time"
    cell = CELL.replace('RotationExplorer("pelvis.png")', f"explorer = RotationExplorer({str(PELVIS)!r})")
    told = "len(explorer.pictures.panes[0].image.value), 'torch' in sys.modules, sum(os.times()[:2])"
    code = f"{cell}\nimport os, sys\nprint({told})"
    def run():
        ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        size, loaded, seconds = ran.stdout.split()
        assert int(size) > 10_000 and loaded == "False"
        return float(seconds)
    assert min(run() for _ in range(2)) < 2


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
        stage(explorer).focus()
        page.keyboard.press("ArrowLeft")    # which JupyterLab would take for a walk through its cells
        assert window(explorer) == (95, 50)
        if axis == "x": break
        menu("runmenu:restart-and-run-all")
        page.locator(".jp-Dialog button.jp-mod-accept").click()
        def is_new(): return explorer.count() and value(explorer, "z") == 0
        wait(is_new, "the widget should be new after a restart")
