"""Projection with gradients, where a notebook does not look: odd tensors, bad input, six degrees of freedom."""
import numpy as np
import pytest
import torch

from radrotator.core import RadRotatorError
from radrotator.drr.adjoint import back_project
from radrotator.drr.attenuation import _affine_about_isocentre, attenuation
from radrotator.drr.project import project
from radrotator.drr.render import render
from radrotator.geometry import CArm, rotation
from radrotator.phantom.phantom import phantom

CARM = CArm(size=12, fov=80)
POSES = np.array([[3.0, -5, 8], [10, 2, -70]])
SHAPE = 10, 14, 12


@pytest.fixture
def volume():
    return torch.rand(SHAPE, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def affine():
    matrix = np.diag([4.0, 3, 5, 1])
    matrix[:3, 3] = -matrix[:3, :3] @ ((np.array(SHAPE) - 1)/2)
    return matrix


def gradient(volume, affine, **more):
    leaf = volume.detach().requires_grad_()
    project(leaf, affine, POSES, CARM, **more).square().sum().backward()
    return leaf.grad


def test_tensors_that_do_not_lie_in_order(volume, affine):
    "A view of another layout, and one of double precision, have the same pictures and gradients"
    turned = volume.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    assert not turned.is_contiguous()
    assert torch.equal(project(turned, affine, POSES, CARM), project(volume, affine, POSES, CARM))
    assert torch.equal(gradient(turned, affine), gradient(volume, affine))
    assert gradient(volume.double(), affine).dtype == torch.float64
    torch.testing.assert_close(gradient(volume.double(), affine).float(), gradient(volume, affine))


def test_an_upstream_gradient_that_is_one_number(volume, affine):
    "Of sum() torch hands down one number, expanded: no memory of its own"
    leaf = volume.requires_grad_()
    project(leaf, affine, POSES, CARM).sum().backward()
    expected = back_project(np.ones((2, 12, 12)), SHAPE, affine, POSES, CARM)
    np.testing.assert_allclose(leaf.grad, expected, rtol=1e-5)


def test_one_pose_alone_and_among_others(volume, affine):
    both = project(volume, affine, POSES, CARM, [1.0, 2, 3])
    for pose, image in zip(POSES, both): assert torch.equal(project(volume, affine, pose, CARM, [1.0, 2, 3])[0], image)


def test_a_voxel_of_air_has_a_gradient(volume, affine):
    "The renderer cuts empty borders away; the way back may not"
    volume[:4] = 0
    assert (gradient(volume, affine)[2:4].abs() > 0).any()


def test_gradients_go_only_where_they_are_wanted(volume, affine):
    pose = torch.tensor(POSES, requires_grad=True)
    project(volume, affine, pose, CARM).sum().backward()
    assert volume.grad is None and pose.grad.isfinite().all()
    assert not project(volume, affine, POSES, CARM).requires_grad


def test_the_gradient_of_a_gradient_is_refused(volume, affine):
    "Rather than a wrong one"
    pose = torch.tensor(POSES, requires_grad=True)
    slope, = torch.autograd.grad(project(volume, affine, pose, CARM).square().sum(), pose, create_graph=True)
    with pytest.raises(RuntimeError): slope.sum().backward()


BAD_INPUT = {
    "meta": ("DEVICE", dict(volume=torch.zeros(SHAPE, device="meta"))),
    "whole numbers": ("WRONG_SHAPE", dict(volume=torch.ones(SHAPE, dtype=torch.int16))),
    "no voxels": ("WRONG_SHAPE", dict(volume=torch.zeros(0, 4, 4))),
    "a batch": ("WRONG_SHAPE", dict(volume=torch.zeros(1, *SHAPE))),
    "infinite": ("NOT_FINITE", dict(volume=torch.full(SHAPE, torch.inf))),
    "flat affine": ("WRONG_SHAPE", dict(affine=np.diag([1.0, 0, 1, 1]))),
    "no poses": ("WRONG_SHAPE", dict(poses=np.zeros((0, 3)))),
    "matrices": ("WRONG_SHAPE", dict(poses=np.zeros((2, 3, 3)))),
    "lost optimiser": ("NOT_FINITE", dict(poses=torch.tensor([0, torch.nan, 0]))),
    "other offsets": ("OFFSETS", dict(offset=np.zeros((3, 3)))),
    "above the picture": ("MISSED", dict(offset=[0, 0, 500])),
    "one of two": ("MISSED", dict(offset=[[0, 0, 0], [0, 0, 500]])),
    "behind the source": ("MISSED", dict(poses=[0, 0, 0], offset=[0, -2000, 0])),
    "inside": ("SOURCE_INSIDE", dict(poses=[0, 0, 0], offset=[0, -850, 0])),
}


@pytest.mark.parametrize("code, change", BAD_INPUT.values(), ids=BAD_INPUT)
def test_bad_input(volume, affine, code, change):
    arguments = dict(volume=volume, affine=affine, poses=POSES, carm=CARM, offset=None) | change
    with pytest.raises(RadRotatorError) as error: project(**arguments)
    assert error.value.code == code


@pytest.mark.slow
def test_adam_finds_angles_and_isocentre():
    "From 5° and 11 mm away, against a finer phantom; the depth is what a picture knows least of"
    patient, fine = (phantom(3, spacing=spacing) for spacing in (4.0, 2.0))
    mu, affine = torch.from_numpy(attenuation(patient.hu)), _affine_about_isocentre(patient)
    carm = CArm(size=48, fov=300)
    truth = np.array([4.0, -6, 3])
    target = torch.from_numpy(render(fine, truth, carm, oversample=2))
    pose = torch.tensor(truth + [3.0, 3, -2.8], requires_grad=True)
    offset = torch.tensor([5.0, 8, -6]).double().requires_grad_()
    optimiser = torch.optim.Adam([dict(params=[pose], lr=0.5), dict(params=[offset], lr=1.0)])
    schedule = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 0.0, 80)
    for _ in range(80):
        optimiser.zero_grad()
        (project(mu, affine, pose, carm, offset) - target).square().mean().backward()
        optimiser.step()
        schedule.step()
    cosine = (np.trace(rotation(pose.detach().numpy()).T @ rotation(truth)) - 1)/2
    x, y, z = offset.detach().abs().tolist()
    assert np.degrees(np.arccos(cosine)) < 0.6
    assert max(x, z) < 1.5 and y < 5, (x, y, z)
