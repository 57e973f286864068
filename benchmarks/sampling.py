"""Time the network beside Mediffusion's, whole views by several solvers, and a sweep, each table in one run.

    pip install --no-deps mediffusion
    python benchmarks/sampling.py             # about six minutes on two idle cores
    python benchmarks/sampling.py --rounds 9

Forward: one of the `paper` preset at batch 1 on the CPU: no layer of it is zero, the weights are random. Rounds alternate between the sides, and medians are compared: of seconds on the clock, and of seconds of processor time, which say more
where other programs run beside. Peak memory is what a process of its own holds at most in a forward, weights and PyTorch counted in.

Views: the shipped weights, one noise, a phantom that they never saw turned by 12° about z. "converged" is DDIM with 1,000 steps at the same guidance. Sweep: 300 frames, views together against one by one.
"""
import argparse, copy, ctypes, importlib.util, math, multiprocessing, os, statistics, sys, time, types
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # a thread that waits is not to count as one that works
import numpy as np, torch
from torch import nn

from radrotator.core import markdown_table
from radrotator.model.sample import SOLVERS, ddim, guided_denoiser, time_steps
from radrotator.model.unet import UNet, UNetConfig
from radrotator.rotate.drawing import draw_batch
from radrotator.rotate.rotator import RadRotator

SIDES = "Mediffusion, fp32", "ours, fp32", "ours, bf16"


def mediffusion(config):
    "Mediffusion's network; its package's __init__ would import Lightning and more"
    package = types.ModuleType("mediffusion")
    package.__path__ = list(importlib.util.find_spec("mediffusion").submodule_search_locations)
    sys.modules["mediffusion"] = package
    from mediffusion.models.unet import UNetModel
    return UNetModel(config.size, 2, config.channels, 2, [config.blocks]*len(config.multipliers), config.attention, channel_mult=config.multipliers, num_heads=config.heads,
                     num_classes=config.conditions, concat_channels=1, guidance_drop_prob=0.1, use_scale_shift_norm=True).eval()


def drawn(config):
    "A network in which no layer is zero"
    torch.manual_seed(0)
    network = UNet(config).eval()
    for module in network.modules():
        if getattr(module, "weight", None) is not None and not module.weight.any(): module.reset_parameters()
    return network


def forward_of(side, network):
    "A function (x_t, t, input, vector) → both outputs, for one of SIDES"
    if side == "ours, fp32": return lambda *given: torch.cat(network(*given), 1)
    if side == "ours, bf16":
        half = copy.deepcopy(network).cast(torch.bfloat16)
        return lambda *given: torch.cat(half(*given), 1)
    theirs, config = mediffusion(network.config), network.config
    theirs.load_state_dict(network.state_dict())
    condition = lambda vector: nn.functional.pad(vector/config.condition_scale, (0, config.conditions - 3))
    return lambda x_t, t, input, vector: theirs(x_t, t, cls=condition(vector), concat=input, drop_cls_prob=0)


def given(size):
    "What a forward is asked: noise, step, radiograph, rotation"
    generator = torch.Generator().manual_seed(1)
    image = lambda: torch.randn(1, 1, size, size, generator=generator)
    return image(), torch.tensor([500]), image().clamp(-1, 1), torch.tensor([[3.0, 5.0, -7.0]])


def seconds(call, *arguments):
    "(seconds on the clock, seconds of processor time), answer"
    clock, processor = time.perf_counter(), time.process_time()
    answer = call(*arguments)
    return (time.perf_counter() - clock, time.process_time() - processor), answer


def alternate(calls, rounds):
    "Median times of each call and its answer, one round after the other"
    times, answers = {name: [] for name in calls}, {}
    for _ in range(rounds + 1):
        for name, call in calls.items():
            taken, answers[name] = seconds(call)
            times[name].append(taken)
    return {name: tuple(statistics.median(column) for column in zip(*taken[1:])) for name, taken in times.items()}, answers  # the first round is for warming up


