"""Layer statistics: the numbers of weight-baselines and of hand computations."""

import pytest
import torch

from secateur import SecateurError
from secateur.stats.layer import InputStats, LayerStats

TOKENS = torch.tensor([[1.0, 0, 2, -1], [0, 1, 1, 1], [2, 1, 0, 0], [1, -1, 4, 0]])
ALL = frozenset({"input_norm", "hessian", "input_mean", "input_var"})


def stats_of(rows, sequences, needs=ALL):
    inputs = InputStats(rows.shape[1], needs)
    inputs.add(rows)
    inputs.sequences = sequences
    return LayerStats(inputs, name="layer")


@pytest.mark.parametrize("needs", [ALL, frozenset({"input_norm"})])
def test_input_norm_counts_sequences_not_tokens(needs):
    expected = torch.tensor([2.44949, 1.73205, 4.58258, 1.41421])
    assert torch.allclose(stats_of(TOKENS, 1, needs).input_norm, expected, atol=1e-5)
    assert torch.allclose(stats_of(TOKENS, 4, needs).input_norm, expected / 2, atol=1e-5)


def test_hessian_mean_and_unbiased_variance():
    stats = stats_of(TOKENS, 4)
    assert stats.hessian.diagonal().tolist() == [3, 1.5, 10.5, 1]
    assert torch.allclose(stats.hessian, 2 / 4 * TOKENS.T @ TOKENS)
    assert torch.allclose(stats.input_mean, torch.tensor([1.0, 0.25, 1.75, 0.0]))
    assert torch.allclose(stats.input_var, torch.tensor([0.66667, 0.91667, 2.91667, 0.66667]), atol=1e-5)
    assert stats.sequences == 4 and stats.tokens == 4


def test_moments_do_not_depend_on_how_the_rows_come():
    rows = torch.randn(50, 3) + 100
    inputs = InputStats(3, {"input_mean", "input_var"})
    for piece in rows.split([1, 7, 30, 12]):
        inputs.add(piece)
    stats = LayerStats(inputs)
    assert torch.allclose(stats.input_mean.double(), rows.double().mean(0), rtol=1e-6)
    assert torch.allclose(stats.input_var.double(), rows.double().var(0), rtol=1e-3)


def test_factor_is_the_inverse_of_sparsegpts_u():
    stats = stats_of(TOKENS, 4)
    upper, dead = stats.inputs.factor(0.01)
    assert torch.equal(upper, upper.triu()) and not dead.any()
    assert torch.allclose(1 / upper.diagonal(), torch.tensor([0.97775, 0.93431, 0.31159, 0.98058]), atol=1e-5)
    damped = stats.hessian + 0.01 * 4.0 * torch.eye(4)
    assert torch.allclose(upper @ upper.T, damped, atol=1e-5)
    u = torch.linalg.cholesky(torch.linalg.inv(damped.double()), upper=True)
    assert torch.allclose(torch.linalg.inv(upper.double()), u, atol=1e-5)
    assert stats.inputs.factor(0.01)[0] is upper
    stats.inputs.release()
    assert stats.inputs.factor(0.01)[0] is not upper


def test_dead_inputs_get_a_unit_diagonal():
    rows = TOKENS.clone()
    rows[:, 1] = 0
    upper, dead = stats_of(rows, 4).inputs.factor(0.0)
    assert dead.tolist() == [False, True, False, False]
    assert torch.allclose((upper @ upper.T).diagonal(), torch.tensor([3.0, 1.0, 10.5, 1.0]), atol=1e-5)


def test_a_singular_hessian_says_what_to_do():
    stats = stats_of(torch.ones(3, 2), 1)
    with pytest.raises(SecateurError, match="damping"):
        stats.inputs.factor(-1e-3)


def test_what_was_not_gathered_raises():
    stats = stats_of(TOKENS, 1, frozenset({"input_norm"}))
    for name in ("hessian", "input_mean", "input_var", "gradient", "fisher"):
        with pytest.raises(SecateurError, match=name):
            getattr(stats, name)


def test_parts_have_inputs_of_their_own_and_an_unused_one_is_white():
    inputs = InputStats(4, {"input_norm", "hessian"}, parts=2)
    inputs.add(TOKENS, part=1)
    inputs.sequences = 1
    stats = LayerStats(inputs, name="experts", gradient=torch.arange(24.0).reshape(6, 4))
    with pytest.raises(SecateurError, match="split"):
        _ = stats.input_norm
    (first, unused), (second, used) = stats.split(torch.arange(24.0).reshape(6, 4))
    assert first.shape == second.shape == (3, 4) and second[0, 0] == 12
    assert torch.equal(unused.input_norm, torch.ones(4)) and torch.equal(unused.hessian, torch.eye(4))
    assert torch.allclose(used.hessian, 2 * TOKENS.T @ TOKENS)
    assert torch.equal(used.gradient, second)
