"""The page that turns a radiograph in the browser: used as people use it, with files, mouse and keys, and compared with what Python gives."""
import base64, io, threading
from functools import cache, partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from bs4 import BeautifulSoup
from helpers import dicom_bytes
from PIL import Image
from pydicom import uid
from scripts import load_script, one_folder

from radrotator.radiograph.image import Radiograph, resize
from radrotator.rotate.rotator import RadRotator

ROOT = Path(__file__).resolve().parents[1]
PELVIS = ROOT/"nbs"/"images"/"pelvis.png"
PATIENCE = 120_000  # milliseconds: a busy machine takes its time, and no test asserts any
TURNS = (0, 0, 12), (-12, 0, 0), (0, 15, 0), (5, -7.5, -11), (-15, 15, 15)


@pytest.fixture(scope="session")
def built(tmp_path_factory):
    "The folder of the page, built once for all workers of pytest-xdist"
    with one_folder(tmp_path_factory, "page") as page:
        if not (page/"rotate-offline.js").exists():
            page.mkdir(exist_ok=True)
            missing = load_script("rotator").build_page(page)
            if missing: pytest.skip(f"the page cannot be built: {missing}")
    return page


def open_page(context, address):
    "A page that is ready, and notes what it complains of and what it asks of a network"
    context.set_default_timeout(PATIENCE)
    page = context.new_page()
    page.wrong = []
    page.on("console", lambda message: message.type == "error" and page.wrong.append(message.text))
    page.on("pageerror", lambda error: page.wrong.append(str(error)))
    page.on("request", lambda request: request.url.startswith(("file:", "data:", "blob:")) or page.wrong.append(request.url))
    page.goto(address)
    page.get_by_text("Ready").wait_for()
    return page


@pytest.fixture(scope="module")
def opened(browser, built):
    context = browser.new_context(viewport=dict(width=1280, height=900), accept_downloads=True)
    page = open_page(context, (built/"rotate.html").as_uri())
    yield page
    context.close()
    assert not page.wrong, "\n".join(page.wrong)


@pytest.fixture
def bare(opened):
    "The page with no box ticked"
    box = opened.locator("#negative")
    if box.is_visible() and box.is_checked(): wait_for(opened, box.uncheck)
    return opened


@pytest.fixture
def page(bare):
    "The page as it was at the beginning, with the example"
    wait_for(bare, lambda: bare.get_by_role("button", name="Take the example").click())
    bare.get_by_role("button", name="Reset").click()
    bare.get_by_label("turned", exact=True).check()
    done(bare)
    return bare


def wait_for(page, act):
    "Do something, and wait until the page has an answer; its words"
    page.evaluate("for (const name of ['status', 'error']) document.getElementById(name).textContent = ''")
    act()
    page.locator("#status:has-text('lifted'), #error:not(:empty)").first.wait_for()
    done(page)
    return page.locator("#error").inner_text()


