"""SparseGPT on one block of SmolLM2-135M's shapes, against the plain sweep with one Hessian per matrix.

    python benchmarks/sparsegpt_speed.py [--tokens 4096] [--pattern 50%]

fp32, CPU seconds of one thread, the best of three runs in turn. The reference goes column by column as the paper writes it: Hessian,
inverse, its Cholesky factor, blocks of 128 columns. Both must give the same weights to 1e-4 of the largest.
"""

from __future__ import annotations

import argparse
import time

import torch
from torch import Tensor

from secateur.methods.sparsegpt import SparseGPT
from secateur.pruning.select import Pattern
from secateur.stats.layer import InputStats, LayerStats

SHAPES = {"q": (576, 576), "k": (192, 576), "v": (192, 576), "o": (576, 576)} | {
    "gate": (1536, 576),
    "up": (1536, 576),
    "down": (576, 1536),
}
SHARED = [("q", "k", "v"), ("o",), ("gate", "up"), ("down",)]
SEQUENCES = 8


def reference_hessian(rows: Tensor) -> Tensor:
    return 2 / SEQUENCES * rows.T @ rows


def reference_sweep(weight: Tensor, hessian: Tensor, sparsity: float, n_m: tuple[int, int] | None) -> Tensor:
    """Frantar & Alistarh 2023, written out plainly; removes exactly ⌊sparsity * n⌋ of every block of columns."""
    weight, hessian = weight.clone(), hessian.clone()
    columns = weight.shape[1]
    dead = torch.diag(hessian) == 0
    hessian[dead, dead] = 1
    weight[:, dead] = 0
    diagonal = torch.arange(columns)
    hessian[diagonal, diagonal] += 0.01 * torch.mean(torch.diag(hessian))
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    factor = torch.linalg.cholesky(inverse, upper=True)
    for first in range(0, columns, 128):
        last = min(first + 128, columns)
        block = weight[:, first:last].clone()
        result, errors, mask = (
            torch.zeros_like(block),
            torch.zeros_like(block),
            torch.zeros_like(block, dtype=torch.bool),
        )
        own = factor[first:last, first:last]
        if n_m is None:
            score = block**2 / torch.diag(own).reshape(1, -1) ** 2
            mask = score <= torch.sort(score.flatten())[0][int(score.numel() * sparsity) - 1]
        for i in range(last - first):
            column, pivot = block[:, i], own[i, i]
            if n_m is not None and i % n_m[1] == 0:
                score = block[:, i : i + n_m[1]] ** 2 / torch.diag(own)[i : i + n_m[1]].reshape(1, -1) ** 2
                lowest = torch.topk(score, n_m[1] - n_m[0], dim=1, largest=False)[1]
                mask.scatter_(1, i + lowest, True)
            kept = column.clone()
            kept[mask[:, i]] = 0
            result[:, i] = kept
            error = (column - kept) / pivot
            block[:, i:] -= error.unsqueeze(1).matmul(own[i, i:].unsqueeze(0))
            errors[:, i] = error
        weight[:, first:last] = result
        weight[:, last:] -= errors.matmul(factor[first:last, last:])
    return weight


def ours(
    weights: dict[str, Tensor], stats: dict[str, LayerStats], n_m: tuple[int, int] | None
) -> dict[str, Tensor]:
    method, result = SparseGPT(), {}
    for names in SHARED:
        patterns = [Pattern(weights[name].numel() // 2, "layer", n_m) for name in names]
        solved = method._solve([weights[n] for n in names], [stats[n] for n in names], patterns)
        result |= {name: new for name, (new, _) in zip(names, solved)}
        for name in names:
            stats[name].inputs.release()  # type: ignore[union-attr]
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--pattern", choices=["50%", "2:4"], default="50%")
    arguments = parser.parse_args()
    n_m = (2, 4) if arguments.pattern == "2:4" else None
    torch.set_num_threads(1)
    torch.manual_seed(0)
    weights = {name: torch.randn(shape) / shape[1] ** 0.5 for name, shape in SHAPES.items()}
    rows = {}
    for names in SHARED:
        size = SHAPES[names[0]][1]
        mixed = torch.randn(arguments.tokens, size) @ (torch.randn(size, size) / size**0.5 + torch.eye(size))
        rows |= dict.fromkeys(names, mixed * torch.rand(size))

    best = {key: float("inf") for key in ("hessians, plain", "hessians, ours", "sweep, plain", "sweep, ours")}
    for _ in range(3):
        start = time.process_time()
        hessians = {name: reference_hessian(rows[name]) for name in SHAPES}
        middle = time.process_time()
        plain = {name: reference_sweep(weights[name], hessians[name], 0.5, n_m) for name in SHAPES}
        end = time.process_time()
        best["hessians, plain"] = min(best["hessians, plain"], middle - start)
        best["sweep, plain"] = min(best["sweep, plain"], end - middle)

        start = time.process_time()
        stats = {}
        for names in SHARED:
            inputs = InputStats(SHAPES[names[0]][1], {"hessian"})
            inputs.add(rows[names[0]])
            inputs.sequences = SEQUENCES
            stats |= {name: LayerStats(inputs, name=name) for name in names}
        middle = time.process_time()
        found = ours(weights, stats, n_m)
        end = time.process_time()
        best["hessians, ours"] = min(best["hessians, ours"], middle - start)
        best["sweep, ours"] = min(best["sweep, ours"], end - middle)

    for name in SHAPES:
        scale = plain[name].abs().max()
        apart = ((found[name] - plain[name]).abs().max() / scale).item()
        same = ((found[name] == 0) == (plain[name] == 0)).float().mean().item()
        print(f"{name:>5}: largest difference {apart:.1e}, mask agreement {same:.6f}")
    for key, seconds in best.items():
        print(f"{key:>16}: {seconds * 1e3:8.1f} ms")
    print(f"sweep: {best['sweep, plain'] / best['sweep, ours']:.2f} times faster")
    plain_total = best["hessians, plain"] + best["sweep, plain"]
    ours_total = best["hessians, ours"] + best["sweep, ours"]
    print(f"with the Hessians of {arguments.tokens} tokens: {plain_total / ours_total:.2f} times faster")


if __name__ == "__main__":
    main()
