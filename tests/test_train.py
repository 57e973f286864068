"""Training under rough treatment: killed anywhere, told to stop, on several processes, with a full disk, sets and
checkpoints that are damaged, and a loss that is no number. Every run is the command in a process of its own."""
import base64, io, json, os, random, re, shutil, signal, subprocess, sys
from dataclasses import asdict, replace
from functools import partial
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from processes import QUIET, drop_late_notes, free_port, ranks, serving, wait_until
from radrotator.cli import main
from radrotator.ct.nifti import write_ct
from radrotator.ct.volume import CT
from radrotator.geometry import CArm
from radrotator.model.weights import load_weights
from radrotator.pairs.protocol import draw_poses
from radrotator.pairs.sets import write_set
from radrotator.train.checkpoint import list_checkpoints, read_checkpoint
from radrotator.train.config import RNG_CHUNK, PRESETS, with_settings
from radrotator.train.log import COLUMNS, read_log
from radrotator.train.compute import assign_pairs

RECIPE = {
    "unet.size": "16",
    "unet.channels": "8",
    "unet.multipliers": "1,2",
    "unet.attention": "[]",
    "unet.heads": "2",
    "unet.groups": "4",
    "unet.learned_variance": "true",
    "batch": "16",
    "every": "5",
    "validation": "1",
    "precision": "fp32",
    "warmup": "10",
    "decay": "false",
}
FIGURES = "step pairs loss gradient rate quarantined validation skill".split()  # of the log; the others tell the time
KILL = "signal", "SIGKILL"


def warm_up():
    "Do once what every run would do again"
    import accelerate, torch._dynamo, radrotator.train.feeds, radrotator.train.log
    main(["train", "--help"])
    radrotator.train.log.draw_curves([dict(step=0, loss=1)]).savefig(io.BytesIO(), format="png")


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with serving(tmp_path_factory.mktemp("server"), warm_up) as server: yield server


def typed(*words): return partial(main, [*map(str, words)])


def as_json(call): return typed(*call.args[0], "--json")


def settings(recipe): return [word for key, value in recipe.items() for word in ("--set", f"{key}={value}")]


def train(sets, run, *words, steps=20, workers=0, **changed):
    "The command that trains on sets"
    place = "--data", sets, "-o", run, "--device", "cpu", "--workers", workers
    return typed("train", *place, *settings(RECIPE | changed), "--steps", steps, *words)


def outcome(ended):
    "What a run that went well came to, told as JSON"
    assert ended.status == 0 and "radrotator: " not in ended.err and "Traceback" not in ended.err, ended
    return json.loads(ended.out)


def line(ended):
    "The one line of errors or warnings"
    notices = r".*resource_tracker: .*\n.*warnings\.warn.*\n"  # Python's own, now and then, where a process was killed
    text = re.sub(notices, "", ended.err)
    assert text.startswith("radrotator: ") and text.count("\n") == 1 and "Traceback" not in text, text
    assert len(text) < 600
    return text


def is_refused(ended, code, *values):
    "Refused in one line, with this code, or with any where it is None; with these values in the line"
    assert ended.status == 2, ended
    assert code in (None, ended.code), ended
    text = line(ended)
    for value in values: assert value in text, text


def is_warned(ended, *values):
    "Done, with one line of warning that has these values"
    assert ended.status == 0, ended
    text = line(ended)
    for value in values: assert value in text, text


def kill_at(run, pattern, times=1): return str(run), pattern, times, *KILL


def ball(x):
    "A CT of a ball in a box"
    grid = np.indices((24, 20, 40)).transpose(1, 2, 3, 0) - [11.5, 9.5, 19.5]
    box = np.where(np.abs(grid[..., 0]) < 8, 0.0, -1000.0)
    ball = np.where(np.linalg.norm(grid - [x, 5, 3], axis=-1) < 4, 900, 0)
    return CT((box + ball).astype(np.float32), np.diag([8.0, 8, 8, 1]))


def write_folds(folder, folds):
    "A table of folds, each CT a patient"
    rows = [f"v{i},v{i},{fold}" for i, fold in enumerate(folds)]
    (folder/"folds.csv").write_text("\n".join(["name,patient,fold", *rows, ""]))


