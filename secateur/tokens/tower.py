"""Dropping inside the vision tower: patches leave between its blocks and are put back, as they last were, before what joins them.

The units are visual tokens: all patches of a merge group stay or leave together, so that what is put back never touches
a token that stayed. A vision transformer on its own gets nothing put back: its output is shorter.
Shapes: N crops, P slots of each at first, P' now (packed towers have one axis [P]), U units, T tokens of the table, D width.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from secateur.errors import SecateurError
from secateur.families.vlm.facts import each_patch, grids
from secateur.skipping.alive import gather_columns, pack
from secateur.tokens.call import Call, Current
from secateur.tokens.choose import run_stage
from secateur.tokens.record import Key, Note, Recorder, attention_of, part
from secateur.tokens.sets import Outcome, make_table
from secateur.tokens.setup import Placed, Setup
from secateur.tokens.shorten import additive, gather_mask

MASKS = ("attention_mask", "attn_mask")
TABLES = ("position_embeddings", "rotary_pos_emb", "rope")
"""Names under which blocks take their mask and their rotary tables."""


class State:
    """The tower's slots in one run: `place` [N, P'] the first place of each slot, `valid` [N, P'] which aren't padding."""

    def __init__(self, hidden: Tensor, packed: bool, prefix: int, order: Tensor | None):
        self.packed, self.prefix = packed, prefix
        self.shape = hidden.shape
        """[N, P, D] (packed: [P, D]) before anything left."""
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
        """[patches] flat slot at first."""
        self.where = self.first
        """[patches] flat slot now; -1 where it has left."""
        self.units: Tensor | None = None
        """[U] tokens of the table that are left, by their first patch."""
        self.stale: Tensor | None = None
        """States of all slots, those that left as they last were; None while all are there."""
        self.history: dict[int, tuple[Tensor, Tensor]] = {}
        """`place` and `valid` after each block."""
        self.memo: dict[Any, Any] = {}
        """Masks and tables for the slots now, beside what they were made of (so that its id stays its own)."""
        self.bias: Tensor | None = None
        """[N, P'] added to the attention logits of each slot as a key."""

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


class TowerDriver:
    """Shortens what the blocks of the vision tower are given: before each block a hook may let a stage choose, and hands
    the block the states, mask and tables of the patches that are left. Blocks with a stage inside run as two halves.

    Around a vision-language model the input driver says which call runs; a tower on its own runs inside `alone`, and its
    call is made when the first block shows how many tokens there are.
    """

    def __init__(
        self, setup: Setup, current: Current, recorder: Recorder | None, tower: nn.Module, blocks: Any
    ):
        self.setup, self.current, self.recorder, self.tower = setup, current, recorder, tower
        self.family, self.packed = setup.family, setup.family.packed
        self.state: State | None = None
        self.inputs: Mapping[str, Any] | None = None
        """Of a tower that runs on its own, while it does."""
        self.stages = sorted({p.number for p in setup.stages if p.kind == "encoder"})
        self.names = list(inspect.signature(blocks[0].forward).parameters)
        self.undo: list[Callable[[], None]] = []
        self._can_mask = not self.packed and self.family.masks and any(name in self.names for name in MASKS)
        for number, block in enumerate(blocks):
            hook = block.register_forward_pre_hook(self._hook(number), with_kwargs=True)
            self.undo.append(hook.remove)
        for number in sorted({p.number for p in setup.stages if p.kind == "inside"}):
            self._split(number, blocks[number])
        if not setup.plain:
            for module in self.family.full_before(tower):
                self.undo.append(module.register_forward_pre_hook(self._full).remove)
            if not self.packed:
                self.undo.append(tower.register_forward_hook(self._exit).remove)

    def remove(self) -> None:
        while self.undo:
            self.undo.pop()()
        self.state = None

    @contextmanager
    def alone(self, kwargs: Mapping[str, Any]) -> Iterator[None]:
        """A vision transformer on its own runs inside."""
        self.inputs, self.state = kwargs, None
        try:
            with self.current.running(None):
                yield
        finally:
            self.state = self.inputs = None

    # -- hooks --

    def _hook(self, number: int) -> Any:
        def hook(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if self.current.call is None and self.inputs is None:
                return None
            return self._before(number, block, args, kwargs)

        return hook

    def _before(self, number: int, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        full = dict(zip(self.names, args)) | kwargs
        hidden: Tensor = full.pop(self.names[0])  # [N, P', D]
        if hidden.dim() != (2 if self.packed else 3):
            raise SecateurError(
                f"its blocks see {hidden.dim()} dimensions, not a sequence of tokens", where="encoder drop"
            )
        if number == 0:
            self._begin(hidden)
        call, state = self.current.call, self.state
        assert call is not None and state is not None
        now = self._kwargs(state, hidden, full)
        for placed in self.setup.stages_at("encoder", number):
            hidden = self._stage(state, call, placed, number, block, hidden, now)
            now = self._kwargs(state, hidden, full)
        state.history[number] = (state.place, state.valid)
        if number in self.stages:
            call.tower[number] = int(state.valid.sum())
        if self.recorder is not None:
            self.recorder.begin(("encoder", number), block, hidden, now, where=state.where)
        if not state.shorter and state.bias is None:
            return None
        return (hidden,), now

    def _split(self, number: int, block: nn.Module) -> None:
        """Makes a block's forward two halves, with the stages between its attention and its MLP."""
        # the first half is the block itself, left at its second norm; the second the block with an attention that adds nothing
        own, original = block.__dict__.get("forward"), block.forward
        attention, norm = attention_of(block), part(block, "norm2", "layer_norm2", "layernorm_after")

        def halves(*args: Any, **kwargs: Any) -> Any:
            if self.current.call is None:
                return original(*args, **kwargs)
            rest = dict(zip(self.names, args)) | kwargs
            hidden: Tensor = rest.pop(self.names[0])
            seen: list[Any] = []
            handles = (
                attention.register_forward_hook(lambda module, args, out: seen.append(out)),
                norm.register_forward_pre_hook(_caught),
            )
            try:
                original(hidden, **rest)
            except _Middle as middle:
                hidden = middle.hidden
            finally:
                for handle in handles:
                    handle.remove()
            hidden = self._inside(number, block, hidden, rest)
            with _silent(attention, isinstance(seen[0], tuple)):
                return original(hidden, **rest)

        block.forward = halves

        def restore() -> None:
            if own is None:
                del block.forward
            else:
                block.forward = own

        self.undo.append(restore)

    def _inside(self, number: int, block: nn.Module, hidden: Tensor, now: Mapping[str, Any]) -> Tensor:
        call, state = self.current.call, self.state
        assert call is not None and state is not None
        for placed in self.setup.stages_at("inside", number):
            # no stage peeks from inside: number -1 is no block's
            hidden = self._stage(state, call, placed, -1, block, hidden, now)
        state.history[number] = (state.place, state.valid)
        call.tower[number + 1] = int(state.valid.sum())
        if self.recorder is not None and ("encoder", number, "") in self.recorder.notes:
            self.recorder.notes["encoder", number, ""].after = state.where
        return hidden

    def _begin(self, hidden: Tensor) -> None:
        """Before the first block."""
        if self.current.call is None:
            self.current.call = self._alone_call(hidden)
        call, order = self.current.call, None
        if self.family.order is not None:
            kind = "image" if call.inputs.get("pixel_values") is not None else "video"
            order = self.family.order(self.setup.model, call.inputs[f"{kind}_grid_thw"])
        self.state = State(hidden, self.packed, self.setup.facts.prefix, order)
        total = int(call.table.patches.max()) + 1
        if len(self.state.first) != total:
            raise SecateurError(
                f"the tower sees {len(self.state.first)} patches where {total} were expected", where="encoder"
            )
        call.tower_full = int(self.state.valid.sum())

    def _alone_call(self, hidden: Tensor) -> Call:
        """Every patch is a token, on a grid of the picture's shape; a row for each picture."""
        assert self.inputs is not None
        crops, length = hidden.shape[:2]
        count = length - self.setup.facts.prefix
        picture = next((v for v in self.inputs.values() if isinstance(v, Tensor) and v.dim() == 4), None)
        ratio = 1.0 if picture is None else picture.shape[-2] / picture.shape[-1]
        rows = max(1, round((count * ratio) ** 0.5))
        rows, columns = (rows, count // rows) if count % rows == 0 else (1, count)
        layout = grids([(rows, columns)] * crops, each_patch)
        row = torch.arange(crops, device=hidden.device).repeat_interleave(count)
        column = torch.arange(count, device=hidden.device).repeat(crops)
        table = make_table({"image": layout}, {"image": (row, column)}, crops)
        return Call(self.setup, table, self.inputs, None, None)

    def _stage(
        self,
        state: State,
        call: Call,
        placed: Placed,
        number: int,
        block: nn.Module,
        hidden: Tensor,
        now: Mapping[str, Any],
    ) -> Tensor:
        """A stage chooses among the units that are left; the states [N, P', D] without those that leave."""
        table = call.table
        if state.units is None:
            # every token that has patches, in the order of the first of them
            there = ((table.patches >= 0).any(1) & ~table.newline).nonzero()[:, 0]
            patches = table.patches[there]
            state.units = there[patches.masked_fill(patches < 0, 2**62).amin(1).argsort()]
        units = state.units
        slot = _slots(state, call)
        features = _mean_over_patches(hidden, slot)

        def peek(key: Key, raw: bool) -> Note:
            assert self.recorder is not None
            return self.recorder.peek(key, block, hidden, now, raw, where=state.where)

        outcome = run_stage(call, self.recorder, placed, units, features, "encoder", number, peek)
        if outcome is not None:
            # the tower keeps its own order, so only the set of those that stay counts
            stays = torch.zeros(len(units), dtype=torch.bool, device=units.device)  # [U]
            stays[outcome.source] = True
            if outcome.replaced is not None:
                hidden = _replace(outcome, hidden, features, slot)
            if not bool(stays.all()):
                hidden = self._shorten(state, hidden, slot[~stays])
            state.units = units[stays]
            left = torch.zeros(len(table), dtype=torch.bool, device=units.device)  # [T]
            left[units[~stays]] = True
            alive = ~left[table.alive]
            table.alive, table.slot = table.alive[alive], table.slot[alive]
        if placed.stage.bias is not None:
            self._weigh(state, call, placed)
        self.current.note(placed, table)
        return hidden

    def _weigh(self, state: State, call: Call, placed: Placed) -> None:
        """Takes up the bias that the stage carries: the log of each unit's size, on all of its slots."""
        assert placed.stage.bias is not None
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
        slot = _slots(state, call)
        bias = torch.zeros(state.place.numel(), device=sizes.device)
        there = slot >= 0
        bias[slot[there]] = sizes.log()[:, None].expand_as(slot)[there]
        state.bias = bias.view(state.place.shape)
        state.memo.clear()

    def _shorten(self, state: State, hidden: Tensor, gone: Tensor) -> Tensor:
        """The states without the flat slots `gone` [U', m] (-1 none); the state follows."""
        state.memo.clear()
        gone = gone[gone >= 0]
        state.stale = hidden if state.stale is None else state.put_back(hidden)
        if state.packed:
            keep = torch.ones(len(hidden), dtype=torch.bool, device=hidden.device)
            keep[gone] = False
            state.place, state.valid = state.place[keep], state.valid[keep]
            at = torch.full((state.shape[0],), -1, device=hidden.device)
            at[state.place] = torch.arange(len(state.place), device=hidden.device)
            state.where = at[state.first]
            return hidden[keep]
        keep = state.valid.clone()
        keep.view(-1)[gone] = False
        index, valid = pack(keep, right=True)  # [N, P'']
        if not bool(valid.all()):
            self._refuse_ragged()
        hidden = gather_columns(hidden, index)
        if state.bias is not None:
            state.bias = state.bias.gather(1, index)
        state.place, state.valid = state.place.gather(1, index), valid
        at = torch.full(state.shape[:2], -1, device=hidden.device)  # [N, P]
        row, slot = valid.nonzero(as_tuple=True)
        at[row, state.place[row, slot]] = row * index.shape[1] + slot
        state.where = at.flatten()[state.first]
        return hidden

    def _refuse_ragged(self) -> None:
        """Crops of different lengths are padded, and padding must be masked everywhere."""
        if not self._can_mask:
            raise SecateurError(
                "crops keep different numbers of tokens, and the blocks of this tower take no mask",
                where="encoder drop",
                fix="keep an equal number in every crop",
            )
        if self.setup.plain and self.family.pools:
            raise SecateurError(
                "pictures keep different numbers of tokens, and the head averages over padding",
                where="encoder drop",
                fix="keep an equal number in every picture",
            )

    # -- what a block is given --

    def _kwargs(self, state: State, hidden: Tensor, full: Mapping[str, Any]) -> dict[str, Any]:
        """The keyword arguments `full`, made for all patches, for those that are left."""
        new = dict(full)
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
        """Rotary tables by slot, and cumulative lengths of the windows or pictures; empty ones vanish."""
        for name in TABLES:
            if new.get(name) is not None:
                new[name] = tuple(table[state.place] for table in new[name])
        lengths = new["cu_seqlens"]
        key = id(lengths)
        if key not in state.memo:
            kept = torch.zeros(state.shape[0] + 1, dtype=torch.int64, device=lengths.device)
            kept[state.place + 1] = 1
            short = kept.cumsum(0)[lengths.long()].unique_consecutive().to(lengths.dtype)
            state.memo[key] = (short, lengths)
        new["cu_seqlens"] = state.memo[key][0]
        if new.get("max_seqlen") is not None:
            most = new["cu_seqlens"].diff().max()
            new["max_seqlen"] = most if isinstance(new["max_seqlen"], Tensor) else int(most)
        return new

    def _table(self, state: State, tables: Any) -> Any:
        """Rotary tables [patches, d] or [..., patches, d] -> one for each crop's patches."""
        key = ("table", id(tables))
        if key in state.memo:
            return state.memo[key][0]

        def pick(table: Tensor) -> Tensor:
            # tables leave out the tokens before the patches that aren't rotated
            lead = state.shape[1] - table.shape[-2]
            at = (state.place[:, lead:] - lead).clamp(min=0)
            crops = len(at)
            if table.dim() == 2:
                return table[at][:, None]  # [N, 1, P', d]
            wide = table.expand(crops, *table.shape[1:]) if table.shape[0] == 1 else table
            index = at.view(crops, *[1] * (table.dim() - 3), at.shape[1], 1)
            return wide.gather(-2, index.expand(*wide.shape[:-2], at.shape[1], table.shape[-1]))

        picked = tuple(map(pick, tables)) if isinstance(tables, tuple) else pick(tables)
        state.memo[key] = (picked, tables)
        return picked

    def _mask(self, state: State, hidden: Tensor, full: Tensor | None) -> Tensor | None:
        """[N, 1, P', P'] of what may be seen, with the bias of sizes; None where all may be."""
        if full is None and not state.ragged and state.bias is None:
            return None
        key = ("mask", id(full))
        if key in state.memo:
            return state.memo[key][0]
        crops, short = state.place.shape
        if full is None:
            mask = torch.ones(crops, 1, short, short, dtype=torch.bool, device=hidden.device)
        else:
            mask = gather_mask(full, state.place, state.place)
        if state.ragged:
            real = state.valid[:, None, None]
            if mask.dtype == torch.bool:
                mask = mask & real
                config = getattr(self.tower, "config", None)
                if config is not None and getattr(config, "_attn_implementation", None) == "eager":
                    mask = additive(mask, hidden.dtype)
            else:
                mask = mask.masked_fill(~real, torch.finfo(mask.dtype).min)
        if state.bias is not None:
            bias = state.bias[:, None, None].to(hidden.dtype)
            if mask.dtype == torch.bool:
                lowest = torch.finfo(hidden.dtype).min
                mask = bias.expand(crops, 1, mask.shape[2], -1).masked_fill(~mask, lowest)
            else:
                mask = mask + bias
        state.memo[key] = (mask, full)
        return mask

    # -- back to the full grid --

    def _full(self, module: nn.Module, args: tuple[Any, ...]) -> Any:
        if self.current.call is None or self.state is None or not self.state.shorter:
            return None
        return (self.state.put_back(args[0]), *args[1:])

    def _exit(self, tower: nn.Module, args: Any, output: Any) -> Any:
        state = self.state
        if self.current.call is None or state is None or not state.shorter:
            return None
        last = getattr(output, "last_hidden_state", None)
        if last is not None:
            output.last_hidden_state = state.put_back(last)
        states = getattr(output, "hidden_states", None)
        if states is not None:
            # output 0 is what block 0 was given, before anything left
            full = []
            for number, hidden in enumerate(states):
                if hidden is None or not number:
                    full.append(hidden)
                    continue
                place, valid = state.history[number - 1]
                full.append(state.put_back(hidden, place, valid))
            output.hidden_states = tuple(full)
        return output


def _slots(state: State, call: Call) -> Tensor:
    """[U, m] flat slots of the patches of every unit that is left; -1 none."""
    assert state.units is not None
    patches = call.table.patches[state.units]
    return torch.where(patches >= 0, state.where[patches.clamp(min=0)], -1)


def _mean_over_patches(hidden: Tensor, slot: Tensor) -> Tensor:
    """States [N, P', D] at slots [U, m] -> the units' features [U, D]."""
    flat = hidden.flatten(0, -2)
    if slot.shape[1] == 1:
        return flat[slot[:, 0]]
    there = (slot >= 0)[..., None].to(flat.dtype)
    return (flat[slot.clamp(min=0)] * there).sum(1) / there.sum(1).clamp(min=1)


def _replace(outcome: Outcome, hidden: Tensor, features: Tensor, slot: Tensor) -> Tensor:
    """The states with new features of the units that stay; what a unit changed by, each of its patches changes by."""
    assert outcome.replaced is not None
    change = outcome.replaced - features[outcome.source]
    if not bool((change != 0).any()):
        return hidden
    # towers without CLS hand over transposed states, of which flatten makes a copy
    hidden = hidden.clone(memory_format=torch.contiguous_format)
    flat = hidden.flatten(0, -2)
    at = slot[outcome.source]
    if at.shape[1] == 1:
        flat[at[:, 0]] = outcome.replaced.to(flat.dtype)
    else:
        good = at >= 0
        flat[at[good]] += change[:, None].expand(-1, at.shape[1], -1)[good].to(flat.dtype)
    return hidden


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
        zero = torch.zeros_like(args[0] if args else kwargs["hidden_states"])
        return (zero, None) if pair else zero

    attention.forward = nothing
    try:
        yield
    finally:
        if own is None:
            del attention.forward
        else:
            attention.forward = own
