"""What a gate draws while it learns: hard-concrete, Gaussian, straight-through.

A law is a small module with one row of parameters. `sample` draws from torch's global random state, which the training
loop seeds at every step, or from a generator.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from secateur.errors import SecateurError, choose


class Gate(nn.Module, ABC):
    """A gate for each unit of one group: how likely each stays, and what is decided."""

    opens_from_closed = False
    """Whether a gate at exactly 0 still gets a gradient."""

    def __init__(self, units: int):
        super().__init__()
        if units < 1:
            raise SecateurError(f"a gate of {units} units", where=type(self).__name__, fix="one unit or more")
        self.units = units

    @abstractmethod
    def keep(self) -> Tensor:
        """The probability that each unit stays, [units] in 0..1, with a gradient."""

    @abstractmethod
    def value(self) -> Tensor:
        """What the gate is without chance, [units]: 0 where it is closed."""


class Law(Gate):
    """A gate that is drawn, whatever the input."""

    @abstractmethod
    def sample(self, generator: torch.Generator | None = None, rows: tuple[int, ...] = ()) -> Tensor:
        """A draw, [units], or one for each of some rows, [*rows, units]; gradients reach the law's parameters."""


def uniform_like(like: Tensor, generator: torch.Generator | None, rows: tuple[int, ...] = ()) -> Tensor:
    """Numbers strictly between 0 and 1."""
    drawn = torch.rand((*rows, *like.shape), generator=generator, dtype=torch.float32)
    return drawn.clamp_(1e-6, 1 - 1e-6).to(like)


class HardConcrete(Law):
    """Zero and one with a probability above nothing, and a gradient between (Louizos et al. 2018, arXiv 1712.01312).

    >>> law = HardConcrete(2, start=0.0)
    >>> law.keep().tolist()  # doctest: +ELLIPSIS
    [0.8797..., 0.8797...]

    s = sigmoid((log(u + delta) - log(1 - u + delta) + lambda) / beta), stretched to gamma..zeta and clamped to 0..1.
    delta: bounds the noise, as EcoDiff does (arXiv 2412.02852); 0: the law as published.
    """

    def __init__(
        self,
        units: int,
        start: float = 3.0,
        beta: float = 0.83,
        gamma: float = -0.1,
        zeta: float = 1.1,
        delta: float = 0.0,
    ):
        super().__init__(units)
        if not (beta > 0 > gamma and zeta > 1 and delta >= 0):
            raise SecateurError(
                f"beta {beta}, gamma {gamma}, zeta {zeta}, delta {delta}",
                where="HardConcrete",
                fix="beta above 0, gamma below 0, zeta above 1, delta 0 or more",
            )
        self.beta, self.gamma, self.zeta, self.delta = beta, gamma, zeta, delta
        self.logits = nn.Parameter(torch.full((units,), float(start)))

    def at(self, u: Tensor) -> Tensor:
        """The gate at these draws u of 0..1."""
        noise = torch.log(u + self.delta) - torch.log(1 - u + self.delta)
        stretched = torch.sigmoid((noise + self.logits) / self.beta)
        return (stretched * (self.zeta - self.gamma) + self.gamma).clamp(0, 1)

    def sample(self, generator: torch.Generator | None = None, rows: tuple[int, ...] = ()) -> Tensor:
        return self.at(uniform_like(self.logits, generator, rows))

    def keep(self) -> Tensor:
        return torch.sigmoid(self.logits - self.beta * math.log(-self.gamma / self.zeta))

    def value(self) -> Tensor:
        return (torch.sigmoid(self.logits) * (self.zeta - self.gamma) + self.gamma).clamp(0, 1)


class Gaussian(Law):
    """z ~ N(mu, sigma^2): the variational information bottleneck (Dai et al. 2018, arXiv 1802.10399; spec: vtrans).

    >>> law = Gaussian(3)
    >>> law.kl().shape, bool((law.value() != 0).all())
    (torch.Size([]), True)

    A unit stays while sigma^2 < mu^2; without chance its gate is mu. sharpness: b of the soft count sigmoid(-b log alpha).
    """

    def __init__(self, units: int, sharpness: float = 10.0, generator: torch.Generator | None = None):
        super().__init__(units)
        if not sharpness > 0:
            raise SecateurError(f"{sharpness} isn't above 0", where="sharpness")
        self.sharpness = sharpness
        self.mu = nn.Parameter(1 + 0.01 * torch.randn(units, generator=generator))
        self.log_variance = nn.Parameter(-9 + 0.01 * torch.randn(units, generator=generator))

    def log_alpha(self) -> Tensor:
        """log(sigma^2 / mu^2), [units], in float32."""
        return self.log_variance.float() - torch.log(self.mu.float() ** 2 + 1e-8)

    def sample(self, generator: torch.Generator | None = None, rows: tuple[int, ...] = ()) -> Tensor:
        noise = torch.randn((*rows, *self.mu.shape), generator=generator).to(self.mu)
        return self.mu + noise * torch.exp(self.log_variance / 2)

    def keep(self) -> Tensor:
        return torch.sigmoid(-self.sharpness * self.log_alpha())

    def value(self) -> Tensor:
        return self.mu * (self.log_alpha() < 0)

    def kl(self) -> Tensor:
        """sum 1/2 log(1 + mu^2 / sigma^2): what the bottleneck adds to the loss."""
        ratio = self.mu.float() ** 2 / (torch.exp(self.log_variance.float()) + 1e-8)
        return 0.5 * torch.log1p(ratio).sum()


GRADIENTS = ("sigmoid", "identity")


def hard_step(logits: Tensor, gradient: str = "sigmoid") -> Tensor:
    """1 where a logit is above 0, else 0; backward as if it were the sigmoid, or the logit itself.

    >>> hard_step(torch.tensor([2.0, -1.0]))
    tensor([1., 0.])
    """
    choose(gradient, GRADIENTS, what="gradient", where="hard_step")
    smooth = torch.sigmoid(logits) if gradient == "sigmoid" else logits
    # in this order the difference is exactly 0, so that the value is exactly 0 or 1
    return (logits > 0).to(logits) + (smooth - smooth.detach())


class StraightThrough(Law):
    """A hard step with a smooth gradient: open where the logit is above 0.

    >>> StraightThrough(2).value()
    tensor([1., 1.])
    """

    opens_from_closed = True

    def __init__(self, units: int, gradient: str = "sigmoid", start: float | Sequence[float] = 1.0):
        super().__init__(units)
        self.gradient = choose(gradient, GRADIENTS, what="gradient", where="StraightThrough")
        self.logits = nn.Parameter(torch.as_tensor(start, dtype=torch.float32).expand(units).clone())

    def sample(self, generator: torch.Generator | None = None, rows: tuple[int, ...] = ()) -> Tensor:
        return hard_step(self.logits, self.gradient).expand(*rows, self.units)

    def keep(self) -> Tensor:
        return torch.sigmoid(self.logits)

    def value(self) -> Tensor:
        return (self.logits > 0).to(self.logits)
