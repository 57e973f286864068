"""The command as it is typed: what it writes and says, and that a mistake costs one line, exit status 2, and nothing
on disk. What a mistake is called is the code of its error, or the option that the parser finds wrong."""
import contextlib, errno, functools, json, os, pty, re, shlex, signal, subprocess, sys, threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pydicom
import pytest
import torch
import typer
from PIL import Image

from processes import noting, wait_until
from radrotator.app import console
from radrotator.app.console import COMMAND_GROUPS, list_examples
from radrotator.app.demo import DEMO_TITLE
from radrotator.cli import app, main
from radrotator.files import PICTURES
from radrotator.ct.nifti import write_ct
from radrotator.ct.volume import CT
from radrotator.evaluate.patients import FIRST_TEST_SEED
from radrotator.model.lift import Lift, LiftConfig
from radrotator.model.unet import UNet, UNetConfig
from radrotator.model.weights import load_weights, save_weights
from radrotator.radiograph.image import Radiograph
from radrotator.rotate.rotator import RadRotator
from test_bad_files import HEADERS, dicom

WEIGHTS = "--weights", "untrained.safetensors"   # they lift
DRAWING = "--weights", "drawing.safetensors"     # they draw views, told the rotation, as in the paper
PROGRAM = sys.executable, "-m", "radrotator.cli"
NOTEBOOK = Path(__file__).resolve().parents[1]/"nbs"/"50_app"/"08_commands.ipynb"
COMMANDS = typer.main.get_command(app).commands


def write_weights(folder):
    "Networks that have learnt nothing"
    torch.manual_seed(0)
    lift = LiftConfig(size=32, canvas=48, slabs=8, channels=16, multipliers=(1, 2))
    save_weights(Lift(lift), folder/"untrained.safetensors", {})
    network = UNet(replace(UNetConfig.tiny(), size=32))
    for module in network.modules():  # of zeros it would draw nothing
        if getattr(module, "weight", None) is not None and not module.weight.any(): module.reset_parameters()
    save_weights(network, folder/"drawing.safetensors", {})


def write_radiographs(folder):
    row, column = np.mgrid[-1:1:96j, -1:1:80j]
    body = 0.4*(row**2 + column**2 < 0.9) + 0.5*((row - 0.2)**2 + (abs(column) - 0.4)**2 < 0.04)
    radiograph = Radiograph(body/body.max(), (0.5, 0.5))
    radiograph.write(folder/"hip.png")
    radiograph.write(folder/"hip.dcm", mark=False)  # a marked one is met with a warning
    label = np.zeros((96, 80))
    label[4:8, 4:16] = 1
    Radiograph(label).write(folder/"black.png")  # but for a label


def write_cts(folder):
    z, y, x = np.mgrid[-1:1:60j, -1:1:40j, -1:1:50j]
    hu = np.where(x**2 + y**2 < 0.8, 40.0, -1000.0) + 900*((abs(x) - 0.5)**2 + y**2 + (z/2)**2 < 0.05)
    hu = hu.transpose(2, 1, 0).astype(np.float32)
    write_ct(CT(hu, np.diag([8.0, 6, 8, 1])), folder/"body.nii.gz")
    write_ct(CT(hu[:, :, 20:40], np.diag([8.0, 6, 8, 1])), folder/"slab.nii.gz")
    (folder/"series").mkdir()
    place = dict(ImagePositionPatient=[0, 0, 0], ImageOrientationPatient=[1, 0, 0, 0, 1, 0], PixelSpacing=[1, 1])
    (folder/"series"/"slice.dcm").write_bytes(dicom("CT", **place))


def write_bad_files(folder):
    (folder/"letter.dcm").write_text("Dear colleague,\nthe patient …\n")
    (folder/"short.png").write_bytes((folder/"hip.png").read_bytes()[:400])
    (folder/"short.nii.gz").write_bytes((folder/"body.nii.gz").read_bytes()[:2000])
    (folder/"other").mkdir()
    (folder/"other"/"thesis.txt").write_text("mine")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "One folder with good files and bad ones, made once"
    folder = tmp_path_factory.mktemp("made")
    for write in (write_weights, write_radiographs, write_cts, write_bad_files): write(folder)
    return folder


@pytest.fixture
def here(made, monkeypatch):
    "That folder, as the current one"
    monkeypatch.chdir(made)
    return made


def listing(folder):
    "Every file and folder, with size and time of change"
    return {str(p.relative_to(folder)): (p.stat().st_size, p.stat().st_mtime_ns) for p in sorted(folder.rglob("*"))}


@pytest.fixture
def refuse(here, capfd, monkeypatch):
    "A function that types a mistake: it costs one line, which has some values in it, and leaves the folder as it was"
    names = []
    monkeypatch.setattr(console, "format_error", noting(console.format_error, names.append))
    def refuse(expected, *words):
        before = listing(here)
        name, *values = expected.split()
        assert main([str(word) for word in words]) == 2
        out, err = capfd.readouterr()
        assert out == "" and err.startswith("radrotator: ") and err.endswith("\n") and err.count("\n") == 1, err
        assert 40 < len(err) < 300 and "Traceback" not in err, err
        assert name in ("*", names[-1]), (names, err)
        assert all(value in err for value in values), err
        assert listing(here) == before
    return refuse


def accept(capfd, *words):
    "The last line that `radrotator WORDS` prints"
    assert main([str(w) for w in words]) == 0, capfd.readouterr().err
    out, err = capfd.readouterr()
    assert err == ""
    return out.splitlines()[-1]


def accept_json(capfd, *words):
    "What `radrotator WORDS --json` says; what a person would read goes to the error stream"
    assert main([*map(str, words), "--json"]) == 0, capfd.readouterr().err
    out, err = capfd.readouterr()
    assert "radrotator: " not in err
    return json.loads(out)


# What is typed, and what the refusal is: its name (* any), and values that its line must have

