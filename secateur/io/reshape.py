"""How a written model differs from the dense one, and the same changes made again when it is loaded."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import load_file
from torch import Tensor, nn

from secateur.errors import SecateurError
from secateur.surgery.absent import Absent
from secateur.surgery.constant import Constant, Novices, leave_constants

if TYPE_CHECKING:
    from secateur.pruning.plan import Plan


FORMAT = "secateur-module"
BROKEN = (
    ValueError,
    TypeError,
    RuntimeError,
    LookupError,
    AttributeError,
    ArithmeticError,
    StrictDataclassError,
    StopIteration,
)
SHARD_BYTES = 5_000_000_000
TRANSIENT = {
    "training",
    "gradient_checkpointing",
    "name_or_path",
    "is_gradient_checkpointing",
    "_is_hf_initialized",
}
CONFIG_KEYS = {
    "architectures",
    "auto_map",
    "dtype",
    "model_type",
    "pruned",
    "transformers_version",
    "_name_or_path",
}


def swap(config: Any, values: dict[str, Any]) -> None:
    """Set fields of a config, e.g. {"num_hidden_layers": 4, "text_config.hidden_size": 96}."""
    for path, value in values.items():
        *parents, leaf = path.split(".")
        setattr(functools.reduce(getattr, parents, config), leaf, value)


def reshape(model: nn.Module, cut: dict[str, Any]) -> None:
    """Drop the blocks that were removed; give tensors and attributes the sizes of the pruned model."""
    for path, kept in cut["blocks"].items():
        blocks = model.get_submodule(path)._modules
        numbered = all(name.isdigit() for name in blocks)
        left = [list(blocks.items())[index] for index in kept]
        blocks.clear()
        for index, (name, block) in enumerate(left):
            blocks[str(index) if numbered else name] = block
    for path in cut["identity"]:
        parent, _, leaf = path.rpartition(".")
        setattr(model.get_submodule(parent), leaf, nn.Identity())
    for path, returns in cut.get("absent", {}).items():
        parent, _, leaf = path.rpartition(".")
        setattr(model.get_submodule(parent), leaf, Absent(returns))
    if cut.get("constants") or cut.get("novices"):
        leave_constants(model, cut)
    for name, shape in cut["shapes"].items():
        path, _, leaf = name.rpartition(".")
        module = model.get_submodule(path)
        old = getattr(module, leaf, None)
        if shape is None:
            setattr(module, leaf, None)
        elif old is None or list(old.shape) != shape:
            like = next(module.parameters()) if old is None else old
            new = torch.empty(shape, dtype=like.dtype, device=like.device)
            if leaf in module._buffers:
                module.register_buffer(leaf, new)
            else:
                setattr(module, leaf, nn.Parameter(new, requires_grad=like.requires_grad))
    for path, values in cut["attributes"].items():
        module = model.get_submodule(path)
        for key, value in values.items():
            if getattr(module, key, value) is None:  # what a run leaves behind, such as the length of a table
                continue
            as_tuple = isinstance(value, list) and not isinstance(getattr(module, key, None), list)
            setattr(module, key, tuple(value) if as_tuple else value)


def assemble(folder: Path, about: dict[str, Any], model: nn.Module | None = None) -> nn.Module:
    """The pruned model of a folder: a dense one, re-shaped, with the folder's weights."""
    if model is None:
        import timm

        model = timm.create_model(**about["timm"])
    reshape(model, about["pruned"])
    state = {}
    for file in sorted(folder.glob("model*.safetensors")):
        # Copies: tensors in the file's own memory are aligned as the file is, and how a kernel rounds may depend on it.
        state.update({name: tensor.clone() for name, tensor in load_file(file).items()})
    state.update({name: state[source] for name, source in about["tied"].items()})
    missing, extra = model.load_state_dict(state, strict=False, assign=True)
    if missing or set(extra) - set(about["buffers"]):
        raise RuntimeError(f"this is another model: missing {missing}, unexpected {extra}")
    for name in extra:
        path, _, leaf = name.rpartition(".")
        model.get_submodule(path).register_buffer(leaf, state[name], persistent=False)
    for name, source in about["tied"].items():
        path, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(path), leaf, model.get_parameter(source))
    return model.eval()


# What differs between a model and the one that its config or constructor builds


