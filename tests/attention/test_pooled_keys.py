"""Attention over pooled keys: the sheet's example, dense and masked attention as special cases, padding, causality."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from secateur.attention.layout import Layout
from secateur.attention.pyramid import gathered, masked, pool
from secateur.errors import SecateurError

BOTH = pytest.mark.parametrize("attend", [masked, gathered])


def drawn(n: int = 100, m: int = 150, heads: int = 4, groups: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    make = torch.Generator().manual_seed(n + m)
    shapes = ((2, heads, n, 8), (2, groups, m, 8), (2, groups, m, 6))
    q, k, v = (torch.randn(shape, generator=make, dtype=torch.float64) for shape in shapes)
    return q, k, v


def some_levels(layout: Layout, heads: int = 4, among: tuple[int, ...] = (0, 1, 2, 4, 8)) -> Tensor:
    make = torch.Generator().manual_seed(5)
    index = torch.randint(len(among), (2, heads, layout.rows, layout.columns), generator=make)
    levels = torch.tensor(among)[index]
    levels[..., 0] = 1
    return torch.where(layout.crossed(), 1, levels).where(layout.visible(), 0)


@BOTH
@pytest.mark.parametrize(
    ("pair", "expected"),
    [
        ((1, 1), 2.65455),
        ((2, 2), 2.65455),
        ((1, 2), 2.65455),
        ((1, 4), 2.70654),
        ((4, 4), 2.98176),
        ((1, 0), 1.16048),
    ],
)
def test_the_sheets_outputs(attend, pair: tuple[int, int], expected: float) -> None:
    q = torch.tensor([[[[1.0, 0.0]]]])
    k = torch.tensor([[[[1.0, 0], [1, 0], [0, 1], [0, 1], [0.5, 0.5], [0.5, 0.5], [-1, 0], [-1, 0]]]])
    v = torch.arange(8.0)[None, None, :, None]
    out = attend(q, k, v, torch.tensor([[[pair]]]), Layout(1, 8, block_k=4))
    assert out.item() == pytest.approx(expected, abs=1e-5)


def reference(q: Tensor, k: Tensor, v: Tensor, levels: Tensor, layout: Layout, real: Tensor | None) -> Tensor:
    """One query, one block, one group of keys at a time."""
    out = torch.zeros(*q.shape[:3], v.shape[3], dtype=q.dtype)
    for b, h, n in itertools.product(*map(range, q.shape[:3])):
        group, logits, values = h // (q.shape[1] // k.shape[1]), [], []
        for column, level in enumerate(levels[b, h, n // layout.block_q].tolist()):
            start, stop = column * layout.block_k, min((column + 1) * layout.block_k, layout.keys)
            for at in range(start, stop, level) if level else ():
                members = [i for i in range(at, min(at + level, stop)) if real is None or real[b, i]]
                end = min(at + level, layout.keys) - 1
                if not members or (layout.causal and end > n + layout.offset):
                    continue
                key = k[b, group, members].mean(0)
                logits.append(q[b, h, n] @ key / 8**0.5 + math.log(len(members)))
                values.append(v[b, group, members].mean(0))
        if logits:
            out[b, h, n] = torch.stack(logits).softmax(0) @ torch.stack(values)
    return out


@BOTH
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_each_query_by_hand(attend, causal: bool, padded: bool) -> None:
    q, k, v = drawn(37, 45)
    layout, real = Layout(37, 45, 16, 16, causal), None
    if padded:
        real = torch.ones(2, 45, dtype=torch.bool)
        real[0, :19] = False
        real[1, 40:] = False
    levels = some_levels(layout)
    torch.testing.assert_close(
        attend(q, k, v, levels, layout, real=real),
        reference(q, k, v, levels, layout, real),
        atol=1e-12,
        rtol=0,
    )


@BOTH
@pytest.mark.parametrize("causal", [False, True])
def test_level_one_everywhere_is_dense_attention(attend, causal: bool) -> None:
    q, k, v = drawn(150, 150)
    layout = Layout(150, 150, 32, 16, causal)
    dense = F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)
    torch.testing.assert_close(
        attend(q, k, v, some_levels(layout, among=(1,)), layout), dense, atol=1e-12, rtol=0
    )


@BOTH
def test_levels_one_and_nothing_are_masked_attention(attend) -> None:
    q, k, v = drawn()
    layout = Layout(100, 150, 32, 16)
    levels = some_levels(layout, among=(0, 1))
    may = levels.repeat_interleave(32, 2)[:, :, :100].repeat_interleave(16, 3)[..., :150] == 1
    wanted = F.scaled_dot_product_attention(q, k, v, attn_mask=may, enable_gqa=True)
    torch.testing.assert_close(attend(q, k, v, levels, layout), wanted, atol=1e-12, rtol=0)


@BOTH
@pytest.mark.parametrize("level", [2, 4, 8])
def test_a_level_is_exact_where_its_keys_are_alike(attend, level: int) -> None:
    q, k, v = drawn(100, 144)
    k = k[:, :, ::level].repeat_interleave(level, 2)[:, :, :144]
    layout = Layout(100, 144, 32, 16)
    dense = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    every = torch.full((2, 4, layout.rows, layout.columns), level)
    torch.testing.assert_close(attend(q, k, v, every, layout), dense, atol=1e-12, rtol=0)


@BOTH
def test_what_comes_later_changes_nothing(attend) -> None:
    q, k, v = drawn(100, 100)
    layout = Layout(100, 100, 16, 16, causal=True)
    levels = some_levels(layout)
    before = attend(q, k, v, levels, layout)
    k[:, :, 60:], v[:, :, 60:] = 7, -7
    torch.testing.assert_close(attend(q, k, v, levels, layout)[:, :, :60], before[:, :, :60], atol=0, rtol=0)


@BOTH
def test_half_precision_and_gradients(attend) -> None:
    q, k, v = drawn(40, 40)
    layout = Layout(40, 40, 16, 16)
    levels = some_levels(layout)
    half = attend(q.bfloat16(), k.bfloat16(), v.bfloat16(), levels, layout)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.double(), masked(q, k, v, levels, layout), atol=3e-2, rtol=3e-2)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    one = torch.autograd.grad(attend(q, k, v, levels, layout).sum(), leaves)
    two = torch.autograd.grad(masked(q, k, v, levels, layout).sum(), leaves)
    for a, b in zip(one, two, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=0)


def test_pooled_padding_counts_for_nothing() -> None:
    means, counts = pool(
        torch.tensor([[1.0], [3.0], [5.0], [7.0]]), 2, torch.tensor([True, False, False, False])
    )
    assert counts.tolist() == [1, 0] and means[0].item() == 1


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"levels": torch.full((2, 4, 4, 10), 3)}, "no level 3"),
        ({"levels": torch.ones(2, 4, 3, 10, dtype=torch.int64)}, "the levels should be"),
        ({"layout": Layout(100, 140, 32, 16)}, "isn't theirs"),
        ({"q": torch.ones(2, 3, 100, 8)}, "don't belong together"),
        ({"layout": Layout(100, 150, 32, 4), "levels": torch.full((2, 4, 4, 38), 8)}, "no level 8"),
    ],
)
def test_what_does_not_fit_is_named(change: dict, match: str) -> None:
    q, k, v = (x.float() for x in drawn())
    layout = Layout(100, 150, 32, 16)
    given = {"q": q, "k": k, "v": v, "levels": some_levels(layout), "layout": layout, **change}
    for attend in (masked, gathered):
        with pytest.raises(SecateurError, match=match):
            attend(**given)
