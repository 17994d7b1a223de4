"""What a token method reads of the running model, computed when it asks: attention rows, keys, states, text, pixels.

Letters in shapes: S sets of up to n tokens, B rows and L slots of the sequence, H heads, F flat slots of a whole tower.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from secateur.errors import SecateurError
from secateur.families.vlm.facts import final_norm_of
from secateur.tokens.call import Call
from secateur.tokens.record import Key, Note, Recorder
from secateur.tokens.scores import attention_rows, mean_logits, received_attention
from secateur.tokens.site import Site
from secateur.tokens.state import Missing, TokenSets

Peek = Callable[[Key, bool], Note]
"""Block and whether before rotation -> what its attention would see now."""
CHUNK = 128
"""Query rows handled at once."""


def _padded(usable: Tensor, past: int) -> Tensor:
    """bool [S, past + n]: earlier keys are all there."""
    return torch.nn.functional.pad(usable, (past, 0), value=True) if past else usable


def _at(sets: TokenSets, slots: Tensor, states: Tensor) -> Tensor:
    """States [B, L, ...] at slots [S, n] of each set's row -> [S, n, ...]; 0 where there is none."""
    picked = states[sets.row[:, None], slots.clamp(min=0)]
    gone = slots < 0
    return picked.masked_fill(gone.view(*gone.shape, *[1] * (picked.dim() - 2)), 0)


