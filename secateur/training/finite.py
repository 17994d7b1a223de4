"""Where numbers break: the step and the layer of the first loss or gradient that isn't finite."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateur.errors import SecateurError


class Watch:
    """Stops a run at a number that isn't finite, and names the layer; the model is left as it was before the step."""

    def __init__(self, model: nn.Module, file: Path | None):
        self.model, self.file = model, file
        self.buffers = [b for b in model.buffers() if b.is_floating_point()]
        self.good = [b.clone() for b in self.buffers]
        self.step = 0

    @torch.no_grad()
    def remember(self, step: int) -> None:
        """Keep the buffers (means and variances of norms) that the forward of this step will change."""
        self.step = step
        if any(kept.shape != now.shape for kept, now in zip(self.good, self.buffers)):
            self.good = [b.clone() for b in self.buffers]
        if self.buffers:
            torch._foreach_copy_(self.good, self.buffers)

    def loss(self, value: float, forward: Callable[[], Any]) -> None:
        if not math.isfinite(value):
            self._restore()
            where = nonfinite_tensor(self.model) or nonfinite_output(self.model, forward) or "the loss itself"
            self._restore()
            self._stop(f"the loss is {value} at step {self.step}, first in {where}")

    def gradient(self, norm: float, trained: Sequence[Tensor]) -> None:
        if not math.isfinite(norm):
            self._restore()
            names = {id(p): name for name, p in self.model.named_parameters()}
            broken = [p for p in trained if p.grad is not None and not torch.isfinite(p.grad).all()]
            # the backward pass runs from the output: the deepest layer is the first that broke
            order = {name: i for i, name in enumerate(names.values())}
            found = sorted(
                (names.get(id(p), "an extra parameter") for p in broken), key=lambda n: order.get(n, -1)
            )
            where = f"first in {found[-1]}" if found else "though every gradient is finite"
            self._stop(f"the gradient's norm is {norm} at step {self.step}, {where}")

    @torch.no_grad()
    def _restore(self) -> None:
        if self.buffers:
            torch._foreach_copy_(self.buffers, self.good)

    def _stop(self, what: str) -> None:
        kept = f"; the last good checkpoint is {self.file}" if self.file and self.file.exists() else ""
        raise SecateurError(
            what,
            where="training",
            fix=f"lower lr or raise warmup, and check the data and the weights for NaN{kept}",
        )


def nonfinite_tensor(model: nn.Module) -> str | None:
    """The name of the first parameter or buffer that holds NaN or infinity."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            return name
    return None


@torch.no_grad()
def nonfinite_output(model: nn.Module, forward: Callable[[], Any]) -> str | None:
    """The first module, in the order in which they run, whose input or output isn't finite."""
    found: list[str] = []

    def look(name: str, module: nn.Module) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            given = [t for t in inputs if isinstance(t, Tensor) and t.is_floating_point()]
            if not found and not all(torch.isfinite(t).all() for t in given):
                found.append(f"the input of {name or type(module).__name__}")
            made = output if isinstance(output, Tensor) else None
            if not found and made is not None and not torch.isfinite(made).all():
                found.append(name or f"the output of {type(module).__name__}")

        return module.register_forward_hook(hook)

    leaves = [(n, m) for n, m in model.named_modules() if not any(m.children())]
    handles = [look(name, module) for name, module in leaves]
    try:
        forward()
    except Exception:  # noqa: BLE001  the search for a cause must not hide it
        return found[0] if found else None
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None
