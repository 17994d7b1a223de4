"""Distillation against hand computations."""

import copy
import math
from collections.abc import Callable

import pytest
import torch
from torch import nn

from secateur.errors import SecateurError
from secateur.training import distillation, fit
from secateur.training.distill import hidden_distance, soft_kl
from secateur.training.fit import default_loss


def test_soft_kl_by_hand() -> None:
    """Teacher (3/4, 1/4), student (1/2, 1/2): KL = 3/4 ln 3/2 + 1/4 ln 1/2; a temperature of 2 halves the logits."""
    teacher, student = torch.tensor([[math.log(3.0), 0.0]]), torch.zeros(1, 2)
    expected = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert soft_kl(student, teacher).item() == pytest.approx(expected, rel=1e-5)
    p = math.sqrt(3) / (1 + math.sqrt(3))
    warm = 4 * (p * math.log(2 * p) + (1 - p) * math.log(2 * (1 - p)))
    assert soft_kl(student, teacher, temperature=2.0).item() == pytest.approx(warm, rel=1e-5)
    both = torch.cat([teacher, torch.full((1, 2), 9.0)])[None]
    masked = soft_kl(torch.zeros(1, 2, 2), both, mask=torch.tensor([[1, 0]]))
    assert masked.item() == pytest.approx(expected, rel=1e-5)


def test_hidden_distance_by_hand() -> None:
    teacher = tuple(torch.full((1, 1, 2), float(value)) for value in (1, 2, 4))
    student = (torch.full((1, 1, 2), 2.0), torch.full((1, 1, 2), 4.0))  # meets the first and the last
    assert hidden_distance(student, teacher).item() == pytest.approx(0.5)
    with pytest.raises(SecateurError, match="3 wide"):
        hidden_distance((torch.ones(1, 1, 3),), teacher)


def test_weights_of_the_parts(tiny_llama: Callable[..., nn.Module]) -> None:
    student, teacher = tiny_llama(), tiny_llama(vocab_size=64, hidden_act="relu")
    ids = torch.randint(0, 64, (2, 6))
    own = default_loss(student, ids)
    kl = distillation(teacher, weight=1.0)(student, ids)
    assert kl > 0
    torch.testing.assert_close(distillation(teacher, weight=0.0)(student, ids), own)
    torch.testing.assert_close(distillation(teacher, weight=0.25)(student, ids), 0.75 * own + 0.25 * kl)
    labels = ids.masked_fill(ids < 20, -100)
    torch.testing.assert_close(
        distillation(teacher, weight=0.0)(student, {"input_ids": ids, "labels": labels}),
        student(ids, labels=labels).loss,
    )
    with_states = distillation(teacher, weight=1.0, hidden=2.0)(student, ids)
    states = [m(ids, output_hidden_states=True).hidden_states for m in (student, teacher)]
    torch.testing.assert_close(with_states, kl + 2 * hidden_distance(*states))


def test_a_student_comes_nearer_to_its_teacher() -> None:
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 3))
    student = copy.deepcopy(teacher)
    with torch.no_grad():
        student[0].weight[::2] = 0
    x, y = torch.randn(64, 4), torch.zeros(64, dtype=torch.long)
    frozen = copy.deepcopy(teacher.state_dict())
    losses = fit(student, (x, y), steps=60, lr=0.01, loss=distillation(teacher, weight=1.0))
    assert losses[-1] < 0.2 * losses[0]
    assert all(torch.equal(frozen[name], value) for name, value in teacher.state_dict().items())
    assert all(p.grad is None for p in teacher.parameters())


def test_nonsense_is_refused(tiny_llama: Callable[..., nn.Module]) -> None:
    model = tiny_llama()
    for arguments in ({"weight": 1.5}, {"temperature": 0.0}):
        with pytest.raises(SecateurError):
            distillation(model, **arguments)
    with pytest.raises(SecateurError, match="is the student"):
        distillation(model)(model, torch.zeros(1, 4, dtype=torch.long))
    with pytest.raises(SecateurError, match=r"\[1, 4, 32\]"):
        distillation(tiny_llama(vocab_size=32))(model, torch.zeros(1, 4, dtype=torch.long))
