"""Budgets: what must hold at the end, and how it is divided over the network.

A target is text (`50%`, `params<=100e6`, `macs<=50%`, `size<=200MB`, `latency<=8ms`, `2:4`, `tokens=64`); a bare
percentage is always the share **kept**. Units are divided along one *path*: the order in which they would leave if the
budget shrank from everything to the floors. The cut is the first state of the path that fits, found by bisection, then
refilled unit by unit: never over the budget, and within one unit of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from secateur.errors import SecateurError, choose
from secateur.pruning.select import top_k
from secateur.utils.screen import Screen


def divide(sizes: Sequence[int], shares: Sequence[float], total: int) -> list[int]:
    """How many weights each layer keeps: near size x share, in all exactly `total` (or all there are).

    Remainders go to the largest fractions, the earlier layer first; no layer is given more than it has.

    >>> divide([10, 10, 7], [0.5, 0.5, 0.5], 13)
    [5, 5, 3]
    """
    if not 0 <= total <= sum(sizes):
        raise SecateurError(f"can't keep {total} of {sum(sizes)} weights", where="budget")
    exact = [min(max(share, 0.0), 1.0) * size for size, share in zip(sizes, shares)]
    keep = [min(size, math.floor(share + 1e-9)) for size, share in zip(sizes, exact)]
    left = total - sum(keep)
    order = sorted(range(len(sizes)), key=lambda i: (keep[i] - exact[i], i))
    while left:
        step = 1 if left > 0 else -1
        movable = [i for i in (order if left > 0 else order[::-1]) if 0 <= keep[i] + step <= sizes[i]]
        share, extra = divmod(abs(left), len(movable))
        for position, i in enumerate(movable):
            room = sizes[i] - keep[i] if step > 0 else keep[i]
            keep[i] += step * min(room, share + (position < extra))
        left = total - sum(keep)
    return keep


def owl_shares(outliers: Sequence[float], share: float, lam: float = 0.08) -> list[float]:
    """Share kept per block from its outlier ratio, mean `share` (weight-baselines, 15; OWL, arXiv 2310.05175).

    >>> [round(1 - s, 5) for s in owl_shares([2, 5, 3], 0.3)]
    [0.77111, 0.61111, 0.71778]
    """
    ratios = torch.tensor(outliers, dtype=torch.float64)
    spread = (ratios.max() - ratios.min()).item()
    raised = (ratios - ratios.min()) / spread * 2 * lam if spread > 0 else torch.zeros_like(ratios)
    return (raised - raised.mean() + share).clamp(0, 1).tolist()


def coarse_to_fine(sizes: Sequence[int], scores: Sequence[float], keep: int, most: float) -> list[int]:
    """How many weights each block keeps: what the cap leaves it, and of the rest a part in proportion to its score.

    >>> coarse_to_fine([1000, 1000, 2000], [5, 1, 2], 2000, 0.6)
    [650, 450, 900]

    most: the largest share that any block may lose. In all exactly `keep` (ECoFLaP, arXiv 2310.02998; spec: ecoflap).
    The released code adds what the rounding kept too many instead of taking it away.

    Raises `SecateurError` where a score is negative or no number, or the cap leaves more than `keep`.
    """
    if not all(score >= 0 and math.isfinite(score) for score in scores):
        raise SecateurError(
            f"scores of blocks must be numbers of 0 or more: {list(scores)}", where="coarse-to-fine"
        )
    least = [round(size * (1 - most), 9) for size in sizes]
    floors = [math.floor(value) for value in least]
    if sum(floors) > keep:
        raise SecateurError(
            f"where no block may lose more than {most:.4g}, {sum(floors):,} weights stay of the {keep:,} wanted",
            where="coarse-to-fine",
            fix="let a block lose more, or keep more",
        )
    kept, left = [math.ceil(value) for value in least], [float(score) for score in scores]
    keep = min(keep, sum(sizes))
    while (missing := keep - sum(kept)) > 0:
        left = [score if n < size else 0.0 for score, n, size in zip(left, kept, sizes)]
        if not sum(left):
            left = [float(size - n) for size, n in zip(sizes, kept)]
        more = [max(math.ceil(round(s / sum(left) * missing, 9)), 1) if s else 0 for s in left]
        kept = [min(size, n + add) for size, n, add in zip(sizes, kept, more)]
    while (over := sum(kept) - keep) > 0:
        largest = max((i for i in range(len(kept)) if kept[i] > floors[i]), key=kept.__getitem__)
        kept[largest] -= min(over, kept[largest] - floors[largest])
    return kept


def arithmetic_shares(count: int, share: float, step: float) -> list[float]:
    """Shares kept that fall by `step` from each block to the next, with the mean `share` (arXiv 2502.14770).

    >>> arithmetic_shares(3, 0.5, 0.1)
    [0.6, 0.5, 0.4]
    """
    return [share + step * ((count - 1) / 2 - number) for number in range(count)]


def arithmetic_steps(count: int, share: float, tries: int = 5) -> list[float]:
    """Steps worth a try, from 0 to the largest at which no block is below 0 or above 1."""
    largest = 2 * min(share, 1 - share) / max(1, count - 1)
    return [largest * number / tries for number in range(tries)]


@dataclass(frozen=True, repr=False)
class Competitor(Screen):
    """One group as the allocator sees it: units with scores, in a kind, with a floor and a grain."""

    name: str
    kind: str
    scores: Tensor
    floor: int = 1
    round_to: int = 1
    fixed: bool = False
    """It goes down to its floor whatever the target is."""

    @property
    def size(self) -> int:
        return self.scores.numel()

    def grains(self) -> list[list[int]]:
        """Leaving units, lowest score first (of equals the later one), in steps that keep a multiple of `round_to`."""
        values, steps, size = self.scores.tolist(), [], self.size
        order = sorted(range(size - 1, -1, -1), key=values.__getitem__)
        floor, kept = self.floor, size
        while kept > floor:
            down = kept % self.round_to or self.round_to
            if kept - down < floor:
                break
            gone = size - kept
            steps.append(order[gone : gone + down])
            kept -= down
        return steps

    def down_to(self, limit: int) -> Tensor:
        """Sorted kept units once as many have left as it takes to keep `limit` or, if it can't, as few as it can."""
        kept = set(range(self.size))
        for grain in self.grains():
            if len(kept) <= limit:
                break
            kept.difference_update(grain)
        return torch.tensor(sorted(kept), dtype=torch.int64)


