"""What the token engine must know about a model, as data: depths, widths, and where each visual token came from."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from secateur.errors import SecateurError
from secateur.utils.screen import Screen


@dataclass(frozen=True, repr=False)
class Facts(Screen):
    """Numbers of one model.

    >>> Facts(layers=32, blocks=24, feature_block=-2).layer(8, of=32)
    8
    """

    layers: int = 0
    """Decoder layers; 0: a plain vision transformer."""
    blocks: int = 0
    """Blocks of the vision tower."""
    feature_block: int = -1
    """The block whose output feeds the projector, counted from the end."""
    has_cls: bool = False
    merge: int = 1
    """Tower patches that make one visual token of the language model."""
    hidden: int = 0
    intermediate: int = 0
    heads: int = 0
    kv_heads: int = 0
    head_dim: int = 0
    gated: bool = True
    """The feed-forward part has three matrices (3ndm), not two (2ndm)."""
    vision_hidden: int = 0
    vision_intermediate: int = 0
    vision_heads: int = 0
    vision_gated: bool = False
    prefix: int = 0
    """Tokens before the patches in the tower: CLS, registers."""
    tokenwise_projector: bool = False
    mrope: bool = False
    first_layer: int = 0
    """The earliest decoder layer before which tokens may leave."""
    video: bool = False

    def layer(self, number: float, of: int | None = None) -> int:
        """A decoder layer: a share of the depth (0..1), or a published number `of` a published depth, scaled."""
        if of:
            return min(round(number * self.layers / of), self.layers - 1)
        if isinstance(number, float):
            return min(round(number * self.layers), self.layers - 1)
        return int(number) if number >= 0 else self.layers + int(number)

    def spread(self, numbers: Sequence[int], of: int) -> list[int]:
        """Published decoder layers scaled to this depth: different ones, none before `first_layer` or layer 1, none after the last.

        >>> Facts(layers=28).spread((8, 16), of=32), Facts(layers=4).spread((7, 9, 12), of=32)
        ([7, 14], [1, 2, 3])

        Raises `SecateurError` where they aren't in order, or are more than the model has room for.
        """
        check_order(numbers)
        first = max(1, self.first_layer)
        if self.layers - first < len(numbers):
            raise SecateurError(
                f"{len(numbers)} cuts inside the language model need {len(numbers) + first} layers or more",
                where="layers",
                fix=f"this one has {self.layers}; choose a method that prunes before it",
            )
        layers: list[int] = []
        for i, number in enumerate(numbers):
            least = layers[-1] + 1 if layers else first
            most = self.layers - (len(numbers) - i)
            layers.append(min(max(math.floor(number * self.layers / of + 0.5), least), most))
        return layers

    def block(self, number: float, of: int | None = None) -> int:
        """A block of the tower, like `layer`."""
        if of:
            return min(round(number * self.blocks / of), self.blocks - 1)
        if isinstance(number, float):
            return min(round(number * self.blocks), self.blocks - 1)
        return int(number) if number >= 0 else self.blocks + int(number)


def check_order(layers: Sequence[int]) -> None:
    """Layers where tokens leave are named from 0 on, the lowest first and each once; raises `SecateurError` for others.

    >>> check_order((16, 8))
    Traceback (most recent call last):
    ...
    secateur.errors.SecateurError: layers: 16, 8 aren't in order; from 0 on, the lowest first and each once, such as 8,16
    """
    if not layers or sorted(set(layers)) != list(layers) or layers[0] < 0:
        raise SecateurError(
            f"{', '.join(map(str, layers))} aren't in order" if layers else "there is none",
            where="layers",
            fix="from 0 on, the lowest first and each once, such as 8,16",
        )


@dataclass(repr=False)
class Layout(Screen):
    """Where each of the N visual tokens of a batch came from, in the order of the placeholders."""

    image: Tensor
    """[N] number of its image in the batch."""
    crop: Tensor
    """[N] number of its crop in the batch (a tower row, or one picture of a packed tower)."""
    frame: Tensor
    """[N] 0 for stills, -1 where a video's frames can't be told apart."""
    grid_row: Tensor
    grid_col: Tensor
    """[N] place on the grid of its crop, in visual tokens."""
    newline: Tensor
    """[N] bool: a separator, which no patch belongs to."""
    patches: Tensor
    """[N, m] flat numbers (crop * patches per crop + patch, or the row of a packed tower) of its patches; -1 none."""
    grid: Tensor
    """[crops, 2] height and width in visual tokens; 0 where the places aren't known."""
    crop_image: Tensor
    """[crops] the image of each crop."""
    total_patches: int = 0
    whole: Tensor | None = None
    """[N, 2] row and column on the picture that the crops of an image make together; None: as in its crop."""
    level: Tensor | None = None
    """[N] of its crop in the image's pyramid, from 0, the coarsest; -1 where a tile is padded; None: every crop is level 0."""
    tile: Tensor | None = None
    """[N, 2] row and column of its crop among the tiles of its level, -1 where tiles are mixed into one another; None: (0, 0)."""

    def __len__(self) -> int:
        return len(self.image)

    def to(self, device: torch.device) -> Layout:
        """The layout with its tensors on a device."""
        moved: dict[str, Any] = {
            k: v.to(device) if isinstance(v, Tensor) else v for k, v in vars(self).items()
        }
        return Layout(**moved)


