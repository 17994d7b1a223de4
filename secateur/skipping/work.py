"""What was really computed: multiply-adds of matrices and attention, for each picture, by what was alive."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from secateur.utils.screen import Screen


def weights_of(module: nn.Module) -> int:
    """Multiply-adds of one token in the matrices and convolutions (stride 1, padded) of a module.

    >>> weights_of(nn.Sequential(nn.Linear(3, 4), nn.Conv2d(4, 4, 3, groups=4)))
    48
    """
    parts = list(module.modules())
    fused = [m.in_proj_weight for m in parts if isinstance(m, nn.MultiheadAttention)]
    plain = [m.weight for m in parts if isinstance(m, nn.Linear | nn.Conv1d | nn.Conv2d)]
    return sum(weight.numel() for weight in (*plain, *fused) if weight is not None)


def block_macs(module: nn.Module, tokens: Tensor, width: int) -> Tensor:
    """Multiply-adds [B] of a transformer block on so many tokens [B]: matrices, q k^T and what is summed by it.

    >>> block_macs(nn.Linear(8, 8), torch.tensor([2]), 8).tolist()
    [192]
    """
    return tokens * weights_of(module) + 2 * tokens**2 * width


@dataclass(repr=False)
class Work(Screen):
    """Multiply-adds of the last run, for each picture: those that were done, and those of everything alive.

    >>> work = Work()
    >>> work.add(torch.tensor([30]), torch.tensor([60])); work.add(torch.tensor([10]), torch.tensor([20]))
    >>> work.share.tolist()
    [0.5]
    """

    done: Tensor | None = None
    """int64 [B]"""
    whole: Tensor | None = None
    """int64 [B]"""
    total: tuple[int, int] = (0, 0)
    """Of the runs before."""

    def add(self, done: Tensor, whole: Tensor) -> None:
        self.done = done if self.done is None else self.done + done
        self.whole = whole if self.whole is None else self.whole + whole

    def clear(self) -> None:
        """A new run begins."""
        self.total = self._all()
        self.done = self.whole = None

    def _all(self) -> tuple[int, int]:
        if self.done is None or self.whole is None:
            return self.total
        return self.total[0] + int(self.done.sum()), self.total[1] + int(self.whole.sum())

    @property
    def mean(self) -> float:
        """done / whole over all runs."""
        done, whole = self._all()
        return done / max(whole, 1)

    @property
    def share(self) -> Tensor:
        """[B] done / whole."""
        assert self.done is not None and self.whole is not None
        return self.done.double() / self.whole.double()
