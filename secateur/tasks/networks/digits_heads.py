"""One trunk, three tasks: which digit, mirrored or not, and how much ink."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class DigitsHeads(nn.Module):
    """Three 3 x 3 convolutions with BatchNorm that all tasks share, and a linear layer for each task.

    >>> DigitsHeads()(torch.zeros(2, 1, 8, 8)).shape
    torch.Size([2, 16])

    [batch, 16]: ten digits, two of whether it is mirrored, four amounts of ink.
    """

    def __init__(self) -> None:
        super().__init__()
        self.input_size = (1, 8, 8)
        self.conv1 = nn.Conv2d(1, 24, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(24)
        self.conv2 = nn.Conv2d(24, 48, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(48)
        self.conv3 = nn.Conv2d(48, 48, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(48)
        self.digit = nn.Linear(48 * 4, 10)
        self.mirrored = nn.Linear(48 * 4, 2)
        self.ink = nn.Linear(48 * 4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 2)
        x = F.relu(self.bn2(self.conv2(x)))
        x = F.max_pool2d(F.relu(self.bn3(self.conv3(x))), 2).flatten(1)
        return torch.cat((self.digit(x), self.mirrored(x), self.ink(x)), 1)
