"""ToP-ViM: tokens that a state space model makes little of leave it, and the scan goes on past their places.

Zhan et al. 2024, "Exploring Token Pruning in Vision State Space Models", https://arxiv.org/abs/2409.18962. Spec: top-vim.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from secateur.errors import SecateurError, require
from secateur.families.scan import CONVS, GAPS, Path
from secateur.families.vim import Mixer, Scanned, Vim
from secateur.method import register
from secateur.pruning.plan import Plan
from secateur.skipping.alive import drawn
from secateur.skipping.attached import Skipping
from secateur.skipping.work import weights_of
from secateur.taxonomy import record
from secateur.tokens.select import top_per_row
from secateur.training.job import Job
from secateur.training.skip import SkipMethod
from secateur.training.task import Task

SCORES = ("clipped", "unclipped", "l1", "random")


def odd_count(patches: int, r: float) -> int:
    """How many tokens are left of so many patches, the CLS token among them: odd, so that it has a middle.

    >>> odd_count(196, 0.8), odd_count(156, 0.8), odd_count(124, 0.8)
    (157, 125, 101)
    """
    count = math.ceil(patches * r - 1e-9)
    return min(count + (count % 2 == 0), patches + 1)


def importance(y: Tensor, score: str = "clipped") -> Tensor:
    """[B, n]: what the scans made of each token, summed over the channels of y [B, n, E].

    >>> importance(torch.tensor([[[0.5, -1.0, 2.0], [-0.2, -0.3, -0.1]]])).tolist()
    [[2.5, 0.0]]

    score: "clipped", without what is below 0; "unclipped"; "l1", the sum of absolute values.
    """
    return {"clipped": y.relu, "unclipped": lambda: y, "l1": y.abs}[score]().float().sum(-1)


@register
@dataclass
class TopVim(SkipMethod):
    """Patches by the clipped sum of the scans' output; states decay over the places of those that left.

    >>> with secateur.attach(vim, "top-vim", r=0.7) as attached:  # doctest: +SKIP
    ...     logits = vim(pictures)

    Every few blocks the best patches and the CLS token go on, an odd number. A trained network is tuned with it on. gap: what a
    state decays by at a place whose token has left, see `families.scan.Path`. "identity" with conv="condensed" and cls="middle" is
    naive deletion, as released. score: "random" is the control: drawn anew for each picture and step.

    Reconstructed: the paper's transition over gaps (its kernel wasn't released) is "repeat" by default; the outputs of both
    directions are added before they are clipped.

    Departs from the paper's released code in two defaults, since without tuning they are what alignment comes to (docs/results.md):
    the convolution sees zeros at empty places, and the CLS token keeps its place instead of moving to the middle of what is
    left (where it moves, it moves as little as it can on the path).

    Differs from the released code, which doesn't clip, ranks by the backward output in reversed order, and can choose the CLS
    token twice.
    """

    info = record("top-vim")
    everything: ClassVar[Mapping[str, Any]] = {"r": 1.0}
    shown_on: ClassVar[str] = "digits-vim"

    r: float = field(
        default=0.8, metadata={"help": "share of the patches that stays at a step", "above": 0, "max": 1}
    )
    start: int = field(
        default=0,
        metadata={"help": "the first block behind which patches leave; 0: at 5/24 of the depth", "min": 0},
    )
    apart: int = field(
        default=0, metadata={"help": "blocks from step to step; 0: 5/24 of the depth", "min": 0}
    )
    until: int = field(
        default=0,
        metadata={"help": "no step behind this block or a later one; 0: 20/24 of the depth", "min": 0},
    )
    score: str = field(default="clipped", metadata={"help": "what ranks patches", "choices": SCORES})
    gap: str = field(
        default="repeat", metadata={"help": "how a state passes a place that is empty", "choices": GAPS}
    )
    conv: str = field(
        default="zeros", metadata={"help": "what the convolution sees of empty places", "choices": CONVS}
    )
    cls: str = field(
        default="place",
        metadata={
            "help": "where the CLS token stands: at its place, or in the middle of what is left",
            "choices": ("place", "middle"),
        },
    )
    draw: int = field(default=0, metadata={"help": "which draw of the random score"})

    def prune(self, job: Job) -> Plan:
        if not job.trained:
            job.train("dense")
            job.note(quality=job.quality())
        with self.attach(job.model) as attached:
            job.note(phase="pruned, not tuned", quality=job.quality())
            job.train("tuning")
            job.note(quality=job.quality(), work=attached.work.share.mean().item())
        return job.plan()

    def steps(self, depth: int) -> range:
        """The blocks behind which patches leave, of so many."""
        share = math.ceil(depth * 5 / 24)
        return range(
            self.start or share, min(self.until or math.ceil(depth * 20 / 24), depth), self.apart or share
        )

    def attach(self, model: nn.Module, masked: bool = False) -> Skipping:
        if not isinstance(model, Vim):
            raise SecateurError(
                f"{type(model).__name__} is no two-way Mamba of this library",
                where="attach",
                fix="give a families.vim.Vim",
            )
        depth, total = len(model.blocks), model.patches + 1
        steps = self.steps(depth)
        require(
            steps,
            f"no patch would leave: there are {depth} blocks",
            where="start, until",
            fix="begin earlier",
        )
        attached = Skipping(model, self.name)
        now, generator = total, torch.Generator().manual_seed(self.draw)

        def skip(number: int, tokens: Scanned) -> Scanned:
            nonlocal now
            if number == 1:
                attached.work.clear()
                now = total
            block = model.blocks[number - 1]
            assert isinstance(block, Mixer)
            attached.work.add(*(_macs(block, len(tokens.x), n) for n in (now, total)))
            left = odd_count(now - 1, self.r) if number in steps else now
            if left == now:
                return tokens
            now = left
            stays = top_per_row(self.scores(tokens, generator), left, tokens.path.alive)
            x, path = tokens.path.leave(tokens.x, stays, self.cls == "middle", masked)
            return replace(tokens, x=x, path=path)

        def begin(path: Path) -> Path:
            return replace(path, gap=self.gap, conv=self.conv)

        attached.put(model, "skip", skip)
        attached.put(model, "path", begin)
        return attached

    def scores(self, tokens: Scanned, generator: torch.Generator) -> Tensor:
        """[B, n], higher stays; the CLS token has the highest."""
        path, random = tokens.path, self.score == "random"
        scores = drawn(path.positions, path.length, generator) if random else importance(tokens.y, self.score)
        return scores.masked_fill(path.positions == path.cls[:, None], torch.inf)

    @classmethod
    def example(cls) -> Task:
        return Task(
            "tiny",
            build=lambda: Vim(image=8, patch=2, channels=1, width=16, depth=4, state=4),
            train=(
                torch.randn(16, 1, 8, 8, generator=torch.Generator().manual_seed(0)),
                torch.arange(16) % 10,
            ),
            inputs=torch.zeros(1, 1, 8, 8),
        )


def _macs(block: Mixer, pictures: int, tokens: int) -> Tensor:
    """[B]: multiply-adds of a block on so many tokens: matrices, convolutions, and three for each state of each channel."""
    scan = sum(3 * way.log_a.numel() for way in (block.forth, block.back))
    return torch.tensor(tokens * (weights_of(block) + scan)).expand(pictures)
