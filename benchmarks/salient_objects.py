"""Objects that stand out in ECSSD's photographs: links of neighbours against a binary mask, several opinions against one.

    python benchmarks/salient_objects.py connnet                        # EfficientNet-Lite0, three seeds
    python benchmarks/salient_objects.py connnet --backbone vit-s-focus
    python benchmarks/salient_objects.py psod                           # three prompts against one, preferences

The backbone stays as it is and sees pictures of 160 x 160 (the ViT 168 x 168) once, as they are and mirrored; only heads learn, with
the same steps, width and seed. A seed draws which 50 of the 250 pictures are held out, the head's weights and the order. Figures are
of maps and masks enlarged to the picture's own size. ± is two standard errors over the held-out pictures of all seeds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from secateur.data.ecssd import load_ecssd
from secateur.measure.opinions import opinion_figures, preference_figures
from secateur.method import make_method
from secateur.saliency.objects.features import smaller
from secateur.saliency.objects.opinions import tries
from secateur.tasks.scenes.opinions import draw_opinions
from secateur.tasks.sod import BACKBONES, Backbone, judge, learn, lessons, look, own_size, read, stack_masks

SEEDS = (0, 1, 2)


def split(seed: int) -> tuple[list[int], list[int]]:
    """Numbers of the 200 pictures to train on and of the 50 others, as `load_ecssd` parts them."""
    whole = {id(p): n for n, p in enumerate(load_ecssd()[0])}
    train, test = ([whole[id(p)] for p in load_ecssd(part, seed=seed)[0]] for part in ("train", "test"))
    return train, test


def seen(spec: Backbone, pictures: Sequence[Tensor], keep: Path | None = None) -> list[list[Tensor]]:
    """The maps of all pictures, and of their mirror images; read from a file where one was kept."""
    if keep is not None and keep.is_file():
        return torch.load(keep, weights_only=True)
    model = spec.load()
    found = [look(spec, model, pictures, mirrored=side) for side in (False, True)]
    if keep is not None:
        torch.save(found, keep)
    return found


def paired(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, float]:
    """The mean difference in pairs and two standard errors."""
    apart = [a - b for a, b in zip(ours, theirs, strict=True)]
    return statistics.mean(apart), 2 * statistics.stdev(apart) / len(apart) ** 0.5


def connnet(arguments: argparse.Namespace) -> None:
    spec = BACKBONES[arguments.backbone]
    pictures, masks = load_ecssd()
    plain, mirrored = seen(spec, pictures, (arguments.keep or [None])[0])
    stacked = stack_masks(pictures, masks, spec.size)
    each: dict[str, dict[str, list[float]]] = {}
    for seed in arguments.seeds:
        train, test = split(seed)
        data = lessons(
            [torch.cat([a[train], b[train]]) for a, b in zip(plain, mirrored)],
            torch.cat([stacked[train], stacked[train].flip(-1)]),
        )
        for name in arguments.heads:
            predict, _, more = name.partition(":")
            own = json.loads(more) if more else {}
            method = make_method("connnet", predict=predict, **own)
            started = time.monotonic()
            head = learn(method, data, steps=arguments.steps, seed=seed)
            took = time.monotonic() - started
            found = own_size(read(method, head, [m[test] for m in plain]), [masks[n].shape for n in test])
            figures = judge(found, [masks[n] for n in test])
            row = {"head": name, "seed": seed, **figures.table(), "seconds": took}
            print(
                json.dumps({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}),
                flush=True,
            )
            kept = each.setdefault(name, {key: [] for key in figures.each})
            for key, values in figures.each.items():
                kept[key] += values
            if arguments.each is not None:
                with arguments.each.open("a") as file:
                    print(json.dumps({"head": name, "seed": seed, **figures.each}), file=file)
    first, rival = arguments.heads[0], arguments.heads[-1]
    for key in ("mae", "components", "iou", "s"):
        mean, error = paired(each[first][key], each[rival][key])
        print(f"{first} - {rival}, {key}: {mean:+.4f} ± {error:.4f}")


def psod(arguments: argparse.Namespace) -> None:
    """With the default the last of the prompts is the one-mask model."""
    spec = BACKBONES[arguments.backbone]
    photographs, photo_masks = load_ecssd()
    drawn, drawn_masks = draw_opinions(250, 0, spec.size)
    pictures, masks = photographs + drawn, photo_masks + drawn_masks
    sides = [
        seen(spec, some, keep) for some, keep in zip((photographs, drawn), arguments.keep or (None, None))
    ]
    plain, mirrored = ([torch.cat(two) for two in zip(*some)][arguments.coarse :] for some in zip(*sides))
    stacked = stack_masks(pictures, masks, spec.size)
    for seed in arguments.seeds:
        train, test = split(seed)
        kinds = {"photographs": test, "scenes": list(range(450, 500))}
        train = train + list(range(250, 450))
        data = lessons(
            [torch.cat([a[train], b[train]]) for a, b in zip(plain, mirrored)],
            torch.cat([stacked[train], stacked[train].flip(-1)]),
        )
        for prompts in arguments.prompts:
            method = make_method("psod", prompts=prompts)
            started = time.monotonic()
            head = learn(method, data, steps=arguments.steps, seed=seed)
            took = time.monotonic() - started
            row: dict[str, object] = {"prompts": prompts, "seed": seed, "seconds": took}
            for kind, rows in {**kinds, "all": [n for part in kinds.values() for n in part]}.items():
                found = read(method, head, [m[rows] for m in plain])
                size = found.masks.shape[2:]
                truths = smaller(stacked[rows], size)
                figures = opinion_figures(
                    [own[own.flatten(1).any(1)] for own in found.masks],
                    [t[t.flatten(1).any(1)] for t in truths],
                )
                row |= {f"{kind} {name}": 100 * value for name, value in figures.items()}
                torch.manual_seed(1000 + seed)
                count = truths.flatten(2).any(2).sum(1)
                tried, value = tries(truths, count, found.masks)
                scores = preferences(head, [m[rows] for m in plain], tried)
                shown = tried.flatten(2).any(2)  # a place that no opinion fills isn't a mask
                row |= {f"{kind} {n}": v for n, v in preference_figures(scores[shown], value[shown]).items()}
            print(
                json.dumps({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}),
                flush=True,
            )


@torch.no_grad()
def preferences(head: Any, maps: Sequence[Tensor], masks: Tensor) -> Tensor:
    """[N, K] how much masks would be liked."""
    parts = zip(*(m.split(10) for m in maps), masks.split(10))
    return torch.cat([head.scores(head.pyramid(some[:-1]), some[-1]).sigmoid() for some in parts])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=("connnet", "psod"))
    parser.add_argument("--backbone", choices=tuple(BACKBONES), default="efficientnet-lite0")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--steps", type=int, default=300, help="of training; 200 for psod")
    parser.add_argument("--heads", nargs="+", default=["links", "mask"])
    parser.add_argument("--coarse", type=int, default=1, help="finest maps that psod leaves out, for speed")
    parser.add_argument("--each", type=Path, help="a file to which the figures of single pictures are added")
    parser.add_argument("--prompts", type=int, nargs="+", default=[3, 1])
    parser.add_argument(
        "--keep",
        type=Path,
        nargs="+",
        help="files for the maps of photographs, and of scenes; written and read again",
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    {"connnet": connnet, "psod": psod}[arguments.part](arguments)


if __name__ == "__main__":
    main()
