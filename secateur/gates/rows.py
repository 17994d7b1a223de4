"""A draw of the gates for each token, where the others are one for a whole forward."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from secateur.gates.laws import Law
from secateur.gates.points import Points
from secateur.graph import Slice
from secateur.utils.screen import Screen

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True, repr=False)
class Site(Screen):
    """A module whose input or output is multiplied. index: [units, k], the channels of each unit. dim: the axis of the channels."""

    module: nn.Module
    index: Tensor
    reads: bool
    dim: int


def row_sites(model: nn.Module, points: Points) -> tuple[list[Site], tuple[Slice, ...]]:
    """(where a gate is drawn for each token, the slices that can only be multiplied as parameters, once a forward).

    >>> sites, loose = row_sites(model, points_of(model, graph, graph["mlp:neurons"]))  # doctest: +SKIP

    A weight that several modules share is a slice: what one of them makes, the other would not see multiplied.
    """
    names = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    reads, found = points.place == "consumers", dict[str, Site]()
    loose: list[Slice] = []
    for s in points.soft:
        path = s.name.rpartition(".")[0]
        module, parameter = model.get_submodule(path), model.get_parameter(s.name)
        # a norm's channels are its output's, whatever it is; else the layer's own are counted
        sizes = _channels(module)
        fits = points.place == "norms" or (sizes and sizes[not reads] == parameter.shape[s.dim])
        if not fits or names[id(parameter)] > 1:
            loose.append(s)
        elif path not in found:  # a bias is multiplied with its weight
            last = isinstance(module, nn.Linear | nn.Embedding) or _turned(module)
            found[path] = Site(module, s.index, reads, -1 if last else 1)
    return list(found.values()), tuple(loose)


def _channels(module: Any) -> tuple[int, int] | None:
    """How many channels go in and come out of a layer; None for others."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if isinstance(module, CONVOLUTIONS):
        return module.in_channels, module.out_channels
    if isinstance(module, nn.Embedding):
        return 0, module.embedding_dim
    return (module.weight.shape[0], module.nf) if _turned(module) else None


def _turned(module: Any) -> bool:
    """A linear layer of transformers whose weight lies as [in, out]."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


class Rows:
    """While the model runs, the channels of its units are multiplied by draws, one for each token or sample.

    Channels of one unit (of a head) have draws of their own. Tokens are all axes before the channels of a linear layer or an
    embedding; of a convolution, samples.
    """

    def __init__(self, sites: Mapping[str, list[Site]], laws: Mapping[str, Law]):
        self.sites, self.laws = sites, laws
        self.handles: list[Any] = []

    def __enter__(self) -> None:
        for name, sites in self.sites.items():
            for site in sites:
                hook = _times(self.laws[name], site)
                if site.reads:
                    self.handles.append(site.module.register_forward_pre_hook(_before(hook)))
                else:
                    self.handles.append(site.module.register_forward_hook(_behind(hook)))

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles.clear()


def _times(law: Law, site: Site) -> Callable[[Tensor], Tensor]:
    def times(x: Tensor) -> Tensor:
        axis = site.dim % x.dim()
        rows = tuple(x.shape[:axis])
        drawn = (
            law.sample(rows=(*rows, site.index.shape[1])).transpose(-1, -2).flatten(-2)
        )  # [*rows, units * k]
        whole = drawn.new_ones(*rows, x.shape[axis])
        gates = whole.index_copy(-1, site.index.reshape(-1).to(drawn.device), drawn)
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
