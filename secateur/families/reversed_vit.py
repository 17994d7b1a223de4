"""A vision transformer with reversed attention: a token sends to those it attends to.

Ding et al. 2023, "Visual Dependency Transformers", https://arxiv.org/abs/2304.03282. Spec: dependency-vit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secateur.errors import SecateurError
from secateur.utils.screen import Screen

OPEN = 2.0
"""Bias of a message controller at the start: seven eighths of a message go on. At 0 a half of it would leave in every block."""


@dataclass(repr=False)
class Messages(Screen):
    """The tokens inside a block, and what they say to each other.

    x [B, n, C]. log_m float32 [B, n]: the logarithm of how much each still sends. received float32 [B, n]: what arrived at it
    in this block. positions int64 [B, n]: its place in the picture, ascending; length: of all places. alive bool [B, n]: False where a token has left
    but its place is still computed (a masked pass); None: all of them.
    """

    x: Tensor
    log_m: Tensor
    received: Tensor
    positions: Tensor
    length: int
    alive: Tensor | None = None


Skip = Callable[[int, Messages], Messages]
"""(the block, counted from 1; its tokens between attention and MLP) -> those that go on."""


def reversed_attention(
    q: Tensor, k: Tensor, v: Tensor, heads: Tensor, message: Tensor, alive: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(what arrives at each token [B, H, n, d], the mass that arrives [B, n]).

    >>> q = k = v = torch.randn(1, 2, 5, 4)
    >>> out, received = reversed_attention(q, k, v, torch.full((1, 5, 2), 0.5), torch.ones(1, 5))
    >>> received.sum().round().item()  # as much as was sent
    5.0

    q, k, v: [B, H, n, d]. heads: [B, n, H], what share of its message a token sends by which head. message: [B, n], how much
    it sends. alive: bool [B, n], who can receive. Row i of softmax(q k^T / sqrt(d)) is how sender i divides its message; what
    arrives isn't normalised again.
    """
    share = heads.transpose(1, 2) * message[:, None]  # [B, H, n]
    forward = forward_attention(q, k, alive).transpose(-1, -2)  # [B, H, receiver, sender]
    out = forward @ (v * share[..., None].to(v.dtype))
    return out, (forward.float() @ share[..., None]).squeeze(-1).sum(1)


def forward_attention(q: Tensor, k: Tensor, alive: Tensor | None = None) -> Tensor:
    """[B, H, sender, receiver], rows sum to 1: how each token divides what it sends."""
    logits = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    if alive is not None:
        logits = logits.masked_fill(~alive[:, None, None], -torch.inf)
    return logits.softmax(-1)


