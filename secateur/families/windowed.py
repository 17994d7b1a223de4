"""A U-shaped transformer of windows that restores pictures: down, up, and over to what was there before, as LMD-ViT has it.

Wang et al. 2022, "Uformer", https://arxiv.org/abs/2106.03106; Li et al. 2024, https://arxiv.org/abs/2306.14268.
Maps are [B, H, W, C]; windows of side w have n = w * w places.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secateur.errors import SecateurError
from secateur.skipping.windows import advance

Choose = Callable[[int, Tensor], Tensor | None]
"""(the block, counted from 0; the map in front of it) -> policy [M] of 0 and 1 of the windows it works on; None: all."""


class WindowBlock(nn.Module):
    """Attention and a local feed-forward inside windows: (windows [M, n, C], mask [M, n, n], policy [M, 1, 1]) -> [M, n, C].

    The policy, of 0 and 1, multiplies what attention reads, and what both add: a window of policy 0 comes out as it went in.
    """

    def __init__(
        self, width: int, heads: int, side: int, shift: int, ratio: int = 4, modulated: bool = False
    ):
        super().__init__()
        self.heads, self.side, self.shift = heads, side, shift
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.bias = nn.Parameter(torch.zeros((2 * side - 1) ** 2, heads))
        self.modulator = nn.Parameter(torch.zeros(side * side, width)) if modulated else None
        self.up, self.down = nn.Linear(width, ratio * width), nn.Linear(ratio * width, width)
        self.local = nn.Conv2d(ratio * width, ratio * width, 3, groups=ratio * width)
        place = torch.stack(torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij"), -1).view(
            -1, 2
        )
        apart = place[:, None] - place[None] + side - 1
        self.register_buffer("apart", apart[..., 0] * (2 * side - 1) + apart[..., 1], persistent=False)

    def forward(self, x: Tensor, mask: Tensor | None = None, policy: Tensor | None = None) -> Tensor:
        if policy is None:
            x = x + self.attention(self.norm1(x), mask)
            return x + self.feed_forward(self.norm2(x))
        x = x + policy * self.attention(self.norm1(x) * policy, mask)
        return x + policy * self.feed_forward(self.norm2(x))

    def attention(self, x: Tensor, mask: Tensor | None) -> Tensor:
        if self.modulator is not None:
            x = x + self.modulator
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        bias = self.bias[self.apart].permute(2, 0, 1)[None].to(x.dtype)  # type: ignore[index]
        if mask is not None:
            bias = bias.masked_fill(~mask[:, None], torch.finfo(x.dtype).min)
        return self.proj(F.scaled_dot_product_attention(q, k, v, bias).transpose(1, 2).flatten(2))

    def feed_forward(self, x: Tensor) -> Tensor:
        """Linear, a 3 x 3 convolution of each channel inside the window (its border mirrored), linear."""
        grid = F.gelu(self.up(x)).mT.unflatten(2, (self.side, self.side))
        grid = F.gelu(self.local(F.pad(grid, (1, 1, 1, 1), mode="reflect")))
        return self.down(grid.flatten(2).mT)


class Predictor(nn.Module):
    """Two logits for every place, keep and drop, from what is there and what the whole map is: [B, H, W, C] -> [B, H, W, 2]."""

    def __init__(self, width: int):
        super().__init__()
        self.first, self.norm, self.second = (
            nn.Linear(width, width),
            nn.LayerNorm(width),
            nn.Linear(width, width),
        )
        self.score = nn.Sequential(
            nn.Linear(width, width // 2),
            nn.GELU(),
            nn.Linear(width // 2, width // 4),
            nn.GELU(),
            nn.Linear(width // 4, 2),
        )

    def forward(self, x: Tensor) -> Tensor:
        here, everywhere = self.second(self.norm(F.gelu(self.first(x)))).chunk(2, -1)
        return self.score(torch.cat([here, everywhere.mean((1, 2), keepdim=True).expand_as(here)], -1))


class Stage(nn.Module):
    """Blocks of one resolution, every second one shifted by half a window, and a predictor for either kind.

    Dense as it is. `choose` says which windows are worked on, where something is attached, and `masked` how.
    """

    def __init__(self, width: int, depth: int, heads: int, side: int, modulated: bool):
        super().__init__()
        self.blocks = nn.ModuleList(
            WindowBlock(width, heads, side, (i % 2) * (side // 2), modulated=modulated) for i in range(depth)
        )
        self.predictors = nn.ModuleList(Predictor(width) for _ in range(min(depth, 2)))
        self.choose: Choose | None = None
        self.masked = False

    def forward(self, x: Tensor) -> Tensor:
        for number, block in enumerate(self.blocks):
            assert isinstance(block, WindowBlock)
            policy = None if self.choose is None else self.choose(number, x)
            x = advance(block, x, policy, block.side, block.shift, self.masked)
        return x


class WindowedUNet(nn.Module):
    """Pictures [B, 3, H, W] in 0..1 -> restored ones, of any size: they are padded around and cut again.

    >>> WindowedUNet(8, (1, 1, 1), (1, 1, 1), side=4)(torch.zeros(1, 3, 18, 30)).shape
    torch.Size([1, 3, 18, 30])

    width: channels of the first stage, doubled at each level. depths, heads: of every stage, on the way down, at the bottom, and up.
    What it adds is gated: output = input + y * max(sigmoid(g), floor). Untrained it adds nothing.
    """

    def __init__(
        self,
        width: int = 32,
        depths: Sequence[int] = (1, 2, 8, 8, 2, 8, 8, 2, 1),
        heads: Sequence[int] = (1, 2, 4, 8, 16, 16, 8, 4, 2),
        side: int = 8,
        floor: float = 0.1,
    ):
        super().__init__()
        if len(depths) % 2 == 0 or len(heads) != len(depths):
            raise SecateurError(
                f"{len(depths)} depths and {len(heads)} heads make no U",
                where="WindowedUNet",
                fix="an odd number of stages, and heads for each",
            )
        self.levels, self.floor = len(depths) // 2, floor
        self.multiple = side * 2**self.levels
        sizes = [width * 2**level for level in range(self.levels + 1)]
        each = [*sizes, *(2 * size for size in sizes[-2::-1])]
        self.stages = nn.ModuleList(
            Stage(size, depth, count, side, modulated=number > self.levels)
            for number, (size, depth, count) in enumerate(zip(each, depths, heads, strict=True))
        )
        self.read = nn.Conv2d(3, width, 3, padding=1)
        self.shrink = nn.ModuleList(nn.Conv2d(size, 2 * size, 4, 2, 1) for size in sizes[:-1])
        below = [each[number] for number in range(self.levels, 2 * self.levels)]
        self.grow = nn.ModuleList(
            nn.ConvTranspose2d(before, size, 2, 2) for before, size in zip(below, sizes[-2::-1], strict=True)
        )
        self.write = nn.Conv2d(each[-1], 4, 3, padding=1)
        for weight in self.write.parameters():  # it begins as its input
            nn.init.zeros_(weight)

    def forward(self, picture: Tensor) -> Tensor:
        padded, (top, left) = pad_around(picture, self.multiple)
        x = F.leaky_relu(self.read(padded)).permute(0, 2, 3, 1)
        over = []
        for stage, shrink in zip(self.stages, self.shrink):
            x = stage(x)
            over.append(x)
            x = shrink(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        x = self.stages[self.levels](x)
        for stage, grow in zip(self.stages[self.levels + 1 :], self.grow):
            x = stage(torch.cat([grow(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1), over.pop()], -1))
        y, gate = self.write(x.permute(0, 3, 1, 2)).split((3, 1), 1)
        height, width = picture.shape[-2:]
        made = padded + y * gate.sigmoid().clamp(min=self.floor)
        return made[..., top : top + height, left : left + width]


def pad_around(x: Tensor, multiple: int) -> tuple[Tensor, tuple[int, int]]:
    """[B, C, H, W] in the middle of a size that `multiple` divides, its border repeated, and (top, left) of where it lies.

    >>> pad_around(torch.zeros(1, 3, 18, 32), 16)[0].shape
    torch.Size([1, 3, 32, 32])
    """
    down, across = (-x.shape[-2] % multiple, -x.shape[-1] % multiple)
    top, left = down // 2, across // 2
    if not down and not across:
        return x, (0, 0)
    return F.pad(x, (left, across - left, top, down - top), mode="replicate"), (top, left)
