"""DependencyViT-Lite: tokens that have stopped sending leave a vision transformer with reversed attention.

Ding et al. 2023, "Visual Dependency Transformers", https://arxiv.org/abs/2304.03282. Spec: dependency-vit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from secateur.errors import SecateurError, require
from secateur.families.reversed_vit import Block, Messages, ReversedVit
from secateur.method import register
from secateur.pruning.plan import Plan
from secateur.skipping.alive import drawn, gather_columns, pack
from secateur.skipping.attached import Skipping
from secateur.skipping.work import block_macs, weights_of
from secateur.taxonomy import record
from secateur.tokens.select import top_per_row
from secateur.training.job import Job
from secateur.training.skip import SkipMethod
from secateur.training.task import Task

PLACES = (2 / 12, 5 / 12, 8 / 12, 11 / 12)
"""Where tokens leave, of the depth: behind the attention of blocks 2, 5, 8 and 11 of 12."""


def stage_counts(tokens: int, stages: int, r: float) -> list[int]:
    """How many tokens are left after each stage.

    >>> stage_counts(196, 4, 0.16)
    [164, 132, 100, 69]

    r: the share of the first count that leaves at a stage. Raises `SecateurError` where nothing would be left.
    """
    if stages * r >= 1:
        raise SecateurError(
            f"{stages} stages of {r:g} leave no token",
            where="r",
            fix=f"give less than {1 / stages:g}, or fewer blocks",
        )
    counts = [tokens]
    for stage in range(1, stages + 1):
        counts.append(math.floor(counts[-1] * (1 - stage * r) / (1 - (stage - 1) * r) + 1e-9))
    return counts[1:]


@register
@dataclass
class DependencyVit(SkipMethod):
    """Leaves of the dependency tree, which hardly send anything, leave between attention and MLP; the network learns with it on.

    >>> pruned = secateur.train_prune(load_task("digits-dependency-vit"), method="dependency-vit")  # doctest: +SKIP
    >>> with secateur.attach(pruned.model, "dependency-vit", r=0.2) as attached:  # doctest: +SKIP
    ...     logits = pruned.model(pictures)

    A softmax transformer can't be converted: the operator (`families.reversed_vit`) is trained from the start.

    Reconstructed: no code was published, and whether tokens are ranked by what they send, as the abstract has it, or by what they
    receive, as a third-party implementation does, isn't known: `score`. The bias of the message controllers, which
    begins at 2, is this library's. "random" is the control: drawn anew for each picture and stage.
    """

    info = record("dependency-vit")
    starts: ClassVar[str] = "init"
    everything: ClassVar[Mapping[str, Any]] = {"r": 0.0}
    shown_on: ClassVar[str] = "digits-dependency-vit"

    r: float = field(
        default=0.16,
        metadata={"help": "share of the first number of tokens that leaves at a stage", "min": 0, "below": 1},
    )
    blocks: tuple[int, ...] = field(
        default=(),
        metadata={"help": "where, counted from 1; none: at 2, 5, 8 and 11 twelfths of the depth", "min": 1},
    )
    score: str = field(
        default="sent", metadata={"help": "what ranks tokens", "choices": ("sent", "received", "random")}
    )
    draw: int = field(default=0, metadata={"help": "which draw of the random score"})

    def prune(self, job: Job) -> Plan:
        with self.attach(job.model) as attached:
            job.train("lite")
            job.note(quality=job.quality(), work=attached.work.share.mean().item())
        return job.plan()

    def attach(self, model: nn.Module, masked: bool = False) -> Skipping:
        if not isinstance(model, ReversedVit):
            raise SecateurError(
                f"{type(model).__name__} has no reversed attention",
                where="attach",
                fix="train a families.reversed_vit.ReversedVit; other attention can't be converted",
            )
        depth = len(model.blocks)
        blocks = self.blocks or tuple(sorted({math.ceil(depth * place) for place in PLACES}))
        require(
            max(blocks) <= depth and len(set(blocks)) == len(blocks),
            f"there are no blocks {', '.join(map(str, blocks))} among {depth}",
            where="blocks",
            fix=f"different numbers from 1 to {depth}",
        )
        counts = dict(zip(sorted(blocks), stage_counts(model.tokens, len(blocks), self.r)))
        require(min(counts.values()), "the last stage leaves no token", where="r", fix="give less")
        attached = Skipping(model, self.name)
        now, generator = model.tokens, torch.Generator().manual_seed(self.draw)

        def skip(number: int, tokens: Messages) -> Messages:
            nonlocal now
            if number == 1:
                attached.work.clear()
                now = model.tokens
            before, now = now, counts.get(number, now)
            block = model.blocks[number - 1]
            assert isinstance(block, Block)
            attached.work.add(
                *(_macs(block, len(tokens.x), a, b) for a, b in ((before, now), (model.tokens,) * 2))
            )
            return tokens if now == before else self.keep(tokens, self.scores(tokens, generator), now, masked)

        attached.put(model, "skip", skip)
        return attached

    def keep(self, tokens: Messages, scores: Tensor, count: int, masked: bool = False) -> Messages:
        """The `count` tokens with the highest scores [B, n]; of equal scores the one that comes first."""
        stays = top_per_row(scores, count, tokens.alive)
        if masked:
            return replace(tokens, alive=stays)
        index, _ = pack(stays)
        short = {name: getattr(tokens, name).gather(1, index) for name in ("log_m", "received", "positions")}
        return replace(tokens, x=gather_columns(tokens.x, index), **short)

    def scores(self, tokens: Messages, generator: torch.Generator) -> Tensor:
        """[B, n], higher stays."""
        if self.score == "random":
            return drawn(tokens.positions, tokens.length, generator)
        return tokens.log_m if self.score == "sent" else tokens.received

    @classmethod
    def example(cls) -> Task:
        return Task(
            "tiny",
            build=lambda: ReversedVit(image=8, patch=2, channels=1, width=16, depth=4, heads=2, scale=0.5),
            train=(
                torch.randn(16, 1, 8, 8, generator=torch.Generator().manual_seed(0)),
                torch.arange(16) % 10,
            ),
            inputs=torch.zeros(1, 1, 8, 8),
        )


def _macs(block: Block, pictures: int, before: int, behind: int) -> Tensor:
    """[B]: multiply-adds of a block of which so many tokens attend, and so many go through the MLP."""
    attention = block_macs(block.attention, torch.tensor(before), block.norm1.normalized_shape[0])
    return (attention + behind * weights_of(block.mlp)).expand(pictures)
