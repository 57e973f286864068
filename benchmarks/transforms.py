"""RandHistogramShift beside scikit-image on the CPU, and whether the two agree.

    python benchmarks/transforms.py

Both sides give both images of every pair of one batch the histogram of the same noise, in turns; each time is the median
of several. `matching`: to noise as large as the image. `sorting`: the same in the way that every other device takes.
`whole`: noise of 32 × 32 pixels, drawn anew each time, on scikit-image's side uniform.
Ends with status 1 where a grey value differs by more than 1e-6; never for a time.
"""
import argparse, os, statistics, sys, time

import numpy as np, torch
from skimage.exposure import match_histograms

from radrotator.train.histogram import _match_by_sorting, match_ranks, draw_noise, rand_histogram_shift

SMALL = 32


def skimage_pairs(pairs, noise):
    "Both images of every pair with the histogram of the pair's noise image"
    return np.stack([[match_histograms(image, values) for image in pair] for pair, values in zip(pairs, noise)])


def sorting(pairs, noise):
    return _match_by_sorting(pairs.flatten(2), noise).view(pairs.shape)


def medians(ways, repeats):
    "Seconds of each way: one call to warm up, then all of them in turns"
    seconds = {name: [] for name in ways}
    for _ in range(repeats + 1):
        for name, way in ways.items():
            start = time.perf_counter(); way(); seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(s[1:]) for name, s in seconds.items()}


def compare(size, batch, repeats):
    "Milliseconds an image for each way, and the largest difference from scikit-image"
    generator, random = torch.Generator().manual_seed(size), np.random.default_rng(size)
    pairs = torch.rand(batch, 2, size, size, generator=generator)
    noise = draw_noise(batch, size*size, generator)
    shuffled = random.permuted(noise.numpy(), axis=1).reshape(batch, size, size)
    ways = dict(skimage=lambda: skimage_pairs(pairs.numpy(), shuffled), matching=lambda: match_ranks(pairs, noise), sorting=lambda: sorting(pairs, noise),
                skimage_whole=lambda: skimage_pairs(pairs.numpy(), random.random((batch, SMALL, SMALL), np.float32)),
                whole=lambda: rand_histogram_shift(pairs[:, :1], pairs[:, 1:], generator, SMALL**2))
    times = {name: seconds*1e3/(2*batch) for name, seconds in medians(ways, repeats).items()}
    expected = ways["skimage"]()
    return times, max(np.abs(expected - ways[way]().numpy()).max() for way in ("matching", "sorting"))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=32, help="pairs")
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    print(f"{args.batch} pairs, milliseconds an image, median of {args.repeats}; {len(os.sched_getaffinity(0))} cores, torch {torch.__version__}\n")
    print("| pixels | threads | scikit-image | matching | | sorting | | scikit-image, whole | whole | | largest difference |\n|---|---|---|---|---|---|---|---|---|---|---|")
    worst = 0.0
    for size in (64, 128, 256):
        for threads in (1, 2):
            torch.set_num_threads(threads)
            t, difference = compare(size, args.batch, args.repeats)
            worst = max(worst, difference)
            print(f"| {size}² | {threads} | {t['skimage']:.3f} | {t['matching']:.3f} | {t['skimage']/t['matching']:.1f}× | {t['sorting']:.3f} | {t['skimage']/t['sorting']:.1f}× "
                  f"| {t['skimage_whole']:.3f} | {t['whole']:.3f} | {t['skimage_whole']/t['whole']:.1f}× | {difference:.1e} |", flush=True)
    return int(worst > 1e-6)


if __name__ == "__main__": sys.exit(main())
