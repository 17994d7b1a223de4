"""`train_prompts`: prompts in both towers of a frozen model, on the one training loop."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateur.errors import require
from secateur.method import Method, expect, make_method
from secateur.prompts.method import Patches, PromptMethod, Seen
from secateur.prompts.towers import Towers, class_ids
from secateur.training.fit import fit
from secateur.training.recipe import Recipe
from secateur.utils.random import seeded
from secateur.utils.running import device_of, evaluating, frozen_weights
from secateur.utils.screen import Screen

RECIPE = Recipe(optimizer="sgd", lr=0.0025, batch=4, warmup=0.05, clip=0.0)
"""That of PromptSRC: SGD, 0.0025 along a cosine, an epoch of 20 to warm up."""
AT_ONCE = 64


class Prompts(nn.Module):
    """Vectors of both towers: `text` [depth, tokens, width], `image` [depth, tokens, width] or None."""

    def __init__(self, text: Tensor, image: Tensor | None):
        super().__init__()
        self.text = nn.Parameter(text)
        self.image = None if image is None else nn.Parameter(image)


@dataclass(repr=False)
class Prompted(Screen):
    """What `train_prompts` gives: a classifier by names of any classes, those of the training or others.

    >>> found.logits(images, ["cat", "dog"]).argmax(1)  # doctest: +SKIP
    """

    model: nn.Module
    tokenizer: Any
    prompts: Prompts
    method: PromptMethod
    classes: tuple[str, ...]
    """The names that they were trained on."""
    losses: list[float] = field(default_factory=list)

    @torch.no_grad()
    def logits(self, images: Tensor, classes: Sequence[str]) -> Tensor:
        """[N, classes], of pictures [N, 3, H, W] as the model takes them, unmasked."""
        towers = Towers(self.model)
        device = device_of(self.model)
        with evaluating(self.model):
            ids, place = _ids(towers, self.tokenizer, classes, self.method)
            text = towers.text(ids.to(device), self.prompts.text, place)
            parts = [towers.image(part.to(device), self.prompts.image) for part in images.split(AT_ONCE)]
        return torch.cat(parts) @ text.T * towers.scale


def train_prompts(
    model: nn.Module,
    tokenizer: Any,
    data: tuple[Tensor, Tensor],
    classes: Sequence[str],
    method: str | Method | type[Method] = "disa",
    *,
    epochs: float = 20,
    seed: int = 0,
    recipe: Recipe = RECIPE,
    directory: str | Path | None = None,
    **settings: Any,
) -> Prompted:
    """Train prompts on a few pictures of each class; the towers stay as they are.

    >>> found = train_prompts(clip, tokenizer, (images, labels), ["cat", "dog"], epochs=5)  # doctest: +SKIP
    >>> found.logits(others, ["horse", "frog"])  # doctest: +SKIP

    Parameters
    ----------
    model: a CLIP or SigLIP of transformers, on any device. tokenizer: its own.
    data: (pictures [n, 3, H, W] as the model takes them, labels [n]), the shots of all classes.
    classes: the names, in the order of the labels.
    method: `disa`, or one of your own. settings: its hyperparameters, and fields of the recipe.
    epochs: passes over the data. seed: of the prompts, the order and what is drawn.
    directory: where a stopped run is kept; the same call goes on.

    Raises `SecateurError`: a model without patch tokens or blocks, a name longer than the text tower takes, data of one class, a class without a
    picture, labels outside the classes, more prompts deep than there are blocks.
    """
    fields = {name: settings.pop(name) for name in list(settings) if name in Recipe.__dataclass_fields__}
    recipe, chosen = recipe.replace(**fields), make_method(method, **settings)
    expect(chosen, "prompts", "train_prompts")
    assert isinstance(chosen, PromptMethod)
    towers = Towers(model)
    images, labels = _checked(data, classes, model)
    blocks = min(len(towers.text_blocks), len(towers.image_blocks))
    require(
        chosen.depth <= blocks,
        f"{chosen.depth} is more than the {blocks} blocks of a tower",
        where="depth",
        fix=f"1 to {blocks}",
    )
    device = device_of(model)
    labels = labels.to(device)
    ids, place = _ids(towers, tokenizer, classes, chosen)
    ids = ids.to(device)
    with evaluating(model), frozen_weights(model):
        with torch.no_grad():
            frozen_text = towers.text(ids)
        frozen, kept = _look(towers, images, labels, frozen_text, chosen, seed)
        prototypes = torch.stack([frozen[labels == c].mean(0) for c in range(len(classes))])
        prompts = _first(towers, ids, place, chosen, seed).to(device)
        scale = towers.scale

        def loss(learner: nn.Module, batch: Any) -> Tensor:
            pixels, own, before, keep = batch
            image = towers.image(pixels, prompts.image)
            masked = towers.image(pixels, prompts.image, keep, chosen.drops) if chosen.masks else image
            text = towers.text(ids, prompts.text, place)
            seen = Seen(image, masked, before, text, frozen_text, own, prototypes, scale)
            return chosen.loss(seen)

        count = max(1, round(epochs * len(images) / recipe.batch))
        file = Path(directory).expanduser() / "prompts.safetensors" if directory is not None else None
        losses = fit(
            prompts, (images.to(device), labels, frozen, kept), steps=count, loss=loss, seed=seed, recipe=recipe,
            checkpoint=file, description=chosen.name, about={"method": chosen.name, **chosen.hyperparameters},
        )  # fmt: skip
    return Prompted(model, tokenizer, prompts, chosen, tuple(classes), losses)


def _ids(towers: Towers, tokenizer: Any, classes: Sequence[str], method: PromptMethod) -> tuple[Tensor, int]:
    return class_ids(tokenizer, classes, method.text_tokens, towers.longest, towers.pads, method.words)


def _checked(data: tuple[Tensor, Tensor], classes: Sequence[str], model: nn.Module) -> tuple[Tensor, Tensor]:
    images, labels = data
    require(
        images.dim() == 4 and images.is_floating_point() and labels.shape == images.shape[:1],
        f"pictures {tuple(images.shape)} and labels {tuple(labels.shape)} are no pairs",
        where="data",
        fix="floats [n, 3, H, W], normalised as the model wants them, and [n]",
    )
    require(torch.isfinite(images).all(), "the pictures hold NaN or infinite values", where="data")
    inside = not labels.is_floating_point() and bool(((labels >= 0) & (labels < len(classes))).all())
    require(
        inside,
        f"labels aren't all 0 to {len(classes) - 1}",
        where="data",
        fix="the places of the names in classes",
    )
    there = labels.unique()
    require(len(there) > 1, "all pictures are of one class", where="data", fix="give two classes or more")
    absent = sorted(set(range(len(classes))) - set(there.tolist()))
    require(not absent, f"there is no picture of {', '.join(classes[c] for c in absent)}", where="data", fix="give one, or leave its name out")  # fmt: skip
    return images, labels.long()


@torch.no_grad()
def _look(
    towers: Towers, images: Tensor, labels: Tensor, text: Tensor, method: PromptMethod, seed: int
) -> tuple[Tensor, Tensor]:
    """(frozen features [n, D], kept patches [n, k])"""
    whole, kept = [], []
    for part, own in zip(images.split(AT_ONCE), labels.split(AT_ONCE), strict=True):
        features, patches, attention = towers.look(part.to(labels.device))
        whole.append(features)
        generator = seeded(seed, "patches", len(whole))
        kept.append(
            method.keep(Patches(patches, text[own], attention), generator) if method.masks else own[:, None]
        )
    return torch.cat(whole), torch.cat(kept)


def _first(towers: Towers, ids: Tensor, place: int, method: PromptMethod, seed: int) -> Prompts:
    """Prompts to begin with: small noise, the first text ones the words that stand in their place."""
    generator = seeded(seed, "prompts")
    wide_text, wide_image = towers.widths

    def noise(tokens: int, width: int) -> Tensor:
        return torch.randn(method.depth, tokens, width, generator=generator) * 0.02

    text = noise(method.text_tokens, wide_text)
    held = ids[:, place : place + method.text_tokens]
    if (held == held[0]).all():
        text[0] = towers.text_tower.embeddings.token_embedding(held[0]).detach().float().cpu()
    return Prompts(text, noise(method.image_tokens, wide_image) if method.image_tokens else None)
