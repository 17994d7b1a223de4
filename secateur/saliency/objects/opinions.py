"""Several opinions of one picture: pairing masks with truths, dropping those said twice, and masks of any worth.

Matching: Carion et al. 2020, https://arxiv.org/abs/2005.12872.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from secateur.measure.opinions import iou


def pair_losses(logits: Tensor, truths: Tensor) -> tuple[Tensor, Tensor]:
    """(cross-entropy, Dice), [P, G] each, of every mask's logits [P, pixels] against every truth [G, pixels] in 0..1.

    >>> logits = torch.tensor([[0.9, 0.8, 0.1], [0.2, 0.3, 0.7]]).logit()
    >>> entropy, dice = pair_losses(logits, torch.tensor([[1.0, 1, 0], [0, 0, 1]]))
    >>> entropy[0, 0].item(), dice[1, 1].item()  # doctest: +ELLIPSIS
    (0.1446..., 0.3636...)

    Cross-entropy is a mean over pixels; Dice 1 - 2 sum(p g) / (sum p + sum g).
    """
    with torch.autocast(logits.device.type, enabled=False):  # sums of pixels need every digit
        p, g = logits.sigmoid(), truths.to(logits.dtype)
        entropy = F.softplus(logits).mean(1)[:, None] - logits @ g.T / logits.shape[1]
        return entropy, 1 - 2 * (p @ g.T) / (p.sum(1)[:, None] + g.sum(1))


def match(cost: Tensor) -> tuple[Tensor, Tensor]:
    """(rows, columns) of a cost [P, G] that pair one to one at the least total cost; what is left over stays free.

    >>> [t.tolist() for t in match(torch.tensor([[3.0, 1.0], [1.0, 5.0], [9.0, 9.0]]))]
    [[0, 1], [1, 0]]
    """
    rows, columns = linear_sum_assignment(cost.detach().double().cpu().numpy())
    return torch.from_numpy(rows).to(cost.device), torch.from_numpy(columns).to(cost.device)


def unlike(masks: Tensor, order: Sequence[int], most: float = 0.9) -> list[int]:
    """Numbers of masks bool [K, H, W] in this order, without those whose overlap with one kept before is above `most`.

    >>> unlike(torch.tensor([[[1, 1]], [[1, 0]], [[1, 1]]]).bool(), [2, 0, 1])
    [2, 1]

    Overlap is intersection over union, of two empty masks 1.
    """
    same = iou(masks, masks) > most
    kept: list[int] = []
    for number in order:
        if not same[number, kept].any():
            kept.append(number)
    return kept


def tries(truths: Tensor, count: Tensor, made: Tensor) -> tuple[Tensor, Tensor]:
    """Masks of all kinds of worth, bool [N, K, H, W], and the worth of each, [N, K]: its overlap with the nearest truth.

    truths: bool [N, G, H, W], the first `count` [N] of each picture. made: masks bool [N, M, H, W] of a model, tried as they are.
    The others: a truth, the truth moved, grown, shrunk, cut in half, and another picture's; from torch's global random state.
    """
    size, side = len(truths), max(truths.shape[2:])
    pick = (torch.rand(size, device=truths.device) * count).long()
    one = truths[torch.arange(size, device=truths.device), pick]
    far = [int(v) for v in (torch.rand(2) * 2 - 1) * side / 3]
    reach = 2 * int(1 + torch.rand(()) * side / 10) + 1
    soft = one[:, None].float()
    grown = F.max_pool2d(soft, reach, 1, reach // 2)[:, 0] > 0.5
    shrunk = F.max_pool2d(1 - soft, reach, 1, reach // 2)[:, 0] < 0.5
    left = torch.arange(one.shape[2], device=one.device) < one.shape[2] // 2
    half = one & (left if torch.rand(()) < 0.5 else ~left)
    kinds = [one, one.roll(far, (1, 2)), grown, shrunk, half, one.roll(1, 0)]
    masks = torch.cat([torch.stack(kinds, 1), made], 1)
    return masks, worth(masks, truths)


def worth(masks: Tensor, truths: Tensor) -> Tensor:
    """[N, K]: intersection over union of masks bool [N, K, H, W] with the nearest of the truths [N, G, H, W]; an empty truth is
    no truth."""
    with torch.autocast(masks.device.type, enabled=False):
        m, t = masks.flatten(2).float(), truths.flatten(2).float()
        inside = m @ t.mT
        union = m.sum(2)[:, :, None] + t.sum(2)[:, None] - inside
        return (inside / union.clamp(min=1)).amax(2)
