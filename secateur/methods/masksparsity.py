"""MaskSparsity: sparsity regularisation of only those channels that are going to be removed.

Jiang et al. 2022, "Pruning-aware Sparse Regularization for Network Pruning", https://arxiv.org/abs/2201.06776.
Spec: masksparsity.

Differs from the published code: the mask is as large as the target asks, and its channels are those that leave
(`prune="threshold"` and "ot" let |gamma| decide after the sparse training, as published, so that a target may be missed);
`uniform` takes the channels of smallest |gamma|, where the released masks take the first ones (`position`). Groups of
coupled channels come from the traced network. The biases of removed channels are dropped, not folded. One round.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from secateur.context import Context
from secateur.errors import SecateurError
from secateur.graph import Group
from secateur.method import TrainMethod, register
from secateur.plan import Plan
from secateur.recover import reestimate_batchnorm
from secateur.taxonomy import record
from secateur.training.batches import Draw
from secateur.training.fit import State
from secateur.training.job import Job

PENALTIES = ("l1", "l2", "smooth-l1")


@torch.no_grad()
def penalty_gradient(gamma: Tensor, kind: str = "l1", lr_lambda: float = 0.0) -> Tensor:
    """The derivative of the penalty on BatchNorm scales [C]: sign(gamma), gamma, or gamma where |gamma| < lr_lambda.

    >>> penalty_gradient(torch.tensor([0.9, -0.02, 0.0]))
    tensor([ 1., -1.,  0.])
    """
    if kind == "l2":
        return gamma.clone()
    if kind == "smooth-l1":
        return torch.where(gamma.abs() < lr_lambda, gamma, gamma.sign())
    return gamma.sign()


@dataclass
class Sparsify:
    """A hook on the gradients: lambda times the penalty's derivative joins them for the scales that will leave."""

    scales: Mapping[str, nn.Parameter]
    keep: Mapping[str, Tensor]
    """Bool [C] by name; a name that is missing keeps every channel."""
    lam: float
    kind: str = "l1"

    @torch.no_grad()
    def __call__(self, state: State) -> None:
        for name, gamma in self.scales.items():
            if name not in self.keep or gamma.grad is None:
                continue
            leaves = (~self.keep[name]).to(gamma.device, gamma.dtype)
            gamma.grad.add_(self.lam * penalty_gradient(gamma, self.kind, state.lr * self.lam) * leaves)


def ot_threshold(gamma: Tensor, share: float = 1e-4, least: float = 1e-3) -> float:
    """The "OT" threshold of a layer: as many of the smallest |gamma| [C] leave as hold `share` of the sum of squares.

    >>> round(ot_threshold(torch.tensor([0.001, 0.002, 0.004, 0.5, 0.8, 0.9])), 3)
    0.252

    The mean of the last that leaves and the first that stays; 0 where none may, 1 where the largest is below `least`.
    """
    sizes = gamma.detach().abs().double().clamp_min(1e-18).sort().values
    if sizes[-1] < least:
        return 1.0
    removed = int((sizes.square().cumsum(0) <= share * sizes.square().sum()).sum())
    return ((sizes[removed - 1] + sizes[removed]) / 2).item() if removed else 0.0


def above(gamma: Tensor, threshold: float) -> Tensor:
    """Which channels stay, bool [C]: |gamma| above the threshold, and at least the (first) largest."""
    sizes = gamma.detach().abs()
    keep = sizes > threshold
    keep[sizes.argmax()] = True
    return keep


def vote(keep: Tensor, gammas: Tensor | None = None) -> Tensor:
    """The mask that members of a coupled group share, bool [C], from their own, bool [members, C].

    >>> vote(torch.tensor([[1, 1, 0, 0, 1], [1, 0, 0, 1, 1], [1, 0, 0, 0, 1]]).bool()).int()
    tensor([1, 0, 0, 0, 1], dtype=torch.int32)

    Those channels leave on which most members agree, as many members as leave no fewer channels than the member that
    gives up fewest. Where all would leave, the one with the fewest votes stays, then of the largest |gamma| [members, C].
    """
    counts = (~keep).sum(0)
    least = int((~keep).sum(1).min())
    agreed = next(i for i in range(len(keep), -1, -1) if i == 0 or int((counts >= i).sum()) >= least)
    gone = counts >= max(agreed, 1) if least else torch.zeros_like(keep[0])
    if gone.all():
        sizes = gammas.detach().abs().double().sum(0) if gammas is not None else torch.zeros(len(gone))
        fewest = counts == counts.min()
        gone[sizes.masked_fill(~fewest, -1.0).argmax()] = False
    return ~gone


