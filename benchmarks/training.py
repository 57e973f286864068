"""Time a training step beside Mediffusion's with the same network, and what each preset does with its time, in one run.

    pip install --no-deps mediffusion bkh_pytorch_utils
    python benchmarks/training.py                            # about six minutes on two idle cores
    python benchmarks/training.py --parts presets cuda       # without Mediffusion
    python benchmarks/training.py --parts presets --presets tiny paper-tiny    # what lifts beside what draws views
    python benchmarks/training.py --parts cuda --rehearse    # the way through the CUDA part, on the CPU and at a toy size

Beside Mediffusion: the `paper` preset (or another) in fp32 on the CPU. Theirs is what `DiffusionModule.training_step` and the `Trainer` of that package do with a batch: its UNetModel, its losses at steps from its UniformSampler, the Lion of bkh_pytorch_utils with the two groups
of its weight decay, gradients clipped to 1 as Lightning does it, and its average of the weights, copied to the CPU at every step (where all of it is on the CPU, the copy costs nothing). Lightning's own loop and logging are left out. Ours is `Trainer.train_step`, transforms included.
Each side lives in a process of its own, has the same weights and the same batch, and takes a step when it is told to: rounds alternate, and medians are compared, of seconds on the clock and of seconds of processor time, which say more where other programs run beside.

Presets: `Trainer.train_step` and the feed that renders slabs or pairs while training, from phantoms in memory. A preset that lifts learns from patients, and judges each answer by some turns: both are counted. "share of peak" is three times a forward's operations over what a large product of matrices reaches in the same precision and the same run; recomputed activations do not count as work.
"""
import argparse, importlib.util, multiprocessing, os, statistics, tempfile, time
from collections import defaultdict
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # a thread that waits is not to count as one that works
import torch

from radrotator.core import markdown_table
from radrotator.batch import Batch
from radrotator.pairs.folds import TRAIN
from radrotator.pairs.sources import PhantomPlan, phantom_jobs
from radrotator.train.config import PRECISIONS, PRESETS
from radrotator.train.feeds import open_jobs
from radrotator.train.compute import ComputeConfig, make_accelerator
from radrotator.train.trainer import Trainer
from radrotator.model.lift import Lift, LiftConfig
from radrotator.model.unet import UNetConfig, count_operations
from torch.utils.flop_counter import FlopCounterMode
from sampling import drawn, given, mediffusion

PARTS = "transforms", "forward", "backward", "optimizer", "ema"
BATCHES = {"cpu": {"tiny": 32, "small": 8, "paper-tiny": 32, "paper": 1}, "cuda": {"tiny": 256, "small": 128, "paper-tiny": 256, "paper": 64}}  # pairs, or patients, a step
TOY_LIFT = LiftConfig(size=32, canvas=48, slabs=8, channels=16, multipliers=(1, 2), tones=16)
TOY = UNetConfig(size=32, channels=32, multipliers=(1, 2), blocks=1, attention=(2,), heads=2, conditions=3, learned_variance=False)


class Clock:
    "Seconds by name, as `Trainer.clock` notes them"
    def __init__(self, device="cpu"): self.seconds, self.device = defaultdict(float), device

    def wait(self):
        if str(self.device).startswith("cuda"): torch.cuda.synchronize()

    @contextmanager
    def __call__(self, name):
        self.wait(); start = time.perf_counter()
        yield
        self.wait(); self.seconds[name] += time.perf_counter() - start


def trainer_of(config, data=None, machine=ComputeConfig(), device="cpu"):
    "A trainer in which no layer is zero"
    trainer = Trainer(tempfile.mkdtemp(), config, data, None, machine, make_accelerator(device))
    if not config.lift: trainer.network.load_state_dict(drawn(config.unet).state_dict())
    return trainer


