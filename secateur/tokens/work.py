"""Visual tokens that take part in less of a language model's work, as a `VisualWork` says.

Modules are wrapped on the instance: the attention of each layer, its projections, its feed-forward part. That visual tokens leave
at the cut is a stage between layers, as any other. Letters in shapes: B rows, L slots of a layer, M keys, W columns.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secateur.attention.visual import Asked, Bands, Instead, attend, banded, excused, neighbours
from secateur.attention.work import VisualWork
from secateur.errors import SecateurError
from secateur.skipping.alive import pack
from secateur.tokens import static
from secateur.tokens.decoder import DecoderDriver, Forward, Stretch
from secateur.tokens.record import attention_of, part
from secateur.tokens.setup import Setup
from secateur.utils.screen import Screen
from secateur.utils.versions import cache_in

Listen = Callable[[int, Asked, "Seen"], None]


@dataclass(eq=False, repr=False)
class Seen(Screen):
    """What a layer sees."""

    queries: Tensor
    """[B, L] bool: visual."""
    keys: Tensor
    """[B, M] bool: visual."""
    valid: Tensor
    """[B, M] bool: no padding."""
    near: Tensor | None
    """[B, L, M] bool: which visual keys a visual query may see; None: as the model has it."""
    lines: Tensor | None
    """[B, L]: a number for each line of each picture's grid, -1 for what isn't visual; None where `near` is."""
    text: Tensor
    """[B, T] slots of the queries that aren't visual, -1 padding."""
    rest: Tensor
    flat: Tensor
    """The same, and those of visual queries, over all rows."""
    memo: dict[int, tuple[Tensor, Tensor, Bands | None]] = field(default_factory=dict)
    """Masks with the window in them, by the mask that was given."""
    masks: dict[Any, tuple[Any, Tensor]] = field(default_factory=dict)