BAD_RADIOGRAPHS = {
    "missing.png": "NO_FILE",
    "letter.dcm": "UNREADABLE",
    "short.png": "UNREADABLE",
    "untrained.safetensors": "UNREADABLE",
    "body.nii.gz": "NOT_A_RADIOGRAPH drr",
    "series": "NOT_A_RADIOGRAPH drr",
    "series/slice.dcm": "NOT_A_RADIOGRAPH drr",
}
BAD_CTS = {
    "missing.nii.gz": "UNREADABLE",
    "short.nii.gz": "UNREADABLE",
    "letter.dcm": "NOT_CT",
    "hip.dcm": "NOT_CT",
    "hip.png": "NOT_CT",
    "other": "NOT_CT",
    "series": "TOO_FEW_SLICES",
    "series/slice.dcm": "TOO_FEW_SLICES",
    "slab.nii.gz": "TOO_SHORT 160",
}
BAD_ANGLES = {angle: f"ANGLE {angle}" for angle in ("16", "-15.5", "nan", "inf")} | {"ten": "--{}", "": "--{}"}
BAD_OUTPUTS = {
    "nowhere/out.png": "NO_FOLDER",
    "letter.dcm/out.png": "NO_FOLDER",
    "hip.png": "EXISTS",
    "out.bmp": "KIND .tif",
    "out": "KIND",
    "other": "KIND",
}
FOLDERS = "out", "other"  # `rotate` takes them for folders: see test_one_file_into_a_folder
MAKERS = ["rotate hip.png --weights untrained.safetensors", "drr body.nii.gz"]
MAKING = pytest.mark.parametrize("command", MAKERS)


@pytest.mark.parametrize("given", BAD_RADIOGRAPHS)
def test_rotate_refuses_what_is_no_radiograph(given, refuse):
    refuse(f"{BAD_RADIOGRAPHS[given]} {given}", "rotate", given, "-o", "out.png", *WEIGHTS)


@pytest.mark.parametrize("given", BAD_CTS)
def test_drr_refuses_what_is_no_ct(given, refuse):
    refuse(f"{BAD_CTS[given]} {given}", "drr", given, "-o", "out.png")


@MAKING
@pytest.mark.parametrize("axis", "xyz")
@pytest.mark.parametrize("angle", BAD_ANGLES)
def test_angles(command, axis, angle, refuse):
    refuse(BAD_ANGLES[angle].format(axis), *command.split(), "-o", "out.png", f"--{axis}", angle)


@pytest.mark.parametrize("command, out", [
    *((MAKERS[0], out) for out in BAD_OUTPUTS if out not in FOLDERS),
    *((MAKERS[1], out) for out in BAD_OUTPUTS),
])
def test_outputs(command, out, refuse):
    refuse(f"{BAD_OUTPUTS[out]} {out}", *command.split(), "-o", out)


