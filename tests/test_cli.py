"""The command as it is typed: what it writes and says, and that a mistake costs one line, exit status 2, and nothing on disk."""
import contextlib, errno, functools, json, os, pty, re, shlex, signal, subprocess, sys, threading, time
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pydicom
import pytest
import torch
import typer
from PIL import Image
from test_bad_files import HEADERS, dicom

from radrotator.app.console import COMMAND_GROUPS, list_examples
from radrotator.app.demo import DEMO_TITLE
from radrotator.cli import app, main
from radrotator.files import PICTURES
from radrotator.ct.nifti import write_ct
from radrotator.ct.volume import CT
from radrotator.evaluate.patients import FIRST_TEST_SEED
from radrotator.model.lift import Lift, LiftConfig
from radrotator.radiograph.image import Radiograph
from radrotator.model.unet import UNet, UNetConfig
from radrotator.model.weights import load_weights, save_weights
from radrotator.rotate.rotator import RadRotator

WEIGHTS = "--weights", "untrained.safetensors"   # they lift
DRAWING = "--weights", "drawing.safetensors"     # they draw views, told the rotation, as in the paper
PROGRAM = sys.executable, "-m", "radrotator.cli"
NOTEBOOK = Path(__file__).resolve().parents[1]/"nbs"/"50_app"/"08_commands.ipynb"
COMMANDS = typer.main.get_command(app).commands


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "One folder with good files and bad ones, made once"
    folder = tmp_path_factory.mktemp("made")
    torch.manual_seed(0)
    save_weights(Lift(LiftConfig(size=32, canvas=48, slabs=8, channels=16, multipliers=(1, 2))), folder/"untrained.safetensors", {})
    network = UNet(replace(UNetConfig.tiny(), size=32))
    for module in network.modules():                                      # of zeros it would draw nothing
        if getattr(module, "weight", None) is not None and not module.weight.any(): module.reset_parameters()
    save_weights(network, folder/"drawing.safetensors", {})
    row, column = np.mgrid[-1:1:96j, -1:1:80j]
    body = 0.4*(row**2 + column**2 < 0.9) + 0.5*((row - 0.2)**2 + (abs(column) - 0.4)**2 < 0.04)
    radiograph = Radiograph(body/body.max(), (0.5, 0.5))
    radiograph.write(folder/"hip.png")
    radiograph.write(folder/"hip.dcm", mark=False)              # a marked one is met with a warning
    z, y, x = np.mgrid[-1:1:60j, -1:1:40j, -1:1:50j]
    hu = np.where(x**2 + y**2 < 0.8, 40.0, -1000.0) + 900*((abs(x) - 0.5)**2 + y**2 + (z/2)**2 < 0.05)
    write_ct(CT(hu.transpose(2, 1, 0).astype(np.float32), np.diag([8.0, 6, 8, 1])), folder/"body.nii.gz")
    write_ct(CT(hu.transpose(2, 1, 0)[:, :, 20:40].astype(np.float32), np.diag([8.0, 6, 8, 1])), folder/"slab.nii.gz")
    label = np.zeros((96, 80)); label[4:8, 4:16] = 1
    Radiograph(label).write(folder/"black.png")                           # but for a label
    (folder/"letter.dcm").write_text("Dear colleague,\nthe patient …\n")
    (folder/"short.png").write_bytes((folder/"hip.png").read_bytes()[:400])
    (folder/"short.nii.gz").write_bytes((folder/"body.nii.gz").read_bytes()[:2000])
    (folder/"other").mkdir()
    (folder/"other"/"thesis.txt").write_text("mine")
    (folder/"series").mkdir()
    header = dict(Modality="CT", ImagePositionPatient=[0, 0, 0], ImageOrientationPatient=[1, 0, 0, 0, 1, 0], PixelSpacing=[1, 1])
    ds = pydicom.dcmread(folder/"hip.dcm")
    for key, value in header.items(): setattr(ds, key, value)
    ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = pydicom.uid.CTImageStorage
    ds.save_as(folder/"series"/"slice.dcm")
    return folder


@pytest.fixture
def here(made, monkeypatch):
    "That folder, as the current one"
    monkeypatch.chdir(made)
    return made


def listing(folder):
    "Every file and folder, with size and time of change"
    return {str(p.relative_to(folder)): (p.stat().st_size, p.stat().st_mtime_ns) for p in sorted(folder.rglob("*"))}


def refuse(folder, capfd, *words):
    "The one line with which `radrotator WORDS` is refused; the folder stays as it was"
    before = listing(folder)
    assert main([str(w) for w in words]) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert err.endswith("\n") and err.count("\n") == 1 and err.startswith("radrotator: "), err
    assert 40 < len(err) < 300 and "Traceback" not in err, err
    assert listing(folder) == before
    return err


def accept(capfd, *words):
    "The last line that `radrotator WORDS` prints"
    assert main([str(w) for w in words]) == 0, capfd.readouterr().err
    out, err = capfd.readouterr()
    assert err == ""
    return out.splitlines()[-1]


BAD_RADIOGRAPHS = {"missing.png": "no such file", "letter.dcm": "not a DICOM", "short.png": "cut short", "body.nii.gz": "radrotator drr", "series": "radrotator drr",
                   "series/slice.dcm": "radrotator drr", "untrained.safetensors": "not a DICOM"}
BAD_CTS = {"missing.nii.gz": "no such file", "letter.dcm": "not a CT", "short.nii.gz": "cut short", "hip.dcm": "not CT", "hip.png": "not a CT", "series": "whole series|one CT slice",
           "series/slice.dcm": "whole series", "other": "no DICOM file", "slab.nii.gz": "slab.nii.gz: cannot choose a field of view: the CT is 160 mm tall"}
