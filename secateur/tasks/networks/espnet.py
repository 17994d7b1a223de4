"""ESPNet: segmentation of street scenes with parallel dilated convolutions.

Mehta, Rastegari, Caspi, Shapiro, Hajishirzi 2018, https://arxiv.org/abs/1803.06815; parameter names of the published
checkpoints.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Conv(nn.Module):
    """A convolution without bias that keeps the size, or divides it by the stride."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1, dilation: int = 1):
        super().__init__()
        padding = (kernel - 1) // 2 * dilation
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, dilation, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class NormAct(nn.Module):
    """BatchNorm and PReLU."""

    def __init__(self, width: int):
        super().__init__()
        self.bn = nn.BatchNorm2d(width, eps=1e-3)
        self.act = nn.PReLU(width)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(x))


class ConvNormAct(NormAct):
    """Convolution, BatchNorm, PReLU."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1):
        super().__init__(outputs)
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, (kernel - 1) // 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.conv(x)))


class Pyramid(nn.Module):
    """Reduce, five dilations in parallel, and sums of ever more of them side by side, which removes gridding."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int):
        super().__init__()
        part = outputs // 5
        self.c1 = Conv(inputs, part, kernel, stride)
        self.d1 = Conv(part, outputs - 4 * part, 3)
        self.d2, self.d4, self.d8, self.d16 = (Conv(part, part, 3, dilation=d) for d in (2, 4, 8, 16))

    def forward(self, x: Tensor) -> Tensor:
        x = self.c1(x)
        total = self.d2(x)
        parts = [self.d1(x), total]
        for layer in (self.d4, self.d8, self.d16):
            total = total + layer(x)
            parts.append(total)
        return torch.cat(parts, 1)


class DownSample(Pyramid):
    """A pyramid at half the size."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__(inputs, outputs, 3, 2)
        self.bn = nn.BatchNorm2d(outputs, eps=1e-3)
        self.act = nn.PReLU(outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(super().forward(x)))


class Esp(Pyramid):
    """A pyramid with a shortcut where the widths agree."""

    def __init__(self, inputs: int, outputs: int, add: bool = True):
        super().__init__(inputs, outputs, 1, 1)
        self.bn = NormAct(outputs)
        self.add = add

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return self.bn(x + y if self.add else y)


class Encoder(nn.Module):
    """Three levels at a half, a quarter and an eighth of the size, each beside a reduced copy of the picture."""

    def __init__(self, classes: int, p: int, q: int):
        super().__init__()
        self.level1 = ConvNormAct(3, 16, 3, 2)
        self.b1 = NormAct(16 + 3)
        self.level2_0 = DownSample(16 + 3, 64)
        self.level2 = nn.ModuleList(Esp(64, 64) for _ in range(p))
        self.b2 = NormAct(128 + 3)
        self.level3_0 = DownSample(128 + 3, 128)
        self.level3 = nn.ModuleList(Esp(128, 128) for _ in range(q))
        self.b3 = NormAct(256)
        self.classifier = Conv(256, classes, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        half = F.avg_pool2d(x, 3, 2, 1)
        quarter = F.avg_pool2d(half, 3, 2, 1)
        first = self.b1(torch.cat([self.level1(x), half], 1))
        start = out = self.level2_0(first)
        for block in self.level2:
            out = block(out)
        second = self.b2(torch.cat([out, start, quarter], 1))
        start = out = self.level3_0(second)
        for block in self.level3:
            out = block(out)
        return first, second, self.classifier(self.b3(torch.cat([start, out], 1)))


class EspNet(nn.Module):
    """Logits of every pixel.

    >>> EspNet()(torch.zeros(1, 3, 64, 64)).shape
    torch.Size([1, 12, 64, 64])

    [N, 3, height, width] BGR, normalised -> [N, classes, height, width]; sides are multiples of 8.
    """

    def __init__(self, classes: int = 12, p: int = 2, q: int = 8):
        super().__init__()
        self.input_size = (3, 360, 480)
        self.encoder = Encoder(classes, p, q)
        self.level3_C = Conv(128 + 3, classes, 1)
        self.br = nn.BatchNorm2d(classes, eps=1e-3)
        self.conv = ConvNormAct(16 + 3 + classes, classes, 3)
        self.up_l3 = nn.Sequential(nn.ConvTranspose2d(classes, classes, 2, 2, bias=False))
        self.combine_l2_l3 = nn.Sequential(NormAct(2 * classes), Esp(2 * classes, classes, add=False))
        self.up_l2 = nn.Sequential(nn.ConvTranspose2d(classes, classes, 2, 2, bias=False), NormAct(classes))
        self.classifier = nn.ConvTranspose2d(classes, classes, 2, 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        first, second, deep = self.encoder(x)
        deep = self.up_l3(self.br(deep))
        out = self.up_l2(self.combine_l2_l3(torch.cat([self.level3_C(second), deep], 1)))
        return self.classifier(self.conv(torch.cat([out, first], 1)))
