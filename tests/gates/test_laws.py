"""Laws of gates and their controllers: numbers of the sheets ecodiff, vtrans, consensus-subnetwork and tas."""

import math

import pytest
import torch

from secateur import SecateurError
from secateur.gates import Gaussian, HardConcrete, Lagrangian, StraightThrough, log_cost, penalty
from secateur.gates.laws import hard_step

# ------------------------------------------------------------------ hard-concrete (ecodiff, a)


@pytest.mark.parametrize(
    ("start", "gates", "keep"),
    [(0.0, [0.21784, 0.5, 0.78216], 0.87977), (3.0, [1, 1, 1], 0.99324), (-3.0, [0, 0, 0], 0.26703)],
)
def test_hard_concrete(start, gates, keep):
    law = HardConcrete(3, start=start, delta=0.5)
    assert law.at(torch.tensor([0.1, 0.5, 0.9])).tolist() == pytest.approx(gates, abs=1e-5)
    assert law.keep().tolist() == pytest.approx([keep] * 3, abs=1e-5)


def test_a_draw_is_above_zero_as_often_as_its_probability_says():
    """The probability is that of the law without bounded noise."""
    law = HardConcrete(200_000, start=-1.0)
    share = (law.sample(torch.Generator().manual_seed(0)) > 0).float().mean().item()
    assert share == pytest.approx(law.keep()[0].item(), abs=4 * math.sqrt(0.25 / 200_000))


@pytest.mark.parametrize(
    "law", [HardConcrete(5, 0.0), Gaussian(5, generator=torch.Generator().manual_seed(1))]
)
def test_draws_are_a_function_of_the_generator_and_bring_gradients(law):
    first, again = (law.sample(torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first, again) and not torch.equal(first, law.sample(torch.Generator().manual_seed(4)))
    first.sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in law.parameters())


# ------------------------------------------------------------------ Gaussian (vtrans, a and d)


def sheet_gates(sharpness=10.0):
    law = Gaussian(3, sharpness)
    law.mu.data = torch.tensor([1.0, 0.2, 0.05])
    law.log_variance.data = torch.tensor([-9.0, -4.0, -5.0])
    return law


def test_gaussian_gates():
    law = sheet_gates()
    assert law.log_alpha().tolist() == pytest.approx([-9.0, -0.781124, 0.991461], abs=1e-5)
    assert (law.value() != 0).tolist() == [True, True, False]
    assert law.value().tolist() == pytest.approx([1.0, 0.2, 0.0])
    assert law.keep().tolist() == pytest.approx([1.0, 0.999595, 0.000049], abs=1e-6)
    assert sheet_gates(1.0).keep().tolist() == pytest.approx([0.999877, 0.685922, 0.270624], abs=1e-5)
    assert law.kl().item() == pytest.approx(5.236861, abs=1e-5)


def test_the_bottleneck_shrinks_the_mean_and_widens_the_noise():
    law = sheet_gates()
    law.mu.data *= torch.tensor([1.0, -1.0, 1.0])
    law.kl().backward()
    assert torch.equal(law.mu.grad.sign(), law.mu.sign())
    assert (law.log_variance.grad < 0).all()


def test_counts_are_hard_as_the_sharpness_grows():
    assert sheet_gates(1e4).keep().tolist() == [1.0, 1.0, 0.0]


# ------------------------------------------------------------------ straight-through (consensus-subnetwork, a)

LOGITS = [[2, -1, 0.5], [1, -2, -0.5], [3, 0.5, 0.2], [0.5, -0.3, -0.1]]


@pytest.mark.parametrize(
    ("gradient", "first"), [("identity", [-1 / 12, 1 / 24, 0]), ("sigmoid", [-0.008749, 0.008192, 0])]
)
def test_gradient_of_the_polarisation(gradient, first):
    logits = torch.tensor(LOGITS, requires_grad=True)
    gates = hard_step(logits, gradient)
    assert gates.tolist() == [[1, 0, 1], [1, 0, 0], [1, 1, 1], [1, 0, 0]]
    mean = gates.mean(0)
    polar = (mean * (1 - mean)).mean()
    assert polar.item() == pytest.approx(0.1458333, abs=1e-6)
    polar.backward()
    assert logits.grad[0].tolist() == pytest.approx(first, abs=1e-6)


def test_a_hard_step_is_exactly_zero_or_one():
    logits = torch.linspace(-5, 5, 10_001, requires_grad=True)
    assert set(hard_step(logits).tolist()) == {0.0, 1.0}


def test_straight_through_opens_and_closes():
    law = StraightThrough(3, start=[1.0, -1.0, 0.0])
    assert law.sample().tolist() == law.value().tolist() == [1, 0, 0]
    law.sample().sum().backward()
    assert (law.logits.grad > 0).all()


# ------------------------------------------------------------------ controllers


def test_penalty_is_the_sheets():
    cost = torch.tensor([4.0, 2.0, 2.0]) @ torch.tensor([1.0, 0.25, 0.5]) / 8
    assert penalty(cost).item() == pytest.approx(0.6875)
    assert penalty(cost, target=0.5).item() == pytest.approx(0.1875)


@pytest.mark.parametrize(("now", "sign"), [(50, -1), (52, 0), (55, 0), (57.5, 1), (60, 1)])
def test_log_cost_is_the_sheets(now, sign):
    assert log_cost(torch.tensor(math.e), now=now, target=57, tolerance=5).item() == pytest.approx(sign)


def test_lagrangian_is_the_sheets():
    held = Lagrangian()
    held.linear.data, held.square.data = torch.tensor(0.4), torch.tensor(2.0)
    loss = held(torch.tensor(0.3), 0.5)
    assert loss.item() == pytest.approx(-0.08 + 0.08, abs=1e-6)
    loss.backward()
    assert held.linear.grad.item() == pytest.approx(-0.2) and held.square.grad.item() == pytest.approx(0.04)


def test_multipliers_ascend():
    held = Lagrangian()
    torch.optim.AdamW([held.groups(0.1)]).step(lambda: held(torch.tensor(0.3), 0.5).backward())
    assert held.linear.item() < 0 < held.square.item()


@pytest.mark.parametrize(
    "bad", [lambda: HardConcrete(3, beta=0), lambda: HardConcrete(3, delta=-1), lambda: HardConcrete(0)]
)
def test_bad_laws_are_refused(bad):
    with pytest.raises(SecateurError):
        bad()
