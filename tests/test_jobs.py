"""The job scripts of the documentation: they are shell and YAML, every option in them is one that the programs have,
and they go back into the queue."""
import json, os, re, shlex, signal, subprocess, time
from pathlib import Path

import pytest
import typer
import yaml
from torch.distributed.run import get_args_parser

from processes import wait_until
from radrotator.app.console import UsageError
from radrotator.app.options import parse_settings, parse_shard
from radrotator.cli import app
from radrotator.core import RadRotatorError
from radrotator.train.run import RunRequest, train_config
from radrotator.train.compute import assign_pairs

PAGE = Path(__file__).resolve().parents[1]/"nbs"/"tutorials"/"train_at_scale.ipynb"
SBATCH = set(  # of its manual
    "job-name nodes ntasks-per-node gpus-per-node cpus-per-task mem time signal requeue open-mode output array".split())
COMMAND = re.compile(r"^(?:srun (?:--\S+ )*)?((?:torchrun|radrotator) .*?)(?: &)?$")


def blocks(language):
    "The code blocks of the page in this language"
    cells = json.loads(PAGE.read_text(encoding="utf-8"))["cells"]
    block = re.compile(rf"^```{language}\n(.*?)^```", re.DOTALL | re.MULTILINE)
    texts = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown"]
    return [found for text in texts for found in block.findall(text)]


def words(line):
    "A line of shell as its program sees it, every variable a 1"
    return shlex.split(re.sub(r"\$\w+", "1", line), comments=True)


def in_shell(script):
    "The commands of a script that are torchrun's or ours"
    lines = (line.split(" #")[0].strip() for line in script.replace("\\\n", " ").splitlines())
    return [words(found[1]) for line in lines if (found := COMMAND.match(re.sub(r" +", " ", line)))]


def manifests():
    "Every document of every YAML block"
    return [document for block in blocks("yaml") for document in yaml.safe_load_all(block)]


def container(job): return job["spec"]["template"]["spec"]["containers"][0]


def in_container(job):
    "What a container runs"
    command = container(job)["command"] + container(job).get("args", [])
    return words(command[2].removeprefix("exec ")) if command[:2] == ["bash", "-c"] else command


def jobs(): return [document for document in manifests() if document["kind"] == "Job"]


def commands():
    "Every command of the page"
    scripts = [command for script in blocks("bash") for command in in_shell(script)]
    return scripts + [in_container(job) for job in jobs()]


def of_torchrun(command):
    "How many processes a command of torchrun starts, and the command that they run"
    options = get_args_parser().parse_args(command[1:])
    assert (options.module, options.training_script) == (True, "radrotator.cli")
    most = int(options.nnodes.split(":")[-1])
    return most*int(options.nproc_per_node), ["radrotator", *options.training_script_args]


def parsed(command):
    "Name and options of a command line of ours, and how many processes it is for"
    processes, command = of_torchrun(command) if command[0] == "torchrun" else (1, command)
    group = typer.main.get_command(app)
    with group.make_context("radrotator", command[1:]) as context:
        name, command, rest = group.resolve_command(context, command[1:])
    return name, command.make_context(name, rest).params, processes


def check(command):
    "Refuse a command line that would be refused when it runs"
    name, given, processes = parsed(command)
    if name == "pairs": parse_shard(given["shard"])
    if name == "train":
        settings = parse_settings(given["settings"])
        request = RunRequest(preset=given["preset"] or "tiny", seed=0, steps=given["steps"], set=settings)
        config, _ = train_config(request)
        assign_pairs(config.batch, 0, processes)


def test_the_page_has_jobs():
    assert len(commands()) >= 9 and len(jobs()) == 2 and sum("#SBATCH" in script for script in blocks("bash")) == 3
    assert sum(command[0] == "torchrun" for command in commands()) >= 6


@pytest.mark.parametrize("command", commands(), ids=" ".join)
def test_every_option_is_known(command):
    check(command)


WRONG = [
    "radrotator train --dta sets -o run",
    "radrotator trian --data sets -o run",
    "radrotator train --data sets",
    "radrotator train --data sets -o run --set unet.haed=warp",
    "radrotator train --data sets -o run --preset huge",
    "radrotator pairs cts -o sets --shard 51/50",
    "torchrun --nnodes=8 --nproc-per-node=8 -m radrotator.cli train --data sets -o run --preset paper",
]


@pytest.mark.parametrize("line", WRONG)
def test_a_wrong_one_is_found(line):
    with pytest.raises((UsageError, RadRotatorError)): check(words(line))


def test_a_wrong_option_of_torchrun_is_found(capsys):
    line = "torchrun --stand-alone --nproc-per-node=8 -m radrotator.cli train --data sets -o run"
    with pytest.raises(SystemExit): check(words(line))


def number_after(text, script): return re.search(text + r"(\d+)", script)[1]


def options_of(script):
    "What a script tells sbatch"
    options = dict(re.findall(r"^#SBATCH --([a-z-]+)=?(\S*)$", script, re.MULTILINE))
    assert len(options) == script.count("#SBATCH ") and options.keys() <= SBATCH
    return options