def peak(side, config, answer):
    "Peak memory in MiB of a forward"
    network = drawn(config)
    call = forward_of(side, network)
    del network                                                                     # the fp32 side keeps its own hold of it
    ctypes.CDLL(None).malloc_trim(0)                                                # give back what building took …
    Path("/proc/self/clear_refs").write_text("5")                                   # … and forget its peak (Linux)
    with torch.inference_mode(): call(*given(config.size))
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    answer.put(int(status["VmHWM"].split()[0])/1024)


def in_a_process(target, *arguments):
    "What `target` puts into the queue that it is given last, from a fresh process"
    context = multiprocessing.get_context("spawn")
    answer = context.Queue()
    process = context.Process(target=target, args=(*arguments, answer))
    process.start(); result = answer.get(); process.join()
    return result


@torch.inference_mode()
def forward_table(config, rounds, memory=True):
    "Rows: one forward on each side"
    mebibytes = {side: in_a_process(peak, side, config) if memory else float("nan") for side in SIDES}  # first, while this process is small
    network, asked = drawn(config), given(config.size)
    functions = {side: forward_of(side, network) for side in SIDES}
    times, answers = alternate({side: lambda call=call: call(*asked) for side, call in functions.items()}, rounds)
    reference = SIDES[0]
    error = lambda side: (answers[side] - answers[reference]).norm()/answers[reference].norm()
    return [{"forward": side, "s": f"{times[side][0]:.2f}", "faster by": f"{times[reference][0]/times[side][0]:.2f}×", "processor s": f"{times[side][1]:.2f}", "less work by": f"{times[reference][1]/times[side][1]:.2f}×",
             "relative error": f"{error(side):.1e}", "peak memory": f"{mebibytes[side]:.0f} MiB"} for side in SIDES]


def picture_and_truth(model, seed=2**31):
    "A phantom's DRR that training never drew, and the same turned by 12° about z, (size, size) in [0, 1]"
    from radrotator.evaluate.views import turned_views
    from radrotator.phantom.phantom import phantom
    view, = turned_views(model, phantom(seed), [(0, 0, 12.0)], "phantom")
    return view.input, view.truth


def psnr(picture, reference): return -10*math.log10(max(((picture - reference)**2).mean(), 1e-12))


def view_table(model, rounds):
    "Rows: a view by each solver; distance to the converged view of the same guidance, and to the truth"
    picture, truth = picture_and_truth(model)
    view = lambda **asked: draw_batch(model.network, picture, [[0, 0, 12.0]], model.choose_sampling(**asked))[0]
    ways = [dict(solver="ddim-leading", steps=200, guidance=g) for g in (4.0, 1.0)]
    ways += [dict(solver=solver, steps=steps, guidance=g) for g in (4.0, 1.0) for solver, steps in (("ddim", 200), ("ddim", 20), ("dpm", 20), ("dpm", 15), ("dpm", 10))] + [model.defaults]
    SOLVERS["ddim-leading"] = ddim, "leading"                                        # the paper's grid
    ways = [{key: way[key] for key in ("solver", "steps", "guidance")} for way in ways]
    times, answers = alternate({tuple(way.values()): lambda way=way: view(**way) for way in ways}, rounds)
    converged = {g: view(solver="ddim", steps=1000, guidance=g) for g in {way["guidance"] for way in ways}}
    slowest = times["ddim-leading", 200, 4.0][0]
    return [way | {"s": f"{times[tuple(way.values())][0]:.3f}", "faster by": f"{slowest/times[tuple(way.values())][0]:.1f}×", "PSNR to converged": f"{psnr(answers[tuple(way.values())], converged[way['guidance']]):.1f}",
                   "PSNR to truth": f"{psnr(answers[tuple(way.values())], truth):.1f}"} for way in ways]


