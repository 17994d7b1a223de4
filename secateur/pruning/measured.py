"""Budgets of units by what the model's predictions lose: measured with each group cut alone and what reads it solved anew."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from secateur.graph import Graph, Slice
from secateur.graph.blocks import Matrix, find_stacks
from secateur.pruning.allocate import Competitor
from secateur.repair.readers import Moments, beside_states, output_of
from secateur.repair.squares import masked_least_squares
from secateur.stats.divergence import TopKDivergence
from secateur.stats.record import Recorder
from secateur.stats.stream import Flow, states_of
from secateur.surgery import trial
from secateur.utils.batches import as_batches
from secateur.utils.running import evaluating

KEPT = (0.85, 0.7, 0.5, 0.3, 0.1)
"""Shares of a group's units at which its block's error is worked out."""
TRIED = 0.7
"""The share at which the predictions' loss is measured, one of `KEPT`."""
TOP = 1024
"""Outcomes of a prediction that are compared."""

Readers = Mapping[str, tuple[Slice, Matrix]]


def by_what_is_lost(
    model: nn.Module,
    graph: Graph,
    groups: Sequence[Competitor],
    readers: Readers,
    batches: Any,
    judged: Any,
    weights: Mapping[str, int],
    progress: Callable[..., Iterable] | None = None,
) -> dict[str, Tensor]:
    """Scores [units] that keep each group's order and say what the predictions lose with a unit, for each weight it frees.

    >>> by_what_is_lost(model, graph, groups, readers, ids, ids[:2], weights)  # doctest: +SKIP
    {'model.layers.0.mlp:neurons': tensor([1.3e-08, 4.1e-08, ...]), ...}

    readers: the matrix that reads a group's units, and where. batches: what blocks are run on; judged: token ids or model inputs
    that predictions are compared on. weights: how many weights a unit frees.

    The loss is the KL of predictions at `TRIED` of a group's units, its reader solved anew by least squares; between there and
    the ends it grows as the block's own error does, which costs no forward. The model is as it was.
    """
    free = {group.name: group for group in groups if group.grains()}
    orders = {name: [unit for grain in group.grains() for unit in grain] for name, group in free.items()}
    if isinstance(judged, Tensor) and judged.is_floating_point():
        judged = [judged]
    divergence = TopKDivergence(model, judged, TOP)
    scores = {group.name: group.scores for group in groups}
    bar: Any = progress(range(len(free)), "measured", len(free)) if progress else range(len(free))
    every = tuple((sample, divergence.lengths[sample]) for sample in range(len(judged)))
    found = iter(_moments(model, {name: readers[name] for name in free}, batches))
    for _ in bar:
        name, sums = next(found)
        (part, matrix), order, size = readers[name], orders[name], free[name].size
        counts = sorted({max(size - len(order), round(size * share)) for share in KEPT} - {size})
        errors, tried = {size: 0.0}, max(counts, key=lambda n: -abs(n - TRIED * size))
        for count in counts:
            kept = _kept(size, order, count)
            solved, errors[count] = _solved(matrix, part, kept, sums)
            if count == tried:
                with trial(model, graph, {name: kept}), torch.no_grad(), evaluating(model):
                    matrix.set(solved)
                    loss = max(divergence(every), 0.0)
        unit = loss / max(errors[tried], torch.finfo(torch.float32).tiny) / weights[name]
        scores[name] = _slopes(errors, order, unit)
    return scores


def _moments(model: nn.Module, readers: Readers, batches: Any) -> Iterable[tuple[str, Moments]]:
    """What each reader is given, block by block through the dense model: tokens weigh by the size of the block's states."""
    stacks, chunks = find_stacks(model), as_batches(batches)
    recorder = Recorder(model, {}, frozenset())
    for stack in stacks:
        flow = Flow(model, stack.modules, chunks, stack.path, alone=len(stacks) == 1)
        for index, block in enumerate(stack.modules):
            path = stack.path_of(index)
            own = {n: m for n, (_, m) in readers.items() if m.name.startswith(f"{path}." if path else "")}
            sums = {name: Moments() for name in own}
            for number, batch in enumerate(chunks):
                recorder.begin(batch)
                given = flow.call(number, index)
                with torch.no_grad(), evaluating(model):
                    output = None
                    for name, matrix in own.items():
                        seen = output_of(block, given, matrix.module)
                        if seen is not None:
                            (x, output), states = seen, states_of(seen[1])[0]
                            x = x * beside_states(states) if x.shape[:-1] == states.shape[:-1] else x
                            sums[name].add(recorder.rows(matrix, x))
                    flow.keep(number, index, block(*given[0], **given[1]) if output is None else output)
            yield from sums.items()


def _kept(size: int, order: Sequence[int], count: int) -> Tensor:
    gone = set(order[: size - count])
    return torch.tensor([unit for unit in range(size) if unit not in gone], dtype=torch.int64)


def _solved(matrix: Matrix, part: Slice, kept: Tensor, sums: Moments) -> tuple[Tensor, float]:
    """The reader solved anew on the units that stay, and the error that is left."""
    weight = matrix.weight().float()
    if sums.inner is None:
        return matrix.weight(), 0.0
    columns = torch.zeros(weight.shape[1], dtype=torch.bool, device=weight.device)
    columns[part.index[kept].flatten().to(weight.device)] = True
    new = masked_least_squares(weight, columns.expand_as(weight), sums.inner[0])
    off = weight - new
    return new, float(((off @ sums.inner[0]) * off).sum().clamp_min(0))


def _slopes(errors: Mapping[int, float], order: Sequence[int], unit: float) -> Tensor:
    """[units] What each unit that leaves adds to the error, never less than the one before it; those that can't leave: infinity."""
    size = max(errors)
    gone = sorted(size - count for count in errors)
    steps = [(errors[size - b] - errors[size - a]) / (b - a) for a, b in pairwise(gone)]
    middles = [(a + b) / 2 for a, b in pairwise(gone)]
    along = np.maximum.accumulate(np.interp(np.arange(len(order)) + 0.5, middles, steps)) * unit
    scores = torch.full((size,), torch.inf, dtype=torch.float64)
    ranks = torch.arange(len(order), dtype=torch.float64)
    scores[torch.tensor(order)] = (
        torch.from_numpy(along) * (1 + 1e-9 * ranks) + 1e-30 * ranks
    )  # equals keep their order
    return scores


def with_scores(groups: Sequence[Competitor], scores: Mapping[str, Tensor]) -> list[Competitor]:
    return [dataclasses.replace(group, scores=scores[group.name]) for group in groups]