LONG = "a"*250
LIFT, DRAW = " ".join(WEIGHTS), " ".join(DRAWING)
REFUSED = {
    "dance": "USAGE dance",

    "rotate hip.png": "--out",
    "rotate -o out.png": "USAGE INPUT",
    "rotate gone.png -o out.png --json": "NO_FILE gone.png",
    "rotate hip.png -o out.png --angle 3": "--angle",
    "rotate hip.png -o out.png --weights gone.safetensors": "NO_WEIGHTS gone.safetensors",
    "rotate hip.png -o out.png --weights hip.png": "NOT_SAFETENSORS hip.png",
    "rotate hip.png -o out.png --device quantum": "NO_DEVICE quantum cuda",
    "rotate hip.png -o out.png --steps 0": "--steps",
    "rotate hip.png -o out.png --guidance nan": "--guidance",
    "rotate hip.png -o out.png --detail nan": "--detail",
    "rotate hip.png -o out.png --detail 1.5": "--detail",
    "rotate hip.png -o out.png --seed -1": "--seed",
    f"rotate hip.png -o out.png --detail 0 {DRAW}": "NO_DETAIL",
    f"rotate hip.png -o out.png --guidance 2 {LIFT}": "NO_GUIDANCE",
    f"rotate hip.png -o out.png --steps 10 {LIFT}": "NO_SAMPLES 10",
    f"rotate hip.png -o out.png --solver magic {LIFT}": "NO_SOLVER magic ddim",
    f"rotate black.png -o out.png --z 3 {LIFT}": "EVEN_PICTURE",

    "sweep hip.png -o hip.png": "FILM_KIND hip.png",
    "sweep hip.png -o nowhere/out.mp4": "NO_FOLDER nowhere",
    "sweep hip.png -o out.mp4 --axis w": "--axis",
    f"sweep hip.png -o out.avi {LIFT}": "FILM_KIND .mp4 .gif",
    f"sweep hip.png -o out.mp4 --span 16 {LIFT}": "ANGLE 16",
    f"sweep hip.png -o out.mp4 --span nan {LIFT}": "ANGLE nan",
    f"sweep hip.png -o out.mp4 --frames 1 {LIFT}": "FRAME_COUNT 2",
    f"sweep hip.png -o out.mp4 --fps 0 {LIFT}": "FRAME_RATE 1",
    f"sweep hip.png -o out.mp4 --solver magic --frames 2 {LIFT}": "NO_SOLVER magic ddim",
    f"sweep hip.png -o out.gif --frames 2 --steps 10 {LIFT}": "NO_SAMPLES 10",
    f"sweep black.png -o out.gif --frames 2 {LIFT}": "EVEN_PICTURE",

    "phantom -o out.png": "KIND .nii",
    "phantom -o body.nii.gz": "EXISTS body.nii.gz",
    "phantom -o nowhere/out.nii.gz": "NO_FOLDER nowhere",
    f"phantom -o {LONG}.nii.gz": "NAME_TOO_LONG",
    "phantom -o out.nii.gz --bones gone.npz": "NO_ATLAS gone.npz",
    "phantom -o out.nii.gz --bones hip.png": "NOT_AN_ATLAS hip.png",
    "phantom -o out.nii.gz --spacing nan": "--spacing",
    "phantom -o out.nii.gz --spacing 9": "--spacing",

    "drr body.nii.gz -o out.png --size 3": "--size",
    "drr body.nii.gz -o out.png --fov nan": "--fov",
    "drr body.nii.gz -o out.png --centre hip": "NO_CENTRE hip volume",
    "drr body.nii.gz -o out.png --kvp 20": "PHYSICS 20.0 40 150",
    "drr body.nii.gz -o out.png --kvp nan": "PHYSICS nan",
    "drr body.nii.gz -o out.png --kerma 5": "USAGE --kerma --kvp",
    "drr body.nii.gz -o out.png --labels": "NO_LABELS body.nii.gz NAME_labels.nii.gz",
    "drr body.nii.gz -o out.dcm --labels": "KIND out.dcm .png",
    "drr body.nii.gz -o out.png --labels --kvp 80": "USAGE --labels --kvp",
    "drr body.nii.gz -o out.png --labels --no-mark": "USAGE --labels --mark",

    "ingest -o cts": "USAGE SRC",
    "ingest gone -o cts": "NO_FILE gone",
    "ingest body.nii.gz -o hip.png": "FILE hip.png",
    "ingest body.nii.gz -o nowhere/cts": "NO_FOLDER nowhere",
    "ingest body.nii.gz -o cts --report nowhere/report.csv": "NO_FOLDER nowhere",
    "ingest body.nii.gz -o cts --report hip.png": "NOT_A_REPORT hip.png",
    "ingest body.nii.gz -o cts --spacing nan": "--spacing",
    "ingest body.nii.gz -o cts --patient (": "BAD_PATTERN",

    "pairs gone -o sets": "NO_CT gone",
    "pairs other -o sets": "NO_CT other",
    "pairs series -o hip.png": "FILE hip.png",
    "pairs series -o nowhere/sets": "NO_FOLDER nowhere",
    "pairs series -o sets --shard 0/2": "USAGE 0/2",
    "pairs series -o sets --shard half": "USAGE half",
    "pairs series -o sets --drrs 2": "--drrs",
    "pairs series -o sets --fov nan": "--fov",
    "pairs series -o sets --folds gone.csv": "NO_CT series",
    "pairs series -o sets --centre hip": "BAD_CENTRE hip volume",

    "convert hip.png -o out.safetensors": "NOT_A_CHECKPOINT hip.png",
    "convert gone.ckpt -o out.safetensors": "NO_CHECKPOINT gone.ckpt",
    "convert untrained.safetensors -o out.safetensors": "NOT_A_CHECKPOINT untrained.safetensors",
    "convert untrained.safetensors -o out.png": "KIND .safetensors",

    f"export -o out.pt {LIFT}": "KIND .onnx",
    f"export -o out.onnx {DRAW}": "NOT_A_LIFT",

    "train -o run": "ONE_SOURCE",
    "train -o run --resume": "NO_RUN run",
    "train -o other": "NOT_A_RUN other",
    "train -o hip.png": "NOT_A_RUN hip.png",
    "train -o nowhere/run": "NO_FOLDER nowhere",
    "train -o run --preset huge": "NO_PRESET huge paper-tiny",
    "train -o run --minutes nan": "--minutes",
    "train -o run --phantoms 0": "--phantoms",
    "train -o run --bones hip.png": "NOT_AN_ATLAS hip.png",
    "train -o run --init gone.safetensors": "NO_WEIGHTS gone.safetensors",
    "train -o run --init untrained.safetensors": "OTHER_NETWORK untrained.safetensors",
    "train -o run --data . --cts .": "ONE_SOURCE --data --cts",
    "train -o run --data . --bones hip.png": "NOT_AN_ATLAS hip.png",
    "train -o run --data nowhere": "NO_SETS nowhere",
    "train -o run --data other": "NO_SETS other",
    "train -o run --cts other": "NO_CT other",
    "train -o run --phantoms 1 --together 12": "BAD_SETTING 12 8",
    "train -o run --phantoms 1 --set steps=3": "USAGE --steps",
    "train -o run --phantoms 1 --set rate": "USAGE 'rate'",
    "train -o run --phantoms 1 --set rate=x": "BAD_VALUE rate 'x'",
    "train -o run --phantoms 1 --set data.magic=1": "NO_SETTING magic drrs",
    "train -o run --phantoms 1 --set batch=20": "* 20 8",
    "report other": "NO_LOG other",

    f"demo -o other {LIFT}": "NOT_A_DEMO other",
    f"demo -o hip.png {LIFT}": "NOT_A_DEMO hip.png",
    f"demo -o nowhere/demo {LIFT}": "NO_FOLDER nowhere",
    f"demo -o demo {LIFT} --ct hip.png": "NOT_CT hip.png",
    f"demo -o demo {LIFT} --radiograph body.nii.gz": "NOT_A_RADIOGRAPH body.nii.gz",
    f"demo -o demo {LIFT} --radiograph missing.png": "NO_FILE missing.png",
}


@pytest.mark.parametrize("line", REFUSED)
def test_refused(line, refuse):
    refuse(REFUSED[line], *line.split())


def test_labels_are_not_overwritten(here, refuse):
    (here/"new_labels.nii.gz").touch()
    refuse("EXISTS new_labels.nii.gz", "phantom", "-o", "new.nii.gz")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_cuda_where_there_is_none(refuse):
    refuse("NO_GPU cuda", "rotate", "hip.png", "-o", "out.png", "--device", "cuda", *WEIGHTS)
    refuse("NO_GPU cuda", "train", "-o", "run", "--device", "cuda")


def test_a_fault_of_the_program_is_not_hidden(here, monkeypatch):
    monkeypatch.setattr("radrotator.radiograph.read.read_radiograph", lambda *given: 1/0)
    with pytest.raises(ZeroDivisionError): main(["rotate", "hip.png", "-o", "out.png", *WEIGHTS])


@pytest.mark.parametrize("number", ["ENOSPC", "EACCES", "EROFS", "ENAMETOOLONG"])
@pytest.mark.parametrize("file", [None, "out.png"])
def test_a_disk_that_refuses(number, file, refuse, monkeypatch):
    def fail(*given): raise OSError(getattr(errno, number), "it-will-not-do", file)
    monkeypatch.setattr("radrotator.radiograph.read.read_radiograph", fail)
    refuse(f"{number} it-will-not-do {file or 'disk'}", "rotate", "hip.png", "-o", "out.png", *WEIGHTS)


def test_a_fault_of_the_disk_is_not_hidden(here, monkeypatch):
    def fail(*given): raise OSError(errno.EIO, "it broke")
    monkeypatch.setattr("radrotator.radiograph.read.read_radiograph", fail)
    with pytest.raises(OSError): main(["rotate", "hip.png", "-o", "out.png", *WEIGHTS])


