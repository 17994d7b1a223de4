"""The proof that a cut model computes what the masked one does."""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from secateur.errors import SecateurError
from secateur.graph.groups import Graph
from secateur.graph.notes import Run
from secateur.surgery.changes import Keep, _tensor
from secateur.surgery.cut import cut_modules
from secateur.surgery.mask import leave_out, mask_units, zeros
from secateur.surgery.stand_in import Edit, StandIns, loosened, sharing, zeroed
from secateur.utils.inputs import as_call, describe, map_tensors
from secateur.utils.running import call, evaluating, flat_tensors, forget_caches, without_cache

# --- proof


def prove(
    model: nn.Module,
    graph: Graph,
    keep: Keep,
    inputs: Any,
    *,
    also: Sequence[Any] = (),
    backward: bool = True,
    export: bool = False,
) -> dict[str, str]:
    """Cut a copy and check it; the groups whose cut is not provably right, with the reason (empty: all sound).

    >>> prove(model, graph, {"fc1:neurons": torch.arange(4)}, x)
    {}

    Checked: the forward runs and has the same output shapes, with another batch size too (two examples instead of one,
    or one instead of several) where the model takes it, and on the inputs in `also`; all values are finite, gradients flow, the number of parameters
    is the predicted one and, for groups where no norm or softmax mixes units, the cut model gives what the masked one
    gives (1e-5 relative, in double precision where the model is small). With `export`, which takes seconds, a model that
    `torch.export` takes must be taken by it afterwards. The model is not changed.

    Values are compared with noise on norms, biases and tensors of one value throughout, since equal entries hide which
    of them was cut. First in the model's own precision and, where the same operations run on them, on smaller pictures
    or shorter sequences, with a cut copy beside the model and no other; what doesn't pass is looked at closely.
    """
    left = {g.name: kept for g, kept in graph._kept(keep)}
    bad: dict[str, str] = {}
    if left and not export and holds(model, graph, left, inputs, also, backward):
        return bad
    expected = _expected(model, inputs, also, export)
    while left:
        why = _check(model, graph, left, inputs, expected, backward)
        if why is None:
            return bad
        for name in _suspects(model, graph, left, inputs, expected, backward):
            bad[name] = why
            del left[name]
    return bad


@dataclass
class _Expected:
    """What the dense model does: its outputs, other inputs (name, inputs, output shapes), if exported."""

    outputs: list[Tensor]
    others: list[tuple[str, Any, list[tuple[int, ...]]]]
    exports: bool


def _expected(model: nn.Module, inputs: Any, also: Sequence[Any], export: bool) -> _Expected:
    outputs = _forward(model, inputs)
    others = [("another of the inputs", fed, _shapes(_forward(model, fed))) for fed in also]
    batches = {t.shape[0] if t.dim() else 0 for t in flat_tensors(as_call(inputs))}
    if len(batches) == 1 and batches != {0}:
        fed = map_tensors(inputs, _rebatched)
        with contextlib.suppress(Exception):  # a model made for one batch size
            others.append(("another batch size", fed, _shapes(_forward(model, fed))))
    return _Expected(outputs, others, export and _exports(model, inputs) is None)


def holds(
    model: nn.Module, graph: Graph, keep: Keep, inputs: Any, also: Sequence[Any], backward: bool
) -> bool:
    """Whether a cut is sound as far as a proof in little memory and time can tell; no says nothing yet."""
    try:
        return _holds(model, graph, keep, inputs, also, backward)
    except Exception:  # noqa: BLE001  the full proof finds the reason
        return False


