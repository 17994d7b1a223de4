"""What drives gates to a size: a penalty, a log cost that seeks a target, a Lagrangian whose multipliers ascend."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from secateur.errors import SecateurError


def penalty(cost: Tensor, weight: float = 1.0, target: float | None = None) -> Tensor:
    """weight * cost, or weight * |cost - target|, for a cost that is a share of the whole.

    >>> penalty(torch.tensor(0.6875), target=0.5)
    tensor(0.1875)
    """
    return weight * (cost if target is None else (cost - target).abs())


def log_cost(expected: Tensor, now: float, target: float, tolerance: float) -> Tensor:
    """log E where the network as it stands costs too much, -log E where too little, 0 within the tolerance.

    >>> log_cost(torch.tensor(1.0), now=60, target=57, tolerance=5)
    tensor(0.)
    >>> log_cost(torch.tensor(10.0), now=60, target=57, tolerance=5) > 0
    tensor(True)

    Above the target at all is too much; below it by more than the tolerance is too little (TAS, arXiv 1905.09717).
    Raises `SecateurError` where the tolerance is below 0.
    """
    if not tolerance >= 0:
        raise SecateurError(
            f"{tolerance} is below 0", where="tolerance", fix="such as 0.05 of the whole cost"
        )
    if now > target:
        return expected.log()
    return -expected.log() if now < target - tolerance else expected.log() * 0


class Lagrangian(nn.Module):
    """l1 (s - t) + l2 (s - t)^2: a bound that holds at the end, by multipliers that ascend from 0.

    >>> held = Lagrangian()
    >>> held(torch.tensor(0.3), 0.5)  # both multipliers are 0 yet
    tensor(0., grad_fn=<AddBackward0>)

    s: the expected sparsity, t: the one that is wanted. Give `groups()` to the optimiser: gradient ascent, no decay.
    """

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Parameter(torch.zeros(()))
        self.square = nn.Parameter(torch.zeros(()))

    def forward(self, sparsity: Tensor, target: float) -> Tensor:
        gap = (sparsity - target).float()
        return self.linear * gap + self.square * gap**2

    def groups(self, lr: float) -> dict[str, object]:
        """The optimiser's parameter group."""
        return {"params": [*self.parameters()], "lr": lr, "weight_decay": 0.0, "maximize": True}
