"""What it costs a network when tokens leave it: `top-vim` on a two-way Mamba, `dependency-vit` on reversed attention.

    python benchmarks/skipping_tokens.py top-vim --seeds 0 1 2
    python benchmarks/skipping_tokens.py dependency-vit --seeds 0 1 2
    python benchmarks/skipping_tokens.py top-vim --task cifar10 --train 10000 --steps 1200 --tune 300 --seeds 0

Every row is the accuracy on pictures that nothing was trained on (of digits: test and validation, 597), one number a seed. A random
score is drawn for each picture. Nothing is chosen by these numbers.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections import defaultdict
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

import secateur
from secateur.data.digits import MEAN, STD, load_digits
from secateur.families.reversed_vit import ReversedVit
from secateur.measure.vision import accuracy
from secateur.methods.dependency_tree import DependencyTree
from secateur.tasks import load_task
from secateur.training.fit import fit
from secateur.training.task import Task

Row = Callable[[str, float], None]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("method", choices=("top-vim", "dependency-vit"))
    parser.add_argument("--task", default="digits", choices=("digits", "cifar10"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=250, help="of training")
    parser.add_argument("--tune", type=int, default=150, help="steps of tuning, top-vim")
    parser.add_argument("--train", type=int, default=None, help="pictures to train on")
    parser.add_argument("--out", help="a file for the numbers, as JSON")
    given = parser.parse_args()
    torch.set_num_threads(1)
    made: dict[str, list[float]] = defaultdict(list)

    def row(name: str, value: float) -> None:
        made[name].append(100 * value)
        print(f"{name}: {100 * value:.1f}", flush=True)

    for seed in given.seeds:
        print(f"seed {seed}", flush=True)
        if given.method == "top-vim":
            top_vim(given, seed, row)
        else:
            dependency_vit(given, seed, row)
        if given.out:
            with open(given.out, "w") as file:
                json.dump({"settings": vars(given), "rows": made}, file, indent=1)
    print(f"\n| row | mean | seeds {given.seeds} |\n| --- | --- | --- |")
    for name, values in made.items():
        print(f"| {name} | {statistics.mean(values):.1f} | {', '.join(f'{v:.1f}' for v in values)} |")


def prepared(given: argparse.Namespace, network: str) -> tuple[Task, Callable[[nn.Module], float]]:
    task = load_task(f"{given.task}:{network}", train=given.train)
    if given.task != "digits":
        assert task.quality is not None
        return task, task.quality
    x, y = (torch.cat(both) for both in zip(load_digits("test"), load_digits("val")))
    return task, lambda model: accuracy(model, x, y, 200)


def drawn(build: Callable[[], nn.Module], seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return build()


def train(model: nn.Module, task: Task, steps: int, seed: int, **recipe: float) -> nn.Module:
    fit(model, task.train, steps=steps, seed=seed, augment=task.augment, recipe=task.recipe, **recipe)
    return model


def top_vim(given: argparse.Namespace, seed: int, row: Row) -> None:
    task, quality = prepared(given, "cifar-vim" if given.task == "cifar10" else "digits-vim")
    model = train(drawn(task.build, seed), task, given.steps, seed)
    pruned = partial(attached, model, quality, "top-vim")
    row("dense", quality(model))
    naive = {"gap": "identity", "conv": "condensed", "cls": "middle"}
    for r in (0.9, 0.8, 0.6):
        row(f"r {r:g}, naive", pruned(r=r, **naive))
        row(f"r {r:g}, aligned", pruned(r=r))
    for gap in ("cached", "bias", "identity"):
        row(f"r 0.8, {gap}, conv zeros, cls place", pruned(gap=gap))
    for conv, cls in (("zeros", "middle"), ("condensed", "place"), ("condensed", "middle")):
        row(f"r 0.8, repeat, conv {conv}, cls {cls}", pruned(conv=conv, cls=cls))
    for r in (0.8, 0.6):
        for score in ("unclipped", "l1", "random"):
            row(f"r {r:g}, aligned, {score}", pruned(r=r, score=score))
    with secateur.attach(model, "top-vim") as on:
        train(model, task, given.tune, seed + 100, lr=task.recipe.lr / 2)
        row("r 0.8 tuned, aligned", quality(model))
        row("work", on.work.share.mean().item())


def attached(
    model: nn.Module, quality: Callable[[nn.Module], float], method: str, **settings: object
) -> float:
    with secateur.attach(model, method, **settings):
        return quality(model)


def dependency_vit(given: argparse.Namespace, seed: int, row: Row) -> None:
    task, quality = prepared(
        given, "cifar-dependency-vit" if given.task == "cifar10" else "digits-dependency-vit"
    )

    def without(*parts: str) -> nn.Module:
        model = task.build()
        assert isinstance(model, ReversedVit)
        for block in model.blocks:
            for part in parts:
                setattr(block.attention, part, None)
        return model

    dense = train(drawn(task.build, seed), task, given.steps, seed)
    row("dense", quality(dense))
    if given.task == "digits":
        on_ink(dense, row)
    for r in (0.1, 0.16, 0.2):
        for score in ("sent", "received", "random"):
            row(f"r {r:g}, not tuned, {score}", attached(dense, quality, "dependency-vit", r=r, score=score))
    for name, build, settings in (
        ("sent", task.build, {}),
        ("received", task.build, {"score": "received"}),
        ("random", task.build, {"score": "random"}),
        ("without selector", partial(without, "selector"), {}),
        ("without controller", partial(without, "controller"), {"score": "received"}),
    ):
        model = drawn(build, seed)
        with secateur.attach(model, "dependency-vit", **settings) as on:
            train(model, task, given.steps, seed)
            row(f"r 0.16, trained with it, {name}", quality(model))
            row(f"work, {name}", on.work.share.mean().item())


def on_ink(model: nn.Module, row: Row) -> None:
    """How often the strongest patch of a map holds ink: a pixel of half of white or more."""
    x, _ = load_digits("test")
    ink = F.max_pool2d(x, 2)[:, 0].flatten(1) >= (8 - MEAN) / STD
    row("patches with ink", ink.double().mean().item())
    for of in ("tree", "sent", "received"):
        maps = DependencyTree(of=of).draw(model, x, 0).values.flatten(1)
        row(f"strongest patch on ink, {of}", ink.gather(1, maps.argmax(1)[:, None]).double().mean().item())


if __name__ == "__main__":
    main()
