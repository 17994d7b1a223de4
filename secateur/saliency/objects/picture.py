"""What was found in a picture, drawn: its saliency, its objects in colours, its opinions with their scores."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from secateur.errors import SecateurError
from secateur.saliency.objects.method import Objects
from secateur.saliency.picture import SMALL, _coloured, _greyed, _laid_out

TINTS = ((240, 140, 40), (70, 150, 235), (90, 200, 110), (215, 90, 190), (235, 215, 70), (110, 215, 220))
"""Of objects and opinions, in turn."""


def draw_objects(found: Objects, picture: Tensor, lines: Sequence[str] = ()) -> Tensor:
    """The picture, its saliency over it, and a panel of its instances or one of each opinion: uint8 [h, w, 3].

    >>> half = torch.zeros(1, 1, 8, 8, dtype=torch.bool)
    >>> half[..., :4] = True
    >>> found = Objects(half[:, 0].float(), half, torch.ones(1, 1))
    >>> draw_objects(found, torch.zeros(8, 8, 3, dtype=torch.uint8)).shape[2]
    3

    found: of one picture, at its own size. picture: uint8 [H, W, 3]; one whose longer side is below 320 pixels is enlarged by a
    whole number. lines: above it. Raises `SecateurError` where the sizes differ.
    """
    if tuple(found.saliency.shape) != (1, *picture.shape[:2]):
        raise SecateurError(
            f"what was found is {tuple(found.saliency.shape)}, the picture {tuple(picture.shape[:2])}",
            where="draw_objects",
            fix="give what was found in one picture, at its own size",
        )
    panels = [picture, _coloured(found.saliency[0], picture)]
    if found.instances is not None:
        panels.append(tinted(found.instances[0], picture))
    else:
        shown = [n for n, mask in enumerate(found.masks[0]) if mask.any()]
        panels += [tinted(found.masks[0, n].long() * (n + 1), picture) for n in shown]
    times = -(-SMALL // max(picture.shape[:2])) if max(picture.shape[:2]) < SMALL else 1
    return _laid_out(
        [p.repeat_interleave(times, 0).repeat_interleave(times, 1) for p in panels], False, lines
    )


def tinted(numbers: Tensor, picture: Tensor) -> Tensor:
    """uint8 [H, W, 3]: the picture in grey, objects int64 [H, W] numbered from 1 in colours over it."""
    tints = torch.tensor(((0, 0, 0), *TINTS)).float()
    which = torch.where(numbers > 0, (numbers - 1) % len(TINTS) + 1, 0)
    share = torch.where(numbers > 0, 0.6, 0.0)[..., None]
    return (
        (_greyed(picture) * (0.5 + 0.5 * (share > 0)) * (1 - share) + tints[which] * share)
        .round()
        .to(torch.uint8)
    )
