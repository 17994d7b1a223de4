"""Pruned timm models that timm's own arguments can express: folders that `timm.create_model("local-dir:...")` loads.

>>> pruned.save("small")
>>> model = timm.create_model("local-dir:small", pretrained=True)
"""

from __future__ import annotations

import functools
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from secateur.errors import SecateurError
from secateur.surgery.arguments import constructor_arguments
from secateur.utils.files import atomic_write_json
from secateur.utils.inputs import Inputs, map_tensors
from secateur.utils.running import call, evaluating

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


def load_plain(folder: Path) -> nn.Module:
    """The model of a folder that timm or `save_plain` wrote.

    Raises `SecateurError` where it is damaged, or timm isn't installed.
    """
    try:
        import timm
    except ImportError as error:
        raise SecateurError("it is a timm model", where=str(folder), fix="pip install timm") from error
    try:
        model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
        with safe_open(folder / "model.safetensors", "pt") as file:
            return model.to(file.get_tensor(next(name for name, _ in model.named_parameters())).dtype)
    except Exception as error:
        raise SecateurError(
            f"timm can't load it ({str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__})",
            where=str(folder),
            fix="save the model again",
        ) from error


def is_plain(folder: Path) -> bool:
    """Whether a folder's config is timm's, not one of transformers."""
    try:
        document = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError):
        return False
    return "architecture" in document and "model_type" not in document


def _same(model: nn.Module, folder: Path, inputs: Inputs) -> bool:
    like = next(model.parameters())
    ours: list[Tensor] = []
    theirs: list[Tensor] = []
    try:
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]), evaluating(model), torch.no_grad():
            warnings.simplefilter("ignore")
            twin = load_plain(folder).to(like.device, like.dtype)
            fed = map_tensors(inputs, lambda tensor: tensor.to(like.device))
            for found, module in ((ours, model), (theirs, twin)):
                map_tensors(call(module, fed), found.append)
    except (SecateurError, RuntimeError, ValueError, TypeError, AssertionError):
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
