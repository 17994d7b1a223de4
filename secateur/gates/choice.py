"""A choice among widths of a group, or depths of a stage, by Gumbel noise (TAS, arXiv 1905.09717; spec: tas)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secateur.errors import SecateurError
from secateur.gates.laws import Law, uniform_like
from secateur.graph import Group

TENTHS = range(3, 11)


def width_choices(units: int) -> tuple[int, ...]:
    """The widths that are tried: 30, 40, ... 100 % of the units, in whole units, one at least.

    >>> width_choices(16)
    (4, 6, 8, 9, 11, 12, 14, 16)
    """
    return tuple(sorted({max(1, units * tenths // 10) for tenths in TENTHS}))


def depth_choices(blocks: int) -> tuple[int, ...]:
    """The depths that are tried: all of up to three, else every second, and the whole stage.

    >>> depth_choices(3), depth_choices(18)
    ((1, 2, 3), (1, 3, 5, 7, 9, 11, 13, 15, 17, 18))
    """
    return tuple(sorted({*range(1, blocks + 1, 1 if blocks <= 3 else 2), blocks}))


def temperature(done: float, high: float = 5.0, low: float = 0.1) -> float:
    """Half a cosine from `high` to `low`; done: the share of the training that is over.

    >>> [round(temperature(done), 6) for done in (0, 0.25, 0.5, 1)]
    [5.0, 4.282412, 2.55, 0.1]
    """
    return low + (high - low) * (1 + math.cos(math.pi * done)) / 2


def noisy(logits: Tensor, noise: Tensor, tau: float) -> Tensor:
    """(log softmax(logits) + Gumbel noise) / tau, whose softmax is the relaxed draw."""
    if not tau > 0:
        raise SecateurError(
            f"{tau} isn't above 0", where="tau", fix="such as 5 at the start and 0.1 at the end"
        )
    return (logits.log_softmax(-1) + noise) / tau


def interpolate(y: Tensor, channels: int, dim: int = 1) -> Tensor:
    """Channel-wise interpolation: channel j is the mean of those from floor(j C / c) to ceil((j + 1) C / c) - 1.

    >>> interpolate(torch.tensor([[1.0, 2, 3, 4, 5]]), 3)
    tensor([[1.5000, 3.0000, 4.5000]])

    y: [..., C, ...] of any other axes; C lies along `dim`.
    """
    if y.shape[dim] == channels:
        return y
    flat = y.movedim(dim, 0).flatten(1)
    pooled = F.adaptive_avg_pool2d(flat[None], (channels, flat.shape[1]))[0]
    return pooled.unflatten(1, y.movedim(dim, 0).shape[1:]).movedim(0, dim)


class Choice(Law):
    """One of several counts of units, the first ones of the group; two of them, or all, are mixed while it is learned.

    >>> law = Choice(16, width_choices(16))
    >>> law.keep().shape, int(law.value().sum()) in law.counts
    (torch.Size([16]), True)

    counts: rising, the last is all units. pair: yes: each draw mixes two different counts (widths); no: all (depths).
    tau: temperature of the draws, or what gives it. Logits begin at N(0, 0.01^2), drawn from torch's random state.
    """

    def __init__(
        self,
        units: int,
        counts: Sequence[int],
        pair: bool = True,
        tau: float | Callable[[], float] = 5.0,
    ):
        super().__init__(units)
        counts = tuple(counts)
        if len(counts) < 2 or list(counts) != sorted(set(counts)) or counts[0] < 1 or counts[-1] != units:
            raise SecateurError(
                f"counts {counts} for {units} units",
                where="Choice",
                fix="two or more, rising, the last all units",
            )
        self.counts, self.pair, self.tau = counts, pair, tau
        self.logits = nn.Parameter(0.01 * torch.randn(len(counts)))
        self.drawn: tuple[list[int], Tensor] = ([len(counts) - 1], torch.ones(1))
        """Numbers of the counts that the last draw mixes, and their weights, with a gradient."""

    def draw(self, generator: torch.Generator | None = None) -> tuple[list[int], Tensor]:
        """Numbers of the counts that are mixed, and their weights."""
        noise = -torch.log(-torch.log(uniform_like(self.logits, generator)))
        z = noisy(self.logits, noise, self.tau() if callable(self.tau) else self.tau)
        if not self.pair:
            return [*range(len(self.counts))], z.softmax(-1)
        chances = z.detach().softmax(-1).cpu() + 1e-7
        two: list[int] = torch.multinomial(chances, 2, generator=generator).tolist()
        return two, z[two].softmax(-1)

    def sample(self, generator: torch.Generator | None = None, rows: tuple[int, ...] = ()) -> Tensor:
        """Which units any of the mixed counts has, [units]; `drawn` has the weights, and the gradient. One for all rows."""
        if not torch.isfinite(self.logits).all():
            return self._nothing()
        self.drawn = self.draw(generator)
        return self._first(max(self.counts[n] for n in self.drawn[0]))

    def probability(self) -> Tensor:
        """[counts], without noise."""
        return self.logits.softmax(-1)

    def keep(self) -> Tensor:
        units = torch.arange(self.units, device=self.logits.device)
        counts = torch.tensor(self.counts, device=units.device)
        return self.probability() @ (units < counts[:, None]).to(self.logits)

    def likeliest(self) -> int:
        """The number of the count that is decided for."""
        return int(self.logits.argmax())

    def value(self) -> Tensor:
        if not torch.isfinite(self.logits).all():
            return self._nothing()
        return self._first(self.counts[self.likeliest()])

    def _first(self, count: int) -> Tensor:
        return (torch.arange(self.units, device=self.logits.device) < count).to(self.logits)

    def _nothing(self) -> Tensor:
        """NaN, which the gated model refuses by the name of the group."""
        return self.logits.detach().new_full((self.units,), math.nan)


def counts_of(group: Group) -> tuple[int, ...]:
    """The sizes of a group that are tried: depths of a stage, widths of all else."""
    return depth_choices(group.size) if group.kind == "layers" else width_choices(group.size)


def choice_of(group: Group, tau: float | Callable[[], float] = 5.0) -> Choice:
    """The choice among a group's `counts_of`.

    >>> gated = place(model, graph, choice_of, kinds=("channels", "layers"))  # doctest: +SKIP

    Raises `SecateurError` where there is one count only, naming the group.
    """
    counts = counts_of(group)
    if len(counts) < 2:
        raise SecateurError(
            f"{group.size} of {group.kind} is too narrow for a choice",
            where=group.name,
            fix="leave the group out",
        )
    return Choice(group.size, counts, group.kind != "layers", tau)
