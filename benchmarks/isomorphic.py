"""Isomorphic pruning beside one ranking over everything, magnitudes, chance, and Torch-Pruning's own, at equal multiply-adds.

    python benchmarks/isomorphic.py --networks resnet20 --out isomorphic.json     # minutes of one core
    python benchmarks/isomorphic.py --networks efficientnet-lite0 --shares 0.8 --steps 0 --draws 0 1

A trained network is cut to a share of its multiply-adds, judged on 1,000 test pictures of CIFAR-10 (or half of the ImageNet sample), then
trained for `--steps` batches of 64 pictures (AdamW, 1e-3) and judged again. A draw is which 256 training pictures gradients
are taken on, and the seed of chance. Torch-Pruning 1.6.1 (`pip install "secateur[bench]"`) is given the same gradients, and
the ratio at which it first meets the target, found by bisection; where it fails, the row says how. One row a network, target, method and draw. Needs SECATEUR_DATA.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path
from typing import Any

import rows
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import secateur
from secateur.measure import macs
from secateur.tasks import vision

METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "random": ("random-structured", {"kinds": ("channels", "hidden")}),
    "group-magnitude": ("group-magnitude", {}),
    "group-magnitude, global": ("group-magnitude", {"allocation": "global"}),
    "spa, |w·g|, one ranking": ("spa", {"criterion": "snip"}),
    "isomorphic": ("isomorphic", {}),
    "isomorphic, w²": ("isomorphic", {"criterion": "l2"}),
}
Pairs = list[tuple[Tensor, Tensor]]


def by_torch_pruning(model: nn.Module, x: Tensor, batches: Pairs, limit: float) -> nn.Module:
    """The largest network that its isomorphic pruner leaves within `limit` multiply-adds."""
    import torch_pruning as tp

    def cut(ratio: float) -> nn.Module:
        network = copy.deepcopy(model)
        head = [m for m in network.modules() if isinstance(m, nn.Linear)][-1]
        pruner = tp.pruner.MetaPruner(
            network,
            x[:1],
            importance=tp.importance.GroupTaylorImportance(),
            global_pruning=True,
            isomorphic=True,
            pruning_ratio=ratio,
            ignored_layers=[head],
        )
        for name, parameter in network.named_parameters():
            parameter.grad = gradients[name].clone()
        pruner.step()
        network.zero_grad()
        return network

    dense = copy.deepcopy(model)
    for pictures, labels in batches:
        F.cross_entropy(dense(pictures), labels).backward()
    gradients = {name: p.grad for name, p in dense.named_parameters() if p.grad is not None}
    low, high = 0.0, 0.9
    for _ in range(7):
        middle = (low + high) / 2
        low, high = (low, middle) if macs(cut(middle), x[:1]) <= limit else (middle, high)
    return cut(high)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--networks", nargs="+", default=["resnet20", "resnet56"])
    parser.add_argument("--shares", nargs="+", type=float, default=[0.5])
    parser.add_argument("--only", nargs="+", default=None)
    parser.add_argument("--draws", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--limit", type=int, default=1000, help="test pictures")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=None)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    found: list[dict[str, Any]] = []
    for name in args.networks:
        data = "imagenet-sample" if name == vision.LITE else "cifar10"
        model = vision.load_network(name)
        shown = vision.load_pictures(data, args.limit, split="test")
        x, y = vision.load_pictures(data, 6400 if data == "cifar10" else 256, split="train")
        dense = macs(model, x[:1])
        rows.keep(
            found,
            {"network": name, "method": "dense", "accuracy": round(100 * vision.accuracy(model, *shown), 2)},
            args.out,
        )
        for draw in args.draws:
            drawn = torch.randperm(len(x), generator=torch.Generator().manual_seed(draw))
            batches = vision.as_pairs((x[drawn[:256]], y[drawn[:256]]), 64)
            later = vision.as_pairs((x[drawn], y[drawn]), 64)
            for share in args.shares:
                for method in args.only or [*METHODS, "torch-pruning, isomorphic"]:
                    if method in METHODS:
                        own, settings = METHODS[method]
                        small = secateur.prune(
                            model, x[:1], method=own, target=f"macs<={share:.0%}", data=batches, seed=draw,
                            prove=False, **settings,
                        ).model  # fmt: skip
                    else:
                        try:
                            small = by_torch_pruning(model, x, batches, share * dense)
                        except Exception as error:  # noqa: BLE001  another tool may fail in any way
                            said = f"{type(error).__name__}: {error}"
                            rows.keep(found, {"network": name, "method": method, "failed": said}, args.out)
                            continue
                    row = {"network": name, "share": share, "method": method, "draw": draw}
                    row |= {"macs": round(macs(small, x[:1]) / dense, 4)}
                    row |= {
                        "params": round(
                            sum(p.numel() for p in small.parameters())
                            / sum(p.numel() for p in model.parameters()),
                            4,
                        )
                    }
                    row |= {"accuracy": round(100 * vision.accuracy(small, *shown), 2)}
                    if args.steps:
                        torch.manual_seed(draw)
                        secateur.recover(small, later, how="full", steps=args.steps, lr=1e-3, seed=draw)
                        row |= {"trained": round(100 * vision.accuracy(small.eval(), *shown), 2)}
                    rows.keep(found, row, args.out)


if __name__ == "__main__":
    main()
