"""The config of a model whose layers differ, in the form that transformers reads layer by layer (`per_layer_config`, 5.24)."""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from secateur.graph.blocks import find_stacks
from secateur.surgery.arguments import FAR, SAME, fit_arguments
from secateur.utils.files import atomic_write_json

FOLDER = "per_layer"
KEY = "per_layer_config"


def write_per_layer(model: nn.Module, cls: Any, config: Any, folder: Path) -> str | None:
    """Write `per_layer/config.json` beside a model whose layers differ; gives why it can't be said so, else None.

    >>> config = AutoConfig.from_pretrained("out/per_layer")  # doctest: +SKIP
    >>> AutoModelForCausalLM.from_pretrained("out", config=config)  # where transformers builds layers by it  # doctest: +SKIP

    config: that of the cut model, with the fields that hold for all layers. What a layer has of its own is found by
    building that layer alone from a config with other numbers, until it has the layer's shapes.
    """
    layers = per_layer_fields(model, config)
    if isinstance(layers, str):
        return layers
    document = json.loads(config.to_json_string(use_diff=True))
    document |= {"architectures": [cls.__name__], "model_type": cls.config_class.model_type}
    document[KEY] = {str(n).zfill(len(str(len(layers)))): own for n, own in enumerate(layers) if own}
    # checks of configs, such as heads that divide the width, read the fields of the whole
    document["allow_global_per_layer_attribute_access"] = True
    (folder / FOLDER).mkdir()
    atomic_write_json(folder / FOLDER / "config.json", document)
    return None


def per_layer_fields(model: nn.Module, config: Any) -> list[dict[str, int]] | str:
    """For each layer the fields in which it differs from the config; or why there are none that say it."""
    stacks = find_stacks(model)
    if len(stacks) != 1:
        return f"it has {len(stacks)} lists of layers"
    blocks = list(model.get_submodule(stacks[0].path).children())
    if getattr(config, "num_hidden_layers", None) != len(blocks):
        return (
            f"{len(blocks)} layers are left, and the config says {getattr(config, 'num_hidden_layers', None)}"
        )
    found: list[dict[str, int]] = []
    known: list[tuple[Any, dict[str, int]]] = []
    for place, block in enumerate(blocks):
        shapes = _shapes(block)
        own = next((fields for other, fields in known if other == shapes), None)
        if own is None:
            own = _fields(block, config, place)
            if own is None:
                return f"no fields of the config build layer {place}"
            known.append((shapes, own))
        found.append(own)
    return found


def _fields(block: nn.Module, config: Any, place: int) -> dict[str, int] | None:
    """The fields that make the config build this layer."""
    built = _built(block, config, place)
    if built is None:
        return None
    pairs = set(_pairs(_shapes(block), _shapes(built)))
    knobs = [
        functools.partial(_set, name=name, value=new)
        for name, value in vars(config).items()
        if type(value) is int and value > 1
        for new in sorted(
            {new * value // old for old, new in pairs if old % value == 0 and new * value % old == 0}
        )
        if new
    ]

    def distance(trial: Any) -> tuple[int, int]:
        other = _built(block, trial, place)
        if other is None:
            return FAR
        here, there = _shapes(block), _shapes(other)
        return sum(here.get(n) != there.get(n) for n in here.keys() | there.keys()), 0

    best, score = fit_arguments(config, knobs, distance, eager=True)
    if score != SAME:
        return None
    return {
        name: value
        for name, value in vars(best).items()
        if type(value) is int and value != getattr(config, name)
    }


def _set(config: Any, name: str, value: int) -> None:
    setattr(config, name, value)


def _built(block: nn.Module, config: Any, place: int) -> nn.Module | None:
    """A layer of this kind, without weights."""
    try:
        with torch.device("meta"):
            return type(block)(copy.deepcopy(config), place)
    except Exception:  # noqa: BLE001  any way a config can be wrong
        return None


def _shapes(block: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shapes of a layer's tensors, and the numbers among its modules' attributes."""
    shapes = {name: tuple(p.shape) for name, p in block.named_parameters()}
    for path, module in block.named_modules():
        for name, value in vars(module).items():
            if type(value) is int and "head" in name:
                shapes[f"{path}:{name}"] = (value,)
    return shapes


def _pairs(
    here: Mapping[str, tuple[int, ...]], there: Mapping[str, tuple[int, ...]]
) -> Iterator[tuple[int, int]]:
    """(size in a layer of the config, size in the layer) where they differ."""
    for name in here.keys() & there.keys():
        if len(here[name]) == len(there[name]):
            yield from ((old, new) for new, old in zip(here[name], there[name]) if old != new)
