"""Dropping before the language model: shorter ids, mask and positions, and the features that stay. No hook."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from secateur.errors import SecateurError
from secateur.tokens.call import Call, pack
from secateur.tokens.sets import make_table
from secateur.utils.versions import cache_in, cache_name

if TYPE_CHECKING:
    from secateur.tokens.attach import Attached

KINDS = {"image": "pixel_values", "video": "pixel_values_videos"}
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

    def rows(self, wanted: int) -> Turn:
        """For `wanted` rows: several beams of each prompt."""
        have = len(self.columns)
        if have == wanted:
            return self
        if wanted % have:
            raise SecateurError(f"the cache holds {have} rows, the inputs {wanted}", where="generate")
        times = wanted // have
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
    found = output.pooler_output
    parts = [found] if isinstance(found, Tensor) else list(found)
    return torch.cat([p.reshape(-1, p.shape[-1]) for p in parts])


def encode(model: Any, kind: str, kwargs: Mapping[str, Any]) -> Any:
    """What the model's own `get_image_features` (or video) gives for these inputs."""
    function = getattr(model.base_model, f"get_{kind}_features")
    names = inspect.signature(function).parameters
    given = {k: kwargs[k] for k in names if k != "kwargs" and kwargs.get(k) is not None}
    return function(**given, return_dict=True)


def prepare(
    attached: Attached, kwargs: dict[str, Any], generating: bool
) -> tuple[dict[str, Any], Call | None, Turn | None]:
    """Keyword arguments of forward or generate -> shorter ones.

    The call is None where there is no picture; the turn None where the language model sees what it was given.
    """
    model, family = attached.model, attached.family
    ids = kwargs.get("input_ids")
    mask = kwargs.get("attention_mask")
    turn = getattr(cache_in(kwargs), "_secateur_turn", None)
    mm = dict(kwargs.get("mm_encoder_outputs") or {})
    kinds = [k for k, name in KINDS.items() if kwargs.get(name) is not None or mm.get(k) is not None]
    if not kinds:
        if turn is not None:
            kwargs = _continue(attached, kwargs, turn, generating)
        return kwargs, None, turn
    if ids is None:
        raise SecateurError(
            "pictures came with inputs_embeds, so their places aren't known",
            where="attach",
            fix="give input_ids",
        )
    if isinstance(mask, Tensor) and mask.dim() != 2 or isinstance(mask, dict):
        raise SecateurError(
            "a mask of four dimensions can't be shortened", where="attach", fix="give [rows, tokens]"
        )
    if mask is None:
        pad = getattr(model.generation_config, "pad_token_id", None)
        eos = model.generation_config.eos_token_id
        unpadded = pad is None or not generating or pad in (eos if isinstance(eos, list) else [eos])
        mask = torch.ones_like(ids) if unpadded else (ids != pad).long()
    if turn is not None or _length(cache_in(kwargs)):
        raise SecateurError(
            "new pictures came with a cache that holds an earlier turn",
            where="attach",
            fix="give the whole conversation without the cache",
        )
    places, layouts = {}, family.layout(model, kwargs) if family.layout else {}
    for kind in kinds:
        token = getattr(model.config, f"{kind}_token_id")
        where = (ids == token).nonzero(as_tuple=True)
        if kind not in layouts:
            if kind == "image":
                raise SecateurError(
                    "features came without their pictures, so their grid isn't known",
                    where="attach",
                    fix="give pixel_values",
                )
            continue
        if len(where[0]) != len(layouts[kind]):
            raise SecateurError(
                f"the prompt has {len(where[0])} places for the {len(layouts[kind])} tokens of its {kind}s",
                where="attach",
                fix="make both with one processor call",
            )
        places[kind] = where
    layouts = {kind: layouts[kind] for kind in places}
    if not layouts or not sum(map(len, layouts.values())):
        return kwargs, None, None
    if len(layouts) > 1 and (attached.recorder_sites_tower or attached.encoder is not None):
        raise SecateurError("images and videos in one batch", where="encoder", fix="give them in two calls")
    table = make_table(layouts, places, len(ids))
    call = Call(attached, model, family, attached.facts, table, kwargs, ids, mask.bool())
    with torch.set_grad_enabled(torch.is_grad_enabled() and not generating):
        for kind in kinds:
            if mm.get(kind) is None:
                with attached.running(call if kind in layouts else None):
                    mm[kind] = encode(model, kind, kwargs)
    order = _order(table, layouts, places)
    features = torch.cat([flat(mm[kind]) for kind in layouts])[order]
    if len(features) != table.visual:
        raise SecateurError(f"{len(features)} features came for {table.visual} places", where="attach")
    changed = len(table.alive) < table.visual
    features = features[table.alive]
    for placed in attached.stages_at("input"):
        outcome = call.run_stage(placed, table.alive, features, "input", 0)
        if outcome is not None:
            changed = True
            slots = table.slot[outcome.keep]
            table.alive = table.alive[outcome.source]
            table.slot = slots
            features = features[outcome.source] if outcome.replaced is None else outcome.replaced
        attached.note_kept(placed.label, table)
    new = {k: v for k, v in kwargs.items() if k not in KINDS.values()}
    new["mm_encoder_outputs"] = mm
    if not changed:
        return new, call, None
    return _shorten(attached, call, new, mm, layouts, order, features, mask, generating)


