"""Dropping inside the vision tower: patches leave between its blocks and are put back, as they last were, before what joins them.

The units are visual tokens: all patches of a merge group stay or leave together, so that what is put back never touches
a token that stayed. A vision transformer on its own gets nothing put back: its output is shorter.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from secateur.errors import SecateurError
from secateur.families.vlm.facts import each_patch, grids
from secateur.tokens import cost as account
from secateur.tokens.call import Call, pack
from secateur.tokens.record import Note, attention_of, part, without_rotation
from secateur.tokens.sets import make_table

if TYPE_CHECKING:
    from secateur.tokens.attach import Attached

MASKS = ("attention_mask", "attn_mask")
TABLES = ("position_embeddings", "rotary_pos_emb", "rope")


class State:
    """The tower's slots now. `place` [N, T'] the first place of each slot (packed: [T'])."""

    def __init__(self, hidden: Tensor, packed: bool, prefix: int, order: Tensor | None):
        self.packed, self.prefix = packed, prefix
        self.shape = hidden.shape
        device = hidden.device
        if packed:
            self.place = torch.arange(len(hidden), device=device)
            self.valid = torch.ones(len(hidden), dtype=torch.bool, device=device)
            patches = torch.arange(len(hidden), device=device) if order is None else order.to(device)
            self.first = torch.empty_like(patches)
            self.first[patches] = torch.arange(len(hidden), device=device)
        else:
            crops, length = hidden.shape[:2]
            self.place = torch.arange(length, device=device).expand(crops, -1)
            self.valid = torch.ones(crops, length, dtype=torch.bool, device=device)
            each = torch.arange(length - prefix, device=device) + prefix
            self.first = (torch.arange(crops, device=device)[:, None] * length + each).flatten()
        self.where = self.first
        """[patches] flat slot now; -1 where it has left."""
        self.units: Tensor | None = None
        self.stale: Tensor | None = None
        self.history: dict[int, tuple[Tensor, Tensor]] = {}
        self.masks: dict[Any, Any] = {}
        self.bias: Tensor | None = None
        """[N, T'] added to the attention logits of each slot as a key."""

    @property
    def shorter(self) -> bool:
        return self.stale is not None

    @property
    def ragged(self) -> bool:
        return not bool(self.valid.all())

    def put_back(self, hidden: Tensor, place: Tensor | None = None, valid: Tensor | None = None) -> Tensor:
        """Shorter states -> one for every patch; those that left are as they last were."""
        assert self.stale is not None
        place = self.place if place is None else place
        valid = self.valid if valid is None else valid
        if hidden.shape[-2] == self.stale.shape[-2]:
            return hidden
        full = self.stale.to(hidden.dtype).clone(memory_format=torch.contiguous_format)
        if self.packed:
            full[place] = hidden
            return full
        row, slot = valid.nonzero(as_tuple=True)
        full[row, place[row, slot]] = hidden[row, slot]
        return full


class EncoderDriver:
    def __init__(self, attached: Attached, tower: nn.Module, blocks: Any):
        self.attached, self.tower = attached, tower
        self.family = attached.family
        self.packed = self.family.packed
        self.state: State | None = None
        self.inputs: Mapping[str, Any] = {}
        self.stages = sorted({p.number for p in attached.placed if p.kind == "encoder"})
        self.handles: list[Any] = []
        self.blocks = blocks
        self.names = list(inspect.signature(blocks[0].forward).parameters)
        self.inner = sorted({p.number for p in attached.placed if p.kind == "inside"})
        self.undo: list[Callable[[], None]] = []
        self._can_mask = not self.packed and self.family.masks and any(name in self.names for name in MASKS)
        for number, block in enumerate(blocks):
            self.handles.append(block.register_forward_pre_hook(self._hook(number), with_kwargs=True))
        for number in self.inner:
            self._split(number, blocks[number])
        if not attached.plain:
            for module in self.family.full_before(tower):
                self.handles.append(module.register_forward_pre_hook(self._full))
            if not self.packed:
                self.handles.append(tower.register_forward_hook(self._exit))

    def remove(self) -> None:
        while self.undo:
            self.undo.pop()()
        while self.handles:
            self.handles.pop().remove()
        self.state = None

    @contextmanager
    def alone(self, kwargs: Mapping[str, Any]) -> Iterator[None]:
        """A vision transformer on its own runs inside."""
        self.inputs, self.state = kwargs, None
        attached = self.attached
        try:
            with attached.running(_Waiting):
                yield
        finally:
            self.state, self.inputs = None, {}

    # -- hooks --

    def _hook(self, number: int) -> Any:
        def hook(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if self.attached.call is None:
                return None
            return self._before(number, block, args, kwargs)

        return hook

    def _before(self, number: int, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        attached = self.attached
        names = self.names
        given = dict(zip(names, args)) | kwargs
        hidden: Tensor = given.pop(names[0])
        if hidden.dim() != (2 if self.packed else 3):
            raise SecateurError(
                f"its blocks see {hidden.dim()} dimensions, not a sequence of tokens", where="encoder drop"
            )
        if number == 0:
            self._begin(hidden)
        call, state = attached.call, self.state
        assert call is not None and state is not None
        now = self._kwargs(state, hidden, given)
        for placed in attached.stages_at("encoder", number):
            hidden = self._stage(state, call, placed, number, block, hidden, now)
            now = self._kwargs(state, hidden, given)
        state.history[number] = (state.place, state.valid)
        if number in self.stages:
            call.tower[number] = int(state.valid.sum())
        recorder = attached.recorder
        if recorder is not None and ("encoder", number) in recorder.wanted:
            key = ("encoder", number)
            if "raw" in recorder.wanted[key]:
                recorder.notes[(*key, "raw")] = self._peek(state, key, block, hidden, now, True)
            recorder.start(key)
            recorder.place(key, where=state.where)
        if not state.shorter and state.bias is None:
            return None
        return (hidden,), now

    def _split(self, number: int, block: nn.Module) -> None:
        """Makes a block's forward two halves, with the stages between its attention and its MLP."""
        own, original = block.__dict__.get("forward"), block.forward
        attention, norm = attention_of(block), part(block, "norm2", "layer_norm2", "layernorm_after")

        def halves(*args: Any, **kwargs: Any) -> Any:
            if self.attached.call is None:
                return original(*args, **kwargs)
            given = dict(zip(self.names, args)) | kwargs
            hidden: Tensor = given.pop(self.names[0])
            seen: list[Any] = []
            handles = (
                attention.register_forward_hook(lambda module, args, out: seen.append(out)),
                norm.register_forward_pre_hook(_caught),
            )
            try:
                original(hidden, **given)
            except _Middle as middle:
                hidden = middle.hidden
            finally:
                for handle in handles:
                    handle.remove()
            hidden = self._inside(number, block, hidden, given)
            with _silent(attention, isinstance(seen[0], tuple)):
                return original(hidden, **given)

        block.forward = halves

        def restore() -> None:
            if own is None:
                del block.forward
            else:
                block.forward = own

        self.undo.append(restore)

    def _inside(self, number: int, block: nn.Module, hidden: Tensor, given: Mapping[str, Any]) -> Tensor:
        attached, state = self.attached, self.state
        call, recorder = attached.call, attached.recorder
        assert call is not None and state is not None
        for placed in attached.stages_at("inside", number):
            hidden = self._stage(state, call, placed, -1, block, hidden, given)
        state.history[number] = (state.place, state.valid)
        call.tower[number + 1] = int(state.valid.sum())
        if recorder is not None and ("encoder", number, "") in recorder.notes:
            recorder.notes["encoder", number, ""].after = state.where
        return hidden

    def _begin(self, hidden: Tensor) -> None:
        attached = self.attached
        order = None
        if attached.call is _Waiting:
            attached.call = self._alone_call(hidden)
        call = attached.call
        assert call is not None
        if self.family.order is not None:
            kind = "image" if call.inputs.get("pixel_values") is not None else "video"
            order = self.family.order(attached.model, call.inputs[f"{kind}_grid_thw"])
        prefix = attached.facts.prefix
        self.state = State(hidden, self.packed, prefix, order)
        total = int(call.table.patches.max()) + 1
        if len(self.state.first) != total:
            raise SecateurError(
                f"the tower sees {len(self.state.first)} patches where {total} were expected", where="encoder"
            )
        call.tower_full = int(self.state.valid.sum())

    def _alone_call(self, hidden: Tensor) -> Call:
        attached = self.attached
        crops, length = hidden.shape[:2]
        count = length - attached.facts.prefix
        picture = next((v for v in self.inputs.values() if isinstance(v, Tensor) and v.dim() == 4), None)
        ratio = 1.0 if picture is None else picture.shape[-2] / picture.shape[-1]
        rows = max(1, round((count * ratio) ** 0.5))
        rows, columns = (rows, count // rows) if count % rows == 0 else (1, count)
        layout = grids([(rows, columns)] * crops, each_patch)
        row = torch.arange(crops, device=hidden.device).repeat_interleave(count)
        column = torch.arange(count, device=hidden.device).repeat(crops)
        table = make_table({"image": layout}, {"image": (row, column)}, crops)
        return Call(attached, attached.model, self.family, attached.facts, table, self.inputs, None, None)

    def _stage(
        self,
        state: State,
        call: Call,
        placed: Any,
        number: int,
        block: nn.Module,
        hidden: Tensor,
        now: Mapping[str, Any],
    ) -> Tensor:
        table, attached = call.table, self.attached
        if state.units is None:
            there = ((table.patches >= 0).any(1) & ~table.newline).nonzero()[:, 0]
            state.units = there[
                table.patches[there].masked_fill(table.patches[there] < 0, 2**62).amin(1).argsort()
            ]
        units = state.units
        patches = table.patches[units]
        slot = torch.where(patches >= 0, state.where[patches.clamp(min=0)], -1)
        flat = hidden.flatten(0, -2)
        if slot.shape[1] == 1:
            features = flat[slot[:, 0]]
        else:
            there = (slot >= 0)[..., None].to(flat.dtype)
            features = (flat[slot.clamp(min=0)] * there).sum(1) / there.sum(1).clamp(min=1)

        def peek(key: tuple[str, int], raw: bool) -> Note:
            return self._peek(state, key, block, hidden, now, raw)

        outcome = call.run_stage(placed, units, features, "encoder", number, peek)
        if outcome is not None:
            chosen = torch.zeros(len(units), dtype=torch.bool, device=units.device)
            chosen[outcome.source] = True
            if outcome.replaced is not None:
                change = outcome.replaced - features[outcome.source]
                if bool((change != 0).any()):
                    hidden = hidden.clone()
                    flat = hidden.flatten(0, -2)
                    at = slot[outcome.source]
                    if at.shape[1] == 1:
                        flat[at[:, 0]] = outcome.replaced.to(flat.dtype)
                    else:
                        good = at >= 0
                        spread = change[:, None].expand(-1, at.shape[1], -1)[good]
                        flat[at[good]] += spread.to(flat.dtype)
            if not bool(chosen.all()):
                hidden = self._shorten(state, hidden, slot[~chosen])
            state.units = units[chosen]
            gone = units[~chosen]
            left = torch.zeros(len(table), dtype=torch.bool, device=units.device)
            left[gone] = True
            stays = ~left[table.alive]
            table.alive, table.slot = table.alive[stays], table.slot[stays]
        if placed.stage.bias is not None:
            self._weigh(state, call, placed)
        attached.note_kept(placed.label, table)
        return hidden

    def _weigh(self, state: State, call: Call, placed: Any) -> None:
        """Takes up the bias that the stage carries."""
        sizes = call.table.carried.get(placed.stage.bias)
        if sizes is None or state.units is None:
            return
        sizes = sizes[state.units].nan_to_num(1.0)
        if state.bias is None and bool((sizes == 1).all()):
            return
        if not self._can_mask:
            raise SecateurError(
                "the blocks of this tower take no mask, so sizes can't weigh in their attention",
                where=placed.label,
                fix="use the method without sizes (proportional=False)",
            )
        patches = call.table.patches[state.units]
        slot = torch.where(patches >= 0, state.where[patches.clamp(min=0)], -1)
        bias = torch.zeros(state.place.numel(), device=sizes.device)
        there = slot >= 0
        bias[slot[there]] = sizes.log()[:, None].expand_as(slot)[there]
        state.bias = bias.view(state.place.shape)
        state.masks.clear()

    def _shorten(self, state: State, hidden: Tensor, gone: Tensor) -> Tensor:
        state.masks.clear()
        gone = gone[gone >= 0]
        if state.packed:
            state.stale = hidden if state.stale is None else state.put_back(hidden)
            keep = torch.ones(len(hidden), dtype=torch.bool, device=hidden.device)
            keep[gone] = False
            state.place, state.valid = state.place[keep], state.valid[keep]
            at = torch.full((state.shape[0],), -1, device=hidden.device)
            at[state.place] = torch.arange(len(state.place), device=hidden.device)
            state.where = at[state.first]
            return hidden[keep]
        state.stale = hidden if state.stale is None else state.put_back(hidden)
        keep = state.valid.clone()
        keep.view(-1)[gone] = False
        index, valid = pack(keep, right=True)
        if not bool(valid.all()):
            if not self._can_mask:
                raise SecateurError(
                    "crops keep different numbers of tokens, and the blocks of this tower take no mask",
                    where="encoder drop",
                    fix="keep an equal number in every crop",
                )
            if self.attached.plain and self.family.pools:
                raise SecateurError(
                    "pictures keep different numbers of tokens, and the head averages over padding",
                    where="encoder drop",
                    fix="keep an equal number in every picture",
                )
        hidden = hidden.gather(1, index[..., None].expand(-1, -1, hidden.shape[-1]))
        if state.bias is not None:
            state.bias = state.bias.gather(1, index)
        state.place = state.place.gather(1, index)
        state.valid = valid
        crops, length = state.shape[:2]
        at = torch.full((crops, length), -1, device=hidden.device)
        row, slot = valid.nonzero(as_tuple=True)
        at[row, state.place[row, slot]] = row * index.shape[1] + slot
        state.where = at.flatten()[state.first]
        return hidden

    # -- what a block is given --

    def _kwargs(self, state: State, hidden: Tensor, given: Mapping[str, Any]) -> dict[str, Any]:
        new = dict(given)
        if not state.shorter and state.bias is None:
            return new
        if state.packed:
            return self._packed_kwargs(state, new)
        for name in TABLES:
            if new.get(name) is not None:
                new[name] = self._table(state, new[name])
        mask = next((n for n in MASKS if n in self.names), None)
        if mask is not None:
            new[mask] = self._mask(state, hidden, new.get(mask))
        return new

    def _packed_kwargs(self, state: State, new: dict[str, Any]) -> dict[str, Any]:
        for name in TABLES:
            if new.get(name) is not None:
                new[name] = tuple(table[state.place] for table in new[name])
        lengths = new["cu_seqlens"]
        key = id(lengths)
        if key not in state.masks:
            kept = torch.zeros(state.shape[0] + 1, dtype=torch.int64, device=lengths.device)
            kept[state.place + 1] = 1
            short = kept.cumsum(0)[lengths.long()].unique_consecutive().to(lengths.dtype)
            state.masks[key] = (short, lengths)
        new["cu_seqlens"] = state.masks[key][0]
        if new.get("max_seqlen") is not None:
            most = new["cu_seqlens"].diff().max()
            new["max_seqlen"] = most if isinstance(new["max_seqlen"], Tensor) else int(most)
        return new

    def _table(self, state: State, tables: Any) -> Any:
        """Rotary tables [patches, d] or [..., patches, d] -> one for each crop's patches."""
        key = ("table", id(tables))
        if key in state.masks:
            return state.masks[key][0]

        def pick(table: Tensor) -> Tensor:
            length = state.shape[1]
            lead = length - table.shape[-2]
            at = (state.place[:, lead:] - lead).clamp(min=0)
            crops = len(at)
            if table.dim() == 2:
                return table[at][:, None]
            wide = table.expand(crops, *table.shape[1:]) if table.shape[0] == 1 else table
            index = at.view(crops, *[1] * (table.dim() - 3), at.shape[1], 1)
            return wide.gather(-2, index.expand(*wide.shape[:-2], at.shape[1], table.shape[-1]))

        found = tuple(map(pick, tables)) if isinstance(tables, tuple) else pick(tables)
        state.masks[key] = (found, tables)
        return found

    def _mask(self, state: State, hidden: Tensor, given: Tensor | None) -> Tensor | None:
        if given is None and not state.ragged and state.bias is None:
            return None
        key = ("mask", id(given))
        if key in state.masks:
            return state.masks[key][0]
        crops, short = state.place.shape
        made: Tensor
        if given is None:
            made = torch.ones(crops, 1, short, short, dtype=torch.bool, device=hidden.device)
        else:
            made = given.expand(crops, *given.shape[1:])
            at = state.place
            if made.shape[2] > 1:
                made = made.gather(2, at[:, None, :, None].expand(-1, made.shape[1], -1, made.shape[3]))
            made = made.gather(3, at[:, None, None].expand(-1, made.shape[1], made.shape[2], -1))
        if state.ragged:
            seen = state.valid[:, None, None]
            if made.dtype == torch.bool:
                made = made & seen
                config = getattr(self.tower, "config", None)
                if config is not None and getattr(config, "_attn_implementation", None) == "eager":
                    made = torch.zeros(made.shape, dtype=hidden.dtype, device=made.device).masked_fill(
                        ~made, torch.finfo(hidden.dtype).min
                    )
            else:
                made = made.masked_fill(~seen, torch.finfo(made.dtype).min)
        if state.bias is not None:
            bias = state.bias[:, None, None].to(hidden.dtype)
            if made.dtype == torch.bool:
                made = bias.expand(crops, 1, made.shape[2], -1).masked_fill(
                    ~made, torch.finfo(hidden.dtype).min
                )
            else:
                made = made + bias
        state.masks[key] = (made, given)
        return made

    # -- back to the full grid --

    def _full(self, module: nn.Module, args: tuple[Any, ...]) -> Any:
        if self.attached.call is None or self.state is None or not self.state.shorter:
            return None
        return (self.state.put_back(args[0]), *args[1:])

    def _exit(self, tower: nn.Module, args: Any, output: Any) -> Any:
        state = self.state
        if self.attached.call is None or state is None or not state.shorter:
            return None
        last = getattr(output, "last_hidden_state", None)
        if last is not None:
            output.last_hidden_state = state.put_back(last)
        states = getattr(output, "hidden_states", None)
        if states is not None:
            full = []
            for number, hidden in enumerate(states):
                if hidden is None or not number:
                    full.append(hidden)
                    continue
                place, valid = state.history[number - 1]
                full.append(state.put_back(hidden, place, valid))
            output.hidden_states = tuple(full)
        return output

    # -- notes --

    def _peek(
        self,
        state: State,
        key: tuple[str, int],
        block: nn.Module,
        hidden: Tensor,
        now: Mapping[str, Any],
        raw: bool,
    ) -> Note:
        recorder = self.attached.recorder
        assert recorder is not None
        given = without_rotation(now) if raw else dict(now)
        with torch.no_grad(), recorder.peeking(key) as note:
            block.forward(hidden, **given)
        note.where = state.where
        return note

    # -- counts --

    def counts(self, call: Call) -> tuple[float, float] | None:
        """Multiply-adds of the tower before and after."""
        if not call.tower_full:
            return None
        facts = self.attached.facts
        lengths, now = [], call.tower_full
        for block in range(facts.blocks):
            now = call.tower.get(block, now)
            lengths.append(float(now))
        crops = int(call.table.crop_id.max()) + 1
        full = [float(call.tower_full)] * facts.blocks
        return account.tower_flops(full, crops, facts), account.tower_flops(lengths, crops, facts)

    def report(self) -> dict[str, Any]:
        table = self.attached.table
        if table is None:
            return {"before": None, "after": None}
        return {
            "before": {"visual_tokens": table.visual},
            "after": {"visual_tokens": len(table.alive)},
        }


class _Middle(Exception):
    """Raised before a block's second norm: the residual stream between its attention and its MLP."""

    def __init__(self, hidden: Tensor):
        self.hidden = hidden


def _caught(module: nn.Module, args: tuple[Any, ...]) -> None:
    raise _Middle(args[0])


@contextmanager
def _silent(attention: nn.Module, pair: bool) -> Iterator[None]:
    """Inside, the module adds nothing."""
    own = attention.__dict__.get("forward")

    def nothing(*args: Any, **kwargs: Any) -> Any:
        given = args[0] if args else kwargs["hidden_states"]
        zero = torch.zeros_like(given)
        return (zero, None) if pair else zero

    attention.forward = nothing
    try:
        yield
    finally:
        if own is None:
            del attention.forward
        else:
            attention.forward = own


_Waiting: Any = object()
"""In place of a call until the first block of a tower on its own shows how many tokens there are."""
