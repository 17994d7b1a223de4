import pytest
import torch
from tiny_models import inputs_for, make

from secateur.errors import SecateurError
from secateur.tokens.search import agreement, calibrate, final_state

pytest.importorskip("optuna")


@pytest.fixture(scope="module")
def llava():
    return make("llava-clip", torch.float32)


def test_the_search_gives_settings_within_their_bounds_and_repeats(llava):
    samples = [dict(inputs_for("llava-clip", torch.float32))]
    search = {"target": "50%", "evaluations": 4, "start": 2, "seed": 1}
    found = calibrate(llava, samples, **search)
    assert set(found) == {"r1", "r2", "t", "a", "alpha"}
    assert 0.5 <= found["r1"] <= 0.75 and 0.5333 <= found["r2"] <= 1
    assert calibrate(llava, samples, **search) == found
    counted = calibrate(llava, samples, target="tokens=4", evaluations=1, start=1)
    assert 0.25 <= counted["r1"] <= 0.375  # a count is no share of its own


def test_the_unpruned_model_agrees_with_itself(llava):
    state = final_state(llava, inputs_for("llava-clip", torch.float32))
    assert agreement(state, state) == pytest.approx(1.0, abs=1e-6)
    assert agreement(state, torch.full_like(state, torch.nan)) == 0.0


def test_no_samples(llava):
    with pytest.raises(SecateurError, match="no samples"):
        calibrate(llava, [])
