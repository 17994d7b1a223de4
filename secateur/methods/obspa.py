"""OBSPA: SPA with Optimal Brain Surgeon's score, and the layers that read a removed channel set anew in closed form.

Wang, Rachwan, Günnemann, Charpentier 2024, "Structurally Prune Anything", https://arxiv.org/abs/2403.18955; no training,
and with noise in the place of pictures no data. Spec: spa, algorithm C.

Reconstruction: damping (1 % of the Hessian's mean diagonal), 128 noise inputs and U(0, 1) as their distribution are
choices, the paper's weren't available. Hessians are those of the dense model, for all layers. BatchNorm statistics are
moved by what the cut changes on the calibration inputs; `batchnorm="new"` replaces them, as the paper does, which takes
many more pictures (on 250 of CIFAR-10 it costs a dense ResNet-20 2.5 points).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from secateur.errors import SecateurError
from secateur.method import register
from secateur.methods.spa import BATCHNORM, Spa
from secateur.pruning.context import Context
from secateur.scores.criteria import CRITERIA
from secateur.solvers.least_squares import least_squares
from secateur.stats.hessians import every_matrix, hessians, readers
from secateur.taxonomy import record
from secateur.utils.batches import as_batches
from secateur.utils.inputs import noise_like

CALIBRATIONS = ("data", "noise")


@register
@dataclass
class Obspa(Spa):
    """w²/[H⁻¹]_ii over coupled channels; what reads them is solved for again by least squares; BatchNorm re-estimated.

    >>> secateur.prune(net, image, method="obspa", target="macs<=70%", data=pictures)  # doctest: +SKIP
    >>> secateur.prune(net, image, method="obspa", target="macs<=70%", calibration="noise")  # doctest: +SKIP

    `data` are pictures the network was trained on, or of another set; labels aren't needed. With `calibration="noise"`
    there are none: uniform noise (random tokens for a language model), by which BatchNorm statistics are still shifted.
    """

    criterion: str = field(
        default="obs",
        metadata={"help": f"of single weights: {', '.join(CRITERIA)}", "choices": tuple(CRITERIA)},
    )
    batchnorm: str = field(
        default="shift",
        metadata={
            "help": "BatchNorm statistics after the cut: keep, new (of the data), shift (by the change on the data)",
            "choices": BATCHNORM,
        },
    )
    calibration: str = field(
        default="data", metadata={"help": "data, or noise: no data at all", "choices": CALIBRATIONS}
    )
    noise_samples: int = field(default=128, metadata={"help": "inputs of noise", "min": 1})
    noise_mean: float = field(default=0.45, metadata={"help": "noise is (U(0, 1) - this) / noise-std"})
    noise_std: float = field(default=0.225, metadata={"help": "as pictures are normalised", "above": 0})

    kinds: ClassVar[tuple[str, ...] | None] = Spa.kinds
    info = record("obspa")
    needs: ClassVar[frozenset[str]] = frozenset({"hessian"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.calibration == "noise" and self.batchnorm == "new":
            raise SecateurError(
                "noise doesn't have the statistics of data", where=self.name, fix="batchnorm=shift or keep"
            )

    def statistics(self) -> frozenset[str]:
        hessian = frozenset({"hessian"})
        return (
            super().statistics() - hessian if self.calibration == "noise" else super().statistics() | hessian
        )

    def batches(self, context: Context) -> list[Any]:
        if self.calibration == "data":
            return super().batches(context)
        noise = noise_like(
            context.example,
            self.noise_samples,
            context.generator("noise"),
            self.noise_mean,
            self.noise_std,
            getattr(getattr(context.model, "config", None), "vocab_size", None),
        )
        return as_batches(noise)

    def changes(
        self, context: Context, keep: Mapping[str, Tensor], notes: dict[str, str]
    ) -> dict[str, Tensor]:
        left = [name for name in readers(context.graph, keep) if name not in every_matrix(context.model)]
        if left:
            notes["repair"] = f"not repaired, because they are no plain layers: {', '.join(left)}"
        return super().changes(context, keep, notes)

    def repair(self, context: Context, keep: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        known = every_matrix(context.model)
        gone = {name: mask for name, mask in readers(context.graph, keep).items() if name in known}
        values: dict[str, Tensor] = {}
        with torch.no_grad():
            for matrix, stats in hessians(
                context.model,
                self.batches(context),
                {name: known[name] for name in gone},
                progress=context.progress,
            ):
                stay = (~matrix.fold(gone[matrix.name])[0]).nonzero().squeeze(1)
                parts = [
                    least_squares(rows, own.hessian, stay, self.damping)
                    for rows, own in stats.split(matrix.weight())
                ]
                values[matrix.name] = matrix.unfold(torch.cat(parts)).contiguous()
        return values
