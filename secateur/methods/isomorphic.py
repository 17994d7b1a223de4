"""Isomorphic pruning: units are ranked among those of sub-structures that are built alike, and never against others.

Fang, Ma, Bi Mi, Wang 2024, "Isomorphic Pruning for Vision Models", https://arxiv.org/abs/2407.04616. Facts from the
authors' code, github.com/VainF/Isomorphic-Pruning, and from Torch-Pruning 1.6.1, which it moved into. Spec: none.

Reconstruction: two sub-structures are isomorphic where the same classes of layers make and read their units, in the same
number and on the same side; the released code compares them in the order in which its graph lists them, here the order
doesn't count. Weights count, norms and biases don't (there LayerNorms do).

Departs: all kinds of sub-structure lose the same share, and this share falls until the target holds, so that it is met
exactly; the released scripts give the share, one more for heads and one for their width, and take multiply-adds as they come.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import ClassVar

from torch import nn

from secateur.graph import Group
from secateur.method import register
from secateur.methods.spa import Spa
from secateur.pruning.context import Context
from secateur.scores.criteria import CRITERIA
from secateur.taxonomy import record


def structure(model: nn.Module, group: Group) -> str:
    """What a group is made of: kind, and how often each class of layer makes or reads its units.

    >>> structure(resnet, graph["layer1.0.conv1:channels"])  # doctest: +SKIP
    'channels: BatchNorm2d.bias vector, BatchNorm2d.weight vector, Conv2d.weight in, Conv2d.weight out'

    Sizes don't count: a narrow block and a wide one are isomorphic.
    """
    parts: Counter[str] = Counter()
    for s in group.slices:
        path, _, leaf = s.name.rpartition(".")
        module = model.get_submodule(path)
        if isinstance(getattr(module, leaf), nn.Parameter):
            parts[f"{type(module).__name__}.{leaf} {s.role}"] += 1
    found = [f"{count} x {part}" if count > 1 else part for part, count in sorted(parts.items())]
    return f"{group.kind}: {', '.join(found)}"


@register
@dataclass
class Isomorphic(Spa):
    """|w·∂L/∂w| of coupled weights, ranked within each kind of sub-structure; each kind loses the same share.

    >>> secateur.prune(net, image, method="isomorphic", target="macs<=50%", data=[(pictures, labels)])  # doctest: +SKIP
    >>> secateur.prune(net, image, method="isomorphic", target="macs<=50%", criterion="l2")  # doctest: +SKIP

    The first is the published one and needs pictures with labels; the second needs no data. Residual streams, the inside of
    blocks, heads and MLPs compete each among themselves, since their scores differ for reasons other than importance.
    """

    criterion: str = field(
        default="snip",
        metadata={
            "help": f"of single weights: {', '.join(CRITERIA)}; snip is |w·g|, the paper's",
            "choices": tuple(CRITERIA),
        },
    )

    kinds: ClassVar[tuple[str, ...] | None] = Spa.kinds
    allocation: ClassVar[str] = "per-kind"
    share_of: ClassVar[str] = "units"
    info = record("isomorphic")

    def ranked_with(self, group: Group, context: Context) -> str:
        return structure(context.model, group)
