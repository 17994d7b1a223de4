"""What gates are driven to: the share of the cost that a target leaves, and the share that is expected to be left."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from secateur.gates import ExpectedCost
from secateur.pruning.context import Context

Share = Callable[[Mapping[str, Tensor]], Tensor]


def price(context: Context, names: Iterable[str]) -> tuple[Share, float]:
    """(the share expected to be left, as a function of the probabilities of each group's units; the share wanted).

    >>> share, wanted = price(context, gated.points)  # doctest: +SKIP
    >>> over = (share(gated.keep()) - wanted).clamp_min(0)  # doctest: +SKIP

    Counted as `Context.allocate` counts: a target in multiply-adds or parameters is that of the whole network; a bare share is that
    of the units of the groups in `names`, or of the weights, as the method's `share_of` says. Others are refused.
    """
    target, graph = context.target, context.graph
    cost = ExpectedCost(graph)
    if target.kind == "macs":
        return lambda keep: cost.macs(keep).float() / cost.whole_macs, target.limit(
            cost.whole_macs
        ) / cost.whole_macs
    if target.kind == "params":
        whole = cost.whole_params
        return lambda keep: cost.params(keep).float() / whole, target.limit(whole) / whole
    wanted = context.share
    if getattr(context.method, "share_of", None) == "weights":
        own = set(context.every_matrix)
        weights = graph.params({}, names=list(own))
        return lambda keep: cost.params(keep, own).float() / weights, wanted
    units = {name: graph[name].size for name in names}
    return lambda keep: torch.stack([keep[n].sum() for n in units]).sum() / sum(units.values()), wanted
