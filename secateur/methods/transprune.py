"""TransPrune: tokens that the modules change matter; attention from the instruction helps.

Li et al. 2025, "TransPrune: Token Transition Pruning for Efficient Large Vision-Language Model",
https://arxiv.org/abs/2507.20630. Spec: transprune.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from secateur.method import register
from secateur.taxonomy import record
from secateur.tokens.method import Facts, Stage, TokenMethod
from secateur.tokens.scores import normalised
from secateur.tokens.select import top_per_row
from secateur.tokens.state import TokenSets


def variation(given: Tensor, made: Tensor, turn: str = "code") -> tuple[Tensor, Tensor]:
    """(ratio of norms, exp of the change of direction) of a module's input and output, both [..., D] -> [...].

    The token transition variation is the first times the softmax of the second. turn: "code" 1 - cos, "paper" 1 - |cos|.
    """
    given, made = given.float(), made.float()
    ratio = made.norm(dim=-1) / given.norm(dim=-1).clamp(min=1e-8)
    cosine = F.cosine_similarity(given, made, dim=-1)
    return ratio, (1 - (cosine.abs() if turn == "paper" else cosine)).exp()


@register
@dataclass
class TransPrune(TokenMethod):
    """Transition variation summed over the middle layers plus attention from the instruction; three cuts.

    >>> with secateur.attach(vlm, "transprune", target="12.5%") as attached:  # doctest: +SKIP
    ...     vlm.generate(**inputs)

    The target is the share of the tokens after the last cut (the paper: 12.5%); the cuts before it keep `shares`, or the
    target where that is more. Layers count from 1 and are the paper's for 32, scaled to the model's depth. The text
    that counts as instruction stands behind the image. compat: the change of direction is 1 - cos in the code, 1 - |cos|
    in the paper. The softmax runs over one row of the batch (the code's couples rows).
    """

    layers: tuple[int, ...] = (7, 9, 12)
    shares: tuple[float, ...] = (0.875, 0.625)
    compat: str = field(default="code", metadata={"choices": ("paper", "code")})
    scope: ClassVar[str] = "image"
    positions: ClassVar[str] = "compact"

    info = record("transprune")

    def stages(self, facts: Facts) -> list[Stage]:
        cuts = facts.spread(self.layers, of=32)
        shares = [*self.shares, 0.0]
        starts = [cuts[0] - 1, *cuts[:-1]]
        return [
            Stage(
                f"layer:{cut}",
                partial(self.cut, list(range(start, cut)), f"layer:{cut}:peek", share),
                (*(f"layer:{layer}:modules" for layer in range(start, cut)), f"layer:{cut}:peek"),
            )
            for start, cut, share in zip(starts, cuts, shares)
        ]

    def cut(self, layers: Sequence[int], peek: str, share: float, sets: TokenSets) -> Tensor:
        change = sets.carried.get("variation", torch.zeros_like(sets.valid, dtype=torch.float32))
        for layer in layers:
            for module in ("attention", "mlp"):
                site = f"layer:{layer}"
                given, made = sets.transition(site, module)
                ratio, turn = variation(given, made, self.compat)
                given, made, real = sets.transition(site, module, whole=True)
                around = (variation(given, made, self.compat)[1] * real).sum(1)
                change = change + ratio * turn / around[sets.row, None]
        sets.carried["variation"] = change
        score = normalised(change, sets.valid) + normalised(sets.attention(peek, rows="text"), sets.valid)
        last = sets.keep if sets.share is None else (sets.total * sets.share).long().clamp(min=1)
        return top_per_row(score, torch.maximum((sets.total * share).long(), last), sets.valid)
