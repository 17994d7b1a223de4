"""DToP: patches that an early head is sure of leave a segmenting vision transformer; what was said of them is final.

Tang et al. 2023, "Dynamic Token Pruning in Plain Vision Transformers for Semantic Segmentation",
https://arxiv.org/abs/2308.01045. Spec: dtop.

Differs from the authors' code: a batch is padded or masked instead of run picture by picture, and the states of patches that left
stay as they were where the code holds zeros; neither is read again. The last head lets nothing go.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secateur.errors import SecateurError
from secateur.families.segmenter import Segmenter, TokenHead, on_living
from secateur.families.vit import Vit
from secateur.method import register
from secateur.pruning.plan import Plan
from secateur.skipping.alive import write
from secateur.skipping.attached import Skipping
from secateur.skipping.blocks import skip_blocks
from secateur.taxonomy import record
from secateur.training.job import Job
from secateur.training.losses import mask_losses
from secateur.training.recipe import Recipe
from secateur.training.skip import SkipMethod
from secateur.training.task import Task

NOBODY = -100
"""The label of pixels that don't count."""


def leaving(probabilities: Tensor, alive: Tensor, p0: float, k: int) -> Tensor:
    """bool [B, n] of the patches that leave: surer than p0, but for the k surest of each class.

    >>> p = torch.tensor([[[0.97, 0.01], [0.95, 0.02], [0.50, 0.50], [0.01, 0.99]]])
    >>> leaving(p, torch.ones(1, 4, dtype=torch.bool), p0=0.9, k=1).tolist()
    [[False, True, False, False]]

    probabilities: [B, n, C]. Where two classes are alike the first counts, where two patches are, the first stays.
    """
    sure, classes = probabilities.amax(-1), probabilities.shape[-1]
    numbers = torch.arange(classes, device=sure.device)
    guess = numbers.expand_as(probabilities).masked_fill(probabilities < sure[..., None], classes).amin(-1)
    leave = alive & (sure > p0)
    order = sure.masked_fill(~leave, -torch.inf).argsort(dim=1, descending=True, stable=True)
    each = F.one_hot(guess.gather(1, order), classes) * leave.gather(1, order)[..., None]
    rank = (each.cumsum(1) * each).sum(-1)  # 1 for the surest of a class, 0 for those that stay anyway
    return torch.zeros_like(leave).scatter(1, order, rank > k)


class Exits(Skipping):
    """A segmenter that lets patches go. `said`: what each stage made of the last pictures, (canvas [B, n, C], presence).

    `alive`: bool [B, n] after each stage but the last.
    """

    said: list[tuple[Tensor, Tensor | None]]
    alive: list[Tensor]


