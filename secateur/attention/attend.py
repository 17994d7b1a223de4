"""An attention method on an unmodified model, until it is taken off."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from secateur.attention.layout import Layout
from secateur.attention.levels import density
from secateur.attention.method import AttentionMethod
from secateur.attention.pyramid import gathered
from secateur.attention.reach import Call, Watch
from secateur.errors import SecateurError
from secateur.utils.screen import fit

_ATTENDED: weakref.WeakSet[nn.Module] = weakref.WeakSet()


class Attending:
    """A model whose attention reads less. Use it as a context manager, or call `detach`.

    >>> with secateur.attach(model, "psa", density="25%") as attached:  # doctest: +SKIP
    ...     model(input_ids)
    >>> attached.report["density"]  # doctest: +SKIP
    0.26

    It wraps the `forward` of the module on the instance; no class is changed.
    """

    def __init__(self, model: nn.Module, method: AttentionMethod, part: str = "", seed: int = 0):
        self.model, self.method, self.part = model, method, part
        self.module = _module(model, part)
        if self.module in _ATTENDED:
            raise SecateurError(
                "an attention method is attached already", where=part or type(model).__name__, fix="detach it"
            )
        self.seed = seed
        self._densities: list[tuple[float, int]] = []
        self._dense = 0
        self._seconds = [0.0, 0.0]
        own, forward = self.module.__dict__.get("forward"), self.module.forward

        def attending(*args: Any, **kwargs: Any) -> Any:
            return self._run(forward, args, kwargs)

        def restore() -> None:
            _ATTENDED.discard(self.module)
            if own is None:
                del self.module.forward
            else:
                self.module.forward = own

        self.module.forward = attending
        _ATTENDED.add(self.module)
        self._undo: Callable[[], None] | None = restore

    def _run(self, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        self._generator = torch.Generator().manual_seed(self.seed)
        with Watch(self._answer) as watch:
            out = forward(*args, **kwargs)
        if not watch.calls:
            raise SecateurError(
                f"{type(self.module).__name__} doesn't call torch's scaled_dot_product_attention, so its attention can't be reached",
                where="attach",
                fix='load it with attn_implementation="sdpa"; timm: fused attention on',
            )
        return out

    def _answer(self, call: Call) -> Tensor | None:
        method = self.method
        layout = Layout(call.q.shape[2], call.k.shape[2], method.block_q, method.block_k, call.causal)
        if layout.keys <= layout.block_k:
            self._dense += 1
            return None
        begun = time.perf_counter()
        with torch.no_grad():
            levels = method.levels(call.q, call.k, layout, self._generator)
            visible = layout.visible(levels.device)
            levels = torch.where(layout.crossed(levels.device), 1, levels).where(visible, 0)
            self._densities.append((density(levels, visible), int(visible.sum())))
        self._seconds[0] += time.perf_counter() - begun
        if bool((levels == 1).eq(visible).all()):
            return None
        begun = time.perf_counter()
        out = gathered(call.q, call.k, call.v, levels, layout, scale=call.scale, real=call.real)
        self._seconds[1] += time.perf_counter() - begun
        return out

    @property
    def report(self) -> dict[str, Any]:
        """Since it was attached: the mean density over visible pairs of blocks, attentions that were cut and that ran as
        they were (no longer than a block), and seconds spent on levels and on attention."""
        pairs = sum(count for _, count in self._densities)
        mean = sum(value * count for value, count in self._densities) / pairs if pairs else 1.0
        return {
            "density": mean,
            "attentions": len(self._densities),
            "too_short": self._dense,
            "seconds": {"levels": self._seconds[0], "attention": self._seconds[1]},
        }

    def detach(self) -> None:
        """Takes it off; the model gives what it gave before, bit for bit. Twice is once."""
        if self._undo is not None:
            self._undo()
            self._undo = None

    @property
    def attached(self) -> bool:
        return self._undo is not None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.detach()

    def __repr__(self) -> str:
        on = "on" if self.attached else "taken off"
        lines = [f"Attending: {self.method!r} {on} {type(self.model).__name__}"]
        return fit([*lines, f"  density {self.report['density']:.3f}", "  .report; .detach()"])


def _module(model: nn.Module, part: str) -> nn.Module:
    try:
        return model.get_submodule(part)
    except AttributeError:
        names = [name for name, _ in model.named_children()]
        raise SecateurError(
            f"there is no module {part!r}", where="part", fix=f"such as {', '.join(names)}"
        ) from None
