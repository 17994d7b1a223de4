"""The checkpoint of a run: weights that train, buffers, moments, hooks and position in one safetensors file."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from secateur.errors import SecateurError
from secateur.training.sharded import full, share_of
from secateur.utils.files import atomic_write_bytes

if TYPE_CHECKING:
    from secateur.training.state import State

Moments = Mapping[int, Mapping[str, Any]]
"""An optimiser's state by parameter index, as `optimizer.state_dict()["state"]` gives it."""


def write_checkpoint(
    file: Path,
    state: State,
    trained: Sequence[Tensor],
    settings: Mapping[str, Any],
    hooks: Sequence[Any] = (),
    write: bool = True,
) -> None:
    """One file, whole or not at all. hooks: those that have `state_dict()`. Where weights are shared out over processes all of them
    call it, and one is to `write`; the file is that of one process."""
    tensors = {f"parameter/{i}": p.detach() for i, p in enumerate(trained)}
    tensors |= {f"buffer/{name}": b for name, b in state.model.named_buffers()}
    plain: dict[str, Any] = {}
    for i, moments in state.optimizer.state_dict()["state"].items():
        for key, value in moments.items():
            _put(f"optimizer/{i}/{key}", value, tensors, plain)
    for i, hook in enumerate(hooks):
        for key, value in hook.state_dict().items():
            _put(f"hook/{i}/{key}", value, tensors, plain)
    about = {"step": state.step, "losses": state.losses, "settings": settings, "plain": plain}
    for key, tensor in tensors.items():
        whole = full(tensor)
        tensors[key] = whole.cpu().clone(memory_format=torch.contiguous_format) if write else torch.empty(0)
    if not write:
        return
    atomic_write_bytes(file, save(tensors, metadata={"secateur": json.dumps(about)}))


@torch.no_grad()
def read_checkpoint(
    file: Path,
    state: State,
    trained: Sequence[Tensor],
    settings: Mapping[str, Any],
    hooks: Sequence[Any] = (),
) -> None:
    """Puts a run back where `write_checkpoint` left it.

    Raises `SecateurError` when the file is damaged, or was written with another model or other settings; the file and
    the model are then as they were.
    """
    try:
        with safe_open(str(file), "pt") as opened:
            about = json.loads((opened.metadata() or {})["secateur"])
            names = opened.keys()
            tensors = {name: opened.get_tensor(name) for name in names}
        written = about["settings"]
    except (SafetensorError, KeyError, ValueError, OSError) as error:
        raise SecateurError(
            f"it isn't a checkpoint, or is cut short ({error})",
            where=str(file),
            fix="remove it to start anew",
        ) from error
    if written.get("model") != settings["model"]:
        raise SecateurError(
            "it is the checkpoint of another model",
            where=str(file),
            fix="train the model that it was written for, or remove it to start anew",
        )
    if changed := [
        key for key, value in settings.items() if written.get(key) != json.loads(json.dumps(value))
    ]:
        raise SecateurError(
            f"it was written with another {', '.join(changed)}",
            where=str(file),
            fix="use the same settings, or remove it to start anew",
        )
    everything = {**tensors, **about["plain"]}
    moments: dict[int, dict[str, Any]] = {}
    kept: dict[int, dict[str, Any]] = {i: {} for i in range(len(hooks))}
    for name, value in everything.items():
        kind, _, rest = name.partition("/")
        index, _, key = rest.partition("/")
        if kind == "optimizer":
            moments.setdefault(int(index), {})[key] = value
        elif kind == "hook":
            kept[int(index)][key] = value
    for i, values in kept.items():
        if hasattr(hooks[i], "resize"):
            hooks[i].resize(state, values)
    for i, parameter in enumerate(trained):
        parameter.copy_(share_of(tensors[f"parameter/{i}"], parameter))
    for name, buffer in state.model.named_buffers():
        buffer.copy_(tensors[f"buffer/{name}"])
    load_moments(state.optimizer, moments)
    for i, values in kept.items():
        hooks[i].load_state_dict(values)
    state.step, state.losses = about["step"], about["losses"]


def load_moments(optimizer: torch.optim.Optimizer, moments: Moments) -> None:
    """The moments of an earlier run; rates and groups stay this optimiser's. The given tensors aren't changed.

    Raises `SecateurError` where they are those of parameters of other shapes.
    """
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    check_moments(moments, trained)
    copies = {
        i: {k: _own(v, trained[i]) if isinstance(v, Tensor) else v for k, v in m.items()}
        for i, m in moments.items()
    }
    optimizer.load_state_dict({"state": copies, "param_groups": optimizer.state_dict()["param_groups"]})


def _own(moment: Tensor, parameter: Tensor) -> Tensor:
    return share_of(moment.clone(), parameter) if moment.shape == parameter.shape else moment.clone()


def check_moments(moments: Moments, trained: Sequence[Tensor]) -> None:
    """Refuse a state that isn't laid out as the parameters: each of its tensors has their shape, or is one number."""
    for i, own in moments.items():
        shape = list(trained[i].shape) if i < len(trained) else None
        for key, value in own.items():
            if isinstance(value, Tensor) and value.numel() > 1 and list(value.shape) != shape:
                raise SecateurError(
                    f"{key} of parameter {i} is {list(value.shape)}, the parameter {shape or 'missing'}",
                    where="the optimiser's state is of another shape",
                    fix="begin with fresh moments (moments=None), or those of this network at this size",
                )


def copy_moments(optimizer: torch.optim.Optimizer) -> Moments:
    """A copy of the moments as they are now."""
    return {
        i: {k: v.clone() if isinstance(v, Tensor) else v for k, v in m.items()}
        for i, m in optimizer.state_dict()["state"].items()
    }


def _put(name: str, value: Any, tensors: dict[str, Tensor], plain: dict[str, Any]) -> None:
    if isinstance(value, Tensor):
        tensors[name] = value
    else:
        plain[name] = value
