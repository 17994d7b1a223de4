"""Lottery tickets with rewinding on CIFAR-10: does the ticket win, and do runs become stable as they are rewound later?

    python benchmarks/lottery.py --device cuda                 # ResNet-20, 20 % of the weights kept, 3 seeds
    python benchmarks/lottery.py --smoke                       # the same program in a minute on a CPU; its numbers mean nothing

Part "tickets": iterative magnitude pruning to 20 % of the weights with rewinding to step k; the ticket, its mask with
fresh random weights, and a random mask with the same layer counts are then trained alike. Part "curves": for several k,
the distance, angle and error barrier between paired runs (Frankle et al. 2019, arXiv 1903.01611), of the ticket's mask and
of a random one. Needs SECATEUR_DATA for CIFAR-10.

Several networks are trained at once: on CUDA one step of all of them is one graph, each network on a stream of its own;
pictures, their order, crops and flips lie on the device. The rules (which weights leave, rewinding, controls, distances)
are those of `secateur.training`.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secateur.data.pictures import load_pictures
from secateur.graph.blocks import find_matrices
from secateur.solvers.batchnorm import reestimate_batchnorm
from secateur.tasks.networks.cifar_resnet import CifarResNet
from secateur.training.masks import Masks, density, full_masks, prune_smallest, shuffled
from secateur.training.recipe import Recipe
from secateur.training.stability import angle, barrier, distance
from secateur.training.tickets import levels

Weights = dict[str, Tensor]


@dataclass
class Data:
    """CIFAR-10 on the device. padded: [N, 40, 40, 3], channels last; test: [10000, 3, 32, 32]."""

    padded: Tensor
    labels: Tensor
    test: Tensor
    test_labels: Tensor

    @classmethod
    def load(cls, device: torch.device, count: int | None, test: int | None, dtype: torch.dtype) -> Data:
        parts = [load_pictures("cifar10", split=split) for split in ("train", "val")]
        x, y = (torch.cat(tensors)[:count] for tensors in zip(*parts))
        held_out, answers = load_pictures("cifar10", test)
        x = F.pad(x.to(device, dtype), (4, 4, 4, 4)).permute(0, 2, 3, 1).contiguous()
        form = torch.channels_last
        return cls(x, y.to(device), held_out.to(device, dtype, memory_format=form), answers.to(device))

    def crops(self, rows: Tensor, down: Tensor, across: Tensor, flip: Tensor) -> Tensor:
        """[B, 3, 32, 32]: pictures moved by up to 4 pixels over a border of the mean colour, some mirrored."""
        span = torch.arange(32, device=rows.device)
        columns = torch.where(flip[:, None], span.flip(0), span) + across[:, None]
        found = self.padded[rows[:, None, None], (span + down[:, None])[:, :, None], columns[:, None, :]]
        return found.permute(0, 3, 1, 2)


@dataclass
class Run:
    """One network's training: from `weights` at step `start` to the end, under `masks`, in the order of `seed`."""

    weights: Weights
    masks: Masks
    seed: int
    start: int = 0


