"""DART: tokens that are unlike a few pivots stay, whatever their importance.

Wen et al. 2025, "Stop Looking for Important Tokens in Multimodal Language Models: Duplication Matters More",
https://arxiv.org/abs/2502.11494. There is no sheet: a baseline, read from the authors' code.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from secateur.method import register
from secateur.taxonomy import record
from secateur.tokens.greedy import directions
from secateur.tokens.method import Facts, Stage, TokenMethod
from secateur.tokens.select import top_per_row
from secateur.tokens.state import TokenSets


@register
@dataclass
class DART(TokenMethod):
    """Four image and four text tokens with the largest keys are pivots; each brings in the tokens least like it.

    >>> with secateur.attach(vlm, "dart", target="22.2%") as attached:  # doctest: +SKIP
    ...     vlm.generate(**inputs)

    The target is the share kept from layer `k` on, image pivots included (the release adds those to the number it is
    given). Keys are those of layer k - 1 after rotation, measured by the sum of |x|; likeness is the cosine of what layer
    k - 1 gave, after the model's last norm. A token that one pivot took is not there for the next. The sum of |x| of a rotated key
    depends on its position, so rows that are padded on the left need `position_ids` that don't count padding (`generate` gives them).

    Differs: pivots take their turns in the order of the prompt, and equally many tokens each, the first ones one more where that
    doesn't come out even. The release goes through a Python set of the pivots' positions, whose order has no meaning, and
    takes as many as a whole number allows.

    The released function (the author's commit 38d7b9c), run beside `attach` on 60 random models and inputs of one picture,
    kept the same tokens in 60 of 60 where its pivots were put into the order of the prompt, and in 7 of 60 as it is
    (on average 90 % of the tokens in common).
    """

    k: int = field(default=2, metadata={"help": "layers that see every token", "min": 1})
    image_pivots: int = field(default=4, metadata={"help": "pivots among the image's tokens", "min": 1})
    text_pivots: int = field(default=4, metadata={"help": "pivots among the text after the image", "min": 0})
    scope: ClassVar[str] = "image"
    positions: ClassVar[str] = "original"
    newlines: ClassVar[str] = "compete"

    info = record("dart")

    def stages(self, facts: Facts) -> list[Stage]:
        return [Stage(f"layer:{self.k}", self.select, (f"layer:{self.k - 1}",))]

    def select(self, sets: TokenSets) -> Tensor:
        site = f"layer:{self.k - 1}"
        words, real = sets.text(f"{site}:keys")
        image = top_per_row(
            sets.keys(site).abs().sum((1, 3)), sets.keep.clamp(max=self.image_pivots), sets.valid
        )
        text = top_per_row(words.abs().sum((2, 3)), self.text_pivots, real)
        states = torch.cat([sets.features, sets.text(site)[0]], 1)
        states = directions(sets.final_norm(states), torch.cat([sets.valid, real], 1))

        pivot = torch.cat([image, text], 1)  # [S, n + m]
        number = pivot.sum(1)
        order = (~pivot).to(torch.uint8).argsort(dim=1, stable=True)[:, : int(number.max())]  # [S, P]
        rows = torch.arange(len(sets), device=sets.device)
        kept, room = image, sets.keep - image.sum(1)
        for turn in range(order.shape[1]):
            share = (room // number + (turn < room % number)) * (turn < number)
            likeness = torch.einsum(
                "sd,snd->sn", states[rows, order[:, turn]], states[:, : sets.valid.shape[1]]
            )
            kept = kept | top_per_row(-likeness, share, sets.valid & ~kept)
        return kept