def test_a_folder_that_is_closed(refuse, monkeypatch):
    monkeypatch.setattr("os.access", lambda path, mode, allowed=os.access: mode != os.W_OK and allowed(path, mode))
    refuse("NOT_WRITABLE out.png", "drr", "body.nii.gz", "-o", "out.png")


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    "Radiographs that are none, whatever their headers say"
    folder = tmp_path_factory.mktemp("hostile")
    for name, (header, _) in HEADERS.items(): (folder/f"{name}.dcm").write_bytes(dicom(**header))
    return folder


@pytest.mark.parametrize("name", HEADERS)
def test_every_command_survives_a_hostile_radiograph(name, hostile, here, capfd):
    before = listing(here)
    for line in ("rotate {} -o out.png", "sweep {} -o out.mp4", "demo -o demo2 --radiograph {}"):
        assert main([word.format(hostile/f"{name}.dcm") for word in line.split()]) == 2
        out, err = capfd.readouterr()
        assert out == "" and err.count("\n") == 1 and f"{name}.dcm" in err
        assert "SECRET" not in err and "Secret" not in err and "Traceback" not in err
    assert listing(here) == before


def run_alone(*words, **options):
    "The command in a process of its own"
    return subprocess.run([*PROGRAM, *words], capture_output=True, text=True, timeout=300, **options)


def test_in_a_process_of_its_own(here):
    bad = run_alone("rotate", "letter.dcm", "-o", "out.png")
    assert (bad.returncode, bad.stdout, bad.stderr.count("\n")) == (2, "", 1) and not (here/"out.png").exists()
    good = run_alone("rotate", "hip.dcm", "-o", "alone.png", "--z", "-5", "--json", *WEIGHTS)
    assert (good.returncode, good.stderr) == (0, "")  # no bar where there is no terminal
    assert Image.open(here/"alone.png").size == (80, 96) and json.loads(good.stdout)["out"] == "alone.png"


# ---- help ------------------------------------------------------------------------------------------------------------

def test_the_whole_story_in_one_screen():
    text = run_alone("--help", env=os.environ | dict(COLUMNS="80")).stdout
    lines = text.splitlines()
    named = [name for names in COMMAND_GROUPS.values() for name in names]
    assert len(lines) <= 30 and max(map(len, lines)) <= 80 and "not for diagnosis" in text
    assert sorted(COMMANDS) == sorted(named)
    assert re.findall(r"^  [A-Z ].{13}(\w+)  ", text, re.MULTILINE) == named
    assert text.count("  radrotator ") == 2  # examples
    assert not [line for line in lines[1:] if line.endswith("...")]  # nothing cut off


HELP = """
import sys
from radrotator.cli import main
main(["rotate", "--help"])
print(*{"torch", "numba", "scipy", "pydicom"} & set(sys.modules), file=sys.stderr)
"""


