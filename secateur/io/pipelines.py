"""Pipelines of diffusers: written so that plain diffusers loads them where their configs can say it, and read again."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from secateur.errors import SecateurError, require
from secateur.families.pipelines import Parts
from secateur.io.reshape import BROKEN, SHARD_BYTES, _build, _tensors, compare, kept_blocks, reshape
from secateur.io.transformers import quiet
from secateur.io.trusted import CutEntry, check_config
from secateur.utils.files import atomic_write_json
from secateur.utils.schema import parse, read_object

if TYPE_CHECKING:
    from secateur.pruning.plan import Plan

FORMAT = "secateur-pipeline"
PLAIN, LOADER = "DiffusionPipeline.from_pretrained(folder)", "secateur.load(folder)"
INDEX, PRUNED, TABLES = "model_index.json", "pruned.json", "pruned.safetensors"
OURS = "pruned_"
"""How the names of weights begin that only this library can load."""
AGAIN = "save the pipeline again"


def is_pipeline_folder(path: Path) -> bool:
    """Whether a folder holds a pipeline of diffusers."""
    return (path / INDEX).is_file()


def save_pipeline(parts: Parts, folder: Path, plan: Plan | None) -> dict[str, Any]:
    """Writes the whole pipeline; what a part's config can't say of its shapes goes into `pruned.json`."""
    blocks = kept_blocks(plan, parts)
    cuts: dict[str, Any] = {}
    tables: dict[str, Tensor] = {}
    for name, part in parts.named_children():
        own = {p.removeprefix(f"{name}."): kept for p, kept in blocks.items() if p.startswith(f"{name}.")}
        cut, buffers = _fit(part, own)
        if any(cut.values()) or buffers:
            cuts[name] = cut
            tables |= {f"{name}.{key}": value for key, value in buffers.items()}
    with _quiet():
        parts.pipeline.save_pretrained(folder, safe_serialization=True, max_shard_size=SHARD_BYTES)
    if not cuts:
        return {"form": "plain", "load": PLAIN, "why": None}
    for name in cuts:  # under another name, since diffusers would fill up what it misses with random numbers
        for file in sorted((folder / name).glob("*.safetensors*")):
            file.rename(file.with_name(f"{OURS}{file.name}"))
    atomic_write_json(folder / PRUNED, {"format": FORMAT, "parts": cuts})
    save_file(tables, folder / TABLES)
    name, cut = next(iter(cuts.items()))
    key = next(
        (
            key
            for kind in ("shapes", "blocks", "attributes", "identity", "absent", "constants", "novices")
            for key in cut[kind]
        ),
        None,
    )
    key = key or next(iter(tables)).removeprefix(f"{name}.")
    return {"form": "pipeline", "load": LOADER, "why": f"no field of {name}'s config says what {key} is"}


def _fit(part: Any, blocks: Mapping[str, Sequence[int]]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What differs between a part and the module that its config builds; fields of the config that make it less are set.

    A field is tried where its value is a size that something had before the cut. Also the buffers that are in no file of the
    part's, and that the config gives other values.
    """
    values = dict(_fields(part.config))
    cut = compare(part, _built(part, values), blocks)
    sizes = set(_changed(_built(part, values), cut))
    for field, value in values.items():
        for old, new in sizes:
            if type(value) is int and value == old and any(cut.values()):
                trial = {**values, field: new}
                try:
                    left = compare(part, _built(part, trial), {})
                except (SecateurError, *BROKEN):
                    continue
                if _much(left) < _much(cut):
                    cut, values = left, trial
                    break
    if changed := {k: v for k, v in values.items() if v != dict(_fields(part.config)).get(k)}:
        if hasattr(part, "register_to_config"):
            part.register_to_config(**changed)
        else:
            for key, value in changed.items():
                setattr(part.config, key, value)
    return cut, _tables(part, values, cut) if changed or any(cut.values()) else {}


def _tables(part: nn.Module, values: Mapping[str, Any], cut: Mapping[str, Any]) -> dict[str, Tensor]:
    """Buffers that no file of the part's holds and that aren't what its config computes."""
    kept = part.state_dict()
    own = {name: buffer for name, buffer in part.named_buffers() if name not in kept}
    if not own:
        return {}
    with torch.random.fork_rng(devices=[]):
        there = dict(_make(part, values).named_buffers())
    return {
        name: buffer.detach().cpu().contiguous().clone()
        for name, buffer in own.items()
        if name in cut["shapes"] or name not in there or not _equal(there[name], buffer.cpu())
    }


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a.to(b.dtype), b)


def _much(cut: Mapping[str, Any]) -> int:
    """How many things a table changes."""
    attributes = sum(map(len, cut["attributes"].values()))
    tables = ("blocks", "identity", "absent", "constants", "novices", "shapes")
    return sum(len(cut[table]) for table in tables) + attributes


def _changed(built: nn.Module, cut: Mapping[str, Any]) -> Iterator[tuple[int, int]]:
    """(before, now) of the numbers of blocks, the sizes of axes, and attributes."""
    was = _tensors(built)
    for path, kept in cut["blocks"].items():
        yield len(built.get_submodule(path)._modules), len(kept)
    for name, shape in cut["shapes"].items():
        if shape is not None and name in was:
            yield from ((a, b) for a, b in zip(was[name].shape, shape) if a != b)
    for path, attributes in cut["attributes"].items():
        for key, now in attributes.items():
            old = (
                getattr(built.get_submodule(path), key, None) if path in dict(built.named_modules()) else None
            )
            if type(old) is int and type(now) is int:
                yield old, now


