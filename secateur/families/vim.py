"""A Mamba that reads the patches of a picture both ways, with a CLS token in their middle.

Zhu et al. 2024, "Vision Mamba", https://arxiv.org/abs/2401.09417. Spec: top-vim.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secateur.errors import SecateurError
from secateur.families.scan import Path, selective_scan
from secateur.utils.screen import Screen


class Direction(nn.Module):
    """One way through the tokens: a causal convolution, then the selective scan."""

    def __init__(self, inner: int, state: int, rank: int, kernel: int):
        super().__init__()
        self.kernel, self.rank, self.state = kernel, rank, state
        self.conv = nn.Conv1d(inner, inner, kernel, groups=inner, padding=kernel - 1)
        self.read = nn.Linear(inner, rank + 2 * state, bias=False)
        self.delta = nn.Linear(rank, inner)
        self.log_a = nn.Parameter(torch.arange(1, state + 1).float().log().repeat(inner, 1))
        self.d = nn.Parameter(torch.ones(inner))
        start = torch.empty(inner).uniform_(-6.9, -2.3).exp()  # of delta: 0.001 to 0.1
        with torch.no_grad():
            self.delta.bias.copy_(start + torch.log(-torch.expm1(-start)))

    def forward(self, x: Tensor, path: Path, name: str) -> Tensor:
        """x: [B, n, E] in the order of this way; gives the same."""
        x = F.silu(self.convolve(x, path))
        low, b, c = self.read(x).split([self.rank, self.state, self.state], -1)
        delta = F.softplus(self.delta(low).float())
        travel = None
        if not path.whole:
            travel = path.travel(delta, F.softplus(self.delta.bias.float()), name)
        path.remember(name, delta)
        if path.alive is not None:
            x = x * path.alive[..., None]
        return selective_scan(x, delta, -self.log_a.float().exp(), b, c, self.d, travel).to(x.dtype)

    def convolve(self, x: Tensor, path: Path) -> Tensor:
        """[B, n, E]: each token with the kernel - 1 before it."""
        count = x.shape[1]
        if path.whole:
            return self.conv(x.transpose(1, 2))[..., :count].transpose(1, 2)
        if path.conv == "zeros":
            if path.alive is not None:
                return self.conv((x * path.alive[..., None]).transpose(1, 2))[..., :count].transpose(1, 2)
            index = path.positions[..., None].expand_as(x)
            wide = x.new_zeros(len(x), path.length, x.shape[2]).scatter(1, index, x)
            return self.conv(wide.transpose(1, 2))[..., : path.length].transpose(1, 2).gather(1, index)
        if path.alive is None:
            return self.conv(x.transpose(1, 2))[..., :count].transpose(1, 2)
        order = (~path.alive).to(torch.uint8).argsort(dim=1, stable=True)[..., None].expand_as(x)
        made = self.conv(x.gather(1, order).transpose(1, 2))[..., :count].transpose(1, 2)
        return torch.empty_like(made).scatter(1, order, made)


class Mixer(nn.Module):
    """Two ways through the tokens, added, gated and projected."""

    def __init__(self, width: int, expand: int, state: int, kernel: int):
        super().__init__()
        inner, rank = expand * width, -(-width // 16)
        self.into = nn.Linear(width, 2 * inner, bias=False)
        self.forth = Direction(inner, state, rank, kernel)
        self.back = Direction(inner, state, rank, kernel)
        self.out = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor, path: Path) -> tuple[Tensor, Tensor]:
        """(what is added to the tokens [B, n, C], the gated output of the scans [B, n, E])."""
        x, gate = self.into(x).chunk(2, -1)
        y = self.forth(x, path, "forth") + self.back(x.flip(1), path.reversed(), "back").flip(1)
        y = y * F.silu(gate)
        return self.out(y), y


@dataclass(repr=False)
class Scanned(Screen):
    """Tokens behind a block: x [B, n, C], the way they stand on, and y [B, n, E], what the scans gave them, gated."""

    x: Tensor
    path: Path
    y: Tensor


Skip = Callable[[int, Scanned], Scanned]
"""(the block, counted from 1; the tokens behind it) -> those that go on."""


class Vim(nn.Module):
    """A classifier of pictures: patches with a CLS token in their middle, blocks that scan both ways, a linear head on the CLS.

    >>> net = Vim(image=32, patch=8, width=64, depth=4)
    >>> net(torch.zeros(2, 3, 32, 32)).shape
    torch.Size([2, 10])

    expand: inner width by width. state: numbers for each channel. kernel: of the convolution. `skip` says which tokens go on, and
    `path` what is known of the way before it begins, where something is attached. Raises `SecateurError` for sides that don't divide, and for an odd number of patches, between
    which nothing has a middle.
    """

    def __init__(
        self,
        image: int = 224,
        patch: int = 16,
        channels: int = 3,
        classes: int = 10,
        width: int = 192,
        depth: int = 24,
        expand: int = 2,
        state: int = 16,
        kernel: int = 4,
    ):
        super().__init__()
        if image % patch:
            raise SecateurError(
                f"{image} doesn't divide into patches of {patch}",
                where=type(self).__name__,
                fix="give a divisor",
            )
        self.input_size = (channels, image, image)
        self.patch, self.patches = patch, (image // patch) ** 2
        check_middle(self.patches + 1)
        self.skip: Skip | None = None
        self.path: Callable[[Path], Path] | None = None
        self.embed = nn.Conv2d(channels, width, patch, patch)
        self.cls = nn.Parameter(torch.zeros(1, 1, width))
        self.position = nn.Parameter(torch.zeros(1, self.patches + 1, width))
        self.norms = nn.ModuleList(nn.RMSNorm(width) for _ in range(depth))
        self.blocks = nn.ModuleList(Mixer(width, expand, state, kernel) for _ in range(depth))
        self.norm, self.head = nn.RMSNorm(width), nn.Linear(width, classes)
        nn.init.trunc_normal_(self.position, std=0.02)
        nn.init.trunc_normal_(self.cls, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        x = self.start(x)
        places = torch.arange(x.shape[1], device=x.device).expand(len(x), -1)
        path = Path(places, x.shape[1], places.new_full((len(x),), self.patches // 2))
        if self.path is not None:
            path = self.path(path)
        for number, (norm, block) in enumerate(zip(self.norms, self.blocks), 1):
            added, y = block(norm(x), path)
            x = x + added
            if self.skip is not None:
                tokens = self.skip(number, Scanned(x, path, y))
                x, path = tokens.x, tokens.path
        here = (path.positions < path.cls[:, None]).sum(1)
        return self.head(self.norm(x[torch.arange(len(x), device=x.device), here]))

    def start(self, x: Tensor) -> Tensor:
        """The patches of pictures [B, channels, side, side] as tokens, with the CLS token in their middle."""
        patches = self.embed(x).flatten(2).transpose(1, 2)
        if patches.shape[1] != self.patches:
            raise SecateurError(
                f"a picture {tuple(x.shape[2:])} has {patches.shape[1]} patches, and {self.patches} have positions",
                where=type(self).__name__,
                fix=f"give pictures {round(self.patches**0.5) * self.patch} pixels wide and high",
            )
        half, cls = self.patches // 2, self.cls.expand(len(x), -1, -1)
        return torch.cat([patches[:, :half], cls, patches[:, half:]], 1) + self.position


def check_middle(total: int) -> None:
    """Refuses a number of tokens, CLS among them, that has no middle.

    Raises `SecateurError`.
    """
    if total % 2 == 0:
        raise SecateurError(
            f"{total} tokens have no middle for the CLS token",
            where="Vim",
            fix="an even number of patches and the CLS token",
        )
