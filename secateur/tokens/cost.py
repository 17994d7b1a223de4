"""What a run cost: tokens x layers, FLOPs, cache bytes and seconds."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from secateur.families.vlm import Facts

if TYPE_CHECKING:
    from secateur.tokens.attach import Attached
    from secateur.tokens.call import Call


def layer_flops(tokens: float, width: int, inner: int, gated: bool, kv_share: float = 1.0) -> float:
    """4nd^2 + 2n^2d + 2ndm (3ndm where the feed-forward part is gated): the multiply-adds of one layer.

    >>> f"{32 * layer_flops(576, 4096, 11008, gated=True) / 1e12:.3f}"
    '3.817'

    n tokens, d wide, m inner; key and value projections count `kv_share` of a full one (grouped queries). The published
    convention: no factor 2 for multiply and add, norms and softmax left out.
    """
    projections = (2 + 2 * kv_share) * tokens * width**2
    return projections + 2 * tokens**2 * width + (3 if gated else 2) * tokens * width * inner


def llm_flops(lengths: list[float], facts: Facts) -> float:
    """Multiply-adds of a prefill whose decoder layers see these numbers of tokens."""
    share = facts.kv_heads / facts.heads if facts.heads else 1.0
    return sum(layer_flops(n, facts.hidden, facts.intermediate, facts.gated, share) for n in lengths)


def tower_flops(lengths: list[float], crops: int, facts: Facts) -> float:
    """Multiply-adds of a vision tower whose blocks see these numbers of tokens in all, in `crops` equal sequences."""
    return sum(
        crops * layer_flops(n / crops, facts.vision_hidden, facts.vision_intermediate, facts.vision_gated)
        for n in lengths
    )


def cache_bytes(cache: Any) -> int:
    """Bytes of the keys and values that a cache holds."""
    total = 0
    for layer in getattr(cache, "layers", ()):
        for tensor in (getattr(layer, "keys", None), getattr(layer, "values", None)):
            if isinstance(tensor, Tensor):
                total += tensor.numel() * tensor.element_size()
    return total


@dataclass
class Clock:
    """Seconds: `first` up to the end of the first forward, `steps` of those after it."""

    begun: float = 0.0
    last: float = 0.0
    first: float = 0.0
    steps: list[float] = field(default_factory=list)

    @staticmethod
    def _now(model: nn.Module) -> float:
        if torch.cuda.is_available():
            parameter = next(model.parameters(), None)
            if parameter is not None and parameter.is_cuda:
                torch.cuda.synchronize(parameter.device)
        return time.perf_counter()

    def start(self, model: nn.Module) -> None:
        self.begun = self._now(model)
        self.first, self.steps = 0.0, []

    def mark(self, model: nn.Module) -> None:
        now = self._now(model)
        if not self.first:
            self.first = now - self.begun
        else:
            self.steps.append(now - self.last)
        self.last = now


class Run:
    """The counts of one prefill."""

    def __init__(self, attached: Attached, call: Call, kwargs: dict[str, Any]):
        self.call = call
        facts = attached.facts
        assert call.mask is not None
        self.dense = call.mask.sum(1).cpu()
        visual = torch.bincount(call.table.row[: call.table.visual], minlength=call.table.rows).cpu()
        self.visual = visual
        mask = kwargs.get("attention_mask")
        self.short = self.dense if mask is None else mask.sum(1).cpu()
        self.facts = facts
        self.kv_after = 0
        self.kv_before = 0
        self.width_before = call.mask.shape[1]

    def finish(self, cache: Any) -> None:
        """After the prefill: what the cache really holds, and what it would hold."""
        self.kv_after = cache_bytes(cache)
        first = next(iter(getattr(cache, "layers", ())), None)
        keys = getattr(first, "keys", None)
        if isinstance(keys, Tensor) and keys.shape[-2]:
            per_token = (keys.numel() // keys.shape[-2]) * keys.element_size()
            self.kv_before = 2 * per_token * self.width_before * len(cache.layers)

    def lengths(self) -> Tensor:
        """[layers, rows] tokens that each decoder layer saw."""
        found, now = [], self.short
        for layer in range(self.facts.layers):
            now = self.call.lengths.get(layer, now)
            found.append(now)
        return torch.stack(found).cpu() if found else torch.zeros(0, len(self.dense))


def report(attached: Attached, run: Run | None) -> dict[str, Any]:
    """The last run's counts.

    `tokens_x_layers`: visual tokens summed over the decoder layers. `equivalent_tokens`: that over the depth. FLOPs are
    multiply-adds of the prefill, summed over rows: 4nd^2 + 2n^2d + 2ndm, or 3ndm where gated.
    """
    facts = attached.facts
    times = {
        "seconds_to_first_token": attached.clock.first,
        "seconds_per_token": sum(attached.clock.steps) / len(attached.clock.steps)
        if attached.clock.steps
        else None,
    }
    if run is None:
        if attached.plain and attached.encoder is not None:
            return {**attached.encoder.report(), **times}
        return {"before": None, "after": None, **times}
    lengths = run.lengths()
    visual = (lengths - (run.dense - run.visual)[None]).clamp(min=0)
    dense_rows = [[float(n)] * facts.layers for n in run.dense]
    after_rows = [[float(n) for n in lengths[:, row]] for row in range(lengths.shape[1])]
    tower = attached.encoder.counts(run.call) if attached.encoder is not None else None
    before = {
        "visual_tokens": int(run.visual.sum()),
        "tokens_x_layers": int(run.visual.sum()) * facts.layers,
        "equivalent_tokens": float(run.visual.sum()),
        "flops": sum(llm_flops(row, facts) for row in dense_rows),
        "kv_bytes": run.kv_before,
    }
    after = {
        "visual_tokens": int(visual[-1].sum()) if len(visual) else 0,
        "tokens_x_layers": int(visual.sum()),
        "equivalent_tokens": float(visual.sum()) / max(1, facts.layers),
        "flops": sum(llm_flops(row, facts) for row in after_rows),
        "kv_bytes": run.kv_after,
    }
    if tower is not None:
        before["tower_flops"], after["tower_flops"] = tower
    return {
        "convention": f"multiply-adds, 4nd^2 + 2n^2d + {3 if facts.gated else 2}ndm",
        "before": before,
        "after": after,
        "lengths": lengths.tolist(),
        **times,
    }
