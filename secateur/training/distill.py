"""Distillation: the pruned model learns from what the dense one says, beside the data."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secateur.errors import SecateurError
from secateur.training.fit import next_token_loss
from secateur.utils.running import call, logits_of
from secateur.utils.types import Objective


def distillation(
    teacher: nn.Module, *, weight: float = 0.5, temperature: float = 2.0, hidden: float = 0.0
) -> Objective:
    """A loss for `fit`: (1 - weight) * the data's loss + weight * KL to the teacher (+ hidden * distance of states).

    >>> fit(student, token_ids, steps=100, loss=distillation(dense, weight=1.0))  # doctest: +SKIP

    weight: 0 is the data alone, 1 the teacher alone. temperature: both distributions are softened by it.
    hidden: weight of the mean squared distance between hidden states, each scaled by the teacher's mean square;
    layers are matched by their relative depth. It needs a transformers model and an unchanged hidden width.
    The teacher is put in eval mode.

    Hinton, Vinyals, Dean 2015, arXiv 1503.02531. Raises `SecateurError` when a value is out of range, or when the two
    models' logits or states don't have the same width.
    """
    if not 0 <= weight <= 1:
        raise SecateurError(f"{weight} is outside 0..1", where="distillation weight", fix="such as 0.5")
    if temperature <= 0:
        raise SecateurError(f"{temperature} isn't above 0", where="temperature", fix="such as 2.0")
    teacher.eval()
    options = {"output_hidden_states": True} if hidden else {}

    def objective(student: nn.Module, batch: Any) -> Tensor:
        if student is teacher:
            raise SecateurError(
                "the teacher is the student", where="distillation", fix="keep a copy of the dense model"
            )
        inputs, labels = split_batch(batch)
        plain = {k: v for k, v in inputs.items() if k != "labels"} if isinstance(inputs, dict) else inputs
        mask = inputs.get("attention_mask") if isinstance(inputs, dict) else None
        with torch.no_grad():
            told = _run(teacher, plain, options)
        said = _run(student, inputs if weight < 1 else plain, options)
        wanted, got = logits_of(told), logits_of(said)
        if wanted.shape != got.shape:
            raise SecateurError(
                f"the teacher gives {list(wanted.shape)}, the student {list(got.shape)}",
                where="distillation",
                fix="use the dense model of the same task as the teacher",
            )
        loss = weight * soft_kl(got, wanted, temperature, mask)
        if weight < 1:
            if labels is not None:
                own = F.cross_entropy(got.float(), labels)
            elif "labels" in inputs:
                own = said.loss
            else:
                own = next_token_loss(got, inputs["input_ids"], mask)
            loss = loss + (1 - weight) * own
        if hidden:
            loss = loss + hidden * hidden_distance(said.hidden_states, told.hidden_states, mask)
        return loss

    return objective


def soft_kl(student: Tensor, teacher: Tensor, temperature: float = 1.0, mask: Tensor | None = None) -> Tensor:
    """temperature**2 * KL(teacher || student) of softened logits [..., classes], averaged over what mask [...] keeps."""
    log_p = F.log_softmax(teacher.float() / temperature, -1)
    log_q = F.log_softmax(student.float() / temperature, -1)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)
    return temperature**2 * _mean(kl, mask)


def hidden_distance(
    student: tuple[Tensor, ...], teacher: tuple[Tensor, ...], mask: Tensor | None = None
) -> Tensor:
    """Mean over the student's states [b, t, width] of |s - t|**2 / |t|**2, t the teacher's state at the same depth."""
    total = student[0].new_zeros((), dtype=torch.float32)
    for i, state in enumerate(student):
        other = teacher[round(i * (len(teacher) - 1) / max(1, len(student) - 1))]
        if state.shape != other.shape:
            raise SecateurError(
                f"hidden states are {state.shape[-1]} wide, the teacher's {other.shape[-1]}",
                where="distillation",
                fix="leave hidden at 0 when the hidden width was cut",
            )
        distance = (state.float() - other.float()).square().mean(-1)
        scale = other.float().square().mean(-1).clamp_min(1e-6)
        total = total + _mean(distance / scale, mask)
    return total / len(student)


def split_batch(batch: Any) -> tuple[Any, Tensor | None]:
    """(what the model takes, labels of a pair (x, labels)): ids and dicts of inputs carry their own."""
    if isinstance(batch, Tensor):
        return {"input_ids": batch}, None
    if isinstance(batch, tuple | list) and len(batch) == 2:
        return batch[0], batch[1]
    if hasattr(batch, "keys") and ("input_ids" in batch or "labels" in batch):
        return dict(batch), None
    raise SecateurError(
        f"a {type(batch).__name__} can't be distilled on",
        where="data",
        fix="token ids, (x, labels), or a dict of inputs",
    )


def _run(model: nn.Module, inputs: Any, options: dict[str, Any]) -> Any:
    return model(**inputs, **options) if isinstance(inputs, dict) else call(model, inputs)


def _mean(values: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None or mask.shape != values.shape:
        return values.mean()
    keep = mask.to(values.dtype)
    return (values * keep).sum() / keep.sum().clamp_min(1)
