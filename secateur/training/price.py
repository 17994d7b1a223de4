"""What gates are driven to: the share of the cost that a target leaves, and the share that is expected to be left."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import Tensor

from secateur.gates import ExpectedCost
from secateur.graph import Graph
from secateur.training.job import Job


def price(job: Job, graph: Graph, names: Iterable[str]) -> tuple[Callable[..., Tensor], float]:
    """(the share expected to be left, as a function of the probabilities of each group's units; the share wanted).

    >>> share, wanted = price(job, graph, gated.points)  # doctest: +SKIP
    >>> over = (share(gated.keep()) - wanted).clamp_min(0)  # doctest: +SKIP

    names: the groups that a bare share counts, by the multiply-adds of their units. A target in multiply-adds or parameters
    is that of the whole network; others are refused.
    """
    target, cost = job.target, ExpectedCost(graph)
    if target.kind not in ("macs", "params"):
        return cost.share_of_units(names), job.share
    count, whole = (cost.macs, cost.whole_macs) if target.kind == "macs" else (cost.params, cost.whole_params)
    return lambda keep: count(keep).float() / whole, target.limit(whole) / whole