@dataclass(frozen=True, repr=False)
class Family(Screen):
    """How one family of models is laid out. `layout(model, inputs)` is None for a vision transformer on its own."""

    name: str
    blocks: Callable[[nn.Module], nn.ModuleList]
    """Tower -> its blocks."""
    prefix: Callable[[nn.Module], int]
    """Tower -> tokens before the patches."""
    layout: Callable[[Any, Mapping[str, Any]], dict[str, Layout]] | None = None
    """Model and its inputs -> a layout for each of "image", "video" that is there."""
    measure: Callable[[Any, Mapping[str, Any], str, Any], Layout] | None = None
    """Model, its inputs, "image" or "video", what its encoder gave for them -> a layout, where `layout` has none."""
    merge: Callable[[Any], int] = lambda model: 1
    feature_block: Callable[[Any], int] = lambda model: -1
    projector: Callable[[Any], Callable[[Tensor], Tensor] | None] = lambda model: None
    packed: bool = False
    """The tower's states are [patches of all pictures, C] with cumulative lengths."""
    order: Callable[[Any, Tensor], Tensor] | None = None
    """Packed towers that permute: model and grid -> the patch in each slot."""
    full_before: Callable[[nn.Module], Sequence[nn.Module]] = lambda tower: ()
    """Packed towers: modules that need the state of every patch."""
    position_offset: int = 0
    """Positions in forward start here."""
    bidirectional: bool = False
    """Image or prefix tokens see each other both ways."""
    mrope: bool = False
    observed: bool = False
    """Positions are those that the decoder is seen to get."""
    first_layer: Callable[[Any], int] = lambda model: 0
    video: bool = False
    masks: bool = True
    """Tower blocks take a mask, so that crops may keep different numbers."""
    joins: Callable[[Any], nn.Module | None] = lambda model: None
    """Model -> the module behind the tower whose output is the last with an entry for each crop; None: crops can't go alone."""
    pools: bool = False
    """A tower on its own averages or attends over the patches at its end."""
    proven: bool = True
    """The tests run it; otherwise the first run with every token kept is compared with the model's own."""


