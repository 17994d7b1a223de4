"""ISS-P: every step shrinks the smallest weights a little; those that matter grow back.

Wang et al. 2023, "Iterative Soft Shrinkage Learning for Efficient Image Super-Resolution" (ICCV),
https://arxiv.org/abs/2303.09650. Spec: iss-p.

Differs from the published code: the pruning stage has a fixed length, a share of the training (there, counters end it
after 100,020 steps as long as one weight of each layer stays in the set throughout); `sample` does shrink, where the
published fast path doesn't; equal weights are told apart by their position; weights that don't train, and those that
`skip` names, are left alone in N:M mode too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatch
from typing import ClassVar

import torch
from torch import Tensor, nn

from secateur.errors import SecateurError
from secateur.method import register
from secateur.pruning.plan import Plan
from secateur.pruning.select import top_k
from secateur.taxonomy import record
from secateur.training.job import Job
from secateur.training.masks import below_sampled_threshold, fit_pattern, smallest_of_groups
from secateur.training.method import TrainMethod
from secateur.training.state import State
from secateur.utils.random import seeded

MOST = 0.995
"""No layer loses more than this share of its weights."""


def smallest(weight: Tensor, ratio: float) -> Tensor:
    """Mask of the ceil(ratio * numel) weights of least magnitude, at most 99.5 % of them; ties by index.

    >>> smallest(torch.tensor([0.9, -0.02, 0.3, 0.05]), 0.5)
    tensor([False,  True, False,  True])
    """
    count = min(math.ceil(ratio * weight.numel() - 1e-9), math.floor(MOST * weight.numel() + 1e-9))
    return top_k(-weight.detach().abs(), count)


@dataclass
class Shrink:
    """A hook after each step: in every layer the smallest weights are multiplied by `alpha`; others stay, bit for bit."""

    weights: Mapping[str, nn.Parameter]
    ratio: float
    alpha: float = 0.95
    pattern: tuple[int, int] | None = None
    sample: int = 0
    seed: int = 0

    def chosen(self, name: str, step: int = 0, exact: bool = False) -> Tensor:
        """The set U of a layer, as its weights are now."""
        weight = self.weights[name]
        if self.pattern:
            return smallest_of_groups(weight, *self.pattern)
        if self.sample and not exact and weight.numel() > self.sample:
            return below_sampled_threshold(
                weight, self.ratio, self.sample, seeded(self.seed, "iss-p", name, step)
            )
        return smallest(weight, self.ratio)

    @torch.no_grad()
    def __call__(self, state: State | None = None) -> None:
        for name, weight in self.weights.items():
            chosen = self.chosen(name, state.step if state else 0)
            weight.copy_(torch.where(chosen, weight * self.alpha, weight))


@register
@dataclass
class IssP(TrainMethod):
    """Soft shrinkage of the smallest weights of each layer while training; then they are zero for good and the rest trains.

    >>> secateur.train_prune(load_task("sr:vdsr"), method="iss-p", target="10%", epochs=20)  # doctest: +SKIP

    The first `stage` of the training has a constant rate, the rest the task's schedule; the optimiser's moments are
    carried over. alpha=0 is iterative hard thresholding. A target N:M keeps N of M consecutive weights of the flattened
    tensor (hardware wants them along a row); M grows until it divides every layer. Under Adam a weight of the set settles
    at up to lr * alpha / (1 - alpha): with a rate that is small against the weights the set hardly moves.
    """

    alpha: float = field(
        default=0.95,
        metadata={"help": "what the smallest weights are multiplied by, each step", "min": 0, "max": 1},
    )
    stage: float = field(
        default=1 / 3,
        metadata={"help": "share of the steps that shrink; the rest fine-tunes", "above": 0, "below": 1},
    )
    sample: int = field(
        default=0,
        metadata={
            "help": "estimate a large layer's threshold from this many entries (published: 32400); 0: exact",
            "min": 0,
        },
    )
    skip: tuple[str, ...] = field(
        default=(), metadata={"help": "weights left whole, by name pattern: *tail*"}
    )

    starts: ClassVar[str] = "init"
    info = record("iss-p")

    def prune(self, job: Job) -> Plan:
        weights = {
            name: weight
            for name, weight in job.weights.items()
            if weight.requires_grad and not any(fnmatch(name, pattern) for pattern in self.skip)
        }
        if not weights:
            raise SecateurError("no weight is left to prune", where=self.name, fix="skip fewer layers")
        pattern, notes = None, {}
        if job.target.n_m:
            keep, m = job.target.n_m
            pattern = fit_pattern(m - keep, m, [weight.numel() for weight in weights.values()])
            if pattern[1] != m:
                notes["pattern"] = f"{keep} of {pattern[1]} are kept: {m} doesn't divide every layer"
        shrink = Shrink(weights, 1 - (job.target.value if pattern else job.share), self.alpha, pattern)
        shrink.sample, shrink.seed = self.sample, job.seed
        first = min(max(1, round(self.stage * job.steps)), job.steps - 1)
        if first < 1:
            raise SecateurError("one step is no training", where=self.name, fix="train for 2 steps or more")
        job.train("shrink", steps=first, after_step=[shrink], lr_schedule="constant", warmup=0.0)
        masks = {name: ~shrink.chosen(name, exact=True) for name in weights}
        before = job.quality()
        held = job.masked(masks)
        job.note(before_the_freeze=before, after_the_freeze=job.quality())
        job.train("tune", steps=job.steps - first, after_step=[held], moments=job.moments)
        return job.plan(masks=masks, notes=notes)
