"""A plan: what is kept, as data. It can be read, edited, compared, and applied again to a fresh model.

On disk a plan is two files: `plan.json` (what stays of every group, as ranges a person can edit) and
`plan.safetensors` (masks packed to bits, and tensors that a repair changed).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save
from torch import Tensor

from secateur.pruning.document import (
    FORMAT,
    check_mask,
    from_ranges,
    kept_units,
    read_document,
    to_ranges,
    undamaged,
)
from secateur.utils.files import atomic_write_bytes, atomic_write_text
from secateur.utils.screen import counted, fit

DENSE_NOTE = "same size and speed without sparse kernels: the zeros are stored in dense tensors"

__all__ = ["Masks", "Plan", "diff", "from_ranges", "pack", "to_ranges", "unpack"]


class Masks(MutableMapping[str, Tensor]):
    """Bool masks by name, held as bits: a 32nd of the memory of float32 weights."""

    def __init__(self, masks: Mapping[str, Tensor] | None = None):
        self._bits: dict[str, tuple[Tensor, tuple[int, ...]]] = {}
        self.update(masks or {})

    def __getitem__(self, name: str) -> Tensor:
        bits, shape = self._bits[name]
        return unpack(bits, shape)

    def __setitem__(self, name: str, mask: Tensor) -> None:
        self._bits[name] = (pack(mask), tuple(mask.shape))

    def __delitem__(self, name: str) -> None:
        del self._bits[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._bits)

    def __len__(self) -> int:
        return len(self._bits)


@dataclass(repr=False)
class Plan:
    """What a method decided.

    `keep` holds the kept unit indices per group, `masks` the kept weights per tensor (True stays), `values` the
    tensors, at their dense shape, that a repair replaced. `beside` holds the positions of the
    blocks that share a list with a group's and aren't in it. `inputs` describes the example inputs the groups were traced
    with; `notes` is free text by key. `source` says where a method that isn't this library's came from; nothing reads it.
    """

    method: str
    target: str
    seed: int = 0
    hyperparameters: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    inputs: Any = None
    keep: dict[str, Tensor] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    kinds: dict[str, str] = field(default_factory=dict)
    beside: dict[str, list[int]] = field(default_factory=dict)
    masks: MutableMapping[str, Tensor] = field(default_factory=Masks)
    values: dict[str, Tensor] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    source: str = ""

    def __post_init__(self) -> None:
        if not isinstance(self.masks, Masks):
            self.masks = Masks(self.masks)
        # as JSON gives them back, so that a loaded plan equals the one that was saved
        for name in ("hyperparameters", "options", "inputs", "notes"):
            setattr(self, name, json.loads(json.dumps(getattr(self, name))))

    def __repr__(self) -> str:
        lines = [f"Plan of {self.method} for {self.target}, seed {self.seed}"]
        for kind in dict.fromkeys(self.kinds.values()):
            names = [name for name in self.keep if self.kinds.get(name) == kind]
            kept, size = sum(len(self.keep[n]) for n in names), sum(self.sizes[n] for n in names)
            lines.append(f"  {kind}: {kept:,} of {size:,} stay, in {counted(len(names), 'group')}")
        if self.masks:
            kept, size = (
                sum(int(m.sum()) for m in self.masks.values()),
                sum(m.numel() for m in self.masks.values()),
            )
            lines.append(f"  weights: {kept:,} of {size:,} stay, in {len(self.masks)} tensors")
        if self.values:
            lines.append(f"  {counted(len(self.values), 'repaired tensor')}")
        return fit([*lines, *(f"  {name}: {text}" for name, text in self.notes.items())])

    @property
    def structured(self) -> bool:
        return bool(self.keep)

    @property
    def tokens(self) -> Tensor | None:
        """The tokens that stay where the vocabulary is cut, by their old ids; None where it is whole."""
        return next((units for name, units in self.keep.items() if self.kinds[name] == "vocabulary"), None)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Plan):
            return NotImplemented
        plain = (
            "method",
            "target",
            "seed",
            "hyperparameters",
            "options",
            "inputs",
            "sizes",
            "kinds",
            "beside",
            "notes",
            "source",
        )
        return all(getattr(self, name) == getattr(other, name) for name in plain) and all(
            _same(getattr(self, name), getattr(other, name)) for name in ("keep", "masks", "values")
        )

    def save(self, directory: str | Path) -> None:
        """Write `plan.json` and `plan.safetensors` into an existing directory."""
        directory = Path(directory)
        tensors = {f"mask/{name}": pack(mask) for name, mask in self.masks.items()}
        tensors |= {f"value/{name}": value.detach().cpu().contiguous() for name, value in self.values.items()}
        document = {
            "format": FORMAT,
            "version": 1,
            "method": self.method,
            "target": self.target,
            "seed": self.seed,
            "hyperparameters": self.hyperparameters,
            "options": self.options,
            "inputs": self.inputs,
            "groups": {
                name: {
                    "kind": self.kinds.get(name, ""),
                    "size": self.sizes[name],
                    "keep": to_ranges(units.tolist()),
                    **({"beside": to_ranges(self.beside[name])} if name in self.beside else {}),
                }
                for name, units in self.keep.items()
            },
            "masks": {
                name: {"shape": list(mask.shape), "kept": int(mask.sum())}
                for name, mask in self.masks.items()
            },
            "notes": self.notes,
            **({"source": self.source} if self.source else {}),
        }
        if tensors:
            atomic_write_bytes(directory / "plan.safetensors", save(tensors))
        atomic_write_text(directory / "plan.json", json.dumps(document, indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """The plan in a directory, or of a `plan.json`.

        Raises `SecateurError` when it is missing, damaged, or an edit made it impossible.
        """
        path, document = read_document(path)
        with undamaged(path):
            units = kept_units(document, path)
            groups = document["groups"]
            tensors: dict[str, Tensor] = {}
            if (beside := path.with_name("plan.safetensors")).exists():
                tensors = load_file(beside)
            masks = Masks()
            for name, entry in document["masks"].items():
                bits = tensors[f"mask/{name}"]
                check_mask(name, bits, math.prod(entry["shape"]))
                masks[name] = unpack(bits, entry["shape"])
                if (kept := int(masks[name].sum())) != entry["kept"]:
                    raise ValueError(f"the mask of {name} keeps {kept}, not {entry['kept']}")
            return cls(
                method=document["method"],
                target=document["target"],
                seed=document["seed"],
                hyperparameters=document["hyperparameters"],
                options=document["options"],
                inputs=document["inputs"],
                keep={name: torch.tensor(kept, dtype=torch.int64) for name, kept in units.items()},
                sizes={name: group["size"] for name, group in groups.items()},
                kinds={name: group["kind"] for name, group in groups.items()},
                beside={
                    name: from_ranges(group["beside"], where=f"{path}, group {name}")
                    for name, group in groups.items()
                    if "beside" in group
                },
                masks=masks,
                values={n.removeprefix("value/"): t for n, t in tensors.items() if n.startswith("value/")},
                notes=document["notes"],
                source=document.get("source", ""),
            )

    def summary(self) -> list[dict[str, Any]]:
        """One row per group or masked tensor: name, kind, size, kept."""
        rows = [
            {"name": n, "kind": self.kinds.get(n, ""), "size": self.sizes[n], "kept": len(units)}
            for n, units in self.keep.items()
        ]
        rows += [
            {"name": n, "kind": "weights", "size": mask.numel(), "kept": int(mask.sum())}
            for n, mask in self.masks.items()
        ]
        return rows


def diff(first: Plan, second: Plan) -> list[dict[str, Any]]:
    """Rows where two plans differ: name, kept in each, and the share of the union that both keep (1.0 = the same)."""
    rows = []
    for attribute in ("keep", "masks"):
        a, b = getattr(first, attribute), getattr(second, attribute)
        for name in dict.fromkeys([*a, *b]):
            left, right = _kept(first, attribute, name), _kept(second, attribute, name)
            if left is None or right is None or not np.array_equal(left, right):
                both = union = 0
                if left is not None and right is not None:
                    both, union = len(np.intersect1d(left, right)), len(np.union1d(left, right))
                rows.append(
                    {
                        "name": name,
                        "first": None if left is None else len(left),
                        "second": None if right is None else len(right),
                        "agree": both / union if union else 0.0,
                    }
                )
    return rows


def _kept(plan: Plan, attribute: str, name: str) -> np.ndarray | None:
    tensor = getattr(plan, attribute).get(name)
    if tensor is None:
        return None
    return tensor.numpy() if attribute == "keep" else tensor.flatten().nonzero().squeeze(1).numpy()


def _same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def pack(mask: Tensor) -> Tensor:
    """A bool tensor as bits (uint8)."""
    return torch.from_numpy(np.packbits(mask.cpu().numpy().reshape(-1)))


def unpack(bits: Tensor, shape: Sequence[int]) -> Tensor:
    count = int(np.prod(shape))
    return torch.from_numpy(np.unpackbits(bits.numpy(), count=count).astype(bool)).reshape(tuple(shape))