def test_help_does_not_wait_for_pytorch():
    done = subprocess.run([sys.executable, "-c", HELP], capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (0, "\n") and "--detail" in done.stdout


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_a_command(name, capfd, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert main([name, "--help"]) == 0
    text, examples = capfd.readouterr().out, list_examples(COMMANDS[name])
    assert max(map(len, text.splitlines())) <= 80 and examples and all(example in text for example in examples)


@pytest.mark.parametrize("example", [example for command in COMMANDS.values() for example in list_examples(command)])
def test_examples_are_understood(example):
    _, name, *words = shlex.split(example)
    COMMANDS[name].make_context(name, words)


def test_examples_that_are_cheap_run(here, tmp_path, capfd, monkeypatch):
    for theirs, ours in {"hip.dcm": "hip.dcm", "hip.png": "hip.png", "pelvis.nii.gz": "body.nii.gz"}.items():
        (tmp_path/theirs).write_bytes((here/ours).read_bytes())
    monkeypatch.chdir(tmp_path)
    of = {name: list_examples(COMMANDS[name]) for name in ("rotate", "sweep", "drr", "doctor")}
    for example in (*of["rotate"], of["sweep"][1], of["drr"][0], *of["doctor"]):
        assert main(shlex.split(example)[1:]) == 0, capfd.readouterr().err
    assert {"turned.dcm", "turned.png", "sweep.gif", "frontal.png"} < {path.name for path in tmp_path.iterdir()}


# ---- what is written -------------------------------------------------------------------------------------------------

def likeness(a, b): return np.corrcoef(a.ravel(), b.ravel())[0, 1]


def pixels_of(*names): return (Radiograph.read(name).pixels for name in names)


@pytest.mark.parametrize("suffix", PICTURES)
def test_rotate_writes_every_kind(suffix, here, capfd):
    name = f"kind{suffix}"
    line = accept(capfd, "rotate", "hip.dcm", "-o", name, "--x", "-3", "--y", "5.5", "--no-mark", *WEIGHTS)
    assert name in line and "y = 5.5°" in line
    view, given = pixels_of(name, "hip.dcm")
    expected = RadRotator.from_file("untrained.safetensors", "cpu").rotate("hip.dcm", x=-3, y=5.5).pixels
    assert view.shape == (96, 80) and likeness(view, expected) > 0.998 > likeness(given, expected)


@pytest.mark.parametrize("words, values", [
    (("--steps", 2, "--guidance", 1.5, "--seed", 7, *DRAWING), ["steps 2", "guidance 1.5", "seed 7"]),
    (("--detail", 0.5, *WEIGHTS), ["detail 0.5"]),
], ids=["drawn", "lifted"])
def test_dicom_says_what_was_done(words, values, here, capfd, tmp_path):
    accept(capfd, "rotate", "hip.dcm", "-o", tmp_path/"a.dcm", "--x", "-3", *words)
    ds = pydicom.dcmread(tmp_path/"a.dcm")
    for value in ("x = -3°", "Rz·Ry·Rx", "weights ", *values): assert value in ds.DerivationDescription
    assert ds.SyntheticData == "YES" and list(ds.PixelSpacing) == [0.5, 0.5]


@pytest.mark.parametrize("suffix", PICTURES)
@pytest.mark.parametrize("crop", [(), ("--crop",)], ids=["whole", "cropped"])
def test_turned_by_nothing_every_pixel_stays(suffix, crop, here, capfd, tmp_path):
    same, unturned = tmp_path/f"same{suffix}", tmp_path/f"unturned{suffix}"
    Radiograph.read("hip.dcm").write(same, mark=False)
    accept(capfd, "rotate", "hip.dcm", "-o", unturned, "--no-mark", *crop, *WEIGHTS)
    a, b = pixels_of(same, unturned)
    assert a.tobytes() == b.tobytes()


def test_detail_and_line_integrals_make_other_views(here, capfd):
    for name, words in dict(sharp=(), mean=("--detail", 0), linear=("--line-integrals",)).items():
        accept(capfd, "rotate", "hip.png", "-o", f"{name}.png", "--z", 9, *words, *WEIGHTS)
    sharp, mean, linear = pixels_of("sharp.png", "mean.png", "linear.png")
    assert np.abs(sharp - mean).max() > 0.02 and np.abs(sharp - linear).max() > 0.01
    assert all(np.isfinite(view).all() for view in (sharp, mean, linear))


def test_same_seed_same_file(here, capfd):
    for i, seed in enumerate((1, 1, 2)):
        accept(capfd, "rotate", "hip.png", "-o", f"seed{i}.png", "--z", "9", "--seed", seed, *DRAWING)
    a, b, c = (np.asarray(Image.open(f"seed{i}.png")) for i in range(3))
    assert np.array_equal(a, b) and a.shape == c.shape and not np.array_equal(a, c)


def test_phantom_drr_rotate(here, capfd):
    assert "p.nii.gz" in accept(capfd, "phantom", "-o", "p.nii.gz", "--seed", "1", "--spacing", "6")
    assert (here/"p_labels.nii.gz").exists()
    accept(capfd, "drr", "p.nii.gz", "-o", "p0.png", "--size", "64")
    accept(capfd, "drr", "p.nii.gz", "-o", "py.png", "--size", "64", "--y", "10")
    accept(capfd, "rotate", "p0.png", "-o", "pr.png", "--y", "10", "--no-mark", *WEIGHTS)
    before, truth, view = pixels_of("p0.png", "py.png", "pr.png")
    assert before.shape == truth.shape == view.shape == (64, 64)
    inner = (slice(7, -7),)*2  # what comes in from beyond the frame nobody knows
    # about the beam's axis geometry is nearly all
    assert np.mean((view - truth)[inner]**2) < 0.2*np.mean((before - truth)[inner]**2)


def test_label_picture_names_what_a_drr_shows(here, capfd):
    accept(capfd, "phantom", "-o", "q.nii.gz", "--seed", "2", "--spacing", "4")
    shown = accept_json(capfd, "drr", "q.nii.gz", "-o", "bones.png", "--labels", "--size", "64", "--z", "10")
    drr = accept_json(capfd, "drr", "q.nii.gz", "-o", "q.png", "--size", "64", "--z", "10")
    assert {name: shown[name] for name in ("fov", "spacing", "isocentre")} == {name: drr[name] for name in ("fov", "spacing", "isocentre")}
    picture = Image.open("bones.png")
    numbers, names = np.array(picture), json.loads(picture.text["Labels"])
    assert picture.mode == "P" and numbers.shape == (64, 64) and names == shown["structures"]
    assert {str(n) for n in np.unique(numbers)} - {"0"} <= set(names) and names["4"] == "hip_left"
    bright = np.array(Image.open("q.png"), float)
    assert bright[numbers > 0].mean() > 1.2*bright[numbers == 0].mean()  # in register: bone lies where it is bright
    left, right = ((numbers == n).nonzero()[1].mean() for n in (4, 5))
    assert right < left                                                  # the patient's right is on the left


def test_drr_of_one_ct_has_one_scale(here, capfd):
    found = [accept_json(capfd, "drr", "body.nii.gz", "-o", f"scale{z}.dcm", "--size", "32", "--z", z) for z in (0, 15)]
    assert found[0]["fov"] == found[1]["fov"]
    assert len({tuple(pydicom.dcmread(f"scale{z}.dcm").PixelSpacing) for z in (0, 15)}) == 1


SMALL = {
    "lift.size": 32,
    "lift.canvas": 48,
    "lift.slabs": 8,
    "lift.channels": 16,
    "lift.multipliers": "1,2",
    "held": 2,
    "batch": 8,
    "validation": 8,
    "data.oversample": 1,
}
QUICKLY = [word for key, value in SMALL.items() for word in ("--set", f"{key}={value}")]
QUICKLY += ["--workers", "0", "--device", "cpu"]


def test_train_and_train_on(here, capfd, refuse):
    words = "train", "--phantoms", 1, "--steps", 2, "-o", here/"run", "--seed", 3, *QUICKLY
    assert accept_json(capfd, *words, "--minutes", 0)["step"] == 1
    refuse("RUN_EXISTS --resume", *words)
    assert accept_json(capfd, *words, "--minutes", 5, "--resume")["step"] == 2
    # what was said need not be said again, and what is done stays done
    assert accept_json(capfd, "train", "-o", here/"run", "--resume", "--device", "cpu")["end"] == "steps"
    _, about = load_weights("run/weights.safetensors")
    assert about["training"]["seed"] == about["data"]["seed"] == 3
    assert about["training"]["lift"]["channels"] == 16 and about["data"]["size"] == 32
    assert (about["device"], about["processes"], about["torch"]) == ("cpu", 1, torch.__version__)
    assert about["command"].startswith("radrotator train --out run --phantoms 1 ")
    assert "--set lift.channels=16" in about["command"]
    assert str(here) not in json.dumps(about) and "commit" in about
    again = "-o", "run", "--resume", "--device", "cpu"
    refuse("OTHER_SETTING phantoms 1 2", "train", "--phantoms", 2, *again)
    refuse("OTHER_SETTING cts", "train", "--cts", ".", *again)
    refuse("OTHER_SETTING steps 2 3", "train", "--steps", 3, *again)  # the rate follows the steps
    accept(capfd, "rotate", "hip.png", "-o", "trained.png", "--x", "5", "--weights", "run/weights.safetensors")
    accept(capfd, "report", "run", "-o", "report.html")


DEMO_FILES = {
    "phantom.png", "phantom_input.png", "phantom_x12_rotated.png", "chest_z12_true.png", "ct1_y12_difference.png",
    "radiograph1.png", "radiograph1_x12_rotated.png",
}


def test_demo_twice(here, capfd, monkeypatch, refuse):
    import radrotator.phantom.phantom as room
    seeds, coarse = [], room.phantom
    monkeypatch.setattr(room, "phantom", lambda seed: seeds.append(seed) or coarse(seed, spacing=8.0))
    files = "--ct", "body.nii.gz", "--radiograph", "hip.dcm"
    for seed in (0, 1): accept(capfd, "demo", "-o", "demo", *files, "--seed", seed, *WEIGHTS)
    assert seeds == [FIRST_TEST_SEED, FIRST_TEST_SEED + 1]  # not among the seeds that training draws
    table = (here/"demo"/"table.md").read_text()
    assert table.startswith(DEMO_TITLE) and "frontal pelvis phantoms only" in table and "hip" not in table
    for item in ("phantom", "chest CT", "CT 1", "radiograph 1"): assert table.count(f"\n| {item} ") == 3
    names = {path.name for path in (here/"demo").iterdir()}
    assert DEMO_FILES < names and "radiograph1_x12_true.png" not in names
    assert not [path for path in here.iterdir() if path.name.startswith(".")]
    assert Image.open(here/"demo"/"radiograph1_x12_rotated.png").size == (80, 96)
    def description(name): return Image.open(here/"demo"/f"{name}.png").text["Description"]
    assert "as given" in description("radiograph1_input") and "DRR" in description("ct1_input")
    assert description("ct1_x12_rotated").startswith("SYNTHETIC, not for diagnosis")
    (here/"demo"/"notes.txt").write_text("mine")
    refuse("NOT_A_DEMO demo", "demo", "-o", "demo", *WEIGHTS)


# ---- sweeps ----------------------------------------------------------------------------------------------------------

def test_sweep_of_every_kind(here, capfd):
    few = "--frames", 5, *WEIGHTS
    found = accept_json(capfd, "sweep", "hip.dcm", "-o", "turn.mp4", "--axis", "x", "--span", 3, "--label", *few)
    assert (found["axis"], found["frames"], found["span"]) == ("x", 5, 3)
    accept(capfd, "sweep", "hip.dcm", "-o", "turn.gif", "--crop", "--bounce", *few)
    accept(capfd, "sweep", "hip.dcm", "-o", "turn", "--invert", *few)
    import imageio_ffmpeg
    assert imageio_ffmpeg.count_frames_and_secs("turn.mp4")[0] == 5 and Image.open("turn.gif").n_frames == 8
    assert len([*Path("turn").glob("*.png")]) == 5 and not [p for p in here.iterdir() if p.name.startswith(".")]


def test_how_a_radiograph_is_read_and_marked(here, capfd):
    Radiograph(1 - Radiograph.read("hip.png").pixels).write("negative.png")
    ways = dict(as_is=["hip.png", "--no-mark"], inverted=["negative.png", "--invert", "--no-mark"], marked=["hip.png"])
    for name, words in ways.items(): accept(capfd, "rotate", *words, "-o", f"{name}.png", "--z", 4, *WEIGHTS)
    as_is, inverted, marked = pixels_of("as_is.png", "inverted.png", "marked.png")
    assert np.abs(as_is - inverted).max() < 0.01 and np.abs(as_is - marked).max() > 0.5
    accept(capfd, "rotate", "hip.png", "-o", "bare.dcm", "--no-mark", *WEIGHTS)
    assert pydicom.dcmread("bare.dcm").BurnedInAnnotation == "NO"


def test_what_the_weights_do_not_know_is_turned_with_a_warning(here, capfd, monkeypatch):
    monkeypatch.setattr(RadRotator, "unfamiliar", lambda self, radiograph, crop: "it looks like a horse")
    for words in (["rotate", "-o", "horse.png"], ["sweep", "-o", "horse.gif", "--frames", "2"]):
        assert main([*words, "hip.png", "--json", *WEIGHTS]) == 0
        out, err = capfd.readouterr()
        assert err == "radrotator: it looks like a horse\n" and "it looks like a horse" in json.loads(out)["unfamiliar"]


# ---- JSON ------------------------------------------------------------------------------------------------------------

def documented():
    "Command → words of its row in the table of the notebook"
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    text = "".join(line for cell in cells if cell["cell_type"] == "markdown" for line in cell["source"])
    rows = re.findall(r"^\| `(\w+)` \|(.*)\|$", text, re.MULTILINE)
    return {name: set(re.findall(r"`(\w+)`", row)) for name, row in rows}


FEW = "--set angles=0,12 --set compound=0 --set style=0 --set frames=0 --set seeds=0"
ODDLY = "--min-slices 2 --max-thickness 10 --spacing 8 --no-coverage --workers 1"
LINES = {
    "phantom": "phantom -o json/p.nii.gz --spacing 8",
    "drr": "drr json/p.nii.gz -o json/d.png --size 64 --kvp 80",
    "register": "register json/p.nii.gz json/d.png --fov 320 -o json/pose.json",
    "rotate": f"rotate hip.dcm -o json/r.dcm --z 3 {LIFT} --crop",
    "sweep": f"sweep hip.png -o json/s --frames 2 {LIFT}",
    "ingest": f"ingest json/a.nii.gz json/b.nii.gz -o json/cts {ODDLY}",
    "pairs": "pairs json/cts -o json/sets --drrs 3 --size 16",
    "train": f"train --phantoms 1 --steps 1 -o json/run {' '.join(QUICKLY)}",
    "report": "report json/run",
    "evaluate": f"evaluate --cts json/one -o json/judged {LIFT} --device cpu {FEW}",
    "convert": "convert json/theirs.ckpt -o json/c.safetensors --size 32 --heads 2 --no-ema",
    "export": f"export -o json/m.onnx {LIFT}",
    "demo": f"demo -o json/demo --radiograph hip.png {LIFT}",
    "doctor": "doctor",
}


@pytest.fixture
def material(here, monkeypatch):
    "What these lines read; phantoms are coarse"
    import radrotator.phantom.phantom as room
    from radrotator.ct.read import read_ct
    from radrotator.model.mediffusion import to_mediffusion
    fine = room.phantom
    def coarse(seed, spacing=8.0, *others, **named): return fine(seed, max(spacing, 8.0), *others, **named)
    monkeypatch.setattr(room, "phantom", coarse)
    folder = here/"json"
    folder.mkdir()
    write_ct(CT(read_ct("body.nii.gz").hu, np.diag([8.0, 8, 6, 1])), folder/"a.nii.gz")
    (folder/"b.nii.gz").write_bytes((folder/"a.nii.gz").read_bytes()[:3000])
    (folder/"one").mkdir()
    (folder/"one"/"a.nii.gz").write_bytes((folder/"a.nii.gz").read_bytes())
    theirs = UNetConfig(size=32, channels=32, multipliers=(1, 2), blocks=1, attention=(2,), heads=2)
    torch.save(dict(state_dict=to_mediffusion(UNet(theirs))), folder/"theirs.ckpt")


FILES = "out", "report", "labels", "run", "data"


def test_one_json_object_and_nothing_else(here, material, capfd):
    words, known = documented(), {}
    assert LINES.keys() == COMMANDS.keys() == words.keys()
    words["sweep"] |= words["rotate"]
    for name, line in LINES.items():
        status = 1 if name == "ingest" else 0  # one of its files is cut short
        assert main([*line.split(), "--json"]) == status, capfd.readouterr().err
        said = known[name] = json.loads(capfd.readouterr().out, parse_constant=pytest.fail)  # no NaN
        assert said.pop("command") == name and said.keys() <= words[name], said.keys() - words[name]
        assert all((here/said[key]).exists() for key in FILES if key in said)
    ingest, rotate, train, demo = (known[name] for name in ("ingest", "rotate", "train", "demo"))
    assert (ingest["series"], ingest["accepted"], ingest["refused"]) == (2, 1, dict(UNREADABLE=1))
    assert (known["pairs"]["made"], known["pairs"]["drrs"]) == (1, 3)
    assert (rotate["z"], rotate["size"], rotate["spacing"]) == (3, [96, 80], [0.5, 0.5])
    assert (train["step"], train["end"], train["best"]["step"]) == (1, "steps", 1)
    (group,) = known["evaluate"]["groups"].values()
    assert {row["axis"] for row in group["headline"]} >= {"x", "y", "z"}
    rows = demo["rows"]
    assert [row["axis"] for row in rows] == [*"xyz"]*3 and rows[0]["psnr"] > 10 and rows[-1]["psnr"] is None


# ---- what is in a file -----------------------------------------------------------------------------------------------

def test_one_of_several_pictures(here, capfd, tmp_path, refuse):
    pages = [Image.open("hip.png"), Image.open("hip.png").transpose(Image.Transpose.FLIP_TOP_BOTTOM)]
    pages[0].save(tmp_path/"two.tif", save_all=True, append_images=pages[1:])
    refuse("WHICH_FRAME --frame", "rotate", tmp_path/"two.tif", "-o", tmp_path/"one.png", *WEIGHTS)
    for frame in (1, 2):
        accept(capfd, "rotate", tmp_path/"two.tif", "-o", tmp_path/f"{frame}.png", "--frame", frame, *WEIGHTS)
    first, second = (np.asarray(Image.open(tmp_path/f"{frame}.png"), float) for frame in (1, 2))
    assert np.abs(first - second).mean() > 100


def test_patient_data_comes_along_only_by_name(here, capfd, tmp_path, refuse):
    seen = tmp_path/"seen.dcm"
    seen.write_bytes(dicom(BodyPartExamined="PELVIS"))
    secret = str(pydicom.dcmread(seen).PatientName)
    accept(capfd, "rotate", seen, "-o", tmp_path/"none.dcm", *WEIGHTS)
    keep = "--keep", "PatientID", "--keep", "BodyPartExamined"
    accept(capfd, "rotate", seen, "-o", tmp_path/"kept.dcm", *keep, *WEIGHTS)
    none, kept = (pydicom.dcmread(tmp_path/f"{name}.dcm") for name in ("none", "kept"))
    assert "4711" not in str(none) and secret not in str(kept)
    assert (kept.PatientID, kept.BodyPartExamined) == ("ID4711", "PELVIS")
    refuse("NOT_PATIENT_DATA PixelData", "rotate", seen, "-o", tmp_path/"no.dcm", "--keep", "PixelData", *WEIGHTS)
    refuse("NOT_DICOM .dcm", "rotate", seen, "-o", tmp_path/"no.png", "--keep", "PatientID", *WEIGHTS)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("no.")]


# ---- the doctor ------------------------------------------------------------------------------------------------------

def test_the_doctor_says_what_is_missing_and_nothing_about_the_user(capfd, monkeypatch, tmp_path):
    def not_found(package): raise ModuleNotFoundError(package)
    home = Path(torch.__file__).parents[3]
    monkeypatch.setattr(Path, "home", lambda: home)  # as if all were installed in somebody's home
    assert main(["doctor"]) == 0
    text = capfd.readouterr().out
    assert "turn of a drawn pelvis" in text
    assert f"torch {torch.__version__.split('+')[0]}" in text and "weights tiny" in text
    assert str(home) not in text and str(Path.cwd()) not in text
    monkeypatch.setattr("radrotator.rotate.video.has_encoder", lambda: False)
    monkeypatch.setattr("importlib.metadata.version", not_found)
    assert main(["doctor", "--json"]) == 0  # none of this is needed to rotate
    checks = json.loads(capfd.readouterr().out)["checks"]
    missing = {check["name"]: check for check in checks if check["found"] is None}
    assert {"video (H.264)", "spectra of a real beam"} <= missing.keys()
    assert all(check["without"] and check["remedy"] for check in missing.values())


def test_the_doctor_finds_damaged_weights(capfd, monkeypatch, tmp_path):
    for module in ("importlib.resources", "radrotator.pretrained"):
        monkeypatch.setattr(f"{module}.files", lambda package: tmp_path)
    (tmp_path/"weights").mkdir()
    (tmp_path/"weights"/"tiny.safetensors").write_text("damaged")
    assert main(["doctor"]) == 1
    text = capfd.readouterr().out
    assert text.count("NEEDED  ") == 2 and ".safetensors" in text and "make demo" in text
    assert str(tmp_path) not in text


# ---- terminals, pipes and Ctrl-C -------------------------------------------------------------------------------------

@contextlib.contextmanager
def at_a_terminal(*words, **options):
    "A command whose error stream is a terminal, and a function that tells what has been seen there"
    ours, theirs = pty.openpty()
    seen = []
    def read():
        with contextlib.suppress(OSError):  # Linux: an end that is closed
            while data := os.read(ours, 65536): seen.append(data.decode(errors="replace"))
    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    options |= dict(preexec_fn=functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL), start_new_session=True)
    command = [*PROGRAM, *map(str, words)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=theirs, text=True, **options) as process:
        os.close(theirs)
        yield process, lambda: "".join(seen)
        if process.poll() is None: process.kill()
    reader.join(60)
    os.close(ours)


