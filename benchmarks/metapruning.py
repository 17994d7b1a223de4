"""MetaPruning against the same run without its metanetwork: accuracy right after the cut, and at the end.

    python benchmarks/metapruning.py                                       # digits-cnn, 2.3 and 4 times fewer multiply-adds
    python benchmarks/metapruning.py --networks cifar10:resnet20 --seeds 1 --train 4000 --epochs 2
    python benchmarks/metapruning.py --smoke                               # a few steps: does it run

A metanetwork is made for each network on data models of their own seeds. Then both train the same network from the same weights,
cut it by 1.32, train it on, train it again, cut it to the target by group norms and train it on, with the same data in the same
order: `metapruning` changes the weights by the metanetwork between the second and the third training, `untouched` doesn't.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import time
from pathlib import Path
from typing import Any, ClassVar

import torch
from rows import keep, spread
from torch import nn

import secateur
from secateur.methods.metapruning import Metapruning
from secateur.tasks import load_task
from secateur.training.job import Job
from secateur.training.metanetwork import MetaNetwork, save_metanetwork
from secateur.training.metatraining import Making, train_metanetwork
from secateur.training.task import Task

METHODS = ("untouched", "metapruning")
SETTINGS = ("models", "meta_epochs", "hidden", "layers", "ratio", "reg", "meta_lr", "judged", "tune", "last")


@dataclasses.dataclass
class Untouched(Metapruning):
    """The same phases, and nothing changed between them."""

    name: ClassVar[str] = "untouched"

    def change(self, job: Job, model: nn.Module, meta: MetaNetwork | None) -> None:
        pass


def begun(network: str, args: argparse.Namespace) -> Task:
    """The task, whose networks begin untrained."""
    task = load_task(network, train=args.train, test=args.test, split=args.split)
    return dataclasses.replace(task, pretrained=None)


def made(network: str, args: argparse.Namespace) -> tuple[Path, float]:
    """(the folder of a metanetwork for the network, the seconds that it took)."""
    folder = args.out / network.replace(":", "-")
    if (folder / "metanetwork.json").exists():
        return folder, load_about(folder).get("cpu_seconds", 0.0)
    started = time.process_time()
    own = {
        name: getattr(args, name) for name in SETTINGS if getattr(args, name) is not None and name != "last"
    }
    work = folder.with_name(folder.name + ".run")
    meta, about = train_metanetwork(
        begun(network, args), Making(**own), epochs=args.epochs, seed=100, directory=work
    )
    seconds = time.process_time() - started
    save_metanetwork(meta, folder, about | {"cpu_seconds": seconds})
    for row in about["phases"]:
        print(json.dumps(row), flush=True)
    return folder, seconds


def load_about(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "metanetwork.json").read_text(encoding="utf-8"))["about"]


def one(network: str, method: str, factor: float, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """A run: its figures."""
    started = time.process_time()
    folder, _ = made(network, args)
    own = {name: getattr(args, name) for name in ("tune", "last") if getattr(args, name) is not None}
    kind = Metapruning if method == "metapruning" else Untouched
    pruned = secateur.train_prune(
        begun(network, args),
        method=kind(metanetwork=str(folder), **own),
        target=f"macs<={100 / factor}%",
        epochs=args.epochs,
        seed=seed,
    )
    report = pruned.report
    row = next(row for row in report["phases"] if "quality_after_the_cut" in row)
    return {
        "network": network,
        "method": method,
        "factor": factor,
        "seed": seed,
        "changed": row["quality_before_the_cut"],
        "cut": row["quality_after_the_cut"],
        "end": report["after"]["quality"],
        "macs": report["after"]["macs"] / report["before"]["macs"],
        "cpu_seconds": time.process_time() - started,
    }


def table(found: list[dict[str, Any]]) -> None:
    """One row a method and target: means over seeds, and two standard errors."""
    print(
        f"\n{'network':20s} {'fewer MACs':>10s} {'method':12s} {'before':>8s} {'after the cut':>20s} {'end':>20s}"
    )
    for key in dict.fromkeys((row["network"], row["factor"], row["method"]) for row in found):
        rows = [row for row in found if (row["network"], row["factor"], row["method"]) == key]

        after, end = (
            "{:.2%} ± {:.2%}".format(*spread([row[name] for row in rows])) for name in ("cut", "end")
        )
        before = statistics.mean(row["changed"] for row in rows)
        print(f"{key[0]:20s} {key[1]:10g} {key[2]:12s} {before:8.2%} {after:>20s} {end:>20s}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--networks", nargs="*", default=["digits:digits-cnn"])
    parser.add_argument("--factors", nargs="*", type=float, default=[2.3, 4.0])
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=METHODS)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--epochs", type=float, default=20)
    for name in SETTINGS:
        default = next(f.default for f in dataclasses.fields(Metapruning) if f.name == name)
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default))
    parser.add_argument("--train", type=int)
    parser.add_argument("--test", type=int)
    parser.add_argument("--split", default="test", choices=("test", "val"))
    parser.add_argument(
        "--out", type=Path, default=Path("out/metanetworks"), help="where the metanetworks are kept"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--smoke", action="store_true")
    args = parser.parse_args()
    if args.smoke:
        args.seeds, args.train, args.test, args.epochs = 1, 128, 50, 1
        args.models, args.meta_epochs, args.hidden, args.layers = 2, 1, 8, 1
    torch.set_num_threads(args.threads)
    found: list[dict[str, Any]] = []
    for network in args.networks:
        print(f"metanetwork: {made(network, args)[1]:.0f} CPU s", flush=True)
        for seed in range(args.first_seed, args.first_seed + args.seeds):
            for factor in args.factors:
                for method in args.methods:
                    keep(found, one(network, method, factor, seed, args), args.json)
    table(found)


if __name__ == "__main__":
    main()
