"""CIFAR-10 with the pretrained ResNet-20, 32, 44 and 56; the networks come from tasks.vision."""

from __future__ import annotations

import torch

from secateur.data.pictures import CIFAR10, IMAGENET_MEAN, IMAGENET_STD, Pictures, load_pictures
from secateur.measure.vision import accuracy
from secateur.tasks.augment import Batch, shift
from secateur.tasks.networks.cifar_resnet import CifarResNet
from secateur.tasks.vision import load_network
from secateur.training.recipe import Recipe
from secateur.training.task import Task

BLACK = tuple(-mean / std for mean, std in zip(IMAGENET_MEAN, IMAGENET_STD))


def augment(batch: Batch, generator: torch.Generator) -> Batch:
    """He et al. 2015: moved by up to four pixels over a black border, mirrored."""
    return shift(batch[0], generator, 4, torch.tensor(BLACK), flip=True), batch[1]


def task(network: str, split: str, train: int | None, test: int | None) -> Task:
    """35,000 pictures to train on, the 10,000 of the test set (or 5,000 for validation) to be judged by."""
    held_out = load_pictures("cifar10", test, split)
    return Task(
        name=f"cifar10:{network}",
        build=lambda: CifarResNet(int(network.removeprefix("resnet"))),
        pretrained=lambda: load_network(network),
        train=load_pictures("cifar10", train, "train"),
        quality=lambda model: accuracy(model, *held_out, batch=500),
        inputs=torch.zeros(1, 3, 32, 32),
        metric="accuracy",
        recipe=Recipe(
            optimizer="sgd",
            lr=0.1,
            nesterov=True,
            weight_decay=1e-4,
            decay="all",
            batch=128,
            warmup=0,
            clip=0,
        ),
        epochs=30,
        augment=augment,
        classes=10,
        pictures=lambda count: Pictures.of(held_out, IMAGENET_MEAN, IMAGENET_STD, CIFAR10, count),
    )
