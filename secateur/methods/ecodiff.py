"""EcoDiff: one mask over heads and neurons, learned so that the final drawing stays what it was.

Zhang et al. 2024, "Effortless Efficiency: Low-Cost Pruning of Diffusion Models", https://arxiv.org/abs/2412.02852.
Spec: ecodiff.

Differs from the published code: one draw of the gates a step is multiplied into the weights (there, each module draws its
own at every call); a step that is run again on the way back has the random numbers it had; the regulariser of a group that
can't be cut isn't counted; `ratio` 0 is refused by the budget, where the code keeps nearly everything; AdaLN outputs are
no kind of unit here; hidden units of the embedders of time and prompt are gated as neurons, where the code leaves them whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from secateur.errors import SecateurError
from secateur.gates import HardConcrete
from secateur.method import register
from secateur.pruning.plan import Plan
from secateur.taxonomy import record
from secateur.training.job import Job
from secateur.training.method import TrainMethod
from secateur.training.sampling import Sampler, draw, sample

PENALTIES = ("l1", "sigmoid", "l0")


def regulariser(laws: Sequence[HardConcrete], kind: str = "l1") -> Tensor:
    """Mean over modules of the mean |v| over their units: v is lambda, or sigmoid(0.4 lambda + 1); "l0": the expected count.

    >>> a, b = HardConcrete(3), HardConcrete(4)
    >>> a.logits.data, b.logits.data = torch.tensor([3.0, 1, 2]), torch.tensor([0.5, 2.5, -1, 4])
    >>> regulariser([a, b]).item(), round(regulariser([a, b], "sigmoid").item(), 6)
    (2.0, 0.829994)
    """
    if kind == "l0":
        return torch.stack([law.keep().sum() for law in laws]).mean()
    values = [torch.sigmoid(0.4 * law.logits + 1) if kind == "sigmoid" else law.logits for law in laws]
    return torch.stack([value.abs().mean() for value in values]).mean()


@register
@dataclass
class EcoDiff(TrainMethod):
    """Gates over heads and neurons are trained through all steps of the sampler, on drawings of the model's own.

    >>> secateur.train_prune(load_task("mnist-dit"), method="ecodiff", target="80%", steps=100)  # doctest: +SKIP

    The network itself isn't trained. Memory doesn't grow with the number of steps. A kind's units compete over all modules
    (`allocation="uniform"`: inside each, "local" in the paper). `match="step"` compares single steps from the dense
    model's states instead of the final drawing: what the paper is ahead of.
    """

    samples: int = field(default=100, metadata={"help": "drawings of the dense model to match", "min": 1})
    batch: int = field(default=4, metadata={"help": "drawings in a step of the gates", "min": 1})
    beta_reg: float = field(
        default=0.01,
        metadata={"help": "weight of the regulariser (published: 0.5 SDXL, 0.01 FLUX)", "min": 0},
    )
    penalty: str = field(default="l1", metadata={"help": ", ".join(PENALTIES), "choices": PENALTIES})
    gate_lr: float = field(default=0.1, metadata={"help": "learning rate of the gates", "above": 0})
    start: float = field(default=3.0, metadata={"help": "first value of each gate's lambda"})
    delta: float = field(default=0.5, metadata={"help": "bound of the gates' noise", "above": 0})
    match: str = field(
        default="final",
        metadata={"help": "what is compared: final drawing, step", "choices": ("final", "step")},
    )

    starts: ClassVar[str] = "trained"
    draws: ClassVar[bool] = True
    removes: ClassVar[str] = "units"
    kinds: ClassVar[tuple[str, ...] | None] = ("heads", "kv_groups", "neurons")
    share_of: ClassVar[str] = "units"
    allocation: ClassVar[str] = "per-kind"
    info = record("ecodiff")

    def prune(self, job: Job) -> Plan:
        sampler = job.task.sampler
        if sampler is None:
            raise SecateurError(
                "it needs a model that draws in steps",
                where=self.name,
                fix="a task with a sampler, such as mnist-dit, or a pipeline of diffusers",
            )
        if self.match == "step" and sampler.steps == 1:
            raise SecateurError(
                "the sampler can't be run step by step", where="match", fix="compare the final drawing"
            )
        if not job.trained:
            job.train("dense")
        context = job.context()
        law = lambda group: HardConcrete(group.size, self.start, delta=self.delta)
        gated = job.gated(context, law, train_model=False)
        laws = {name: made for name, made in gated.by_group().items() if isinstance(made, HardConcrete)}
        heads = [name for name in laws if gated.groups[name].kind != "neurons"]
        kinds = [names for names in (heads, [name for name in laws if name not in heads]) if names]

        def penalty(model: nn.Module, batch: Any) -> Tensor:
            parts = [regulariser([laws[name] for name in names], self.penalty) for names in kinds]
            return self.beta_reg * torch.stack(parts).sum()

        job.train(
            "gates",
            model=gated,
            parameters=[{"params": [*gated.laws.parameters()], "lr": self.gate_lr}],
            loss=self.distance(sampler),
            loss_terms=[penalty],
            data=self.drawings(job, sampler),
            optimizer="adamw",
            lr=self.gate_lr,
            batch=min(self.batch, self.samples),
            lr_schedule="constant",
            clip=0.0,
        )
        job.note(
            penalty=regulariser([*laws.values()], self.penalty).item(),
            lambda_least=min(made.logits.min().item() for made in laws.values()),
            lambda_most=max(made.logits.max().item() for made in laws.values()),
        )
        # a share is that of each kind, as the paper's ratios are
        together = kinds if job.target.kind == "share" else [[*laws]]
        keep: dict[str, Tensor] = {}
        for names in together:
            keep |= context.allocate({name: laws[name].logits.detach() for name in names})
        job.cut(keep)
        return job.plan()

    def drawings(self, job: Job, sampler: Sampler) -> tuple[Tensor, Any, Tensor]:
        """What the gates are trained on: noise, what is asked for, and the dense model's drawings of them."""
        noise, asked = sampler.start(self.samples, job.seed)
        final, _ = draw(job.model, sampler, self.samples, job.seed)
        return noise, asked, final

    def distance(self, sampler: Sampler) -> Any:
        """The loss of a batch: mean squared error of the final drawings, or of each step alone."""

        def final(model: nn.Module, batch: Any) -> Tensor:
            noise, asked, wanted = batch
            return ((sample(model, sampler, noise, asked) - wanted) ** 2).mean()

        def step(model: nn.Module, batch: Any) -> Tensor:
            state, asked, _ = batch
            dense = model.get_submodule("model")
            total = torch.zeros((), device=state.device)
            for number in range(sampler.steps):
                with torch.no_grad():
                    after = sampler.step(dense, state, number, asked)
                total = total + ((sampler.step(model, state, number, asked) - after) ** 2).mean()
                state = after
            return total / sampler.steps

        return final if self.match == "final" else step
