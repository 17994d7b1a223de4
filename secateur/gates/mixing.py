"""Outputs of several widths, or depths, of one network mixed while it runs: what a `Choice` does to a model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from secateur.errors import SecateurError
from secateur.gates.choice import Choice, interpolate
from secateur.gates.points import Points
from secateur.utils.running import with_residual

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def widths_at(model: nn.Module, points: Points) -> dict[str, Tensor] | str:
    """Modules behind which the units of a group lie whole, with the channels [units, k] of each unit; or why none do."""
    if points.place == "producers":
        return "norms mix its units, so that none of its widths stands alone"
    if points.place == "norms":
        slices = [s for s in points.soft if s.role == "vector"]
    else:
        slices = [s for s in (*points.soft, *points.closed) if s.role == "out"]
    found = {s.name.rpartition(".")[0]: s.index for s in slices}
    if points.place == "consumers":
        for path in found:
            if not isinstance(model.get_submodule(path), (nn.Linear, *CONVOLUTIONS)):
                return f"{path} makes its units, and is no linear layer or convolution"
    return found or "no layer makes its units"


class Widths(nn.Module):
    """One module's output at several widths of one group, each with a norm of its own where the module is a BatchNorm.

    index: [units, k], the channels of each unit. Channels of no unit are as the module gives them; those behind the widest
    width that is mixed are 0.
    """

    def __init__(self, module: nn.Module, law: Choice, index: Tensor):
        super().__init__()
        self.counts, self.each = law.counts, index.shape[1]
        channels = index.flatten()
        self.register_buffer("channels", channels.to(_device(module)), persistent=False)
        self.run = bool((channels.diff() == 1).all())
        self.first = int(channels[0])
        self.dim = -1 if isinstance(module, nn.Linear) else 1
        self.norms = nn.ModuleList()
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            self.norms.extend(_narrowed(module, self._channels(count)) for count in law.counts)

    def forward(self, given: Tensor, made: Tensor, numbers: list[int], weights: Tensor) -> Tensor:
        """given, made: what went into the module and came out."""
        widest, dim = max(self.counts[n] for n in numbers), self.dim % made.dim()
        mixed: Any = 0
        for number, weight in zip(numbers, weights):
            y = self._of(given if self.norms else made, self.counts[number])
            if self.norms:
                y = self.norms[number](y)
            if self.counts[number] != widest:
                y = interpolate(y.unflatten(dim, (-1, self.each)), widest, dim).flatten(dim, dim + 1)
            mixed = mixed + weight.to(y) * y
        if self.run and len(self.get_buffer("channels")) == made.shape[dim]:
            closed = list(mixed.shape)
            closed[dim] = made.shape[dim] - mixed.shape[dim]
            return torch.cat([mixed, mixed.new_zeros(closed)], dim)
        whole = made.index_fill(dim, self._channels(max(self.counts)), 0)
        return whole.index_copy(dim, self._channels(widest), mixed.to(whole))

    def _of(self, tensor: Tensor, count: int) -> Tensor:
        if self.run:  # a view
            return tensor.narrow(self.dim, self.first, count * self.each)
        return tensor.index_select(self.dim, self._channels(count))

    def _channels(self, count: int) -> Tensor:
        channels = self.get_buffer("channels")
        return channels[: count * self.each]


def _device(module: nn.Module) -> torch.device | None:
    return next((p.device for p in module.parameters()), None)


def _narrowed(norm: nn.Module, channels: Tensor) -> nn.Module:
    """A BatchNorm of these channels alone."""
    small: Any = copy.deepcopy(norm)
    small.num_features = len(channels)
    for name, parameter in norm.named_parameters(recurse=False):
        setattr(small, name, nn.Parameter(parameter.detach()[channels].clone()))
    for name, buffer in norm.named_buffers(recurse=False):
        if buffer.dim():
            setattr(small, name, buffer[channels].clone())
    return small


class Mixing:
    """While the model runs, outputs are those of the widths and depths that were drawn, or decided."""

    def __init__(
        self,
        model: nn.Module,
        choices: Mapping[str, tuple[Choice, Points]],
        widths: Mapping[str, Mapping[str, nn.Module]],
        training: bool,
    ):
        self.model, self.choices, self.widths, self.training = model, choices, widths, training
        self.handles: list[Any] = []

    def __enter__(self) -> None:
        for name, (law, points) in self.choices.items():
            mixed = law.drawn if self.training else ([law.likeliest()], torch.ones(1))
            for path, sizes in self.widths.get(name, {}).items():
                hook = _behind(sizes, *mixed)
                self.handles.append(self.model.get_submodule(path).register_forward_hook(hook))
            if points.blocks and self.training:
                states: list[Tensor] = []
                for path in points.blocks:
                    block = self.model.get_submodule(path)
                    depths = _block(name, law, states, mixed[1])
                    self.handles.append(block.register_forward_hook(depths, with_kwargs=True))

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles.clear()


def _behind(sizes: nn.Module, numbers: list[int], weights: Tensor) -> Callable[..., Tensor]:
    def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return sizes(args[0], output, numbers, weights)

    return hook


def _block(name: str, law: Choice, states: list[Tensor], weights: Tensor) -> Callable[..., Any]:
    """Behind each block of a stage: the state is kept, and behind the last one they are mixed."""

    def mix(given: Tensor, made: Tensor) -> Tensor:
        if states and given is not states[-1] and not torch.equal(given, states[-1]):
            raise SecateurError(
                "something stands between its blocks, so its depths can't be mixed",
                where=name,
                fix="search widths only: kinds=('channels',)",
            )
        states.append(made)
        if len(states) < law.units:
            return made
        kept = [states[count - 1] for count in law.counts]
        states.clear()
        return torch.stack([weight.to(y) * y for weight, y in zip(weights, kept)]).sum(0)

    def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        return with_residual(output, (args, kwargs), mix)

    return hook
