"""What a cut changes, and the small steps it is made of."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from secateur.graph.groups import Group
from secateur.utils.screen import Screen


def set_values(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Write repaired tensors, in the model's dtype and place; one the model lacks (a new bias) becomes a parameter.

    Of tensors that are tied to each other, each that is given a value has one of its own.
    """
    untie(model, values)
    for name, value in values.items():
        path, _, attribute = name.rpartition(".")
        module = model.get_submodule(path)
        present = getattr(module, attribute, None)
        if present is None:
            like = next(module.parameters())
            module.register_parameter(attribute, nn.Parameter(value.to(like.device, like.dtype)))
            continue
        with torch.no_grad():
            present.copy_(value)


def untie(model: nn.Module, names: Iterable[str]) -> None:
    """Parameters of these names that are one tensor become several; the config says that embeddings are no longer tied."""
    first: dict[int, str] = {}
    for name in names:
        path, _, attribute = name.rpartition(".")
        module = model.get_submodule(path)
        tensor = getattr(module, attribute, None)
        if not isinstance(tensor, nn.Parameter) or first.setdefault(id(tensor), name) == name:
            continue
        setattr(module, attribute, nn.Parameter(tensor.detach().clone(), requires_grad=tensor.requires_grad))
        config: Any = getattr(model, "config", None)
        configs: list[Any] = [config, getattr(config, "get_text_config", lambda: None)()]
        for each in configs:
            if getattr(each, "tie_word_embeddings", False):
                each.tie_word_embeddings = False


Keep = Mapping[str, Tensor]


@dataclass(repr=False)
class Changes(Screen):
    """What a cut changed.

    `shapes`: new shape of every parameter and buffer that was cut; `attributes`: module path -> attribute -> value;
    `config`: field of the model's config (dots for nested ones) -> value; `layers`: path of a list of blocks -> the
    positions that stay. Paths are those after blocks were taken out. `uniform`: the config alone rebuilds the model.
    """

    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    attributes: dict[str, dict[str, Any]] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    layers: dict[str, list[int]] = field(default_factory=dict)
    uniform: bool = False

    def join(self, other: Changes) -> None:
        """Take in what a further cut, of other modules, changed."""
        self.shapes |= other.shapes
        self.config |= other.config
        self.layers |= other.layers
        for path, values in other.attributes.items():
            self.attributes.setdefault(path, {}).update(values)


# --- tensors


def _tensor(model: nn.Module, name: str) -> Tensor:
    path, _, leaf = name.rpartition(".")
    return getattr(model.get_submodule(path), leaf)


def _put(model: nn.Module, name: str, value: Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    (module._parameters if leaf in module._parameters else module._buffers)[leaf] = value  # type: ignore[assignment]


def _gone(group: Group, kept: Tensor) -> Tensor:
    gone = torch.ones(group.size, dtype=torch.bool)
    gone[kept] = False
    return gone


def _removed_blocks(group: Group, kept: Tensor) -> list[str]:
    stay = set(kept.tolist())
    return [path for u, path in enumerate(group.modules) if u not in stay]


def _refresh(m: nn.Module) -> None:
    if isinstance(m, nn.RNNBase):
        m._flat_weights = [getattr(m, name) for name in m._flat_weights_names]
        m.flatten_parameters()


def _renumber(container: nn.Module, names: Sequence[str]) -> dict[str, str]:
    """Keep only these children; numbered ones are numbered afresh. Old name -> new name."""
    digits = all(name.isdigit() for name in container._modules)
    kept = {name: container._modules[name] for name in names}
    moved = {name: str(n) if digits else name for n, name in enumerate(names)}
    container._modules.clear()
    for name, child in kept.items():
        container._modules[moved[name]] = child
    return moved


def _set_config(config: Any, name: str, value: Any) -> None:
    *path, leaf = name.split(".")
    for part in path:
        config = getattr(config, part)
    setattr(config, leaf, value)
