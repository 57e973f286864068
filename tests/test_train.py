"""Training under rough treatment: killed anywhere, told to stop, on several processes, with a full disk, sets and checkpoints that are damaged, and a loss that is no number. Every run is a process of its own and, but for a few, the command."""
import base64, json, os, random, re, shutil, signal, socket, subprocess, sys, time
from dataclasses import asdict, replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from radrotator.cli import main
from radrotator.ct.nifti import write_ct
from radrotator.ct.volume import CT
from radrotator.geometry import CArm
from radrotator.pairs.protocol import draw_poses
from radrotator.pairs.sets import write_set
from radrotator.train.checkpoint import list_checkpoints, read_checkpoint
from radrotator.train.config import RNG_CHUNK, PRESETS, with_settings
from radrotator.train.log import COLUMNS, read_log
from radrotator.train.machine import assign_pairs
from radrotator.model.weights import load_weights

ROOT = Path(__file__).parents[1]
QUIET = dict(OMP_NUM_THREADS="1", NUMBA_NUM_THREADS="1", PYTHONPATH=os.environ.get("PYTHONPATH", str(ROOT)))
RECIPE = {"unet.size": "16", "unet.channels": "8", "unet.multipliers": "1,2", "unet.attention": "[]", "unet.heads": "2", "unet.groups": "4", "unet.learned_variance": "true",
          "batch": "16", "every": "5", "validation": "1", "precision": "fp32", "warmup": "10", "decay": "false"}
FIGURES = "step", "pairs", "loss", "gradient", "rate", "quarantined", "validation", "skill"   # of the log; the others tell the time
SERVER = """
import contextlib, gc, io, json, multiprocessing.util, os, re, resource, signal, sys, threading, time, traceback
from pathlib import Path
WRITES = os.O_WRONLY | os.O_RDWR
def children(pid):
    return [int(child) for path in Path(f"/proc/{pid}/task").glob("*/children") for child in path.read_text().split()]
def act(what, *about):
    if what == "signal": os.kill(os.getpid(), getattr(signal, *about))
    if what == "full": resource.setrlimit(resource.RLIMIT_FSIZE, (*about, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))  # no file grows beyond so many bytes
    if what == "cut": os.truncate(*about)
    if what == "worker":
        os.kill(next(pid for pid in children(os.getpid()) if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()), signal.SIGKILL)
        time.sleep(*about)  # PyTorch tells of it in the middle of anything
def watch(folder, pattern, times, *what):
    "Count whenever something in a folder is about to be opened for writing, made, renamed or removed, and its description matches; at a count, act."
    seen = []
    def hook(event, about):
        if event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree") or event == "open" and (about[2] or 0) & WRITES:
            path = str(about[0])
            if path.startswith(folder) and re.search(pattern, f"{event} {path[len(folder):]}"):
                seen.append(event)
                if len(seen) == times: act(*what)
    sys.addaudithook(hook)
def wait_and_act(seconds, *what):
    "Act after so much processor time"
    while time.process_time() < seconds: time.sleep(0.0005)
    act(*what)
def child(words, out, env={}, at=None, after=None):
    for number, name in ((1, "out"), (2, "err")): os.dup2(os.open(f"{out}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.environ.update(env)
    if at: watch(*at)
    if after: threading.Thread(target=wait_and_act, args=after, daemon=True).start()
    try: code = radrotator.cli.main(words)
    except BaseException: traceback.print_exc(); code = 1
    multiprocessing.util._run_finalizers()   # what a process does that ends by itself: else semaphores of the readers are told of as leaked
    sys.stdout.flush(); sys.stderr.flush()
    os._exit(code)
if __name__ == "__main__":  # the processes are forked, since to import torch takes longer than all the rest
    import accelerate, torch._dynamo, radrotator.cli, radrotator.train.feeds, radrotator.train.log
    with contextlib.redirect_stdout(None): radrotator.cli.main(["train", "--help"])
    radrotator.train.log.draw_curves([dict(step=0, loss=1)]).savefig(io.BytesIO(), format="png")
    gc.freeze()             # or every process would copy all this as it looks for garbage
    for line in sys.stdin:
        asked = json.loads(line)
        if "wait" in asked: print(os.waitstatus_to_exitcode(os.waitpid(asked["wait"], 0)[1]), flush=True)
        elif pid := os.fork(): print(pid, flush=True)
        else: child(**asked)
"""


