"""A selective scan over the tokens of a picture, and the way that it takes when some of them have left.

Gu and Dao 2023, "Mamba", https://arxiv.org/abs/2312.00752; positions that stay where they were when tokens leave: Zhan et al. 2024,
"Exploring Token Pruning in Vision State Space Models", https://arxiv.org/abs/2409.18962. Spec: top-vim.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from secateur.errors import SecateurError
from secateur.skipping.alive import gather_columns, pack
from secateur.utils.screen import Screen

GAPS = ("repeat", "cached", "bias", "identity")
"""What a state decays by at the places of tokens that have left: see `Path`."""
CONVS = ("condensed", "zeros")
"""What the convolution before the scan sees of them: nothing, or zeros."""
SHORT = 32
"""Steps that are done one by one."""


class LinearScan(torch.autograd.Function):
    """h_t = decay_t h_{t-1} + x_t along axis 1 of [B, L, ...], h_{-1} = 0.

    >>> LinearScan.apply(torch.full((1, 3), 0.5), torch.ones(1, 3))
    tensor([[1.0000, 1.5000, 1.7500]])

    Beyond 32 steps in chunks of about sqrt(L): one step of all chunks at once, then what each hands to the next, so that
    2 sqrt(L) operations do the work of L. Nothing is ever divided by a product of decays. The gradient is the same scan from the
    other end.
    """

    @staticmethod
    def forward(ctx: Any, decay: Tensor, x: Tensor) -> Tensor:
        h = _scan(decay, x)
        ctx.save_for_backward(decay, h)
        return h

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        decay, h = ctx.saved_tensors
        later = torch.cat([decay[:, 1:], torch.zeros_like(decay[:, :1])], 1)
        own = LinearScan.apply(later.flip(1), grad.flip(1)).flip(1)
        before = torch.cat([torch.zeros_like(h[:, :1]), h[:, :-1]], 1)
        return own * before, own


def _scan(decay: Tensor, x: Tensor) -> Tensor:
    length = x.shape[1]
    chunk = length if length <= SHORT else round(length**0.5)
    if short := -length % chunk:
        decay = torch.cat([decay, decay.new_ones(len(x), short, *x.shape[2:])], 1)
        x = torch.cat([x, x.new_zeros(len(x), short, *x.shape[2:])], 1)
    decay, h = decay.unflatten(1, (-1, chunk)), x.unflatten(1, (-1, chunk)).clone()
    for step in range(1, chunk):
        h[:, :, step].addcmul_(decay[:, :, step], h[:, :, step - 1])
    if h.shape[1] > 1:
        through = decay.cumprod(2)
        for part in range(1, h.shape[1]):
            h[:, part].addcmul_(through[:, part], h[:, part - 1, -1:])
    return h.flatten(1, 2)[:, :length]


def selective_scan(
    x: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor, travel: Tensor | None = None
) -> Tensor:
    """What a selective state space gives [B, L, E], float32.

    >>> x, delta = torch.randn(2, 7, 4), torch.rand(2, 7, 4)
    >>> b, c = torch.randn(2, 2, 7, 3)
    >>> selective_scan(x, delta, -torch.rand(4, 3), b, c, torch.ones(4)).shape
    torch.Size([2, 7, 4])

    x, delta: [B, L, E]. a: [E, S], negative. b, c: [B, L, S]. d: [E].
    travel: [B, L, E], what the state decays by on the way from the token before, where that is more than delta: the sum of the
    deltas of all positions passed. Raises `SecateurError` where delta holds NaN or infinity.
    """
    x, delta, b, c = x.float(), delta.float(), b.float(), c.float()
    if not torch.compiler.is_compiling() and not torch.isfinite(delta).all():
        raise SecateurError(
            "Delta holds NaN or infinity",
            where="selective scan",
            fix="check the weights and the pictures; train in float32 or with a lower lr",
        )
    decay = ((delta if travel is None else travel.float())[..., None] * a.float()).exp()
    h: Tensor = LinearScan.apply(decay, (delta * x)[..., None] * b[:, :, None])
    return torch.einsum("bles,bls->ble", h, c) + d.float() * x


@dataclass(repr=False)
class Path(Screen):
    """Where the tokens that are there stand on the way that the scan once took.

    positions int64 [B, n], ascending; length: of the whole way. cls int64 [B]: the place of the CLS token. alive bool [B, n]: in
    a masked pass, where the places of those that left are still computed; None: all of them. gap: what a state decays by at a
    place whose token has left: "repeat", the delta of the next that is there; "cached", the token's own in the last block where it
    was there; "bias", that of no input; "identity", nothing. conv: of `CONVS`. deltas: with "cached", [B, length, E] by direction.
    """

    positions: Tensor
    length: int
    cls: Tensor
    alive: Tensor | None = None
    gap: str = "repeat"
    conv: str = "condensed"
    deltas: dict[str, Tensor] = field(default_factory=dict)

    @property
    def whole(self) -> bool:
        """Whether nothing has left."""
        return self.alive is None and self.positions.shape[1] == self.length

    def reversed(self) -> Path:
        """The same way, walked from its other end."""
        return replace(
            self,
            positions=self.length - 1 - self.positions.flip(1),
            alive=None if self.alive is None else self.alive.flip(1),
        )

    def travel(self, delta: Tensor, rest: Tensor, direction: str) -> Tensor:
        """[B, n, E]: the sum of the deltas passed from the token before to each.

        delta: [B, n, E]; rest: [E], the delta of no input.
        """
        if self.alive is not None:
            own = {
                "repeat": lambda: self._next(delta),
                "cached": lambda: self.deltas[direction],
                "bias": lambda: rest,
                "identity": lambda: torch.zeros_like(delta),
            }[self.gap]()
            return torch.where(self.alive[..., None], delta, own)
        gap = self.positions.diff(dim=1, prepend=self.positions.new_full((len(delta), 1), -1))[..., None]
        if self.gap == "cached":
            return delta + self._passed(self.deltas[direction])
        return {
            "repeat": lambda: delta * gap,
            "bias": lambda: delta + rest * (gap - 1),
            "identity": lambda: delta,
        }[self.gap]()

    def _next(self, delta: Tensor) -> Tensor:
        """Delta of the next token that is there, at every place; of the last place behind all of them."""
        assert self.alive is not None
        places = torch.arange(self.length, device=delta.device).expand_as(self.alive)
        after = places.masked_fill(~self.alive, self.length - 1).flip(1).cummin(1).values.flip(1)
        return delta.gather(1, after[..., None].expand_as(delta))

    def _passed(self, deltas: Tensor) -> Tensor:
        """The deltas of those that left, added up at the next token that is there."""
        gone = torch.ones(deltas.shape[:2], device=deltas.device, dtype=torch.bool)
        gone = gone.scatter(1, self.positions, False)
        places = torch.arange(self.length, device=deltas.device).expand_as(gone).contiguous()
        following = torch.searchsorted(self.positions.contiguous(), places)  # n: behind the last
        count = self.positions.shape[1]
        sums = deltas.new_zeros(len(deltas), count + 1, deltas.shape[2])
        sums.scatter_add_(1, following[..., None].expand_as(deltas), deltas * gone[..., None])
        return sums[:, :count]

    def remember(self, direction: str, delta: Tensor) -> None:
        """Keep the deltas of those that are there, for when they have left."""
        if self.gap != "cached":
            return
        if self.alive is not None:
            self.deltas[direction] = torch.where(self.alive[..., None], delta, self.deltas[direction])
        elif direction in self.deltas:
            index = self.positions[..., None].expand_as(delta)
            self.deltas[direction] = self.deltas[direction].scatter(1, index, delta)
        else:
            self.deltas[direction] = delta

    def leave(
        self, x: Tensor, stays: Tensor, middle: bool = True, masked: bool = False
    ) -> tuple[Tensor, Path]:
        """(the tokens that go on, their way): those of x [B, n, C] that stay, bool [B, n], equally many and odd in every picture.

        middle: the CLS token stands between as many patches before as behind it, as near to its place as that allows, and every
        patch that it passes is one place further from it; else it stays at its place. masked: x stays whole, and the
        others are only marked.
        """
        index, _ = pack(stays)
        positions = index if masked else self.positions.gather(1, index)
        half = index.shape[1] // 2
        cls = self.cls[:, None]
        if middle and half:
            patches = positions[positions != cls].view(len(positions), -1)
            rank = patches - (patches > cls).long()  # among all patches
            place = self.cls.clamp(rank[:, half - 1] + 1, rank[:, half])[:, None]
        else:
            place = cls
        new = torch.arange(self.length, device=x.device).expand(len(x), -1)
        rank = new - (new > place).long()
        old = torch.where(new == place, cls, rank + (rank >= cls).long())  # which place each was before
        deltas = {
            name: gather_columns(d.flip(1), old).flip(1) if name == "back" else gather_columns(d, old)
            for name, d in self.deltas.items()
        }
        there = torch.zeros_like(old, dtype=torch.bool).scatter(1, positions, True).gather(1, old)
        path = replace(self, cls=place[:, 0], deltas=deltas)
        if masked:
            return gather_columns(x, old), replace(path, alive=there)
        positions, _ = pack(there)
        full = torch.zeros_like(old).scatter(
            1, self.positions, torch.arange(x.shape[1], device=x.device).expand_as(self.positions)
        )
        return gather_columns(x, full.gather(1, old.gather(1, positions))), replace(path, positions=positions)