Step = list[tuple[str, int]]
Order = Callable[[Sequence[Competitor]], list[Step]]
MEASURED = "measured"
"""The allocation for units that runs the model: by what its predictions lose with each group cut alone."""
ORDERS: dict[str, Order] = {}
"""Allocations of a budget over units, by name: the competing groups -> the order in which units leave."""


def order(name: str) -> Callable[[Order], Order]:
    """Decorator: an allocation for units under this name, for `allocation=`.

    >>> @order("largest-first")  # doctest: +SKIP
    ... def largest_first(groups): ...
    """

    def add(function: Order) -> Order:
        ORDERS[name] = function
        return function

    return add


def build_path(groups: Sequence[Competitor], allocation: str = "uniform") -> list[Step]:
    """The order in which units leave, as steps of (group name, unit), under the allocation of this name.

    uniform: all groups of a kind lose their next unit together, kinds in step by share; global: by score over all
    groups; per-kind: by score within a kind, kinds in step by share.

    Raises `SecateurError` where there is no such allocation for units.
    """
    return ORDERS[choose(allocation, ORDERS, what="allocation for units", where="allocation")](groups)


@order("uniform")
def in_step(groups: Sequence[Competitor]) -> list[Step]:
    """All groups of a kind and size lose their next unit together, kinds in step by share."""
    steps: dict[tuple[float, str, int, int], Step] = {}
    for group in groups:
        gone = 0
        for index, grain in enumerate(group.grains()):
            # a unit leaves when its kind's share has fallen by the whole of it: few large units (a third of the
            # heads) stay while many small ones can make up the difference
            gone += len(grain)
            key = (gone / group.size, group.kind, group.size, index)
            steps.setdefault(key, []).extend((group.name, unit) for unit in grain)
    return [steps[key] for key in sorted(steps)]


