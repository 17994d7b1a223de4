"""Gradients through all steps of a sampler: the sheet's example, plain autograd, constant memory, one draw a step."""

import pytest
import torch
from torch import nn

import secateur
from secateur import SecateurError
from secateur.measure.cost import _Live
from secateur.training.sampling import Sampler, draw, sample, visited


class Scaled(nn.Module):
    def __init__(self, m=0.8):
        super().__init__()
        self.m = nn.Parameter(torch.tensor(m))

    def forward(self, z):
        return 1.1 * self.m * z


def start(count, seed):
    return torch.full((count, 1), 2.0), None


def test_the_sheets_example():
    """ecodiff (b): z' = 1.1 m z, m = 0.8, z = 2, three steps, target 1."""
    model = Scaled()
    final = sample(model, Sampler(3, start, lambda m, z, i, asked: m(z)), *start(1, 0))
    loss = ((final - 1) ** 2).mean()
    loss.backward()
    assert final.item() == pytest.approx(1.362944) and loss.item() == pytest.approx(0.131728, abs=1e-6)
    assert model.m.grad.item() == pytest.approx(3.710043, abs=1e-5)


class Noisy(nn.Module):
    """A layer whose units are dropped by chance, at every call anew."""

    def __init__(self, width=16):
        super().__init__()
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, z):
        h = torch.tanh(self.up(z))
        return z + 0.1 * self.down(h * (torch.rand(h.shape[1]) < 0.7))


def plain(model, sampler, z, asked):
    for number in range(sampler.steps):
        z = sampler.step(model, z, number, asked)
    return z


def gradients(run, steps=5):
    torch.manual_seed(0)
    model, z = Noisy(), torch.randn(4, 16)
    sampler = Sampler(steps, start, lambda m, z, i, asked: m(z) * (1 + i / 10))
    torch.manual_seed(7)
    run(model, sampler, z, None).square().mean().backward()
    return [p.grad for p in model.parameters()]


def test_gradients_are_those_of_plain_autograd_with_the_same_draws():
    for ours, theirs in zip(gradients(sample), gradients(plain), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


def peak(run, steps):
    with _Live(set()) as live:
        gradients(run, steps)
    return live.peak


def test_memory_does_not_grow_with_the_steps():
    states = 4 * 16 * 4
    assert peak(sample, 32) - 28 * 2 * states < 1.1 * peak(sample, 4)
    assert peak(plain, 32) > 2 * peak(plain, 4)


def test_drawings_are_a_function_of_the_seed():
    def seeded(count, seed):
        return torch.randn(count, 2, generator=torch.Generator().manual_seed(seed)), torch.arange(count)

    steady = Sampler(2, seeded, lambda m, z, i, asked: m(z) + asked[:, None])
    (first, asked), (again, _) = (draw(Scaled(), steady, 7, 3, batch=2) for _ in range(2))
    assert torch.equal(first, again) and asked.tolist() == list(range(7))
    torch.testing.assert_close(draw(Scaled(), steady, 7, 3, batch=7)[0], first)
    careless = Sampler(2, lambda count, seed: (torch.randn(count, 2), None), lambda m, z, i, asked: m(z))
    with pytest.raises(SecateurError, match="two starts from one seed differ"):
        draw(Scaled(), careless, 3, 0)


def test_visited_is_every_call_of_the_model_with_both_branches():
    """z doubles at each step; the second of two steps is guided and runs the model on both branches at once."""

    def step(model, z, number, asked):
        if not number:
            model(z, t=torch.zeros(len(z)))
        else:
            model(torch.cat([z, z]), torch.ones(2 * len(z)))
        return z.mul_(2)  # in place: what was noted must stay as it was

    class Timed(nn.Linear):
        def forward(self, z, t):
            assert not self.training
            return super().forward(z)

    model = Timed(1, 1)
    first, second = visited(model, Sampler(2, start, step), 3, 0)
    assert first["z"].tolist() == [[2.0]] * 3 and first["t"].tolist() == [0.0] * 3
    assert second[0].tolist() == [[4.0]] * 6 and second[1].tolist() == [1.0] * 6
    assert model.training and not model._forward_pre_hooks
    with pytest.raises(SecateurError, match="never call the model"):
        visited(model, Sampler(2, start, lambda m, z, i, asked: z), 3, 0)


def test_wanda_pools_its_norms_over_the_steps():
    """Inputs (1, 1) and then (3, 0), twice for guidance: squared norms 1 + 2 * 9 and 1, so the columns' are sqrt(19) and 1."""

    def step(model, z, number, asked):
        return model(z)[:, :2] * 0 + torch.tensor([3.0, 0.0]) if not number else model(torch.cat([z, z]))

    model = nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, 4.0], [1.0, 5.0]]))  # 4 * 1 < sqrt(19) < 5 * 1
    data = visited(model, Sampler(2, lambda count, seed: (torch.ones(count, 2), None), step), 1, 0)
    pruned = secateur.prune(model, method="wanda", target="50%", everywhere=True, data=data)
    assert pruned.model.weight.tolist() == [[1.0, 0.0], [0.0, 5.0]]