@pytest.mark.parametrize("script", blocks("bash"), ids=lambda script: script.splitlines()[-1][:40])
def test_scripts_are_shell(script):
    subprocess.run(["bash", "-n"], input=script, text=True, check=True, timeout=20)
    options = options_of(script)
    assert script.startswith("#!/bin/bash\n") == bool(options)  # sbatch wants a shell: a percent script may lose its #
    if "array" in options: assert options["array"].split("-")[1] == number_after("SLURM_ARRAY_TASK_ID/", script)


REQUEUEING = [script for script in blocks("bash") if "#SBATCH --signal" in script]
requeueing = pytest.mark.parametrize("script", REQUEUEING, ids=["one node", "eight nodes"])


@requeueing
def test_a_script_leaves_itself_the_time_to_save(script):
    options = options_of(script)
    nodes = number_after("--nnodes=", script) if "--nnodes" in script else "1"
    assert options["nodes"] == nodes and options["gpus-per-node"] == number_after("--nproc-per-node=", script)
    seconds = int(options["signal"].split("@")[1])
    assert int(number_after("SHUTDOWN_TIMEOUT=", script)) < seconds - 60  # a minute for the rest of the script
    assert "requeue" in options and "--resume" in script
    assert script.index("\ntrap ") < script.index("\nsrun ") < script.rindex("\nwait ")


SRUN = """
trap 'sleep 0.3; echo saved >> log; exit 1' TERM
echo $$ > started
[ -z "$STATUS" ] || exit $STATUS
while :; do sleep 0.02; done
"""
STUBS = {  # of SLURM's commands
    "srun": SRUN,
    "scancel": 'echo "$@" >> log; kill -TERM $(cat started)',
    "scontrol": 'if [ "$1" = show ]; then echo node; else echo "$@" >> log; fi',
}


@pytest.fixture
def cluster(tmp_path):
    "A function that starts a script where SLURM's commands are stubs"
    for name, body in STUBS.items():
        (tmp_path/name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path/name).chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    job = dict(PATH=path, SLURM_JOB_ID="7", SLURM_CPUS_PER_TASK="48", SLURM_JOB_NODELIST="node[1-8]")
    def start(script, **more):
        return subprocess.Popen(["bash", "-c", script], cwd=tmp_path, env=os.environ | job | more)
    return start


@requeueing
def test_a_script_lets_training_save_and_goes_back_into_the_queue(script, cluster, tmp_path):
    with cluster(script) as job:
        wait_until((tmp_path/"started").exists, 10)
        time.sleep(0.1)
        job.send_signal(signal.SIGUSR1)
        job.wait(20)
    assert (tmp_path/"log").read_text().splitlines() == ["--signal=TERM 7", "saved", "requeue 7"]


@requeueing
@pytest.mark.parametrize("status", [0, 1])
def test_what_has_ended_by_itself_does_not_come_back(script, status, cluster, tmp_path):
    with cluster(script, STATUS=str(status)) as job: assert job.wait(20) == status
    assert not (tmp_path/"log").exists()


@pytest.mark.parametrize("job", jobs(), ids=lambda job: job["spec"].get("completionMode", "NonIndexed"))
def test_manifests_are_whole(job):
    pod, one = job["spec"]["template"]["spec"], container(job)
    options = get_args_parser().parse_args(in_container(job)[1:])
    assert one["image"] and one["resources"]["limits"]["nvidia.com/gpu"] == int(options.nproc_per_node)
    assert pod["restartPolicy"] == "OnFailure" and "--resume" in options.training_script_args
    environment = {entry["name"]: entry["value"] for entry in one["env"]}
    assert int(environment["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]) < pod["terminationGracePeriodSeconds"]
    mounts = {mount["mountPath"]: mount["name"] for mount in one["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert volumes[mounts["/dev/shm"]]["emptyDir"]["medium"] == "Memory" and set(mounts.values()) == volumes.keys()
    claims = {document["metadata"]["name"] for document in manifests() if document["kind"] == "PersistentVolumeClaim"}
    claimed = [volume["persistentVolumeClaim"] for volume in volumes.values() if "persistentVolumeClaim" in volume]
    assert {claim["claimName"] for claim in claimed} <= claims


def test_pods_find_each_other():
    job = next(job for job in jobs() if job["spec"].get("completionMode") == "Indexed")
    service, = (document for document in manifests() if document["kind"] == "Service")
    name, spec = job["metadata"]["name"], job["spec"]
    options = get_args_parser().parse_args(in_container(job)[1:])
    assert service["spec"]["clusterIP"] == "None" and service["spec"]["selector"] == {"job-name": name}
    domain = spec["template"]["spec"]["subdomain"]
    assert options.master_addr == f"{name}-0.{domain}" and domain == service["metadata"]["name"]
    assert int(options.nnodes) == spec["completions"] == spec["parallelism"]
    assert "$JOB_COMPLETION_INDEX" in container(job)["args"][0]
