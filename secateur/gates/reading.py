"""Gates that look at the input: a small network says for each sample which units run.

Facts of the scheme: Learning a Consensus Sub-Network, arXiv 2302.10798 (spec: consensus-subnetwork).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from secateur.errors import SecateurError
from secateur.gates.laws import Law, hard_step
from secateur.gates.points import Points


class Reading(Law):
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
                    self.handles.append(block.register_forward_hook(_gated_block(law, number)))
                continue
            source, scaled = sites(self.model, points)
            self.handles.append(source.register_forward_pre_hook(_read(law), prepend=True))
            self.handles += [module.register_forward_hook(_multiply(law, index)) for module, index in scaled]

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles.clear()


def sites(model: nn.Module, points: Points) -> tuple[nn.Module, list[tuple[nn.Module, Tensor]]]:
    """(the module whose input is read, [(a norm whose output is multiplied, channels of each unit)]).

    Raises `SecateurError` where the units aren't channels with a norm behind their producer.
    """
    if points.place != "norms":
        raise SecateurError(
            f"its gate meets the {points.place}, not a norm behind its producer",
            where=points.soft[0].name,
            fix="gate only layers, or channels with a norm",
        )
    producer = next(s for s in points.closed if s.role == "out")
    norms = {s.name.rpartition(".")[0]: s.index for s in points.soft}
    return (
        model.get_submodule(producer.name.rpartition(".")[0]),
        [(model.get_submodule(path), index) for path, index in norms.items()],
    )


def _read(law: Reading) -> Callable[..., None]:
    def hook(module: nn.Module, args: Any) -> None:
        law(args[0])

    return hook


def _multiply(law: Reading, index: Tensor) -> Callable[..., Tensor]:
    def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        gates = law.seen[0]
        each = torch.ones(len(gates), output.shape[1], dtype=gates.dtype, device=gates.device)
        each = each.index_put(
            (torch.arange(len(gates), device=gates.device)[:, None], index.reshape(1, -1).to(gates.device)),
            gates.repeat_interleave(index.shape[1], 1),
        )
        return output * each.to(output).reshape(*each.shape, *[1] * (output.dim() - 2))

    return hook


def _gated_block(law: Reading, number: int) -> Callable[..., Any]:
    def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        gate = law(args[0], number)
        return torch.lerp(
            args[0], output, gate.to(output).reshape(-1, *[1] * (output.dim() - 1)).expand_as(output)
        )

    return hook
