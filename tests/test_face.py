"""What a user types first."""
import copy, pickle, subprocess, sys, warnings
from pathlib import Path

import numpy as np
import pydicom
import pytest
from PIL import Image

from radrotator import RadRotator, Radiograph
from radrotator.core import RadRotatorError, error_code


def test_five_names_and_nothing_heavy_before_they_are_asked_for():
    code = ("import sys, radrotator; early = {'torch', 'numpy'} & set(sys.modules);"
            "from radrotator import RadRotator, Radiograph, CT, read_radiograph, read_ct;"
            "sys.exit(0 if not early and callable(Radiograph.write) and 'RadRotator' in dir(radrotator) else 1)")
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize("room", ["image", "read", "write"])
def test_a_radiograph_reads_and_writes_wherever_it_was_taken_from(room):
    code = f"from radrotator.radiograph.{room} import Radiograph; Radiograph.write, Radiograph.read"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_other_names_are_no_attributes():
    import radrotator
    with pytest.raises(AttributeError, match="Nobody"): radrotator.Nobody


# What people try first in Python

@pytest.fixture(scope="module")
def model():
    "Weights by their name"
    return RadRotator.from_pretrained("tiny", "cpu")


@pytest.fixture(scope="module")
def pelvis():
    "A radiograph, (256, 256)"
    from radrotator import read_radiograph
    return read_radiograph(Path(__file__).resolve().parents[1]/"nbs"/"images"/"pelvis.png")


def test_a_file_is_overwritten_only_if_that_is_asked_for(pelvis, tmp_path):
    path = pelvis.write(tmp_path/"hip.png")
    before = path.read_bytes()
    assert error_code(lambda: pelvis.write(path, mark=True)) == "EXISTS" and path.read_bytes() == before
    pelvis.write(path, mark=True, overwrite=True)
    assert path.read_bytes() != before and [one.name for one in tmp_path.iterdir()] == ["hip.png"]


def test_a_view_is_an_array_and_only_its_files_are_marked(model, pelvis, tmp_path):
    view = model.rotate(pelvis, z=5)
    assert np.array_equal(np.asarray(view), view.pixels) and np.asarray(view, np.float64).dtype == np.float64
    for suffix in ("png", "tif", "jpg", "dcm"):
        bare, marked = (view.write(tmp_path/f"{mark}.{suffix}", mark=mark) for mark in (False, None))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")                               # a marked DICOM is read with a warning
            apart = np.abs(Radiograph.read(bare).pixels - Radiograph.read(marked).pixels) > 0.1
        rows, columns = np.nonzero(apart)
        assert 0 < apart.mean() < 0.02 and np.ptp(rows) < 40 and np.ptp(columns) < 100, suffix
    assert [pydicom.dcmread(tmp_path/f"{name}.dcm").BurnedInAnnotation for name in ("False", "None")] == ["NO", "YES"]
    pelvis.write(tmp_path/"input.png")
    assert np.array_equal(Radiograph.read(tmp_path/"input.png").pixels, pelvis.pixels)


def test_whatever_holds_a_picture_is_turned(model, pelvis):
    import torch
    expected = model.rotate(pelvis, z=5).pixels
    bytes_ = np.rint(pelvis.pixels*255).astype(np.uint8)
    words = np.rint(pelvis.pixels*65535).astype(np.uint16)
    for given in (pelvis.pixels, torch.from_numpy(pelvis.pixels)[None, None], bytes_, words, Image.fromarray(bytes_),
                  Image.fromarray(bytes_).convert("RGB"), np.repeat(bytes_[..., None], 3, -1)):
        assert np.abs(model.rotate(given, z=5).pixels - expected).mean() < 0.005


@pytest.mark.parametrize("given, words", [
    (np.zeros((4, 4, 3)) + [0, 0.5, 1], "colours"), (np.zeros((2, 1, 9, 9)), "2×1×9×9"), (np.full((9, 9), 4000, np.uint16), "4000"),
    (np.full((9, 9), 7, np.int16), "int16"), (np.full((9, 9), -3.0), "-3"), (np.full((9, 9), np.nan), "finite"), (np.zeros(9), "dimension")])
def test_the_condition_that_failed_is_named(given, words, model):
    with pytest.raises(RadRotatorError) as error: model.rotate(given, z=5)
    assert error.value.code == "BAD_PIXELS" and words in str(error.value)


def test_many_at_once(model, pelvis, tmp_path):
    path = pelvis.write(tmp_path/"hip.png")
    views = model.rotate([pelvis, path, str(path), pelvis.pixels], z=5)
    assert len(views) == 4 and model.rotate([]) == []
    assert all(np.abs(view.pixels - views[0].pixels).mean() < 1e-3 for view in views)
    with pytest.raises(RadRotatorError) as error: model.rotate([path, tmp_path/"gone.png"], z=5)
    assert error.value.code == "NO_FILE" and "picture 2 of 2" in str(error.value)


def test_a_wrong_name_is_answered_with_the_right_one(model, pelvis):
    with pytest.raises(AttributeError, match=r"\.write\("): pelvis.save("hip.png")
    with pytest.raises(TypeError, match=r"\.rotate\("): model(pelvis)
    assert not hasattr(pelvis, "magic") and copy.deepcopy(pelvis).shape == pickle.loads(pickle.dumps(pelvis)).shape


def test_each_says_in_one_line_what_it_is(model, pelvis):
    from radrotator import CT
    lines = [repr(one) for one in (model, pelvis, model.rotate(pelvis, z=1), CT(np.zeros((3, 4, 5), np.float32), np.eye(4)))]
    starts = ["<RadRotator: lifts", "<Radiograph: 256×256", "<View: 256×256", "<CT ct: 3×4×5 voxels"]
    assert all(line.startswith(start) and "\n" not in line and len(line) < 300 for line, start in zip(lines, starts)), lines


def test_weights_by_name_and_by_file(model):
    from radrotator.pretrained import find_weights
    for given in ("tiny", find_weights("tiny"), str(find_weights())):
        assert RadRotator.from_file(given, "cpu").fingerprint() == RadRotator.from_pretrained(given, "cpu").fingerprint() == model.fingerprint()
    assert error_code(lambda: RadRotator.from_pretrained("enormous")) == "NO_PRETRAINED"
    assert error_code(lambda: RadRotator.from_file("gone.safetensors")) == "NO_WEIGHTS"
