"""Where a gate meets the network, read off the coupled slices of a group."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from secateur.graph import Graph, Group, Slice

BATCHNORMS = (nn.modules.batchnorm._BatchNorm, nn.GroupNorm, nn.modules.instancenorm._InstanceNorm)


@dataclass(frozen=True)
class Points:
    """The slices of one group that its gate multiplies.

    >>> points_of(model, graph, graph["fc1:neurons"]).place  # doctest: +SKIP
    'consumers'

    place: "norms", the scale and shift of the norm behind each producer, before the non-linearity; "consumers", the
    columns of what reads the units; "producers", rows and biases, of a stream that norms mix; "blocks", the branch of
    each block beside its residual.
    soft: slices that are multiplied by the gate. closed: all others, which only see whether it is closed, so that a
    gate at 0 is `mask_units`, whatever stands between producer and consumer.
    """

    place: str
    soft: tuple[Slice, ...] = ()
    closed: tuple[Slice, ...] = ()
    blocks: tuple[str, ...] = ()


def points_of(model: nn.Module, graph: Graph, group: Group) -> Points | str:
    """The gate points of a group, or why it has none."""
    if group.reason is not None:
        return group.reason
    if group.kind == "layers":
        return Points("blocks", blocks=group.modules)
    if group.kind == "experts" or group.modules:
        return "a router picks its units, they are not summed: nothing to scale"
    parameters = dict(model.named_parameters())
    slices = [s for s in group.slices if s.name in parameters and s.name not in graph.normalised]
    modules = {s.name: model.get_submodule(s.name.rpartition(".")[0]) for s in slices}
    norms = [s for s in slices if s.role == "vector" and isinstance(modules[s.name], BATCHNORMS)]
    producers = [s for s in slices if s.role == "out"]
    consumers = [s for s in slices if s.role == "in"]
    if norms and group.exact and _behind_each(producers, norms):
        place, soft = "norms", norms
    elif consumers and group.exact:
        place, soft = "consumers", consumers
    else:
        place, soft = "producers", producers + _loose(slices, producers, modules)
    if not soft:
        return "no layer produces or reads its units by a weight"
    rest = tuple(s for s in slices if s not in soft)
    return Points(place, tuple(soft), rest)


def _behind_each(producers: list[Slice], norms: list[Slice]) -> bool:
    """Whether every producer has a norm of its own: there are as many."""
    return len({s.name.rpartition(".")[0] for s in norms}) >= len(producers) > 0


def _loose(slices: list[Slice], producers: list[Slice], modules: Mapping[str, nn.Module]) -> list[Slice]:
    """What adds to the units beside the producers' rows: their biases, and parameters that no norm owns."""
    made = {s.name.rpartition(".")[0] for s in producers}
    return [
        s
        for s in slices
        if s.role == "vector" and (s.name.rpartition(".")[0] in made or not _is_norm(modules[s.name]))
    ]


def _is_norm(module: nn.Module) -> bool:
    return "norm" in type(module).__name__.lower()


def entries(gates: Tensor, index: Tensor, size: int) -> Tensor:
    """The gate of each of the `size` entries of an axis, 1 where none is: [..., units] -> [..., size].

    >>> entries(torch.tensor([0.5, 0.0]), torch.tensor([[0, 1], [3, 4]]), 6)
    tensor([0.5000, 0.5000, 1.0000, 0.0000, 0.0000, 1.0000])

    index: [units, k], the entries of each unit.
    """
    each = gates.new_ones(*gates.shape[:-1], size)
    return each.index_copy(
        -1, index.reshape(-1).to(gates.device), gates.repeat_interleave(index.shape[1], -1)
    )
