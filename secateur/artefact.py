"""Saves pruned models so that they load without secateur: safetensors, JSON and, where needed, one short Python file.

Three forms, the simplest that can hold the model:

- plain: a transformers model whose shapes its config can express, or a timm model that timm's arguments can; any
  `from_pretrained`, or `timm.create_model("local-dir:...")`, loads it.
- custom: a transformers model whose layers differ; `modeling_pruned.py` builds the dense model from the config and
  re-shapes it, so `from_pretrained(folder, trust_remote_code=True)` loads it.
- module: any other module; `load_pruned.py` re-shapes a freshly built dense model and loads the weights.
"""

from __future__ import annotations

import copy
import functools
import importlib.abc
import importlib.util
import inspect
import json
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from secateur.compat import is_cache
from secateur.errors import SecateurError
from secateur.files import atomic_directory, atomic_write_json, atomic_write_text
from secateur.inputs import call, default_inputs, from_description, map_tensors
from secateur.plain_timm import LOAD, is_plain, load_plain, save_plain

if TYPE_CHECKING:
    from secateur.plan import Plan

FORMAT = "secateur-module"
BROKEN = (
    ValueError,
    TypeError,
    RuntimeError,
    LookupError,
    AttributeError,
    ArithmeticError,
    StrictDataclassError,
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

MODELING = '''"""A pruned {name}. It needs torch and transformers:

    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)    # or the Auto class in config.json

config.json describes the dense model; its "pruned" entry says what was cut.
"""

import functools
from typing import Any

import torch
from torch import nn
from {config_module} import {config}
from {module} import {name}


class PrunedConfig({config}):
    model_type = "{model_type}"


{swap}

{reshape}

class Pruned{name}({name}):
    config_class = PrunedConfig

    def __init__(self, config, *args, **kwargs):
        swap(config, config.pruned["dense"])
        super().__init__(config, *args, **kwargs)
        swap(config, config.pruned["config"])
        reshape(self, config.pruned)
        self.tie_weights()
'''

LOADER = '''"""Loads the pruned model beside this file. It needs torch and safetensors{timm}:

    from load_pruned import load
    model = load({argument})    # {comment}
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn


{reshape}

{assemble}

def load(model=None):
    folder = Path(__file__).resolve().parent
    return assemble(folder, json.loads((folder / "model.json").read_text()), model)
'''


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
        state.update(load_file(file))
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


def save_model(
    model: nn.Module,
    directory: str | Path,
    *,
    tokenizer: Any = None,
    plan: Plan | None = None,
    report: Mapping[str, Any] | None = None,
    dense_config: Any = None,
    changes: Any = None,
) -> dict[str, Any]:
    """Write a pruned model into a new or empty directory, all or nothing, in the simplest form that can hold it.

    >>> save_model(pruned.model, "out", tokenizer=tokenizer, plan=pruned.plan)  # doctest: +SKIP
    {'form': 'plain', 'load': 'AutoModelForCausalLM.from_pretrained(folder)', 'why': None}

    dense_config: the transformers config before the cut; the model's own where it is None. changes: what
    `cut_units` gave; it tells which blocks were removed where there is no plan.

    Gives what it wrote: `form` (plain, custom, module), `load` (the line that loads it) and `why` (what the config
    can't express; None when plain). The same goes into `report.json` under `artefact`.

    Raises `SecateurError` where the directory isn't empty, the disk is full, or the model holds modules that the
    dense one doesn't have.
    """
    with atomic_directory(directory) as partial:
        if _transformers_class(model) is not None:
            about = _save_transformers(model, partial, plan, dense_config, changes)
        else:
            about = _save_module(model, partial, plan, changes)
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
        if plan is not None:
            plan.save(partial)
        atomic_write_json(partial / "report.json", {**(report or {}), "artefact": about})
    return about


def load(
    path: str | Path,
    model: nn.Module | None = None,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
) -> tuple[nn.Module, Any]:
    """(model, tokenizer) of a directory that `Pruned.save` wrote, or of an `.onnx` or `.pt2` file (no tokenizer).

    >>> model, tokenizer = secateur.load("out")  # doctest: +SKIP
    >>> model, _ = secateur.load("out", model=build_the_dense_model())  # doctest: +SKIP

    model: a freshly built dense model, needed for modules that are neither transformers' nor timm's. No code of the
    directory is run: what it says was cut is done by this library's own copy of it. The model is in eval mode.

    Raises `SecateurError` where there is no model, or it is damaged.
    """
    path = Path(path).expanduser()
    if path.suffix.lower() in (".onnx", ".pt2") and not path.is_dir():
        from secateur.exchange import load_file

        return load_file(path).to(device or "cpu", dtype), None
    if is_plain(path):
        loaded = load_plain(path)
        loaded = loaded.to(dtype) if dtype else loaded
    elif (path / "config.json").is_file():
        loaded = _load_transformers(path, dtype)
    elif (path / "model.json").is_file():
        loaded = _load_module(path, model)
        loaded = loaded.to(dtype) if dtype else loaded
    else:
        raise SecateurError("there is no model", where=str(path), fix="give a directory that secateur wrote")
    return loaded.to(device or "cpu").eval(), _load_tokenizer(path)


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
    cut: dict[str, Any] = {"blocks": {}, "identity": [], "shapes": {}, "attributes": {}}
    modules = dict(model.named_modules(remove_duplicate=False))
    if dense is None:
        cut["blocks"] = {path: list(kept) for path, kept in (blocks or {}).items()}
        cut["identity"] = [path for path, module in modules.items() if type(module) is nn.Identity]
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
    if isinstance(value, tuple | list):
        return bool(value) and all(isinstance(item, int) for item in value)
    return isinstance(value, bool | int | float | str)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple | list) else value