def _holds(
    model: nn.Module, graph: Graph, keep: Keep, inputs: Any, also: Sequence[Any], backward: bool
) -> bool:
    exact = {name: kept for name, kept in keep.items() if graph[name].exact}
    mixed = [name for name in keep if name not in exact]
    noise = loosened(model)
    twin = sharing(model, noise)
    masks: dict[str, Edit] = {n: functools.partial(zeroed, at) for n, at in zeros(graph, exact).items()}
    fed, wanted = _fed(twin, graph, inputs, {} if mixed else masks)
    if mixed:
        moved = sharing(model, noise) if any(graph[name].modules for name in mixed) else twin
        moves = shuffled(moved, graph, mixed, torch.Generator().manual_seed(0))
        edits: dict[str, Edit] = {n: lambda t, m=m: _moved(m, t.clone()) for n, m in moves.items()}  # type: ignore[misc]
        if largest_gap(_stood_in(moved, graph, edits, fed)[0], wanted) is not None:
            return False
    masked = wanted
    if exact and (mixed or _beside_zeros(graph, exact)):
        leave_out(twin, graph, exact)
        masked = _stood_in(twin, graph, masks, fed)[0]
    del twin
    cut = _cut_twin(model, graph, keep, noise)
    if sum(p.numel() for p in cut.parameters()) != graph.params(keep):
        return False
    if fed is not inputs and not _like(_forward(cut, inputs), _run_of(model, graph, inputs)):
        return False
    for parameter in cut.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(_forget_grad)
    got = _forward(cut, fed, grad=backward)
    if not any(o.numel() for o in got):
        return False
    if _shapes(got) != _shapes(wanted) or not all(torch.isfinite(o).all() for o in got):
        return False
    loss = sum(o.float().sum() for o in got if o.requires_grad)
    if isinstance(loss, Tensor):
        loss.backward()
    if any(_shapes(_forward(cut, each)) != _shapes(_forward(model, each)) for each in also):
        return False
    if not _other_batch(model, cut, graph, inputs, fed):
        return False
    got = [o.detach() for o in got]
    del loss, cut
    if exact and mixed:
        got = _forward(_cut_twin(model, graph, exact, noise), fed)
    return not exact or largest_gap(got, masked) is None


def _beside_zeros(graph: Graph, keep: Keep) -> bool:
    return bool(graph._choices) or any(graph[name].whole for name in keep)


def _cut_twin(model: nn.Module, graph: Graph, keep: Keep, noise: Mapping[str, Tensor]) -> nn.Module:
    rescaled = {name for _, rows in graph._rescaled for name, _, _ in rows}
    own = {name: noise.get(name, _tensor(model, name).detach()).clone() for name in rescaled}
    twin = sharing(model, {**noise, **own})
    cut_modules(twin, graph, keep)
    return twin


def _forget_grad(parameter: Tensor) -> None:
    parameter.grad = None


def _stood_in(
    model: nn.Module, graph: Graph, edits: Mapping[str, Edit], inputs: Any
) -> tuple[list[Tensor], int]:
    """(outputs of the model with edited tensors, what it did)."""
    forget_caches(model)
    with StandIns(model, graph, edits) as mode:
        return _forward(model, inputs), mode.ops


def _fed(dense: nn.Module, graph: Graph, inputs: Any, edits: Mapping[str, Edit]) -> tuple[Any, list[Tensor]]:
    """Inputs to compare values on, smaller where the same operations run on them, and what the edited model gives."""
    traced = graph._runs.get(str(describe(inputs)))
    small = _smaller(inputs) if traced is not None else None
    for fed in [] if small is None else [map_tensors(small, _rebatched), small]:
        with contextlib.suppress(Exception):  # a model made for one size
            outputs, ops = _stood_in(dense, graph, edits, fed)
            if traced is not None and ops == traced.ops and all(torch.isfinite(o).all() for o in outputs):
                return fed, outputs
    return inputs, _stood_in(dense, graph, edits, inputs)[0]


PICTURE, SEQUENCE = 64, 32
"""Pixels and tokens that a proof makes do with."""


def _smaller(inputs: Any) -> Any:
    """A corner of a picture, or the beginning of sequences; None for other inputs."""
    tensors = list(flat_tensors(as_call(inputs)))
    if len(tensors) == 1 and tensors[0].dim() == 4 and min(tensors[0].shape[2:]) >= 1.5 * PICTURE:
        return map_tensors(inputs, lambda t: t[:, :, :PICTURE, :PICTURE].contiguous())
    sizes = {t.shape for t in tensors if t.dim() == 2 and not t.is_floating_point()}
    if len(sizes) == 1 and all(t.shape in sizes for t in tensors) and min(sizes)[1] >= 1.5 * SEQUENCE:
        return map_tensors(inputs, lambda t: t[:, :SEQUENCE].contiguous())
    return None


