"""Dropping between the layers of the language model: shorter hidden states, masks, rotary tables, and a cache whose layers have
different lengths.

What a later step must know (which columns each stretch of layers holds) hangs on the cache itself, so that beams,
several turns and several conversations at once need no further code. Shapes: B rows, L columns, T tokens of the table, D width.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from secateur.errors import SecateurError
from secateur.families.vlm.facts import decoder_of
from secateur.skipping.alive import gather_columns, pack
from secateur.tokens import static
from secateur.tokens.call import Call, Current
from secateur.tokens.choose import run_stage
from secateur.tokens.record import Key, Note, Recorder, attention_of
from secateur.tokens.sets import Outcome
from secateur.tokens.setup import Setup
from secateur.tokens.shorten import additive, gather_mask, window_of
from secateur.utils.versions import cache_in

KEYED = {"full_attention", "sliding_attention", "chunked_attention"}
"""Kinds of layer whose cache holds one key and value a token, and nothing else."""
STATE = {"linear_attention", "conv"}
"""Kinds that read the tokens one after another into a state of fixed size: behind a stage they read those that are left."""
ALONE = {"moe", "mlp"}
"""Kinds that see each token by itself."""


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
    bias: Tensor | None = None
    """[B, n] added to the attention logits of each key; None: nothing is."""

    @property
    def plain(self) -> bool:
        """A layer can be given what it would be given without secateur."""
        return self.identity and self.bias is None

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
    fewer: int = 0
    """How many columns less the cache's first layer of keys holds."""


@dataclass(eq=False)
class Parked:
    """P tokens that no layer reads or writes until they return."""

    token: Tensor
    """[P] rows of the table."""
    slot: Tensor
    """[P] whose place each has, as `Table.slot`."""
    column: Tensor
    """[P] the column that place is."""
    states: Tensor
    """[P, D] as they were; of the first beam, since all beams are alike in a prompt."""


@dataclass(eq=False)
class Forward:
    """One forward of the language model."""

    call: Call | None
    """None where the forward brings no pictures: a later step."""
    past: int
    """Columns of the conversation before this forward's."""
    mask: Tensor | None
    """[B, past + L] as given."""
    base: Stretch | None = None
    """What layer 0 sees."""
    held: Held | None = None
    """What an earlier forward left on the cache."""
    stretches: dict[int, Stretch] = field(default_factory=dict)
    """By the layer of the stage each begins at."""
    parked: Parked | None = None
    memo: dict[Any, Any] = field(default_factory=dict)
    """Masks and rotary tables, which all layers of a stretch share, beside what they were made of (so that its id stays its own)."""
    right: bool = False
    """Rows are padded on the right."""

    def now(self, number: int) -> Stretch:
        """The stretch that a layer belongs to."""
        assert self.base is not None
        before = [k for k in self.stretches if k <= number]
        return self.stretches[max(before)] if before else self.base


