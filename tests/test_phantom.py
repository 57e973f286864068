"What a notebook is no place for: files of bone atlases, right and wrong; members on their own; bodies by the dozen."
from concurrent.futures import ProcessPoolExecutor
import multiprocessing

import numpy as np
import pytest

from radrotator.anatomy import POINTS, pelvic_angles
from radrotator.core import RadRotatorError, error_code, shared_data
from radrotator.ct.nifti import read_nifti_ct, write_ct
from radrotator.drr.centre import recentre
from radrotator.geometry import CArm
from radrotator.phantom.atlas import BoneAtlas
from radrotator.phantom.grid import BONES, FEMORA, LABELS
from radrotator.phantom.phantom import member, phantom
from radrotator.phantom.shapes import PATIENTS
from radrotator.phantom.skeleton import make_skeleton
from radrotator.phantom.surfaces import load_surfaces

FILES = "left/LeftHip{}_cpd.vtk", "right/RightHip{}_cpd.vtk", "sacrum/Sacrum{}_cpd.vtk"  # as published


def balls(patients, rings=6, around=9):
    "Three ellipsoids a patient, in correspondence: RAS vertices (P, 3, V, 3) and faces"
    polar, azimuth = np.linspace(0.2, np.pi - 0.2, rings), np.linspace(0, 2*np.pi, around, endpoint=False)
    theta, phi = np.meshgrid(polar, azimuth, indexing="ij")
    ball = np.stack([np.sin(theta)*np.cos(phi), np.sin(theta)*np.sin(phi), np.cos(theta)], -1).reshape(-1, 3)
    def at(r, a): return r*around + a % around
    faces = []
    for r in range(rings - 1):
        for a in range(around):
            faces += [(at(r, a), at(r + 1, a), at(r, a + 1)), (at(r + 1, a + 1), at(r, a + 1), at(r + 1, a))]
    hips = [[ball*[30, 40, 60 + p % 7] + [x, 0, 0] for x in (-90, 90)] for p in patients]
    shapes = np.stack([[*pair, ball*[40, 20, 40] + [0, -60, 30]] for pair in hips])
    return shapes - shapes.mean((1, 2), keepdims=True), {b: np.array(faces) for b in BONES}


def publish(folder, patients, vertices, faces, files=FILES):
    "Write surfaces as their authors do: LPS, one file a bone, each patient where the scanner saw them"
    import pyvista
    for patient, shape in zip(patients, vertices):
        for bone, file, v in zip(BONES, files, shape):
            path = folder/file.format(patient)
            path.parent.mkdir(parents=True, exist_ok=True)
            pyvista.PolyData.from_regular_faces((v + [12, -200, 640])*[-1, -1, 1], faces[bone]).save(path, binary=False)


@pytest.fixture
def folder(tmp_path):
    publish(tmp_path/"surface", range(1, 10), *balls(range(1, 10)))
    return tmp_path/"surface"


def test_folder_gives_what_was_written(folder):
    vertices, faces = balls(range(1, 10))
    patients, read, triangles = load_surfaces(folder)
    assert patients.tolist() == list(range(1, 10))  # by number, not by name
    np.testing.assert_allclose(read, vertices, atol=1e-3)
    for b in BONES: assert (triangles[b] == faces[b]).all()
    left, right = read[:, 0, :, 0].mean(1), read[:, 1, :, 0].mean(1)
    assert (left < 0).all() and (right > 0).all()  # RAS+


def test_names_are_taken_loosely(tmp_path):
    files = "patient{}-hip-LEFT.vtk", "Right/{}.vtk", "all/the_sacrum_{:03d}_v2.vtk"
    publish(tmp_path, range(8), *balls(range(8)), files)
    assert load_surfaces(tmp_path)[0].tolist() == list(range(8))


