"""Any other module: weights, a description and a short loader, and read again."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import save_file
from torch import Tensor, nn

from secateur.errors import SecateurError, require
from secateur.io.reshape import (
    BROKEN,
    FORMAT,
    SHARD_BYTES,
    _build,
    _tensors,
    assemble,
    compare,
    kept_blocks,
    reshape,
)
from secateur.io.timm import LOAD, build, save_plain
from secateur.io.trusted import ModuleEntry
from secateur.surgery.absent import Absent
from secateur.surgery.constant import sources
from secateur.utils.files import atomic_write_json, atomic_write_text
from secateur.utils.inputs import default_inputs, from_description
from secateur.utils.schema import parse, read_object

if TYPE_CHECKING:
    from secateur.pruning.plan import Plan


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


{absent}

{constants}{reshape}

{assemble}

def load(model=None):
    folder = Path(__file__).resolve().parent
    return assemble(folder, json.loads((folder / "model.json").read_text()), model)
'''


# Any other module


def _save_module(model: nn.Module, folder: Path, plan: Plan | None) -> dict[str, Any]:
    blocks = kept_blocks(plan, model)
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
    build_it = f"build_{_word(cls.__name__)}()"
    atomic_write_text(
        folder / "load_pruned.py",
        LOADER.format(
            absent=inspect.getsource(Absent),
            constants=sources(cut),
            reshape=inspect.getsource(reshape),
            assemble=inspect.getsource(assemble),
            timm=", and timm" if timm_kwargs else "",
            argument="" if timm_kwargs else build_it,
            comment=f"timm {_word(timm_kwargs['model_name'])}"
            if timm_kwargs
            else f"the dense {_word(cls.__name__)}, freshly built",
        ),
    )
    return {
        "form": "module",
        "load": f"load_pruned.load({'' if timm_kwargs else build_it})",
        "why": f"no arguments of timm's {timm_kwargs['model_name']} build these shapes"
        if timm_kwargs
        else f"{cls.__module__}.{cls.__qualname__} isn't a transformers model, so it has no config to load it from",
    }


def _word(name: str) -> str:
    """A name that goes into the written loader: it can't leave the comment or the call that it stands in."""
    require(re.fullmatch(r"[\w.]+", name), f"{name!r} isn't a name", where="model")
    return name


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

    about = read_object(path / "model.json", fix="save the model again")
    if about.get("format") != FORMAT:
        raise SecateurError("it isn't a model that secateur wrote", where=str(path))
    parse(ModuleEntry, about, str(path / "model.json"), fix="save the model again")
    if model is None and about["timm"] is None:
        raise SecateurError(
            f"it needs a freshly built dense {about['class']}", where=str(path), fix="pass it as model="
        )
    try:
        if model is None:
            arguments = {
                key: value for key, value in about["timm"].items() if key not in ("model_name", "pretrained")
            }
            model = build(about["timm"]["model_name"], arguments, str(path / "model.json"))
        return assemble(path, about, model)
    except (*BROKEN, SafetensorError, OSError, AssertionError) as error:
        raise SecateurError(
            f"it can't be loaded ({str(error).strip().splitlines()[0]})",
            where=str(path),
            fix="pass a freshly built dense model of the same settings",
        ) from error
