"""The command as it is typed: what it writes, and that a mistake costs one line, exit status 2, and nothing on disk."""
import errno, json, os, subprocess, sys
from dataclasses import replace

import numpy as np
import pydicom
import pytest
import torch
from PIL import Image

from radrotator.cli import PICTURES, TITLE, main
from radrotator.ct import CT, write_ct
from radrotator.evaluate import UNSEEN
from radrotator.radiograph import Radiograph
from radrotator.unet import UNet, UNetConfig, load_weights, save_weights

WEIGHTS = "--weights", "untrained.safetensors"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "One folder with good files and bad ones, made once"
    folder = tmp_path_factory.mktemp("made")
    torch.manual_seed(0)
    save_weights(UNet(replace(UNetConfig.tiny(), size=32)), folder/"untrained.safetensors", {})
    row, column = np.mgrid[-1:1:96j, -1:1:80j]
    body = 0.4*(row**2 + column**2 < 0.9) + 0.5*((row - 0.2)**2 + (abs(column) - 0.4)**2 < 0.04)
    radiograph = Radiograph(body/body.max(), (0.5, 0.5))
    radiograph.write(folder/"hip.png")
    radiograph.write(folder/"hip.dcm")
    z, y, x = np.mgrid[-1:1:60j, -1:1:40j, -1:1:50j]
    hu = np.where(x**2 + y**2 < 0.8, 40.0, -1000.0) + 900*((abs(x) - 0.5)**2 + y**2 + (z/2)**2 < 0.05)
    write_ct(CT(hu.transpose(2, 1, 0).astype(np.float32), np.diag([8.0, 6, 8, 1])), folder/"body.nii.gz")
    write_ct(CT(hu.transpose(2, 1, 0)[:, :, 20:40].astype(np.float32), np.diag([8.0, 6, 8, 1])), folder/"slab.nii.gz")
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
           "series/slice.dcm": "whole series", "other": "no DICOM file", "slab.nii.gz": "slab.nii.gz: the CT is 160 mm tall"}
BAD_ANGLES = {"16": "outside", "-15.5": "outside", "nan": "not a number", "inf": "not a number", "ten": "Invalid value", "": "Invalid value"}
BAD_OUTPUTS = {"nowhere/out.png": "does not exist", "hip.png": "exists already", "out.bmp": "end it in", "out": "end it in", "other": "end it in", "letter.dcm/out.png": "does not exist"}


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
    ("rotate hip.png -o out.png --device quantum", "choose auto, cpu or cuda"),
    ("rotate hip.png -o out.png --steps 0", "--steps"),
    ("rotate hip.png -o out.png --guidance nan", "--guidance"),
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
    ("rotate hip.png -o out.png --weights untrained.safetensors --solver magic", "choose one of ddim"),
    ("convert hip.png -o out.safetensors", "hip.png"),
    ("convert gone.ckpt -o out.safetensors", "gone.ckpt"),
    ("convert untrained.safetensors -o out.safetensors", "untrained.safetensors"),
    ("convert untrained.safetensors -o out.png", ".safetensors"),
    ("train --preset huge -o run", "choose tiny or small or paper"),
    ("train -o run", "one source of pairs, and none was given"),
    ("train -o run --resume", "there is no run in run to go on with"),
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
    monkeypatch.setattr("radrotator.radiograph.read_radiograph", lambda path: 1/0)
    with pytest.raises(ZeroDivisionError): main(["rotate", "hip.png", "-o", "out.png", *WEIGHTS])


@pytest.mark.parametrize("number, file", [(errno.ENOSPC, None), (errno.EACCES, "out.png"), (errno.EROFS, "out.png"), (errno.ENAMETOOLONG, "out.png")])
def test_a_disk_that_refuses(number, file, here, capfd, monkeypatch):
    def fail(path): raise OSError(number, "it will not do", file)
    monkeypatch.setattr("radrotator.radiograph.read_radiograph", fail)
    said(refuse(here, capfd, "rotate", "hip.png", "-o", "out.png", *WEIGHTS), f"{file or 'the disk'}: it will not do")
    number = errno.EIO
    with pytest.raises(OSError): main(["rotate", "hip.png", "-o", "out.png", *WEIGHTS])


