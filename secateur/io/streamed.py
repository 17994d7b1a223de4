"""A model of a folder whose blocks come from its shards when they run, and go when others do."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateur.errors import SecateurError, require
from secateur.graph.blocks import find_stacks
from secateur.io.hollow import hollow
from secateur.io.shards import Shards, copy_shard, read, shard_name, write_index, write_shard
from secateur.utils.memory import give_back

HELD = 2
"""Blocks in memory at once: the one in work, and the one before it, which gives it its inputs."""


class Streamed:
    """The blocks of an `empty_model`, read from `source` when they are entered, written to `folder` when they are done.

    >>> streamed = Streamed(empty_model("big"), Shards("big"), Path("out.run"))  # doctest: +SKIP
    >>> streamed.enter(0); streamed.finish(0)  # doctest: +SKIP

    Numbers of blocks run through all stacks. A block's own forward enters it, so the model's forward can be run as it is as
    long as it stops before the output head. Everything outside the blocks but the head lies in memory, in `dtype`. A block
    that is done is read from `folder`, in the dtype of its file, so a run that goes on sees the same numbers; where the run is
    to see the `dense` model, from `source`.

    Raises SecateurError where the names or shapes of the shards aren't the model's.
    """

    def __init__(self, model: nn.Module, source: Shards, folder: Path, *, dense: bool = False):
        self.model, self.source, self.folder, self.dense = model, source, folder, dense
        self.dtype = torch.float32
        stacks = find_stacks(model)
        require(
            stacks[0].repeated,
            "it has no repeated blocks that could be read one by one",
            where=type(model).__name__,
            fix="prune it without --stream",
        )
        self.stacks = stacks
        self.modules = [module for stack in stacks for module in stack.modules]
        self.paths = paths = [stack.path_of(index) for stack in stacks for index in range(len(stack))]
        self.targets = tensors_of(model, source)
        self.buffers = [name for name, _ in model.named_buffers() if name in source.entries]
        owner = {name: next((i for i, p in enumerate(paths) if name.startswith(f"{p}.")), -1) for name in source.entries}  # fmt: skip
        self.own = [[n for n, i in owner.items() if i == number] for number in range(len(paths))]
        self.rest = [name for name, number in owner.items() if number < 0]
        self.entered: list[int] = []
        head = getattr(model, "get_output_embeddings", lambda: None)()
        weight = getattr(head, "weight", None)
        tied = weight is not None and any(m.weight is weight for m in model.modules() if isinstance(m, nn.Embedding))  # fmt: skip
        self.outside = [n for n in self.rest if tied or self.targets[n] is not weight]
        self._place(source.read(self.outside))
        for number, module in enumerate(self.modules):
            module.forward = self._entering(number, module.forward)

    @property
    def count(self) -> int:
        """Shards that are written: one a block, and one for everything else."""
        return len(self.modules) + 1

    @property
    def resident(self) -> int:
        """Bytes of weights in memory at most: what is outside the blocks, the blocks that are held, and one as it is written."""
        size = torch.finfo(self.dtype).bits // 8
        outside = sum(math.prod(self.source.entries[n].shape) for n in self.outside)
        blocks = [sum(math.prod(self.source.entries[n].shape) for n in own) for own in self.own]
        written = max(sum(self.source.entries[n].nbytes for n in own) for own in self.own)
        return size * (outside + HELD * max(blocks)) + 2 * written

    def enter(self, number: int) -> None:
        """Read a block that isn't there; the one that was entered longest ago goes."""
        if number in self.entered:
            self.entered.remove(number)
        else:
            while len(self.entered) >= HELD:
                for name in self.own[self.entered.pop(0)]:
                    target = self.targets[name]
                    target.data = hollow(target, self.dtype, target.device)
            done = self.file(number)
            again = done.exists() and not self.dense
            self._place(read(done) if again else self.source.read(self.own[number]))
        self.entered.append(number)

    def file(self, number: int) -> Path:
        """The shard of a block that is done."""
        return self.folder / shard_name(number, self.count)

    def original(self, number: int) -> dict[str, Tensor]:
        """A block's tensors as the source has them."""
        return self.source.read(self.own[number])

    def finish(self, number: int) -> None:
        """Write a block as it is now, in the dtypes of the source; what was rounded is what others see from now on."""
        entries = self.source.entries
        tensors = {n: self.targets[n].data.to("cpu", entries[n].dtype) for n in self.own[number]}
        write_shard(self.file(number), tensors)
        self._place(tensors)
        give_back()

    def finish_as(self, number: int, tensors: dict[str, Tensor]) -> None:
        """Write other tensors in place of a block's, in the dtypes of the source; a new one in that of the block."""
        entries = self.source.entries
        usual = next(entries[name].dtype for name in self.own[number] if entries[name].dtype is not None)
        kinds = {name: entries[name].dtype if name in entries else usual for name in tensors}
        write_shard(self.file(number), {n: t.data.to("cpu", kinds[n]) for n, t in tensors.items()})
        self.leave(number)

    def keep_only(self, numbers: list[int]) -> None:
        """Write these blocks of a single list as the source has them, numbered afresh; the others are gone, and so is what is in memory."""
        stack = self.stacks[0]
        for number in range(len(self.modules)):
            self.leave(number)
        count = len(numbers) + 1
        for place, number in enumerate(numbers):
            old, new = f"{self.paths[number]}.", f"{stack.path_of(place)}."
            moved = {f"{new}{name.removeprefix(old)}": name for name in self.own[number]}
            tensors = self.source.read(self.own[number])
            write_shard(
                self.folder / shard_name(place, count), {name: tensors[was] for name, was in moved.items()}
            )
        self.modules = [self.modules[number] for number in numbers]
        self.close()

    def leave(self, number: int) -> None:
        """A block's tensors go, whatever they are by now; it isn't entered again."""
        if number in self.entered:
            self.entered.remove(number)
        for tensor in (
            *(self.targets[name] for name in self.own[number]),
            *self.modules[number].parameters(),
        ):
            tensor.data = hollow(tensor, tensor.dtype, tensor.device)
        give_back()

    def close(self) -> None:
        """Give up what is in memory, copy what lies outside the blocks, unchanged, and write the index."""
        for target in self.targets.values():
            target.data = hollow(target, self.dtype, target.device)
        for module in self.modules:
            del module.forward
        rest = {name: self.source.entries[name] for name in self.rest}
        if any(entry.start < 0 for entry in rest.values()):  # made of several
            write_shard(self.file(self.count - 1), self.source.read(rest))
        else:
            copy_shard(self.file(self.count - 1), rest)
        write_index(self.folder)

    def _place(self, tensors: dict[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            target = self.targets[name]
            target.data = tensor.to(target.device, self.dtype if tensor.is_floating_point() else None)

    def _entering(self, number: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(forward)
        def entered(*args: Any, **kwargs: Any) -> Any:
            self.enter(number)
            return forward(*args, **kwargs)

        return entered


def tensors_of(model: nn.Module, source: Shards) -> dict[str, Tensor]:
    """The model's tensors that lie in the shards, by all their names. Raises SecateurError where names or shapes aren't the same."""
    targets: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    targets |= {n: b for n, b in model.named_buffers() if n in source.entries}
    where, found = str(source.folder), source.entries
    held = {id(targets[name]) for name in found if name in targets}
    missing = [name for name, target in targets.items() if id(target) not in held]
    strange = [name for name in found if name not in targets]
    if missing or strange:
        name, what = (missing[0], "lacks") if missing else (strange[0], "has")
        raise SecateurError(
            f"the shards' names aren't the model's: the folder {what} {name}",
            where=where,
            fix="prune it without --stream, or load it with transformers and save it again",
        )
    for name, entry in found.items():
        own = tuple(targets[name].shape)
        require(entry.shape == own, f"{name} is {list(entry.shape)}, the config says {list(own)}", where=where)  # fmt: skip
    return targets
