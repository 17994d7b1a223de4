"""The fields of a config that build the cut model."""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from secateur.graph.groups import Graph, Group
from secateur.surgery.arguments import FAR, SAME, fit_arguments
from secateur.surgery.changes import Changes, _removed_blocks, _set_config


def _configs(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """A config and those inside it, with the dotted prefix of their fields."""
    yield prefix, config
    for name, value in list(vars(config).items()):
        if hasattr(value, "to_dict") and hasattr(value, "__dict__"):
            yield from _configs(value, f"{prefix}{name}.")


def _get_config(config: Any, name: str) -> Any:
    for part in name.split("."):
        config = getattr(config, part, None)
    return config


def _alike(graph: Graph, pairs: Sequence[tuple[Group, Tensor]]) -> bool:
    """Whether twins (the same group of another block) keep equally many units, as one config would have it."""
    kept = {group.name: len(units) for group, units in pairs}
    gone = tuple(
        f"{path}." for group, units in pairs if group.modules for path in _removed_blocks(group, units)
    )
    counts: dict[Any, set[int]] = {}
    for group in graph.groups:
        if gone and any(s.name.startswith(gone) for s in group.slices):
            continue
        twin = (
            group.kind,
            group.size,
            tuple((re.sub(r"\.\d+\.", ".*.", s.name), s.dim) for s in group.slices),
        )
        counts.setdefault(twin, set()).add(kept.get(group.name, group.size))
    return all(len(found) == 1 for found in counts.values())


def fit_config(
    model: nn.Module, graph: Graph, pairs: Sequence[tuple[Group, Tensor]], changes: Changes
) -> None:
    """Find the config that builds the cut model, and set it: fields with an old size get the new one.

    Building on the meta device proves it. Where no config builds the cut shapes but blocks were removed, the one that
    builds modules of the right names is taken; `changes.uniform` tells the two apart.
    """
    config: Any = getattr(model, "config", None)
    if config is None or not hasattr(config, "to_dict") or not pairs:
        return
    alike = _alike(graph, pairs)
    if not alike and not changes.layers:
        return
    # Attributes that views read, and those that the cut set, must come out of the constructor as well.
    watched = [(a.module, a.name) for a in graph._attributes if "." not in a.name and a.place is None]
    watched += [(path, name) for path, values in changes.attributes.items() for name in values]

    start = copy.deepcopy(config)
    _shorten_lists(start, _lists(graph, pairs, changes))
    options = _options(model, start, graph, _changed_sizes(graph, pairs, changes), watched)
    knobs = [functools.partial(_set_config, name=name, value=value) for name, value in options]

    def search(names_only: bool) -> tuple[Any, bool]:
        distance = functools.partial(_distance, model, watched, names_only=names_only)
        # A build takes long, and most fields are independent of each other: the first that helps is taken.
        best, score = fit_arguments(start, knobs, distance, eager=True)
        return best, score == SAME

    best, uniform = search(False) if alike else (start, False)
    if uniform and not _same_numbers(model, best, changes):
        return
    changes.uniform = fits = uniform
    if not uniform and changes.layers:
        best, fits = search(True)
    if not fits:
        return
    for prefix, part in _configs(best):
        for name, value in vars(part).items():
            full = prefix + name
            if type(value) in (int, list, tuple) and value != _get_config(config, full):
                _set_config(config, full, value)
                changes.config[full] = value


def _distance(
    model: nn.Module, watched: Sequence[tuple[str, str]], config: Any, names_only: bool = False
) -> tuple[int, int]:
    """(names of parameters in one of them only, other shapes and attributes) between the model and what is built."""
    try:
        with torch.device("meta"):
            built = type(model)(copy.deepcopy(config))
    except Exception:  # noqa: BLE001  any way a config can be wrong
        return FAR
    here, there = (
        {name: p.shape for name, p in m.named_parameters(remove_duplicate=False)} for m in (model, built)
    )
    names = len(here.keys() ^ there.keys())
    if names_only:
        return names, 0
    wrong = 4 * names + sum(here[name] != there[name] for name in here.keys() & there.keys())
    modules, others = dict(model.named_modules()), dict(built.named_modules())
    for path, name in watched:
        if path in modules and path in others and name in vars(modules[path]):
            wrong += getattr(others[path], name, None) != getattr(modules[path], name)
    return wrong, 0


def _block_count(graph: Graph, path: str) -> int:
    """How many children with parameters the module has in the dense model."""
    prefix = f"{path}." if path else ""
    return len({name[len(prefix) :].partition(".")[0] for name in graph.shapes if name.startswith(prefix)})


def _lists(graph: Graph, pairs: Sequence[tuple[Group, Tensor]], changes: Changes) -> dict[int, list[int]]:
    """Number of blocks -> positions that stay: config lists of that length hold one entry a block."""
    blocks = {group.name.rpartition(":")[0] for group, _ in pairs if group.kind == "layers"}
    return {
        _block_count(graph, path): stay
        for path, stay in changes.layers.items()
        if path in blocks or "model" in blocks
    }


def _shorten_lists(config: Any, lists: Mapping[int, Sequence[int]]) -> None:
    for _, part in _configs(config):
        for name, value in list(vars(part).items()):
            if isinstance(value, list | tuple) and len(value) in lists and vars(part).get(name) is value:
                setattr(part, name, type(value)(value[n] for n in lists[len(value)]))


def _changed_sizes(
    graph: Graph, pairs: Sequence[tuple[Group, Tensor]], changes: Changes
) -> set[tuple[int, int]]:
    """(old, new) of whatever a config field may count: units and their multiples, axes, blocks, attributes."""
    sizes: set[tuple[int, int]] = set()
    for group, kept in pairs:
        new = len(kept)
        if not group.whole:
            sizes |= {(m * group.size, m * new) for m in range(1, 17)}
        for s in group.slices:
            old = graph.shapes[s.name][s.dim]
            sizes.add((old, old - (group.size - new) * s.index.shape[1]))
    sizes |= {(_block_count(graph, path), len(stay)) for path, stay in changes.layers.items()}
    before: dict[tuple[str, str], Any] = {}
    for attribute, value in graph._attributes.items():
        before.setdefault((attribute.module, attribute.name), value)
    for path, values in changes.attributes.items():
        for name, value in values.items():
            if before.get((path, name)) is not None and isinstance(value, int):
                sizes.add((before[path, name], value))
    return {(old, new) for old, new in sizes if old != new}


def _options(
    model: nn.Module,
    config: Any,
    graph: Graph,
    sizes: set[tuple[int, int]],
    watched: Sequence[tuple[str, str]],
) -> list[tuple[str, int]]:
    """(field, value) that are worth a try."""
    modules = dict(model.named_modules())
    options = [
        (prefix + name, new)
        for prefix, part in _configs(config)
        for name, value in vars(part).items()
        for old, new in sorted(sizes)
        if type(value) is int and old == value
    ]
    # A field whose namesake in every module has its old value still is none that was cut.
    unchanged: dict[str, set[bool]] = {}
    for a, old_value in graph._attributes.items():
        if "." not in a.name and a.place is None and a.module in modules:
            same = getattr(modules[a.module], a.name, None) == old_value
            unchanged.setdefault(a.name, set()).add(same)
    settled = {name for name, same in unchanged.items() if same == {True}}
    options = [(name, new) for name, new in options if name.rpartition(".")[2] not in settled]
    # A field that is None (head_dim) is computed from others; the cut may need it written out.
    own = {a.name for a in graph._attributes if "." not in a.name}
    for path, name in sorted(set(watched)):
        if name in own and getattr(config, name, None) is None and path in modules:
            value = getattr(modules[path], name, None)
            if type(value) is int and (name, value) not in options:
                options.append((name, value))
    return options


def _same_numbers(model: nn.Module, config: Any, changes: Changes) -> bool:
    """Whether the config gives the cut model's other numbers too: scales, and buffers that no file holds."""
    modules = dict(model.named_modules())
    for name in changes.shapes:
        path, _, leaf = name.rpartition(".")
        if leaf in modules[path]._non_persistent_buffers_set:
            return False
    with torch.device("meta"):
        others = dict(type(model)(copy.deepcopy(config)).named_modules())
    return all(
        others[path].__dict__.get(key, value) == value
        for path, module in modules.items()
        for key, value in module.__dict__.items()
        if type(value) is float and path in others
    )
