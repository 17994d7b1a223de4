"""How much each layer may lose before one of several losses has grown too much: a greedy pass with an allowance each.

PAGCP, arXiv 2303.11923 (spec: pagcp). Nothing here knows a model: sizes, and a function from a trial to losses.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod

from secateur.errors import SecateurError

Losses = Mapping[str, float]
GRID = 20
"""Units leave in steps of a twentieth."""


def decay(first: float, count: int, budget: float) -> float:
    """The factor from one allowance to the next, so that prod(1 + first * factor^i) over `count` of them is `budget`.

    >>> round(decay(0.06, 60, 6.0), 6), round(decay(0.1, 3, 1.5), 6), decay(0.5, 3, 1.2)
    (0.973794, 1.400447, 0.0)

    0 where the first alone is over the budget, 1 where it is 0.
    """
    if first == 0:
        return 1.0
    if budget <= 1 + first or count < 2:
        return 0.0

    def left(factor: float) -> float:
        return prod(1 + first * factor**i for i in range(count)) - budget

    low, high = 0.0, 1.0
    while left(high) < 0:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (low, middle) if left(middle) > 0 else (middle, high)
    return (low + high) / 2


def in_order(savings: Mapping[str, float], factor: float) -> list[str]:
    """Layers so that the largest allowance meets the largest saving: falling where allowances fall, else rising.

    >>> in_order({"a": 1.0, "b": 3.0}, 0.9), in_order({"a": 1.0, "b": 3.0}, 1.1)
    (['b', 'a'], ['a', 'b'])
    """
    return sorted(savings, key=lambda name: savings[name] * (-1 if factor <= 1 else 1))


@dataclass(frozen=True)
class Accepted:
    """What one layer may lose: units, the losses then, the total before it, and the loss that stopped it ("" : none)."""

    name: str
    removed: int
    losses: Losses
    before: float
    worst: str


def greedy(
    sizes: Mapping[str, int],
    evaluate: Callable[[Mapping[str, int]], Losses],
    allowance: float,
    factor: float,
    guard: str = "max",
) -> list[Accepted]:
    """One pass over the layers in the order of `sizes`; the allowance is multiplied by `factor` after each that loses.

    evaluate: units removed by layer -> losses; called with what was accepted so far and one trial. guard: "max", the loss
    that grew most must stay within the allowance; "sum", the sum of the losses.

    Raises `SecateurError` for a loss that isn't above 0: nothing can be said of its growth.
    """
    base = dict(evaluate({}))
    for name, value in base.items():
        if not value > 0:
            raise SecateurError(
                f"the loss {name!r} is {value:.4g}, and its growth is counted in shares of it",
                where="losses",
                fix="a loss above 0: a cross-entropy, a mean squared error, one minus a metric",
            )
    total = sum(base.values())
    removed: dict[str, int] = {}
    found: list[Accepted] = []
    for name, size in sizes.items():
        best, losses, worst = 0, dict(base), ""
        for step in range(1, GRID):
            count = min(step * size // GRID, size - 1)
            if count <= best:
                continue
            now = evaluate({**removed, name: count})
            growth = {task: now[task] / base[task] for task in base}
            over = sum(now.values()) / sum(base.values()) if guard == "sum" else max(growth.values())
            if not over <= 1 + allowance:
                worst = max(growth, key=growth.__getitem__)
                break
            best, losses = count, dict(now)
        found.append(Accepted(name, best, losses, total, worst))
        if best:
            removed[name] = best
            base = {task: max(value, losses[task]) for task, value in base.items()}
            total = max(total, sum(losses.values()))
            allowance *= factor
    return found


def savings(accepted: Sequence[Accepted], cost: Callable[[Mapping[str, int]], float]) -> dict[str, float]:
    """What each layer saves once those before it have lost theirs; cost: units removed by layer -> what is left to pay.

    >>> steps = [Accepted("a", 2, {"x": 1}, 1.0, ""), Accepted("b", 5, {"x": 1}, 1.0, "")]
    >>> savings(steps, lambda removed: (10 - removed.get("a", 0)) * (10 - removed.get("b", 0)))
    {'a': 20.0, 'b': 40.0}
    """
    removed: dict[str, int] = {}
    costs = [cost(removed)]
    for step in accepted:
        removed[step.name] = step.removed
        costs.append(cost(removed))
    return {step.name: float(costs[i] - costs[i + 1]) for i, step in enumerate(accepted)}


def cheapest(accepted: Sequence[Accepted], savings: Mapping[str, float], share: float) -> list[Accepted]:
    """Of what may leave, the floor(share * all) layers (one at least) whose loss rises least for what they save, cheapest first.

    >>> steps = [Accepted("a", 2, {"x": 1.2}, 1.0, ""), Accepted("b", 1, {"x": 1.3}, 1.2, ""), Accepted("c", 0, {"x": 1}, 1, "")]
    >>> [step.name for step in cheapest(steps, {"a": 10.0, "b": 20.0}, 0.4)]
    ['b']
    """
    leaving = [step for step in accepted if step.removed]
    rise = {
        step.name: (sum(step.losses.values()) - step.before) / (savings[step.name] + 1e-20)
        for step in leaving
    }
    ranked = sorted(leaving, key=lambda step: rise[step.name])
    return ranked[: max(1, int(share * len(accepted) + 1e-9))]