def operations_of(shape):
    "Of a forward pass: multiplications and additions"
    if not isinstance(shape, LiftConfig): return count_operations(shape)
    with torch.device("meta"): network, picture = Lift(shape), torch.ones(1, 1, shape.size, shape.size)
    with FlopCounterMode(display=False) as counter: network(picture, torch.ones_like(picture))
    return counter.get_total_flops()


def same_batch(config, batch):
    "Noise in place of radiographs, in [0, 1]"
    _, _, _, vector = given(config.size)
    return Batch(*torch.rand(2, batch, 1, config.size, config.size, generator=torch.Generator().manual_seed(2)), vector.expand(batch, 3))


def our_step(config, batch, clock):
    "A function that trains our network by a step"
    trainer, pairs = trainer_of(config), same_batch(config.unet, batch)
    trainer.clock = clock
    return lambda: trainer.train_step(pairs)


def their_lion():
    "Lion of bkh_pytorch_utils, without that package's __init__"
    folder, = importlib.util.find_spec("bkh_pytorch_utils").submodule_search_locations
    spec = importlib.util.spec_from_file_location("bkh_optim", Path(folder)/"py"/"optim.py")
    spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    return module.Lion


def their_process():
    "Their diffusion and their sampler of steps, as `DiffusionModule` builds them for the paper"
    from mediffusion.diffusion import base
    from mediffusion.utils import diffusion as schedule
    betas, steps = schedule.get_respaced_betas(schedule.get_named_beta_schedule("cosine", 1000, cosine_s=0.008), [1000])
    process = base.GaussianDiffusionBase(schedule.enforce_zero_terminal_snr(betas), base.ModelMeanType.VELOCITY, base.ModelVarType.LEARNED_RANGE, base.LossType.MSE)
    return process, schedule.UniformSampler(process.num_timesteps, steps)


def their_step(config, batch, clock):
    "A function that trains their network by a step"
    network, pairs, unet = mediffusion(config.unet).train(), same_batch(config.unet, batch), config.unet
    network.load_state_dict(drawn(unet).state_dict())
    process, sampler = their_process()
    named = [(name, p, p.ndim == 1 or name.endswith(".bias")) for name, p in network.named_parameters()]   # add_weight_decay
    optimizer = their_lion()([dict(params=[p for _, p, plain in named if plain], weight_decay=0.0), dict(params=[p for _, p, plain in named if not plain], weight_decay=config.weight_decay)], lr=config.rate)
    parameters = list(network.parameters())
    average = [p.data.clone().to("cpu") for p in parameters]
    condition = torch.nn.functional.pad(pairs.vector/unet.condition_scale, (0, unet.conditions - 3))

    def step():
        image, radiograph = 2*pairs.target - 1, 2*pairs.input - 1
        with clock("forward"):
            t, _ = sampler.sample(batch_size=batch, device=image.device)
            loss = process.training_losses(model=network, x_start=image, t=t, noise=torch.randn_like(image), model_kwargs={"cls": condition, "concat": radiograph})["loss"].mean()
        with clock("backward"):
            optimizer.zero_grad()
            loss.backward()
        with clock("optimizer"):
            torch.nn.utils.clip_grad_norm_(parameters, config.clip)
            optimizer.step()
        with clock("ema"), torch.no_grad(): torch._foreach_lerp_(average, [p.data.to("cpu", non_blocking=True) for p in parameters], weight=1 - config.ema)
    return step


SIDES = {"Mediffusion": their_step, "ours": our_step}


def serve(side, config, batch, threads, pipe):
    "Take a step whenever asked to; answer with seconds on the clock, of processor time, and by name, and with the peak memory of this process in MiB"
    torch.set_num_threads(threads)
    clock = Clock()
    step = SIDES[side](config, batch, clock)
    for _ in iter(pipe.recv, None):
        clock.seconds.clear()
        start, processor = time.perf_counter(), time.process_time()
        step()
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        pipe.send(dict(s=time.perf_counter() - start, processor=time.process_time() - processor, mib=int(status["VmHWM"].split()[0])/1024, **clock.seconds))