def write_balls(folder, count, folds):
    folder.mkdir(exist_ok=True)
    for i in range(count): write_ct(ball(2*i - 4), folder/f"v{i}.nii.gz")
    write_folds(folder, folds)
    return folder


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    "Four sets to train on, one to validate"
    folder = tmp_path_factory.mktemp("sets")
    for i in range(5):
        known = dict(fold=6 if i == 4 else 1, patient=f"v{i}")
        write_set(ball(2*i - 4), folder/f"v{i}", draw_poses(i, 21), CArm(size=16, fov=160), **known)
    return folder


@pytest.fixture(scope="module")
def untold(sets, tmp_path_factory):
    "The same without the one to validate: a validation draws a picture, which takes longer than ten steps"
    folder = tmp_path_factory.mktemp("untold")/"sets"
    return shutil.copytree(sets, folder, ignore=shutil.ignore_patterns("v4"))


@pytest.fixture(scope="module")
def whole(server, sets, tmp_path_factory):
    "A run of 20 steps that nothing interrupted"
    run = tmp_path_factory.mktemp("whole")/"run"
    found = outcome(server(as_json(train(sets, run))))
    assert (found["step"], found["steps"], found["end"]) == (20, 20, "steps")
    return run


@pytest.fixture(scope="module")
def plain(server, untold, tmp_path_factory):
    "The same without a validation, with a row for every step"
    run = tmp_path_factory.mktemp("plain")/"run"
    assert server(train(untold, run, every=1)).went_well
    return run


def tensors(run):
    "Those of the newest checkpoint"
    files = list_checkpoints(run)[-1].glob("*.safetensors")
    return {f"{path.stem}.{key}": tensor for path in files for key, tensor in load_file(path).items()}


def equal(one, other): return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def same(a, b):
    "Whether two runs stand at the same step, with the same bits"
    one, two = tensors(a), tensors(b)
    assert {key.split(".")[0] for key in one} == {"network", "ema", "optimizer"}
    best = [load_weights(run/"weights.safetensors")[0].state_dict() for run in (a, b)]
    return list_checkpoints(a)[-1].name == list_checkpoints(b)[-1].name and equal(one, two) and equal(*best)


def close(a, b):
    "Whether weights are the same but for a few: Lion takes the sign of what may be rounding alone"
    def weights(run):
        named = sorted(tensors(run).items())
        return torch.cat([tensor.flatten() for name, tensor in named if name.startswith("network.")])
    return ((weights(a) - weights(b)).abs() < 1e-6).float().mean() > 0.998


def figures(run): return [{key: row[key] for key in FIGURES if key in row} for row in read_log(run)]


def column(run, name): return [row[name] for row in read_log(run)]


def losses(run): return column(run, "loss")


def hidden(run): return [path.name for path in run.rglob(".*")]


def step_of(path): return read_checkpoint(path)[1]["step"]


def files(folder): return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def has_rows(run, count): return (run/"log.csv").exists() and len(read_log(run)) >= count


# ---- killed, and told to stop ----------------------------------------------------------------------------------------

# What a run leaves behind changes only as it opens, makes, renames or removes something: it is killed just before each
# kind of change, in this order, and each time surely, since it is never done before the last.
DEATHS = [
    ("os.mkdir $", 1),                # the run's folder
    ("open /.run", 2),
    ("os.rename /.run", 1),
    ("os.rename /.log", 1),
    ("open /.weights", 2),            # of step 5
    ("os.rename /.weights", 1),
    ("os.rename /pictures/", 1),
    ("open /log", 1),                 # a row
    ("os.mkdir /.checkpoint", 1),
    ("open .*/state.json", 1),
    ("os.rename /.checkpoint", 1),
    ("shutil.rmtree /.checkpoint", 2),  # the first sweeps up what the death before left; 5 has its name
    ("open /pictures/", 2),           # step 10
    ("os.rename /.checkpoint", 2),    # 10 has its name, 15 not yet
    ("os.mkdir .*/new", 2),           # 15 has its name, 20 not yet
    ("shutil.rmtree /.checkpoint", 2),  # as above; 20 has its name, older ones are not yet removed
]


def test_killed_anywhere_it_ends_in_the_same_weights(server, sets, whole, tmp_path):
    run, draw = tmp_path/"run", random.Random(4)
    deaths = [*DEATHS[:12], *(("", draw.randint(1, 18)) for _ in range(2)), *DEATHS[12:]]  # two that nobody chose
    for death in deaths:
        ended = server(train(sets, run, "--resume"), at=kill_at(run, *death))
        assert ended.was_killed, (death, ended)
        for path in list_checkpoints(run): assert step_of(path) == int(path.name[11:])  # what has its name is whole
    assert list(map(step_of, list_checkpoints(run)))[-1] == 20
    assert server(train(sets, run, "--resume")).went_well
    assert same(run, whole) and figures(run) == figures(whole)
    assert column(run, "step") == [5, 10, 15, 20] and 3 <= len(list_checkpoints(run)) <= 4
    kept = {path.name for path in whole.iterdir()} | {"checkpoint-00000005"}  # killed before it removed this one
    assert not hidden(run) and {path.name for path in run.iterdir()} == kept


