"""Drawing scikit-learn's digits from prompts: a text encoder and a denoiser, with weights that come with the library.

Judged by class consistency: how many drawings have a digit as nearest neighbour that is the one asked for.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from secateur.data.digits import MEAN, STD, load_digits
from secateur.tasks.networks.digits_diffusion import (
    DIGITS,
    STEPS,
    TEMPLATES,
    DigitsDiffusion,
    encode,
    prompts,
    sampler,
)
from secateur.training import fit
from secateur.training.recipe import Recipe
from secateur.training.sampling import draw
from secateur.training.task import Task
from secateur.utils.files import atomic_directory
from secateur.utils.running import evaluating

WEIGHTS = Path(__file__).parent / "weights" / "digits-diffusion"
RECIPE = Recipe(optimizer="adamw", lr=3e-3, batch=64, warmup=0.1)
TRAINED = 1100
"""Steps that the weights were trained for."""
SEEDS = {"test": 1_000_000, "val": 2_000_000}
"""Drawings of the splits begin with noise of other seeds, and of other seeds than training's."""


def load_pictures(split: str = "train", limit: int | None = None) -> tuple[Tensor, Tensor]:
    """(pictures float32 [N, 1, 8, 8] from -1, white, to 1, black; digits int64 [N])."""
    pictures, digits = load_digits(split, limit)
    return (pictures * STD + MEAN) / 8 - 1, digits


def _table() -> Tensor:
    """The words of every prompt for every digit, int64 [10, templates, 4]; where a template has none for a digit, another."""
    texts, _ = prompts(10 * len(TEMPLATES))
    return encode(texts).view(len(TEMPLATES), len(DIGITS), -1).transpose(0, 1)


def flow_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Mean squared error of the predicted velocity at a time and with a prompt that are drawn for each picture."""
    picture, digit = batch
    t = torch.rand(len(picture), 1, device=picture.device)
    noise, place = torch.randn_like(picture), t[..., None, None]
    said = torch.randint(len(TEMPLATES), (len(digit),), device=digit.device)
    words = _table().to(digit.device)[digit, said]
    return ((model(place * picture + (1 - place) * noise, t, words) - (picture - noise)) ** 2).mean()


def train_network(folder: str | Path, seed: int = 0, steps: int = TRAINED) -> nn.Module:
    """Train the network anew and write its weights, in float16, into a new folder. About 70 CPU seconds.

    >>> train_network("out/digits-diffusion")  # doctest: +SKIP

    The same on the command line: `python -m secateur.tasks.digits_diffusion out/digits-diffusion`.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = DigitsDiffusion()
    fit(
        model,
        load_pictures("train"),
        steps=steps,
        seed=seed,
        loss=flow_loss,
        recipe=RECIPE,
        description="training digits-diffusion",
    )
    with atomic_directory(folder) as partial:
        halves = {name: value.half() for name, value in model.state_dict().items()}
        save_file(halves, partial / "model.safetensors")
    return model.eval()


def load_network(name: str = "digits-diffusion", folder: str | Path = WEIGHTS) -> nn.Module:
    """The trained network, in eval mode, float32: the one that comes with the library, or one that `train_network` wrote."""
    model = DigitsDiffusion()
    state = load_file(Path(folder).expanduser() / "model.safetensors")
    model.load_state_dict({name: value.float() for name, value in state.items()})
    return model.eval()


def nearest_digits(drawings: Tensor) -> Tensor:
    """The digit of the nearest training picture of each drawing [N, 1, 8, 8], int64 [N]."""
    pictures, digits = load_pictures("train")
    return digits[torch.cdist(drawings.flatten(1), pictures.flatten(1)).argmin(1)]


def consistency(model: nn.Module, count: int = 200, seed: int = SEEDS["test"], steps: int = STEPS) -> float:
    """The share of drawings that are the digit that the prompt asked for."""
    with evaluating(model):
        drawings, _ = draw(model, sampler(steps), count, seed)
    return (nearest_digits(drawings) == prompts(count)[1]).float().mean().item()


def task(network: str, split: str, train: int | None, test: int | None) -> Task:
    """1,200 digits to train on; 200 drawings in 20 steps to be judged by."""
    return Task(
        name=network,
        build=DigitsDiffusion,
        pretrained=load_network,
        train=load_pictures("train", train),
        quality=lambda model: consistency(model, test or 200, SEEDS[split]),
        inputs=DigitsDiffusion().example_inputs(),
        metric="accuracy",
        loss=flow_loss,
        recipe=RECIPE,
        epochs=60,
        sampler=sampler(),
    )


if __name__ == "__main__":
    print(f"{consistency(train_network(sys.argv[1])):.1%} of 200 drawings are the digit that was asked for")
