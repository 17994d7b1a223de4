"""Zeros that cost no disk: tensors as a bit for each entry and the entries that aren't zero.

`NAME` with many zeros becomes `NAME.bits`, uint8, the mask of entries in row-major order, eight to a byte, highest bit first
(numpy.packbits), and `NAME.values`, the entries that stay in the same order. Zeros are those of all bits: -0.0 is kept. Tensors
that wouldn't get smaller stay as they are. `packed.json` lists shapes. The files are `packed*.safetensors` in place of
`model*.safetensors`, so that nothing else takes them for a model.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from secateur.errors import SecateurError
from secateur.utils.files import atomic_directory, atomic_write_json, check_path
from secateur.utils.schema import read_object

NAME, FORMAT = "packed.json", "secateur-packed"
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
FIX = "save the model again"


def is_packed(path: str | Path) -> bool:
    """Whether a folder's zeros are packed."""
    return (Path(path) / NAME).is_file()


def pack_folder(folder: Path) -> dict[str, Any]:
    """Pack the weights of a folder that was just written, in place; gives bytes before and after."""
    before, shapes = 0, {}
    for file in sorted(folder.glob("model*.safetensors")):
        packed: dict[str, Tensor] = {}
        with safe_open(file, framework="pt") as tensors:
            metadata = tensors.metadata() or {}
            for name in tensors.keys():  # noqa: SIM118
                tensor = tensors.get_tensor(name)
                parts = pack(tensor)
                if parts is None:
                    packed[name] = tensor
                else:
                    packed[f"{name}.bits"], packed[f"{name}.values"] = parts
                    shapes[name] = list(tensor.shape)
        before += file.stat().st_size
        save_file(packed, folder / file.name.replace("model", "packed", 1), metadata)
        file.unlink()
    after = sum(file.stat().st_size for file in folder.glob("packed*.safetensors"))
    atomic_write_json(folder / NAME, {"format": FORMAT, "version": 1, "shapes": shapes})
    return {"bytes": after, "dense_bytes": before}


def pack(tensor: Tensor) -> tuple[Tensor, Tensor] | None:
    """(bits, values) of a tensor; None where they would take as much as it.

    >>> pack(torch.tensor([[0.0, 2.0, 0.0, 0.0, 0.0, 0.0, 0.0, 3.0]]))
    (tensor([65], dtype=torch.uint8), tensor([2., 3.]))
    """
    flat = tensor.contiguous().reshape(-1)
    if flat.element_size() not in INTEGERS or not flat.numel():
        return None
    stay = flat.view(INTEGERS[flat.element_size()]) != 0
    bits = np.packbits(stay.numpy())
    if bits.nbytes + int(stay.sum()) * flat.element_size() >= flat.numel() * flat.element_size():
        return None
    return torch.from_numpy(bits), flat[stay]


def unpacked(bits: Tensor, values: Tensor, shape: list[int]) -> Tensor:
    """The tensor of `pack`, to the bit. Raises ValueError where the parts don't fit each other."""
    count = int(np.prod(shape))
    if bits.dtype != torch.uint8 or bits.numel() != (count + 7) // 8:
        raise ValueError(f"{bits.numel()} bytes of bits for {count} entries")
    stay = torch.from_numpy(np.unpackbits(bits.numpy(), count=count).astype(bool))
    if int(stay.sum()) != values.numel():
        raise ValueError(f"{int(stay.sum())} bits and {values.numel()} values")
    flat = torch.zeros(count, dtype=values.dtype)
    flat[stay] = values
    return flat.reshape(shape)


def unpack(folder: str | Path, out: str | Path) -> None:
    """Write the dense folder of a packed one: a new folder, all or nothing, that plain libraries load.

    >>> unpack("packed", "dense")  # doctest: +SKIP

    Raises `SecateurError` where the folder isn't packed or is damaged, where `out` is in use, and for a full disk.
    """
    folder = Path(folder).expanduser()
    if not is_packed(folder):
        raise SecateurError("it isn't packed", where=str(folder), fix=check_path(folder, "give a folder with a packed.json"))  # fmt: skip
    with atomic_directory(Path(out).expanduser()) as partial:
        _unpack_into(folder, partial)


def _unpack_into(folder: Path, out: Path) -> None:
    document = read_object(folder / NAME, fix=FIX)
    shapes = document.get("shapes")
    if document.get("format") != FORMAT or not isinstance(shapes, dict):
        raise SecateurError("it isn't a packed model", where=str(folder / NAME), fix=FIX)
    try:
        for file in sorted(folder.iterdir()):
            if file.name == NAME or not file.match("packed*.safetensors"):
                if file.is_file() and file.name != NAME:
                    shutil.copyfile(file, out / file.name)
                elif file.is_dir():
                    shutil.copytree(file, out / file.name)
                continue
            dense: dict[str, Tensor] = {}
            with safe_open(file, framework="pt") as tensors:
                metadata, names = tensors.metadata(), set(tensors.keys())
                for name in names:
                    stem, _, part = name.rpartition(".")
                    if stem in shapes and part == "bits":
                        values = tensors.get_tensor(f"{stem}.values")
                        dense[stem] = unpacked(
                            tensors.get_tensor(name), values, [int(n) for n in shapes[stem]]
                        )
                    elif not (stem in shapes and part == "values"):
                        dense[name] = tensors.get_tensor(name)
            save_file(dense, out / file.name.replace("packed", "model", 1), metadata)
    except (ValueError, TypeError, KeyError, SafetensorError, json.JSONDecodeError) as error:
        raise SecateurError(f"it is damaged ({error})", where=str(folder), fix=FIX) from error


@contextmanager
def dense_folder(folder: Path) -> Iterator[Path]:
    """A dense copy of a packed folder that is there while it is read; any other folder itself."""
    if not is_packed(folder):
        yield folder
        return
    with tempfile.TemporaryDirectory() as scratch:
        _unpack_into(folder, Path(scratch))
        yield Path(scratch)
