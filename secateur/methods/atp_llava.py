"""ATP-LLaVA: each picture and question finds its own thresholds, and so how many tokens stay behind three layers.

Ye et al. 2024, "ATP-LLaVA: Adaptive Token Pruning for Large Vision Language Models", https://arxiv.org/abs/2412.00447.
Spec: atp-llava. There is no code of the authors; the formulas are those of a student's module that numbers the paper's equations.

Reconstructed: scores are brought to 0..1 by their smallest and largest before thresholds are laid on them, the grid is
sampled at two rates, soft masks weigh tokens as keys of attention, and what the thresholds are laid on holds no gradient. `counted="hard"` takes the
counts of the loss from the tokens that would really leave, with the soft masks' gradient: the budget then holds when they do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from secateur.families.vlm.facts import check_order
from secateur.method import register
from secateur.taxonomy import record
from secateur.tokens.grid import strided_grid
from secateur.tokens.method import Facts, Lesson, Stage, TokenMethod
from secateur.tokens.select import top_per_row
from secateur.tokens.state import TokenSets

LEAST = 1e-6


class Thresholds(nn.Module):
    """Two thresholds in 0..1 from the means of the two scores."""

    def __init__(self, hidden: int):
        super().__init__()
        self.join = nn.Linear(2, hidden)
        self.redundancy, self.spatial = nn.Linear(hidden, 1), nn.Linear(hidden, 1)
        nn.init.normal_(self.join.weight, std=0.02)
        for linear in (self.join, self.redundancy, self.spatial):
            nn.init.zeros_(linear.bias)

    def forward(self, means: Tensor) -> tuple[Tensor, Tensor]:
        """[S, 2] -> two [S, 1]."""
        z = self.join(means.to(self.join.weight))
        return self.redundancy(z).sigmoid(), self.spatial(z).sigmoid()


def spread_out(row: Tensor, col: Tensor, rates: Sequence[float], weight: float) -> Tensor:
    """The spatial score, [S, n]: 1 - rate * weight on the grid that a rate samples, the largest over the rates; else 0.

    >>> place = torch.arange(4)[None]
    >>> spread_out(place // 2, place % 2, (0.25,), 3.0)
    tensor([[0.2500, 0.0000, 0.0000, 0.0000]])
    """
    found = torch.zeros(row.shape, device=row.device)
    for rate in rates:
        stride = max(1, round(rate**-0.5))
        found = found.maximum(strided_grid(row, col, stride) * max(0.0, 1 - rate * weight))
    return found


def soft_mask(redundancy: Tensor, spatial: Tensor, low: Tensor, far: Tensor, sharp: float) -> Tensor:
    """sigmoid(T (score - threshold)) of the score that is further above its own."""
    return (sharp * (redundancy - low)).sigmoid().maximum((sharp * (spatial - far)).sigmoid())


def budget_loss(
    counts: Sequence[Tensor], layers: Sequence[int], total: Tensor, target: Tensor, deep: float, mean: float
) -> Tensor:
    """deep * sum of (count / total) * layer + mean * |mean count - target|; counts by layer, means over the pictures.

    >>> counts = [torch.tensor(288.0), torch.tensor(144.0), torch.tensor(72.0)]
    >>> budget_loss(counts, (4, 14, 24), torch.tensor(576.0), torch.tensor(144.0), 0.05, 0.2)
    tensor(5.2250)
    """
    shares = torch.stack([count / total * layer for count, layer in zip(counts, layers, strict=True)])
    return deep * shares.sum() + mean * (torch.stack(list(counts)).mean() - target).abs()


@register
@dataclass
class ATPLLaVA(TokenMethod):
    """Between layers, tokens stay that attention or the grid places above a threshold; modules say which threshold.

    >>> trained = secateur.train_tokens(vlm, "atp-llava", data=batches, target="25%")  # doctest: +SKIP
    >>> trained.save("thresholds")  # doctest: +SKIP
    >>> with secateur.attach(vlm, "atp-llava", weights="thresholds") as attached:  # doctest: +SKIP
    ...     vlm.generate(**inputs)

    `secateur train tokens MODEL --method atp-llava --target 25% --out thresholds` trains them too. The target is the mean over pictures and
    over the three places; another one needs another training. The paper trains the language model as well (`frozen=False`).
    Modules stand behind layers 4, 14 and 24 of 32, scaled to the model's depth; each image has thresholds of its own.
    """

    layers: tuple[int, ...] = field(
        default=(4, 14, 24), metadata={"help": "modules stand behind these, of 32, scaled"}
    )
    self_reduce: str = field(
        default="row",
        metadata={
            "help": "a token's mean logit over keys (row) or over queries (col)",
            "choices": ("row", "col"),
        },
    )
    normalize: bool = field(
        default=True, metadata={"help": "both scores are brought to 0..1 in each picture"}
    )
    rates: tuple[float, ...] = field(default=(0.25, 0.0625), metadata={"help": "of the sampled grids"})
    sample_weight: float = field(
        default=3.0, metadata={"help": "how much a rate lowers its grid's score", "min": 0}
    )
    sharpness: float = field(default=10.0, metadata={"help": "of the soft masks", "above": 0})
    deep_weight: float = field(
        default=0.05, metadata={"help": "of tokens in deep layers, in the loss", "min": 0}
    )
    target_weight: float = field(
        default=0.2, metadata={"help": "of the distance to the target, in the loss", "min": 0}
    )
    counted: str = field(
        default="soft", metadata={"help": "what the loss counts", "choices": ("soft", "hard")}
    )
    scope: ClassVar[str] = "image"
    positions: ClassVar[str] = "original"
    adaptive: ClassVar[bool] = True
    no_budget: ClassVar[Mapping[str, str]] = dict.fromkeys(
        ("frame", "image", "all"), "its thresholds find the counts"
    )

    info = record("atp-llava")

    def places(self, facts: Facts) -> list[int]:
        """The layers before which tokens leave."""
        check_order(self.layers)
        return facts.spread([layer + 1 for layer in self.layers], of=32)

    def modules(self, facts: Facts) -> nn.Module:
        return nn.ModuleList(Thresholds(facts.hidden) for _ in self.places(facts))

    def at(self, facts: Facts, select: Any, bias: str | None = None) -> list[Stage]:
        found = []
        for number, layer in enumerate(self.places(facts)):
            site = f"layer:{layer - 1}"
            found.append(Stage(f"layer:{layer}", partial(select, number, site), (site,), bias=bias))
        return found

    def stages(self, facts: Facts) -> list[Stage]:
        return self.at(facts, self.choose)

    def lessons(self, facts: Facts) -> list[Lesson]:
        return [Lesson("thresholds", self.at(facts, self.weigh, bias="mask"), self.loss)]

    def scores(self, number: int, site: str, sets: TokenSets, alive: Tensor) -> tuple[Tensor, ...]:
        """Redundancy and spatial scores [S, n] among the tokens `alive` [S, n], and the two thresholds [S, 1]."""
        over = "keys" if self.self_reduce == "row" else "queries"
        own, cross = sets.logits(site, over, alive), sets.attention(site, rows="text")
        if self.normalize:
            own, cross = scaled(own, alive), scaled(cross, alive)
        means = torch.stack([(x * alive).sum(1) / alive.sum(1).clamp(min=1) for x in (own, cross)], 1)
        assert isinstance(sets.modules, nn.ModuleList)
        spatial = spread_out(sets.grid_row, sets.grid_col, self.rates, self.sample_weight)
        return (own + cross) / 2, spatial, *sets.modules[number](means)

    def choose(self, number: int, site: str, sets: TokenSets) -> Tensor:
        redundancy, spatial, low, far = self.scores(number, site, sets, sets.valid)
        return self.above(redundancy, spatial, low, far, sets.valid)

    @staticmethod
    def above(redundancy: Tensor, spatial: Tensor, low: Tensor, far: Tensor, alive: Tensor) -> Tensor:
        """[S, n] bool: above one of the thresholds; the best where none is."""
        kept = ((redundancy > low) | (spatial > far)) & alive
        return torch.where(kept.any(1, keepdim=True), kept, top_per_row(redundancy, 1, alive))

    def weigh(self, number: int, site: str, sets: TokenSets) -> Tensor:
        """Everything stays, weighs as much as its soft mask in the layers that come, and is counted."""
        alive = sets.carried["alive"] > 0 if number else sets.valid
        redundancy, spatial, low, far = self.scores(number, site, sets, alive)
        mask = soft_mask(redundancy, spatial, low, far, self.sharpness) * sets.carried.get("mask", 1.0)
        hard = self.above(redundancy, spatial, low, far, alive)
        sets.carried |= {"mask": mask.clamp(min=LEAST), "alive": hard.float()}
        soft = (mask * sets.valid).sum(1)
        count = soft if self.counted == "soft" else hard.sum(1) + soft - soft.detach()
        sets.noted |= {
            f"count {number}": count.mean(),
            "total": sets.total.float().mean(),
            "asked": sets.asked.float().mean(),
        }
        return sets.valid

    def loss(self, noted: Mapping[str, Tensor], own: Tensor) -> Tensor:
        counts = [noted[f"count {number}"] for number in range(len(self.layers))]
        weights = (self.deep_weight, self.target_weight)
        return own + budget_loss(counts, self.layers, noted["total"], noted["asked"], *weights)


def scaled(scores: Tensor, valid: Tensor) -> Tensor:
    """(score - smallest) / (largest - smallest + 1e-6) within each set; 0 for what isn't valid. [S, n].

    >>> scaled(torch.tensor([[0.2, 0.2, 0.25, 0.25]]), torch.ones(1, 4, dtype=torch.bool)).round(decimals=2)
    tensor([[0., 0., 1., 1.]])
    """
    low = scores.masked_fill(~valid, torch.inf).amin(1, keepdim=True)
    high = scores.masked_fill(~valid, -torch.inf).amax(1, keepdim=True)
    return ((scores - low) / (high - low + 1e-6)).masked_fill(~valid, 0)
