"""A model of a folder whose blocks come from its shards when they run, and go when others do."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateur.errors import SecateurError, require
from secateur.graph.blocks import find_stacks
from secateur.io.reshape import BROKEN
from secateur.io.shards import Shards, copy_shard, read, shard_name, write_index, write_shard
from secateur.io.transformers import class_of
from secateur.utils.memory import give_back

HELD = 2
"""Blocks in memory at once: the one in work, and the one before it, which gives it its inputs."""


def empty_model(folder: str | Path, device: str | torch.device = "cpu") -> Any:
    """The model of a folder of transformers, with parameters that have shapes and no memory, in eval mode.

    >>> model = empty_model("llama-70b")  # doctest: +SKIP
    >>> model.num_parameters()  # doctest: +SKIP
    70553706496

    Raises SecateurError for a folder that transformers can't build a model from.
    """
    from accelerate import init_empty_weights
    from transformers import AutoConfig

    path = Path(folder).expanduser()
    where = str(path / "config.json")
    try:
        cls, config = class_of(path)
        config = config or AutoConfig.from_pretrained(path, trust_remote_code=False, local_files_only=True)
        build = cls.from_config if hasattr(cls, "from_config") and not issubclass(cls, nn.Module) else cls
        with init_empty_weights(include_buffers=False):
            model = build(copy.deepcopy(config))
        model.tie_weights()
    except (*BROKEN, OSError, ImportError, AssertionError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise SecateurError(f"no model can be built from it ({reason})", where=where) from error
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                hollow = _hollow(parameter, torch.float32, torch.device(device))
                hollow = nn.Parameter(hollow, requires_grad=False)
                module._parameters[name] = made.setdefault(id(parameter), hollow)
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else buffer.to(device)
    return model.eval()


def _hollow(tensor: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of the same shape in the memory of one number."""
    return torch.zeros((), dtype=dtype, device=device).expand(tensor.shape)


class Streamed:
    """The blocks of an `empty_model`, read from `source` when they are entered, written to `folder` when they are done.

    >>> streamed = Streamed(empty_model("big"), Shards("big"), Path("out.run"))  # doctest: +SKIP
    >>> streamed.enter(0); streamed.finish(0)  # doctest: +SKIP

    Numbers of blocks run through all stacks. A block's own forward enters it, so the model's forward can be run as it is as
    long as it stops before the output head. Everything outside the blocks but the head lies in memory, in `dtype`. A block
    that is done is read from `folder`, in the dtype of its file, so a run that goes on sees the same numbers.

    Raises SecateurError where the names or shapes of the shards aren't the model's.
    """

    def __init__(self, model: nn.Module, source: Shards, folder: Path, dtype: torch.dtype = torch.float32):
        self.model, self.source, self.folder, self.dtype = model, source, folder, dtype
        stacks = find_stacks(model)
        require(
            stacks[0].repeated,
            "it has no repeated blocks that could be read one by one",
            where=type(model).__name__,
            fix="prune it without --stream",
        )
        self.modules = [module for stack in stacks for module in stack.modules]
        paths = [stack.path_of(index) for stack in stacks for index in range(len(stack))]
        self.targets: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
        self.targets |= {n: b for n, b in model.named_buffers() if n in source.entries}
        self._check()
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
                    target.data = _hollow(target, self.dtype, target.device)
            done = self.file(number)
            self._place(read(done) if done.exists() else self.source.read(self.own[number]))
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

    def close(self) -> None:
        """Give up what is in memory, copy what lies outside the blocks, unchanged, and write the index."""
        for target in self.targets.values():
            target.data = _hollow(target, self.dtype, target.device)
        copy_shard(self.file(self.count - 1), {name: self.source.entries[name] for name in self.rest})
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

    def _check(self) -> None:
        where, found = str(self.source.folder), self.source.entries
        held = {id(self.targets[name]) for name in found if name in self.targets}
        missing = [name for name, target in self.targets.items() if id(target) not in held]
        strange = [name for name in found if name not in self.targets]
        if missing or strange:
            name, what = (missing[0], "lacks") if missing else (strange[0], "has")
            raise SecateurError(
                f"the shards' names aren't the model's: the folder {what} {name}",
                where=where,
                fix="prune it without --stream, or load it with transformers and save it again",
            )
        for name, entry in found.items():
            own = tuple(self.targets[name].shape)
            require(
                entry.shape == own, f"{name} is {list(entry.shape)}, the config says {list(own)}", where=where
            )
