"""What a router sends to each expert and what the expert makes of it: counts, weights, norms and sums of outputs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from secateur.errors import SecateurError
from secateur.graph.blocks import plain_experts
from secateur.graph.groups import Group
from secateur.graph.novices import holder_of
from secateur.utils.batches import as_batches, token_mask
from secateur.utils.inputs import map_tensors
from secateur.utils.running import device_of, evaluating, flat_tensors, run
from secateur.utils.screen import Screen

LARGE = 4096.0
"""What an expert answers in place of its output while its weight is read: large, so that little is lost beside shared experts."""


@dataclass(repr=False, eq=False)
class ExpertStats(Screen):
    """Sums over the tokens that a layer's router sends to each of its experts; padding doesn't count.

    tokens: [experts] how many there are. weights: [experts] of what the output is multiplied with, as the model does it: behind
    renormalisation, scaling and correction. norms: [experts] of the output's L2 norm, before its weight. weighted:
    [experts] of weight times norm. outputs: [experts, width] of the output. squares: [experts] of the squared norm. fp64, on
    the CPU.
    """

    tokens: Tensor
    weights: Tensor
    norms: Tensor
    weighted: Tensor
    outputs: Tensor
    squares: Tensor

    @classmethod
    def empty(cls, experts: int, width: int) -> ExpertStats:
        tokens, weights, norms, weighted, squares = (
            torch.zeros(experts, dtype=torch.float64) for _ in range(5)
        )
        return cls(
            tokens, weights, norms, weighted, torch.zeros(experts, width, dtype=torch.float64), squares
        )

    def add(self, number: int, outputs: Tensor, weights: Tensor) -> None:
        """One expert's tokens: what it makes of them [n, width], and what that is multiplied with [n]."""
        outputs, weights = outputs.double().cpu(), weights.double().cpu()
        norm = outputs.norm(dim=1)
        self.tokens[number] += len(outputs)
        self.weights[number] += weights.sum()
        self.norms[number] += norm.sum()
        self.weighted[number] += (weights * norm).sum()
        self.outputs[number] += outputs.sum(0)
        self.squares[number] += norm.square().sum()


Answer = Callable[[Tensor], Tensor]
"""An expert: [n, width] -> [n, width], before the router's weight."""


@dataclass(repr=False, eq=False)
class Watch(Screen):
    """Layers of experts while a model runs: what each of them adds is in `stats`, by the group's name.

    whole: called with a group's name, the states [n, width] of all tokens that count, and an `Answer` for each expert, after
    the layer ran.
    """

    stats: dict[str, ExpertStats]
    whole: Callable[[str, Tensor, Sequence[Answer]], None] | None = None
    visible: Tensor | None = None

    def begin(self, batch: Any) -> None:
        """A batch comes: its padding doesn't count."""
        mask = token_mask(batch)
        self.visible = None if mask is None else mask.flatten()


@contextlib.contextmanager
def watched(
    model: nn.Module,
    groups: Sequence[Group],
    whole: Callable[[str, Tensor, Sequence[Answer]], None] | None = None,
) -> Iterator[Watch]:
    """A `Watch` over these groups; the caller runs the model, or the blocks around them.

    >>> with watched(model, groups) as watch:  # doctest: +SKIP
    ...     watch.begin(batch)
    ...     model(**batch)

    groups: of experts, stacked in tensors or modules of a list. Raises as `collect_experts` does.
    """
    watch = Watch({}, whole)
    with contextlib.ExitStack() as stack:
        for group in groups:
            layer, hook = _watched(model, group, watch)
            if not group.modules:
                stack.enter_context(plain_experts(layer))
            stack.callback(layer.register_forward_hook(hook, with_kwargs=True).remove)
        stack.enter_context(torch.no_grad())
        stack.enter_context(evaluating(model))
        yield watch


