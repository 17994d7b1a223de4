"""Models of transformers: written so that plain transformers loads them, and read again."""

from __future__ import annotations

import copy
import functools
import hashlib
import inspect
import json
import re
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from secateur.errors import SecateurError, require
from secateur.io.per_layer import FOLDER, write_per_layer
from secateur.io.reshape import (
    BROKEN,
    CONFIG_KEYS,
    SHARD_BYTES,
    _build,
    _tensors,
    compare,
    kept_blocks,
    reshape,
    swap,
)
from secateur.io.trusted import auto_or_model_class, check_folder, pruned_from
from secateur.surgery.absent import Absent
from secateur.surgery.constant import sources
from secateur.utils.files import atomic_write_json, atomic_write_text
from secateur.utils.inputs import default_inputs, from_description, map_tensors
from secateur.utils.running import call, device_of, evaluating
from secateur.utils.schema import read_object
from secateur.utils.versions import is_cache

if TYPE_CHECKING:
    from secateur.pruning.plan import Plan


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

{absent}

{constants}{reshape}

class Pruned{name}({name}):
    config_class = PrunedConfig

    def __init__(self, config, *args, **kwargs):
        swap(config, config.pruned["dense"])
        super().__init__(config, *args, **kwargs)
        swap(config, config.pruned["config"])
        reshape(self, config.pruned)
        self.tie_weights()
