"""Saves pruned models so that they load without secateur: safetensors, JSON and, where needed, one short Python file.

Four forms, the simplest that can hold the model:

- plain: a transformers model whose shapes its config can express, or a timm model that timm's arguments can; any
  `from_pretrained`, or `timm.create_model("local-dir:...")`, loads it.
- custom: a transformers model whose layers differ; `modeling_pruned.py` builds the dense model from the config and
  re-shapes it, so `from_pretrained(folder, trust_remote_code=True)` loads it.
- pipeline: a pipeline of diffusers whose parts' configs can't say the shapes; `pruned.json` does, and `secateur.load` reads it.
- module: any other module; `load_pruned.py` re-shapes a freshly built dense model and loads the weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from secateur.errors import SecateurError
from secateur.families.pipelines import Parts
from secateur.io.card import write_card
from secateur.io.module import _load_module, _save_module
from secateur.io.packed import dense_folder, is_packed, pack_folder
from secateur.io.pipelines import is_pipeline_folder, load_pipeline, save_pipeline
from secateur.io.timm import is_plain, load_plain
from secateur.io.transformers import (
    _load_transformers,
    _save_transformers,
    _transformers_class,
    load_tokenizer,
)
from secateur.utils.files import atomic_directory, atomic_write_json, check_path

if TYPE_CHECKING:
    from secateur.pruning.plan import Plan


def save_model(
    model: nn.Module,
    directory: str | Path,
    *,
    tokenizer: Any = None,
    plan: Plan | None = None,
    report: Mapping[str, Any] | None = None,
    dense_config: Any = None,
    packed: bool = False,
) -> dict[str, Any]:
    """Write a pruned model into a new or empty directory, all or nothing, in the simplest form that can hold it.

    >>> save_model(pruned.model, "out", tokenizer=tokenizer, plan=pruned.plan)  # doctest: +SKIP
    {'form': 'plain', 'load': 'AutoModelForCausalLM.from_pretrained(folder)', 'why': None}

    dense_config: the transformers config before the cut; the model's own where it is None.
    packed: zeros take a bit each; `secateur.load` reads such a folder, and `secateur.io.packed.unpack` makes it dense.

    Gives what it wrote: `form` (plain, custom, module), `load` (the line that loads it) and `why` (what the config
    can't express; None when plain). The same goes into `report.json` under `artefact`, and `README.md` is a model card.

    Raises `SecateurError` where the directory isn't empty, the disk is full, or the model holds modules that the
    dense one doesn't have.
    """
    with atomic_directory(directory) as partial:
        if isinstance(model, Parts):
            about = save_pipeline(model, partial, plan)
        elif _transformers_class(model) is not None:
            about = _save_transformers(model, partial, plan, dense_config)
        else:
            about = _save_module(model, partial, plan)
        if packed:
            about |= {"load": "secateur.load(folder)", "packed": pack_folder(partial)}
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
        if plan is not None:
            plan.save(partial)
        atomic_write_json(partial / "report.json", {**(report or {}), "artefact": about})
        write_card(partial, report or {}, about, type(model).__name__)
    return about


def load(
    path: str | Path,
    model: nn.Module | None = None,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
) -> tuple[nn.Module, Any]:
    """(model, tokenizer) of a directory that `Pruned.save` wrote, or of an `.onnx` or `.pt2` file (no tokenizer).

    >>> model, tokenizer = secateur.load("out")  # doctest: +SKIP
    >>> model, _ = secateur.load("out", model=build_the_dense_model())  # doctest: +SKIP

    model: a freshly built dense model, needed for modules that are neither transformers' nor timm's. No code of the
    directory is run: what it says was cut is done by this library's own copy of it. The model is in eval mode. Of a pipeline
    of diffusers it is the parts that can be cut; `model.pipeline` draws.

    Raises `SecateurError` where there is no model, or it is damaged.
    """
    path = Path(path).expanduser()
    if is_packed(path):
        with dense_folder(path) as folder:
            return load(folder, model, dtype=dtype, device=device)
    if path.suffix.lower() in (".onnx", ".pt2") and not path.is_dir():
        from secateur.io.exchange import load_file

        return load_file(path).to(device or "cpu", dtype), None
    if is_pipeline_folder(path):
        return load_pipeline(path, dtype).to(device or "cpu").eval(), None
    if is_plain(path):
        loaded = load_plain(path)
        loaded = loaded.to(dtype) if dtype else loaded
    elif (path / "config.json").is_file():
        loaded = _load_transformers(path, dtype)
    elif (path / "model.json").is_file():
        loaded = _load_module(path, model)
        loaded = loaded.to(dtype) if dtype else loaded
    else:
        raise SecateurError(
            "there is no model", where=str(path), fix=check_path(path, "give a directory that secateur wrote")
        )
    return loaded.to(device or "cpu").eval(), load_tokenizer(path)
