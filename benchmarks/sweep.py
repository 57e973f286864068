"""Time to a finished film, here and in another version, in one run.

    python benchmarks/sweep.py                                   this version alone
    git worktree add /tmp/before v0.1.0; python benchmarks/sweep.py --before /tmp/before

Each film is made in a process of its own, the versions in turn, so that a busy machine slows both alike. Processor seconds
count the encoder, too; they are what a busy machine changes least. The radiograph is the example pelvis at the size of a
film, with the grain of a detector: without grain the frames would compress better than any real ones.
"""
import argparse, json, os, statistics, subprocess, sys, tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WORK = """
import json, resource, sys, tempfile, time
from pathlib import Path
import numpy as np
from PIL import Image
from radrotator import RadRotator, Radiograph
from radrotator.radiograph.image import resize
picture, kind, frames = sys.argv[1], sys.argv[2], int(sys.argv[3])
pixels = np.asarray(Image.open(picture).convert("L"), np.float32)/255
grain = np.random.default_rng(0).normal(0, 0.006, (1080, 1012))
given = Radiograph(np.clip(resize(pixels, (1080, 1012)) + grain, 0, 1), (0.2, 0.2))
model = RadRotator.from_pretrained(device="cpu")
model.rotate(given, z=3)
def used(): return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
with tempfile.TemporaryDirectory() as folder:
    wall, processor = time.perf_counter(), used()
    path = model.write_sweep(given, Path(folder)/f"film{kind}", frames=frames)
    size = sum(file.stat().st_size for file in ([path] if path.is_file() else path.iterdir()))
    print(json.dumps(dict(wall=time.perf_counter() - wall, processor=used() - processor, size=size)))
"""


def make_film(version, kind, frames):
    "Seconds and bytes of one film, made by the package in a folder"
    words = [sys.executable, "-c", WORK, ROOT/"nbs"/"images"/"pelvis.png", kind, frames]
    done = subprocess.run([*map(str, words)], env=os.environ | dict(PYTHONPATH=str(version)), cwd=tempfile.gettempdir(),
                          capture_output=True, text=True)
    if done.returncode: sys.exit(done.stderr)
    return json.loads(done.stdout)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, help="a checkout of another version")
    parser.add_argument("--frames", type=int, default=30, help="of each film")
    parser.add_argument("--repeat", type=int, default=5, help="films of each version; medians are shown")
    parser.add_argument("--kinds", nargs="+", default=[".mp4", ".gif", ""], help="'' is a folder of frames")
    args = parser.parse_args()
    versions = dict(before=args.before, now=ROOT) if args.before else dict(now=ROOT)
    print("| film | version | seconds | processor seconds | MB |")
    print("|---|---|---|---|---|")
    for kind in args.kinds:
        runs = {name: [] for name in versions}
        for _ in range(args.repeat):
            for name, version in versions.items(): runs[name].append(make_film(version, kind, args.frames))
        middle = {name: {what: statistics.median(run[what] for run in of) for what in of[0]} for name, of in runs.items()}
        for name, seen in middle.items():
            print(f"| {kind or 'frames'} | {name} | {seen['wall']:.2f} | {seen['processor']:.2f} | {seen['size']/1e6:.1f} |")
        if not args.before: continue
        pairs = zip(runs["now"], runs["before"])
        wall, processor = zip(*[(now["wall"]/before["wall"], now["processor"]/before["processor"]) for now, before in pairs])
        print(f"| {kind or 'frames'} | now/before | {statistics.median(wall):.2f} | {statistics.median(processor):.2f} | |", flush=True)


if __name__ == "__main__": main()
