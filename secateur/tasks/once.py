"""Networks that are trained here, once, and then lie in the cache."""

from __future__ import annotations

from collections.abc import Callable

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from secateur.errors import SecateurError
from secateur.utils.files import atomic_directory, cache_dir


def trained_once(
    name: str, version: int, build: Callable[[], nn.Module], train: Callable[[nn.Module], object]
) -> nn.Module:
    """The trained network, in eval mode; drawn with seed 0 and trained at the first call, then kept in the cache.

    >>> trained_once("line", 1, lambda: nn.Linear(1, 1), lambda model: None)  # doctest: +SKIP

    Two processes may do this at once; the first to finish wins.
    """
    folder = cache_dir() / f"{name}-{version}"
    file = folder / "model.safetensors"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build()
    if not file.is_file():
        train(model)
        try:
            with atomic_directory(folder) as partial:
                save_file(model.state_dict(), partial / "model.safetensors")
        except SecateurError:
            if not file.is_file():
                raise
    model.load_state_dict(load_file(file))
    return model.eval()
