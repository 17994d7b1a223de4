"""DiSa: prompts in both towers that keep to what the frozen towers say of salient patches and of whole classes.

"DiSa: directional saliency-aware prompt learning for generalizable vision-language models", 2025, https://arxiv.org/abs/2505.19373.
Spec: disa.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from secateur.errors import require
from secateur.method import register
from secateur.prompts.method import Patches, PromptMethod, Seen
from secateur.taxonomy import record


@register
@dataclass
class Disa(PromptMethod):
    """Cross-entropy, self-regularisation, agreement of each prompted tower with the other frozen one, and the direction of prototypes.

    >>> found = train_prompts(clip, tokenizer, (images, labels), ["cat", "dog"], method="disa")  # doctest: +SKIP

    Reconstructed: no code was published. The distances, how patches are chosen (cosine with the text of the picture's class), that only the
    pass of the cross-interactive term is masked, and all coefficients; `cross=0, direction=0` is the base recipe, self-regularised
    prompts in both towers (PromptSRC, arXiv 2307.06948), without its ensembles of texts and of epochs.
    """

    info = record("disa")

    text_weight: float = field(
        default=25.0, metadata={"help": "of the text features' distance from the frozen ones", "min": 0}
    )
    image_weight: float = field(default=10.0, metadata={"help": "of the image features' distance", "min": 0})
    cross: float = field(default=1.0, metadata={"help": "of the cross-interactive term", "min": 0})
    direction: float = field(default=1.0, metadata={"help": "of the directional term", "min": 0})
    ratio: float = field(
        default=0.3,
        metadata={"help": "share of the patches that the masked pass doesn't see", "min": 0, "below": 1},
    )
    by: str = field(
        default="text",
        metadata={
            "help": "what patches stay by: text, cls (its attention), random",
            "choices": ("text", "cls", "random"),
        },
    )
    mask: str = field(
        default="drop",
        metadata={"help": "patches leave (drop), or are zeros (zero)", "choices": ("drop", "zero")},
    )
    agree: str = field(
        default="kl",
        metadata={"help": "of the cross-interactive term: kl, or ce with the label", "choices": ("kl", "ce")},
    )
    distance: str = field(
        default="cosine",
        metadata={"help": "of the directional term: cosine, or square", "choices": ("cosine", "square")},
    )

    @property
    def masks(self) -> bool:
        return self.cross > 0 and self.ratio > 0

    @property
    def drops(self) -> bool:
        return self.mask == "drop"

    def keep(self, patches: Patches, generator: Generator) -> Tensor:
        if self.by == "random":
            saliency = torch.rand(patches.features.shape[:2], generator=generator).to(patches.features.device)
        elif self.by == "cls":
            require(
                patches.attention is not None, "the image tower has no CLS", where="disa, by", fix="by='text'"
            )
            assert patches.attention is not None
            saliency = patches.attention
        else:
            saliency = torch.einsum("bnd,bd->bn", patches.features, patches.text)
        return salient(saliency, self.ratio)

    def loss(self, seen: Seen) -> Tensor:
        total = F.cross_entropy(seen.scale * seen.image @ seen.text.T, seen.labels)
        total = total + self_regularisation(seen, self.text_weight, self.image_weight)
        if self.cross:
            total = total + self.cross * cross_interaction(seen, self.agree)
        if self.direction:
            total = total + self.direction * directional(
                seen.image, seen.prototypes[seen.labels], self.distance
            )
        return total


def salient(saliency: Tensor, ratio: float) -> Tensor:
    """The ceil((1 - ratio) * N) patches with the largest saliency [B, N], lower ones among equals: int64 [B, k], ascending.

    >>> salient(torch.tensor([[1.0, 0.6, 0.0, -1.0]]), 0.5)
    tensor([[0, 1]])
    """
    count = math.ceil((1 - ratio) * saliency.shape[1] - 1e-9)
    return saliency.argsort(dim=1, descending=True, stable=True)[:, :count].sort(1).values


def self_regularisation(seen: Seen, text_weight: float, image_weight: float) -> Tensor:
    """Mean distances of prompted from frozen features, and the divergence of their predictions over pictures and classes."""
    text = (seen.text - seen.frozen_text).abs().mean()
    image = (seen.image - seen.frozen_image).abs().mean()
    frozen, prompted = (
        (seen.scale * f @ g.T).log_softmax(1)
        for f, g in ((seen.frozen_image, seen.frozen_text), (seen.image, seen.text))
    )
    divergence = F.kl_div(prompted, frozen, reduction="sum", log_target=True) / prompted.numel()
    return text_weight * text + image_weight * image + divergence


def cross_interaction(seen: Seen, agree: str = "kl") -> Tensor:
    """The prompted, masked picture with the frozen texts, and the frozen picture with the prompted texts, against both frozen."""
    first = (seen.scale * seen.masked @ seen.frozen_text.T).log_softmax(1)
    second = (seen.scale * seen.frozen_image @ seen.text.T).log_softmax(1)
    if agree == "ce":
        return F.nll_loss(first, seen.labels) + F.nll_loss(second, seen.labels)
    frozen = (seen.scale * seen.frozen_image @ seen.frozen_text.T).log_softmax(1).detach()
    return sum(F.kl_div(one, frozen, reduction="batchmean", log_target=True) for one in (first, second))  # type: ignore[return-value]


def directional(image: Tensor, prototypes: Tensor, distance: str = "cosine") -> Tensor:
    """Mean of 1 less the cosine of pictures [B, D] and their classes' prototypes [B, D], or of the squared distance."""
    if distance == "square":
        return (image - prototypes).pow(2).sum(1).mean()
    return (1 - F.cosine_similarity(image, prototypes, dim=1)).mean()
