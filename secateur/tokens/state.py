"""What a token method sees and what it gives back.

Visual tokens compete in *sets*: those of a crop, a frame, an image or a batch row, at one stage. Everything is batched over
the sets and padded at the end of the set axis.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from secateur.errors import SecateurError
from secateur.families.vlm import Facts, Layout
from secateur.utils.screen import Screen

__all__ = ["Facts", "Layout", "Missing", "Reduction", "Source", "TokenSets"]


class Missing(SecateurError):
    """A model or a run doesn't have what the method asked for, such as a CLS token. Methods catch it to fall back."""

    def __init__(self, what: str, *, where: str | None = None, fix: str | None = None):
        super().__init__(f"there is no {what}", where=where, fix=fix)


def no_frames() -> Missing:
    """What to raise where a video's frames aren't told apart."""
    return Missing(
        "known frame: which frame of a video a token comes from can't be told from outside here",
        where="tokens",
        fix='budget="image", a method that needs no frames, or register_family with a layout',
    )


@dataclass(repr=False)
class Reduction(Screen):
    """What stays of each set, when that is more than a mask.

    `index` [S, k] int64: positions within the set, in the order they are emitted; -1 is padding, at the end.
    `features` [S, k, D]: replaces the gathered features (merges, remainders); None: the gathered ones.
    """

    index: Tensor
    features: Tensor | None = None

    @classmethod
    def from_mask(cls, keep: Tensor) -> Reduction:
        """bool [S, n] -> the kept positions, ascending.

        >>> Reduction.from_mask(torch.tensor([[True, False, True], [False, False, True]])).index.tolist()
        [[0, 2], [2, -1]]
        """
        count = keep.sum(1)
        order = torch.argsort((~keep).to(torch.uint8), dim=1, stable=True)[
            :, : int(count.max()) if len(count) else 0
        ]
        slot = torch.arange(order.shape[1], device=keep.device)
        return cls(torch.where(slot < count[:, None], order, -1))


class Source(Protocol):
    """Where a set's statistics come from: a running model, or tensors given by hand."""

    def attention(self, sets: TokenSets, site: str, rows: str | Tensor, over: str, heads: bool) -> Tensor: ...
    def vectors(self, sets: TokenSets, which: str, site: str, rope: bool, cls: bool) -> Tensor: ...
    def hidden(self, sets: TokenSets, site: str, cls: bool) -> Tensor: ...
    def transition(self, sets: TokenSets, site: str, module: str, whole: bool) -> tuple[Tensor, ...]: ...
    def logits(self, sets: TokenSets, site: str, over: str, among: Tensor | None) -> Tensor: ...
    def text(self, sets: TokenSets, kind: str, of: str | int, visual: bool) -> tuple[Tensor, Tensor]: ...
    def pixels(self, sets: TokenSets) -> Tensor: ...
    def project(self, hidden: Tensor) -> Tensor: ...
    def final_norm(self, hidden: Tensor) -> Tensor: ...