def _ranked(groups: Sequence[Competitor]) -> list[tuple[str, Step]]:
    """(kind, step) of all groups, lowest score first; of equals the later group's."""
    ranked: list[tuple[float, str, int, Step]] = []
    for position, group in enumerate(groups):
        level, values = -math.inf, group.scores.tolist()
        for grain in group.grains():
            # a coarse step leaves when its average unit would; never before the step ahead of it
            level = max(level, sum(values[unit] for unit in grain) / len(grain))
            ranked.append((level, group.kind, position, [(group.name, unit) for unit in grain]))
    ranked.sort(key=lambda item: (item[0], -item[2]))
    return [(kind, step) for _, kind, _, step in ranked]


@order("global")
def by_score(groups: Sequence[Competitor]) -> list[Step]:
    """By score over all groups."""
    return [step for _, step in _ranked(groups)]


@order("per-kind")
def by_score_in_kind(groups: Sequence[Competitor]) -> list[Step]:
    """By score within a kind, kinds in step by share."""
    total = {kind: sum(g.size for g in groups if g.kind == kind) for kind in {g.kind for g in groups}}
    gone_of = dict.fromkeys(total, 0)
    keyed = []
    for kind, step in _ranked(groups):
        gone_of[kind] += len(step)
        keyed.append((gone_of[kind] / total[kind], kind, step))
    keyed.sort(key=lambda item: item[:2])
    return [step for *_, step in keyed]


def paced_path(pools: Iterable[tuple[float, Sequence[Competitor]]], allocation: str = "global") -> list[Step]:
    """One path out of several pools of groups, each (pace, groups): by the share that left, times the pace.

    Half of the units of a pool with pace 2 are gone when all of a pool with pace 1 are. Within a pool the order is
    that of `build_path`.

    >>> a, b = (Competitor(name, "neurons", torch.arange(4.0)) for name in "ab")
    >>> [step[0] for step in paced_path([(2.0, [a]), (1.0, [b])])]
    [('b', 0), ('a', 0), ('b', 1), ('b', 2), ('a', 1), ('a', 2)]
    """
    keyed: list[tuple[float, Step]] = []
    for pace, groups in pools:
        gone, total = 0, sum(group.size for group in groups)
        for step in build_path(groups, allocation):
            keyed.append((pace * (gone + len(step) / 2) / total, step))
            gone += len(step)
    return [step for _, step in sorted(keyed, key=lambda item: item[0])]


def kept_after(groups: Sequence[Competitor], steps: Iterable[Step]) -> dict[str, Tensor]:
    """Sorted kept units per group once `steps` have left."""
    gone: dict[str, set[int]] = {group.name: set() for group in groups}
    for step in steps:
        for name, unit in step:
            gone[name].add(unit)
    return {
        group.name: torch.tensor(
            [u for u in range(group.size) if u not in gone[group.name]], dtype=torch.int64
        )
        for group in groups
    }


def follow(
    groups: Sequence[Competitor],
    path: Sequence[Step],
    cost: Callable[[Mapping[str, Tensor]], float],
    limit: float,
    *,
    refill: bool = True,
    describe: Callable[[float], str] = lambda value: f"{value:,.0f}",
) -> dict[str, Tensor]:
    """The largest state of `path` whose cost is at most `limit`: never over, within one step.

    Parameters
    ----------
    cost: kept units -> what is bounded; it must not rise as units leave.
    refill: give back, latest leaver first, every step that still fits.

    Groups that are `fixed` are at their floor throughout.

    Raises `SecateurError` naming the best that can be reached when even the end of the path is over the limit.
    """

    fixed = {group.name for group in groups if group.fixed}
    start: Step = [(g.name, unit) for g in groups if g.fixed for grain in g.grains() for unit in grain]
    if fixed:
        free = ([item for item in step if item[0] not in fixed] for step in path)
        path = [step for step in free if step]

    def kept(steps: Iterable[Step]) -> dict[str, Tensor]:
        return kept_after(groups, [start, *steps])

    def price(count: int) -> float:
        return cost(kept(path[:count]))

    if price(0) <= limit:
        return kept([])
    if (least := price(len(path))) > limit:
        floors = "the shares that were given, and every other group" if fixed else "every group"
        raise SecateurError(
            f"the target {describe(limit)} can't be met: with {floors} at its floor, {describe(least)} is left",
            where="target",
            fix=f"ask for {describe(least)} or more, or lower the {'shares' if fixed else 'floors'}",
        )
    low, high = 0, len(path)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if price(middle) <= limit else (middle, high)
    left = list(path[:high])
    if refill:
        # Units of one kind and size cost the same, so one that doesn't fit closes its like.
        like = {group.name: (group.kind, group.size) for group in groups}
        closed: set[frozenset[tuple[str, int]]] = set()
        for index in range(len(left) - 1, -1, -1):
            owners = frozenset(like[name] for name, _ in left[index])
            if owners in closed:
                continue
            trial = left[:index] + left[index + 1 :]
            if cost(kept(trial)) <= limit:
                left = trial
            else:
                closed.add(owners)
    return kept(left)


