"""The worked examples and invariants of vidcom2."""

import pytest
import torch
from token_examples import kept

from secateur.methods.vidcom2 import nearness
from secateur.testing import token_sets

ONE, OTHER = (1.0, 0.0), (0.0, 1.0)


def video(frames, keep, **fields):
    """Frames of tokens that point somewhere in two channels, beside two that vary most and must not count."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.tensor([token for frame in frames for token in frame])
    loud = 50 * torch.randn(len(tokens), 2, generator=generator)
    frame = torch.tensor([[i for i, part in enumerate(frames) for _ in part]])
    return token_sets(torch.cat([loud, tokens], 1)[None], keep, frame_of=frame, **fields)


def by_frame(sets, **settings):
    found = torch.tensor(kept("vidcom2", sets, **settings)[0])
    return torch.bincount(sets.frame_of[0, found], minlength=3).tolist()


def test_nearness_sums_five_widths():
    """Distance^2 2: e^-8 + e^-4 + e^-2 + e^-1 + e^-0.5."""
    found = nearness(torch.tensor([[1.0, 0.0]]), torch.tensor([0.0, 1.0]))
    assert found.item() == pytest.approx(
        0.00033546 + 0.01831564 + 0.13533528 + 0.36787944 + 0.60653066, abs=1e-6
    )


def test_the_frame_that_differs_keeps_more():
    """Mean (2/3, 1/3): nearness 3.694 of the first two frames, 2.051 of the third, so p = (0, 0, 1) and the scales are 2/3,
    2/3 and 5/3: of four tokens a frame at one half 1.33, 1.33 and 3.33."""
    frames = [[ONE] * 4, [ONE] * 4, [OTHER] * 4]
    assert by_frame(video(frames, 6)) == [1, 1, 4]  # what rounding down leaves goes to the largest
    assert by_frame(video(frames, 6, target=0.5), compat="code") == [1, 1, 3]
    assert by_frame(video(frames, 6, target=0.5), temperature=1e6, compat="code") == [2, 2, 2]


def test_the_temperature_by_hand():
    """At 1.6432 the gap is one: p = 1/(2 + e), 1/(2 + e), e/(2 + e); of 12 tokens 3.51, 3.51 and 4.97. What
    rounding down leaves goes to the third frame and the first."""
    frames = [[ONE] * 8, [ONE] * 8, [OTHER] * 8]
    assert by_frame(video(frames, 12), temperature=1.64324) == [4, 3, 5]
    assert by_frame(video(frames, 12, target=0.5), temperature=1.64324, compat="code") == [4, 4, 5]


def test_in_a_frame_the_tokens_unlike_it_stay():
    odd = (0.6, 0.8)
    frames = [[ONE, ONE, odd, ONE], [ONE, odd, ONE, ONE], [odd, ONE, ONE, ONE]]
    assert kept("vidcom2", video(frames, 3)) == [[2, 5, 8]]


def test_code_keeps_one_token_of_every_frame_and_the_paper_form_meets_the_target():
    frames = [[ONE] * 4, [ONE] * 4, [OTHER] * 4]
    assert by_frame(video(frames, 1, target=0.1), compat="code") == [1, 1, 1]
    assert by_frame(video(frames, 1)) == [0, 0, 1]


def test_a_picture_is_a_video_of_one_frame():
    odd = (0.6, 0.8)
    frames = [[ONE, ONE, odd, ONE, odd, ONE]]
    assert kept("vidcom2", video(frames, 2)) == [[2, 4]]
    for keep in range(1, 7):
        assert len(kept("vidcom2", video(frames, keep))[0]) == keep


def test_padding_is_no_token():
    frames = [[ONE] * 4, [ONE] * 4, [OTHER] * 4]
    alone, twice = video(frames, 6), video(frames, 6)
    valid = torch.tensor([[True] * 12, [True] * 8 + [False] * 4])
    both = token_sets(alone.features.expand(2, -1, -1), 6, valid=valid, frame_of=twice.frame_of.expand(2, -1))
    found = kept("vidcom2", both)
    assert found[0] == kept("vidcom2", alone)[0] and len(found[1]) == 6 and max(found[1]) < 8
