"""Dropping before the language model: shorter ids, mask and positions, and the features that stay. No hook.

Shapes: B rows, L columns, N visual tokens, T tokens of the table, D width.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from secateur.errors import SecateurError
from secateur.families.vlm import Layout
from secateur.families.vlm.facts import decoder_of, encoder_of, placeholder, slot_of
from secateur.skipping.alive import pack
from secateur.tokens.call import Call, Current
from secateur.tokens.choose import run_stage
from secateur.tokens.glimpse import look
from secateur.tokens.pyramid import levels_of, regroup
from secateur.tokens.record import Recorder
from secateur.tokens.room import room, widened
from secateur.tokens.sets import make_table
from secateur.tokens.setup import Placed, Setup
from secateur.tokens.shorten import window_of
from secateur.tokens.tiles import check, crops_of, next_tiles, pictures_of, reading, together
from secateur.utils.versions import cache_in, cache_name

Places = dict[str, tuple[Tensor, Tensor]]
"""Row and column of each placeholder, [N] each, by kind."""
KINDS = {"image": "pixel_values", "video": "pixel_values_videos"}
SHORTENED = ("input_ids", "attention_mask", "position_ids")
TYPES = ("token_type_ids", "mm_token_type_ids")


@dataclass(eq=False)
class Turn:
    """Kept on a cache: which columns of the conversation it holds, and at which positions.

    `seen` columns were given so far; `columns` [B, n] of them are in the cache's coordinates, `valid` [B, n] aren't
    padding; `positions` [..., B, n]; what comes after `seen` follows one by one.
    """

    seen: int
    columns: Tensor
    valid: Tensor
    positions: Tensor
    mask: Tensor

    def rows(self, count: int) -> Turn:
        """For `count` rows: several beams of each prompt."""
        have = len(self.columns)
        if have == count:
            return self
        if count % have:
            raise SecateurError(f"the cache holds {have} rows, the inputs {count}", where="generate")
        times = count // have
        return Turn(
            self.seen,
            self.columns.repeat_interleave(times, 0),
            self.valid.repeat_interleave(times, 0),
            self.positions.repeat_interleave(times, -2),
            self.mask.repeat_interleave(times, 0),
        )

    def ids(self, full: Tensor, pad: int) -> Tensor:
        """Ids of a whole conversation -> as the cache counts them."""
        old = full[:, : self.seen].gather(1, self.columns).masked_fill(~self.valid, pad)
        return torch.cat([old, full[:, self.seen :]], 1)

    def attention(self, full: Tensor | None, length: int) -> Tensor:
        """The 2-D mask; `length` columns in the conversation."""
        rest = self.valid.new_ones(len(self.valid), length - self.seen)
        if full is not None and full.shape[1] == length:
            rest = full[:, self.seen :].bool()
        return torch.cat([self.valid, rest], 1).long()

    def place(self, mask: Tensor) -> Tensor:
        """Positions of every column of a mask made by `attention`."""
        rest = mask[:, self.columns.shape[1] :]
        more = self.positions[..., -1:] + rest.cumsum(1)
        return torch.cat([self.positions, more], -1)


def flat(output: Any) -> Tensor:
    """Projected features [N, D] of what an image or video encoder gave."""
    features = getattr(output, slot_of(output))
    parts = [features] if isinstance(features, Tensor) else list(features)
    return torch.cat([p.reshape(-1, p.shape[-1]) for p in parts])


def encode(model: Any, kind: str, kwargs: Mapping[str, Any]) -> Any:
    """What the model's own `get_image_features` (or video) gives for these inputs."""
    function = getattr(encoder_of(model, kind), f"get_{kind}_features")
    names = inspect.signature(function).parameters
    arguments = {k: kwargs[k] for k in names if k != "kwargs" and kwargs.get(k) is not None}
    return function(**arguments, return_dict=True)