def test_told_to_stop_it_saves_this_very_step(server, untold, plain, tmp_path):
    run = tmp_path/"run"
    # as the row of step 5 is written, so that it ends with the next step
    ended = server(as_json(train(untold, run)), at=(str(run), "open /log", 1, "signal", "SIGTERM"))
    found = outcome(ended)
    assert (found["step"], found["end"]) == (6, "signal")
    assert list(map(step_of, list_checkpoints(run))) == [5, 6] and not hidden(run)
    assert server(train(untold, run, "--resume")).went_well
    assert same(run, plain) and column(run, "step") == [5, 6, 10, 15, 20]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_told_to_stop_with_its_readers_while_they_start(number, server, untold, tmp_path):
    "A terminal, and torchrun, send the signal to the whole group of processes"
    run = tmp_path/"run"
    process = server.start(as_json(train(untold, run, steps=10**6, workers=1)))
    wait_until((run/"log.csv").exists)
    os.killpg(process.pid, number)
    assert outcome(server.end(process))["end"] == "signal" and list_checkpoints(run)


def test_one_process_works_in_a_folder(server, untold, tmp_path):
    run = tmp_path/"run"
    first = server.start(as_json(train(untold, run, "--minutes", 3, steps=10**6)))
    wait_until(lambda: has_rows(run, 2))
    is_refused(server(train(untold, run, "--resume", steps=10**6)), "LOCKED", str(run))
    os.kill(first.pid, signal.SIGTERM)
    step = outcome(server.end(first))["step"]
    assert step_of(list_checkpoints(run)[-1]) == step == column(run, "step")[-1]


def resumed_to_the_bit(server, words, tmp_path):
    "A run killed at its second checkpoint, and one that was not, have the same bits; the killed one"
    whole, killed = tmp_path/"whole", tmp_path/"killed"
    assert server(words(killed), at=kill_at(killed, "os.rename /.checkpoint", 2)).was_killed
    for run in (whole, killed): assert server(words(run)).went_well
    assert same(whole, killed) and figures(whole) == figures(killed)
    return killed


def test_half_precision_is_resumed_to_the_bit(server, untold, tmp_path):
    def words(run): return train(untold, run, "--resume", steps=8, precision="bf16", every=4)
    resumed_to_the_bit(server, words, tmp_path)


def train_on_cts(cts, run, *words, **changed):
    place = "--cts", cts, "-o", run, "--device", "cpu", "--workers", 0, "--resume"
    recipe = settings(RECIPE | {"data.fov": "160,160"} | changed)
    return typed("train", *place, "--preset", "paper-tiny", *recipe, *words)


def test_pairs_rendered_while_training_are_resumed_to_the_bit(server, tmp_path):
    cts = write_balls(tmp_path/"cts", 4, [1]*4)
    def words(run): return train_on_cts(cts, run, "--steps", 10, held=2, refresh=3)
    assert step_of(list_checkpoints(resumed_to_the_bit(server, words, tmp_path))[-1]) == 10


def test_cts_without_a_table_of_folds_stay_untouched_and_a_later_one_is_named(server, tmp_path):
    cts, run = tmp_path/"cts", tmp_path/"run"
    cts.mkdir()
    write_ct(ball(0), cts/"first.nii.gz")
    assert server(train_on_cts(cts, run, "--steps", 2)).went_well
    assert [path.name for path in cts.iterdir()] == ["first.nii.gz"]
    write_ct(ball(2), cts/"later.nii.gz")
    is_warned(server(train_on_cts(cts, run, "--steps", 3)), "later")
    assert load_weights(run/"weights.safetensors")[1]["data"]["cts"] == 1


