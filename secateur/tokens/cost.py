"""What a run cost: tokens x layers, FLOPs, cache bytes and seconds."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from secateur.attention.work import VisualWork
from secateur.families.vlm import Facts
from secateur.tokens.call import Call
from secateur.tokens.sets import Table
from secateur.tokens.setup import Setup
from secateur.tokens.static import is_static


def layer_flops(tokens: float, width: int, inner: int, gated: bool, kv_share: float = 1.0) -> float:
    """4nd^2 + 2n^2d + 2ndm (3ndm where the feed-forward part is gated): the multiply-adds of one layer.

    >>> f"{32 * layer_flops(576, 4096, 11008, gated=True) / 1e12:.3f}"
    '3.817'

    n tokens, d wide, m inner; key and value projections count `kv_share` of a full one (grouped queries). The published
    convention: no factor 2 for multiply and add, norms and softmax left out.
    """
    projections = (2 + 2 * kv_share) * tokens * width**2
    return projections + 2 * tokens**2 * width + (3 if gated else 2) * tokens * width * inner


def visual_flops(work: VisualWork, facts: Facts, tokens: list[list[float]]) -> dict[str, float]:
    """Multiply-adds of visual tokens in the language model, and what each part of a plan saves of them.

    >>> half = VisualWork(32, 32, 11008, heads=(tuple(range(16)),) * 32, neurons=(5504,) * 32, cut=16)
    >>> facts = Facts(layers=32, hidden=4096, intermediate=11008, heads=32, kv_heads=32)
    >>> parts = visual_flops(half, facts, [[576.0]] * 32)
    >>> f"{2 * parts['dense'] / 1e12:.2f} {parts['left'] / parts['dense']:.3f}"
    '7.63 0.250'

    tokens: how many there would be in each layer and row without the plan's cut. A layer costs 4nd^2 + 2n^2d for its heads and
    3ndm (2ndm where it isn't gated) for its neurons: the paper's convention, which counts them twice. What a window saves isn't in it.
    """
    share = facts.kv_heads / facts.heads if facts.heads else 1.0
    found = dict.fromkeys(("dense", "layers", "heads", "neurons"), 0.0)
    for layer, counts in enumerate(tokens):
        for n in counts:
            whole = layer_flops(n, facts.hidden, facts.intermediate, facts.gated, share)
            heads = layer_flops(n, facts.hidden, 0, facts.gated, share)
            found["dense"] += whole
            if layer >= work.last:
                found["layers"] += whole
                continue
            found["heads"] += heads * len(work.pruned(layer)) / work.heads_each
            found["neurons"] += (whole - heads) * (1 - work.count(layer) / work.neurons_each)
    found["left"] = found["dense"] - found["layers"] - found["heads"] - found["neurons"]
    return found


def llm_flops(lengths: list[float], facts: Facts) -> float:
    """The multiply-adds of a prefill whose decoder layers see these numbers of tokens."""
    share = facts.kv_heads / facts.heads if facts.heads else 1.0
    return sum(layer_flops(n, facts.hidden, facts.intermediate, facts.gated, share) for n in lengths)


def tower_flops(lengths: list[float], crops: int, facts: Facts) -> float:
    """The multiply-adds of a vision tower whose blocks see these numbers of tokens in all, in `crops` equal sequences."""
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
    """Seconds: `first` up to the end of the first forward, `steps` of those after it.

    A compiled forward can't look at a clock, so its steps count together, by `rest`.
    """

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
        if torch.compiler.is_compiling():
            return
        self.begun = self._now(model)
        self.first, self.steps = 0.0, []

    def mark(self, model: nn.Module) -> None:
        if torch.compiler.is_compiling():
            return
        now = self._now(model)
        if not self.first:
            self.first = now - self.begun
        else:
            self.steps.append(now - self.last)
        self.last = now

    def rest(self, model: nn.Module, steps: int) -> None:
        """After generate, which ran `steps` forwards behind the first."""
        if self.first and not self.steps and steps > 0:
            self.steps = [(self._now(model) - self.last) / steps]


class Prefill:
    """The counts of one prefill."""

    def __init__(self, call: Call, kwargs: dict[str, Any]):
        assert call.mask is not None
        self.call, self.facts = call, call.setup.facts
        self.dense = call.mask.sum(1).cpu()  # [B] tokens before anything left
        row = call.table.row[: call.table.visual]
        self.visual = torch.bincount(row, minlength=call.table.rows).cpu()
        mask = kwargs.get("attention_mask")
        self.short = self.dense if mask is None else mask.sum(1).cpu()  # [B] tokens that layer 0 sees
        self.width = call.mask.shape[1] if mask is None else mask.shape[1]
        self.kv_before = self.kv_after = 0

    def finish(self, cache: Any) -> None:
        """After the prefill: what the cache really holds, and what it would hold."""
        assert self.call.mask is not None
        self.kv_after = cache_bytes(cache)
        first = next(iter(getattr(cache, "layers", ())), None)
        keys = getattr(first, "keys", None)
        if isinstance(keys, Tensor) and keys.dim() > 2 and keys.shape[-2]:
            per_token = (keys.numel() // keys.shape[-2]) * keys.element_size()
            # a static cache has room for the answer too
            room = max(0, keys.shape[-2] - self.width) if is_static(cache) else 0
            tokens = self.call.mask.shape[1] + room
            self.kv_before = 2 * per_token * tokens * len(cache.layers)

    def lengths(self) -> Tensor:
        """[layers, rows] tokens that each decoder layer saw."""
        lengths, now = [], self.short
        for layer in range(self.facts.layers):
            now = self.call.lengths.get(layer, now)
            lengths.append(now)
        return torch.stack(lengths).cpu() if lengths else torch.zeros(0, len(self.dense))

    def tower(self) -> tuple[float, float] | None:
        """Multiply-adds of the tower before and after; None where nothing happens in it."""
        call, facts = self.call, self.facts
        if call.tiles is not None:
            every, read = call.tiles
            each = float(call.table.patches.max() + 1) / every + facts.prefix
            before, after = (tower_flops([each * n] * facts.blocks, n, facts) for n in (every, read))
            return before, after
        if not call.tower_full:
            return None
        lengths, now = [], call.tower_full
        for block in range(facts.blocks):
            now = call.tower.get(block, now)
            lengths.append(float(now))
        crops = int(call.table.crop_id.max()) + 1
        full = [float(call.tower_full)] * facts.blocks
        return tower_flops(full, crops, facts), tower_flops(lengths, crops, facts)


def report(setup: Setup, clock: Clock, run: Prefill | None, table: Table | None) -> dict[str, Any]:
    """The last run's counts.

    `tokens_x_layers`: visual tokens summed over the decoder layers. `equivalent_tokens`: that over the depth. FLOPs are
    multiply-adds of the prefill, summed over rows: 4nd^2 + 2n^2d + 2ndm, or 3ndm where gated. Looks at the prompt count in all
    three; `glimpse_tokens_x_layers` and `glimpse_flops` say how much of it they are. `tiles`: crops of pyramids that went through the tower, whose `tower_flops` count no others.
    """
    facts = setup.facts
    times = {
        "seconds_to_first_token": clock.first,
        "seconds_per_token": sum(clock.steps) / len(clock.steps) if clock.steps else None,
    }
    if run is None:
        if table is None or not setup.plain:
            return {"before": None, "after": None, **times}
        counts = {"visual_tokens": table.visual}, {"visual_tokens": len(table.alive)}
        return {"before": counts[0], "after": counts[1], **times}
    lengths = run.lengths()
    # text never leaves, so what a layer saw beyond it is visual
    words = run.dense - run.visual  # [B]
    visual = (lengths - words[None]).clamp(min=0)
    total = int(run.visual.sum())
    looks = run.call.glimpses
    looked = sum(layers * int((seen - words).clamp(min=0).sum()) for layers, seen in looks)
    look_flops = sum(llm_flops([float(n)] * layers, facts) for layers, seen in looks for n in seen)
    before: dict[str, Any] = {
        "visual_tokens": total,
        "tokens_x_layers": total * facts.layers,
        "equivalent_tokens": float(total),
        "flops": sum(llm_flops([float(n)] * facts.layers, facts) for n in run.dense),
        "kv_bytes": run.kv_before,
    }
    after: dict[str, Any] = {
        "visual_tokens": int(visual[-1].sum()) if len(visual) else 0,
        "tokens_x_layers": int(visual.sum()) + looked,
        "equivalent_tokens": (float(visual.sum()) + looked) / max(1, facts.layers),
        "flops": sum(llm_flops([float(n) for n in row], facts) for row in lengths.T) + look_flops,
        "kv_bytes": run.kv_after,
    }
    spared: dict[str, Any] = {}
    if setup.work is not None:
        there = visual.clone()
        there[setup.work.last :] = visual[max(0, setup.work.last - 1)] if setup.work.last else run.visual
        spared = {"visual_flops": visual_flops(setup.work, facts, there.tolist())}
        after["flops"] -= spared["visual_flops"]["heads"] + spared["visual_flops"]["neurons"]
    if run.call.tiles is not None:
        before["tiles"], after["tiles"] = run.call.tiles
    if looks:
        before["glimpse_tokens_x_layers"], after["glimpse_tokens_x_layers"] = 0, looked
        before["glimpse_flops"], after["glimpse_flops"] = 0.0, look_flops
    tower = run.tower()
    if tower is not None:
        before["tower_flops"], after["tower_flops"] = tower
    return {
        "convention": f"multiply-adds, 4nd^2 + 2n^2d + {3 if facts.gated else 2}ndm",
        "before": before,
        "after": after,
        "lengths": lengths.tolist(),
        **spared,
        **times,
    }
