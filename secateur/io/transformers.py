"""Models of transformers: written so that plain transformers loads them, and read again."""

from __future__ import annotations

import copy
import importlib.util
import inspect
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from secateur.errors import SecateurError
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
from secateur.utils.files import atomic_write_json, atomic_write_text
from secateur.utils.inputs import default_inputs, from_description, map_tensors
from secateur.utils.running import call, device_of, evaluating
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


def _save_transformers(model: Any, folder: Path, plan: Plan | None, dense_config: Any) -> dict[str, Any]:
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
        return _save_custom(model, cls, folder, plan, dense_config, why)
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
    device = device_of(model)
    try:
        inputs = map_tensors(_example(model, plan), lambda tensor: tensor.to(device))
        with evaluating(model), torch.no_grad():
            ours = _floats(call(model, inputs))
            theirs = _floats(call(twin.to(device).eval(), inputs))
    except (SecateurError, *BROKEN):
        return False
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
    why: str,
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
