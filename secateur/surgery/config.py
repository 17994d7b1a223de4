"""The fields of a config that build the cut model."""

from __future__ import annotations

import copy
import itertools
import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from secateur.graph.groups import Graph, Group
from secateur.surgery.changes import Changes, _removed_blocks, _set_config

# --- config


def _configs(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
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


def _fit_config(
    model: nn.Module, graph: Graph, pairs: Sequence[tuple[Group, Tensor]], changes: Changes
) -> None:
    """Find the config that builds the cut model: fields with an old size get the new one, and building proves it."""
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "to_dict") or not pairs:
        return
    alike = _alike(graph, pairs)
    if not alike and not changes.layers:
        return
    target = {n: tuple(p.shape) for n, p in model.named_parameters(remove_duplicate=False)}
    modules = dict(model.named_modules())
    watched = [(a.module, a.name) for a in graph._attributes if "." not in a.name and a.place is None]
    watched += [(path, name) for path, values in changes.attributes.items() for name in values]

    def distance(candidate: Any, names_only: bool = False) -> int:
        try:
            with torch.device("meta"):
                built = type(model)(copy.deepcopy(candidate))
        except Exception:  # noqa: BLE001  any way a config can be wrong
            return 10**9
        shapes = {n: tuple(p.shape) for n, p in built.named_parameters(remove_duplicate=False)}
        if names_only:
            return len(shapes.keys() ^ target.keys())
        wrong = sum(shapes[n] != target[n] for n in shapes.keys() & target.keys())
        wrong += 4 * len(shapes.keys() ^ target.keys())
        others = dict(built.named_modules())
        for path, name in watched:
            if path in modules and path in others and name in vars(modules[path]):
                wrong += getattr(others[path], name, None) != getattr(modules[path], name)
        return wrong

    sizes: set[tuple[int, int]] = set()
    lists: dict[int, list[int]] = {}
    for group, kept in pairs:
        new = len(kept)
        sizes |= {(m * group.size, m * new) for m in range(1, 17)} if group.kind != "layers" else set()
        for s in group.slices:
            old = graph.shapes[s.name][s.dim]
            sizes.add((old, old - (group.size - new) * s.index.shape[1]))
    for path, stay in changes.layers.items():
        count = sum(1 for n in {k.split(".")[len(path.split(".")) if path else 0] for k in graph.shapes
                                if not path or k.startswith(path + ".")})  # fmt: skip
        sizes.add((count, len(stay)))
        if any(
            group.kind == "layers" and group.name.rpartition(":")[0] in (path, "model") for group, _ in pairs
        ):
            lists[count] = stay
    for path, values in changes.attributes.items():
        for name in values:
            old_value = graph._attributes.get(next((a for a in graph._attributes if (a.module, a.name) == (path, name)), None))  # type: ignore[arg-type]  # fmt: skip
            if old_value is not None and isinstance(values[name], int):
                sizes.add((old_value, values[name]))
    sizes = {(a, b) for a, b in sizes if a != b}

    trial = copy.deepcopy(config)
    for count, stay in lists.items():
        for prefix, part in _configs(trial):
            for name, value in list(vars(part).items()):
                if isinstance(value, (list, tuple)) and len(value) == count and vars(part).get(name) is value:
                    setattr(part, name, type(value)(value[n] for n in stay))
    options: list[tuple[str, int]] = []
    for prefix, part in _configs(trial):
        for name, value in vars(part).items():
            if type(value) is int:
                options += [(prefix + name, b) for a, b in sorted(sizes) if a == value]
    found_as: dict[str, set[bool]] = {}
    for a, old_value in graph._attributes.items():
        if "." not in a.name and a.place is None and a.module in modules:
            same = getattr(modules[a.module], a.name, None) == old_value
            found_as.setdefault(a.name, set()).add(same)
    settled = {name for name, same in found_as.items() if same == {True}}
    options = [(name, b) for name, b in options if name.rpartition(".")[2] not in settled]
    own = {a.name for a in graph._attributes if "." not in a.name}
    for module_path, name in sorted(set(watched)):
        if name in own and getattr(trial, name, None) is None and module_path in modules:
            value = getattr(modules[module_path], name, None)
            if type(value) is int and (name, value) not in options:
                options.append((name, value))

    def search(names_only: bool) -> tuple[Any, int]:
        best, score = trial, distance(trial, names_only)
        for width in (1, 2):
            improved = True
            while improved and score:
                improved = False
                for combo in itertools.islice(itertools.combinations(options, width), 100):
                    if len({name for name, _ in combo}) < width:
                        continue
                    candidate = copy.deepcopy(best)
                    for name, value in combo:
                        _set_config(candidate, name, value)
                    found = distance(candidate, names_only)
                    if found < score:
                        best, score, improved = candidate, found, True
                        break
        return best, score

    best, score = search(False) if alike else (trial, 1)
    if score == 0 and not _same_numbers(model, type(model), best, changes):
        return
    changes.uniform = score == 0
    if score and changes.layers:
        best, score = search(True)
    if score:
        return
    for prefix, part in _configs(best):
        for name, value in vars(part).items():
            full = prefix + name
            if hasattr(value, "to_dict"):
                continue
            if type(value) in (int, list, tuple) and value != _get_config(config, full):
                _set_config(config, full, value)
                changes.config[full] = value


def _same_numbers(model: nn.Module, cls: Any, config: Any, changes: Changes) -> bool:
    """Whether the config gives the cut model's other numbers too: scales, and buffers that no file holds."""
    modules = dict(model.named_modules())
    for name in changes.shapes:
        path, _, leaf = name.rpartition(".")
        if leaf in modules[path]._non_persistent_buffers_set:
            return False
    with torch.device("meta"):
        others = dict(cls(copy.deepcopy(config)).named_modules())
    return all(
        others[path].__dict__.get(key, value) == value
        for path, module in modules.items()
        for key, value in module.__dict__.items()
        if type(value) is float and path in others
    )
