"""LMD-ViT: windows of a picture that a small predictor finds sharp skip attention and feed-forward.

Li et al. 2024, "Adaptive Window Pruning for Efficient Local Motion Deblurring", https://arxiv.org/abs/2306.14268. Spec: lmd-vit.

Reconstructed: the weight of the pruning loss and the optimiser, which the authors' release doesn't have. Left out are their minimum over
small shifts of the target and the weighting of the reconstruction by the mask. What the network adds is gated by max(sigmoid(g), 0.1), as
theirs is; below the floor the maximum gives g no gradient, and in training here the gate closes down to it (docs/results.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secateur.errors import SecateurError
from secateur.families.windowed import Choose, Stage, WindowBlock, WindowedUNet, pad_around
from secateur.method import register
from secateur.pruning.plan import Plan
from secateur.skipping.attached import Skipping
from secateur.skipping.windows import unpartition, window_means
from secateur.skipping.work import block_macs, weights_of
from secateur.taxonomy import record
from secateur.training.job import Job
from secateur.training.losses import reconstruction
from secateur.training.recipe import Recipe
from secateur.training.skip import SkipMethod
from secateur.training.task import Task


def decide(scores: Tensor, side: int, shift: int = 0, threshold: float = 0.5, draw: bool = False) -> Tensor:
    """[M] of 0 and 1, the windows that are worked on, from logits (keep, drop) of every place [B, H, W, 2].

    >>> decide(torch.tensor([1.0, -1.0]).expand(1, 2, 2, 2), 2).tolist(), decide(torch.zeros(1, 2, 2, 2), 2).tolist()
    ([1.0], [0.0])

    The logits are averaged over a window, not the probabilities; equal ones drop it. draw: with Gumbel noise from torch's global
    random state, and gradients as if the probability were the answer.
    """
    logits = window_means(scores, side, shift)
    if not draw:
        return (logits.softmax(-1)[:, 0] > threshold).float()
    noise = -torch.empty_like(logits).exponential_().log()
    soft = (logits + noise).softmax(-1)[:, 0]
    return (soft.detach() > 0.5).float() + (soft - soft.detach())  # exactly 0 or 1


def pruning_loss(scores: Tensor, blurred: Tensor) -> Tensor:
    """Cross-entropy of the logits [B, H, W, 2] of every place, keep where the mask [B, h, w], resized, is blurred."""
    small = F.interpolate(blurred[:, None].float(), scores.shape[1:3], mode="area")[:, 0]
    return F.cross_entropy(scores.permute(0, 3, 1, 2), (small < 0.5).long())


class Windows(Skipping):
    """A network that works on some windows. `scores`: what each predictor said of the last pictures, [B, H, W, 2].

    `active`: bool [B, H, W] for each predictor, the places whose windows were worked on.
    """

    scores: list[Tensor]
    active: list[Tensor]


@register
@dataclass
class LmdVit(SkipMethod):
    """A predictor scores every place of a feature map; windows of a mean score for dropping pass through untouched.

    >>> pruned = secateur.train_prune(load_task("blur"), method="lmd-vit")  # doctest: +SKIP
    >>> with secateur.attach(pruned.model, "lmd-vit") as attached:  # doctest: +SKIP
    ...     restored = pruned.model(blurred)
    >>> attached.active[0]  # where it worked  # doctest: +SKIP

    A `secateur.families.windowed.WindowedUNet` has the predictors, one for unshifted and one for shifted windows of each stage. The
    network and they are trained together, on (blurred, sharp, mask of what is blurred); masks aren't needed to run it.
    """

    threshold: float = field(
        default=0.5,
        metadata={"help": "probability above which a window is kept; 0: all are", "min": 0, "below": 1},
    )
    weight: float = field(default=0.1, metadata={"help": "of the pruning loss", "min": 0})

    stages: tuple[int, ...] = field(
        default=(), metadata={"help": "the stages, from 0, in which windows are skipped; default: all"}
    )

    info = record("lmd-vit")
    everything: ClassVar[Mapping[str, Any]] = {"threshold": 0.0}
    starts: ClassVar[str] = "init"
    shown_on: ClassVar[str] = "blur"

    def attach(self, model: nn.Module, masked: bool = False) -> Windows:
        stages = [module for module in model.modules() if isinstance(module, Stage)]
        if not stages:
            raise SecateurError(
                f"{type(model).__name__} has no stages of windows",
                where="attach lmd-vit",
                fix="a network of secateur.families.windowed.Stage, such as WindowedUNet",
            )
        chosen = tuple(self.stages) or tuple(range(len(stages)))
        if unknown := [number for number in chosen if not 0 <= number < len(stages)]:
            raise SecateurError(
                f"there is no stage {unknown[0]}", where="lmd-vit.stages", fix=f"0 to {len(stages) - 1}"
            )
        attached = Windows(model, self.name)
        attached.scores, attached.active = [], []
        original = model.forward

        def forward(picture: Tensor) -> Tensor:
            attached.scores, attached.active = [], []
            attached.work.clear()
            return original(picture)

        attached.put(model, "forward", forward)
        for number, stage in enumerate(stages):
            attached.put(stage, "choose", self._choose(attached, stage, number not in chosen))
            attached.put(stage, "masked", masked)
        return attached

    def _choose(self, attached: Windows, stage: Stage, dense: bool) -> Choose:
        policies: dict[int, Tensor] = {}

        def choose(number: int, x: Tensor) -> Tensor | None:
            (batch, height, width, channels), block = x.shape, stage.blocks[number]
            assert isinstance(block, WindowBlock)
            area, policy = block.side**2, None
            if not dense and (self.threshold > 0 or stage.training):
                if number < len(stage.predictors):
                    predictor = stage.predictors[number]
                    scores = predictor(x)
                    policies[number] = decide(scores, block.side, block.shift, self.threshold, stage.training)
                    attached.scores.append(scores)
                    attached.active.append(
                        _places(policies[number] > 0, height, width, block.side, block.shift)
                    )
                    cost = torch.full((batch,), height * width * weights_of(predictor), device=x.device)
                    attached.work.add(cost, cost * 0)
                policy = policies[number % 2].to(x.dtype)
            each = block_macs(block, torch.tensor(area, device=x.device), channels)
            whole = torch.full((batch,), height * width // area, device=x.device)
            done = whole if policy is None else (policy.detach() > 0).view(batch, -1).sum(1)
            attached.work.add(done * each, whole * each)
            return policy

        return choose

    def prune(self, job: Job) -> Plan:
        check_masks(job.task)
        multiple = getattr(job.model, "multiple", 1)  # a network that pads its pictures says to what

        def loss(model: nn.Module, batch: Any) -> Tensor:
            blurred, sharp, mask = batch
            made = reconstruction(model(blurred), sharp)
            mask = pad_around(mask[:, None].float(), multiple)[0][:, 0]
            return made + self.weight * sum(pruning_loss(scores, mask) for scores in attached.scores)

        with self.attach(job.model, masked=True) as attached:
            job.train("windows", loss=loss)
        with self.attach(job.model) as attached:
            quality = job.quality()
            job.note(phase="pruned", quality=quality, work=None if quality is None else attached.work.mean)
        return job.plan()

    @classmethod
    def example(cls) -> Task:
        """Noise, of which a corner is to be made smooth."""
        sharp = torch.rand(8, 3, 16, 16, generator=torch.Generator().manual_seed(0))
        mask = torch.zeros(8, 16, 16, dtype=torch.bool)
        mask[:, :8, :8] = True
        blurred = torch.where(mask[:, None], F.avg_pool2d(sharp, 3, 1, 1), sharp)

        def build() -> nn.Module:
            return balanced(WindowedUNet(8, (2, 1, 2), (1, 2, 2), side=4), blurred)

        recipe = Recipe(lr=1e-3, batch=4, warmup=0)
        return Task("corner", build, (blurred, sharp, mask), inputs=blurred[:1], recipe=recipe)


@torch.no_grad()
def balanced(net: nn.Module, pictures: Tensor) -> nn.Module:
    """An untrained network that adds something, and whose predictors keep some windows of these pictures and drop others, for checks."""
    for module in net.modules():
        if isinstance(module, WindowedUNet):
            module.write.reset_parameters()
    predictors = [each for stage in net.modules() if isinstance(stage, Stage) for each in stage.predictors]
    for number, predictor in enumerate(predictors):
        predictor.score[-1].weight.mul_(30)  # type: ignore[index, union-attr]
        with LmdVit().attach(net) as attached:
            net(pictures)
        predictor.score[-1].bias.sub_(attached.scores[number].mean((0, 1, 2)))  # type: ignore[index, union-attr]
    return net


def _places(active: Tensor, height: int, width: int, side: int, shift: int) -> Tensor:
    """Windows bool [M] -> the places that are theirs, bool [B, H, W]."""
    spread = active.view(-1, 1, 1).expand(-1, side * side, 1)
    return unpartition(spread, height, width, side, shift)[..., 0]


def check_masks(task: Task) -> None:
    """Raises `SecateurError` where a task's data aren't (blurred, sharp, mask) of one size."""
    parts = task.train if isinstance(task.train, tuple) else ()
    if len(parts) != 3 or parts[1].shape != parts[0].shape or parts[2].shape != parts[0][:, 0].shape:
        raise SecateurError(
            f"its data are {', '.join(str(list(part.shape)) for part in parts) or type(task.train).__name__}",
            where=f"task {task.name}",
            fix="(blurred [N, 3, h, w], sharp [N, 3, h, w], mask [N, h, w]) of one size",
        )
