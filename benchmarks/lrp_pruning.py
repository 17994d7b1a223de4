"""LRP against magnitude, gradient, Taylor and chance: filters removed without fine-tuning, ten pictures of each class.

    python benchmarks/lrp_pruning.py                 # prints the table, writes docs/lrp-pruning.svg; 15 min on one core
    python benchmarks/lrp_pruning.py --seeds 1 --removed 10 20 --test 500

ResNet-56 on CIFAR-10. The 1,008 filters between the two convolutions of each block compete in one global ranking (cutting
them leaves the width of the residual stream alone); 5 % of them leave in a step, then all criteria but magnitude are
computed anew on the same pictures. A seed is a draw of reference pictures from the training set. Filters are really cut.

The baselines are those of the paper: `weight`, L1 norm over its sum in the layer; `grad` and `taylor`, mean over pictures
and positions of dL/da and of a dL/da at the convolution's output, absolute, over the layer's L2 norm. "LRP" is the
method's default, z+ everywhere; "LRP epsilon-plus" the paper's choice for ResNets, with the epsilon rule at the last
layer; "LRP epsilon" has that rule everywhere, as the paper's successor (arXiv 2408.12568).
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from plot import panels
from scipy.stats import spearmanr
from torch import Tensor, nn

import secateur
from secateur.graph import Graph, Group
from secateur.saliency.filters import filter_relevance
from secateur.surgery import cut_units, mask_units
from secateur.tasks import vision

CURVES = {
    "random": "#b0b7bf",
    "weight": "#7d8791",
    "grad": "#c9a0dc",
    "taylor": "#e3a857",
    "LRP epsilon": "#9fd0c4",
    "LRP epsilon-plus": "#7fb3d5",
    "LRP": "#1f6fb2",
}
STEP = 0.05


def inner_groups(graph: Graph) -> list[Group]:
    """Channels that a single convolution makes."""
    return [
        group
        for group in graph.prunable(["channels"])
        if len([s for s in group.slices if s.role == "out"]) == 1
    ]


def producer(group: Group) -> str:
    return next(s.name for s in group.slices if s.role == "out")


def gradients(
    model: nn.Module, groups: list[Group], x: Tensor, y: Tensor
) -> dict[str, tuple[Tensor, Tensor]]:
    """Group -> (mean of dL/da, mean of a dL/da) over pictures and positions, [filters]."""
    outputs: dict[str, Tensor] = {}
    hooks = [
        model.get_submodule(producer(group).removesuffix(".weight")).register_forward_hook(
            lambda module, args, output, name=group.name: outputs.__setitem__(name, output)
        )
        for group in groups
    ]
    loss = F.cross_entropy(model(x), y)
    found = torch.autograd.grad(loss, list(outputs.values()))
    for hook in hooks:
        hook.remove()
    return {
        name: (g.mean((0, 2, 3)), (a.detach() * g).mean((0, 2, 3)))
        for (name, a), g in zip(outputs.items(), found)
    }


def scores_of(
    method: str, model: nn.Module, groups: list[Group], x: Tensor, y: Tensor, seed: int
) -> dict[str, Tensor]:
    if method.startswith("LRP"):
        relevance = filter_relevance(model, [(x, y)], method.removeprefix("LRP").strip() or "z+")
        return {group.name: relevance[producer(group), group.size] for group in groups}
    if method == "random":
        generator = torch.Generator().manual_seed(seed)
        return {group.name: torch.rand(group.size, generator=generator) for group in groups}
    if method == "weight":
        norms = {g.name: model.get_parameter(producer(g)).detach().abs().sum((1, 2, 3)) for g in groups}
        return {name: norm / norm.sum() for name, norm in norms.items()}
    found = gradients(model, groups, x, y)
    picked = {name: pair[method == "taylor"].abs() for name, pair in found.items()}
    return {name: value / value.norm().clamp_min(1e-30) for name, value in picked.items()}


def references(pictures: Tensor, labels: Tensor, each: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labels), generator=generator)
    taken = torch.cat([order[labels[order] == c][:each] for c in labels.unique()])
    return pictures[taken], labels[taken]


def curve(
    method: str, dense: nn.Module, graph: Graph, removed: list[int], data: tuple, test: tuple, seed: int
) -> tuple[dict[int, float], dict[str, Tensor]]:
    """(percent removed -> accuracy, the scores of the dense network)."""
    groups = inner_groups(graph)
    total = sum(group.size for group in groups)
    gone = {group.name: torch.zeros(group.size, dtype=torch.bool) for group in groups}
    first: dict[str, Tensor] = {}
    found = {}
    for percent in range(round(STEP * 100), max(removed) + 1, round(STEP * 100)):
        masked = copy.deepcopy(dense)
        mask_units(masked, graph, {name: (~out).nonzero().flatten() for name, out in gone.items()})
        scores = scores_of(method, masked, groups, *data, seed)
        first = first or scores
        ranked = sorted(
            (float(scores[name][unit]), position, unit)
            for position, name in enumerate(gone)
            for unit in range(len(gone[name]))
            if not gone[name][unit]
        )
        names = list(gone)
        left = int(percent / 100 * total) - sum(int(out.sum()) for out in gone.values())
        for _, position, unit in ranked:
            out = gone[names[position]]
            if left == 0:
                break
            if len(out) - out.sum() > 1:
                out[unit] = True
                left -= 1
        if percent in removed:
            cut = copy.deepcopy(dense)
            cut_units(cut, graph, {name: (~out).nonzero().flatten() for name, out in gone.items()})
            found[percent] = vision.accuracy(cut, *test)
    return found, first


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--network", default="resnet56")
    parser.add_argument("--removed", nargs="*", type=int, default=[5, 10, 15, 20, 30, 40, 50])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--each", type=int, default=10, help="reference pictures of a class")
    parser.add_argument("--test", type=int, default=1000, help="test pictures")
    parser.add_argument("--methods", nargs="*", default=list(CURVES), choices=list(CURVES))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--plot", type=Path, default=Path(__file__).resolve().parents[1] / "docs" / "lrp-pruning.svg"
    )
    parser.add_argument("--json", type=Path, help="where the numbers go; those that are there already stay")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    start = time.perf_counter()
    dense = vision.load_network(args.network)
    test = vision.load_pictures("cifar10", args.test, split="test")
    training = vision.load_pictures("cifar10", None, split="train")
    graph = secateur.trace(dense, test[0][:1])
    base = vision.accuracy(dense, *test)
    units = sum(group.size for group in inner_groups(graph))
    print(f"{args.network}, {units} filters, {len(test[0])} test pictures, dense {base:.2%}")
    print(f"{'removed':18s} " + " ".join(f"{percent:13d}%" for percent in args.removed), flush=True)
    found: dict[str, list[dict[int, float]]] = {}
    kept = json.loads(args.json.read_text()) if args.json and args.json.exists() else {}
    agreement = {}
    for method in args.methods:
        ranks = []
        for seed in range(1 if method == "weight" else args.seeds):
            key = f"{method} {seed} {args.each} {args.test} {args.removed}"
            if key not in kept:
                data = references(*training, args.each, seed)
                accuracies, scores = curve(method, dense, graph, args.removed, data, test, seed)
                kept[key] = [accuracies, torch.cat(list(scores.values())).tolist()]
                if args.json:
                    args.json.write_text(json.dumps(kept))
            found.setdefault(method, []).append({int(p): value for p, value in kept[key][0].items()})
            ranks.append(kept[key][1])
        if len(ranks) > 1:
            pairs = [(a, b) for i, a in enumerate(ranks) for b in ranks[:i]]
            agreement[method] = statistics.mean(float(spearmanr(a, b).statistic) for a, b in pairs)
        cells = []
        for percent in args.removed:
            values = [one[percent] for one in found[method]]
            error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0
            cells.append(f"{statistics.mean(values):8.2%} ± {error * 100:.1f}")
        print(f"{method:18s} " + " ".join(f"{cell:>14s}" for cell in cells), flush=True)
    print("rank correlation of the first scores between draws:", end=" ")
    print(", ".join(f"{method} {value:.2f}" for method, value in agreement.items()))
    points = (0, *args.removed)
    means = {
        m: {p: base if p == 0 else statistics.mean(one[p] for one in runs) for p in points}
        for m, runs in found.items()
    }
    spread = {
        m: {p: statistics.stdev(one[p] for one in runs) for p in args.removed} if len(runs) > 1 else {}
        for m, runs in found.items()
    }
    title = f"{args.network} on cifar10, {args.each} pictures a class"
    args.plot.write_text(
        panels({title: means}, {m: CURVES[m] for m in args.methods}, "filters removed", {title: spread})
    )
    print(f"{time.perf_counter() - start:.0f} s, {args.plot}")


if __name__ == "__main__":
    main()
