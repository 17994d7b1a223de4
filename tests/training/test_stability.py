"""Distance, angle and error barrier: spec lottery-rewinding (a), and lines whose errors are known by hand."""

import pytest
import torch
from torch import nn

from secateur.errors import SecateurError
from secateur.training.stability import angle, barrier, distance, interpolate

MASK = {"w": torch.tensor([1, 0, 1, 1]).bool()}
ONE = {"w": torch.tensor([1, 2, -3, 0.5])}
TWO = {"w": torch.tensor([1.5, 9, -1, 0.5])}


def test_the_sheet_s_distance_and_angle() -> None:
    assert distance(ONE, TWO, MASK) == pytest.approx(2.0615528, abs=1e-7)
    assert angle(ONE, TWO, MASK) == pytest.approx(37.529041, abs=1e-6)


def test_symmetric_and_zero_for_the_same_weights() -> None:
    assert distance(TWO, ONE, MASK) == distance(ONE, TWO, MASK) and angle(TWO, ONE, MASK) == angle(
        ONE, TWO, MASK
    )
    assert distance(ONE, ONE, MASK) == 0 and angle(ONE, ONE, MASK) == 0
    moved = {"w": ONE["w"] + torch.tensor([0, 5.0, 0, 0])}
    assert distance(ONE, moved, MASK) == 0 and angle(ONE, moved, MASK) == 0  # only where the mask is
    assert angle(ONE, {"w": -ONE["w"]}, MASK) == pytest.approx(180)


def line() -> nn.Module:
    return nn.Linear(1, 1, bias=False)


def test_the_barrier_is_the_rise_over_the_mean_of_the_ends() -> None:
    """error(w) = w (3 - w) on w = 0..2: the top of the line is 2.25 at 1.5, the ends are 0 and 2."""
    model = line()
    first, second = {"weight": torch.zeros(1, 1)}, {"weight": torch.full((1, 1), 2.0)}
    before = model.weight.detach().clone()
    found, errors = barrier(model, first, second, lambda m: (m.weight * (3 - m.weight)).item(), points=5)
    assert errors == pytest.approx([0, 1.25, 2, 2.25, 2]) and found == pytest.approx(2.25 - 1)
    assert torch.equal(model.weight, before)
    assert barrier(model, first, second, lambda m: m.weight.item())[0] == pytest.approx(1.0)  # the worse end
    flat, _ = barrier(model, first, first, lambda m: 0.3)
    assert flat == 0
    assert barrier(model, first, second, lambda m: m.weight.item() ** 2, points=3)[1] == pytest.approx(
        [0, 1, 4]
    )
    with pytest.raises(SecateurError, match="2 points"):
        barrier(model, first, second, lambda m: 0.0, points=2)


def test_statistics_are_interpolated_and_counters_are_not() -> None:
    norm = nn.BatchNorm1d(2)
    first = {name: t.clone() for name, t in [*norm.named_parameters(), *norm.named_buffers()]}
    second = {**first, "running_mean": torch.tensor([4.0, 8.0]), "num_batches_tracked": torch.tensor(7)}
    interpolate(norm, first, second, 0.25)
    assert norm.running_mean.tolist() == [1.0, 2.0] and norm.num_batches_tracked.item() == 7