@dataclass(eq=False)
class Prompt:
    """Inputs with pictures as they are made shorter."""

    call: Call
    kwargs: dict[str, Any]
    mask: Tensor
    """[B, L]"""
    generating: bool
    layouts: dict[str, Layout]
    order: Tensor
    """[N] position among the features, kinds one after another, of each token of the table: it goes row by row."""
    encoded: dict[str, Any]
    """What the encoders gave, by kind."""
    source: Tensor | None = None
    """[B, L] the column as the caller gave it of each of these, -1 padding, where room was made for tiles."""
    seen: int = 0
    """Columns that the caller gave."""

    def features(self) -> Tensor:
        """[N, D] as the table goes."""
        features = torch.cat([flat(self.encoded[kind]) for kind in self.layouts])
        if len(features) != self.call.table.visual:
            raise SecateurError(
                f"{len(features)} features came for {self.call.table.visual} places", where="attach"
            )
        return features[self.order]

    def whole(self, model: Any) -> dict[str, Any]:
        """The arguments with features in place of pictures."""
        names = inspect.signature(type(model).forward).parameters
        needed = {n for n in KINDS.values() if n in names and names[n].default is inspect.Parameter.empty}
        new = {k: v for k, v in self.kwargs.items() if k not in KINDS.values()} | dict.fromkeys(needed)
        return new | {"mm_encoder_outputs": self.encoded}

    def short(self, whole: dict[str, Any], features: Tensor) -> dict[str, Any]:
        """The same with the features [M, D] of the tokens that are left."""
        left = _features(self.call, self.encoded, self.layouts, self.order, features)
        return {**whole, "mm_encoder_outputs": left}


