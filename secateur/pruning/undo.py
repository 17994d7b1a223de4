"""What a run changes in place, so that a failure puts it back."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from secateur.surgery import unmask_units


class Undo:
    """Original tensors of what a run changes in place, so that a failure puts them back."""

    def __init__(self, model: nn.Module, active: bool = True):
        self.model, self.active = model, active
        self.originals: dict[str, Tensor] = {}
        self.added: set[str] = set()
        """Parameters that the model didn't have."""

    def remember(self, name: str) -> None:
        """Keep a copy of this parameter or buffer as it is now, unless there is one; or that the model has none."""
        if not self.active or name in self.originals or name in self.added:
            return
        if not has_tensor(self.model, name):
            self.added.add(name)
        else:
            self.originals[name] = tensor_of(self.model, name).detach().clone()

    def restore(self) -> None:
        unmask_units(self.model)
        with torch.no_grad():
            for name, original in self.originals.items():
                tensor_of(self.model, name).copy_(original)
        for name in self.added:
            remove_parameter(self.model, name)

    def release(self) -> None:
        self.originals.clear()


def tensor_of(model: nn.Module, name: str) -> Tensor:
    """A parameter or buffer."""
    path, _, attribute = name.rpartition(".")
    return getattr(model.get_submodule(path), attribute)


def has_tensor(model: nn.Module, name: str) -> bool:
    try:
        return isinstance(tensor_of(model, name), Tensor)
    except AttributeError:
        return False


def remove_parameter(model: nn.Module, name: str) -> None:
    """Take away a parameter that a repair gave a layer that had none, such as a bias."""
    path, _, attribute = name.rpartition(".")
    module = model.get_submodule(path)
    if module._parameters.get(attribute) is not None:
        module.register_parameter(attribute, None)
