"""Levels of key blocks: the sheet's worked examples, and what holds of any."""

import pytest
import torch

from secateur.attention.layout import Layout
from secateur.attention.levels import (
    by_energy,
    by_rank,
    by_threshold,
    cap_by_likeness,
    capped,
    density,
    forced,
)
from secateur.errors import SecateurError

S = torch.tensor([[0.02, 0.30, 0.05, 0.01, 0.20, 0.09, 0.04, 0.15, 0.12, 0.02]])
ALL = torch.ones(1, 10, dtype=torch.bool)


def test_the_sheets_level_maps() -> None:
    ranked = by_rank(S, ALL, (0.1, 0.3, 0.4, 0.6))
    assert ranked.tolist() == [[0, 1, 8, 0, 2, 8, 0, 2, 4, 0]] and density(ranked, ALL) == 0.25
    assert by_energy(S, ALL, (0.7, 0.8, 0.9, 0.9)).tolist() == [[0, 1, 0, 0, 1, 4, 0, 1, 2, 0]]
    assert by_threshold(S, ALL, (0.7, 0.8, 0.9, 0.9)).tolist() == [[0, 1, 4, 0, 1, 2, 0, 1, 1, 0]]


def test_a_block_that_just_meets_a_bound_is_within_it() -> None:
    scores = torch.tensor([[0.25, 0.5, 0.25]])
    assert by_energy(scores, ALL[:, :3], (0.5, 0.75, 0.75, 1.0)).tolist() == [[2, 1, 8]]


def test_the_sheets_caps() -> None:
    a, b = [1.0, 0.0], [0.0, 1.0]
    keys = torch.tensor([a, a, b, b, a, a, b, b])
    assert cap_by_likeness(keys, 8, (0.7, 0.65, 0.6)).tolist() == [2]
    assert cap_by_likeness(keys, 8, (0.0, 0.0, -1.0)).tolist() == [8]
    assert capped(torch.tensor([[8, 0], [2, 8]]), torch.tensor([4, 1])).tolist() == [[4, 0], [2, 1]]


def test_padding_says_nothing_of_likeness() -> None:
    a, b = [1.0, 0.0], [0.0, 1.0]
    keys, real = torch.tensor([a, a, a, b, a, a, a, b]), torch.tensor([True] * 3 + [False] + [True] * 4)
    assert cap_by_likeness(keys, 8, (0.6, 2.0, 2.0)).tolist() == [1]  # pairs alike: yes, no, yes, no
    assert cap_by_likeness(keys, 8, (0.6, 2.0, 2.0), real).tolist() == [2]  # the second isn't asked


def test_ranks_count_visible_blocks_and_are_aligned() -> None:
    visible = torch.tensor([[True] * 4 + [False] * 6])
    assert by_rank(S, visible, (0.25, 0.5, 0.5, 1.0)).tolist() == [[8, 1, 2, 8, 0, 0, 0, 0, 0, 0]]
    # to rank 1, 3, 4, 6: the first two are rounded up to 2 and 4, where the third has nothing left
    aligned = by_rank(S, ALL, (0.1, 0.3, 0.4, 0.6), align=(2, 2, 2, 2))
    assert [(aligned == level).sum().item() for level in (1, 2, 4, 8)] == [2, 2, 0, 2]
    assert by_rank(S, ALL, (0.9, 1.0, 1.0, 1.0), align=(4, 4, 4, 4)).count_nonzero() == 8


def test_ties_go_to_the_first() -> None:
    assert by_rank(torch.ones(1, 4), ALL[:, :4], (0.25, 0.5, 0.75, 0.75)).tolist() == [[1, 2, 4, 0]]


def test_a_row_always_reads_something() -> None:
    one = torch.tensor([[0.0, 0.97, 0.03]])
    assert by_energy(one, ALL[:, :3], (0.5, 0.6, 0.7, 0.8)).tolist() == [[0, 1, 0]]
    assert by_rank(S, ALL, (0.0, 0.0, 0.0, 0.0)).sum() == 1


def test_what_must_be_read_is_read_whole_where_it_is_visible() -> None:
    layout = Layout(8, 8, 4, 4, causal=True)
    levels = torch.tensor([[8, 8], [8, 8]])
    assert forced(levels, layout.crossed(), layout.visible()).tolist() == [[1, 8], [8, 1]]
    assert layout.visible().tolist() == [[True, False], [True, True]]
    late = Layout(2, 8, 4, 4, causal=True)  # two queries behind six keys
    assert (
        late.offset == 6
        and late.visible().tolist() == [[True, True]]
        and late.crossed().tolist() == [[False, True]]
    )


@pytest.mark.parametrize(
    "ends", [(0.5, 0.4, 0.6, 0.7), (0.1, 0.2, 0.3), (0.1, 0.2, 0.3, float("nan")), (0.1, 0.2, 0.3, 1.5)]
)
def test_ends_out_of_order_are_refused(ends: tuple[float, ...]) -> None:
    for function in (by_rank, by_threshold, by_energy):
        with pytest.raises(SecateurError, match="can't end at"):
            function(S, ALL, ends)


def test_importance_that_is_no_number_is_refused() -> None:
    with pytest.raises(SecateurError, match="no number"):
        by_rank(S.log().log(), ALL, (0.1, 0.3, 0.4, 0.6))


def test_layouts_that_hold_nothing_are_refused() -> None:
    for wrong in (
        {"queries": 0, "keys": 4},
        {"queries": 4, "keys": 4, "block_k": 0},
        {"queries": 5, "keys": 4, "causal": True},
    ):
        with pytest.raises(SecateurError):
            Layout(**wrong)


def test_a_row_that_must_read_something_is_given_nothing_more() -> None:
    one, all_three = torch.tensor([[0.0, 0.97, 0.03]]), torch.ones(1, 3, dtype=torch.bool)
    must = torch.tensor([[True, False, False]])
    assert by_energy(one, all_three, (0.5, 0.6, 0.7, 0.8), must=must).tolist() == [[1, 0, 0]]
    assert by_rank(one, all_three, (0.0, 0.0, 0.0, 0.0), must=must).tolist() == [[1, 0, 0]]
    hidden = torch.tensor([[True, True, False]])
    assert by_threshold(one, hidden, (0.5, 0.5, 0.5, 0.5), must=~hidden).tolist() == [[0, 1, 0]]
