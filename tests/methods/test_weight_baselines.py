"""Weight criteria: the worked examples of weight-baselines and the invariants it lists."""

from itertools import pairwise

import pytest
import torch
from torch import nn

from secateur.graph.blocks import find_matrices
from secateur.method import make_method
from secateur.pruning.allocate import owl_shares
from secateur.pruning.select import Pattern
from secateur.solvers.sweep import sweep
from secateur.stats.layer import InputStats, LayerStats
from secateur.stats.stream import stream

W = torch.tensor([[1, -2, 0.9, 3], [-0.4, 0.3, 2, -1]])
TOKENS = torch.tensor([[1.0, 0, 2, -1], [0, 1, 1, 1], [2, 1, 0, 0], [1, -1, 4, 0]])


def stats_of(rows, sequences=1, needs=("input_norm", "hessian")):
    inputs = InputStats(rows.shape[1], frozenset(needs))
    inputs.add(rows)
    inputs.sequences = sequences
    return LayerStats(inputs, name="layer")


def kept(mask):
    return [row.nonzero().flatten().tolist() for row in mask]


def near(found, expected, atol=1e-5):
    return torch.allclose(found, torch.tensor(expected), atol=atol)


# Worked examples


def test_magnitude():
    _, mask = make_method("magnitude", scope="row").solve(W, LayerStats(), Pattern(4, "row"))
    assert kept(~mask) == [[0, 2], [0, 1]]
    # of all: |w| sorted .3 .4 .9 1 1 2 2 3; of the equal ones the earlier stays
    weight, mask = make_method("magnitude").solve(W, LayerStats(), Pattern(4, "layer"))
    assert kept(mask) == [[0, 1, 3], [2]]
    assert torch.equal(weight, torch.tensor([[1.0, -2, 0, 3], [0, 0, 2, 0]]))


def test_wanda():
    method = make_method("wanda")
    stats = stats_of(TOKENS)
    expected = [[2.44949, 3.46410, 4.12432, 4.24264], [0.97980, 0.51962, 9.16515, 1.41421]]
    assert near(method.score(W, stats), expected)
    weight, mask = method.solve(W, stats, Pattern(4, "row"))
    assert kept(~mask) == [[0, 1], [0, 1]]
    assert torch.equal(weight, torch.tensor([[0, 0, 0.9, 3], [0, 0, 2, -1]]))


def test_ria():
    expected = [[1.34474, 1.52588, 0.94357, 1.40895], [0.61637, 0.27837, 2.63347, 0.61871]]
    assert near(make_method("ria").score(W, stats_of(TOKENS)), expected)


def test_ria_lets_no_expert_compete_with_another():
    """Two experts with equal weights: the one that saw a hundred times the activations doesn't take the other's share."""
    inputs = InputStats(4, frozenset({"input_norm"}), parts=2)
    inputs.add(TOKENS)
    inputs.add(100 * TOKENS, 1)
    inputs.sequences = 1
    both, alone = LayerStats(inputs, name="experts"), stats_of(TOKENS)
    method = make_method("ria")
    mask = method.solve(torch.cat([W, W]), both, Pattern(8, "layer"))[1]
    expected = method.solve(W, alone, Pattern(4, "layer"))[1]
    assert torch.equal(mask[:2], expected) and torch.equal(mask[2:], expected)
    odd = method.solve(torch.cat([W, W]), both, Pattern(9, "layer"))[1]
    assert [int(odd[:2].sum()), int(odd[2:].sum())] == [4, 5]


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


def test_owl():
    shares = owl_shares([2, 5, 3], 0.3, make_method("owl").lam)
    assert [1 - share for share in shares] == pytest.approx([0.77111, 0.61111, 0.71778], abs=1e-5)
    # mean of the ten scores 2.8: one of them is above 5 * 2.8
    scores = [torch.tensor([[1.0, 1, 1, 1, 19]]), torch.tensor([[1.0], [1.0], [1.0], [1.0], [1.0]])]
    assert make_method("owl").outliers(scores) == 10.0
    assert make_method("owl", M=7).outliers(scores) == 0.0


