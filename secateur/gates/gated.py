"""A model behind gates: the model's own forward, with parameters that the gates have multiplied."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call

from secateur.errors import SecateurError
from secateur.gates.choice import Choice
from secateur.gates.laws import Gate, Law
from secateur.gates.mixing import Mixing, Widths, widths_at
from secateur.gates.points import Points, entries, points_of
from secateur.gates.reading import Readers, Reading
from secateur.gates.rows import Rows, row_sites
from secateur.graph import Graph, Group
from secateur.utils.inputs import Inputs
from secateur.utils.running import call, evaluating, with_residual


class Gated(nn.Module):
    """A model whose units are multiplied by gates, in `forward` only: the model itself is as it was.

    >>> gated = place(model, graph, lambda group: HardConcrete(group.size), kinds=("neurons",))  # doctest: +SKIP
    >>> gated(x)  # a draw in train mode, the decided values in eval mode  # doctest: +SKIP

    laws: the law of each group, in the order of the graph. points: where each meets the network. widths: norms of each width
    that a `Choice` has. frozen: groups that have no gate, and why. fixed: values that stand in place of the laws', for groups
    in it. train_model: no: the model's parameters get no gradient. rows: draws for each token; `by_rows` holds where, by group.
    """

    def __init__(
        self,
        model: nn.Module,
        groups: Sequence[Group],
        laws: Sequence[Gate],
        points: Mapping[str, Points],
        frozen: Mapping[str, str],
        train_model: bool = True,
        rows: bool = False,
    ):
        super().__init__()
        self.model = model
        self.laws = nn.ModuleList(laws)
        self.groups = {group.name: group for group in groups}
        self.points, self.frozen = dict(points), dict(frozen)
        self.fixed: dict[str, Tensor] = {}
        self.train_model = train_model
        self.widths = nn.ModuleList()
        found = {n: row_sites(model, p) for n, p in self.points.items() if rows and not p.blocks}
        self.by_rows = {name: sites for name, (sites, _) in found.items() if sites}
        self._loose = {name: loose for name, (sites, loose) in found.items() if sites}
        self._widths: dict[str, dict[str, nn.Module]] = {}
        for name, law in self.choices().items():
            if not points[name].blocks:
                places = widths_at(model, points[name])
                assert not isinstance(places, str)
                sizes = {path: Widths(model.get_submodule(path), law, i) for path, i in places.items()}
                self._widths[name] = {**sizes}
                self.widths.extend(sizes.values())

    def train(self, mode: bool = True) -> Gated:
        """As `nn.Module.train`; a model that isn't trained stays in eval mode while its gates draw."""
        super().train(mode)
        if not self.train_model:
            self.model.eval()
        return self

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        values = self.values()
        readers = [(law, self.points[name]) for name, law in self.readers().items() if name not in self.fixed]
        choices = {n: (law, self.points[n]) for n, law in self.choices().items() if n not in self.fixed}
        mixing = Mixing(self.model, choices, self._widths, self.training)
        with _Branches(self, values), Readers(self.model, readers), mixing, self._rows():
            return functional_call(self.model, self._parameters_at(values), args, kwargs)

    def values(self) -> dict[str, Tensor]:
        """The gates of one forward: draws in train mode, else what is decided; [units] by group name."""
        values = dict(self.fixed)
        for name, law in self.by_group().items():
            if name not in values and isinstance(law, Law):
                values[name] = law.sample() if self.training else law.value()
        for name, value in values.items():
            if not torch.isfinite(value).all():
                raise SecateurError(
                    "a gate isn't finite",
                    where=name,
                    fix="lower the rate of the gates, and check the loss for NaN",
                )
        return values

    def _rows(self) -> Rows:
        """The draws of each token, where the model trains and no value is fixed."""
        own = {n: sites for n, sites in self.by_rows.items() if self.training and n not in self.fixed}
        laws = self.by_group()
        return Rows(own, {name: cast(Law, laws[name]) for name in own})

    def readers(self) -> dict[str, Reading]:
        """The laws that read the input, by group name."""
        return {name: law for name, law in self.by_group().items() if isinstance(law, Reading)}

    def choices(self) -> dict[str, Choice]:
        """The laws that choose among counts, by group name."""
        return {name: law for name, law in self.by_group().items() if isinstance(law, Choice)}

    def by_group(self) -> dict[str, Gate]:
        """The laws by group name."""
        return dict(zip(self.groups, self.laws, strict=True))  # type: ignore[arg-type]

    def keep(self) -> dict[str, Tensor]:
        """The probability that each unit stays, [units] by group name, with a gradient."""
        return {name: law.keep() for name, law in self.by_group().items()}

    @torch.no_grad()
    def open(self) -> dict[str, Tensor]:
        """Numbers of the units that are open without chance, by group name.

        Raises `SecateurError` where a group is closed as a whole.
        """
        found = {name: law.value().nonzero().flatten().cpu() for name, law in self.by_group().items()}
        for name, units in found.items():
            if not len(units):
                raise SecateurError(
                    "all its gates are closed",
                    where=name,
                    fix="a smaller weight of the cost, or an exact allocation",
                )
        return found

    @torch.no_grad()
    def fold(self) -> None:
        """Write the decided gates into the model's parameters, so that it computes without gates what it did with them.

        Blocks whose gate isn't 0 or 1 can't be folded, nor a width with a norm of its own. Raises `SecateurError` for these.
        """
        if apart := [name for name, sizes in self._widths.items() if name not in self.fixed and sizes]:
            raise SecateurError(
                "each of its widths has a norm of its own, which isn't the model's",
                where=apart[0],
                fix="cut to `open()` and train what is left",
            )
        values = {name: self.fixed.get(name, law.value()) for name, law in self.by_group().items()}
        for name, value in values.items():
            if (
                self.points[name].place == "blocks"
                and not torch.isin(value, torch.tensor([0.0, 1.0]).to(value)).all()
            ):
                raise SecateurError(
                    "a block's gate between 0 and 1 has no place in weights",
                    where=name,
                    fix="decide it: fixed values of 0 and 1",
                )
        own = dict(self.model.named_parameters())
        for name, value in self._parameters_at(values, decided=True).items():
            own[name].copy_(value)

    def _parameters_at(self, values: Mapping[str, Tensor], decided: bool | None = None) -> dict[str, Tensor]:
        own: dict[str, Tensor] = dict(self.model.named_parameters())
        if not self.train_model:
            own = {name: parameter.detach() for name, parameter in own.items()}
        changed: dict[str, Tensor] = {} if self.train_model else dict(own)
        decided = not self.training if decided is None else decided
        laws = self.by_group()
        for name, points in self.points.items():
            if name not in values:
                continue
            soft = values[name]
            drawn = not decided and name in self.by_rows and name not in self.fixed
            parts = [(self._loose[name] if drawn else points.soft, soft)]
            # where a closed gate must feel its gradient, what only looks at it closed would hide it
            if decided or not (drawn or laws[name].opens_from_closed):
                parts.append((points.closed, (soft.detach() != 0).to(soft)))
            for slices, gate in parts:
                for s in slices:
                    tensor = changed.get(s.name, own[s.name])
                    changed[s.name] = tensor * _at(gate, s.index, tensor, s.dim)
        return changed


