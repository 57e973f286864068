"""DRR sets and pairs under rough treatment: killed anywhere, two jobs at once, a full disk, files changed behind our back, a thousand sets, volumes that come and go for days."""
import gc, json, os, pickle, random, resource, shutil, signal, subprocess, sys, threading, time
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from radrotator.core import RadRotatorError, error_code, shared_data
from radrotator.files import sha256
from radrotator.ct.nifti import write_ct
from radrotator.ct.volume import CT
from radrotator.drr.render import Renderer
from radrotator.geometry import CArm
from radrotator.pairs.protocol import draw_poses
from radrotator.pairs.folds import FOLDS, read_folds
from radrotator.pairs.plan import Job, SetPlan
from radrotator.pairs.sources import ct_jobs
from radrotator.pairs.sets import read_set, sets_in, write_manifest, write_set
from radrotator.pairs.jobs import ct_sets
from radrotator.pairs.dataset import PairDataset, SlabDataset
from radrotator.pairs.live import OnTheFlyPairs

ROOT = Path(__file__).parents[1]
PLAN = SetPlan(drrs=41, size=32, fov=(200, 220))
WITH_SLABS = replace(PLAN, drrs=5, slabs=4, canvas=40, slab_views=2)
CHILD = """
import json, os, signal, sys
from radrotator.pairs.plan import SetPlan
from radrotator.pairs.jobs import ct_sets
WRITES = os.O_WRONLY | os.O_RDWR
def die_at(deadly, sets):
    "Count whenever a file of the sets is about to be opened for writing, renamed, removed or changed; at the deadly count, die."
    count = 0
    def watch(event, about):
        nonlocal count
        if event in ("os.rename", "os.remove", "os.chmod") or event == "open" and about[2] & WRITES:
            count += str(about[0]).startswith(sets)
            if count == deadly: os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(watch)
def run(cts, sets, shard, workers, deadly, slabs=False):
    if deadly: die_at(deadly, sets)
    with_slabs = dict(drrs=5, slabs=4, canvas=40, slab_views=2) if slabs else {}
    ct_sets(cts, sets, SetPlan(**dict(drrs=41, size=32, fov=(200, 220)) | with_slabs), shard, workers)
if __name__ == "__main__":
    if len(sys.argv) > 1: run(*json.loads(sys.argv[1]))
    else:  # those of a line at once, each in a process of its own; forked, since to import torch takes longer than all the rest
        for line in sys.stdin:
            children = []
            for words in json.loads(line):
                if child := os.fork(): children.append(child)
                else: run(*words); os._exit(0)
            print(*(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children), flush=True)
"""


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
    return {str(path.relative_to(folder)): sha256(path) for path in sorted(folder.rglob("*")) if path.is_file() and not path.name.startswith("report")}


def stamps(folder):
    "When the images of each marked set were written"
    return {path.name: (path/"drr.npy").stat().st_mtime_ns for path in sets_in(folder)}


def child(folder, *words, **pipes):
    "The same in a process of its own"
    script = folder/"child.py"
    script.write_text(CHILD)
    return subprocess.Popen([sys.executable, script, *map(json.dumps, words)], stdout=subprocess.PIPE, text=True, cwd=ROOT, **pipes,
                            env=os.environ | dict(NUMBA_NUM_THREADS="1", OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT)))


@pytest.fixture(scope="module")
def whole_with_slabs(cts, tmp_path_factory):
    "The same of sets that hold slabs"
    folder = tmp_path_factory.mktemp("whole")
    assert [row["status"] for row in ct_sets(cts, folder, WITH_SLABS)] == ["made"]*6 + ["refused"]
    return hashes(folder)


