"""Training in which each process holds its share of every weight, moment and gradient: torch's FSDP, block by block."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from secateur.errors import require
from secateur.graph.blocks import find_stacks
from secateur.training import parallel
from secateur.utils.running import device_of

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def shard(model: nn.Module, device: torch.device | None = None) -> nn.Module:
    """A copy of a model whose parameters are shared out over the processes that `torchrun` started; a block is whole while it runs.

    >>> student = shard(model)  # doctest: +SKIP
    >>> fit(student, ids, steps=100); gather(student, model)  # doctest: +SKIP

    device: where the shares lie; None: where the model is. The model itself stays as it is, so that a large one is best left on the
    CPU.

    Raises `SecateurError` for an ordinary process.
    """
    device = device_of(model) if device is None else device
    size = parallel.join(device)[1]
    require(size > 1, "there is one process, which holds everything", where="shard", fix="start it with torchrun --nproc-per-node N, or leave shard out")  # fmt: skip
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (size,))
    shared = copy.deepcopy(model)
    blocks = [block for stack in find_stacks(shared) if stack.repeated for block in stack.modules]
    for part in (*blocks, shared):
        fully_shard(part, mesh=mesh)
    for module in shared.modules():
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else buffer.to(device)
    return shared


@torch.no_grad()
def gather(shared: nn.Module, model: nn.Module) -> None:
    """The weights of `shard(model)` as they are now, into the model; all processes call it."""
    whole = dict(model.named_parameters())
    for name, parameter in shared.named_parameters():
        whole[name].copy_(full(parameter))
    buffers = dict(model.named_buffers())
    for name, buffer in shared.named_buffers():
        buffers[name].copy_(buffer)


def sharded(tensor: object) -> bool:
    """Whether each process holds a share of it alone."""
    return hasattr(tensor, "full_tensor")


def full(tensor: Tensor) -> Tensor:
    """All of a tensor of which this process may hold a share; all processes call it.

    >>> full(torch.ones(2))
    tensor([1., 1.])
    """
    return tensor.full_tensor() if sharded(tensor) else tensor  # type: ignore[attr-defined]


def share_of(tensor: Tensor, like: Tensor) -> Tensor:
    """What this process holds of a tensor that all have, where `like` is shared out; else the tensor.

    >>> share_of(torch.ones(2), torch.zeros(2))
    tensor([1., 1.])
    """
    if not sharded(like) or sharded(tensor):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    shares: DTensor = like  # type: ignore[assignment]
    own = tensor.to(shares.device)
    return distribute_tensor(own, shares.device_mesh, shares.placements, src_data_rank=None)
