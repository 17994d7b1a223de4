"""How often a small policy does what it is told in rooms of MiniGrid, in closed loop, when visual tokens leave.

    OMP_NUM_THREADS=1 python benchmarks/rooms_minigrid.py [--targets 12.5%,25%] [--k 2] [--seeds 0,1,2] [--episodes 64] [--policy DIR]

Needs `pip install secateur[minigrid]`. Prints markdown tables: success in percent, steps of an episode and tokens x layers of
a step; means over the seeds of episodes with two standard errors. `vla-pruner` keeps everything in the first three steps of
an episode, so each criterion alone and random tokens do here, too; `fastv` and `random, from the first step on` don't. All
drop before layer K. `--out FILE` keeps the scores as JSON; a run that finds some goes on with what is missing.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rows import spread
from torch import Tensor

from secateur.methods.vla_pruner import VLAPruner
from secateur.tasks.minigrid.evaluate import Score, evaluate
from secateur.tasks.minigrid.models import load_policy
from secateur.tokens.select import top_per_row
from secateur.tokens.state import TokenSets
from secateur.utils.files import atomic_write_json
from secateur.utils.random import seeded


@dataclass
class Drawn(VLAPruner):
    """Other tokens at random in every step, once the window is full (or from the first step on). No paper."""

    waits: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.draws = seeded(0, "drawn")

    def select(self, sets: TokenSets) -> Tensor:
        assert sets.history is not None
        chosen = top_per_row(torch.rand(sets.valid.shape, generator=self.draws), sets.keep, sets.valid)
        ready = ~sets.history[:, 0].isnan().any(1, keepdim=True)
        return torch.where(ready, chosen, sets.valid) if self.waits else chosen


def variants(k: int) -> dict[str, tuple[Any, dict[str, Any]]]:
    """By the name in the table: a method and its settings."""
    own = "vla-pruner"
    return {
        "vla-pruner": (own, {"k": k}),
        "prompt's criterion alone": (own, {"k": k, "criteria": "prefill"}),
        "action's criterion alone": (own, {"k": k, "criteria": "action"}),
        "random": (Drawn(k=k), {}),
        "fastv": ("fastv", {"k": k}),
        "random, from the first step on": (Drawn(k=k, waits=False), {}),
        "vla-pruner, last prompt row": (own, {"k": k, "prefill": "last"}),
        "vla-pruner, carry": (own, {"k": k, "carry": True}),
    }


def cell(values: list[float], digits: int = 1) -> str:
    mean, error = spread(values)
    return f"{mean:.{digits}f} ± {error:.{digits}f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--targets", default="12.5%,25%")
    parser.add_argument("--k", type=int, default=2)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--episodes", type=int, default=64, help="a seed")
    parser.add_argument("--policy", type=Path, help="a folder that train minigrid wrote")
    parser.add_argument("--only", help="names of the table, separated by ;")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    policy = load_policy(args.policy)
    seeds = [int(seed) for seed in args.seeds.split(",")]
    settings = {name: str(getattr(args, name)) for name in ("k", "seeds", "episodes", "policy")}
    kept: dict[str, dict[str, Any]] = {}
    if args.out and args.out.exists():
        found = json.loads(args.out.read_text())
        kept = found["scores"] if found["settings"] == settings else {}
    for target in args.targets.split(","):
        jobs = {"all tokens": (None, {}), **variants(args.k)}
        if args.only:
            jobs = {name: jobs[name] for name in args.only.split(";")}
        print(f"\n| {target} | success | steps | tokens x layers |\n|---|---|---|---|")
        for name, (method, options) in jobs.items():
            key = name if method is None else f"{name} {target}"
            if key not in kept:
                score = evaluate(
                    method,
                    target if method is not None else None,
                    args.episodes,
                    seeds,
                    policy,
                    name,
                    **options,
                )
                kept[key] = dataclasses.asdict(score)
                if args.out:
                    atomic_write_json(args.out, {"settings": settings, "scores": kept})
            score = Score(**kept[key])
            shown = (cell(score.success), cell(score.steps), cell(score.tokens_layers, 0))
            print(f"| {name} | {' | '.join(shown)} |", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
