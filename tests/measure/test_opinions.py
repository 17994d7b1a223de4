"""Several masks against several truths, and scores against people's: the worked examples."""

import importlib

import pytest
import torch
from torch import Tensor

from secateur import SecateurError
from secateur.measure.opinions import LEVELS, iou, opinion_figures, overlaps, preference_figures


def line(*ranges: tuple[int, int]) -> Tensor:
    """Masks [n, 1, 10] of pixels first to last, both included."""
    masks = torch.zeros(len(ranges), 1, 10, dtype=torch.bool)
    for mask, (first, last) in zip(masks, ranges):
        mask[0, first : last + 1] = True
    return masks


TRUTHS, FOUND = line((0, 3), (5, 8)), line((0, 2), (0, 4), (6, 9))


def test_the_worked_example() -> None:
    assert iou(FOUND, TRUTHS).flatten().tolist() == pytest.approx([0.75, 0, 0.8, 0, 0, 0.6])
    figures = opinion_figures([FOUND], [TRUTHS])
    assert figures["precision"] == pytest.approx(0.533333, abs=1e-6)
    assert figures["recall"] == pytest.approx(0.5)
    assert figures["f1"] == pytest.approx(0.516129, abs=1e-6)
    assert figures["soft_precision"] == pytest.approx(0.716667, abs=1e-6)
    assert figures["soft_recall"] == pytest.approx(0.7)
    assert figures["soft_f1"] == pytest.approx(0.708235, abs=1e-6)


@pytest.mark.parametrize(
    ("twentieths", "precision", "recall"),
    [(10, 1, 1), (12, 1, 1), (14, 2 / 3, 0.5), (15, 2 / 3, 0.5), (16, 1 / 3, 0.5)],
)
def test_the_worked_example_at_single_thresholds(
    twentieths: int, precision: float, recall: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """0.6 is met by an overlap of exactly 3 of 5, as nothing is rounded."""
    monkeypatch.setattr(importlib.import_module("secateur.measure.opinions"), "LEVELS", [twentieths])
    figures = opinion_figures([FOUND], [TRUTHS])
    assert figures["precision"] == pytest.approx(precision) and figures["recall"] == pytest.approx(recall)
    assert twentieths in LEVELS


def test_order_and_repetition_and_wrong_masks() -> None:
    whole = opinion_figures([FOUND], [TRUTHS])
    assert opinion_figures([FOUND[[2, 0, 1]]], [TRUTHS.flip(0)]) == pytest.approx(whole)
    twice = opinion_figures([torch.cat([FOUND, FOUND[1:2]])], [TRUTHS])
    assert twice["recall"] == whole["recall"]
    worse = opinion_figures([torch.cat([FOUND, line((4, 4))])], [TRUTHS])
    assert worse["recall"] == whole["recall"] and worse["precision"] == pytest.approx(
        0.75 * whole["precision"]
    )


def test_no_mask_at_all_counts_as_nothing() -> None:
    figures = opinion_figures([FOUND[:0], TRUTHS], [TRUTHS, TRUTHS])
    assert figures["precision"] == figures["recall"] == 0.5
    assert set(opinion_figures([FOUND[:0]], [TRUTHS]).values()) == {0.0}


def test_overlap_is_counted_in_pixels() -> None:
    inside, union = overlaps(FOUND, TRUTHS)
    assert inside.tolist() == [[3, 0], [4, 0], [0, 3]] and union.tolist() == [[4, 7], [5, 9], [8, 5]]
    assert inside.dtype == torch.int64
    assert iou(torch.zeros(1, 4).bool(), torch.zeros(1, 4).bool()).item() == 1


def test_preferences_by_the_worked_example() -> None:
    figures = preference_figures([0.9, 0.4, 0.7, 0.2], [1, 0.3, 0.5, 0.4])
    assert figures == pytest.approx({"pearson": 0.827586, "spearman": 0.8, "mae": 0.15}, abs=1e-6)
    assert preference_figures([0.5, 0.5], [0, 1])["spearman"] == 0


@pytest.mark.parametrize(
    ("found", "truths", "said"),
    [
        ([], [], "0 predictions for 0 truths"),
        ([FOUND], [], "1 predictions for 0 truths"),
        ([FOUND.float()], [TRUTHS], "predictions: the masks are of floats"),
        ([FOUND], [TRUTHS.float()], "truths: the masks are of floats"),
        ([FOUND[..., :4]], [TRUTHS], r"\(1, 4\) and of \(1, 10\)"),
        ([FOUND], [TRUTHS & False], "picture 0: a truth shows no object"),
    ],
)
def test_what_cannot_be_compared_is_refused(found: list, truths: list, said: str) -> None:
    with pytest.raises(SecateurError, match=said):
        opinion_figures(found, truths)


@pytest.mark.parametrize(
    ("scores", "people", "said"),
    [
        ([0.5], [0.5], "1 scores for 1"),
        ([0.1, 0.2], [0.1], "2 scores for 1"),
        ([0.1, 0.2], [0.4, 0.4], "all 0.4"),
        ([0.1, float("nan")], [0.1, 0.4], "isn't finite"),
    ],
)
def test_scores_that_say_nothing_are_refused(scores: list, people: list, said: str) -> None:
    with pytest.raises(SecateurError, match=said):
        preference_figures(scores, people)