def test_a_run_ends_when_the_average_gets_no_better(server, sets, tmp_path):
    run = tmp_path/"run"
    words = as_json(train(sets, run, "--resume", steps=60, every=1, patience=2, rate=0.01, warmup=0))
    assert outcome(server(words))["end"] == "patience"
    errors = column(run, "validation")
    waited = [step - int(np.argmin(errors[:step + 1])) for step in range(len(errors))]
    assert waited[-1] == 2 and max(waited[:-1]) < 2
    assert load_weights(run/"weights.safetensors")[1]["steps"] == len(errors) - 2
    before = [path.name for path in list_checkpoints(run)]
    assert outcome(server(words))["end"] == "patience"  # and does not begin again
    assert [path.name for path in list_checkpoints(run)] == before


# ---- how it is computed ----------------------------------------------------------------------------------------------

def test_passes_do_not_change_the_loss(server, untold, plain, tmp_path):
    run = tmp_path/"run"
    assert server(train(untold, run, "--together", 8, every=1)).went_well
    np.testing.assert_allclose(losses(run), losses(plain), atol=1e-5, rtol=0)
    assert not same(run, plain) and close(run, plain)


def test_a_process_that_reads_is_killed_and_the_number_of_them_changes_nothing(server, untold, plain, tmp_path):
    run = tmp_path/"run"
    for seconds in (20, 0):  # while a row is written; whenever it may be
        words = train(untold, run, "--resume", workers=1, every=2)
        is_refused(server(words, at=(str(run), "open /log", 2, "worker", seconds)), "READER_KILLED", "--resume")
        assert list_checkpoints(run) and not hidden(run)
    assert server(train(untold, run, "--resume", workers=2)).went_well
    assert same(run, plain)


def test_a_semaphore_that_is_still_there_is_a_leak():
    where = "/usr/lib/python3.11/multiprocessing/resource_tracker.py"
    leak = f"{where}:254: UserWarning: resource_tracker: There appear to be 1 leaked semaphore objects\n  warnings.warn(\n"
    gone = f"{where}:267: UserWarning: resource_tracker: '/mp-tpjkmr02': [Errno 2] No such file or directory\n  warnings.warn(\n"
    assert drop_late_notes(f"before\n{leak}{gone}after\n") == "before\nafter\n"
    for err in (leak, leak.replace("1 leaked", "2 leaked") + gone): assert drop_late_notes(err) == err


def start_together(server, *calls):
    "Begin as torchrun does: one call for all, or one for each rank"
    calls = calls*2 if len(calls) == 1 else calls
    return [server.start(call, env=env) for call, env in zip(calls, ranks(2))]


def test_two_processes_have_the_losses_of_one(untold, plain, tmp_path):
    run = tmp_path/"run"
    torchrun = sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port", free_port()
    command = [*torchrun, "-m", "radrotator.cli", *train(untold, run, every=1).args[0]]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=os.environ | QUIET)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert load_weights(run/"weights.safetensors")[1]["processes"] == 2
    assert len(losses(run)) == 20
    np.testing.assert_allclose(losses(run), losses(plain), atol=1e-5, rtol=0)
    assert close(run, plain)


def test_the_number_of_processes_changes_on_the_way(server, untold, plain, tmp_path):
    run = tmp_path/"run"
    def until(steps): return train(untold, run, "--resume", steps=steps, every=1)
    assert server(until(6)).went_well
    for each in start_together(server, until(13)): assert server.end(each).went_well
    assert server(until(20)).went_well
    np.testing.assert_allclose(losses(run), losses(plain), atol=1e-5, rtol=0)
    assert losses(run)[:6] == losses(plain)[:6] and len(losses(run)) == 20 and close(run, plain)


def test_lost_weights_of_a_run_that_is_done_are_made_again(server, untold, plain, tmp_path):
    "By one process, and by two that have to agree on it"
    run = shutil.copytree(plain, tmp_path/"run")
    for together in (False, True):
        (run/"weights.safetensors").unlink()
        call = train(untold, run, "--resume")
        for each in start_together(server, call) if together else [server.start(call)]:
            assert server.end(each).went_well
        assert close(run, plain)


def test_two_processes_stop_together_where_one_is_told_to(server, untold, tmp_path):
    run = tmp_path/"run"
    both = start_together(server, train(untold, run, "--minutes", 3, steps=10**6))
    wait_until(lambda: has_rows(run, 2))
    os.kill(both[1].pid, signal.SIGTERM)
    for each in both: assert server.end(each).went_well
    step = step_of(list_checkpoints(run)[-1])
    assert step == column(run, "step")[-1] and not hidden(run)
    assert server(train(untold, run, "--resume", steps=step + 1)).went_well
    assert len(set(column(run, "step"))) == len(read_log(run))


