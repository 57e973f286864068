"""Judge trained weights, and write them in half precision with their report and with what their pictures look like.

    python benchmarks/ship.py runs/tiny/weights.safetensors --bones pelvis_atlas.npz --cts DIR \\
        -o tiny.safetensors --report report

The patients of fold 7 are judged once, and so are the CTs. What is judged is what ships: the half-precision file.
`radrotator evaluate --weights tiny.safetensors` with the same sources gives the same report. What the pictures of the
training look like goes into the file, too, so that other pictures are met with a warning.
"""
import argparse, os, statistics, tempfile, time
from pathlib import Path

import numpy as np

from radrotator.core import markdown_table
from radrotator.files import check_output, atomic_folder, sha256
from radrotator.evaluate.judge import judge
from radrotator.evaluate.patients import atlas_patients, ct_patients
from radrotator.evaluate.protocol import Protocol
from radrotator.evaluate.report import save_release, write_judge_report
from radrotator.train.losses import LiftingConfig
from radrotator.pairs.folds import TRAIN, VALIDATE
from radrotator.pairs.live import OnTheFlyPairs, OnTheFlySlabs
from radrotator.pairs.sources import PhantomPlan, phantom_jobs
from radrotator.radiograph.image import Radiograph
from radrotator.rotate.novelty import fit_novelty_model
from radrotator.rotate.rotator import RadRotator
from radrotator.train.novelty import draw_training_pictures
from radrotator.train.config import with_settings
from radrotator.train.transforms import TransformConfig

SHIPPED = "patients", "headline", "styles", "depth"  # figures that the weights file carries


def draw_pictures(model, plan, folds, steps):
    "Draw pictures as training does; of a lifting network's slabs one is enough, because their sum is seen"
    feed, refresh = (OnTheFlySlabs, plan.echo) if model.lifts else (OnTheFlyPairs, 1)
    data = feed(phantom_jobs(plan), plan, folds=folds, held=1, refresh=refresh)
    recipe = LiftingConfig() if model.lifts else TransformConfig(**model.about.get("training", {}).get("transforms", {}))
    pictures = draw_training_pictures(data, recipe, steps)
    data.close()
    return pictures


def known_of(model, bones, of="frontal pelvis", patients=(240, 100)):
    "Learn what the training's pictures look like from patients of its folds, and the limits from those of fold 6"
    plan = PhantomPlan(bones=str(bones), count=5000, bare=0.3, atlas_share=0.7, slabs=2*model.lifts, canvas=64*model.lifts)
    drawn = [draw_pictures(model, plan, folds, steps) for folds, steps in zip((TRAIN, VALIDATE), patients)]
    return fit_novelty_model(*drawn, of)


def seconds_per_view(model, views=15):
    "Measure the first view of a 512² radiograph, and the median of those of one that was lifted before"
    picture = Radiograph(np.random.default_rng(0).random((512, 512), np.float32))
    def once(angle):
        start = time.perf_counter()
        model.rotate(picture, z=angle)
        return time.perf_counter() - start
    once(5)
    model.latest = None, None
    return once(5), statistics.median(once(angle) for angle in np.linspace(1, 15, views))


def show_progress(patients, total):
    "Print how far the judge is"
    for i, patient in enumerate(patients, 1):
        print(f"{i}/{total} {patient.group}, {patient.name}", flush=True)
        yield patient


def halve(path, folder):
    "Load the weights as they ship, in half precision, with their default sampling"
    save_release(RadRotator.from_file(path, "cpu"), Path(folder)/"half.safetensors", {}, {})
    model = RadRotator.from_file(Path(folder)/"half.safetensors", "cpu")
    model.about["sampling"] = dict(detail=1.0) if model.lifts else model.about["sampling"] or dict(steps=1)
    return model


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", type=Path)
    parser.add_argument("--bones", type=Path, required=True)
    parser.add_argument("--cts", type=Path, action="append", default=[], help="a folder of CTs; may be given again")
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--report", type=Path, required=True, help="folder of the report")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="of `evaluate.protocol.Protocol`")
    return parser.parse_args()


def main():
    args = parse_arguments()
    check_output(args.report)
    protocol = with_settings(Protocol(), dict(word.split("=", 1) for word in args.set))
    with tempfile.TemporaryDirectory() as folder: model = halve(args.weights, folder)
    first, further = seconds_per_view(model)
    model.about |= dict(seconds_first_view=first, seconds_per_view=further, cores=len(os.sched_getaffinity(0)))
    patients = atlas_patients(args.bones) + [patient for folder in args.cts for patient in ct_patients(folder)]
    began = time.perf_counter()
    results, left_out = judge(model, patients, protocol, progress=show_progress)
    about = dict(weights=args.out.name, left_out=left_out, questions=vars(protocol), sampling=model.about["sampling"],
                 seconds=round(time.perf_counter() - began),
                 made={key: value for key, value in model.about.items() if key != "known"})
    with atomic_folder(args.report) as folder: figures = write_judge_report(folder, results, about)
    report = {group: {key: mine[key] for key in SHIPPED} for group, mine in figures["groups"].items()}
    for group, mine in report.items():
        print(f"\n{group}\n\n{markdown_table(mine['headline'])}\n\n{markdown_table(mine['depth'])}")
    model.about["known"] = known_of(model, args.bones)
    save_release(model, args.out, model.about["sampling"], report)
    print(f"\n{args.out}: {sha256(args.out)}, {first:.2f} s the first view, {further:.3f} s a further one")


if __name__ == "__main__": main()
