"""Small networks that enlarge pictures: VDSR, CARN-M and RFDN, under the parameter names of the common checkpoints.

Each knows what it was made for: `scale`, `luma` (it reads and writes brightness alone), `peak` (the value of white), and
`enlarged` (it reads pictures that were enlarged already).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

RGB_MEAN = (0.4488, 0.4371, 0.4040)
"""Mean of DIV2K, which CARN takes off its input and adds to its output."""


class ConvReLU(nn.Module):
    """A convolution without bias and a ReLU; VDSR's names for them."""

    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv(x))


class Vdsr(nn.Module):
    """Kim, Lee, Lee 2016, https://arxiv.org/abs/1511.04587: what is missing in an enlarged picture, by 20 convolutions.

    >>> Vdsr()(torch.zeros(1, 1, 24, 24)).shape
    torch.Size([1, 1, 24, 24])

    [N, 1, height, width] -> the same: luma (16..235 scale / 255), enlarged bicubically.
    """

    luma, peak, enlarged = True, 1.0, True

    def __init__(self, scale: int = 2, width: int = 64, depth: int = 20):
        super().__init__()
        self.scale, self.input_size = scale, (1, 48, 48)
        self.input = nn.Conv2d(1, width, 3, padding=1, bias=False)
        self.residual_layer = nn.Sequential(*(ConvReLU(width) for _ in range(depth - 2)))
        self.output = nn.Conv2d(width, 1, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.output(self.residual_layer(F.relu(self.input(x))))


class MeanShift(nn.Module):
    """Adds a colour."""

    shift: Tensor

    def __init__(self, sign: int):
        super().__init__()
        self.register_buffer("shift", sign * torch.tensor(RGB_MEAN)[:, None, None])

    def forward(self, x: Tensor) -> Tensor:
        return x + self.shift


class EfficientResidual(nn.Module):
    """Two grouped 3 x 3 convolutions, a 1 x 1, and a shortcut."""

    def __init__(self, width: int, groups: int):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1, groups=groups),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1, groups=groups),
            nn.ReLU(),
            nn.Conv2d(width, width, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + x)