class Server:
    "Where the command runs in processes of their own"
    def __init__(self, folder):
        (folder/"server.py").write_text(SERVER)
        self.folder, self.count, self.running = folder, 0, set()
        self.process = subprocess.Popen([sys.executable, folder/"server.py"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=os.environ | QUIET)

    def ask(self, **what):
        print(json.dumps(what), file=self.process.stdin, flush=True)
        return int(self.process.stdout.readline())

    def start(self, *words, **how):
        "Begin; (process, where its output goes)"
        self.count += 1
        out = str(self.folder/f"output{self.count}")
        pid = self.ask(words=list(map(str, words)), out=out, **how)
        self.running.add(pid)
        return pid, out

    def end(self, pid, out):
        "Wait; (status, output, errors)"
        code = self.ask(wait=pid)
        self.running.discard(pid)
        return code, *(Path(f"{out}.{name}").read_text() for name in ("out", "err"))

    def __call__(self, *words, **how): return self.end(*self.start(*words, **how))


def settings(**other):
    return [word for key, value in (RECIPE | other).items() for word in ("--set", f"{key}={value}")]


def command(sets, run, *words, workers=0, **other):
    "What to type"
    return "train", "--data", sets, "-o", run, "--device", "cpu", "--workers", workers, *settings(**other), *words


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = Server(tmp_path_factory.mktemp("server"))
    yield server
    for pid in server.running: os.kill(pid, signal.SIGKILL)
    server.process.communicate()


def ball(x):
    "A CT of a ball in a box"
    grid = np.indices((24, 20, 40)).transpose(1, 2, 3, 0) - [11.5, 9.5, 19.5]
    hu = np.where(np.abs(grid[..., 0]) < 8, 0.0, -1000.0) + np.where(np.linalg.norm(grid - [x, 5, 3], axis=-1) < 4, 900, 0)
    return CT(hu.astype(np.float32), np.diag([8.0, 8, 8, 1]))


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    "Four sets to train on, one to validate"
    folder = tmp_path_factory.mktemp("sets")
    for i in range(5): write_set(ball(2*i - 4), folder/f"v{i}", draw_poses(i, 21), CArm(size=16, fov=160), fold=6 if i == 4 else 1, patient=f"v{i}")
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
    code, out, err = server(*command(sets, run, "--steps", 20))
    assert (code, err) == (0, "") and "20 of 20 steps" in out
    return run


@pytest.fixture(scope="module")
def plain(server, untold, tmp_path_factory):
    "The same without a validation, with a row for every step"
    run = tmp_path_factory.mktemp("plain")/"run"
    assert server(*command(untold, run, "--steps", 20, every=1))[::2] == (0, "")
    return run


def tensors(run):
    "Those of the newest checkpoint"
    return {f"{path.stem}.{key}": tensor for path in list_checkpoints(run)[-1].glob("*.safetensors") for key, tensor in load_file(path).items()}


def same(a, b):
    "Whether two runs stand at the same step, with the same bits"
    one, two = tensors(a), tensors(b)
    best = [load_weights(run/"weights.safetensors")[0].state_dict() for run in (a, b)]
    assert {key.split(".")[0] for key in one} == {"network", "ema", "optimizer"}
    return list_checkpoints(a)[-1].name == list_checkpoints(b)[-1].name and one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one) and all(torch.equal(best[0][key], best[1][key]) for key in best[0])


def close(a, b):
    "Whether weights are the same but for a few: Lion takes the sign of what may be rounding alone"
    one, two = (torch.cat([tensor.flatten() for name, tensor in sorted(tensors(run).items()) if name.startswith("network.")]) for run in (a, b))
    return ((one - two).abs() < 1e-6).float().mean() > 0.998


def figures(run): return [{key: row[key] for key in FIGURES if key in row} for row in read_log(run)]


def losses(run): return [row["loss"] for row in read_log(run)]


def hidden(run): return [path.name for path in run.rglob(".*")]


def sentence(err, words):
    "That the errors are one sentence, and say so"
    err = re.sub(r".*resource_tracker: .*\n.*warnings\.warn.*\n", "", err)   # Python's own notices (leaked; already gone), now and then, where a process was killed
    assert err.startswith("radrotator: ") and err.count("\n") == 1 and "Traceback" not in err and len(err) < 600, err
    assert re.search(words, err), err


def until(condition, seconds=60):
    "Wait"
    end = time.monotonic() + seconds
    while not condition(): assert time.monotonic() < end, "it takes too long"; time.sleep(0.005)


def rows(run): return len(read_log(run)) if (run/"log.csv").exists() else 0



# Killed, and told to stop -------------------------------------------------

KILL = "signal", "SIGKILL"
DEATHS = ("os.mkdir /.checkpoint", 1), ("os.mkdir .*/new", 1), ("open .*/state.json", 1), ("os.rename /.checkpoint", 2), ("open /pictures/", 1), ("open /.weights", 2), ("shutil.rmtree", 2), ("open /log", 2)