def sweep_run(batch, frames, answer):
    "Seconds of a sweep, and the peak memory of its process"
    model = RadRotator.from_pretrained(device="cpu")
    picture, _ = picture_and_truth(model)
    list(model.sweep(picture, "z", [0.0]*batch, batch))
    clock = time.perf_counter()
    for _ in model.sweep(picture, "z", np.linspace(-15, 15, frames), batch): pass
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    answer.put((time.perf_counter() - clock, int(status["VmHWM"].split()[0])/1024))


def sweep_table(rounds, frames=300):
    "Rows: frames one by one, and in batches"
    taken = {batch: [in_a_process(sweep_run, batch, frames) for _ in range(rounds)] for batch in (1, 16, 64)}
    seconds = {batch: statistics.median(s for s, _ in runs) for batch, runs in taken.items()}
    return [{"frames at a time": batch, "s": f"{seconds[batch]:.1f}", "frames a second": f"{frames/seconds[batch]:.0f}", "faster by": f"{seconds[1]/seconds[batch]:.2f}×",
             "peak memory": f"{max(mib for _, mib in taken[batch]):.0f} MiB"} for batch in taken]


def paper_table(config, device, frames=300, steps=20, batch=16, rounds=3, peak=None):
    "Rows: one view and a sweep with guidance 4, DPM-Solver++ and bfloat16, eager and compiled; `peak` is the device's FLOP/s, where its share is wanted"
    from torch.utils.flop_counter import FlopCounterMode
    network = drawn(config).to(device).cast(torch.bfloat16)
    solve, spacing = SOLVERS["dpm"]
    noise, _, radiograph, vector = (tensor.to(device) for tensor in given(config.size))
    wait = torch.cuda.synchronize if str(device).startswith("cuda") else lambda: None

    def views(forward, n):
        many = lambda tensor, size: tensor.expand(size, *tensor.shape[1:])
        for start in range(0, n, batch):
            size = min(batch, n - start)
            solve(guided_denoiser(forward, many(radiograph, size), many(vector, size), 4.0), many(noise, size), time_steps(steps, spacing))
        wait()

    with FlopCounterMode(display=False) as counter, torch.no_grad(): network(noise, torch.tensor([500], device=device), radiograph, vector)
    work, rows = 2*steps*counter.get_total_flops(), []                                # twice: with the rotation, and without
    forwards = {"eager": network} | ({"compiled": torch.compile(network, mode="reduce-overhead")} if str(device).startswith("cuda") else {})
    for name, forward in forwards.items():
        for n in (1, frames):
            views(forward, min(n, batch))                                             # warm up, compile
            taken = statistics.median(seconds(views, forward, n)[0][0] for _ in range(rounds))
            rows.append({"network": name, "views": n, "s": f"{taken:.3f}", "s a view": f"{taken/n:.4f}", "share of peak": f"{n*work/taken/peak:.0%}" if peak else "–"})
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--size", type=int, default=256, help="pixels along each side; the paper's is 256")
    parser.add_argument("--peak", type=float, default=790, help="TFLOP/s of the GPU in bfloat16; measured on an H200: 790")
    args = parser.parse_args()
    config = UNetConfig(size=args.size)
    load = lambda: "/".join(f"{value:.1f}" for value in os.getloadavg())
    print(f"one forward at {args.size}², {torch.get_num_threads()} threads; load average at the start {load()}\n", flush=True)
    print(markdown_table(forward_table(config, args.rounds)), flush=True)
    model = RadRotator.from_pretrained(device="cpu")
    print(f"\none view, shipped weights, {model.size}²\n\n{markdown_table(view_table(model, args.rounds))}", flush=True)
    print(f"\na sweep of 300 frames with the shipped weights and their defaults\n\n{markdown_table(sweep_table(3))}")
    print(f"\nthe paper preset on CUDA, {config.size}², bfloat16, DPM-Solver++ with 20 steps, guidance 4\n")
    print(markdown_table(paper_table(config, "cuda", peak=args.peak*1e12)) if torch.cuda.is_available() else "not run here")
    print(f"\nload average at the end {load()}")


if __name__ == "__main__": main()