def _length(cache: Any) -> int:
    return int(cache.get_seq_length()) if cache is not None else 0


def _order(table: Any, layouts: Mapping[str, Any], places: Mapping[str, tuple[Tensor, Tensor]]) -> Tensor:
    """Placeholder order -> position among the features, kinds one after another."""
    row = torch.cat([places[k][0] for k in layouts])
    column = torch.cat([places[k][1] for k in layouts])
    return (row * (int(column.max()) + 1) + column).argsort()


def positions_of(attached: Attached, kwargs: Mapping[str, Any], mask: Tensor, generating: bool) -> Tensor:
    """The position ids the model would have used: [B or 1, L], or [3 or 4, B, L]."""
    model, family = attached.model, attached.family
    ids = kwargs["input_ids"]
    if kwargs.get("position_ids") is not None:
        return kwargs["position_ids"]
    if generating:
        return model._prepare_position_ids_for_generation(ids, {**kwargs, "attention_mask": mask})
    if family.mrope:
        found = model.model.compute_3d_position_ids(
            input_ids=ids,
            image_grid_thw=kwargs.get("image_grid_thw"),
            video_grid_thw=kwargs.get("video_grid_thw"),
            inputs_embeds=model.get_input_embeddings()(ids),
            attention_mask=kwargs.get("attention_mask"),
            **{cache_name(model.model.compute_3d_position_ids) or "past_key_values": None},
            **(
                {"second_per_grid_ts": kwargs.get("second_per_grid_ts")}
                if "second_per_grid_ts" in inspect.signature(model.model.compute_3d_position_ids).parameters
                else {}
            ),
            mm_token_type_ids=kwargs.get("mm_token_type_ids"),
        )
        if found is not None:
            return found
    return torch.arange(ids.shape[1], device=ids.device)[None] + family.position_offset


def _shorten(
    attached: Attached,
    call: Call,
    kwargs: dict[str, Any],
    mm: dict[str, Any],
    layouts: Mapping[str, Any],
    order: Tensor,
    features: Tensor,
    mask: Tensor,
    generating: bool,
) -> tuple[dict[str, Any], Call, Turn]:
    table = call.table
    ids = kwargs["input_ids"]
    rows, length = ids.shape
    _windows(attached, length + int(kwargs.get("max_new_tokens") or 0))
    keep = mask.bool().clone()
    visual = table.column[: table.visual]
    keep[table.row[: table.visual], visual] = False
    stays = table.column[table.slot]
    keep[table.row[table.slot], stays] = True
    right = not bool(mask[:, -1].all()) and bool(mask[:, 0].all())
    index, valid = pack(keep, right)
    pad = attached.pad

    def gather(tensor: Tensor, fill: int) -> Tensor:
        return tensor.gather(1, index).masked_fill(~valid, fill)

    positions = positions_of(attached, kwargs, mask, generating)
    wide = positions.expand(*positions.shape[:-2], rows, length)
    short = wide.gather(-1, index.expand(*wide.shape[:-2], *index.shape))
    if attached.compact:
        before = mask.cumsum(1).gather(1, index) - valid.cumsum(1)
        short = short - before.masked_fill(~valid, 0)
    new = dict(kwargs)
    new["input_ids"] = gather(ids, pad)
    new["attention_mask"] = valid.long()
    new["position_ids"] = short
    for name in TYPES:
        if new.get(name) is not None:
            new[name] = gather(new[name], 0)
    if new.get("labels") is not None:
        new["labels"] = gather(new["labels"], -100)
    new["mm_encoder_outputs"] = _features(attached, call, mm, layouts, order, features)
    where = torch.full((rows, length), -1, device=ids.device)
    place = torch.arange(index.shape[1], device=ids.device).expand_as(index)
    row, slot = valid.nonzero(as_tuple=True)
    where[row, index[row, slot]] = place[row, slot]
    column_at = torch.full((len(table),), -1, device=ids.device)
    column_at[table.alive] = where[table.row[table.slot], stays]
    call.column_at = column_at
    attached.columns = torch.where(valid, index, -1)
    turn = Turn(length, index, valid, short, mask.bool())
    return new, call, turn