def grids(
    sizes: Sequence[tuple[int, int]],
    patches: Callable[[int, int], Tensor],
    image: Sequence[int] | None = None,
    lead: int = 0,
) -> Layout:
    """The layout of pictures that are each one grid.

    `sizes`: patches (h, w) of each crop; `patches(h, w)` -> [n, m] the patches of each token; `lead`: tokens in front of
    each grid that no patch belongs to (CLS taken for a visual token).
    """
    parts: dict[str, list[Tensor]] = {k: [] for k in ("image", "crop", "row", "col", "line", "patches")}
    shapes: list[tuple[int, int]] = []
    start = 0
    for (h, w), alike in groupby(sizes):
        index = patches(h, w)  # [n, m]
        n = len(index)
        # a token lies where its first patch does; merges are square
        row, col = torch.div(index, w, rounding_mode="floor").amin(1), (index % w).amin(1)
        scale = max(1, round((h * w / n) ** 0.5))
        fill = torch.full((lead,), 0)
        number = len(shapes) + torch.arange(len(list(alike)))  # [c] crops of one size behind one another
        c, first = len(number), start + h * w * torch.arange(len(number))
        owner = torch.tensor([image[i] for i in number.tolist()]) if image is not None else number
        none = torch.full((c, lead, index.shape[1]), -1)
        parts["image"].append(owner.repeat_interleave(n + lead))
        parts["crop"].append(number.repeat_interleave(n + lead))
        parts["row"].append(torch.cat([fill, row // scale]).repeat(c))
        parts["col"].append(torch.cat([fill, col // scale]).repeat(c))
        parts["line"].append((torch.arange(n + lead) < lead).repeat(c))
        parts["patches"].append(torch.cat([none, index + first[:, None, None]], 1).flatten(0, 1))
        shapes += c * [(h // scale, w // scale)]
        start += c * h * w
    joined = {k: torch.cat(v) for k, v in parts.items()}
    return Layout(
        image=joined["image"],
        crop=joined["crop"],
        frame=torch.zeros_like(joined["crop"]),
        grid_row=joined["row"],
        grid_col=joined["col"],
        newline=joined["line"],
        patches=joined["patches"],
        grid=torch.tensor(shapes),
        crop_image=torch.tensor(list(image) if image is not None else list(range(len(sizes)))),
        total_patches=start,
    )


def each_patch(h: int, w: int) -> Tensor:
    """Every patch is a token: [h * w, 1]."""
    return torch.arange(h * w)[:, None]


def picture_sizes(pixels: Tensor, patch: int) -> list[tuple[int, int]]:
    """(h, w) in patches of each picture of [..., H, W]."""
    size = (pixels.shape[-2] // patch, pixels.shape[-1] // patch)
    return [size] * pixels.shape[0]


def encoder_of(model: Any, kind: str) -> Any:
    """The module with `get_image_features` (or video): the base model, or the model itself."""
    return model.base_model if hasattr(model.base_model, f"get_{kind}_features") else model


def decoder_of(model: Any) -> Any:
    """The module of the language model that runs its layers."""
    decoder = model.get_decoder()
    for name in ("model", "decoder"):
        if not hasattr(decoder, "layers") and hasattr(decoder, name):
            decoder = getattr(decoder, name)
    return decoder


def final_norm_of(model: Any) -> nn.Module | None:
    """The norm behind the language model's last layer; None where it has none."""
    decoder = decoder_of(model)
    found = (getattr(decoder, name, None) for name in ("norm", "final_layernorm", "final_layer_norm", "ln_f"))
    return next((norm for norm in found if isinstance(norm, nn.Module)), None)


def placeholder(model: Any, kind: str) -> int:
    """The id in a prompt that stands for a token of a picture or video.

    >>> placeholder(llava, "image")  # doctest: +SKIP
    32000

    Raises `SecateurError` where the config names none.
    """
    vocabulary = getattr(model.base_model, "vocabulary_mapping", None)
    names = (f"{kind}_token_id", f"{kind}_token_index", f"{kind}_patch_id")
    for holder in (model.config, vocabulary):
        for name in names:
            if getattr(holder, name, None) is not None:
                return int(getattr(holder, name))
    raise SecateurError(
        f"the config of {type(model).__name__} has none of {', '.join(names)}", where="attach"
    )


def slot_of(output: Any) -> str:
    """The field of an encoder's output that goes to the language model: the projected features, or all that it has."""
    return "pooler_output" if getattr(output, "pooler_output", None) is not None else "last_hidden_state"


def parts_of(output: Any, pictures: int) -> list[Tensor]:
    """Projected features [n, D] of each picture, of what an image or video encoder gave for so many.

    One tensor of all tokens is divided evenly where that is possible, and else counts as one picture.
    """
    features = getattr(output, slot_of(output))
    if not isinstance(features, Tensor) or features.dim() > 2:
        return [part.reshape(-1, part.shape[-1]) for part in features]
    even = pictures > 0 and len(features) % pictures == 0
    return list(features.chunk(pictures)) if even and len(features) else [features]
