"""Shards under a model's own names: transformers stacks the experts of a folder when it loads them, and takes them apart when it saves."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from secateur.errors import SecateurError
from secateur.io.reshape import BROKEN
from secateur.io.shards import Entry, Shards, header, read, write_index, write_shard


def named(source: Shards, model: Any) -> Shards:
    """The shards by the names that the model has for what is in them; as they are where names are the same.

    >>> named(Shards("mixtral"), empty_model("mixtral")).entries["model.layers.0.mlp.experts.down_proj"].shape  # doctest: +SKIP
    (8, 4096, 14336)
    """
    own = {*model.state_dict()}
    if source.entries.keys() <= own:
        return source
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, rename_source_key
    except ImportError:  # before 5, models have the names of their files
        return source
    return Renamed(source, model, get_model_conversion_mapping(model), WeightConverter, rename_source_key)


class Renamed(Shards):
    """Entries are the model's; what several tensors of the files become is put together when it is read, as transformers does it.

    Raises SecateurError as `Shards` does; names that lead nowhere stay as they are.
    """

    def __init__(self, source: Shards, model: Any, conversions: list, converter: type, rename: Any):
        self.folder, self.nbytes, self.stored = source.folder, source.nbytes, source.stored
        self.model = model
        converters: list[Any] = [each for each in conversions if isinstance(each, converter)]
        others = [each for each in conversions if not isinstance(each, converter)]
        self.makers: dict[str, Any] = {
            pattern: each for each in converters for pattern in each.source_patterns
        }
        own = model.state_dict()
        self.parts: dict[str, list[tuple[str, str | None]]] = {}
        """Name of the first tensor that is made -> names in the files, each with the pattern that matched."""
        for name in sorted(source.entries, key=_natural):
            made, pattern = name, None
            if name not in own:
                made, pattern = rename(name, others, converters, model.base_model_prefix, own)
            made, pattern = (made, pattern) if made in own else (name, None)
            self.parts.setdefault(made, []).append((name, pattern))
        model._weight_conversions = [each for each in conversions if each.was_used()]
        self.entries: dict[str, Entry] = {}
        self.first: dict[str, str] = {}
        for made, parts in self.parts.items():
            entries = [self.stored[name] for name, _ in parts]
            empty = {
                n: torch.empty(e.shape, dtype=e.dtype, device="meta") for (n, _), e in zip(parts, entries)
            }
            for name, tensor in self._made(made, empty).items():
                size = math.prod(tensor.shape) * sum(e.nbytes for e in entries)
                nbytes = size // max(sum(math.prod(e.shape) for e in entries), 1)
                whole = parts[0][1] is None
                self.entries[name] = entries[0] if whole else Entry(entries[0].file, tuple(tensor.shape), entries[0].kind, -1, nbytes)  # fmt: skip
                self.first[name] = made

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """These tensors by the model's names, on the CPU, in the dtype of the files."""
        wanted = list(names)
        found: dict[str, Tensor] = {}
        for made in dict.fromkeys(self.first[name] for name in wanted):
            by_file: dict[Path, list[str]] = {}
            for name, _ in self.parts[made]:
                by_file.setdefault(self.stored[name].file, []).append(name)
            stored = {n: t for file, own in by_file.items() for n, t in read(file, own).items()}
            found |= self._made(made, stored)
        return {name: found[name] for name in wanted}

    def _made(self, made: str, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
        parts = self.parts[made]
        if parts[0][1] is None:
            return {made: stored[parts[0][0]]}
        maker = copy.deepcopy(self.makers[parts[0][1]])
        for name, pattern in parts:
            maker.add_tensor(made, name, pattern, stored[name])
        try:
            found = maker.convert(made, model=self.model, config=self.model.config)
        except BROKEN as error:
            what = f"{made} can't be put together of {len(parts)} tensors of the files ({error})"
            raise SecateurError(what, where=str(self.folder), fix="prune it without --stream") from error
        return {name: value[0] if isinstance(value, list) else value for name, value in found.items()}

    def forget_put_back(self, folder: Path) -> None:
        """Remove shards that a run which was killed as it ended had put back: their blocks are made again."""
        gone = self.stored.keys() - self.entries.keys()
        for file in folder.glob("model-*.safetensors"):
            if header(file).keys() & gone:
                file.unlink()

    def put_back(self, folder: Path) -> None:
        """The shards of a folder get the names that plain transformers saves, one file after the other."""
        from transformers.core_model_loading import revert_weight_conversion

        for file in sorted(folder.glob("model-*.safetensors")):
            write_shard(file, revert_weight_conversion(self.model, read(file)))
        write_index(folder)


def _natural(name: str) -> list[tuple[int, int | str]]:
    """Numbers in order: expert 10 behind expert 9.

    >>> sorted(["e.10", "e.9"], key=_natural)
    ['e.9', 'e.10']
    """
    return [(0, int(part)) if part.isdigit() else (1, part) for part in name.split(".")]
