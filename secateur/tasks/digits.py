"""Handwritten digits of scikit-learn with a small network that is trained here, in seconds: for machines without data."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from secateur.data.digits import MEAN, STD, load_digits
from secateur.data.pictures import Pictures
from secateur.families.reversed_vit import ReversedVit
from secateur.families.vim import Vim
from secateur.measure.vision import accuracy
from secateur.tasks import digits_heads
from secateur.tasks.augment import Batch, shift
from secateur.tasks.networks.digits_cnn import DigitsCnn
from secateur.tasks.networks.digits_heads import DigitsHeads
from secateur.tasks.networks.digits_resnet import DigitsResNet
from secateur.tasks.once import trained_once
from secateur.training import fit
from secateur.training.recipe import Recipe
from secateur.training.task import Task

BLACK = -MEAN / STD
LEVELS = 16
"""What a white pixel is."""
RECIPE = Recipe(optimizer="adamw", lr=1e-2, batch=64, weight_decay=1e-3, warmup=0.1)
STEPS = {"digits-vim": 600, "digits-dependency-vit": 800}
LR = {"digits-vim": 5e-3, "digits-dependency-vit": 3e-3}
VERSION = 1
HEADS = "digits-heads"
BUILDS: dict[str, Callable[[], nn.Module]] = {
    "digits-cnn": DigitsCnn,
    "digits-resnet": DigitsResNet,
    HEADS: DigitsHeads,
    "digits-vim": lambda: Vim(image=8, patch=2, channels=1, width=32, depth=4, state=4),
    "digits-dependency-vit": lambda: ReversedVit(
        image=8, patch=2, channels=1, width=48, depth=4, heads=4, ratio=2, scale=1.0, spread=0.5
    ),
}


def augment(batch: Batch, generator: torch.Generator) -> Batch:
    """Moved by up to one pixel over a black border; a mirrored digit is none."""
    return shift(batch[0], generator, 1, BLACK), batch[1]


def load_network(name: str = "digits-cnn") -> nn.Module:
    """The trained network, in eval mode; trained with seed 0 at the first call (400 steps or more), then kept in the cache."""
    several = name == HEADS

    def train(model: nn.Module) -> None:
        fit(
            model,
            digits_heads.load_tasks("train") if several else load_digits("train"),
            steps=STEPS.get(name, 400),
            seed=0,
            loss=digits_heads.loss if several else None,
            recipe=digits_heads.RECIPE if several else recipe_of(name),
            augment=augment,
            description=f"training {name}",
        )

    return trained_once(name, VERSION, BUILDS[name], train)


def recipe_of(network: str) -> Recipe:
    return RECIPE.replace(lr=LR.get(network, RECIPE.lr))


def task(network: str, split: str, train: int | None, test: int | None) -> Task:
    """1,200 digits to train on, 397 to be judged by (or 200 for validation); of three tasks at once, by the mean score."""
    if network == HEADS:
        judged = digits_heads.load_tasks(split, test)
        return Task(
            name=f"digits:{network}",
            build=DigitsHeads,
            pretrained=lambda: load_network(network),
            train=digits_heads.load_tasks("train", train),
            quality=lambda model: sum(digits_heads.scores(model, judged).values()) / 3,
            inputs=torch.zeros(1, 1, 8, 8),
            metric="score",
            loss=digits_heads.loss,
            losses=digits_heads.losses,
            recipe=digits_heads.RECIPE,
            epochs=20,
            augment=augment,
        )
    held_out = load_digits(split, test)
    return Task(
        name=f"digits:{network}",
        build=BUILDS[network],
        pretrained=lambda: load_network(network),
        train=load_digits("train", train),
        quality=lambda model: accuracy(model, *held_out, batch=500),
        inputs=torch.zeros(1, 1, 8, 8),
        metric="accuracy",
        recipe=recipe_of(network),
        epochs=STEPS.get(network, 375) * RECIPE.batch / 1200,
        augment=augment,
        classes=10,
        pictures=lambda count: Pictures.of(held_out, (MEAN / LEVELS,), (STD / LEVELS,), "0123456789", count),
    )
