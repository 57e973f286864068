"""Films of a sweep: what players and readers find in them, and that an interruption at any moment costs no more than
the frames that were under way."""
import base64, contextlib, csv, hashlib, json, os, resource, shutil, signal, subprocess, warnings
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from imageio_ffmpeg import get_ffmpeg_exe, read_frames
from PIL import Image

from processes import serving
from radrotator.core import RadRotatorError, RadRotatorWarning
from radrotator.model.lift import Lift, LiftConfig
from radrotator.model.unet import UNet, UNetConfig
from radrotator.radiograph.image import Radiograph
from radrotator.radiograph.write import burn_mark
from radrotator.rotate import frames as frames_room, rotator
from radrotator.rotate.figure import montage
from radrotator.rotate.rotator import RadRotator
from radrotator.rotate.video import fit_to_film, read_frame

FRAMES = 11  # of the sweeps here: two batches of four, and three frames
LIFT = LiftConfig(size=32, canvas=48, slabs=8, channels=16, multipliers=(1, 2))


def model_of(seed=0):
    """A network that has learnt nothing and lifts: it turns the picture in its plane as a trained one does, and
    otherwise as patients are in the mean"""
    torch.set_num_threads(1)  # the order of sums is that of other processes, too
    torch.manual_seed(seed)
    return RadRotator(Lift(LIFT), {})


def drawing_model(seed=0):
    "A U-Net of random numbers, which draws views of 32² pixels"
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    network = UNet(replace(UNetConfig.tiny(), size=32, channels=8))
    for module in network.modules():
        if getattr(module, "weight", None) is not None and not module.weight.any(): module.reset_parameters()
    return RadRotator(network, {})


def picture(height=75, width=60, spacing=None):
    "A bright ring and two blobs"
    row, column = np.mgrid[-1:1:height*1j, -1:1:width*1j]
    ring = np.exp(-((np.hypot(row, column) - 0.5)/0.15)**2)
    blobs = np.exp(-((row - 0.3)**2 + (abs(column) - 0.6)**2)/0.02)
    return Radiograph(np.clip(0.1 + 0.6*(0.7*ring + 0.6*blobs), 0, 1), spacing, "Doe^Jane.dcm")


def write(path, model=None, **asked):
    "The sweep that all tests are about"
    return (model or model_of()).write_sweep(picture(), path, **dict(axis="y", frames=FRAMES, batch=4, mark=False) | asked)


def film(path):
    "Its frames, (N, H, W) in grey, and what ffmpeg tells about it"
    reader = read_frames(path, "gray", bits_per_pixel=8)
    about = next(reader)
    frames = [np.frombuffer(frame, np.uint8).reshape(about["size"][::-1]) for frame in reader]
    return np.stack(frames), about


def moving_picture(path):
    "The frames of a GIF, and the milliseconds that each stands"
    frames, times = [], []
    with Image.open(path) as image:
        for i in range(image.n_frames):
            image.seek(i)
            frames.append(np.asarray(image.convert("L")))
            times.append(image.info["duration"])
    return np.stack(frames), times


def content(path):
    "What a result holds, to be compared"
    if path.is_dir(): return {p.name: p.read_bytes() for p in sorted(path.iterdir())}
    return (film(path)[0] if path.suffix == ".mp4" else moving_picture(path)[0]).tobytes()


@contextlib.contextmanager
def refused(code):
    "The block is refused with this code; the error is given, to be looked at afterwards"
    with pytest.raises(RadRotatorError) as error: yield error
    assert error.value.code == code


def names(folder):
    "Everything in a folder, hidden or not"
    return sorted(p.name for p in folder.iterdir())


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    "One result of each kind, never interrupted: by its ending"
    folder = tmp_path_factory.mktemp("whole")
    return {kind: write(folder/f"turn{kind}") for kind in (".mp4", ".gif", "")}


# What is in a film

def test_a_video_is_what_players_know(tmp_path):
    "H.264, yuv420p, ten seconds of 30 frames each, even sides, its index in front, and greys as they were"
    model = model_of()
    path = model.write_sweep(picture(), tmp_path/"turn.mp4", axis="y", mark=False)
    frames, about = film(path)
    assert (about["codec"], about["fps"], about["duration"]) == ("h264", 30, 10)
    assert about["pix_fmt"].startswith("yuv420p(tv, bt709")
    assert frames.shape == (300, 76, 60)
    views = np.stack([view.pixels for view in model.sweep(picture(), "y")])
    assert np.sqrt(np.mean((frames[:, :75] - 255*views)**2, axis=(1, 2))).max() < 2
    assert frames[:, 75].max() < 30  # the row that makes it even is black, but for what spills over
    data = path.read_bytes()
    assert data.find(b"moov") < data.find(b"mdat")


