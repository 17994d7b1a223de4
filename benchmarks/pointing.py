"""Whether the strongest place of a map lies on the object, and whether a map knows its class.

    python benchmarks/pointing.py                    # EfficientNet-Lite0, 100 pictures of ECSSD; 4 min on one core
    python benchmarks/pointing.py --only gradient integrated-gradients occlusion smoothgrad  # longer: many passes a map

ECSSD's masks say what people look at; the class is the likeliest one. A hit: the strongest pixel lies on the mask or within
15 pixels of it, as in the pointing game. "random" is a pixel drawn by chance (seeds 0, 1, 2), "centre" a guess at the middle. The
maps of all layers come from one forward and one backward. "mass": how much of a map of pixels lies on the object itself;
"even" is a map that is the same everywhere. Class sensitivity: Spearman's correlation of the maps of the most and the least
likely class, with and without a meta step of 0.0025 where a method has one. `--parts` prints the shares of each ten
pictures, for pairs, and ± is two standard errors over these.
"""

from __future__ import annotations

import argparse
import io
import math
import statistics
import tarfile
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from PIL import Image
from scipy.ndimage import binary_dilation
from torch import Tensor

import secateur
from secateur.data.pictures import normalise
from secateur.methods.grad_cam import cam
from secateur.methods.normgrad import contribution_map
from secateur.saliency import class_sensitivity
from secateur.saliency.maps import combine, resize
from secateur.saliency.record import record
from secateur.tasks.vision import load_network
from secateur.utils.files import require_data

SIZE, REACH, PART = 224, 15, 10
PIXELS = ("lrp", "salient-relevance", "gradient", "guided-backprop", "guided-grad-cam")
BLURRED = ("lrp", "integrated-gradients")
"""Maps of both signs that change from pixel to pixel."""
BLIND = ("gradient", "guided-backprop", "guided-grad-cam", "grad-cam")
"""Maps whose class sensitivity is printed too; they have no meta step."""
CELLS = {
    "normgrad": ("conv1", "norm"),
    "selective-normgrad": ("scaling", "positive"),
    "linear-approximation": ("scaling", "sum"),
    "gradient": ("bias", "max"),
}


def pictures(limit: int) -> Iterator[tuple[Tensor, np.ndarray, np.ndarray]]:
    """([1, 3, 224, 224] normalised, bool [224, 224] of the object, and widened)"""
    disc = np.hypot(*np.mgrid[-REACH : REACH + 1, -REACH : REACH + 1]) <= REACH
    with tarfile.open(require_data("ecssd/ecssd_part_a.tar")) as archive:
        names = [n[7:-4] for n in archive.getnames() if n.startswith("images/")][:limit]
        for name in names:
            files = [archive.extractfile(member) for member in (f"images/{name}.jpg", f"masks/{name}.png")]
            image, mask = (Image.open(io.BytesIO(file.read())) for file in files if file)
            pixels = np.asarray(image.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BICUBIC))
            mask = np.asarray(mask.convert("L").resize((SIZE, SIZE), Image.Resampling.NEAREST)) >= 128
            yield normalise(pixels[None].copy(), (0.5,) * 3, (0.5,) * 3), mask, binary_dilation(mask, disc)


def parts(values: Sequence[float]) -> list[float]:
    """The mean of each ten pictures, in percent; what is left over isn't counted."""
    whole = [100 * float(v) for v in values]
    return [round(statistics.mean(whole[i : i + PART]), 2) for i in range(0, len(whole) - PART + 1, PART)]