def _at(gate: Tensor, index: Tensor, tensor: Tensor, dim: int) -> Tensor:
    """The gate of each entry along `dim` in a shape that multiplies the tensor."""
    each = entries(gate.to(tensor), index, tensor.shape[dim])
    return each.reshape([-1 if d == dim else 1 for d in range(tensor.dim())])


class _Branches:
    """While the model runs, what each gated block adds to its input is multiplied by the block's gate."""

    def __init__(self, gated: Gated, values: Mapping[str, Tensor]):
        self.blocks = [
            (gated.model.get_submodule(path), values[name][unit])
            for name, points in gated.points.items()
            if name in values
            for unit, path in enumerate(points.blocks)
        ]
        self.handles: list[Any] = []

    def __enter__(self) -> None:
        self.handles = [
            block.register_forward_hook(_scaled(gate), with_kwargs=True) for block, gate in self.blocks
        ]

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()


def _scaled(gate: Tensor) -> Callable[..., Any]:
    def mix(given: Tensor, made: Tensor) -> Tensor:
        return torch.lerp(given, made, gate.to(made))  # exact at both ends

    def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        return with_residual(output, (args, kwargs), mix)

    return hook


def place(
    model: nn.Module,
    graph: Graph,
    law: Callable[[Group], Gate],
    kinds: Sequence[str] | None = None,
    groups: Sequence[Group] | None = None,
    inputs: Inputs | None = None,
    train_model: bool = True,
    rows: bool = False,
) -> Gated:
    """Gates for the groups of a traced model.

    >>> gated = place(model, graph, lambda group: HardConcrete(group.size, start=2.5))  # doctest: +SKIP

    law: the law of a group. kinds: None: all. groups: only these. inputs: examples, which laws that read the input need
    once. train_model: whether the model learns beside its gates. rows: a draw for each token (sample, of convolutions) in place
    of one for the forward, where a gate meets whole layers. Groups without a gate point are in `frozen` with the
    reason.

    Raises `SecateurError` where no group gets a gate, with the reasons.
    """
    wanted = [g for g in (graph.groups if groups is None else groups) if kinds is None or g.kind in kinds]
    points: dict[str, Points] = {}
    frozen: dict[str, str] = {}
    laws: dict[str, Gate] = {}
    for group in wanted:
        found = points_of(model, graph, group)
        if isinstance(found, str):
            frozen[group.name] = found
            continue
        laws[group.name] = made = law(group)
        places = widths_at(model, found) if isinstance(made, Choice) and not found.blocks else {}
        if isinstance(places, str):
            frozen[group.name] = places
        else:
            points[group.name] = found
    if not points:
        reasons = "; ".join(f"{name}: {why}" for name, why in list(frozen.items())[:4]) or "no such group"
        raise SecateurError(
            f"no group gets a gate ({reasons})", where=type(model).__name__, fix="see graph.explain()"
        )
    chosen = [group for group in wanted if group.name in points]
    for group in chosen:
        if laws[group.name].units != group.size:
            raise SecateurError(
                f"a law of {laws[group.name].units} gates for {group.size} units",
                where=group.name,
                fix="law(group.size)",
            )
    gated = Gated(model, chosen, [laws[group.name] for group in chosen], points, frozen, train_model, rows)
    gated.laws.to(next(model.parameters()).device)
    if gated.readers():
        if inputs is None:
            raise SecateurError(
                "gates that read the input need an example of it", where="place", fix="pass inputs="
            )
        with evaluating(gated), torch.no_grad():
            call(gated, inputs)
    gated.train(model.training)
    return gated
