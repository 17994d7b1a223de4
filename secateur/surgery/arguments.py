"""Find the constructor arguments that build a cut model, so that plain library code loads it.

>>> model = timm.create_model(name, depth=6, embed_dim=192, num_heads=3)
>>> constructor_arguments(model, functools.partial(timm.create_model, name))
{'depth': 6, 'embed_dim': 192, 'num_heads': 3}

No fact of the library is used. The arguments that reach the model's class are noted while the dense model is built;
those that explain an old size (12 blocks, a dimension of 384, a ratio of 4.0) are tried with the value that explains
the new one, and a change stays when more of the model comes out right. Models are built on the meta device.
"""

from __future__ import annotations

import copy
import functools
import inspect
import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import nn

TRIALS = 100
"""Models that are built at most at a step."""
Sizes = set[tuple[int, int]]
T = TypeVar("T")

FAR = (10**9, 10**9)
"""The distance of what can't be built."""
SAME = (0, 0)


def fit_arguments(
    start: T,
    knobs: Sequence[Callable[[T], None]],
    distance: Callable[[T], tuple[int, int]],
    *,
    eager: bool = False,
) -> tuple[T, tuple[int, int]]:
    """The arguments that come nearest to a model, and their distance to it; `SAME` where they build it.

    Greedy: of the knobs (each changes arguments in place) that bring the arguments nearer the one that brings them
    nearest is turned, again and again; where none does, two at a time. At most `TRIALS` are tried at each step.

    Args:
        start: arguments to begin with: a dict, a config. They aren't changed.
        knobs: functions that set something in a copy of the arguments.
        distance: from what arguments build to the model; `FAR` where they build nothing.
        eager: take the first knob that brings the arguments nearer, which needs fewer builds.
    """
    best, score, size = start, distance(start), 1
    while score > SAME and size <= 2:
        nearer, wins = best, score
        for turned in itertools.islice(itertools.combinations(knobs, size), TRIALS):
            trial = copy.deepcopy(best)
            for knob in turned:
                knob(trial)
            if (found := distance(trial)) < wins:
                nearer, wins = trial, found
                if eager:
                    break
        # two at a time only where no single one helps
        size = 1 if wins < score else size + 1
        best, score = nearer, wins
    return best, score


def constructor_arguments(model: nn.Module, build: Callable[..., nn.Module]) -> dict[str, Any] | None:
    """What to call `build` with, so that it gives modules and shapes of `model`; None where no arguments do.

    Only arguments that hold an integer, a float, or a list of them are changed. What `build` raises rules a trial out.
    """
    built: dict[str, tuple[int, int]] = {}

    def distance(values: Mapping[str, Any]) -> tuple[int, int]:
        key = repr(sorted(values.items()))
        if key not in built:
            if len(built) >= TRIALS:
                return FAR
            built[key] = shape_distance(model, _built(build, values))
        return built[key]

    def alone(knob: Change) -> tuple[int, int]:
        values: dict[str, Any] = {}
        knob(values)
        return distance(values)

    defaults, dense = _noted(type(model), build)
    score = shape_distance(model, dense)
    if dense is None or score == SAME or not _alike(model, dense):
        return {} if score == SAME else None
    built[repr([])] = score
    # Of two knobs turned together each must do some good alone, or be refused alone: else there are too many pairs.
    knobs = [knob for knob in _options(model, dense, defaults) if alone(knob) < score or alone(knob) == FAR]
    start: dict[str, Any] = {}
    values, (shapes, _) = fit_arguments(start, knobs, distance)
    return values if shapes == 0 else None


def _noted(cls: Any, build: Callable[..., nn.Module]) -> tuple[dict[str, Any], nn.Module | None]:
    """The arguments that `build` hands to the class, its defaults among them, and the dense model."""
    original: Any = cls.__init__
    passed: dict[str, Any] = {}

    @functools.wraps(original)
    def note(self: Any, *args: Any, **kwargs: Any) -> None:
        if type(self) is cls and not passed:
            bound = inspect.signature(original).bind(self, *args, **kwargs)
            bound.apply_defaults()
            passed.update(bound.arguments)
        original(self, *args, **kwargs)

    cls.__init__ = note
    try:
        return passed, _built(build, {})
    finally:
        cls.__init__ = original