def beside_table(config, batch, rounds):
    "Rows: a training step on each side"
    context, pipes, times = multiprocessing.get_context("spawn"), {}, {side: [] for side in SIDES}
    for side in SIDES:
        pipes[side], theirs = context.Pipe()
        context.Process(target=serve, args=(side, config, batch, torch.get_num_threads(), theirs), daemon=True).start()
    for _ in range(rounds + 1):
        for side, pipe in pipes.items():
            pipe.send("step")
            times[side].append(pipe.recv())
    for pipe in pipes.values(): pipe.send(None)
    median = {side: {key: statistics.median(one[key] for one in taken[1:]) for key in taken[0]} for side, taken in times.items()}  # the first round is for warming up
    reference = median["Mediffusion"]
    return [{"training step": side, "s": f"{m['s']:.2f}", "faster by": f"{reference['s']/m['s']:.2f}×", "processor s": f"{m['processor']:.2f}", "less work by": f"{reference['processor']/m['processor']:.2f}×",
             **{part: f"{m[part]:.2f}" if part in m else "–" for part in PARTS}, "peak memory": f"{m['mib']:.0f} MiB"} for side, m in median.items()]


def peak_of(device, precision, rounds=5):
    "Operations a second of a large product of matrices"
    n, clock = 16384 if str(device).startswith("cuda") else 2048, Clock(device)
    a, b = (torch.randn(n, n, device=device, dtype=precision) for _ in range(2))
    a @ b
    def once():
        clock.seconds.clear()
        with clock("product"): a @ b
        return clock.seconds["product"]
    return 2*n**3/min(once() for _ in range(rounds))


def feed_of(config, device):
    "Pairs or slabs of two phantoms in memory, rendered when they are asked for"
    plan = PhantomPlan(count=2, size=config.shape.size, drrs=511)
    return open_jobs([job for job in phantom_jobs(plan) if job.fold in TRAIN], plan, config, device=device)[0]


