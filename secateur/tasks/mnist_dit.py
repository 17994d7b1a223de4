"""Drawing digits with a small pretrained transformer: the first task whose model generates.

Judged by class consistency: a small classifier, trained here, says how many drawings are the digit that was asked for.
"""

from __future__ import annotations

import functools
import itertools

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from secateur.data.mnist import load_mnist
from secateur.measure.vision import accuracy
from secateur.tasks.networks.mnist_dit import NONE, MnistDit, from_published
from secateur.training import fit
from secateur.training.recipe import Recipe
from secateur.training.sampling import Sampler, draw
from secateur.training.task import Task
from secateur.utils.files import atomic_directory, cache_dir, require_data
from secateur.utils.random import seeded

STEPS, GUIDANCE = 50, 2.0
VERSION = 1
SEEDS = {"test": 1_000_000, "val": 2_000_000}
"""Drawings of the splits begin with noise of other seeds, and of other seeds than training's."""


def load_network(name: str = "mnist-dit") -> nn.Module:
    """The published weights, in eval mode."""
    state = torch.load(require_data("pretrained/mnist_dit.pth"), map_location="cpu", weights_only=True)
    model = MnistDit()
    model.load_state_dict(from_published(state))
    return model.eval()


def step(model: nn.Module, x: Tensor, number: int, labels: Tensor, steps: int = STEPS) -> Tensor:
    """One Euler step of the flow; between 0.3 and 0.7 away from what no class would draw."""
    t = x.new_full((len(x), 1), number / steps)
    guided = 0.3 < number / steps < 0.7
    wanted = (
        model(torch.cat([x, x]), torch.cat([t, t]), torch.cat([labels, torch.full_like(labels, NONE)]))
        if guided
        else model(x, t, labels)
    )
    if guided:
        asked, free = wanted.chunk(2)
        wanted = GUIDANCE * asked + (1 - GUIDANCE) * free
    # the velocity of a straight path to what is predicted; linear in it, so that guidance may be mixed before
    return x + (wanted - x) / (1 - number / steps) / steps


def sampler(steps: int = STEPS) -> Sampler:
    """The guided sampler, digits 0 to 9 in turn."""

    def start(count: int, seed: int) -> tuple[Tensor, Tensor]:
        noise = torch.randn(count, 1, 28, 28, generator=seeded(seed, "mnist-dit"))
        return noise, torch.arange(count) % 10

    return Sampler(steps, start, functools.partial(step, steps=steps))


def flow_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Mean squared error of the predicted picture at a time drawn for each; one in ten without its class."""
    picture, label = batch
    t = torch.rand(len(picture), 1, device=picture.device)
    mixed = t[..., None, None] * picture + (1 - t[..., None, None]) * torch.randn_like(picture)
    label = torch.where(torch.rand(len(label), device=label.device) < 0.1, NONE, label)
    return ((model(mixed, t, label) - picture) ** 2).mean()


class Judge(nn.Module):
    """Three convolutions and a linear layer that read 28 x 28 digits."""

    def __init__(self) -> None:
        super().__init__()
        widths = (1, 32, 64, 64)
        self.layers = nn.Sequential(
            *(
                nn.Sequential(nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU(), nn.MaxPool2d(2))
                for a, b in itertools.pairwise(widths)
            )
        )
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.layers(x).mean((2, 3)))


@functools.cache
def load_judge() -> nn.Module:
    """The classifier; trained at the first call (about 15 CPU seconds), then kept in the cache."""
    folder = cache_dir() / f"mnist-judge-{VERSION}"
    file = folder / "model.safetensors"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Judge()
    if not file.is_file():
        data = load_mnist("train")
        recipe = Recipe(optimizer="adamw", lr=3e-3, batch=100, weight_decay=1e-3)
        fit(
            model,
            data,
            steps=5 * len(data[0]) // 100,
            seed=0,
            recipe=recipe,
            description="training the judge",
        )
        with atomic_directory(folder) as partial:
            save_file(model.state_dict(), partial / "model.safetensors")
    model.load_state_dict(load_file(file))
    return model.eval()


def consistency(model: nn.Module, count: int = 200, seed: int = SEEDS["test"], steps: int = STEPS) -> float:
    """The share of drawings that are the digit that was asked for."""
    training = model.training
    try:
        drawings, labels = draw(model.eval(), sampler(steps), count, seed)
    finally:
        model.train(training)
    return accuracy(load_judge(), drawings, labels, batch=200)


def task(network: str, split: str, train: int | None, test: int | None) -> Task:
    """7,000 digits of MNIST to train on; 200 drawings in 50 guided steps to be judged by."""
    return Task(
        name=f"mnist:{network}",
        build=MnistDit,
        pretrained=load_network,
        train=load_mnist("train", train),
        quality=lambda model: consistency(model, test or 200, SEEDS[split]),
        inputs=(torch.zeros(2, 1, 28, 28), torch.full((2, 1), 0.5), torch.tensor([0, NONE])),
        metric="accuracy",
        loss=flow_loss,
        recipe=Recipe(optimizer="adamw", lr=1e-3, batch=64, warmup=0.1),
        epochs=5,
        sampler=sampler(),
    )