'''


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
    model: Any,
    folder: Path,
    plan: Plan | None,
    dense_config: Any,
    same: Callable[[Any, Any], bool] | None = None,
) -> dict[str, Any]:
    """same: of a model that holds no weights, whether another computes the same; the files beside the weights are written alone."""
    cls = _transformers_class(model)
    assert cls is not None
    weights = same is None
    why = _inexpressible(model, cls, same or functools.partial(_same_outputs, plan=plan))
    architectures = model.config.architectures
    try:
        if why is None:
            with quiet():
                _save_pretrained(model, folder, None if weights else {})
            auto = _auto_classes(cls, model.config.model_type)[0]
            return {"form": "plain", "load": f"{auto}.from_pretrained(folder)", "why": None}
        return _save_custom(model, cls, folder, plan, dense_config, why, weights)
    finally:
        model.config.architectures = architectures


def _save_pretrained(model: Any, folder: Path, state: dict[str, Tensor] | None, **settings: Any) -> None:
    """transformers' own; without a tensor of `state` it writes no weights."""
    none = state is not None and not state
    model.save_pretrained(folder, state_dict=state, max_shard_size=SHARD_BYTES, **settings)
    if none:
        (folder / "model.safetensors").unlink(missing_ok=True)


def _inexpressible(model: Any, cls: Any, same: Callable[[Any, Any], bool]) -> str | None:
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
    if cut["absent"]:
        return f"{next(iter(cut['absent']))} has left, which no config says"
    if constant := [*cut["constants"], *cut["novices"]]:
        return f"{constant[0]} gives vectors that no config says"
    if cut["blocks"] or cut["identity"]:
        return (
            f"{next(iter(cut['blocks']), None) or cut['identity'][0]} has fewer blocks than the config says"
        )
    for name, shape in cut["shapes"].items():
        old = _tensors(built).get(name)
        says = "none" if old is None else str(list(old.shape))
        more = f", and {len(cut['shapes']) - 1} more" if len(cut["shapes"]) > 1 else ""
        return f"{name} is {shape}, the config says {says}{more}"
    if cut["attributes"] and not _computes_the_same(model, cls, config, same):
        path, values = next(iter(cut["attributes"].items()))
        key, value = next(iter(values.items()))
        return f"{path}.{key} is {value}, the config says {getattr(built.get_submodule(path), key, None)}"
    return None


def _computes_the_same(model: Any, cls: Any, config: Any, same: Callable[[Any, Any], bool]) -> bool:
    """Whether what the config builds gives the model's outputs with the model's weights, whatever its attributes say.

    Many attributes are never read again after the modules were built. The weights are shared, not copied.
    """
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        twin = cls(copy.deepcopy(config))
    twin.load_state_dict(model.state_dict(), strict=False, assign=True)
    twin.tie_weights()
    try:
        with evaluating(model), torch.no_grad():
            return same(model, twin.to(device_of(model)).eval())
    except (SecateurError, *BROKEN):
        return False


def _same_outputs(model: Any, twin: Any, plan: Plan | None) -> bool:
    device = device_of(model)
    inputs = map_tensors(_example(model, plan), lambda tensor: tensor.to(device))
    ours, theirs = (_floats(call(each, inputs)) for each in (model, twin))
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


def _render(cls: Any, cut: Mapping[str, Any]) -> str:
    config = cls.config_class
    names = {"name": cls.__name__, "module": cls.__module__, "config": config.__name__}
    names |= {"config_module": config.__module__, "model_type": f"pruned_{config.model_type}"}
    for text in names.values():
        require(re.fullmatch(r"[\w.-]+", text), f"{text!r} isn't a name", where=cls.__name__)
    return MODELING.format(
        **names,
        swap=inspect.getsource(swap),
        absent=inspect.getsource(Absent),
        constants=sources(cut),
        reshape=inspect.getsource(reshape),
    )


def _save_custom(
    model: Any,
    cls: Any,
    folder: Path,
    plan: Plan | None,
    dense_config: Any,
    why: str,
    weights: bool = True,
) -> dict[str, Any]:
    before = getattr(model.config, "pruned", None) or {"blocks": {}}
    dense = _dense_config(dense_config if dense_config is not None else model.config)
    blocks = dict(before["blocks"])
    for path, kept in kept_blocks(plan, model).items():
        earlier = blocks.get(path)
        blocks[path] = [earlier[i] for i in kept] if earlier else kept
    cut = compare(model, _build(lambda: cls(copy.deepcopy(dense))), blocks)
    was, now = _config_fields(dense), _config_fields(model.config)
    cut["dense"] = {key: value for key, value in was.items() if key in now and now[key] != value}
    cut["config"] = _valid_fields(dense, {key: now[key] for key in cut["dense"]})

    text = _render(cls, cut)
    state = model.state_dict() if weights else {}
    state |= {n: tensor for n, tensor in _tensors(model).items() if weights and n in cut["shapes"]}
    automatic = getattr(model.config, "auto_map", None)
    swap(model.config, cut["dense"])
    try:
        with quiet():
            _save_pretrained(model, folder, state, save_original_format=False)
    finally:
        swap(model.config, {key: now[key] for key in cut["dense"]})
        if automatic is not None:
            model.config.auto_map = automatic

    autos = _auto_classes(cls, cls.config_class.model_type)
    dense.dtype = model.config.dtype
    document = json.loads(dense.to_json_string(use_diff=True))
    document |= {
        "architectures": [f"Pruned{cls.__name__}"],
        "auto_map": {
            "AutoConfig": "modeling_pruned.PrunedConfig",
            **{auto: f"modeling_pruned.Pruned{cls.__name__}" for auto in autos},
        },
        "model_type": f"pruned_{cls.config_class.model_type}",
        "pruned": {"class": f"{cls.__module__}:{cls.__name__}", **cut},
    }
    atomic_write_json(folder / "config.json", document)
    atomic_write_text(folder / "modeling_pruned.py", text)
    _verify(model, cls, folder / "config.json")
    plain = copy.deepcopy(dense)
    swap(plain, cut["config"])
    unsaid = write_per_layer(model, cls, plain, folder)
    return {
        "form": "custom",
        "load": f"{autos[0]}.from_pretrained(folder, trust_remote_code=True)",
        "why": why,
        "per_layer_config": unsaid or f"{FOLDER}/config.json",
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


def _verify(model: nn.Module, cls: type, config_file: Path) -> None:
    """Builds the model as a loader would and compares shapes and attributes."""
    config, built = _pruned_classes(cls, "verify")
    again = _build(lambda: built(config.from_dict(config._dict_from_json_file(config_file))))
    left = compare(model, again)
    if wrong := [
        *left["blocks"],
        *left["identity"],
        *left["absent"],
        *left["shapes"],
        *left["constants"],
        *left["novices"],
    ]:
        raise SecateurError(
            f"the saved model would differ in {wrong[0]}",
            where=type(model).__name__,
            fix="save the plan, and apply it to the dense model after loading",
        )


def _pruned_classes(cls: Any, name: str, file: Path | None = None) -> tuple[Any, Any]:
    """(config class, model class) that `MODELING` writes for a class of transformers, made without running any text.

    file: the written text, which transformers copies when it saves the model.
    """
    module = types.ModuleType(f"secateur_{name}.modeling_pruned")
    module.__file__ = str(file) if file else None
    sys.modules[module.__name__] = module

    def __init__(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        swap(config, config.pruned["dense"])
        cls.__init__(self, config, *args, **kwargs)
        swap(config, config.pruned["config"])
        reshape(self, config.pruned)
        self.tie_weights()

    own = {"__module__": module.__name__}
    model_type = f"pruned_{cls.config_class.model_type}"
    config = types.new_class(
        "PrunedConfig", (cls.config_class,), exec_body=lambda body: body.update(own, model_type=model_type)
    )
    body = {**own, "config_class": config, "__init__": __init__}
    return config, types.new_class(
        f"Pruned{cls.__name__}", (cls,), exec_body=lambda space: space.update(body)
    )


def class_of(path: Path) -> tuple[Any, Any]:
    """(class, config) of a folder of transformers; the config only where the class is one that `save_model` made.

    Raises `SecateurError` for a folder that leads to other code or other files.
    """
    check_folder(path)
    document = read_object(path / "config.json", fix="save the model again")
    if "pruned" not in document:
        return auto_or_model_class(document, str(path / "config.json")), None
    cls, config = _trusted_classes(document, path)
    return cls, config.from_dict(config._dict_from_json_file(path / "config.json"))  # with its infinities


def _load_transformers(path: Path, dtype: torch.dtype | None) -> nn.Module:
    from safetensors import SafetensorError

    try:
        cls, config = class_of(path)
        with quiet():
            model, info = cls.from_pretrained(
                path,
                config=config,
                dtype=dtype or "auto",
                use_safetensors=True,
                output_loading_info=True,
                trust_remote_code=False,
                local_files_only=True,
            )
    except (*BROKEN, OSError, ImportError, AssertionError, SafetensorError) as error:
        reason = str(error).strip() or type(error).__name__
        raise SecateurError(
            f"it can't be loaded ({reason.splitlines()[0]})", where=str(path), fix="save the model again"
        ) from error
    if info["missing_keys"]:
        raise SecateurError(
            f"it lacks {min(info['missing_keys'])}", where=str(path), fix="save the model again"
        )
    return model


def _trusted_classes(document: dict[str, Any], path: Path) -> tuple[Any, Any]:
    """(model class, config class) of a folder that `save_model` wrote; nothing of the folder is run."""
    cls = pruned_from(document, str(path / "config.json"))
    name = hashlib.sha256(str(path).encode()).hexdigest()[:16]
    file = path / "modeling_pruned.py"
    # transformers copies the file when it saves the model again: only one that says what these classes do
    ours = file.is_file() and file.read_text(encoding="utf-8", errors="replace") == _render(
        cls, document["pruned"]
    )
    config, pruned = _pruned_classes(cls, name, file if ours else None)
    if ours:
        config.register_for_auto_class("AutoConfig")
        for auto in _auto_classes(cls, cls.config_class.model_type):
            pruned.register_for_auto_class(auto)
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


def load_tokenizer(path: Path) -> Any:
    """The tokenizer of a folder; None where it holds none. Raises SecateurError for a damaged one."""
    if not any(path.glob("tokenizer*")) and not any(path.glob("*vocab*")):
        return None
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    # a damaged tokenizer.json raises a bare Exception
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise SecateurError(
            f"its tokenizer can't be loaded ({reason})", where=str(path), fix="save the tokenizer again"
        ) from error
