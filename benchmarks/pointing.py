"""Whether the strongest place of a map lies on the object, and whether a map knows its class.

    python benchmarks/pointing.py                    # EfficientNet-Lite0, 100 pictures of ECSSD; 3 min on one core

ECSSD's masks say what people look at; the class is the likeliest one. A hit: the strongest pixel lies on the mask or within
15 pixels of it, as in the pointing game. "chance" is the mean share of the masks, so widened, "centre" a guess at
the middle. The maps of all layers come from one forward and one backward. Class sensitivity: Spearman's
correlation of the maps of the most and the least likely class, last stage, with and without a meta step of 0.0025.
"""

from __future__ import annotations

import argparse
import io
import math
import statistics
import tarfile
from collections.abc import Iterator

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

SIZE, REACH = 224, 15
CELLS = {
    "normgrad": ("conv1", "norm"),
    "selective-normgrad": ("scaling", "positive"),
    "linear-approximation": ("scaling", "sum"),
    "gradient": ("bias", "max"),
}


def pictures(limit: int) -> Iterator[tuple[Tensor, np.ndarray]]:
    """([1, 3, 224, 224] normalised, bool [224, 224] of the object)"""
    disc = np.hypot(*np.mgrid[-REACH : REACH + 1, -REACH : REACH + 1]) <= REACH
    with tarfile.open(require_data("ecssd/ecssd_part_a.tar")) as archive:
        names = [n[7:-4] for n in archive.getnames() if n.startswith("images/")][:limit]
        for name in names:
            files = [archive.extractfile(member) for member in (f"images/{name}.jpg", f"masks/{name}.png")]
            image, mask = (Image.open(io.BytesIO(file.read())) for file in files if file)
            pixels = np.asarray(image.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BICUBIC))
            mask = np.asarray(mask.convert("L").resize((SIZE, SIZE), Image.Resampling.NEAREST)) >= 128
            yield normalise(pixels[None].copy(), (0.5,) * 3, (0.5,) * 3), binary_dilation(mask, disc)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pictures", type=int, default=100)
    parser.add_argument("--sensitivity", type=int, default=20, help="pictures for class sensitivity")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model = load_network("efficientnet-lite0")
    hits: dict[tuple[str, str], list[bool]] = {}
    shares, centres, kept = [], [], []
    for x, mask in pictures(args.pictures):
        shares.append(mask.mean())
        centres.append(mask[SIZE // 2, SIZE // 2])
        kept.append(x)

        def point(method: str, layer: str, values: Tensor, mask: np.ndarray = mask) -> None:
            row, column = divmod(int(resize(values, (SIZE, SIZE))[0].argmax()), SIZE)
            hits.setdefault((method, layer), []).append(bool(mask[row, column]))

        seen = record(model, x, None, "all")
        maps: dict[str, list[Tensor]] = {}
        for layer, a in seen.activations.items():
            g = seen.gradients[layer]
            for method, cell in CELLS.items():
                maps.setdefault(method, []).append(contribution_map(a, g, *cell))
            maps.setdefault("grad-cam", []).append(cam(a, g))
            for method, found in maps.items():
                point(method, layer, found[-1])
        for method, found in maps.items():
            point(method, "all", combine(found))
        for method in ("lrp", "salient-relevance"):
            blur = 0.02 if method == "lrp" else 0.0
            point(method, "pixels", secateur.saliency(model, x, method, blur=blur).values)
    layers = [layer for method, layer in hits if method == "normgrad"]
    print(f"{len(shares)} pictures: chance {np.mean(shares):.1%}, centre {np.mean(centres):.1%}")
    print(f"{'pointing':22s}" + "".join(f"{layer:>10s}" for layer in layers))
    for method in (*CELLS, "grad-cam"):
        print(f"{method:22s}" + "".join(f"{np.mean(hits[method, layer]):10.1%}" for layer in layers))
    for method in ("lrp", "salient-relevance"):
        print(f"{method:22s}{np.mean(hits[method, 'pixels']):10.1%}")
    print(
        f"\n{'class sensitivity':22s}{'plain':>10s}{'meta':>10s}   (mean over {args.sensitivity} pictures; 1 is blind)"
    )
    for method in ("normgrad", "selective-normgrad", "linear-approximation"):
        means = []
        for meta in (0.0, 0.0025):
            found = [class_sensitivity(model, x[0], method, meta=meta) for x in kept[: args.sensitivity]]
            means.append(statistics.mean(value for value in found if not math.isnan(value)))
        print(f"{method:22s}" + "".join(f"{mean:10.2f}" for mean in means), flush=True)


if __name__ == "__main__":
    main()
