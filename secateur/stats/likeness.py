"""What tells how alike the experts of a layer are: what each makes of every token, how the router rates them, and their neurons."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from secateur.errors import SecateurError
from secateur.graph import Graph
from secateur.graph.blocks import plain_experts
from secateur.graph.groups import Group, Slice
from secateur.graph.novices import holder_of
from secateur.stats.experts import Answer, ExpertStats, members, watched
from secateur.utils.running import evaluating
from secateur.utils.screen import Screen


@dataclass(repr=False, eq=False)
class Likeness(Screen):
    """Sums over the tokens that count.

    routed: what the router sends to each expert. outputs: [experts, width] of the softmax of the router's logits times what an
    expert makes of the token, sent there or not. ratings: [experts, experts] products of two experts' logits. fp64, on the CPU.
    states: [n, width] a sample of what experts are given. answers: the experts themselves.
    """

    routed: ExpertStats
    outputs: Tensor
    ratings: Tensor
    states: Tensor
    answers: Sequence[Answer] = field(default=())


def collect_likeness(
    model: nn.Module,
    group: Group,
    batches: Sequence[Any],
    play: Callable[[int], None],
    samples: int,
    generator: torch.Generator,
) -> Likeness:
    """How alike the experts of one group are. Every expert runs on every token.

    >>> found = collect_likeness(model, group, [ids], lambda number: model(ids), 1024, torch.Generator())  # doctest: +SKIP
    >>> found.ratings.shape
    torch.Size([8, 8])

    group: of experts, stacked or in a list. play: runs batch `number` at least through the group's layer. samples: of states to
    keep, the same number of each batch.

    Raises `SecateurError` where the router isn't one matrix, and as `collect_experts` does.
    """
    rows, bias = router_of(model, group)
    found: list[Likeness] = []
    each = -(-samples // max(1, len(batches)))

    def add(name: str, states: Tensor, answers: Sequence[Answer]) -> None:
        logits = F.linear(states, rows.to(states), None if bias is None else bias.to(states)).float()
        shares = logits.softmax(-1)
        if not found:
            width, count = states.shape[1], len(answers)
            empty = torch.zeros(count, width, dtype=torch.float64)
            ratings = torch.zeros(count, count, dtype=torch.float64)
            found.append(Likeness(watch.stats[name], empty, ratings, states[:0]))
        own, wide = found[0], logits.double().cpu()
        own.answers = answers
        own.ratings += wide.T @ wide
        for number, answer in enumerate(answers):
            own.outputs[number] += (shares[:, number] @ answer(states).float()).double().cpu()
        picked = torch.randperm(len(states), generator=generator)[:each].sort().values
        own.states = torch.cat([own.states, states[picked.to(states.device)]])

    with watched(model, [group], add) as watch:
        for number, batch in enumerate(batches):
            watch.begin(batch)
            play(number)
    if not found or not found[0].routed.tokens.sum():
        raise SecateurError("no token reached its experts", where=group.name, fix="give more data")
    return found[0]


def router_of(model: nn.Module, group: Group) -> tuple[Tensor, Tensor | None]:
    """([experts, width] the router's matrix, [experts] its bias or None), in the experts' order.

    >>> router_of(model, group)[0].shape  # doctest: +SKIP
    torch.Size([8, 64])
    """
    inside = group.modules or (holder_of(model, group),)
    makers = [
        s
        for s in group.slices
        if s.role == "out" and s.dim == 0 and not any(s.name.startswith(f"{path}.") for path in inside)
    ]
    tensors = dict(model.named_parameters(remove_duplicate=False))
    makers = [s for s in makers if s.name in tensors and tensors[s.name].dim() == 2]
    if len(makers) != 1:
        raise SecateurError(
            f"its router is {len(makers)} matrices that have a row for each expert",
            where=group.name,
            fix="take reap, which needs to see no logits",
        )
    order = torch.empty(members(model, group).numel(), dtype=torch.int64)
    order[members(model, group).flatten()] = makers[0].index.flatten()
    bias = tensors.get(f"{makers[0].name.rpartition('.')[0]}.bias")
    own = tensors[makers[0].name].detach()
    return own[order], None if bias is None or len(bias) != len(own) else bias.detach()[order]


# ---------------------------------------------------------------- one expert as tensors


@dataclass(repr=False, eq=False)
class Expert(Screen):
    """The tensors of one expert by their names in the model, and its neurons: for each kind the slices that make or read them.

    tensors: copies; of stacked ones that expert's part, so that the axes of its slices are one less than in the model.
    """

    number: int
    tensors: dict[str, Tensor]
    neurons: list[list[Slice]]


def experts_of(model: nn.Module, graph: Graph, group: Group) -> list[Expert]:
    """Each expert of a group as tensors of its own; nothing is shared with the model.

    >>> first = experts_of(model, graph, group)[0]  # doctest: +SKIP
    >>> {name: tuple(t.shape) for name, t in first.tensors.items()}
    {'model.layers.0.mlp.experts.gate_up_proj': (48, 16), 'model.layers.0.mlp.experts.down_proj': (16, 24)}

    Raises `SecateurError` where the neurons inside can't be told apart.
    """
    stacked = not group.modules
    holders = group.modules or (holder_of(model, group),)
    parameters = {n: p.detach() for n, p in model.named_parameters(remove_duplicate=False)}
    count = members(model, group).numel()
    owned = {s.name for s in group.slices if s.dim == 0} if stacked else set(parameters)
    found = []
    for number in range(count):
        prefix = f"{holders[0 if stacked else number]}."
        tensors = {n: p for n, p in parameters.items() if n.startswith(prefix) and n in owned}
        tensors = {n: (p[number] if stacked else p).clone() for n, p in tensors.items()}
        neurons = []
        for other in graph.groups:
            roles = {s.role for s in other.slices}
            if (
                other.kind == "neurons"
                and {"in", "out"} <= roles
                and {s.name for s in other.slices} <= tensors.keys()
            ):
                slices = [Slice(s.name, s.dim - stacked, s.index, s.role) for s in other.slices]
                neurons.append(slices)
        if not neurons and sum(t.dim() > 1 for t in tensors.values()) > 1:
            raise SecateurError(
                "the neurons inside its experts can't be told apart",
                where=group.name,
                fix="take reap, which merges nothing",
            )
        found.append(Expert(number, tensors, neurons))
    shapes = [[t.shape for t in e.tensors.values()] for e in found]
    if odd := next((n for n, own in enumerate(shapes) if own != shapes[0]), None):
        raise SecateurError(
            f"experts 0 and {odd} have tensors of different shapes",
            where=group.name,
            fix="take reap, which merges nothing",
        )
    return found


def activations(model: nn.Module, group: Group, expert: Expert, found: Likeness) -> list[Tensor]:
    """For each kind of neuron of an expert [neurons, n]: what it gives on the sampled states.

    >>> activations(model, group, experts[0], found)[0].shape  # doctest: +SKIP
    torch.Size([24, 1024])
    """
    results = []
    for slices in expert.neurons:
        reader = next(s for s in slices if s.role == "in")
        path, _, leaf = reader.name.rpartition(".")
        parameter = getattr(model.get_submodule(path), leaf)
        with torch.no_grad(), evaluating(model), plain_experts(model), _Reads(parameter) as reads:
            found.answers[expert.number](found.states)
        if reads.rows is None:
            raise SecateurError("its neurons can't be seen", where=reader.name, fix="take reap")
        rows = reads.rows[:, reader.index.to(reads.rows.device)]  # [n, neurons, k]
        results.append(rows.permute(1, 0, 2).flatten(1).float())
    return results


class _Reads(TorchFunctionMode):
    """What a matrix, or a part of it, is multiplied with while this is open."""

    def __init__(self, parameter: Tensor):
        super().__init__()
        self.storage, self.rows = parameter.untyped_storage().data_ptr(), None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        weight = args[1] if len(args) > 1 else None
        product = getattr(func, "__name__", "") in ("linear", "matmul", "__matmul__")
        if product and isinstance(weight, Tensor) and weight.untyped_storage().data_ptr() == self.storage:
            self.rows = args[0].reshape(-1, args[0].shape[-1])
        return func(*args, **(kwargs or {}))
