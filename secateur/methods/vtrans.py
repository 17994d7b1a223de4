"""VTrans: what a layer passes on is drowned in learned noise, and units whose noise outgrows their signal leave.

Dutta, Gupta, Agarwal 2024, "VTrans: Accelerating Transformer Compression with Variational Information Bottleneck based
Pruning", https://arxiv.org/abs/2406.05276. Spec: vtrans.

Reconstruction: no code of the paper is known; mask, KL and Lagrangian are those of the authors' next work (TVA-Prune),
distillation is CoFi's. Differs: no masks over whole sublayers; a weight that is the embedding and the output head is multiplied
itself, by a draw for each forward, so that both see its mean; the last state is taken, not the best inside the window; what
leaves is divided exactly, with -log alpha as scores (`select="threshold"`: alpha below 1 stays, as published).
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from secateur.gates import Gated, Gaussian, Lagrangian
from secateur.graph import Group
from secateur.method import register
from secateur.pruning.allocate import nearest_multiple
from secateur.pruning.plan import Plan
from secateur.taxonomy import record
from secateur.training.batches import part_of
from secateur.training.distill import distillation
from secateur.training.job import Job
from secateur.training.method import TrainMethod
from secateur.training.price import price
from secateur.training.ramp import Ramp
from secateur.utils.types import Objective

HEADS = ("heads", "kv_groups")


@register
@dataclass
class VTrans(TrainMethod):
    """Gaussian gates over the stream, heads and neurons, trained with the network until the target's share is expected.

    >>> secateur.train_prune(model, method="vtrans", target="params<=70%", data=ids, steps=300)  # doctest: +SKIP
    >>> secateur.train_prune(model, method="vtrans", target="70%", data=ids, steps=300, masks_only=True)  # doctest: +SKIP

    `masks_only` leaves the weights alone (Faster-VTrans); `data_share=0.03` trains on 3 % of the data (Fast-VTrans).
    A bare share counts the weights of the blocks, `params<=` the whole network with its embeddings. Masks can't come back once they
    are far beyond their threshold: where the report says that fewer are expected than wanted, lower `kl` and `mask_lr`.
    """

    masks_only: bool = field(default=False, metadata={"help": "train the masks alone, not the weights"})
    data_share: float = field(
        default=1.0, metadata={"help": "share of the data to train on", "above": 0, "max": 1}
    )
    mask_lr: float = field(
        default=0.05, metadata={"help": "learning rate of the masks (0.1 for small targets)", "above": 0}
    )
    multiplier_lr: float = field(
        default=0.1, metadata={"help": "rate at which the multipliers ascend", "above": 0}
    )
    kl: float = field(default=1e-6, metadata={"help": "weight of the bottleneck", "min": 0})
    kl_heads: float = field(default=256.0, metadata={"help": "of a head's, beside a neuron's", "min": 0})
    warmup_target: float = field(
        default=0.1,
        metadata={"help": "share of the steps in which the target comes in", "min": 0, "max": 1},
    )
    sharpness: float = field(default=10.0, metadata={"help": "of the expected count", "above": 0})
    distil: float = field(
        default=0.0, metadata={"help": "weight of the dense model's answers", "min": 0, "max": 1}
    )
    distil_states: float = field(
        default=0.0, metadata={"help": "weight of the distance of hidden states, with distil", "min": 0}
    )
    select: str = field(
        default="allocate",
        metadata={
            "help": "what leaves: allocate, threshold (published)",
            "choices": ("allocate", "threshold"),
        },
    )
    tune: float = field(default=0.0, metadata={"help": "fine-tuning, in lengths of the training", "min": 0})

    starts: ClassVar[str] = "trained"
    removes: ClassVar[str] = "units"
    kinds: ClassVar[tuple[str, ...] | None] = ("hidden", "heads", "kv_groups", "neurons", "channels")
    share_of: ClassVar[str] = "weights"
    allocation: ClassVar[str] = "global"
    info = record("vtrans")

    def prune(self, job: Job) -> Plan:
        if not job.trained:
            job.train("dense")
        context = job.context()
        data = part_of(job.task.train, self.data_share, job.generator("data"))
        dense = copy.deepcopy(job.model).requires_grad_(False) if self.distil else None
        with job.seeded("gates"):
            law = lambda group: Gaussian(group.size, self.sharpness)
            gated = job.gated(context, law, train_model=not self.masks_only, rows=True)
        laws = {name: law for name, law in gated.by_group().items() if isinstance(law, Gaussian)}
        expected, wanted = price(context, gated.points)
        held, ramp = Lagrangian(), Ramp(self.warmup_target)
        start = 1 - float(expected({name: (law.value().detach() != 0).float() for name, law in laws.items()}))

        def bottleneck(model: nn.Module, batch: Any) -> Tensor:
            each = [self.weight(gated, name) * law.kl() for name, law in laws.items()]
            return self.kl * torch.stack(each).sum()

        def size(model: nn.Module, batch: Any) -> Tensor:
            return held(1 - expected(gated.keep()), start + (1 - wanted - start) * ramp.weight)

        gated.add_module("held", held)
        weights = [] if self.masks_only else [{"params": [*job.model.parameters()], "lr": job.recipe.lr}]
        job.train(
            "masks",
            model=gated,
            parameters=[
                *weights,
                {"params": [*gated.laws.parameters()], "lr": self.mask_lr, "weight_decay": 0.0},
                held.groups(self.multiplier_lr),
            ],
            loss=self.loss(job, dense, self.distil_states),
            loss_terms=[bottleneck, size],
            after_step=[ramp],
            data=data,
            optimizer="adamw",
            lr_schedule="linear",
            clip=0.0,
        )
        with torch.no_grad():
            left = float(expected(gated.keep()))
        notes = {}
        if abs(left - wanted) > 0.05:
            notes["masks"] = (
                f"the masks expect {left:.1%} to be left, not {wanted:.1%}: train for longer, or raise mask_lr and multiplier_lr"
            )
        job.note(share_expected=left, share_wanted=wanted, drawn_for_each_token=sorted(gated.by_rows))
        scores = {name: -law.log_alpha().detach() for name, law in laws.items()}
        if self.select == "threshold":
            keep = {name: self.published(s, gated.groups[name], job) for name, s in scores.items()}
        else:
            keep = context.allocate(scores, job.options.allocation)
        for name, law in laws.items():  # means into weights, zeros where units leave
            stays = keep[name].to(law.mu.device)
            gated.fixed[name] = torch.zeros_like(law.mu).index_copy(0, stays, law.mu.detach()[stays])
        gated.fold()
        job.cut(keep)
        if steps := round(self.tune * job.steps):
            narrow = any(context.graph[name].kind == "hidden" for name in keep)
            states = 0.0 if narrow else self.distil_states
            job.train("tune", steps=steps, loss=self.loss(job, dense, states), data=data)
        return job.plan(notes=notes)

    def published(self, scores: Tensor, group: Group, job: Job) -> Tensor:
        """Kept units: alpha below 1, one at least; neurons and the stream to the next multiple of `round_to`."""
        count, grain = max(1, int((scores > 0).sum())), job.options.round_to
        if grain > 1 and group.kind not in HEADS:
            count = nearest_multiple(count, grain, group.size)
        return scores.cpu().topk(count).indices.sort().values

    def weight(self, gated: Gated, name: str) -> float:
        """What a group's KL is multiplied by: its kind's, and how many layers draw from a mask of the stream."""
        if gated.groups[name].kind in HEADS:
            return self.kl_heads
        layers = {s.name.rpartition(".")[0] for s in gated.points[name].soft}
        return float(len(layers)) if gated.groups[name].kind == "hidden" else 1.0

    def loss(self, job: Job, dense: nn.Module | None, states: float) -> Objective | None:
        """The loss of a batch beside the dense model's answers; None: the task's."""
        if dense is None:
            return job.task.loss
        return distillation(dense, weight=self.distil, hidden=states)
