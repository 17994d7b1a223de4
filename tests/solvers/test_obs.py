"""OBS removal of units: the worked example of the Tyr sheet, and brute force."""

import itertools

import pytest
import torch
from torch import Tensor

from secateur.errors import SecateurError
from secateur.solvers.obs import kept_rows, output_error, prepare, refit, remove, select, split, unit_scores

X = torch.tensor([[1, 0, 1, 0], [0, 1, 1, 0], [1, 1, 0, 1], [2, 0, 1, 1], [0, 1, 0, 2]], dtype=torch.float64)
B = torch.tensor([[1, 0.5], [2, -1], [-1, 3], [0.2, 0.1]], dtype=torch.float64)


def close(a: Tensor, b: list, atol: float = 6e-5) -> bool:
    return torch.allclose(a.double(), torch.tensor(b, dtype=torch.float64), atol=atol, rtol=0)


def test_worked_example_scores() -> None:
    problem = prepare(B.T, X.T @ X)
    assert close(problem.H.diagonal(), [6.045, 3.045, 3.045, 6.045])
    args = problem.B, problem.inverse, problem.G, torch.arange(4), 1
    obs = unit_scores(*args, first_order=False)
    assert close(obs, [1.1213, 2.7676, 5.5351, 0.0449])
    both = unit_scores(*args)
    assert close(both, [12.4276, 15.3926, 32.5851, 2.0971])
    assert close(both - obs, [11.3063, 12.625, 27.05, 2.0523])


def test_worked_example_removal_and_refit() -> None:
    problem = prepare(B.T, X.T @ X)
    (kept,) = select(problem, [2], rounds=2)
    assert kept.tolist() == [1, 2]
    weight = refit(problem, kept)
    expected = [[0, 0], [2.202127, -0.898936], [-0.015477, 3.492262], [0, 0]]
    assert close(weight.T, expected, 6e-7)
    left, inverse = problem.B.clone(), problem.inverse.clone()
    remove(left, inverse, torch.tensor([3]))
    remove(left, inverse, torch.tensor([0]))
    assert (left - weight.T).abs().max() < 1e-14
    error = ((X @ (B - weight.T)) ** 2).sum()
    plain = ((X @ (B - B * torch.tensor([[0], [1], [1], [0]]))) ** 2).sum()
    assert error.item() == pytest.approx(4.9008, abs=6e-5)
    assert plain.item() == pytest.approx(9.3, abs=1e-9)
    # the sheet's errors are of the outputs; `output_error` adds the damping's part
    damped = ((B - weight.T) ** 2).sum() * 0.045
    assert output_error(problem, weight) == pytest.approx(float(error + damped), abs=1e-9)


def test_block_scores_equal_the_loss_of_the_best_refit() -> None:
    """Without the first-order term a unit's score is exactly half the squared error that removing it leaves."""
    torch.manual_seed(1)
    x, weight = torch.randn(40, 9, dtype=torch.float64), torch.randn(3, 9, dtype=torch.float64)
    units = torch.tensor([[0, 4], [1, 7], [8, 2]])
    problem = prepare(weight, x.T @ x, units, damping=0.0)
    scores = unit_scores(problem.B, problem.inverse, problem.G, torch.arange(3), 2, first_order=False)
    for unit, score in enumerate(scores):
        columns = [c for c in range(9) if c not in units[unit].tolist()]
        best = torch.linalg.lstsq(x[:, columns], x @ weight.T).solution
        assert score.item() == pytest.approx(((x @ weight.T - x[:, columns] @ best) ** 2).sum().item() / 2)
    keep = torch.tensor([0, 2])
    refitted = refit(problem, keep)
    assert (refitted[:, [1, 7]] == 0).all()
    columns = [0, 2, 3, 4, 5, 6, 8]
    best = torch.linalg.lstsq(x[:, columns], x @ weight.T).solution
    assert torch.allclose(refitted[:, columns], best.T)