def measured(trainer, steps):
    "Pairs a second, data included, and the share of each part of a step, taken in as many steps more"
    batches, clock, silent, echo = iter(trainer.iterate_batches()), Clock(trainer.device), trainer.clock, trainer.data.plan.echo
    if trainer.config.lift: steps = -(-steps//echo)*echo                               # so many steps in a row ask about the same slabs
    for _ in range(echo): trainer.train_step(next(batches))                            # warm up, compile
    def steps_with(noting):
        clock.wait(); start = time.perf_counter()
        for _ in range(steps):
            with noting("data"): batch = next(batches)
            trainer.train_step(batch)
        clock.wait()
        return time.perf_counter() - start
    taken = steps_with(silent)
    trainer.clock = clock
    split = steps_with(clock)
    return steps*trainer.config.batch/taken, {part: seconds/split for part, seconds in clock.seconds.items()}


def preset_row(name, config, data, device, peak, machine, steps):
    "How fast a preset trains, and on what the time goes"
    trainer = trainer_of(config, data, machine, device)
    cuda = trainer.device.type == "cuda"
    if cuda: torch.cuda.reset_peak_memory_stats()
    speed, share = measured(trainer, steps)
    how = " ".join(word for word, wanted in (("compiled", machine.compile), ("checkpointing", machine.checkpointing)) if wanted) or "plain"
    samples, turns = ("patients", f"{speed*config.lifting.turns:.3g}") if config.lift else ("pairs", "–")
    return {"preset": f"{name}, {config.shape.size}²", "precision": config.precision, "network": how, "batch": f"{config.batch} {samples}",
            "samples a second": f"{speed:.3g}", "turns judged a second": turns, "share of peak": f"{3*operations_of(config.shape)*speed/peak:.0%}",
            **{part: f"{share.get(part, 0):.1%}" for part in ("data", *PARTS)}} | ({"peak memory": f"{torch.cuda.max_memory_allocated()/2**30:.1f} GiB"} if cuda else {})


def preset_table(configs, precisions, device, machines=(ComputeConfig(),), steps=2):
    "Rows: every preset in every precision and way of computing"
    peaks = {precision: peak_of(device, PRECISIONS[precision]) for precision in precisions}
    print("peak of a matrix product: " + ", ".join(f"{peak/1e12:.3g} TFLOP/s in {precision}" for precision, peak in peaks.items()) + "\n", flush=True)
    feeds = {name: feed_of(config, device) for name, config in configs.items()}
    return [preset_row(name, replace(config, precision=precision), feeds[name], device, peaks[precision], machine, steps) for name, config in configs.items() for precision in precisions
            for machine in machines if not (config.lift and machine.checkpointing)]         # a network that lifts keeps little


def configs_of(names, device, toy=False):
    "Recipes of the presets, with batches that suit a device"
    of = lambda name: replace(PRESETS[name], batch=BATCHES[device][name], steps=10**6)
    small = lambda config: dict(lift=TOY_LIFT) if config.lift else dict(unet=replace(TOY, learned_variance=config.unet.learned_variance))
    return {name: replace(of(name), **small(of(name)), batch=8) if toy else of(name) for name in names}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=["mediffusion", "presets", "cuda"], choices=["mediffusion", "presets", "cuda"])
    parser.add_argument("--presets", nargs="+", default=list(PRESETS), choices=list(PRESETS), help="for the parts presets and cuda")
    parser.add_argument("--preset", default="paper", choices=[name for name, config in PRESETS.items() if not config.lift], help="beside Mediffusion")
    parser.add_argument("--size", type=int, help="pixels along each side, beside Mediffusion; default: the preset's")
    parser.add_argument("--batch", type=int, default=1, help="pairs a step, beside Mediffusion")
    parser.add_argument("--rounds", type=int, default=5, help="beside Mediffusion")
    parser.add_argument("--steps", type=int, default=20, help="timed on CUDA, twice")
    parser.add_argument("--rehearse", action="store_true", help="go through the CUDA part on the CPU with toy networks")
    args = parser.parse_args()
    load = lambda: "/".join(f"{value:.1f}" for value in os.getloadavg())
    print(f"{torch.get_num_threads()} threads, PyTorch {torch.__version__}; load average at the start {load()}", flush=True)
    if "mediffusion" in args.parts:
        config = replace(PRESETS[args.preset], precision="fp32", batch=args.batch)
        unet = config.unet
        config = replace(config, unet=replace(unet, groups=32, learned_variance=True, size=args.size or unet.size))   # what Mediffusion can build
        print(f"\na training step of the {args.preset} preset at {config.unet.size}², batch {args.batch}, fp32, on the CPU, in seconds\n\n{markdown_table(beside_table(config, args.batch, args.rounds))}", flush=True)
    if "presets" in args.parts:
        print(f"\npresets on the CPU, rendered while training; parts as a share of a step\n\n{markdown_table(preset_table(configs_of(args.presets, 'cpu'), ('fp32', 'bf16'), 'cpu'))}", flush=True)
    if "cuda" in args.parts:
        print("\npresets on CUDA, rendered while training; parts as a share of a step\n", flush=True)
        machines = [ComputeConfig(compile=compile, checkpointing=checkpointing) for compile in (False, True) for checkpointing in (False, True)]
        if args.rehearse: torch.compile = lambda network: network                        # its way through a compiler is a test of its own
        if args.rehearse or torch.cuda.is_available():
            print(markdown_table(preset_table(configs_of(args.presets, "cuda", args.rehearse), ("bf16",), "cpu" if args.rehearse else "cuda", machines, 2 if args.rehearse else args.steps)))
        else: print("not run here")
    print(f"\nload average at the end {load()}")


if __name__ == "__main__": main()