class Fleet:
    """Trains several networks of one architecture at once."""

    def __init__(
        self, make: Callable[[], nn.Module], data: Data, recipe: Recipe, steps: int, bf16: bool = False
    ):
        self.make, self.data, self.recipe, self.steps, self.bf16 = make, data, recipe, steps, bf16
        self.device = data.padded.device
        self.graphs: dict[int, tuple[list[Slot], Tensor, Callable[[], None]]] = {}
        self.trained = 0

    def train(self, runs: list[Run], until: int | None = None) -> list[Weights]:
        """The weights and statistics of each run at its end (or at step `until`)."""
        until = self.steps if until is None else until
        if len(runs) not in self.graphs:
            self.graphs[len(runs)] = self._prepare(len(runs))
        slots, clock, advance = self.graphs[len(runs)]
        for slot, run in zip(slots, runs):
            slot.begin(run)
        begin = min((run.start for run in runs), default=0)
        clock.fill_(begin)
        waiting = sorted({run.start for run in runs} - {begin})
        for step in range(begin, until):
            if waiting and step == waiting[0]:
                waiting.pop(0)
                for slot, run in zip(slots, runs):
                    if run.start == step:
                        slot.load(run)
            advance()
        self.trained += len(runs) * (until - begin)
        return [slot.weights() for slot in slots]

    def _prepare(self, count: int) -> tuple[list[Slot], Tensor, Callable[[], None]]:
        clock = torch.zeros(1, dtype=torch.int64, device=self.device)
        slots = [Slot(self.make(), self, clock) for _ in range(count)]
        rates = torch.tensor([self.recipe.rate(s, self.steps) for s in range(self.steps)], device=self.device)

        def eager() -> None:
            rate = rates[clock][0]
            for slot in slots:
                slot.step(rate)
            clock.add_(1)

        if self.device.type != "cuda":
            return slots, clock, eager
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                eager()
                clock.zero_()
        torch.cuda.current_stream().wait_stream(side)
        graph, streams = torch.cuda.CUDAGraph(), [torch.cuda.Stream() for _ in slots]
        with torch.cuda.graph(graph):
            main = torch.cuda.current_stream()
            rate = rates[clock][0]
            for slot, stream in zip(slots, streams):
                stream.wait_stream(main)
                with torch.cuda.stream(stream):
                    slot.step(rate)
            for stream in streams:
                main.wait_stream(stream)
            clock.add_(1)
        return slots, clock, graph.replay


class Slot:
    """One place of a fleet: a network, its optimiser's buffers, and tables of what each step sees."""

    def __init__(self, model: nn.Module, fleet: Fleet, clock: Tensor):
        device, batch, steps = fleet.device, fleet.recipe.batch, fleet.steps
        self.model = model.to(device, memory_format=torch.channels_last).train()
        self.fleet, self.clock = fleet, clock
        self.parameters = dict(self.model.named_parameters())
        self.tensors: Weights = {**self.parameters, **dict(self.model.named_buffers())}
        self.names = [name for name in find_matrices(self.model)]
        self.velocity = [torch.zeros_like(p) for p in self.parameters.values()]
        self.factors = [torch.ones_like(self.parameters[name]) for name in self.names]
        self.rows = torch.zeros(steps, batch, dtype=torch.int64, device=device)
        self.moves = torch.zeros(2, steps, batch, dtype=torch.int64, device=device)
        self.flips = torch.zeros(steps, batch, dtype=torch.bool, device=device)

    def begin(self, run: Run) -> None:
        """The order, crops and flips of the run's seed, drawn on the CPU, and its weights."""
        steps, batch = self.rows.shape
        generator, count = torch.Generator().manual_seed(run.seed), len(self.fleet.data.labels)
        epochs = math.ceil(steps * batch / count)
        order = torch.cat([torch.randperm(count, generator=generator) for _ in range(epochs)])
        self.rows.copy_(order[: steps * batch].reshape(steps, batch))
        self.moves.copy_(torch.randint(0, 9, self.moves.shape, generator=generator))
        self.flips.copy_(torch.rand(self.flips.shape, generator=generator) < 0.5)
        for factor, name in zip(self.factors, self.names):
            factor.copy_(run.masks[name])
        self.load(run)

    @torch.no_grad()
    def load(self, run: Run) -> None:
        """Masked weights and statistics as they are in the run; the momentum starts afresh."""
        for name, tensor in self.tensors.items():
            tensor.copy_(run.weights[name])
        torch._foreach_mul_([self.parameters[name] for name in self.names], self.factors)
        torch._foreach_zero_(self.velocity)

    def step(self, rate: Tensor) -> None:
        recipe, data = self.fleet.recipe, self.fleet.data
        rows = self.rows[self.clock][0]
        down, across = self.moves[0][self.clock][0], self.moves[1][self.clock][0]
        x = data.crops(rows, down, across, self.flips[self.clock][0])
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.fleet.bf16, cache_enabled=False):
            logits = self.model(x)
        loss = F.cross_entropy(logits.float(), data.labels[rows])
        weights = list(self.parameters.values())
        gradients = list(torch.autograd.grad(loss, weights))
        with torch.no_grad():
            torch._foreach_add_(gradients, weights, alpha=recipe.weight_decay)
            torch._foreach_mul_(self.velocity, recipe.momentum)
            torch._foreach_add_(self.velocity, gradients)
            torch._foreach_sub_(weights, torch._foreach_mul(self.velocity, rate))
            torch._foreach_mul_([self.parameters[name] for name in self.names], self.factors)

    def weights(self) -> Weights:
        return {name: tensor.detach().clone() for name, tensor in self.tensors.items()}


