"""Which share of the visual tokens holds which share of the attention on scenes, and what counts by mass are worth.

    python benchmarks/token_mass.py [--limit 256] [--targets 50,25,10] [--layer 1] [--out FILE]

The first table is of every layer of the six models: what the least looked-at 60 % of the tokens hold of the attention that the
last word gives to the picture, and how many hold 95 %. The second: `adatoken-3d` behind one layer (`--layer`) of the three LLaVAs,
at 95 % and at shares of the attention that bring its mean count to the targets, beside the same number for every picture
(`fastv` behind the same layer, which ranks alike), a random choice there, and random tokens before the language model.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from secateur.tasks.scenes.evaluate import deviation
from secateur.tasks.scenes.models import TOKENS, inputs, load_scenes
from secateur.tasks.scenes.questions import Group, accuracy, test_set
from secateur.tokens.attach import attach
from secateur.tokens.counts import by_mass
from secateur.tokens.profile import Profile, profile_attention
from secateur.tokens.select import top_per_row
from secateur.tokens.state import TokenSets
from secateur.utils.files import atomic_write_json

MODELS = tuple((variant, seed) for variant in ("llava", "qwen") for seed in (0, 1, 2))
BATCH = 64


def prompts(model: Any, groups: Sequence[Group]) -> list[dict[str, Tensor]]:
    return [
        inputs(model, g.pictures[at : at + BATCH], g.questions[at : at + BATCH])
        for g in groups
        for at in range(0, len(g.questions), BATCH)
    ]


@torch.no_grad()
def masses(model: Any, groups: Sequence[Group], layer: int) -> Tensor:
    """[questions, 64] the last word's attention at a layer."""
    found: list[Tensor] = []

    def read(sets: TokenSets) -> Tensor:
        found.append(sets.attention(f"layer:{layer}", rows="last"))
        return sets.valid

    with attach(model, read, at=f"layer:{layer + 1}", records=(f"layer:{layer}",), target=0.5):
        for batch in prompts(model, groups):
            model(**batch, logits_to_keep=1, use_cache=False)
    return torch.cat(found)


def share_for(mass: Tensor, count: float) -> float:
    """The share of the attention whose smallest sets have this many tokens on average."""
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if by_mass(mass, middle).double().mean() < count else (low, middle)
    return high


def answered(
    model: Any, groups: Sequence[Group], method: Any, **settings: Any
) -> tuple[list[float], float, float]:
    """Accuracy by kind, the mean number of tokens that stay and its standard deviation over questions."""
    counts: list[int] = []
    with attach(model, method, **settings) as attached:
        found = accuracy(model, groups, BATCH, lambda: counts.extend(len(row) for row in attached.kept[-1]))
    kept = torch.tensor(counts, dtype=torch.float64)
    return list(found.values()), kept.mean().item(), kept.std().item()


def rows_of(
    model: Any,
    seed: int,
    groups: Sequence[Group],
    layer: int,
    targets: Sequence[int],
    once: Callable[..., Any],
) -> None:
    """Every row of the second table for one model. `once(name, function)`: what the function gives, or gave before."""
    mass, behind = masses(model, groups, layer), f"layer:{layer + 1}"

    def some(sets: TokenSets) -> Tensor:
        draw = torch.rand(sets.valid.shape, generator=sets.generator)
        return top_per_row(draw, sets.keep, sets.valid)

    def row(name: str, method: Any, **settings: Any) -> Any:
        return once(name, lambda: answered(model, groups, method, **settings))

    once("all tokens", lambda: (list(accuracy(model, groups, BATCH).values()), TOKENS, 0.0))
    shares = {"95 % of the attention": 0.95} | {f"{t} %": share_for(mass, TOKENS * t / 100) for t in targets}
    for name, tau in shares.items():
        mine = row(f"{name}: adatoken-3d", "adatoken-3d", k=layer, tau=tau, r_min=0.0)
        same = f"tokens={max(1, round(mine[1]))}"
        row(f"{name}: fastv, the same number", "fastv", k=layer + 1, target=same)
        row(f"{name}: random behind the same layer", some, at=behind, target=same, seed=seed)
        row(f"{name}: random-tokens", "random-tokens", target=same, seed=seed)


def profiled(variant: str, seed: int, groups: Sequence[Group]) -> dict[str, Any]:
    model = load_scenes(variant, seed)
    return profile_attention(model, prompts(model, groups)).model_dump()


def told(name: str, profile: Profile) -> None:
    for layer in range(profile.layers):
        curve = profile.curve[layer]
        stable = f"{profile.stability[layer]:.2f}" if layer < profile.layers - 1 else "-"
        mark = " (gate)" if layer == profile.gate else " (withdraw)" if layer == profile.withdraw else ""
        enough = next(i for i, value in enumerate(curve) if value >= 0.95) * 5
        print(
            f"| {name} | {layer}{mark} | {100 * profile.mass[layer]:.1f} | {100 * (1 - curve[8]):.1f} | {enough} | "
            f"{100 * profile.keep[layer]:.0f} | {stable} |",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--limit", type=int, default=256, help="test pictures")
    parser.add_argument("--targets", default="50,25,10")
    parser.add_argument("--layer", type=int, default=1, help="the layer that gates")
    parser.add_argument("--out", type=Path, help="every figure as JSON")
    args = parser.parse_args()
    torch.set_num_threads(1)
    groups, targets = test_set(args.limit), [int(t) for t in args.targets.split(",")]
    settings = {"limit": args.limit, "layer": args.layer, "targets": targets}
    there = json.loads(args.out.read_text()) if args.out and args.out.exists() else {}
    kept = there["found"] if there.get("settings") == settings else {}

    def once(key: str, make: Callable[[], Any]) -> Any:
        if key not in kept:
            kept[key] = make()
            if args.out:
                atomic_write_json(args.out, {"settings": settings, "found": kept})
        return kept[key]

    print(
        "| model | layer | attention to the picture | least 60 % hold | tokens that hold 95 % | keep | stability |"
    )
    print("|---|---|---|---|---|---|---|")
    for variant, seed in MODELS:
        found = once(f"profile {variant} {seed}", partial(profiled, variant, seed, groups))
        told(f"`scenes:{variant}:{seed}`", Profile(**found))
    rows: dict[str, list[Any]] = {}
    for seed in (0, 1, 2):

        def named(name: str, make: Callable[[], Any], seed: int = seed) -> Any:
            found = once(f"{name} {seed}", make)
            rows.setdefault(name, []).append(found)
            return found

        rows_of(load_scenes("llava", seed), seed, groups, args.layer, targets, named)
    kinds = ("presence", "colour", "count", "relation", "where")
    print(f"\n| row | tokens kept, mean | spread over questions | {' | '.join(kinds)} | mean |")
    print("|---|---|---|" + "---|" * (len(kinds) + 1))
    for name, mine in rows.items():
        columns = [list(values) for values in zip(*(row[0] for row in mine))]
        columns.append([sum(row[0]) / len(row[0]) for row in mine])
        cells = [f"{sum(c) / len(c):.1f} ± {deviation(c):.1f}" for c in columns]
        stay, spread = (sum(row[i] for row in mine) / len(mine) for i in (1, 2))
        print(f"| {name} | {stay:.1f} | {spread:.1f} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
