"""Results of finished steps on disk, so that a run that was killed goes on where it was and ends the same."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from secateur.utils.files import atomic_write_bytes, cache_dir

Tensors = dict[str, Tensor]


class Checkpoint:
    """Named steps in one directory; a step is a dict of tensors, written whole or not at all.

    >>> checkpoint = Checkpoint(tmp / "run")  # doctest: +SKIP
    >>> checkpoint.remember("block-0", lambda: {"mask": mask})  # doctest: +SKIP
    """

    def __init__(self, directory: str | Path | None):
        self.directory = Path(directory) if directory else None

    def _path(self, key: str) -> Path | None:
        return self.directory / f"{key.replace('/', '.')}.safetensors" if self.directory else None

    def load(self, key: str) -> Tensors | None:
        """The step's tensors; None where it wasn't finished."""
        path = self._path(key)
        if path is None or not path.exists():
            return None
        try:
            return load_file(path)
        except (SafetensorError, OSError):
            return None

    def save(self, key: str, tensors: Tensors) -> None:
        if path := self._path(key):
            atomic_write_bytes(
                path, save({name: t.detach().cpu().contiguous() for name, t in tensors.items()})
            )

    def remember(self, key: str, compute: Callable[[], Tensors]) -> Tensors:
        """What `compute` gives, or gave in a run before this one."""
        tensors = self.load(key)
        if tensors is None:
            tensors = compute()
            self.save(key, tensors)
        return tensors

    def remove(self) -> None:
        if self.directory:
            shutil.rmtree(self.directory, ignore_errors=True)


def run_directory(resume: bool | str | Path, name: Callable[[], str]) -> Path | None:
    """Where a run keeps what is finished: a folder of this name in the directory given, or (True) in the cache; None for False."""
    if resume is False:
        return None
    return (cache_dir() / "runs" if resume is True else Path(resume)) / name()


def fingerprint(model: nn.Module, *parts: Any) -> str:
    """A digest of a model's weights and of everything else that decides a run's result."""
    digest = hashlib.sha256()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        flat = tensor.detach().flatten()
        sample = flat[:: max(1, flat.numel() // 64)].double().cpu()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(sample.numpy().tobytes())
        if flat.numel():
            digest.update(str(flat.double().sum().item()).encode())
    for part in parts:
        if isinstance(part, Tensor):
            digest.update(part.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        else:
            digest.update(json.dumps(part, sort_keys=True, default=str).encode())
    return digest.hexdigest()[:24]
