"""YOPO: visual tokens keep their place and do less: near neighbours, some heads, some neurons, and nothing after a cut layer.

"Treat Visual Tokens as Text? But Your MLLM Only Needs Fewer Efforts to See", 2024, https://arxiv.org/abs/2410.06169. Spec: yopo.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from secateur.attention.work import VisualWork
from secateur.errors import SecateurError
from secateur.families.vlm import Facts
from secateur.method import register
from secateur.taxonomy import record
from secateur.tokens.heads import standing, votes
from secateur.tokens.method import WorkMethod
from secateur.utils.random import seeded

EVEN = 0.5
"""The share of the layers that the paper's settings of 25 % and 12 % keep, and the least here."""


@register
@dataclass
class YOPO(WorkMethod):
    """A plan made once says which work visual tokens take part in; words do all of theirs.

    >>> ratios = head_ratios(vlm, prompts)  # doctest: +SKIP
    >>> with secateur.attach(vlm, "yopo", target="25%", given={"ratios": ratios}) as attached:  # doctest: +SKIP
    ...     vlm.generate(**inputs)
    >>> attached.setup.work.save("work.json")  # doctest: +SKIP

    The target is the share of the visual tokens' multiply-adds (4nd^2 + 2n^2d + 3ndm a layer) that is left. At 25 % half of the
    layers, heads and neurons stay, at 12.5 % half of the layers and a quarter of the others, as in the paper. Without a target each part is as its field says. Without
    `ratios` (`secateur.tokens.heads.head_ratios`, about 100 prompts) all heads stay and a target is met by neurons and layers.
    Heads are ranked by the ratio that more than 0.4 of the prompts exceed, over all layers before the cut, which is the threshold
    that leaves that share. The plan can be saved, edited and given as `work=`. To tune a model for it, train it while the
    method is attached.

    Reconstructed: shares between the paper's settings; layers 0 and 1 of 32 that keep all heads are scaled to the depth, none of
    4. Crops and frames have grids of their own.
    """

    window: int = field(
        default=5, metadata={"help": "visual tokens see neighbours in so many rows; 0: all", "min": 0}
    )
    causal: bool = field(default=False, metadata={"help": "and only those before them"})
    heads: float = field(
        default=1.0, metadata={"help": "share of the heads that work for visual tokens", "min": 0, "max": 1}
    )
    by: str = field(
        default="ratio",
        metadata={
            "help": "which heads: by their ratios, or as many at random",
            "choices": ("ratio", "random"),
        },
    )
    threshold: float | None = field(
        default=None, metadata={"help": "ratio above which a prompt votes for a head, in place of a share"}
    )
    silent: bool = field(default=True, metadata={"help": "other heads give visual tokens nothing, too"})
    neurons: float = field(
        default=1.0, metadata={"help": "share of the neurons that work for visual tokens", "min": 0, "max": 1}
    )
    cut: float = field(
        default=1.0,
        metadata={"help": "share of the layers that visual tokens take part in", "min": 0, "max": 1},
    )
    renormalise: bool = field(
        default=True, metadata={"help": "they leave at the cut; no: they stay, unseen after the softmax"}
    )
    physical: bool = field(
        default=True, metadata={"help": "what isn't used isn't computed; no: it is masked, as released"}
    )

    instead: ClassVar[tuple[str, ...]] = ("heads", "neurons", "cut", "threshold")

    info = record("yopo")

    def work(self, facts: Facts, target: float | None, given: Mapping[str, Any], seed: int) -> VisualWork:
        if target is not None and any(getattr(self, name) != getattr(YOPO, name) for name in self.instead):
            raise SecateurError(
                "a target says how much of the heads, neurons and layers is left",
                where="target",
                fix=f"leave it out, or leave {', '.join(self.instead)} out",
            )
        if target == 1:
            return VisualWork(facts.layers, facts.heads, facts.intermediate)
        ratios: Tensor | None = given.get("ratios")
        heads, neurons, layers = self.heads, self.neurons, round(self.cut * facts.layers)
        if target is not None:
            chooses = ratios is not None or self.by == "random"
            heads, neurons, layers = shares(target, facts, chooses)
        kept = self.chosen(facts, heads, layers, ratios, seed)
        return VisualWork(
            facts.layers,
            facts.heads,
            facts.intermediate,
            window=self.window or None,
            causal=self.causal,
            heads=kept,
            silent=self.silent,
            neurons=None if neurons == 1 else (int(neurons * facts.intermediate),) * facts.layers,
            cut=layers,
            renormalise=self.renormalise,
            physical=self.physical,
            about={"method": self.name, "target": target, "prompts": 0 if ratios is None else len(ratios)},
        )

    def chosen(
        self, facts: Facts, share: float, layers: int, ratios: Tensor | None, seed: int
    ) -> tuple[tuple[int, ...], ...] | None:
        """For each layer the heads that work for visual tokens; None: all."""
        whole = tuple(range(facts.heads))
        first = min(round(2 * facts.layers / 32), layers)  # these keep all
        if self.threshold is None and (share == 1 or first >= layers):
            return None
        if self.by == "ratio" and ratios is None:
            raise SecateurError(
                "which heads look at pictures must be seen on prompts",
                where="heads",
                fix='given={"ratios": secateur.tokens.heads.head_ratios(model, prompts)}, or by="random"',
            )
        if ratios is not None and (ratios.dim() != 3 or ratios.shape[1:] != (facts.layers, facts.heads)):
            raise SecateurError(
                f"the ratios are {list(ratios.shape)}, and this model has {facts.layers} layers of {facts.heads} heads",
                where="ratios",
                fix="[samples, layers, heads] of head_ratios on this model",
            )
        if ratios is not None and self.threshold is not None:
            keep = votes(ratios, self.threshold)
            count = int(keep[first:layers].sum())
        else:
            count = round(share * facts.heads * layers) - first * facts.heads
        size = (layers - first) * facts.heads
        if self.by == "random":
            scores = torch.rand(size, generator=seeded(seed, "heads"))
        else:
            assert ratios is not None
            scores = standing(ratios)[first:layers].flatten()
        there = torch.zeros(size, dtype=torch.bool)
        there[scores.argsort(descending=True, stable=True)[: max(0, count)]] = True
        rows = there.view(layers - first, facts.heads)
        own = [tuple(row.nonzero()[:, 0].tolist()) for row in rows]
        return (*[whole] * first, *own, *[whole] * (facts.layers - layers))


def shares(target: float, facts: Facts, heads: bool) -> tuple[float, float, int]:
    """(share of the heads, share of the neurons, layers) that leave a share of the visual tokens' work.

    >>> shares(0.25, Facts(layers=32, hidden=4096, intermediate=11008), heads=True)
    (0.5, 0.5, 16)

    heads: some may be excused; otherwise all stay, and layers leave until neurons can make up for the rest.
    """
    layers = max(1, round(max(target**0.5, EVEN) * facts.layers))
    if heads:
        share = min(1.0, target * facts.layers / layers)
        return share, share, layers
    # 4nd^2 against 3ndm: the products of queries and keys are few beside them
    ways = 3 if facts.gated else 2
    attention, inner = 4 * facts.hidden, ways * facts.intermediate
    while layers > 1 and target * facts.layers / layers * (attention + inner) < attention:
        layers -= 1
    neurons = (target * facts.layers / layers * (attention + inner) - attention) / inner
    return 1.0, min(1.0, max(0.0, neurons)), layers