def test_killed_anywhere_it_ends_in_the_same_weights(server, sets, whole, tmp_path):
    run, draw, codes = tmp_path/"run", random.Random(3), []
    ways = [dict(at=(str(run), *death, *KILL)) for death in DEATHS]
    ways += [dict(at=(str(run), "", draw.randint(1, 50), *KILL)) for _ in range(2)] + [dict(after=(draw.uniform(0.02, 1.0), *KILL)) for _ in range(3)]
    draw.shuffle(ways)
    for way in ways:
        codes.append(server(*command(sets, run, "--steps", 20, "--resume"), **way)[0])
        assert codes[-1] in (0, -signal.SIGKILL)
        for path in list_checkpoints(run): assert read_checkpoint(path)[1]["step"] == int(path.name[11:])   # what has its name is whole
    code, _, err = server(*command(sets, run, "--steps", 20, "--resume"))
    assert (code, err) == (0, "") and codes.count(-signal.SIGKILL) >= 8
    assert same(run, whole) and figures(run) == figures(whole)
    assert [row["step"] for row in read_log(run)] == [5, 10, 15, 20] and 3 <= len(list_checkpoints(run)) <= 4
    assert not hidden(run) and {path.name for path in run.iterdir()} == {path.name for path in whole.iterdir()}


