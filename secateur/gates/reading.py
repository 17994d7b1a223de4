"""Gates that look at the input: a small network says for each sample which units run.

Facts of the scheme: Learning a Consensus Sub-Network, arXiv 2302.10798 (spec: consensus-subnetwork).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from secateur.errors import SecateurError
from secateur.gates.laws import Gate, hard_step
from secateur.gates.points import Points, entries
from secateur.utils.running import with_residual


class Reading(Gate):
    """Pool the input over places, two linear layers, a hard step: one answer a sample and unit.

    >>> law = Reading(4)
    >>> law(torch.randn(8, 16, 6, 6)).shape  # [batch, units]; its width is taken from the first input
    torch.Size([8, 4])

    blocks: whether each unit is a block with an input of its own, so that it has a network of its own. The last bias
    starts at `start`: all gates open, none saturated.
    """

    opens_from_closed = True

    def __init__(
        self,
        units: int,
        *,
        blocks: bool = False,
        hidden: int = 16,
        gradient: str = "sigmoid",
        start: float = 1.0,
    ):
        super().__init__(units)
        self.gradient, self.start = gradient, start
        self.nets = nn.ModuleList(
            nn.Sequential(nn.LazyLinear(hidden), nn.ReLU(), nn.Linear(hidden, 1 if blocks else units))
            for _ in range(units if blocks else 1)
        )
        self.blocks = blocks
        self.sure: dict[int, Tensor] = {}
        self.seen: dict[int, Tensor] = {}
        """The answers of the last forward, [batch, units of a network], by network, with their gradient."""
        for last in (net.get_submodule("2") for net in self.nets):
            nn.init.zeros_(last.get_parameter("weight"))
            nn.init.constant_(last.get_parameter("bias"), start)

    def forward(self, x: Tensor, number: int = 0) -> Tensor:
        pooled = x.flatten(2).mean(2) if x.dim() == 4 else (x.mean(1) if x.dim() == 3 else x)
        weight = self.nets[number].get_submodule("2").get_parameter("weight")
        logits = self.nets[number](pooled.to(weight.dtype))
        if not torch.isfinite(logits).all():
            raise SecateurError(
                "a gate's logit isn't finite", where="Reading", fix="lower the rate of the gates"
            )
        self.seen[number] = hard_step(logits, self.gradient)
        self.sure[number] = torch.sigmoid(logits).detach()
        return self.seen[number]

    def answers(self) -> Tensor:
        """What the last forward decided, [batch, units]."""
        if len(self.seen) < len(self.nets):
            raise SecateurError("no forward has run yet", where="Reading.answers")
        return torch.cat([self.seen[n] for n in range(len(self.nets))], 1)

    def probability(self) -> Tensor:
        """How sure the last forward was that each unit runs, [units], without a gradient."""
        return torch.cat([self.sure[n] for n in range(len(self.nets))], 1).mean(0)

    def keep(self) -> Tensor:
        return self.answers().mean(0)

    def value(self) -> Tensor:
        return (self.keep().detach() >= 0.5).float()


@torch.no_grad()
def answers_over(
    readers: Mapping[str, Reading], forwards: Iterable[object]
) -> dict[str, tuple[Tensor, Tensor]]:
    """By name, over all samples: the share that runs each unit, and how sure their gates are, [units] each.

    >>> answers_over(laws, (gated(x) for x in batches))  # doctest: +SKIP

    forwards: one forward is done for each of them. The shares are exact where all samples agree.
    """
    ran = {name: torch.zeros(law.units) for name, law in readers.items()}
    sure = {name: torch.zeros(law.units) for name, law in readers.items()}
    count = 0
    for _ in forwards:
        for name, law in readers.items():
            answers = law.answers().cpu()
            ran[name] += answers.sum(0)
            sure[name] += law.probability().cpu() * len(answers)
        count += len(answers)
    return {name: (ran[name] / count, sure[name] / count) for name in readers}


class Readers:
    """While the model runs, its units are multiplied by what each sample's gates say."""

    def __init__(self, model: nn.Module, readers: list[tuple[Reading, Points]]):
        self.model, self.readers = model, readers
        self.handles: list[Any] = []

    def __enter__(self) -> None:
        for law, points in self.readers:
            law.seen.clear()
            if points.blocks:
                for number, path in enumerate(points.blocks):
                    block = self.model.get_submodule(path)
                    hook = _gated_block(law, number)
                    self.handles.append(block.register_forward_hook(hook, with_kwargs=True))
                continue
            source, scaled = sites(self.model, points)
            self.handles.append(source.register_forward_pre_hook(_read(law), prepend=True))
            for module, index in scaled:
                if points.place == "norms":
                    self.handles.append(module.register_forward_hook(_behind(law, index)))
                else:
                    self.handles.append(module.register_forward_pre_hook(_before(law, index)))

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles.clear()


def sites(model: nn.Module, points: Points) -> tuple[nn.Module, list[tuple[nn.Module, Tensor]]]:
    """(the module whose input is read, [(a module whose channels are multiplied, channels of each unit)]).

    The norms behind the producers are multiplied as they come out, consumers as they go in. Raises `SecateurError` where
    the units are a stream, or a consumer reads them in groups.
    """
    producers = [s for s in (*points.soft, *points.closed) if s.role == "out"]
    found = {s.name.rpartition(".")[0]: s for s in points.soft}
    whole = [
        path
        for path, s in found.items()
        if points.place == "consumers"
        and _channels(model.get_submodule(path)) != model.get_parameter(s.name).shape[s.dim]
    ]
    if points.place == "producers" or not producers or whole:
        raise SecateurError(
            f"its gate meets {'a layer that reads in groups' if whole else 'a stream'}, which no input opens or closes",
            where=points.soft[0].name,
            fix="gate only layers, channels and neurons",
        )
    source = model.get_submodule(producers[0].name.rpartition(".")[0])
    return source, [(model.get_submodule(path), s.index) for path, s in found.items()]


def _channels(module: nn.Module) -> int:
    """How many channels go into a linear layer or convolution; 0 for other modules."""
    return int(getattr(module, "in_features", getattr(module, "in_channels", 0)))


def _read(law: Reading) -> Callable[..., None]:
    def hook(module: nn.Module, args: Any) -> None:
        law(args[0])

    return hook


def _behind(law: Reading, index: Tensor) -> Callable[..., Tensor]:
    def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return output * _at(law.seen[0], index, output, 1)

    return hook


def _before(law: Reading, index: Tensor) -> Callable[..., Any]:
    def hook(module: nn.Module, args: Any) -> Any:
        dim = args[0].dim() - 1 if isinstance(module, nn.Linear) else 1
        return (args[0] * _at(law.seen[0], index, args[0], dim), *args[1:])

    return hook


def _at(gates: Tensor, index: Tensor, value: Tensor, dim: int) -> Tensor:
    """The gates [batch, units] in a shape that multiplies a value whose channels lie along `dim`."""
    each = entries(gates, index, value.shape[dim]).to(value)
    return each.reshape([value.shape[d] if d in (0, dim) else 1 for d in range(value.dim())])


def _gated_block(law: Reading, number: int) -> Callable[..., Any]:
    def mix(given: Tensor, made: Tensor) -> Tensor:
        gate = law(given, number).to(made).reshape(-1, *[1] * (made.dim() - 1))
        return torch.lerp(given, made, gate.expand_as(made))

    def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        return with_residual(output, (args, kwargs), mix)

    return hook