def told(values: Sequence[float]) -> str:
    """The mean in percent, and two standard errors over the parts."""
    own = parts(values)
    error = 2 * statistics.stdev(own) / len(own) ** 0.5 if len(own) > 1 else math.nan
    return f"{100 * np.mean(values):.1f} ± {error:.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pictures", type=int, default=100)
    parser.add_argument("--sensitivity", type=int, default=20, help="pictures for class sensitivity")
    parser.add_argument("--parts", action="store_true", help="also print the shares of each ten pictures")
    parser.add_argument("--only", nargs="+", help="these maps of pixels and none of layers")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model = load_network("efficientnet-lite0")
    hits: dict[tuple[str, str], list[float]] = {}
    mass: dict[str, list[float]] = {}
    kept = []
    guess = [np.random.default_rng(seed) for seed in range(3)]
    for x, mask, wide in pictures(args.pictures):
        kept.append(x)
        hits.setdefault(("centre", "pixels"), []).append(float(wide[SIZE // 2, SIZE // 2]))
        for seed, draw in enumerate(guess):
            row, column = draw.integers(SIZE, size=2)
            hits.setdefault((f"random, seed {seed}", "pixels"), []).append(float(wide[row, column]))
        mass.setdefault("even", []).append(float(mask.mean()))

        def point(method: str, layer: str, values: Tensor, wide: np.ndarray = wide) -> None:
            row, column = divmod(int(resize(values, (SIZE, SIZE))[0].argmax()), SIZE)
            hits.setdefault((method, layer), []).append(float(wide[row, column]))

        maps: dict[str, list[Tensor]] = {}
        seen = record(model, x, None, "all" if not args.only else ())
        for layer, a in seen.activations.items():
            g = seen.gradients[layer]
            for method, cell in CELLS.items():
                maps.setdefault(method, []).append(contribution_map(a, g, *cell))
            maps.setdefault("grad-cam", []).append(cam(a, g))
            for method, found in maps.items():
                point(method, layer, found[-1])
        for method, found in maps.items():
            point(method, "all", combine(found))
        for method in args.only or PIXELS:
            blur = 0.02 if method in BLURRED else 0.0
            values = secateur.saliency(model, x, method, blur=blur).values
            point(method, "pixels", values)
            positive = values.reshape(SIZE, SIZE).clamp(min=0).double().numpy()
            mass.setdefault(method, []).append(positive[mask].sum() / positive.sum())
    layers = [layer for method, layer in hits if method == "normgrad"]
    print(f"{len(kept)} pictures; ± is two standard errors over parts of {PART}, all in %")
    print(f"{'pointing':22s}" + "".join(f"{layer:>14s}" for layer in layers))
    for method in (*CELLS, "grad-cam") if layers else ():
        print(f"{method:22s}" + "".join(f"{told(hits[method, layer]):>14s}" for layer in layers))
    for (method, layer), shares in hits.items():
        if layer == "pixels":
            print(f"{method:22s}{told(shares):>14s}")
    print(f"\n{'mass on the object':22s}")
    for method, values in mass.items():
        print(f"{method:22s}{told(values):>14s}")
    if args.parts:
        print("\nparts")
        for (method, layer), found in hits.items():
            print(f"{method}, {layer}: {parts(found)}")
        for method, found in mass.items():
            print(f"{method}, mass: {parts(found)}")
    print(
        f"\n{'class sensitivity':22s}{'plain':>14s}{'meta':>14s}   (mean over the pictures whose maps aren't empty; 1 is blind)"
    )
    for method in args.only or ("normgrad", "selective-normgrad", "linear-approximation", *BLIND):
        said = []
        for meta in (0.0, 0.0025) if method not in BLIND and not args.only else (None,):
            settings = {} if meta is None else {"meta": meta}
            found = [class_sensitivity(model, x[0], method, **settings) for x in kept[: args.sensitivity]]
            known = [value for value in found if not math.isnan(value)]
            said.append(f"{statistics.mean(known):.2f} ({len(known)})" if known else "none")
            if args.parts:
                print(f"{method}, {meta}: {[round(value, 3) for value in found]}")
        print(f"{method:22s}" + "".join(f"{text:>14s}" for text in said), flush=True)


if __name__ == "__main__":
    main()
