"""Data-parallel training under `torchrun`: torch's own DDP, one process a device, gloo on CPU and NCCL on CUDA."""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from secateur.errors import SecateurError
from secateur.utils.inputs import map_tensors


def join(device: torch.device) -> tuple[int, int]:
    """(rank, number of processes); joins the group that `torchrun` announced. (0, 1) for an ordinary process."""
    if not dist.is_available() or (not dist.is_initialized() and int(os.environ.get("WORLD_SIZE", "1")) < 2):
        return 0, 1
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        atexit.register(leave)
    return dist.get_rank(), dist.get_world_size()


def leave() -> None:
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def is_main() -> bool:
    """Whether this process prints and writes."""
    return int(os.environ.get("RANK", "0")) == 0


def local_device(device: str | torch.device) -> torch.device:
    """`cuda` is this process's own card under `torchrun`."""
    device = torch.device(device)
    if device.type == "cuda" and device.index is None and "LOCAL_RANK" in os.environ:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    return device


def barrier(size: int) -> None:
    if size > 1:
        dist.barrier()


def mean(value: Tensor, size: int) -> Tensor:
    """The mean of a scalar over processes."""
    value = value.detach().float()
    if size > 1:
        value = value.clone()
        dist.all_reduce(value)
        value /= size
    return value


def part(batch: Any, rank: int, size: int) -> Any:
    """This process's share of a global batch: equal, consecutive pieces."""
    if size == 1:
        return batch

    def own(tensor: Tensor) -> Tensor:
        each, left = divmod(len(tensor), size)
        if left or not each:
            raise SecateurError(
                f"a batch of {len(tensor)} can't be shared by {size} processes",
                where="batch",
                fix=f"take a multiple of {size}",
            )
        return tensor[rank * each : (rank + 1) * each]

    return map_tensors(batch, own)


class Total(nn.Module):
    """The whole loss as a module, so that DDP sees its forward; `extra` are trained tensors outside the model."""

    def __init__(self, model: nn.Module, terms: Sequence[Callable[..., Tensor]], extra: Sequence[Any] = ()):
        super().__init__()
        self.model, self.terms, self.extra = model, terms, nn.ParameterList(extra)

    def forward(self, batch: Any) -> Tensor:
        total = self.terms[0](self.model, batch)
        for term in self.terms[1:]:
            total = total + term(self.model, batch)
        return total


def wrap(
    model: nn.Module, terms: Sequence[Callable[..., Tensor]], trained: Sequence[Tensor], size: int
) -> nn.Module:
    """The loss of a batch as a module; with several processes, `backward` averages its gradients over them."""
    if any(
        hasattr(p, "full_tensor") for p in trained
    ):  # shared out already, and averaged as they are reduced
        return Total(model, terms)
    own = {id(p) for p in model.parameters()}
    total = Total(model, terms, [p for p in trained if id(p) not in own] if size > 1 else ())
    return DistributedDataParallel(total) if size > 1 else total