SYNTHETIC = "SYNTHETIC, not for diagnosis"


def test_metadata_say_what_it_is_and_nothing_of_the_patient(whole, tmp_path):
    command = [get_ffmpeg_exe(), "-hide_banner", "-i", whole[".mp4"]]
    tags = subprocess.run(command, capture_output=True, text=True).stderr
    assert SYNTHETIC in tags and "y from -15° to 15°" in tags and model_of().fingerprint()[:12] in tags
    with Image.open(whole[".gif"]) as image: assert SYNTHETIC.encode() in image.info["comment"]
    with Image.open(whole[""]/"003.png") as image:
        assert image.info["Description"].startswith(f"{SYNTHETIC}. y = −6.0°;")
    for path in (whole[".mp4"], whole[".gif"], *whole[""].iterdir()): assert b"Doe" not in path.read_bytes()


def test_a_gif_takes_as_long_as_the_video(whole):
    frames, times = moving_picture(whole[".gif"])
    assert set(times) == {30, 40} and abs(sum(times) - 1000*FRAMES/30) <= 5
    assert np.array_equal(frames, [read_frame(path) for path in sorted(whole[""].glob("*.png"))])  # no grey is lost
    with Image.open(whole[".gif"]) as image: assert image.info["loop"] == 0


def test_frames_are_the_views_of_a_sweep(whole):
    assert names(whole[""]) == [*(f"{i:03}.png" for i in range(FRAMES)), "angles.csv"]
    views = model_of().sweep(picture(), "y", np.linspace(-15, 15, FRAMES), batch=4)
    for i, view in enumerate(views):
        with Image.open(whole[""]/f"{i:03}.png") as image:
            assert image.mode.startswith("I;16")
            assert np.array_equal(np.asarray(image), np.rint(view.pixels*65535))
    rows = list(csv.DictReader(open(whole[""]/"angles.csv")))
    found = [(row["frame"], row["axis"], float(row["degrees"])) for row in rows]
    assert found == [(f"{i:03}.png", "y", 3.0*i - 15) for i in range(FRAMES)]


def test_there_and_back(tmp_path):
    frames, _ = moving_picture(write(tmp_path/"turn.gif", frames=4, bounce=True))
    assert len(frames) == 6 and np.array_equal(frames[4:], frames[[2, 1]])


def test_a_large_radiograph_is_scaled_down_for_a_film_only(tmp_path):
    large = picture(1200, 1120)
    assert film(model_of().write_sweep(large, tmp_path/"turn.mp4", frames=2))[0].shape == (2, 1080, 1008)
    first = model_of().write_sweep(large, tmp_path/"turn", frames=2)/"000.png"
    with Image.open(first) as image: assert image.size == (1120, 1200)
    assert np.abs(fit_to_film(large).pixels[::4, ::4] - picture(1080, 1008).pixels[::4, ::4]).max() < 0.01


def test_pixels_that_are_not_square_are_shown_as_they_are(tmp_path):
    "A disc, stored at half as many rows as columns, is a disc again"
    row, column = np.mgrid[-1:1:50j, -1:1:100j]
    disc = Radiograph(np.hypot(row, column) < 0.8, (0.4, 0.2))
    shown, _ = film(model_of().write_sweep(disc, tmp_path/"turn.mp4", frames=2, span=0, mark=False))
    assert shown.shape[1:] == (100, 100)
    across = [np.ptp(np.flatnonzero(shown[0].max(axis=axis) > 128)) for axis in (0, 1)]
    assert abs(across[0] - across[1]) <= 4 and across[0] > 70


@pytest.mark.parametrize("size", [64, 300, 3000])
def test_a_caption_can_be_read(size):
    "Enough black and white, in the lower left, on any background; elsewhere nothing is touched"
    for grey in (0, 0.5, 1):
        given = np.full((size, size), grey, np.float32)
        shown = burn_mark(given, "z = −12.3°\nSYNTHETIC")
        rows, columns = np.nonzero(shown != given)
        assert rows.min() > size/2 and rows.max() < size and columns.max() < 0.9*size and columns.min() > 0
        assert (np.ptp(rows) + 1)/2 > 8                         # letters are at least seven pixels high, with an edge
        box = shown[rows.min():rows.max() + 1, columns.min():columns.max() + 1]
        assert 0.1 < (box > 0.7).mean() < 0.9 or grey == 1 and 0.1 < (box < 0.3).mean() < 0.9
    assert not np.array_equal(shown, burn_mark(given, "z = +12.3°\nSYNTHETIC"))


