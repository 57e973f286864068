"""DRR sets and pairs under rough treatment: killed anywhere, two jobs at once, a full disk, files changed behind our
back, a thousand sets, volumes that come and go for days."""
import gc, json, os, pickle, random, resource, shutil, signal, subprocess, sys, threading, time
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from processes import QUIET, children_of, is_worker, serving, wait_until
from radrotator.core import error_code, shared_data
from radrotator.files import sha256
from radrotator.ct.nifti import write_ct
from radrotator.ct.volume import CT
from radrotator.drr.render import Renderer
from radrotator.geometry import CArm
from radrotator.pairs.dataset import PairDataset, SlabDataset
from radrotator.pairs.folds import FOLDS, read_folds
from radrotator.pairs.jobs import ct_sets
from radrotator.pairs.live import OnTheFlyPairs
from radrotator.pairs.plan import Job, SetPlan
from radrotator.pairs.protocol import draw_poses
from radrotator.pairs.sets import read_set, sets_in, write_manifest, write_set
from radrotator.pairs.sources import ct_jobs

PLAN = SetPlan(drrs=41, size=32, fov=(200, 220))
WITH_SLABS = replace(PLAN, drrs=5, slabs=4, canvas=40, slab_views=2)


@pytest.fixture(scope="module")
def cts(tmp_path_factory):
    "A folder with six CTs, and one that is too short"
    folder = tmp_path_factory.mktemp("cts")
    for i in range(6):
        hu = np.random.default_rng(i).normal(0, 300, (24, 20, 30)).astype(np.float32)
        write_ct(CT(hu, np.diag([10.0, 10, 12, 1])), folder/f"ct{i}.nii.gz")
    write_ct(CT(hu[:, :, :5], np.diag([10.0, 10, 12, 1])), folder/"slab.nii.gz")
    return folder


@pytest.fixture(scope="module")
def whole(cts, tmp_path_factory):
    "The hashes of its sets, made without interruption"
    folder = tmp_path_factory.mktemp("whole")
    rows = ct_sets(cts, folder, PLAN)
    assert [row["status"] for row in rows] == ["made"]*6 + ["refused"]
    return hashes(folder)


def hashes(folder):
    "Every file of the sets by its content; reports say what one run did, so they are left out"
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and not path.name.startswith("report")]
    return {str(path.relative_to(folder)): sha256(path) for path in files}


def stamps(folder):
    "When the images of each marked set were written"
    return {path.name: (path/"drr.npy").stat().st_mtime_ns for path in sets_in(folder)}


def some_cts(cts, folder, *names):
    "Copies of a few"
    folder.mkdir()
    for name in names: shutil.copy(cts/f"{name}.nii.gz", folder)
    return folder


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with serving(tmp_path_factory.mktemp("server"), prepare) as server: yield server


def prepare(): "Importing this file is enough."


@pytest.fixture(scope="module")
def with_slabs(cts, tmp_path_factory):
    "Sets that hold slabs, made without interruption"
    folder = tmp_path_factory.mktemp("slabs")
    assert [row["status"] for row in ct_sets(cts, folder, WITH_SLABS)] == ["made"]*6 + ["refused"]
    return folder


@pytest.mark.parametrize("slabs", [False, True], ids=["views", "slabs"])
def test_killed_at_any_file_it_neither_loses_nor_repeats_a_drr(slabs, server, cts, whole, with_slabs, tmp_path):
    whole, plan, most = (hashes(with_slabs), WITH_SLABS, 60) if slabs else (whole, PLAN, 25)
    sets, draw, deaths, ended = tmp_path/"sets", random.Random(7), 0, None
    while ended is None or ended.was_killed:
        before = stamps(sets)
        deadly = str(sets), "", draw.randint(1, most), "signal", "SIGKILL"
        ended = server(partial(ct_sets, cts, sets, plan, (1, 1), 1), at=deadly)
        deaths += ended.was_killed
        now = stamps(sets)
        assert {name: now[name] for name in before} == before  # what was whole is not made again
        for file in (file for path in sets_in(sets) for file in path.glob("*.npy")):
            assert whole[f"{file.parent.name}/{file.name}"] == sha256(file)  # what is marked whole is
    assert ended.went_well, ended
    assert deaths >= 6 and hashes(sets) == whole  # and nothing half-written is left


def has_begun(sets): return lambda: list(sets.glob("*/.drr-*"))


def is_alive(pid):
    "Whether a process runs: not when it has ended and nobody has asked for its status"
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and " Z " not in stat.read_text()