def _run_of(model: nn.Module, graph: Graph, inputs: Any) -> Run:
    """The run that the trace made on such inputs; the dense model's where it made none, or one that spared values."""
    key = str(describe(inputs))
    run = graph._runs.get(key, Run(key, 0, [], None, []))
    if run.finite is None:
        outputs = _forward(model, inputs)
        finite = [bool(torch.isfinite(o).all()) for o in outputs]
        run = graph._runs[key] = Run(key, run.ops, _shapes(outputs), finite, [])
    return run


def _like(outputs: Sequence[Tensor], run: Run) -> bool:
    finite = [bool(torch.isfinite(o).all()) or not was for o, was in zip(outputs, run.finite or [])]
    return _shapes(outputs) == run.shapes and all(finite)


def _other_batch(model: nn.Module, cut: nn.Module, graph: Graph, inputs: Any, fed: Any) -> bool:
    """Another batch size gives the shapes that one expects, or those of the dense model."""
    first, used = ({t.shape[0] if t.dim() else 0 for t in flat_tensors(as_call(x))} for x in (inputs, fed))
    if used != first or len(first) != 1 or first == {0}:  # it ran with another, or can't
        return True
    other = map_tensors(inputs, _rebatched)
    (old,), (new,) = first, {len(t) for t in flat_tensors(as_call(other))}
    try:
        shapes = _shapes(_forward(cut, other))
    except Exception:  # noqa: BLE001  a model made for one batch size, or a cut that isn't sound
        shapes = []
    run = _run_of(model, graph, inputs)
    if shapes and shapes == [(new, *s[1:]) if s[:1] == (old,) else s for s in run.shapes]:
        return True
    try:
        return shapes == _shapes(_forward(model, other))
    except Exception:  # noqa: BLE001  the dense model takes no other batch size either
        return True


def _rebatched(tensor: Tensor) -> Tensor:
    """One example twice; of several the first."""
    return tensor[:1] if len(tensor) > 1 else torch.cat([tensor, tensor])


def _exports(model: nn.Module, inputs: Any) -> str | None:
    """Why `torch.export` doesn't take the model; None if it does."""
    args, kwargs = as_call(inputs)
    try:
        with evaluating(model), torch.no_grad():
            torch.export.export(model, args, kwargs, strict=False)
    except Exception as error:  # noqa: BLE001  any way an export can fail
        return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return None


def _forward(model: nn.Module, inputs: Any, grad: bool = False) -> list[Tensor]:
    with evaluating(model), without_cache(model), torch.set_grad_enabled(grad):
        return list(flat_tensors(call(model, inputs)))


def _shapes(outputs: Sequence[Tensor]) -> list[tuple[int, ...]]:
    return [tuple(o.shape) for o in outputs]


def _copied(model: nn.Module) -> nn.Module:
    """A copy with noise where equal entries would hide which of them was cut."""
    clone = copy.deepcopy(model)
    with torch.no_grad():
        for name, value in loosened(clone).items():
            _tensor(clone, name).copy_(value)
    return clone


def _double(model: nn.Module, inputs: Any) -> tuple[nn.Module, Any]:
    """`_copied`, in double precision when that is cheap."""
    clone = _copied(model)
    types = {p.dtype for p in clone.parameters()}
    if types == {torch.float32} and sum(p.numel() for p in clone.parameters()) < 5e7:
        return clone.double(), map_tensors(inputs, lambda t: t.double() if t.is_floating_point() else t)
    return clone, inputs