def test_told_to_stop_it_saves_this_very_step(server, untold, plain, tmp_path):
    run = tmp_path/"run"
    code, out, err = server(*command(untold, run, "--steps", 20), at=(str(run), "open /log", 1, "signal", "SIGTERM"))   # as the row of step 5 is written, so that it ends with the next step
    assert (code, err) == (0, "") and "6 of 20 steps" in out and "asked to stop" in out
    assert [path.name for path in list_checkpoints(run)] == ["checkpoint-00000005", "checkpoint-00000006"] and not hidden(run)
    assert server(*command(untold, run, "--steps", 20, "--resume"))[::2] == (0, "")
    assert same(run, plain) and [row["step"] for row in read_log(run)] == [5, 6, 10, 15, 20]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_told_to_stop_with_its_readers_while_they_start(number, untold, tmp_path):
    "A terminal, and torchrun, send the signal to the whole group of processes"
    run = tmp_path/"run"
    process = subprocess.Popen([sys.executable, "-m", "radrotator.cli", *map(str, command(untold, run, "--steps", 10**6, workers=1))], env=os.environ | QUIET, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    until(lambda: (run/"log.csv").exists())
    os.killpg(process.pid, number)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0 and "it was asked to stop" in out, err
    assert list_checkpoints(run)


def test_one_process_works_in_a_folder(server, untold, tmp_path):
    run = tmp_path/"run"
    first = server.start(*command(untold, run, "--steps", 1_000_000, "--minutes", 3))
    until(lambda: rows(run) > 1)
    code, _, err = server(*command(untold, run, "--steps", 1_000_000, "--resume"))
    assert code == 2; sentence(err, "another process is at work")
    os.kill(first[0], signal.SIGTERM)
    code, out, err = server.end(*first)
    assert (code, err) == (0, "")
    step = int(re.search(r"(\d+) of 1000000 steps", out)[1])
    assert read_checkpoint(list_checkpoints(run)[-1])[1]["step"] == step == read_log(run)[-1]["step"]


def test_half_precision_is_resumed_to_the_bit(server, untold, tmp_path):
    runs = tmp_path/"whole", tmp_path/"killed"
    words = [command(untold, run, "--steps", 8, "--resume", precision="bf16", every=4) for run in runs]
    assert server(*words[1], at=(str(runs[1]), "os.rename /.checkpoint", 2, *KILL))[0] == -signal.SIGKILL
    for each in words: assert server(*each)[::2] == (0, "")
    assert same(*runs) and figures(runs[0]) == figures(runs[1])


def test_pairs_rendered_while_training_are_resumed_to_the_bit(server, tmp_path):
    cts, runs = tmp_path/"cts", (tmp_path/"whole", tmp_path/"killed")
    cts.mkdir()
    for i in range(4): write_ct(ball(2*i - 4), cts/f"v{i}.nii.gz")
    (cts/"folds.csv").write_text("name,patient,fold\n" + "".join(f"v{i},v{i},1\n" for i in range(4)))
    words = [("train", "--cts", cts, "--preset", "paper-tiny", "-o", run, "--device", "cpu", "--workers", 0, *settings(**{"data.fov": "160,160", "held": 2, "refresh": 3}), "--steps", 10, "--resume") for run in runs]
    assert server(*words[1], at=(str(runs[1]), "os.rename /.checkpoint", 2, *KILL))[0] == -signal.SIGKILL
    for each in words: assert server(*each)[::2] == (0, "")
    assert same(*runs) and figures(runs[0]) == figures(runs[1]) and read_checkpoint(list_checkpoints(runs[1])[-1])[1]["step"] == 10


def test_cts_without_a_table_of_folds_stay_untouched_and_a_later_one_is_named(server, tmp_path):
    cts, run = tmp_path/"cts", tmp_path/"run"
    cts.mkdir(); write_ct(ball(0), cts/"first.nii.gz")
    words = lambda n: ("train", "--cts", cts, "--preset", "paper-tiny", "-o", run, "--device", "cpu", "--workers", 0, *settings(**{"data.fov": "160,160"}), "--steps", n, "--resume")
    assert server(*words(2))[::2] == (0, "") and [path.name for path in cts.iterdir()] == ["first.nii.gz"]
    write_ct(ball(2), cts/"later.nii.gz")
    code, _, err = server(*words(3))
    assert code == 0; sentence(err, "later is not in the table of folds")
    assert load_weights(run/"weights.safetensors")[1]["data"]["cts"] == 1


def test_a_run_ends_when_the_average_gets_no_better(server, sets, tmp_path):
    run = tmp_path/"run"
    words = command(sets, run, "--steps", 60, "--resume", every=1, patience=2, rate=0.01, warmup=0)
    code, out, err = server(*words)
    assert (code, err) == (0, "") and "no longer improves" in out
    examined = [row["validation"] for row in read_log(run)]
    waited = [step - int(np.argmin(examined[:step + 1])) for step in range(len(examined))]
    assert waited[-1] == 2 and max(waited[:-1]) < 2 and load_weights(run/"weights.safetensors")[1]["steps"] == len(examined) - 2
    before = [path.name for path in list_checkpoints(run)]
    assert "no longer improves" in server(*words)[1] and [path.name for path in list_checkpoints(run)] == before   # and does not begin again


# How it is computed -------------------------------------------------------

def test_passes_do_not_change_the_loss(server, untold, plain, tmp_path):
    run = tmp_path/"run"
    assert server(*command(untold, run, "--steps", 20, "--together", 8, every=1))[::2] == (0, "")
    np.testing.assert_allclose(losses(run), losses(plain), atol=1e-5, rtol=0)
    assert not same(run, plain) and close(run, plain)


def test_a_process_that_reads_is_killed_and_the_number_of_them_changes_nothing(server, untold, plain, tmp_path):
    run = tmp_path/"run"
    for seconds in (20, 0):  # while a row is written; whenever it may be
        code, _, err = server(*command(untold, run, "--steps", 20, "--resume", workers=1, every=2), at=(str(run), "open /log", 2, "worker", seconds))
        assert code == 2; sentence(err, "a process that reads pairs was killed.*--resume")
        assert list_checkpoints(run) and not hidden(run)
    assert server(*command(untold, run, "--steps", 20, "--resume", workers=2))[::2] == (0, "")
    assert same(run, plain)


def free_port():
    with socket.socket() as taken: taken.bind(("127.0.0.1", 0)); return str(taken.getsockname()[1])


def two(server, *words):
    "Begin in two processes, as torchrun does"
    common = dict(WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=free_port())
    return [server.start(*words, env=common | dict(RANK=str(rank), LOCAL_RANK=str(rank))) for rank in range(2)]


def test_two_processes_have_the_losses_of_one(untold, plain, tmp_path):
    run = tmp_path/"run"
    torchrun = sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port", free_port(), "-m", "radrotator.cli"
    done = subprocess.run([*torchrun, *map(str, command(untold, run, "--steps", 20, every=1))], capture_output=True, text=True, timeout=300, env=os.environ | QUIET)
    assert done.returncode == 0 and "2 processes" in done.stdout and "Traceback" not in done.stderr, done.stderr
    assert len(losses(run)) == 20
    np.testing.assert_allclose(losses(run), losses(plain), atol=1e-5, rtol=0)
    assert close(run, plain)


def test_the_number_of_processes_changes_on_the_way(server, untold, plain, tmp_path):
    run = tmp_path/"run"
    step = lambda n: command(untold, run, "--steps", n, "--resume", every=1)
    assert server(*step(6))[::2] == (0, "")
    for each in two(server, *step(13)): assert server.end(*each)[::2] == (0, "")
    assert server(*step(20))[::2] == (0, "")
    np.testing.assert_allclose(losses(run), losses(plain), atol=1e-5, rtol=0)
    assert losses(run)[:6] == losses(plain)[:6] and len(losses(run)) == 20 and close(run, plain)


def test_two_processes_stop_together_where_one_is_told_to(server, untold, tmp_path):
    run = tmp_path/"run"
    both = two(server, *command(untold, run, "--steps", 1_000_000, "--minutes", 3))
    until(lambda: rows(run) > 1)
    os.kill(both[1][0], signal.SIGTERM)
    for each in both: assert server.end(*each)[::2] == (0, "")
    step = read_checkpoint(list_checkpoints(run)[-1])[1]["step"]
    assert step == read_log(run)[-1]["step"] and not hidden(run)
    assert server(*command(untold, run, "--steps", step + 1, "--resume"))[::2] == (0, "") and rows(run) == len({row["step"] for row in read_log(run)})


def test_two_processes_that_see_different_folders_do_not_begin(server, untold, plain, tmp_path):
    far = shutil.copytree(plain, tmp_path/"far")
    shutil.rmtree(list_checkpoints(far)[-1])
    common = dict(WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=free_port())
    for each in [server.start(*command(untold, run, "--steps", 40, "--resume", every=1), env=common | dict(RANK=str(rank), LOCAL_RANK=str(rank))) for rank, run in enumerate((plain, far))]:
        code, _, err = server.end(*each)
        assert code == 2 and re.search("different checkpoints there .* one folder", err), err


def test_a_batch_that_cannot_be_shared(server, untold, tmp_path):
    for each in two(server, *command(untold, tmp_path/"run", batch=8)):
        code, _, err = server.end(*each)
        assert code == 2; sentence(err, "share a batch of 8 pairs among 2 processes.*multiple of 16")
    assert not (tmp_path/"run").exists()
    for batch, processes in ((RNG_CHUNK, 1), (3, 1), (48, 3), (64, 4)): assert [i for process in range(processes) for i in assign_pairs(batch, process, processes)] == list(range(batch))


# What lifts ---------------------------------------------------------------

LIFTING = {"lift.size": "32", "lift.canvas": "48", "lift.slabs": "8", "lift.channels": "16", "lift.multipliers": "1,2", "lift.tones": "16", "batch": "16", "every": "5", "validation": "8",
           "precision": "fp32", "held": "2", "refresh": "4", "data.oversample": "1", "data.fov": "160,160"}


def lifting(cts, run, *words, **other):
    "What to type to train on slabs"
    return ("train", "--cts", cts, "--preset", "tiny", "-o", run, "--device", "cpu", "--workers", 0, "--resume", "--steps", 10,
            *(word for key, value in (LIFTING | other).items() for word in ("--set", f"{key}={value}")), *words)


@pytest.fixture(scope="module")
def bodies(tmp_path_factory):
    "Four CTs to train on, one to validate"
    folder = tmp_path_factory.mktemp("cts")
    for i in range(5): write_ct(ball(2*i - 4), folder/f"v{i}.nii.gz")
    (folder/"folds.csv").write_text("name,patient,fold\n" + "".join(f"v{i},v{i},{6 if i == 4 else 1}\n" for i in range(5)))
    return folder


@pytest.fixture(scope="module")
def lifted(server, bodies, tmp_path_factory):
    "A run that lifts, and that nothing interrupted, with a row for every step"
    run = tmp_path_factory.mktemp("lifted")/"run"
    code, out, err = server(*lifting(bodies, run, every=1))
    assert (code, err) == (0, "") and "10 of 10 steps" in out
    return run


def test_a_run_that_lifts_is_resumed_to_the_bit(server, bodies, lifted, tmp_path):
    run = tmp_path/"run"
    for count in (2, 3, 3):   # killed as step 2 gets its name, in the midst of steps that ask about the same slabs; and later
        assert server(*lifting(bodies, run, every=1), at=(str(run), "os.rename /.checkpoint", count, *KILL))[0] == -signal.SIGKILL
    assert server(*lifting(bodies, run, every=1))[::2] == (0, "")
    assert same(run, lifted) and figures(run) == figures(lifted) and not hidden(run)
    network, about = load_weights(run/"weights.safetensors")
    assert network.config.slabs == 8 and "depth_error" in about and about["training"]["lift"]["canvas"] == 48


def test_a_watched_ct_is_never_learned_from_and_helps_to_choose(server, bodies, lifted, tmp_path):
    run, other = tmp_path/"run", tmp_path/"other.nii.gz"
    write_ct(ball(9), other)
    assert server(*lifting(bodies, run, "--watch", other, every=5))[::2] == (0, "")
    examined = [row for row in read_log(run) if "watched" in row]
    assert [row["step"] for row in examined] == [5, 10] and all(0 < row["watched_depth_error"] < 50 for row in examined)
    assert [row["loss"] for row in read_log(run)] == pytest.approx([np.mean(losses(lifted)[:5]), np.mean(losses(lifted)[5:])], rel=1e-5)
    _, about = load_weights(run/"weights.safetensors")
    assert about["steps"] == min(examined, key=lambda row: row["validation"] + row["watched"])["step"]
    assert about["watched_skill"] < 1 and "other" not in str(about)               # a file may bear a patient's name


@pytest.mark.parametrize("what, sentence", [("v1.nii.gz", "cannot watch v1: this patient is one of those to train on"), ("none.nii.gz", "it is not there")])
def test_what_cannot_be_watched(what, sentence, server, bodies, tmp_path):
    code, _, err = server(*lifting(bodies, tmp_path/"run", "--watch", bodies/what))
    assert code == 2 and sentence in err and "Traceback" not in err


def test_slabs_read_from_sets_are_trained_on_and_resumed_to_the_bit(server, bodies, tmp_path):
    "Rendered by the command, read by none and by two processes"
    sets, whole, run = tmp_path/"sets", tmp_path/"whole", tmp_path/"run"
    assert server("pairs", bodies, "-o", sets, "--drrs", 3, "--size", 32, "--fov", 160, "--slabs", 8, "--device", "cpu")[::2] == (0, "")
    given = [word for key, value in LIFTING.items() if not key.startswith(("data.", "held", "refresh")) for word in ("--set", f"{key}={value}")]
    words = lambda run, workers: ("train", "--data", sets, "--preset", "tiny", "-o", run, "--device", "cpu", "--workers", workers, "--resume", "--steps", 6, *given)
    assert server(*words(whole, 0))[::2] == (0, "")
    assert server(*words(run, 2), at=(str(run), "os.rename /.checkpoint", 2, *KILL))[0] == -signal.SIGKILL
    assert server(*words(run, 2))[::2] == (0, "")
    assert same(run, whole) and losses(run) == losses(whole) and "depth_error" in load_weights(run/"weights.safetensors")[1]


@pytest.mark.parametrize("early", [0, 0.5])
def test_two_processes_lift_as_one_does(early, server, bodies, lifted, tmp_path):
    "Also where some of what is trained is not asked for in every pass, and the first steps know the patients of both"
    one, run = tmp_path/"one", tmp_path/"two"
    asked = {"lifting.early": early, "every": 5, "together": 8} if early else {"every": 1}
    words = ("--together", asked.pop("together")) if early else ()
    if early: assert server(*lifting(bodies, one, **asked))[::2] == (0, "")
    for each in two(server, *lifting(bodies, run, *words, **asked)): assert server.end(*each)[::2] == (0, "")
    whole = one if early else lifted
    np.testing.assert_allclose(losses(run), losses(whole), rtol=1e-3)
    assert torch.equal(tensors(run)["network.population"], tensors(whole)["network.population"])
    assert torch.equal(tensors(run)["network.tone.bank"], tensors(whole)["network.tone.bank"])


def test_what_cannot_be_lifted_is_one_sentence(server, bodies, sets, lifted, tmp_path):
    run = tmp_path/"run"
    cases = [(lifting(bodies, run, rate=1e30, warmup=0, every=1), r"the loss became (nan|inf) at step 2; the last checkpoint .* intact"),
             (lifting(bodies, tmp_path/"a", **{"lift.canvas": 50}), "lift.* canvas = 50; give 32, or more by a multiple of 8"),
             (lifting(bodies, tmp_path/"b", **{"lifting.view": -1}), "view = -1.0: .* Give 0 or more"),
             (lifting(bodies, tmp_path/"c", **{"unet.size": 32}), "cannot set unet.size: .* lifts"),
             (("train", "--data", sets, "--preset", "tiny", "-o", tmp_path/"d", "--device", "cpu"), "cannot learn depth from DRR sets"),
             (("train", "--cts", bodies, "-o", shutil.copytree(lifted, tmp_path/"e"), "--resume", "--device", "cpu", "--set", "lift.slabs=12"), "started with lift.slabs = 8, not 12")]
    begun = [(server.start(*words), why) for words, why in cases]
    for process, why in begun:
        code, _, err = server.end(*process)
        assert code == 2; sentence(err, why)
    assert read_checkpoint(list_checkpoints(run)[-1])[1]["step"] == 1 and all(tensor.isfinite().all() for tensor in tensors(run).values())


# What goes wrong ----------------------------------------------------------

@pytest.mark.parametrize("where", ["open /.weights", "os.mkdir /.checkpoint"])
def test_a_full_disk_is_one_sentence_and_costs_no_checkpoint(where, server, untold, plain, tmp_path):
    run = tmp_path/"run"
    code, _, err = server(*command(untold, run, "--steps", 20), at=(str(run), where, 3, "full", 20_000))
    assert code == 2; sentence(err, "cannot write .*(too large|no space|disk).*")
    assert not hidden(run) and [read_checkpoint(path)[1]["step"] for path in list_checkpoints(run)] == [5]
    assert server(*command(untold, run, "--steps", 20, "--resume"))[::2] == (0, "")
    assert same(run, plain)


def test_a_loss_that_is_no_number(server, untold, tmp_path):
    run = tmp_path/"run"
    code, _, err = server(*command(untold, run, "--steps", 20, every=1, rate=1e30, warmup=0))
    assert code == 2; sentence(err, r"the loss became (nan|inf) at step \d+; the last checkpoint .* intact")
    step = int(re.search(r"step (\d+)", err)[1])
    assert 1 < step <= 20 and not hidden(run) and read_checkpoint(list_checkpoints(run)[-1])[1]["step"] == step - 1
    assert all(tensor.isfinite().all() for tensor in tensors(run).values())


def test_a_set_damaged_before_is_counted_and_told_once(server, untold, plain, tmp_path):
    damaged, runs = shutil.copytree(untold, tmp_path/"sets"), (tmp_path/"whole", tmp_path/"killed")
    os.truncate(damaged/"v1"/"drr.npy", 3_000)
    words = [command(damaged, run, "--steps", 20, "--resume") for run in runs]
    assert server(*words[1], at=(str(runs[1]), "os.rename /.checkpoint", 2, *KILL))[0] == -signal.SIGKILL
    for each in words:
        code, _, err = server(*each)
        assert code == 0; sentence(err, "v1: it is not a whole DRR set.*training goes on without it")
    assert same(*runs) and [row["quarantined"] for row in read_log(runs[0])] == [1]*4
    assert losses(runs[0]) == losses(runs[1]) and not torch.equal(tensors(runs[0])["network.out.2.weight"], tensors(plain)["network.out.2.weight"])


def test_a_set_damaged_while_it_runs(server, untold, plain, tmp_path):
    mine, run = shutil.copytree(untold, tmp_path/"sets"), tmp_path/"run"
    code, _, err = server(*command(mine, run, "--steps", 20, every=1), at=(str(run), "open /log", 7, "cut", str(mine/"v2"/"drr.npy"), 3_000))
    assert code == 0; sentence(err, "v2: it is not a whole DRR set.*training goes on without it")
    assert losses(run)[:6] == losses(plain)[:6] and np.isfinite(losses(run)).all() and len(losses(run)) == 20
    counted = [row["quarantined"] for row in read_log(run)]
    assert counted == sorted(counted) and set(counted[:6]) == {0} and counted[-1] == 1


BROKEN = dict(cut=lambda folder: os.truncate(folder/"optimizer.safetensors", 5_000), flipped=lambda folder: flip(folder/"network.safetensors"), garbage=lambda folder: (folder/"state.json").write_text('{"step": 20'),
              gone=lambda folder: (folder/"ema.safetensors").unlink(), empty=lambda folder: [path.unlink() for path in folder.iterdir()])


def flip(path):
    "One bit in the middle"
    content = bytearray(path.read_bytes())
    content[len(content)//2] ^= 1
    path.write_bytes(content)


def test_a_broken_checkpoint_falls_back_to_the_one_before(server, untold, plain, tmp_path):
    begun = []
    for name, spoil in BROKEN.items():
        run = shutil.copytree(plain, tmp_path/name)
        spoil(list_checkpoints(run)[-1])
        begun.append((run, server.start(*command(untold, run, "--steps", 20, "--resume", every=1))))
    for run, process in begun:
        code, _, err = server.end(*process)
        assert code == 0; sentence(err, "checkpoint-00000020 is damaged.*set aside")
        assert same(run, plain) and figures(run) == figures(plain)


def test_where_all_are_broken_it_says_so_and_begins_nothing(server, untold, plain, tmp_path):
    run = shutil.copytree(plain, tmp_path/"run")
    for path in list_checkpoints(run): BROKEN["cut"](path)
    for _ in range(2):   # a scheduler asks again
        code, _, err = server(*command(untold, run, "--steps", 20, "--resume", every=1))
        assert code == 2; sentence(err, "none of the 3 checkpoints")
    assert figures(run) == figures(plain) and load_weights(run/"weights.safetensors")[1]["steps"] == 20


def test_what_is_resumed_otherwise_is_refused_by_name(server, untold, plain, tmp_path):
    run = shutil.copytree(plain, tmp_path/"run")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    words = "train", "--data", untold, "-o", run, "--device", "cpu", "--workers", 0
    cases = {("--resume", "--set", "rate=1e-3"): "started with rate = 0.0003, not 0.001", ("--resume", *settings(**{"unet.channels": "12"})): "started with unet.channels = 8, not 12", ("--resume", "--seed", 3): "started with seed = 0, not 3",
             ("--resume", "--preset", "paper"): "started with preset", ("--resume", "--phantoms", 3): "started with phantoms", ("--resume", "--set", "data.one_axis=0"): "started with data.one_axis = None, not 0", (): "holds one already"}
    begun = [(server.start(*words, *more), why) for more, why in cases.items()]
    for process, why in begun:
        code, _, err = server.end(*process)
        assert code == 2; sentence(err, why)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_what_goes_without_saying_may_be_said(server, untold, plain, tmp_path):
    run = shutil.copytree(plain, tmp_path/"run")
    assert server(*command(untold, run, "--steps", 20, "--resume", "--preset", "paper-tiny", "--seed", 0, every=1))[::2] == (0, "")


def test_a_run_killed_as_it_began_begins(server, untold, plain, tmp_path):
    (tmp_path/"run").mkdir(); (tmp_path/"run"/".run-abc.json").write_text("{")
    assert server(*command(untold, tmp_path/"run", "--steps", 20, "--resume"))[::2] == (0, "")
    assert same(tmp_path/"run", plain) and not hidden(tmp_path/"run")


def test_a_finished_run_stays_as_it_is(server, untold, plain, tmp_path):
    run = shutil.copytree(plain, tmp_path/"run")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    code, out, err = server("train", "-o", run, "--resume", "--device", "cpu", "--workers", 0)
    assert (code, err) == (0, "") and "20 of 20 steps" in out and "all steps are done" in out
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


# What is left behind ------------------------------------------------------

def test_weights_say_how_they_were_made_and_nothing_of_this_machine(whole, sets):
    network, about = load_weights(whole/"weights.safetensors")
    config = replace(with_settings(PRESETS["paper-tiny"], RECIPE), steps=20)
    assert about["training"] == json.loads(json.dumps(asdict(config))) and about["training"]["unet"] == json.loads(json.dumps(asdict(network.config)))
    assert network.config.channels == 8 and about["training"]["warmup"] == 10 and about["steps"] == 20 and about["samples"] == 320
    assert about["data"] == dict(sets=4, folder=sets.name) and about["command"].startswith("radrotator train ") and "unet.channels=8" in about["command"]
    with open(whole/"weights.safetensors", "rb") as file: header = file.read(int.from_bytes(file.read(8), "little")).decode()
    assert not re.search(r"(^|[\s\"'=])/\w+/", header) and str(sets.parent) not in header and str(Path.home()) not in header


def test_weights_know_what_they_began_from_also_after_a_stop(server, untold, plain, tmp_path):
    run = tmp_path/"run"
    weights = Path(shutil.copy(plain/"weights.safetensors", tmp_path))
    words = command(untold, run, "--steps", 6, "--init", weights, "--resume")
    assert server(*words, at=(str(run), "open /log", 1, "signal", "SIGTERM"))[::2] == (0, "")
    begun = load_weights(run/"weights.safetensors")[1]["init"]
    weights.unlink()   # what is in the checkpoint is not read again
    assert server(*words)[::2] == (0, "")
    assert begun["steps"] == 20 and load_weights(run/"weights.safetensors")[1]["init"] == begun


class Page(HTMLParser):
    "Whether every tag is closed, and what pages and pictures it refers to"
    def __init__(self, text):
        super().__init__()
        self.open, self.links, self.tags = [], [], []
        self.feed(text); self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        if tag not in ("meta", "img", "br", "hr", "link"): self.open.append(tag)
        self.links += [value for name, value in attributes if name in ("src", "href", "action", "data", "poster", "srcset")]

    def handle_endtag(self, tag): assert self.open.pop() == tag


def test_a_report_is_one_file(server, sets, whole, tmp_path):
    half = tmp_path/"half"
    assert server(*command(sets, half, "--steps", 20), at=(str(half), "os.rename /.checkpoint", 2, *KILL))[0] == -signal.SIGKILL   # killed as the second one gets its name
    for run, pictures, said in ((whole, 3, "checkpoint-00000020"), (half, 3, "checkpoint-00000005")):
        assert main(["report", str(run), "-o", str(tmp_path/f"{said}.html")]) == 0
        text = (tmp_path/f"{said}.html").read_text()
        page = Page(text)
        assert said in text and "unet.channels" in text and page.tags.count("img") == pictures == len(page.links) and not {"script", "link", "iframe"} & set(page.tags)
        for link in page.links:
            kind, content = link.split(",", 1)
            assert kind == "data:image/png;base64" and base64.b64decode(content).startswith(b"\x89PNG\r\n")
        assert not re.search(r"url\(|@import|https?:", text.split("<body>")[0])
    assert main(["report", str(half)]) == 0 and (half/"report.html").exists()


def test_events_can_be_read_back(server, untold, plain, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    run = tmp_path/"run"
    words = command(untold, run, "--steps", 6, "--tensorboard", "--resume", every=1)
    assert server(*words, at=(str(run), "os.rename /.checkpoint", 4, *KILL))[0] == -signal.SIGKILL
    code, _, err = server(*words)
    assert code == 0 and "Traceback" not in err
    events = EventAccumulator(str(run/"events")).Reload()
    assert set(events.Tags()["scalars"]) == set(COLUMNS) - {"step", "validation", "skill", "depth_error", "watched", "watched_skill", "watched_depth_error"}
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3, 4, 5, 6]
    np.testing.assert_allclose([event.value for event in events.Scalars("loss")], losses(run), rtol=1e-6)
    assert losses(run) == losses(plain)[:6]
