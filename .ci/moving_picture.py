"""Make the landing page's moving picture: a radiograph, the same turned by the weights, and the true view, swept about z and x.

    python .ci/moving_picture.py                                  with the weights that come with the package
    python .ci/moving_picture.py --weights runs/tiny/weights.safetensors --to /tmp/sweep.webp
"""
import argparse, os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the order of a sum
ROOT = Path(__file__).resolve().parents[1]
UNSEEN = 2**31 + 1           # a phantom whose seed lies above all of training's
SIZE, GAP, LABEL = 210, 8, 28  # pixels: side of a panel, between panels, and the line of words below
FRAMES, SECONDS = 48, 3.6    # of one axis, there and back


def poses():
    "((2·FRAMES), 3) degrees: from rest to one end, to the other and back, slowly at the ends; first about z, then about x"
    import numpy as np
    swing, rest = 15*np.sin(2*np.pi*np.arange(FRAMES)/FRAMES).round(9), np.zeros(FRAMES)
    return np.concatenate([np.stack([rest, rest, swing], 1), np.stack([swing, rest, rest], 1)])


def panels(model, soft):
    "For each pose the input, the rotated and the true view of the unseen phantom, on one scale of greys"
    import numpy as np
    from radrotator.drr.frame import fit_fov
    from radrotator.drr.render import Renderer
    from radrotator.evaluate.views import SCALE
    from radrotator.geometry import CArm
    from radrotator.phantom.phantom import phantom
    from radrotator.radiograph.write import Radiograph
    ct = phantom(UNSEEN, spacing=2.0, soft=soft)
    each, which = np.unique(poses(), axis=0, return_inverse=True)
    carm, renderer = fit_fov(ct, CArm(size=SIZE, fov=300.0), each), Renderer(ct)
    offset = renderer.centre_offsets(np.zeros((1, 3)), carm)
    input, *truths = renderer(np.concatenate([np.zeros((1, 3)), each]), carm, 2, offset[0]).numpy()
    scale = SCALE/input.max()
    rotated = [view.pixels for view in model.views(Radiograph(input*scale, linear=True), each)]
    input, truths = input*scale, np.stack(truths)*scale
    low = np.percentile(input, 3)  # else a little air takes up half of the greys
    shade = lambda picture: (255*((picture - low)/(SCALE - low)).clip(0, 1)).astype(np.uint8)
    return [(shade(input), shade(rotated[i]), shade(truths[i])) for i in which.ravel()]


def sheet(rows, words):
    "Rows of pictures side by side, and a line of words below them"
    from matplotlib.font_manager import findfont
    from PIL import Image, ImageDraw, ImageFont
    image = Image.new("L", (3*(SIZE + GAP) - GAP, len(rows)*(SIZE + GAP) - GAP + LABEL), 0)
    draw, font = ImageDraw.Draw(image), ImageFont.truetype(findfont("DejaVu Sans"), 14)
    for j, row in enumerate(rows):
        for i, picture in enumerate(row): image.paste(Image.fromarray(picture), (i*(SIZE + GAP), j*(SIZE + GAP)))
    for i, word in enumerate(words): draw.text((i*(SIZE + GAP) + SIZE/2, image.height - LABEL/2), word, 235, font, anchor="mm")
    return image.convert("RGB")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, help="default: those of the package")
    parser.add_argument("--to", type=Path, default=ROOT/"nbs"/"images"/"sweep.webp")
    args = parser.parse_args()
    from radrotator.files import atomic_file
    from radrotator.rotate.rotator import RadRotator
    model = RadRotator.from_file(args.weights, "cpu") if args.weights else RadRotator.from_pretrained(device="cpu")
    rows = zip(panels(model, soft=True), panels(model, soft=False))
    angle = lambda i, x, z: f"{'z' if i < FRAMES else 'x'} = {round(x + z):+d}°".replace("+0", "0").replace("-", "−")
    frames = [sheet(pair, ("radiograph", f"rotated, {angle(i, x, z)}", "true view")) for i, (pair, (x, _, z)) in enumerate(zip(rows, poses()))]
    with atomic_file(args.to) as beside:
        frames[0].save(beside, "WEBP", save_all=True, append_images=frames[1:], duration=round(1000*SECONDS/FRAMES), loop=0, quality=72, method=6, kmin=0, kmax=1)  # every frame whole: differences of frames leave blocks behind
    print(f"{args.to}: {len(frames)} frames, {args.to.stat().st_size/1000:.0f} kB")


if __name__ == "__main__": main()
