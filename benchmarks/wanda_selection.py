"""Wanda's selection against a stable sort and a scatter, on the matrices of one block of SmolLM2-135M.

    python benchmarks/wanda_selection.py

fp32, CPU seconds of one thread, the best of several runs in turn. Both choose the same weights; that is checked first.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

from secateur.pruning.select import top_k_rows

SHAPES = {"q": (576, 576), "k": (192, 576), "v": (192, 576), "o": (576, 576)} | {
    "gate": (1536, 576),
    "up": (1536, 576),
    "down": (576, 1536),
}


def sort_and_scatter(scores: Tensor, keep: int) -> Tensor:
    """The kept mask as the official code forms it, but for ties, where the earlier weight stays here too."""
    order = torch.sort(scores, dim=1, stable=True, descending=True).indices
    mask = torch.zeros_like(scores, dtype=torch.bool)
    return mask.scatter_(1, order[:, :keep], True)


def best(function: Callable[..., object], *args: object, repeat: int = 7) -> float:
    times = []
    for _ in range(repeat):
        start = time.process_time()
        function(*args)
        times.append(time.process_time() - start)
    return min(times) * 1e3


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    total = [0.0, 0.0]
    print(f"{'matrix':>8} {'shape':>12} {'sort ms':>9} {'ours ms':>9} {'ratio':>6}")
    for name, (rows, columns) in SHAPES.items():
        scores = torch.randn(rows, columns).abs() * torch.rand(columns)
        keep = columns // 2
        if not torch.equal(sort_and_scatter(scores, keep), top_k_rows(scores, keep)):
            raise SystemExit(f"{name}: the masks differ")
        plain = best(sort_and_scatter, scores, keep)
        ours = best(top_k_rows, scores, keep)
        total[0] += plain
        total[1] += ours
        print(f"{name:>8} {f'{rows}x{columns}':>12} {plain:9.2f} {ours:9.2f} {plain / ours:6.1f}")
    print(f"{'block':>8} {'':>12} {total[0]:9.2f} {total[1]:9.2f} {total[0] / total[1]:6.1f}")


if __name__ == "__main__":
    main()
