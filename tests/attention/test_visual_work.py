"""Plans of visual work as data, neighbour windows, and attention in which visual keys have no part."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from secateur.attention.visual import Asked, attend, excused, neighbours
from secateur.attention.work import VisualWork
from secateur.errors import SecateurError

SIZES: dict[str, Any] = {"layers": 2, "heads_each": 4, "neurons_each": 8}


def grid(side: int, window: int) -> torch.Tensor:
    place = torch.arange(side * side)
    return neighbours(place // side, place % side, torch.zeros(side * side), window)


@pytest.mark.parametrize(("window", "pairs"), [(3, 4900), (5, 12996), (7, 24336), (47, 576**2)])
def test_pairs_of_a_24_by_24_grid(window: int, pairs: int) -> None:
    assert int(grid(24, window).sum()) == pairs


def test_neighbours_on_3_by_3() -> None:
    near = grid(3, 3)
    assert near[0].nonzero()[:, 0].tolist() == [0, 1, 3, 4]
    assert near[4].all()
    assert near[5].nonzero()[:, 0].tolist() == [1, 2, 4, 5, 7, 8]


def test_pictures_dont_see_each_other() -> None:
    place = torch.arange(4)
    near = neighbours(place * 0, place % 2, place // 2, 3)
    assert near.tolist() == [
        [True, True, False, False],
        [True, True, False, False],
        [False, False, True, True],
        [False, False, True, True],
    ]


def test_a_plan_is_a_file_that_can_be_edited(tmp_path: Path) -> None:
    work = VisualWork(**SIZES, window=3, heads=((0, 1), ()), neurons=(4, (1, 7)), cut=1, about={"by": "me"})
    file = tmp_path / "work.json"
    work.save(file)
    assert VisualWork.load(file) == work
    written = json.loads(file.read_text())
    assert written["heads"] == [[0, 1], []] and written["neurons"] == [4, [1, 7]]
    written["cut"] = 2
    file.write_text(json.dumps(written))
    changed = VisualWork.load(str(file))
    assert changed.cut == 2 and changed.window == 3
    assert changed.pruned(1) == [0, 1, 2, 3] and changed.count(1) == 2


@pytest.mark.parametrize(
    ("match", "wrong"),
    [
        ("window of 4 has no middle", {"window": 4}),
        ("window of -1 has no middle", {"window": -1}),
        ("layer 3 of 2", {"cut": 3}),
        ("layer -1 of 2", {"cut": -1}),
        ("for 1 layers of 2", {"heads": ((0,),)}),
        ("heads 0 to 3, each once", {"heads": ((4,), ())}),
        ("heads 0 to 3, each once", {"heads": ((1, 1), ())}),
        ("8 neurons, not 9", {"neurons": (9, 8)}),
        ("neurons 0 to 7", {"neurons": ((8,), 8)}),
    ],
)
def test_nonsense_in_a_plan_is_named(match: str, wrong: dict[str, Any]) -> None:
    with pytest.raises(SecateurError, match=match):
        VisualWork(**SIZES, **wrong)


@pytest.mark.parametrize(
    ("match", "text"),
    [
        ("isn't JSON", "{"),
        ("isn't a JSON object", "[]"),
        ("window is nan|isn't JSON|valid integer", json.dumps({**SIZES, "window": float("nan")})),
        ("valid integer", json.dumps({**SIZES, "window": 2.5})),
        ("Extra inputs", json.dumps({**SIZES, "shrubbery": 1})),
        ("format", json.dumps({**SIZES, "format": "other"})),
    ],
)
def test_a_broken_file_is_named(match: str, text: str, tmp_path: Path) -> None:
    file = tmp_path / "work.json"
    file.write_text(text)
    with pytest.raises(SecateurError, match=match):
        VisualWork.load(file)
    with pytest.raises(SecateurError, match="no such file"):
        VisualWork.load(tmp_path / "none.json")


def asked(kv: int = 4) -> Asked:
    made = torch.Generator().manual_seed(0)
    q = torch.randn(2, 4, 6, 3, generator=made, dtype=torch.float64)
    k, v = (torch.randn(2, kv, 6, 3, generator=made, dtype=torch.float64) for _ in range(2))
    return Asked(q, k, v, torch.ones(1, 1, 6, 6, dtype=torch.bool).tril(), None)


@pytest.mark.parametrize("silent", [True, False])
@pytest.mark.parametrize("kv", [4, 2, 1])
def test_an_excused_head_gives_what_zeroed_weights_give(kv: int, silent: bool) -> None:
    given = asked(kv)
    visual = torch.tensor([[False, True, True, False, False, False], [False, False, True, True, True, False]])
    pruned = [1, 2]
    weights = (given.q @ given.k.repeat_interleave(4 // kv, 1).mT / 3**0.5).masked_fill(
        ~given.may, -torch.inf
    )
    weights = weights.softmax(-1)
    weights[:, pruned] = weights[:, pruned].masked_fill(visual[:, None, None], 0)
    wanted = weights @ given.v.repeat_interleave(4 // kv, 1)
    if silent:
        wanted[:, pruned] = wanted[:, pruned].masked_fill(visual[:, None, :, None], 0)
    text = torch.tensor([[0, 3, 4, 5], [-1, 0, 1, 5]])
    for slots in (None, text):
        found = excused(given, visual, visual, pruned, silent, slots)
        torch.testing.assert_close(found, wanted, atol=1e-12, rtol=0)
    torch.testing.assert_close(attend(given)[:, [0, 3]], wanted[:, [0, 3]], atol=1e-12, rtol=0)
