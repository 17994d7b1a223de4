"""CDPruner: tokens that are unlike each other and have to do with the question.

Zhang et al. 2025, "Beyond Attention or Similarity: Maximizing Conditional Diversity for Token Pruning in MLLMs",
https://arxiv.org/abs/2506.10967. There is no sheet: a baseline, read from the authors' code.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from secateur.method import register
from secateur.taxonomy import record
from secateur.tokens.greedy import directions, max_determinant
from secateur.tokens.method import Facts, Stage, TokenMethod
from secateur.tokens.state import TokenSets


@register
@dataclass
class CDPruner(TokenMethod):
    """Greedy determinant of a kernel: cosines of the projected features, scaled on both sides by relevance to the question.

    >>> with secateur.attach(vlm, "cdpruner", target="tokens=64", text_encoder=encode) as attached:  # doctest: +SKIP
    ...     vlm.generate(**inputs)

    `text_encoder(hidden [S, n, C], sets) -> [S, n]` gives how like the question each patch is to the contrastive text tower of the
    same vision tower: `hidden` is what the projector gets, so for CLIP the cosine of
    `visual_projection(post_layernorm(hidden))` with the text's embedding, the mean over its pieces of 77 tokens. **Its sign is turned,
    as released**, and it is scaled to 0..1 over the
    crops of a picture. text="embeddings": the mean cosine of the projected feature with the words of the prompt after the image,
    sign kept; it needs no text tower and isn't the authors' (a reconstruction).
    Each crop keeps its own number of tokens. Newline tokens stay, positions are counted anew. Equally relevant tokens all count 1.

    The released function (commit 9541616), given what `attach` gave to ours on 60 random models and inputs of one picture, kept
    the same tokens in 60 of 60. It scales over all pictures of a batch, and gives NaN where more tokens
    stay than the features have dimensions; here the rest then follow by place.
    """

    text: str = field(
        default="encoder",
        metadata={"choices": ("encoder", "embeddings"), "help": "what the question is compared in"},
    )
    scope: ClassVar[str] = "crop"
    positions: ClassVar[str] = "compact"

    info = record("cdpruner")
    quick: ClassVar[Mapping[str, Any]] = {"text": "embeddings"}

    def stages(self, facts: Facts) -> list[Stage]:
        records = (f"encoder:{facts.feature_block}",) if self.text == "encoder" else ()
        return [Stage("input", self.select, records)]

    def select(self, sets: TokenSets) -> Tensor:
        relevance = over_image(self.relevance(sets), sets)
        features = directions(sets.features, sets.valid) * relevance[..., None]
        return max_determinant(features @ features.mT, sets.keep, sets.valid).mask(sets.valid.shape[1])

    def relevance(self, sets: TokenSets) -> Tensor:
        """[S, n], higher where a token has more to do with the question."""
        if self.text == "embeddings":
            words, real = sets.text("embeddings")
            likeness = directions(sets.features, sets.valid) @ directions(words, real).mT
            return likeness.sum(2) / real.sum(1, keepdim=True).clamp(min=1)
        return -sets.by_text_encoder(f"encoder:{sets.facts.feature_block}").float()


def over_image(values: Tensor, sets: TokenSets) -> Tensor:
    """Values [S, n] scaled to 0..1 over the crops of each picture; 1 where all are alike."""
    image = sets.row * (int(sets.image.max()) + 2) + sets.image  # -1: several
    same = image[:, None] == image[None]  # [S, S]

    def least(values: Tensor) -> Tensor:
        own = values.masked_fill(~sets.valid, torch.inf).amin(1)
        return own.expand(len(own), -1).masked_fill(~same, torch.inf).amin(1, keepdim=True)

    low, high = least(values), -least(-values)
    return ((values - low + 1e-6) / (high - low).clamp(min=1e-6)).masked_fill(~sets.valid, 0)
