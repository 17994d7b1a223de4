"""Remove units from a model: as zeros (`mask_units`) or for real (`cut_units`), and prove that both agree.

>>> graph = trace(model, inputs)
>>> keep = {g.name: torch.arange(g.size // 2) for g in graph.prunable("neurons")}
>>> prove(model, graph, keep, inputs)      # group name -> reason, empty when all cuts are sound
{}
>>> changes = cut_units(model, graph, keep)
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from secateur.graph.groups import Graph, Group
from secateur.surgery.absent import Absent
from secateur.surgery.changes import Changes, Keep, _gone, _put, _refresh, _removed_blocks, _renumber, _tensor
from secateur.surgery.config import fit_config
from secateur.surgery.constant import Constant, Novices
from secateur.surgery.mask import unmask_units
from secateur.surgery.vocabulary import check_named, renumber
from secateur.utils.running import forget_caches


def cut_units(model: nn.Module, graph: Graph, keep: Keep) -> Changes:
    """Make the removed units really absent, in place: smaller tensors, attributes and config put right.

    >>> changes = cut_units(model, graph, {"model.layers.0.mlp:neurons": torch.arange(12)})
    >>> changes.attributes["model.layers.0.mlp.gate_proj"]
    {'out_features': 12}

    Tied parameters stay tied, dtype, device and requires_grad stay. Raises SecateurError for unknown or frozen groups
    and for unit numbers out of range; the model is then untouched.
    """
    changes = cut_modules(model, graph, keep)
    fit_config(model, graph, graph._kept(keep), changes)
    return changes


def cut_modules(model: nn.Module, graph: Graph, keep: Keep) -> Changes:
    """`cut_units` without the config of a transformers model, which `fit_config` then makes of what all cuts changed.

    >>> changes = cut_modules(model, graph, {"model.layers.0.mlp:neurons": torch.arange(12)})  # doctest: +SKIP
    """
    pairs = graph._kept(keep)
    tokens = [(group, kept) for group, kept in pairs if group.kind == "vocabulary"]
    for group, kept in tokens:
        check_named(model, group.size, kept)
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
    _set_transformers(modules, before, changes)
    _set_head_counts(graph, pairs, modules, changes)
    _set_expert_counts(graph, pairs, modules, changes)
    for group, kept in tokens:
        _set_vocabulary(model, modules, group.size, kept, changes)
    for group, kept in pairs:
        if group.kind == "attentions":
            _leave_absent(model, group, kept, changes)
        if group.kind == "novices":
            _leave_constants(model, group, kept, changes)
    for group, kept in pairs:
        if group.modules and group.kind not in ("attentions", "novices"):
            _drop_blocks(model, group, kept, changes)
    return changes


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
        if not group.whole and gone.any():
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
        storage = old.untyped_storage().data_ptr()
        new = _without(old, dims)
        if isinstance(old, nn.Parameter):
            new = nn.Parameter(new, requires_grad=old.requires_grad)
        for alias in dict.fromkeys([*names[id(old)], *extra.get(name, ())]):
            other = _tensor(model, alias)
            if (
                alias not in names[id(old)] and other.untyped_storage().data_ptr() != storage
            ):  # no longer tied
                _put(model, alias, nn.Parameter(_without(other, dims), requires_grad=other.requires_grad))
            else:
                _put(model, alias, new)
            changes.shapes[alias] = tuple(new.shape)
            touched[alias.rpartition(".")[0]] = None
    return list(touched)


def _without(tensor: Tensor, dims: Mapping[int, Tensor]) -> Tensor:
    """A tensor without these places along its axes."""
    new = tensor.detach()
    for dim, gone in dims.items():
        stay = torch.ones(new.shape[dim], dtype=torch.bool)
        stay[gone] = False
        new = new.index_select(dim, stay.nonzero().reshape(-1).to(new.device))
    return new.contiguous()


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
        out = {"num_embeddings": m.weight.shape[0], "embedding_dim": m.weight.shape[1]}
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
    elif isinstance(m, nn.MultiheadAttention):
        width = m.out_proj.weight.shape[1]
        out = {"embed_dim": width, "head_dim": width // m.num_heads, "kdim": width, "vdim": width}
        if m.in_proj_weight is None:
            out |= {"kdim": m.k_proj_weight.shape[1], "vdim": m.v_proj_weight.shape[1]}
    _refresh(m)
    return out


def _set_transformers(
    modules: Mapping[str, nn.Module], before: Mapping[str, Mapping[str, int]], changes: Changes
) -> None:
    """`nn.Transformer` compares its inputs with a width of its own, that of its attention."""
    for path, module in modules.items():
        if not isinstance(module, nn.Transformer):
            continue
        for inside, attention in module.named_modules(prefix=path):
            if not isinstance(attention, nn.MultiheadAttention):
                continue
            old = before[inside]
            for name, source in (("d_model", "embed_dim"), ("nhead", "num_heads")):
                if before[path][name] == old[source]:
                    _set(changes, path, module, name, getattr(attention, source))
            break


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


def _set_vocabulary(
    model: nn.Module, modules: Mapping[str, nn.Module], size: int, kept: Tensor, changes: Changes
) -> None:
    """Sizes of the vocabulary that modules keep, and the tokens that modules and configs name."""
    places = {old: place for place, old in enumerate(kept.tolist())}
    for path, module in modules.items():
        for name, value in _own_sizes(module).items():
            if "vocab" in name and value == size:
                _set(changes, path, module, name, len(kept))
            elif name in ("padding_idx", "pad_token_id") and value in places:
                _set(changes, path, module, name, places[value])
    changes.config |= renumber(model, size, kept)


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
    _count_anew(container, path, counters, changes)


def _leave_absent(model: nn.Module, group: Group, kept: Tensor, changes: Changes) -> None:
    """Attentions that leave are followed by what says nothing; those that stay are numbered afresh, as caches count them."""
    gone = _removed_blocks(group, kept)
    if not gone:
        return
    path = group.name.rpartition(":")[0]
    container = model.get_submodule(path)
    counters = _counters(container)
    for name in gone:
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, Absent(group.returns))
        for known in (changes.shapes, changes.attributes):
            for lost in [key for key in known if key == name or key.startswith(f"{name}.")]:
                del known[lost]
    _count_anew(container, path, counters, changes)


def _leave_constants(model: nn.Module, group: Group, kept: Tensor, changes: Changes) -> None:
    """Experts that leave give a vector, where the model holds one for them: `constant`, or a row of `constants`."""
    gone = _gone(group, kept)
    if not gone.any():
        return
    if group.modules:
        for path in _removed_blocks(group, kept):
            parent, _, leaf = path.rpartition(".")
            constant = getattr(model.get_submodule(path), "constant", None)
            setattr(
                model.get_submodule(parent), leaf, Constant(None if constant is None else constant.detach())
            )
            for known in (changes.shapes, changes.attributes):
                for lost in [key for key in known if key == path or key.startswith(f"{path}.")]:
                    del known[lost]
            if constant is not None:
                changes.shapes[f"{path}.constant"] = tuple(constant.shape)
        return
    path = group.slices[0].name.rpartition(".")[0]
    holder = model.get_submodule(path)
    for s in group.slices:
        old = _tensor(model, s.name)
        new = nn.Parameter(_without(old, {0: gone.nonzero().flatten()}), requires_grad=old.requires_grad)
        _put(model, s.name, new)
        changes.shapes[s.name] = tuple(new.shape)
    if getattr(holder, "constants", None) is not None:
        rows = _without(_tensor(model, f"{path}.constants"), {0: kept})
        _put(model, f"{path}.constants", nn.Parameter(rows))
        changes.shapes[f"{path}.constants"] = tuple(rows.shape)
    for name, value in _own_sizes(holder).items():
        if "expert" in name and value == group.size:
            _set(changes, path, holder, name, len(kept))
    holder.__dict__["novices"] = changes.attributes.setdefault(path, {})["novices"] = (
        gone.nonzero().flatten().tolist()
    )
    holder.__class__ = type(type(holder).__name__, (Novices, type(holder)), {})


def _count_anew(
    container: nn.Module, path: str, counters: Sequence[tuple[str, str]], changes: Changes
) -> None:
    for inside, name in counters:
        number = 0
        for block, child in container.named_children():
            try:
                module = child.get_submodule(inside)
            except AttributeError:
                continue
            if type(getattr(module, name, None)) is int:
                _set(changes, ".".join(part for part in (path, block, inside) if part), module, name, number)
                number += 1


def _counters(container: nn.Module) -> list[tuple[str, str]]:
    """(path inside a block, attribute) that counts the blocks that have it, from 0."""
    seen: dict[tuple[str, str], list[int]] = {}
    for child in container.children():
        for inside, module in child.named_modules():
            for name, value in _own_sizes(module).items():
                seen.setdefault((inside, name), []).append(value)
    return [key for key, values in seen.items() if len(values) > 1 and values == [*range(len(values))]]
