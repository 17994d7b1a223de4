"""The dependency tree of reversed attention as a map: each patch with what hangs on it.

Ding et al. 2023, "Visual Dependency Transformers", https://arxiv.org/abs/2304.03282. Spec: dependency-vit.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from secateur.errors import SecateurError
from secateur.families.reversed_vit import ReversedVit
from secateur.method import register
from secateur.saliency.method import Drawn, SaliencyMethod
from secateur.saliency.record import as_targets
from secateur.taxonomy import record
from secateur.utils.running import evaluating


def parents_of(mask: Tensor) -> Tensor:
    """[B, n] int64, the parent of each token; of a root, its own number.

    >>> parents_of(torch.tensor([[[0.1, 0.0, 0.1], [0.2, 0.1, 0.1], [0.0, 0.3, 0.2]]]))
    tensor([[1, 2, 2]])

    mask: [B, receiver, sender]. The parent is who receives most of what a token sends, of equals the first. Where that leads in a
    circle, the member that receives most in all becomes a root (of equals the first).
    """
    count = mask.shape[1]
    places = torch.arange(count, device=mask.device)
    parents = torch.where(mask == mask.amax(1, keepdim=True), places[:, None], count).amin(1)
    received, found = mask.sum(2).tolist(), parents.tolist()
    for parent, mass in zip(found, received):
        state = [0] * count  # 0 not seen, 1 on this way, 2 leads to a root
        for token in range(count):
            way = []
            while not state[token]:
                state[token] = 1
                way.append(token)
                token = parent[token]
            if state[token] == 1:
                circle = way[way.index(token) :]
                root = max(circle, key=lambda i: (mass[i], -i))
                parent[root] = root
            for passed in way:
                state[passed] = 2
    return torch.tensor(found, device=mask.device)


def hanging(parents: Tensor, values: Tensor) -> Tensor:
    """[B, n]: the values [B, n] of each token and of all below it in the tree, added up.

    >>> hanging(torch.tensor([[1, 2, 2]]), torch.ones(1, 3))
    tensor([[1., 2., 3.]])
    """
    total, at = values.clone(), torch.arange(values.shape[1], device=values.device).expand_as(parents)
    for _ in range(values.shape[1]):
        above = parents.gather(1, at)
        total = total.scatter_add(1, above, values * (above != at))
        if torch.equal(above, at):
            break
        at = above
    return total


@register
@dataclass
class DependencyTree(SaliencyMethod):
    """How much of what is sent hangs on each patch in the dependency tree; a network with reversed attention, and any class.

    >>> found = secateur.saliency(vit, picture, method="dependency-tree")  # doctest: +SKIP

    The tree is of the parts of a picture and blind to the class. A map of messages alone says which patches still send.

    Reconstructed: from which block the tree is read, how circles are broken, and that patches are weighed by what hangs on them.
    """

    info = record("dependency-tree")
    shown_on: ClassVar[str] = "cifar-dependency-vit"

    layers: str = field(
        default="last", metadata={"help": "the last block, or the mean of all", "choices": ("last", "mean")}
    )
    of: str = field(
        default="tree",
        metadata={
            "help": "tree: messages of all that hangs on a patch; sent: its own; received: what arrives at it",
            "choices": ("tree", "sent", "received"),
        },
    )

    def draw(self, model: nn.Module, image: Tensor, target: Any) -> Drawn:
        if not isinstance(model, ReversedVit):
            raise SecateurError(
                f"{type(model).__name__} has no reversed attention",
                where="dependency-tree",
                fix="give a families.reversed_vit.ReversedVit",
            )
        with evaluating(model), torch.no_grad():
            targets, masks = as_targets(target, model(image)), model.dependencies(image)
        mask = masks[-1] if self.layers == "last" else torch.stack(masks).mean(0)
        sent = mask.sum(1)
        values = {
            "tree": lambda: hanging(parents_of(mask), sent),
            "sent": lambda: sent,
            "received": lambda: mask.sum(2),
        }[self.of]()
        side = round(model.tokens**0.5)
        names = range(len(masks)) if self.layers == "mean" else (len(masks) - 1,)
        return Drawn(values.unflatten(1, (side, side)), targets, tuple(f"blocks.{i}" for i in names))

    @classmethod
    def example(cls) -> nn.Module:
        return ReversedVit(image=16, patch=4, width=16, depth=2, heads=2, classes=5, scale=0.5)