@pytest.mark.parametrize("slabs", [False, True], ids=["views", "slabs"])
def test_killed_at_any_file_it_neither_loses_nor_repeats_a_drr(slabs, cts, whole, whole_with_slabs, tmp_path):
    whole = whole_with_slabs if slabs else whole
    sets, draw, deaths, code = tmp_path/"sets", random.Random(7), 0, None
    with child(tmp_path, stdin=subprocess.PIPE) as runs:
        while code != 0:
            before = stamps(sets)
            deadly = draw.randint(1, 60 if slabs else 25)
            print(json.dumps([[str(cts), str(sets), (1, 1), 1, deadly, slabs]]), file=runs.stdin, flush=True)
            code = int(runs.stdout.readline())
            assert code in (0, -signal.SIGKILL)
            assert {name: stamp for name, stamp in stamps(sets).items() if name in before} == before  # what was whole is not made again
            assert all(whole[f"{path.name}/{file.name}"] == sha256(file) for path in sets_in(sets) for file in path.glob("*.npy"))  # what is marked whole is
            deaths += code != 0
        runs.stdin.close()
    assert deaths >= 6 and hashes(sets) == whole  # and nothing half-written is left


def children(process):
    "Of a process"
    return [int(pid) for path in Path(f"/proc/{process.pid}/task").glob("*/children") for pid in path.read_text().split()]


def test_a_pool_killed_ends_its_workers_and_goes_on(cts, whole, tmp_path):
    sets = tmp_path/"sets"
    process = child(tmp_path, [str(cts), str(sets), (1, 1), 2, 0])
    while not list(sets.glob("*/.drr-*")): time.sleep(0.002); assert process.poll() is None
    workers = children(process)
    process.kill(); process.wait()
    until = time.monotonic() + 20
    alive = lambda pid: Path(f"/proc/{pid}/stat").exists() and " Z " not in Path(f"/proc/{pid}/stat").read_text()
    while any(map(alive, workers)): assert time.monotonic() < until, "a worker outlived its parent"; time.sleep(0.05)
    assert len(workers) >= 2 and len(sets_in(sets)) < 6
    ct_sets(cts, sets, PLAN)
    assert hashes(sets) == whole


def test_a_worker_killed_costs_nothing_but_time(cts, whole, tmp_path):
    mine, sets = tmp_path/"cts", tmp_path/"sets"
    mine.mkdir()
    for name in ("ct0", "ct1"): (mine/f"{name}.nii.gz").write_bytes((cts/f"{name}.nii.gz").read_bytes())
    process = child(tmp_path, [str(mine), str(sets), (1, 1), 2, 0])
    while not list(sets.glob("*/.drr-*")): time.sleep(0.002); assert process.poll() is None
    os.kill(next(pid for pid in children(process) if "spawn_main" in Path(f"/proc/{pid}/cmdline").read_text()), signal.SIGKILL)
    assert process.wait(timeout=180) == 0
    assert [hashes(sets)[f"{name}/drr.npy"] for name in ("ct0", "ct1")] == [whole[f"{name}/drr.npy"] for name in ("ct0", "ct1")]
    assert not list(sets.rglob(".*"))


def test_shards_and_copies_of_them_at_once_do_no_harm(cts, whole, tmp_path):
    sets = tmp_path/"sets"
    with child(tmp_path, stdin=subprocess.PIPE) as runs:
        print(json.dumps([[str(cts), str(sets), shard, 1, 0] for shard in ((1, 2), (2, 2), (2, 2))]), file=runs.stdin, flush=True)
        assert runs.stdout.readline() == "0 0 0\n"
        runs.stdin.close()
    assert hashes(sets) == whole and len(list(sets.glob("report-*.csv"))) == 2