def test_of_the_published_forty_the_packed_are_taken(tmp_path):
    everyone = sorted({*PATIENTS, 8, 16, 27, 36, 44, 49, 57, 65})
    publish(tmp_path, everyone, *balls(everyone))
    assert load_surfaces(tmp_path)[0].tolist() == list(PATIENTS)


DAMAGE = {  # what is done to a folder -> the code of the refusal, and what the sentence must name
    "missing": (lambda f: (f/"sacrum/Sacrum4_cpd.vtk").unlink(), "SURFACE_MISSING", "4 sacrum"),
    "short": (lambda f: (f/"left/LeftHip2_cpd.vtk").write_text("# vtk DataFile Version 4.0\nvtk"),
              "SURFACE_UNREADABLE", "LeftHip2_cpd.vtk"),
    "noise": (lambda f: (f/"left/LeftHip2_cpd.vtk").write_bytes(b"\0\1\2"), "SURFACE_UNREADABLE", "LeftHip2_cpd.vtk"),
    "no number": (lambda f: (f/"left/LeftHip2_cpd.vtk").rename(f/"left/LeftHip_cpd.vtk"),
                  "SURFACE_NAME", "LeftHip_cpd.vtk"),
    "no bone": (lambda f: (f/"left/LeftHip2_cpd.vtk").rename(f/"femur2.vtk"), "SURFACE_NAME", "femur2.vtk"),
    "twice": (lambda f: (f/"left/LeftHip2_cpd.vtk").rename(f/"left/LeftHip3.vtk"),
              "SURFACE_TWICE", "hip_left 3"),
    "other vertices": (lambda f: publish(f, [3], *balls([3], rings=5)), "NOT_CORRESPONDING", "LeftHip3_cpd.vtk"),
    "sides": (lambda f: publish(f, [1], balls([1])[0][:, [1, 0, 2]], balls([1])[1]), "NOT_LPS", "LeftHip1_cpd.vtk"),
    "few": (lambda f: [p.unlink() for p in f.rglob("*[2-9]_cpd.vtk")], "BAD_VERTICES", "8"),
    "none": (lambda f: [p.unlink() for p in f.rglob("*.vtk")], "NO_SURFACES", "surface")}


@pytest.mark.parametrize("kind", DAMAGE)
def test_what_does_not_fit_is_refused_by_name(folder, kind):
    damage, code, names = DAMAGE[kind]
    damage(folder)
    with pytest.raises(RadRotatorError) as error: load_surfaces(folder)
    assert error.value.code == code
    assert all(name in str(error.value) for name in names.split()) and "\n" not in str(error.value)


def test_packed_file_and_published_folder_are_one_atlas(tmp_path):
    path = shared_data("pelvis_atlas", "pelvis_atlas.npz")
    if not path: pytest.skip("no bone atlas here")
    with np.load(path) as z:
        publish(tmp_path, z["patient"], z["vertices"].astype(float), {b: z["faces_" + b] for b in BONES})
    one, other = BoneAtlas.read(path), BoneAtlas.read(tmp_path)
    assert (one.folds == other.folds).all()
    np.testing.assert_allclose(one.vertices, other.vertices, atol=2e-3)
    np.testing.assert_allclose(one.mean, other.mean, atol=5e-3)
    np.testing.assert_allclose(one.deviations, other.deviations, rtol=1e-3)
    a, b = (phantom(3, 5.0, bones=atlas, patient=8, soft=True) for atlas in (one, other))
    assert (a.labels != b.labels).mean() < 1e-3


def whole_pelves(path, patients=14):
    "A packed atlas of whole pelves: three balls in one mesh, and rods with a ball for femora"
    vertices, faces = balls(range(patients))
    n = vertices.shape[2]
    joined = np.concatenate([faces[b] + i*n for i, b in enumerate(BONES)])
    shuffled = np.random.default_rng(0).permutation(3*n)   # bones are told apart by what hangs together
    pelvis = vertices.reshape(patients, -1, 3)[:, np.argsort(shuffled)]
    rod = vertices[:, 0] - vertices[:, 0].mean(1, keepdims=True)
    femora = dict(femur_left=rod - [90, 0, 60], femur_right_mirrored=rod*[-1, 1, 1] + [90, 0, -60])
    np.savez(path, pelvis=pelvis, **femora, faces_pelvis=shuffled[joined], faces_femur=faces["hip_left"])
    return vertices, faces