@register
@dataclass
class MaskSparsity(TrainMethod):
    """Choose the channels first; train with L1 on the BatchNorm scales of these alone; cut them; fine-tune.

    >>> secateur.train_prune(load_task("cifar10"), method="masksparsity", target="macs<=50%", epochs=30)  # doctest: +SKIP

    The mask is made by `uniform` (the smallest scales of each group), `position` (the first channels of each), `global`
    (a training with all scales regularised, then the smallest of all groups) or `threshold` (such a training, then
    |gamma| <= threshold; the target is not looked at). The trainings for mask and sparsity have the full length, from the
    trained network each; fine-tuning `tune` times that, at `tune_lr`. A unit's score is the mean |gamma| of the
    BatchNorms that it is coupled with. Removed biases shift what follows until fine-tuning, or `reestimate`, sets BatchNorm
    statistics anew. Short trainings want a larger `lam`: an SGD step moves a scale by lr * lam.
    """

    lam: float = field(default=5e-4, metadata={"help": "weight of the penalty"})
    penalty: str = field(default="l1", metadata={"help": ", ".join(PENALTIES), "choices": PENALTIES})
    mask: str = field(
        default="uniform",
        metadata={
            "help": "where the mask comes from: uniform, position, global, threshold",
            "choices": ("uniform", "position", "global", "threshold"),
        },
    )
    select: str = field(
        default="mask",
        metadata={
            "help": "what leaves after the sparse training: the mask, or what lies below: threshold, ot",
            "choices": ("mask", "threshold", "ot"),
        },
    )
    threshold: float = field(default=0.01, metadata={"help": "|gamma| up to which a channel leaves"})
    tune: float = field(default=0.4, metadata={"help": "length of fine-tuning, of the training's"})
    tune_lr: float = field(default=5e-4, metadata={"help": "learning rate of fine-tuning"})
    reestimate: int = field(
        default=0,
        metadata={"help": "batches to take BatchNorm statistics anew on, between the cut and fine-tuning"},
    )

    starts: ClassVar[str] = "trained"
    removes: ClassVar[str] = "units"
    kinds: ClassVar[tuple[str, ...] | None] = ("channels", "neurons", "hidden")
    share_of: ClassVar[str] = "units"
    info = record("masksparsity")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lam < 0 or self.threshold < 0 or self.tune < 0 or self.tune_lr <= 0 or self.reestimate < 0:
            raise SecateurError(
                f"lam {self.lam}, threshold {self.threshold}, tune {self.tune}, tune_lr {self.tune_lr}",
                where=self.name,
                fix="numbers of 0 or more, and a rate above 0",
            )

    def prune(self, job: Job) -> Plan:
        if not job.trained:
            job.train("baseline")
        scales, baseline = batchnorm_scales(job.model), job.snapshot()
        context = job.context()
        members = coupled_scales(context, scales)
        none = {name: torch.zeros_like(gamma, dtype=torch.bool) for name, gamma in scales.items()}
        if self.mask in ("global", "threshold"):
            job.train("mask", after_backward=[Sparsify(scales, none, self.lam, self.penalty)])
        units = self.choose(context, members, scales)
        job.restore(baseline)
        regularised = Sparsify(scales, of_layers(members, units, scales), self.lam, self.penalty)
        job.train("sparse", after_backward=[regularised])
        if self.select != "mask":
            units = {name: self.fallen(group, scales) for name, group in members.items()}
        job.note(quality=job.quality(), **separation(regularised))
        job.cut({name: keep.nonzero().flatten().cpu() for name, keep in units.items()})
        if self.reestimate:
            draw = Draw(job.task.train, job.recipe.batch, job.seed)
            with torch.no_grad():
                reestimate_batchnorm(job.model, map(inputs_of_batch, map(draw, range(self.reestimate))))
        job.note(quality_after_the_cut=job.quality())
        if steps := round(self.tune * job.steps):
            job.train("tune", steps=steps, lr=self.tune_lr)
        return job.plan()

    def choose(
        self, context: Context, members: Mapping[str, Group], scales: Mapping[str, nn.Parameter]
    ) -> dict[str, Tensor]:
        """The mask that the sparse training gets, bool [units] by group: True stays."""
        if self.mask == "threshold":
            return {name: self.fallen(group, scales, "threshold") for name, group in members.items()}
        if self.mask == "position":
            scores = {name: torch.arange(group.size).float() for name, group in members.items()}
        else:
            scores = {name: gammas(group, scales).mean(0) for name, group in members.items()}
        kept = context.allocate(
            scores, context.allocation or ("global" if self.mask == "global" else "uniform")
        )
        units = {}
        for name, group in members.items():
            units[name] = torch.ones(group.size, dtype=torch.bool)
            if name in kept:
                units[name].fill_(False)[kept[name].cpu()] = True
        return units

    def fallen(self, group: Group, scales: Mapping[str, nn.Parameter], how: str | None = None) -> Tensor:
        """Which units of a group stay by the scales as they are, bool [units]."""
        found = gammas(group, scales)
        own = [above(g, ot_threshold(g) if (how or self.select) == "ot" else self.threshold) for g in found]
        return vote(torch.stack(own), found)


