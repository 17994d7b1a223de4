"""The repairs by name, block after block: what is left of a pruned block is fitted to the dense model's outputs."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from secateur.graph.blocks import Matrix
from secateur.repair.readers import LAYERS, Moments, beside_states, input_of, output_of, reading_order
from secateur.repair.squares import masked_least_squares
from secateur.repair.steps import Case, fit_block
from secateur.stats.record import Recorder
from secateur.stats.stream import Flow, Given, states_of
from secateur.utils.inputs import map_tensors
from secateur.utils.running import evaluating, with_residual
from secateur.utils.screen import Screen

REPAIRS = ("reconstruct", "obs", "bias", "none")
"""What `repair` may be: fitted to the dense model's states, to each matrix's own dense outputs, a bias for what left, nothing."""
DAMPING = 0.01
STEPS = 20
"""Of conjugate gradients in each matrix: more change nothing that can be measured behind the block."""


@dataclass(frozen=True, eq=False, repr=False)
class PrunedBlock(Screen):
    """One block as it was pruned: the module in the model, a copy from before, what may be changed of it, and where zeros are.

    matrices and masks by parameter name; a matrix without a mask is whole. `masks` may hold biases and norms too.
    """

    index: int
    path: str
    module: nn.Module
    whole: nn.Module
    matrices: Mapping[str, Matrix]
    masks: Mapping[str, Tensor]
    units: bool = False
    """Whether whole units left, so that what read them is given zeros in their place."""
    ahead: tuple[nn.Module, ...] = ()
    """The dense blocks behind it that left: it is fitted to what the dense model gives behind the last of them."""

    def inside(self, name: str) -> str:
        """A name of the model as one of the block."""
        return name[len(self.path) + 1 :] if self.path else name


def dense_copy(block: nn.Module) -> nn.Module:
    """A copy of a block that runs by itself: one whose forward is wrapped would call the block that it was made from."""
    made = copy.deepcopy(block)
    for module in made.modules():
        module.__dict__.pop("forward", None)
    return made


class Repair:
    """Repairs the blocks of a model in their order, each once, as they are pruned.

    >>> repair = Repair(model, "reconstruct", passes=2)
    >>> for block in stream(model, ids, needs, matrices):
    ...     whole = dense_copy(block.module)
    ...     masks = prune_in_place(block)
    ...     values = repair.block(block.flow, PrunedBlock(i, block.path, block.module, whole, block.matrices, masks))

    `obs`: matrices are solved for in the order in which they read, on what the pruned block gives them, so that they give what
    the dense weights give; where units left, tokens weigh relative to their states. `reconstruct`: the same, then `passes` of an
    optimiser towards the states of the dense model behind the block. `bias`: what left is made up for on average.
    Memory: the hidden states, a copy of one block, and for `reconstruct` the dense model's states and four more copies.
    """

    def __init__(self, model: nn.Module, how: str, *, passes: int = 2, rate: float = 0.012, seed: int = 0):
        self.model, self.how, self.passes, self.rate, self.seed = model, how, passes, rate, seed
        self.dense: Flow | None = None
        self.pruned: Flow | None = None
        self.errors: list[tuple[float, float]] = []
        """Of each block that was fitted by steps, before and after them."""
        self.left: list[str] = []
        """Matrices that lost something and couldn't be solved for: experts, those of a layer that is called twice."""

    def block(self, pruned: Flow, part: PrunedBlock) -> dict[str, Tensor]:
        """The tensors of a block that the repair changes, by name of the model; they are in the model when it returns.

        The pruned states don't go on: that is left to `go_on`, or to whoever reads them next.
        """
        self._enter(pruned)
        with torch.no_grad(), evaluating(self.model), evaluating(part.whole):
            work = _Work(self, part)
            changed: dict[str, Tensor] = {}
            for names in work.order() if part.masks else ():
                changed |= work.solve(names)
            self.left += [
                n for n in part.matrices if n in part.masks and work.loses(n) and n not in work.solved
            ]
            for place, dense in enumerate((part.whole, *part.ahead), part.index):
                self._pass_on(self.dense, place, dense)
            if self.how == "reconstruct" and self.passes and (part.masks or part.ahead):
                changed |= work.steps()
            written = work.write(changed)
        return written

    def finished(self, pruned: Flow, index: int, whole: nn.Module, ahead: tuple[nn.Module, ...] = ()) -> None:
        """The dense states go on behind a block that needs no repair, or had it. ahead: as in `PrunedBlock`."""
        self._enter(pruned)
        with torch.no_grad(), evaluating(self.model), evaluating(whole):
            for place, dense in enumerate((whole, *ahead), index):
                self._pass_on(self.dense, place, dense)

    def go_on(self, index: int, module: nn.Module, gone: bool = False) -> None:
        """The pruned states go on behind a block as it is now. gone: it left, so that what it is given is passed on."""
        with torch.no_grad(), evaluating(self.model):
            self._pass_on(self.pruned, index, module, gone)

    def _enter(self, pruned: Flow) -> None:
        if pruned is not self.pruned:
            self.pruned = pruned
            self.dense = pruned.beside() if self.how == "reconstruct" else None

    def _pass_on(self, flow: Flow | None, index: int, block: nn.Module, gone: bool = False) -> None:
        for number in range(len(flow.batches) if flow is not None else 0):
            assert flow is not None
            if flow.level[number] >= index:  # gone through with the block before it
                continue
            given = flow.call(number, index)
            made = block(*given[0], **given[1])
            flow.keep(number, index, with_residual(made, given, lambda x, _: x) if gone else made)


