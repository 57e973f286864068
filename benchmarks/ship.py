"""Judge trained weights on patients of a bone atlas and on real CT, and write them with their report.

    python benchmarks/ship.py runs/tiny/weights.safetensors --bones pelvis_atlas.npz --ct a.nii.gz --ct b.nii.gz -o tiny.safetensors

Fold 6 chooses the sampling, fold 7 is judged once with it. What is judged is what ships: the half-precision file.
"""
import argparse, os, statistics, tempfile, time
from dataclasses import replace
from pathlib import Path

import numpy as np

from radrotator.ct import read_ct
from radrotator.evaluate import judge, markdown_table, publish, summary
from radrotator.phantom import BoneAtlas, phantom
from radrotator.radiograph import Radiograph
from radrotator.rotate import RadRotator

UNSEEN = 2**31  # training draws the seeds of its phantoms below this
TONES = (None, (1., 1.), (1., 2.), (2., 2.), (4., 2.), (8., 2.))
SOLVERS = ((1, 1.), (2, 1.), (5, 1.), (10, 1.), (1, 1.5), (1, 2.), (5, 2.), (20, 4.))  # steps, guidance


def patients(atlas, fold, soft, bodies=1):
    "The atlas's patients of one fold, each in one or more synthetic bodies"
    for row in np.flatnonzero(atlas.folds == fold):
        for body in range(bodies):
            yield replace(phantom(UNSEEN + 100*int(row) + body, bones=atlas, patient=int(row), soft=soft), name=f"atlas {row}")


def choose(model, cts):
    "Try tones, then solvers; the sampling with the best mean skill about x and z, and all that was tried"
    tried = []
    def trial(angles, **sampling):
        model.about["sampling"] = sampling
        rows = {r["axis"]: r for r in summary([r for kind in cts.values() for r in judge(model, kind, angles)], ((5, 15),))}
        tried.append(dict(degrees=str(angles), steps=sampling["steps"], guidance=sampling["guidance"], tone=str(sampling["tone"]), x=rows["x"]["skill"], z=rows["z"]["skill"]))
        print(tried[-1], flush=True)
        return rows["x"]["skill"] + rows["z"]["skill"]
    tone = max(TONES, key=lambda tone: trial((7.5, 12, 14), steps=1, guidance=1., tone=tone))
    best = max(SOLVERS, key=lambda s: trial((12,), steps=s[0], guidance=s[1], tone=tone))
    return dict(steps=best[0], guidance=best[1], tone=tone and list(tone)), tried


def rounded(rows):
    return [{key: round(float(value), 3) if isinstance(value, float) else value for key, value in row.items()} for row in rows]


def seconds_per_view(model, views=15):
    picture = Radiograph(np.random.default_rng(0).random((256, 256), np.float32))
    def once():
        start = time.perf_counter(); model.rotate(picture, z=5); return time.perf_counter() - start
    once()
    return statistics.median(once() for _ in range(views))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", type=Path)
    parser.add_argument("--bones", type=Path, required=True)
    parser.add_argument("--ct", type=Path, action="append", default=[])
    parser.add_argument("-o", "--out", type=Path, required=True)
    args = parser.parse_args()
    atlas = BoneAtlas.read(args.bones)
    with tempfile.TemporaryDirectory() as folder:
        half = Path(folder)/"half.safetensors"
        publish(RadRotator.from_file(args.weights), half, {}, {})
        model = RadRotator.from_file(half)
    kinds = dict(soft=True, bone=False)
    sampling, tried = choose(model, {kind: list(patients(atlas, 6, soft)) for kind, soft in kinds.items()})
    model.about["sampling"] = sampling
    angles = (1, 3.5, 7.5, 12, 14)
    report = {"atlas patients, fold 7, soft tissue": judge(model, patients(atlas, 7, True, bodies=2), angles),
              "atlas patients, fold 7, bone only": judge(model, patients(atlas, 7, False), angles)}
    if args.ct: report["real pelvis CT, bone only"] = judge(model, (replace(read_ct(path).resample(2.), name=f"ct {i}") for i, path in enumerate(args.ct)), angles)
    report = {name: rounded(summary(rows)) for name, rows in report.items()}
    for name, rows in report.items(): print(f"\n{name}\n\n{markdown_table(rows)}")
    model.about |= dict(seconds_per_view=seconds_per_view(model))
    print(f"\nsampling {sampling}, {model.about['seconds_per_view']:.3f} s a view on {len(os.sched_getaffinity(0))} cores")
    publish(model, args.out, sampling, report | {"sampling tried on fold 6": rounded(tried)})


if __name__ == "__main__": main()
