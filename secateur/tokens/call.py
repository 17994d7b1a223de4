"""One run of an attached model over inputs that hold pictures, and what the stages need to know about it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from secateur.errors import SecateurError
from secateur.families.vlm import Facts, Family
from secateur.tokens.live import Live
from secateur.tokens.record import Note
from secateur.tokens.sets import Outcome, Table, make_sets, resolve, settle
from secateur.tokens.state import Missing, TokenSets
from secateur.utils.random import seeded

if TYPE_CHECKING:
    from secateur.tokens.attach import Attached
    from secateur.tokens.setup import Placed


@dataclass(eq=False)
class Call:
    attached: Attached
    model: Any
    family: Family
    facts: Facts
    table: Table
    inputs: Mapping[str, Any]
    ids: Tensor | None
    """[B, L] as given; None for a vision transformer on its own."""
    mask: Tensor | None
    """[B, L] bool."""
    column_at: Tensor = field(init=False)
    """[T] the column each token has in the language model now; -1 where it has left. Replaced, never written to."""
    expand: int = 1
    """Rows of the language model for each row given: beams, several answers."""
    lengths: dict[int, Tensor] = field(default_factory=dict)
    """Tokens of each row before decoder layer K, where that changes."""
    tower: dict[int, int] = field(default_factory=dict)
    """Tokens in all before block K of the tower, where that changes."""
    tower_full: int = 0

    def __post_init__(self) -> None:
        self.column_at = self.table.column

    def visual_columns(self, row: Tensor, columns: Tensor, column_at: Tensor) -> Tensor:
        """bool [S, n]: which columns of the rows hold visual tokens."""
        there = column_at >= 0
        width = int(max(columns.max(), column_at.max())) + 1 if len(column_at) else int(columns.max()) + 1
        visual = torch.zeros(self.table.rows, width, dtype=torch.bool, device=columns.device)
        visual[self.table.row[there], column_at[there]] = True
        return visual[row[:, None], columns[row]]

    def run_stage(
        self,
        placed: Placed,
        members: Tensor,
        features: Tensor,
        kind: str,
        number: int,
        peek: Callable[[tuple[str, int], bool], Note] | None = None,
    ) -> Outcome | None:
        """Lets the method choose among `members` [M] with `features` [M, D]; None where nothing changes."""
        attached, table = self.attached, self.table
        if attached.whole:
            return None
        if not bool(torch.isfinite(features).all()):
            raise SecateurError(
                "the features of a visual token aren't finite numbers",
                where=placed.label,
                fix="look for NaN in the picture and the weights",
            )
        newlines = attached.method.newlines
        competing = torch.ones_like(members, dtype=torch.bool)
        if newlines != "compete" and kind != "encoder":
            competing = ~table.newline[members]
        candidates = competing.nonzero()[:, 0]
        universe = torch.arange(len(table) if kind == "encoder" else table.visual, device=table.device)
        if newlines != "compete" or kind == "encoder":
            universe = universe[~table.newline[universe]]
        live = Live(self, attached.recorder, kind, number)
        live.peek = peek
        stage = placed.stage
        scope = stage.scope or attached.method.scope
        sets = make_sets(
            table,
            members[candidates],
            features if len(candidates) == len(members) else features[candidates],
            scope=scope,
            universe=universe,
            keep=stage.keep,
            target=attached.amount,
            generator=seeded(attached.seed, "tokens", placed.label),
            facts=self.facts,
            given=attached.given,
            source=live,
            kind=kind,
        )
        outcome = None
        all_stay = stage.keep is None and not attached.free and sets is not None
        if sets is not None and not (all_stay and bool((sets.keep >= sets.total).all())):
            outcome = self._choose(placed, sets, members, features, candidates)
        if newlines == "drop" and kind != "encoder" and not bool(competing.all()):
            outcome = _without(outcome, ~competing, len(members), features)
        return outcome

    def _choose(
        self, placed: Placed, sets: TokenSets, members: Tensor, features: Tensor, candidates: Tensor
    ) -> Outcome | None:
        table = self.table
        answer = placed.stage.select(sets)
        reduction = settle(sets, answer, placed.label)
        there = sets.place.members >= 0
        for name, values in sets.carried.items():
            if tuple(values.shape) != tuple(sets.valid.shape):
                raise SecateurError(
                    f"carried {name!r} is {tuple(values.shape)}, not {tuple(sets.valid.shape)}",
                    where=placed.label,
                )
            new = table.carried.get(name)
            new = (
                torch.full((len(table),), torch.nan, dtype=torch.float32, device=table.device)
                if new is None
                else new.clone()
            )
            new[sets.place.members[there]] = values[there].float()
            table.carried[name] = new
        sets.place.at = torch.where(sets.place.at >= 0, candidates[sets.place.at.clamp(min=0)], -1)
        outcome = resolve(sets, reduction, len(members), features)
        return outcome if outcome.changed else None

    def text(self, sets: TokenSets, kind: str) -> tuple[Tensor, Tensor]:
        """Text tokens of each set's row, not visual, not padding: those after the last image, or all where none is."""
        if self.ids is None or self.mask is None:
            raise Missing("text beside a vision transformer on its own", where="tokens")
        ids, valid = self.ids, self.mask
        text = valid.clone()
        visual = self.table.column[: self.table.visual]
        text[self.table.row[: self.table.visual], visual] = False
        last = torch.full((len(text),), -1, device=text.device)
        last.scatter_reduce_(0, self.table.row[: self.table.visual], visual, "amax")
        after = text & (torch.arange(text.shape[1], device=text.device) > last[:, None])
        text = torch.where(after.any(1, keepdim=True), after, text)
        order = (~text).to(torch.uint8).argsort(dim=1, stable=True)[:, : int(text.sum(1).max())]
        there = text.gather(1, order)[sets.row]
        picked = ids.gather(1, order)[sets.row].masked_fill(~there, 0)
        if kind == "ids":
            return picked, there
        if kind == "embeddings":
            return self.model.get_input_embeddings()(picked).masked_fill(~there[..., None], 0), there
        raise Missing(f"text {kind!r}", where="tokens", fix="embeddings or ids")

    def pixels(self, sets: TokenSets) -> Tensor:
        """Grey values; the processor's normalisation is undone with `image_mean` and `image_std` (0.5 unless given)."""
        given = self.attached.given
        pixels = self.inputs.get("pixel_values")
        total = int(self.table.patches.max()) + 1
        if not isinstance(pixels, Tensor) or total < 1:
            raise Missing("pixels", where="tokens")
        if self.family.packed:
            config = self.model.config.vision_config
            size = config.patch_size
            flat = pixels.view(len(pixels), 3, -1, size * size)[:, :, 0].transpose(0, 1)
        else:
            pictures = pixels if pixels.dim() == 4 else pixels.flatten(0, 1)
            if pixels.dim() == 5:
                pictures = pictures[(pictures.flatten(1) != 0).any(1)]
            per = total // len(pictures)
            size = round((pictures.shape[-1] * pictures.shape[-2] / per) ** 0.5)
            columns = torch.nn.functional.unfold(pictures.flatten(0, 1)[:, None].float(), size, stride=size)
            flat = columns.view(len(pictures), 3, size * size, -1).permute(1, 0, 3, 2).flatten(1, 2)
        mean = torch.as_tensor(given.get("image_mean", 0.5), device=flat.device).expand(3)
        std = torch.as_tensor(given.get("image_std", 0.5), device=flat.device).expand(3)
        colour = flat.float() * std[:, None, None] + mean[:, None, None]
        weights = flat.new_tensor([0.299, 0.587, 0.114]).float()
        grey = ((colour * weights[:, None, None]).sum(0) * 255).clamp(0, 255)
        patches = self.table.patches[sets.place.members.clamp(min=0)]
        found = grey[patches.clamp(min=0)].masked_fill((patches < 0)[..., None], 0)
        return found.flatten(2)