class Bench:
    """A fleet of one length of training, and what is measured with it."""

    def __init__(self, args: argparse.Namespace, data: Data, epochs: float):
        self.args, self.data = args, data
        self.steps = round(epochs * len(data.labels) / args.batch)
        milestones = (2 / 3, 5 / 6)  # 20,000 and 25,000 of the paper's 30,000 steps
        self.recipe = Recipe(
            optimizer="sgd",
            lr=args.lr,
            batch=args.batch,
            weight_decay=1e-4,
            decay="all",
            lr_schedule="milestones",
            milestones=milestones,
            warmup=0.0,
            clip=0.0,
        )
        self.fleet = Fleet(lambda: CifarResNet(args.depth), data, self.recipe, self.steps, args.bf16)
        self.judge = CifarResNet(args.depth).to(data.test.device, memory_format=torch.channels_last).eval()
        self.names = [name for name in find_matrices(self.judge)]

    def fresh(self, seed: int) -> Weights:
        torch.manual_seed(seed)
        model = CifarResNet(self.args.depth).to(self.data.test.device)
        return {**dict(model.named_parameters()), **dict(model.named_buffers())}

    @torch.no_grad()
    def accuracy(self, weights: Weights) -> float:
        for name, tensor in [*self.judge.named_parameters(), *self.judge.named_buffers()]:
            tensor.copy_(weights[name])
        return self.judged(self.judge)

    @torch.no_grad()
    def judged(self, model: nn.Module) -> float:
        model.eval()
        right = torch.zeros((), dtype=torch.int64, device=self.data.test.device)
        for x, y in zip(self.data.test.split(2000), self.data.test_labels.split(2000)):
            with torch.autocast(x.device.type, torch.bfloat16, enabled=self.fleet.bf16):
                right += (model(x).argmax(1) == y).sum()
        return right.item() / len(self.data.test_labels)

    def barrier(self, first: Weights, second: Weights) -> float:
        """Of the test error; statistics are estimated anew on 2,000 training pictures at each point."""
        sample = self.data.padded[:2000, 4:36, 4:36].permute(0, 3, 1, 2).float().split(500)
        found, _ = barrier(
            self.judge,
            first,
            second,
            lambda model: 1 - self.judged(model),
            points=self.args.points,
            prepare=lambda model: reestimate_batchnorm(model, sample),
        )
        return found

    def iterate(
        self, chains: list[tuple[Weights, int, int]], rounds: int
    ) -> tuple[list[Masks], list[Weights]]:
        """Iterative magnitude pruning of several chains (early weights, rewind step, seed) side by side.

        Gives the masks, and what the whole networks became.
        """
        sizes = {name: chains[0][0][name].numel() for name in self.names}
        counts = levels(sizes, int(self.args.keep * sum(sizes.values()) + 1e-9), rounds)
        masks = [full_masks({name: early[name] for name in self.names}) for early, _, _ in chains]
        dense: list[Weights] = []
        for level, keep in enumerate(counts):
            ends = self.fleet.train([Run(w, m, seed, k) for (w, k, seed), m in zip(chains, masks)])
            dense = dense or ends
            chosen = [{name: end[name] for name in self.names} for end in ends]
            masks = [prune_smallest(w, m, keep=keep) for w, m in zip(chosen, masks)]
            print(f"  level {level}: {[round(self.accuracy(end), 4) for end in ends]}", flush=True)
        return masks, dense