def _check(
    model: nn.Module, graph: Graph, keep: Keep, inputs: Any, expected: _Expected, backward: bool
) -> str | None:
    predicted = graph.params(keep)
    try:
        cut = copy.deepcopy(model)
        cut_modules(cut, graph, keep)
        got = sum(p.numel() for p in cut.parameters())
        if got != predicted:
            return f"{got} parameters where {predicted} were predicted"
        outputs = _forward(cut, inputs, grad=backward)
        shapes, wanted = _shapes(outputs), _shapes(expected.outputs)
        if not _fit(shapes, wanted, model, graph, keep, inputs):
            return f"output shapes {shapes} where the model had {wanted}"
        if not any(o.numel() for o in outputs):
            return "on these inputs nothing is left to compare: the cut model returns no values, as a detector without detections"
        for o, e in zip(outputs, expected.outputs, strict=True):
            if not torch.isfinite(o).all() and torch.isfinite(e).all():
                return "the output is not finite"
        if backward:
            loss = sum(o.float().sum() for o in outputs if o.requires_grad)
            if isinstance(loss, Tensor):
                loss.backward()
        for what, fed, wanted in expected.others:
            if not _fit(_shapes(_forward(cut, fed)), wanted, model, graph, keep, fed):
                return f"{what} gives other output shapes"
        if expected.exports and (why := _exports(cut, inputs)) is not None:
            return f"torch.export no longer takes it: {why}"
        exact = {name: kept for name, kept in keep.items() if graph[name].exact}
        why = _differs(model, graph, exact, inputs) if exact else None
        return why or _order_matters(model, graph, [n for n in keep if n not in exact], inputs)
    except SecateurError:
        raise
    except Exception as error:  # noqa: BLE001  any way a model can fail
        return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _fit(
    shapes: list[tuple[int, ...]],
    wanted: list[tuple[int, ...]],
    model: nn.Module,
    graph: Graph,
    keep: Keep,
    inputs: Any,
) -> bool:
    """Are these shapes those of the dense model, but for sizes that follow from values, such as a number of boxes?

    These are the sizes that the masked model gives another value.
    """
    if shapes == wanted:
        return True
    if [len(s) for s in shapes] != [len(s) for s in wanted]:
        return False
    masked = copy.deepcopy(model)
    mask_units(masked, graph, keep)
    found = _shapes(_forward(masked, inputs))
    if [len(s) for s in found] != [len(s) for s in wanted]:
        return False
    exact = all(graph[name].exact for name in keep)
    sizes = zip(itertools.chain(*shapes), itertools.chain(*wanted), itertools.chain(*found), strict=True)
    return all(cut == mask or (cut == dense if mask == dense else not exact) for cut, dense, mask in sizes)