def _removed_blocks(
    model: nn.Module, dense: nn.Module, known: Mapping[str, Sequence[int]]
) -> dict[str, list[int]]:
    removed: dict[str, list[int]] = {}
    for path, left in model.named_modules():
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


def kept_blocks(
    plan: Plan | None, changes: Any = None, model: nn.Module | None = None
) -> dict[str, list[int]]:
    """Positions of the blocks that a cut kept, by the path of their list in the order they are dropped.

    model: the pruned one; lists of experts in it are told from stacked experts, which are tensors.
    """
    blocks: dict[str, list[int]] = {}
    if plan is not None:
        blocks = {
            n.rpartition(":")[0]: u.tolist() for n, u in plan.keep.items() if plan.kinds.get(n) == "layers"
        }
        lists = (
            {} if model is None else {p: m for p, m in model.named_modules() if isinstance(m, nn.ModuleList)}
        )
        layers = dict(blocks)
        for name, units in plan.keep.items():
            path: str | None = name.rpartition(":")[0] if plan.kinds.get(name) == "experts" else None
            for outer, kept in layers.items():
                if path is not None and path.startswith(f"{outer}."):
                    number, _, rest = path[len(outer) + 1 :].partition(".")
                    inside = number.isdigit() and int(number) in kept
                    path = f"{outer}.{kept.index(int(number))}.{rest}" if inside else None
            if path is not None and path in lists and len(lists[path]) == len(units):
                blocks[path] = units.tolist()
    return blocks | {path: list(kept) for path, kept in getattr(changes, "layers", {}).items()}


# transformers


def _transformers_class(model: nn.Module) -> type | None:
    """The class of the library that a model is, or that it was before it was pruned; None for anything else."""
    if getattr(model, "config", None) is None or not hasattr(model, "save_pretrained"):
        return None
    cls = type(model)
    if cls.__module__.startswith("transformers."):
        return cls
    parent = cls.__mro__[1]
    pruned = getattr(model.config, "pruned", None) is not None and cls.__name__ == f"Pruned{parent.__name__}"
    return parent if pruned and parent.__module__.startswith("transformers.") else None


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


def _dense_config(config: Any) -> Any:
    """The config of the dense model; of one that was pruned before, that of its first ancestor."""
    config = copy.deepcopy(config)
    pruned = getattr(config, "pruned", None)
    if pruned is None:
        return config
    swap(config, pruned["dense"])
    fields = {k: v for k, v in config.to_dict().items() if k not in {"pruned", "model_type", "auto_map"}}
    cls: Any = next(c for c in type(config).__mro__ if c.__module__.startswith("transformers."))
    return cls.from_dict(fields)