def middles(vertices, faces):
    "Middles of the triangles of (P, V, 3), sorted"
    return np.sort(vertices[:, faces].mean(2).round(3), axis=1)


def volume(vertices, faces):
    "Six times the volume within a closed surface: negative where it is inside out"
    return np.einsum("ij,ij->", vertices[faces[:, 0]], np.cross(vertices[faces[:, 1]], vertices[faces[:, 2]]))


def test_whole_pelves_fall_into_bones(tmp_path):
    vertices, _ = whole_pelves(tmp_path/"a.npz")
    patients, read, faces = load_surfaces(tmp_path/"a.npz")
    assert patients.min() >= 1000 and list(faces) == [*BONES, *FEMORA] and read.shape[:2] == (14, 5)
    for i, bone in enumerate(BONES):  # the same triangles, whatever the order of their vertices
        written = middles(vertices[:, i], balls([0])[1][bone])
        np.testing.assert_allclose(middles(read[:, i], faces[bone]), written, atol=1e-2)
    left, right = (read[0, k] - read[0, k].mean(0) for k in (3, 4))
    assert volume(left, faces["femur_left"])*volume(right, faces["femur_right"]) > 0  # not inside out


@pytest.mark.parametrize("key", ["femur_right_mirrored", "faces_pelvis", "faces_femur"])
def test_whole_pelves_need_all_their_parts(tmp_path, key):
    whole_pelves(tmp_path/"a.npz")
    with np.load(tmp_path/"a.npz") as z: np.savez(tmp_path/"b.npz", **{k: z[k] for k in z if k != key})
    assert error_code(lambda: load_surfaces(tmp_path/"b.npz")) == "NOT_AN_ATLAS"


def make_hu(i): return member(i, 4, 6.0, implants=0.4, fractures=0.5, lost=0.5).hu


def test_members_are_the_same_in_any_process():
    here = [make_hu(i) for i in range(4)]
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        there = list(pool.map(make_hu, reversed(range(4))))
    for a, b in zip(here, reversed(there)): assert np.array_equal(a, b)


def test_both_hips_replaced():
    ct = phantom(1, 4.0, implant="both", soft=True)
    x = np.argwhere(ct.labels == LABELS["implant"])[:, 0]*4 + ct.affine[0, 3]
    assert (x > 40).any() and (x < -40).any() and (np.abs(x) > 20).all()


@pytest.mark.parametrize("seed", range(4))
def test_no_ray_shows_where_the_volume_ends(seed):
    from radrotator.drr.frame import find_truncation
    from radrotator.geometry import CArm
    corners = np.array(np.meshgrid([-15, 15], [-15, 15], [-15, 15])).reshape(3, -1).T
    assert not find_truncation(phantom(seed, 6.0, soft=True), corners, CArm(size=24, fov=320)).any()


