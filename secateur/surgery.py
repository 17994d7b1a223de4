"""Remove units from a model: as zeros (`mask_units`) or for real (`cut_units`), and prove that both agree.

>>> graph = trace(model, inputs)
>>> keep = {g.name: torch.arange(g.size // 2) for g in graph.prunable("neurons")}
>>> prove(model, graph, keep, inputs)      # group name -> reason, empty when all cuts are sound
{}
>>> changes = cut_units(model, graph, keep)
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

from secateur.errors import SecateurError
from secateur.graph.groups import Graph, Group
from secateur.graph.trace import Functions, call_arguments, flat_tensors, forget_caches

__all__ = ["Changes", "apply_changes", "cut_units", "mask_units", "prove", "unmask_units"]

Keep = Mapping[str, Tensor]


@dataclass
class Changes:
    """What a cut changed, enough to repeat it on a freshly built dense model (see `apply_changes`).

    `shapes`: new shape of every parameter and buffer that was cut; `attributes`: module path -> attribute -> value;
    `config`: field of the model's config (dots for nested ones) -> value; `layers`: path of a list of blocks -> the
    positions that stay. Paths are those after blocks were taken out. `uniform`: the config alone rebuilds the model.
    """

    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    attributes: dict[str, dict[str, Any]] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    layers: dict[str, list[int]] = field(default_factory=dict)
    uniform: bool = False


def mask_units(model: nn.Module, graph: Graph, keep: Keep) -> None:
    """Zero everything the removed units own, in place; removed blocks pass their input through.

    Units that compete for being picked (experts, by a router's softmax and top-k) take no part any more: their
    logits are minus infinity.

    >>> mask_units(model, graph, {"fc1:neurons": torch.tensor([0, 2])})

    Raises SecateurError for unknown or frozen groups and for unit numbers out of range.
    """
    for group, kept in graph._kept(keep):
        if group.kind == "layers":
            for path in _removed_blocks(group, kept):
                model.get_submodule(path).register_forward_hook(_pass_through, with_kwargs=True)
            continue
        gone = _gone(group, kept)
        with torch.no_grad():
            for s in group.slices:
                if s.name in graph.normalised:
                    continue
                tensor = _tensor(model, s.name)
                tensor.index_fill_(s.dim, s.index[gone].reshape(-1).to(tensor.device), 0)
    _exclude(model, graph, keep)


def unmask_units(model: nn.Module) -> None:
    """Take away what `mask_units` added to a model beside zeros: blocks run again, routers may pick any expert.

    >>> unmask_units(model)  # before the tensors are put back, or the units really leave
    """
    for module in model.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key, hook in list(hooks.items()):
                if isinstance(hook, _Enter | _Leave) or hook is _pass_through:
                    module._forward_hooks_with_kwargs.pop(key, None)
                    module._forward_hooks_always_called.pop(key, None)
                    del hooks[key]


def cut_units(model: nn.Module, graph: Graph, keep: Keep) -> Changes:
    """Make the removed units really absent, in place: smaller tensors, attributes and config put right.

    >>> changes = cut_units(model, graph, {"model.layers.0.mlp:neurons": torch.arange(12)})
    >>> changes.attributes["model.layers.0.mlp.gate_proj"]
    {'out_features': 12}

    Tied parameters stay tied, dtype, device and requires_grad stay. Raises SecateurError for unknown or frozen groups
    and for unit numbers out of range; the model is then untouched.
    """
    changes = _cut(model, graph, keep)
    _fit_config(model, graph, graph._kept(keep), changes)
    return changes


def _cut(model: nn.Module, graph: Graph, keep: Keep) -> Changes:
    """Everything but the config of a transformers model."""
    pairs = graph._kept(keep)
    attributes, _ = graph.assign(keep)
    changes = Changes()
    forget_caches(model)
    unmask_units(model)
    before = {path: _own_sizes(m) for path, m in model.named_modules()}
    _rescale(model, graph, keep)
    touched = _cut_tensors(model, graph, pairs, changes)
    modules = dict(model.named_modules())
    for a, number in attributes.items():
        owner: Any = modules[a.module]
        value: Any = number
        *steps, name = a.name.split(".")
        for step in steps:
            owner = getattr(owner, step)
        if a.place is not None:
            old = getattr(owner, name)
            value = type(old)(value if n == a.place else v for n, v in enumerate(old))
        if steps:
            setattr(owner, name, value)
            changes.config[".".join([*steps[1:], name])] = value
        else:
            _set(changes, a.module, owner, name, value)
    for path in touched:
        for name, value in _standard_sizes(modules[path], before[path]).items():
            _set(changes, path, modules[path], name, value)
    _set_head_counts(graph, pairs, modules, changes)
    _set_expert_counts(graph, pairs, modules, changes)
    for group, kept in pairs:
        if group.modules:
            _drop_blocks(model, group, kept, changes)
    return changes


def apply_changes(model: nn.Module, changes: Changes) -> None:
    """Give a freshly built dense model the structure of a cut one; its cut tensors are then left uninitialised.

    >>> fresh = type(model)(dense_config)
    >>> apply_changes(fresh, changes)
    >>> fresh.load_state_dict(cut_model.state_dict())
    """
    for path, kept in changes.layers.items():
        container = model.get_submodule(path) if path else model
        _renumber(container, [name for n, name in enumerate(container._modules) if n in set(kept)])
    done: dict[int, Tensor] = {}
    for name, shape in changes.shapes.items():
        old = _tensor(model, name)
        if id(old) not in done:
            new = old.new_zeros(shape)
            done[id(old)] = nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new
        _put(model, name, done[id(old)])
    for path, values in changes.attributes.items():
        module = model.get_submodule(path)
        for name, value in values.items():
            setattr(module, name, value)
    for field_name, value in changes.config.items():
        _set_config(model.config, field_name, value)
    for module in model.modules():
        _refresh(module)


# --- tensors


def _tensor(model: nn.Module, name: str) -> Tensor:
    path, _, leaf = name.rpartition(".")
    return getattr(model.get_submodule(path), leaf)


def _put(model: nn.Module, name: str, value: Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    (module._parameters if leaf in module._parameters else module._buffers)[leaf] = value  # type: ignore[assignment]


def _gone(group: Group, kept: Tensor) -> Tensor:
    gone = torch.ones(group.size, dtype=torch.bool)
    gone[kept] = False
    return gone


def _removed_blocks(group: Group, kept: Tensor) -> list[str]:
    stay = set(kept.tolist())
    return [path for u, path in enumerate(group.modules) if u not in stay]


def _rescale(model: nn.Module, graph: Graph, keep: Keep) -> None:
    """Attention that divides by the root of its width takes queries that make up for it."""
    alive = graph._alive(keep)
    for classes, rows in graph._rescaled:
        share = float(alive[classes].mean())
        for name, dim, place in rows if share < 1 else ():
            tensor = _tensor(model, name)
            index = torch.from_numpy(place).to(tensor.device)
            with torch.no_grad():
                tensor.index_copy_(dim, index, tensor.index_select(dim, index) * share**0.5)


def _cut_tensors(
    model: nn.Module, graph: Graph, pairs: Sequence[tuple[Group, Tensor]], changes: Changes
) -> list[str]:
    leave: dict[tuple[str, int], list[Tensor]] = {}
    for group, kept in pairs:
        gone = _gone(group, kept)
        if group.kind != "layers" and gone.any():
            for s in group.slices:
                leave.setdefault((s.name, s.dim), []).append(s.index[gone].reshape(-1))
    names: dict[int, list[str]] = {}
    named = itertools.chain(
        model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False)
    )
    for name, tensor in named:
        names.setdefault(id(tensor), []).append(name)
    by_name: dict[str, dict[int, Tensor]] = {}
    for (name, dim), parts in leave.items():
        by_name.setdefault(name, {})[dim] = torch.cat(parts)
    extra: dict[str, list[str]] = {}
    for name, first in graph.aliases.items():
        extra.setdefault(first, []).append(name)
    touched: dict[str, None] = {}
    for name, dims in by_name.items():
        old = _tensor(model, name)
        new = old.detach()
        for dim, gone in dims.items():
            stay = torch.ones(new.shape[dim], dtype=torch.bool)
            stay[gone] = False
            new = new.index_select(dim, stay.nonzero().reshape(-1).to(new.device))
        new = new.contiguous()
        if isinstance(old, nn.Parameter):
            new = nn.Parameter(new, requires_grad=old.requires_grad)
        for alias in dict.fromkeys([*names[id(old)], *extra.get(name, ())]):
            _put(model, alias, new)
            changes.shapes[alias] = tuple(new.shape)
            touched[alias.rpartition(".")[0]] = None
    return list(touched)


# --- attributes


def _set(changes: Changes, path: str, module: nn.Module, name: str, value: Any) -> None:
    if getattr(module, name) != value:
        setattr(module, name, value)
        changes.attributes.setdefault(path, {})[name] = value


def _own_sizes(module: nn.Module) -> dict[str, int]:
    return {k: v for k, v in module.__dict__.items() if type(v) is int}


def _standard_sizes(m: nn.Module, before: Mapping[str, int]) -> dict[str, Any]:
    """Sizes that PyTorch's own layers keep beside their tensors."""
    out: dict[str, Any] = {}
    weight: Any = getattr(m, "weight", None)
    w: Any = weight
    if isinstance(m, nn.Linear):
        out = {"in_features": weight.shape[1], "out_features": weight.shape[0]}
    elif isinstance(m, nn.modules.conv._ConvNd):
        if m.transposed:
            out = {"in_channels": w.shape[0], "out_channels": w.shape[1] * m.groups}
        else:
            depthwise = before["groups"] > 1 and before["groups"] == before["in_channels"]
            if depthwise:
                out["groups"] = w.shape[0] * before["in_channels"] // before["out_channels"]
            groups = out.get("groups", m.groups)
            out |= {"in_channels": w.shape[1] * groups, "out_channels": w.shape[0]}
    elif isinstance(m, nn.Embedding):
        out = {"embedding_dim": m.weight.shape[1]}
    elif isinstance(m, (nn.LayerNorm, nn.RMSNorm)) and weight is not None:
        out = {"normalized_shape": tuple(weight.shape)}
    elif isinstance(m, nn.modules.batchnorm._NormBase):
        known = next((v for v in (m.weight, m.running_mean) if v is not None), None)
        out = {} if known is None else {"num_features": len(known)}
    elif isinstance(m, nn.GroupNorm) and weight is not None:
        out = {"num_channels": len(weight)}
        if before["num_groups"] == before["num_channels"]:
            out["num_groups"] = len(weight)
    elif isinstance(m, nn.PReLU):
        out = {"num_parameters": len(m.weight)}
    elif isinstance(m, nn.RNNBase):
        gates = {"LSTM": 4, "GRU": 3}.get(m.mode, 1)
        w = dict(m.named_parameters(recurse=False))
        out = {"input_size": w["weight_ih_l0"].shape[1], "hidden_size": w["weight_hh_l0"].shape[0] // gates}
        if m.proj_size:
            out["proj_size"] = w["weight_hr_l0"].shape[0]
    elif isinstance(m, nn.MultiheadAttention) and m.in_proj_weight is not None:
        heads = m.in_proj_weight.shape[0] // 3 // m.head_dim
        out = {"embed_dim": m.in_proj_weight.shape[1], "num_heads": heads}
        out |= {"kdim": out["embed_dim"], "vdim": out["embed_dim"]}
    _refresh(m)
    return out


def _refresh(m: nn.Module) -> None:
    if isinstance(m, nn.RNNBase):
        m._flat_weights = [getattr(m, name) for name in m._flat_weights_names]
        m.flatten_parameters()


def _set_head_counts(
    graph: Graph, pairs: Sequence[tuple[Group, Tensor]], modules: Mapping[str, nn.Module], changes: Changes
) -> None:
    """Counts of heads that no operation reads but that others rely on: they shrink in proportion."""
    fixed = {(a.module, a.name) for a in graph._attributes}
    for group, kept in pairs:
        if group.kind not in ("heads", "kv_groups"):
            continue
        path = group.name.partition(":")[0]
        module = modules.get(path)
        if module is None:
            continue
        for name, value in _own_sizes(module).items():
            count = "head" in name and "dim" not in name or group._alone and "group" in name
            if count and (path, name) not in fixed and value % group.size == 0:
                _set(changes, path, module, name, value // group.size * len(kept))


def _set_expert_counts(
    graph: Graph, pairs: Sequence[tuple[Group, Tensor]], modules: Mapping[str, nn.Module], changes: Changes
) -> None:
    """Counts of experts that no operation reads, in the modules between the group's path and its tensors."""
    fixed = {(a.module, a.name) for a in graph._attributes}
    for group, kept in pairs:
        if group.kind != "experts":
            continue
        sizes = {graph.shapes[s.name][s.dim] for s in group.slices}
        path = group.name.partition(":")[0]
        path = path.rpartition(".")[0] if group.modules else path
        owners = {s.name.rpartition(".")[0] for s in group.slices}
        for name, module in modules.items():
            inside = not path or name == path or name.startswith(path + ".")
            if not inside or not any(o == name or o.startswith(name + ".") or not name for o in owners):
                continue
            for key, value in _own_sizes(module).items():
                if (
                    "expert" in key
                    and "per_" not in key
                    and "shared" not in key
                    and value in sizes
                    and (name, key) not in fixed
                ):
                    _set(changes, name, module, key, value // group.size * len(kept))


# --- units that are picked


class _Without(TorchFunctionMode):
    """While a module runs, removed units get minus infinity where its units compete."""

    def __init__(self, masks: Sequence[tuple[str, Tensor]]):
        super().__init__()
        self.masks = masks

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        for known, gone in self.masks:
            if name != known or not args or not _fits(gone, args[0]):
                continue
            args = (args[0].masked_fill(gone.to(args[0].device), -torch.inf), *args[1:])
            break
        return func(*args, **(kwargs or {}))


def _fits(gone: Tensor, value: Any) -> bool:
    return (
        isinstance(value, Tensor)
        and value.is_floating_point()
        and value.dim() == gone.dim()
        and all(n in (1, m) for n, m in zip(gone.shape, value.shape, strict=True))
    )


class _Enter:
    def __init__(self, masks: Sequence[tuple[str, Tensor]]):
        self.masks = masks
        self.modes: list[_Without | None] = []

    def __call__(self, module: nn.Module, args: Any) -> None:
        tracing = any(isinstance(mode, Functions) for mode in _get_current_function_mode_stack())
        self.modes.append(None if tracing else _Without(self.masks))
        if self.modes[-1] is not None:
            self.modes[-1].__enter__()


class _Leave:
    def __init__(self, enter: _Enter):
        self.enter = enter

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        mode = self.enter.modes.pop() if self.enter.modes else None
        if mode is not None:
            mode.__exit__(None, None, None)


def _exclude(model: nn.Module, graph: Graph, keep: Keep) -> None:
    gone = ~graph._alive(keep)
    masks: dict[str, list[tuple[str, Tensor]]] = {}
    for path, name, classes in graph._choices:
        if gone[classes].any():
            masks.setdefault(path, []).append((name, torch.from_numpy(np.ascontiguousarray(gone[classes]))))
    for path, found in masks.items():
        module = model.get_submodule(path)
        enter = _Enter(found)
        module.register_forward_pre_hook(enter)
        module.register_forward_hook(_Leave(enter), always_call=True)


# --- blocks


def _pass_through(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
    first = next(flat_tensors(output))
    value = next(v for v in flat_tensors((args, kwargs)) if v.shape == first.shape)
    if isinstance(output, tuple):
        return (value, *output[1:])
    return value


def _renumber(container: nn.Module, names: Sequence[str]) -> dict[str, str]:
    """Keep only these children; numbered ones are numbered afresh. Old name -> new name."""
    digits = all(name.isdigit() for name in container._modules)
    kept = {name: container._modules[name] for name in names}
    moved = {name: str(n) if digits else name for n, name in enumerate(names)}
    container._modules.clear()
    for name, child in kept.items():
        container._modules[moved[name]] = child
    return moved


def _drop_blocks(model: nn.Module, group: Group, kept: Tensor, changes: Changes) -> None:
    gone = set(_removed_blocks(group, kept))
    if not gone:
        return
    path = group.modules[0].rpartition(".")[0]
    container = model.get_submodule(path)
    names = list(container._modules)
    prefix = f"{path}." if path else ""
    counters = _counters(container)
    stay = [n for n, name in enumerate(names) if f"{prefix}{name}" not in gone]
    moved = _renumber(container, [names[n] for n in stay])
    changes.layers[path] = stay

    def renamed(name: str) -> str | None:
        if not name.startswith(prefix) or name == path:
            return name
        child, dot, rest = name[len(prefix) :].partition(".")
        return f"{prefix}{moved[child]}{dot}{rest}" if child in moved else (None if child in names else name)

    changes.shapes = {new: s for name, s in changes.shapes.items() if (new := renamed(name))}
    changes.attributes = {new: a for name, a in changes.attributes.items() if (new := renamed(name))}
    for n, child in enumerate(container.children()):
        for inside, name in counters:
            try:
                module = child.get_submodule(inside)
            except AttributeError:
                continue
            if type(getattr(module, name, None)) is int:
                full = ".".join(part for part in (path, list(container._modules)[n], inside) if part)
                _set(changes, full, module, name, n)


def _counters(container: nn.Module) -> list[tuple[str, str]]:
    """(path inside a block, attribute) that holds the block's own position in every block that has it."""
    seen: dict[tuple[str, str], list[bool]] = {}
    for n, child in enumerate(container.children()):
        for inside, module in child.named_modules():
            for name, value in _own_sizes(module).items():
                seen.setdefault((inside, name), []).append(value == n)
    return [key for key, hits in seen.items() if len(hits) > 1 and all(hits)]


# --- config


def _configs(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    yield prefix, config
    for name, value in list(vars(config).items()):
        if hasattr(value, "to_dict") and hasattr(value, "__dict__"):
            yield from _configs(value, f"{prefix}{name}.")


def _set_config(config: Any, name: str, value: Any) -> None:
    *path, leaf = name.split(".")
    for part in path:
        config = getattr(config, part)
    setattr(config, leaf, value)


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


# --- proof


def prove(
    model: nn.Module, graph: Graph, keep: Keep, inputs: Any, *, backward: bool = True, export: bool = False
) -> dict[str, str]:
    """Cut a copy and check it; the groups whose cut is not provably right, with the reason (empty: all sound).

    >>> prove(model, graph, {"fc1:neurons": torch.arange(4)}, x)
    {}

    Checked: the forward runs and has the same output shapes, with another batch size too (two examples instead of one,
    or one instead of several) where the model takes it; all values are finite, gradients flow, the number of parameters
    is the predicted one and, for groups where no norm or softmax mixes units, the cut model gives what the masked one
    gives (1e-5 relative, in double precision where the model is small). With `export`, which takes seconds, a model that
    `torch.export` takes must be taken by it afterwards. The model is not changed.
    """
    left = {g.name: kept for g, kept in graph._kept(keep)}
    bad: dict[str, str] = {}
    expected = _expected(model, inputs, export)
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
    """What the dense model does: its outputs, inputs of another batch size with their output shapes, if exported."""

    outputs: list[Tensor]
    other: tuple[Any, list[tuple[int, ...]]] | None
    exports: bool


def _expected(model: nn.Module, inputs: Any, export: bool) -> _Expected:
    outputs, other = _forward(model, inputs), None
    batches = {t.shape[0] if t.dim() else 0 for t in flat_tensors(call_arguments(inputs))}
    if len(batches) == 1 and batches != {0}:
        fed = _rebatched(inputs)
        try:
            other = fed, [tuple(o.shape) for o in _forward(model, fed)]
        except Exception:  # noqa: BLE001  a model made for one batch size
            other = None
    return _Expected(outputs, other, export and _exports(model, inputs) is None)


def _rebatched(value: Any) -> Any:
    """One example twice; of several the first."""
    if isinstance(value, Tensor):
        return value[:1] if len(value) > 1 else torch.cat([value, value])
    if isinstance(value, Mapping):
        return {k: _rebatched(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_rebatched(v) for v in value)
    return value


def _exports(model: nn.Module, inputs: Any) -> str | None:
    """Why `torch.export` doesn't take the model; None if it does."""
    args, kwargs = call_arguments(inputs)
    was = [m for m in model.modules() if m.training]
    model.eval()
    try:
        with torch.no_grad():
            torch.export.export(model, args, kwargs, strict=False)
    except Exception as error:  # noqa: BLE001  any way an export can fail
        return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    finally:
        for m in was:
            m.training = True
    return None


def _forward(model: nn.Module, inputs: Any, grad: bool = False) -> list[Tensor]:
    args, kwargs = call_arguments(inputs)
    was = [m for m in model.modules() if m.training]
    model.eval()
    config: Any = getattr(model, "config", None)
    cached = getattr(config, "use_cache", None)
    if cached:
        config.use_cache = False
    try:
        with torch.set_grad_enabled(grad):
            return list(flat_tensors(model(*args, **kwargs)))
    finally:
        if cached:
            config.use_cache = cached
        for m in was:
            m.training = True


def _double(model: nn.Module, inputs: Any) -> tuple[nn.Module, Any]:
    """A copy, in double precision when that is cheap."""
    clone = copy.deepcopy(model)
    types = {p.dtype for p in clone.parameters()}
    if types == {torch.float32} and sum(p.numel() for p in clone.parameters()) < 5e7:
        return clone.double(), _cast(inputs)
    return clone, inputs


def _cast(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, Mapping):
        return {k: _cast(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_cast(v) for v in value)
    return value


def _check(
    model: nn.Module, graph: Graph, keep: Keep, inputs: Any, expected: _Expected, backward: bool
) -> str | None:
    predicted = graph.params(keep)
    try:
        cut = copy.deepcopy(model)
        _cut(cut, graph, keep)
        got = sum(p.numel() for p in cut.parameters())
        if got != predicted:
            return f"{got} parameters where {predicted} were predicted"
        outputs = _forward(cut, inputs, grad=backward)
        shapes, wanted = [tuple(o.shape) for o in outputs], [tuple(o.shape) for o in expected.outputs]
        if shapes != wanted:
            return f"output shapes {shapes} where the model had {wanted}"
        for o, e in zip(outputs, expected.outputs, strict=True):
            if not torch.isfinite(o).all() and torch.isfinite(e).all():
                return "the output is not finite"
        if backward:
            loss = sum(o.float().sum() for o in outputs if o.requires_grad)
            if isinstance(loss, Tensor):
                loss.backward()
        if expected.other is not None:
            fed, wanted = expected.other
            if [tuple(o.shape) for o in _forward(cut, fed)] != wanted:
                return "another batch size gives other output shapes"
        if expected.exports and (why := _exports(cut, inputs)) is not None:
            return f"torch.export no longer takes it: {why}"
        exact = {name: kept for name, kept in keep.items() if graph[name].exact}
        why = _differs(model, graph, exact, inputs) if exact else None
        return why or _order_matters(model, graph, [n for n in keep if n not in exact], inputs)
    except SecateurError:
        raise
    except Exception as error:  # noqa: BLE001  any way a model can fail
        return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


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
        for change in (_cut, mask_units):
            clone, fed = _double(model, inputs) if double else (copy.deepcopy(model), inputs)
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
    gap = _gap(a, b)
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
            out = [_forward(model, inputs)] if permuted else out
            clone = copy.deepcopy(model)
            out.append(_forward(_shuffled(clone, graph, names, generator) if permuted else clone, inputs))
    gap = _gap(out[1], out[0])
    return None if gap is None else f"the order of its units matters: outputs differ by {gap:.2g}"


def _shuffled(model: nn.Module, graph: Graph, names: Sequence[str], generator: torch.Generator) -> nn.Module:
    """The model with the units of these groups permuted, in place."""
    for name in names:
        group = graph[name]
        order = torch.randperm(group.size, generator=generator)
        with torch.no_grad():
            for s in group.slices:
                tensor = _tensor(model, s.name)
                to, source = (i.reshape(-1).to(tensor.device) for i in (s.index, s.index[order]))
                tensor.index_copy_(s.dim, to, tensor.index_select(s.dim, source))
        if group.modules:
            owners = [path.rpartition(".") for path in group.modules]
            moved = [model.get_submodule(group.modules[n]) for n in order.tolist()]
            for (parent, _, leaf), module in zip(owners, moved, strict=True):
                model.get_submodule(parent)._modules[leaf] = module
    return model


def _gap(got: Sequence[Tensor], expected: Sequence[Tensor]) -> float | None:
    """The largest difference, if it is more than rounding."""
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