BAD_ANGLES = {"16": "outside", "-15.5": "outside", "nan": "not a number", "inf": "not a number", "ten": "Invalid value", "": "Invalid value"}
BAD_OUTPUTS = {"nowhere/out.png": "does not exist", "hip.png": "exists already", "out.bmp": "End it in", "out": "End it in", "other": "End it in", "letter.dcm/out.png": "does not exist"}


def said(err, words): assert any(w in err for w in words.split("|")), err


@pytest.mark.parametrize("given", BAD_RADIOGRAPHS)
def test_rotate_refuses_what_is_no_radiograph(given, here, capfd):
    said(refuse(here, capfd, "rotate", given, "-o", "out.png", *WEIGHTS), BAD_RADIOGRAPHS[given])


@pytest.mark.parametrize("given", BAD_CTS)
def test_drr_refuses_what_is_no_ct(given, here, capfd):
    said(refuse(here, capfd, "drr", given, "-o", "out.png"), BAD_CTS[given])


@pytest.mark.parametrize("command", [("rotate", "hip.png", *WEIGHTS), ("drr", "body.nii.gz")], ids=lambda c: c[0])
@pytest.mark.parametrize("axis", ["--x", "--y", "--z"])
@pytest.mark.parametrize("angle", BAD_ANGLES)
def test_angles(command, axis, angle, here, capfd):
    said(refuse(here, capfd, *command, "-o", "out.png", axis, angle), BAD_ANGLES[angle])


@pytest.mark.parametrize("command", [("rotate", "hip.png", *WEIGHTS), ("drr", "body.nii.gz")], ids=lambda c: c[0])
@pytest.mark.parametrize("out", BAD_OUTPUTS)
def test_outputs(command, out, here, capfd):
    said(refuse(here, capfd, *command, "-o", out), BAD_OUTPUTS[out])


@pytest.mark.parametrize("words, why", [
    ("rotate hip.png -o out.png --weights gone.safetensors", "gone.safetensors"),
    ("rotate hip.png -o out.png --weights hip.png", "not a readable .safetensors"),
    ("rotate hip.png -o out.png --device quantum", "Choose auto, cpu or cuda"),
    ("rotate hip.png -o out.png --steps 0", "--steps"),
    ("rotate hip.png -o out.png --guidance nan", "--guidance"),
    ("rotate hip.png -o out.png --detail nan", "--detail"),
    ("rotate hip.png -o out.png --detail 1.5", "--detail"),
    ("rotate hip.png -o out.png --detail 0 --weights drawing.safetensors", "these weights draw whole views"),
    ("rotate hip.png -o out.png --guidance 2 --weights untrained.safetensors", "cannot guide"),
    ("rotate hip.png -o out.png --steps 10 --weights untrained.safetensors", "these weights know the mean alone"),
    ("rotate black.png -o out.png --z 3 --weights untrained.safetensors", "one even grey"),
    ("sweep black.png -o out.gif --frames 2 --weights untrained.safetensors", "one even grey"),
    ("sweep hip.png -o out.gif --frames 2 --steps 10 --weights untrained.safetensors", "these weights know the mean alone"),
    ("drr body.nii.gz -o out.png --centre hip", "Choose picture or volume"),
    ("pairs series -o sets --centre hip", "Choose picture or volume|no NIfTI"),
    ("rotate hip.png -o out.png --seed -1", "--seed"),
    ("rotate hip.png -o out.png --angle 3", "--angle"),
    ("rotate hip.png", "--out"),
    ("rotate -o out.png", "INPUT"),
    ("dance", "dance"),
    ("drr body.nii.gz -o out.png --size 3", "--size"),
    ("drr body.nii.gz -o out.png --fov nan", "--fov"),
    ("phantom -o out.png", ".nii"),
    ("phantom -o body.nii.gz", "exists already"),
    ("phantom -o nowhere/out.nii.gz", "does not exist"),
    ("phantom -o out.nii.gz --bones gone.npz", "gone.npz"),
    ("phantom -o out.nii.gz --bones hip.png", "hip.png"),
    ("phantom -o out.nii.gz --spacing nan", "--spacing"),
    ("phantom -o out.nii.gz --spacing 9", "--spacing"),
    (f"phantom -o {'a'*250}.nii.gz", "too long"),
    ("drr body.nii.gz -o out.png --kvp 20", "from 40 to 150 kV"),
    ("drr body.nii.gz -o out.png --kvp nan", "--kvp|from 40 to 150 kV"),
    ("drr body.nii.gz -o out.png --kerma 5", "--kvp"),
    ("ingest gone -o cts", "gone"),
    ("ingest body.nii.gz -o hip.png", "a folder is needed"),
    ("ingest body.nii.gz -o nowhere/cts", "does not exist"),
    ("ingest body.nii.gz -o cts --report nowhere/report.csv", "nowhere"),
    ("ingest body.nii.gz -o cts --report hip.png", "hip.png"),
    ("ingest body.nii.gz -o cts --spacing nan", "--spacing"),
    ("ingest body.nii.gz -o cts --patient (", "regular expression"),
    ("ingest -o cts", "SRC"),
    ("pairs gone -o sets", "gone"),
    ("pairs other -o sets", "no NIfTI file"),
    ("pairs series -o hip.png", "a folder is needed"),
    ("pairs series -o nowhere/sets", "does not exist"),
    ("pairs series -o sets --shard 0/2", "no shard"),
    ("pairs series -o sets --shard half", "no shard"),
    ("pairs series -o sets --drrs 2", "--drrs"),
    ("pairs series -o sets --fov nan", "--fov"),
    ("pairs series -o sets --folds gone.csv", "gone.csv|no NIfTI"),
    ("rotate hip.png -o out.png --weights untrained.safetensors --solver magic", "Choose one of ddim"),
    ("convert hip.png -o out.safetensors", "hip.png"),
    ("convert gone.ckpt -o out.safetensors", "gone.ckpt"),
    ("convert untrained.safetensors -o out.safetensors", "untrained.safetensors"),
    ("convert untrained.safetensors -o out.png", ".safetensors"),
    ("export -o out.pt --weights untrained.safetensors", ".onnx"),
    ("sweep hip.png -o out.avi --weights untrained.safetensors", "End it in .mp4 or .gif"),
    ("sweep hip.png -o hip.png", "exists already"),
    ("sweep hip.png -o nowhere/out.mp4", "does not exist"),
    ("sweep hip.png -o out.mp4 --axis w", "--axis"),
    ("sweep hip.png -o out.mp4 --span 16 --weights untrained.safetensors", "outside"),
    ("sweep hip.png -o out.mp4 --span nan --weights untrained.safetensors", "not a number"),
    ("sweep hip.png -o out.mp4 --frames 1 --weights untrained.safetensors", "from 2 to"),
    ("sweep hip.png -o out.mp4 --fps 0 --weights untrained.safetensors", "from 1 to"),
    ("sweep hip.png -o out.mp4 --solver magic --frames 2 --weights untrained.safetensors", "Choose one of ddim"),
    ("rotate gone.png -o out.png --json", "gone.png"),
    ("train --preset huge -o run", "Choose tiny or small or paper-tiny or paper"),
    ("train -o run", "one source of pairs, and none was given"),
    ("train -o run --resume", "cannot go on with a run in run: there is none"),
    ("train --phantoms 1 --set steps=3 -o run", "use --steps 3"),
    ("train --phantoms 1 --together 12 -o run", "multiple of 8"),
    ("train --data . --cts . -o run", "--data and --cts was given"),
    ("train --data nowhere -o run", "nowhere"),
    ("train --data other -o run", "other"),
    ("train --cts other -o run", "other"),
    ("train --phantoms 1 --set rate -o run", "no setting"),
    ("train --phantoms 1 --set rate=x -o run", "cannot be 'x'"),
    ("train --phantoms 1 --set data.magic=1 -o run", "no setting 'magic'"),
    ("train --phantoms 1 --set batch=20 -o run", "multiple of 8"),
    ("train --data . --bones hip.png -o run", "hip.png"),
    ("report other", "not the folder of a run"),
    ("train -o other", "not the folder of a run"),
    ("train -o hip.png", "not the folder of a run"),
    ("train -o nowhere/run", "does not exist"),
    ("train -o run --bones hip.png", "hip.png"),
    ("train -o run --init gone.safetensors", "gone.safetensors"),
    ("train -o run --init untrained.safetensors", "another network than the one to be trained"),
    ("train -o run --minutes nan", "--minutes"),
    ("train -o run --phantoms 0", "--phantoms"),
    ("demo -o other --weights untrained.safetensors", "no demo wrote"),
    ("demo -o hip.png --weights untrained.safetensors", "no demo wrote"),
    ("demo -o nowhere/demo --weights untrained.safetensors", "does not exist"),
    ("demo -o demo --weights untrained.safetensors --ct hip.png", "not a CT"),
    ("demo -o demo --weights untrained.safetensors --radiograph body.nii.gz", "not a radiograph"),
    ("demo -o demo --weights untrained.safetensors --radiograph missing.png", "missing.png"),
])
def test_refused(words, why, here, capfd):
    said(refuse(here, capfd, *words.split()), why)


