"""MMTok: kept tokens must cover the question and the whole image.

Dong et al. 2025, "MMTok: Multimodal Coverage Maximization for Efficient Inference of VLMs",
https://arxiv.org/abs/2508.18264. Spec: mmtok.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from secateur.errors import SecateurError
from secateur.method import register
from secateur.taxonomy import record
from secateur.tokens.greedy import coverage, directions
from secateur.tokens.method import Facts, Stage, TokenMethod
from secateur.tokens.question import question_tokens
from secateur.tokens.state import TokenSets


@register
@dataclass
class MMTok(TokenMethod):
    """Greedy maximum coverage of the question's embeddings and of all patches by the kept tokens.

    >>> with secateur.attach(vlm, "mmtok", target="tokens=64", tokenizer=tokenizer, question="Is the cup red?"):  # doctest: +SKIP
    ...     vlm.generate(**inputs)

    The question is `question` (one, or a list by batch row) or else what the prompt says after the image; its words
    without stop words are looked up among the prompt's own tokens with `tokenizer`. Without a tokenizer every text token
    after the image counts (not the paper's). tau_text: None is 0.02, and 0.01 where tokens are merged patches (the
    paper's for LLaVA and Qwen2.5-VL), where stop words also stay, as released. padded_from: (width, height) of pictures that
    were padded to squares; tokens wholly in the padding are never chosen.
    """

    tau_text: float | None = None
    tau_image: float = 0.2
    alpha: float = 0.5
    padded_from: tuple[int, int] | None = None
    scope: ClassVar[str] = "crop"
    positions: ClassVar[str] = "compact"
    newlines: ClassVar[str] = "drop"

    info = record("mmtok")

    def stages(self, facts: Facts) -> list[Stage]:
        return [Stage("input", self.select, (f"encoder:{facts.feature_block}",))]

    def select(self, sets: TokenSets) -> Tensor:
        text, real = question_tokens(sets, plain=sets.facts.merge > 1)
        tau = (0.01 if sets.facts.merge > 1 else 0.02) if self.tau_text is None else self.tau_text
        image = directions(sets.hidden(f"encoder:{sets.facts.feature_block}"), sets.valid)
        asked = directions(text, real) @ directions(sets.features, sets.valid).mT
        gains = torch.cat(
            [
                shares(asked, tau, real, sets.valid),
                self.alpha * shares(image @ image.mT, self.tau_image, sets.valid, sets.valid),
            ],
            1,
        )
        allowed = sets.valid
        if self.padded_from is not None:
            if bool((sets.crop < 0).any()):
                raise SecateurError("padded_from is of one crop", where="mmtok", fix="leave budget out")
            allowed = allowed & ~padding(sets.grid_row, sets.grid_col, sets.grid, self.padded_from)
        picked = coverage(gains, sets.keep, allowed).mask(sets.valid.shape[1])
        return picked | (sets.valid & (sets.count <= sets.keep)[:, None])


def shares(likeness: Tensor, tau: float, rows: Tensor, columns: Tensor) -> Tensor:
    """softmax(likeness / tau) over the valid columns, divided by the number of valid rows; other rows are 0."""
    found = (likeness / tau).masked_fill(~columns[:, None], -torch.inf).softmax(2) * rows[..., None]
    return found / rows.sum(1).clamp(min=1)[:, None, None]


def padding(row: Tensor, column: Tensor, grid: Tensor, size: tuple[int, int]) -> Tensor:
    """[S, n] bool: tokens that lie wholly in the borders that made a picture of size (width, height) a square.

    The paper's integers, for a square of 14 pixels a token.
    """
    width, height = size
    side = grid[:, :1] * 14
    place, scaled = (row, side * height / width) if width >= height else (column, side * width / height)
    scaled = scaled.round().long()
    before = (side - scaled) // 2
    return (place < before // 14) | (place >= grid[:, :1] - (side - scaled - before) // 14)
