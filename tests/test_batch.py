"""Many radiographs behind one command: what is refused before anything is computed, and what becomes of each."""
import json, os, subprocess, sys
from pathlib import Path

import numpy as np
import pydicom
import pytest
import torch
from PIL import Image

from radrotator.cli import main
from radrotator.files import PICTURES
from radrotator.model.lift import Lift, LiftConfig
from radrotator.model.weights import save_weights
from radrotator.radiograph.image import Radiograph
from radrotator.rotate.rotator import RadRotator

WEIGHTS = "--weights", "untrained.safetensors"


@pytest.fixture
def here(tmp_path, monkeypatch):
    "A folder with good files and a bad one"
    torch.manual_seed(0)
    network = Lift(LiftConfig(size=32, canvas=48, slabs=8, channels=16, multipliers=(1, 2)))
    save_weights(network, tmp_path/"untrained.safetensors", {})
    row, column = np.mgrid[-1:1:64j, -1:1:56j]
    body = 0.4*(row**2 + column**2 < 0.9) + 0.5*((row - 0.2)**2 + (abs(column) - 0.4)**2 < 0.04)
    (tmp_path/"hips"/"left").mkdir(parents=True)
    for i, name in enumerate(("a.png", "b.tif", "IM0001.dcm", "left/a.png")):
        Radiograph(np.roll(body, i, axis=1), (0.5, 0.5)).write(tmp_path/"hips"/name, mark=False)
    (tmp_path/"hips"/"IM0001.dcm").rename(tmp_path/"hips"/"IM0001")
    (tmp_path/"hips"/"notes.txt").write_text("mine")
    (tmp_path/"short.png").write_bytes((tmp_path/"hips"/"a.png").read_bytes()[:300])
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*words): return main([*map(str, words), *WEIGHTS])


def files(folder): return sorted(path.relative_to(folder).as_posix() for path in Path(folder).rglob("*") if path.is_file())


def test_a_folder_keeps_its_order_and_its_kinds(here, capfd):
    assert run("rotate", "hips", "-o", "turned", "--z", 9, "--no-mark") == 0
    out, err = capfd.readouterr()
    assert err == "" and files("turned") == ["IM0001.dcm", "a.png", "b.tif", "left/a.png"]
    assert out.splitlines()[-1] == "wrote 4 of 4 into turned" and out.count("\n| hips/") == 4
    expected = RadRotator.from_file("untrained.safetensors", "cpu").rotate("hips/left/a.png", z=9)
    assert np.abs(Radiograph.read("turned/left/a.png").pixels - expected.pixels).max() < 1e-4


@pytest.mark.parametrize("words", [("hips/a.png", "hips/b.tif"), ("hips/?.???",), ("hips/*",)], ids=str)
def test_files_and_patterns(words, here, capfd):
    assert run("rotate", *words, "-o", "turned", "--kind", "jpg") == (1 if words == ("hips/*",) else 0)
    assert {"a.jpg", "b.jpg"} <= set(files("turned"))
    if words == ("hips/*",): assert "notes.txt" in capfd.readouterr().err and (here/"turned"/"left"/"a.jpg").exists()


def test_one_file_into_a_folder(here, capfd):
    (here/"there").mkdir()
    for out in ("there", "new"): assert run("rotate", "hips/a.png", "-o", out) == 0 and files(out) == ["a.png"]


def test_weights_are_loaded_once(here, monkeypatch):
    import radrotator.rotate.rotator as room
    loaded = []
    monkeypatch.setattr(room, "load_weights", lambda *given, load=room.load_weights: loaded.append(given) or load(*given))
    assert run("rotate", "hips", "-o", "turned") == 0 and len(loaded) == 1


@pytest.mark.parametrize("choice, done, untried", [("skip", ["a.png", "b.tif"], 0), ("stop", ["a.png"], 1)])
def test_one_that_fails(choice, done, untried, here, capfd):
    words = "rotate", "hips/a.png", "short.png", "hips/b.tif", "-o", "turned", "--on-error", choice
    assert run(*words, "--json") == 1
    out, err = capfd.readouterr()
    known = json.loads(out)
    assert files("turned") == done and known["failed"] == 1 + untried and err.startswith("radrotator: ") and "short.png" in err
    assert [row["status"] for row in known["results"]] == ["done", "failed", "not tried" if untried else "done"]
    assert known["results"][1]["code"] and known["results"][0]["size"] == [64, 56]


