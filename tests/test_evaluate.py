"""The judge as a command: one process or several, whatever is not to be judged, and what a report must not say."""
import json, os, re, subprocess, sys
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from processes import QUIET, noting, ranks, serving
from radrotator.app import console
from radrotator.cli import main
from radrotator.ct.nifti import write_ct
from radrotator.ct.read import read_ct
from radrotator.model.unet import UNet, UNetConfig
from radrotator.model.weights import save_weights
from radrotator.phantom.phantom import phantom

FEW = "--set angles=0,12 --set compound=1 --set style=0 --set frames=5 --set seeds=2 --set fine=0".split()
NAMES = "Mustermann_Erika_1950", "Doe_John_1948"


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights")/"w.safetensors"
    save_weights(UNet(replace(UNetConfig.tiny(), size=32, channels=8, groups=4)), path, {})
    return path


def make_ct(path, seed=2**31, soft=True, slices=None):
    "A phantom's CT as a file, perhaps of its lowest slices alone"
    ct = phantom(seed, spacing=6.0, soft=soft)
    write_ct(replace(ct, hu=ct.hu[:, :, :slices], labels=None), path)


@pytest.fixture(scope="module")
def cts(tmp_path_factory):
    "Two patients whose files, and their folder, have telling names"
    folder = tmp_path_factory.mktemp("Patient_Mustermann")
    for i, name in enumerate(NAMES): make_ct(folder/f"{name}.nii.gz", 2**31 + i)
    return folder


def evaluate(out, *words):
    "Exit status of the command"
    return main(["evaluate", "-o", str(out), "--device", "cpu", *map(str, words)])


def read_report(folder): return json.loads((folder/"report.json").read_text())


@pytest.fixture
def refuse(capsys, monkeypatch):
    "A function that asks for what is refused: it costs one line that has some values in it, and writes nothing"
    names = []
    monkeypatch.setattr(console, "format_error", noting(console.format_error, names.append))
    def refuse(expected, out, *words):
        name, *values = expected.split()
        assert evaluate(out, *words) == 2
        text = capsys.readouterr().err
        assert "Traceback" not in text and text.splitlines()[-1].startswith("radrotator: ")
        assert name in ("*", names[-1]), (names, text)
        assert all(value in text for value in values), text
        assert not [path for path in out.parent.iterdir() if path.name.lstrip(".").startswith(out.name)]
    return refuse


def prepare(): main(["evaluate", "--help"])


def command(out, weights, cts):
    words = ["--cts", cts, "--phantoms", 1, "--weights", weights, "--device", "cpu", *FEW]
    return partial(main, ["evaluate", "-o", str(out), *map(str, words)])


def test_two_processes_find_what_one_finds(weights, cts, tmp_path):
    with serving(tmp_path, prepare) as server:
        running = [server.start(command(tmp_path/"two", weights, cts), env=rank) for rank in ranks(2)]
        running.append(server.start(command(tmp_path/"one", weights, cts)))
        ended = [server.end(process) for process in running]
    assert [process.status for process in ended] == [0]*3, ended
    one, two = (read_report(tmp_path/name) for name in ("one", "two"))
    assert one["groups"] == two["groups"]
    assert (one["about"]["processes"], two["about"]["processes"]) == (1, 2)
    methods = {row["method"] for row in one["groups"]["phantoms"]["rows"]}
    assert methods == {"model", "10 steps", "no-op", "best affine (oracle)", "true slabs (oracle)", "true view"}
    real = [group for group in one["groups"] if group.startswith("real CT, ")]
    patients = [patient for group in real for patient in one["groups"][group]["patients"]]
    assert list(one["groups"]) == [*real, "phantoms"] and sorted(patients) == ["CT 1", "CT 2"]
    page = (tmp_path/"one"/"report.html").read_text()
    everything = ended[2].err + page + json.dumps(one)
    assert not any(name in everything for name in ("Mustermann", "Doe_John"))
    assert str(tmp_path.parent) not in page + json.dumps(one)  # nor where things lie on this machine