class DecoderDriver:
    """Shortens what the decoder layers are given: before each layer a hook may let a stage choose, and hands the layer the
    hidden states, mask, positions and rotary tables of the tokens that are left.

    `begin` tells it of every forward of the whole model; without that the hooks do nothing.
    """

    def __init__(self, setup: Setup, current: Current, recorder: Recorder | None, layers: Any):
        self.setup, self.current, self.recorder = setup, current, recorder
        self.decoder: Any = decoder_of(setup.model)
        self.run: Forward | None = None
        self.step: static.Step | None = None
        """A forward after the prompt on a static cache, in place of `run`."""
        self.handles: list[Any] = []
        self.watch: Callable[[Forward, int, Stretch, dict[str, Any]], None] | None = None
        """Told of every layer, of what it sees and of what it is given."""
        self.stages = sorted({p.number for p in setup.stages if p.kind == "layer"})
        self.remembered = set(setup.memory.layers) if setup.memory is not None else set()
        recorded = {n for kind, n in (recorder.forms if recorder else {}) if kind == "layer"}
        base = getattr(self.decoder.config, "_attn_implementation", None) or "eager"
        self.biases = {p.number if p.kind == "layer" else 0: p.stage.bias for p in setup.stages if p.weighs}
        """The names of carried numbers whose log is added to keys' logits, by the layer that they begin at."""
        if (self.stages or self.biases) and "flex" in base:
            raise SecateurError(
                "flex attention keeps its own block masks, which can't be shortened between layers",
                where="attach",
                fix='load the model with attn_implementation="sdpa"',
            )
        self.eager, self.flash = base == "eager", "flash" in base
        self.window = window_of(self.decoder.config) if self.stages else None
        kinds = list(getattr(self.decoder.config, "layer_types", None) or ())
        self.kinds = kinds or ["full_attention"] * len(layers)
        if self.biases and (self.flash or set(kinds[min(self.biases) :]) & STATE):
            what = "flash attention takes no mask" if self.flash else "some of its layers have no keys"
            raise SecateurError(
                f"{what}, so tokens can't be weighed as keys",
                where="attach",
                fix='load the model with attn_implementation="sdpa"' if self.flash else "use another model",
            )
        strange = set(kinds[min(self.stages, default=len(kinds)) :]) - KEYED - STATE - ALONE
        if strange:
            raise SecateurError(
                f"its {', '.join(sorted(strange))} layers keep other things than one key a token, and tokens that leave would still be in them",
                where="attach",
                fix="use a method that drops at the input",
            )
        self.parks = any(placed.stage.parks for placed in setup.stages)
        # the cache counts its first layer of keys; where that stands behind a stage, it holds fewer than were given
        keyed = [number for number, kind in enumerate(self.kinds) if kind in KEYED]
        self.counted = max((n for n in self.stages if keyed and n <= keyed[0]), default=None)
        """The stage that layer stands behind."""
        shared = [
            n
            for n, mode in enumerate(getattr(self.decoder.config, "kv_sharing_modes", ()))
            if mode == "reuse"
        ]
        if self.stages and shared and shared[-1] >= self.stages[0]:
            raise SecateurError(
                f"its layers from {shared[0]} on read the keys of earlier ones, which may hold tokens that left",
                where="attach",
                fix="use a method that drops at the input",
            )
        # layers before the first stage run as they are, so they need no hook
        first = 0 if setup.work is not None else min([*self.stages, *self.biases], default=len(layers))
        for number, layer in enumerate(layers):
            if number >= first or number in recorded:
                hook = self._hook(number)
                self.handles.append(layer.register_forward_pre_hook(hook, with_kwargs=True))
        self.names = list(inspect.signature(layers[0].forward).parameters)
        rotary = getattr(self.decoder, "rotary_emb", None)
        self.typed = rotary is not None and "layer_type" in inspect.signature(rotary.forward).parameters

    def remove(self) -> None:
        while self.handles:
            self.handles.pop().remove()
        self.run = self.step = None

    def begin(self, kwargs: Mapping[str, Any], call: Call | None, mask: Tensor | None) -> None:
        """Before a forward of the whole model; `mask` [B, columns]."""
        cache = cache_in(kwargs)
        if self.decoder.training and getattr(self.decoder, "gradient_checkpointing", False):
            raise SecateurError(
                "gradient checkpointing runs each layer twice, and tokens would leave twice",
                where="layer drop",
                fix="call model.gradient_checkpointing_disable()",
            )
        self.run = self.step = None
        if static.is_static(cache):
            if self.remembered:
                raise SecateurError(
                    "what is remembered from run to run isn't read off a static cache",
                    where="session",
                    fix="use a DynamicCache",
                )
            buffers = static.buffers_of(cache)
            if call is None:
                self.step = static.Step(buffers, mask) if buffers is not None else None
                return
        past = int(cache.get_seq_length()) if cache is not None else 0
        if self.biases and (past or static.is_static(cache)):
            raise SecateurError(
                "tokens are weighed as keys in one forward, not in the steps after it or on a static cache",
                where="attach",
                fix="give use_cache=False",
            )
        held = getattr(cache, "_secateur_layers", None)
        if isinstance(held, Held) and (past == 0 or past < held.seen):
            held = _cropped(held, past) if past else None
        self.run = Forward(call, past, mask, held=held)
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
            if self.step is not None:
                return self._later(self.step, number, layer, args, kwargs)
            if self.run is None:
                return None
            return self._before(number, layer, args, kwargs)

        return hook

    def _before(self, number: int, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        run = self.run
        assert run is not None
        kwargs = dict(zip(self.names, args)) | kwargs
        hidden: Tensor = kwargs.pop(self.names[0])  # [B, L, D]
        if run.base is None:
            run.base = self._base(run, hidden)
        if number in self.stages:
            hidden = self._stage(run, number, layer, hidden, kwargs)
        now = run.now(number)
        new = kwargs if now.plain else self._kwargs(run, now, number, layer, hidden, kwargs)
        if run.call is not None and self.recorder is not None:
            self.recorder.begin(("layer", number), layer, hidden, new, **_marks(run.call, now))
        if self.watch is not None:
            self.watch(run, number, now, new)
        begins = None if run.call is None else run.call.column_at
        if number in self.remembered and (begins is None) == bool(run.past):
            assert self.recorder is not None and self.current.session is not None
            about = (number, begins, now.columns, now.valid, cache_in(kwargs))
            self.recorder.taps["layer", number].rows = partial(self.current.session.note, *about)
        return (hidden,), new

    def _base(self, run: Forward, hidden: Tensor) -> Stretch:
        rows, length = hidden.shape[:2]
        columns = torch.arange(run.past + length, device=hidden.device).expand(rows, -1)
        valid = torch.ones(rows, run.past + length, dtype=torch.bool, device=hidden.device)
        # a mask may cover the last columns alone; what is before them counts as there
        if run.mask is not None:
            own = run.mask.bool()[:, -valid.shape[1] :]
            valid = torch.cat([valid[:, : valid.shape[1] - own.shape[1]], own], 1)
        zero = torch.zeros(rows, length, dtype=torch.int64, device=hidden.device)
        return Stretch(columns, valid, length, zero, zero[:, 0], bias=self._bias(run, 0, columns))

    def _bias(self, run: Forward, number: int, columns: Tensor) -> Tensor | None:
        """[B, n] the logs of the numbers that stages up to this layer carry for the keys `columns` [B, n]; None: none do."""
        names = [name for layer, name in sorted(self.biases.items()) if layer <= number]
        if run.call is None or not names:
            return None
        table, values = run.call.table, run.call.table.carried.get(names[-1] or "")
        if values is None:
            return None
        values = values[table.alive]
        there = ~values.isnan()
        row, at, values = table.row[table.alive][there], run.call.column_at[table.alive][there], values[there]
        if bool((values <= 0).any()):
            raise SecateurError(
                f"{names[-1]!r} isn't above 0 for some token, and its log is added",
                where="layer drop",
                fix="clamp it",
            )
        if not values.requires_grad and bool((values == 1).all()):
            return None
        bias = torch.zeros(table.rows, int(columns.max()) + 1, device=columns.device)
        bias = bias.index_put((row, at), values.log())
        return bias.repeat_interleave(run.call.expand, 0).gather(1, columns)

    def _stage(
        self, run: Forward, number: int, layer: nn.Module, hidden: Tensor, kwargs: dict[str, Any]
    ) -> Tensor:
        cache = cache_in(kwargs)
        self._check(cache, number)
        fixed = static.is_static(cache)
        before = run.now(number - 1)
        held = run.held.stretches.get(number) if run.held is not None else None
        if run.call is None or run.past:
            now = self._continue(run, before, held)
        else:
            hidden, now = self._drop(run, number, layer, before, hidden, kwargs)
        run.stretches[number] = now
        if fixed:
            assert run.base is not None
            after = [k for k in self.stages if k > number]
            layers = range(number, min(after, default=len(cache.layers)))
            static.hold(cache, layers, run.base.queries, now.columns, now.valid, now.gone, now.identity)
        elif cache is not None:
            state = getattr(cache, "_secateur_layers", None)
            if not isinstance(state, Held):
                state = cache._secateur_layers = Held(0, {})
            assert run.base is not None
            state.seen = run.past + run.base.queries
            state.stretches[number] = now
            if number == self.counted and not run.past:
                state.fewer = run.base.queries - now.columns.shape[1]
                cache.get_seq_length = MethodType(_seen, cache)
        return hidden

    def _check(self, cache: Any, number: int) -> None:
        layers = getattr(cache, "layers", None)
        # states of fixed size know no columns
        number = next((n for n in range(number, len(self.kinds)) if self.kinds[n] in KEYED), -1)
        if not layers or number < 0:
            return
        fix = "use a DynamicCache, or a method that drops at the input"
        kind = type(layers[min(number, len(layers) - 1)]).__name__
        if static.is_static(cache):
            if self.parks or self.stages[0] == 0:
                what = (
                    "tokens that are parked need room again in later layers than they had before"
                    if self.parks
                    else "a model counts what it has seen by its first layer, which would hold less"
                )
                raise SecateurError(
                    f"a static cache has buffers of a fixed size, and {what}",
                    where="layer drop",
                    fix="use a DynamicCache",
                )
            name = self.window[0] if self.window is not None else None
            if self.flash or name == "attention chunk":
                what = "flash attention" if self.flash else "an attention that is cut into chunks"
                raise SecateurError(
                    f"{what} wasn't tried on a static cache whose layers hold different tokens",
                    where="layer drop",
                    fix=fix,
                )
        elif "Dynamic" not in kind:
            raise SecateurError(
                f"a cache of {kind} wasn't tried with layers that hold different tokens",
                where="layer drop",
                fix=fix,
            )

    @staticmethod
    def _continue(run: Forward, before: Stretch, held: Stretch | None) -> Stretch:
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
        run: Forward,
        number: int,
        layer: nn.Module,
        before: Stretch,
        hidden: Tensor,
        kwargs: dict[str, Any],
    ) -> tuple[Tensor, Stretch]:
        """The first step: the stages before this layer choose, and the states [B, L, D] are shortened once for all of them."""
        call, recorder, setup = run.call, self.recorder, self.setup
        assert call is not None and run.base is not None
        table, step = call.table, call.expand
        stages = setup.stages_at("layer", number)
        if run.parked is not None and any(placed.stage.returns for placed in stages):
            hidden, before = _return(run, before, hidden)
            call.lengths[number] = before.mine_valid[::step].sum(1).cpu()
        now = kwargs if before.identity else self._kwargs(run, before, number, layer, hidden, kwargs)

        def peek(key: Key, raw: bool) -> Note:
            assert recorder is not None and call is not None
            return recorder.peek(key, layer, hidden, now, raw, **_marks(call, before))

        keep = before.mine_valid.clone()  # [B, L]
        changed = False
        for placed in stages:
            row = table.row[table.slot]
            slot = _slots(before, call)[table.slot]
            features = hidden[row * step, slot]  # [M, D] of the first beam; all beams are alike in a prompt
            outcome = run_stage(call, recorder, placed, table.alive, features, "layer", number, peek)
            if outcome is not None:
                changed = True
                if placed.stage.parks:
                    run.parked = _parked(outcome, call, features, run.parked)
                hidden = _apply(outcome, call, row, slot, features, keep, hidden)
            self.current.note(placed, table)
        if not changed:
            call.lengths[number] = before.mine_valid[::step].sum(1).cpu()
            bias = self._bias(run, number, before.columns)
            return hidden, before if bias is None else replace(before, bias=bias)

        index, valid = pack(keep, run.right)
        columns = before.mine.gather(1, index)
        call.lengths[number] = valid[::step].sum(1).cpu()
        # how many have left before each token: what its compact position falls by
        if all(placed.stage.positions == "original" for placed in stages):
            left, gone = before.left.gather(1, index), before.gone
        else:
            place = run.base.valid.cumsum(1).gather(1, columns) - valid.cumsum(1)
            left = place.masked_fill(~valid, 0)
            gone = run.base.valid.sum(1) - valid.sum(1)
        bias = self._bias(run, number, columns)
        now_left = Stretch(columns, valid, index.shape[1], left, gone, False, shorter=True, bias=bias)
        return gather_columns(hidden, index), now_left

    # -- what a layer is given --

    def _kwargs(
        self,
        run: Forward,
        now: Stretch,
        number: int,
        layer: nn.Module,
        hidden: Tensor,
        kwargs: Mapping[str, Any],
    ) -> dict[str, Any]:
        """The keyword arguments of a layer that sees the tokens of `now`."""
        assert run.base is not None
        if self.window is not None and run.base.columns.shape[1] > self.window[1]:
            name, size = self.window
            # both are counted by the attention itself, in the columns that are left
            if self.flash or name == "attention chunk":
                raise SecateurError(
                    f"{run.base.columns.shape[1]} tokens are more than the {name} of {size}, which counts tokens, not positions",
                    where="layer drop",
                    fix="shorten the prompt"
                    if name == "attention chunk"
                    else 'load the model with attn_implementation="sdpa"',
                )
        new = dict(kwargs)
        if now.shorter:
            at = now.mine - run.past  # [B, L'] slots of this forward before anything left
            for name, value in kwargs.items():
                new[name] = self._picked(run, now, name, value, at)
        new["attention_mask"] = self._mask(run, now, number, layer, hidden, kwargs)
        if self.setup.compact:
            places, tables = self._moved(run.memo, id(now), layer, hidden, new.get("position_ids"), now.left)
            changed = {"position_ids": places, "position_embeddings": tables}
            new |= {name: value for name, value in changed.items() if name in kwargs}
        return new

    def _picked(self, run: Forward, now: Stretch, name: str, value: Any, at: Tensor) -> Any:
        """What a layer is given by column, at the slots `at` [B, L'] that are left; anything else as it is."""
        assert run.base is not None
        if isinstance(value, tuple):
            return tuple(self._picked(run, now, name, each, at) for each in value)
        if not isinstance(value, Tensor) or value.dim() < 2 or name == "attention_mask":
            return value
        key = ("picked", id(now), id(value))
        if key not in run.memo:
            run.memo[key] = (_gather_slots(value, at, run.base.queries, name == "position_ids"), value)
        return run.memo[key][0]

    def _moved(
        self,
        memo: dict[Any, Any],
        stretch: int,
        layer: nn.Module,
        hidden: Tensor,
        places: Tensor | None,
        left: Tensor,
    ) -> tuple[Tensor, Any]:
        """Compact positions [B, L'] and rotary tables for them, in the layer's own type where the model has several."""
        if places is None:
            raise SecateurError(
                "its layers aren't told their positions", where="layer drop", fix='use positions="original"'
            )
        places = places.expand(*places.shape[:-2], len(hidden), -1) - left
        kind = getattr(layer, "attention_type", None) or getattr(attention_of(layer), "layer_type", None)
        key = ("rotary", stretch, kind)
        if key not in memo:
            memo[key] = self.decoder.rotary_emb(
                hidden, places, **({"layer_type": kind} if self.typed else {})
            )
        return places, memo[key]

    def _later(
        self,
        step: static.Step,
        number: int,
        layer: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """What a layer is given in a step after the prompt on a static cache: all that changes are masks and positions."""
        stage, cache = step.stage(number), cache_in(kwargs)
        if stage is None or cache is None:
            return None
        kwargs = dict(zip(self.names, args)) | kwargs
        hidden: Tensor = kwargs.pop(self.names[0])
        held = cache.layers[number]
        key = ("mask", stage, held.is_sliding)
        if key not in step.memo:
            window = self.window[1] if held.is_sliding and self.window is not None else None
            dtype = hidden.dtype if self.eager else None
            step.memo[key] = static.visible(step, stage, held, hidden.shape[1], window, dtype)
        new = {**kwargs, "attention_mask": step.memo[key]}
        if self.setup.compact:
            gone, places = static.left(step, stage, held), kwargs.get("position_ids")
            places, tables = self._moved(step.memo, stage, layer, hidden, places, gone)
            changed = {"position_ids": places, "position_embeddings": tables}
            new |= {name: value for name, value in changed.items() if name in kwargs}
        return (hidden,), new

    def _mask(
        self,
        run: Forward,
        now: Stretch,
        number: int,
        layer: nn.Module,
        hidden: Tensor,
        kwargs: Mapping[str, Any],
    ) -> Tensor | None:
        """The mask [B, 1, L', keys] of a layer, in the form its attention takes; None where it may see everything before it."""
        full = kwargs.get("attention_mask")
        if self.kinds[number] in ALONE or self.kinds[number] in STATE and run.past:
            return full
        if self.kinds[number] in STATE:
            return None if bool(now.valid.all()) else now.valid.to(torch.int64)
        # flash attention is told of padding alone
        if self.flash or (full is not None and full.dim() == 2):
            return None if bool(now.valid.all()) else now.valid.to(torch.int64)
        cache = cache_in(kwargs)
        keys = now.columns.shape[1]
        window = getattr(attention_of(layer), "sliding_window", None)
        if cache is not None and number < len(cache.layers):
            window = getattr(cache.layers[number], "sliding_window", window)
        if run.past and cache is not None:
            # a sliding layer's cache holds fewer keys than the conversation
            keys = int(cache.get_mask_sizes(now.queries, number)[0])
        key = ("mask", id(now), id(full), keys, window if run.past else None)
        if key in run.memo:
            return run.memo[key][0]

        columns, valid = now.columns[:, -keys:], now.valid[:, -keys:]
        mask: Tensor | None
        fixed = static.is_static(cache)
        if run.past:
            # the given mask knows nothing of columns that left, so later steps make their own
            if now.queries == 1 and bool(valid.all()) and (window is None or keys <= 1):
                mask = None
            else:
                mask = self._causal(now, columns, valid, window)
        elif full is None:
            mask = None if bool(valid.all()) and not fixed else self._causal(now, columns, valid, None)
        else:
            mask = self._gather(now, full)
        if mask is not None and mask.dtype == torch.bool:
            # padding sees itself: a row that sees nothing would be NaN
            eye = now.mine[:, None, :, None] == columns[:, None, None, :]
            mask = mask | (eye & ~now.mine_valid[:, None, :, None])
            if self.eager:
                mask = additive(mask, hidden.dtype)
        if now.bias is not None:
            bias = now.bias[:, None, None].to(hidden.dtype)
            mask = self._causal(now, columns, valid, None) if mask is None else mask
            lowest = torch.finfo(hidden.dtype).min
            mask = torch.where(mask, bias, lowest) if mask.dtype == torch.bool else mask + bias
        if fixed and mask is not None:
            empty = int(cache.get_mask_sizes(now.queries, number)[0]) - keys
            nothing = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
            mask = torch.nn.functional.pad(mask, (0, empty), value=nothing)
        run.memo[key] = (mask, full)
        return mask

    @staticmethod
    def _causal(now: Stretch, columns: Tensor, valid: Tensor, window: int | None) -> Tensor:
        """bool [B, 1, L', keys], by the columns that queries and keys had at first."""
        queries = now.mine[:, None, :, None]
        keys = columns[:, None, None, :]
        mask = (keys <= queries) & valid[:, None, None, :]
        return mask if window is None else mask & (keys > queries - window)

    @staticmethod
    def _gather(now: Stretch, full: Tensor) -> Tensor:
        """The given mask's rows and columns that are left, without padding."""
        mask = gather_mask(full, now.mine, now.columns)
        hidden = ~now.valid[:, None, None, :]
        if mask.dtype == torch.bool:
            return mask & ~hidden
        itself = now.mine[:, None, :, None] == now.columns[:, None, None, :]
        itself = itself & ~now.mine_valid[:, None, :, None]
        return mask.masked_fill(hidden, torch.finfo(mask.dtype).min).masked_fill(itself, 0)


def _gather_slots(value: Tensor, at: Tensor, length: int, three: bool) -> Tensor:
    """At `at` [B, L'] along the axis of the `length` slots: [B, L, ...], [B, 1, L, d], or [3, B, L, ...] of three axes."""
    rows = len(at)
    if value.dim() > 2 and value.shape[2] == length and value.shape[1] in (1, rows):
        axis = 2
        batch = 1 if three or value.shape[1] == rows > 1 or value.shape[0] not in (1, rows) else 0
    elif value.shape[1] == length and value.shape[0] in (1, rows):
        axis, batch = 1, 0
    else:
        return value
    wide = value.expand(*value.shape[:batch], rows, *value.shape[batch + 1 :])
    index = at.view(*[1] * batch, rows, *[1] * (axis - batch - 1), -1, *[1] * (value.dim() - axis - 1))
    return wide.gather(axis, index.expand(*wide.shape[:axis], at.shape[1], *wide.shape[axis + 1 :]))


def _marks(call: Call, now: Stretch) -> dict[str, Any]:
    """Where the slots of a recorded layer lie; the first beam speaks for all."""
    step = call.expand
    return {"columns": now.mine[::step], "valid": now.mine_valid[::step], "column_at": call.column_at}


def _slots(before: Stretch, call: Call) -> Tensor:
    """[T] slot of every token of the table that is left, seen through the place (`Table.slot`) it has."""
    table, step = call.table, call.expand
    columns, valid = before.mine[::step], before.mine_valid[::step]  # [B, L]
    where = torch.zeros(len(columns), int(columns.max()) + 1, dtype=torch.int64, device=columns.device)
    row, slot = valid.nonzero(as_tuple=True)
    where[row, columns[row, slot]] = slot
    slots = torch.zeros(len(table), dtype=torch.int64, device=columns.device)
    slots[table.slot] = where[table.row[table.alive], call.column_at[table.alive]]
    return slots


def _apply(
    outcome: Outcome, call: Call, row: Tensor, slot: Tensor, features: Tensor, keep: Tensor, hidden: Tensor
) -> Tensor:
    """Writes an outcome into the table and `keep` [B, L]; the states with what moved or was merged, [B, L, D].

    `row`, `slot` [M]: where the tokens that were handed in lie.
    """
    table, step, stays = call.table, call.expand, outcome.keep
    columns = call.column_at[table.alive][stays]
    table.alive, table.slot = table.alive[outcome.source], table.slot[stays]
    column_at = torch.full_like(call.column_at, -1)
    column_at[table.alive] = columns
    call.column_at = column_at  # replaced: notes hold the one before
    moved = outcome.replaced
    if moved is None and outcome.permuted:
        moved = features[outcome.source]
    if moved is not None:
        hidden = hidden.clone()
    for beam in range(step):
        keep[row[~stays] * step + beam, slot[~stays]] = False
        if moved is not None:
            hidden[row[stays] * step + beam, slot[stays]] = moved.to(hidden.dtype)
    return hidden


def _parked(outcome: Outcome, call: Call, features: Tensor, before: Parked | None) -> Parked:
    """The tokens that leave by an outcome, with their states among `features` [M, D], beside those that are parked already."""
    table, leave = call.table, ~outcome.keep
    token, slot = table.alive[leave], table.slot[leave]
    parts = [token, slot, call.column_at[token], features[leave]]
    if before is not None:
        parts = [
            torch.cat(pair) for pair in zip((before.token, before.slot, before.column, before.states), parts)
        ]
    return Parked(*parts)


def _return(run: Forward, before: Stretch, hidden: Tensor) -> tuple[Tensor, Stretch]:
    """All that is parked, back at its columns: the states [B, L', D] and what the layers from here on see."""
    call, base, parked = run.call, run.base, run.parked
    assert call is not None and base is not None and parked is not None
    table, step = call.table, call.expand
    table.alive, order = torch.cat([table.alive, parked.token]), torch.cat([table.slot, parked.slot])
    table.slot, order = order.sort()
    table.alive = table.alive[order]
    column_at = call.column_at.clone()
    column_at[parked.token] = parked.column
    call.column_at, run.parked = column_at, None

    row, slot = before.mine_valid.nonzero(as_tuple=True)
    there = torch.zeros_like(base.valid)
    full = hidden.new_zeros(*base.valid.shape, hidden.shape[-1])
    full[row, before.mine[row, slot]] = hidden[row, slot]
    there[row, before.mine[row, slot]] = True
    for beam in range(step):
        row = table.row[parked.slot] * step + beam
        full[row, parked.column] = parked.states.to(full.dtype)
        there[row, parked.column] = True
    if torch.equal(there, base.valid):
        # padding has left, and is as it was given wherever everything else is
        return full, dataclasses.replace(base, identity=False)
    index, valid = pack(there, run.right)
    place = base.valid.cumsum(1).gather(1, index) - valid.cumsum(1)
    now = Stretch(
        index,
        valid,
        index.shape[1],
        place.masked_fill(~valid, 0),
        base.valid.sum(1) - valid.sum(1),
        False,
        True,
    )
    return gather_columns(full, index), now


def _seen(cache: Any, layer_idx: int = 0) -> int:
    """`get_seq_length` of a cache whose first layer holds fewer tokens than it was given."""
    length = type(cache).get_seq_length(cache, layer_idx)
    return length + cache._secateur_layers.fewer if length and not layer_idx else length


def _cropped(held: Held, past: int) -> Held:
    """After `cache.crop`: only columns that are still there."""
    stretches = {}
    for number, s in held.stretches.items():
        gone = int((s.columns >= past).sum(1).max())
        size = s.columns.shape[1] - gone
        stretches[number] = Stretch(
            s.columns[:, :size], s.valid[:, :size], s.queries, s.left, s.gone, s.identity
        )
    return Held(past, stretches)