def _config_fields(config: Any, prefix: str = "") -> dict[str, Any]:
    """All fields with dotted names, down through the sub-configs."""
    fields: dict[str, Any] = {}
    for key, value in config.to_dict().items():
        own = getattr(config, key, None)
        if hasattr(own, "to_dict") and isinstance(value, dict):
            fields |= _config_fields(own, f"{prefix}{key}.")
        elif key not in CONFIG_KEYS and not key.startswith("_"):
            fields[prefix + key] = value
    return fields


def _save_transformers(
    model: Any, folder: Path, plan: Plan | None, dense_config: Any, changes: Any
) -> dict[str, Any]:
    cls = _transformers_class(model)
    assert cls is not None
    why = _inexpressible(model, cls, plan)
    architectures = model.config.architectures
    try:
        if why is None:
            with quiet():
                model.save_pretrained(folder, max_shard_size=SHARD_BYTES)
            auto = _auto_classes(cls, model.config.model_type)[0]
            return {"form": "plain", "load": f"{auto}.from_pretrained(folder)", "why": None}
        return _save_custom(model, cls, folder, plan, dense_config, changes, why)
    finally:
        model.config.architectures = architectures


def _inexpressible(model: Any, cls: Any, plan: Plan | None) -> str | None:
    """Why the model's config doesn't describe it; None when building from the config gives these very modules."""
    if type(model) is not cls:
        return f"it was loaded as {type(model).__name__}"
    try:
        config = type(model.config).from_dict(model.config.to_dict())
        config._attn_implementation = model.config._attn_implementation
        built = _build(lambda: cls(config))
    except BROKEN as error:
        return f"its config can't be built from ({str(error).strip().splitlines()[-1].strip()})"
    try:
        cut = compare(model, built)
    except SecateurError as error:
        return error.what
    if cut["blocks"] or cut["identity"]:
        return (
            f"{next(iter(cut['blocks']), None) or cut['identity'][0]} has fewer blocks than the config says"
        )
    for name, shape in cut["shapes"].items():
        old = _tensors(built).get(name)
        says = "none" if old is None else str(list(old.shape))
        more = f", and {len(cut['shapes']) - 1} more" if len(cut["shapes"]) > 1 else ""
        return f"{name} is {shape}, the config says {says}{more}"
    if cut["attributes"] and not _computes_the_same(model, cls, config, plan):
        path, values = next(iter(cut["attributes"].items()))
        key, value = next(iter(values.items()))
        return f"{path}.{key} is {value}, the config says {getattr(built.get_submodule(path), key, None)}"
    return None


def _computes_the_same(model: Any, cls: Any, config: Any, plan: Plan | None) -> bool:
    """Whether what the config builds gives the model's outputs with the model's weights, whatever its attributes say.

    Many attributes are never read again after the modules were built. The weights are shared, not copied.
    """
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        twin = cls(copy.deepcopy(config))
    twin.load_state_dict(model.state_dict(), strict=False, assign=True)
    twin.tie_weights()
    device = next(model.parameters()).device
    training = model.training
    try:
        inputs = map_tensors(_example(model, plan), lambda tensor: tensor.to(device))
        with torch.no_grad():
            ours = _floats(call(model.eval(), inputs))
            theirs = _floats(call(twin.to(device).eval(), inputs))
    except (SecateurError, *BROKEN):
        return False
    finally:
        model.train(training)
    return len(ours) == len(theirs) > 0 and all(
        a.shape == b.shape and torch.allclose(a, b, rtol=1e-3, atol=1e-5, equal_nan=True)
        for a, b in zip(ours, theirs)
    )


def _example(model: Any, plan: Plan | None) -> Any:
    """Inputs that tell models apart: random token ids, or noise of the shapes that the plan was traced with."""
    if plan is None or not isinstance(plan.inputs, dict) or set(plan.inputs) == {"tensor", "dtype"}:
        return default_inputs(model)
    inputs = from_description(plan.inputs)
    for name, value in inputs.items():
        if name.endswith("input_ids"):
            embedding = model.get_input_embeddings()
            inputs[name] = torch.arange(value.numel()).reshape(value.shape) * 7 % embedding.num_embeddings
    return inputs