def test_n_of_m_for_each_score():
    """2:4 of the example: the two best of every row."""
    pattern = Pattern(4, "row", (2, 4))
    stats = stats_of(TOKENS)
    assert kept(make_method("magnitude").solve(W, stats, pattern)[1]) == [[1, 3], [2, 3]]
    assert kept(make_method("wanda").solve(W, stats, pattern)[1]) == [[2, 3], [2, 3]]
    assert kept(make_method("ria").solve(W, stats, pattern)[1]) == [[1, 3], [2, 3]]


# SparseGPT against a plain reference


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


# Invariants


@pytest.mark.parametrize("name", ["random", "magnitude", "wanda", "ria", "sparsegpt", "owl"])
def test_keeping_everything_is_the_identity(name):
    method = make_method(name)
    weight, mask = method.solve(W, stats_of(TOKENS * torch.tensor([1, 0, 1, 1])), Pattern(8, method.scope))
    assert torch.equal(weight, W) and mask.all()


def test_wanda_with_equal_norms_is_magnitude_per_row():
    torch.manual_seed(0)
    weight = torch.randn(12, 16)
    equal = stats_of(torch.eye(16))
    for keep in (12, 50, 96, 130):
        wanda = make_method("wanda").solve(weight, equal, Pattern(keep, "row"))[1]
        magnitude = make_method("magnitude", scope="row").solve(weight, equal, Pattern(keep, "row"))[1]
        assert torch.equal(wanda, magnitude)


def test_ria_without_its_exponent_ignores_the_data():
    method = make_method("ria", a=0.0)
    assert torch.equal(method.score(W, stats_of(TOKENS)), method.score(W, stats_of(TOKENS * 7 + 1)))
    assert not torch.equal(make_method("ria").score(W, stats_of(TOKENS)), method.score(W, stats_of(TOKENS)))


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


@pytest.mark.parametrize("name", ["random", "magnitude", "wanda", "ria"])
def test_masks_are_nested(name):
    torch.manual_seed(0)
    weight, stats = torch.randn(9, 20), stats_of(torch.randn(30, 20))
    method = make_method(name)
    masks = [method.solve(weight, stats, Pattern(keep, method.scope))[1] for keep in range(0, 181, 9)]
    assert all((large | ~small).all() for small, large in pairwise(masks))


def test_random_is_the_seeds_and_the_layers():
    stats = LayerStats(name="a")
    one = make_method("random", seed=1).score(W, stats)
    assert torch.equal(one, make_method("random", seed=1).score(W, stats))
    assert not torch.equal(one, make_method("random", seed=2).score(W, stats))
    assert not torch.equal(one, make_method("random", seed=1).score(W, LayerStats(name="b")))


def test_global_and_layerwise_magnitude_agree_on_one_layer_and_differ_on_two():
    import secateur

    torch.manual_seed(0)
    single = nn.Sequential(nn.Linear(8, 6))
    two = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 8))
    with torch.no_grad():
        two[2].weight *= 10

    def masks(model, scope):
        pruned = secateur.prune(model, torch.randn(1, 8), method="magnitude", target="50%", scope=scope)
        return pruned.plan.masks

    assert torch.equal(masks(single, "global")["0.weight"], masks(single, "layer")["0.weight"])
    counts = {name: int(mask.sum()) for name, mask in masks(two, "global").items()}
    assert counts["2.weight"] > 40 and sum(counts.values()) == 48
    assert [int(mask.sum()) for mask in masks(two, "layer").values()] == [24, 24]


def test_bfloat16_weights_stay_bfloat16_and_zero():
    weight = W.bfloat16()
    for name in ("wanda", "sparsegpt", "ria", "magnitude"):
        new, mask = make_method(name).solve(weight, stats_of(TOKENS, 4), Pattern(4, "layer"))
        assert new.dtype == torch.bfloat16 and not new[~mask].any()


def test_sweep_does_nothing_where_nothing_leaves():
    upper, dead = stats_of(TOKENS, 4).inputs.factor()
    [(weight, mask)] = sweep([W], upper, dead, [0])
    assert weight is W and mask.all()
