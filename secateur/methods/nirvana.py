"""NIRVANA: what moves the output itself stays; attention is cut more gently than MLPs.

"NIRVANA: Structured pruning reimagined for large language models compression", 2025,
https://arxiv.org/abs/2509.14230. Spec: nirvana.

Reconstruction: only the default γ, as the paper's rule wasn't available. Here it is the MLPs' weights
per attention weight: the published 3.0 for Llama-3.2-3B, but 4.2 for Llama-3.1-8B, where the authors took 3.36.

Departure: units leave in the order of the same rankings and γ until the target holds, so any target is met exactly, and
`allocation="uniform"` cuts every layer alike. The published thresholds (`rounding="paper"`) fall short of the budget:
floors, multiples of 8, at least one group a layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from secateur.method import register
from secateur.pruning.allocate import Competitor, Step, lowest, paced_path, spare_last, spare_to_multiple
from secateur.pruning.context import Context
from secateur.pruning.method import UnitMethod
from secateur.pruning.plan import Plan
from secateur.stats.windows import masked_divergence
from secateur.taxonomy import record
from secateur.utils.batches import token_mask
from secateur.utils.running import logits_of, run


def peak_logits(model: nn.Module, batch: Any) -> Tensor:
    """f: the maximum of the logits over positions, averaged over batch and vocabulary. Padding has no part in it."""
    logits = logits_of(run(model, batch))
    if (mask := token_mask(batch)) is not None and mask.shape == logits.shape[:-1]:
        logits = logits.masked_fill(~mask[..., None].to(logits.device), -torch.inf)
    return (logits.flatten(1, -2).amax(1) if logits.dim() > 2 else logits).float().mean()


def unit_budget(
    removed: float, groups: int, neurons: int, gamma: float, group_cost: float, neuron_cost: float = 3
) -> tuple[int, int]:
    """How many key/value groups and neurons leave, in the whole network, to remove a share of the weights.

    The published counts for half of Llama-3.1-8B, 1280 and 3 hidden widths a unit:

    >>> unit_budget(0.5, 256, 32 * 14336, 3.36, 1280)
    (44, 265197)
    """
    ratio = groups / neurons / gamma
    x = removed * (group_cost * groups + neuron_cost * neurons) / (group_cost + neuron_cost / ratio)
    return int(x + 1e-9), int(x / ratio + 1e-9)


def ratio_path(groups: Sequence[Competitor], gamma: float, allocation: str = "global") -> list[Step]:
    """The order in which units leave: neurons γ times as fast, by share, as what belongs to attention."""
    attention, mlp = parts(groups)
    return paced_path([(gamma, attention), (1.0, mlp)], allocation)


def parts(groups: Sequence[Competitor]) -> tuple[list[Competitor], list[Competitor]]:
    """What belongs to attention, and the neurons."""
    return [g for g in groups if g.kind != "neurons"], [g for g in groups if g.kind == "neurons"]


@register
@dataclass
class Nirvana(UnitMethod):
    """|w·∂f/∂w| of the output f, summed over a key/value group or a neuron and ranked over all layers.

    >>> secateur.prune(model, method="nirvana", target="80%", data=ids)  # doctest: +SKIP

    With `candidates` > 1 as many calibration draws are tried; the one whose pruned model diverges least stays.
    """

    gamma: float | None = field(
        default=None,
        metadata={
            "help": "how much less attention is cut than MLPs, by share; default: by their weights",
            "above": 0,
        },
    )
    windows: int = field(default=32, metadata={"help": "calibration windows", "min": 1})
    length: int = field(default=128, metadata={"help": "tokens of a window", "min": 1})
    candidates: int = field(
        default=1, metadata={"help": "calibration draws to choose from, by divergence", "min": 1}
    )
    rounding: str = field(
        default="exact",
        metadata={
            "help": "exact: meets the budget; paper: the published rounding",
            "choices": ("exact", "paper"),
        },
    )

    kinds: ClassVar[tuple[str, ...] | None] = ("heads", "kv_groups", "neurons")
    needs: ClassVar[frozenset[str]] = frozenset({"gradient"})
    allocation: ClassVar[str] = "global"
    share_of: ClassVar[str] = "weights"
    info = record("nirvana")

    def plan(self, context: Context) -> Plan:
        tries = []
        for draw in range(self.candidates):
            scores = context.remember(f"scores-{draw}", partial(self.scores, context, draw))
            keep = self.divide(context, scores)
            tries.append((self.divergence(context, keep) if self.candidates > 1 else 0.0, draw, keep, scores))
        loss, draw, keep, scores = min(tries, key=lambda item: item[0])
        context.competitors(scores)  # the report shows the scores of the draw that stays
        notes = {"calibration": f"draw {draw} of {self.candidates}, KL divergence {loss:.4g}"}
        return context.make_plan(keep=keep, notes=notes if self.candidates > 1 else {})

    def scores(self, context: Context, draw: int = 0) -> dict[str, Tensor]:
        """[units] of every group, from one backward pass over the windows of one draw."""
        data = context.draw(self.windows, self.length, "windows", draw)
        stats = context.stats({"gradient"}, data=data, loss=peak_logits)
        scores = {}
        for name, pairs in context.all_coupled().items():
            values = {
                s.name: (m.parameter.detach() * m.unfold(stats[s.name].gradient)).abs() for s, m in pairs
            }
            scores[name] = context.graph[name].reduce(values, roles=("out", "in"))
        return scores

    def divide(self, context: Context, scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Kept units of every group."""
        groups = context.competitors(scores)
        attention, mlp = parts(groups)
        each = {g.name: context.unit_weights(g) for g in context.groups}
        a, m = (sum(each[g.name] * g.size for g in part) for part in (attention, mlp))
        gamma = self.gamma or (m / a if a and m else 1.0)
        if self.rounding == "exact" or not (attention and mlp):
            return context.follow(groups, ratio_path(groups, gamma, context.allocation or self.allocation))
        heads, neurons = (sum(g.size for g in part) for part in (attention, mlp))
        counts = unit_budget(1 - context.share, heads, neurons, gamma, a / heads, m / neurons)
        found = [lowest([g.scores for g in part], k) for part, k in zip((attention, mlp), counts)]
        gone = {g.name: spare_last(mask) for g, mask in zip(attention, found[0])}
        gone |= {g.name: spare_to_multiple(g.scores, mask) for g, mask in zip(mlp, found[1])}
        return {name: (~mask).nonzero().squeeze(1) for name, mask in gone.items()}

    def divergence(self, context: Context, keep: Mapping[str, Tensor]) -> float:
        """KL(dense ‖ pruned) on 128 windows of 64 tokens, the same for every draw."""
        return masked_divergence(context.model, context.graph, keep, context.draw(128, 64, "kl"))
