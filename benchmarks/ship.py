"""Choose the sampling of trained weights, judge them, and write them with their report.

    python benchmarks/ship.py runs/tiny/weights.safetensors --bones pelvis_atlas.npz --cts DIR -o tiny.safetensors --report report

Fold 6 chooses the sampling, fold 7 is judged once with it, and so are the CTs. What is judged is what ships: the half-precision file. `radrotator evaluate --weights tiny.safetensors` with the same sources gives the same report.
What the pictures of the training look like goes into the file, too, so that other pictures are met with a warning.
"""
import argparse, os, statistics, tempfile, time
from dataclasses import fields
from pathlib import Path

import numpy as np

from radrotator.core import check_output, folder_beside, markdown_table, sha256
from radrotator.evaluate import Questions, atlas_patients, ct_patients, judge, publish, pure_turns, row_of, summary, turned_views, write_report
from radrotator.pairs import TRAIN, VALIDATE, OnTheFlyPairs, PhantomPlan, phantom_jobs
from radrotator.radiograph import Radiograph
from radrotator.rotate import RadRotator, fit_known, training_pictures
from radrotator.transforms import TransformConfig

TONES = (None, (1., 2.), (2., 2.), (4., 2.))
SOLVERS = (("ddim", 1, 1.), ("ddim", 2, 1.), ("ddim", 5, 1.), ("ddim", 10, 1.), ("dpm", 5, 1.), ("dpm", 10, 1.), ("ddim", 1, 1.5), ("ddim", 5, 2.), ("ddim", 20, 4.))  # solver, steps, guidance


def choose(model, patients):
    "Try tones, then solvers; the sampling with the best mean skill about x and z beyond 5°, and all that was tried"
    tried, turns = [], pure_turns((7.5, 12))
    volumes = [(patient, patient.make()) for patient in patients]
    def trial(**sampling):
        model.about["sampling"] = sampling
        rows = [row_of(view, "model") for patient, ct in volumes for view in turned_views(model, ct, turns, f"{patient.group}, {patient.name}")]
        lines = {line["axis"]: line for line in summary(rows, ("axis",))}
        tried.append({name: str(value) for name, value in sampling.items()} | {f"skill {axis}": lines[axis]["skill"] for axis in "xyz"} | {"sharpness x": lines["x"]["sharpness"], "sharpness z": lines["z"]["sharpness"]})
        print(tried[-1], flush=True)
        return lines["x"]["skill"] + lines["z"]["skill"]
    first = dict(zip(("solver", "steps", "guidance"), SOLVERS[0]))
    tone = max(TONES, key=lambda tone: trial(**first, tone=tone and list(tone)))
    return max((dict(zip(first, way)) | dict(tone=tone and list(tone)) for way in SOLVERS), key=lambda sampling: trial(**sampling)), tried


def known_of(about, bones, of="frontal pelvis", patients=(240, 100)):
    "What the pictures of the training look like: those of patients of its folds, and for the limits those of others, of fold 6"
    said = {key: tuple(value) if isinstance(value, list) else value for key, value in about["data"].items() if key in {field.name for field in fields(PhantomPlan)} - {"bones", "physics"}}
    plan, transforms, drawn = PhantomPlan(**said, bones=str(bones)), TransformConfig(**about["training"]["transforms"]), []
    for folds, steps in zip((TRAIN, VALIDATE), patients):
        pairs = OnTheFlyPairs(phantom_jobs(plan), plan, folds=folds, held=1, refresh=1)
        drawn.append(training_pictures(pairs, transforms, steps))
        pairs.close()
    return fit_known(*drawn, of)


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
    parser.add_argument("--cts", type=Path)
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--report", type=Path, required=True, help="folder of the report")
    args = parser.parse_args()
    check_output(args.report)
    with tempfile.TemporaryDirectory() as folder:
        half = Path(folder)/"half.safetensors"
        publish(RadRotator.from_file(args.weights, "cpu"), half, {}, {})
        model = RadRotator.from_file(half, "cpu")
    sampling, tried = choose(model, atlas_patients(args.bones, fold=6))
    print(f"\nchosen on fold 6: {sampling}\n")
    model.about["sampling"] = sampling
    model.about |= dict(seconds_per_view=seconds_per_view(model), cores=len(os.sched_getaffinity(0)))
    began = time.perf_counter()
    found, left_out = judge(model, atlas_patients(args.bones) + (ct_patients(args.cts) if args.cts else []), Questions(), progress=report_as_they_come)
    with folder_beside(args.report) as folder:
        known = write_report(folder, found, dict(weights=args.out.name, left_out=left_out, questions=vars(Questions()), sampling=sampling, seconds=round(time.perf_counter() - began), made={key: value for key, value in model.about.items() if key != "known"}))
    report = {group: {key: figures[key] for key in ("patients", "headline", "styles")} for group, figures in known["groups"].items()}
    for group, figures in report.items(): print(f"\n{group}\n\n{markdown_table(figures['headline'])}\n\n{markdown_table(figures['styles'])}")
    model.about["known"] = known_of(model.about, args.bones)
    publish(model, args.out, sampling, report | {"sampling tried on fold 6": tried})
    print(f"\n{args.out}: {sha256(args.out)}, {model.about['seconds_per_view']:.3f} s a view on {model.about['cores']} cores")


def report_as_they_come(patients, total):
    "Say how far the judge is"
    for i, patient in enumerate(patients, 1):
        print(f"{i}/{total} {patient.group}, {patient.name}", flush=True)
        yield patient


if __name__ == "__main__": main()