def test_a_full_disk_is_said_in_one_sentence(cts, whole, tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        with pytest.raises(RadRotatorError, match="File too large") as error: ct_sets(cts, tmp_path, PLAN)
        assert error.value.code == "CANNOT_WRITE"
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not sets_in(tmp_path) and not list(tmp_path.rglob(".*"))
    ct_sets(cts, tmp_path, PLAN)
    assert hashes(tmp_path) == whole


def test_what_was_changed_behind_our_back_is_made_again(cts, whole, tmp_path):
    mine, sets = tmp_path/"cts", tmp_path/"sets"
    mine.mkdir()
    for path in cts.iterdir(): (mine/path.name).write_bytes(path.read_bytes())
    ct_sets(mine, sets, PLAN)
    damaged = np.load(sets/"ct0"/"drr.npy", mmap_mode="r+"); damaged[3, 2, 1] += 1; damaged.flush()
    (sets/"ct1"/"manifest.json").write_text("{}")
    (sets/"ct2"/"manifest.json").unlink()
    (mine/"ct3.nii.gz").write_bytes((cts/"ct4.nii.gz").read_bytes())
    (mine/"ct5.nii.gz").write_bytes((cts/"ct5.nii.gz").read_bytes()[:500])
    rows = {row["name"]: row for row in ct_sets(mine, sets, PLAN)}
    assert [rows[f"ct{i}"]["status"] for i in range(6)] == ["made", "made", "made", "made", "kept", "refused"]
    assert rows["ct5"]["reason"] == "UNREADABLE" and rows["slab"]["reason"] == "TOO_SHORT"
    assert [path.name for path in sets_in(sets)] == [f"ct{i}" for i in range(5)]  # the set of a CT that can no longer be read is not trained on
    now = hashes(sets)
    assert [now[f"ct{i}/drr.npy"] == whole[f"ct{i}/drr.npy"] for i in range(5)] == [True, True, True, False, True]


def test_sets_of_before_they_could_hold_slabs_are_still_whole(cts, tmp_path):
    "Their manifests do not say how many pictures have slabs"
    plan = dict(drrs=41, size=32, fov=[200, 220], oversample=1, one_axis=0.0, seed=0, physics=None, engine="siddon", slabs=0, canvas=0,
                slab_fov=[250, 400], shift=30.0, echo=4, centre="picture")
    ct_sets(cts, tmp_path, PLAN)
    for path in sets_in(tmp_path):
        manifest = json.loads((path/"manifest.json").read_text())
        assert manifest["plan"] == plan and "slabs" not in manifest and manifest["format"] == 2
    assert {row["status"] for row in ct_sets(cts, tmp_path, PLAN)} == {"kept", "refused"}
    assert len(PairDataset(tmp_path, FOLDS).sets) == 6


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 2}', '{"format": 2, "bytes": 0}', "\x00", '{"format": 1, "poses": [[0, 0, 0]]}'])
def test_a_manifest_that_is_none_is_refused(text, tmp_path):
    (tmp_path/"manifest.json").write_text(text)
    (tmp_path/"drr.npy").touch()
    assert error_code(lambda: read_set(tmp_path)) == "DAMAGED_SET"


def test_a_patient_keeps_one_fold(tmp_path, cts):
    mine = tmp_path/"cts"
    mine.mkdir()
    for i, name in enumerate(("0123abcd-00000001", "0123abcd-00000002", "89abcdef-00000001")): (mine/f"{name}.nii.gz").write_bytes((cts/f"ct{i}.nii.gz").read_bytes())
    jobs = ct_jobs(mine, tmp_path)
    assert [(job.patient, job.fold) for job in jobs] == [("0123abcd", jobs[0].fold), ("0123abcd", jobs[0].fold), ("89abcdef", 3 - jobs[0].fold)]
    (mine/"folds.csv").write_text("name,patient,fold\n0123abcd-00000001,0123abcd,7\n0123abcd-00000002,0123abcd,7\n")
    rows = ct_sets(mine, tmp_path/"sets", PLAN)
    assert [(row["fold"], row["status"], row["reason"]) for row in rows] == [(7, "made", ""), (7, "made", ""), (None, "refused", "NO_FOLD")]
    manifest = json.loads((tmp_path/"sets"/"0123abcd-00000002"/"manifest.json").read_text())
    write_manifest(tmp_path/"sets"/"0123abcd-00000002", manifest | dict(fold=1))
    for folds in ((7,), (1, 2, 3, 4, 5)): assert error_code(lambda: PairDataset(sets_in(tmp_path/"sets"), folds)) == "SPLIT_PATIENT"