@pytest.mark.parametrize("command, words, why", [
    ("rotate", "hips/a.png hips/left/a.png -o turned", "hips/left/a.png"),
    ("rotate", "hips/a.png gone.png -o turned", "gone.png"),
    ("rotate", "hips/*.gif -o turned", "hips/*.gif"),
    ("rotate", "hips/a.png hips/b.tif -o turned.png", "names one file"),
    ("rotate", "hips/a.png hips/b.tif -o gone/turned", "gone"),
    ("rotate", "hips/a.png hips/b.tif -o full", "full/a.png: it exists already"),
    ("rotate", "hips -o turned --keep PatientID", "--keep"),
    ("rotate", "hips -o turned --weights huge", "huge"),
    ("rotate", "empty -o turned", "empty"),
    ("rotate", "https://example.org/hip.png -o turned.png", "https://example.org/hip.png"),
    ("rotate", "- hips/a.png -o turned", "standard input"),
    ("rotate", "hips -o turned --z 16", "outside"),
    ("sweep", "hips/a.png hips/left/a.png -o films", "hips/left/a.png"),
    ("sweep", "hips/a.png hips/b.tif -o film.mp4", "names one file"),
    ("sweep", "hips -o films --frames 1", "from 2 to"),
    ("sweep", "hips/a.png -o film.avi", ".mp4, .gif or .dcm"),
    ("sweep", "hips/a.png -o film.mp4 --fps 99", "from 1 to 50"),
    ("sweep", "hips/a.png -o film.mp4 --keep PatientID", "--keep"),
    ("sweep", "hips/a.png -o film.mp4 --weights huge", "huge"),
])
def test_refused_before_pytorch_is_imported(command, words, why, here):
    "Nothing is computed, nothing is written"
    fill(here)
    before = files(here)
    done = command_and_torch(command, *words.split())
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1 and why in done.stderr, done.stderr
    assert files(here) == before


def test_pytorch_is_seen_where_it_is_imported(here):
    "The control of the test above"
    fill(here)
    assert command_and_torch("rotate", "full", "-o", "turned").returncode == 100 and files("turned") == ["a.png"]


def fill(here):
    "A folder with one picture, and one with none"
    (here/"full").mkdir()
    (here/"full"/"a.png").write_bytes((here/"hips"/"a.png").read_bytes())
    (here/"empty").mkdir()


def command_and_torch(*words):
    "A command in a process of its own; its status, and 100 more where PyTorch was imported"
    code = "import sys; from radrotator.cli import main; status = main(sys.argv[1:]); sys.exit(100*('torch' in sys.modules) + status)"
    return subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)


def test_results_in_the_same_folder_are_not_read_again(here, capfd):
    assert run("rotate", "hips", "-o", "hips/turned", "--kind", "png") == 0
    assert run("rotate", "hips", "-o", "hips/turned", "--kind", "jpg") == 0
    assert len(files("hips/turned")) == 8


def test_strict(here, capfd, monkeypatch):
    monkeypatch.setattr("radrotator.rotate.rotator.RadRotator.unfamiliar",
                        lambda self, radiograph, crop: "a horse (bone is dark: invert=True)" if radiograph.shape[0] == 60 else None)
    Radiograph(Radiograph.read("hips/a.png").pixels[:60]).write("horse.png")
    assert run("rotate", "horse.png", "-o", "x.png", "--strict") == 2
    out, err = capfd.readouterr()
    assert out == "" and "a horse (bone is dark: --invert)" in err and not Path("x.png").exists()
    assert run("rotate", "horse.png", "hips/a.png", "-o", "strict", "--strict", "--json") == 1 and files("strict") == ["a.png"]
    assert [row["code"] for row in json.loads(capfd.readouterr().out)["results"]] == ["UNFAMILIAR", None]
    assert run("rotate", "horse.png", "hips/a.png", "-o", "turned") == 0
    out, err = capfd.readouterr()
    assert err.startswith("radrotator: horse.png: a horse") and "unfamiliar" in out
    assert run("sweep", "horse.png", "-o", "x.gif", "--frames", 2, "--strict") == 2 and not Path("x.gif").exists()


@pytest.mark.parametrize("kind, names", [((), ["IM0001.mp4", "a.mp4", "b.mp4", "left/a.mp4"]), (("--kind", "gif"), ["IM0001.gif", "a.gif", "b.gif", "left/a.gif"]),
                                         (("--kind", "dcm"), ["IM0001.dcm", "a.dcm", "b.dcm", "left/a.dcm"])], ids=str)
def test_sweeps(kind, names, here, capfd):
    assert run("sweep", "hips", "-o", "films", "--frames", 3, *kind) == 0
    assert files("films") == names and "wrote 4 of 4 into films" in capfd.readouterr().out


