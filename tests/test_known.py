"""What a notebook is no place for: what the shipped weights take for a radiograph of their kind, on real files and in
many tones."""
import io

import numpy as np
import pytest
from PIL import Image

from radrotator.core import shared_data
from radrotator.ct.read import read_ct
from radrotator.drr.render import render
from radrotator.geometry import CArm
from radrotator.batch import unit_range
from radrotator.phantom.atlas import BoneAtlas
from radrotator.phantom.phantom import phantom
from radrotator.radiograph.image import Radiograph, to_unit
from radrotator.radiograph.read import read_radiograph
from radrotator.rotate.novelty import novelty_score, shrink_radiograph
from radrotator.rotate.rotator import RadRotator


@pytest.fixture(scope="module")
def model(): return RadRotator.from_pretrained(device="cpu")


def far(model, picture):
    "Novelty score of a picture for these weights"
    small = shrink_radiograph(Radiograph(to_unit(picture)))
    return novelty_score(small.square(64)[0], model.about["known"])


def jpeg(picture):
    Image.fromarray(np.rint(255*picture).astype(np.uint8)).save(file := io.BytesIO(), "JPEG", quality=80)
    return np.asarray(Image.open(file), np.float32)/255


STYLES = {
    "plain": lambda p: p,
    "bright": lambda p: p**0.5,
    "dark": lambda p: p**2,
    "sigmoid": lambda p: 1/(1 + np.exp(-8*(p - 0.5))),
    "jpeg": jpeg,
}


def frontals(ct, seed=0, count=5):
    "Pictures of a CT at some poses"
    poses = np.random.default_rng(seed).uniform(-15, 15, (count, 3))
    return unit_range(render(ct, poses, CArm(size=64, fov=300), oversample=2))[0]


@pytest.fixture(scope="module")
def people(): return [picture for i in range(12) for picture in frontals(phantom(2**31 + 50 + i), i)]


@pytest.mark.parametrize("style", STYLES)
def test_unseen_phantoms_are_familiar(model, people, style):
    assert np.mean([far(model, STYLES[style](picture)) > 1 for picture in people]) <= 0.05
    assert all(far(model, 1 - STYLES[style](picture)) > 1 for picture in people)


def test_patients_of_the_test_fold_and_real_pelves_are_familiar(model):
    bones, pelves = shared_data("pelvis_atlas", "pelvis_atlas.npz"), shared_data("ct_pelvis_bone")
    if not (bones and pelves): pytest.skip("no bone atlas or no CTs at hand")
    atlas = BoneAtlas.read(bones)
    rows = [int(row) for row in np.flatnonzero(atlas.folds == 7)]
    cts = [phantom(2**31 + 100*row, bones=atlas, patient=row, soft=soft) for row in rows for soft in (True, False)]
    cts += [read_ct(path).resample(2.0) for path in sorted(pelves.glob("*.nii.gz"))]
    assert np.mean([far(model, picture) > 1 for ct in cts for picture in frontals(ct)]) <= 0.1


@pytest.mark.parametrize("name", ["wg04_RG1.dcm", "wg04_RG3.dcm"])
def test_real_radiographs_of_other_anatomy_are_strange(model, name):
    "A chest and an ankle: weights that know the pelvis must say so, whatever the window and the crop."
    if not (path := shared_data("radiographs", name)): pytest.skip("no radiographs at hand")
    picture = read_radiograph(path).pixels
    assert model.unfamiliar(path) is not None
    for style in STYLES.values(): assert far(model, style(picture)) > 1
    rows, columns = (n//5 for n in picture.shape)
    assert far(model, picture[rows:-rows, columns:-columns]) > 1


def test_weights_that_say_nothing_are_silent(model):
    silent = RadRotator(model.network, {})
    assert silent.unfamiliar(np.random.default_rng(0).random((64, 64))) is None
    assert model.unfamiliar(np.random.default_rng(0).random((64, 64))) is not None
