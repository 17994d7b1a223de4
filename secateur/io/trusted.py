"""What a folder's JSON may name: classes of transformers, and nothing that leads to other code or other files."""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from secateur.errors import SecateurError, require

MODELING = re.compile(r"transformers\.models\.[a-z0-9_]+\.modeling_[a-z0-9_]+")
ELSEWHERE = (
    "checkpoint_path",
    "pretrained_cfg_overlay",
    "pretrained_model_args",
    "cache_dir",
    "hf_hub_id",
    "custom_load",
)
"""Keys, at any depth, by which a config makes a library read other files than the folder's."""
KERNELS = ("attn_implementation", "experts_implementation")
DEEPEST = 64


def auto_or_model_class(document: Mapping[str, Any], where: str) -> Any:
    """The class of transformers that a `config.json` names first; AutoModelForCausalLM where it names none.

    Raises `SecateurError` for anything else that a name of the library may mean.
    """
    import transformers

    names = document.get("architectures") or []
    right = isinstance(names, list) and all(isinstance(name, str) for name in names)
    require(right, "architectures isn't a list of names", where=where, fix="save the model again")
    if not names:
        return transformers.AutoModelForCausalLM
    cls = getattr(transformers, names[0], None) if names[0].isidentifier() else None
    require(_is_model(cls), f"transformers has no model {names[0]!r}", where=where, fix="update transformers")
    return cls


def pruned_from(document: Mapping[str, Any], where: str) -> Any:
    """The class of transformers that a folder's pruned model was made from.

    Raises `SecateurError` where the names in the document aren't those that `save_model` writes for such a class.
    """
    pruned = document.get("pruned")
    text = str(pruned.get("class")) if isinstance(pruned, dict) else ""
    module, _, name = text.partition(":")
    cls = None
    if MODELING.fullmatch(module) and name.isidentifier():
        try:
            cls = getattr(importlib.import_module(module), name, None)
        except ImportError:
            cls = None
    known = _is_model(cls) and getattr(cls, "__module__", None) == module
    require(known, f"{text!r} isn't a class of transformers", where=where, fix="save the model again")
    assert cls is not None
    wanted, named = f"pruned_{cls.config_class.model_type}", document.get("model_type")
    require(
        named == wanted,
        f"its model_type is {named!r}, not {wanted!r}",
        where=where,
        fix="save the model again",
    )
    return cls


def _is_model(cls: Any) -> bool:
    from transformers import PreTrainedModel

    return isinstance(cls, type) and issubclass(cls, PreTrainedModel) and cls is not PreTrainedModel


def check_config(value: Any, where: str, depth: int = 0) -> None:
    """Refuse a config that makes a library fetch code or weights from elsewhere.

    >>> check_config({"model_args": {"checkpoint_path": "/etc/x.pt"}}, "config.json")
    Traceback (most recent call last):
    ...
    secateur.errors.SecateurError: config.json: checkpoint_path reads files outside the folder; remove it

    Raises `SecateurError` with the key.
    """
    require(depth < DEEPEST, "it is nested too deep", where=where, fix="save the model again")
    if isinstance(value, list):
        for item in value:
            check_config(item, where, depth + 1)
    if not isinstance(value, dict):
        return
    for key, item in value.items():
        outside = key in ELSEWHERE or (key in ("use_pretrained_backbone", "pretrained") and item)
        if outside and item is not None and item is not False:
            raise SecateurError(f"{key} reads files outside the folder", where=where, fix="remove it")
        if key.strip("_").removesuffix("_internal") in KERNELS:
            names = item.values() if isinstance(item, dict) else [item]
            plain = all(name is None or (isinstance(name, str) and name.isidentifier()) for name in names)
            require(plain, f"{key} names code of a hub", where=where, fix="remove it")
        # timm takes sources such as hf-hub:NAME where an architecture stands
        if key == "architecture":
            named = item is None or (isinstance(item, str) and re.fullmatch(r"[\w.]+", item))
            require(named, f"{item!r} isn't an architecture", where=where, fix="save the model again")
        check_config(item, where, depth + 1)


def check_folder(path: str | Path) -> None:
    """Refuse a folder whose `config.json` leads elsewhere, or with an adapter, which may name another model.

    A name that is no folder passes: that is the hub's.
    """
    path = Path(path).expanduser()
    if (file := path / "config.json").is_file():
        try:
            check_config(json.loads(file.read_text(encoding="utf-8")), str(file))
        except (ValueError, RecursionError) as error:
            raise SecateurError(
                f"it isn't JSON ({error})", where=str(file), fix="save the model again"
            ) from error
    there = (path / "adapter_config.json").exists()
    require(
        not there,
        "an adapter lies beside the model",
        where=str(path),
        fix="merge it, and save the model again",
    )