def test_the_label_is_in_the_frame(tmp_path, whole):
    labelled = content(write(tmp_path/"turn", label=True))
    plain = [read_frame(whole[""]/f"{i:03}.png") for i in (0, 1)]
    shown = [read_frame(tmp_path/"turn"/f"{i:03}.png") for i in (0, 1)]
    assert all(np.array_equal(a[:30], b[:30]) and not np.array_equal(a[40:], b[40:]) for a, b in zip(plain, shown))
    assert len(labelled) == FRAMES + 1


LOOK_AT_VIDEO = """async source => {
    const video = document.createElement('video')
    const met = name => new Promise((good, bad) => {
        video['on' + name] = good
        video.onerror = () => bad(video.error.message)
    })
    video.muted = true
    let event = met('loadeddata')
    video.src = source
    await event
    event = met('seeked')
    video.currentTime = 0.2
    await event
    const canvas = document.createElement('canvas');
    [canvas.width, canvas.height] = [video.videoWidth, video.videoHeight]
    const brush = canvas.getContext('2d')
    brush.drawImage(video, 0, 0)
    const pixels = [...brush.getImageData(0, 0, canvas.width, canvas.height).data].filter((_, i) => i % 4 == 0)
    return [video.duration, video.videoWidth, video.videoHeight, pixels]
}"""


def test_a_browser_plays_it(whole, browser):
    "It finds a duration and a size, goes to a moment of the film, and shows it"
    page = browser.new_page()
    data = base64.b64encode(whole[".mp4"].read_bytes()).decode()  # a script may not read pixels of a file
    *size, pixels = page.evaluate(LOOK_AT_VIDEO, f"data:video/mp4;base64,{data}")
    page.close()
    assert size == [pytest.approx(FRAMES/30, abs=0.01), 60, 76]
    shown = np.array(pixels).reshape(76, 60)
    errors = [np.sqrt(np.mean((shown - frame)**2)) for frame in film(whole[".mp4"])[0].astype(float)]
    assert min(errors) < 3 and np.argmin(errors) in (5, 6)  # 0.2 s are six frames


# Interrupted and resumed

def kill_self(*_, **__): os.kill(os.getpid(), signal.SIGKILL)


def work(path, killed_at=None, resume=False):
    "In a process of its own: write, and be killed at a given moment"
    rounds = []
    def progress(rows, total):
        rounds.append(total)
        for i, row in enumerate(rows):
            if killed_at == ("frames", "film")[len(rounds) - 1] + f" {i}": kill_self()
            yield row
    if killed_at == "manifest": frames_room.claim_folder = kill_self
    if killed_at == "end": rotator.move_into_place = kill_self
    if killed_at == "naming": Path.rename = kill_self
    if killed_at == "tidying":
        move = rotator.move_into_place
        rotator.move_into_place = lambda *where: (move(*where), kill_self())
    write(path, resume=resume, progress=progress)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with serving(tmp_path_factory.mktemp("server"), warm_up) as server: yield server


def warm_up():
    "Import what a sweep imports as it begins"
    import scipy.ndimage, skimage.transform


MOMENTS = ["manifest", *(f"frames {i}" for i in (0, 1, 6, FRAMES - 1)), "film 0", "film 7", "end", "naming", "tidying"]
ENDINGS = [(moment, kind) for moment in MOMENTS for kind in (".mp4", ".gif", "")]


# a folder has no film
@pytest.mark.parametrize("moment, kind", [(m, kind) for m, kind in ENDINGS if kind or not m.startswith("film")])
def test_killed_and_resumed(moment, kind, whole, tmp_path, server):
    "Nothing stands under the result's name until it is whole; resumed, it is what it would have been, and alone"
    path = tmp_path/f"turn{kind}"
    assert server(partial(work, path, moment)).was_killed
    assert path.exists() == (moment == "tidying")
    if moment == "tidying":
        with refused("EXISTS"): write(path, resume=True)
    else: assert write(path, resume=True) == path
    assert names(tmp_path) == [path.name] and content(path) == content(whole[kind])


