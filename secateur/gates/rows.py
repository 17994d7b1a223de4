"""A draw of the gates for each token, where the others are one for a whole forward."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from secateur.gates.laws import Law
from secateur.gates.points import Points

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def row_sites(model: nn.Module, points: Points) -> list[tuple[nn.Module, Tensor, bool]] | None:
    """[(module, channels [units, k] of each unit, whether its input is multiplied and not its output)]; None where the gate
    meets something that is no layer's whole input or output, so that only its parameters can be multiplied.

    >>> row_sites(model, points_of(model, graph, graph["mlp:neurons"]))  # doctest: +SKIP
    """
    found: dict[str, tuple[nn.Module, Tensor, bool]] = {}
    for s in points.soft:
        path, _, own = s.name.rpartition(".")
        module, size = model.get_submodule(path), model.get_parameter(s.name).shape[s.dim]
        reads = points.place == "consumers"
        layer = isinstance(module, (nn.Linear, *CONVOLUTIONS, nn.Embedding))
        if points.place == "producers" and not layer:
            return None
        if reads and (
            not isinstance(module, (nn.Linear, *CONVOLUTIONS))
            or size != getattr(module, "in_features", getattr(module, "in_channels", 0))
        ):
            return None
        if own == "bias" and path in found:
            continue
        found[path] = (module, s.index, reads)
    return list(found.values()) or None


class Rows:
    """While the model runs, the channels of its units are multiplied by draws, one for each token or sample.

    Channels of one unit (of a head) have draws of their own. Tokens are all axes before the channels of a linear layer or an
    embedding; of a convolution, samples.
    """

    def __init__(self, sites: Mapping[str, list[tuple[nn.Module, Tensor, bool]]], laws: Mapping[str, Law]):
        self.sites, self.laws = sites, laws
        self.handles: list[Any] = []

    def __enter__(self) -> None:
        for name, sites in self.sites.items():
            for module, index, reads in sites:
                hook = _times(self.laws[name], index, _axis(module))
                if reads:
                    self.handles.append(module.register_forward_pre_hook(_before(hook)))
                else:
                    self.handles.append(module.register_forward_hook(_behind(hook)))

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles.clear()


def _axis(module: nn.Module) -> int:
    return -1 if isinstance(module, nn.Linear | nn.Embedding | nn.LayerNorm) else 1


def _times(law: Law, index: Tensor, dim: int) -> Callable[[Tensor], Tensor]:
    each = index.shape[1]

    def times(x: Tensor) -> Tensor:
        axis = dim % x.dim()
        rows = tuple(x.shape[:axis])
        drawn = law.sample(rows=(*rows, each)).transpose(-1, -2).flatten(-2)  # [*rows, units * each]
        whole = drawn.new_ones(*rows, x.shape[axis])
        gates = whole.index_copy(-1, index.reshape(-1).to(drawn.device), drawn)
        return x * gates.reshape(*gates.shape, *[1] * (x.dim() - axis - 1)).to(x)

    return times


def _before(times: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
    def hook(module: nn.Module, args: Any) -> Any:
        return (times(args[0]), *args[1:])

    return hook


def _behind(times: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
    def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return times(output)

    return hook