def test_two_processes_that_see_different_folders_do_not_begin(server, untold, plain, tmp_path):
    far = shutil.copytree(plain, tmp_path/"far")
    shutil.rmtree(list_checkpoints(far)[-1])
    calls = [train(untold, run, "--resume", steps=40, every=1) for run in (plain, far)]
    for run, each in zip((plain, far), start_together(server, *calls)):
        ended = server.end(each)
        assert (ended.status, ended.code) == (2, "OTHER_FOLDER"), ended


def test_a_batch_that_cannot_be_shared(server, untold, tmp_path):
    for each in start_together(server, train(untold, tmp_path/"run", batch=8)):
        is_refused(server.end(each), "UNEVEN_BATCH", " 8 ", " 2 ", " 16")
    assert not (tmp_path/"run").exists()
    for batch, processes in ((RNG_CHUNK, 1), (3, 1), (48, 3), (64, 4)):
        shares = [assign_pairs(batch, process, processes) for process in range(processes)]
        assert [i for share in shares for i in share] == list(range(batch))


# ---- what lifts ------------------------------------------------------------------------------------------------------

LIFTING = {
    "lift.size": "32",
    "lift.canvas": "48",
    "lift.slabs": "8",
    "lift.channels": "16",
    "lift.multipliers": "1,2",
    "lift.tones": "16",
    "batch": "16",
    "every": "5",
    "validation": "8",
    "precision": "fp32",
}
LIVE = {"held": "2", "refresh": "4", "data.oversample": "1", "data.fov": "160,160"}


def lift(cts, run, *words, **changed):
    "The command that trains on slabs"
    place = "--cts", cts, "-o", run, "--device", "cpu", "--workers", 0, "--resume", "--steps", 10
    return typed("train", *place, "--preset", "tiny", *settings(LIFTING | LIVE | changed), *words)


@pytest.fixture(scope="module")
def bodies(tmp_path_factory):
    "Four CTs to train on, one to validate"
    return write_balls(tmp_path_factory.mktemp("cts"), 5, [1, 1, 1, 1, 6])


@pytest.fixture(scope="module")
def lifted(server, bodies, tmp_path_factory):
    "A run that lifts, and that nothing interrupted, with a row for every step"
    run = tmp_path_factory.mktemp("lifted")/"run"
    assert outcome(server(as_json(lift(bodies, run, every=1))))["step"] == 10
    return run


def test_a_run_that_lifts_is_resumed_to_the_bit(server, bodies, lifted, tmp_path):
    run = tmp_path/"run"
    for count in (2, 3, 3):  # as step 2 gets its name, in the midst of steps that ask about the same slabs; and later
        assert server(lift(bodies, run, every=1), at=kill_at(run, "os.rename /.checkpoint", count)).was_killed
    assert server(lift(bodies, run, every=1)).went_well
    assert same(run, lifted) and figures(run) == figures(lifted) and not hidden(run)
    network, about = load_weights(run/"weights.safetensors")
    assert network.config.slabs == 8 and "depth_error" in about and about["training"]["lift"]["canvas"] == 48


def test_a_watched_ct_is_never_learned_from_and_helps_to_choose(server, bodies, lifted, tmp_path):
    run, other = tmp_path/"run", tmp_path/"other.nii.gz"
    write_ct(ball(9), other)
    assert server(lift(bodies, run, "--watch", other, every=5)).went_well
    rows = [row for row in read_log(run) if "watched" in row]
    assert [row["step"] for row in rows] == [5, 10] and all(0 < row["watched_depth_error"] < 50 for row in rows)
    without = losses(lifted)
    assert losses(run) == pytest.approx([np.mean(without[:5]), np.mean(without[5:])], rel=1e-5)
    _, about = load_weights(run/"weights.safetensors")
    assert about["steps"] == min(rows, key=lambda row: row["validation"] + row["watched"])["step"]
    assert about["watched_skill"] < 1 and "other" not in str(about)  # a file may bear a patient's name


@pytest.mark.parametrize("name, code", [("v1.nii.gz", "WATCHED"), ("none.nii.gz", "NO_FILE")])
def test_what_cannot_be_watched(name, code, server, bodies, tmp_path):
    is_refused(server(lift(bodies, tmp_path/"run", "--watch", bodies/name)), code, name.split(".")[0])


