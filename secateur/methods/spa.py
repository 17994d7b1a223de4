"""SPA: any criterion of single weights, lifted to the channels that must leave together.

Wang, Rachwan, Günnemann, Charpentier 2024, "Structurally Prune Anything: Any Architecture, Any Framework, Any Time",
https://arxiv.org/abs/2403.18955. Spec: spa, algorithm B.

Reconstruction: aggregation and normalisation are sum and mean, as the paper's choice wasn't available. Weights count,
biases and normalisations don't. `fpgm` counts the filters that make a unit, `bn-scale` the normalisation behind it.
Signed scores (GraSP) are normalised by their mean size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from secateur.context import Context
from secateur.criteria import (
    CRITERIA,
    NORMALISE,
    OF_INPUTS,
    OF_LOSS,
    fpgm,
    inverse_diagonal,
    l2,
    normalise,
    obd,
    obs,
    score,
)
from secateur.errors import SecateurError
from secateur.graph import Group
from secateur.graph.groups import HOW, KINDS
from secateur.method import UnitMethod, register
from secateur.plan import Plan
from secateur.recover import batchnorm_after
from secateur.stats.hessians import every_matrix, hessians
from secateur.stats.record import as_batches
from secateur.taxonomy import record

BATCHNORM = ("keep", "new", "shift")


@register
@dataclass
class Spa(UnitMethod):
    """Coupled channels by any criterion, in any network: before training, or after it with and without fine-tuning.

    >>> secateur.prune(net, images, method="spa", criterion="snip", data=[(x, y)], target="macs<=50%")  # doctest: +SKIP

    Batches are pairs (inputs, labels) for criteria that need a loss, unless `loss=` says otherwise; token ids for
    language models. An untrained network is scored with the batch's statistics where BatchNorm has none.
    """

    criterion: str = field(
        default="magnitude", metadata={"help": f"of single weights: {', '.join(CRITERIA)}"}
    )
    aggregate: str = field(default="sum", metadata={"help": f"over a unit's weights: {', '.join(HOW)}"})
    normalise: str = field(default="mean", metadata={"help": f"over a group's units: {', '.join(NORMALISE)}"})
    damping: float = field(
        default=0.01, metadata={"help": "for obd and obs: share of the Hessian's mean diagonal added to it"}
    )
    batchnorm: str = field(
        default="keep",
        metadata={
            "help": "BatchNorm statistics after the cut: keep, new (of the data), shift (by the change on the data)"
        },
    )

    kinds: ClassVar[tuple[str, ...] | None] = tuple(kind for kind in KINDS if kind != "layers")
    allocation: ClassVar[str] = "global"
    share_of: ClassVar[str] = "units"
    info = record("spa")

    def __post_init__(self) -> None:
        for value, known in (
            (self.criterion, CRITERIA),
            (self.aggregate, HOW),
            (self.normalise, NORMALISE),
            (self.batchnorm, BATCHNORM),
        ):
            if value not in known:
                raise SecateurError(
                    f"there is no {value!r}", where=self.name, fix=f"one of {', '.join(known)}"
                )
        if self.damping < 0:
            raise SecateurError(f"damping is {self.damping}", where=self.name, fix="0 or more, such as 0.01")
        self.needs = frozenset(self._needs())  # type: ignore[misc]

    def _needs(self) -> set[str]:
        needs = {"gradient"} if self.criterion in OF_LOSS else set()
        return needs | ({"hessian"} if self.criterion in OF_INPUTS or self.batchnorm != "keep" else set())

    def batches(self, context: Context) -> list[Any]:
        """What is calibrated on; labels, where there are, beside the inputs."""
        return as_batches(context.require_data())

    def plan(self, context: Context) -> Plan:
        found = context.remember("scores", lambda: self.scores(context))
        keep = context.allocate(found)
        notes: dict[str, str] = {}
        values = self.changes(context, keep, notes) if _cuts(context, keep) else {}
        return context.make_plan(keep=keep, values=values, notes=notes)

    def score(self, group: Group, context: Context) -> Tensor:
        return self.scores(context)[group.name]

    def scores(self, context: Context) -> dict[str, Tensor]:
        """[units] of every group that the criterion says something about, normalised."""
        return {
            group.name: normalise(group.reduce(values, self.aggregate, roles), self.normalise)
            for group, values, roles in self._elements(context)
        }

    def _elements(self, context: Context) -> list[tuple[Group, Mapping[str, Tensor], tuple[str, ...] | None]]:
        """(group, scores of its tensors' elements, the roles that count)."""
        parameters = dict(context.model.named_parameters(remove_duplicate=False))
        if self.criterion == "bn-scale":
            scales = {
                f"{path}.weight".lstrip("."): module.weight
                for path, module in context.model.named_modules()
                if "norm" in type(module).__name__.lower()
                and isinstance(getattr(module, "weight", None), Tensor)
            }
            values = {name: scale.detach().float().abs() for name, scale in scales.items()}
            return [
                (group, values, ("vector",))
                for group in self._having(context, values, ("vector",), "normalisation follows its units")
            ]
        names = list(
            dict.fromkeys(
                s.name
                for group in context.groups
                for s in group.slices
                if s.role in ("out", "in") and s.name in parameters
            )
        )
        modules = tuple(f"{path}." for group in context.groups for path in group.modules)
        names += [
            n for n, p in parameters.items() if n.startswith(modules) and p.dim() > 1 and n not in names
        ]
        roles = ("out", "in")
        if self.criterion == "fpgm":
            return [
                (
                    group,
                    {s.name: fpgm(parameters[s.name], s.dim) for s in group.slices if s.name in names},
                    ("out",),
                )
                for group in self._having(context, set(names), ("out",), "layer makes its units")
            ]
        if self.criterion in OF_INPUTS:
            values = self._of_inputs(context, names)
            plain = {name: l2(parameters[name]) for name in names if name not in values}
            return [
                (group, values if any(s.name in values for s in group.slices) else plain, roles)
                for group in context.groups
            ]
        values = score(
            self.criterion,
            context.model,
            names,
            as_batches(context.require_data()) if self.criterion in OF_LOSS else None,
            context.loss,
            inputs=context.inputs,
            generator=context.generator("probes"),
        )
        return [
            (group, values, roles)
            for group in self._having(context, values, roles, "weight leaves with its units")
        ]

    def _having(self, context: Context, names: Any, roles: tuple[str, ...], what: str) -> list[Group]:
        groups = [
            group
            for group in context.groups
            if any(s.name in names and s.role in roles for s in group.slices)
        ]
        if not groups:
            raise SecateurError(
                f"{self.criterion} says nothing about {type(context.model).__name__}: no {what}",
                where=self.name,
                fix="use another criterion",
            )
        return groups

    def _of_inputs(self, context: Context, names: list[str]) -> dict[str, Tensor]:
        """Scores by the Hessian of each layer's inputs; tensors that aren't layers have none."""
        known = every_matrix(context.model)
        matrices = {name: known[name] for name in names if name in known}
        scores: dict[str, Tensor] = {}
        for matrix, stats in hessians(
            context.model, self.batches(context), matrices, progress=context.progress
        ):
            parts = []
            for rows, own in stats.split(matrix.weight()):
                hessian = own.hessian
                if self.criterion == "obd":
                    parts.append(obd(rows, hessian))
                else:
                    parts.append(obs(rows, inverse_diagonal(hessian, self.damping)))
            scores[matrix.name] = matrix.unfold(torch.cat(parts))
        return scores

    def changes(
        self, context: Context, keep: Mapping[str, Tensor], notes: dict[str, str]
    ) -> dict[str, Tensor]:
        """Tensors that replace the model's; adds to the plan's notes."""
        values = dict(self.repair(context, keep))
        if self.batchnorm != "keep":
            batches = self.batches(context)
            values |= batchnorm_after(context.model, context.graph, keep, values, batches, self.batchnorm)
        return values


def _cuts(context: Context, keep: Mapping[str, Tensor]) -> bool:
    return any(len(units) < context.graph[name].size for name, units in keep.items())
