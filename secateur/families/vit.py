"""A small vision transformer in plain torch, for checks and small tasks. Dosovitskiy et al. 2021, https://arxiv.org/abs/2010.11929."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class VitBlock(nn.Module):
    """Pre-norm attention and MLP, each with a residual: states [B, N, D] -> [B, N, D]."""

    def __init__(self, width: int, heads: int, ratio: float = 4.0):
        super().__init__()
        self.heads, hidden = heads, int(width * ratio)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v, attn_mask).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class Vit(nn.Module):
    """Square pictures [B, 3, size, size] -> the states of all tokens [B, 1 + n, width], CLS first.

    >>> Vit(size=8, patch=2, width=16, depth=2, heads=2)(torch.zeros(1, 3, 8, 8)).shape
    torch.Size([1, 17, 16])
    """

    def __init__(self, size: int, patch: int, width: int, depth: int, heads: int):
        super().__init__()
        self.patch_embed = nn.Conv2d(3, width, patch, patch)
        self.cls = nn.Parameter(torch.zeros(1, 1, width))
        self.places = nn.Parameter(torch.randn(1, 1 + (size // patch) ** 2, width) * 0.02)
        self.blocks = nn.ModuleList(VitBlock(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patch_embed(x).flatten(2).mT
        states = torch.cat([self.cls.expand(len(x), -1, -1), tokens], 1) + self.places
        for block in self.blocks:
            states = block(states)
        return self.norm(states)