def collect_experts(
    model: nn.Module,
    data: Any,
    groups: Sequence[Group],
    progress: Callable[..., Iterable] | None = None,
    play: Callable[[int], None] | None = None,
) -> dict[str, ExpertStats]:
    """Group name -> `ExpertStats` of the dense model, from one pass over `data`.

    >>> found = collect_experts(model, ids, trace(model, ids).prunable("experts"))  # doctest: +SKIP
    >>> found["model.layers.0.mlp:experts"].tokens
    tensor([211., 87., 152., 62.])

    play: runs the blocks around the groups on a batch, by its number; None: the model runs.
    groups: of experts, stacked in tensors or modules of a list. Stacked ones are given (states, numbers, weights), as
    transformers does it. Of listed ones the weights are read off the layer: it runs once more with experts that answer a constant.
    What either gives is compared with what the layer gave.

    Raises `SecateurError` where routing isn't seen in these ways, an output is NaN or infinite, or no token came.
    """
    device = device_of(model)
    with watched(model, groups) as watch:
        batches = as_batches(data)
        every = progress(batches, "experts", len(batches)) if progress else batches
        for number, batch in enumerate(every):
            batch = map_tensors(batch, lambda tensor: tensor.to(device))
            watch.begin(batch)
            play(number) if play else run(model, batch)
    for group in groups:
        if group.name not in watch.stats or not watch.stats[group.name].tokens.sum():
            raise SecateurError("no token reached its experts", where=group.name, fix="give more data")
    return watch.stats


def members(model: nn.Module, group: Group) -> Tensor:
    """[units, k] int64: the numbers of the experts that leave with each unit; k > 1 where a router chooses among groups.

    >>> members(model, group).tolist()  # doctest: +SKIP
    [[0, 1], [2, 3], [4, 5]]
    """
    return torch.arange(group.size)[:, None] if group.modules else _stacked(model, group)[1]


def _stacked(model: nn.Module, group: Group) -> tuple[nn.Module, Tensor]:
    """The module that holds stacked experts, and which of them each unit is, [units, k]."""
    path = holder_of(model, group)
    if path is None:
        raise SecateurError("its experts are neither stacked nor in a list", where=group.name)
    own = next(s for s in group.slices if s.dim == 0 and s.name.rpartition(".")[0] == path)
    return model.get_submodule(path), own.index


def _watched(model: nn.Module, group: Group, watch: Watch) -> tuple[nn.Module, Callable[..., None]]:
    """The module to hook, and the hook that adds what it sees to the watch."""
    if group.modules:
        path = group.modules[0].rpartition(".")[0]
        experts = [model.get_submodule(name) for name in group.modules]
        layer = model.get_submodule(path.rpartition(".")[0])
    else:
        layer, experts = _stacked(model, group)[0], []

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        states = next((x for x in (*args, *kwargs.values()) if _is_states(x)), None)
        given = next(flat_tensors(output), None)
        if states is None or given is None or given.shape != states.shape:
            raise _unseen(group.name)
        rows, seen = states.flatten(0, -2), watch.visible
        if experts:
            gates, rest = _listed_gates(module, experts, args, kwargs, rows)
            answers = [_answer_of(expert) for expert in experts]
        else:
            gates = _stacked_gates(module, args, kwargs, len(rows), group.name)
            rest = torch.zeros_like(rows)
            answers = [_answer_at(module, args, kwargs, number) for number in range(gates.shape[1])]
        seen = seen if seen is not None and len(seen) == len(rows) else torch.ones_like(rows[:, 0]).bool()
        total = rest.float()
        stats = watch.stats.setdefault(group.name, ExpertStats.empty(gates.shape[1], rows.shape[1]))
        for number, answer in enumerate(answers):
            routed = gates[:, number].nonzero().squeeze(1)
            if not len(routed):
                continue
            out, gate = answer(rows[routed]).float(), gates[routed, number].float()
            total.index_add_(0, routed, out * gate[:, None])
            stats.add(number, out[seen[routed]], gate[seen[routed]])
        if not torch.isfinite(total).all():
            raise SecateurError("its experts give NaN or infinite values", where=group.name)
        exact = torch.finfo(given.dtype).eps ** 0.5
        if (total - given.flatten(0, -2).float()).norm() > exact * (given.float().norm() + 1e-6):
            raise _unseen(group.name)
        if watch.whole is not None and seen.any():
            watch.whole(group.name, rows[seen], answers)

    return layer, hook


