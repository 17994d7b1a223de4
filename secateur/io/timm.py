"""Pruned timm models that timm's own arguments can express: folders that `timm.create_model("local-dir:...")` loads.

>>> pruned.save("small")
>>> model = timm.create_model("local-dir:small", pretrained=True)
"""

from __future__ import annotations

import functools
import inspect
import json
import re
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from secateur.errors import SecateurError, require
from secateur.io.reshape import BROKEN
from secateur.io.trusted import TimmEntry
from secateur.surgery.arguments import constructor_arguments
from secateur.utils.files import atomic_write_json
from secateur.utils.inputs import Inputs, map_tensors
from secateur.utils.running import call, evaluating
from secateur.utils.schema import parse, read_object

SOURCE = {
    "url",
    "hf_hub_id",
    "hf_hub_filename",
    "file",
    "source",
    "state_dict",
    "custom_load",
    "architecture",
}
ABOUT = {
    "input_size", "test_input_size", "min_input_size", "fixed_input_size", "interpolation", "crop_pct", "test_crop_pct",
    "crop_mode", "mean", "std", "num_classes", "pool_size", "test_pool_size", "first_conv", "classifier",
}  # fmt: skip
"""Keys of timm's `pretrained_cfg` that describe inputs and classes."""
LARGEST = 10**7
LOAD = 'timm.create_model("local-dir:FOLDER", pretrained=True)'


def save_plain(model: nn.Module, folder: Path, known: Mapping[str, Any], inputs: Inputs) -> bool:
    """Write `config.json` and `model.safetensors` if timm can build the model; False, and nothing written, if not.

    known: the call of `timm.create_model` that builds the dense model. inputs: what the outputs are compared on, once
    timm has loaded what was written.
    """
    import timm

    dense = {key: value for key, value in known.items() if key not in ("model_name", "pretrained")}
    changed = constructor_arguments(model, functools.partial(timm.create_model, known["model_name"], **dense))
    if changed is None:
        return False
    about: Any = getattr(model, "pretrained_cfg", {})
    document = {
        "architecture": known["model_name"],
        "num_classes": getattr(model, "num_classes", about.get("num_classes")),
        "num_features": getattr(model, "num_features", None),
        "pretrained_cfg": {
            key: value for key, value in dict(about).items() if key not in SOURCE and _plain(value)
        },
        "model_args": {**dense, **changed},
    }
    files = folder / "config.json", folder / "model.safetensors"
    atomic_write_json(files[0], document)
    save_file({name: _own(tensor) for name, tensor in model.state_dict().items()}, files[1])
    if _same(model, folder, inputs):
        return True
    for file in files:
        file.unlink()
    return False


def build(
    name: Any, arguments: Mapping[str, Any], where: str, about: Mapping[str, Any] | None = None
) -> nn.Module:
    """The timm model of an architecture, freshly built: nothing is read or fetched, whatever the arguments say.

    >>> build("vit_tiny_patch16_224", {"depth": 2}, "model.json")  # doctest: +SKIP

    arguments: those of the constructors in the architecture's file. about: its `pretrained_cfg`, of which what describes
    inputs and classes is kept.

    Raises `SecateurError` where timm isn't installed, for an architecture or argument that it hasn't got, and for text that
    may be a path or an address.
    """
    try:
        import timm
    except ImportError as error:
        raise SecateurError("it is a timm model", where=where, fix="pip install timm") from error
    known = isinstance(name, str) and re.fullmatch(r"\w+(\.\w+)?", name) and timm.is_model(name)
    require(known, f"timm has no model {name!r}", where=where, fix="update timm")
    fields = constructor_fields(timm.model_entrypoint(name))
    for key, value in arguments.items():
        require(key in fields, f"{key!r} isn't an argument of {name}", where=where, fix="remove it")
        require(_describes(value), f"{key} is {str(value)[:40]!r}", where=where, fix="save the model again")
    about = {key: value for key, value in (about or {}).items() if key in ABOUT}
    return timm.create_model(name, pretrained=False, pretrained_cfg=about or None, **arguments)