def interrupt(process, condition):
    "Ctrl-C as soon as something is so; what was printed"
    wait_until(lambda: condition() or process.poll() is not None, 300)
    os.killpg(process.pid, signal.SIGINT)
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 130
    return out


def without_colours(text): return re.sub(r"\x1b\[[\d;?]*\w", "", text)


def test_a_bar_on_a_terminal_and_only_there(here):
    with at_a_terminal("rotate", "hip.png", "-o", "bar.png", "--steps", 4, *DRAWING) as (process, seen):
        out, _ = process.communicate(timeout=300)
    assert process.returncode == 0 and "bar.png" in out and out.count("\n") == 1 and "\x1b" not in out
    assert "4/4" in seen() and "\x1b" in seen()


def names(folder): return {path.name for path in folder.iterdir()}


def test_ctrl_c(here, tmp_path, monkeypatch):
    given = {"hip.png", "drawing.safetensors"}
    for name in given: (tmp_path/name).write_bytes((here/name).read_bytes())
    monkeypatch.chdir(tmp_path)
    words = ["sweep", "hip.png", "-o", "long.gif", "--frames", "65", "--steps", "10", *DRAWING]
    with at_a_terminal(*words) as (process, seen):
        assert interrupt(process, lambda: any(tmp_path.glob(".long.gif.frames/[0-9]*.png"))) == ""
    text = without_colours(seen())
    assert "Traceback" not in text and "radrotator: " in text and "--resume" in text.splitlines()[-1]
    assert names(tmp_path) == {*given, ".long.gif.frames"}
    assert main([*words, "--resume"]) == 0 and Image.open("long.gif").n_frames == 65
    for moment in (r"loading", r"turning", r"turning.* [1-9]\d*/1000"):
        with at_a_terminal("rotate", "hip.png", "-o", "long.png", "--steps", 1000, *DRAWING) as (process, seen):
            interrupt(process, lambda: re.search(moment, without_colours(seen())))
        assert names(tmp_path) == {*given, "long.gif"} and "Traceback" not in seen()