def test_a_folder_that_is_closed(here, capfd, monkeypatch):
    monkeypatch.setattr("os.access", lambda path, mode, allowed=os.access: mode != os.W_OK and allowed(path, mode))
    said(refuse(here, capfd, "drr", "body.nii.gz", "-o", "out.png"), "may not write in the folder")


def test_in_a_process_of_its_own(here):
    run = lambda *words: subprocess.run([sys.executable, "-m", "radrotator.cli", *words], capture_output=True, text=True, timeout=300)
    help = run("--help")
    assert help.returncode == 0 and all(c in help.stdout for c in ("rotate", "drr", "phantom", "train", "demo"))
    bad = run("rotate", "letter.dcm", "-o", "out.png")
    assert (bad.returncode, bad.stdout, bad.stderr.count("\n")) == (2, "", 1) and not (here/"out.png").exists()
    good = run("rotate", "hip.dcm", "-o", "alone.png", "--z", "-5", *WEIGHTS)
    assert (good.returncode, good.stderr) == (0, "") and Image.open(here/"alone.png").size == (80, 96)


def test_help_does_not_wait_for_pytorch():
    heavy = "import sys; from radrotator.cli import main; main(['rotate', '--help']); sys.exit(any(m in sys.modules for m in ('torch', 'numba', 'scipy', 'pydicom')))"
    assert subprocess.run([sys.executable, "-c", heavy], capture_output=True, timeout=300).returncode == 0


@pytest.mark.parametrize("suffix", PICTURES)
def test_rotate_writes_every_kind(suffix, here, capfd):
    name = f"kind{suffix}"
    line = accept(capfd, "rotate", "hip.dcm", "-o", name, "--x", "-3", "--y", "5.5", *WEIGHTS)
    assert name in line and "y = 5.5°" in line and line.endswith(" s")
    assert Radiograph.read(name).shape == (96, 80)


def test_dicom_says_what_was_done(here, capfd):
    accept(capfd, "rotate", "hip.dcm", "-o", "said.dcm", "--x", "-3", "--steps", "2", "--guidance", "1.5", "--seed", "7", *WEIGHTS)
    ds = pydicom.dcmread("said.dcm")
    for word in ("x = -3°", "Rz·Ry·Rx", "untrained.safetensors", "steps 2", "guidance 1.5", "seed 7"): assert word in ds.DerivationDescription
    assert ds.SyntheticData == "YES" and list(ds.PixelSpacing) == [0.5, 0.5]


def test_same_seed_same_file(here, capfd):
    for i, seed in enumerate((1, 1, 2)): accept(capfd, "rotate", "hip.png", "-o", f"seed{i}.png", "--z", "9", "--seed", seed, *WEIGHTS)
    a, b, c = (np.asarray(Image.open(f"seed{i}.png")) for i in range(3))
    assert np.array_equal(a, b) and a.shape == c.shape


def test_phantom_drr_rotate(here, capfd):
    line = accept(capfd, "phantom", "-o", "p.nii.gz", "--seed", "1", "--spacing", "6")
    assert "p.nii.gz" in line and (here/"p_labels.nii.gz").exists()
    accept(capfd, "drr", "p.nii.gz", "-o", "p0.png", "--size", "64")
    accept(capfd, "drr", "p.nii.gz", "-o", "py.png", "--size", "64", "--y", "10")
    accept(capfd, "rotate", "p0.png", "-o", "pr.png", "--y", "10", *WEIGHTS)
    before, truth, view = (Radiograph.read(n).pixels for n in ("p0.png", "py.png", "pr.png"))
    assert before.shape == truth.shape == view.shape == (64, 64)
    assert np.mean((view - truth)**2) < 0.6*np.mean((before - truth)**2)  # about the beam's axis geometry is nearly all


