"""How far a changed model's predictions are from those it had: KL over the most likely outcomes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from secateur.utils.batches import TOKENS_PER_BATCH
from secateur.utils.running import logits_of, run


def topk_kl(values: Tensor, candidate: Tensor) -> Tensor:
    """[...]: KL(dense || candidate) of the logits [..., K] at the dense model's top K, both softmaxed over the K only.

    >>> topk_kl(torch.tensor([2.0, 1.0]), torch.tensor([1.0, 1.0]))
    tensor(0.1109)
    """
    dense = values.float().log_softmax(-1)
    return (dense.exp() * (dense - candidate.float().log_softmax(-1))).sum(-1)


class TopKDivergence:
    """Mean KL over positions between a model as it was when this was made and as it is when called.

    >>> divergence = TopKDivergence(model, ids, k=1024)
    >>> divergence(((0, 512), (3, 100)))  # the first 512 tokens of sample 0, the first 100 of sample 3

    samples: token ids [samples, length], whose last position predicts nothing and is dropped, or a list of model inputs
    that can't be truncated: each counts as one token. Dense logits are kept on the CPU, 8 bytes times K a position.
    """

    def __init__(self, model: nn.Module, samples: Any, k: int = 8192):
        self.model, self.samples, self.ids = model, samples, isinstance(samples, Tensor)
        self.lengths = [samples.shape[1]] * len(samples) if self.ids else [1] * len(samples)
        self.top: list[tuple[Tensor, Tensor]] = []
        with torch.inference_mode():
            for start in range(0, len(samples), self._rows()):
                logits = self._logits(list(range(start, min(start + self._rows(), len(samples)))), None)
                for row in logits if self.ids else [logits]:
                    values, indices = row.topk(min(k, row.shape[-1]), dim=-1)
                    self.top.append((values.float().cpu(), indices.int().cpu()))

    def _rows(self, length: int | None = None) -> int:
        return max(1, TOKENS_PER_BATCH // (length or self.lengths[0])) if self.ids else 1

    def _logits(self, rows: list[int], length: int | None) -> Tensor:
        inputs = self.samples[rows][:, :length] if self.ids else self.samples[rows[0]]
        return logits_of(run(self.model, inputs))

    def __call__(self, batch: tuple[tuple[int, int], ...]) -> float:
        """Mean over the positions of `batch`: pairs of (sample, tokens taken from its start)."""
        total, count = 0.0, 0
        by_length: dict[int, list[int]] = {}
        for sample, take in batch:
            by_length.setdefault(take, []).append(sample)
        with torch.inference_mode():
            for take, members in by_length.items():
                for start in range(0, len(members), self._rows(take)):
                    rows = members[start : start + self._rows(take)]
                    logits = self._logits(rows, take)
                    for row, sample in zip(logits if self.ids else [logits], rows):
                        values, indices = self.top[sample]
                        if self.ids:
                            last = take - 1 or 1
                            row, values, indices = row[:last], values[:last], indices[:last]
                        kl = topk_kl(values.to(row.device), row.gather(-1, indices.to(row.device).long()))
                        total += float(kl.double().sum())
                        count += kl.numel()
        return total / count
