"""The worked examples and invariants of sparsegpt."""

import pytest
import torch
from weight_examples import TOKENS, W, kept, near, stats_of

from secateur.graph.blocks import find_matrices
from secateur.method import make_method
from secateur.pruning.select import Pattern
from secateur.solvers.sweep import sweep
from secateur.stats.layer import InputStats, LayerStats
from secateur.stats.stream import stream


def reference(weight, hessian, sparsity, n_m=None, blocksize=128):
    """Column by column, as the sheet writes it, in float64."""
    weight, hessian = weight.double().clone(), hessian.double().clone()
    dead = hessian.diagonal() == 0
    hessian[dead, dead] = 1
    weight[:, dead] = 0
    hessian += 0.01 * hessian.diagonal().mean() * torch.eye(len(hessian))
    u = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
    removed = torch.zeros_like(weight, dtype=torch.bool)
    columns = weight.shape[1]
    for first in range(0, columns, blocksize):
        last = min(first + blocksize, columns)
        if n_m is None:
            score = weight[:, first:last] ** 2 / u.diagonal()[first:last] ** 2
            threshold = score.flatten().sort().values[int(score.numel() * sparsity) - 1]
            removed[:, first:last] = score <= threshold
        for j in range(first, last):
            if n_m is not None and j % n_m[1] == 0:
                score = weight[:, j : j + n_m[1]] ** 2 / u.diagonal()[j : j + n_m[1]] ** 2
                worst = score.argsort(1)[:, : n_m[1] - n_m[0]]
                removed[:, j : j + n_m[1]].scatter_(1, worst, True)
            error = weight[:, j] * removed[:, j] / u[j, j]
            weight[:, j:] -= error[:, None] * u[j, j:]
            weight[:, j] *= ~removed[:, j]
    return weight, ~removed


def test_sparsegpt():
    method, stats = make_method("sparsegpt"), stats_of(TOKENS, 4)
    expected = [[1.0460, 4.5823, 8.3427, 9.36], [0.1674, 0.1031, 41.1985, 1.04]]
    assert near(method.score(W, stats), expected, atol=1e-3)
    weight, mask = method.solve(W, stats, Pattern(4, "layer"))
    assert kept(~mask) == [[0], [0, 1, 3]]
    assert near(weight, [[0, -1.05909, 1.283, 2.25101], [0, 0, 1.85614, 0]])
    assert ((W - weight) @ TOKENS.T).square().sum().item() == pytest.approx(3.24748, abs=1e-4)
    assert ((W - W * mask) @ TOKENS.T).square().sum().item() == pytest.approx(7.59, abs=1e-4)


def test_sparsegpt_with_the_published_threshold_removes_one_more():
    _, mask = make_method("sparsegpt", exact_k=False).solve(W, stats_of(TOKENS, 4), Pattern(4, "layer"))
    assert int((~mask).sum()) == 5


@pytest.mark.parametrize("n_m", [None, (2, 4), (3, 8)])
@pytest.mark.parametrize("blocksize", [16, 40, 128])
def test_sparsegpt_agrees_with_the_plain_sweep(n_m, blocksize):
    torch.manual_seed(3)
    weight = torch.randn(20, 80)
    rows = torch.randn(300, 80) @ torch.randn(80, 80)
    rows[:, [5, 41]] = 0
    stats = stats_of(rows, 3)
    if n_m == (2, 4) and blocksize == 40 or n_m != (3, 8):
        blocksize -= blocksize % 8
    keep = weight.numel() * (n_m[0] if n_m else 1) // (n_m[1] if n_m else 2)
    method = make_method("sparsegpt", blocksize=blocksize)
    found, mask = method.solve(weight, stats, Pattern(keep, "layer", n_m))
    expected, expected_mask = reference(weight, stats.hessian, 0.5, n_m, blocksize)
    assert torch.equal(mask, expected_mask) and int(mask.sum()) == keep
    assert torch.allclose(found.double(), expected, atol=1e-4)
    assert not found[:, [5, 41]].any()


def test_matrices_that_share_inputs_are_solved_as_if_alone(tiny_llama):
    model = tiny_llama(hidden_size=32)
    method = make_method("sparsegpt", blocksize=8)
    ids = torch.randint(0, 64, (4, 16))
    block = next(stream(model, ids, method.needs, find_matrices(model)))
    patterns = {name: Pattern(matrix.numel // 3, "layer") for name, matrix in block.matrices.items()}
    solved = method.solve_block(block, patterns)
    assert list(solved) == list(patterns)
    for name, (weight, mask) in solved.items():
        alone, alone_mask = method.solve(block.matrices[name].weight(), block.stats[name], patterns[name])
        assert torch.equal(mask, alone_mask) and int(mask.sum()) == patterns[name].keep
        assert torch.allclose(weight, alone, atol=1e-5)


@pytest.mark.parametrize("keep", [0, 1, 777, 1599, 1600])
def test_sparsegpt_meets_any_budget(keep):
    torch.manual_seed(0)
    weight, rows = torch.randn(20, 80), torch.randn(100, 80)
    new, mask = make_method("sparsegpt", blocksize=32).solve(weight, stats_of(rows), Pattern(keep, "layer"))
    assert int(mask.sum()) == keep == int((new != 0).sum())


def test_sparsegpt_splits_experts():
    torch.manual_seed(0)
    inputs = InputStats(8, {"hessian"}, parts=2)
    rows = torch.randn(2, 40, 8)
    for part in range(2):
        inputs.add(rows[part], part)
    inputs.sequences = 4
    weight, method = torch.randn(10, 8), make_method("sparsegpt")
    new, mask = method.solve(weight, LayerStats(inputs), Pattern(41, "layer"))
    assert int(mask[:5].sum()) in (20, 21) and int(mask.sum()) == 41
    for part in range(2):
        own = slice(5 * part, 5 * part + 5)
        pattern = Pattern(int(mask[own].sum()), "layer")
        alone, alone_mask = method.solve(weight[own], stats_of(rows[part], 4), pattern)
        assert torch.equal(mask[own], alone_mask) and torch.allclose(new[own], alone, atol=1e-5)


def test_sparsegpt_with_a_white_hessian_is_magnitude_without_change():
    torch.manual_seed(0)
    weight = torch.randn(12, 16)
    stats = stats_of(3 * torch.eye(16))
    new, mask = make_method("sparsegpt").solve(weight, stats, Pattern(70, "layer"))
    expected, expected_mask = make_method("magnitude").solve(weight, stats, Pattern(70, "layer"))
    assert torch.equal(mask, expected_mask) and torch.allclose(new, expected, atol=1e-6)


def test_sparsegpt_loses_less_than_plain_removal():
    torch.manual_seed(0)
    weight, rows = torch.randn(24, 64), torch.randn(500, 16) @ torch.randn(16, 64)
    rows += 0.1 * torch.randn(500, 64)
    new, mask = make_method("sparsegpt").solve(weight, stats_of(rows), Pattern(768, "layer"))
    wanda, _ = make_method("wanda").solve(weight, stats_of(rows), Pattern(768, "row"))

    def error(changed):
        return ((weight - changed) @ rows.T).square().sum()

    assert error(new) < 0.5 * error(weight * mask) and error(new) < 0.5 * error(wanda)


def test_sweep_does_nothing_where_nothing_leaves():
    upper, dead = stats_of(TOKENS, 4).inputs.factor()
    [(weight, mask)] = sweep([W], upper, dead, [0])
    assert weight is W and mask.all()