def _without(outcome: Outcome | None, gone: Tensor, handed: int, features: Tensor) -> Outcome:
    """An outcome in which the places `gone` leave too."""
    if outcome is None:
        keep = ~gone
        return Outcome(keep, keep.nonzero()[:, 0], None)
    stay = ~gone[outcome.keep.nonzero()[:, 0]]
    replaced = None if outcome.replaced is None else outcome.replaced[stay]
    return Outcome(outcome.keep & ~gone, outcome.source[stay], replaced)


def pack(keep: Tensor, right: bool = False) -> tuple[Tensor, Tensor]:
    """bool [B, L] -> (index [B, L'], bool [B, L']): the kept columns of each row, padded on the left (or right).

    >>> pack(torch.tensor([[True, False, True], [False, False, True]]))
    (tensor([[0, 2], [0, 2]]), tensor([[ True,  True], [False,  True]]))
    """
    count = keep.sum(1)
    width = int(count.max()) if len(count) else 0
    order = keep.to(torch.uint8).argsort(dim=1, stable=True)
    place = torch.arange(width, device=keep.device)
    if right:
        order = (~keep).to(torch.uint8).argsort(dim=1, stable=True)[:, :width]
        valid = place < count[:, None]
    else:
        order = order[:, keep.shape[1] - width :]
        valid = place >= width - count[:, None]
    return order.masked_fill(~valid, 0), valid
