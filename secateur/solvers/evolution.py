"""Evolutionary search over integer levels that keeps a budget exactly.

A state gives every name an integer level. A move raises one level and lowers another of the same pool, so the sum of
levels per pool, and with it the budget, never changes. A generation's offspring pass stages: many on few samples, few
on many; the parent joins before the last, so the best never gets worse on the same samples.

After EvoPress (arXiv 2410.14649), as Tyr-the-Pruner (arXiv 2503.09657) uses it.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field

import torch

State = tuple[int, ...]


@dataclass(frozen=True)
class Space:
    """Names with their pools and the inclusive range of each level.

    >>> space = Space(("a", "b"), ("mlp", "mlp"), (-1, -1), (1, 1))
    >>> space.offspring((0, 0), 2, torch.Generator().manual_seed(0)) in ([(-1, 1), (1, -1)], [(1, -1), (-1, 1)])
    True
    """

    names: tuple[str, ...]
    pools: tuple[Hashable, ...]
    low: State
    high: State

    def mutate(self, state: State, generator: torch.Generator, flips: int = 4) -> State:
        """`state` after min of two draws from 1..flips moves; a move that finds no partner is skipped."""
        levels = list(state)
        for _ in range(min(_draw(flips, generator), _draw(flips, generator)) + 1):
            room: dict[Hashable, list[int]] = {}
            for i, pool in enumerate(self.pools):
                if levels[i] < self.high[i]:
                    room.setdefault(pool, []).append(i)
            givers = [
                i
                for i, pool in enumerate(self.pools)
                if levels[i] > self.low[i] and room.get(pool, [i]) != [i]
            ]
            if not givers:
                break
            giver = givers[_draw(len(givers), generator)]
            takers = [i for i in room[self.pools[giver]] if i != giver]
            taker = takers[_draw(len(takers), generator)]
            levels[giver] -= 1
            levels[taker] += 1
        return tuple(levels)

    def offspring(self, parent: State, count: int, generator: torch.Generator, flips: int = 4) -> list[State]:
        """Up to `count` distinct states other than `parent`; fewer where so many aren't found in 20 tries each."""
        found: dict[State, None] = {}
        for _ in range(20 * count):
            child = self.mutate(parent, generator, flips)
            if child != parent:
                found.setdefault(child)
            if len(found) == count:
                break
        return list(found)


def _draw(n: int, generator: torch.Generator) -> int:
    return int(torch.randint(n, (1,), generator=generator))


def reach_of(count: int, step: int, least: int, most: int, reach: int = 4) -> tuple[int, int]:
    """(lowest, highest) level such that count + level * step stays in least..most, at most `reach` to each side.

    >>> reach_of(count=4, step=1, least=0, most=8), reach_of(1, 1, 0, 8)
    ((-4, 4), (-1, 4))
    """
    return -min(reach, (count - least) // step), min(reach, (most - count) // step)


def halving(index: int) -> float:
    """The van der Corput sequence: its first few numbers are always spread evenly over 0..1.

    >>> [halving(i) for i in range(5)]
    [0.0, 0.5, 0.25, 0.75, 0.125]
    """
    return sum(((index >> bit) & 1) / 2 ** (bit + 1) for bit in range(index.bit_length()))


@dataclass(frozen=True)
class Stage:
    """How many tokens the candidates of a stage are judged on, and how many go on."""

    tokens: int
    survivors: int


Batch = tuple[tuple[int, int], ...]


def draw_tokens(lengths: Sequence[int], tokens: int, generator: torch.Generator) -> Batch:
    """Distinct random samples with `tokens` tokens in all, as (sample, tokens taken); the last one is truncated.

    All samples when they hold no more than that.

    >>> sum(take for _, take in draw_tokens([5, 5, 5], 8, torch.Generator()))
    8
    """
    if tokens >= sum(lengths):
        return tuple(enumerate(lengths))
    batch, left = [], tokens
    for sample in torch.randperm(len(lengths), generator=generator).tolist():
        if left > 0:
            batch.append((sample, min(left, lengths[sample])))
            left -= lengths[sample]
    return tuple(sorted(batch))


@dataclass
class Found:
    """The best state, and per generation the fitness of the winner on that generation's last samples."""

    state: State
    history: list[float] = field(default_factory=list)


def evolve(
    space: Space,
    fitness: Callable[[State, Batch], float],
    lengths: Sequence[int],
    stages: Sequence[Stage],
    generator: torch.Generator,
    *,
    parent: State | None = None,
    generations: int = 50,
    offspring: int = 128,
    flips: int = 4,
    fixed: bool = False,
    progress: Callable[[Iterable[int]], Iterable[int]] = iter,
) -> Found:
    """The state of lowest fitness found from `parent` (all zero by default).

    fitness(state, batch): lower is better; the same arguments always give the same number. lengths: tokens of each
    sample. The last stage's first is the next parent; ties go to the parent, then to the earlier offspring.
    fixed: the last stage's samples are drawn once, so that its best never gets worse, and the parent costs nothing.
    """
    found = Found(parent or (0,) * len(space.names))
    known: dict[tuple[State, Batch], float] = {}
    always = draw_tokens(lengths, stages[-1].tokens, generator) if fixed else None

    def judge(state: State, batch: Batch) -> float:
        if (state, batch) not in known:
            known[state, batch] = fitness(state, batch)
        return known[state, batch]

    for _ in progress(range(generations)):
        candidates = space.offspring(found.state, offspring, generator, flips)
        if not candidates:
            break
        for index, stage in enumerate(stages):
            last = index + 1 == len(stages)
            batch = always if always and last else draw_tokens(lengths, stage.tokens, generator)
            if last:
                candidates = [found.state, *candidates]
            scores = [judge(state, batch) for state in candidates]
            order = sorted(range(len(candidates)), key=lambda i: (scores[i], i))
            if last:
                found.state = candidates[order[0]]
                found.history.append(scores[order[0]])
            candidates = [candidates[i] for i in order[: stage.survivors]]
    return found
