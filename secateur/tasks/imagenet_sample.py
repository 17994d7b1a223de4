"""A sample of ImageNet with the pretrained EfficientNet-Lite0: dense against pruned on pictures of 224 x 224."""

from __future__ import annotations

import torch

from secateur.data.pictures import HALF, Pictures, load_pictures
from secateur.measure.vision import accuracy
from secateur.tasks.augment import Batch, shift
from secateur.tasks.vision import LITE, build_lite, load_network
from secateur.training.recipe import Recipe
from secateur.training.task import Task

BLACK = -1.0
TRAINED = 200
"""Pictures to train on; the other 50 of their half are for validation."""


def augment(batch: Batch, generator: torch.Generator) -> Batch:
    """Moved by up to 16 pixels over a black border, mirrored."""
    return shift(batch[0], generator, 16, BLACK, flip=True), batch[1]


def task(network: str, split: str, train: int | None, test: int | None) -> Task:
    """200 pictures to calibrate or train on, the 250 of the other half (or 50 for validation) to be judged by.

    Every picture is of a class of its own, so what is trained on here says nothing of the classes that are judged.
    """
    count = TRAINED if train is None else min(train, TRAINED)
    if split == "val":
        pictures, labels = load_pictures("imagenet-sample", split="train")
        held_out = (pictures[TRAINED:][:test], labels[TRAINED:][:test])
    else:
        held_out = load_pictures("imagenet-sample", test, split)
    return Task(
        name=f"imagenet-sample:{network}",
        build=build_lite,
        pretrained=lambda: load_network(LITE),
        train=load_pictures("imagenet-sample", count, "train"),
        quality=lambda model: accuracy(model, *held_out, batch=25),
        inputs=torch.zeros(1, 3, 224, 224),
        metric="accuracy",
        recipe=Recipe(optimizer="sgd", lr=1e-3, nesterov=True, weight_decay=1e-5, batch=16, warmup=0.1),
        epochs=1,
        augment=augment,
        pictures=lambda count: Pictures.of(held_out, HALF, HALF, limit=count),
    )
