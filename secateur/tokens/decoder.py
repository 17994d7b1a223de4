"""Dropping between the layers of the language model: shorter hidden states, masks, rotary tables, and a cache whose layers have
different lengths.

What a later step must know (which columns each stretch of layers holds) hangs on the cache itself, so that beams,
several turns and several conversations at once need no further code.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from secateur.errors import SecateurError
from secateur.tokens.call import Call, pack
from secateur.tokens.record import Note, attention_of, without_rotation
from secateur.utils.versions import cache_in, without_cache

if TYPE_CHECKING:
    from secateur.tokens.attach import Attached


@dataclass(eq=False)
class Stretch:
    """The layers from one stage to the next: the columns their cache holds, in the order of its slots."""

    columns: Tensor
    """[B, n] columns of the keys: the cached ones, then those of this forward."""
    valid: Tensor
    """[B, n] bool; False is padding."""
    queries: int
    """How many of them belong to this forward."""
    left: Tensor
    """[B, queries] how many tokens have left before each query."""
    gone: Tensor
    """[B] how many tokens of the row have left in all."""
    identity: bool = True
    """Nothing has left."""
    shorter: bool = False
    """In this forward."""

    @property
    def mine(self) -> Tensor:
        return self.columns[:, -self.queries :]

    @property
    def mine_valid(self) -> Tensor:
        return self.valid[:, -self.queries :]


@dataclass(eq=False)
class Held:
    """Kept on a cache: one stretch a stage, and how many columns layer 0 has seen."""

    seen: int
    stretches: dict[int, Stretch]


@dataclass(eq=False)
class Run:
    """One forward of the language model."""

    call: Call | None
    past: int
    mask: Tensor | None
    base: Stretch | None = None
    held: Held | None = None
    stretches: dict[int, Stretch] = field(default_factory=dict)
    memo: dict[Any, Any] = field(default_factory=dict)
    right: bool = False


class LayerDriver:
    def __init__(self, attached: Attached, layers: Any):
        self.attached = attached
        self.decoder: Any = attached.model.get_decoder()
        self.run: Run | None = None
        self.handles: list[Any] = []
        self.stages = sorted({p.number for p in attached.placed if p.kind == "layer"})
        recorded = {
            n for kind, n in (attached.recorder.wanted if attached.recorder else {}) if kind == "layer"
        }
        config = self.decoder.config
        base = getattr(config, "_attn_implementation", None) or "eager"
        if self.stages and "flex" in base:
            raise SecateurError(
                "flex attention keeps its own block masks, which can't be shortened between layers",
                where="attach",
                fix='load the model with attn_implementation="sdpa"',
            )
        self.eager, self.flash = base == "eager", "flash" in base
        first = self.stages[0] if self.stages else len(layers)
        for number, layer in enumerate(layers):
            if number >= first or number in recorded:
                hook = self._hook(number)
                self.handles.append(layer.register_forward_pre_hook(hook, with_kwargs=True))
        rotary = getattr(self.decoder, "rotary_emb", None)
        self.typed = rotary is not None and "layer_type" in inspect.signature(rotary.forward).parameters

    def remove(self) -> None:
        while self.handles:
            self.handles.pop().remove()
        self.run = None

    def begin(self, kwargs: Mapping[str, Any], call: Call | None) -> None:
        """Before a forward of the whole model."""
        cache, mask = cache_in(kwargs), kwargs.get("attention_mask")
        if self.decoder.training and getattr(self.decoder, "gradient_checkpointing", False):
            raise SecateurError(
                "gradient checkpointing runs each layer twice, and tokens would leave twice",
                where="layer drop",
                fix="call model.gradient_checkpointing_disable()",
            )
        past = int(cache.get_seq_length()) if cache is not None else 0
        held = getattr(cache, "_secateur_layers", None)
        if held is not None and (past == 0 or past < held.seen):
            held = _cropped(held, past) if past else None
        mask = mask if isinstance(mask, Tensor) and mask.dim() == 2 else None
        self.run = Run(call, past, mask, held=held)
        if call is not None and call.mask is not None and mask is not None:
            self.run.right = not bool(mask[:, -1].all()) and bool(mask[:, 0].all())

    def shorten(self, values: Tensor, fill: int) -> Tensor:
        """[B, L] as the language model was given them -> as its last layer left them."""
        run = self.run
        if run is None or not run.stretches:
            return values
        last = run.stretches[max(run.stretches)]
        if not last.shorter:
            return values
        return values.gather(1, last.mine - run.past).masked_fill(~last.mine_valid, fill)

    # -- hooks --

    def _hook(self, number: int) -> Any:
        def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if self.run is None:
                return None
            return self._before(number, layer, args, kwargs)

        return hook

    def _before(self, number: int, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        run = self.run
        assert run is not None
        hidden: Tensor = args[0] if args else kwargs["hidden_states"]
        if number in self.stages or run.base is None:
            if run.base is None:
                run.base = self._base(run, hidden)
            if number in self.stages:
                hidden = self._stage(run, number, layer, hidden, kwargs)
        now = self._now(run, number)
        new = kwargs if now.identity else self._kwargs(run, now, number, layer, hidden, kwargs)
        recorder = self.attached.recorder
        if run.call is not None and recorder is not None and ("layer", number) in recorder.wanted:
            self._record(run, now, number, layer, hidden, new)
        if args:
            return (hidden, *args[1:]), new
        return args, {**new, "hidden_states": hidden}

    def _now(self, run: Run, number: int) -> Stretch:
        assert run.base is not None
        before = [k for k in run.stretches if k <= number]
        return run.stretches[max(before)] if before else run.base

    def _base(self, run: Run, hidden: Tensor) -> Stretch:
        rows, length = hidden.shape[:2]
        columns = torch.arange(run.past + length, device=hidden.device).expand(rows, -1)
        valid = torch.ones(rows, run.past + length, dtype=torch.bool, device=hidden.device)
        if run.mask is not None:
            own = run.mask.bool()[:, -valid.shape[1] :]
            valid = torch.cat([valid[:, : valid.shape[1] - own.shape[1]], own], 1)
        zero = torch.zeros(rows, length, dtype=torch.int64, device=hidden.device)
        return Stretch(columns, valid, length, zero, zero[:, 0])

    def _stage(
        self, run: Run, number: int, layer: nn.Module, hidden: Tensor, kwargs: dict[str, Any]
    ) -> Tensor:
        cache = cache_in(kwargs)
        self._check(cache, number)
        before = self._now(run, number - 1)
        held = run.held.stretches.get(number) if run.held is not None else None
        if run.call is None or run.past:
            now = self._continue(run, before, held)
        else:
            hidden, now = self._drop(run, number, layer, before, hidden, kwargs)
        run.stretches[number] = now
        if cache is not None:
            state = getattr(cache, "_secateur_layers", None)
            if state is None or not isinstance(state, Held):
                state = cache._secateur_layers = Held(0, {})
            assert run.base is not None
            state.seen = run.past + run.base.queries
            state.stretches[number] = now
        return hidden

    @staticmethod
    def _check(cache: Any, number: int) -> None:
        layers = getattr(cache, "layers", None)
        if not layers:
            return
        kind = type(layers[min(number, len(layers) - 1)]).__name__
        if "Dynamic" not in kind:
            raise SecateurError(
                f"a cache of {kind} has one length for all layers, and tokens leave between them",
                where="layer drop",
                fix="use a DynamicCache, or a method that drops at the input",
            )

    @staticmethod
    def _continue(run: Run, before: Stretch, held: Stretch | None) -> Stretch:
        """A later step: everything new stays."""
        assert run.base is not None
        if held is None:
            return before
        rows = len(run.base.columns)
        times = rows // len(held.columns)
        old = [
            t.repeat_interleave(times, 0) if times > 1 else t for t in (held.columns, held.valid, held.gone)
        ]
        mine = run.base.columns[:, run.past :]
        columns = torch.cat([old[0], mine], 1)
        valid = torch.cat([old[1], run.base.valid[:, run.past :]], 1)
        left = old[2][:, None].expand_as(mine)
        return Stretch(columns, valid, mine.shape[1], left, old[2], held.identity)

    def _drop(
        self,
        run: Run,
        number: int,
        layer: nn.Module,
        before: Stretch,
        hidden: Tensor,
        kwargs: dict[str, Any],
    ) -> tuple[Tensor, Stretch]:
        call, attached = run.call, self.attached
        assert call is not None and run.base is not None
        table = call.table
        kwargs_now = kwargs if before.identity else self._kwargs(run, before, number, layer, hidden, kwargs)

        def peek(key: tuple[str, int], raw: bool) -> Note:
            return self._peek(run, before, key, layer, hidden, kwargs_now, raw)

        step = call.expand
        keep = before.mine_valid.clone()
        changed = False
        for placed in attached.stages_at("layer", number):
            slot = self._slots(before, call, step)
            row = table.row[table.slot]
            mine = slot[table.slot]
            features = hidden[row * step, mine]
            outcome = call.run_stage(placed, table.alive, features, "layer", number, peek)
            if outcome is not None:
                changed = True
                dropped_row, dropped = row[~outcome.keep], mine[~outcome.keep]
                kept_row, kept = row[outcome.keep], mine[outcome.keep]
                column_at = torch.full_like(call.column_at, -1)
                slots = table.slot[outcome.keep]
                columns = call.column_at[table.alive][outcome.keep]
                table.alive = table.alive[outcome.source]
                column_at[table.alive] = columns
                table.slot = slots
                moved = outcome.replaced
                if moved is None and outcome.permuted:
                    moved = features[outcome.source]
                if moved is not None:
                    hidden = hidden.clone()
                for beam in range(step):
                    keep[dropped_row * step + beam, dropped] = False
                    if moved is not None:
                        hidden[kept_row * step + beam, kept] = moved.to(hidden.dtype)
                call.column_at = column_at
            attached.note_kept(placed.label, table)
        if not changed:
            call.lengths[number] = before.mine_valid[::step].sum(1).cpu()
            return hidden, before
        index, valid = pack(keep, run.right)
        columns = before.mine.gather(1, index)
        hidden = hidden.gather(1, index[..., None].expand(-1, -1, hidden.shape[-1]))
        place = run.base.valid.cumsum(1).gather(1, columns) - valid.cumsum(1)
        left = place.masked_fill(~valid, 0)
        gone = run.base.valid.sum(1) - valid.sum(1)
        if all(placed.stage.positions == "original" for placed in attached.stages_at("layer", number)):
            left, gone = before.left.gather(1, index), before.gone
        call.lengths[number] = valid[::step].sum(1).cpu()
        return hidden, Stretch(columns, valid, index.shape[1], left, gone, identity=False, shorter=True)

    @staticmethod
    def _slots(before: Stretch, call: Call, step: int) -> Tensor:
        """[T] slot of every token of the table that is left, seen through the place (`slot`) it has."""
        table = call.table
        columns, valid = before.mine[::step], before.mine_valid[::step]
        width = int(columns.max()) + 1
        where = torch.zeros(len(columns), width, dtype=torch.int64, device=columns.device)
        row, slot = valid.nonzero(as_tuple=True)
        where[row, columns[row, slot]] = slot
        found = torch.zeros(len(table), dtype=torch.int64, device=columns.device)
        column = call.column_at[table.alive]
        found[table.slot] = where[table.row[table.alive], column]
        return found

    # -- what a layer is given --

    def _kwargs(
        self, run: Run, now: Stretch, number: int, layer: nn.Module, hidden: Tensor, kwargs: Mapping[str, Any]
    ) -> dict[str, Any]:
        new = dict(kwargs)
        new["attention_mask"] = self._mask(run, now, number, layer, hidden, kwargs)
        rows = len(hidden)
        tables, places = kwargs.get("position_embeddings"), kwargs.get("position_ids")
        at = now.mine - run.past
        if places is not None and now.shorter:
            places = places.expand(rows, -1).gather(1, at)
        if self.attached.compact:
            if places is None:
                raise SecateurError(
                    "its layers aren't told their positions",
                    where="layer drop",
                    fix='use positions="original"',
                )
            places = places.expand(rows, -1) - now.left
            kind = getattr(layer, "attention_type", None) or getattr(attention_of(layer), "layer_type", None)
            key = ("rotary", id(now), kind)
            if key not in run.memo:
                more = {"layer_type": kind} if self.typed else {}
                run.memo[key] = self.decoder.rotary_emb(hidden, places, **more)
            tables = run.memo[key]
        elif tables is not None and now.shorter:
            key = ("tables", id(now), id(tables))
            if key not in run.memo:
                run.memo[key] = (
                    tuple(
                        t.expand(rows, *t.shape[1:]).gather(1, at[..., None].expand(-1, -1, t.shape[-1]))
                        for t in tables
                    ),
                    tables,
                )
            tables = run.memo[key][0]
        if "position_ids" in kwargs:
            new["position_ids"] = places
        if "position_embeddings" in kwargs:
            new["position_embeddings"] = tables
        return new

    def _mask(
        self, run: Run, now: Stretch, number: int, layer: nn.Module, hidden: Tensor, kwargs: Mapping[str, Any]
    ) -> Tensor | None:
        given = kwargs.get("attention_mask")
        if self.flash or (given is not None and given.dim() == 2):
            return None if bool(now.valid.all()) else now.valid.to(torch.int64)
        cache = cache_in(kwargs)
        keys = now.columns.shape[1]
        window = getattr(attention_of(layer), "sliding_window", None)
        if cache is not None and number < len(cache.layers):
            window = getattr(cache.layers[number], "sliding_window", window)
        if run.past and cache is not None:
            keys = int(cache.get_mask_sizes(now.queries, number)[0])
        key = ("mask", id(now), id(given), keys, window if run.past else None)
        if key in run.memo:
            return run.memo[key][0]
        columns, valid = now.columns[:, -keys:], now.valid[:, -keys:]
        made: Tensor | None
        if run.past:
            if now.queries == 1 and bool(valid.all()) and (window is None or keys <= 1):
                made = None
            else:
                made = self._causal(now, columns, valid, window)
        elif given is None:
            made = None if bool(valid.all()) else self._causal(now, columns, valid, None)
        else:
            made = self._gather(now, given, len(hidden))
        if made is not None and made.dtype == torch.bool:
            eye = now.mine[:, None, :, None] == columns[:, None, None, :]
            made = made | (eye & ~now.mine_valid[:, None, :, None])
            if self.eager:
                made = torch.zeros(made.shape, dtype=hidden.dtype, device=made.device).masked_fill(
                    ~made, torch.finfo(hidden.dtype).min
                )
        run.memo[key] = (made, given)
        return made

    @staticmethod
    def _causal(now: Stretch, columns: Tensor, valid: Tensor, window: int | None) -> Tensor:
        queries = now.mine[:, None, :, None]
        keys = columns[:, None, None, :]
        made = (keys <= queries) & valid[:, None, None, :]
        if window is not None:
            made = made & (keys > queries - window)
        return made

    @staticmethod
    def _gather(now: Stretch, given: Tensor, rows: int) -> Tensor:
        made = given.expand(rows, *given.shape[1:])
        at = now.mine
        made = made.gather(2, at[:, None, :, None].expand(-1, made.shape[1], -1, made.shape[3]))
        made = made.gather(3, now.columns[:, None, None, :].expand(-1, made.shape[1], made.shape[2], -1))
        hidden = ~now.valid[:, None, None, :]
        if made.dtype == torch.bool:
            return made & ~hidden
        itself = (at[:, None, :, None] == now.columns[:, None, None, :]) & ~now.mine_valid[:, None, :, None]
        return made.masked_fill(hidden, torch.finfo(made.dtype).min).masked_fill(itself, 0)

    # -- notes --

    def _marks(self, run: Run, now: Stretch) -> dict[str, Any]:
        call = run.call
        assert call is not None
        step = call.expand
        return {
            "columns": now.mine[::step],
            "valid": now.mine_valid[::step],
            "column_at": call.column_at,
        }

    def _record(
        self, run: Run, now: Stretch, number: int, layer: nn.Module, hidden: Tensor, kwargs: Mapping[str, Any]
    ) -> None:
        recorder = self.attached.recorder
        assert recorder is not None
        key = ("layer", number)
        marks = self._marks(run, now)
        if "raw" in recorder.wanted[key]:
            recorder.notes[(*key, "raw")] = self._peek(run, now, key, layer, hidden, kwargs, True)
        recorder.start(key)
        recorder.place(key, **marks)

    def _peek(
        self,
        run: Run,
        now: Stretch,
        key: tuple[str, int],
        layer: nn.Module,
        hidden: Tensor,
        kwargs: Mapping[str, Any],
        raw: bool,
    ) -> Note:
        recorder = self.attached.recorder
        assert recorder is not None
        given = without_cache(without_rotation(kwargs) if raw else kwargs)
        given.pop("hidden_states", None)
        with torch.no_grad(), recorder.peeking(key) as note:
            layer.forward(hidden, **given)
        for name, value in self._marks(run, now).items():
            setattr(note, name, value)
        return note


def _cropped(held: Held, past: int) -> Held:
    """After `cache.crop`: only columns that are still there."""
    found = {}
    for number, s in held.stretches.items():
        gone = int((s.columns >= past).sum(1).max())
        size = s.columns.shape[1] - gone
        found[number] = Stretch(s.columns[:, :size], s.valid[:, :size], s.queries, s.left, s.gone, s.identity)
    return Held(past, found)