def done(page):
    "Wait until the whole view is painted"
    page.evaluate("() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
    if page.locator("#work").is_visible(): page.locator("#picture[aria-busy=false]").wait_for()


def give(page, data, name="a.dcm"):
    "Choose a file; what the page says is wrong with it"
    return wait_for(page, lambda: page.set_input_files("#file", dict(name=name, mimeType="", buffer=data)))


def turn(page, vector=(0, 0, 0), detail=1):
    "Move the sliders"
    page.evaluate("""values => {
        for (const [id, value] of Object.entries(values)) document.getElementById(id).value = value
        document.getElementById("x").dispatchEvent(new Event("input", {bubbles: true}))
    }""", dict(zip("xyz", vector), detail=detail))
    done(page)


def picture(page):
    "Levels of grey that the page shows, at its own resolution"
    data = page.evaluate("document.getElementById('picture').toDataURL('image/png').split(',')[1]")
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB")).astype(int)[..., 0]


@cache
def model(): return RadRotator.from_pretrained(device="cpu")


def levels(radiograph, vector=(0, 0, 0), detail=1.0):
    "Levels of grey that Python gives"
    return np.rint(model().rotate(radiograph, *vector, detail=detail).pixels*255).astype(int)


def shows(page, expected, within=2):
    "Whether the page shows these levels of grey"
    seen = picture(page)
    assert seen.shape == expected.shape
    assert abs(seen - expected).max() <= within


# ---- what is shown ---------------------------------------------------------------------------------------------------

def test_views_are_those_of_python(page):
    pelvis = Radiograph.read(PELVIS)
    shows(page, levels(pelvis), within=0)
    for vector in TURNS:
        expected = levels(pelvis, vector)
        turn(page, vector)
        shows(page, expected)
        assert abs(expected - levels(pelvis)).mean() > 2  # and that is another picture
    for detail in (0, 0.5):
        turn(page, TURNS[3], detail)
        shows(page, levels(pelvis, TURNS[3], detail))
    assert abs(levels(pelvis, TURNS[3], 0) - levels(pelvis, TURNS[3])).max() > 2


def test_pictures_of_other_kinds_and_shapes(page, tmp_path):
    "Larger than the curve is made from, higher than wide, wider than high, odd, in 16 bits, as JPEG"
    grain = np.random.default_rng(0).normal(0, 0.01, (700, 700))
    large = np.clip(resize(Radiograph.read(PELVIS).pixels, (700, 700)) + grain, 0, 1)
    pictures = dict(tall=(large[:, 101:500]*65535).astype(np.uint16), small=(large[::9, ::9]*255).astype(np.uint8))
    for name, pixels in pictures.items(): Image.fromarray(pixels).save(tmp_path/f"{name}.png")
    Image.fromarray((large[150:549]*255).astype(np.uint8)).save(tmp_path/"wide.jpg", quality=90)
    Image.fromarray((np.stack([large, large**2, 0*large], -1)*255).astype(np.uint8)).save(tmp_path/"colour.png")
    for path in sorted(tmp_path.iterdir()):
        assert give(page, path.read_bytes(), path.name) == ""
        radiograph = Radiograph.read(path)
        turn(page)
        shows(page, levels(radiograph), within=0)
        turn(page, TURNS[3])
        shows(page, levels(radiograph, TURNS[3]))
        assert "does not say whether bone is bright" in page.locator("#notes").inner_text()


def test_a_negative_is_turned_over_first(page):
    wait_for(page, page.get_by_label("Negative").check)
    negative = Radiograph.read(PELVIS, invert=True)
    shows(page, levels(negative), within=0)
    turn(page, TURNS[0])
    shows(page, levels(negative, TURNS[0]))


# ---- DICOM -----------------------------------------------------------------------------------------------------------

def scene(bits=12, signed=False):
    "Stored values of a picture that is not symmetric"
    y, x = np.mgrid[:96, :80]/80
    bright = np.exp(-((x - 0.35)**2 + (y - 0.5)**2)/0.05) + 0.4*(x > 0.7)*(y > 0.6) + 0.3*x
    values = np.rint(bright/bright.max()*(2**bits - 1)).astype(int)
    values[0], values[-1] = values.min(), 0
    return (values - 2**(bits - 1)*signed).astype(f"{'i' if signed else 'u'}{1 if bits == 8 else 2}")


def jpeg(**options):
    "The picture as a JPEG stream by Pillow"
    stream = io.BytesIO()
    Image.fromarray(scene(8)).save(stream, "JPEG", **options)
    return stream.getvalue()


def lossless():
    import imagecodecs
    return imagecodecs.jpeg8_encode(scene(12), lossless=True, bitspersample=12)


def cases():
    "Name → DICOM file that Python reads, too"
    plain, window = scene(), dict(WindowCenter=2000, WindowWidth=2600)
    make = partial(dicom_bytes, bits=12)
    yield "plain", make(plain)
    yield "implicit", make(plain, syntax=uid.ImplicitVRLittleEndian)
    yield "big-endian", make(plain, syntax=uid.ExplicitVRBigEndian)
    yield "deflated", make(plain, syntax=uid.DeflatedExplicitVRLittleEndian)
    yield "8 bits", dicom_bytes(scene(8))
    yield "signed", make(scene(signed=True), PixelRepresentation=1, RescaleSlope=2, RescaleIntercept=-100)
    yield "turned over", make(plain, PhotometricInterpretation="MONOCHROME1", **window)
    yield "window", make(plain, **window)
    yield "exact", make(plain, VOILUTFunction="LINEAR_EXACT", **window)
    yield "sigmoid", make(plain, VOILUTFunction="SIGMOID", **window)
    yield "padding", make(plain, PixelPaddingValue=0)
    yield "air bright", make(plain, PixelIntensityRelationshipSign=1)
    yield "mirrored", make(plain, PatientOrientation=["R", "F"])
    yield "JPEG", dicom_bytes(scene(8), stream=jpeg(quality=95), syntax=uid.JPEGBaseline8Bit)
    yield "lossless JPEG", make(plain, stream=lossless(), syntax=uid.JPEGLosslessSV1)


@pytest.mark.parametrize("name, data", list(cases()), ids=lambda value: value if isinstance(value, str) else "")
def test_a_dicom_file_is_read_as_python_reads_it(bare, tmp_path, name, data):
    (tmp_path/"a.dcm").write_bytes(data)
    assert give(bare, data) == ""
    turn(bare)
    shows(bare, levels(Radiograph.read(tmp_path/"a.dcm")), within=1)
    notes = bare.locator("#notes").inner_text()
    for words in ("turned over", "mirrored", "air"): assert (words in notes) == name.startswith(words), words


def test_a_dicom_file_is_dropped(page, tmp_path):
    data = dicom_bytes(scene(), bits=12)
    (tmp_path/"a.dcm").write_bytes(data)
    carried = page.evaluate_handle("""text => {
        const carried = new DataTransfer()
        carried.items.add(new File([Uint8Array.from(atob(text), letter => letter.charCodeAt(0))], "hip.dcm"))
        return carried
    }""", base64.b64encode(data).decode())
    assert wait_for(page, lambda: page.dispatch_event("#drop", "drop", dict(dataTransfer=carried))) == ""
    turn(page, TURNS[0])
    shows(page, levels(Radiograph.read(tmp_path/"a.dcm"), TURNS[0]))


def bad_files():
    "Words of the refusal → a file"
    png, good = PELVIS.read_bytes(), dicom_bytes(scene(), bits=12)
    even = io.BytesIO()
    Image.fromarray(np.full((64, 64), 7, np.uint8)).save(even, "PNG")
    strip = io.BytesIO()
    Image.fromarray(np.tile(np.arange(4000)//16, (16, 1)).astype(np.uint8)).save(strip, "PNG")
    colour = np.zeros((96, 80, 3), np.uint8)
    yield "no DICOM", b"<svg onload='alert(1)'/>"
    yield "no DICOM", b""
    yield "damaged or cut short", png[:5000]
    yield "damaged or cut short", png[:5000] + b"\0"*9 + png[5009:]
    yield "damaged or cut short", jpeg()[:900]
    yield "damaged or cut short", good[:400]
    yield "cut short", good[:-500]
    yield "even grey", even.getvalue()
    yield "narrow", strip.getvalue()
    yield "too few pixels", dicom_bytes(scene()[:12], bits=12)
    yield "modality is CT", dicom_bytes(scene(), "CT", bits=12)
    yield "several pictures", dicom_bytes(np.stack([scene()]*2), bits=12, NumberOfFrames=2)
    yield "in colour", dicom_bytes(colour[..., 0], SamplesPerPixel=3, PlanarConfiguration=0, PhotometricInterpretation="RGB", PixelData=colour.tobytes())
    yield "compressed", dicom_bytes(scene(), bits=12, compress=(uid.RLELossless, {}))
    yield "contradicts itself", dicom_bytes(scene(), bits=12, PresentationLUTShape="INVERSE")
    yield "not square", dicom_bytes(scene(), bits=12, PixelSpacing=[0.2, 0.1])
    yield "another size", dicom_bytes(scene(8)[:50], stream=jpeg(), syntax=uid.JPEGBaseline8Bit)


def test_bad_files_are_refused_in_a_sentence(page):
    turn(page, TURNS[0])
    before = picture(page)
    for words, data in bad_files():
        said = give(page, data, "Doe^John 1944.png")
        assert words in said and said.startswith("Cannot ") and said.endswith(".") and len(said) < 160, (words, said)
        assert "Doe" not in said and page.locator("#status").inner_text() == ""
    assert np.array_equal(picture(page), before)  # what was shown goes on


# ---- hands -----------------------------------------------------------------------------------------------------------

def test_keys_move_the_sliders(page):
    pelvis = Radiograph.read(PELVIS)
    page.locator("#z").focus()
    for key in ("ArrowRight", "ArrowRight", "ArrowRight", "ArrowLeft"): page.keyboard.press(key)
    done(page)
    assert page.locator("output[for=z]").inner_text() == "+1°" and "z +1°" in page.locator("#picture").get_attribute("aria-label")
    shows(page, levels(pelvis, (0, 0, 1)))
    page.keyboard.press("Home")
    done(page)
    shows(page, levels(pelvis, (0, 0, -15)))
    page.get_by_role("button", name="Reset").click()
    done(page)
    shows(page, levels(pelvis), within=0)


def test_before_and_after(page):
    pelvis = Radiograph.read(PELVIS)
    turn(page, TURNS[0])
    page.get_by_label("as it was").check()
    done(page)
    shows(page, levels(pelvis), within=0)
    page.get_by_label("half and half").check()
    done(page)
    shows(page, np.hstack([levels(pelvis)[:, :128], levels(pelvis, TURNS[0])[:, 128:]]))


def test_a_download_says_what_it_is(page, tmp_path):
    turn(page, TURNS[3])
    with page.expect_download() as download: page.get_by_role("button", name="Download PNG").click()
    download.value.save_as(tmp_path/"a.png")
    assert download.value.suggested_filename == "radrotator_x+5_y-7.5_z-11.png"
    with Image.open(tmp_path/"a.png") as image:
        image.load()
        text, pixels = image.text["Description"], np.asarray(image).astype(int)
    assert text.startswith("SYNTHETIC, not for diagnosis. x +5, y -7.5, z -11 degrees") and model().fingerprint()[:12] in text
    expected = levels(Radiograph.read(PELVIS), TURNS[3])
    assert pixels.shape == expected.shape and abs(pixels - expected)[:215].max() <= 2
    assert (abs(pixels - expected)[225:] > 60).mean() > 0.1  # the mark, white with a black edge


def test_a_phone(browser, built, page):
    context = browser.new_context(viewport=dict(width=390, height=844), has_touch=True, is_mobile=True, color_scheme="dark")
    phone = open_page(context, (built/"rotate.html").as_uri())
    assert wait_for(phone, lambda: phone.get_by_role("button", name="Take the example").tap()) == ""
    assert phone.evaluate("document.documentElement.scrollWidth") <= 390
    for control in ("x", "y", "z", "detail", "save"):
        box = phone.locator(f"#{control}").bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= 390 and box["height"] >= 24, control
    phone.locator("#z").tap(position=dict(x=300, y=12))
    done(phone)
    z = phone.locator("#z").evaluate("slider => slider.valueAsNumber")
    assert z > 5
    shows(phone, levels(Radiograph.read(PELVIS), (0, 0, z)))
    assert phone.evaluate("getComputedStyle(document.body).backgroundColor") != page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert not phone.wrong
    context.close()


# ---- nothing leaves --------------------------------------------------------------------------------------------------

def test_the_page_may_not_connect(browser, built):
    "Its own policy stops what its scripts would send"
    context = browser.new_context()
    page = open_page(context, (built/"rotate.html").as_uri())
    tried = page.evaluate("fetch('http://127.0.0.1:9/x', {mode: 'no-cors'}).then(() => 'sent', error => 'stopped')")
    assert tried == "stopped" and any("Content Security Policy" in words for words in page.wrong)
    assert not any(words.startswith("http") for words in page.wrong)  # not even asked for
    context.close()


def test_it_opens_without_a_network_once_it_was_opened(browser, built):
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_): pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=built))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    context = browser.new_context()
    page = open_page(context, f"http://127.0.0.1:{server.server_port}/rotate.html")
    page.evaluate("navigator.serviceWorker.ready.then(() => null)")
    server.shutdown()
    server.server_close()
    page.reload()
    page.get_by_text("Ready").wait_for()
    assert wait_for(page, lambda: page.get_by_role("button", name="Take the example").click()) == ""
    turn(page, TURNS[0])
    shows(page, levels(Radiograph.read(PELVIS), TURNS[0]))
    context.close()


def test_where_npm_is_missing_the_page_is_left_out(monkeypatch, tmp_path, capsys):
    docs = load_script("docs")
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert not docs.write_rotator(tmp_path) and "rotate.html is left out: npm is missing" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())
    soup = BeautifulSoup('<p>the <a href="../rotate.html">page</a>, <a href="b.html">b</a></p>', "html.parser")
    bar = [dict(text="Home", href="index.ipynb"), dict(text="Try it", href="rotate.html")]
    docs.unlink_rotator([soup], bar)
    assert str(soup) == '<p>the page, <a href="b.html">b</a></p>' and [item["text"] for item in bar] == ["Home"]