def tickets(bench: Bench, seeds: list[int], k: int, rounds: int) -> dict[str, Any]:
    """Per seed: test accuracy of the whole network, the ticket, its mask with fresh weights, and a random mask."""
    full = full_masks({name: bench.fresh(0)[name] for name in bench.names})
    starts = bench.fleet.train([Run(bench.fresh(seed), full, seed) for seed in seeds], until=k)
    chains = [(early, k, seed) for early, seed in zip(starts, seeds)]
    masks, dense = bench.iterate(chains, rounds)
    random = [shuffled(m, torch.Generator().manual_seed(seed + 77)) for m, seed in zip(masks, seeds)]
    runs = [Run(w, m, seed, k) for (w, _, seed), m in zip(chains, masks)]
    runs += [Run(w, m, seed, k) for (w, _, seed), m in zip(chains, random)]
    ends = bench.fleet.train(runs)
    anew = bench.fleet.train([Run(bench.fresh(seed + 1000), m, seed) for m, seed in zip(masks, seeds)])
    count = len(seeds)
    found = {
        "whole": [bench.accuracy(w) for w in dense],
        "ticket": [bench.accuracy(w) for w in ends[:count]],
        "fresh weights": [bench.accuracy(w) for w in anew],
        "random mask": [bench.accuracy(w) for w in ends[count:]],
    }
    return {"k": k, "steps": bench.steps, "kept": density(masks[0]), "seeds": seeds, "accuracy": found}


def curves(bench: Bench, seeds: list[int], ks: list[int], rounds: int) -> list[dict[str, Any]]:
    """One row per k and mask: mean distances, angles, barrier and accuracy over seeds."""
    full = full_masks({name: bench.fresh(0)[name] for name in bench.names})
    chains: list[tuple[Weights, int, int]] = []
    for k in ks:
        runs = [Run(bench.fresh(seed), full, seed) for seed in seeds]
        starts = bench.fleet.train(runs, until=k) if k else [run.weights for run in runs]
        chains += [(early, k, seed) for early, seed in zip(starts, seeds)]
    masks, dense = bench.iterate(chains, rounds)
    rows: list[dict[str, Any]] = []
    for kind in ("ticket", "random"):
        chosen = masks
        if kind == "random":
            chosen = [
                shuffled(m, torch.Generator().manual_seed(seed + 77))
                for m, (_, _, seed) in zip(masks, chains)
            ]
        one = bench.fleet.train([Run(w, m, seed, k) for (w, k, seed), m in zip(chains, chosen)])
        two = bench.fleet.train([Run(w, m, seed + 500, k) for (w, k, seed), m in zip(chains, chosen)])
        for k in ks:
            here = [i for i, chain in enumerate(chains) if chain[1] == k]
            values = {
                "prune distance": [distance(dense[i], one[i], chosen[i]) for i in here],
                "prune angle": [angle(dense[i], one[i], chosen[i]) for i in here],
                "order distance": [distance(one[i], two[i], chosen[i]) for i in here],
                "order angle": [angle(one[i], two[i], chosen[i]) for i in here],
                "barrier": [bench.barrier(one[i], two[i]) for i in here],
                "accuracy": [bench.accuracy(one[i]) for i in here],
            }
            rows.append(
                {"k": k, "mask": kind, **{n: statistics.mean(v) for n, v in values.items()}, "each": values}
            )
    return rows