class _Elastic(TorchFunctionMode):
    """Lets one written size of a view give way.

    Used only to compare values: a part of a plan may be impossible to run alone (channels without their heads)
    where the whole plan runs.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        try:
            return func(*args, **(kwargs or {}))
        except RuntimeError:
            if getattr(func, "__name__", "") not in ("view", "reshape"):
                raise
            sizes = list(args[1]) if isinstance(args[1], (tuple, list)) else list(args[1:])
            for k in reversed(range(len(sizes))):
                trial = [-1 if n == k else size for n, size in enumerate(sizes)]
                try:
                    return args[0].reshape(trial)
                except RuntimeError:
                    continue
            raise


def _differs(model: nn.Module, graph: Graph, keep: Keep, inputs: Any) -> str | None:
    """Does the cut model give something else than the masked one?"""

    def both(double: bool, elastic: bool) -> tuple[list[Tensor], list[Tensor]]:
        out = []
        for change in (cut_modules, mask_units):
            clone, fed = _double(model, inputs) if double else (_copied(model), inputs)
            change(clone, graph, keep)
            with _Elastic() if elastic else contextlib.nullcontext():
                out.append(_forward(clone, fed))
        return out[0], out[1]

    ways = [(True, False), (True, True), (False, False), (False, True)]
    for n, way in enumerate(ways):
        try:
            a, b = both(*way)
            break
        except RuntimeError:
            if n == len(ways) - 1:
                raise
    gap = largest_gap(a, b)
    return None if gap is None else f"slicing and masking differ by {gap:.2g}"


def _order_matters(model: nn.Module, graph: Graph, names: Sequence[str], inputs: Any) -> str | None:
    """Do norms and all see the units of a group in any order? If a slice were missing, permuting would show it."""
    if not names:
        return None
    generator = torch.Generator().manual_seed(0)
    out = []
    for permuted in (False, True):
        try:
            clone, fed = _double(model, inputs)
            out.append(_forward(_shuffled(clone, graph, names, generator) if permuted else clone, fed))
        except RuntimeError:  # an operation without double precision
            out = [_forward(_copied(model), inputs)] if permuted else out
            clone = _copied(model)
            out.append(_forward(_shuffled(clone, graph, names, generator) if permuted else clone, inputs))
    gap = largest_gap(out[1], out[0])
    return None if gap is None else f"the order of its units matters: outputs differ by {gap:.2g}"


def _shuffled(model: nn.Module, graph: Graph, names: Sequence[str], generator: torch.Generator) -> nn.Module:
    """The model with the units of these groups permuted, in place."""
    with torch.no_grad():
        for name, moves in shuffled(model, graph, names, generator).items():
            _moved(moves, _tensor(model, name))
    return model


def shuffled(
    model: nn.Module, graph: Graph, names: Sequence[str], generator: torch.Generator
) -> dict[str, list[Move]]:
    """What permutes the units of these groups, by tensor: (axis, to, from). Modules have moved already."""
    moves: dict[str, list[Move]] = {}
    for name in names:
        group = graph[name]
        order = torch.randperm(group.size, generator=generator)
        for s in group.slices:
            to, source = s.index.reshape(-1), s.index[order].reshape(-1)
            moves.setdefault(s.name, []).append((s.dim, to, source))
        if group.modules:
            owners = [path.rpartition(".") for path in group.modules]
            moved = [model.get_submodule(group.modules[n]) for n in order.tolist()]
            for (parent, _, leaf), module in zip(owners, moved, strict=True):
                model.get_submodule(parent)._modules[leaf] = module
    return moves


Move = tuple[int, Tensor, Tensor]


def _moved(moves: Sequence[Move], tensor: Tensor) -> Tensor:
    for dim, to, source in moves:
        tensor.index_copy_(dim, to.to(tensor.device), tensor.index_select(dim, source.to(tensor.device)))
    return tensor


def largest_gap(got: Sequence[Tensor], expected: Sequence[Tensor]) -> float | None:
    """The largest difference, if it is more than rounding."""
    if _shapes(got) != _shapes(expected):
        return float("inf")
    for x, y in zip(got, expected, strict=True):
        if not x.is_floating_point():
            if not x.is_complex() and not torch.equal(x, y):
                return float("inf")
            continue
        limit = {torch.float64: 1e-5, torch.float32: 1e-4}.get(x.dtype, 5e-2)
        ok = torch.isfinite(y)
        if not ok.any():
            continue
        gap = float((x - y)[ok].abs().max())
        if not gap <= limit * max(1e-3, float(y[ok].abs().max())):
            return gap
    return None


def _suspects(
    model: nn.Module, graph: Graph, keep: Keep, inputs: Any, expected: _Expected, backward: bool
) -> list[str]:
    """The groups to give up: those at a size that no attribute can mend, else found by halving."""
    trouble = graph.troubled(keep)
    for names in trouble:
        local = [n for n in names if graph[n].kind != "hidden" and n in keep]
        if local:
            return local
        if names:
            return [n for n in names if n in keep]

    def search(names: list[str]) -> list[str]:
        part = {n: keep[n] for n in names}
        if len(names) == 1 or _check(model, graph, part, inputs, expected, backward) is None:
            return []
        half = len(names) // 2
        found = []
        for side in (names[:half], names[half:]):
            if _check(model, graph, {n: keep[n] for n in side}, inputs, expected, backward) is not None:
                found += side if len(side) == 1 else search(side)
        return found or names[half:]

    return list(keep) if len(keep) == 1 else search(list(keep))