class WorkDriver:
    """Excuses visual tokens from the work that the plan says; `begin` tells it of every layer."""

    def __init__(self, setup: Setup, decoder: DecoderDriver, layers: Any, listen: Listen | None = None):
        assert setup.work is not None
        self.work: VisualWork = setup.work
        self.decoder, self.listen = decoder, listen
        self.seen: Seen | None = None
        self.undo: list[Callable[[], None]] = []
        decoder.watch = self.begin
        self.undo.append(lambda: setattr(decoder, "watch", None))
        try:
            for number, layer in enumerate(layers):
                self._install(number, layer)
        except BaseException:
            self.remove()
            raise

    def remove(self) -> None:
        while self.undo:
            self.undo.pop()()
        self.seen = None

    def masked(self, number: int) -> bool:
        """Visual tokens stay in this layer behind the cut, without weight."""
        return number >= self.work.last and not self.work.leaves

    def attends(self, number: int) -> bool:
        """The layer's attention isn't the model's own."""
        before = number < self.work.last
        own = before and (self.work.window is not None or bool(self.work.pruned(number)))
        return own or self.masked(number) or self.listen is not None

    def _install(self, number: int, layer: nn.Module) -> None:
        if self.attends(number):
            attention = attention_of(layer)
            own = getattr(getattr(attention, "config", None), "_attn_implementation", None) or "sdpa"
            if own.removeprefix("secateur-") != "sdpa":
                raise SecateurError(
                    f"{type(attention).__name__} runs as {own}, where its attention can't be reached",
                    where="work",
                    fix='load the model with attn_implementation="sdpa", or leave window, heads and a masked cut out',
                )
            self._wrap(attention, partial(self._attention, number, attention))
            if number < self.work.last and self.work.physical:
                self._projections(number, attention)
        if number < self.work.last and self.work.count(number) < self.work.neurons_each:
            self._neurons(number, part(layer, "mlp", "feed_forward"))

    def _wrap(self, module: nn.Module, around: Callable[..., Any]) -> None:
        own, forward = module.__dict__.get("forward"), module.forward
        module.forward = partial(around, forward)

        def restore() -> None:
            if own is None:
                del module.forward
            else:
                module.forward = own

        self.undo.append(restore)

    @property
    def now(self) -> Seen | None:
        return self.seen if self.decoder.run is not None else None

    # -- attention --

    def _attention(
        self, number: int, module: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        seen = self.now
        if seen is None:
            return forward(*args, **kwargs)
        with Instead(partial(self._unpacked, number, seen), seen.masks) as watch:
            out = forward(*args, **kwargs)
        if not watch.calls:
            raise SecateurError(
                f"{type(module).__name__} doesn't call torch's scaled_dot_product_attention, so its attention can't be reached",
                where="work",
                fix="leave window and heads out",
            )
        return out

    def _unpacked(self, number: int, seen: Seen, asked: Asked) -> Tensor:
        """A single query of grouped heads may come as several queries of one: [B, G, heads of a group, d]."""
        length, shape = seen.queries.shape[1], asked.q.shape
        if shape[2] == length:
            return self._answer(number, seen, asked)
        q = asked.q.reshape(shape[0], -1, length, shape[3])
        may = asked.may
        if may.shape[1] == 1:  # one for all heads
            may = may[:, :, :length]
        else:
            may = may.reshape(len(may), -1, length, may.shape[3])
        out = self._answer(number, seen, Asked(q, asked.k, asked.v, may, asked.scale))
        return out.reshape(*shape[:3], -1)

    def _answer(self, number: int, seen: Seen, asked: Asked) -> Tensor:
        if self.listen is not None:
            self.listen(number, asked, seen)
            return attend(asked)
        may, bands = asked.may, None
        if seen.near is not None and number < self.work.last:
            may, bands = self._windowed(seen, may)
        pruned = self.work.pruned(number) if number < self.work.last else []
        if self.masked(number):
            if not self.work.renormalise:
                everything = list(range(asked.q.shape[1]))
                return excused(asked, seen.queries, seen.keys, everything, silent=False)
            may = may & (seen.queries[:, :, None] | ~seen.keys[:, None])[:, None]
        if may is not asked.may:
            asked = Asked(asked.q, asked.k, asked.v, may, asked.scale)
        if not pruned:
            return attend(asked) if bands is None else banded(asked, bands)
        text = seen.text if self.work.physical and bool(seen.queries.any()) else None
        return excused(asked, seen.queries, seen.keys, pruned, self.work.silent, text, bands)

    def _windowed(self, seen: Seen, may: Tensor) -> tuple[Tensor, Bands | None]:
        """A mask with the window in it, and the few keys that each line of a grid sees in it."""
        if id(may) not in seen.memo:
            assert seen.near is not None and seen.lines is not None
            both = seen.queries[:, :, None] & seen.keys[:, None]
            new = torch.where(both[:, None], seen.near[:, None], may)
            bands = (
                _bands(new[:, 0], seen.lines, seen.text) if self.work.physical and new.shape[1] == 1 else None
            )
            seen.memo[id(may)] = new, may, bands
        return seen.memo[id(may)][0], seen.memo[id(may)][2]

    # -- what isn't computed --

    def _projections(self, number: int, attention: nn.Module) -> None:
        """Queries, values and outputs of pruned heads aren't made for visual tokens; keys are, for the denominator."""
        pruned = self.work.pruned(number)
        named: dict[str, Any] = {name: getattr(attention, f"{name}_proj", None) for name in "qvo"}
        if not pruned or any(type(linear) is not nn.Linear for linear in named.values()):
            return
        heads = self.work.heads_each
        width = named["q"].weight.shape[0] // heads
        of = heads * width // named["v"].weight.shape[0]
        kept = [head for head in range(heads) if head not in pruned]
        columns = {"q": kept, "v": sorted({head // of for head in kept}), "o": kept}
        for name, linear in named.items():
            if name == "v" or self.work.silent:
                index = torch.tensor(columns[name], dtype=torch.int64)[:, None] * width + torch.arange(width)
                self._wrap(linear, partial(self._linear, linear, index.flatten(), name == "o"))

    def _linear(
        self, linear: Any, index: Tensor, reads: bool, forward: Callable[..., Any], x: Tensor
    ) -> Tensor:
        """Visual rows read (or write, where not `reads`) only the features `index`."""
        seen = self.now
        if seen is None or not len(seen.flat) or x.shape[:2] != seen.queries.shape:
            return forward(x)
        index, flat = index.to(x.device), x.flatten(0, 1)
        text = F.linear(flat[seen.rest], linear.weight, linear.bias)
        if reads:
            visual = F.linear(flat[seen.flat][:, index], linear.weight[:, index], linear.bias)
        else:
            bias = None if linear.bias is None else linear.bias[index]
            some = F.linear(flat[seen.flat], linear.weight[index], bias)
            visual = some.new_zeros(len(some), text.shape[1]).index_copy(1, index, some)
        return _joined(seen, text, visual)

    def _neurons(self, number: int, mlp: nn.Module) -> None:
        own: int | tuple[int, ...] = () if self.work.neurons is None else self.work.neurons[number]
        keep = torch.arange(own) if isinstance(own, int) else torch.tensor(own, dtype=torch.int64)
        ways = {name: m for name, m in mlp.named_modules() if type(m) is nn.Linear}
        inner = self.work.neurons_each
        down = [name for name, m in ways.items() if m.in_features == inner]
        if len(down) != 1 or any(m.out_features != inner for name, m in ways.items() if name not in down):
            raise SecateurError(
                f"the neurons of {type(mlp).__name__} can't be told apart: {inner} outputs of its linear layers, and one that reads them, were looked for",
                where="neurons",
                fix="leave neurons out",
            )
        if not self.work.physical:

            def silence(module: nn.Module, args: tuple[Tensor, ...]) -> Any:
                seen = self.now
                if seen is None or args[0].shape[:2] != seen.queries.shape:
                    return None
                gone = torch.ones(inner, dtype=torch.bool, device=args[0].device)
                gone[keep.to(gone.device)] = False
                return (args[0].masked_fill(seen.queries[..., None] & gone, 0),)

            self.undo.append(ways[down[0]].register_forward_pre_hook(silence).remove)
            return
        self._wrap(mlp, partial(self._fewer, mlp, ways, down[0], own if isinstance(own, int) else keep))

    def _fewer(
        self,
        mlp: nn.Module,
        ways: dict[str, Any],
        down: str,
        keep: int | Tensor,
        forward: Callable[..., Any],
        x: Tensor,
    ) -> Tensor:
        """The feed-forward part, visual rows through the neurons `keep`."""
        seen = self.now
        if seen is None or not len(seen.flat) or x.shape[:2] != seen.queries.shape:
            return forward(x)
        some = slice(keep) if isinstance(keep, int) else keep.to(x.device)
        weights = {}
        for name, linear in ways.items():
            weights[f"inner.{name}.weight"] = linear.weight[:, some] if name == down else linear.weight[some]
            if linear.bias is not None and name != down:
                weights[f"inner.{name}.bias"] = linear.bias[some]
        flat = x.flatten(0, 1)
        visual = torch.func.functional_call(_Own(mlp, forward), weights, (flat[seen.flat],))
        return _joined(seen, forward(flat[seen.rest]), visual)

    # -- what a layer sees --

    def begin(self, run: Forward, number: int, now: Stretch, kwargs: dict[str, Any]) -> None:
        """Before a layer runs."""
        cache = cache_in(kwargs)
        if run.call is not None and run.past:
            raise SecateurError(
                "pictures came in a later turn on the same cache",
                where="work",
                fix="give the whole conversation at once",
            )
        remembers = any(map(self.work.pruned, range(self.work.last))) or self.masked(self.work.layers - 1)
        if static.is_static(cache) and remembers and run.call is not None:
            raise SecateurError(
                "a static cache doesn't tell which of its keys are visual",
                where="work",
                fix="use a DynamicCache, or leave heads and a masked cut out",
            )
        key = ("visual", id(now))
        if key not in run.memo:
            run.memo[key] = (self._look(run, now, cache), now)
        self.seen = run.memo[key][0]
        if self.seen is not None and run.past and cache is not None and number < len(cache.layers):
            keys = int(cache.get_mask_sizes(now.queries, number)[0])
            self.seen = _last(self.seen, keys)

    def _look(self, run: Forward, now: Stretch, cache: Any) -> Seen | None:
        marks: Tensor | None = getattr(cache, "_secateur_visual", None)  # [B, W] bool
        places = None
        if run.call is not None:
            places = self._places(run, now)
            marks = places[0] >= 0
            if cache is not None and not hasattr(cache, "_secateur_visual"):
                cache._secateur_visual = marks
        if marks is None:
            return None
        marks = marks.repeat_interleave(len(now.columns) // len(marks), 0)
        marks = F.pad(marks, (0, max(0, int(now.columns.max()) + 1 - marks.shape[1])))
        keys = marks.gather(1, now.columns) & now.valid
        if not bool(keys.any()):
            return None
        queries = keys[:, -now.queries :]
        near = lines = None
        if places is not None and self.work.window is not None:
            places = places.repeat_interleave(len(keys) // places.shape[1], 1)
            near = self._near(places, now)
            picture, line, _ = (own.gather(1, now.mine) for own in places)
            batch = torch.arange(len(keys), device=keys.device)[:, None]
            lines = (batch * (int(picture.max()) + 1) + picture) * (int(line.max()) + 1) + line
            lines = lines.masked_fill(~queries, -1)
        rest = ~queries
        text, there = pack(rest)
        flat = queries.flatten().nonzero()[:, 0]
        return Seen(queries, keys, now.valid, near, lines, text.masked_fill(~there, -1), rest.flatten().nonzero()[:, 0], flat)  # fmt: skip

    def _places(self, run: Forward, now: Stretch) -> Tensor:
        """int64 [3, B, W]: picture, row and column of the visual token in each column; -1: there is none."""
        call = run.call
        assert call is not None
        table, alive = call.table, call.table.alive
        places = torch.full((3, table.rows, int(now.columns.max()) + 1), -1, device=table.device)
        at = (table.row[alive], call.column_at[alive])
        frame = table.crop_id * (int(table.frame.max()) + 2) + table.frame + 1
        for own, values in zip(places, (frame, table.grid_row, table.grid_col)):
            own[at] = values[alive]
        if self.work.window is not None:
            largest = int(table.grid[alive].max()) if len(alive) else 0
            if not largest and len(alive):
                raise SecateurError(
                    "where this model's tokens lie on its pictures can't be told from outside",
                    where="window",
                    fix="leave window out",
                )
            if len(alive) and self.work.window > 2 * largest - 1:
                height, width = table.grid[alive].amax(0).tolist()
                raise SecateurError(
                    f"a window of {self.work.window} is larger than all that a grid of {height} x {width} tokens holds",
                    where="window",
                    fix=f"{2 * largest - 1} sees everything",
                )
        return places

    def _near(self, places: Tensor, now: Stretch) -> Tensor:
        """bool [B, L, M]."""
        picture, row, column = (own.gather(1, now.columns) for own in places)
        near = neighbours(row, column, picture, self.work.window or 1)
        if self.work.causal:
            near = near & (now.columns[:, None] <= now.columns[:, :, None])
        return near[:, -now.queries :]


class _Own(nn.Module):
    """A module's forward as it was before it was wrapped."""

    def __init__(self, inner: nn.Module, forward: Callable[..., Any]):
        super().__init__()
        self.inner, self.own = inner, forward

    def forward(self, x: Tensor) -> Tensor:
        return self.own(x)


def _joined(seen: Seen, text: Tensor, visual: Tensor) -> Tensor:
    """[rest, D] and [visual, D] -> [B, L, D]."""
    out = text.new_zeros(seen.queries.numel(), text.shape[1])
    out = out.index_copy(0, seen.rest, text).index_copy(0, seen.flat, visual.to(text.dtype))
    return out.unflatten(0, seen.queries.shape)


def _bands(may: Tensor, lines: Tensor, rest: Tensor) -> Bands:
    """may bool [B, L, M], lines int64 [B, L] (-1: none), rest [B, T] -> what each line may see."""
    row, slot = (lines >= 0).nonzero(as_tuple=True)
    _, group, count = lines[row, slot].unique(return_inverse=True, return_counts=True)
    order = group.argsort(stable=True)
    place = torch.arange(len(order), device=order.device) - (count.cumsum(0) - count)[group[order]]
    queries = torch.full((len(count), int(count.max())), -1, device=order.device)
    queries[group[order], place] = slot[order]
    batch = torch.zeros(len(count), dtype=torch.int64, device=order.device)
    batch[group] = row
    seen = may[batch[:, None], queries.clamp(min=0)] & (queries >= 0)[..., None]
    keys, there = pack(seen.any(1))
    return Bands(batch, queries, keys.masked_fill(~there, -1), rest)


def _last(seen: Seen, keys: int) -> Seen:
    """A sliding layer's cache holds the last keys alone."""
    if keys == seen.keys.shape[1]:
        return seen
    return Seen(seen.queries, seen.keys[:, -keys:], seen.valid[:, -keys:], None, None, seen.text, seen.rest, seen.flat, masks=seen.masks)  # fmt: skip