def _floats(output: Any) -> list[Tensor]:
    found: list[Tensor] = []
    wanted = {key: value for key, value in output.items() if not is_cache(value)}
    map_tensors(wanted, lambda tensor: found.append(tensor) if tensor.is_floating_point() else None)
    return found


def _auto_classes(cls: type, model_type: str) -> list[str]:
    """Names of the Auto classes that give `cls`."""
    from transformers.models.auto import modeling_auto

    names = []
    for name, auto in vars(modeling_auto).items():
        if name.startswith("AutoModel") and hasattr(auto, "_model_mapping"):
            known = auto._model_mapping._model_mapping.get(model_type, ())
            if cls.__name__ in ((known,) if isinstance(known, str) else known):
                names.append(name)
    return sorted(names, key=lambda name: (name != "AutoModelForCausalLM", len(name))) or ["AutoModel"]


def _render(cls: type, config: type, model_type: str) -> str:
    return MODELING.format(
        name=cls.__name__,
        module=cls.__module__,
        config=config.__name__,
        config_module=config.__module__,
        model_type=model_type,
        swap=inspect.getsource(swap),
        reshape=inspect.getsource(reshape),
    )


def _save_custom(
    model: Any,
    cls: type,
    folder: Path,
    plan: Plan | None,
    dense_config: Any,
    changes: Any,
    why: str,
) -> dict[str, Any]:
    before = getattr(model.config, "pruned", None) or {"blocks": {}}
    dense = _dense_config(dense_config if dense_config is not None else model.config)
    blocks = dict(before["blocks"])
    for path, kept in kept_blocks(plan, changes, model).items():
        earlier = blocks.get(path)
        blocks[path] = [earlier[i] for i in kept] if earlier else kept
    cut = compare(model, _build(lambda: cls(copy.deepcopy(dense))), blocks)
    was, now = _config_fields(dense), _config_fields(model.config)
    cut["dense"] = {key: value for key, value in was.items() if key in now and now[key] != value}
    cut["config"] = _valid_fields(dense, {key: now[key] for key in cut["dense"]})

    model_type = f"pruned_{dense.model_type}"
    text = _render(cls, type(dense), model_type)
    state = model.state_dict()
    state |= {name: tensor for name, tensor in _tensors(model).items() if name in cut["shapes"]}
    automatic = getattr(model.config, "auto_map", None)
    swap(model.config, cut["dense"])
    try:
        with quiet():
            model.save_pretrained(
                folder, state_dict=state, save_original_format=False, max_shard_size=SHARD_BYTES
            )
    finally:
        swap(model.config, {key: now[key] for key in cut["dense"]})
        if automatic is not None:
            model.config.auto_map = automatic

    autos = _auto_classes(cls, dense.model_type)
    dense.dtype = model.config.dtype
    document = json.loads(dense.to_json_string(use_diff=True))
    document |= {
        "architectures": [f"Pruned{cls.__name__}"],
        "auto_map": {
            "AutoConfig": "modeling_pruned.PrunedConfig",
            **{auto: f"modeling_pruned.Pruned{cls.__name__}" for auto in autos},
        },
        "model_type": model_type,
        "pruned": {"class": f"{cls.__module__}:{cls.__name__}", **cut},
    }
    atomic_write_json(folder / "config.json", document)
    atomic_write_text(folder / "modeling_pruned.py", text)
    _verify(model, text, folder / "config.json")
    return {
        "form": "custom",
        "load": f"{autos[0]}.from_pretrained(folder, trust_remote_code=True)",
        "why": why,
    }


def _valid_fields(dense: Any, fields: dict[str, Any]) -> dict[str, Any]:
    """As many of the fields as the config accepts together: it may refuse 5 heads that don't divide its width."""
    for left_out in (None, *fields, ...):
        chosen = {} if left_out is ... else {key: value for key, value in fields.items() if key != left_out}
        trial = copy.deepcopy(dense)
        try:
            swap(trial, chosen)
            type(trial).from_dict(trial.to_dict())
            return chosen
        except BROKEN:
            continue
    return {}


