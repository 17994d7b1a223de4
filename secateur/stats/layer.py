"""What is known of one layer's data: norms, moments and Hessian of its inputs, gradients of its weight. All in fp32."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from secateur.errors import SecateurError

OF_INPUTS = frozenset({"input_norm", "hessian", "input_mean", "input_var", "input_abs"})
OF_GRADIENTS = frozenset({"gradient", "fisher"})
NEEDS = OF_INPUTS | OF_GRADIENTS
SUMS = ("outer", "square", "mean", "deviation", "absolute")
CHUNK = 1 << 23
"""Numbers cast to fp32 at a time."""


class InputStats:
    """Running sums over a layer's input rows; one object for all layers that read the same tensor.

    >>> inputs = InputStats(4, {"hessian"})
    >>> inputs.add(torch.randn(16, 4)); inputs.sequences += 1

    With `parts` > 1 (experts, convolution groups) every part has rows of its own and all sums are [parts, ...].
    """

    def __init__(
        self, size: int, needs: frozenset[str] | set[str], device: torch.device | None = None, parts: int = 1
    ):
        self.size, self.needs, self.parts = size, frozenset(needs), parts
        self.sequences = 0
        self.tokens = [0] * parts

        def zeros(wanted: bool, *shape: int) -> Tensor | None:
            return torch.zeros(parts, *shape, dtype=torch.float32, device=device) if wanted else None

        moments = bool({"input_mean", "input_var"} & self.needs)
        self.outer = zeros("hessian" in needs, size, size)
        self.square = zeros("input_norm" in needs and "hessian" not in needs, size)
        self.mean, self.deviation = zeros(moments, size), zeros(moments, size)
        self.absolute = zeros("input_abs" in needs, size)
        self._factors: dict[tuple[float, int], Tensor] = {}

    def add(self, rows: Tensor, part: int = 0) -> None:
        """Adds rows [tokens, in] of one part."""
        self._factors.clear()
        band = max(64, -(-self.size // 8))
        for chunk in rows.split(max(1, CHUNK // self.size)):
            x = chunk.float()
            if not len(x):
                continue
            if self.outer is not None:
                # the upper triangle is enough, in bands
                for first in range(0, self.size, band):
                    rows_of = slice(first, first + band)
                    self.outer[part][rows_of, first:].addmm_(x[:, rows_of].T, x[:, first:])
            if self.square is not None:
                self.square[part] += torch.linalg.vector_norm(x, dim=0).square_()
            if self.absolute is not None:
                self.absolute[part] += x.abs().sum(0)
            if self.mean is not None and self.deviation is not None:
                before, count = self.tokens[part], len(x)
                mean = x.mean(0)
                shift = mean - self.mean[part]
                self.deviation[part] += (x - mean).square_().sum(0)
                self.deviation[part] += shift.square() * (before * count / (before + count))
                self.mean[part] += shift * (count / (before + count))
            self.tokens[part] += len(x)

    def add_parts(self, rows: Tensor) -> None:
        """Adds rows [parts, tokens, in], as many for every part; many small parts at once."""
        if self.parts == 1 or self.mean is not None or self.absolute is not None or not rows.shape[1]:
            for part, own in enumerate(rows):
                self.add(own, part)
            return
        self._factors.clear()
        x = rows.float()
        if self.outer is not None:
            self.outer.baddbmm_(x.transpose(1, 2), x)
        if self.square is not None:
            self.square += torch.linalg.vector_norm(x, dim=1).square_()
        self.tokens = [count + x.shape[1] for count in self.tokens]

    def finite(self) -> bool:
        sums = (self.outer, self.square, self.deviation, self.absolute)
        return all(bool(torch.isfinite(s).all()) for s in sums if s is not None)

    def hessian(self, part: int = 0) -> Tensor:
        """[in, in], 2 / sequences * sum of x xᵀ; the identity where no token came."""
        if self.outer is None:
            raise _missing("hessian")
        if not self.tokens[part]:
            return torch.eye(self.size, device=self.outer.device)
        upper = self.outer[part].triu() * (2 / self.sequences)
        return upper + upper.triu(1).T

    def norm(self, part: int = 0) -> Tensor:
        """[in], the root of the mean over sequences of the sum over tokens of x²; ones where no token came."""
        total = self.outer.diagonal(dim1=1, dim2=2) if self.outer is not None else self.square
        if total is None:
            raise _missing("input_norm")
        if not self.tokens[part]:
            return torch.ones_like(total[part])
        return (total[part] / self.sequences).sqrt_()

    def factor(self, damping: float = 0.01, part: int = 0) -> tuple[Tensor, Tensor]:
        """(R, dead): R upper triangular with R Rᵀ = Hessian + damping * mean(diagonal) * I, and the mask of inputs
        that are always zero, whose diagonal is set to 1 first. R⁻¹ is then SparseGPT's U: Hessian⁻¹ = Uᵀ U.

        Computed once for all layers that share these inputs.
        Raises `SecateurError` when the damped Hessian isn't positive definite.
        """
        key = (damping, part)
        if key not in self._factors:
            if self.outer is None:
                raise _missing("hessian")
            # the Cholesky factor of the matrix read backwards, read backwards, is upper triangular; only the lower
            # triangle of what goes in is looked at
            backwards = self.outer[part].flip(0, 1)
            diagonal = backwards.diagonal()
            if not self.tokens[part]:
                diagonal.fill_(1)
            else:
                backwards *= 2 / self.sequences
                diagonal[diagonal == 0] = 1
            diagonal += damping * diagonal.mean()
            lower, info = torch.linalg.cholesky_ex(backwards)
            if info.item():
                raise SecateurError(
                    "the Hessian isn't positive definite",
                    where=f"inputs of size {self.size}",
                    fix=f"raise damping (now {damping:g}) or give more calibration data",
                )
            del backwards, diagonal
            self._factors[key] = lower.flip(0, 1)
        upper = self._factors[key]
        return upper, self.dead(part)

    def dead(self, part: int = 0) -> Tensor:
        """[in] bool: inputs that were zero in every token."""
        if self.outer is None:
            raise _missing("hessian")
        if not self.tokens[part]:
            return torch.zeros(self.size, dtype=torch.bool, device=self.outer.device)
        return self.outer[part].diagonal() == 0

    def state(self) -> dict[str, Tensor]:
        """The sums and counts as tensors, to be kept on disk; `with_state` puts them back."""
        sums = {name: getattr(self, name) for name in SUMS}
        counts = {"sequences": torch.tensor(self.sequences), "tokens": torch.tensor(self.tokens)}
        return {name: tensor.clone() for name, tensor in sums.items() if tensor is not None} | counts

    def with_state(self, state: Mapping[str, Tensor]) -> InputStats:
        """This, holding what `state` gave of another of the same size and needs."""
        for name in SUMS:
            if (mine := getattr(self, name)) is not None:
                mine.copy_(state[name])
        self.sequences, self.tokens = int(state["sequences"]), state["tokens"].tolist()
        return self

    def release(self) -> None:
        """Drops the cached factors."""
        self._factors.clear()


class LayerStats:
    """The statistics of one matrix. What the method didn't list in `needs` raises when read.

    Attributes (fp32, on the weight's device)
    -----------------------------------------
    input_norm: [in], the root of the mean over sequences of the sum over tokens of x²
    hessian: [in, in], 2 / sequences * sum over tokens of x xᵀ
    input_mean, input_var: [in], over tokens; the variance is unbiased
    input_abs: [in], the mean over tokens of |x|
    gradient: [out, in], dLoss/dW; over batches the mean, weighted by tokens where the loss is the model's own
    fisher: [out, in], mean over single samples of (dLoss/dW)²
    name: the matrix's
    seed: the run's, for methods that draw
    inputs: the `InputStats` behind them, one object for all matrices with the same input tensor

    Spec: weight-baselines, 6-8 and 12.
    """

    def __init__(
        self,
        inputs: InputStats | None = None,
        *,
        name: str = "",
        part: int | None = None,
        gradient: Tensor | None = None,
        fisher: Tensor | None = None,
        seed: int = 0,
    ):
        self.inputs, self.name, self.part, self.seed = inputs, name, part, seed
        self._gradient, self._fisher = gradient, fisher

    @property
    def sequences(self) -> int:
        return self.inputs.sequences if self.inputs else 0

    @property
    def tokens(self) -> int:
        if self.inputs is None:
            return 0
        return sum(self.inputs.tokens) if self.part is None else self.inputs.tokens[self.part]

    @property
    def parts(self) -> int:
        """How many equal runs of rows have inputs of their own: experts, convolution groups; 1 for a plain layer."""
        return self.inputs.parts if self.inputs and self.part is None else 1

    def _one(self, name: str) -> tuple[InputStats, int]:
        if self.inputs is None:
            raise _missing(name)
        if self.part is None and self.inputs.parts > 1:
            raise SecateurError(
                f"the layer has {self.inputs.parts} parts (experts or groups) with inputs of their own",
                where=name,
                fix="go through stats.split(weight)",
            )
        return self.inputs, self.part or 0

    @property
    def input_norm(self) -> Tensor:
        inputs, part = self._one("input_norm")
        return inputs.norm(part)

    @property
    def hessian(self) -> Tensor:
        inputs, part = self._one("hessian")
        return inputs.hessian(part)

    @property
    def input_mean(self) -> Tensor:
        inputs, part = self._one("input_mean")
        if inputs.mean is None:
            raise _missing("input_mean")
        return inputs.mean[part].clone()

    @property
    def input_var(self) -> Tensor:
        inputs, part = self._one("input_var")
        if inputs.deviation is None:
            raise _missing("input_var")
        return inputs.deviation[part] / max(inputs.tokens[part] - 1, 1)

    @property
    def input_abs(self) -> Tensor:
        inputs, part = self._one("input_abs")
        if inputs.absolute is None:
            raise _missing("input_abs")
        return inputs.absolute[part] / max(inputs.tokens[part], 1)

    @property
    def gradient(self) -> Tensor:
        if self._gradient is None:
            raise _missing("gradient")
        return self._gradient

    @property
    def fisher(self) -> Tensor:
        if self._fisher is None:
            raise _missing("fisher")
        return self._fisher

    def split(self, weight: Tensor) -> Iterator[tuple[Tensor, LayerStats]]:
        """(rows of `weight` [out, in], their statistics) for every part; just (weight, self) for a plain layer."""
        parts = self.parts
        if parts == 1:
            yield weight, self
            return
        rows = len(weight) // parts
        for part in range(parts):
            own = slice(part * rows, (part + 1) * rows)
            yield (
                weight[own],
                LayerStats(
                    self.inputs,
                    name=f"{self.name}[{part}]",
                    part=part,
                    gradient=None if self._gradient is None else self._gradient[own],
                    fisher=None if self._fisher is None else self._fisher[own],
                    seed=self.seed,
                ),
            )


def check_needs(needs: frozenset[str] | set[str]) -> frozenset[str]:
    if unknown := set(needs) - NEEDS:
        raise SecateurError(
            f"there is no statistic {', '.join(sorted(unknown))}",
            where="needs",
            fix=f"one of {', '.join(sorted(NEEDS))}",
        )
    return frozenset(needs)


def _missing(name: str) -> SecateurError:
    return SecateurError(f"{name} wasn't gathered", where="stats", fix=f"list {name!r} in the method's needs")