@dataclass(eq=False, repr=False)
class TokenSets(Screen):
    """S sets of up to n tokens.

    >>> top_per_row(sets.attention("encoder:-2", rows="cls"), sets.keep, sets.valid)  # doctest: +SKIP

    `secateur.testing.token_sets` makes them of tensors, for worked examples.
    """

    features: Tensor
    """[S, n, D] the tokens here: projected features at "input", hidden states at "layer:K" and "encoder:K"."""
    valid: Tensor
    """[S, n] bool; False is padding."""
    keep: Tensor
    """[S] int64: how many may stay; never above the count."""
    asked: Tensor
    """[S] int64: the same of the tokens before any stage, for methods whose target is a mean over stages."""
    total: Tensor
    """[S] int64: how many the set had before any stage."""
    index: Tensor
    """[S, n] int64: number among the row's visual tokens, as `attached.kept` reports it; -1 padding, and tower patches
    that no visual token stands for (cut away by unpadding)."""
    row: Tensor
    image: Tensor
    crop: Tensor
    frame: Tensor
    """[S] int64 batch row; image of the row, crop of the image, video frame (-1 where a set spans several)."""
    grid_row: Tensor
    grid_col: Tensor
    """[S, n] int64 place on the grid of its crop; where an image's crops compete together, tiles are placed on the picture
    that they make (after unpadding; a newline comes after the last column), the base crop on its own."""
    image_of: Tensor
    crop_of: Tensor
    frame_of: Tensor
    """[S, n] int64 image of the row, crop of the image, frame of the video (0 for stills); -1 padding."""
    newline: Tensor
    """[S, n] bool: separators. Among the candidates: a method that wants them kept says so, and counts them."""
    level: Tensor
    """[S, n] int64 level of each token's crop in its picture's pyramid: 0 the coarsest, or where there is none; -1 padding."""
    grid: Tensor
    """[S, 2] int64 height and width of the set's grid, (0, 0) where it spans several."""
    generator: torch.Generator
    """Seeded, on the CPU."""
    facts: Facts = field(default_factory=Facts)
    target: float | int | None = None
    """What the caller asked for: the share of the visual tokens that stays, their number (an image's, or whatever has a
    budget), or nothing."""
    carried: dict[str, Tensor] = field(default_factory=dict)
    """[S, n] numbers a method writes at one stage and reads at the next; the engine re-indexes them. NaN where new."""
    history: Tensor | None = None
    """[S, steps, n] float32: what each of the last runs attended to (`TokenMethod.memory`), the newest last; NaN where an
    episode has had fewer, 0 where the token had left. None: the method remembers nothing."""
    noted: dict[str, Tensor] = field(default_factory=dict)
    """Whatever else a method writes at one stage and reads at the next; the same for all stages of a run."""
    given: dict[str, Any] = field(default_factory=dict)
    """What the caller passed to `attach` beside the hyperparameters: question, text_encoder, tokenizer, ..."""
    tiles: Tensor | None = None
    """[S, levels, 2] int64 rows and columns of tiles of each level of the set's image, (0, 0) where it has none; None where a
    set spans several images."""
    maps: Tensor | None = None
    """[S, levels, 2] int64 height and width, in tokens, of the map that the tiles of a level make, with separators."""
    reading: int = 0
    """At "tiles" the level whose tiles may be read."""
    modules: nn.Module | None = None
    """The method's own modules, trained (`TokenMethod.modules`)."""
    source: Source | None = None
    place: Any = None
    """The engine's own note of where the sets lie in the model."""

    def __len__(self) -> int:
        return self.features.shape[0]

    def __post_init__(self) -> None:
        self._memo: dict[Any, Any] = {}

    def forget_places(self) -> None:
        """Where the tokens lie isn't known: who asks for `grid`, `grid_row` or `grid_col` gets `Missing`."""
        del self.grid, self.grid_row, self.grid_col

    def __getattr__(self, name: str) -> Any:
        if name in ("grid", "grid_row", "grid_col"):
            raise Missing(
                "known grid: where this model's tokens lie on its pictures can't be told from outside",
                where="tokens",
                fix="a method that needs no places, or register_family with a layout",
            )
        if name in ("frame", "frame_of"):
            raise no_frames()
        raise AttributeError(f"{type(self).__name__} has no {name}")

    def forget_frames(self) -> None:
        """Which frame a token comes from isn't known: who asks for `frame` or `frame_of` gets `Missing`."""
        del self.frame, self.frame_of

    @property
    def count(self) -> Tensor:
        """[S] how many tokens each set has here."""
        return self.valid.sum(1)

    @property
    def home(self) -> Tensor:
        """[S, n] int64: a number for each crop of each image of the set's row; -1 padding."""
        return torch.where(self.valid, self.image_of * (int(self.crop_of.max()) + 1) + self.crop_of, -1)

    @property
    def finest(self) -> Tensor:
        """[S, n] bool: the tokens of the finest level that each set has here."""
        return self.valid & (self.level == self.level.amax(1, keepdim=True))

    @property
    def share(self) -> float | None:
        """The share of the visual tokens that the caller asked for; None where it was a number, or nothing."""
        return self.target if isinstance(self.target, float) else None

    @property
    def asked_share(self) -> Tensor:
        """[S] float64: what the caller asked for as a share of each set before any stage, also where it was a number."""
        if self.share is None:
            return self.asked.double() / self.total
        return torch.full_like(self.total, self.share, dtype=torch.float64)

    @property
    def device(self) -> torch.device:
        return self.features.device

    @property
    def _source(self) -> Source:
        if self.source is None:
            raise Missing("recorded statistic", where="tokens", fix="give it to secateur.testing.token_sets")
        return self.source

    def attention(
        self, site: str, rows: str | Tensor = "cls", over: str = "all", heads: bool = False
    ) -> Tensor:
        """float32 [S, n] (`heads`: [S, H, n]): softmax(q k^T) averaged over the query rows and the heads.

        `rows`: "cls", "last" (last prompt token), "text" (prompt tokens after the set's last one), "visual" (the set's own
        tokens), "all" (every valid token of the sequence), weights [S, n] over the set's own tokens as queries (a
        weighted sum), or int64 [S, r] columns of the prompt as `text("columns")` gives them, -1 none (their mean). `over`: softmax over "all" keys of the sequence, or over the set's own ("visual").
        Where patches are merged to tokens, a token's value is the mean over its patches.
        Raises `Missing` when the model has no such row or the site isn't recorded.
        """
        key = ("attention", site, rows, over, heads) if isinstance(rows, str) else None
        if key is None or key not in self._memo:
            attention = self._source.attention(self, site, rows, over, heads)
            if key is None:
                return attention
            self._memo[key] = attention
        return self._memo[key]

    def logits(self, site: str, over: str = "keys", among: Tensor | None = None) -> Tensor:
        """float32 [S, n]: the mean of the logits q k^T, before the softmax, among the set's own tokens and over the heads.

        `over`: "keys", those of a token's own row that it may see; or "queries", those of its column that may see it.
        `among` [S, n] bool: only these count in the mean. Raises `Missing` in a vision tower, and where the site isn't recorded.
        """
        return self._source.logits(self, site, over, among)

    def queries(self, site: str, rope: bool = True, cls: bool = False) -> Tensor:
        """float32 [S, H, n, d]; cls=True: [S, H, d] of the CLS token, in the language model of the last prompt token."""
        return self._source.vectors(self, "q", site, rope, cls)

    def keys(self, site: str, rope: bool = True, cls: bool = False) -> Tensor:
        """float32 [S, H_kv, n, d]; cls=True: as for queries, [S, H_kv, d]."""
        return self._source.vectors(self, "k", site, rope, cls)

    def values(self, site: str, cls: bool = False) -> Tensor:
        """float32 [S, H_kv, n, d]; cls=True: as for queries, [S, H_kv, d]."""
        return self._source.vectors(self, "v", site, True, cls)

    def hidden(self, site: str, cls: bool = False) -> Tensor:
        """[S, n, C] output of that block, before the projector, or what it is given ("layer:0:entry"); cls=True: [S, C]."""
        return self._source.hidden(self, site, cls)

    def transition(self, site: str, module: str = "attention", whole: bool = False) -> tuple[Tensor, ...]:
        """(input after its norm, output before the residual) of "attention" or "mlp": each [S, n, D].

        whole=True: the sequences instead, and which of it is no padding: ([B, L, D], [B, L, D], bool [B, L]).
        """
        return self._source.transition(self, site, module, whole)

    def text(
        self, kind: str = "embeddings", of: str | int = "question", visual: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Text tokens of each set's row, and which of them are there: ([S, m] or [S, m, D], bool [S, m]).

        >>> words, there = sets.text("layer:6", of="image")  # doctest: +SKIP

        `kind`: "embeddings", "ids", "columns" (of `input_ids` as given), or a recorded "layer:K": its output there;
        "layer:K:entry": what the layer was given; "layer:K:keys": its keys, after rotation, [S, m, H_kv, d].
        `of`: text belongs to the image that it follows. "question" (what follows the row's last image, or all of its text
        where nothing does), "query" (the same, empty where nothing does), "image" (the set's own), "context" (all images
        but the last; what stands before the first belongs to none), or an image's number in its row, as `image_of` has it.
        `visual`: with the tokens of those images, as many as are left.
        Raises `Missing` for "image" where a set spans several images, and where the layer isn't recorded.
        """
        return self._source.text(self, kind, of, visual)

    def pixels(self) -> Tensor:
        """[S, n, p] grey values 0..255 of each token's patches, p pixels."""
        return self._source.pixels(self)

    def by_text_encoder(self, site: str) -> Tensor:
        """[S, n]: how near the states at `site` are to the question, by `text_encoder(states [S, n, C], sets)` of `attach`."""
        if (encode := self.given.get("text_encoder")) is None:
            raise Missing(
                "text encoder of the vision tower",
                where="tokens",
                fix="pass attach(..., text_encoder=f), or text='embeddings' to use the language model's",
            )
        return encode(self.hidden(site), self)

    def per_token(self, name: str, width: int) -> Tensor:
        """[S, n, width] float64: what `given[name]` of `attach` says of each token; 0 for padding.

        `given[name]`: [tokens, width] for each row, in the order of its visual tokens. Raises `SecateurError` where it isn't there,
        is of another shape, or isn't finite.
        """
        fix = f'attach(..., given={{"{name}": [[tokens, {width}] for each row]}})'
        if (rows := self.given.get(name)) is None:
            raise SecateurError(f"there are no {name} of the tokens", where="tokens", fix=fix)
        out = torch.zeros(*self.valid.shape, width, dtype=torch.float64, device=self.device)
        for one, row, index, valid in zip(out, self.row.tolist(), self.index, self.valid):
            last = int(index.max())
            if row >= len(rows):
                raise SecateurError(f"there are no {name} of row {row}", where="tokens", fix=fix)
            found = torch.as_tensor(rows[row], device=self.device).double()
            fits = found.dim() == 2 and found.shape[1] == width and len(found) > last
            if not fits or not bool(found.isfinite().all()):
                raise SecateurError(
                    f"the {name} of row {row} are {list(found.shape)}, or aren't finite; it has {last + 1} tokens",
                    where="tokens",
                    fix=fix,
                )
            one[valid] = found[index[valid]]
        return out

    def project(self, hidden: Tensor) -> Tensor:
        """[..., C] -> [..., D] through the projector, where it works token by token; else `Missing`."""
        return self._source.project(hidden)

    def final_norm(self, hidden: Tensor) -> Tensor:
        """[..., D] -> [..., D] through the norm after the language model's last layer; `Missing` where it has none."""
        return self._source.final_norm(hidden)
