"""Optimal brain surgeon on whole units: what removing input columns of a layer costs, and how the rest makes up for it.

A layer computes y = W x. A *unit* is a set of columns of W (one neuron, the columns of one attention head). With
H = sum of x xT over calibration inputs, `prepare` sets the problem up, `select` decides which units stay at each of
several counts, and `refit` solves the least squares for the weights that are left.

Everything is a function of the direction of H only: scores scale with H, and damping is relative to its diagonal, so
a mean, a sum or twice the sum of x xT give the same choice and the same weights.

Sources: OSSCAR (arXiv 2403.12983) and Tyr-the-Pruner (arXiv 2503.09657), whose notation B = WT is kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from secateur.errors import SecateurError
from secateur.utils.screen import Screen

DEAD = 1e-12


@dataclass(repr=False)
class Removal(Screen):
    """One layer's problem, rows ordered unit by unit; rows that belong to no unit come last and always stay.

    B [in, out] dense weights, H [in, in] damped, G = H B, `inverse` of H; `rows` [in] maps a row to its input column.
    """

    B: Tensor
    H: Tensor
    G: Tensor
    inverse: Tensor
    rows: Tensor
    units: int
    width: int
    dtype: torch.dtype
    dense: Tensor

    @property
    def dead(self) -> Tensor:
        """[units] bool: units whose weights are all zero leave first and cost nothing."""
        return self.B[: self.units * self.width].abs().reshape(self.units, -1).sum(1) <= DEAD


def prepare(weight: Tensor, hessian: Tensor, units: Tensor | None = None, damping: float = 0.01) -> Removal:
    """The problem of removing `units` from a layer.

    >>> problem = prepare(torch.eye(2), torch.tensor([[2.0, 1.0], [1.0, 2.0]]), damping=0.0)
    >>> unit_scores(problem.B, problem.inverse, problem.G, torch.arange(2), 1, first_order=False)
    tensor([0.7500, 0.7500])

    Parameters
    ----------
    weight: [out, in]. hessian: [in, in], any multiple of sum x xT. units: int64 [units, width], the columns of each
        unit; None: every column is a unit. damping: times the mean of the diagonal, added to the diagonal.

    Columns whose input is always zero lose their weight, as in the source. The algebra runs in float32, or in float64
    for float64 weights.

    Raises `SecateurError` when the Hessian isn't finite.
    """
    if not torch.isfinite(hessian).all():
        raise SecateurError(
            "the Hessian isn't finite", where="obs", fix="check weights and calibration data for NaN"
        )
    compute = torch.float64 if weight.dtype == torch.float64 else torch.float32
    device, columns = weight.device, weight.shape[1]
    if units is None:
        units = torch.arange(columns)[:, None]
    rest = torch.ones(columns, dtype=torch.bool)
    rest[units.reshape(-1).cpu()] = False
    rows = torch.cat([units.reshape(-1).cpu(), rest.nonzero().squeeze(1)]).to(device)
    H = hessian.to(device=device, dtype=compute)[rows[:, None], rows]
    B = weight.detach().to(compute).T[rows]
    diagonal = H.diagonal()
    B[diagonal == 0] = 0
    mean = diagonal.mean()
    mean = mean if mean > 0 else torch.ones_like(mean)
    for _ in range(6):
        damped = H.clone()
        damped.diagonal().add_(damping * mean)
        factor, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            break
        damping = max(10 * damping, 1e-4)
    else:
        raise SecateurError(
            "the Hessian isn't positive definite", where="obs", fix="give more damping or more data"
        )
    count, width = units.shape
    inverse = torch.cholesky_inverse(factor)
    return Removal(B, damped, damped @ B, inverse, rows, count, width, weight.dtype, weight.detach())


def unit_scores(
    B: Tensor, inverse: Tensor, G: Tensor, units: Tensor, width: int, first_order: bool = True
) -> Tensor:
    """Loss that removing each of `units` (int64 [n], numbers of blocks of `width` rows) adds, [n], higher = keep.

    The sum over a unit's rows of B * (1/2 [inverse]_uu^-1 B + G); without `first_order` the G term, an energy of the
    dense layer's output, is left out and this is the plain OBS cost.
    """
    if width == 1:
        B = B[units]
        cost = (B * B).sum(1) / (2 * inverse.diagonal()[units])
        return cost + (B * G[units]).sum(1) if first_order else cost
    rows = rows_of(units, width)
    blocks = inverse[rows[:, :, None], rows[:, None, :]]
    gradient = torch.cholesky_solve(B[rows], torch.linalg.cholesky(blocks)) / 2
    return (B[rows] * (gradient + G[rows] if first_order else gradient)).sum((1, 2))


def rows_of(units: Tensor, width: int) -> Tensor:
    """[n, width]: the rows of each unit."""
    return units[:, None] * width + torch.arange(width, device=units.device)


def remove(B: Tensor, inverse: Tensor, gone: Tensor) -> None:
    """Removes the rows `gone`, in place, and lets the others make up for them.

    B -= inverse[:, p] inverse[p, p]^-1 B[p], the same for `inverse`; rows p of both, columns p of `inverse` become zero.
    """
    across = inverse[:, gone]
    factor = torch.linalg.cholesky(across[gone])
    B.addmm_(across, torch.cholesky_solve(B[gone], factor), alpha=-1)
    half = torch.linalg.solve_triangular(factor, across.T, upper=False)
    inverse.addmm_(half.T, half, alpha=-1)
    B[gone] = 0
    inverse[gone] = 0
    inverse[:, gone] = 0


def split(total: int, rounds: int) -> list[int]:
    """`total` removals over at most `rounds` rounds, as even as possible, larger first.

    >>> split(10, 4)
    [3, 3, 2, 2]
    """
    each, extra = divmod(total, rounds)
    return [each + (i < extra) for i in range(rounds) if each + (i < extra)]


def select(
    problem: Removal, keeps: Sequence[int], rounds: int = 16, first_order: bool = True, nested: bool = False
) -> list[Tensor]:
    """Kept units (sorted int64, CPU) for each count of `keeps`.

    Every round removes the lowest scoring units and updates the others. With `nested` one path of rounds passes
    through all counts, so that smaller sets lie in larger ones, at the cost of one; otherwise each count starts from
    the dense layer.
    """
    if not nested:
        return [_path(problem, [keep], rounds, first_order)[0] for keep in keeps]
    order = sorted(set(keeps), reverse=True)
    found = dict(zip(order, _path(problem, order, rounds, first_order)))
    return [found[keep] for keep in keeps]


def _path(problem: Removal, keeps: Sequence[int], rounds: int, first_order: bool) -> list[Tensor]:
    B, inverse, G, width = problem.B.clone(), problem.inverse.clone(), problem.G, problem.width
    alive = torch.ones(problem.units, dtype=torch.bool, device=B.device)
    left = problem.units
    total = max(left - keeps[-1], 1)
    found: list[Tensor] = []

    def drop(units: Tensor) -> None:
        if len(units):
            remove(B, inverse, rows_of(units, width).reshape(-1))
            alive[units] = False

    for keep in keeps:
        dead = (alive & problem.dead).nonzero().squeeze(1)[: left - keep]
        count = left - keep - len(dead)
        share = rounds if len(keeps) == 1 else max(1, -(-rounds * count // total))
        drop(dead)
        for k in split(count, share):
            units = alive.nonzero().squeeze(1)
            scores = unit_scores(B, inverse, G, units, width, first_order)
            drop(units[scores.sort(stable=True).indices[:k]])
        left = keep
        found.append(alive.nonzero().squeeze(1).cpu())
    return found


def refit(problem: Removal, keep: Tensor) -> Tensor:
    """[out, in] weights, zero outside the kept units, that best give back the dense layer's outputs: H_kk^-1 G_k.

    The original weights when every unit stays.
    """
    if len(keep) == problem.units:
        return problem.dense.clone()
    rows = kept_rows(problem, keep)
    solved = torch.cholesky_solve(problem.G[rows], torch.linalg.cholesky(problem.H[rows][:, rows]))
    weight = torch.zeros_like(problem.dense)
    weight[:, problem.rows[rows]] = solved.T.to(problem.dtype)
    return weight


def kept_rows(problem: Removal, keep: Tensor) -> Tensor:
    device = problem.B.device
    rows = rows_of(keep.to(device), problem.width).reshape(-1)
    return torch.cat([rows, torch.arange(problem.units * problem.width, len(problem.B), device=device)])


def output_error(problem: Removal, weight: Tensor) -> float:
    """Trace of (B - B')T H (B - B'): the squared error of the outputs, with the damping's part."""
    difference = problem.B - weight.to(problem.B).T[problem.rows]
    return float((difference * (problem.H @ difference)).sum())