POSES = draw_poses(0).tolist()


def empty_images(path, drrs=511, size=256):
    "DRRs that take up hardly any room: of each but one pixel is on the disk, the rest is a hole in the file"
    with open(path, "wb") as file:
        np.lib.format.write_array_header_1_0(file, dict(descr="<f2", fortran_order=False, shape=(drrs, size, size)))
        begin = file.tell()
        for row in range(drrs): file.seek(begin + 2*row*size*size); file.write(np.float16(1).tobytes())
        file.truncate(begin + 2*drrs*size*size)


def empty_set(folder, images, size=256, fold=1):
    "A set whose images are another name of a file"
    folder.mkdir()
    os.link(images, folder/"drr.npy")
    write_manifest(folder, SetPlan().recipe(Job(folder.name, folder.name, fold, __file__)) | dict(
        patient=folder.name, fold=fold, carm=asdict(CArm(size=size)), poses=POSES, bytes=(folder/"drr.npy").stat().st_size, sha256="0"*64))


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
    print({row["reason"] for row in rows}, [row["fov"] for row in rows])
    assert len(rows) == len(list(found.glob("*.nii.gz"))) == len(read_folds(tmp_path/"folds.csv"))
    made = sets_in(tmp_path)
    assert made and {row["reason"] for row in rows} <= {"", "TOO_SHORT"}
    stored, live = PairDataset(made, FOLDS), OnTheFlyPairs(ct_jobs(found, tmp_path), plan, FOLDS)
    assert len(live.refused) + len(made) == len(rows)
    for a, b in zip(*(tensors(pairs.batch(3, 1, 12)) for pairs in (stored, live))): np.testing.assert_allclose(a, b, atol=2e-3)


def tensors(batch): return batch.input, batch.target, batch.vector


def same(a, b): return all(map(torch.equal, tensors(a), tensors(b)))


def volume(i, side=20):
    "A CT of noise"
    return CT(np.random.default_rng(i).normal(0, 300, (side, side, 30)).astype(np.float32), np.diag([200/side, 200/side, 12, 1]), name=f"v{i:02d}")


@pytest.fixture(scope="module")
def eight(tmp_path_factory):
    "A folder of eight sets"
    folder = tmp_path_factory.mktemp("eight")
    for i in range(8): write_set(volume(i), folder/f"v{i:02d}", draw_poses(i, 21), CArm(size=32, fov=150), fold=1)
    return folder


def spoil(row, value):
    def do(folder):
        images = np.load(folder/"drr.npy", mmap_mode="r+"); images[row] = value; images.flush()
    return do


DAMAGE = dict(cut=lambda folder: os.truncate(folder/"drr.npy", 9_000), longer=lambda folder: os.truncate(folder/"drr.npy", 90_000), gone=lambda folder: (folder/"drr.npy").unlink(),
              folder=lambda folder: ((folder/"drr.npy").unlink(), (folder/"drr.npy").mkdir()), nan=spoil(0, np.nan), infinite=spoil(0, np.inf), black=spoil(slice(None), 3))


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_set_damaged_while_it_is_drawn_from_changes_nothing_else(damage, eight, tmp_path):
    sets = shutil.copytree(eight, tmp_path/"sets")
    data = PairDataset(sets)
    before = [data.batch(1, step, 16) for step in range(4)]
    DAMAGE[damage](sets/"v03")
    after = [data.batch(1, step, 16) for step in range(4)]
    for feed in (PairDataset(sets), PairDataset(sets_in(sets)[::-1]), pickle.loads(pickle.dumps(data))):        # others who know of it before their first batch, or do not
        for step, batch in reversed([*enumerate(after)]):
            parts = [feed.batch(1, step, size, start) for size, start in ((7, 0), (9, 7))]
            assert all(torch.equal(whole, torch.cat(halves)) for whole, halves in zip(tensors(batch), zip(*map(tensors, parts))))
            assert dict(batch.quarantined) == dict(parts[0].quarantined) | dict(parts[1].quarantined)
    assert {name for batch in after for name, _ in batch.quarantined} == {"v03"} and all(batch.input.isfinite().all() for batch in after)
    changed = [torch.equal(a.input[i], b.input[i]) for a, b in zip(before, after) for i in range(16)].count(False)
    assert 2 <= changed <= 20                                                                                  # of 64 pairs, about an eighth
    assert list(PairDataset(sets).quarantined) == (["v03"] if damage in ("cut", "longer", "gone", "folder") else [])     # what a look at the file shows