def test_slabs_read_from_sets_are_trained_on_and_resumed_to_the_bit(server, bodies, tmp_path):
    "Rendered by the command, read by none and by two processes"
    sets, whole, run = tmp_path/"sets", tmp_path/"whole", tmp_path/"run"
    rendered = "--drrs", 3, "--size", 32, "--fov", 160, "--slabs", 8, "--device", "cpu"
    assert server(typed("pairs", bodies, "-o", sets, *rendered)).went_well
    def words(run, workers):
        place = "--data", sets, "-o", run, "--device", "cpu", "--workers", workers, "--resume", "--steps", 6
        return typed("train", *place, "--preset", "tiny", *settings(LIFTING))
    assert server(words(whole, 0)).went_well
    assert server(words(run, 2), at=kill_at(run, "os.rename /.checkpoint", 2)).was_killed
    assert server(words(run, 2)).went_well
    assert same(run, whole) and losses(run) == losses(whole)
    assert "depth_error" in load_weights(run/"weights.safetensors")[1]


@pytest.mark.parametrize("early", [0, 0.5])
def test_two_processes_lift_as_one_does(early, server, bodies, lifted, tmp_path):
    "Also where some of what is trained is not asked for in every pass, and the first steps know the patients of both"
    one, run = lifted, tmp_path/"two"
    words, changed = (), {"every": 1}
    if early:
        one, words, changed = tmp_path/"one", ("--together", 8), {"every": 5, "lifting.early": early}
        assert server(lift(bodies, one, **changed)).went_well
    for each in start_together(server, lift(bodies, run, *words, **changed)): assert server.end(each).went_well
    np.testing.assert_allclose(losses(run), losses(one), rtol=1e-3)
    for name in ("network.population", "network.tone.bank"): assert torch.equal(tensors(run)[name], tensors(one)[name])


def test_what_cannot_be_lifted_is_one_line(server, bodies, sets, lifted, tmp_path):
    run = tmp_path/"run"
    of_sets = typed("train", "--data", sets, "--preset", "tiny", "-o", tmp_path/"d", "--device", "cpu")
    begun = shutil.copytree(lifted, tmp_path/"e")
    otherwise = typed("train", "--cts", bodies, "-o", begun, "--resume", "--device", "cpu", "--set", "lift.slabs=12")
    cases = [
        (lift(bodies, run, rate=1e30, warmup=0, every=1), "NOT_FINITE", ["step 2"]),
        (lift(bodies, tmp_path/"a", **{"lift.canvas": 50}), None, ["canvas", "50", "32"]),
        (lift(bodies, tmp_path/"b", **{"lifting.view": -1}), "BAD_SETTING", ["view", "-1.0"]),
        (lift(bodies, tmp_path/"c", **{"unet.size": 32}), "IDLE_SETTING", ["unet.size"]),
        (of_sets, "NO_SLABS", []),
        (otherwise, "OTHER_SETTING", ["lift.slabs", "8", "12"]),
    ]
    running = [server.start(call) for call, *_ in cases]
    for process, (_, code, values) in zip(running, cases): is_refused(server.end(process), code, *values)
    assert step_of(list_checkpoints(run)[-1]) == 1 and all(tensor.isfinite().all() for tensor in tensors(run).values())


# ---- what goes wrong -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("where", ["open /.weights", "os.mkdir /.checkpoint"])
def test_a_full_disk_is_one_line_and_costs_no_checkpoint(where, server, untold, plain, tmp_path):
    run = tmp_path/"run"
    is_refused(server(train(untold, run), at=(str(run), where, 3, "full", 20_000)), "NOT_WRITTEN", str(run))
    assert not hidden(run) and list(map(step_of, list_checkpoints(run))) == [5]
    assert server(train(untold, run, "--resume")).went_well
    assert same(run, plain)


def test_a_loss_that_is_no_number(server, untold, tmp_path):
    run = tmp_path/"run"
    ended = server(train(untold, run, every=1, rate=1e30, warmup=0))
    is_refused(ended, "NOT_FINITE")
    step = int(re.search(r"step (\d+)", ended.err)[1])
    assert 1 < step <= 20 and not hidden(run) and step_of(list_checkpoints(run)[-1]) == step - 1
    assert all(tensor.isfinite().all() for tensor in tensors(run).values())