def compare(
    model: nn.Module,
    dense: nn.Module | None,
    blocks: Mapping[str, Sequence[int]] | None = None,
) -> dict[str, Any]:
    """The table that makes `reshape(dense, table)` a module of the model's shapes and attributes. `dense` is changed.

    Without a dense model the table holds every shape and every number among the attributes.

    Raises `SecateurError` when no table can do it.
    """
    cut: dict[str, Any] = {"blocks": {}, "identity": [], "absent": {}, "constants": [], "novices": []}
    cut |= {"shapes": {}, "attributes": {}}
    modules = dict(model.named_modules(remove_duplicate=False))
    if dense is None:
        cut["blocks"] = {path: list(kept) for path, kept in (blocks or {}).items()}
        cut["identity"] = [path for path, module in modules.items() if type(module) is nn.Identity]
        cut["absent"] = {path: module.returns for path, module in modules.items() if type(module) is Absent}
        cut["constants"] = [path for path, module in modules.items() if type(module) is Constant]
        cut["novices"] = [path for path, module in modules.items() if isinstance(module, Novices)]
        cut["shapes"] = {name: list(tensor.shape) for name, tensor in _tensors(model).items()}
        cut["shapes"] |= {f"{p}.{k}".lstrip("."): None for p, m in modules.items() for k in _absent(m)}
        for path, module in modules.items():
            cut["attributes"][path] = _attributes(module)
    else:
        cut["blocks"] = _removed_blocks(model, dense, blocks or {})
        reshape(dense, cut)
        wanted = dict(dense.named_modules(remove_duplicate=False))
        for path, module in modules.items():
            if type(module) is nn.Identity and path in wanted and type(wanted[path]) is not nn.Identity:
                cut["identity"].append(path)
            if type(module) is Absent and path in wanted and type(wanted[path]) is not Absent:
                cut["absent"][path] = module.returns
            if type(module) is Constant and path in wanted and type(wanted[path]) is not Constant:
                cut["constants"].append(path)
            if isinstance(module, Novices) and path in wanted and not isinstance(wanted[path], Novices):
                cut["novices"].append(path)
        reshape(dense, {**cut, "blocks": {}})
        wanted = dict(dense.named_modules(remove_duplicate=False))
        if strange := sorted(modules.keys() ^ wanted.keys()):
            raise SecateurError(
                f"{strange[0]!r} is in the {'pruned' if strange[0] in modules else 'dense'} model only",
                where=type(model).__name__,
                fix="a model is saved when cutting changed sizes, removed blocks, or replaced modules by nn.Identity",
            )
        here, there = _tensors(model), _tensors(dense)
        cut["shapes"] = {
            name: list(tensor.shape)
            for name, tensor in here.items()
            if name not in there or there[name].shape != tensor.shape
        }
        cut["shapes"] |= {name: None for name in there if name not in here}
        for path, module in modules.items():
            old = _attributes(wanted[path])
            cut["attributes"][path] = {
                key: value
                for key, value in _attributes(module).items()
                if key not in old or old[key] != value
            }
    cut["attributes"] = {path: values for path, values in cut["attributes"].items() if values}
    return cut


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }


def _absent(module: nn.Module) -> Iterator[str]:
    """Parameters that are registered as None, such as the bias of Linear(bias=False)."""
    yield from (key for key, value in module._parameters.items() if value is None)


def _attributes(module: nn.Module) -> dict[str, Any]:
    """Numbers, and tuples and lists of integers, that a module keeps; text too, where it isn't the root's."""
    return {
        key: _plain(value)
        for key, value in vars(module).items()
        if key not in TRANSIENT and not key.startswith("__") and _simple(value)
        if not (key.startswith("_") and isinstance(value, bool | str | float))
    }


def _simple(value: Any) -> bool:
    if isinstance(value, tuple | list):  # a torch.Size is the shape of something that a run has seen
        return bool(value) and not isinstance(value, torch.Size) and all(isinstance(v, int) for v in value)
    return isinstance(value, bool | int | float | str)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple | list) else value


def _removed_blocks(
    model: nn.Module, dense: nn.Module, known: Mapping[str, Sequence[int]]
) -> dict[str, list[int]]:
    removed: dict[str, list[int]] = {}
    for path, left in model.named_modules():
        if type(left) in (Absent, Constant):
            continue
        try:
            whole = dense.get_submodule(path)
        except AttributeError:
            continue
        here, there = len(left._modules), len(whole._modules)
        if here < there and len(known.get(path, ())) == here:
            removed[path] = list(known[path])
        elif here < there and isinstance(left, nn.ModuleList | nn.Sequential):
            removed[path] = _match(left, whole)
    return removed


def _match(left: nn.Module, whole: nn.Module) -> list[int]:
    """Which blocks stayed, by their structure alone: the first ones that fit, in order."""

    def structure(block: nn.Module) -> list[tuple[str, str]]:
        return [(path, type(module).__name__) for path, module in block.named_modules()]

    candidates = [structure(block) for block in whole.children()]
    kept: list[int] = []
    for block in map(structure, left.children()):
        start = kept[-1] + 1 if kept else 0
        found = next((i for i in range(start, len(candidates)) if candidates[i] == block), None)
        kept.append(start if found is None else found)
    if kept[-1] >= len(candidates):
        return list(range(len(kept)))
    return kept


def kept_blocks(plan: Plan | None, model: nn.Module) -> dict[str, list[int]]:
    """Positions of the blocks that a cut kept, by the path of their list in the order they are dropped.

    model: the pruned one. Only lists of experts are blocks; stacked experts are tensors.
    """
    if plan is None:
        return {}
    groups = [name for name in plan.keep if plan.kinds.get(name) == "layers"]
    layers = {name.rpartition(":")[0]: _stay(plan, name) for name in groups}
    if isinstance(model, nn.Sequential | nn.ModuleList) and "model" in layers:
        layers[""] = layers.pop("model")
    lists = {path: module for path, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    blocks = dict(layers)
    for name, units in plan.keep.items():
        path: str | None = name.rpartition(":")[0] if plan.kinds.get(name) == "experts" else None
        # blocks have left before: the experts of dense block 5 are found in the block that took its number
        for outer, kept in layers.items():
            if path is not None and path.startswith(f"{outer}."):
                number, _, rest = path[len(outer) + 1 :].partition(".")
                inside = number.isdigit() and int(number) in kept
                path = f"{outer}.{kept.index(int(number))}.{rest}" if inside else None
        if path is not None and path in lists and len(lists[path]) == len(units):
            blocks[path] = units.tolist()
    return blocks


def _stay(plan: Plan, name: str) -> list[int]:
    """Positions in their list of the blocks that stay when this group is cut, those of no group included."""
    beside = set(plan.beside.get(name, ()))
    places = [place for place in range(plan.sizes[name] + len(beside)) if place not in beside]
    return sorted(beside | {places[unit] for unit in plan.keep[name].tolist()})


def _build(build: Any) -> nn.Module:
    """A module without weights; with them where its constructor can't do without."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with torch.device("meta"):
                return build()
        except (RuntimeError, NotImplementedError):
            with torch.random.fork_rng(devices=[]):
                return build()