def test_labels_are_not_overwritten(here, capfd):
    (here/"new_labels.nii.gz").touch()
    said(refuse(here, capfd, "phantom", "-o", "new.nii.gz"), "new_labels.nii.gz")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_cuda_where_there_is_none(here, capfd):
    said(refuse(here, capfd, "rotate", "hip.png", "-o", "out.png", "--device", "cuda", *WEIGHTS), "no CUDA GPU")
    said(refuse(here, capfd, "train", "-o", "run", "--device", "cuda"), "no CUDA GPU")


def test_a_fault_of_the_program_is_not_hidden(here, monkeypatch):
    monkeypatch.setattr("radrotator.radiograph.read.read_radiograph", lambda *given: 1/0)
    with pytest.raises(ZeroDivisionError): main(["rotate", "hip.png", "-o", "out.png", *WEIGHTS])


@pytest.mark.parametrize("number, file", [(errno.ENOSPC, None), (errno.EACCES, "out.png"), (errno.EROFS, "out.png"), (errno.ENAMETOOLONG, "out.png")])
def test_a_disk_that_refuses(number, file, here, capfd, monkeypatch):
    def fail(*given): raise OSError(number, "it will not do", file)
    monkeypatch.setattr("radrotator.radiograph.read.read_radiograph", fail)
    said(refuse(here, capfd, "rotate", "hip.png", "-o", "out.png", *WEIGHTS), f"{file or 'the disk'}: it will not do")
    number = errno.EIO
    with pytest.raises(OSError): main(["rotate", "hip.png", "-o", "out.png", *WEIGHTS])


def test_a_folder_that_is_closed(here, capfd, monkeypatch):
    monkeypatch.setattr("os.access", lambda path, mode, allowed=os.access: mode != os.W_OK and allowed(path, mode))
    said(refuse(here, capfd, "drr", "body.nii.gz", "-o", "out.png"), "may not write in the folder")


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    "Radiographs that are none, whatever their headers say"
    folder = tmp_path_factory.mktemp("hostile")
    for name, header in HEADERS.items(): (folder/f"{name}.dcm").write_bytes(dicom(**header))
    return folder