def test_killed_again_and_again(whole, tmp_path, server):
    """As the disk is about to change for the n-th time, until it is done: what is left depends on nothing else.
    A sweep changes it about 80 times before it has its name, and no attempt gets beyond the 14th"""
    path, chance, deaths = tmp_path/"turn.mp4", np.random.default_rng(0), 0
    while not path.exists():
        where = str(tmp_path), "", int(chance.integers(5, 15)), "signal", "SIGKILL"
        ended = server(partial(work, path, resume=True), at=where)
        assert ended.was_killed or path.exists(), ended
        deaths += ended.was_killed
        assert deaths < 40, "it does not get on"
    assert deaths >= 5
    shutil.rmtree(tmp_path/".turn.mp4.frames", ignore_errors=True)
    assert names(tmp_path) == ["turn.mp4"] and content(path) == content(whole[".mp4"])


def test_frames_that_are_there_are_not_made_again(tmp_path, server):
    path, made = tmp_path/"turn", []
    assert server(partial(work, path, "frames 6")).was_killed
    before = {p.name: p.stat().st_mtime_ns for p in (tmp_path/".turn.frames").glob("*.png")}
    assert len(before) == 6
    write(path, resume=True, progress=lambda rows, total: made.append(total) or rows)
    assert made == [FRAMES - 6] and all((path/name).stat().st_mtime_ns == when for name, when in before.items())


def interrupt(path, after=3, **asked):
    "Ctrl-C, or what else is raised, when so many frames are there"
    def progress(rows, total):
        for i, row in enumerate(rows):
            if i == after: raise KeyboardInterrupt
            yield row
    with pytest.raises(KeyboardInterrupt): write(path, progress=progress, **asked)


def test_ctrl_c(whole, tmp_path):
    path = tmp_path/"turn.mp4"
    interrupt(path, after=0)
    assert names(tmp_path) == []  # nothing was done, nothing is left
    interrupt(path)
    assert names(tmp_path) == [".turn.mp4.frames"]
    assert names(tmp_path/".turn.mp4.frames") == ["000.png", "001.png", "002.png", "manifest.json"]
    with refused("INTERRUPTED"): write(path)
    assert content(write(path, resume=True)) == content(whole[".mp4"]) and names(tmp_path) == ["turn.mp4"]


CHANGES = {  # what the refusal names, and what is asked for
    "axis": dict(axis="z"),
    "span": dict(span=10),
    "frames": dict(frames=12),
    "label": dict(label=True),
    "mark": dict(mark=True),
    "crop": dict(crop=True),
    "batch": dict(batch=5),
    "sampling": dict(detail=0.5),
    "weights": dict(model=1),
}


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    "A sweep that was interrupted"
    path = tmp_path_factory.mktemp("begun")/"turn.mp4"
    interrupt(path)
    return path


@pytest.mark.parametrize("name", CHANGES)
def test_other_settings_are_refused(name, begun):
    asked = dict(CHANGES[name])
    if "model" in asked: asked["model"] = model_of(asked["model"])
    before = content(begun.with_name(".turn.mp4.frames"))
    with refused("OTHER_SETTING") as error: write(begun, resume=True, **asked)
    assert f" {name}." in str(error.value) and "\n" not in str(error.value)
    assert content(begun.with_name(".turn.mp4.frames")) == before


def test_another_radiograph_is_refused(begun):
    with refused("OTHER_SETTING") as error:
        model_of().write_sweep(picture().pixels**2, begun, "y", FRAMES, batch=4, mark=False, resume=True)
    assert " radiograph." in str(error.value)
    manifest = (begun.with_name(".turn.mp4.frames")/"manifest.json").read_text()
    seen = b"(75, 60) None False" + picture().pixels.tobytes()
    assert "Doe" not in manifest and json.loads(manifest)["radiograph"] == hashlib.sha256(seen).hexdigest()


def test_speed_and_way_back_may_be_chosen_anew(begun, tmp_path):
    "They decide no pixel"
    shutil.copytree(begun.with_name(".turn.mp4.frames"), tmp_path/".turn.mp4.frames")
    frames, about = film(write(tmp_path/"turn.mp4", resume=True, fps=25, bounce=True))
    assert (len(frames), about["fps"]) == (2*FRAMES - 2, 25)