def test_drr_of_one_ct_has_one_scale(here, capfd):
    lines = [accept(capfd, "drr", "body.nii.gz", "-o", f"scale{z}.dcm", "--size", "32", "--z", z) for z in (0, 15)]
    assert len({line.split("field of view")[1] for line in lines}) == 1
    assert len({tuple(pydicom.dcmread(f"scale{z}.dcm").PixelSpacing) for z in (0, 15)}) == 1


SMALL = "--set unet.size=32 --set unet.channels=8 --set batch=8 --set validation=8 --set data.oversample=1 --workers 0 --device cpu".split()


def test_train_and_train_on(here, capfd):
    words = "train", "--phantoms", 1, "--steps", 2, "-o", here/"run", "--seed", 3, *SMALL
    assert "1 of 2 steps" in accept(capfd, *words, "--minutes", 0)
    said(refuse(here, capfd, *words), "add --resume")
    assert "2 of 2 steps" in accept(capfd, *words, "--minutes", 5, "--resume")
    assert "2 of 2 steps" in accept(capfd, "train", "-o", here/"run", "--resume", "--device", "cpu")  # what was said need not be said again, and what is done stays done
    _, about = load_weights("run/weights.safetensors")
    assert about["training"]["seed"] == about["data"]["seed"] == 3 and about["training"]["unet"]["channels"] == 8 and about["data"]["size"] == 32
    assert about["device"] == "cpu" and about["processes"] == 1 and about["torch"] == torch.__version__
    assert about["command"].startswith("radrotator train --out run --phantoms 1 ") and "--set unet.channels=8" in about["command"]
    assert str(here) not in json.dumps(about) and "commit" in about
    said(refuse(here, capfd, "train", "--phantoms", 2, "-o", "run", "--resume"), "started with phantoms = 1, not 2")
    said(refuse(here, capfd, "train", "--cts", ".", "-o", "run", "--resume"), "started with cts = None")
    said(refuse(here, capfd, "train", "--steps", 3, "-o", "run", "--resume", "--device", "cpu"), "started with steps = 2, not 3")  # the rate follows the steps
    accept(capfd, "rotate", "hip.png", "-o", "trained.png", "--x", "5", "--weights", "run/weights.safetensors")
    accept(capfd, "report", "run", "-o", "report.html")


def test_demo_twice(here, capfd, monkeypatch):
    import radrotator.phantom
    seeds, coarse = [], radrotator.phantom.phantom
    monkeypatch.setattr("radrotator.phantom.phantom", lambda seed: seeds.append(seed) or coarse(seed, spacing=8.0))
    for seed in (0, 1): accept(capfd, "demo", "-o", "demo", "--ct", "body.nii.gz", "--radiograph", "hip.dcm", "--seed", seed, *WEIGHTS)
    assert seeds == [UNSEEN, UNSEEN + 1]  # not among the seeds that training draws
    table = (here/"demo"/"table.md").read_text()
    assert table.startswith(TITLE) and "frontal pelvis phantoms only" in table
    for item in ("phantom", "chest CT", "CT body", "radiograph hip"): assert table.count(f"\n| {item} ") == 3
    names = {p.name for p in (here/"demo").iterdir()}
    assert {"phantom.png", "phantom_input.png", "phantom_x12_rotated.png", "chest_z12_true.png", "ct1_y12_difference.png", "radiograph1_x12_rotated.png", "radiograph1.png"} < names
    assert "radiograph1_x12_true.png" not in names and not [p for p in here.iterdir() if p.name.startswith(".")]
    assert Image.open(here/"demo"/"radiograph1_x12_rotated.png").size == (80, 96)
    made = lambda name: Image.open(here/"demo"/name).text["Description"]
    assert "as given" in made("radiograph1_input.png") and "DRR" in made("ct1_input.png") and "synthetic" in made("ct1_x12_rotated.png")
    (here/"demo"/"notes.txt").write_text("mine")
    said(refuse(here, capfd, "demo", "-o", "demo", *WEIGHTS), "no demo wrote")
