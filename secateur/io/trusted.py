"""What a folder's JSON may name: classes of transformers, and nothing that leads to other code or other files."""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, Field

from secateur.errors import SecateurError, require
from secateur.utils.schema import Count, Entry, Path_, parse, read_object

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
COUNTS = re.compile(r"(.*_)?(num|n)_[a-z_]+|(.*_)?(size|dim|heads|layers|experts|depths?)|n_positions")
OTHER = re.compile(
    r".*(window|ratio|factor|scale|token|prob|eps|rate|std|init|tie|type|freeze|share|all|adjust|chunk|max|min|images)_?.*|output_.*|.*feature_layers"
)
"""Keys of configs that hold counts, and those that only look it."""
REPEATED = re.compile(r".*(layers|blocks|depths?)")
MOST_LAYERS, LARGEST = 2_000, 10**9


class CutEntry(Entry):
    """What `reshape` does to a dense model."""

    blocks: dict[Path_, list[Count]]
    identity: list[Path_]
    absent: dict[Path_, Count] = Field(default_factory=dict)
    constants: list[Path_] = Field(default_factory=list)
    novices: list[Path_] = Field(default_factory=list)
    shapes: dict[Path_, list[Count] | None]
    attributes: dict[Path_, dict[Path_, bool | int | float | str | list[int]]]


class PrunedEntry(CutEntry):
    """`pruned` in the `config.json` of a folder with its own modeling file."""

    class_: str = Field(alias="class")
    dense: dict[Path_, Any]
    config: dict[Path_, Any]


class ModuleEntry(Entry):
    """`model.json`."""

    format: str
    class_: str = Field(alias="class")
    timm: dict[str, Any] | None
    tied: dict[Path_, Path_]
    buffers: list[Path_]
    pruned: CutEntry


class TimmEntry(Entry):
    """`config.json` of a folder of timm."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)

    architecture: str
    num_classes: Count | None = None
    num_features: Count | None = None
    pretrained_cfg: dict[str, Any] | None = None
    model_args: dict[str, Any] | None = None


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
        if COUNTS.fullmatch(key) and not OTHER.fullmatch(key):
            _check_count(key, item, where)
        # some families give it as a float
        if key == "max_position_embeddings" and item is not None:
            right = type(item) in (int, float) and 1 <= item <= LARGEST
            require(right, f"{key} is {item}", where=where, fix="save the model again")
        check_config(item, where, depth + 1)


def _check_count(key: str, value: Any, where: str) -> None:
    if isinstance(value, list):
        for item in value:
            _check_count(key, item, where)
    elif isinstance(value, bool | int | float):
        most = MOST_LAYERS if REPEATED.fullmatch(key) else LARGEST
        right = type(value) is int and 0 <= value <= most
        require(right, f"{key} is {value}, not a count up to {most}", where=where, fix="save the model again")


def check_folder(path: str | Path) -> None:
    """Refuse a folder whose `config.json` leads elsewhere, or with an adapter, which may name another model.

    A name that is no folder passes: that is the hub's.
    """
    path = Path(path).expanduser()
    if (file := path / "config.json").is_file():
        document = read_object(file, fix="save the model again")
        check_config(document, str(file))
        if "pruned" in document:
            entry = parse(PrunedEntry, document["pruned"], f"{file}, pruned", fix="save the model again")
            none = [n for n, shape in entry.shapes.items() if shape is None and n.endswith("weight")]
            require(not none, f"{none} without a shape", where=f"{file}, pruned", fix="save the model again")
    there = (path / "adapter_config.json").exists()
    require(
        not there,
        "an adapter lies beside the model",
        where=str(path),
        fix="merge it, and save the model again",
    )
