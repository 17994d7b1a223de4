"""Handwritten digits of scikit-learn with a small network that is trained here, in seconds: for machines without data."""

from __future__ import annotations

from collections.abc import Callable

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from secateur.data.digits import MEAN, STD, load_digits
from secateur.data.pictures import Pictures
from secateur.errors import SecateurError
from secateur.measure.vision import accuracy
from secateur.tasks import digits_heads
from secateur.tasks.augment import Batch, shift
from secateur.tasks.networks.digits_cnn import DigitsCnn
from secateur.tasks.networks.digits_heads import DigitsHeads
from secateur.tasks.networks.digits_resnet import DigitsResNet
from secateur.training import fit
from secateur.training.recipe import Recipe
from secateur.training.task import Task
from secateur.utils.files import atomic_directory, cache_dir

BLACK = -MEAN / STD
LEVELS = 16
"""What a white pixel is."""
RECIPE = Recipe(optimizer="adamw", lr=1e-2, batch=64, weight_decay=1e-3, warmup=0.1)
STEPS, VERSION = 400, 1
HEADS = "digits-heads"
BUILDS: dict[str, Callable[[], nn.Module]] = {
    "digits-cnn": DigitsCnn,
    "digits-resnet": DigitsResNet,
    HEADS: DigitsHeads,
}


def augment(batch: Batch, generator: torch.Generator) -> Batch:
    """Moved by up to one pixel over a black border; a mirrored digit is none."""
    return shift(batch[0], generator, 1, BLACK), batch[1]


def load_network(name: str = "digits-cnn") -> nn.Module:
    """The trained network, in eval mode; trained with seed 0 at the first call (400 steps), then kept in the cache."""
    folder = cache_dir() / f"{name}-{VERSION}"
    file = folder / "model.safetensors"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = BUILDS[name]()
    if not file.is_file():
        several = name == HEADS
        fit(
            model,
            digits_heads.load_tasks("train") if several else load_digits("train"),
            steps=STEPS,
            seed=0,
            loss=digits_heads.loss if several else None,
            recipe=digits_heads.RECIPE if several else RECIPE,
            augment=augment,
            description=f"training {name}",
        )
        try:
            with atomic_directory(folder) as partial:
                save_file(model.state_dict(), partial / "model.safetensors")
        except SecateurError:
            if not file.is_file():
                raise
    model.load_state_dict(load_file(file))
    return model.eval()


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
        recipe=RECIPE,
        epochs=20,
        augment=augment,
        classes=10,
        pictures=lambda count: Pictures.of(held_out, (MEAN / LEVELS,), (STD / LEVELS,), "0123456789", count),
    )
