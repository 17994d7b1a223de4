"""Orders of video tokens: curves, tiles, clusters; outputs come back in the model's own order."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import secateur
from secateur.attention.layout import Layout
from secateur.attention.order import alike, gilbert, inverse, tiles
from secateur.errors import SecateurError
from secateur.methods.psa import PSA

GRID = (3, 4, 6)
ORDERS = ("gilbert", "tiles", "alike", "mix")


class Joint(nn.Module):
    """Attention over text and video together."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, **more: Any) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, **more)


def drawn(n: int = 80) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = torch.randn(3, 2, 2, n, 16, generator=torch.Generator().manual_seed(n))
    return q, k, v


@pytest.mark.parametrize("grid", [*itertools.product((1, 2, 3, 5, 6), repeat=3), (13, 30, 45)])
def test_every_token_has_one_place_and_steps_are_short(grid: tuple[int, int, int]) -> None:
    frames, rows, columns = grid
    path = gilbert(grid)
    everyone = torch.arange(frames * rows * columns)
    assert torch.equal(path.sort().values, everyone)
    assert torch.equal(tiles(grid).sort().values, everyone)
    points = torch.stack([path // (rows * columns), path // columns % rows, path % columns], 1)
    longer = (points.diff(dim=0).abs().sum(1) > 1).sum()
    assert longer == 0 if all(side % 2 == 0 for side in grid) else longer <= len(path) // 20 + 2


def test_tiles_by_hand() -> None:
    assert tiles((2, 2, 3), (2, 2, 2)).tolist() == [0, 1, 3, 4, 6, 7, 9, 10, 2, 5, 8, 11]


def test_there_and_back() -> None:
    x = torch.arange(72)
    for places in (gilbert(GRID), tiles(GRID)):
        assert torch.equal(x[places][inverse(places)], x)


def test_clusters_stand_together() -> None:
    make = torch.Generator().manual_seed(0)
    centres = torch.eye(4, 8) * 10
    kind = torch.randint(4, (1, 2, 60), generator=make)
    x = centres[kind] + torch.randn(1, 2, 60, 8, generator=make) * 0.1
    places = alike(x, 12, generator=make)
    assert places.shape == (1, 2, 60) and torch.equal(
        places.sort(-1).values, torch.arange(60).expand(1, 2, 60)
    )
    changes = (kind.gather(2, places).diff(dim=-1) != 0).sum(-1)
    assert int(changes.max()) <= 11  # each cluster is of one kind
    one = alike(x, 1)
    assert torch.equal(one, torch.arange(60).expand(1, 2, 60))  # no change inside a cluster


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("text_first", [True, False])
def test_dense_attention_does_not_depend_on_the_order(order: str, text_first: bool) -> None:
    q, k, v = drawn()
    more: dict[str, Any] = {} if order == "alike" else {"grid": GRID}
    method = PSA(order=order, text=8, text_first=text_first, clusters=(5, 7), **more)
    found = method.places(q, k, torch.Generator().manual_seed(0))
    assert found is not None
    queries, keys = (places[..., None].expand(2, 2, -1, 16) for places in found)
    read = F.scaled_dot_product_attention(q.gather(2, queries), k.gather(2, keys), v.gather(2, keys))
    out = read.gather(2, inverse(found[0])[..., None].expand_as(read))
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v), atol=1e-5, rtol=1e-5)
    text = range(8) if text_first else range(72, 80)
    assert found[1][0, 0, -8:].tolist() == list(text)


@pytest.mark.parametrize("order", ORDERS)
def test_outputs_come_back_in_place(order: str) -> None:
    """Each query's output, beside attention over the keys that its block reads, worked out by hand in the new order."""
    q, k, v = drawn()
    more: dict[str, Any] = {} if order == "alike" else {"grid": GRID}
    method = PSA(order=order, text=8, clusters=(5, 7), density="40%", block_q=16, block_k=16, **more)
    module = Joint()
    with secateur.attach(module, method) as attached:
        out = module(q, k, v)
    assert attached.report["density"] < 0.7
    generator = torch.Generator().manual_seed(1)
    queries, keys = method.places(q, k, generator) or ()
    new_q, new_k, new_v = (
        x.gather(2, places[..., None].expand(2, 2, -1, 16))
        for x, places in ((q, queries), (k, keys), (v, keys))
    )
    levels = method.levels(new_q, new_k, Layout(80, 80, 16, 16), generator)
    assert bool((levels[..., -1] == 1).all())  # the text's block of keys
    from secateur.attention.pyramid import masked

    wanted = masked(new_q, new_k, new_v, levels, Layout(80, 80, 16, 16))
    back = torch.zeros_like(wanted).scatter_(2, queries[..., None].expand(2, 2, -1, 16), wanted)
    torch.testing.assert_close(out, back, atol=1e-5, rtol=1e-5)


def test_curves_serve_videos_whose_neighbours_are_alike() -> None:
    """Keys that change smoothly over frames, rows and columns are pooled with less loss along the curve."""
    make = torch.Generator().manual_seed(3)
    coarse = torch.randn(1, 16, 3, 3, 3, generator=make)
    smooth = (
        F.interpolate(coarse, (8, 8, 8), mode="trilinear", align_corners=True)
        .flatten(2)
        .transpose(1, 2)[:, None]
    )
    q, k, v = smooth * 3, smooth * 3, smooth
    wanted = F.scaled_dot_product_attention(q, k, v)
    errors = {}
    for order in ("", "gilbert"):
        more: dict[str, Any] = {"order": order, "grid": (8, 8, 8)} if order else {}
        with secateur.attach(
            Joint(), PSA(ends=(0.0, 0.0, 0.0, 1.0), block_q=32, block_k=32, **more)
        ) as attached:
            errors[order] = float((attached.model(q, k, v) - wanted).square().sum())
    assert errors["gilbert"] < 0.7 * errors[""]


def test_gradients_pass_an_order() -> None:
    q, k, v = (x.requires_grad_() for x in drawn())
    module = Joint()
    with secateur.attach(
        module, "psa", order="gilbert", grid=GRID, text=8, density="40%", block_q=16, block_k=16
    ):
        grads = torch.autograd.grad(module(q, k, v).square().sum(), (q, k, v))
    assert all(bool(grad.abs().sum(-1).gt(0).any()) for grad in grads)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"order": "gilbert"}, "isn't frames, rows and columns"),
        ({"order": "gilbert", "grid": (3, 4, 0)}, "isn't frames, rows and columns"),
        ({"order": "tiles", "grid": GRID, "tile": (2, 8)}, "isn't frames, rows and columns"),
        ({"order": "gilbert", "grid": (3, 4, 5)}, "aren't a grid of"),
        ({"order": "gilbert", "grid": GRID, "text": -1}, "text of -1"),
        ({"order": "alike", "clusters": (0, 5)}, "0 or more"),
        ({"order": "spiral"}, "spiral"),
        ({"text": 5}, "serve an order"),
    ],
)
def test_wrong_grids_are_named(settings: dict[str, Any], match: str) -> None:
    module = Joint()
    with (
        pytest.raises(SecateurError, match=match),
        secateur.attach(module, "psa", block_q=16, block_k=16, **settings),
    ):
        module(*drawn())


def test_causal_attention_keeps_its_order() -> None:
    module = Joint()
    with (
        pytest.raises(SecateurError, match="can't change places"),
        secateur.attach(module, "psa", order="alike", block_q=16, block_k=16),
    ):
        module(*drawn(), is_causal=True)
