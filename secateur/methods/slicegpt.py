"""SliceGPT, with one rotation: the residual stream in the coordinates of its principal components, the last of which leave.

Ashkboos et al. 2024, "SliceGPT: Compress Large Language Models by Deleting Rows and Columns", https://arxiv.org/abs/2401.15024.
Facts from the authors' code, github.com/microsoft/TransformerCompression. Spec: none.

Departs: one rotation for the whole stream. The paper turns it anew before every norm and puts a matrix [width, width] into every
skip connection, which no model of transformers has and which cost as much as a sixth of a block of Llama. With one rotation these are identities
and the result is a plain smaller model; it fits each layer less well. Second moments are averaged over norms, each token divided
by its root mean square first (`moments="raw"` as published), since a few massive activations would rule them. The head is cut along.

As published: norms divide by the root of the sum over the dense width, what was cut away counting as zero.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from secateur.errors import SecateurError
from secateur.method import register
from secateur.pruning.allocate import build_path
from secateur.pruning.context import Context
from secateur.pruning.method import UnitMethod
from secateur.pruning.plan import Plan
from secateur.solvers.rotation import Stream, changes_nothing, find_stream, rotated
from secateur.stats.streams import second_moments
from secateur.taxonomy import record


def principal(moments: Tensor) -> tuple[Tensor, Tensor]:
    """(eigenvalues in falling order, eigenvectors as columns), float64: [width, width] -> [width], [width, width].

    >>> values, vectors = principal(torch.tensor([[5.0, 4.0], [4.0, 5.0]]))
    >>> values.tolist(), vectors[:, 0].abs().tolist()
    ([9.0, 1.0], [0.7071067811865475, 0.7071067811865475])
    """
    values, vectors = torch.linalg.eigh(moments.double())
    return values.flip(0).clamp_min(0), vectors.flip(1)


@register
@dataclass
class SliceGPT(UnitMethod):
    """Channels of the residual stream with the least variance, in coordinates in which that is as little as can be.

    >>> secateur.prune(model, method="slicegpt", target="macs<=80%", data=ids)  # doctest: +SKIP

    For language models whose norms are root mean squares (Llama, Mistral, Qwen, ...); others are refused with the reason. Results
    load with plain `from_pretrained` where the config takes the width (a multiple of the heads: see `--round-to`). Embeddings
    that were tied to the head are tied no longer, because the last norm is folded into the head alone: on a small model with a
    large vocabulary parameters then hardly fall, multiply-adds do. `plan.json` comes with all turned weights beside it.
    """

    moments: str = field(
        default="normalised",
        metadata={
            "help": "of what principal components are taken: normalised (tokens of length one) or raw",
            "choices": ("normalised", "raw"),
        },
    )

    kinds: ClassVar[tuple[str, ...] | None] = ("hidden",)
    unrepaired: ClassVar[str] = "it cuts the stream that runs through all blocks, in coordinates of its own"
    needs: ClassVar[frozenset[str]] = frozenset({"second_moments"})
    share_of: ClassVar[str] = "weights"
    info = record("slicegpt")

    def plan(self, context: Context) -> Plan:
        if context.options.schedule != "once":
            raise SecateurError(
                "it turns a stream once",
                where=f"slicegpt, schedule {context.options.schedule}",
                fix="leave it out",
            )
        others = sorted({group.kind for group in context.groups} - {"hidden"})
        if others:
            raise SecateurError(
                f"it cuts the residual stream, and no {', '.join(others)}",
                where="slicegpt, kinds",
                fix="leave them out",
            )
        streams = {
            g.name: find_stream(context.model, context.graph, g, context.example) for g in context.groups
        }
        found = context.remember("components", lambda: self.components(context, streams))
        scores = {name: found[f"{name}/values"] for name in streams}
        path = build_path(context.competitors(scores), context.allocation or self.allocation)
        keep = context.follow(
            context.competitors(scores), path, new=lambda keep: untied(context, streams, keep)
        )
        values: dict[str, Tensor] = {}
        for name, stream in streams.items():
            if len(keep[name]) < stream.group.size:
                values |= self.turned(context, stream, found[f"{name}/vectors"], len(keep[name]))
        return context.make_plan(keep=keep, values=values)

    def components(self, context: Context, streams: Mapping[str, Stream]) -> dict[str, Tensor]:
        """Eigenvalues [width] and eigenvectors [width, width] of each stream, under NAME/values and NAME/vectors."""
        result: dict[str, Tensor] = {}
        for name, stream in streams.items():
            norms, data = sorted(set(stream.reads.values())), context.require_data()
            moments = second_moments(
                context.model, data, norms, self.moments == "normalised", context.progress
            )
            values, vectors = principal(torch.stack([*moments.values()]).mean(0))
            result |= {f"{name}/values": values, f"{name}/vectors": vectors}
        return result

    def turned(self, context: Context, stream: Stream, vectors: Tensor, kept: int) -> dict[str, Tensor]:
        """The model's tensors in the new coordinates, norms scaled for the width that stays."""
        values = rotated(context.model, stream, vectors)
        exact = next(iter(values.values())).dtype == torch.float32
        gap = changes_nothing(context.model, values, context.example, 1e-3 if exact else 0.1)
        if gap is not None:
            raise SecateurError(
                f"turning its residual stream changes what it computes (by {gap:.2g} of the largest output)",
                where=f"slicegpt, {stream.group.name}",
                fix="take a method that removes heads and neurons, such as flap or 2ssp",
            )
        for path, (scale, added) in stream.norms.items():
            weight = f"{path}.weight"
            values[weight] = torch.full_like(values[weight], (len(scale) / kept) ** 0.5 - added)
        return values


def untied(context: Context, streams: Mapping[str, Stream], keep: Mapping[str, Tensor]) -> int:
    """How many parameters there are more because a head is tied no longer."""
    more = 0
    for name, stream in streams.items():
        kept = len(keep[name])
        for alias in context.graph.aliases.keys() & stream.dims.keys() if kept < stream.group.size else ():
            shape: Any = context.graph.shapes[alias]
            more += kept * (torch.Size(shape).numel() // shape[stream.dims[alias]])
    return more