@pytest.mark.parametrize("name", HEADERS)
def test_every_command_survives_a_hostile_radiograph(name, hostile, here, capfd):
    for words in (("rotate", hostile/f"{name}.dcm", "-o", "out.png"), ("sweep", hostile/f"{name}.dcm", "-o", "out.mp4"), ("demo", "-o", "demo2", "--radiograph", hostile/f"{name}.dcm")):
        err = refuse(here, capfd, *words)
        assert f"{name}.dcm" in err and "SECRET" not in err and "Secret" not in err


def test_in_a_process_of_its_own(here):
    run = lambda *words: subprocess.run([*PROGRAM, *words], capture_output=True, text=True, timeout=300)
    bad = run("rotate", "letter.dcm", "-o", "out.png")
    assert (bad.returncode, bad.stdout, bad.stderr.count("\n")) == (2, "", 1) and not (here/"out.png").exists()
    good = run("rotate", "hip.dcm", "-o", "alone.png", "--z", "-5", "--json", *WEIGHTS)
    assert (good.returncode, good.stderr) == (0, "") and Image.open(here/"alone.png").size == (80, 96)  # no bar where there is no terminal
    assert json.loads(good.stdout)["out"] == "alone.png"


# Help


def test_the_whole_story_in_one_screen():
    said = subprocess.run([*PROGRAM, "--help"], capture_output=True, text=True, timeout=300, env=os.environ | dict(COLUMNS="80")).stdout
    lines = said.splitlines()
    assert len(lines) <= 30 and max(map(len, lines)) <= 80 and "not for diagnosis" in said
    assert sorted(COMMANDS) == sorted(name for names in COMMAND_GROUPS.values() for name in names)
    assert re.findall(r"^  [A-Z ].{13}(\w+)  ", said, re.MULTILINE) == [name for names in COMMAND_GROUPS.values() for name in names]
    assert said.count("  radrotator ") == 2                               # two examples
    assert not [line for line in lines[1:] if line.endswith("...")]       # nothing cut off


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_a_command(name, capfd, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert main([name, "--help"]) == 0
    said = capfd.readouterr().out
    assert max(map(len, said.splitlines())) <= 80 and list_examples(COMMANDS[name]) and all(example in said for example in list_examples(COMMANDS[name]))


@pytest.mark.parametrize("example", [example for command in COMMANDS.values() for example in list_examples(command)])
def test_examples_are_understood(example):
    _, name, *words = shlex.split(example)
    COMMANDS[name].make_context(name, words)


def test_examples_that_are_cheap_run(here, tmp_path, capfd, monkeypatch):
    for theirs, ours in {"hip.dcm": "hip.dcm", "hip.png": "hip.png", "pelvis.nii.gz": "body.nii.gz"}.items(): (tmp_path/theirs).write_bytes((here/ours).read_bytes())
    monkeypatch.chdir(tmp_path)
    examples = [*list_examples(COMMANDS["rotate"]), list_examples(COMMANDS["sweep"])[1], list_examples(COMMANDS["drr"])[0], *list_examples(COMMANDS["doctor"])]
    for example in examples: assert main(shlex.split(example)[1:]) == 0, capfd.readouterr().err
    assert {"turned.dcm", "turned.png", "sweep.gif", "frontal.png"} < {path.name for path in tmp_path.iterdir()}


def test_help_does_not_wait_for_pytorch():
    heavy = "import sys; from radrotator.cli import main; main(['rotate', '--help']); sys.exit(any(m in sys.modules for m in ('torch', 'numba', 'scipy', 'pydicom')))"
    assert subprocess.run([sys.executable, "-c", heavy], capture_output=True, timeout=300).returncode == 0


@pytest.mark.parametrize("suffix", PICTURES)
def test_rotate_writes_every_kind(suffix, here, capfd):
    name = f"kind{suffix}"
    line = accept(capfd, "rotate", "hip.dcm", "-o", name, "--x", "-3", "--y", "5.5", "--no-mark", *WEIGHTS)
    assert name in line and "y = 5.5°" in line and line.endswith(" s")
    view, given = (Radiograph.read(path).pixels for path in (name, "hip.dcm"))
    expected = RadRotator.from_file("untrained.safetensors", "cpu").rotate("hip.dcm", x=-3, y=5.5).pixels
    likeness = lambda a, b: np.corrcoef(a.ravel(), b.ravel())[0, 1]
    assert view.shape == (96, 80) and likeness(view, expected) > 0.998 > likeness(given, expected)


def test_dicom_says_what_was_done(here, capfd):
    for name, asked, words in (("drawn", ("--steps", 2, "--guidance", 1.5, "--seed", 7, *DRAWING), ("steps 2", "guidance 1.5", "seed 7")), ("lifted", ("--detail", 0.5, *WEIGHTS), ("detail 0.5",))):
        accept(capfd, "rotate", "hip.dcm", "-o", f"{name}.dcm", "--x", "-3", *asked)
        ds = pydicom.dcmread(f"{name}.dcm")
        for word in ("x = -3°", "Rz·Ry·Rx", "weights ", *words): assert word in ds.DerivationDescription
        assert ds.SyntheticData == "YES" and list(ds.PixelSpacing) == [0.5, 0.5]


@pytest.mark.parametrize("suffix", PICTURES)
@pytest.mark.parametrize("crop", [(), ("--crop",)], ids=["whole", "cropped"])
def test_turned_by_nothing_every_pixel_stays(suffix, crop, here, capfd):
    Radiograph.read("hip.dcm").write(here/f"same{suffix}", mark=False)
    line = accept(capfd, "rotate", "hip.dcm", "-o", f"unturned{len(crop)}{suffix}", "--no-mark", *crop, *WEIGHTS)
    assert line.endswith("these are the pixels of the input")
    assert Radiograph.read(f"unturned{len(crop)}{suffix}").pixels.tobytes() == Radiograph.read(f"same{suffix}").pixels.tobytes()
    for name in (f"same{suffix}", f"unturned{len(crop)}{suffix}"): Path(name).unlink()


def test_detail_and_line_integrals_make_other_views(here, capfd):
    views = {}
    for name, words in dict(sharp=(), mean=("--detail", 0), linear=("--line-integrals",)).items():
        accept(capfd, "rotate", "hip.png", "-o", f"{name}.png", "--z", 9, *words, *WEIGHTS)
        views[name] = Radiograph.read(f"{name}.png").pixels
    assert np.abs(views["sharp"] - views["mean"]).max() > 0.02 and np.abs(views["sharp"] - views["linear"]).max() > 0.01
    assert all(np.isfinite(view).all() for view in views.values())


def test_same_seed_same_file(here, capfd):
    for i, seed in enumerate((1, 1, 2)): accept(capfd, "rotate", "hip.png", "-o", f"seed{i}.png", "--z", "9", "--seed", seed, *DRAWING)
    a, b, c = (np.asarray(Image.open(f"seed{i}.png")) for i in range(3))
    assert np.array_equal(a, b) and a.shape == c.shape and not np.array_equal(a, c)


def test_phantom_drr_rotate(here, capfd):
    line = accept(capfd, "phantom", "-o", "p.nii.gz", "--seed", "1", "--spacing", "6")
    assert "p.nii.gz" in line and (here/"p_labels.nii.gz").exists()
    accept(capfd, "drr", "p.nii.gz", "-o", "p0.png", "--size", "64")
    accept(capfd, "drr", "p.nii.gz", "-o", "py.png", "--size", "64", "--y", "10")
    accept(capfd, "rotate", "p0.png", "-o", "pr.png", "--y", "10", *WEIGHTS)
    before, truth, view = (Radiograph.read(n).pixels for n in ("p0.png", "py.png", "pr.png"))
    assert before.shape == truth.shape == view.shape == (64, 64)
    inner = (slice(7, -7),)*2                                             # what comes in from beyond the frame nobody knows
    assert np.mean((view - truth)[inner]**2) < 0.2*np.mean((before - truth)[inner]**2)    # about the beam's axis geometry is nearly all


def test_drr_of_one_ct_has_one_scale(here, capfd):
    lines = [accept(capfd, "drr", "body.nii.gz", "-o", f"scale{z}.dcm", "--size", "32", "--z", z) for z in (0, 15)]
    assert len({line.split("field of view")[1] for line in lines}) == 1
    assert len({tuple(pydicom.dcmread(f"scale{z}.dcm").PixelSpacing) for z in (0, 15)}) == 1


SMALL = "--set lift.size=32 --set lift.canvas=48 --set lift.slabs=8 --set lift.channels=16 --set lift.multipliers=1,2 --set held=2 --set batch=8 --set validation=8 --set data.oversample=1 --workers 0 --device cpu".split()


def test_train_and_train_on(here, capfd):
    words = "train", "--phantoms", 1, "--steps", 2, "-o", here/"run", "--seed", 3, *SMALL
    assert "1 of 2 steps" in accept(capfd, *words, "--minutes", 0)
    said(refuse(here, capfd, *words), "Go on with it (--resume)")
    assert "2 of 2 steps" in accept(capfd, *words, "--minutes", 5, "--resume")
    assert "2 of 2 steps" in accept(capfd, "train", "-o", here/"run", "--resume", "--device", "cpu")  # what was said need not be said again, and what is done stays done
    _, about = load_weights("run/weights.safetensors")
    assert about["training"]["seed"] == about["data"]["seed"] == 3 and about["training"]["lift"]["channels"] == 16 and about["data"]["size"] == 32
    assert about["device"] == "cpu" and about["processes"] == 1 and about["torch"] == torch.__version__
    assert about["command"].startswith("radrotator train --out run --phantoms 1 ") and "--set lift.channels=16" in about["command"]
    assert str(here) not in json.dumps(about) and "commit" in about
    said(refuse(here, capfd, "train", "--phantoms", 2, "-o", "run", "--resume"), "started with phantoms = 1, not 2")
    said(refuse(here, capfd, "train", "--cts", ".", "-o", "run", "--resume"), "started with cts = None")
    said(refuse(here, capfd, "train", "--steps", 3, "-o", "run", "--resume", "--device", "cpu"), "started with steps = 2, not 3")  # the rate follows the steps
    accept(capfd, "rotate", "hip.png", "-o", "trained.png", "--x", "5", "--weights", "run/weights.safetensors")
    accept(capfd, "report", "run", "-o", "report.html")


def test_demo_twice(here, capfd, monkeypatch):
    import radrotator.phantom.phantom as room
    seeds, coarse = [], room.phantom
    monkeypatch.setattr(room, "phantom", lambda seed: seeds.append(seed) or coarse(seed, spacing=8.0))
    for seed in (0, 1): accept(capfd, "demo", "-o", "demo", "--ct", "body.nii.gz", "--radiograph", "hip.dcm", "--seed", seed, *WEIGHTS)
    assert seeds == [FIRST_TEST_SEED, FIRST_TEST_SEED + 1]  # not among the seeds that training draws
    table = (here/"demo"/"table.md").read_text()
    assert table.startswith(DEMO_TITLE) and "frontal pelvis phantoms only" in table
    for item in ("phantom", "chest CT", "CT 1", "radiograph 1"): assert table.count(f"\n| {item} ") == 3
    names = {p.name for p in (here/"demo").iterdir()}
    assert {"phantom.png", "phantom_input.png", "phantom_x12_rotated.png", "chest_z12_true.png", "ct1_y12_difference.png", "radiograph1_x12_rotated.png", "radiograph1.png"} < names
    assert "radiograph1_x12_true.png" not in names and not [p for p in here.iterdir() if p.name.startswith(".")]
    assert Image.open(here/"demo"/"radiograph1_x12_rotated.png").size == (80, 96)
    made = lambda name: Image.open(here/"demo"/name).text["Description"]
    assert "as given" in made("radiograph1_input.png") and "DRR" in made("ct1_input.png") and made("ct1_x12_rotated.png").startswith("SYNTHETIC, not for diagnosis") and "hip" not in (here/"demo"/"table.md").read_text()
    (here/"demo"/"notes.txt").write_text("mine")
    said(refuse(here, capfd, "demo", "-o", "demo", *WEIGHTS), "no demo wrote")


# Sweeps


def test_sweep_of_every_kind(here, capfd):
    few = "--frames", 5, *WEIGHTS
    assert "from -3° to 3°" in accept(capfd, "sweep", "hip.dcm", "-o", "turn.mp4", "--axis", "x", "--span", 3, "--label", *few)
    accept(capfd, "sweep", "hip.dcm", "-o", "turn.gif", "--crop", "--bounce", *few)
    accept(capfd, "sweep", "hip.dcm", "-o", "turn", "--invert", *few)
    import imageio_ffmpeg
    assert imageio_ffmpeg.count_frames_and_secs("turn.mp4")[0] == 5 and Image.open("turn.gif").n_frames == 8
    assert len([*Path("turn").glob("*.png")]) == 5 and not [p for p in here.iterdir() if p.name.startswith(".")]


def test_how_a_radiograph_is_read_and_marked(here, capfd):
    Radiograph(1 - Radiograph.read("hip.png").pixels).write("negative.png")
    for name, words in {"as_is": ["hip.png"], "inverted": ["negative.png", "--invert"], "marked": ["hip.png", "--mark"]}.items(): accept(capfd, "rotate", *words, "-o", f"{name}.png", "--z", 4, *WEIGHTS)
    as_is, inverted, marked = (Radiograph.read(f"{name}.png").pixels for name in ("as_is", "inverted", "marked"))
    assert np.abs(as_is - inverted).max() < 0.01 and np.abs(as_is - marked).max() > 0.5
    accept(capfd, "rotate", "hip.png", "-o", "bare.dcm", "--no-mark", *WEIGHTS)
    assert pydicom.dcmread("bare.dcm").BurnedInAnnotation == "NO"


def test_what_the_weights_do_not_know_is_turned_with_a_warning(here, capfd, monkeypatch):
    monkeypatch.setattr("radrotator.rotate.rotator.RadRotator.unfamiliar", lambda self, radiograph, crop: "this looks like a horse; judge for yourself")
    for words in ("rotate", "-o", "horse.png"), ("sweep", "-o", "horse.gif", "--frames", 2):
        assert main([*map(str, words), "hip.png", "--json", *WEIGHTS]) == 0
        out, err = capfd.readouterr()
        assert err == "radrotator: this looks like a horse; judge for yourself\n" and "horse; judge" in json.loads(out)["unfamiliar"]


# JSON


def documented():
    "Command → words of its row in the table of the notebook"
    text = "".join(line for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "markdown" for line in cell["source"])
    return {name: set(re.findall(r"`(\w+)`", row)) for name, row in re.findall(r"^\| `(\w+)` \|(.*)\|$", text, re.MULTILINE)}


FEW = "--set angles=0,12 --set compound=0 --set style=0 --set frames=0 --set seeds=0"
LINES = {
    "phantom": "phantom -o json/p.nii.gz --spacing 8", "drr": "drr body.nii.gz -o json/d.png --size 32 --kvp 80", "rotate": "rotate hip.dcm -o json/r.dcm --z 3 --weights untrained.safetensors --crop",
    "sweep": "sweep hip.png -o json/s --frames 2 --weights untrained.safetensors", "ingest": "ingest json/a.nii.gz json/b.nii.gz -o json/cts --min-slices 2 --max-thickness 10 --spacing 8 --no-coverage --workers 1",
    "pairs": "pairs json/cts -o json/sets --drrs 3 --size 16",
    "train": f"train --phantoms 1 --steps 1 -o json/run {' '.join(SMALL)}", "report": "report json/run", "evaluate": f"evaluate --cts json/one -o json/judged --weights untrained.safetensors --device cpu {FEW}",
    "convert": "convert json/theirs.ckpt -o json/c.safetensors --size 32 --heads 2", "export": "export -o json/m.onnx --weights untrained.safetensors", "demo": "demo -o json/demo --radiograph hip.png --weights untrained.safetensors", "doctor": "doctor",
}


@pytest.fixture
def material(here, monkeypatch):
    "What these lines read"
    import radrotator.phantom
    from radrotator.ct.read import read_ct
    from radrotator.model.mediffusion import to_mediffusion
    coarse = radrotator.phantom.phantom
    monkeypatch.setattr("radrotator.phantom.phantom", lambda seed, spacing=8.0, *others, **named: coarse(seed, max(spacing, 8.0), *others, **named))
    if (here/"json").exists(): return
    (here/"json").mkdir()
    write_ct(CT(read_ct("body.nii.gz").hu, np.diag([8.0, 8, 6, 1])), "json/a.nii.gz")
    Path("json/one").mkdir()
    Path("json/one/a.nii.gz").write_bytes(Path("json/a.nii.gz").read_bytes())
    Path("json/b.nii.gz").write_bytes(Path("json/a.nii.gz").read_bytes()[:3000])
    torch.save(dict(state_dict=to_mediffusion(UNet(UNetConfig(size=32, channels=32, multipliers=(1, 2), blocks=1, attention=(2,), heads=2)))), "json/theirs.ckpt")


def test_one_json_object_and_nothing_else(here, material, capfd):
    words, known = documented(), {}
    assert LINES.keys() == COMMANDS.keys() == words.keys()
    words["sweep"] |= words["rotate"]
    LINES["convert"] += " --no-ema"
    for name, line in LINES.items():
        assert main([*line.split(), "--json"]) == (1 if name == "ingest" else 0), capfd.readouterr().err   # one of its files is cut short
        known[name] = json.loads(capfd.readouterr().out, parse_constant=pytest.fail)                       # no NaN
        assert known[name].pop("command") == name and known[name].keys() <= words[name], known[name].keys() - words[name]
        assert all((here/known[name][key]).exists() for key in ("out", "report", "labels", "run", "data") if key in known[name])
    assert (known["ingest"]["series"], known["ingest"]["accepted"], known["ingest"]["refused"]) == (2, 1, dict(UNREADABLE=1))
    assert (known["pairs"]["made"], known["pairs"]["drrs"]) == (1, 3)
    assert (known["rotate"]["z"], known["rotate"]["size"], known["rotate"]["spacing"]) == (3, [96, 80], [0.5, 0.5])
    assert (known["train"]["step"], known["train"]["end"], known["train"]["best"]["step"]) == (1, "steps", 1)
    assert {row["axis"] for row in next(iter(known["evaluate"]["groups"].values()))["headline"]} >= {"x", "y", "z"}
    assert [row["axis"] for row in known["demo"]["rows"]] == [*"xyz"]*3 and known["demo"]["rows"][0]["psnr"] > 10 and known["demo"]["rows"][-1]["psnr"] is None


# What is in a file


def test_one_of_several_pictures(here, capfd, tmp_path):
    pages = [Image.open("hip.png"), Image.open("hip.png").transpose(Image.Transpose.FLIP_TOP_BOTTOM)]
    pages[0].save(tmp_path/"two.tif", save_all=True, append_images=pages[1:])
    assert main(["rotate", str(tmp_path/"two.tif"), "-o", str(tmp_path/"one.png"), *WEIGHTS]) == 2 and "frame=2" in capfd.readouterr().err
    for frame in (1, 2): accept(capfd, "rotate", tmp_path/"two.tif", "-o", tmp_path/f"{frame}.png", "--frame", frame, *WEIGHTS)
    first, second = (np.asarray(Image.open(tmp_path/f"{frame}.png"), float) for frame in (1, 2))
    assert np.abs(first - second).mean() > 100


def test_patient_data_comes_along_only_by_name(here, capfd, tmp_path):
    (tmp_path/"seen.dcm").write_bytes(dicom(BodyPartExamined="PELVIS"))
    secret = str(pydicom.dcmread(tmp_path/"seen.dcm").PatientName)
    accept(capfd, "rotate", tmp_path/"seen.dcm", "-o", tmp_path/"none.dcm", *WEIGHTS)
    accept(capfd, "rotate", tmp_path/"seen.dcm", "-o", tmp_path/"kept.dcm", "--keep", "PatientID", "--keep", "BodyPartExamined", *WEIGHTS)
    none, kept = (pydicom.dcmread(tmp_path/f"{name}.dcm") for name in ("none", "kept"))
    assert "4711" not in str(none) and (kept.PatientID, kept.BodyPartExamined) == ("ID4711", "PELVIS") and secret not in str(kept)
    assert main(["rotate", str(tmp_path/"seen.dcm"), "-o", str(tmp_path/"no.dcm"), "--keep", "PixelData", *WEIGHTS]) == 2 and not (tmp_path/"no.dcm").exists()
    assert main(["rotate", str(tmp_path/"seen.dcm"), "-o", str(tmp_path/"no.png"), "--keep", "PatientID", *WEIGHTS]) == 2 and not (tmp_path/"no.png").exists()


# The doctor


def test_the_doctor_says_what_is_missing_and_nothing_about_the_user(capfd, monkeypatch, tmp_path):
    monkeypatch.setattr(Path, "home", lambda: Path(torch.__file__).parents[3])    # as if all were installed in somebody's home
    assert main(["doctor"]) == 0
    said = capfd.readouterr().out
    assert f"torch {torch.__version__.split('+')[0]}" in said and "weights tiny" in said and "turn of a drawn pelvis" in said and str(Path.home()) not in said and str(Path.cwd()) not in said
    monkeypatch.setattr("radrotator.rotate.video.has_encoder", lambda: False)
    monkeypatch.setattr("importlib.metadata.version", lambda package: (_ for _ in ()).throw(ModuleNotFoundError(package)))
    assert main(["doctor", "--json"]) == 0                                        # none of this is needed to rotate
    missing = {check["name"]: check for check in json.loads(capfd.readouterr().out)["checks"] if check["found"] is None}
    assert {"video (H.264)", "spectra of a real beam"} <= missing.keys() and all(check["without"] and check["remedy"] for check in missing.values())


def test_the_doctor_finds_damaged_weights(capfd, monkeypatch, tmp_path):
    for module in "importlib.resources", "radrotator.rotate.rotator": monkeypatch.setattr(f"{module}.files", lambda package: tmp_path)
    (tmp_path/"weights").mkdir()
    (tmp_path/"weights"/"tiny.safetensors").write_text("damaged")
    assert main(["doctor"]) == 1
    said = capfd.readouterr().out
    assert said.count("NEEDED  ") == 2 and "not a readable .safetensors" in said and "make demo" in said and str(tmp_path) not in said


# Terminals, pipes and Ctrl-C


@contextlib.contextmanager
def at_a_terminal(*words, **options):
    "A command whose error stream is a terminal, and what is seen there"
    ours, theirs = pty.openpty()
    seen = []
    def read():
        with contextlib.suppress(OSError):                                        # Linux: an end that is closed
            while said := os.read(ours, 65536): seen.append(said.decode(errors="replace"))
    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    with subprocess.Popen([*PROGRAM, *map(str, words)], stdout=subprocess.PIPE, stderr=theirs, text=True, start_new_session=True,
                          preexec_fn=functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL), **options) as process:
        os.close(theirs)
        yield process, seen
        if process.poll() is None: process.kill()
    reader.join(60)
    os.close(ours)


