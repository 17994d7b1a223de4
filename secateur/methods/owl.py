"""OWL: Wanda with more weights left in the blocks that hold more outliers.

Yin et al. 2023, "Outlier Weighed Layerwise Sparsity (OWL): A Missing Secret Sauce for Pruning LLMs to High Sparsity",
https://arxiv.org/abs/2310.05175. Spec: weight-baselines, item 15.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from secateur.method import register
from secateur.methods.wanda import Wanda
from secateur.pruning.allocate import owl_shares
from secateur.pruning.context import Context
from secateur.taxonomy import record


@register
@dataclass
class OWL(Wanda):
    """Wanda, with a block's share moved by up to `lam` according to its outliers in the dense model.

    >>> secateur.prune(model, method="owl", target="30%", data=ids)  # doctest: +SKIP

    `allocation="owl"` gives other weight methods the same shares.
    """

    lam: float = field(default=0.08, metadata={"help": "how far a block's share may lie from the mean"})
    M: float = field(default=5.0, metadata={"help": "an outlier scores more than M times the block's mean"})

    allocation: ClassVar[str] = "owl"

    info = record("owl")

    def shares(self, context: Context, share: float) -> Mapping[str, float]:
        """By matrix: blocks whose scores have more outliers keep more."""
        stats, blocks = context.stats(self.statistics()), {m.block for m in context.matrices.values()}
        ratios = {
            block: self.outliers(
                self.scores(matrix.weight(), stats[name])
                for name, matrix in context.matrices.items()
                if matrix.block == block
            )
            for block in sorted(blocks)
        }
        of_block = dict(zip(ratios, owl_shares(list(ratios.values()), share, self.lam)))
        return {name: of_block[matrix.block] for name, matrix in context.matrices.items()}

    def outliers(self, scores: Iterable[Tensor]) -> float:
        """Percent of a block's scores, over all its matrices, that are above M times their mean.

        >>> OWL(M=2).outliers([torch.tensor([[1.0, 1.0, 1.0, 7.0]])])
        25.0
        """
        scores = list(scores)
        count = sum(s.numel() for s in scores)
        mean = sum(s.double().sum().item() for s in scores) / count
        return 100 * sum(int((s > self.M * mean).sum()) for s in scores) / count