def constructor_fields(entrypoint: Any) -> set[str]:
    """What the classes and builders in an architecture's file take, without what timm's factory takes itself."""
    from timm.models._builder import build_model_with_cfg
    from timm.models._factory import create_model

    module = sys.modules[entrypoint.__module__]
    fields = {"num_classes", "in_chans"}
    for value in vars(module).values():
        if inspect.isclass(value) or inspect.isfunction(value):
            try:
                fields |= inspect.signature(value).parameters.keys()
            except (TypeError, ValueError):
                continue
    factory = {
        *inspect.signature(create_model).parameters,
        *inspect.signature(build_model_with_cfg).parameters,
    }
    return fields - factory - {"pruned", "features_only", "feature_cls", "device"}


def _describes(value: Any, depth: int = 0) -> bool:
    """Whether a value is made of numbers and words: no text that a library could open."""
    if isinstance(value, list):
        return depth < 6 and all(_describes(item, depth + 1) for item in value)
    if isinstance(value, str):
        return re.fullmatch(r"[\w.,+-]*", value) is not None
    return value is None or (isinstance(value, bool | int | float) and abs(value) <= LARGEST)


def load_plain(folder: Path) -> nn.Module:
    """The model of a folder that timm or `save_plain` wrote.

    Raises `SecateurError` where it is damaged, or timm isn't installed.
    """
    where = str(folder / "config.json")
    try:
        document = read_object(folder / "config.json", fix="save the model again")
        entry = parse(TimmEntry, document, where, fix="save the model again")
        # timm wrote everything into one object once
        about = document if entry.pretrained_cfg is None else entry.pretrained_cfg
        arguments = {} if entry.num_classes is None else {"num_classes": entry.num_classes}
        arguments |= entry.model_args or {}
        model = build(entry.architecture, arguments, where, about)
        state = load_file(folder / "model.safetensors")
        model.load_state_dict(state)
        return model.to(state[next(name for name, _ in model.named_parameters())].dtype).eval()
    except SecateurError:
        raise
    except (*BROKEN, OSError, AssertionError, SafetensorError) as error:
        reason = str(error).strip() or type(error).__name__
        raise SecateurError(
            f"timm can't load it ({reason.splitlines()[0]})", where=str(folder), fix="save the model again"
        ) from error


def is_plain(folder: Path) -> bool:
    """Whether a folder's config is timm's, not one of transformers."""
    try:
        document = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError):
        return False
    return "architecture" in document and "model_type" not in document


def _same(model: nn.Module, folder: Path, inputs: Inputs) -> bool:
    import timm

    like = next(model.parameters())
    ours: list[Tensor] = []
    theirs: list[Tensor] = []
    try:
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]), evaluating(model), torch.no_grad():
            warnings.simplefilter("ignore")
            twin = (
                timm.create_model(f"local-dir:{folder}", pretrained=True).eval().to(like.device, like.dtype)
            )
            fed = map_tensors(inputs, lambda tensor: tensor.to(like.device))
            for found, module in ((ours, model), (theirs, twin)):
                map_tensors(call(module, fed), found.append)
    except (
        SecateurError,
        AssertionError,
        UnpicklingError,
        *BROKEN,
    ):  # older releases of timm unpickle safetensors
        return False
    return len(ours) == len(theirs) > 0 and all(
        a.shape == b.shape and torch.allclose(a, b, rtol=1e-4, atol=1e-5, equal_nan=True)
        for a, b in zip(ours, theirs)
    )


def _own(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().clone(memory_format=torch.contiguous_format)


def _plain(value: Any) -> bool:
    try:
        return value is not None and json.dumps(value) is not None
    except (TypeError, ValueError):
        return False
