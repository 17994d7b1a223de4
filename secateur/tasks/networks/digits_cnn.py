"""A small convolutional network for 8 x 8 pictures of digits."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class DigitsCnn(nn.Module):
    """Three 3 x 3 convolutions of 16, 32 and 32 channels with BatchNorm, the average over pixels, a linear layer.

    >>> DigitsCnn()(torch.zeros(2, 1, 8, 8)).shape
    torch.Size([2, 10])
    """

    def __init__(self, classes: int = 10):
        super().__init__()
        self.input_size = (1, 8, 8)
        self.conv1 = nn.Conv2d(1, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.conv2 = nn.Conv2d(16, 32, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(32)
        self.conv3 = nn.Conv2d(32, 32, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(32)
        self.linear = nn.Linear(32, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.max_pool2d(F.relu(self.bn2(self.conv2(x))), 2)
        x = F.relu(self.bn3(self.conv3(x)))
        return self.linear(x.mean((2, 3)))
