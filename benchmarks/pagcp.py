"""PAGCP with its guard on the worst task or on the sum, against uniform L1 and random channels, at equal multiply-adds.

    python benchmarks/pagcp.py                         # three seeds of digits, three tasks: about 4 CPU minutes
    python benchmarks/pagcp.py --networks resnet20     # CIFAR-10: which class, animal or not; one seed, about 40 CPU minutes
    python benchmarks/pagcp.py --smoke                 # does it run

Each seed trains its own network. All cuts are made in one pass without training (PAGCP's allowance is doubled until its
pass reaches the target), then all networks are trained alike. Printed: how many times each task's loss on the test set is that
of the dense network right after the cut, and the tasks' accuracies before, after the cut and at the end.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rows import keep
from torch import Tensor, nn

import secateur
from secateur import SecateurError
from secateur.data.pictures import load_pictures
from secateur.graph import trace
from secateur.tasks import digits_heads, load_task
from secateur.training import fit
from secateur.training.task import Task
from secateur.utils.running import evaluating

METHODS = ("pagcp", "pagcp, sum", "uniform L1", "random")
ANIMALS = torch.tensor([0, 0, 1, 1, 1, 1, 1, 1, 0, 0])
Scores = Callable[[nn.Module], dict[str, dict[str, float]]]


def digits(seed: int, args: argparse.Namespace) -> tuple[Task, nn.Module, Scores]:
    task = load_task("digits-heads")
    torch.manual_seed(seed)
    model = task.build()
    fit(model, task.train, steps=400, seed=seed, loss=task.loss, recipe=task.recipe, augment=task.augment)
    held_out = digits_heads.load_tasks("test")

    def judged(model: nn.Module) -> dict[str, dict[str, float]]:
        with torch.no_grad(), evaluating(model):
            lost = {name: float(value) for name, value in digits_heads.losses(model, held_out).items()}
        return {"loss": lost, "accuracy": digits_heads.scores(model, held_out)}

    return task, model, judged


class TwoHeads(nn.Module):
    """A trained classifier whose last features also tell animals from things."""

    def __init__(self, trunk: nn.Module):
        super().__init__()
        self.trunk = trunk
        self.animal = nn.Linear(trunk.linear.in_features, 2)  # type: ignore[union-attr, arg-type]
        self.label = trunk.linear
        trunk.linear = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        features = self.trunk(x)
        return torch.cat((self.label(features), self.animal(features)), 1)


def resnet20(seed: int, args: argparse.Namespace) -> tuple[Task, nn.Module, Scores]:
    plain = load_task("cifar10", train=args.train, test=args.test)
    torch.manual_seed(seed)
    model = TwoHeads(plain.pretrained())  # type: ignore[misc]

    def losses(model: nn.Module, batch: Any) -> dict[str, Tensor]:
        x, label = batch
        made = model(x).float()
        animal = ANIMALS.to(label.device)[label]
        return {
            "class": F.cross_entropy(made[:, :10], label),
            "animal": F.cross_entropy(made[:, 10:], animal),
        }

    def loss(model: nn.Module, batch: Any) -> Tensor:
        return torch.stack([*losses(model, batch).values()]).sum()

    fit(
        model, plain.train, steps=150, seed=seed, loss=loss, recipe=plain.recipe, lr=0.01,
        parameters=[*model.animal.parameters()],
    )  # fmt: skip
    x, label = load_pictures("cifar10", args.test, "test")

    def judged(model: nn.Module) -> dict[str, dict[str, float]]:
        with torch.no_grad(), evaluating(model):
            made = torch.cat([model(part) for part in x.split(500)])
        animal = ANIMALS[label]
        return {
            "loss": {
                "class": F.cross_entropy(made[:, :10], label).item(),
                "animal": F.cross_entropy(made[:, 10:], animal).item(),
            },
            "accuracy": {
                "class": (made[:, :10].argmax(1) == label).float().mean().item(),
                "animal": (made[:, 10:].argmax(1) == animal).float().mean().item(),
            },
        }

    task = Task(
        "cifar10:two-heads", lambda: copy.deepcopy(model), plain.train, inputs=plain.inputs, loss=loss,
        losses=losses, recipe=plain.recipe, augment=plain.augment,
    )  # fmt: skip
    return task, model, judged


def cut(task: Task, model: nn.Module, method: str, seed: int, args: argparse.Namespace) -> nn.Module:
    """The model after one pass, nothing trained."""
    if method == "uniform L1":
        return secateur.prune(
            model,
            task.inputs,
            method="spa",
            criterion="magnitude",
            target=args.target,
            kinds=("channels",),
            allocation="uniform",
        ).model
    if method == "random":
        return secateur.prune(
            model, task.inputs, method="random-structured", target=args.target, kinds=("channels",), seed=seed
        ).model
    own = copy.copy(task)
    own.pretrained = lambda: copy.deepcopy(model)
    allowance = 0.25
    while True:
        try:
            return secateur.train_prune(
                own, method="pagcp", target=args.target, steps=1, lr=1e-12, warmup=0, weight_decay=0.0, seed=seed,
                rounds=1, allowance=allowance, budget=1.0 + allowance * 4, samples=args.guard, top=1.0,
                guard="sum" if "sum" in method else "max",
            ).model  # fmt: skip
        except SecateurError as error:
            if "its losses allow" not in str(error) or allowance > 1e4:
                raise
            allowance *= 1.5


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--networks", nargs="*", default=["digits"], choices=("digits", "resnet20"))
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=METHODS)
    parser.add_argument("--target", default="macs<=60%")
    parser.add_argument("--seeds", type=int)
    parser.add_argument("--epochs", type=float, default=5, help="of training after the cut")
    parser.add_argument("--guard", type=int, default=512, help="training samples the guard sees")
    parser.add_argument("--train", type=int, default=8000)
    parser.add_argument("--test", type=int, default=2000)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--smoke", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.smoke:
        args.seeds, args.epochs, args.guard = 1, 0.1, 64
    rows: list[dict[str, Any]] = []
    for network in args.networks:
        made = {"digits": digits, "resnet20": resnet20}[network]
        for seed in range(args.seeds or (3 if network == "digits" else 1)):
            task, model, judged = made(seed, args)
            before = judged(model)
            whole = trace(model, task.inputs).macs()
            for method in args.methods:
                started = time.process_time()
                small = cut(task, model, method, seed, args)
                after, left = judged(small), trace(small, task.inputs).macs() / whole
                steps = round(args.epochs * len(task.train[0]) / task.recipe.batch)
                if steps:
                    fit(
                        small, task.train, steps=steps, seed=seed, loss=task.loss, recipe=task.recipe,
                        lr=task.recipe.lr / 5, augment=task.augment,
                    )  # fmt: skip
                keep(
                    rows,
                    {
                        "network": network,
                        "seed": seed,
                        "method": method,
                        "macs": left,
                        "growth": {n: after["loss"][n] / before["loss"][n] for n in before["loss"]},
                        "before": before["accuracy"],
                        "cut": after["accuracy"],
                        "end": judged(small)["accuracy"],
                        "cpu_seconds": time.process_time() - started,
                    },
                    args.json,
                )
    for network in args.networks:
        print(
            f"\n{network}: means over seeds; growth of each task's test loss at the cut; accuracies at the cut and at the end"
        )
        for method in args.methods:
            own = [row for row in rows if (row["network"], row["method"]) == (network, method)]
            names = list(own[0]["growth"])
            mean = lambda key, name, own=own: statistics.mean(row[key][name] for row in own)
            worst = statistics.mean(max(row["growth"].values()) for row in own)
            print(
                f"{method:12s} MACs {statistics.mean(r['macs'] for r in own):.1%}  worst x{worst:.2f}  "
                + "  ".join(
                    f"{n}: x{mean('growth', n):.2f} {mean('cut', n):.1%} {mean('end', n):.1%}" for n in names
                )
            )


if __name__ == "__main__":
    main()