def _windows(attached: Attached, length: int) -> None:
    """Sliding windows count columns, so what lies in one would change with what has left before it."""
    config = attached.model.config.get_text_config()
    window = getattr(config, "sliding_window", None)
    sliding = "sliding_attention" in (getattr(config, "layer_types", None) or ())
    if window and sliding and length > window and not attached.compact:
        raise SecateurError(
            f"{length} tokens are more than the sliding window of {window}, which counts tokens, not positions",
            where="input",
            fix='use positions="compact", or a method that drops between layers',
        )


def _features(
    attached: Attached,
    call: Call,
    mm: dict[str, Any],
    layouts: Mapping[str, Any],
    order: Tensor,
    features: Tensor,
) -> dict[str, Any]:
    """Encoder outputs with what stays, one entry a row that has any."""
    table = call.table
    kinds = list(layouts)
    sizes = torch.tensor([len(layouts[k]) for k in kinds], device=features.device)
    kind_of = torch.repeat_interleave(torch.arange(len(kinds), device=features.device), sizes)[order]
    start = sizes.cumsum(0) - sizes
    new = dict(mm)
    for number, kind in enumerate(kinds):
        output = copy.copy(mm[kind])
        mine = kind_of[table.slot] == number
        row = table.row[table.slot][mine]
        counts = [int(c) for c in torch.bincount(row, minlength=table.rows).tolist() if c]
        output.pooler_output = list(features[mine].split(counts))
        deep = getattr(output, "deepstack_features", None)
        if deep is not None:
            at = order[table.alive[mine]] - start[number]
            output.deepstack_features = [
                torch.cat(list(d) if isinstance(d, list | tuple) else [d])[at].split(counts) for d in deep
            ]
        new[kind] = output
    return new


def _continue(attached: Attached, kwargs: dict[str, Any], turn: Turn, generating: bool) -> dict[str, Any]:
    """A later turn or step on a cache that holds a shortened prompt."""
    ids, mask = kwargs.get("input_ids"), kwargs.get("attention_mask")
    given = ids if ids is not None else kwargs["inputs_embeds"]
    turn = turn.rows(len(given))
    past = _length(cache_in(kwargs))
    cached = turn.columns.shape[1]
    whole = mask is not None and mask.shape[1] == given.shape[1] or mask is None and generating
    length = given.shape[1] if whole else turn.seen + past - cached + given.shape[1]
    new = dict(kwargs)
    if whole and ids is not None:
        new["input_ids"] = turn.ids(ids, attached.pad)
    new["attention_mask"] = turn.attention(mask, length)
    if kwargs.get("position_ids") is None:
        places = turn.place(new["attention_mask"])
        new["position_ids"] = places if generating else places[..., -given.shape[1] :]
    for name in TYPES:
        if whole and kwargs.get(name) is not None:
            new[name] = turn.ids(kwargs[name], 0)
    return new


def stacked(mm: Mapping[str, Any]) -> dict[str, Any]:
    """For families that take the features of a batch as one tensor."""
    new = dict(mm)
    for kind, output in mm.items():
        if output is not None and isinstance(output.pooler_output, list | tuple):
            new[kind] = copy.copy(output)
            new[kind].pooler_output = torch.cat(list(output.pooler_output))[None]
    return new