def summary(found: dict[str, Any]) -> str:
    """The table of part "tickets", and by how many standard errors the ticket is ahead."""
    lines = [f"kept {found['kept']:.1%}, rewound to step {found['k']} of {found['steps']}"]
    ticket = found["accuracy"]["ticket"]
    for name, values in found["accuracy"].items():
        line = f"  {name:14} {statistics.mean(values):.4f}  {[round(v, 4) for v in values]}"
        if name in ("fresh weights", "random mask") and len(values) > 1:
            ahead = [a - b for a, b in zip(ticket, values)]
            error = statistics.stdev(ahead) / math.sqrt(len(ahead))
            line += f"  ticket ahead by {statistics.mean(ahead):+.4f} = {statistics.mean(ahead) / max(error, 1e-9):.1f} standard errors"
        lines.append(line)
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--part", choices=["tickets", "curves", "both", "time"], default="both")
    parser.add_argument("--depth", type=int, default=20)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--keep", type=float, default=0.2)
    parser.add_argument("--epochs", type=float, default=20, help="of one training, part tickets")
    parser.add_argument("--rewind", type=int, default=500, help="k of part tickets")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--curve-epochs", type=float, default=10)
    parser.add_argument("--curve-rounds", type=int, default=3)
    parser.add_argument("--curve-seeds", type=int, default=3)
    parser.add_argument("--ks", type=int, nargs="+", default=[0, 100, 500, 1500])
    parser.add_argument("--points", type=int, default=7, help="on the line between two runs")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument(
        "--train", type=int, default=None, help="pictures; default: the 40,000 that are there"
    )
    parser.add_argument("--test", type=int, default=None)
    parser.add_argument(
        "--bf16",
        action=argparse.BooleanOptionalAction,
        default=torch.cuda.is_available(),
        help="compute in bfloat16, weights in float32; default: on CUDA",
    )
    parser.add_argument("--out", default=None, help="a JSON file")
    parser.add_argument("--smoke", action="store_true")
    args = parser.parse_args()
    if args.smoke:
        small: dict[str, Any] = {"train": 256, "test": 200, "batch": 32, "epochs": 1, "curve_epochs": 1}
        small |= {
            "rewind": 2,
            "ks": [0, 4],
            "rounds": 2,
            "curve_rounds": 1,
            "seeds": 2,
            "curve_seeds": 1,
            "points": 3,
        }
        small |= {"depth": 8}
        vars(args).update(small)
    device = torch.device(args.device)
    torch.backends.cudnn.benchmark = True
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    started = time.perf_counter()
    dtype = torch.bfloat16 if args.bf16 else torch.float32
    data = Data.load(device, args.train, args.test, dtype)
    print(f"{len(data.labels)} pictures on {device} after {time.perf_counter() - started:.1f} s", flush=True)
    result: dict[str, Any] = {
        "settings": vars(args),
        "torch": torch.__version__,
        "pictures": len(data.labels),
    }
    result["device"] = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    if args.part == "time":
        result["time"] = times(args, data)
    if args.part in ("tickets", "both"):
        begun, bench = time.perf_counter(), Bench(args, data, args.epochs)
        found = tickets(bench, list(range(args.seeds)), args.rewind, args.rounds)
        result["tickets"] = {**found, "seconds": time.perf_counter() - begun, "trained": bench.fleet.trained}
        print(summary(found), flush=True)
        write(args.out, result)
    if args.part in ("curves", "both"):
        begun, bench = time.perf_counter(), Bench(args, data, args.curve_epochs)
        result["curves"] = curves(bench, list(range(args.curve_seeds)), args.ks, args.curve_rounds)
        result["curve_seconds"] = time.perf_counter() - begun
        for row in result["curves"]:
            print(
                "  ".join(
                    f"{n} {v:.4g}" if isinstance(v, float) else f"{n} {v}"
                    for n, v in row.items()
                    if n != "each"
                )
            )
    result["seconds"] = time.perf_counter() - started
    print(f"{result['seconds']:.0f} s", flush=True)
    write(args.out, result)


def times(args: argparse.Namespace, data: Data) -> dict[int, float]:
    """Milliseconds of a step of one network, by how many are trained at once."""
    found = {}
    for count in (1, 3, 6, 12):
        bench = Bench(copy.copy(args), data, 2)
        full = full_masks({name: bench.fresh(0)[name] for name in bench.names})
        runs = [Run(bench.fresh(i), full, i) for i in range(count)]
        bench.fleet.train(runs, until=5)
        if data.test.is_cuda:
            torch.cuda.synchronize()
        begun = time.perf_counter()
        bench.fleet.train(runs, until=200)
        if data.test.is_cuda:
            torch.cuda.synchronize()
        found[count] = (time.perf_counter() - begun) / 200 / count * 1e3
        print(f"{count} networks at once: {found[count]:.3f} ms a step of each", flush=True)
    return found


def write(path: str | None, result: dict[str, Any]) -> None:
    if path:
        Path(path).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