def test_a_pool_killed_ends_its_workers_and_goes_on(server, cts, whole, tmp_path):
    sets = tmp_path/"sets"
    process = server.start(partial(ct_sets, cts, sets, PLAN, (1, 1), 2))
    wait_until(has_begun(sets))
    workers = children_of(process.pid)
    os.kill(process.pid, signal.SIGKILL)
    assert server.end(process).was_killed
    wait_until(lambda: not any(map(is_alive, workers)), 20)
    assert len(workers) >= 2 and len(sets_in(sets)) < 6
    ct_sets(cts, sets, PLAN)
    assert hashes(sets) == whole


def test_a_worker_killed_costs_nothing_but_time(server, cts, whole, tmp_path):
    mine, sets = some_cts(cts, tmp_path/"cts", "ct0", "ct1"), tmp_path/"sets"
    process = server.start(partial(ct_sets, mine, sets, PLAN, (1, 1), 2))
    wait_until(has_begun(sets))
    os.kill(next(filter(is_worker, children_of(process.pid))), signal.SIGKILL)
    assert server.end(process).status == 0
    images = "ct0/drr.npy", "ct1/drr.npy"
    assert [hashes(sets)[name] for name in images] == [whole[name] for name in images]
    assert not list(sets.rglob(".*"))


def test_shards_and_copies_of_them_at_once_do_no_harm(server, cts, whole, tmp_path):
    sets = tmp_path/"sets"
    calls = [partial(ct_sets, cts, sets, PLAN, shard, 1) for shard in ((1, 2), (2, 2), (2, 2))]
    for process in [server.start(call) for call in calls]: assert server.end(process).went_well
    assert hashes(sets) == whole and len(list(sets.glob("report-*.csv"))) == 2


