"""Several pruned and repaired versions of every sublayer of one model, and the model switching between them.

A sublayer is a group of units with the one matrix that consumes them: the heads with the output projection, the
neurons with the down projection. A version has some units fewer and that matrix refitted by `stats.obs`; leaving the
other matrices alone is enough, because what they feed is multiplied by zero columns.
"""

from __future__ import annotations

import copy
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn

from secateur.graph import Group
from secateur.graph.blocks import Matrix, find_matrices
from secateur.pruning.resume import Checkpoint
from secateur.solvers.evolution import Batch, State, halving, reach_of
from secateur.solvers.obs import Removal, prepare, refit
from secateur.stats.divergence import TopKDivergence
from secateur.stats.stream import stream
from secateur.utils.screen import Screen

if TYPE_CHECKING:
    from secateur.pruning.context import Context

Solve = Callable[["Sublayer", Removal, Sequence[int]], list[Tensor]]
"""(sublayer, problem, counts of kept units) -> kept units for each."""


@dataclass(frozen=True, eq=False, repr=False)
class Sublayer(Screen):
    """A group and the matrix that consumes its units; `units` int64 [units, width] are its columns."""

    group: Group
    matrix: Matrix
    units: Tensor
    footprint: int

    @property
    def name(self) -> str:
        return self.group.name

    @property
    def size(self) -> int:
        return self.group.size

    @property
    def pool(self) -> tuple[str, int]:
        """Units of one pool cost the same, so moving them between its layers leaves every budget as it is."""
        return self.group.kind, self.footprint

    def step(self, share: float, finest: int, round_to: int, coarse: bool) -> int:
        """About `share` of the units: of neurons a multiple of `round_to`, at least `finest` or 1/64 of them."""
        step = round(share * self.size)
        if coarse:
            return max(1, step)
        return max(round_to, max(1, min(finest, self.size // 64), step) // round_to * round_to)

    def columns(self, keep: Tensor) -> Tensor:
        """[in] bool: the columns left when only `keep` units stay; those of no unit always are."""
        left = torch.ones(self.matrix.shape[1], dtype=torch.bool)
        left[self.units.reshape(-1)] = False
        left[self.units[keep].reshape(-1)] = True
        return left


def find_sublayers(
    groups: Iterable[Group], matrices: Mapping[str, Matrix], shapes: Mapping[str, tuple[int, ...]]
) -> list[Sublayer]:
    """Those of `groups` whose units one matrix consumes, in order; others are left out."""
    found = []
    for group in groups:
        consumers = [s for s in group.slices if s.role == "in" and s.name in matrices]
        if len(consumers) == 1 and matrices[consumers[0].name].parts == 1:
            footprint = sum(
                s.index.shape[1] * torch.Size(shapes[s.name]).numel() // shapes[s.name][s.dim]
                for s in group.slices
            )
            found.append(Sublayer(group, matrices[consumers[0].name], consumers[0].index, footprint))
    return found


def even_base(context: Context, layers: Sequence[Sublayer]) -> list[int]:
    """Units removed of each layer when all of a kind lose as equal a share as the exact budget lets them."""
    seen: Counter[str] = Counter()
    order = {}
    for layer in layers:
        order[layer.name] = (torch.arange(layer.size).double() + halving(seen[layer.group.kind])) / layer.size
        seen[layer.group.kind] += 1
    keep = context.allocate(order, keep_scores=False)
    return [layer.size - len(keep[layer.name]) for layer in layers]


def ranges(
    context: Context, layers: Sequence[Sublayer], removed: Sequence[int], steps: Sequence[int], reach: int
) -> list[tuple[int, int]]:
    """(lowest, highest) level of each layer, between what an earlier round removed and the floor."""
    found = []
    for layer, count, step in zip(layers, removed, steps):
        if layer.name in context.fixed_units:
            found.append((0, 0))
            continue
        gone = int(context.gone[layer.name].sum()) if layer.name in context.gone else 0
        found.append(reach_of(count, step, gone, layer.size - context.floor_of(layer.group), reach))
    return found


@dataclass(repr=False)
class Supernet(Screen):
    """Versions by sublayer and count of removed units. A context: leaving it puts the dense weights back.

    >>> with Supernet(context, sublayers, solve) as net:
    ...     net.build("round-0", ids, [[10, 20, 30]] * len(sublayers), [20] * len(sublayers))
    ...     net.weight(sublayers[0], 20)  # [out, in], zero where units left

    offload: a directory that holds the versions instead of memory; what is written there is removed at the end.
    Versions that a killed run had finished are taken from the context's checkpoint.
    """

    context: Context
    layers: Sequence[Sublayer]
    solve: Solve
    damping: float = 0.01
    expected: str = "mean"
    offload: str = ""
    versions: dict[str, dict[str, Tensor]] = field(default_factory=dict)

    def __enter__(self) -> Self:
        self.dense = {layer.name: layer.matrix.weight().clone() for layer in self.layers}
        if self.offload:
            Path(self.offload).mkdir(parents=True, exist_ok=True)
        self.disk = Checkpoint(
            tempfile.mkdtemp(prefix="supernet-", dir=self.offload) if self.offload else None
        )
        return self

    def __exit__(self, *_: object) -> None:
        self.restore()
        if self.disk.directory:
            shutil.rmtree(self.disk.directory, ignore_errors=True)

    def restore(self) -> None:
        for layer in self.layers:
            layer.matrix.set(self.dense[layer.name])

    def build(self, tag: str, data: Any, counts: Sequence[Sequence[int]], center: Sequence[int]) -> None:
        """Versions with `counts` units removed of each layer, block by block from the dense weights.

        Before a block hands its outputs on, each sublayer gets its expected weight: the mean of the versions weighted
        by the share they keep, or (`median`) the version with `center` units removed, or (`off`) the dense one.
        """
        self.restore()
        self.versions = {}
        self.counts = dict(zip([layer.name for layer in self.layers], counts))
        self.center = dict(zip([layer.name for layer in self.layers], center))
        blocks = sorted({layer.matrix.block for layer in self.layers})
        skip = 0
        checkpoint, tag = self.context.checkpoint, f"round-{self.context.round}-{tag}-{len(self.layers)}"
        for index in blocks:
            found = {n.name: checkpoint.load(f"{tag}-{n.name}") for n in self._in(index)}
            if any(versions is None for versions in found.values()):
                break
            for layer in self._in(index):
                self._take(layer, found[layer.name] or {})
            skip = index + 1
        if skip <= blocks[-1]:
            matrices = {layer.matrix.name: layer.matrix for layer in self.layers}
            for block in stream(
                self.context.model, data, {"hessian"}, matrices, skip=skip, progress=self.context.progress
            ):
                for layer in self._in(block.index):
                    hessian = block.stats[layer.matrix.name].hessian
                    versions = self._prune(layer, hessian)
                    checkpoint.save(f"{tag}-{layer.name}", versions)
                    self._take(layer, versions)
        self.restore()

    def _in(self, block: int) -> list[Sublayer]:
        return [layer for layer in self.layers if layer.matrix.block == block]

    def _prune(self, layer: Sublayer, hessian: Tensor) -> dict[str, Tensor]:
        pruned = [count for count in self.counts[layer.name] if count]
        if not pruned:
            return {}
        problem = prepare(self.dense[layer.name], hessian, layer.units, self.damping)
        versions = {}
        for count, keep in zip(pruned, self.solve(layer, problem, [layer.size - count for count in pruned])):
            versions[f"keep/{count}"] = keep
            versions[f"weight/{count}"] = refit(problem, keep)[:, layer.columns(keep)].cpu()
        return versions

    def _take(self, layer: Sublayer, versions: dict[str, Tensor]) -> None:
        if self.disk.directory:
            self.disk.save(layer.name, versions)
            versions = self.disk.load(layer.name) or {}
        self.versions[layer.name] = versions
        if self.expected == "median":
            layer.matrix.set(self.weight(layer, self.center[layer.name]))
        elif self.expected == "mean":
            shares = {count: 1 - count / layer.size for count in self.counts[layer.name]}
            mean = torch.zeros_like(self.dense[layer.name], dtype=torch.float32)
            for count, share in shares.items():
                mean += self.weight(layer, count) * (share / sum(shares.values()))
            layer.matrix.set(mean)

    def keep(self, layer: Sublayer, removed: int) -> Tensor:
        """Kept units, sorted."""
        return self.versions[layer.name][f"keep/{removed}"] if removed else torch.arange(layer.size)

    def weight(self, layer: Sublayer, removed: int) -> Tensor:
        """[out, in] of the version, zero where units left; the dense weight for none removed."""
        dense = self.dense[layer.name]
        if not removed:
            return dense
        full = torch.zeros_like(dense)
        full[:, layer.columns(self.keep(layer, removed)).to(full.device)] = self.versions[layer.name][
            f"weight/{removed}"
        ].to(full)
        return full


class Candidates:
    """The fitness of states of levels over a supernet: KL to the dense model, run on a copy of the model.

    dtype: of the copy's weights; "auto": bfloat16 in place of float32 where the device multiplies it fast.
    """

    def __init__(self, net: Supernet, data: Any, topk: int, dtype: str = "auto"):
        self.net = net
        model = copy.deepcopy(net.context.model).eval()
        wanted = fast_dtype(model) if dtype == "auto" else getattr(torch, dtype)
        for parameter in model.parameters():
            parameter.data = parameter.data.to(wanted)
        self.matrices = find_matrices(model)
        self.divergence = TopKDivergence(model, data, topk)
        self.lengths = self.divergence.lengths

    def center(self, removed: Sequence[int], steps: Sequence[int]) -> None:
        """What a level means: `removed` + level * `steps` units fewer."""
        self.removed, self.steps = removed, steps
        self.installed: dict[str, int] = {}

    def __call__(self, state: State, batch: Batch) -> float:
        counts = [r + level * s for r, level, s in zip(self.removed, state, self.steps)]
        for layer, count in zip(self.net.layers, counts):
            if self.installed.get(layer.name) != count:
                self.matrices[layer.matrix.name].set(self.net.weight(layer, count))
                self.installed[layer.name] = count
        return self.divergence(batch)


def fast_dtype(model: nn.Module) -> torch.dtype:
    """bfloat16 for a float32 model where the device multiplies it fast, else the model's own."""
    first = next(model.parameters())
    amx = getattr(torch.cpu, "_is_amx_tile_supported", bool)
    fast = first.is_cuda or (first.device.type == "cpu" and amx())
    return torch.bfloat16 if first.dtype == torch.float32 and fast else first.dtype