def test_a_bar_on_a_terminal_and_only_there(here):
    with at_a_terminal("rotate", "hip.png", "-o", "bar.png", "--steps", 4, *DRAWING) as (process, seen):
        out, _ = process.communicate(timeout=300)
    assert process.returncode == 0 and out.startswith("wrote bar.png") and out.count("\n") == 1 and "\x1b" not in out
    assert "loading the weights" in "".join(seen) and "turning" in "".join(seen) and "4/4" in "".join(seen)


def test_ctrl_c(here, tmp_path, monkeypatch):
    for name in ("hip.png", "drawing.safetensors"): (tmp_path/name).write_bytes((here/name).read_bytes())
    monkeypatch.chdir(tmp_path)
    words = "sweep", "hip.png", "-o", "long.gif", "--frames", 65, "--steps", 10, *DRAWING
    with at_a_terminal(*words) as (process, seen):
        for _ in range(6000):
            if any(tmp_path.glob(".long.gif.frames/[0-9]*.png")) or process.poll() is not None: break
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGINT)
        out, _ = process.communicate(timeout=300)
    said = re.sub(r"\x1b\[[\d;?]*\w", "", "".join(seen))
    assert (process.returncode, out) == (130, "") and "Traceback" not in said and said.splitlines()[-1].endswith("radrotator: stopped; the same command with --resume goes on with the frames that are finished")
    assert {path.name for path in tmp_path.iterdir()} == {"hip.png", "drawing.safetensors", ".long.gif.frames"}
    assert main([*map(str, words), "--resume"]) == 0 and Image.open("long.gif").n_frames == 65
    with at_a_terminal("rotate", "hip.png", "-o", "long.png", "--steps", 1000, *DRAWING) as (process, seen):
        for _ in range(6000):
            if "turning" in "".join(seen) or process.poll() is not None: break
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(300) == 130
    assert {path.name for path in tmp_path.iterdir()} == {"hip.png", "drawing.safetensors", "long.gif"}


