"""LLaVA-NeXT and LLaVA-OneVision: a base crop and tiles, unpadded, a newline token after each row of the tiled picture."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from secateur.families.vlm.facts import Family, Layout
from secateur.families.vlm.llava import blocks_of, feature_block, joins, prefix_of, projector


def _tools(model: Any) -> Any:
    """The module that holds the model's own functions of image sizes."""
    import sys

    return sys.modules[type(model).__module__]


def _tiled(
    tools: Any, index: Tensor, size: Any, pinpoints: Any, side: int, image_size: int, limit: int | None
) -> tuple[Tensor, bool]:
    """[crops, side * side] patch numbers -> those of the visual tokens in order, -1 for newlines; whether tiles are mixed."""
    # the model's own functions cut the picture's numbers as they cut its features
    base, tiles, mixed = index[0], index[1:], False
    if not len(tiles):
        return torch.cat([base, base.new_tensor([-1])]), False
    rows, cols = tools.get_anyres_image_grid_shape(size, pinpoints, image_size)
    whole = tiles.view(rows, cols, side, side).permute(0, 2, 1, 3).reshape(1, rows * side, cols * side)
    whole = tools.unpad_image(whole, size)
    if limit is not None:
        height, width = whole.shape[1:]
        ratio = math.sqrt(height * width / (limit * side**2))
        if mixed := ratio > 1.1:
            to = [int(height // ratio), int(width // ratio)]
            whole = torch.nn.functional.interpolate(whole[None].double(), to, mode="nearest-exact")[0].long()
    lines = torch.full((1, whole.shape[1], 1), -1)
    return torch.cat([base, torch.cat([whole, lines], 2).flatten()]), mixed


def _place(tokens: Tensor, line: Tensor, base: int, side: int) -> Tensor:
    """[n, 2] row and column: the base crop on its own grid, then the tiles, unpadded, with newlines as last column."""
    small = torch.arange(base)
    first = torch.stack([small // side, small % side], 1)
    rest = line[base:]
    width = int(rest.long().argmax()) + 1 if bool(rest.any()) else 1
    number = torch.arange(len(rest))
    return torch.cat([first, torch.stack([number // width, number % width], 1)])


def layout(model: Any, inputs: Mapping[str, Any]) -> dict[str, Layout]:
    """Images, and videos where the model takes them."""
    layouts = {}
    if inputs.get("pixel_values") is not None:
        layouts["image"] = _images(model, inputs)
    moving = inputs.get("pixel_values_videos")
    if moving is not None and hasattr(model.base_model, "apply_pooling"):
        layouts["video"] = _videos(model, moving)
    return layouts


def _videos(model: Any, pixels: Tensor) -> Layout:
    """Frames one after another, each interpolated to half its sides, then one newline. `pixels`: [videos, frames, 3, H, W]."""
    videos, frames = pixels.shape[:2]
    config = model.config.vision_config
    side = math.ceil(config.image_size // config.patch_size / 2)
    place = torch.arange(frames * side**2 + 1).repeat(videos)
    newline = place == frames * side**2
    # a newline has the frame and row of the token before it, one column further
    token = place - newline.long()
    image = torch.arange(videos).repeat_interleave(frames * side**2 + 1)
    frame, inside = token // side**2, token % side**2
    return Layout(
        image=image,
        crop=image * frames + frame,
        frame=frame,
        grid_row=inside // side,
        grid_col=inside % side + newline.long(),
        newline=newline,
        patches=torch.full((len(place), 1), -1),
        grid=torch.tensor([[side, side]]).expand(videos * frames, 2),
        crop_image=torch.arange(videos).repeat_interleave(frames),
    )


def _images(model: Any, inputs: Mapping[str, Any]) -> Layout:
    """The base crop of each image, then its tiles as one picture."""
    tools, config = _tools(model), model.config
    image_size, patch = config.vision_config.image_size, config.vision_config.patch_size
    side = image_size // patch
    aspect = inputs.get("vision_aspect_ratio") or getattr(config, "vision_aspect_ratio", None)
    limit = int(aspect.removeprefix("anyres_max_")) if aspect else None
    sizes = inputs["image_sizes"]
    sizes = sizes.tolist() if isinstance(sizes, Tensor) else [list(map(int, size)) for size in sizes]
    batch = inputs.get("batch_num_images")
    tiled = [True] * len(sizes) if batch is None else [n == 1 for n in map(int, batch) for _ in range(n)]
    names = ("image", "crop", "row", "col", "line", "patches", "whole", "tile")
    parts: dict[str, list[Tensor]] = {k: [] for k in names}
    crop_image: list[int] = []
    for image, (size, tile) in enumerate(zip(sizes, tiled)):
        crops = tools.image_size_to_num_patches(size, config.image_grid_pinpoints, image_size) if tile else 1
        start = len(crop_image)
        index = torch.arange(crops * side**2).view(crops, -1)
        tokens, mixed = _tiled(tools, index, size, config.image_grid_pinpoints, side, image_size, limit)
        # a newline has the crop and row of the token before it, one column further
        line = tokens < 0
        before = torch.where(line, -1, torch.arange(len(tokens))).cummax(0).values
        nearest = tokens[before]
        inside = nearest % side**2
        parts["image"].append(torch.full_like(tokens, image))
        parts["crop"].append(nearest // side**2 + start)
        parts["row"].append(inside // side)
        parts["col"].append(torch.where(line, side, inside % side))
        parts["line"].append(line)
        parts["patches"].append(torch.where(line, -1, tokens + start * side**2)[:, None])
        parts["whole"].append(_place(tokens, line, side**2, side))
        # the base crop is one tile, and comes first
        tile, width = nearest // side**2 - 1, _columns(tools, size, config, crops)
        place = torch.stack([tile // width, tile % width], 1).masked_fill(torch.tensor(mixed), -1)
        parts["tile"].append(place.masked_fill(tile[:, None] < 0, 0))
        crop_image += [image] * crops
    joined = {k: torch.cat(v) for k, v in parts.items()}
    return Layout(
        image=joined["image"],
        crop=joined["crop"],
        frame=torch.zeros_like(joined["crop"]),
        grid_row=joined["row"],
        grid_col=joined["col"],
        newline=joined["line"],
        patches=joined["patches"],
        grid=torch.tensor([[side, side]]).expand(len(crop_image), 2),
        crop_image=torch.tensor(crop_image),
        total_patches=len(crop_image) * side**2,
        whole=joined["whole"],
        level=(joined["crop"] > _base(torch.tensor(crop_image))[joined["crop"]]).long(),
        tile=joined["tile"],
    )


def _columns(tools: Any, size: Any, config: Any, crops: int) -> int:
    """Columns of the grid of an image's tiles."""
    if crops == 1:
        return 1
    pinpoints, image_size = config.image_grid_pinpoints, config.vision_config.image_size
    return tools.get_anyres_image_grid_shape(size, pinpoints, image_size)[1]


def _base(crop_image: Tensor) -> Tensor:
    """[crops] the number of the first crop of each crop's image."""
    first = torch.ones_like(crop_image, dtype=torch.bool)
    first[1:] = crop_image[1:] != crop_image[:-1]
    return torch.where(first, torch.arange(len(crop_image)), 0).cummax(0).values


ANYRES = Family(
    "anyres",
    blocks_of,
    prefix_of,
    layout=layout,
    feature_block=feature_block,
    projector=projector,
    joins=joins,
)