def test_a_full_disk_is_refused_and_leaves_nothing(cts, whole, tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try: assert error_code(lambda: ct_sets(cts, tmp_path, PLAN)) == "CANNOT_WRITE"
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not sets_in(tmp_path) and not list(tmp_path.rglob(".*"))
    ct_sets(cts, tmp_path, PLAN)
    assert hashes(tmp_path) == whole


def test_what_was_changed_behind_our_back_is_made_again(cts, whole, tmp_path):
    mine, sets = shutil.copytree(cts, tmp_path/"cts"), tmp_path/"sets"
    ct_sets(mine, sets, PLAN)
    damaged = np.load(sets/"ct0"/"drr.npy", mmap_mode="r+")
    damaged[3, 2, 1] += 1
    damaged.flush()
    (sets/"ct1"/"manifest.json").write_text("{}")
    (sets/"ct2"/"manifest.json").unlink()
    shutil.copy(cts/"ct4.nii.gz", mine/"ct3.nii.gz")
    os.truncate(mine/"ct5.nii.gz", 500)
    rows = {row["name"]: row for row in ct_sets(mine, sets, PLAN)}
    assert [rows[f"ct{i}"]["status"] for i in range(6)] == ["made", "made", "made", "made", "kept", "refused"]
    assert rows["ct5"]["reason"] == "UNREADABLE" and rows["slab"]["reason"] == "TOO_SHORT"
    # the set of a CT that can no longer be read is not trained on
    assert [path.name for path in sets_in(sets)] == [f"ct{i}" for i in range(5)]
    now = hashes(sets)
    assert [now[f"ct{i}/drr.npy"] == whole[f"ct{i}/drr.npy"] for i in range(5)] == [True, True, True, False, True]


def test_sets_of_before_they_could_hold_slabs_are_still_whole(cts, tmp_path):
    "Their manifests do not say how many pictures have slabs"
    plan = dict(drrs=41, size=32, fov=[200, 220], oversample=1, one_axis=0.0, seed=0, physics=None, engine="siddon")
    plan |= dict(slabs=0, canvas=0, slab_fov=[250, 400], shift=30.0, echo=4, centre="picture")
    ct_sets(cts, tmp_path, PLAN)
    for path in sets_in(tmp_path):
        manifest = json.loads((path/"manifest.json").read_text())
        assert manifest["plan"] == plan and "slabs" not in manifest and manifest["format"] == 2
    assert {row["status"] for row in ct_sets(cts, tmp_path, PLAN)} == {"kept", "refused"}
    assert len(PairDataset(tmp_path, FOLDS).sets) == 6


NO_MANIFESTS = [
    "", "[]", "{}", "\x00",
    '{"format": 2}', '{"format": 2, "bytes": 0}', '{"format": 1, "poses": [[0, 0, 0]]}',
]


@pytest.mark.parametrize("text", NO_MANIFESTS)
def test_a_manifest_that_is_none_is_refused(text, tmp_path):
    (tmp_path/"manifest.json").write_text(text)
    (tmp_path/"drr.npy").touch()
    assert error_code(lambda: read_set(tmp_path)) == "DAMAGED_SET"


def test_a_patient_keeps_one_fold(tmp_path, cts):
    mine, sets = tmp_path/"cts", tmp_path/"sets"
    mine.mkdir()
    one, other, stranger = "0123abcd-00000001", "0123abcd-00000002", "89abcdef-00000001"
    for i, name in enumerate((one, other, stranger)): shutil.copy(cts/f"ct{i}.nii.gz", mine/f"{name}.nii.gz")
    jobs = ct_jobs(mine, tmp_path)
    fold = jobs[0].fold
    found = [(job.patient, job.fold) for job in jobs]
    assert found == [("0123abcd", fold), ("0123abcd", fold), ("89abcdef", 3 - fold)]
    (mine/"folds.csv").write_text(f"name,patient,fold\n{one},0123abcd,7\n{other},0123abcd,7\n")
    rows = [(row["fold"], row["status"], row["reason"]) for row in ct_sets(mine, sets, PLAN)]
    assert rows == [(7, "made", ""), (7, "made", ""), (None, "refused", "NO_FOLD")]
    manifest = json.loads((sets/other/"manifest.json").read_text())
    write_manifest(sets/other, manifest | dict(fold=1))
    for folds in ((7,), (1, 2, 3, 4, 5)):
        assert error_code(lambda: PairDataset(sets_in(sets), folds)) == "SPLIT_PATIENT"


POSES = draw_poses(0).tolist()


def empty_images(path, drrs=511, size=256):
    "DRRs that take up hardly any room: of each but one pixel is on the disk, the rest is a hole in the file"
    with open(path, "wb") as file:
        header = dict(descr="<f2", fortran_order=False, shape=(drrs, size, size))
        np.lib.format.write_array_header_1_0(file, header)
        begin = file.tell()
        for row in range(drrs):
            file.seek(begin + 2*row*size*size)
            file.write(np.float16(1).tobytes())
        file.truncate(begin + 2*drrs*size*size)


def empty_set(folder, images, size=256, fold=1):
    "A set whose images are another name of a file"
    folder.mkdir()
    os.link(images, folder/"drr.npy")
    about = dict(patient=folder.name, fold=fold, carm=asdict(CArm(size=size)), poses=POSES)
    about |= dict(bytes=images.stat().st_size, sha256="0"*64)
    write_manifest(folder, SetPlan().recipe(Job(folder.name, folder.name, fold, __file__)) | about)


def test_a_thousand_sets_open_in_a_second_and_hold_no_file_open(tmp_path):
    empty_images(tmp_path/"images")
    for i in range(1000): empty_set(tmp_path/f"{i:04d}", tmp_path/"images", fold=FOLDS[i % 7])
    took = []  # of processor time: others may be using this machine
    for _ in range(3):
        began = time.process_time()
        data = PairDataset(tmp_path, FOLDS)
        took.append(time.process_time() - began)
    assert len(data.sets) == 1000 and min(took) < 1, took
    handles = len(os.listdir("/proc/self/fd"))
    for step in range(3): assert not data.batch(0, step, 32).quarantined
    assert len(os.listdir("/proc/self/fd")) == handles
    assert "drr.npy" not in Path("/proc/self/maps").read_text()


def test_real_cts_give_the_same_pairs_from_sets_and_on_the_fly(tmp_path):
    found = shared_data("ct_hip")
    if found is None: pytest.skip("development data are not here")
    plan = SetPlan(drrs=7, size=48)
    rows = ct_sets(found, tmp_path, plan)
    assert len(rows) == len(list(found.glob("*.nii.gz"))) == len(read_folds(tmp_path/"folds.csv"))
    made = sets_in(tmp_path)
    assert made and {row["reason"] for row in rows} <= {"", "TOO_SHORT"}
    stored, live = PairDataset(made, FOLDS), OnTheFlyPairs(ct_jobs(found, tmp_path), plan, FOLDS)
    assert len(live.refused) + len(made) == len(rows)
    for a, b in zip(*(tensors(pairs.batch(3, 1, 12)) for pairs in (stored, live))):
        np.testing.assert_allclose(a, b, atol=2e-3)


def tensors(batch): return batch.input, batch.target, batch.vector


def slab_tensors(batch): return batch.slabs, batch.dense, batch.valid, batch.fov


def same(a, b, parts=tensors): return all(map(torch.equal, parts(a), parts(b)))


def is_joined(whole, halves, parts=tensors):
    "Whether a batch is what two of fewer pairs are together"
    return all(torch.equal(a, torch.cat(b)) for a, b in zip(parts(whole), zip(*map(parts, halves))))


def names_of(quarantined): return {name for name, _ in quarantined}


def volume(i, side=20):
    "A CT of noise"
    hu = np.random.default_rng(i).normal(0, 300, (side, side, 30)).astype(np.float32)
    return CT(hu, np.diag([200/side, 200/side, 12, 1]), name=f"v{i:02d}")


@pytest.fixture(scope="module")
def eight(tmp_path_factory):
    "A folder of eight sets"
    folder = tmp_path_factory.mktemp("eight")
    for i in range(8):
        write_set(volume(i), folder/f"v{i:02d}", draw_poses(i, 21), CArm(size=32, fov=150), fold=1)
    return folder


def put(path, value, rows=slice(None)):
    "Change some of the numbers in a file"
    images = np.load(path, mmap_mode="r+")
    images[rows] = value
    images.flush()


def make_folder(path):
    path.unlink()
    path.mkdir()


DAMAGE = dict(
    cut=lambda folder: os.truncate(folder/"drr.npy", 9_000),
    longer=lambda folder: os.truncate(folder/"drr.npy", 90_000),
    gone=lambda folder: (folder/"drr.npy").unlink(),
    folder=lambda folder: make_folder(folder/"drr.npy"),
    nan=lambda folder: put(folder/"drr.npy", np.nan, 0),
    infinite=lambda folder: put(folder/"drr.npy", np.inf, 0),
    black=lambda folder: put(folder/"drr.npy", 3),
)
IS_SEEN_AT_ONCE = "cut", "longer", "gone", "folder"  # by a look at the file


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_set_damaged_while_it_is_drawn_from_changes_nothing_else(damage, eight, tmp_path):
    sets = shutil.copytree(eight, tmp_path/"sets")
    data = PairDataset(sets)
    before = [data.batch(1, step, 16) for step in range(4)]
    DAMAGE[damage](sets/"v03")
    after = [data.batch(1, step, 16) for step in range(4)]
    # others who know of it before their first batch, or do not
    for feed in (PairDataset(sets), PairDataset(sets_in(sets)[::-1]), pickle.loads(pickle.dumps(data))):
        for step, batch in reversed([*enumerate(after)]):
            parts = [feed.batch(1, step, size, start) for size, start in ((7, 0), (9, 7))]
            assert is_joined(batch, parts)
            assert dict(batch.quarantined) == dict(parts[0].quarantined) | dict(parts[1].quarantined)
    assert names_of(fault for batch in after for fault in batch.quarantined) == {"v03"}
    assert all(batch.input.isfinite().all() for batch in after)
    changed = [not torch.equal(a.input[i], b.input[i]) for a, b in zip(before, after) for i in range(16)]
    assert 2 <= sum(changed) <= 20  # of 64 pairs, about an eighth
    assert list(PairDataset(sets).quarantined) == ["v03"]*(damage in IS_SEEN_AT_ONCE)


SPOILT = dict(
    cut=lambda folder: os.truncate(folder/"slabs.npy", 9_000),
    gone=lambda folder: (folder/"dense.npy").unlink(),
    short=lambda folder: os.truncate(folder/"valid.npy", 200),
    nan=lambda folder: put(folder/"slabs.npy", np.nan),
    black=lambda folder: put(folder/"slabs.npy", 0),
    infinite=lambda folder: put(folder/"dense.npy", np.inf),
)


@pytest.mark.parametrize("damage", SPOILT)
def test_slabs_damaged_while_they_are_drawn_from_change_nothing_else(damage, with_slabs, tmp_path):
    sets = shutil.copytree(with_slabs, tmp_path/"sets")
    data = SlabDataset(sets, FOLDS)
    before = [data.batch(1, step, 8) for step in range(3)]
    SPOILT[damage](sets/"ct3")
    after = [data.batch(1, step, 8) for step in range(3)]
    for feed in (SlabDataset(sets, FOLDS), pickle.loads(pickle.dumps(data))):
        for step, batch in reversed([*enumerate(after)]):
            parts = [feed.batch(1, step, size, start) for size, start in ((3, 0), (5, 3))]
            assert is_joined(batch, parts, slab_tensors)
    assert names_of(fault for batch in after for fault in batch.quarantined) == {"ct3"}
    assert all(batch.slabs.isfinite().all() for batch in after)
    changed = [not torch.equal(a.slabs[i], b.slabs[i]) for a, b in zip(before, after) for i in range(8)]
    assert 1 <= sum(changed) <= 12  # of 24 pictures, about a sixth
    assert not PairDataset(sets, FOLDS).quarantined  # pairs do not need slabs


def test_a_set_without_a_manifest_has_no_fold_and_is_named(eight, tmp_path):
    sets = shutil.copytree(eight, tmp_path/"sets")
    (sets/"v03"/"manifest.json").write_text("{")
    data = PairDataset(sets)
    assert list(data.quarantined) == ["v03"] and len(data.sets) == 7
    shutil.rmtree(sets/"v03")
    assert same(PairDataset(sets).batch(0, 0, 32), data.batch(0, 0, 32))
    for path in sets.glob("*/manifest.json"): path.write_text("{}")
    assert error_code(lambda: PairDataset(sets)) == "ALL_DAMAGED"


def test_a_file_cut_short_during_a_read_is_an_error_and_not_the_end(eight, tmp_path):
    folder = shutil.copytree(eight/"v00", tmp_path/"v00")
    whole, drrs, done, codes = (folder/"drr.npy").read_bytes(), read_set(folder), threading.Event(), set()
    def cut_and_mend():
        with open(folder/"drr.npy", "r+b") as file:
            while not done.is_set():
                file.truncate(5_000)
                file.seek(0)
                file.write(whole)
                file.flush()
    thread = threading.Thread(target=cut_and_mend)
    thread.start()
    end = time.monotonic() + 1
    while time.monotonic() < end: codes.add(error_code(lambda: drrs.read_images([0, 20, 19])))
    done.set()
    thread.join()
    assert codes - {None} == {"DAMAGED_SET"}


def test_processes_of_the_background_give_what_a_thread_gives_killed_or_not(cts):
    jobs = [Job(path.name, path.name, 1, path) for path in sorted(cts.iterdir())]
    thread, two = (OnTheFlyPairs(jobs, PLAN, held=2, refresh=1, workers=workers) for workers in (0, 2))
    expected = [thread.batch(0, step, 6) for step in range(16)]
    for step in range(8): assert same(two.batch(0, step, 6), expected[step])
    before = [process for process, _ in two.prefetcher.processes.values()]
    before[0].kill()
    for step in (*range(8, 16), 3): assert same(two.batch(0, step, 6), expected[step])
    assert list(two.refused) == list(thread.refused) == ["slab.nii.gz"] and len(before) == 2
    two.close()
    thread.close()
    for process in {*before, *(process for process, _ in two.prefetcher.processes.values())}:
        process.join(20)
        assert not process.is_alive()


def test_a_job_that_kills_is_refused_and_nothing_outlives_the_program():
    command = [sys.executable, Path(__file__).with_name("deadly.py")]  # well before the end of what is under way
    ran = subprocess.run(command, capture_output=True, text=True, timeout=300, env=os.environ | QUIET)
    assert ran.returncode == 0 and not ran.stderr, ran.stderr
    of_thread, of_process = json.loads(ran.stdout)
    assert of_thread == {"deadly": "cannot read it in a thread"}
    assert of_process.keys() == of_thread.keys() and of_process != of_thread


def test_memory_stays_flat_over_hundreds_of_refreshes():
    source = volume(0, side=64)  # 0.5 MB; a volume made ready has two copies
    jobs = [Job(f"v{i:02d}", "somebody", 1, source) for i in range(9)]
    pairs = OnTheFlyPairs(jobs, SetPlan(drrs=9, size=16, fov=(150, 150)), held=3, refresh=1)
    def resident(): return int(Path("/proc/self/statm").read_text().split()[1])*os.sysconf("SC_PAGE_SIZE")/1e6
    def walk(steps):
        for step in steps: pairs.batch(0, step, 4)
        gc.collect()
        return resident(), sum(type(thing) is Renderer for thing in gc.get_objects())
    begin, _ = walk(range(30))
    end, alive = walk(range(30, 230))
    assert end - begin < 40, (begin, end)  # MB; 200 volumes kept would be 200
    assert alive <= 3 + 2  # held, one ready, one under way
