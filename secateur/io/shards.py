"""Safetensors shards of a model folder, read and written a few tensors at a time."""

from __future__ import annotations

import contextlib
import json
import os
import uuid
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from secateur.errors import SecateurError, require
from secateur.utils.files import atomic_write_json, explain_oserror

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
FIX = "fetch or save the model again"
CHUNK = 1 << 22
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies, and what it is."""

    file: Path
    shape: tuple[int, ...]
    kind: str
    start: int
    nbytes: int

    @property
    def dtype(self) -> torch.dtype | None:
        """The dtype of floats; None for others."""
        return FLOATS.get(self.kind)


class Shards:
    """The tensors of a folder that `save_pretrained` wrote, by name; nothing is read before `read`.

    >>> shards = Shards("model")  # doctest: +SKIP
    >>> shards.read(["model.norm.weight"])["model.norm.weight"].shape  # doctest: +SKIP
    torch.Size([2048])

    Raises SecateurError for a folder without safetensors, and for shards that are missing, cut off, or not those of the index.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder).expanduser()
        self.entries: dict[str, Entry] = {}
        index = self.folder / INDEX
        if index.is_file():
            named = self._index(index)
            files = [self.folder / name for name in sorted(set(named.values()))]
        else:
            files, named = [self.folder / SINGLE], {}
            fix = "convert it with save_pretrained (safetensors)"
            require(files[0].is_file(), f"holds neither {SINGLE} nor {INDEX}", where=str(folder), fix=fix)
        for file in files:
            self.entries |= header(file)
        for name, shard in named.items():
            lies = name in self.entries and self.entries[name].file.name == shard
            require(lies, f"{shard} doesn't hold {name}, as the index says", where=str(folder), fix=FIX)
        self.nbytes = sum(entry.nbytes for entry in self.entries.values())
        self.stored = self.entries
        """What lies in the files, by their names."""

    def _index(self, path: Path) -> dict[str, str]:
        try:
            named = json.loads(path.read_text("utf-8"))["weight_map"]
        except (ValueError, KeyError, TypeError) as error:
            raise SecateurError(f"it can't be read ({error})", where=str(path), fix=FIX) from error
        right = isinstance(named, dict) and all(
            isinstance(file, str) and Path(file).name == file for file in named.values()
        )
        require(right, "it doesn't map tensors to files beside it", where=str(path), fix=FIX)
        return named

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """These tensors, on the CPU, in the dtype of the file."""
        by_file: dict[Path, list[str]] = {}
        for name in names:
            by_file.setdefault(self.entries[name].file, []).append(name)
        return {name: tensor for file, own in by_file.items() for name, tensor in read(file, own).items()}


def read(file: Path, names: Iterable[str] | None = None) -> dict[str, Tensor]:
    """Tensors of one file, copied out of it: no page of it stays mapped."""
    try:
        with safe_open(file, "pt") as opened:
            wanted = opened.keys() if names is None else names
            return {name: opened.get_tensor(name).clone() for name in wanted}
    except (SafetensorError, OSError) as error:
        raise SecateurError(f"it can't be read ({error})", where=str(file), fix=FIX) from error


def header(file: Path) -> dict[str, Entry]:
    """What a file holds, read off its header; the file must be as long as the header says."""
    where = str(file)
    require(file.is_file(), "the shard is missing", where=where, fix=FIX)
    size = file.stat().st_size
    try:
        with open(file, "rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            require(8 + length <= size, "the shard is cut off", where=where, fix=FIX)
            found: dict[str, Any] = json.loads(opened.read(length))
    except ValueError as error:
        raise SecateurError(f"it isn't a safetensors file ({error})", where=where, fix=FIX) from error
    found.pop("__metadata__", None)
    end = 8 + length + max((tensor["data_offsets"][1] for tensor in found.values()), default=0)
    require(
        end == size,
        f"the shard is {'cut off' if size < end else 'too long'} ({size:,} bytes of {end:,})",
        where=where,
        fix=FIX,
    )
    begin = 8 + length
    return {
        name: Entry(file, tuple(t["shape"]), t["dtype"], begin + t["data_offsets"][0], t["data_offsets"][1] - t["data_offsets"][0])
        for name, t in found.items()
    }  # fmt: skip


def shard_name(number: int, count: int) -> str:
    """
    >>> shard_name(0, 17)
    'model-00001-of-00017.safetensors'
    """
    return f"model-{number + 1:05}-of-{count:05}.safetensors"


def write_shard(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """One shard, beside and renamed. Raises SecateurError where the disk is full."""
    with _beside(file) as partial:
        save_file({n: t.contiguous() for n, t in tensors.items()}, partial, metadata={"format": "pt"})


def copy_shard(file: Path, entries: Mapping[str, Entry]) -> None:
    """One shard of tensors that lie in other files, byte by byte, in the memory of none."""
    head: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, entry in entries.items():
        head[name] = {
            "dtype": entry.kind,
            "shape": list(entry.shape),
            "data_offsets": [end, end + entry.nbytes],
        }
        end += entry.nbytes
    text = json.dumps(head).encode()
    text += b" " * (-len(text) % 8)
    with _beside(file) as partial, open(partial, "wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for entry in entries.values():
            with open(entry.file, "rb") as source:
                source.seek(entry.start)
                left = entry.nbytes
                while left:
                    chunk = source.read(min(left, CHUNK))
                    require(chunk, "the shard is cut off", where=str(entry.file), fix=FIX)
                    left -= out.write(chunk)


@contextlib.contextmanager
def _beside(file: Path) -> Iterator[Path]:
    """A name beside a file, which takes its place when all went well."""
    partial = file.with_name(f".{file.name}.{uuid.uuid4().hex[:8]}.partial")
    with explain_oserror(file):
        try:
            yield partial
            os.replace(partial, file)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise


def write_index(folder: Path) -> None:
    """The index of all shards in a folder."""
    entries = {n: e for file in sorted(folder.glob("model-*.safetensors")) for n, e in header(file).items()}
    total = sum(entry.nbytes for entry in entries.values())
    named = {name: entry.file.name for name, entry in sorted(entries.items())}
    atomic_write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": named})