def inputs_of_batch(batch: Any) -> Any:
    """What the model reads of a pair (x, y), or of another batch."""
    return batch[0] if isinstance(batch, tuple) else batch


def batchnorm_scales(model: nn.Module) -> dict[str, nn.Parameter]:
    """The scale of every BatchNorm that has one, by parameter name.

    Raises `SecateurError` where there is none.
    """
    scales = {
        f"{path}.weight".lstrip("."): module.weight
        for path, module in model.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.affine
    }
    if not scales:
        raise SecateurError(
            "it has no BatchNorm with scales",
            where=f"masksparsity, {type(model).__name__}",
            fix="use another method, such as lottery-ticket or group-magnitude",
        )
    return scales


def coupled_scales(context: Context, scales: Mapping[str, nn.Parameter]) -> dict[str, Group]:
    """The groups that can be cut and have BatchNorm scales.

    Raises `SecateurError` where there is none.
    """
    found = {g.name: g for g in context.groups if any(s.name in scales for s in g.slices)}
    if not found:
        raise SecateurError(
            "no BatchNorm's channels can be cut", where="masksparsity", fix="see secateur inspect"
        )
    return found


def gammas(group: Group, scales: Mapping[str, nn.Parameter]) -> Tensor:
    """|gamma| of each BatchNorm of a group, [members, units]; the largest, where a unit has several channels."""
    rows = [
        scales[s.name].detach().abs().float()[s.index.to(scales[s.name].device)].amax(1)
        for s in group.slices
        if s.name in scales
    ]
    return torch.stack(rows)


def of_layers(
    members: Mapping[str, Group], units: Mapping[str, Tensor], scales: Mapping[str, nn.Parameter]
) -> dict[str, Tensor]:
    """The mask of each BatchNorm, bool [C], from those of the groups; a layer that loses nothing has none."""
    keep: dict[str, Tensor] = {}
    for name, group in members.items():
        gone = ~units[name].cpu()
        for part in group.slices:
            if part.name in scales and gone.any():
                mask = keep.setdefault(part.name, torch.ones(len(scales[part.name]), dtype=torch.bool))
                mask[part.index[gone].flatten()] = False
    return {name: mask.to(scales[name].device) for name, mask in keep.items()}


def separation(hook: Sparsify, below: float = 0.01) -> dict[str, float]:
    """How well the scales have parted: the largest |gamma| that leaves, the smallest that stays, the share below 0.01."""
    gone = [hook.scales[name].detach()[~mask].abs() for name, mask in hook.keep.items()]
    stay = [
        gamma.detach()[hook.keep[name]].abs() if name in hook.keep else gamma.detach().abs()
        for name, gamma in hook.scales.items()
    ]
    if not gone:
        return {}
    leaving, staying = torch.cat(gone), torch.cat(stay)
    return {
        "largest_gamma_that_leaves": leaving.max().item(),
        "leaving_below_0.01": (leaving < below).double().mean().item(),
        "smallest_gamma_that_stays": staying.min().item(),
    }
