"""CIFAR-10 with the pretrained ResNet-20, 32, 44 and 56 of tasks.vision, and two small networks that are trained here."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from secateur.data.pictures import CIFAR10, IMAGENET_MEAN, IMAGENET_STD, Pictures, load_pictures
from secateur.families.reversed_vit import ReversedVit
from secateur.families.vim import Vim
from secateur.measure.vision import accuracy
from secateur.tasks import vision
from secateur.tasks.augment import Batch, shift
from secateur.tasks.networks.cifar_resnet import CifarResNet
from secateur.tasks.once import trained_once
from secateur.training.fit import fit
from secateur.training.recipe import Recipe
from secateur.training.task import Task

BLACK = tuple(-mean / std for mean, std in zip(IMAGENET_MEAN, IMAGENET_STD))

OWN: dict[str, Callable[[], nn.Module]] = {
    "cifar-vim": lambda: Vim(image=32, patch=8, width=48, depth=4, state=4),
    "cifar-dependency-vit": lambda: ReversedVit(
        image=32, patch=4, width=48, depth=6, heads=4, ratio=2, scale=1.0, spread=0.5
    ),
}
RECIPE = Recipe(
    optimizer="sgd", lr=0.1, nesterov=True, weight_decay=1e-4, decay="all", batch=128, warmup=0, clip=0
)
OWN_RECIPE = Recipe(optimizer="adamw", lr=2e-3, batch=64, weight_decay=1e-2, warmup=0.1)
EPOCHS, VERSION = 10, 1


def augment(batch: Batch, generator: torch.Generator) -> Batch:
    """He et al. 2015: moved by up to four pixels over a black border, mirrored."""
    return shift(batch[0], generator, 4, torch.tensor(BLACK), flip=True), batch[1]


def load_network(name: str) -> nn.Module:
    """The trained network in eval mode; the small ones are trained at the first call (ten epochs, about a quarter of an hour of a core)."""
    if name not in OWN:
        return vision.load_network(name)

    def train(model: nn.Module) -> None:
        pictures = load_pictures("cifar10", None, "train")
        fit(
            model,
            pictures,
            steps=EPOCHS * len(pictures[0]) // OWN_RECIPE.batch,
            recipe=OWN_RECIPE,
            augment=augment,
            description=f"training {name}",
        )

    return trained_once(name, VERSION, OWN[name], train)


def task(network: str, split: str, train: int | None, test: int | None) -> Task:
    """35,000 pictures to train on, the 10,000 of the test set (or 5,000 for validation) to be judged by."""
    held_out = load_pictures("cifar10", test, split)
    own = network in OWN
    return Task(
        name=f"cifar10:{network}",
        build=OWN[network] if own else lambda: CifarResNet(int(network.removeprefix("resnet"))),
        pretrained=lambda: load_network(network),
        train=load_pictures("cifar10", train, "train"),
        quality=lambda model: accuracy(model, *held_out, batch=500),
        inputs=torch.zeros(1, 3, 32, 32),
        metric="accuracy",
        recipe=OWN_RECIPE if own else RECIPE,
        epochs=EPOCHS if own else 30,
        augment=augment,
        classes=10,
        pictures=lambda count: Pictures.of(held_out, IMAGENET_MEAN, IMAGENET_STD, CIFAR10, count),
    )
