"""Which map is faithful: tokens of a text leave in its order, or pixels of a picture are covered, and the prediction is read.

    python benchmarks/deletion.py              # SmolLM2-135M-Instruct, 20 passages of WikiText-2
    python benchmarks/deletion.py --pictures 20          # ResNet-20 on CIFAR-10
    python benchmarks/deletion.py --maps lrp gradient    # those whose names begin so


Each passage is the first 24 tokens of a paragraph; the target is the token that the model finds likeliest next. Tokens leave the
text (the others close up) in steps of a sixth, those with the largest values first, and those with the smallest first. A map
is faithful where the target's log-probability falls fast in the first order and slowly in the second: "gap" is the mean over the
steps of the second less the first, in nats; "first" and "last" are the two means. The last token always stays: what comes next depends on it in any map.

Of pictures the pixels are set to 0, the mean colour, an eighth, two eighths, ... of them, and the mean log-probability of the likeliest class is read, in the same
two orders. There "sum" is how far the values' sum is from the logit less that of an empty picture, as a share of it.

"random" is an order drawn by chance (seeds 0, 1, 2). ± is two standard errors over the passages; pairs are differences from lrp on the same passages.
"""

from __future__ import annotations

import argparse
import math
import time

import numpy as np
import torch
from torch import Tensor

import secateur
from secateur.data.pictures import load_pictures
from secateur.data.text import load_text
from secateur.saliency.text import text_saliency
from secateur.tasks import load_model
from secateur.tasks.registry import load_network

LENGTH, STEPS = 24, 6
MAPS: dict[str, tuple[str, dict]] = {
    "lrp (attn-lrp)": ("lrp", {}),
    "lrp (epsilon)": ("lrp", {"composite": "epsilon"}),
    "gradient": ("gradient", {}),
    "gradient x input": ("gradient", {"times_input": True}),
    "integrated gradients, 10 steps": ("integrated-gradients", {"steps": 10}),
    "smoothgrad, 10 copies": ("smoothgrad", {"samples": 10}),
    "occlusion": ("occlusion", {}),
}


def passages(tokenizer: object, count: int) -> list[str]:
    """The first tokens of paragraphs that are long enough and no headings."""
    found = []
    for line in load_text("wikitext2").split("\n"):
        ids = tokenizer(line.strip())["input_ids"] if len(line) > 200 else []  # type: ignore[operator]
        if len(ids) > LENGTH:
            text = tokenizer.decode(ids[:LENGTH])  # type: ignore[attr-defined]
            if len(tokenizer(text)["input_ids"]) == LENGTH:  # type: ignore[operator]
                found.append(text)
        if len(found) == count:
            break
    return found


@torch.no_grad()
def curves(model: torch.nn.Module, ids: Tensor, target: int, orders: list[Tensor]) -> list[float]:
    """log p(target) where 1/6, 2/6, ... of the tokens but the last left in each order, a mean over these."""
    said = []
    for step in range(1, STEPS):
        stays = torch.ones(len(orders), len(ids), dtype=torch.bool)
        for row, order in zip(stays, orders, strict=True):
            row[order[: round(step / STEPS * len(order))]] = False
        left = torch.stack([ids[row] for row in stays])
        logits = model(left, use_cache=False, logits_to_keep=1).logits[:, -1]
        said.append(logits.log_softmax(-1)[:, target])
    return torch.stack(said).mean(0).tolist()


