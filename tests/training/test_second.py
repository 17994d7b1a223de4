"""A second optimiser in one training: its own loss, data and moments, and the same bits after a stop."""

import pytest
import torch
from torch import nn

from secateur import SecateurError
from secateur.training import Recipe, fit
from secateur.training.second import Second

PLAIN = {"momentum": 0.0, "lr_schedule": "constant", "warmup": 0.0, "clip": 0.0, "batch": 4}


class Scaled(nn.Module):
    """w * a: w learns on one half of the data, a on the other."""

    def __init__(self):
        super().__init__()
        self.w, self.a = nn.Parameter(torch.ones(())), nn.Parameter(torch.ones(()))

    def forward(self, x):
        return self.w * self.a * x


def squares(model, batch):
    return ((model(batch[0]) - batch[1]) ** 2).mean()


def halves(count=16):
    x = torch.randn(count, generator=torch.Generator().manual_seed(0))
    return (x[: count // 2], 2 * x[: count // 2]), (x[count // 2 :], 3 * x[count // 2 :])


def train(steps=6, stop_at=None, **settings):
    model, (first, second) = Scaled(), halves()
    calls = []

    def loss(model, batch):
        calls.append(1)
        if len(calls) == stop_at:
            raise KeyboardInterrupt
        return squares(model, batch)

    other = Second(
        model,
        [model.a],
        data=second,
        loss=squares,
        recipe=Recipe(optimizer="adam", lr=0.1, lr_schedule="constant", warmup=0, batch=4),
    )
    fit(
        model,
        first,
        steps=steps,
        loss=loss,
        parameters=[model.w],
        after_step=[other],
        recipe=Recipe(optimizer="sgd", lr=0.05, **PLAIN),
        **settings,
    )
    return model, other


def test_each_optimiser_steps_its_own_parameters_on_its_own_data():
    """One step by hand: w by gradient descent on the first half, then a by Adam's first step, which is its rate."""
    model, (first, _) = Scaled(), halves(8)
    x = first[0]
    w = 1 - 0.05 * (2 * x * (x - 2 * x)).mean().item()
    trained, other = train_one()
    assert trained.w.item() == pytest.approx(w, rel=1e-5)
    assert trained.a.item() == pytest.approx(1.1, abs=1e-6)
    assert len(other.losses) == 1 and model.a.item() == 1


def train_one():
    model, (first, second) = Scaled(), halves(8)
    recipe = Recipe(optimizer="adam", lr=0.1, lr_schedule="constant", warmup=0, batch=4)
    other = Second(model, [model.a], data=second, loss=squares, recipe=recipe)
    own = Recipe(optimizer="sgd", lr=0.05, **PLAIN)
    fit(model, first, steps=1, loss=squares, parameters=[model.w], after_step=[other], recipe=own)
    return model, other


def test_a_stopped_run_ends_with_the_same_bits(tmp_path):
    whole, _ = train()
    file = tmp_path / "run.safetensors"
    with pytest.raises(KeyboardInterrupt):
        train(stop_at=5, checkpoint=file, every=2)
    resumed, _ = train(checkpoint=file, every=2)
    assert torch.equal(whole.w, resumed.w) and torch.equal(whole.a, resumed.a)
    assert whole.a != 1


def test_a_loss_that_is_not_finite_names_the_step():
    model, (first, second) = Scaled(), halves()
    recipe = Recipe(optimizer="adam", lr=0.1, batch=4)
    broken = Second(model, [model.a], data=second, loss=lambda m, b: squares(m, b) * torch.nan, recipe=recipe)
    with pytest.raises(SecateurError, match="second optimiser is nan at step 0"):
        fit(model, first, steps=2, loss=squares, parameters=[model.w], after_step=[broken], batch=4)
