"""A small residual network for 8 x 8 pictures of digits: blocks that may leave whole."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    """Two 3 x 3 convolutions beside the identity (He et al. 2015, https://arxiv.org/abs/1512.03385)."""

    def __init__(self, width: int):
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(x + self.bn2(self.conv2(y)))


class DigitsResNet(nn.Module):
    """A stem, three blocks of 16 channels, a step to 32 channels on half the sides, three blocks, a linear layer.

    >>> DigitsResNet()(torch.zeros(2, 1, 8, 8)).shape
    torch.Size([2, 10])
    """

    def __init__(self, classes: int = 10):
        super().__init__()
        self.input_size = (1, 8, 8)
        self.stem = nn.Conv2d(1, 16, 3, padding=1, bias=False)
        self.stem_bn = nn.BatchNorm2d(16)
        self.stage1 = nn.Sequential(*(Block(16) for _ in range(3)))
        self.step = nn.Conv2d(16, 32, 3, stride=2, padding=1, bias=False)
        self.step_bn = nn.BatchNorm2d(32)
        self.stage2 = nn.Sequential(*(Block(32) for _ in range(3)))
        self.linear = nn.Linear(32, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stage1(F.relu(self.stem_bn(self.stem(x))))
        x = self.stage2(F.relu(self.step_bn(self.step(x))))
        return self.linear(x.mean((2, 3)))