def test_whatever_cannot_be_judged_is_refused(weights, tmp_path, refuse):
    for name in ("there", "empty"): (tmp_path/name).mkdir()
    (tmp_path/"text.npz").write_text("no surfaces")
    def case(expected, *words): refuse(expected, tmp_path/"report", *words)
    case("NO_PATIENTS", "--weights", weights)
    case("NO_WEIGHTS none.safetensors", "--weights", tmp_path/"none.safetensors", "--phantoms", 1)
    case("* empty", "--weights", weights, "--cts", tmp_path/"empty")
    case("NOT_AN_ATLAS text.npz", "--weights", weights, "--bones", tmp_path/"text.npz")
    wrong = {"angle=3": "* 'angle'", "seeds=many": "* 'many'", "angles=3,30": "PROTOCOL 30", "seeds=-1": "PROTOCOL -1"}
    for setting, expected in wrong.items():
        case(expected, "--weights", weights, "--phantoms", 1, "--set", setting)
    assert evaluate(tmp_path/"there", "--phantoms", 1, "--weights", weights) == 2
    assert not list((tmp_path/"there").iterdir())


def test_a_volume_too_short_to_be_judged_is_left_out_by_name(weights, tmp_path, capsys, refuse):
    cts = tmp_path/"cts"
    cts.mkdir()
    make_ct(cts/"a.nii.gz", slices=12)
    words = "--cts", cts, "--weights", weights
    refuse("NOBODY_JUDGED CT 1", tmp_path/"report", *words)
    make_ct(cts/"b.nii.gz")
    assert evaluate(tmp_path/"report", *words, *FEW) == 0
    assert "CT 1" in capsys.readouterr().err
    report = read_report(tmp_path/"report")
    (figures,), (left_out,) = report["groups"].values(), report["about"]["left_out"]
    assert figures["patients"] == ["CT 2"] and re.fullmatch("real CT, (soft tissue|bone only), CT 1", left_out)
    assert left_out in (tmp_path/"report"/"report.html").read_text()


def test_real_bodies_and_bones_stand_apart_and_a_broken_file_is_left_out(weights, tmp_path, capsys):
    cts = tmp_path/"cts"
    cts.mkdir()
    for name, soft in (("a", True), ("b", False)): make_ct(cts/f"{name}.nii.gz", soft=soft)
    (cts/"c.nii.gz").write_bytes((cts/"a.nii.gz").read_bytes()[:5000])
    assert evaluate(tmp_path/"report", "--cts", cts, "--weights", weights, *FEW) == 0
    assert "CT 3" in capsys.readouterr().err
    report = read_report(tmp_path/"report")
    patients = {group: figures["patients"] for group, figures in report["groups"].items()}
    assert patients == {"real CT, soft tissue": ["CT 1"], "real CT, bone only": ["CT 2"]}
    assert report["about"]["left_out"] == ["real CT, CT 3"]


def test_a_table_is_masked_and_bones_are_left_alone(tmp_path):
    from radrotator.evaluate.patients import read_patient_ct
    whole, bones = (phantom(2**31, spacing=4.0, soft=soft) for soft in (True, False))
    hu = np.pad(whole.hu, ((0, 0), (10, 0), (0, 0)), constant_values=-1000.0)
    hu[10:-10, 2:5, :] = 80
    affine = whole.affine.copy()
    affine[:3, 3] -= affine[:3, :3] @ [0, 10, 0]
    write_ct(replace(whole, hu=hu, affine=affine, labels=None), tmp_path/"lying.nii.gz")
    write_ct(replace(bones, labels=None), tmp_path/"bones.nii.gz")
    masked, as_read = read_patient_ct(tmp_path/"lying.nii.gz"), read_ct(tmp_path/"lying.nii.gz").resample(2.0)
    assert as_read.hu[:, :12].max() > 0 and masked.hu[:, :12].max() == -1000                    # the table
    changed = (masked.hu != as_read.hu)[:, 24:]
    assert changed[as_read.hu[:, 24:] > -300].mean() < 1e-3                                     # and nobody on it
    as_read = read_ct(tmp_path/"bones.nii.gz").resample(2.0)
    assert np.array_equal(read_patient_ct(tmp_path/"bones.nii.gz").hu, as_read.hu)


