"""Regions that stand out in a map: context-aware saliency detection, run on an attribution instead of a photograph.

Goferman, Zelnik-Manor, Tal 2012, "Context-Aware Saliency Detection", as Li et al. 2017, "Beyond saliency",
https://arxiv.org/abs/1712.08268, use it. Spec: salient-relevance.

Reconstruction: the detector's constants are from memory of its publication, not from its text.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from secateur.errors import SecateurError

CHUNK = 1 << 24
"""Distances held at a time."""


def sr_map(
    attribution: Tensor,
    *,
    colour: bool | None = None,
    longer: int | None = 250,
    patch: int = 7,
    step: int | None = None,
    neighbours: int = 64,
    falloff: float = 3.0,
    scales: Sequence[float] = (1.0, 0.8, 0.5, 0.3),
    candidates: Sequence[float] = (1.0, 0.5, 0.25),
    focus: float = 0.8,
) -> Tensor:
    """[H, W] in 0..1: the areas of a map that differ from what is most like them, lifted near the foci.

    >>> m = torch.zeros(3, 3)
    >>> m[1, 1], m[0, 0] = 1.0, 0.2
    >>> sr_map(m, longer=None, patch=1, neighbours=3, scales=(1,), candidates=(1,))
    tensor([[0., 0., 0.],
            [0., 1., 0.],
            [0., 0., 0.]])

    attribution: [H, W], or [C, H, W], whose channels are added; with `colour` three are one picture in L*a*b. Not negative.
    longer: pixels that the longer side is brought to; None: as it is. step: between patches; default: half of a patch.
    neighbours: how many most similar patches count. falloff: how much less a distant patch counts. scales: sizes at
    which patches are looked at; candidates: sizes, relative to those, at which their likes are looked for.
    A constant map is all zeros. For maps on a grid of tokens use patch=1, longer=None.
    """
    if attribution.dim() not in (2, 3) or not torch.isfinite(attribution).all() or (attribution < 0).any():
        raise SecateurError(
            f"a map {tuple(attribution.shape)} with negative or missing numbers has no regions"
            if attribution.dim() in (2, 3)
            else f"{tuple(attribution.shape)} is no map",
            where="salient-relevance",
            fix="give [H, W] or [C, H, W], the absolute values",
        )
    m = attribution.float()
    size = tuple(m.shape[-2:])
    if m.max() == m.min():
        return m.new_zeros(size)
    m = (m - m.min()) / (m.max() - m.min())
    if m.dim() == 3 and colour and len(m) == 3:
        m = lab(m)
    else:
        m = m.sum(0, keepdim=True) if m.dim() == 3 else m[None]
        m = _unit(m)
    if longer is not None:
        factor = longer / max(size)
        m = _resize(m, [max(1, round(side * factor)) for side in size])
    step = step or max(1, patch // 2)
    s = detect(m, patch, step, neighbours, falloff, scales, candidates)
    return _resize(lift(s, focus)[None], size)[0].clamp(0, 1)


def detect(
    m: Tensor,
    patch: int,
    step: int,
    neighbours: int,
    falloff: float,
    scales: Sequence[float],
    candidates: Sequence[float],
) -> Tensor:
    """[H, W]: the mean over the scales of each one's saliency in its unit range. m: [C, H, W] in 0..1."""
    full, parts = m.shape[-2:], []
    for scale in scales:
        found = at_scale(m, scale, [scale * c for c in candidates], patch, step, neighbours, falloff)
        if found is not None:
            parts.append(_spread(_unit(found[0][None])[0], found[1], full))
    if not parts:
        raise SecateurError(
            f"a map {tuple(full)} is smaller than a patch of {patch}",
            where="salient-relevance",
            fix="patch=1",
        )
    return torch.stack(parts).mean(0)