def told(values: list[float]) -> str:
    return f"{np.mean(values):.2f} ± {2 * np.std(values, ddof=1) / math.sqrt(len(values)):.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--passages", type=int, default=20)
    parser.add_argument("--pictures", type=int, help="pictures of CIFAR-10 in place of texts")
    parser.add_argument("--maps", nargs="+", help="only maps whose names begin with one of these")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.pictures:
        pictures(args.pictures)
        return
    asked = {name: how for name, how in MAPS.items() if not args.maps or name.startswith(tuple(args.maps))}
    model, tokenizer = load_model("smollm2")
    found: dict[str, list[tuple[float, float]]] = {}
    seconds: dict[str, float] = {}
    texts = passages(tokenizer, args.passages)
    for number, text in enumerate(texts):
        values = {}
        for name, (method, settings) in asked.items():
            begun = time.process_time()
            made = text_saliency(model, tokenizer, text, method, **settings)
            seconds[name] = seconds.get(name, 0.0) + time.process_time() - begun
            values[name] = made.values[:-1]
        for seed in range(3):
            generator = torch.Generator().manual_seed(1000 * seed + number)
            values[f"random, seed {seed}"] = torch.rand(LENGTH - 1, generator=generator)
        ids = torch.tensor(made.ids)
        orders = [
            one.argsort(descending=down, stable=True) for one in values.values() for down in (True, False)
        ]
        ends = curves(model, ids, made.target, orders)
        for name, first, last in zip(values, ends[::2], ends[1::2], strict=True):
            found.setdefault(name, []).append((first, last))
        if (number + 1) % 4 == 0 or number + 1 == len(texts):
            table(
                found,
                f"{number + 1} passages of {LENGTH} tokens; log-probability of the next token, nats",
                seconds,
            )


def table(found: dict[str, list[tuple[float, float]]], title: str, seconds: dict[str, float]) -> None:
    first = next(iter(found))
    print(f"\n{title}\n{'map':32s}{'first':>16s}{'last':>16s}{'gap':>16s}{first + ' by':>22s}{'s a map':>9s}")
    ours = [b - a for a, b in found[first]]
    for name, pairs in found.items():
        gap = [b - a for a, b in pairs]
        ahead = told([x - y for x, y in zip(ours, gap, strict=True)])
        cost = f"{seconds[name] / len(pairs):.2f}" if name in seconds else ""
        print(
            f"{name:32s}{told([a for a, _ in pairs]):>16s}{told([b for _, b in pairs]):>16s}{told(gap):>16s}{ahead:>22s}{cost:>9s}",
            flush=True,
        )


PIXELS: dict[str, tuple[str, dict]] = {
    "gradient": ("gradient", {}),
    "gradient x input": ("gradient", {"times_input": True}),
    "integrated-gradients": ("integrated-gradients", {}),
    "smoothgrad": ("smoothgrad", {}),
    "occlusion": ("occlusion", {}),
    "lrp": ("lrp", {}),
}


def pictures(count: int) -> None:
    """The same of pictures, on a small network."""
    model, images = load_network("resnet20").eval(), load_pictures("cifar10", count)[0]
    found: dict[str, list[tuple[float, float]]] = {}
    seconds: dict[str, float] = {}
    off: dict[str, list[float]] = {}
    for number, x in enumerate(images):
        values = {}
        with torch.no_grad():
            logits, empty = model(torch.stack([x, 0 * x]))
        target = int(logits.argmax())
        for name, (method, settings) in PIXELS.items():
            begun = time.process_time()
            made = secateur.saliency(model, x, method, target, **settings)
            seconds[name] = seconds.get(name, 0.0) + time.process_time() - begun
            values[name] = made.values.flatten()
            if made.additive and made.attribution is not None:
                gone = float(logits[target] - empty[target])
                off.setdefault(name, []).append(abs(float(made.attribution.sum()) - gone) / abs(gone))
        for seed in range(3):
            generator = torch.Generator().manual_seed(1000 * seed + number)
            values[f"random, seed {seed}"] = torch.rand(x[0].numel(), generator=generator)
        covered = []
        for one in values.values():
            for down in (True, False):
                order = one.argsort(descending=down, stable=True)
                for step in range(1, 8):
                    left = x.flatten(1).clone()
                    left[:, order[: step * len(order) // 8]] = 0
                    covered.append(left.view_as(x))
        with torch.no_grad():
            said = model(torch.stack(covered)).log_softmax(-1)[:, target].view(len(values), 2, 7).mean(-1)
        for name, (first, last) in zip(values, said.tolist(), strict=True):
            found.setdefault(name, []).append((first, last))
    table(found, f"{len(images)} pictures; log-probability of the likeliest class, nats", seconds)
    for name, shares in off.items():
        print(f"sum, {name:32s}{told(shares):>16s}   {[round(share, 4) for share in shares]}")
    for name, pairs in found.items():
        print(f"gap, {name:32s}{[round(b - a, 3) for a, b in pairs]}")


if __name__ == "__main__":
    main()