class _Work:
    """One block in work: in float32, whatever the model's type, and without what a caller doesn't need."""

    def __init__(self, repair: Repair, part: PrunedBlock):
        self.repair, self.part = repair, part
        self.low = any(p.is_floating_point() and p.dtype.itemsize < 4 for p in part.module.parameters())
        self.module = dense_copy(part.module).float() if self.low else part.module
        self.whole = dense_copy(part.whole).float() if self.low else part.whole
        self.recorder = Recorder(repair.model, {}, frozenset())
        self.solved: set[str] = set()

    def given(self, flow: Flow, number: int) -> Given:
        self.recorder.begin(flow.batches[number])
        args, kwargs = flow.call(number, self.part.index)
        return (self.up(args), self.up(kwargs)) if self.low else (args, kwargs)

    def up(self, value: Any) -> Any:
        return map_tensors(value, lambda t: t.float() if t.is_floating_point() else t)

    def layer(self, module: nn.Module, name: str) -> nn.Module:
        path = self.part.inside(self.part.matrices[name].path)
        return module.get_submodule(path) if path else module

    def order(self) -> list[list[str]]:
        """The matrices that lose something and can be solved for, those with one input together."""
        able = {n: self.layer(self.module, n) for n, m in self.part.matrices.items() if m.kind in LAYERS}
        found = reading_order(self.module, self.given(self.pruned, 0), able)
        cut = {name for name in able if name in self.part.masks and self.loses(name)}
        return [own for names in found if (own := [name for name in names if name in cut])]

    def loses(self, name: str) -> bool:
        """Whether a matrix has anything to make up for; where units left, only what read them has."""
        reads = self.part.matrices[name].fold(self.part.masks[name])
        return not self.part.units or not bool(reads.any(0).all())

    @property
    def pruned(self) -> Flow:
        assert self.repair.pruned is not None
        return self.repair.pruned

    def moments(self, name: str) -> Moments | None:
        """Of what a matrix reads; None where it is given other tokens in the whole block."""
        sums, matrix = Moments(), self.part.matrices[name]
        for number in range(len(self.pruned.batches)):
            x = input_of(self.module, self.given(self.pruned, number), self.layer(self.module, name))
            if x is None:
                continue
            rows, dense = self.recorder.rows(matrix, x), None
            if self.part.units:  # the inputs that left are still there in the whole block
                given = self.given(self.pruned, number)
                seen = output_of(self.whole, given, self.layer(self.whole, name))
                if seen is None or seen[0].shape != x.shape:
                    return None
                beside, states = seen[0], states_of(seen[1])[0]
                if self.repair.how != "bias" and states.shape[:-1] == x.shape[:-1]:
                    x, beside = (each * beside_states(states) for each in (x, beside))
                rows, dense = (self.recorder.rows(matrix, each) for each in (x, beside))
            sums.add(rows, dense)
        return sums

    def solve(self, names: list[str]) -> dict[str, Tensor]:
        """The matrices of one input anew, or their biases; they are in the block when it returns."""
        sums = self.moments(names[0])
        if sums is None or sums.inner is None:
            return {}
        self.solved.update(names)
        return self.biases(names, sums) if self.repair.how == "bias" else self.squares(names, sums)

    def squares(self, names: list[str], sums: Moments) -> dict[str, Tensor]:
        changed = {}
        assert sums.inner is not None
        for name in names:
            matrix, parts = self.part.matrices[name], len(sums.inner)
            whole, now, mask = (
                matrix.fold(tensor).reshape(parts, -1, sums.inner.shape[-1])
                for tensor in (
                    self.parameter(self.whole, name).detach(),
                    self.parameter(self.module, name).detach(),
                    self.part.masks[name].to(self.parameter(self.module, name).device),
                )
            )
            new = [
                masked_least_squares(
                    whole[part],
                    mask[part],
                    sums.inner[part],
                    None if sums.cross is None else whole[part].to(sums.cross) @ sums.cross[part],
                    damping=DAMPING,
                    steps=STEPS,
                    start=now[part],
                )
                for part in range(parts)
            ]
            changed[name] = matrix.unfold(torch.cat(new)).contiguous()
            self.parameter(self.module, name).copy_(changed[name])
        return changed

    def biases(self, names: list[str], sums: Moments) -> dict[str, Tensor]:
        changed = {}
        assert sums.total is not None and sums.dense_total is not None
        mean, before = sums.total / max(sums.tokens, 1), sums.dense_total / max(sums.tokens, 1)  # [parts, in]
        for name in names:
            matrix = self.part.matrices[name]
            was, now = (
                torch.einsum("poi,pi->po", matrix.fold(tensor).reshape(len(mean), -1, mean.shape[1]), each)
                for tensor, each in (
                    (self.parameter(self.whole, name).detach(), before),
                    (self.parameter(self.module, name).detach(), mean),
                )
            )
            added = was - now
            kept = matrix.fold(self.part.masks[name]).any(1).to(added.device)
            added = added.flatten() * kept  # rows that left stay zero
            key, layer = matrix.bias[0], self.layer(self.module, name)
            attribute = key.rpartition(".")[2]
            bias = getattr(layer, attribute, None)
            if bias is None and not added.any():
                continue
            if bias is None:
                layer.register_parameter(attribute, nn.Parameter(added))
                changed[key] = added
            else:
                bias.copy_(bias + added)
                changed[key] = bias
        return changed

    def parameter(self, module: nn.Module, name: str) -> nn.Parameter:
        return getattr(self.layer(module, name), self.part.matrices[name].attribute)

    def steps(self) -> dict[str, Tensor]:
        """The optimiser's steps on everything of the block that may change."""
        own = dict(self.module.named_parameters())
        free = {self.part.inside(name) for name in self.part.matrices}
        free |= {self.part.inside(m.bias[0]) for m in self.part.matrices.values()}
        free |= {name for name in map(self.part.inside, self.part.masks)}
        parameters = {name: p for name, p in own.items() if name in free and p.is_floating_point()}
        masks = {
            parameters[inner]: mask.to(parameters[inner].device)
            for name, mask in self.part.masks.items()
            if (inner := self.part.inside(name)) in parameters
        }
        self.repair.errors.append(
            fit_block(
                self.module,
                self.case,
                len(self.pruned.batches),
                list(parameters.values()),
                masks,
                passes=self.repair.passes,
                rate=self.repair.rate,
                seed=self.repair.seed,
                name=self.part.path or type(self.module).__name__,
            )
        )
        prefix = f"{self.part.path}." if self.part.path else ""
        return {prefix + name: parameter for name, parameter in parameters.items()}

    def case(self, number: int) -> Case:
        assert self.repair.dense is not None
        given, wanted = self.given(self.pruned, number), self.repair.dense.hidden[number]
        return given, wanted, self.counts(wanted[0])

    def counts(self, states: Tensor) -> Tensor | None:
        mask = self.recorder.mask(self.part.module, states)
        return None if mask is None else mask.reshape(states.shape[:-1])

    def write(self, changed: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What was worked on in float32, into the block, with zeros where they were; the tensors as the model has them."""
        written = {}
        for name, tensor in changed.items():
            path, _, attribute = self.part.inside(name).rpartition(".")
            layer = self.part.module.get_submodule(path) if path else self.part.module
            present = getattr(layer, attribute, None)
            if present is None:
                like = next(layer.parameters())
                present = nn.Parameter(tensor.to(like))
                layer.register_parameter(attribute, present)
            else:
                present.copy_(tensor)
            if name in self.part.masks:
                present.masked_fill_(~self.part.masks[name].to(present.device), 0)
            written[name] = present.detach()
        return written