SPOILT = dict(cut=lambda folder: os.truncate(folder/"slabs.npy", 9_000), gone=lambda folder: (folder/"dense.npy").unlink(), short=lambda folder: os.truncate(folder/"valid.npy", 200),
              nan=lambda folder: fill(folder/"slabs.npy", np.nan), black=lambda folder: fill(folder/"slabs.npy", 0), infinite=lambda folder: fill(folder/"dense.npy", np.inf))


def fill(path, value):
    images = np.load(path, mmap_mode="r+"); images[:] = value; images.flush()


@pytest.mark.parametrize("damage", SPOILT)
def test_slabs_damaged_while_they_are_drawn_from_change_nothing_else(damage, cts, tmp_path):
    ct_sets(cts, tmp_path, WITH_SLABS)
    data, tensors_of = SlabDataset(tmp_path, FOLDS), lambda batch: (batch.slabs, batch.dense, batch.valid, batch.fov)
    before = [data.batch(1, step, 8) for step in range(3)]
    SPOILT[damage](tmp_path/"ct3")
    after = [data.batch(1, step, 8) for step in range(3)]
    for feed in (SlabDataset(tmp_path, FOLDS), pickle.loads(pickle.dumps(data))):
        for step, batch in reversed([*enumerate(after)]):
            parts = [feed.batch(1, step, size, start) for size, start in ((3, 0), (5, 3))]
            assert all(torch.equal(whole, torch.cat(halves)) for whole, halves in zip(tensors_of(batch), zip(*map(tensors_of, parts))))
    assert {name for batch in after for name, _ in batch.quarantined} == {"ct3"} and all(batch.slabs.isfinite().all() for batch in after)
    changed = [torch.equal(a.slabs[i], b.slabs[i]) for a, b in zip(before, after) for i in range(8)].count(False)
    assert 1 <= changed <= 12                                                                                  # of 24 pictures, about a sixth
    assert not PairDataset(tmp_path, FOLDS).quarantined                                                        # pairs do not need slabs


def test_a_set_without_a_manifest_has_no_fold_and_is_named(eight, tmp_path):
    sets = shutil.copytree(eight, tmp_path/"sets")
    (sets/"v03"/"manifest.json").write_text("{")
    data = PairDataset(sets)
    assert list(data.quarantined) == ["v03"] and len(data.sets) == 7
    shutil.rmtree(sets/"v03")
    assert same(PairDataset(sets).batch(0, 0, 32), data.batch(0, 0, 32))
    for path in sets.glob("*/manifest.json"): path.write_text("{}")
    with pytest.raises(RadRotatorError, match=r"1, 2, 3, 4, 5.*\(7 damaged\).*v00") as error: PairDataset(sets)
    assert error.value.code == "ALL_DAMAGED"


def test_a_file_cut_short_during_a_read_is_an_error_and_not_the_end(eight, tmp_path):
    sets = shutil.copytree(eight/"v00", tmp_path/"v00")
    whole, drrs, done, refused = (sets/"drr.npy").read_bytes(), read_set(sets), threading.Event(), 0
    def cut_and_mend():
        with open(sets/"drr.npy", "r+b") as file:
            while not done.is_set(): file.truncate(5_000); file.seek(0); file.write(whole); file.flush()
    thread = threading.Thread(target=cut_and_mend); thread.start()
    until = time.monotonic() + 1
    while time.monotonic() < until:
        try: drrs.read_images([0, 20, 19])
        except RadRotatorError: refused += 1
    done.set(); thread.join()
    assert refused