def test_a_set_damaged_before_is_counted_and_told_once(server, untold, plain, tmp_path):
    damaged, runs = shutil.copytree(untold, tmp_path/"sets"), (tmp_path/"whole", tmp_path/"killed")
    os.truncate(damaged/"v1"/"drr.npy", 3_000)
    words = [train(damaged, run, "--resume") for run in runs]
    assert server(words[1], at=kill_at(runs[1], "os.rename /.checkpoint", 2)).was_killed
    for each in words: is_warned(server(each), "v1")
    assert same(*runs) and column(runs[0], "quarantined") == [1]*4
    assert losses(runs[0]) == losses(runs[1])
    last = "network.out.2.weight"
    assert not torch.equal(tensors(runs[0])[last], tensors(plain)[last])


def test_a_set_damaged_while_it_runs(server, untold, plain, tmp_path):
    mine, run = shutil.copytree(untold, tmp_path/"sets"), tmp_path/"run"
    cut = "cut", str(mine/"v2"/"drr.npy"), 3_000
    is_warned(server(train(mine, run, every=1), at=(str(run), "open /log", 7, *cut)), "v2")
    assert losses(run)[:6] == losses(plain)[:6] and np.isfinite(losses(run)).all() and len(losses(run)) == 20
    counted = column(run, "quarantined")
    assert counted == sorted(counted) and set(counted[:6]) == {0} and counted[-1] == 1