@pytest.mark.parametrize("seed", range(30))
def test_a_body_is_whole_and_covers_its_bones(seed):
    ct = phantom(seed, 6.0, soft=True)
    x, y, z = ct.labels.shape
    body = ct.labels[:, :, z//2 - 40:z//2 + 40] > 0    # 240 mm above and below the middle
    assert not body[:, [0, -1]].any() and not body[[0, -1]].any()
    bone = np.isin(ct.labels, [LABELS[b] for b in (*BONES, "vertebrae")])
    bone[:, :, [0, -1]] = False
    for axis in (0, 1):
        for step in (-1, 1):  # there is a voxel of tissue around bone
            assert (bone & np.roll(ct.labels == 0, step, axis)).sum() < 0.01*bone.sum()
    assert 150 < np.ptp(np.nonzero(body.any((0, 2)))[0])*6 < 540


def test_what_lies_on_a_table_is_flat_behind():
    for seed in range(6):
        ct = phantom(seed, 4.0, soft=True)
        level = ct.labels[:, :, ct.labels.shape[2]//2] > 0
        wide = np.flatnonzero(level.any(1))
        middle = wide[len(wide)//4:-(len(wide)//4)]
        back, front = np.argmax(level[middle], 1)*4.0, np.argmax(level[middle, ::-1], 1)*4.0
        behind, ahead = (np.std(v - np.polyval(np.polyfit(middle, v, 1), middle)) for v in (back, front))
        assert behind < 9 and behind < ahead + 3


def test_broken_lost_and_cut_out():
    for seed in range(4):
        whole, broken = (phantom(seed, 5.0, soft=False, fractured=f, segmented=True) for f in (False, True))
        assert (whole.labels != broken.labels).any() and broken.hu.min() == -1000
        assert np.unique(whole.hu[whole.labels == 0]).tolist() == [-1000]
    kinds = {tuple(np.unique(phantom(seed, 8.0, soft=False, lost=True).labels)) for seed in range(12)}
    assert len(kinds) > 4
    assert len(make_skeleton(1, fractured=True).bones) > len(make_skeleton(1).bones)


def test_shares_of_a_population():
    for i in range(3):
        soft_edge, cut_out = (member(i, 0, 8.0, soft=False, segmented=share) for share in (0, 1))
        assert (soft_edge.hu[soft_edge.labels == 0] > -1000).any()
        assert (cut_out.hu[cut_out.labels == 0] == -1000).all()


def distance_to(ct, name, point):
    "mm from a point to the nearest voxel of a structure"
    voxels = np.argwhere(ct.labels == LABELS[name]) @ ct.affine[:3, :3].T + ct.affine[:3, 3]
    return np.linalg.norm(voxels - point, axis=1).min()


@pytest.mark.parametrize("folder", [None, "pelvis_atlas/pelvis_atlas.npz", "pelvis_femur_26/llp26_pelvis_femur.npz"])
def test_points_lie_on_the_bones_they_are_named_after(folder):
    atlas = folder and shared_data(*folder.split("/"))
    if folder and not atlas: pytest.skip("no bone atlas here")
    for seed in (1, 2, 3):
        ct = phantom(seed, 4.0, bones=atlas, soft=False)
        assert set(ct.points) == set(POINTS)
        for name, p in ct.points.items():
            bone = "sacrum" if name == "promontory" else "hip_" + name.split("_")[-1]
            if name != "symphysis" and "socket" not in name: assert distance_to(ct, bone, p) < 8, (seed, name)
        for side in ("left", "right"):
            to_hip = distance_to(ct, f"hip_{side}", ct.points[f"socket_{side}"])
            assert 14 < to_hip < 34                                # a socket is a hollow of 20 to 30 mm
        assert abs(distance_to(ct, "hip_left", ct.points["symphysis"]) - distance_to(ct, "hip_right", ct.points["symphysis"])) < 8


def test_points_outlive_what_is_done_to_a_ct(tmp_path):
    ct = phantom(1, 8.0, soft=False)
    for other in (ct.resample(6.0), recentre(ct, CArm(size=32)), member(0, spacing=8.0)):
        assert set(other.points) == set(POINTS) and np.isfinite(pelvic_angles(other.points)).all()
    assert all(other.points is ct.points for other in (ct.resample(6.0), recentre(ct, CArm(size=32))))
    write_ct(ct, tmp_path/"ct.nii.gz")
    assert read_nifti_ct(tmp_path/"ct.nii.gz").points is None     # a file holds voxels alone
