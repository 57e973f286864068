"""The judge as a command: one process or several, whatever is not to be judged, and what a report must not say."""
import json, re, os, socket, subprocess, sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from radrotator.cli import main
from radrotator.ct import read_ct, write_ct
from radrotator.phantom import phantom
from radrotator.model.unet import UNet, UNetConfig
from radrotator.model.weights import save_weights

ROOT = Path(__file__).parents[1]
QUIET = dict(OMP_NUM_THREADS="1", NUMBA_NUM_THREADS="1", PYTHONPATH=os.environ.get("PYTHONPATH", str(ROOT)))
FEW = [word for setting in ("angles=0,12", "compound=1", "style=0", "frames=5", "seeds=2", "fine=0") for word in ("--set", setting)]


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights")/"w.safetensors"
    save_weights(UNet(replace(UNetConfig.tiny(), size=32, channels=8, groups=4)), path, {})
    return path


@pytest.fixture(scope="module")
def cts(tmp_path_factory):
    "Two patients whose files, and their folder, have telling names"
    folder = tmp_path_factory.mktemp("Patient_Mustermann")
    for i, name in enumerate(("Mustermann_Erika_1950", "Doe_John_1948")): write_ct(replace(phantom(2**31 + i, spacing=6.0), labels=None), folder/f"{name}.nii.gz")
    return folder


def refused(capsys, out, *words):
    "What the command says as it refuses, in one sentence"
    assert main(["evaluate", "-o", str(out), "--device", "cpu", *map(str, words)]) == 2
    said = capsys.readouterr()
    assert said.err and "Traceback" not in said.err and said.err.splitlines()[-1].startswith("radrotator: ")
    assert not [path for path in out.parent.iterdir() if path.name.startswith((f".{out.name}", out.name))]   # nothing half-written
    return said.err


