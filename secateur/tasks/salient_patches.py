"""Salient objects in photographs of ECSSD, by patches: a frozen ViT-S/14 with linear heads behind blocks 3, 6, 9 and 12.

160 pictures to train on, 40 for validation, 50 to be judged by, squeezed to 224 x 224: 16 x 16 patches.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from secateur.data.ecssd import at_size, load_ecssd
from secateur.data.pictures import IMAGENET_MEAN, IMAGENET_STD
from secateur.families.segmenter import Segmenter
from secateur.tasks.focus import build_focus, load_focus
from secateur.tasks.patch_heads import build, fitted, normalised
from secateur.training.recipe import Recipe
from secateur.training.task import Task
from secateur.utils.files import cache_dir
from secateur.utils.running import evaluating

SIZE, TRAINED = 224, 160


def pairs(split: str, limit: int | None = None) -> tuple[Tensor, Tensor]:
    """(pictures as the network wants them [N, 3, 224, 224], int64 labels [N, 224, 224], 1 where the object is)."""
    x, y = at_size(*load_ecssd("test" if split == "test" else "train"), SIZE)
    part = {"train": slice(0, TRAINED), "val": slice(TRAINED, None), "test": slice(None)}[split]
    return normalised(x[part][:limit], IMAGENET_MEAN, IMAGENET_STD), y[part][:limit].long()


def load_network(name: str = "vit-s-patches") -> Segmenter:
    """The network with fitted heads, in eval mode. The first call fits them, in a minute or two, and keeps them in the cache."""
    file = cache_dir() / "salient-patches-1" / "heads.safetensors"
    return fitted(build(load_focus(), 2), *pairs("train"), file)


@torch.no_grad()
def measured(model: nn.Module, x: Tensor, y: Tensor, batch: int = 10) -> dict[str, float]:
    """{"iou": of the object over all pixels, "mae": mean of |probability of the object - mask|}."""
    first = next(model.parameters())
    both = either = wrong = 0.0
    with evaluating(model):
        for some, masks in zip(x.split(batch), y.split(batch), strict=True):
            p = model(some.to(first.device, first.dtype)).float().softmax(1)[:, 1].cpu()
            both += float(((p > 0.5) & (masks == 1)).sum())
            either += float(((p > 0.5) | (masks == 1)).sum())
            wrong += float((p - masks).abs().sum())
    return {"iou": both / max(either, 1.0), "mae": wrong / y.numel()}


def task(network: str, split: str, train: int | None, test: int | None) -> Task:
    """The intersection over union of the object; dense labels [N, 224, 224]."""
    held_out = pairs(split, test)
    return Task(
        name=f"salient-patches:{network}",
        build=lambda: build(build_focus(), 2),
        pretrained=load_network,
        train=pairs("train", train),
        quality=lambda model: measured(model, *held_out)["iou"],
        inputs=held_out[0][:1],
        metric="iou",
        recipe=Recipe(optimizer="adamw", lr=1e-3, batch=8, warmup=0.1, precision="float32"),
        epochs=1,
    )
