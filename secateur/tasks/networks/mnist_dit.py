"""A small transformer that draws digits: class-conditional, with classifier-free guidance, by a rectified flow.

Facts: sofia-dominguezc/MNIST-diffusion, commit 88bc058 (MIT), as described beside its weights.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH, HEADS, PATCH = 64, 4, 7
NONE = -1
"""The class of an unconditional drawing."""


class Attention(nn.Module):
    """Self-attention with one matrix for queries, keys and values each, so that single heads can leave."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads, self.head_dim = heads, width // heads
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width) for _ in range(3))
        self.to_out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length = x.shape[:2]
        q, k, v = (
            layer(x).view(batch, length, self.heads, self.head_dim).transpose(1, 2)
            for layer in (self.to_q, self.to_k, self.to_v)
        )
        out = F.scaled_dot_product_attention(q, k, v)
        return self.to_out(out.transpose(1, 2).reshape(batch, length, self.heads * self.head_dim))


class Block(nn.Module):
    """Attention and a feed-forward part, each with a norm behind its residual sum."""

    def __init__(self, width: int, heads: int, inner: int):
        super().__init__()
        self.attention = Attention(width, heads)
        self.linear1, self.linear2 = nn.Linear(width, inner), nn.Linear(inner, width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(x + self.attention(x))
        return self.norm2(x + self.linear2(F.gelu(self.linear1(x))))


class MnistDit(nn.Module):
    """Predicts the picture x1 from a mixture with noise.

    >>> MnistDit()(torch.zeros(2, 1, 28, 28), torch.zeros(2, 1), torch.tensor([3, -1])).shape
    torch.Size([2, 1, 28, 28])

    x: [batch, 1, 28, 28]; t: [batch, 1] in 0..1, 0 is noise; y: [batch] class, -1 for none. 208,705 parameters.
    """

    def __init__(self) -> None:
        super().__init__()
        self.pos_embed = nn.Parameter(torch.zeros(1, (28 // PATCH) ** 2, WIDTH))
        self.patch_embed = nn.Conv2d(1, WIDTH, PATCH, stride=PATCH)
        self.blocks = nn.ModuleList(Block(WIDTH, HEADS, 4 * WIDTH) for _ in range(4))
        self.unpatch = nn.ConvTranspose2d(WIDTH, 1, PATCH, stride=PATCH)
        self.y_encoder = nn.Embedding(11, 2 * WIDTH)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        batch = x.shape[0]
        tokens = self.patch_embed(x).flatten(2).transpose(1, 2) + self.pos_embed
        frequencies = 10_000.0 ** (-torch.arange(WIDTH, device=t.device) / (WIDTH - 1))
        angles = t * frequencies.to(t.dtype)
        time = torch.cat([angles.sin(), angles.cos()], 1).view(batch, 2, WIDTH)
        kind = self.y_encoder(torch.where(y < 0, 10, y)).view(batch, 2, WIDTH)
        h = torch.cat([tokens, time, kind], 1)
        for block in self.blocks:
            h = block(h)
        picture = h[:, : tokens.shape[1]].transpose(1, 2).unflatten(2, (28 // PATCH, 28 // PATCH))
        return self.unpatch(picture)


def from_published(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The published weights under this network's names: the stacked attention matrix in three."""
    renamed: dict[str, Tensor] = {}
    for name, value in state.items():
        name = name.replace("transformer.", "blocks.")
        if "in_proj_" in name:
            head, _, leaf = name.partition("self_attn.in_proj_")
            for part, piece in zip("qkv", value.chunk(3), strict=True):
                renamed[f"{head}attention.to_{part}.{leaf}"] = piece
        else:
            renamed[name.replace("self_attn.out_proj", "attention.to_out")] = value
    return renamed