STOPPED = """
import sys, radrotator.radiograph.read as room
from radrotator.cli import main
def import_slowly(*given): exec("raise KeyboardInterrupt")
room.read_radiograph = import_slowly
sys.exit(main(["rotate", "hip.png", "-o", "out.png"]))
"""


def test_ctrl_c_while_source_is_executed(here, tmp_path):
    "As in an import that makes dataclasses: Python's own `-m` would end by the signal then, and not with a status"
    (tmp_path/"stopped.py").write_text(STOPPED)
    paths = dict(PYTHONPATH=os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    command = [sys.executable, "-m", "stopped"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=os.environ | paths)
    assert (done.returncode, done.stderr.count("\n")) == (130, 1) and not (here/"out.png").exists()


def test_ctrl_c_while_processes_begin(here, tmp_path):
    "A child that is still importing must not tell of it, either"
    def have_begun():
        children = psutil.Process(process.pid).children()
        return sum("spawn_main" in " ".join(child.cmdline()) for child in children) == 2
    words = "ingest", *[here/"body.nii.gz"]*2, here, "-o", tmp_path/"cts", "--workers", 2
    with at_a_terminal(*words) as (process, seen): interrupt(process, have_begun)
    assert "Traceback" not in seen() and seen().count("radrotator: ") == 1 and not list(tmp_path.glob("cts/*.nii.gz"))


@pytest.mark.parametrize("words", [["--version"], ["--help"], ["doctor"]], ids=" ".join)
def test_nobody_listens(words, tmp_path):
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run([*PROGRAM, *words], stdout=writing, stderr=subprocess.PIPE, text=True, timeout=300)
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, "")