class Fuse(nn.Module):
    """A 1 x 1 convolution of all that came before, and a ReLU."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(inputs, outputs, 1), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


class Cascade(nn.Module):
    """Three times the same residual block (its weights are shared), each result joined to all before it."""

    def __init__(self, width: int, groups: int):
        super().__init__()
        self.b1 = EfficientResidual(width, groups)
        self.c1, self.c2, self.c3 = (Fuse(width * k, width) for k in (2, 3, 4))

    def forward(self, x: Tensor) -> Tensor:
        joined = out = x
        for fuse in (self.c1, self.c2, self.c3):
            joined = torch.cat([joined, self.b1(out)], 1)
            out = fuse(joined)
        return out


class Enlarge(nn.Module):
    """Grouped 3 x 3 convolution, ReLU and pixel shuffle; twice for four times the size."""

    def __init__(self, width: int, scale: int, groups: int):
        super().__init__()
        parts: list[nn.Module] = []
        for step in (2, 2) if scale == 4 else (scale,):
            parts += [nn.Conv2d(width, width * step * step, 3, padding=1, groups=groups), nn.ReLU()]
            parts.append(nn.PixelShuffle(step))
        self.body = nn.Sequential(*parts)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


class CarnM(nn.Module):
    """Ahn, Kang, Sohn 2018, https://arxiv.org/abs/1803.08664: cascading residual blocks, the mobile one, for one scale.

    >>> CarnM(2)(torch.zeros(1, 3, 24, 24)).shape
    torch.Size([1, 3, 48, 48])

    [N, 3, height, width] -> [N, 3, scale * height, scale * width], RGB in 0..1. The published checkpoint holds the last
    stages of three scales; this has that of one.
    """

    luma, peak, enlarged = False, 1.0, False

    def __init__(self, scale: int = 2, width: int = 64, groups: int = 4):
        super().__init__()
        self.scale, self.input_size = scale, (3, 32, 32)
        self.sub_mean, self.add_mean = MeanShift(-1), MeanShift(1)
        self.entry = nn.Conv2d(3, width, 3, padding=1)
        self.b1, self.b2, self.b3 = (Cascade(width, groups) for _ in range(3))
        self.c1, self.c2, self.c3 = (Fuse(width * k, width) for k in (2, 3, 4))
        self.upsample = nn.ModuleDict({f"up{scale}": Enlarge(width, scale, groups)})
        self.exit = nn.Conv2d(width, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        joined = out = self.entry(self.sub_mean(x))
        for block, fuse in ((self.b1, self.c1), (self.b2, self.c2), (self.b3, self.c3)):
            joined = torch.cat([joined, block(out)], 1)
            out = fuse(joined)
        return self.add_mean(self.exit(self.upsample[f"up{self.scale}"](out)))


class SpatialAttention(nn.Module):
    """Enhanced spatial attention: a map in 0..1 from a strongly reduced copy of the features."""

    def __init__(self, width: int, inner: int):
        super().__init__()
        self.conv1 = nn.Conv2d(width, inner, 1)
        self.conv_f = nn.Conv2d(inner, inner, 1)
        self.conv2 = nn.Conv2d(inner, inner, 3, stride=2)
        self.conv_max = nn.Conv2d(inner, inner, 3, padding=1)
        self.conv3 = nn.Conv2d(inner, inner, 3, padding=1)
        self.conv3_ = nn.Conv2d(inner, inner, 3, padding=1)
        self.conv4 = nn.Conv2d(inner, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        near = self.conv1(x)
        far = F.max_pool2d(self.conv2(near), 7, 3)
        far = self.conv3_(F.relu(self.conv3(F.relu(self.conv_max(far)))))
        far = F.interpolate(far, x.shape[2:], mode="bilinear", align_corners=False)
        return x * torch.sigmoid(self.conv4(far + self.conv_f(near)))


class DistillationBlock(nn.Module):
    """Residual feature distillation: at each of three steps half of the channels are set aside, all at the end joined."""

    def __init__(self, width: int):
        super().__init__()
        half = width // 2
        self.c1_d, self.c2_d, self.c3_d = (nn.Conv2d(width, half, 1) for _ in range(3))
        self.c1_r, self.c2_r, self.c3_r = (nn.Conv2d(width, width, 3, padding=1) for _ in range(3))
        self.c4 = nn.Conv2d(width, half, 3, padding=1)
        self.c5 = nn.Conv2d(4 * half, width, 1)
        self.esa = SpatialAttention(width, width // 4)

    def forward(self, x: Tensor) -> Tensor:
        aside = []
        for aside_conv, residual in ((self.c1_d, self.c1_r), (self.c2_d, self.c2_r), (self.c3_d, self.c3_r)):
            aside.append(F.leaky_relu(aside_conv(x), 0.05))
            x = F.leaky_relu(residual(x) + x, 0.05)
        aside.append(F.leaky_relu(self.c4(x), 0.05))
        return self.esa(self.c5(torch.cat(aside, 1)))


class Rfdn(nn.Module):
    """Liu, Tang, Wu 2020, https://arxiv.org/abs/2009.11551: residual feature distillation, four times the size.

    >>> Rfdn()(torch.zeros(1, 3, 24, 24)).shape
    torch.Size([1, 3, 96, 96])

    [N, 3, height, width] -> [N, 3, scale * height, scale * width], RGB in 0..255; at least 17 pixels a side.
    """

    luma, peak, enlarged = False, 255.0, False

    def __init__(self, scale: int = 4, width: int = 50):
        super().__init__()
        self.scale, self.input_size = scale, (3, 32, 32)
        self.fea_conv = nn.Conv2d(3, width, 3, padding=1)
        self.B1, self.B2, self.B3, self.B4 = (DistillationBlock(width) for _ in range(4))
        self.c = nn.Sequential(nn.Conv2d(width * 4, width, 1), nn.LeakyReLU(0.05))
        self.LR_conv = nn.Conv2d(width, width, 3, padding=1)
        self.upsampler = nn.Sequential(nn.Conv2d(width, 3 * scale**2, 3, padding=1), nn.PixelShuffle(scale))

    def forward(self, x: Tensor) -> Tensor:
        first = out = self.fea_conv(x)
        made = []
        for block in (self.B1, self.B2, self.B3, self.B4):
            out = block(out)
            made.append(out)
        return self.upsampler(self.LR_conv(self.c(torch.cat(made, 1))) + first)