def test_ctrl_c_while_processes_begin(here, tmp_path):
    "A child that is still importing must not tell of it, either"
    with at_a_terminal("ingest", *[here/"body.nii.gz"]*2, here, "-o", tmp_path/"cts", "--workers", 2) as (process, seen):
        for _ in range(6000):
            if sum("spawn_main" in " ".join(child.cmdline()) for child in psutil.Process(process.pid).children()) == 2 or process.poll() is not None: break
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(300) == 130
    said = "".join(seen)
    assert "Traceback" not in said and said.count("radrotator: ") == 1 and not list(tmp_path.glob("cts/*.nii.gz"))


@pytest.mark.parametrize("words", [["--version"], ["--help"], ["doctor"]], ids=" ".join)
def test_nobody_listens(words, tmp_path):
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run([*PROGRAM, *words], stdout=writing, stderr=subprocess.PIPE, text=True, timeout=300)
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, "")


def test_a_fault_of_the_program_has_status_1(here):
    fault = "import sys, radrotator.radiograph.read as r; from radrotator.cli import main; r.read_radiograph = None; sys.exit(main(['rotate', 'hip.png', '-o', 'out.png']))"
    done = subprocess.run([sys.executable, "-c", fault], capture_output=True, text=True, timeout=300)
    assert done.returncode == 1 and "TypeError" in done.stderr and not (here/"out.png").exists()