@register
@dataclass
class DToP(SkipMethod):
    """Behind some blocks a head classifies every patch; those it is surer of than p0 leave, the k surest of each class stay.

    >>> with secateur.attach(segmenter, "dtop", p0=0.95, k=5) as attached:  # doctest: +SKIP
    ...     classes = segmenter(pictures).argmax(1)
    >>> attached.work.share  # doctest: +SKIP

    A `secateur.families.segmenter.Segmenter` puts heads on a ViT of timm or transformers. p0 = 1 lets nothing go. Training
    continues on all heads with pruning on: cross-entropy of every stage, or for mask heads presence, focal and dice losses.
    """

    p0: float = field(
        default=0.95, metadata={"help": "how sure is sure enough; 1: nothing leaves", "above": 0, "max": 1}
    )
    k: int = field(
        default=5, metadata={"help": "the surest patches of each class that stay as context", "min": 0}
    )
    stages: tuple[int, ...] = field(
        default=(),
        metadata={"help": "blocks (from 0) behind which patches leave; default: those with a head"},
    )

    info = record("dtop")
    quick: ClassVar[Mapping[str, Any]] = {"p0": 0.6, "k": 1}
    everything: ClassVar[Mapping[str, Any]] = {"p0": 1.0}
    shown_on: ClassVar[str] = "salient-patches"

    def leaving(self, probabilities: Tensor, alive: Tensor) -> Tensor:
        return leaving(probabilities, alive, self.p0, self.k)

    def attach(self, model: nn.Module, masked: bool = False) -> Exits:
        if not isinstance(model, Segmenter):
            raise SecateurError(
                f"{type(model).__name__} has no heads between its blocks",
                where="attach dtop",
                fix="put them on it: secateur.families.segmenter.Segmenter(vit, heads, stages)",
            )
        last = model.stages[-1]
        if len(model.stages) == 1:
            raise SecateurError(
                "its only head is at its end, so that no patch could leave",
                where="attach dtop",
                fix="a Segmenter with heads behind earlier blocks too",
            )
        early = tuple(self.stages) or model.stages[:-1]
        if unknown := [n for n in early if n not in model.stages[:-1]]:
            raise SecateurError(
                f"there is no early head behind block {unknown[0]}",
                where="dtop.stages",
                fix=f"some of {', '.join(map(str, model.stages[:-1]))}",
            )
        attached = Exits(model, self.name)
        attached.said, attached.alive = [], []
        heads = dict(zip(model.stages, model.heads, strict=True))

        def after(number: int, x: Tensor, alive: Tensor) -> Tensor:
            if number != last and (number not in early or self.p0 == 1):
                return alive
            head, live = heads[number], alive[:, model.prefix :]
            logits, presence = on_living(head, x[:, model.prefix :], live, masked)
            canvas = write(attached.said[-1][0], logits, live) if attached.said else logits
            attached.said.append((canvas, presence))
            whole = head.macs(torch.full_like(live.sum(1), live.shape[1])) * (number == last)  # type: ignore[operator]
            attached.work.add(head.macs(live.sum(1)), whole)  # type: ignore[operator]
            if number == last:
                return alive
            with torch.no_grad():
                leave = self.leaving(head.probabilities(logits, presence), live)  # type: ignore[operator]
            attached.alive.append(live & ~leave)
            return torch.cat([alive[:, : model.prefix], live & ~leave], 1)

        def forward(x: Tensor) -> Tensor:
            attached.said, attached.alive = [], []
            model.backbone(x)
            return model.enlarged(*attached.said[-1], x)

        attached.put(model, "forward", forward)
        skip_blocks(attached, model.blocks, after, model.prefix, masked)
        return attached

    def prune(self, job: Job) -> Plan:
        check_labels(job.task)

        def loss(model: nn.Module, batch: Any) -> Tensor:
            model(batch[0])
            inner: Any = job.model
            each = [stage_loss(inner, *said, batch) for said in attached.said]
            return torch.stack(each).mean()

        with self.attach(job.model, masked=True) as attached:
            job.train(
                "pruning on", loss=loss, parameters=[p for p in job.model.parameters() if p.requires_grad]
            )
        with self.attach(job.model) as attached:
            quality = job.quality()
            job.note(phase="pruned", quality=quality, work=None if quality is None else attached.work.mean)
        return job.plan()

    @classmethod
    def example(cls) -> Task:
        """Noise on a bright or a dark half, 8 x 8 pixels, 16 patches."""
        generator = torch.Generator().manual_seed(0)
        labels = (torch.arange(8)[:, None] + torch.arange(8) * 0 >= torch.arange(8)[:, None, None]).long()
        pictures = torch.randn(8, 3, 8, 8, generator=generator) + 3 * labels[:, None]

        def build() -> nn.Module:
            vit = Vit(size=8, patch=2, width=16, depth=3, heads=2)
            return Segmenter(vit, [TokenHead(16, 2) for _ in range(3)], (0, 1, 2), "blocks", 1)

        recipe = Recipe(lr=1e-2, batch=4, warmup=0)
        return Task("halves", build, (pictures, labels), inputs=pictures[:1], recipe=recipe)


def stage_loss(
    model: Segmenter, canvas: Tensor, presence: Tensor | None, batch: tuple[Tensor, Tensor]
) -> Tensor:
    """The loss of one stage, for labels int64 [B, H, W] with -100 where none is."""
    x, labels = batch
    logits = model.enlarged(canvas, None, x)
    if presence is None:
        return F.cross_entropy(logits, labels, ignore_index=NOBODY)
    return mask_losses(logits, presence, labels, NOBODY)


def check_labels(task: Task) -> None:
    """Raises `SecateurError` for labels of another size than the pictures, and pictures in which no pixel has a class."""
    pictures, labels = task.train
    if labels.ndim != 3 or labels.shape[-2:] != pictures.shape[-2:]:
        raise SecateurError(
            f"labels {list(labels.shape)} for pictures {list(pictures.shape)}",
            where=f"task {task.name}",
            fix="a label for every pixel: int64 [N, height, width]",
        )
    empty = (labels == NOBODY).flatten(1).all(1)
    if bool(empty.any()):
        raise SecateurError(
            f"no pixel of picture {int(empty.nonzero()[0])} has a class",
            where=f"task {task.name}",
            fix="leave such pictures out",
        )