def test_nothing_is_overwritten(tmp_path):
    "Neither what is there at the beginning, nor what somebody writes meanwhile"
    path = tmp_path/"turn.gif"
    path.write_text("mine")
    for resume in (False, True):
        with refused("EXISTS"): write(path, resume=resume)
    assert names(tmp_path) == ["turn.gif"]
    path.unlink()

    def progress(rows, total):
        yield from rows
        path.write_text("mine")
    with refused("EXISTS"): write(path, progress=progress)
    assert path.read_text() == "mine" and len(list((tmp_path/".turn.gif.frames").glob("*.png"))) == FRAMES
    path.unlink()
    write(path, resume=True)
    assert names(tmp_path) == ["turn.gif"]


# What can be wrong

@pytest.mark.parametrize("asked, code", [
    (dict(span=float("nan")), "ANGLE"), (dict(frames=10**6), "FRAME_COUNT"), (dict(fps=float("nan")), "FRAME_RATE"),
    (dict(solver="magic"), "NO_SOLVER"), (dict(steps=5), "NO_SAMPLES"),
    (dict(steps=0, model=drawing_model()), "SOLVER_STEPS"), (dict(detail=1, model=drawing_model()), "NO_DETAIL"),
    (dict(guidance=2), "NO_GUIDANCE"), (dict(batch=0), "BATCH")])
def test_refused_and_nothing_left(asked, code, tmp_path):
    with refused(code): write(tmp_path/"turn.mp4", **asked)
    assert names(tmp_path) == []


BAD_NAMES = {
    "turn.avi": "FILM_KIND",
    ".": "FILM_KIND",
    "nowhere/turn.mp4": "NO_FOLDER",
    "a"*250 + ".mp4": "NAME_TOO_LONG",
}


@pytest.mark.parametrize("name, code", BAD_NAMES.items())
def test_names_that_cannot_be(name, code, tmp_path):
    with refused(code): write(Path(name) if name == "." else tmp_path/name)
    assert names(tmp_path) == []


@pytest.mark.parametrize("encoder", ["/nowhere/ffmpeg", "/bin/false", "missing"])
def test_without_an_encoder_there_are_frames(encoder, whole, tmp_path, monkeypatch):
    def missing(): raise RuntimeError("No ffmpeg exe could be found.")
    if encoder == "missing": monkeypatch.setattr("imageio_ffmpeg.get_ffmpeg_exe", missing)
    else: monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", encoder)
    with pytest.warns(RadRotatorWarning) as warned: path = write(tmp_path/"turn.mp4")
    (warning,) = [one for one in warned if issubclass(one.category, RadRotatorWarning)]
    assert str(path) in str(warning.message) and "\n" not in str(warning.message)
    assert path == tmp_path/"turn" and names(tmp_path) == ["turn"] and content(path) == content(whole[""])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        write(tmp_path/"turn.gif")  # needs none


def test_an_encoder_that_breaks_off_costs_no_frames(whole, tmp_path, monkeypatch):
    "It says which encoders it has, and then does nothing"
    script = f'#!/bin/sh\ncase "$*" in *-encoders*) exec {get_ffmpeg_exe()} "$@";; *) exit 1;; esac\n'
    (tmp_path/"ffmpeg").write_text(script)
    (tmp_path/"ffmpeg").chmod(0o755)
    out = tmp_path/"out"
    out.mkdir()
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(tmp_path/"ffmpeg"))
    with refused("NOT_WRITTEN"): write(out/"turn.mp4")
    monkeypatch.delenv("IMAGEIO_FFMPEG_EXE")
    assert content(write(out/"turn.mp4", resume=True)) == content(whole[".mp4"]) and names(out) == ["turn.mp4"]


def fill(path, room, when):
    "In a process that may write files of so many bytes only, from the first frame on or after the last"
    def limit(): resource.setrlimit(resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))
    def progress(rows, total):
        yield from rows
        if when == "after": limit()
    if when == "before": limit()
    try: write(path, progress=progress)
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


FULL = [(".gif", 12_000, "before"), (".mp4", 1_000, "after"), ("", 2_000, "before")]


@pytest.mark.parametrize("kind, room, when", FULL)
def test_no_room(kind, room, when, whole, tmp_path, server):
    "Where Pillow, the encoder, or the first frame finds no room, it is refused, and what was done is gone on with"
    path = tmp_path/f"turn{kind}"
    ended = server(partial(fill, path, room, when))
    assert (ended.status, ended.code) == (2, "NOT_WRITTEN"), ended
    assert not path.exists() and names(tmp_path) == ([f".{path.name}.frames"] if kind else [])
    assert content(write(path, resume=True)) == content(whole[kind]) and names(tmp_path) == [path.name]


