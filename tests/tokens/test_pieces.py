"""Small pieces of the engine, by hand."""

from types import SimpleNamespace

import pytest
import torch

from secateur.tokens.attach import Attached
from secateur.tokens.call import Call
from secateur.tokens.cost import Clock, cache_bytes, report
from secateur.tokens.input import _seen_positions, formed
from secateur.tokens.live import _at, _padded
from secateur.tokens.tower import _mean_over_patches


def test_columns_that_hold_visual_tokens():
    """Row 0 has tokens in columns 1 and 2, row 1 in 0, and one of its tokens is gone."""
    call = SimpleNamespace(table=SimpleNamespace(rows=2, row=torch.tensor([0, 0, 1, 1])))
    columns = torch.tensor([[0, 1, 2, 3], [0, 1, 2, 5]])
    visual = Call.visual_columns(call, torch.tensor([1, 0]), columns, torch.tensor([1, 2, -1, 0]))
    assert visual.int().tolist() == [[1, 0, 0, 0], [0, 1, 1, 0]]
    far = Call.visual_columns(call, torch.tensor([0, 1]), columns[:, :1], torch.tensor([0, 7, -1, -1]))
    assert far.int().tolist() == [[1], [0]]
    none = SimpleNamespace(table=SimpleNamespace(rows=1, row=torch.zeros(0, dtype=torch.int64)))
    empty = torch.zeros(0, dtype=torch.int64)
    assert Call.visual_columns(none, torch.tensor([0]), columns[:1], empty).int().tolist() == [[0, 0, 0, 0]]


def test_a_unit_s_feature_is_the_mean_of_its_patches_that_are_left():
    hidden = torch.tensor([[[1.0, 2.0], [3.0, 6.0]], [[10.0, 0.0], [0.0, 4.0]]])
    slot = torch.tensor([[0, 2, 3], [1, -1, -1], [-1, 2, 1]])
    expected = [[11 / 3, 2.0], [3.0, 6.0], [6.5, 3.0]]
    torch.testing.assert_close(_mean_over_patches(hidden, slot), torch.tensor(expected))
    assert _mean_over_patches(hidden, slot[:2, :1]).tolist() == [[1, 2], [3, 6]]


def test_keys_of_earlier_turns_can_all_be_seen():
    usable = torch.tensor([[True, False], [False, True]])
    assert _padded(usable, 0) is usable
    assert _padded(usable, 3).int().tolist() == [[1, 1, 1, 1, 0], [1, 1, 1, 0, 1]]


def test_states_at_slots_are_those_of_the_sets_row_and_zero_where_there_is_none():
    states = torch.arange(12.0).reshape(2, 3, 2)
    sets = SimpleNamespace(row=torch.tensor([1, 0, 1]))
    found = _at(sets, torch.tensor([[0, 2], [1, -1], [-1, 1]]), states)
    assert found.tolist() == [[[6, 7], [10, 11]], [[2, 3], [0, 0]], [[0, 0], [8, 9]]]
    assert _at(sets, torch.tensor([[0], [2], [-1]]), states[..., 0]).tolist() == [[6], [4], [0]]


@pytest.mark.parametrize("plain", [True, False])
def test_a_report_without_a_language_model(plain):
    """A vision transformer on its own counts its tokens; a model whose run saw no picture has nothing to count."""
    clock = Clock(first=0.5, steps=[0.1, 0.3, 0.2])
    setup = SimpleNamespace(facts=None, plain=plain)
    found = report(setup, clock, None, SimpleNamespace(visual=12, alive=torch.arange(5)))
    assert found["seconds_to_first_token"] == 0.5 and found["seconds_per_token"] == pytest.approx(0.2)
    assert (found["before"], found["after"]) == (
        ({"visual_tokens": 12}, {"visual_tokens": 5}) if plain else (None, None)
    )
    nothing = report(setup, Clock(), None, None)
    assert nothing == {
        "before": None,
        "after": None,
        "seconds_to_first_token": 0.0,
        "seconds_per_token": None,
    }


def test_a_clock_tells_the_first_forward_from_the_steps(monkeypatch):
    now = iter([10.0, 12.0, 12.5, 13.5, 20.0, 21.0, 27.0])
    monkeypatch.setattr(Clock, "_now", staticmethod(lambda model: next(now)))
    clock = Clock()
    clock.start(None)
    for _ in range(3):
        clock.mark(None)
    assert (clock.first, clock.steps) == (2.0, [0.5, 1.0])
    clock.rest(None, 4)  # the steps were seen one by one
    assert clock.steps == [0.5, 1.0]
    clock.start(None)
    clock.rest(None, 3)  # nothing has run yet
    assert (clock.first, clock.steps) == (0.0, [])
    clock.mark(None)
    clock.rest(None, 0)
    assert (clock.first, clock.steps) == (1.0, [])
    clock.rest(None, 3)
    assert clock.steps == [2.0]


def test_features_have_the_form_that_the_encoder_gave():
    parts = [torch.ones(2, 3), torch.zeros(1, 3)]
    given = {"image": SimpleNamespace(pooler_output=parts), "video": SimpleNamespace(pooler_output=[])}
    found = formed(given, {"image": torch.zeros(1, 9, 3), "video": torch.zeros(4, 3)})
    assert torch.equal(found["image"].pooler_output, torch.cat(parts)[None])
    assert found["video"].pooler_output.shape == (0, 3)
    assert given["image"].pooler_output is parts and formed(given, {"image": parts}) == given


def test_bytes_of_a_cache():
    layer = SimpleNamespace(keys=torch.zeros(2, 3, dtype=torch.float16), values=torch.zeros(4))
    assert cache_bytes(SimpleNamespace(layers=[layer, SimpleNamespace(keys=None)])) == 12 + 16
    assert cache_bytes(None) == 0


def test_positions_are_those_that_the_decoder_is_given_and_it_does_not_run():
    class Model(torch.nn.Module):
        def __init__(self, key):
            super().__init__()
            self.inner, self.key = torch.nn.Identity(), key

        def get_decoder(self):
            return self.inner

        def forward(self, ids, labels=None):
            assert labels is None
            return self.inner(ids, **{self.key: ids + 1})

    ids = torch.arange(3)[None]
    model = Model("position_ids")
    assert _seen_positions(model, {"ids": ids, "labels": ids}).tolist() == [[1, 2, 3]]
    assert not model.inner._forward_pre_hooks
    assert _seen_positions(Model("other"), {"ids": ids}) is None


def test_what_an_attached_model_prints():
    kept = {"input": [range(3), range(2)], "layer:2": [range(1), range(0)]}
    setup = SimpleNamespace(target="50%")
    fake = SimpleNamespace(
        attached=True, method="a method", model=torch.nn.Identity(), setup=setup, kept=kept
    )
    lines = Attached.__repr__(fake).split("\n")
    assert lines[:2] == ["Attached: 'a method' on Identity", "  target 50%"]
    assert lines[2:4] == [
        "  input: [3, 2] tokens stay in each row",
        "  layer:2: [1, 0] tokens stay in each row",
    ]
    assert "taken off" in Attached.__repr__(SimpleNamespace(**{**vars(fake), "attached": False, "kept": {}}))