def _verify(model: nn.Module, text: str, config_file: Path) -> None:
    """Builds the model as a loader would and compares shapes and attributes."""
    config, built = _module_from(text, "verify")
    again = _build(lambda: built(config.from_dict(json.loads(config_file.read_text()))))
    left = compare(model, again)
    if left["blocks"] or left["identity"] or left["shapes"]:
        raise SecateurError(
            f"the saved model would differ in {next(iter(left['shapes'] or left['blocks'] or left['identity']))}",
            where=type(model).__name__,
            fix="save the plan, and apply it to the dense model after loading",
        )


class _Text(importlib.abc.InspectLoader):
    """Imports a module from its text."""

    def __init__(self, text: str):
        self.text = text

    def get_source(self, fullname: str) -> str:
        return self.text


def _module_from(text: str, name: str, file: Path | None = None) -> tuple[Any, Any]:
    """(config class, model class) of a rendered modeling file. `file` is where transformers finds it to copy it."""
    spec = importlib.util.spec_from_loader(f"secateur_{name}.modeling_pruned", _Text(text))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    if file:
        module.__file__ = str(file)
    built = [cls for key, cls in vars(module).items() if key.startswith("Pruned") and hasattr(cls, "forward")]
    return module.PrunedConfig, built[0]


def _load_transformers(path: Path, dtype: torch.dtype | None) -> nn.Module:
    import transformers
    from safetensors import SafetensorError

    try:
        document = json.loads((path / "config.json").read_text())
        if "pruned" in document:
            cls, config = _trusted_classes(document, path)
            config = config.from_dict(document)
        else:
            name = (document.get("architectures") or ["AutoModelForCausalLM"])[0]
            cls, config = getattr(transformers, name, None), None
            if cls is None:
                raise SecateurError(
                    f"transformers has no {name!r}", where=str(path), fix="update transformers"
                )
        with quiet():
            model, info = cls.from_pretrained(
                path, config=config, dtype=dtype or "auto", use_safetensors=True, output_loading_info=True
            )
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise SecateurError(
            f"it can't be loaded ({str(error).strip().splitlines()[0]})",
            where=str(path),
            fix="save the model again",
        ) from error
    if info["missing_keys"]:
        raise SecateurError(
            f"it lacks {min(info['missing_keys'])}", where=str(path), fix="save the model again"
        )
    return model


def _trusted_classes(document: dict[str, Any], path: Path) -> tuple[Any, Any]:
    module, _, name = document["pruned"]["class"].partition(":")
    if not module.startswith("transformers.models.") or not name.isidentifier():
        raise SecateurError(f"{module}:{name} isn't a class of transformers", where=str(path))
    cls = getattr(importlib.import_module(module), name)
    text = _render(cls, cls.config_class, document["model_type"])
    config, pruned = _module_from(text, f"{abs(hash((text, str(path)))):x}", path / "modeling_pruned.py")
    for auto in document["auto_map"]:
        (config if auto == "AutoConfig" else pruned).register_for_auto_class(auto)
    return pruned, config


@contextmanager
def quiet() -> Iterator[None]:
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _load_tokenizer(path: Path) -> Any:
    if not any(path.glob("tokenizer*")) and not any(path.glob("*vocab*")):
        return None
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise SecateurError(f"its tokenizer can't be loaded ({error})", where=str(path)) from error


# Any other module