def test_two_processes_find_what_one_finds(weights, cts, tmp_path):
    with socket.socket() as free:
        free.bind(("", 0)); port = str(free.getsockname()[1])
    words = lambda out: [sys.executable, "-m", "radrotator.cli", "evaluate", "-o", str(tmp_path/out), "--cts", str(cts), "--phantoms", "1", "--weights", str(weights), "--device", "cpu", *FEW]
    together = dict(WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    running = [subprocess.Popen(words("two"), env=os.environ | QUIET | together | dict(RANK=str(i), LOCAL_RANK=str(i)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for i in range(2)]
    running.append(subprocess.Popen(words("one"), env=os.environ | QUIET, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
    said = [process.communicate() for process in running]
    assert [process.returncode for process in running] == [0]*3, said
    one, two = (json.loads((tmp_path/name/"report.json").read_text()) for name in ("one", "two"))
    assert one["groups"] == two["groups"] and (one["about"]["processes"], two["about"]["processes"]) == (1, 2)
    assert {row["method"] for row in one["groups"]["phantoms"]["rows"]} == {"model", "10 steps", "no-op", "best affine (oracle)", "true slabs (oracle)", "true view"}
    real = [group for group in one["groups"] if group.startswith("real CT, ")]
    assert list(one["groups"]) == [*real, "phantoms"] and sorted(patient for group in real for patient in one["groups"][group]["patients"]) == ["CT 1", "CT 2"]
    page = (tmp_path/"one"/"report.html").read_text()
    assert not any(name in text for text in (said[2][1], page, json.dumps(one)) for name in ("Mustermann", "Doe_John"))
    assert str(tmp_path.parent) not in page + json.dumps(one)    # nor where things lie on this machine


def test_only_the_test_fold_of_a_folder_is_judged(weights, cts, capsys):
    from radrotator.evaluate import ct_patients, whole_ct
    table = cts/"folds.csv"
    table.write_text("name,patient,fold\nMustermann_Erika_1950,a,1\nDoe_John_1948,b,7\n")
    try:
        patient, = ct_patients(cts)
        assert np.array_equal(patient.make().hu, whole_ct(cts/"Doe_John_1948.nii.gz").hu)
        table.write_text("name,patient,fold\nMustermann_Erika_1950,a,1\nDoe_John_1948,b,2\n")
        assert "no CT into fold 7" in refused(capsys, cts.parent/"none", "--cts", cts, "--weights", weights)
    finally: table.unlink()


def test_whatever_cannot_be_judged_is_refused(weights, cts, tmp_path, capsys):
    (tmp_path/"there").mkdir(); (tmp_path/"empty").mkdir()
    (tmp_path/"text.npz").write_text("no surfaces")
    case = lambda *words: refused(capsys, tmp_path/"report", *words)
    assert "nobody to judge" in case("--weights", weights)
    assert "no weights file" in case("--weights", tmp_path/"none.safetensors", "--phantoms", 1)
    assert "holds no NIfTI file" in case("--weights", weights, "--cts", tmp_path/"empty")
    assert "text.npz" in case("--weights", weights, "--bones", tmp_path/"text.npz")
    assert "no setting 'angle'" in case("--weights", weights, "--phantoms", 1, "--set", "angle=3")
    assert "cannot be 'many'" in case("--weights", weights, "--phantoms", 1, "--set", "seeds=many")
    assert "angles = (3, 30)" in case("--weights", weights, "--phantoms", 1, "--set", "angles=3,30")
    assert "seeds = -1" in case("--weights", weights, "--phantoms", 1, "--set", "seeds=-1")
    assert main(["evaluate", "-o", str(tmp_path/"there"), "--phantoms", "1", "--weights", str(weights)]) == 2
    assert "exists already" in capsys.readouterr().err and not list((tmp_path/"there").iterdir())


def test_a_volume_too_short_to_be_judged_is_left_out_by_name(weights, tmp_path, capsys):
    cts = tmp_path/"cts"; cts.mkdir()
    whole = replace(phantom(2**31, spacing=6.0), labels=None)
    write_ct(replace(whole, hu=whole.hu[:, :, :12]), cts/"a.nii.gz")
    words = "--cts", cts, "--weights", weights
    assert "nobody could be judged" in refused(capsys, tmp_path/"report", *words)
    write_ct(whole, cts/"b.nii.gz")
    assert main(["evaluate", "-o", str(tmp_path/"report"), "--device", "cpu", *map(str, words), *FEW]) == 0
    assert "CT 1 is left out" in capsys.readouterr().err
    known = json.loads((tmp_path/"report"/"report.json").read_text())
    (figures,), (left_out,) = known["groups"].values(), known["about"]["left_out"]
    assert figures["patients"] == ["CT 2"] and re.fullmatch("real CT, (soft tissue|bone only), CT 1", left_out)
    assert left_out in (tmp_path/"report"/"report.html").read_text()


def test_real_bodies_and_bones_stand_apart_and_a_broken_file_is_left_out(weights, tmp_path, capsys):
    cts = tmp_path/"cts"; cts.mkdir()
    for name, soft in (("a", True), ("b", False)): write_ct(replace(phantom(2**31, spacing=6.0, soft=soft), labels=None), cts/f"{name}.nii.gz")
    (cts/"c.nii.gz").write_bytes((cts/"a.nii.gz").read_bytes()[:5000])
    assert main(["evaluate", "-o", str(tmp_path/"report"), "--device", "cpu", "--cts", str(cts), "--weights", str(weights), *FEW]) == 0
    assert "CT 3 is left out" in capsys.readouterr().err
    known = json.loads((tmp_path/"report"/"report.json").read_text())
    assert {group: figures["patients"] for group, figures in known["groups"].items()} == {"real CT, soft tissue": ["CT 1"], "real CT, bone only": ["CT 2"]}
    assert known["about"]["left_out"] == ["real CT, CT 3"]


def test_a_table_is_masked_and_bones_are_left_alone(tmp_path):
    from radrotator.evaluate import whole_ct
    whole, bones = (phantom(2**31, spacing=4.0, soft=soft) for soft in (True, False))
    hu = np.pad(whole.hu, ((0, 0), (10, 0), (0, 0)), constant_values=-1000.0)
    hu[10:-10, 2:5, :] = 80
    affine = whole.affine.copy(); affine[:3, 3] -= affine[:3, :3] @ [0, 10, 0]
    write_ct(replace(whole, hu=hu, affine=affine, labels=None), tmp_path/"lying.nii.gz")
    write_ct(replace(bones, labels=None), tmp_path/"bones.nii.gz")
    lying, lain = whole_ct(tmp_path/"lying.nii.gz"), read_ct(tmp_path/"lying.nii.gz").resample(2.0)
    assert lain.hu[:, :12].max() > 0 and lying.hu[:, :12].max() == -1000                    # the table
    assert (lying.hu != lain.hu)[:, 24:][lain.hu[:, 24:] > -300].mean() < 1e-3              # and nobody on it
    assert np.array_equal(whole_ct(tmp_path/"bones.nii.gz").hu, read_ct(tmp_path/"bones.nii.gz").resample(2.0).hu)


@pytest.mark.parametrize("soft", (True, False))
def test_weights_that_lift_stand_between_no_network_and_perfect_depth(soft):
    from radrotator.evaluate import (AFFINE, CENTRE, ORACLE, PLAIN, POPULATION, UNKNOWN, Patient, Questions, fine_table,
                                     headline, judge_page, judge_patient, summary)
    from radrotator.rotate.rotator import RadRotator
    model = RadRotator.from_pretrained(device="cpu")
    patient = Patient("phantoms", "phantom", lambda: phantom(2**31 + 7, spacing=3.0, soft=soft))
    found = judge_patient(model, patient, Questions(angles=(0, 12), compound=1, frames=0, fine=96))
    lines = summary(found.rows)
    inside = {line["method"]: line["inside"] for line in lines if (line["axis"], line["bin"]) == ("z", "10–15")}
    assert set(inside) == {"model", "mean", "no-op", AFFINE, ORACLE, POPULATION, "true view"}
    assert inside["no-op"] == 0 and inside["true view"] == 1 and inside[ORACLE] > 0.95
    assert inside[ORACLE] > inside["mean"] > inside[POPULATION], inside
    error = {line["axis"]: line["error"] for line in lines if (line["method"], line["bin"]) == ("true view", "10–15")}
    assert max(error[axis] for axis in ("x", "y", "z", "compound", "composed")) < 0.5       # about the same centre
    assert found.depth["detail, error"] < 2*found.depth["detail, spread of the truth"] and found.depth["field"] == 300
    assert [row["style"] for row in found.styles[::12]][:2] == [PLAIN, UNKNOWN] and len(fine_table(found.fine)) == 2
    page = judge_page([found], {"phantoms": lines}, dict(weights="tiny"))
    assert CENTRE in page and "perfect depths" in page and "Here the depth of tissue" in page
    assert {"inside", "inside, mean", f"inside, {ORACLE}", f"inside, {POPULATION}"} <= headline(lines)[1].keys()


def test_black_is_not_taken_away_and_brighter_views_are_not_cut():
    from radrotator.drr import Renderer, recentre
    from radrotator.evaluate import SCALE, true_views
    from radrotator.geometry import CArm
    carm = CArm(size=48, fov=150)                                                            # nowhere air
    ct = recentre(phantom(2**31 + 7, spacing=4.0), carm)
    views = true_views(ct, [[12, 0, 0], [-12, 0, 0], [0, 0, 12]], "phantom", carm)
    raw = Renderer(ct)(np.zeros((1, 3)), carm, 2)[0].numpy()
    assert np.allclose(views[0].input, raw*SCALE/raw.max(), atol=1e-3) and views[0].input.min() > 0.01
    assert max(view.truth.max() for view in views) < 1