# Published cuts: thresholds and roundings as papers have them, near the budget instead of at it


def cut_at(scores: Sequence[Tensor], costs: Sequence[float], share: float) -> list[Tensor]:
    """Bool masks of what stays above one threshold for all, units weighed by what they cost.

    >>> cut_at([torch.tensor([2.0, -1.0]), torch.tensor([1.5, 0.3, 0.1])], [4, 1], 0.6)
    [tensor([ True, False]), tensor([ True,  True, False])]

    Units in falling order; the cut lies where their cumulative cost is nearest to `share` of the whole, the first of
    equals; the unit at the cut leaves too, and whatever ties with it. FLAP, arXiv 2312.11983. Spec: weight-baselines, 12.
    """
    values = torch.cat([s.double() for s in scores])
    cost = torch.cat([torch.full((len(s),), float(c), dtype=torch.float64) for s, c in zip(scores, costs)])
    ordered, order = values.sort(descending=True, stable=True)
    distance = (cost[order].cumsum(0) - share * cost.sum()).abs()
    return [s.double() > ordered[distance.argmin()] for s in scores]


def lowest(scores: Sequence[Tensor], count: int) -> list[Tensor]:
    """Bool masks of what leaves: scores at most the `count`-th smallest of all, ties included; none for a count of 0.

    >>> lowest([torch.tensor([3.0, 1.0]), torch.tensor([2.0, 0.0])], 2)
    [tensor([False,  True]), tensor([False,  True])]
    """
    if count == 0:
        return [torch.zeros_like(s, dtype=torch.bool) for s in scores]
    threshold = torch.cat([*scores]).kthvalue(count).values
    return [s <= threshold for s in scores]


def at_least(kept: Tensor, scores: Tensor, floor: int) -> Tensor:
    """The mask of what stays, or the `floor` best where it keeps fewer.

    >>> at_least(torch.tensor([False, False]), torch.tensor([1.0, 2.0]), 1)
    tensor([False,  True])
    """
    return kept if int(kept.sum()) >= floor else top_k(scores, floor)


def nearest_multiple(count: int, grain: int, size: int) -> int:
    """The nearest multiple of `grain`, from one `grain` to `size` units. TVA-Prune; spec: vtrans, step 10.

    >>> [nearest_multiple(n, 128, 4096) for n in (3000, 100, 70, 63)]
    [2944, 128, 128, 128]
    """
    return min(size, max(grain, (count + grain // 2) // grain * grain))


def spare_last(gone: Tensor) -> Tensor:
    """The mask of what leaves without the last unit, should all leave. NIRVANA, arXiv 2509.14230.

    >>> spare_last(torch.tensor([True, True]))
    tensor([ True, False])
    """
    return gone & (torch.arange(len(gone)) < len(gone) - 1) if gone.all() else gone


def spare_to_multiple(scores: Tensor, gone: Tensor, multiple: int = 8) -> Tensor:
    """The mask of what leaves without its best, so that a multiple of units stays; nothing leaves if that takes all.

    >>> spare_to_multiple(torch.tensor([4.0, 1.0, 2.0, 3.0]), torch.tensor([False, True, True, True]), 2)
    tensor([False,  True,  True, False])

    NIRVANA, arXiv 2509.14230. Spec: nirvana, step 9.
    """
    candidates = int(gone.sum())
    kept = len(gone) - candidates
    need = max(multiple, -(-kept // multiple) * multiple) - kept
    if need >= candidates:
        return torch.zeros_like(gone)
    return gone & ~top_k(scores.masked_fill(~gone, -torch.inf), need)
