"""A task: a network, what it is trained on, and the number that says how well it does."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from secateur.data.pictures import Pictures
from secateur.training.batches import Augment
from secateur.training.recipe import Recipe
from secateur.training.sampling import Sampler
from secateur.utils.screen import Screen
from secateur.utils.types import Objective


@dataclass(repr=False)
class Task(Screen):
    """What training-time methods are run on, and compete on. `secateur.tasks.load_task` makes the real ones.

    >>> Task("pairs", build=lambda: nn.Linear(4, 2), train=(x, y), classes=2)  # doctest: +SKIP

    build: an untrained network, drawn from torch's global random state, which the engine seeds.
    train: as `fit` takes it. augment: `(batch, generator) -> batch` on the model's device.
    quality: on held-out data, higher is better (of the metric "perplexity": lower); None: nothing is measured. metric: what it is.
    inputs: example inputs, for tracing and counting. classes: labels of `train` are checked to be 0..classes-1, none empty.
    sampler: how the network draws, where it generates. losses: where it has several tasks, (model, batch) -> the loss of each
    by name, a mean over the batch; methods that guard the worst of them read it.
    pictures: at most so many of those that a classifier is judged by, as pixels; what changes them under a network reads it.
    epochs, recipe: the task's default training. pretrained: the trained network, where there is one.
    """

    name: str
    build: Callable[[], nn.Module]
    train: Any
    quality: Callable[[nn.Module], float] | None = None
    inputs: Any = None
    metric: str = "accuracy"
    loss: Objective | None = None
    recipe: Recipe = field(default_factory=Recipe)
    epochs: float = 10
    pretrained: Callable[[], nn.Module] | None = None
    augment: Augment | None = None
    classes: int | None = None
    sampler: Sampler | None = None
    losses: Callable[[nn.Module, Any], Mapping[str, Tensor]] | None = None
    pictures: Callable[[int], Pictures] | None = None

    @property
    def sign(self) -> int:
        """-1 where a lower quality is better, else 1."""
        return -1 if self.metric == "perplexity" else 1