def _fields(config: Any) -> Iterator[tuple[str, Any]]:
    """The fields of a config of diffusers or transformers."""
    items = config.to_dict() if hasattr(config, "to_dict") else dict(config)
    return ((key, value) for key, value in items.items() if not key.startswith("_"))


def _built(part: Any, values: Mapping[str, Any]) -> nn.Module:
    """A module of the part's class, as these fields say, without weights."""
    return _build(lambda: _make(part, values))


def _make(part: Any, values: Mapping[str, Any]) -> nn.Module:
    cls: Any = type(part)
    if hasattr(part.config, "to_dict"):
        return cls(type(part.config).from_dict({**part.config.to_dict(), **values}))
    return cls.from_config(dict(values))


def load_pipeline(path: Path, dtype: torch.dtype | None = None) -> Parts:
    """The pipeline of a folder that `save_pipeline` or diffusers wrote, as `Parts`. No code of the folder is run, no pickle read.

    Raises `SecateurError` where diffusers isn't installed, the folder names other classes than the libraries', or is damaged.
    """
    try:
        import diffusers
    except ImportError as error:
        raise SecateurError(
            "it is a pipeline of diffusers, which isn't installed",
            where=str(path),
            fix="pip install 'secateur[diffusers]'",
        ) from error
    index = read_object(path / INDEX, fix=AGAIN)
    where = str(path / INDEX)
    _class(diffusers, index.get("_class_name"), diffusers.DiffusionPipeline, where)
    for name, entry in index.items():
        if isinstance(entry, list):
            right = len(entry) == 2 and all(
                e is None or (isinstance(e, str) and e.isidentifier()) for e in entry
            )
            require(right and name.isidentifier(), f"{name!r} is {entry}", where=where, fix=AGAIN)
            known = (None, "diffusers", "transformers")
            own = entry[0] in known or hasattr(diffusers.pipelines, str(entry[0]))
            require(own, f"{name} is of {entry[0]!r}", where=where, fix="only diffusers and transformers")
            if (config := path / name / "config.json").is_file():
                check_config(read_object(config, fix=AGAIN), str(config))
    parts: dict[str, nn.Module] = {}
    if (path / PRUNED).is_file():
        about = read_object(path / PRUNED, fix=AGAIN)
        right = about.get("format") == FORMAT and isinstance(about.get("parts"), dict)
        require(right, "it isn't what secateur wrote", where=str(path / PRUNED), fix=AGAIN)
        for name, cut in about["parts"].items():
            parse(CutEntry, cut, f"{path / PRUNED}, {name}", fix=AGAIN)
            require(isinstance(index.get(name), list), f"no part is called {name!r}", where=where, fix=AGAIN)
            tables = load_file(path / TABLES)
            kept = {
                k.removeprefix(f"{name}."): v.clone() for k, v in tables.items() if k.startswith(f"{name}.")
            }
            parts[name] = _part(path / name, index[name], cut, kept)
    try:
        with _quiet():
            pipeline = diffusers.DiffusionPipeline.from_pretrained(
                str(path), use_safetensors=True, local_files_only=True, trust_remote_code=False, **parts
            )
    except (*BROKEN, OSError, ImportError) as error:
        raise SecateurError(
            f"it can't be loaded ({(str(error).strip() or type(error).__name__).splitlines()[0]})",
            where=str(path),
            fix=AGAIN,
        ) from error
    loaded = Parts(pipeline)
    return loaded.to(dtype) if dtype else loaded


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars of the libraries."""
    from diffusers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        with quiet():
            yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _class(library: Any, name: Any, base: Any, where: str) -> Any:
    cls = getattr(library, name, None) if isinstance(name, str) and name.isidentifier() else None
    known = isinstance(cls, type) and issubclass(cls, base)
    require(known, f"{library.__name__} has no {base.__name__} {name!r}", where=where, fix="update it")
    return cls


def _part(folder: Path, entry: Sequence[str], cut: dict[str, Any], tables: dict[str, Tensor]) -> nn.Module:
    """A part that its config can't build: the dense one, re-shaped, with the weights of its files."""
    import diffusers
    import transformers
    from safetensors import SafetensorError

    try:
        if entry[0] == "transformers":
            cls = _class(transformers, entry[1], transformers.PreTrainedModel, str(folder))
            config = cls.config_class.from_dict(read_object(folder / "config.json", fix=AGAIN))
            part = cls(config)
        else:
            cls = _class(diffusers, entry[1], diffusers.ModelMixin, str(folder))
            part = cls.from_config(read_object(folder / "config.json", fix=AGAIN))
        reshape(part, copy.deepcopy(cut))
        state: dict[str, Any] = {}
        for file in sorted(folder.glob(f"{OURS}*.safetensors")):
            state |= {name: tensor.clone() for name, tensor in load_file(file).items()}
        if hasattr(part, "tie_weights"):
            part.tie_weights()
        missing, extra = part.load_state_dict(state, strict=False, assign=True)
        known = {*tables, *(getattr(part, "_tied_weights_keys", None) or ())}
        for name, value in tables.items():
            owner, _, leaf = name.rpartition(".")
            part.get_submodule(owner).register_buffer(leaf, value, persistent=False)
        if missing := [name for name in missing if name not in known] or extra:
            raise RuntimeError(f"{missing[0]} is missing, or too much")
        if hasattr(part, "tie_weights"):
            part.tie_weights()
    except (*BROKEN, OSError, SafetensorError) as error:
        raise SecateurError(
            f"it can't be loaded ({(str(error).strip() or type(error).__name__).splitlines()[0]})",
            where=str(folder),
            fix=AGAIN,
        ) from error
    return part.eval()