@dataclass(eq=False)
class InputDriver:
    """Runs the vision tower itself, lets the stages at the input choose among its features, and gives the model a shorter
    prompt and the features that are left."""

    setup: Setup
    current: Current
    recorder: Recorder | None
    shortens: bool = False
    """Also where everything stays."""
    counts: bool = False
    """A decoder that is given no positions counts the tokens that aren't padding; otherwise the columns."""
    forms: dict[str, Any] = field(default_factory=dict)
    """For each kind the features that the encoder itself gave last: how many dimensions they have, and whether in parts."""

    @cached_property
    def window(self) -> tuple[str, int] | None:
        return window_of(self.setup.model.config.get_text_config())

    def prepare(
        self, kwargs: dict[str, Any], generating: bool
    ) -> tuple[dict[str, Any], Call | None, Turn | None]:
        """Keyword arguments of forward or generate -> shorter ones.

        The call is None where there is no picture; the turn None where the language model sees what it was given.
        """
        setup, model, family = self.setup, self.setup.model, self.setup.family
        ids = kwargs.get("input_ids")
        turn = turn_of(cache_in(kwargs))
        encoded = dict(kwargs.get("mm_encoder_outputs") or {})
        kinds = [k for k, name in KINDS.items() if kwargs.get(name) is not None or encoded.get(k) is not None]
        if not kinds:
            if turn is not None:
                kwargs = self._continue(kwargs, turn, generating)
            return kwargs, None, turn
        _refuse(kwargs)
        assert ids is not None
        mask = _mask(model, kwargs, generating)  # [B, L]
        layouts = family.layout(model, kwargs) if family.layout else {}
        source, seen = None, ids.shape[1]
        if "pyramid" in setup.given and "image" in layouts:
            source = self._room(ids, mask, layouts["image"])
        if source is not None:
            kwargs = widened({**kwargs, "attention_mask": mask}, source, ids.shape, setup.pad)
            ids, mask = kwargs["input_ids"], kwargs["attention_mask"]
        no_grad = generating or not torch.is_grad_enabled()
        for kind in [k for k in kinds if k not in layouts and family.measure is not None]:
            with torch.set_grad_enabled(not no_grad), self.current.running(None):
                if encoded.get(kind) is None:
                    encoded[kind] = encode(model, kind, kwargs)
            assert family.measure is not None
            layouts[kind] = family.measure(model, kwargs, kind, encoded[kind])
        places = _places(model, ids, kinds, layouts)
        layouts = {kind: layouts[kind] for kind in places}
        if "pyramid" in setup.given and "image" in layouts:
            layouts["image"] = regroup(layouts["image"], setup.given["pyramid"])
        if not layouts or not sum(map(len, layouts.values())):
            return kwargs, None, None
        if len(layouts) > 1 and setup.in_tower:
            raise SecateurError(
                "images and videos in one batch", where="encoder", fix="give them in two calls"
            )

        unknown = [kind for kind, layout in layouts.items() if not layout.total_patches]
        if unknown and setup.in_tower:
            raise SecateurError(
                f"which patches make the tokens of these {unknown[0]}s isn't known, or no patch belongs to one token alone",
                where="encoder",
                fix="use a method that reads and drops nothing in the tower",
            )

        table = make_table(layouts, places, len(ids))
        call = Call(setup, table, kwargs, ids, mask.bool(), session=self.current.session)
        if setup.lesson is not None:
            call.answers = _answers(kwargs.get("labels"), ids)
        if call.session is not None:
            call.session.open(table, ids, call.mask)
        prompt = Prompt(call, kwargs, mask, generating, layouts, _order(places), encoded, source, seen)
        climbs = setup.stages_at("tiles") and not setup.whole and bool((table.level > 0).any())
        with torch.set_grad_enabled(not no_grad):
            if climbs:
                features = self._climb(prompt, setup.stages_at("tiles")[0])
            else:
                for kind in kinds:
                    if encoded.get(kind) is None:
                        with self.current.running(call if kind in layouts else None):
                            encoded[kind] = encode(model, kind, kwargs)
                features = prompt.features()[call.table.alive]
        self.forms = {kind: getattr(output, slot_of(output)) for kind, output in encoded.items()}
        features, changed = self._choose(prompt, features)
        new = prompt.whole(self.setup.model)
        if not changed and not self.shortens and source is None:
            # a look may have left the columns of what it saw
            call.column_at, call.columns, self.current.columns = table.column, None, None
            return new, call, None
        return self._shorten(prompt, prompt.short(new, features), new)

    def _room(self, ids: Tensor, mask: Tensor, layout: Layout) -> Tensor | None:
        """The columns of a prompt with places for thumbnails alone, with room for all tiles; see `room`."""
        count = len(layout.grid)
        tiles = [sum(n.rows * n.cols for n in each) for each in levels_of(self.setup.given["pyramid"], count)]
        here = ids == placeholder(self.setup.model, "image")
        return room(here, mask, tiles, len(layout) // count) if sum(tiles) == count else None

    def _climb(self, prompt: Prompt, placed: Placed) -> Tensor:
        """Features [M, D] of the tokens on crops that the stage asks for, level by level of the pyramids; no others are made."""
        call, table = prompt.call, prompt.call.table
        if set(prompt.layouts) != {"image"} or prompt.encoded.get("image") is not None:
            raise SecateurError(
                "tiles beside videos, or features that came without their pixels",
                where="tiles",
                fix="give pixel_values alone",
            )
        check(self.setup, table)
        count, depth = len(prompt.layouts["image"].grid), int(table.level.max()) + 1
        crop = table.crop_id[: table.visual]
        crops = crops_of(table, count)
        wanted = crops[0] == 0
        read = torch.zeros_like(wanted)
        features: Tensor | None = None
        for here in range(depth):
            if bool(wanted.any()):
                new = self._encode_some(prompt, wanted)
                features = new if features is None else together(crop, read, wanted, features, new)
                read = read | wanted
            assert features is not None
            at = read[crop].nonzero()[:, 0]
            inside = table.level[at] >= 0
            table.alive = table.slot = at[inside]
            if here < depth - 1:
                shown = features[inside]
                self._look(prompt, placed, shown)
                wanted = next_tiles(call, self.recorder, placed, table.alive, shown, here, crops)
        assert features is not None
        call.tiles = count, int(read.sum())
        self.current.note(placed, table)
        return features[inside]

    def _encode_some(self, prompt: Prompt, wanted: Tensor) -> Tensor:
        """Features [M, D] of the tokens of the crops `wanted` [crops], in the order of the table; only these are encoded."""
        table, model = prompt.call.table, self.setup.model
        mine = wanted[table.crop_id[: table.visual]]
        with self.current.running(prompt.call):
            if "pyramid" not in self.setup.given:
                with reading(self.setup, wanted):
                    prompt.encoded["image"] = encode(model, "image", prompt.kwargs)
                return prompt.features()[mine]
            prompt.encoded["image"] = encode(model, "image", pictures_of(prompt.kwargs, wanted))
        features = flat(prompt.encoded["image"])
        if len(features) != int(mine.sum()):
            raise SecateurError(f"{len(features)} features came for {int(mine.sum())} places", where="tiles")
        return features

    def _look(self, prompt: Prompt, placed: Placed, features: Tensor) -> None:
        """The glimpse of a stage at the tokens that are left, with `features` [M, D]; of pyramids at two levels of them."""
        if placed.stage.glimpse is None:
            return
        call, table = prompt.call, prompt.call.table
        before = table.alive, table.slot
        level, image = table.level[table.alive], table.image_id[table.alive]
        finest = torch.zeros(int(table.image_id.max()) + 1, dtype=torch.int64, device=table.device)
        finest.scatter_reduce_(0, image, level, "amax")
        shown = (level == 0) | (level == finest[image])
        table.alive, table.slot = table.alive[shown], table.slot[shown]
        try:
            new = prompt.whole(self.setup.model)
            short = self._shorten(prompt, prompt.short(new, features[shown]), new)[0]
            forms = {kind: getattr(output, slot_of(output)) for kind, output in prompt.encoded.items()}
            short["mm_encoder_outputs"] = formed(short["mm_encoder_outputs"], forms)
            look(self.setup, self.current, self.recorder, call, short, placed.stage.glimpse)
        finally:
            table.alive, table.slot = before

    def _choose(self, prompt: Prompt, features: Tensor) -> tuple[Tensor, bool]:
        """Features [M, D] of the tokens that are left after the stages here, and whether any has gone, in the tower too."""
        call, table = prompt.call, prompt.call.table
        changed = len(table.alive) < table.visual
        for placed in self.setup.stages_at("input"):
            if not self.setup.whole:
                self._look(prompt, placed, features)
            outcome = run_stage(call, self.recorder, placed, table.alive, features, "input", 0)
            if outcome is not None:
                changed = True
                table.alive, table.slot = table.alive[outcome.source], table.slot[outcome.keep]
                features = features[outcome.source] if outcome.replaced is None else outcome.replaced
            self.current.note(placed, table)
        return features, changed

    def _shorten(
        self, prompt: Prompt, kwargs: dict[str, Any], given: dict[str, Any]
    ) -> tuple[dict[str, Any], Call, Turn]:
        """Ids, mask, positions, types and labels of the columns that stay; `given`: the arguments with every token."""
        call, mask, generating = prompt.call, prompt.mask, prompt.generating
        table, ids, compact = call.table, kwargs["input_ids"], self.setup.compact
        rows, length = ids.shape
        if len(table.alive) < table.visual:
            self._check_window(length + (_to_come(self.setup.model, kwargs, length) if generating else 0))
        # text and padding inside the mask stay, and of the visual columns those whose place is taken
        keep = mask.bool().clone()
        keep[table.row[: table.visual], table.column[: table.visual]] = False
        stays = table.column[table.slot]
        keep[table.row[table.slot], stays] = True
        right = not bool(mask[:, -1].all()) and bool(mask[:, 0].all())
        index, valid = pack(keep, right)  # [B, L']

        def gather(tensor: Tensor, fill: int) -> Tensor:
            return tensor.gather(1, index).masked_fill(~valid, fill)

        positions = positions_of(self.setup, given, mask, generating, self.counts)
        wide = positions.expand(*positions.shape[:-2], rows, length)
        short = wide.gather(-1, index.expand(*wide.shape[:-2], *index.shape))  # [..., B, L']
        if compact:
            before = mask.cumsum(1).gather(1, index) - valid.cumsum(1)
            short = short - before.masked_fill(~valid, 0)
        new = dict(kwargs)
        new["input_ids"] = gather(ids, self.setup.pad)
        new["attention_mask"] = valid.long()
        new["position_ids"] = short
        for name, value in new.items():
            if isinstance(value, Tensor) and value.shape == ids.shape and name not in SHORTENED:
                new[name] = gather(value, -100 if name == "labels" else 0)

        # where each token of the table stands in the shorter sequence
        where = torch.full((rows, length), -1, device=ids.device)
        row, slot = valid.nonzero(as_tuple=True)
        where[row, index[row, slot]] = slot
        column_at = torch.full((len(table),), -1, device=ids.device)
        column_at[table.alive] = where[table.row[table.slot], stays]
        call.column_at = column_at
        call.columns = self.current.columns = torch.where(valid, index, -1)
        if prompt.source is None:
            return new, call, Turn(length, index, valid, short, mask.bool())
        # what comes later counts the columns as they were given
        source = prompt.source.gather(1, index).clamp(min=0)
        self.current.columns = torch.where(valid, source, -1)
        return new, call, Turn(prompt.seen, source, valid, short, mask.bool())

    def step(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments of a later step. Some models' generate forgets the positions, and their forward would count the cache."""
        turn = getattr(cache_in(kwargs), "_secateur_turn", None)
        tokens = kwargs.get("input_ids")
        if turn is None or tokens is None or kwargs.get("position_ids") is not None:
            return kwargs
        past, count = _length(cache_in(kwargs)) - turn.columns.shape[1], tokens.shape[1]
        last = turn.rows(len(tokens)).positions[..., -1:]
        more = torch.arange(past + 1, past + count + 1, device=tokens.device)
        return {**kwargs, "position_ids": last + more}

    def _check_window(self, length: int) -> None:
        """Windows count columns, so what lies in one would change with what has left before it."""
        if self.setup.compact or self.window is None:
            return
        name, size = self.window
        if length > size:
            raise SecateurError(
                f"{length} tokens are more than the {name} of {size}, which counts tokens, not positions",
                where="input",
                fix='use positions="compact", or a method that drops between layers',
            )

    def _continue(self, kwargs: dict[str, Any], turn: Turn, generating: bool) -> dict[str, Any]:
        """A later turn or step on a cache that holds a shortened prompt."""
        ids, mask = kwargs.get("input_ids"), kwargs.get("attention_mask")
        tokens = ids if ids is not None else kwargs["inputs_embeds"]
        turn = turn.rows(len(tokens))
        past, cached, count = _length(cache_in(kwargs)), turn.columns.shape[1], tokens.shape[1]
        # the whole conversation again, or only what is new
        whole = mask is not None and mask.shape[1] == count or mask is None and generating
        length = count if whole else turn.seen + past - cached + count
        self._check_window(length + (_to_come(self.setup.model, kwargs, length) if generating else 0))
        new = dict(kwargs)
        if whole and ids is not None:
            new["input_ids"] = turn.ids(ids, self.setup.pad)
        new["attention_mask"] = turn.attention(mask, length)
        if kwargs.get("position_ids") is None:
            places = turn.place(new["attention_mask"])
            new["position_ids"] = places if generating else places[..., -count:]
        for name in TYPES:
            if whole and kwargs.get(name) is not None:
                new[name] = turn.ids(kwargs[name], 0)
        return new


def _answers(labels: Tensor | None, ids: Tensor) -> Tensor:
    """bool [B, L]: the columns that are trained on."""
    if labels is None:
        return torch.zeros_like(ids, dtype=torch.bool)
    answers = labels != -100
    if bool(answers.all(1).any()):
        raise SecateurError(
            "a row's labels cover all of its prompt",
            where="train_tokens",
            fix="label the answers; -100 where nothing is asked for",
        )
    return answers


def _refuse(kwargs: Mapping[str, Any]) -> None:
    """Pictures in a form that can't be shortened."""
    mask, cache = kwargs.get("attention_mask"), cache_in(kwargs)
    if kwargs.get("input_ids") is None:
        raise SecateurError(
            "pictures came with inputs_embeds, so their places aren't known",
            where="attach",
            fix="give input_ids",
        )
    if isinstance(mask, Tensor) and mask.dim() != 2 or isinstance(mask, dict):
        raise SecateurError(
            "a mask of four dimensions can't be shortened", where="attach", fix="give [rows, tokens]"
        )
    if _length(cache):
        raise SecateurError(
            "new pictures came with a cache that holds an earlier turn",
            where="attach",
            fix="give the whole conversation without the cache",
        )


def _mask(model: Any, kwargs: Mapping[str, Any], generating: bool) -> Tensor:
    """The 2-D mask, as the model itself would make it where none was given."""
    ids, mask = kwargs["input_ids"], kwargs.get("attention_mask")
    if mask is not None:
        return mask
    pad = getattr(model.generation_config, "pad_token_id", None)
    eos = model.generation_config.eos_token_id
    unpadded = pad is None or not generating or pad in (eos if isinstance(eos, list) else [eos])
    return torch.ones_like(ids) if unpadded else (ids != pad).long()


def _places(model: Any, ids: Tensor, kinds: list[str], layouts: Mapping[str, Layout]) -> Places:
    """The placeholders of every kind that has a layout."""
    places: Places = {}
    for kind in kinds:
        if kind not in layouts:
            raise SecateurError(
                f"where the tokens of these {kind}s come from isn't known: {type(model).__name__} has no {kind}s here, "
                "or their features came without their pixels",
                where="attach",
                fix=f"give {KINDS[kind]} with all that the processor makes, or leave the {kind}s to the model alone",
            )
        where = (ids == placeholder(model, kind)).nonzero(as_tuple=True)
        if len(where[0]) != len(layouts[kind]):
            raise SecateurError(
                f"the prompt has {len(where[0])} places for the {len(layouts[kind])} tokens of its {kind}s",
                where="attach",
                fix="make both with one processor call",
            )
        places[kind] = (where[0], where[1])
    return places


def turn_of(cache: Any) -> Turn | None:
    """What an earlier turn left on a cache; nothing on one that was reset."""
    turn = getattr(cache, "_secateur_turn", None)
    if turn is not None and not _length(cache):
        del cache._secateur_turn
        return None
    return turn


def _length(cache: Any) -> int:
    return int(cache.get_seq_length()) if cache is not None else 0


def _order(places: Places) -> Tensor:
    """[N] placeholder order -> position among the features, kinds one after another."""
    if len(places) == 1:
        return torch.arange(len(row := next(iter(places.values()))[0]), device=row.device)
    row, column = (torch.cat(parts) for parts in zip(*places.values()))
    return (row * (int(column.max()) + 1) + column).argsort()


def positions_of(
    setup: Setup, kwargs: Mapping[str, Any], mask: Tensor, generating: bool, counts: bool
) -> Tensor:
    """The position ids the model would have used: [B or 1, L], or [3 or 4, B, L]."""
    model, ids = setup.model, kwargs["input_ids"]
    if kwargs.get("position_ids") is not None:
        return kwargs["position_ids"]
    if generating:
        return model._prepare_position_ids_for_generation(ids, {**kwargs, "attention_mask": mask})
    if setup.family.observed:
        seen = _seen_positions(model, kwargs)
        return (mask.cumsum(1) - 1).clamp(min=0) if counts and seen is None else _or_columns(seen, ids)
    if setup.family.mrope:
        function = model.model.compute_3d_position_ids
        names = ("image_grid_thw", "video_grid_thw", "attention_mask", "mm_token_type_ids")
        arguments = {name: kwargs.get(name) for name in names}
        # a parameter of some families only
        if "second_per_grid_ts" in inspect.signature(function).parameters:
            arguments["second_per_grid_ts"] = kwargs.get("second_per_grid_ts")
        arguments[cache_name(function) or "past_key_values"] = None
        embeddings = model.get_input_embeddings()(ids)
        positions = function(input_ids=ids, inputs_embeds=embeddings, **arguments)
        if positions is not None:
            return positions
    return torch.arange(ids.shape[1], device=ids.device)[None] + setup.family.position_offset


class _Reached(Exception):
    """Raised before the decoder runs, with the positions that it was given."""


def _seen_positions(model: Any, kwargs: Mapping[str, Any]) -> Tensor | None:
    """The position ids that the decoder is given by a forward, which is left there; None where it gets none."""

    def stop(module: Any, args: Any, given: dict[str, Any]) -> None:
        raise _Reached(given.get("position_ids"))

    handle = decoder_of(model).register_forward_pre_hook(stop, with_kwargs=True)
    try:
        type(model).forward(model, **{name: value for name, value in kwargs.items() if name != "labels"})
    except _Reached as reached:
        positions = reached.args[0]
    finally:
        handle.remove()
    return positions


def _or_columns(positions: Tensor | None, ids: Tensor) -> Tensor:
    return torch.arange(ids.shape[1], device=ids.device)[None] if positions is None else positions


def takes_positions(model: Any, kwargs: Mapping[str, Any]) -> bool:
    """Whether the decoder gets the `position_ids` among these arguments of a forward."""
    moved = kwargs["position_ids"] + 1
    seen = _seen_positions(model, {**kwargs, "position_ids": moved})
    return seen is not None and torch.equal(seen, moved)


def _to_come(model: Any, kwargs: Mapping[str, Any], length: int) -> int:
    """The most tokens that generate may write after a prompt of `length`."""
    given = kwargs.get("generation_config")
    for name in ("max_new_tokens", "max_length"):
        for value in (kwargs.get(name), *(getattr(c, name, None) for c in (given, model.generation_config))):
            if value is not None:
                return int(value) if name == "max_new_tokens" else max(0, int(value) - length)
    return 20  # of transformers, where nothing says how many


def _features(
    call: Call, encoded: dict[str, Any], layouts: Mapping[str, Layout], order: Tensor, features: Tensor
) -> dict[str, Any]:
    """Encoder outputs with the features [M, D] that stay, one entry a row that has any."""
    table, kinds = call.table, list(layouts)
    sizes = torch.tensor([len(layouts[k]) for k in kinds], device=features.device)
    kind_of = torch.repeat_interleave(torch.arange(len(kinds), device=features.device), sizes)[order]
    start = sizes.cumsum(0) - sizes
    new = dict(encoded)
    for number, kind in enumerate(kinds):
        output = copy.copy(encoded[kind])
        mine = kind_of[table.slot] == number
        row = table.row[table.slot][mine]
        counts = [int(c) for c in torch.bincount(row, minlength=table.rows).tolist() if c]
        setattr(output, slot_of(output), list(features[mine].split(counts)))
        # features of earlier tower blocks, which the first decoder layers add
        deep = getattr(output, "deepstack_features", None)
        if deep is not None:
            at = order[table.alive[mine]] - start[number]
            output.deepstack_features = [
                torch.cat(list(d) if isinstance(d, list | tuple) else [d])[at].split(counts) for d in deep
            ]
        new[kind] = output
    return new


def formed(mm: Mapping[str, Any], forms: Mapping[str, Any]) -> dict[str, Any]:
    """Encoder outputs with their features in the form that the encoder itself gave: parts, or one tensor of as many dimensions."""
    new = dict(mm)
    for kind, output in mm.items():
        form, parts = forms.get(kind), getattr(output, slot_of(output), None)
        if isinstance(form, Tensor) and isinstance(parts, list | tuple):
            new[kind] = copy.copy(output)
            joined = torch.cat(list(parts)) if parts else form.reshape(-1, form.shape[-1])[:0]
            setattr(new[kind], slot_of(output), joined.view(*[1] * (form.dim() - 2), *joined.shape))
    return new
