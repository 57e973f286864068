"""DRR sets under rough treatment: killed anywhere, two jobs at once, a full disk, files changed behind our back, a thousand sets."""
import json, os, random, resource, signal, subprocess, sys, time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from radrotator.core import RadRotatorError, sha256, shared_data
from radrotator.ct import CT, write_ct
from radrotator.drr import CArm
from radrotator.pairs import FOLDS, Job, OnTheFlyPairs, PairDataset, SetPlan, ct_jobs, ct_sets, draw_poses, read_folds, read_set, sets_in, write_manifest

ROOT = Path(__file__).parents[1]
PLAN = SetPlan(drrs=41, size=32, fov=(200, 220))
CHILD = """
import json, os, signal, sys
from radrotator.pairs import SetPlan, ct_sets
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
def run(cts, sets, shard, workers, deadly):
    if deadly: die_at(deadly, sets)
    ct_sets(cts, sets, SetPlan(drrs=41, size=32, fov=(200, 220)), shard, workers)
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


def test_killed_at_any_file_it_neither_loses_nor_repeats_a_drr(cts, whole, tmp_path):
    sets, draw, deaths, code = tmp_path/"sets", random.Random(7), 0, None
    with child(tmp_path, stdin=subprocess.PIPE) as runs:
        while code != 0:
            before = stamps(sets)
            print(json.dumps([[str(cts), str(sets), (1, 1), 1, draw.randint(1, 25)]]), file=runs.stdin, flush=True)
            code = int(runs.stdout.readline())
            assert code in (0, -signal.SIGKILL)
            assert {name: stamp for name, stamp in stamps(sets).items() if name in before} == before  # what was whole is not made again
            assert all(whole[f"{path.name}/drr.npy"] == sha256(path/"drr.npy") for path in sets_in(sets))  # what is marked whole is
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
        with pytest.raises(RadRotatorError, match="cannot write DRRs to .*File too large.*what is done stays"): ct_sets(cts, tmp_path, PLAN)
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


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 2}', '{"format": 2, "bytes": 0}', "\x00", '{"format": 1, "poses": [[0, 0, 0]]}'])
def test_a_manifest_that_is_none_is_refused(text, tmp_path):
    (tmp_path/"manifest.json").write_text(text)
    (tmp_path/"drr.npy").touch()
    with pytest.raises(RadRotatorError, match="not a whole DRR set"): read_set(tmp_path)


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
    for folds in ((7,), (1, 2, 3, 4, 5)):
        with pytest.raises(RadRotatorError, match="one patient lies in two folds"): PairDataset(sets_in(tmp_path/"sets"), folds)


POSES = draw_poses(0).tolist()


def empty_set(folder, drrs=511, size=256, fold=1):
    "A set that takes up no room: its images are a hole in the file"
    folder.mkdir()
    with open(folder/"drr.npy", "wb") as file:
        np.lib.format.write_array_header_1_0(file, dict(descr="<f2", fortran_order=False, shape=(drrs, size, size)))
        file.truncate(file.tell() + drrs*size*size*2)
    write_manifest(folder, SetPlan().recipe(Job(folder.name, folder.name, fold, __file__)) | dict(
        patient=folder.name, fold=fold, carm=asdict(CArm(size=size)), poses=POSES, bytes=(folder/"drr.npy").stat().st_size, sha256="0"*64))


def test_a_thousand_sets_open_in_a_second_and_hold_no_file_open(tmp_path):
    for i in range(1000): empty_set(tmp_path/f"{i:04d}", fold=FOLDS[i % 7])
    took = []  # of processor time: others may be using this machine
    for _ in range(3):
        began = time.process_time()
        data = PairDataset(sets_in(tmp_path), FOLDS)
        took.append(time.process_time() - began)
    assert len(data.sets) == 1000 and min(took) < 1, took
    handles = len(os.listdir("/proc/self/fd"))
    for step in range(3): data.batch(0, step, 32)
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
    for a, b in zip(*(vars(pairs.batch(3, 1, 12)).values() for pairs in (stored, live))): np.testing.assert_allclose(a, b, atol=2e-3)