FAULT = """
import sys, radrotator.radiograph.read as room
from radrotator.cli import main
room.read_radiograph = None
sys.exit(main(["rotate", "hip.png", "-o", "out.png"]))
"""


def test_a_fault_of_the_program_has_status_1(here):
    done = subprocess.run([sys.executable, "-c", FAULT], capture_output=True, text=True, timeout=300)
    assert done.returncode == 1 and "TypeError" in done.stderr and not (here/"out.png").exists()


# ---- completion ------------------------------------------------------------------------------------------------------

BASH = """
eval "$(radrotator --show-completion)"
tab() {
    COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMPREPLY=()
    _radrotator_completion radrotator
    echo "${COMPREPLY[*]}"
}
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
    path = dict(PATH=f"{tmp_path}:{os.environ['PATH']}")
    command = ["bash", "--norc", "-c", BASH]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=os.environ | path)
    *lines, files, how = done.stdout.splitlines()
    presets = ["tiny", "small", "paper-tiny", "paper"]
    expected = [["sweep"], ["--no-mark"], ["x", "y", "z"], ["ddim", "ddpm"], ["cuda"], presets]
    assert [line.split() for line in lines] == expected, done.stderr
    assert files == "" and "-o default" in how  # bash itself completes files, where we have nothing to offer


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_completion_by_protocol(shell):
    asked = {"_RADROTATOR_COMPLETE": f"complete_{shell}", "_TYPER_COMPLETE_ARGS": "radrotator ev"}
    asked["_TYPER_COMPLETE_FISH_ACTION"] = "get-args"
    assert "evaluate" in run_alone(env=os.environ | asked).stdout


def offered(name, option):
    "What the Tab key offers for an option of a command"
    command = COMMANDS[name]
    parameter = next(p for p in command.params if option in p.opts)
    context = command.make_context(name, [], resilient_parsing=True)
    return [item.value for item in parameter.shell_complete(context, "")]


def test_what_is_completed_is_what_can_be_chosen():
    from radrotator.model.sample import SOLVERS
    from radrotator.train.config import PRESETS
    assert offered("rotate", "--solver") == [*SOLVERS] and offered("train", "--preset") == [*PRESETS]