# Memory

def test_frames_are_written_as_they_come(tmp_path):
    "No more than a batch of views is ever alive"
    folder = tmp_path/".turn.frames"
    def progress(rows, total):
        for i, row in enumerate(rows):
            if total == FRAMES and folder.exists(): assert len(list(folder.glob("[0-9]*.png"))) == i
            yield row
    write(tmp_path/"turn", progress=progress)


@pytest.mark.parametrize("kind", [".gif", ".mp4", ""])
def test_memory_does_not_grow_with_the_frames(kind, tmp_path):
    import tracemalloc
    model, large, peaks = model_of(), picture(400, 300), []
    write(tmp_path/f"first{kind}", model, frames=2)           # imports and caches
    for frames in (4, 16):
        tracemalloc.start()
        model.write_sweep(large, tmp_path/f"{frames}{kind}", frames=frames, batch=4)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + 4*400*300                     # one more picture in float32


# A figure

def test_montage_takes_what_rotate_takes(tmp_path):
    given = picture().write(tmp_path/"hip.png")
    figure = montage([given, picture().pixels, picture(60, 40)], columns=2)
    assert len(figure.axes) == 4 and not figure.axes[3].axison
    figure.savefig(tmp_path/"figure.pdf")
    greys = {ax.images[0].get_clim() for ax in figure.axes[:3]}
    assert greys == {(0, 1)}


# Odd input


@pytest.mark.parametrize("shape", [(16, 1000), (1000, 16)], ids=str)
def test_a_strip_is_refused(shape):
    for model in (model_of(), drawing_model()):
        with refused("STRIP"): model.rotate(Radiograph(np.random.default_rng(0).random(shape, np.float32)), z=5)


def odd_pictures():
    "What is no radiograph, but can be turned; and what shows nothing"
    random, row = np.random.default_rng(0), np.mgrid[0:1:60j, 0:1:50j][0]
    spot = np.zeros((60, 50))
    spot[20:30, 20:40] = 1
    return {
        "noise": random.random((60, 50)),
        "two greys": np.indices((60, 50)).sum(0) % 2,
        "a spot": spot,
        "a step": (row > 0.5).astype(float),
        "a ramp": row,
        "nearly even": 0.5 + 1e-6*random.random((60, 50)),
        "mostly black": np.where(random.random((60, 50)) < 0.05, 1, 0),
    }


@pytest.mark.parametrize("linear", [False, True], ids=["film", "line integrals"])
@pytest.mark.parametrize("name", odd_pictures())
def test_whatever_comes_in_no_nan_leaves(name, linear):
    given = Radiograph(odd_pictures()[name], linear=linear)
    if name == "nearly even":
        with refused("EVEN_PICTURE"): model_of().rotate(given, z=5)
        return
    for detail in (0, 0.3, 1):
        for view in model_of().views(given, [[0, 0, 0], [15, 15, 15], [-15, 3, 15], [0, 0, 1e-3]], detail=detail):
            assert np.isfinite(view.pixels).all() and 0 <= view.pixels.min() <= view.pixels.max() <= 1


@pytest.mark.parametrize("kind", ["", ".gif"])
def test_a_drawn_sweep(kind, tmp_path):
    "The paper's way, interrupted and resumed in the middle of a batch"
    whole = write(tmp_path/f"whole{kind}", drawing_model())
    interrupt(tmp_path/f"turn{kind}", after=6, model=drawing_model())
    assert content(write(tmp_path/f"turn{kind}", drawing_model(), resume=True)) == content(whole)


MANIFESTS = {
    "": "DAMAGED_MANIFEST",
    "null": "DAMAGED_MANIFEST",
    '"frames"': "DAMAGED_MANIFEST",
    "[]": "OTHER_SETTING",
    "{}": "OTHER_SETTING",
}


@pytest.mark.parametrize("text, code", MANIFESTS.items())
def test_a_manifest_that_no_sweep_wrote(tmp_path, text, code):
    folder = tmp_path/".film.frames"
    folder.mkdir()
    (folder/"manifest.json").write_text(text)
    (folder/"000.png").write_bytes(b"")
    noise = Radiograph(np.random.default_rng(0).random((40, 32), np.float32))
    with refused(code): model_of().write_sweep(noise, tmp_path/"film", frames=3, resume=True)