class Live:
    """The `Source` of a running model, for the sets of one stage, which stands before block (kind, number)."""

    def __init__(self, call: Call, recorder: Recorder | None, kind: str, number: int, peek: Peek | None):
        self.call, self.recorder, self.kind, self.number, self.peek = call, recorder, kind, number, peek
        self.facts = call.setup.facts
        self._notes: dict[Any, Note] = {}
        self._memo: dict[Any, Any] = {}

    # -- notes --

    def note(self, text: str, raw: bool = False, form: str | None = None) -> Note:
        """What was noted at a place. Raises `Missing` where nothing was, or not yet."""
        site = Site.parse(text, self.facts.layers, self.facts.blocks)
        raw = raw or site.form == "raw"
        if (site.form == "peek" or site.key == (self.kind, self.number)) and form not in ("modules", "entry"):
            return self._peek(site.key, raw)
        name = form or ("raw" if raw else "")
        if self.recorder is None or name not in self.recorder.forms.get(site.key, ()):
            raise Missing(
                f"record of {text!r}", where="tokens", fix=f'put "{text}" into the records of the stage'
            )
        note = self.recorder.notes.get((*site.key, name))
        if note is None or (name not in ("modules", "entry") and not note.q):
            raise Missing(f"record of {text!r} yet: that place runs later", where="tokens")
        return note

    def _peek(self, key: Key, raw: bool) -> Note:
        if (key, raw) not in self._notes:
            if self.recorder is None or key not in self.recorder.taps or self.peek is None:
                raise Missing(
                    f"record of {key[0]}:{key[1]}", where="tokens", fix="put it into the records of the stage"
                )
            if key != (self.kind, self.number):
                raise Missing(
                    f"way to peek into {key[0]}:{key[1]} from {self.kind}:{self.number}",
                    where="tokens",
                    fix="a stage peeks into the layer that it stands before",
                )
            self._notes[key, raw] = self.peek(key, raw)
        return self._notes[key, raw]

    # -- decoder --

    def _slots(self, sets: TokenSets, note: Note) -> Tensor:
        """[S, n] slot of each member in a decoder layer's sequence; -1 none."""
        assert note.columns is not None and note.column_at is not None
        members = sets.place.members
        column = note.column_at[members.clamp(min=0)]  # [S, n]
        width = int(note.columns.max()) + 1
        table = torch.full((len(note.columns), width), -1, device=column.device)
        slots = torch.arange(note.columns.shape[1], device=column.device).expand_as(note.columns)
        usable = note.valid if note.valid is not None else torch.ones_like(note.columns, dtype=torch.bool)
        # column -> slot; padding is written to column 0, whose slot is then set again
        table.scatter_(1, note.columns.masked_fill(~usable, 0), torch.where(usable, slots, -1))
        first = usable & (note.columns == 0)
        table[:, 0] = torch.where(first.any(1), first.int().argmax(1), -1)
        slot = table[sets.row[:, None], column.clamp(min=0, max=width - 1)]
        return torch.where((members >= 0) & (column >= 0), slot, -1)

    def _layer_attention(
        self, sets: TokenSets, note: Note, rows: str | Tensor, over: str, heads: bool
    ) -> Tensor:
        assert note.columns is not None and note.valid is not None
        # beams repeat the prompt, so one row of each says it all
        step = self.call.expand
        q, k, mask = note.q[0][::step], note.k[0][::step], note.mask[0]
        mask = mask[::step] if mask is not None and mask.shape[0] > 1 else mask
        slots = self._slots(sets, note)  # [S, n]
        keys = k.shape[2]
        past = keys - q.shape[2]
        chosen, weights = self._rows(sets, slots, note, rows)  # [S, R]
        index = slots.clamp(min=0) + past
        seen = None
        if over == "visual":
            seen = torch.zeros(len(sets), keys + 1, dtype=torch.bool, device=q.device)
            seen.scatter_(1, torch.where(slots >= 0, index, keys), True)
            seen = seen[:, :keys]
        elif over != "all":
            raise SecateurError(f"there is no over={over!r}", where="tokens", fix="all or visual")

        # a sequence for each set; no copy where they are the same
        row = sets.row
        if len(row) != len(q) or bool((row != torch.arange(len(q), device=row.device)).any()):
            q, k = q[row], k[row]
            mask = mask[row] if mask is not None and mask.shape[0] > 1 else mask
        usable = note.valid[row]
        causal = note.causal and q.shape[2] > 1
        many = chosen.shape[1] > CHUNK and (mask is None or mask.dim() == 4)
        compute = self._many_rows if many else self._some_rows
        out = compute(q, k, mask, chosen, weights, usable, causal, seen, note.scale)
        picked = out.gather(2, index[:, None].expand(-1, out.shape[1], -1))
        picked = picked.masked_fill((slots < 0)[:, None], 0)
        return picked if heads else picked.mean(1)

    def _many_rows(
        self,
        q: Tensor,
        k: Tensor,
        mask: Tensor | None,
        chosen: Tensor,
        weights: Tensor,
        usable: Tensor,
        causal: bool,
        seen: Tensor | None,
        scale: float | None,
    ) -> Tensor:
        """`_some_rows` by weights over all query slots, 0 for those that aren't chosen: nothing is gathered."""
        length, keys = q.shape[2], k.shape[2]
        share = torch.zeros(len(q), length, device=q.device)
        share.scatter_add_(1, chosen.clamp(min=0), weights.float())
        seen_by: Tensor | None = None if mask is None else mask[..., -keys:]
        if mask is None and not bool(usable.all()):
            seen_by = _padded(usable, keys - length)[:, None, None]
        causal = causal and not self.call.setup.family.bidirectional
        return received_attention(
            q, k, share, mask=seen_by, over=seen, causal=causal, scale=scale, heads=True
        )

    @staticmethod
    def _some_rows(
        q: Tensor,
        k: Tensor,
        mask: Tensor | None,
        chosen: Tensor,
        weights: Tensor,
        usable: Tensor,
        causal: bool,
        seen: Tensor | None,
        scale: float | None,
    ) -> Tensor:
        """[S, H, keys] for query slots `chosen` [S, R], a chunk at a time."""
        keys = k.shape[2]
        past = keys - q.shape[2]
        out = torch.zeros(len(q), q.shape[1], keys, device=q.device)
        sets = torch.arange(len(q), device=q.device)[:, None]
        for start in range(0, chosen.shape[1], CHUNK):
            at = chosen[:, start : start + CHUNK].clamp(min=0)
            queries = q[sets, :, at].transpose(1, 2)
            if mask is None:
                hidden = _padded(usable, past)[:, None, None]
                if causal:
                    order = torch.arange(keys, device=q.device)
                    hidden = hidden & (order <= at[..., None] + past)[:, None]
            elif mask.dim() == 4:
                hidden = mask.expand(len(q), *mask.shape[1:])[sets, :, at].transpose(1, 2)[..., -keys:]
            else:
                hidden = mask.bool()[:, None, None, -keys:]
            share = weights[:, start : start + CHUNK].float()
            out = out + attention_rows(queries, k, share, mask=hidden, over=seen, scale=scale, heads=True)
        return out

    def _rows(self, sets: TokenSets, slots: Tensor, note: Note, rows: str | Tensor) -> tuple[Tensor, Tensor]:
        """Query slots [S, R] and their weights."""
        assert note.columns is not None and note.valid is not None and note.column_at is not None
        row, valid = sets.row, note.valid
        usable = self._asking(note)[row]
        place = torch.arange(valid.shape[1], device=valid.device).expand_as(usable)
        if isinstance(rows, Tensor) and rows.dtype == torch.int64:
            asked = self._prompt_slots(note)[row].gather(1, rows.to(slots.device).clamp(min=0))
            asked = asked.masked_fill(rows.to(slots.device) < 0, -1)
            return asked, (asked >= 0) / (asked >= 0).sum(1, keepdim=True).clamp(min=1)
        if isinstance(rows, Tensor):
            return slots, rows.to(slots.device) * (slots >= 0)
        if rows == "last":
            last = torch.where(usable, place, -1).max(1, keepdim=True).values
            return last, torch.ones_like(last, dtype=torch.float32)
        if rows == "visual":
            mine = slots >= 0
            return slots, mine / mine.sum(1, keepdim=True).clamp(min=1)
        if rows == "all":
            mine = usable
        elif rows == "text":
            text = usable & ~self.call.visual_columns(row, note.columns, note.column_at)
            after = text & (place > slots.max(1, keepdim=True).values)
            mine = torch.where(after.any(1, keepdim=True), after, text)
        elif rows == "cls":
            raise Missing("CLS token in a language model", where="tokens")
        else:
            raise SecateurError(
                f"there are no rows {rows!r}", where="tokens", fix="cls, last, text, visual, all or weights"
            )
        # the chosen slots first, padded by slots of weight 0
        order = (~mine).to(torch.uint8).argsort(dim=1, stable=True)[:, : int(mine.sum(1).max())]
        share = mine / mine.sum(1, keepdim=True).clamp(min=1)
        return order, share.gather(1, order)

    def _asking(self, note: Note) -> Tensor:
        """bool [B, L]: the slots of a decoder layer that hold the prompt: no padding, and no answers that are trained on."""
        assert note.columns is not None and note.valid is not None
        answers, given = self.call.answers, self.call.columns
        if answers is None:
            return note.valid
        columns = note.columns if given is None else given.gather(1, note.columns)
        return note.valid & ~answers.gather(1, columns.clamp(min=0))

    # -- tower --

    def _flat_slots(self, sets: TokenSets, where: Tensor | None) -> Tensor:
        """[S, n, m] flat slots of each member's patches; -1 none."""
        assert where is not None
        members = sets.place.members
        patches = self.call.table.patches[members.clamp(min=0)]
        there = (patches >= 0) & (members >= 0)[..., None]
        return torch.where(there, where[patches.clamp(min=0)], -1)

    def _pool(self, sets: TokenSets, note: Note, values: Tensor, where: Tensor | None = None) -> Tensor:
        """Per flat slot [F, ...] -> per token [S, n, ...], the mean over its patches; 0 where it has none."""
        slot = self._flat_slots(sets, note.where if where is None else where)
        there = slot >= 0
        if slot.shape[-1] == 1:
            picked = values[slot[..., 0].clamp(min=0)]
            gone = ~there[..., 0]
            return picked.masked_fill(gone.view(*gone.shape, *[1] * (picked.dim() - 2)), 0)
        picked = values[slot.clamp(min=0)]  # [S, n, m, ...]
        shape = (*there.shape, *[1] * (values.dim() - 1))
        weight = there.view(shape).to(values.dtype)
        return (picked * weight).sum(2) / weight.sum(2).clamp(min=1)

    def _tower_attention(
        self, sets: TokenSets, note: Note, rows: str | Tensor, over: str, heads: bool
    ) -> Tensor:
        if isinstance(rows, Tensor) and rows.dtype == torch.int64:
            raise Missing("row of text in a vision tower", where="tokens")
        if isinstance(rows, Tensor):
            whole = self._tower_rows(note, self._spread(sets, note, rows), "", over)
        elif rows == "cls" and not self.facts.prefix:
            raise Missing("CLS token", where="tokens", fix="the method's form without CLS")
        elif rows not in ("cls", "all", "visual", "last"):
            raise Missing(f"row {rows!r} in a vision tower", where="tokens")
        else:
            # named rows are the same for every crop, whatever the sets
            key = (id(note), rows, over)
            if key not in self._memo:
                self._memo[key] = self._tower_rows(note, None, rows, over)
            whole = self._memo[key]
        if not heads:
            return self._pool(sets, note, whole.mean(1))
        return self._pool(sets, note, whole).transpose(1, 2)

    def _tower_rows(self, note: Note, share: Tensor | None, rows: str, over: str) -> Tensor:
        """[F, H]: what query rows attend to, weighted by `share` [F], or the mean of the `rows` of each sequence."""
        prefix, done = self.facts.prefix, 0
        flat: list[Tensor] = []
        for q, k, mask in zip(note.q, note.k, note.mask):
            batch, _, length = q.shape[:3]
            if share is not None:
                weight = share[done : done + batch * length].view(batch, length)
                first, end = 0, length
            else:
                first = {"cls": 0, "last": length - 1, "visual": prefix}.get(rows, 0)
                end = 1 if rows == "cls" else length
                each = torch.zeros(length, dtype=torch.float32, device=q.device)
                each[first:end] = 1
                weight = each.expand(batch, length)
                weight = weight / weight.sum(1, keepdim=True)
            seen = None
            if over == "visual":
                seen = torch.arange(length, device=q.device).expand(batch, length) >= prefix
            out = None  # [batch, H, length], a chunk of query rows at a time
            for start in range(first, end, CHUNK):
                stop = min(start + CHUNK, end)
                part = mask[..., start:stop, :] if mask is not None and mask.shape[-2] > 1 else mask
                share_of = weight[:, start:stop].float()
                scale = note.scale
                more = attention_rows(
                    q[:, :, start:stop], k, share_of, mask=part, over=seen, scale=scale, heads=True
                )
                out = more if out is None else out + more
            assert out is not None
            flat.append(out.transpose(1, 2).flatten(0, 1))
            done += batch * length
        return torch.cat(flat)

    def _spread(self, sets: TokenSets, note: Note, weights: Tensor) -> Tensor:
        """Weights [S, n] of tokens -> of the tower's flat slots, a token's divided over its patches."""
        total = sum(q.shape[0] * q.shape[2] for q in note.q)
        slot = self._flat_slots(sets, note.where)
        there = slot >= 0
        each = weights.to(slot.device)[..., None] * there / there.sum(2, keepdim=True).clamp(min=1)
        out = torch.zeros(total + 1, dtype=torch.float32, device=slot.device)
        out.scatter_add_(0, torch.where(there, slot, total).flatten(), each.float().flatten())
        return out[:total]

    def _cls_rows(self, sets: TokenSets, length: int) -> Tensor:
        """[S] flat slot of the CLS token of each set's crop."""
        if not self.facts.prefix:
            raise Missing("CLS token", where="tokens", fix="the method's form without CLS")
        members = sets.place.members
        crops = self.call.table.crop_id[members.clamp(min=0)]
        if bool(((crops != crops[:, :1]) & (members >= 0)).any()):
            raise Missing("one CLS token for a set of several crops", where="tokens", fix='scope "crop"')
        return crops[:, 0] * length

    # -- what TokenSets asks for --

    def attention(self, sets: TokenSets, site: str, rows: str | Tensor, over: str, heads: bool) -> Tensor:
        note = self.note(site)
        with torch.no_grad():
            if site.startswith("layer"):
                return self._layer_attention(sets, note, rows, over, heads)
            return self._tower_attention(sets, note, rows, over, heads)

    def logits(self, sets: TokenSets, site: str, over: str, among: Tensor | None) -> Tensor:
        if not site.startswith("layer"):
            raise Missing("logits of a vision tower", where="tokens", fix="record a decoder layer")
        queries, keys = (self.vectors(sets, which, site, True, False) for which in "qk")
        causal = not self.call.setup.family.bidirectional
        among = sets.valid if among is None else among & sets.valid
        return mean_logits(queries, keys, among, over, self.note(site).scale, causal)

    def vectors(self, sets: TokenSets, which: str, site: str, rope: bool, cls: bool) -> Tensor:
        note = self.note(site, raw=not rope)
        parts: list[Tensor] = getattr(note, which)
        if site.startswith("layer"):
            values = parts[0][:: self.call.expand]
            slots = self._slots(sets, note)
            if cls:
                slots = self._rows(sets, slots, note, "last")[0]
            mine = values[:, :, -note.q[0].shape[2] :].transpose(1, 2)  # [B, L, H, d], without earlier keys
            picked = _at(sets, slots, mine).transpose(1, 2).float()
            return picked[:, :, 0] if cls else picked
        flat = torch.cat([p.transpose(1, 2).flatten(0, 1) for p in parts])
        if cls:
            return flat[self._cls_rows(sets, note.q[0].shape[2])].float()
        return self._pool(sets, note, flat.float()).transpose(1, 2)

    def hidden(self, sets: TokenSets, site: str, cls: bool) -> Tensor:
        note = self.note(site, form="entry" if site.endswith(":entry") else "")
        if note.states is None:
            raise Missing(f"output of {site!r} yet", where="tokens")
        if site.startswith("layer"):
            return _at(sets, self._slots(sets, note), note.states[:: self.call.expand])
        flat = note.states.flatten(0, -2)
        if cls:
            return flat[self._cls_rows(sets, note.states.shape[-2])]
        return self._pool(sets, note, flat, note.after)

    def transition(self, sets: TokenSets, site: str, module: str, whole: bool) -> tuple[Tensor, ...]:
        note = self.note(site, form="modules")
        if module not in note.modules:
            raise Missing(f"record of {module!r} in {site!r}", where="tokens", fix="attention or mlp")
        pair = note.modules[module]  # its input and its output, [B, L, D]
        if not site.startswith("layer"):
            return tuple(self._pool(sets, note, states.flatten(0, -2)) for states in pair)
        first, second = (states[:: self.call.expand] for states in pair)
        assert note.valid is not None
        if whole:
            return first, second, note.valid
        slots = self._slots(sets, note)
        return _at(sets, slots, first), _at(sets, slots, second)

    def _owners(self) -> tuple[Tensor, Tensor]:
        """[B, L] of the prompt as given: the number of the image that each column follows or belongs to, -1 before the
        first; and which columns lie inside images, with what stands between their tokens, such as the tags of tiles."""
        table, ids = self.call.table, self.call.ids
        assert ids is not None
        row, column = table.row[: table.visual], table.column[: table.visual]
        image = table.image_id[: table.visual]
        count = int(image.max()) + 1
        first = torch.full((count,), ids.shape[1], device=ids.device).scatter_reduce(0, image, column, "amin")
        last = torch.full((count,), -1, device=ids.device).scatter_reduce(0, image, column, "amax")
        marks = torch.full((3, *ids.shape), -1, device=ids.device)
        begins = first[image]
        marks[:, row, begins] = torch.stack([begins, table.image[: table.visual], last[image]])
        latest = marks[0].cummax(1).values  # [B, L] where the image that came last begins
        owner, end = (mark.gather(1, latest.clamp(min=0)).masked_fill(latest < 0, -1) for mark in marks[1:])
        return owner, torch.arange(ids.shape[1], device=ids.device) <= end

    def _chosen_text(self, sets: TokenSets, of: str | int, visual: bool) -> Tensor:
        """bool [S, L]: the columns of the prompt as given that `text` is asked for."""
        table, real = self.call.table, self.call.mask
        assert real is not None
        if self.call.answers is not None:
            real = real & ~self.call.answers
        owner, inside = self._owners()
        text, query = real & ~inside, owner[:, -1:]
        if of == "question":
            after = text & (owner == query)
            words = real.clone()
            words[table.row[: table.visual], table.column[: table.visual]] = False
            return torch.where(after.any(1, keepdim=True), after, words)[sets.row]
        if of == "image":
            if bool((sets.image < 0).any()):
                raise Missing("one image for a set of several", where="tokens", fix='scope "image" or "crop"')
            mine = owner[sets.row] == sets.image[:, None]
        elif of == "query":
            mine = (owner == query)[sets.row]
        elif of == "context":
            mine = ((owner >= 0) & (owner != query))[sets.row]
        elif isinstance(of, int) and of >= 0:
            mine = (owner == of)[sets.row]
        else:
            raise SecateurError(
                f"there is no text of {of!r}",
                where="tokens",
                fix="question, query, image, context, or the number of an image",
            )
        return mine & (real if visual else text)[sets.row]

    def _prompt_slots(self, note: Note) -> Tensor:
        """[B, L] slot in a decoder layer's sequence of each column of the prompt as given; -1 where it has left."""
        assert note.columns is not None and note.valid is not None and self.call.ids is not None
        given = self.call.columns
        columns = note.columns if given is None else given.gather(1, note.columns)
        length = self.call.ids.shape[1]
        slots = torch.full((len(columns), length + 1), -1, device=columns.device)
        place = torch.arange(columns.shape[1], device=columns.device).expand_as(columns)
        slots.scatter_(1, torch.where(note.valid, columns, length), place)
        return slots[:, :length]

    def text(self, sets: TokenSets, kind: str, of: str | int, visual: bool) -> tuple[Tensor, Tensor]:
        ids = self.call.ids
        if ids is None or self.call.mask is None:
            raise Missing("text beside a vision transformer on its own", where="tokens")
        layer = kind.startswith("layer:")
        if not layer and kind not in ("ids", "columns", "embeddings"):
            raise Missing(f"text {kind!r}", where="tokens", fix="embeddings, ids, columns or layer:K")
        if visual and kind == "embeddings":
            raise Missing(
                "embeddings of visual tokens", where="tokens", fix="their features, or a layer's output"
            )
        mine = self._chosen_text(sets, of, visual)
        order = (~mine).to(torch.uint8).argsort(dim=1, stable=True)[:, : int(mine.sum(1).max())]
        there = mine.gather(1, order)  # [S, m]
        if kind == "columns":
            return order.masked_fill(~there, -1), there
        if layer:
            keys = kind.endswith(":keys")
            note = self.note(kind.removesuffix(":keys"), form="entry" if kind.endswith(":entry") else "")
            slots = self._prompt_slots(note)[sets.row].gather(1, order).masked_fill(~there, -1)
            if keys:
                values = note.k[0][:: self.call.expand, :, -note.q[0].shape[2] :].transpose(
                    1, 2
                )  # [B, L, H, d]
                return _at(sets, slots, values).float(), slots >= 0
            if note.states is None:
                raise Missing(f"output of {kind!r} yet", where="tokens")
            return _at(sets, slots, note.states[:: self.call.expand]), slots >= 0
        picked = ids[sets.row].gather(1, order).masked_fill(~there, 0)
        if kind == "ids":
            return picked, there
        embeddings = self.call.setup.model.get_input_embeddings()(picked)
        return embeddings.masked_fill(~there[..., None], 0), there

    def pixels(self, sets: TokenSets) -> Tensor:
        """Grey values; the processor's normalisation is undone with `image_mean` and `image_std` (0.5 unless given)."""
        setup, table = self.call.setup, self.call.table
        pixels = self.call.inputs.get("pixel_values")
        total = int(table.patches.max()) + 1
        moving = self.call.inputs.get("pixel_values_videos") is not None
        if not isinstance(pixels, Tensor) or total < 1 or moving:
            raise Missing("pixels", where="tokens")
        if setup.family.packed:
            # [patches, 3 * frames * size^2]: the first frame
            size = setup.model.config.vision_config.patch_size
            flat = pixels.view(len(pixels), 3, -1, size * size)[:, :, 0].transpose(0, 1)
        else:
            pictures = pixels if pixels.dim() == 4 else pixels.flatten(0, 1)
            if pixels.dim() == 5:
                # crops of zeros pad images with fewer crops
                pictures = pictures[(pictures.flatten(1) != 0).any(1)]
            per = total // len(pictures)
            size = round((pictures.shape[-1] * pictures.shape[-2] / per) ** 0.5)
            columns = torch.nn.functional.unfold(pictures.flatten(0, 1)[:, None].float(), size, stride=size)
            flat = columns.view(len(pictures), 3, size * size, -1).permute(1, 0, 3, 2).flatten(1, 2)
        # flat [3, patches, p] -> grey [patches, p] in 0..255
        mean = torch.as_tensor(setup.given.get("image_mean", 0.5), device=flat.device).expand(3)
        std = torch.as_tensor(setup.given.get("image_std", 0.5), device=flat.device).expand(3)
        colour = flat.float() * std[:, None, None] + mean[:, None, None]
        weights = flat.new_tensor([0.299, 0.587, 0.114]).float()
        grey = ((colour * weights[:, None, None]).sum(0) * 255).clamp(0, 255)
        patches = table.patches[sets.place.members.clamp(min=0)]  # [S, n, m]
        return grey[patches.clamp(min=0)].masked_fill((patches < 0)[..., None], 0).flatten(2)

    def project(self, hidden: Tensor) -> Tensor:
        projector = self.call.setup.family.projector(self.call.setup.model)
        if projector is None:
            raise Missing("projector that works token by token", where="tokens")
        flat = projector(hidden.reshape(1, -1, hidden.shape[-1]))
        return flat.reshape(*hidden.shape[:-1], flat.shape[-1])

    def final_norm(self, hidden: Tensor) -> Tensor:
        if (norm := final_norm_of(self.call.setup.model)) is None:
            raise Missing("norm after the last layer", where="tokens")
        with torch.no_grad():
            return norm(hidden)