def _is_states(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point() and x.dim() > 1


def _unseen(name: str) -> SecateurError:
    return SecateurError(
        "what its router gives each expert can't be seen",
        where=name,
        fix="take group-magnitude with kinds=('experts',), which needs no data",
    )


# ---------------------------------------------------------------- experts stacked in tensors


def _routing(args: tuple[Any, ...], kwargs: Mapping[str, Any], rows: int) -> tuple[Tensor, Tensor] | None:
    """(numbers, weights), both [rows, k], among what a module is given."""
    given = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
    numbers = next((x for x in given if not x.is_floating_point() and x.dim() == 2 and len(x) == rows), None)
    if numbers is None:
        return None
    weights = next((x for x in given[1:] if x.is_floating_point() and x.shape == numbers.shape), None)
    return None if weights is None else (numbers, weights)


def _stacked_gates(
    module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], rows: int, name: str
) -> Tensor:
    """[rows, experts]: the weight of each expert's output, 0 where the token isn't sent to it."""
    routing = _routing(args, kwargs, rows)
    if routing is None or hasattr(module, "novices"):
        raise _unseen(name)
    numbers, weights = routing
    count = max(p.shape[0] for p in module.parameters(recurse=False) if p.dim() == 3)
    return weights.new_zeros(rows, count).scatter_add_(1, numbers, weights)


def _answer_at(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], number: int) -> Answer:
    """The output of one of the stacked experts, [n, width] -> [n, width], its weight being 1."""

    def answer(rows: Tensor) -> Tensor:
        def replaced(x: Any) -> Any:
            if _is_states(x) and x.shape[-1] == rows.shape[1] and next(states, None):
                return rows
            if isinstance(x, Tensor) and x.dim() == 2:
                value = 1 if x.is_floating_point() else number
                return torch.full((len(rows), 1), value, dtype=x.dtype, device=x.device)
            return x

        states = iter(
            [True]
        )  # the first are the states, also where there are as many numbers as they are wide
        positional = [replaced(x) for x in args]
        return module.forward(*positional, **{key: replaced(x) for key, x in kwargs.items()})

    return answer


# ---------------------------------------------------------------- experts that are modules of a list


def _answer_of(expert: nn.Module) -> Answer:
    return lambda rows: next(flat_tensors(expert.forward(rows)))


def _listed_gates(
    layer: nn.Module,
    experts: Sequence[nn.Module],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    rows: Tensor,
) -> tuple[Tensor, Tensor]:
    """([rows, experts] the weight of each expert's output, [rows, width] what the layer adds to their sum).

    An expert that answers the unit vector of its number leaves its weight in that column of what the layer gives.
    """

    def given(answers: Mapping[int, int]) -> Tensor:
        with _answering(experts, answers):
            return next(flat_tensors(layer.forward(*args, **kwargs))).flatten(0, -2)

    width, rest = rows.shape[1], given({})
    parts = []
    for first in range(0, len(experts), width):
        own = range(first, min(first + width, len(experts)))
        out = given({number: number - first for number in own}) - rest
        parts.append(out[:, : len(own)] / LARGE)
    return torch.cat(parts, 1), rest


@contextlib.contextmanager
def _answering(experts: Sequence[nn.Module], answers: Mapping[int, int]) -> Iterator[None]:
    """Within, expert `n` gives `LARGE` in column `answers[n]` and zeros elsewhere."""

    def of(column: int | None) -> Callable[..., Tensor]:
        def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            out = torch.zeros_like(x)
            if column is not None:
                out[..., column] = LARGE
            return out

        return forward

    own = [expert.__dict__.get("forward") for expert in experts]
    try:
        for number, expert in enumerate(experts):
            expert.__dict__["forward"] = of(answers.get(number))
        yield
    finally:
        for expert, before in zip(experts, own):
            if before is None:
                expert.__dict__.pop("forward", None)
            else:
                expert.__dict__["forward"] = before
