"""An attention method on an unmodified model, until it is taken off."""

from __future__ import annotations

import time
import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Self

import torch
from torch import Tensor, nn

from secateur.attention import kernel
from secateur.attention.layout import Layout
from secateur.attention.levels import density
from secateur.attention.method import AttentionMethod
from secateur.attention.order import inverse
from secateur.attention.pyramid import gathered
from secateur.attention.reach import Call, Watch, dense, groups_of, unpadded
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
        self.groups = groups_of(self.module)
        if self.module in _ATTENDED:
            raise SecateurError(
                "an attention method is attached already", where=part or type(model).__name__, fix="detach it"
            )
        self.seed = seed
        self._densities: list[tuple[float, int]] = []
        self._dense = self._runs = self._calls = 0
        self._paths: Counter[str] = Counter()
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
        if self._runs < self.method.warmup:
            self._runs += 1
            return forward(*args, **kwargs)
        self._calls = 0
        with Watch(self._answer, self.groups) as watch:
            out = forward(*args, **kwargs)
        if not watch.calls:
            raise SecateurError(
                f"{type(self.module).__name__} doesn't call torch's scaled_dot_product_attention, so its attention can't be reached",
                where="attach",
                fix='load it with attn_implementation="sdpa"; timm: fused attention on',
            )
        self._runs += 1
        return out

    def _answer(self, call: Call) -> Tensor | None:
        self._calls += 1
        if call.real is None:
            return self._attend(call)
        parts = [(rows, own, part, self._attend(part)) for rows, own, part in unpadded(call)]
        if all(found is None for *_, found in parts):
            return None
        out = call.q.new_zeros(*call.q.shape[:3], call.v.shape[3])
        for rows, own, part, found in parts:
            out[rows, :, own] = dense(part) if found is None else found
        return out

    def _attend(self, call: Call) -> Tensor | None:
        method = self.method
        layout = Layout(call.q.shape[2], call.k.shape[2], method.block_q, method.block_k, call.causal)
        if layout.keys <= layout.block_k or layout.queries == 1:
            self._dense += 1
            return None
        begun = time.perf_counter()
        generator = torch.Generator().manual_seed(self.seed + self._calls)
        with torch.no_grad():
            places = method.places(call.q, call.k, generator)
            ordered = call if places is None else _ordered(call, *places)
            levels = method.levels(ordered.q, ordered.k, layout, generator)
            visible = layout.visible(levels.device)
            levels = torch.where(layout.crossed(levels.device), 1, levels).where(visible, 0)
            self._densities.append((density(levels, visible), int(visible.sum())))
        self._seconds[0] += time.perf_counter() - begun
        if bool((levels == 1).eq(visible).all()):
            return None
        begun = time.perf_counter()
        if places is not None:
            ordered = _ordered(call, *places)  # again, where gradients are
        reason = kernel.unfit(ordered.q, ordered.k, ordered.v, layout)
        attend = gathered if reason else kernel.fused
        self._paths[reason] += 1
        out = attend(ordered.q, ordered.k, ordered.v, levels, layout, scale=call.scale, real=call.real)
        if places is not None:
            out = out.gather(2, _spread(inverse(places[0]), out))
        self._seconds[1] += time.perf_counter() - begun
        return out

    @property
    def report(self) -> dict[str, Any]:
        """Since it was attached: the mean density over visible pairs of blocks, attentions that were cut and that ran as
        they were (no longer than a block), runs that stayed dense as warm-up, seconds spent on levels and on attention, and how
        many attentions ran in the fused kernel or, with the reason, as gathered keys."""
        pairs = sum(count for _, count in self._densities)
        mean = sum(value * count for value, count in self._densities) / pairs if pairs else 1.0
        return {
            "density": mean,
            "attentions": len(self._densities),
            "too_short": self._dense,
            "warmup": min(self._runs, self.method.warmup),
            "seconds": {"levels": self._seconds[0], "attention": self._seconds[1]},
            "paths": {f"gathered: {reason}" if reason else "kernel": n for reason, n in self._paths.items()},
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


def _ordered(call: Call, queries: Tensor, keys: Tensor) -> Call:
    if call.causal or call.real is not None:
        raise SecateurError(
            "its attention is causal or padded: its tokens can't change places",
            where="order",
            fix='order="", or part= of a module that reads whole videos',
        )
    at = _spread(keys, call.k)
    v = call.v.gather(2, _spread(keys, call.v))
    return replace(call, q=call.q.gather(2, _spread(queries, call.q)), k=call.k.gather(2, at), v=v)


def _spread(places: Tensor, x: Tensor) -> Tensor:
    return places.to(x.device)[..., None].expand(*x.shape[:2], -1, x.shape[3])


def _module(model: nn.Module, part: str) -> nn.Module:
    try:
        return model.get_submodule(part)
    except AttributeError:
        names = [name for name, _ in model.named_children()]
        raise SecateurError(
            f"there is no module {part!r}", where="part", fix=f"such as {', '.join(names)}"
        ) from None