def test_processes_of_the_background_give_what_a_thread_gives_killed_or_not(cts):
    jobs = [Job(path.name, path.name, 1, path) for path in sorted(cts.iterdir())]
    thread, two = (OnTheFlyPairs(jobs, PLAN, held=2, refresh=1, workers=workers) for workers in (0, 2))
    expected = [thread.batch(0, step, 6) for step in range(16)]
    for step in range(8): assert same(two.batch(0, step, 6), expected[step])
    before = [process for process, _ in two.prefetcher.processes.values()]
    before[0].kill()
    for step in (*range(8, 16), 3): assert same(two.batch(0, step, 6), expected[step])
    assert list(two.refused) == list(thread.refused) == ["slab.nii.gz"] and len(before) == 2
    two.close(); thread.close()
    for process in {*before, *(process for process, _ in two.prefetcher.processes.values())}: process.join(20); assert not process.is_alive()


FATAL = """
import multiprocessing, os, sys, time
sys.path.insert(0, os.getcwd())
from dataclasses import dataclass
import numpy as np
from radrotator.core import RadRotatorError
from radrotator.ct.volume import CT
from radrotator.pairs.live import OnTheFlyPairs
from radrotator.pairs.plan import Job, SetPlan
@dataclass(frozen=True, kw_only=True)
class Plan(SetPlan):
    def load_ct(self, job):
        if job.name == "deadly":
            if multiprocessing.parent_process(): os._exit(9)
            raise RadRotatorError("not in a thread")
        if job.name == "slow": time.sleep(120)
        return CT(np.random.default_rng(len(job.name)).normal(0, 300, (10, 10, 30)).astype(np.float32), np.diag([20.0, 20, 12, 1]))
if __name__ == "__main__":
    plan, job = Plan(drrs=9, size=16, fov=(150, 150)), lambda name: Job(name, name, 1)
    thread, one = (OnTheFlyPairs([job("one"), job("three"), job("deadly")], plan, held=1, refresh=1, workers=workers) for workers in (0, 1))
    for step in range(4): print((thread.batch(0, step, 4).target == one.batch(0, step, 4).target).all().item())
    print(thread.refused, one.refused)
    for feed in (one, thread): feed.prefetcher.submit(job("slow"))
    time.sleep(1)
    print("done", flush=True)
"""


def test_a_job_that_kills_is_refused_and_nothing_outlives_the_program(tmp_path):
    (tmp_path/"script.py").write_text(FATAL)
    run = subprocess.run([sys.executable, tmp_path/"script.py"], capture_output=True, text=True, cwd=ROOT, timeout=100, env=os.environ | dict(OMP_NUM_THREADS="1", NUMBA_NUM_THREADS="1"))
    assert run.returncode == 0 and not run.stderr, run.stderr
    assert run.stdout.startswith("True\n"*4 + "{'deadly': 'not in a thread'} {'deadly': 'deadly: its process was killed") and run.stdout.endswith("done\n")  # well before the 120 seconds of what is under way


def test_memory_stays_flat_over_hundreds_of_refreshes():
    plan, side = SetPlan(drrs=9, size=16, fov=(150, 150)), 64
    source = volume(0, side)                                                                                   # 0.5 MB; a volume made ready has two copies
    jobs = [Job(f"v{i:02d}", "somebody", 1, source) for i in range(9)]
    pairs = OnTheFlyPairs(jobs, plan, held=3, refresh=1)
    resident = lambda: int(Path("/proc/self/statm").read_text().split()[1])*os.sysconf("SC_PAGE_SIZE")/1e6
    def walk(steps):
        for step in steps: pairs.batch(0, step, 4)
        gc.collect()
        return resident(), sum(type(thing) is Renderer for thing in gc.get_objects())
    begin, _ = walk(range(30))
    end, alive = walk(range(30, 230))
    assert end - begin < 40, (begin, end)                                                                      # MB; 200 volumes kept would be 200
    assert alive <= 3 + 2                                                                                      # held, one ready, one under way
