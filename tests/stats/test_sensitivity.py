"""How much the loss hangs on a matrix: the sheet's numbers, autograd, and weights that come back to the bit."""

import pytest
import torch
from torch import nn

from secateur import SecateurError
from secateur.graph.blocks import find_matrices
from secateur.stats import sensitivity
from secateur.stats.sensitivity import first_order, zeroth_order


class Quadratic(nn.Module):
    def __init__(self, dtype=torch.float64):
        super().__init__()
        self.line = nn.Linear(2, 1, bias=False)
        self.line.weight.data = torch.tensor([[3.0, -1.0]], dtype=dtype)

    def forward(self, x):
        return 0.5 * (x * self.line.weight[0] ** 2).sum()


def loss(model, batch):
    return model(batch)


DATA = [torch.tensor([1.0, 2.0], dtype=torch.float64)]


def test_a_quadratic_gives_the_sheets_number(monkeypatch):
    """ecoflap (a): sum c w z = 1*3*.5 + 2*(-1)*1 = -.5."""
    model = Quadratic()
    monkeypatch.setattr(
        sensitivity, "_normal", lambda like, *_: torch.tensor([[0.5, 1.0]], dtype=torch.float64)
    )
    found = zeroth_order(model, DATA, find_matrices(model), loss=loss)
    assert found.scores["line.weight"] == pytest.approx(0.5, abs=1e-9)
    assert torch.equal(model.line.weight.data, torch.tensor([[3.0, -1.0]], dtype=torch.float64))
    twice = zeroth_order(model, DATA * 2, find_matrices(model), loss=loss, noises=3)
    assert twice.scores["line.weight"] == pytest.approx(6 * 0.5, abs=1e-8)  # a sum, not a mean


def test_draws_depend_on_seed_and_batch_alone():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    data = torch.randn(12, 4)
    squared = lambda m, x: m(x).square().mean()
    first, again, other = (
        zeroth_order(model, data, find_matrices(model), loss=squared, batch_size=4, seed=seed).scores
        for seed in (0, 0, 1)
    )
    assert first == again != other
    # the mean of |g z| over z ~ N is |g| sqrt(2 / pi)
    many = zeroth_order(model, [data], find_matrices(model), loss=squared, noises=400).scores
    gradient = torch.autograd.grad(squared(model, data), model[0].weight)[0]
    assert many["0.weight"] / 400 == pytest.approx(gradient.norm().item() * (2 / torch.pi) ** 0.5, rel=0.1)


def test_a_failing_loss_leaves_the_weights_alone():
    model = Quadratic()
    before = model.line.weight.detach().clone()

    def breaks(model, batch):
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError):
        zeroth_order(model, DATA, find_matrices(model), loss=breaks)
    assert torch.equal(model.line.weight, before)
    with pytest.raises(SecateurError, match="loss is nan when it is moved"):
        zeroth_order(
            model, DATA, find_matrices(model), loss=lambda m, b: loss(m, b) * torch.nan, batch_size=1
        )
    assert torch.equal(model.line.weight, before)


def test_steps_that_bfloat16_swallows_are_told():
    model = Quadratic(torch.bfloat16)
    matrices = find_matrices(model)
    with pytest.raises(SecateurError, match="lost in the rounding"):
        zeroth_order(model, DATA, matrices, loss=loss, epsilon=1e-5)
    assert zeroth_order(model, DATA, matrices, loss=loss, epsilon=0.5).swallowed < 0.5
    with pytest.raises(SecateurError, match="epsilon"):
        zeroth_order(model, DATA, matrices, loss=loss, epsilon=0)


def test_first_order_is_weight_times_mean_size_of_gradients():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    data = [torch.randn(2, 3), torch.randn(2, 3)]
    squared = lambda m, x: m(x).square().mean()
    sizes = [torch.autograd.grad(squared(model, x), model[0].weight)[0] for x in data]
    weight = model[0].weight.detach()
    found = first_order(model, data, find_matrices(model), loss=squared)
    assert found.scores["0.weight"] == pytest.approx(
        (weight.abs() * (sizes[0].abs() + sizes[1].abs()) / 2).sum().item(), rel=1e-5
    )
    found = first_order(model, data, find_matrices(model), loss=squared, square=True)
    wanted = (weight**2 * (sizes[0] ** 2 + sizes[1] ** 2) / 2).sum().item()
    assert found.scores["0.weight"] == pytest.approx(wanted, rel=1e-5)