def flip(path):
    "One bit in the middle"
    content = bytearray(path.read_bytes())
    content[len(content)//2] ^= 1
    path.write_bytes(content)


BROKEN = dict(
    cut=lambda folder: os.truncate(folder/"optimizer.safetensors", 5_000),
    flipped=lambda folder: flip(folder/"network.safetensors"),
    garbage=lambda folder: (folder/"state.json").write_text('{"step": 20'),
    gone=lambda folder: (folder/"ema.safetensors").unlink(),
    empty=lambda folder: [path.unlink() for path in folder.iterdir()],
)


def test_a_broken_checkpoint_falls_back_to_the_one_before(server, untold, plain, tmp_path):
    begun = []
    for name, spoil in BROKEN.items():
        run = shutil.copytree(plain, tmp_path/name)
        spoil(list_checkpoints(run)[-1])
        begun.append((run, server.start(train(untold, run, "--resume", every=1))))
    for run, process in begun:
        is_warned(server.end(process), "checkpoint-00000020")
        assert same(run, plain) and figures(run) == figures(plain)


def test_where_all_are_broken_it_says_so_and_begins_nothing(server, untold, plain, tmp_path):
    run = shutil.copytree(plain, tmp_path/"run")
    for path in list_checkpoints(run): BROKEN["cut"](path)
    for _ in range(2):  # a scheduler asks again
        is_refused(server(train(untold, run, "--resume", every=1)), "NO_CHECKPOINT", str(run), " 3 ")
    assert figures(run) == figures(plain) and load_weights(run/"weights.safetensors")[1]["steps"] == 20


OTHER = RECIPE | {"unet.channels": "12"}
OTHERWISE = [  # more words, the code of the refusal, and the values that its line must have
    ("--resume --set rate=1e-3", "OTHER_SETTING", ["rate", "0.0003", "0.001"]),
    (" ".join(["--resume", *settings(OTHER)]), "OTHER_SETTING", ["unet.channels", "8", "12"]),
    ("--resume --seed 3", "OTHER_SETTING", ["seed", "0", "3"]),
    ("--resume --preset paper", "OTHER_SETTING", ["preset"]),
    ("--resume --phantoms 3", "OTHER_SETTING", ["phantoms", "3"]),
    ("--resume --set data.one_axis=0", "OTHER_SETTING", ["data.one_axis", "0"]),
    ("", "RUN_EXISTS", []),
]


def test_what_is_resumed_otherwise_is_refused_by_name(server, untold, plain, tmp_path):
    run = shutil.copytree(plain, tmp_path/"run")
    before = files(run)
    words = "train", "--data", untold, "-o", run, "--device", "cpu", "--workers", 0
    running = [server.start(typed(*words, *more.split())) for more, *_ in OTHERWISE]
    for process, (_, code, values) in zip(running, OTHERWISE): is_refused(server.end(process), code, *values)
    assert files(run) == before


def test_what_goes_without_saying_may_be_said(server, untold, plain, tmp_path):
    run = shutil.copytree(plain, tmp_path/"run")
    assert server(train(untold, run, "--resume", "--preset", "paper-tiny", "--seed", 0, every=1)).went_well


def test_a_run_killed_as_it_began_begins(server, untold, plain, tmp_path):
    run = tmp_path/"run"
    run.mkdir()
    (run/".run-abc.json").write_text("{")
    assert server(train(untold, run, "--resume")).went_well
    assert same(run, plain) and not hidden(run)


def test_a_finished_run_stays_as_it_is(server, untold, plain, tmp_path):
    run = shutil.copytree(plain, tmp_path/"run")
    before = files(run)
    found = outcome(server(typed("train", "-o", run, "--resume", "--device", "cpu", "--workers", 0, "--json")))
    assert (found["step"], found["end"]) == (20, "steps")
    assert files(run) == before


# ---- what is left behind ---------------------------------------------------------------------------------------------

def plain_json(config): return json.loads(json.dumps(asdict(config)))


def test_weights_say_how_they_were_made_and_nothing_of_this_machine(whole, sets):
    network, about = load_weights(whole/"weights.safetensors")
    assert about["training"] == plain_json(replace(with_settings(PRESETS["paper-tiny"], RECIPE), steps=20))
    assert about["training"]["unet"] == plain_json(network.config)
    assert network.config.channels == 8 and about["training"]["warmup"] == 10
    assert (about["steps"], about["samples"]) == (20, 320)
    assert about["data"] == dict(sets=4, folder=sets.name)
    assert about["command"].startswith("radrotator train ") and "unet.channels=8" in about["command"]
    with open(whole/"weights.safetensors", "rb") as file:
        header = file.read(int.from_bytes(file.read(8), "little")).decode()
    assert not re.search(r"(^|[\s\"'=])/\w+/", header)
    assert str(sets.parent) not in header and str(Path.home()) not in header


def test_weights_know_what_they_began_from_also_after_a_stop(server, untold, plain, tmp_path):
    run = tmp_path/"run"
    weights = Path(shutil.copy(plain/"weights.safetensors", tmp_path))
    words = train(untold, run, "--init", weights, "--resume", steps=6)
    assert server(words, at=(str(run), "open /log", 1, "signal", "SIGTERM")).went_well
    begun = load_weights(run/"weights.safetensors")[1]["init"]
    weights.unlink()  # what is in the checkpoint is not read again
    assert server(words).went_well
    assert begun["steps"] == 20 and load_weights(run/"weights.safetensors")[1]["init"] == begun


class Page(HTMLParser):
    "Whether every tag is closed, and what pages and pictures it refers to"
    def __init__(self, text):
        super().__init__()
        self.open, self.links, self.tags = [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        if tag not in ("meta", "img", "br", "hr", "link"): self.open.append(tag)
        linking = "src", "href", "action", "data", "poster", "srcset"
        self.links += [value for name, value in attributes if name in linking]

    def handle_endtag(self, tag): assert self.open.pop() == tag


def test_a_report_is_one_file(server, sets, whole, tmp_path):
    half = tmp_path/"half"
    assert server(train(sets, half), at=kill_at(half, "os.rename /.checkpoint", 2)).was_killed
    for run, newest in ((whole, "checkpoint-00000020"), (half, "checkpoint-00000005")):
        assert main(["report", str(run), "-o", str(tmp_path/f"{newest}.html")]) == 0
        text = (tmp_path/f"{newest}.html").read_text()
        page = Page(text)
        assert newest in text and "unet.channels" in text
        assert page.tags.count("img") == 3 == len(page.links) and not {"script", "link", "iframe"} & set(page.tags)
        for link in page.links:
            kind, content = link.split(",", 1)
            assert kind == "data:image/png;base64" and base64.b64decode(content).startswith(b"\x89PNG\r\n")
        assert not re.search(r"url\(|@import|https?:", text.split("<body>")[0])
    assert main(["report", str(half)]) == 0 and (half/"report.html").exists()


def test_events_can_be_read_back(server, untold, plain, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    run = tmp_path/"run"
    words = train(untold, run, "--tensorboard", "--resume", steps=6, every=1)
    assert server(words, at=kill_at(run, "os.rename /.checkpoint", 4)).was_killed
    ended = server(words)
    assert ended.status == 0 and "Traceback" not in ended.err
    events = EventAccumulator(str(run/"events")).Reload()
    of_validation = "validation skill depth_error watched watched_skill watched_depth_error".split()
    assert set(events.Tags()["scalars"]) == set(COLUMNS) - {"step", *of_validation}
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3, 4, 5, 6]
    np.testing.assert_allclose([event.value for event in events.Scalars("loss")], losses(run), rtol=1e-6)
    assert losses(run) == losses(plain)[:6]