@pytest.mark.parametrize("width", [1, 3])
@pytest.mark.parametrize("rounds", [1, 16])
def test_incremental_removal_ends_at_the_refit(width: int, rounds: int) -> None:
    torch.manual_seed(2)
    x, weight = torch.randn(200, 24, dtype=torch.float64), torch.randn(5, 24, dtype=torch.float64)
    units = torch.randperm(24).reshape(-1, width)
    problem = prepare(weight, x.T @ x, units)
    keep = 24 // width // 2
    (kept,) = select(problem, [keep], rounds)
    gone = sorted(set(range(len(units))) - set(kept.tolist()))
    b, inverse = problem.B.clone(), problem.inverse.clone()
    for unit in gone:
        remove(b, inverse, torch.arange(unit * width, (unit + 1) * width))
    refitted = refit(problem, kept)
    assert torch.allclose(b, refitted.T[problem.rows], atol=1e-12)
    rest = kept_rows(problem, kept)
    assert torch.allclose(inverse[rest][:, rest], torch.linalg.inv(problem.H[rest][:, rest]))
    assert torch.equal(refitted.nonzero()[:, 1].unique(), units[kept].flatten().sort().values)


def test_more_rounds_find_the_better_set_here_and_brute_force_is_no_worse() -> None:
    torch.manual_seed(3)
    base = torch.randn(300, 4, dtype=torch.float64)
    x = torch.cat([base, base + 0.1 * torch.randn(300, 4, dtype=torch.float64)], 1)  # pairs of twins
    weight = torch.randn(6, 8, dtype=torch.float64)
    problem = prepare(weight, x.T @ x, damping=1e-6)

    def error(kept: Tensor) -> float:
        return output_error(problem, refit(problem, kept))

    one, many = (error(select(problem, [4], r, first_order=False)[0]) for r in (1, 4))
    best = min(error(torch.tensor(c)) for c in itertools.combinations(range(8), 4))
    assert best <= many + 1e-12 < one


def test_scale_and_duplication_of_the_data_change_nothing() -> None:
    torch.manual_seed(4)
    x, weight = torch.randn(64, 12, dtype=torch.float64), torch.randn(5, 12, dtype=torch.float64)
    once, twice = prepare(weight, x.T @ x), prepare(weight, torch.cat([x, x]).T @ torch.cat([x, x]))
    for a, b in zip(select(once, [9, 6, 3]), select(twice, [9, 6, 3])):
        assert torch.equal(a, b)
        assert torch.allclose(refit(once, a), refit(twice, b), atol=1e-12)


def test_nested_path_and_counts() -> None:
    torch.manual_seed(5)
    x, weight = torch.randn(300, 40), torch.randn(7, 40)
    problem = prepare(weight, x.T @ x)
    kept = select(problem, [40, 10, 31, 22], rounds=6, nested=True)
    assert [len(k) for k in kept] == [40, 10, 31, 22]
    assert set(kept[1].tolist()) <= set(kept[3].tolist()) <= set(kept[2].tolist())
    assert torch.equal(refit(problem, kept[0]), weight)


def test_dead_units_leave_first_and_silent_inputs_lose_their_weight() -> None:
    torch.manual_seed(6)
    x, weight = torch.randn(50, 6), torch.randn(4, 6)
    x[:, 2] = 0
    weight[:, 4] = 0
    weight[:, 1] *= 1e-4
    problem = prepare(weight, x.T @ x)
    assert problem.dead.tolist() == [False, False, True, False, True, False]
    (kept,) = select(problem, [4])
    assert kept.tolist() == [0, 1, 3, 5]
    (kept,) = select(problem, [3])
    assert kept.tolist() == [0, 3, 5]
    (kept,) = select(problem, [5])
    assert len(kept) == 5 and {0, 1, 3, 5} < set(kept.tolist())


def test_split() -> None:
    assert split(10, 4) == [3, 3, 2, 2]
    assert split(2, 16) == [1, 1]
    assert split(0, 16) == []


def test_half_precision_weights_keep_their_dtype() -> None:
    weight = torch.randn(4, 8).bfloat16()
    x = torch.randn(30, 8)
    problem = prepare(weight, x.T @ x)
    assert problem.B.dtype == torch.float32
    assert refit(problem, torch.tensor([0, 1, 2])).dtype == torch.bfloat16


def test_a_hessian_with_nan_is_refused() -> None:
    hessian = torch.eye(3)
    hessian[1, 1] = float("nan")
    with pytest.raises(SecateurError, match="Hessian isn't finite"):
        prepare(torch.randn(2, 3), hessian)
