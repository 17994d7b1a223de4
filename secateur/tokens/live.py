"""What a token method reads of the running model: attention, keys, states."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from secateur.errors import SecateurError
from secateur.tokens.record import Note, Recorder
from secateur.tokens.scores import attention_rows, received_attention
from secateur.tokens.site import Site
from secateur.tokens.state import Missing, TokenSets

if TYPE_CHECKING:
    from secateur.tokens.call import Call


CHUNK = 128


def _padded(usable: Tensor, past: int) -> Tensor:
    """bool [S, past + n]: earlier keys are all there."""
    return torch.nn.functional.pad(usable, (past, 0), value=True) if past else usable


class Live:
    """Statistics of a run, for the sets of one stage."""

    def __init__(self, call: Call, recorder: Recorder | None, kind: str, number: int):
        self.call, self.recorder, self.kind, self.number = call, recorder, kind, number
        self.peek: Callable[[tuple[str, int], bool], Note] | None = None
        self._notes: dict[Any, Note] = {}
        self._memo: dict[Any, Any] = {}

    # -- notes --

    def note(self, text: str, raw: bool = False, form: str | None = None) -> Note:
        facts = self.call.facts
        site = Site.parse(text, facts.layers, facts.blocks)
        raw = raw or site.form == "raw"
        if (site.form == "peek" or site.key == (self.kind, self.number)) and form != "modules":
            return self._peek(site.key, raw)
        name = form or ("raw" if raw else "")
        if self.recorder is None or name not in self.recorder.wanted.get(site.key, ()):
            raise Missing(
                f"record of {text!r}", where="tokens", fix=f'put "{text}" into the records of the stage'
            )
        found = self.recorder.notes.get((*site.key, name))
        if found is None or (name != "modules" and not found.q):
            raise Missing(f"record of {text!r} yet: that place runs later", where="tokens")
        return found

    def _peek(self, key: tuple[str, int], raw: bool) -> Note:
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
        column = note.column_at[members.clamp(min=0)]
        width = int(note.columns.max()) + 1
        table = torch.full((len(note.columns), width), -1, device=column.device)
        slots = torch.arange(note.columns.shape[1], device=column.device).expand_as(note.columns)
        usable = note.valid if note.valid is not None else torch.ones_like(note.columns, dtype=torch.bool)
        table.scatter_(1, note.columns.masked_fill(~usable, 0), torch.where(usable, slots, -1))
        first = usable & (note.columns == 0)
        table[:, 0] = torch.where(first.any(1), first.int().argmax(1), -1)
        found = table[sets.row[:, None], column.clamp(min=0, max=width - 1)]
        return torch.where((members >= 0) & (column >= 0), found, -1)

    def _layer_attention(
        self, sets: TokenSets, note: Note, rows: str | Tensor, over: str, heads: bool
    ) -> Tensor:
        q, k, mask = note.q[0], note.k[0], note.mask[0]
        assert note.columns is not None and note.valid is not None
        step = self.call.expand
        q, k = q[::step], k[::step]
        mask = mask[::step] if mask is not None and mask.shape[0] > 1 else mask
        slots = self._slots(sets, note)
        length, keys = q.shape[2], k.shape[2]
        past = keys - length
        valid = note.valid
        chosen, weights = self._rows(sets, slots, note, rows)
        index = slots.clamp(min=0) + past
        seen = None
        if over == "visual":
            seen = torch.zeros(len(sets), keys + 1, dtype=torch.bool, device=q.device)
            seen.scatter_(1, torch.where(slots >= 0, index, keys), True)
            seen = seen[:, :keys]
        elif over != "all":
            raise SecateurError(f"there is no over={over!r}", where="tokens", fix="all or visual")
        row = sets.row
        if len(row) != len(q) or bool((row != torch.arange(len(q), device=row.device)).any()):
            q, k = q[row], k[row]
            mask = mask[row] if mask is not None and mask.shape[0] > 1 else mask
        usable = valid[row]
        causal = note.causal and length > 1
        if chosen.shape[1] > CHUNK and (mask is None or mask.dim() == 4):
            share = torch.zeros(len(q), length, device=q.device)
            share.scatter_add_(1, chosen.clamp(min=0), weights.float())
            seen_by: Tensor | None = None if mask is None else mask[..., -keys:]
            if mask is None and not bool(usable.all()):
                seen_by = _padded(usable, past)[:, None, None]
            out = received_attention(
                q,
                k,
                share,
                mask=seen_by,
                over=seen,
                causal=causal and not self.call.family.bidirectional,
                scale=note.scale,
                heads=True,
            )
        else:
            out = self._some_rows(q, k, mask, chosen, weights, usable, causal, seen, note.scale)
        picked = out.gather(2, index[:, None].expand(-1, out.shape[1], -1))
        picked = picked.masked_fill((slots < 0)[:, None], 0)
        return picked if heads else picked.mean(1)

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
        usable = valid[row]
        place = torch.arange(valid.shape[1], device=valid.device).expand_as(usable)
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
        order = (~mine).to(torch.uint8).argsort(dim=1, stable=True)[:, : int(mine.sum(1).max())]
        share = mine / mine.sum(1, keepdim=True).clamp(min=1)
        return order, share.gather(1, order)

    # -- tower --

    def _pool(self, sets: TokenSets, note: Note, values: Tensor, where: Tensor | None = None) -> Tensor:
        """Per flat slot [F, ...] -> per token [S, n, ...], the mean over its patches; 0 where it has none."""
        where = note.where if where is None else where
        members = sets.place.members
        patches = self.call.table.patches[members.clamp(min=0)]
        there = (patches >= 0) & (members >= 0)[..., None]
        assert where is not None
        slot = where[patches.clamp(min=0)]
        there = there & (slot >= 0)
        if patches.shape[-1] == 1:
            found = values[slot[..., 0].clamp(min=0)]
            gone = ~there[..., 0]
            return found.masked_fill(gone.view(*gone.shape, *[1] * (found.dim() - 2)), 0)
        found = values[slot.clamp(min=0)]
        shape = (*there.shape, *[1] * (values.dim() - 1))
        weight = there.view(shape).to(values.dtype)
        return (found * weight).sum(2) / weight.sum(2).clamp(min=1)

    def _tower_attention(
        self, sets: TokenSets, note: Note, rows: str | Tensor, over: str, heads: bool
    ) -> Tensor:
        prefix = self.call.facts.prefix
        share: Tensor | None = None
        if isinstance(rows, Tensor):
            share = self._spread(sets, note, rows)
        elif rows == "cls" and not prefix:
            raise Missing("CLS token", where="tokens", fix="the method's form without CLS")
        elif rows not in ("cls", "all", "visual", "last"):
            raise Missing(f"row {rows!r} in a vision tower", where="tokens")
        key = (id(note), rows, over) if isinstance(rows, str) else None
        if key is None or key not in self._memo:
            flat: list[Tensor] = []
            done = 0
            for q, k, mask in zip(note.q, note.k, note.mask):
                batch, _, length = q.shape[:3]
                chosen = torch.zeros(length, dtype=torch.float32, device=q.device)
                if rows == "cls":
                    chosen[0] = 1
                elif rows == "last":
                    chosen[-1] = 1
                else:
                    chosen[prefix if rows == "visual" else 0 :] = 1
                weight = chosen.expand(batch, length)
                if share is not None:
                    weight = share[done : done + batch * length].view(batch, length)
                    use = slice(0, length)
                else:
                    weight = weight / weight.sum(1, keepdim=True)
                    first = {"cls": 0, "last": length - 1, "visual": prefix}.get(str(rows), 0)
                    use = slice(first, 1 if rows == "cls" else length)
                seen = None
                if over == "visual":
                    seen = torch.arange(length, device=q.device).expand(batch, length) >= prefix
                out = None
                for start in range(use.start, use.stop, CHUNK):
                    stop = min(start + CHUNK, use.stop)
                    piece = mask
                    if mask is not None and mask.shape[-2] > 1:
                        piece = mask[..., start:stop, :]
                    found = attention_rows(
                        q[:, :, start:stop],
                        k,
                        weight[:, start:stop].float(),
                        mask=piece,
                        over=seen,
                        scale=note.scale,
                        heads=True,
                    )
                    out = found if out is None else out + found
                assert out is not None
                flat.append(out.transpose(1, 2).flatten(0, 1))
                done += batch * length
            whole = torch.cat(flat)
            if key is not None:
                self._memo[key] = whole
        else:
            whole = self._memo[key]
        if not heads:
            return self._pool(sets, note, whole.mean(1))
        return self._pool(sets, note, whole).transpose(1, 2)

    def _spread(self, sets: TokenSets, note: Note, weights: Tensor) -> Tensor:
        """Weights [S, n] of tokens -> of the tower's flat slots, a token's divided over its patches."""
        total = sum(q.shape[0] * q.shape[2] for q in note.q)
        members = sets.place.members
        patches = self.call.table.patches[members.clamp(min=0)]
        assert note.where is not None
        slot = torch.where(patches >= 0, note.where[patches.clamp(min=0)], -1)
        there = (slot >= 0) & (members >= 0)[..., None]
        each = weights.to(slot.device)[..., None] * there / there.sum(2, keepdim=True).clamp(min=1)
        out = torch.zeros(total + 1, dtype=torch.float32, device=slot.device)
        out.scatter_add_(0, torch.where(there, slot, total).flatten(), each.float().flatten())
        return out[:total]

    def _cls_rows(self, sets: TokenSets, length: int) -> Tensor:
        """[S] flat slot of the CLS token of each set's crop."""
        if not self.call.facts.prefix:
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

    def vectors(self, sets: TokenSets, which: str, site: str, rope: bool, cls: bool) -> Tensor:
        note = self.note(site, raw=not rope)
        parts: list[Tensor] = getattr(note, which)
        if site.startswith("layer"):
            values = parts[0][:: self.call.expand]
            slots = self._slots(sets, note)
            if cls:
                slots = self._rows(sets, slots, note, "last")[0]
            past = values.shape[2] - note.q[0].shape[2] if which != "q" else 0
            found = values[sets.row[:, None], :, slots.clamp(min=0) + past]
            found = found.masked_fill((slots < 0)[..., None, None], 0).transpose(1, 2).float()
            return found[:, :, 0] if cls else found
        flat = torch.cat([p.transpose(1, 2).flatten(0, 1) for p in parts])
        if cls:
            return flat[self._cls_rows(sets, note.q[0].shape[2])].float()
        return self._pool(sets, note, flat.float()).transpose(1, 2)

    def hidden(self, sets: TokenSets, site: str, cls: bool) -> Tensor:
        note = self.note(site, form="")
        if note.states is None:
            raise Missing(f"output of {site!r} yet", where="tokens")
        if site.startswith("layer"):
            states = note.states[:: self.call.expand]
            slots = self._slots(sets, note)
            found = states[sets.row[:, None], slots.clamp(min=0)]
            return found.masked_fill((slots < 0)[..., None], 0)
        flat = note.states.flatten(0, -2)
        if cls:
            return flat[self._cls_rows(sets, note.states.shape[-2])]
        return self._pool(sets, note, flat, note.after)

    def transition(self, sets: TokenSets, site: str, module: str, whole: bool) -> tuple[Tensor, ...]:
        note = self.note(site, form="modules")
        if module not in note.modules:
            raise Missing(f"record of {module!r} in {site!r}", where="tokens", fix="attention or mlp")
        given, out = note.modules[module]
        if not site.startswith("layer"):
            flat = given.flatten(0, -2), out.flatten(0, -2)
            return self._pool(sets, note, flat[0]), self._pool(sets, note, flat[1])
        given, out = given[:: self.call.expand], out[:: self.call.expand]
        assert note.valid is not None
        if whole:
            return given, out, note.valid
        slots = self._slots(sets, note)
        gone = (slots < 0)[..., None]
        at = slots.clamp(min=0)
        row = sets.row[:, None]
        return given[row, at].masked_fill(gone, 0), out[row, at].masked_fill(gone, 0)

    def text(self, sets: TokenSets, kind: str) -> tuple[Tensor, Tensor]:
        return self.call.text(sets, kind)

    def pixels(self, sets: TokenSets) -> Tensor:
        return self.call.pixels(sets)

    def project(self, hidden: Tensor) -> Tensor:
        projector = self.call.family.projector(self.call.model)
        if projector is None:
            raise Missing("projector that works token by token", where="tokens")
        flat = projector(hidden.reshape(1, -1, hidden.shape[-1]))
        return flat.reshape(*hidden.shape[:-1], -1)