def test_sweeps_go_on(here, capfd):
    "With --resume what is finished is left out, without it refused by name"
    assert run("sweep", "hips/a.png", "hips/b.tif", "-o", "films", "--frames", 3, "--kind", "gif") == 0
    Path("films/b.gif").unlink()
    before = Path("films/a.gif").stat().st_mtime_ns
    words = "sweep", "hips/a.png", "hips/b.tif", "-o", "films", "--frames", 3, "--kind", "gif"
    assert run(*words) == 2 and "films/a.gif" in capfd.readouterr().err
    assert run(*words, "--resume") == 0 and files("films") == ["a.gif", "b.gif"] and Path("films/a.gif").stat().st_mtime_ns == before
    assert run(*words, "--resume") == 0 and "wrote 0 of 0" in capfd.readouterr().out


def test_frames_of_many(here):
    assert run("sweep", "hips/a.png", "-o", "films", "--frames", 2, "--kind", "frames") == 0
    assert files("films") == ["a/000.png", "a/001.png", "a/angles.csv"]


def test_more_steps_say_what_they_do(here, capfd):
    from dataclasses import replace
    from radrotator.model.unet import UNet, UNetConfig
    network = UNet(replace(UNetConfig.tiny(), size=32))
    for module in network.modules():
        if getattr(module, "weight", None) is not None and not module.weight.any(): module.reset_parameters()
    save_weights(network, here/"drawing.safetensors", {})
    drawing = "--weights", "drawing.safetensors"
    for steps, seen in ((2, True), (1, False)):
        assert main(["rotate", "hips/a.png", "-o", f"{steps}.png", "--z", "3", "--steps", str(steps), *drawing]) == 0
        assert ("texture is invented" in capfd.readouterr().out) == seen
    assert main(["rotate", "--help"]) == 0
    assert "texture is invented" in " ".join(capfd.readouterr().out.split())


@pytest.mark.parametrize("suffix", PICTURES)
def test_files_bear_a_mark(suffix, here):
    for name, words in {"marked": (), "bare": ("--no-mark",)}.items(): assert run("rotate", "hips/IM0001", "-o", f"{name}{suffix}", *words) == 0
    if suffix == ".dcm":
        stored = {name: pydicom.dcmread(f"{name}.dcm") for name in ("marked", "bare")}
        assert [ds.BurnedInAnnotation for ds in stored.values()] == ["YES", "NO"]
        marked, bare = (ds.pixel_array/65535 for ds in stored.values())
    else: marked, bare = (np.asarray(Image.open(f"{name}{suffix}"), float) for name in ("marked", "bare"))
    apart = np.abs(marked - bare) > 0.3*max(marked.max(), bare.max())
    assert 0.002 < apart.mean() < 0.2


def test_stopped(here):
    "Ctrl-C in the middle: what is finished is whole, and said where"
    code = ("import radrotator.app.radiographs as room, sys; from radrotator.cli import main; done = []\n"
            "def turn(*given, work=room.turn_file, **named):\n"
            "    if done: raise KeyboardInterrupt\n"
            "    done.append(work(*given, **named)); return done[0]\n"
            "room.turn_file = turn; sys.exit(main(sys.argv[1:]))")
    done = subprocess.run([sys.executable, "-c", code, "rotate", "hips", "-o", "turned", *WEIGHTS], capture_output=True, text=True)
    assert done.returncode == 130 and "turned" in done.stderr and "Traceback" not in done.stderr and files("turned") == ["IM0001.dcm"]


def test_the_words_of_many_are_documented(here, capfd):
    import re
    notebook = Path(__file__).resolve().parents[1]/"nbs"/"50_app"/"08_commands.ipynb"
    row = next(line for line in notebook.read_text(encoding="utf-8").splitlines() if "| `rotate` |" in line)
    words = set(re.findall(r"`(\w+)`", row))
    assert run("rotate", "hips", "-o", "turned", "--json") == 0
    known = json.loads(capfd.readouterr().out)
    assert known.pop("command") == "rotate" and {*known, *known["results"][0]} <= words


@pytest.mark.parametrize("words", [("rotate", "hips", "-o", "turned", "--z", 3), ("sweep", "hips", "-o", "films", "--kind", "gif", "--frames", 2),
                                   ("rotate", "hips/a.png", "-o", "x.png"), ("sweep", "hips/a.png", "-o", "x.gif", "--frames", 2)], ids=str)
def test_how_views_are_made_is_settled_once(words, here, monkeypatch):
    "However many files, one check of what is asked of the solver, and one `Sampling` for all"
    import radrotator.rotate.rotator as room
    resolved, used = [], []
    monkeypatch.setattr(room, "resolve_sampling", lambda *given, resolve=room.resolve_sampling: resolved.append(resolve(*given)) or resolved[-1])
    monkeypatch.setattr(room, "lift_radiograph", lambda network, given, sampling, watch, lift=room.lift_radiograph: used.append(sampling) or lift(network, given, sampling, watch))
    assert run(*words) == 0 and len(resolved) == 1 and used and all(one is resolved[0] for one in used)