class ReversedAttention(nn.Module):
    """Reversed attention with a head selector and a message controller."""

    def __init__(
        self, width: int, heads: int, tau: float = 0.1, selector: bool = True, controller: bool = True
    ):
        super().__init__()
        self.heads, self.tau = heads, tau
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.selector = nn.Linear(width, heads, bias=False) if selector else None
        self.controller = None
        if controller:
            last = nn.Linear(width // 2, 1)
            nn.init.constant_(last.bias, OPEN)
            self.controller = nn.Sequential(nn.Linear(width, width // 2, bias=False), nn.GELU(), last)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, log_m: Tensor, alive: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """(what each token gets [B, n, C], the new log_m [B, n], the mass received [B, n])."""
        q, k, v = self.parts(x)
        log_m = self.sends(x, log_m)
        message = log_m.exp() if alive is None else log_m.exp() * alive
        got, received = reversed_attention(q, k, v, self.chosen(x), message, alive)
        return self.out(got.transpose(1, 2).flatten(2)), log_m, received

    def parts(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v, each [B, H, n, d]."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return q, k, v

    def chosen(self, x: Tensor) -> Tensor:
        """[B, n, H], rows sum to 1: the head that each token sends by. All alike without a selector."""
        if self.selector is None:
            return x.new_full((*x.shape[:2], self.heads), 1 / self.heads, dtype=torch.float32)
        return (self.selector(x).float() / self.tau).softmax(-1)

    def sends(self, x: Tensor, log_m: Tensor) -> Tensor:
        """log_m after this block's controller."""
        if self.controller is None:
            return log_m
        return log_m + F.logsigmoid(self.controller(x).float()).squeeze(-1)

    def mask(self, x: Tensor, log_m: Tensor) -> Tensor:
        """The soft dependency mask A^M [B, receiver, sender]; column i sums to the message that token i sends."""
        q, k, _ = self.parts(x)
        share = self.chosen(x).transpose(1, 2) * self.sends(x, log_m).exp()[:, None]
        return (forward_attention(q, k).float() * share[..., None]).sum(1).transpose(1, 2)


class Block(nn.Module):
    """Reversed attention and an MLP, each behind a LayerNorm and scaled."""

    def __init__(self, width: int, heads: int, ratio: float, scale: float, **attention: float | bool):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = ReversedAttention(width, heads, **attention)  # type: ignore[arg-type]
        hidden = int(width * ratio)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))
        self.scale1 = nn.Parameter(torch.full((width,), scale))
        self.scale2 = nn.Parameter(torch.full((width,), scale))

    def forward(self, tokens: Messages, skip: Callable[[Messages], Messages] | None = None) -> Messages:
        got, log_m, received = self.attention(self.norm1(tokens.x), tokens.log_m, tokens.alive)
        tokens = replace(tokens, x=tokens.x + self.scale1 * got, log_m=log_m, received=received)
        if skip is not None:
            tokens = skip(tokens)
        return replace(tokens, x=tokens.x + self.scale2 * self.mlp(self.norm2(tokens.x)))


class ReversedVit(nn.Module):
    """A classifier of pictures: patches, blocks of reversed attention, the mean of what the tokens still send, a linear head.

    >>> net = ReversedVit(image=32, patch=4, width=64, depth=6, heads=4)
    >>> net(torch.zeros(2, 3, 32, 32)).shape
    torch.Size([2, 10])

    tau: temperature of the head selector. scale: LayerScale at the start. spread: deviation of the positions at the start; small
    networks that train for a short time need more of both. selector, controller: without either, all heads are
    sent by alike, or all messages stay whole. `skip` says which tokens go on, where something is attached.
    Raises `SecateurError` for sides or widths that don't divide.
    """

    def __init__(
        self,
        image: int = 224,
        patch: int = 16,
        channels: int = 3,
        classes: int = 10,
        width: int = 192,
        depth: int = 12,
        heads: int = 12,
        ratio: float = 4.0,
        tau: float = 0.1,
        scale: float = 1e-6,
        spread: float = 0.02,
        selector: bool = True,
        controller: bool = True,
    ):
        super().__init__()
        for whole, part, what in ((image, patch, "patches of"), (width, heads, "heads:")):
            if whole % part:
                raise SecateurError(
                    f"{whole} doesn't divide into {what} {part}",
                    where=type(self).__name__,
                    fix="give a divisor",
                )
        self.input_size = (channels, image, image)
        self.patch, self.tokens = patch, (image // patch) ** 2
        self.skip: Skip | None = None
        self.embed = nn.Conv2d(channels, width, patch, patch)
        self.position = nn.Parameter(torch.zeros(1, self.tokens, width))
        own = {"tau": tau, "selector": selector, "controller": controller}
        self.blocks = nn.ModuleList(Block(width, heads, ratio, scale, **own) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)
        nn.init.trunc_normal_(self.position, std=spread)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.start(x)
        for number, block in enumerate(self.blocks, 1):
            tokens = block(tokens, None if self.skip is None else partial(self.skip, number))
        said = self.norm(tokens.x) * tokens.log_m.exp()[..., None].to(tokens.x.dtype)
        if tokens.alive is None:
            return self.head(said.mean(1))
        return self.head((said * tokens.alive[..., None]).sum(1) / tokens.alive.sum(1, keepdim=True))

    def start(self, x: Tensor) -> Messages:
        """The patches of pictures [B, channels, side, side] as tokens that send everything."""
        patches = self.embed(x).flatten(2).transpose(1, 2)
        if patches.shape[1] != self.tokens:
            raise SecateurError(
                f"a picture {tuple(x.shape[2:])} has {patches.shape[1]} patches, and {self.tokens} have positions",
                where=type(self).__name__,
                fix=f"give pictures {round(self.tokens**0.5) * self.patch} pixels wide and high",
            )
        nothing = x.new_zeros(patches.shape[:2], dtype=torch.float32)
        places = torch.arange(self.tokens, device=x.device).expand(len(x), -1)
        return Messages(patches + self.position, nothing, nothing, places, self.tokens)

    def dependencies(self, x: Tensor) -> list[Tensor]:
        """The soft dependency mask [B, receiver, sender] of every block, with all tokens alive."""
        tokens, masks = self.start(x), []
        for block in self.blocks:
            assert isinstance(block, Block)
            masks.append(block.attention.mask(block.norm1(tokens.x), tokens.log_m))
            tokens = block(tokens)
        return masks