# Completion


BASH = """
eval "$(radrotator --show-completion)"
tab() { COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMPREPLY=(); _radrotator_completion radrotator; echo "${COMPREPLY[*]}"; }
tab radrotator sw
tab radrotator rotate --no-m
tab radrotator sweep hip.png --axis ''
tab radrotator rotate hip.png --solver dd
tab radrotator rotate hip.png --device cu
tab radrotator train --preset ''
tab radrotator rotate h
complete -p radrotator
"""


def test_completion_in_bash(here, tmp_path):
    (tmp_path/"radrotator").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m radrotator.cli "$@"\n')
    (tmp_path/"radrotator").chmod(0o755)
    done = subprocess.run(["bash", "--norc", "-c", BASH], capture_output=True, text=True, timeout=300, env=os.environ | dict(PATH=f"{tmp_path}:{os.environ['PATH']}"))
    *said, files, how = done.stdout.splitlines()
    assert [line.split() for line in said] == [["sweep"], ["--no-mark"], ["x", "y", "z"], ["ddim", "ddpm"], ["cuda"], ["tiny", "small", "paper-tiny", "paper"]], done.stderr
    assert files == "" and "-o default" in how                       # bash itself completes files, where we have nothing to offer


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_completion_by_protocol(shell):
    asked = dict(_RADROTATOR_COMPLETE=f"complete_{shell}", _TYPER_COMPLETE_ARGS="radrotator ev", _TYPER_COMPLETE_FISH_ACTION="get-args")
    assert "evaluate" in subprocess.run(PROGRAM, capture_output=True, text=True, timeout=300, env=os.environ | asked).stdout


def test_what_is_completed_is_what_can_be_chosen():
    from radrotator.model.sample import SOLVERS
    from radrotator.train.config import PRESETS
    offered = lambda name, option: [item.value for item in next(p for p in COMMANDS[name].params if option in p.opts).shell_complete(COMMANDS[name].make_context(name, [], resilient_parsing=True), "")]
    assert offered("rotate", "--solver") == [*SOLVERS] and offered("train", "--preset") == [*PRESETS]
