"""Scores of units from the scores of the weights that leave with them, one coupled tensor after the other.

`Group.reduce` gathers over all of a unit's weights at once; here each tensor of the group has one say.
"""

from __future__ import annotations

from torch import Tensor

AGGREGATIONS = ("sum", "mean", "max", "prod", "first")


def slice_scores(scores: Tensor, dim: int, index: Tensor) -> Tensor:
    """[units]: the scores of what one tensor gives each unit, summed. index [units, k] along `dim`.

    >>> slice_scores(torch.ones(4, 3), 0, torch.tensor([[0, 1], [2, 3]]))
    tensor([6., 6.])

    scores: of every weight, or [lines] of every index along `dim`.
    """
    lines = scores if scores.dim() == 1 else scores.sum([d for d in range(scores.dim()) if d != dim])
    return lines[index.to(lines.device)].sum(1)


def aggregate(members: Tensor, how: str) -> Tensor:
    """[members, units] -> [units]: scores of a group's units from those of the tensors in it.

    >>> aggregate(torch.tensor([[1.0, 2.0], [3.0, 5.0]]), "prod")
    tensor([ 3., 10.])
    """
    if how == "max":
        return members.amax(0)
    return members[0] if how == "first" else getattr(members, how)(0)