def _save_module(model: nn.Module, folder: Path, plan: Plan | None, changes: Any) -> dict[str, Any]:
    blocks = kept_blocks(plan, changes, model)
    timm_kwargs, cut = None, None
    for kwargs in _timm_candidates(model):
        if save_plain(model, folder, kwargs, _picture(model, plan)):
            return {"form": "plain", "load": LOAD, "why": None}
    for kwargs in _timm_candidates(model):
        import timm

        try:
            dense = _build(functools.partial(timm.create_model, **kwargs))
        except BROKEN:
            continue
        try:
            cut = compare(model, dense, blocks)
        except SecateurError:
            continue
        timm_kwargs = kwargs
        break
    if cut is None:
        cut = compare(model, None, blocks)
    state: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    seen: dict[int, str] = {}
    for name, tensor in _tensors(model).items():
        if id(tensor) in seen:
            tied[name] = seen[id(tensor)]
        else:
            seen[id(tensor)] = name
            state[name] = _own_storage(tensor)
    persistent = model.state_dict().keys()
    if extra := [name for name in persistent if name not in state and name not in tied]:
        raise SecateurError(
            f"its state holds more than tensors ({extra[0]})",
            where=type(model).__name__,
            fix="save its state yourself",
        )
    cls = type(model)
    atomic_write_json(
        folder / "model.json",
        {
            "format": FORMAT,
            "class": f"{cls.__module__}:{cls.__qualname__}",
            "timm": timm_kwargs,
            "tied": tied,
            "buffers": [name for name in state if name not in persistent],
            "pruned": cut,
        },
    )
    for number, part in enumerate(shards := _shards(state), 1):
        name = (
            "model.safetensors" if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        )
        save_file(part, folder / name)
    build = f"build_{cls.__name__}()"
    atomic_write_text(
        folder / "load_pruned.py",
        LOADER.format(
            reshape=inspect.getsource(reshape),
            assemble=inspect.getsource(assemble),
            timm=", and timm" if timm_kwargs else "",
            argument="" if timm_kwargs else build,
            comment=f"timm {timm_kwargs['model_name']}"
            if timm_kwargs
            else f"the dense {cls.__name__}, freshly built",
        ),
    )
    return {
        "form": "module",
        "load": f"load_pruned.load({'' if timm_kwargs else build})",
        "why": f"no arguments of timm's {timm_kwargs['model_name']} build these shapes"
        if timm_kwargs
        else f"{cls.__module__}.{cls.__qualname__} isn't a transformers model, so it has no config to load it from",
    }


def _picture(model: nn.Module, plan: Plan | None) -> Any:
    if plan is not None and plan.inputs:
        return from_description(plan.inputs)
    picture = default_inputs(model)
    size = getattr(getattr(model, "patch_embed", None), "img_size", None)
    return (
        picture[..., : size[0], : size[1]]
        if isinstance(size, tuple) and isinstance(picture, Tensor)
        else picture
    )


def _own_storage(tensor: Tensor) -> Tensor:
    """On the CPU, contiguous, and not a part of a larger tensor."""
    tensor = tensor.detach().cpu().contiguous()
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def _timm_candidates(model: nn.Module) -> Iterator[dict[str, Any]]:
    """Calls of `timm.create_model` that may build the dense model, most telling first."""
    about = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None) or {}
    name = about.get("architecture") if hasattr(about, "get") else None
    if not name:
        return
    kwargs: dict[str, Any] = {"model_name": name, "pretrained": False}
    given = getattr(model, "_model_args", {})
    if given and all(type(value) in (int, float, str, bool, tuple, list) for value in given.values()):
        yield {**kwargs, **given}
    if isinstance(classes := getattr(model, "num_classes", None), int):
        kwargs["num_classes"] = classes
    first = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    if first is not None and first.groups == 1 and first.in_channels != 3:
        kwargs["in_chans"] = first.in_channels
    size = getattr(getattr(model, "patch_embed", None), "img_size", None)
    if isinstance(size, tuple):
        yield {**kwargs, "img_size": list(size)}
    yield kwargs


def _shards(state: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in state.items():
        if size and size + tensor.nbytes > SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    return shards


def _load_module(path: Path, model: nn.Module | None) -> nn.Module:
    from safetensors import SafetensorError

    about = json.loads((path / "model.json").read_text())
    if about.get("format") != FORMAT:
        raise SecateurError("it isn't a model that secateur wrote", where=str(path))
    if model is None and about["timm"] is None:
        raise SecateurError(
            f"it needs a freshly built dense {about['class']}", where=str(path), fix="pass it as model="
        )
    try:
        return assemble(path, about, model)
    except (RuntimeError, KeyError, AttributeError, IndexError, SafetensorError, OSError) as error:
        raise SecateurError(
            f"it can't be loaded ({str(error).strip().splitlines()[0]})",
            where=str(path),
            fix="pass a freshly built dense model of the same settings",
        ) from error