def shape_distance(model: nn.Module, other: nn.Module | None) -> tuple[int, int]:
    """(tensors of other shapes or in one of them only, numbers among the attributes that differ)."""
    if other is None:
        return FAR
    here, there = _shapes(model), _shapes(other)
    shapes = sum(here.get(name) != there.get(name) for name in here.keys() | there.keys())
    ours, theirs = _numbers(model), _numbers(other)
    return shapes, sum(ours.get(key) != theirs.get(key) for key in ours.keys() | theirs.keys())


def _built(build: Callable[..., nn.Module], values: Mapping[str, Any]) -> nn.Module | None:
    try:
        with torch.device("meta"):
            return build(**values)
    except Exception:  # noqa: BLE001  any way that arguments can be wrong
        return None


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    tensors = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _numbers(model: nn.Module) -> dict[tuple[str, str], Any]:
    return {
        (path, key): value
        for path, module in model.named_modules()
        for key, value in vars(module).items()
        if type(value) is int
    }


def _alike(model: nn.Module, dense: nn.Module) -> bool:
    """Whether blocks that were twins still are: no list of arguments builds twins of different sizes."""
    kinds: list[dict[str, set[tuple[int, ...]]]] = [{}, {}]
    for found, shapes in zip(kinds, (_shapes(model), _shapes(dense))):
        for name, shape in shapes.items():
            found.setdefault(re.sub(r"\b\d+\b", "*", name), set()).add(shape)
    now, before = kinds
    return now.keys() <= before.keys() and all(len(now[name]) <= len(before[name]) for name in now)


def _pairs(model: nn.Module, dense: nn.Module) -> tuple[Sizes, Sizes]:
    """(old, new) sizes that changed: of axes and attributes, and of lists of blocks."""
    here, there = _shapes(model), _shapes(dense)
    common = [(there[name], here[name]) for name in there if name in here]
    sizes = {pair for old, new in common if len(old) == len(new) for pair in zip(old, new)}
    ours, theirs = _numbers(model), _numbers(dense)
    sizes |= {(theirs[key], ours[key]) for key in theirs if key in ours and theirs[key] != ours[key]}
    blocks = set()
    modules = dict(model.named_modules())
    for path, whole in dense.named_modules():
        if path in modules and len(modules[path]._modules) < len(whole._modules):
            blocks.add((len(whole._modules), len(modules[path]._modules)))
    return sizes, blocks


Change = Callable[[dict[str, Any]], None]


def _options(model: nn.Module, dense: nn.Module, passed: Mapping[str, Any]) -> Iterator[Change]:
    sizes, blocks = _pairs(model, dense)
    changed = {(old, new) for old, new in sizes if old != new}
    shares = sorted({new / old for old, new in changed if old and new < old})
    for name, value in passed.items():
        if value is None:
            held = {n for (_, key), n in _numbers(model).items() if key == name}
            for new in held if len(held) == 1 else ():
                yield lambda trial, name=name, new=new: trial.__setitem__(name, new)  # type: ignore[misc]
        elif type(value) in (int, float):
            for new in _values(value, sizes, changed, blocks):
                yield lambda trial, name=name, new=new: trial.__setitem__(name, new)  # type: ignore[misc]
        elif isinstance(value, (tuple, list)) and all(type(item) in (int, float) for item in value):
            for share in shares:
                whole = [item * share for item in value]
                if all(type(item) is int and (item * share).is_integer() for item in value):
                    scaled = type(value)(int(item) for item in whole)
                    yield lambda trial, name=name, new=scaled: trial.__setitem__(name, new)  # type: ignore[misc]
            for place, item in enumerate(value):
                for new in _values(item, sizes, changed, blocks):
                    yield functools.partial(_replace, name=name, whole=value, place=place, new=new)


def _replace(trial: dict[str, Any], name: str, whole: Any, place: int, new: Any) -> None:
    now = trial.get(name, whole)
    trial[name] = type(whole)(new if n == place else item for n, item in enumerate(now))


def _values(value: float, sizes: Sizes, changed: Sizes, blocks: Sizes) -> list[int | float]:
    """What an argument of this value may have become."""
    found: set[int | float] = set()
    if type(value) is int and value > 1:
        found |= {new for old, new in blocks if old == value}
        for old, new in changed:
            if old % value == 0 and new % (old // value) == 0 and new:
                found.add(new // (old // value))
    elif type(value) is float and value > 0:
        for (wide, wide_now), (narrow, narrow_now) in itertools.product(sizes, sizes):
            if int(narrow * value) == wide and wide_now < wide and narrow_now:
                found.add(wide_now / narrow_now)
    return sorted(found - {value})