@pytest.mark.parametrize("soft", (True, False))
def test_weights_that_lift_stand_between_no_network_and_perfect_depth(soft):
    from radrotator.evaluate.baselines import AFFINE, MEAN_DEPTH, ORACLE, POPULATION
    from radrotator.evaluate.judge import judge_patient
    from radrotator.evaluate.patients import Patient
    from radrotator.evaluate.protocol import Protocol
    from radrotator.evaluate.report import CENTRE, judge_page
    from radrotator.evaluate.statistics import find_cell, summary
    from radrotator.evaluate.styles import PLAIN, UNKNOWN
    from radrotator.evaluate.tables import fine_table, headline_table
    from radrotator.rotate.rotator import RadRotator
    model = RadRotator.from_pretrained(device="cpu")
    patient = Patient("phantoms", "phantom", lambda: phantom(2**31 + 7, spacing=3.0, soft=soft))
    result = judge_patient(model, patient, Protocol(angles=(0, 12), compound=1, frames=0, fine=96))
    lines = summary(result.rows)
    inside = {line["method"]: line["inside"] for line in lines if (line["axis"], line["bin"]) == ("z", "10–15")}
    assert set(inside) == {"model", "mean", "no-op", AFFINE, ORACLE, MEAN_DEPTH, POPULATION, "true view"}
    assert inside["no-op"] == 0 and inside["true view"] == 1 and inside[ORACLE] > 0.95
    assert inside[ORACLE] > inside["mean"] > inside[POPULATION], inside
    assert inside[ORACLE] > inside[MEAN_DEPTH] > inside["mean"] - 0.01*(not soft), inside           # bone is known well
    for axis in ("x", "y", "z", "compound", "composed"):                                        # about the same centre
        assert find_cell(lines, "true view", axis, "10–15")["error"] < 0.5
    assert result.depth["detail, error"] < 2*result.depth["detail, spread of the truth"]
    assert result.depth["field"] == 300
    assert [row["style"] for row in result.styles[::12]][:2] == [PLAIN, UNKNOWN] and len(fine_table(result.fine)) == 2
    page = judge_page([result], {"phantoms": lines}, dict(weights="tiny"))
    assert CENTRE in page and "perfect depths" in page and "Here the depth of tissue" in page
    quoted = {"inside", "inside, mean", f"inside, {ORACLE}", f"inside, {POPULATION}"}
    assert quoted <= headline_table(lines)[1].keys()


def test_black_is_not_taken_away_and_brighter_views_are_not_cut():
    from radrotator.drr.centre import recentre
    from radrotator.drr.render import Renderer
    from radrotator.evaluate.views import SCALE, true_views
    from radrotator.geometry import CArm
    carm = CArm(size=48, fov=150)                                                               # nowhere air
    ct = recentre(phantom(2**31 + 7, spacing=4.0), carm)
    views = true_views(ct, [[12, 0, 0], [-12, 0, 0], [0, 0, 12]], "phantom", carm)
    raw = Renderer(ct)(np.zeros((1, 3)), carm, 2)[0].numpy()
    assert np.allclose(views[0].input, raw*SCALE/raw.max(), atol=1e-3) and views[0].input.min() > 0.01
    assert max(view.truth.max() for view in views) < 1


def test_asking_for_the_protocol_does_not_load_the_judge():
    "Sliders take the ways of sampling from it, and must open without the trainer and the renderer"
    code = "import sys, radrotator.evaluate.protocol; print(*sys.modules)"
    words = [sys.executable, "-c", code]
    loaded = subprocess.run(words, env=os.environ | QUIET, capture_output=True, text=True, check=True).stdout.split()
    cheap = "core", "angles", "geometry", "register", "register.pose", "evaluate", "evaluate.protocol"
    assert {name for name in loaded if name.startswith("radrotator.")} == {f"radrotator.{name}" for name in cheap}
