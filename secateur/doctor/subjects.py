"""The user's model as a tiny one of its class: from its config, with random weights. Its own code is never run, and no network used."""

from __future__ import annotations

import importlib
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn

from secateur.doctor.checks import Subject
from secateur.errors import SecateurError
from secateur.utils.files import check_path

SMALL_ENOUGH = 5_000_000
"""Parameters of a module without a config that is checked as it is."""


class Unfit(Exception):
    """Why no tiny model of the class can be made: a row of the report, not a mistake of the user's."""


def own_subject(model: Any) -> Subject:
    """A tiny model of the class of `model`: a name, a folder, a module or a config.

    Raises `Unfit` with the reason where there can't be one, and `SecateurError` for a name that nobody knows.
    """
    from secateur.tasks import tiny

    found = _find(model) if isinstance(model, str | Path) else model
    if isinstance(found, nn.Module) and not hasattr(found, "save_pretrained"):
        return _as_it_is(found)
    if isinstance(found, tuple):
        cls, config = found
    elif isinstance(found, nn.Module):
        cls, config = _class_of(found)
    elif hasattr(found, "to_dict") and hasattr(found, "model_type"):
        cls, config = _class_for(found), found
    else:
        raise SecateurError(
            f"{type(found).__name__} isn't a model",
            where="doctor",
            fix="give a name, a folder, a module or a config",
        )
    try:
        small = cls(tiny.shrink(config))
        # double precision tells rounding from errors; some kernels don't know it, and padding gives NaN in eager attention
        for dtype in (torch.float64, torch.float32):
            small = tiny.fill(small, dtype=dtype)
            inputs, why = _inputs(small)
            with suppress(*([RuntimeError] if dtype == torch.float64 else [])), torch.no_grad():
                out = small(**inputs)
                if bool(torch.isfinite(out[0]).all()):
                    break
    except Exception as error:  # a config made small can break its model in any way
        told = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise Unfit(f"{cls.__name__} can't be made small automatically ({told})") from error
    return Subject(cls.__name__, small, inputs, own=True, without_tokens=why)


def _inputs(model: Any) -> tuple[Any, str | None]:
    """Example inputs, and why no visual tokens can be dropped: None where they can, "" where there are none."""
    from secateur.tasks import tiny

    if not tiny.sees(model):
        return tiny.inputs_for(model), ""
    try:
        return tiny.inputs_for(model), None
    except SecateurError as error:
        return tiny.text_for(model), str(error)


def _as_it_is(model: nn.Module) -> Subject:
    import copy

    from secateur.utils.inputs import default_inputs, map_tensors

    name, size = type(model).__name__, sum(p.numel() for p in model.parameters())
    if size > SMALL_ENOUGH:
        raise Unfit(
            f"{name} has no config to make a tiny one from, and {size:,} parameters are too many to check"
        )
    model = copy.deepcopy(model).cpu().double().eval()
    try:
        inputs = default_inputs(model)
    except SecateurError as error:
        raise Unfit(f"{name}: {error.what}") from error
    return Subject(
        name,
        model,
        map_tensors(inputs, lambda t: t.double() if t.is_floating_point() else t),
        own=True,
        without_tokens="",
    )


def _class_of(model: Any) -> tuple[Any, Any]:
    from secateur.io.transformers import _dense_config, _transformers_class

    return _transformers_class(model) or type(model), _dense_config(model.config)


def _class_for(config: Any) -> Any:
    """The class that its config names, or the first task that has one for it."""
    import transformers

    for name in getattr(config, "architectures", None) or ():
        if hasattr(transformers, name):
            return getattr(transformers, name)
    for task in ("ImageTextToText", "CausalLM", "Seq2SeqLM", "ImageClassification", "MaskedLM"):
        mapping = getattr(transformers, f"AutoModelFor{task}")._model_mapping
        if type(config) in mapping:
            found = mapping[type(config)]
            return found[0] if isinstance(found, tuple) else found
    raise Unfit(f"transformers has no class for {type(config).__name__}")


def _find(name: str | Path) -> Any:
    """A (class, config), or a module, of a name or a folder."""
    from secateur.tasks import models
    from secateur.tasks.scenes.models import VARIANTS, build

    text, path = str(name), Path(name).expanduser()
    if text.partition(":")[0] == "scenes" and not path.is_dir():
        variant = text.split(":")[1] if ":" in text else VARIANTS[0]
        return _class_of(build(variant))
    if text == "smollm2":
        path = models.smollm2_cached()
        if not (path / "config.json").is_file():
            raise Unfit(
                "smollm2 isn't in the cache, and this uses no network; `secateur inspect smollm2` fetches it"
            )
    elif text in models.NAMES:
        try:
            return models.load_model(text)[0]
        except SecateurError as error:
            raise Unfit(str(error)) from error
    elif path.is_file():
        raise Unfit(f"{text} is a file: it has no config to make a tiny model from")
    elif not path.is_dir():
        path = _on_this_machine(text)
    if (path / "config.json").is_file():
        return _from_folder(path)
    from secateur.io.artefact import load

    try:
        return load(path)[0]
    except SecateurError as error:
        if not (path / "model.json").is_file():
            raise
        raise Unfit(str(error)) from error


def _on_this_machine(name: str) -> Path:
    """The folder in the cache of a model that the hub gave before."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(name, "config.json", local_files_only=True)).parent
    except (HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise SecateurError(
            "no folder has this name, and it isn't a model that was loaded on this machine before",
            where=name,
            fix=check_path(name, "give a model folder; this command uses no network"),
        ) from error


def _from_folder(path: Path) -> tuple[Any, Any]:
    import transformers

    from secateur.io.transformers import _dense_config, _trusted_classes
    from secateur.io.trusted import check_folder
    from secateur.utils.schema import read_object

    check_folder(path)
    document = read_object(path / "config.json", fix="save the model again")
    if "pruned" in document:
        _, config = _trusted_classes(document, path)
        module, _, name = document["pruned"]["class"].partition(":")
        return getattr(importlib.import_module(module), name), _dense_config(config.from_dict(document))
    names = [n for n in document.get("architectures") or () if hasattr(transformers, n)]
    if names:
        cls = getattr(transformers, names[0])
        return cls, cls.config_class.from_dict(document)
    if document.get("auto_map") or document.get("model_type") not in transformers.CONFIG_MAPPING:
        raise Unfit(
            f"{(document.get('architectures') or ['its class'])[0]} isn't a class of transformers {transformers.__version__},"
            " and code that comes with a folder is not run"
        )
    config = transformers.CONFIG_MAPPING[document["model_type"]].from_dict(document)
    return _class_for(config), config