def at_scale(
    m: Tensor,
    scale: float,
    candidate_scales: Sequence[float],
    patch: int,
    step: int,
    neighbours: int,
    falloff: float = 3.0,
) -> tuple[Tensor, Tensor] | None:
    """(S [rows, columns] of the patches' centres, the centres [rows, columns, 2] in pixels of m); None where no patch fits.

    S = 1 - exp(-mean of the `neighbours` smallest d), d = d_colour / (1 + falloff d_position).
    """
    own = _patches(m, scale, patch, step)
    if own is None:
        return None
    values, centres, grid = own
    others = [own] if scale in candidate_scales else []
    for other in candidate_scales:
        if other != scale and other >= 0.2 and (p := _patches(m, other, patch, step)) is not None:
            others.append(p)
    bank, places = torch.cat([o[0] for o in others]), torch.cat([o[1] for o in others])
    itself = scale in candidate_scales
    count = min(neighbours, len(bank) - itself)
    if count < 1:
        return m.new_zeros(grid), centres.reshape(*grid, 2)
    longest, entries, found = max(m.shape[-2:]), values.shape[1], []
    rows = max(1, CHUNK // len(bank))
    for start in range(0, len(values), rows):
        v, c = values[start : start + rows], centres[start : start + rows]
        exact = "donot_use_mm_for_euclid_dist"
        mode = exact if len(bank) * len(values) < CHUNK else "use_mm_for_euclid_dist_if_necessary"
        d = torch.cdist(v, bank, compute_mode=mode) / entries**0.5
        d = d / (1 + falloff * torch.cdist(c, places, compute_mode=exact) / longest)
        if itself:
            index = torch.arange(len(v), device=d.device)
            d[index, start + index] = torch.inf
        found.append(1 - torch.exp(-d.topk(count, dim=1, largest=False).values.mean(1)))
    return torch.cat(found).reshape(grid), centres.reshape(*grid, 2)


def lift(s: Tensor, focus: float = 0.8) -> Tensor:
    """[H, W]: saliency less the farther a pixel is from the nearest focus, a pixel above `focus`."""
    foci = s > focus
    if not foci.any():
        foci = s == s.max()
    if foci.all():
        return s
    from scipy.ndimage import distance_transform_edt

    distance = torch.from_numpy(distance_transform_edt(~foci.cpu().numpy())).to(s)
    return s * (1 - distance / distance.max())


def lab(rgb: Tensor) -> Tensor:
    """[3, H, W] sRGB in 0..1 -> CIE L*a*b* (D65), each in about 0..1: L / 100, (a + 128) / 255, (b + 128) / 255.

    >>> (lab(torch.ones(3, 1, 1)) * torch.tensor([100, 255, 255])[:, None, None]).flatten().round()
    tensor([100., 128., 128.])
    """
    linear = torch.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    to_xyz = rgb.new_tensor(
        [
            [0.4124564, 0.3575761, 0.1804375],
            [0.2126729, 0.7151522, 0.0721750],
            [0.0193339, 0.1191920, 0.9503041],
        ]
    )
    xyz = torch.einsum("ij,jhw->ihw", to_xyz, linear) / rgb.new_tensor([0.95047, 1.0, 1.08883])[:, None, None]
    f = torch.where(xyz > (6 / 29) ** 3, xyz.clamp_min(1e-12) ** (1 / 3), xyz / (3 * (6 / 29) ** 2) + 4 / 29)
    light, a, b = 116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])
    return torch.stack([light / 100, (a + 128) / 255, (b + 128) / 255])


def _patches(m: Tensor, scale: float, patch: int, step: int) -> tuple[Tensor, Tensor, tuple[int, int]] | None:
    """([P, C * patch²], their centres [P, 2] in pixels of m, the grid of patches) of the map at a scale."""
    full = m.shape[-2:]
    sides = [max(1, round(side * scale)) for side in full]
    if min(sides) < patch:
        return None
    small = _resize(m, sides)
    windows = small.unfold(1, patch, step).unfold(2, patch, step)
    rows, columns = windows.shape[1:3]
    values = windows.permute(1, 2, 0, 3, 4).reshape(rows * columns, -1)
    at = [
        ((torch.arange(n, device=m.device) * step + patch / 2) * (whole / side) - 0.5)
        for n, whole, side in zip((rows, columns), full, sides)
    ]
    centres = torch.stack(torch.meshgrid(*at, indexing="ij"), -1).reshape(-1, 2).to(m.dtype)
    return values, centres, (rows, columns)


def _spread(s: Tensor, centres: Tensor, size: Sequence[int]) -> Tensor:
    """[H, W]: bilinear between the centres, the nearest beyond them."""
    rows, columns = s.shape
    positions = []
    for axis, (count, line) in enumerate(((rows, centres[:, 0, 0]), (columns, centres[0, :, 1]))):
        pixels = torch.arange(size[axis], device=s.device, dtype=s.dtype)
        gap = (line[1] - line[0]) if count > 1 else line.new_ones(())
        positions.append(((pixels - line[0]) / gap).clamp(0, count - 1) * 2 / max(count - 1, 1) - 1)
    down, across = torch.meshgrid(*positions, indexing="ij")
    grid = torch.stack([across, down], -1)[None]
    return F.grid_sample(s[None, None], grid, mode="bilinear", padding_mode="border", align_corners=True)[
        0, 0
    ]


def _resize(m: Tensor, size: Sequence[int]) -> Tensor:
    if tuple(m.shape[-2:]) == tuple(size):
        return m
    return F.interpolate(m[None], tuple(size), mode="bilinear", align_corners=False, antialias=True)[0]


def _unit(m: Tensor) -> Tensor:
    span = m.max() - m.min()
    return (m - m.min()) / span if span > 0 else torch.zeros_like(m)
