"""What a method sees while it plans: the model, its groups, the data, and the engines that gather and divide."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import inf, lcm, prod
from typing import Any

import torch
from torch import Tensor, nn

from secateur.errors import SecateurError
from secateur.graph import Graph, Group, Slice, trace
from secateur.graph.attentions import attention_groups
from secateur.graph.blocks import Blocks, Matrix, every_matrix, find_matrices, find_stacks
from secateur.graph.groups import WHOLE
from secateur.graph.novices import novice_groups
from secateur.graph.parts import inside, parts_of, resolve_parts
from secateur.method import Method
from secateur.pruning.allocate import MEASURED, Competitor, Step, build_path, follow
from secateur.pruning.measured import by_what_is_lost, with_scores
from secateur.pruning.options import Options
from secateur.pruning.plan import Plan
from secateur.pruning.protect import freeze_protected, protected
from secateur.pruning.resume import Checkpoint
from secateur.pruning.share import makers, read_shares, steer
from secateur.pruning.target import Target, parse_schedule
from secateur.pruning.tokens import KIND, Tokens
from secateur.pruning.undo import Undo
from secateur.repair.steps import step_size
from secateur.stats.collect import collect
from secateur.stats.layer import LayerStats
from secateur.stats.stream import Block, Flow, stream
from secateur.stats.windows import draw_windows
from secateur.utils.inputs import Inputs, describe, map_ids
from secateur.utils.random import seeded
from secateur.utils.running import call
from secateur.utils.screen import Screen
from secateur.utils.types import Objective

JUDGED = (2, 64)
"""On how many windows of text, or other samples, predictions are compared where a budget is measured."""
COARSE = ("heads", "kv_groups", "experts", *WHOLE)
"""Kinds whose units are few and large: `round_to` leaves them alone."""


@dataclass(repr=False)
class Context(Screen):
    """One planning run. Methods read `model`, `groups`, `share`, `seed`; they gather with `stats`, `stream` and divide
    with `allocate`."""

    model: nn.Module
    method: Method
    target: Target
    inputs: Inputs | None
    data: Any = None
    seed: int = 0
    options: Options = field(default_factory=Options)
    loss: Objective | None = None
    progress: Callable[..., Iterable] | None = None
    announce: Callable[[str], None] | None = None
    """Called with a line to tell, such as the memory that calibration will need."""
    checkpoint: Checkpoint = field(default_factory=lambda: Checkpoint(None))
    undo: Undo | None = None
    """Copies of what a method changes in place, so that a failure puts it back."""
    lean: bool = False
    """The plan shares the model's tensors instead of holding copies."""
    recorded: bool = True
    """The plan holds masks and values; else only the model does, which is then written block by block."""
    original: Callable[[int], Mapping[str, Tensor]] | None = None
    """A block's dense tensors by name, where a run that goes on finds the block as it was left."""
    ready: Callable[[int], None] | None = None
    """Called with the number of a block before it is looked at, where blocks aren't in memory all the time."""
    play: Callable[[int], None] | None = None
    """Runs the block that is looked at on a batch of the data, by its number, where blocks come one by one; else the model runs."""
    round: int = 0
    skip_blocks: tuple[int, int] = (0, 0)
    """Leading and final blocks that are left whole; a method may set it."""
    gone: dict[str, Tensor] = field(default_factory=dict)
    """Units that an earlier round of an iterative schedule removed (bool per unit); they leave first."""

    # what the report tells of the run

    scores: dict[str, Tensor] = field(default_factory=dict)
    """The scores that units competed with, by group name."""
    limit: float | None = None
    """Seconds that a latency target came to."""
    refused: dict[str, str] = field(default_factory=dict)
    """Groups that stay whole because their cut isn't provably right, and why."""
    skipped: dict[str, str] = field(default_factory=dict)
    """Matrices that stay whole because the target's pattern doesn't fit them, and why."""
    met: bool = True
    """Whether the plan keeps no more than the share that was asked for."""
    also: Sequence[Inputs] = ()
    """Further example inputs, which take other branches."""
    notes: dict[str, str] = field(default_factory=dict)
    """Lines for the plan and the report, by key."""
    tokens: Tokens | None = None
    """The order in which tokens stay, where the vocabulary is cut."""

    @cached_property
    def graph(self) -> Graph:
        graph = trace(
            self.model,
            self.example,
            also=self.also,
            inner="head_dim" in (self.options.kinds or ()),
            values=True,
            vocabulary=self.tokens is not None,
        )
        if "attentions" in (self.options.kinds or getattr(self.method, "kinds", None) or ()):
            graph.groups += attention_groups(self.model, graph, self.example)
        kinds = self.options.kinds or getattr(self.method, "kinds", None) or ()
        if {"experts", "novices"} <= {*kinds}:
            raise SecateurError(
                "experts leave either the router too, or nothing but their place",
                where="kinds",
                fix="take one of them",
            )
        if "novices" in kinds:
            graph.groups += novice_groups(self.model, graph)
        freeze_protected(graph, self.options.keep, self.options.only, [*self.parts.values()])
        if self.tokens is not None:
            for group in graph.prunable(KIND):
                group.least = self.tokens.fixed
        return graph

    @cached_property
    def settled(self) -> dict[str, Tensor]:
        """Kept tokens, where the vocabulary is cut beside what the method cuts; they count towards the target."""
        if self.tokens is None or self.method.name == "token-frequency":
            return {}
        groups = self.graph.prunable(KIND)
        if not groups:
            reasons = [g.reason for g in self.graph.groups if g.kind == KIND]
            why = f" ({reasons[0]})" if reasons else ""
            raise SecateurError(
                f"the vocabulary can't be cut{why}", where="kinds", fix="leave vocabulary out"
            )
        return {group.name: self.tokens.first(inf) for group in groups}

    @cached_property
    def parts(self) -> dict[str, str]:
        """The module path of each part that the target names; {} where it names none."""
        return resolve_parts(self.model, [name for name, _ in self.target.parts])

    def each_part(self) -> Iterator[Context]:
        """A context for each part of the target, with its share, its matrices and its groups; or this one alone."""
        if not self.target.parts:
            yield self
            return
        for name, goal in self.target.parts:
            path, own = self.parts[name], dataclasses.replace(self, target=goal)
            own.every_matrix = {n: m for n, m in self.every_matrix.items() if inside(n, path)}
            own.matrices = {n: m for n, m in self.matrices.items() if inside(n, path)}
            if not own.every_matrix:
                raise SecateurError(
                    "it has no linear or convolution weights that a share counts",
                    where=f"part {name}",
                    fix="leave it out",
                )
            if "graph" in self.__dict__:
                own.graph = self.graph
                own.groups = [group for group in self.groups if inside(_home(group), path)]
                if not own.groups:
                    raise SecateurError(
                        f"{self.method.name} can cut nothing there",
                        where=f"part {name}",
                        fix="`secateur inspect` shows every group",
                    )
            yield own

    def part_rows(self, plan: Plan) -> list[dict[str, Any]]:
        """What a plan keeps of the weights of each part: those that the target names, or else those that the model has."""
        shares = dict(self.target.parts)
        rows = []
        for name, path in (self.parts or parts_of(self.model)).items():
            own = {n: m.numel for n, m in self.every_matrix.items() if inside(n, path)}
            if plan.keep:
                kept = self.graph.params(plan.keep, names=list(own))
            else:
                kept = sum(int(plan.masks[n].sum()) if n in plan.masks else numel for n, numel in own.items())
            target = str(shares[name]) if name in shares else None
            rows.append(
                {"name": name, "path": path, "size": sum(own.values()), "kept": kept, "target": target}
            )
        return rows

    @property
    def example(self) -> Inputs:
        """The example inputs; raises `SecateurError` when there are none."""
        if self.inputs is None:
            raise SecateurError("it needs example inputs", where=self.method.name, fix="pass inputs=")
        return self.inputs

    @cached_property
    def every_matrix(self) -> dict[str, Matrix]:
        """What a share of weights counts, by parameter name."""
        if self.options.everywhere or getattr(self.method, "everywhere", False):
            return every_matrix(self.model)
        return find_matrices(self.model)

    @cached_property
    def matrices(self) -> dict[str, Matrix]:
        """The matrices that may be pruned: those that the options don't protect."""
        reasons = protected(self.every_matrix, self.options.keep, self.options.only, [*self.parts.values()])
        return {name: matrix for name, matrix in self.every_matrix.items() if name not in reasons}

    @cached_property
    def groups(self) -> list[Group]:
        """The groups the method may cut.

        Raises `SecateurError` with the reasons when there are none.
        """
        kinds = self.options.kinds or getattr(self.method, "kinds", None)
        if self.settled and kinds:
            kinds = tuple(kind for kind in kinds if kind != KIND)
        groups = self.graph.prunable(kinds)
        if not groups:
            frozen = [g for g in self.graph.groups if g.reason and (not kinds or g.kind in kinds)]
            reasons = "; ".join(dict.fromkeys(f"{g.name}: {g.reason}" for g in frozen[:8])) or (
                f"the graph holds only {', '.join(sorted({g.kind for g in self.graph.groups})) or 'no groups'}"
            )
            others = sorted({g.kind for g in self.graph.prunable()})
            raise SecateurError(
                f"nothing can be cut ({reasons})",
                where=type(self.model).__name__,
                fix=f"its {', '.join(others)} can be: pass kinds= or take another method"
                if others
                else "`secateur inspect` shows every group",
            )
        return groups

    @cached_property
    def shares(self) -> dict[str, float]:
        """The share kept of what fits each pattern of the caller's, in this round of the schedule."""
        rounds = parse_schedule(self.options.schedule)
        done = (self.round + 1) / rounds
        given = read_shares(self.options.share)
        return {p: share if done == 1 else 1 - (1 - share) * done for p, share in given.items()}

    @cached_property
    def fixed_weights(self) -> dict[str, int]:
        """How many weights of a matrix stay because the caller gave its share."""
        if not self.shares:
            return {}
        reasons = protected(self.every_matrix, self.options.keep, self.options.only, [*self.parts.values()])
        others = {n: ([n], reasons.get(n, "it isn't pruned")) for n, _ in self.model.named_parameters()}
        for name in self.matrices:
            del others[name]
        found, _ = steer({name: [name] for name in self.matrices}, self.shares, others)
        counts = {n: int(share * self.matrices[n].numel + 1e-9) for n, share in found.items()}
        if none := next((name for name, count in counts.items() if count < 1), None):
            size = self.matrices[none].numel
            raise SecateurError(
                f"{found[none]:.4g} of the {size:,} weights of {none} is less than one",
                where="share",
                fix="give more",
            )
        return counts

    @cached_property
    def fixed_units(self) -> dict[str, int]:
        """How many units of a group stay because the caller gave its share.

        Raises `SecateurError` where that is less than a unit.
        """
        if not self.shares:
            return {}
        others = {
            g.name: (makers(g), g.reason or f"{self.method.name} doesn't cut {g.kind}")
            for g in self.graph.groups
        }
        for group in self.groups:
            del others[group.name]
        found, note = steer({g.name: makers(g) for g in self.groups}, self.shares, others)
        if note:
            self.notes["share"] = note
        counts = {}
        for name, share in found.items():
            group = self.graph[name]
            grain = self._grain(group)
            count = int(share * group.size + 1e-9)
            count -= 0 if count == group.size else count % grain
            least = max(group.least, 1)
            if count < least:
                raise SecateurError(
                    f"{share:.4g} of the {group.size} {group.kind} of {name} is less than {max(least, grain)}",
                    where="share",
                    fix=f"give {max(least, grain) / group.size:.4g} or more",
                )
            counts[name] = count
        return counts

    def _grain(self, group: Group) -> int:
        return lcm(1 if group.kind in COARSE else self.options.round_to, group.multiple)

    @property
    def share(self) -> float:
        """The share kept; raises `SecateurError` where the target is another."""
        return self.target.share(self.method.name)

    @property
    def allocation(self) -> str | None:
        """How the budget is divided where the caller says so; None: as the method does."""
        return self.options.divides

    def generator(self, *parts: object) -> torch.Generator:
        return seeded(self.seed, self.method.name, *parts)

    def require_data(self) -> Any:
        if self.data is None or len(self.data) == 0:
            raise SecateurError(
                "it needs calibration data and there is none",
                where=f"method {self.method.name}",
                fix="pass data= (token ids [samples, length], or a list of model inputs)",
            )
        return self.data

    @cached_property
    def _collected(self) -> dict[frozenset[str], dict[str, LayerStats]]:
        return {}

    def stats(
        self, needs: Iterable[str] | None = None, *, data: Any = None, loss: Objective | None = None
    ) -> dict[str, LayerStats]:
        """Statistics of every matrix of the dense model, gathered once: parameter name -> LayerStats.

        With `data` they are those of these inputs, gathered again; `loss` is then differentiated instead of the run's.
        """
        names = self._needs(needs)
        if data is None:
            if names not in self._collected:
                self._collected[names] = self.stats(names, data=self.require_data())
            return self._collected[names]
        found = collect(
            self.model, data, names, self.every_matrix, loss=loss or self.loss, progress=self.progress
        )
        return self._seeded(found)

    def _needs(self, needs: Iterable[str] | None) -> frozenset[str]:
        return self.method.statistics() if needs is None else frozenset(needs)

    def _seeded(self, stats: dict[str, LayerStats]) -> dict[str, LayerStats]:
        for layer in stats.values():
            layer.seed = self.seed
        return stats

    def draw(self, count: int, length: int, *parts: object) -> Any:
        """`count` windows of `length` tokens of the calibration data (`draw_windows`); `parts` name the draw."""
        return draw_windows(self.require_data(), count, length, self.generator(*parts))

    def stream(
        self,
        needs: Iterable[str] | None = None,
        *,
        propagate: bool = True,
        skip: int = 0,
        names: Container[str] | None = None,
        flow: Flow | None = None,
    ) -> Iterator[Block]:
        """Blocks in order with their statistics; with `propagate`, each sees what was done to those before it.

        names: only these matrices, and the stacks they lie in. flow: the states behind the blocks that are skipped, where the
        caller ran them.
        """
        wanted = {n: m for n, m in self.every_matrix.items() if names is None or n in names}
        read = self._needs(needs)
        for block in stream(
            self.model,
            self.require_data() if read or self.options.fits else self.data,
            read,
            wanted,
            propagate=propagate,
            skip=skip,
            flowing=self.options.fits,
            flow=flow,
            batch_size=self.batch_size,
            progress=self.progress,
            ready=self.ready,
        ):
            self._seeded(block.stats)
            yield block

    @property
    def batch_size(self) -> int | None:
        """Samples that go through a block at once; fewer where an optimiser makes a step on each."""
        return step_size(self.data) if self.options.repair == "reconstruct" else None

    def remember(self, key: str, compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """The tensors of a finished step, from disk where an earlier, killed run got that far."""
        return self.checkpoint.remember(f"round-{self.round}-{key}", compute)

    # What units are made of

    def coupled(
        self, group: Group, roles: tuple[str, ...] = ("out", "in"), kinds: tuple[str, ...] | None = None
    ) -> list[tuple[Slice, Matrix]]:
        """The group's slices of weight matrices, each with its matrix (of these kinds); biases and norms are none."""
        pairs = [
            (s, self.matrices[s.name]) for s in group.slices if s.role in roles and s.name in self.matrices
        ]
        return [(s, matrix) for s, matrix in pairs if kinds is None or matrix.kind in kinds]

    def all_coupled(self) -> dict[str, list[tuple[Slice, Matrix]]]:
        """`coupled` by group name; groups without matrices are left out.

        Raises `SecateurError` when no group has any.
        """
        coupled = {group.name: pairs for group in self.groups if (pairs := self.coupled(group))}
        if not coupled:
            raise SecateurError("no weight matrix leaves with its units", where=self.groups[0].name)
        return coupled

    def unit_weights(self, group: Group) -> int:
        """How many weights leave with one unit (biases and norms not counted)."""
        shapes = self.graph.shapes
        counted = [s for s in group.slices if s.role in ("out", "in")]
        return sum(s.index.shape[1] * prod(shapes[s.name]) // shapes[s.name][s.dim] for s in counted)

    # Dividing a budget over units

    def floor_of(self, group: Group) -> int:
        return max(group.least, int(group.size * self.options.floor))

    def competitors(self, scores: Mapping[str, Tensor], *, keep_scores: bool = True) -> list[Competitor]:
        """The groups that have scores, as the allocator sees them.

        keep_scores: hold the scores for the report; no where they only say an order.
        """
        first, last = self.skip_blocks
        blocks = sorted({b for g in self.groups if (b := self.block_of(g.name)) is not None})
        spared = {*blocks[:first], *blocks[len(blocks) - last :]} if first or last else set()
        if keep_scores:
            self.scores.update(
                {g.name: scores[g.name].detach().float().cpu() for g in self.groups if g.name in scores}
            )
        among = getattr(self.method, "ranked_with", lambda group, context: group.kind)
        return [
            Competitor(
                name=group.name,
                kind=among(group, self),
                scores=self._finite(group, scores[group.name]),
                floor=self.fixed_units.get(
                    group.name,
                    group.size if self.block_of(group.name) in spared else self.floor_of(group),
                ),
                round_to=self._grain(group),
                fixed=group.name in self.fixed_units,
            )
            for group in self.groups
            if group.name in scores
        ]

    def _finite(self, group: Group, scores: Tensor) -> Tensor:
        scores = scores.detach().double().cpu()
        if scores.shape != (group.size,):
            raise SecateurError(
                f"the scores have shape {tuple(scores.shape)}, the group has {group.size} units",
                where=f"{self.method.name}, {group.name}",
            )
        if torch.isnan(scores).any():
            raise SecateurError(
                "a score isn't a number",
                where=f"{self.method.name}, {group.name}",
                fix="check weights and data for NaN",
            )
        if group.name in self.gone:
            scores = scores.masked_fill(self.gone[group.name], -torch.inf)
        return scores

    def block_of(self, name: str) -> int | None:
        """The number of the repeated block a group or parameter lies in; stacks are numbered through."""
        for stack in self._stacks:
            index = block_index(name, stack.path)
            if index is not None:
                return stack.start + index
        return None

    @cached_property
    def _stacks(self) -> tuple[Blocks, ...]:
        return find_stacks(self.model)

    def cost(self) -> tuple[Callable[[Mapping[str, Tensor]], float], float]:
        """(what the target bounds as a function of the kept units, its limit)."""
        kind, graph, settled = self.target.kind, self.graph, self.settled
        if kind == "share":
            names = list(self.every_matrix)
            dense = graph.params({}, names=names)
            return lambda keep: graph.params(keep, names=names), self.target.limit(dense) + 1e-6
        if kind == "params":
            return lambda keep: graph.params({**settled, **keep}), self.target.limit(graph.params({}))
        if kind == "macs":
            return lambda keep: graph.macs({**settled, **keep}), self.target.limit(graph.macs({}))
        if kind == "size":
            from secateur.measure import size_bytes

            dense_bytes, dense = size_bytes(self.model), graph.params({})
            each = next(p.element_size() for p in self.model.parameters())
            return (
                lambda keep: dense_bytes - (dense - graph.params({**settled, **keep})) * each,
                self.target.limit(dense_bytes),
            )
        if kind == "latency":
            self.limit = self.target.limit(self._latency({}))
            return self._latency, self.limit
        if kind == "parts":
            raise SecateurError(
                f"{self.method.name} divides one budget over all that it cuts",
                where=f"target {self.target}",
                fix="give a share of the whole, or take a method such as group-magnitude or taylor",
            )
        raise SecateurError(
            f"{self.method.name} removes whole units",
            where=f"target {self.target}",
            fix="give a share, params, macs, size or latency",
        )

    def _latency(self, keep: Mapping[str, Tensor]) -> float:
        """Median seconds of one forward of the really cut model on the example inputs."""
        from copy import deepcopy

        from secateur.measure import latency
        from secateur.surgery import cut_units

        model, example = deepcopy(self.model), self.example
        if keep:
            keep = {**self.settled, **keep}
            cut_units(model, self.graph, keep)
            for name, units in keep.items():
                if self.graph[name].kind == KIND:
                    size = len(units)
                    example = map_ids(example, lambda ids: ids % size)  # noqa: B023  used here and now
        return latency(model, example)

    def allocate(
        self, scores: Mapping[str, Tensor], allocation: str | None = None, *, keep_scores: bool = True
    ) -> dict[str, Tensor]:
        """Kept units per group: the scores' order, divided so that the target is met exactly and never exceeded."""
        if self.target.parts:
            kept: dict[str, Tensor] = {}
            for part in self.each_part():
                own = {group.name: scores[group.name] for group in part.groups if group.name in scores}
                kept |= part.allocate(own, allocation, keep_scores=keep_scores)
            return kept
        groups, method = self.competitors(scores, keep_scores=keep_scores), self.method
        if self.target.kind == "share" and getattr(method, "share_of", None) == "units":
            return self._share_of_units(groups, allocation)
        return self.follow(groups, self.path(groups, allocation))

    def path(self, groups: Sequence[Competitor], allocation: str | None = None) -> list[Step]:
        """The order in which units leave: as `allocation`, else the caller, else the method says (`allocate.build_path`).

        Raises `SecateurError` where it is measured and no linear layer reads the units of a group.
        """
        how = allocation or self.allocation or self.method.allocation
        if how != MEASURED:
            return build_path(groups, how)
        readers = {}
        for group in groups:
            pairs = self.coupled(self.graph[group.name], roles=("in",), kinds=("linear", "conv1d"))
            if not pairs:
                raise SecateurError(
                    f"no linear layer reads the units of {group.name}",
                    where=f"allocation {MEASURED}",
                    fix="kinds=neurons, or another allocation",
                )
            readers[group.name] = pairs[0]
        data, length = self.require_data(), self.options.seqlen
        text = not isinstance(data, Tensor) or not data.is_floating_point()
        scores = self.remember(
            MEASURED,
            lambda: by_what_is_lost(
                self.model,
                self.graph,
                groups,
                readers,
                data,
                draw_windows(data, JUDGED[0] if text else JUDGED[1], length, self.generator(MEASURED)),
                {group.name: self.unit_weights(self.graph[group.name]) for group in groups},
                self.progress,
            ),
        )
        return build_path(with_scores(groups, scores), "global")

    def follow(
        self,
        groups: Sequence[Competitor],
        path: Sequence[Step],
        new: Callable[[Mapping[str, Tensor]], int] | None = None,
    ) -> dict[str, Tensor]:
        """Kept units where a path of the method's own first meets the target (`budget.follow`).

        new: how many parameters the method adds, given the kept units; they count where the target bounds parameters
        or bytes.
        """
        cost, limit = self.cost()
        each = {"params": 1, "size": next(self.model.parameters()).element_size()}.get(self.target.kind, 0)

        def with_new(keep: Mapping[str, Tensor]) -> float:
            return cost(keep) + each * new(keep) if new and each else cost(keep)

        return follow(
            groups, path, with_new, limit, refill=self.target.kind != "latency", describe=self._describe
        )

    def _share_of_units(self, groups: list[Competitor], allocation: str | None) -> dict[str, Tensor]:
        how = allocation or self.allocation or self.method.allocation
        fixed = any(group.fixed for group in groups)
        if how == "uniform" and not fixed:
            return {group.name: group.down_to(int(self.target.value * group.size + 1e-9)) for group in groups}
        path = self.path(groups, how)
        limit = int(self.target.value * sum(g.size for g in groups) + 1e-9)
        if not fixed:
            limit = max(limit, sum(map(self._smallest, groups)))
        return follow(groups, path, lambda keep: sum(map(len, keep.values())), limit, describe=self._describe)

    def keeps_share(self, keep: Mapping[str, Tensor], names: Container[str] | None = None) -> bool:
        """Whether no more is kept than the share asked for (a group can't go below its floor).

        names: the groups whose units a share counts; None: all that the method may cut.
        """
        if self.target.parts:
            return all(part.keeps_share(keep, names) for part in self.each_part())
        if getattr(self.method, "share_of", None) == "weights":
            cost, limit = self.cost()
            return cost(keep) <= limit
        own = [group for group in self.groups if names is None or group.name in names]
        kept = sum(len(keep[group.name]) if group.name in keep else group.size for group in own)
        return kept <= sum(max(self.share * group.size, self.floor_of(group)) for group in own) + 1e-6

    @staticmethod
    def _smallest(group: Competitor) -> int:
        return group.size - sum(len(grain) for grain in group.grains())

    def _describe(self, value: float) -> str:
        kind = self.target.kind
        if kind == "latency":
            return f"{value * 1e3:.2f} ms"
        if kind == "size":
            return f"{value / 1e6:,.2f} MB"
        if kind == "share":
            return f"{value:,.0f} units or weights"
        return f"{value:,.0f} {kind}"

    # Outputs

    def forward(self, inputs: Inputs | None = None) -> Any:
        with torch.no_grad():
            return call(self.model, self.example if inputs is None else inputs)

    def make_plan(
        self,
        *,
        keep: Mapping[str, Tensor] | None = None,
        masks: Mapping[str, Tensor] | None = None,
        values: Mapping[str, Tensor] | None = None,
        notes: Mapping[str, str] | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> Plan:
        """The plan of this run. Groups that are kept whole aren't in it; `options` join those of the caller."""
        kept = {
            name: units.cpu()
            for name, units in {**self.settled, **(keep or {})}.items()
            if len(units) < self.graph[name].size
        }
        told = {}
        for name, units in kept.items():
            if self.tokens is not None and self.graph[name].kind == KIND:
                told[KIND] = self.tokens.told(units)
        also = {"also": [describe(each) for each in self.also]} if self.also else {}
        return Plan(
            method=self.method.name,
            target=str(self.target),
            seed=self.seed,
            hyperparameters=self.method.hyperparameters,
            options={**self.options.changed(), **also, **(options or {})},
            inputs=describe(self.inputs),
            keep=kept,
            sizes={name: self.graph[name].size for name in kept},
            kinds={name: self.graph[name].kind for name in kept},
            beside={name: others for name in kept if (others := beside(self.model, self.graph[name]))},
            masks={name: mask.cpu() for name, mask in (masks or {}).items()},
            values={name: value.detach().cpu() for name, value in (values or {}).items()},
            notes={**self.notes, **told, **(notes or {})},
            source=self.method.source,
        )


def _home(group: Group) -> str:
    """Where a group lies: the tensor that makes its units, or its first block."""
    makers = [s.name for s in group.slices if s.role == "out"] or [s.name for s in group.slices]
    return makers[0] if makers else group.modules[0]


def beside(model: nn.Module, group: Group) -> list[int]:
    """Positions of the blocks that share a list with those of the group."""
    if group.kind != "layers":
        return []
    path = group.modules[0].rpartition(".")[0]
    names = model.get_submodule(path)._modules
    own = {path.rpartition(".")[2] for path in group.modules}
    return [place for place, name in enumerate(names) if name not in own]


def block_index(name: str, block_path: str | None) -> int | None:
    """The number after the blocks' path in a dotted name.

    >>> block_index("model.layers.12.mlp:neurons", "model.layers")
    12
    """
    if not block_path or not name.startswith(block_path + "."):
        return None
    head = name[len(block_path) + 1 :].split(".")[0].split(":")[0]
    return int(head) if head.isdigit() else None
