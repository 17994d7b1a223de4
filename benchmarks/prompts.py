"""Prompts trained on some classes, tried on the others: `disa` against what it is built on, part by part.

    python benchmarks/prompts.py --pair /tmp/pair.safetensors           # three seeds; the pair is trained once and kept
    python benchmarks/prompts.py --pair /tmp/pair.safetensors --shots 4 --lr 0.01   # where prompts forget the new classes

A CLIP of transformers with random weights learns 24 names (six colours, four shapes) from drawn pictures of 32 x 32 with one object,
grey bars and slivers of neighbours. Then the light changes (`dusk`): pictures are darker, bluer and noisier, which the pair never
saw. A seed draws which two shapes of each colour are base classes, 16 pictures of each of these, the prompts and the order. Accuracy is over
100 pictures a class, among the twelve base names, and among the twelve new ones. ± is two standard errors of differences in pairs.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from secateur.prompts import PromptMethod, Seen, train_prompts
from secateur.prompts.towers import Towers, class_ids
from secateur.tasks.scenes.draw import COLOURS, SHAPES, SIZE, Scenes, render
from secateur.taxonomy import record
from secateur.training.fit import fit
from secateur.utils.random import seeded

NAMES = [f"{colour} {shape}" for colour in COLOURS for shape in SHAPES]
USUAL = "a photo of a"
TEMPLATES = (USUAL, "here is a small", "we see one little", "this shows the same")
WORDS = ("<pad>", *dict.fromkeys(" ".join((*TEMPLATES, *NAMES)).split()), ".", "<start>", "<end>")
HALF = SIZE // 2
DEEP = {"num_hidden_layers": 3, "num_attention_heads": 4, "hidden_size": 64, "intermediate_size": 128}


class Words:
    """A token a word."""

    pad_token_id = 0

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        inner = [WORDS.index(word) for word in text.replace(".", " .").split()]
        return {"input_ids": [len(WORDS) - 2, *inner, len(WORDS) - 1] if add_special_tokens else inner}


class Plain(PromptMethod):
    """Prompts in both towers by cross-entropy alone."""

    info = record("disa")

    def loss(self, seen: Seen) -> Tensor:
        return F.cross_entropy(seen.scale * seen.image @ seen.text.T, seen.labels)


def draw(kinds: Tensor, generator: torch.Generator) -> Tensor:
    """float32 [n, 3, 32, 32] in 0..1, one object of each kind (0 to 23): the quarters of scenes of four."""
    count = len(kinds)
    kinds = F.pad(kinds, (0, -count % 4)).view(-1, 4)
    row, column = torch.randint(2, (2, *kinds.shape), generator=generator)
    corner = torch.tensor([0, 2, 8, 10])
    cell, kind = (F.pad(values, (0, 2)) for values in (corner + 4 * row + column, kinds))
    there = (torch.arange(6) < 4).expand(len(kinds), -1)
    pictures, _ = render(Scenes(cell, kind // len(SHAPES), kind % len(SHAPES), there), generator)
    quarters = pictures.unflatten(3, (2, HALF)).unflatten(2, (2, HALF)).permute(0, 2, 4, 1, 3, 5)
    return quarters.flatten(0, 2)[:count].float() / 255


def dusk(pictures: Tensor, generator: torch.Generator, noise: float, light: Sequence[float]) -> Tensor:
    """Darker, bluer and noisier."""
    grain = noise * torch.randn(pictures.shape, generator=generator)
    return (pictures * torch.tensor(light)[:, None, None] + grain).clamp(0, 1)


def ready(pictures: Tensor) -> Tensor:
    return (pictures - 0.5) / 0.25


def name_ids(names: Sequence[str], words: str = USUAL) -> Tensor:
    return class_ids(Words(), names, 4, 12, False, words)[0]


def new_pair() -> Any:
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(0)
    ends = {"pad_token_id": 0, "bos_token_id": len(WORDS) - 2, "eos_token_id": len(WORDS) - 1}
    text = {**DEEP, **ends, "vocab_size": len(WORDS), "max_position_embeddings": 12}
    vision = {**DEEP, "image_size": HALF, "patch_size": 8}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=64))


def pair(file: Path | None, steps: int, batch: int = 128) -> Any:
    """The trained pair, from the file where there is one."""
    model = new_pair()
    if file is not None and file.is_file():
        model.load_state_dict(load_file(file))
        return model.eval()
    generator = seeded(0, "pair")
    ids = torch.stack([name_ids(NAMES, words) for words in TEMPLATES])

    def loss(model: Any, _: Any) -> Tensor:
        kinds = torch.randint(len(NAMES), (batch,), generator=generator)
        towers = Towers(model)
        pictures = draw(kinds, generator)
        gain = 0.8 + 0.4 * torch.rand(batch, 3, 1, 1, generator=generator)
        image = towers.image(ready(pictures * gain))
        which = torch.randint(len(TEMPLATES), (len(NAMES),), generator=generator)
        text = towers.text(ids[which, torch.arange(len(NAMES))])
        return F.cross_entropy(model.logit_scale.exp() * image @ text.T, kinds)

    fit(model, (torch.zeros(batch, 1),), steps=steps, loss=loss, batch=batch, lr=1e-3, weight_decay=0.05)
    if file is not None:
        save_file({name: value.contiguous() for name, value in model.state_dict().items()}, file)
    return model.eval()


def paired(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, float]:
    """The mean difference in pairs and two standard errors."""
    apart = [a - b for a, b in zip(ours, theirs, strict=True)]
    return statistics.mean(apart), 2 * statistics.stdev(apart) / len(apart) ** 0.5


ROWS: dict[str, tuple[str | type[PromptMethod], dict[str, Any]]] = {
    "cross-entropy alone": (Plain, {}),
    "self-regularised": ("disa", {"cross": 0.0, "direction": 0.0}),
    "+ direction": ("disa", {"cross": 0.0}),
    "+ agreement": ("disa", {"ratio": 0.0, "direction": 0.0}),
    "+ agreement, salient patches": ("disa", {"direction": 0.0}),
    "disa": ("disa", {}),
    "disa, random patches": ("disa", {"by": "random"}),
    "disa, squared distance": ("disa", {"distance": "square"}),
    "disa, agreeing with labels": ("disa", {"agree": "ce"}),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pair", type=Path, help="a file that keeps the trained pair")
    parser.add_argument("--steps", type=int, default=1200, help="that the pair learns for")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--shots", type=int, default=16)
    parser.add_argument("--tests", type=int, default=100, help="pictures of a class that are tried")
    parser.add_argument(
        "--noise", type=float, default=0.1, help="standard deviation at dusk; pixels are 0 to 1"
    )
    parser.add_argument(
        "--light", type=float, nargs=3, default=[0.45, 0.55, 0.8], help="of dusk: red, green, blue"
    )
    parser.add_argument("--epochs", type=float, default=20)
    parser.add_argument("--lr", type=float, default=0.0025)
    parser.add_argument("--depth", type=int, default=3)
    parser.add_argument("--ratio", type=float, default=0.3, help="share of the patches that leave")
    parser.add_argument("--only", nargs="+", choices=list(ROWS), default=list(ROWS))
    args = parser.parse_args()
    torch.set_num_threads(1)
    began = time.perf_counter()
    model = pair(args.pair, args.steps)
    towers, text = Towers(model), name_ids(NAMES)
    clean = torch.arange(len(NAMES)).repeat_interleave(args.tests)
    with torch.no_grad():
        logits = towers.image(ready(draw(clean, seeded(0, "clean")))) @ towers.text(text).T
    right = 100 * float((logits.argmax(1) == clean).float().mean())
    print(f"pair: {time.perf_counter() - began:.0f} s, {right:.1f} % of 24 names by day", flush=True)
    found: dict[str, list[tuple[float, float]]] = {}
    for seed in args.seeds:
        generator = seeded(seed, "split")
        order = torch.rand(len(COLOURS), len(SHAPES), generator=generator).argsort(1)
        kinds = order + len(SHAPES) * torch.arange(len(COLOURS))[:, None]
        sides = [kinds[:, part].flatten().sort().values for part in (slice(2), slice(2, 4))]

        def pictures(classes: Tensor, count: int, what: str, seed: int = seed) -> Tensor:
            generator = seeded(seed, what)
            seen = draw(classes.repeat_interleave(count), generator)
            return ready(dusk(seen, generator, args.noise, args.light))

        tests = [pictures(side, args.tests, f"tests {n}") for n, side in enumerate(sides)]
        names = [[NAMES[int(kind)] for kind in side] for side in sides]
        asked = torch.arange(len(names[0])).repeat_interleave(args.tests)

        def accuracy(logits: Sequence[Tensor], asked: Tensor = asked) -> tuple[float, float]:
            base, new = (100 * float((own.argmax(1) == asked).float().mean()) for own in logits)
            return base, new

        def note(row: str, logits: Sequence[Tensor], took: float, seed: int = seed) -> None:
            found.setdefault(row, []).append(accuracy(logits))
            base, new = found[row][-1]
            print(f"seed {seed}  {row:30s} base {base:5.1f}  new {new:5.1f}  {took:4.0f} s", flush=True)

        with torch.no_grad():
            note("zero-shot", [towers.image(x) @ towers.text(text[side]).T for x, side in zip(tests, sides, strict=True)], 0)  # fmt: skip
        shots = pictures(sides[0], args.shots, "shots")
        labels = torch.arange(len(names[0])).repeat_interleave(args.shots)
        for row in args.only:
            method, settings = ROWS[row]
            if method == "disa":
                settings = {"ratio": args.ratio, **settings}
            began = time.perf_counter()
            prompted = train_prompts(
                model, Words(), (shots, labels), names[0], method, epochs=args.epochs, seed=seed, lr=args.lr,
                depth=args.depth, **settings,
            )  # fmt: skip
            note(row, [prompted.logits(x, n) for x, n in zip(tests, names, strict=True)], time.perf_counter() - began)  # fmt: skip
    print(f"\n{'accuracy, %':30s} {'base':>6s} {'new':>6s} {'mean':>6s}   new, by seed")
    for row, values in found.items():
        base, new = (statistics.mean(side) for side in zip(*values, strict=True))
        each = statistics.mean(2 * b * n / max(b + n, 1e-9) for b, n in values)
        print(f"{row:30s} {base:6.1f} {new:6.1f} {each:6.1f}   {', '.join(f'{n:.1f}' for _, n in values)}")
    if len(args.seeds) > 1:
        print("\nahead of, in points (base; new)")
        for row, rival in (
            *((row, "zero-shot") for row in args.only),
            *((row, rival) for rival in list(ROWS)[:2] for row in args.only if row != rival),
            ("+ agreement, salient patches", "+ agreement"),
            ("disa", "disa, random patches"),
            ("disa", "disa, squared distance"),
            ("disa", "disa, agreeing with labels"),
        ):
            if row in found and rival in found:
                gaps = (paired([v[k] for v in found[row]], [v[k] for v in found[rival]]) for k in (0, 1))
                print(f"{row:30s} {rival:30s} " + "; ".join(f"{gap:+.1f} ± {two:.1f}" for gap, two in gaps))


if __name__ == "__main__":
    main()
