"""The worked examples and invariants of vla-pruner."""

import pytest
import torch

import secateur
from secateur import SecateurError
from secateur.method import make_method
from secateur.methods.vla_pruner import ENTRY, smoothed
from secateur.tasks.tiny import inputs_for, tiny_llava
from secateur.testing import token_sets
from secateur.tokens.greedy import cosine_distance

HISTORY = torch.tensor(
    [[[0.4, 0.2, 0.1, 0.1, 0.1, 0.1], [0.1, 0.4, 0.2, 0.1, 0.1, 0.1], [0.05, 0.05, 0.1, 0.1, 0.3, 0.4]]]
)
PROMPT = torch.tensor([[0.05, 0.10, 0.35, 0.30, 0.15, 0.05]])
FEATURES = torch.tensor(
    [[[1, 0, 0], [0.9, 0.1, 0], [0, 1, 0], [0, 0.95, 0.2], [0, 0, 1], [0.2, 0, 0.9]]], dtype=torch.float32
)


def sets_of(features=FEATURES, history=HISTORY, prompt=PROMPT, keep=3, rows="all"):
    return token_sets(
        torch.zeros_like(features),  # states at the layer: the distances are of what entered the model
        keep=keep,
        history=history,
        attention={("layer:2", rows): prompt},
        hidden={ENTRY: features},
    )


def kept(sets, **settings):
    return make_method("vla-pruner", **settings).select(sets)[0].nonzero().flatten().tolist()


def test_the_history_is_smoothed_in_the_paper_s_order_or_the_released_one():
    """Spec: vla-pruner (a)."""
    paper = torch.tensor([[0.1582, 0.2041, 0.1328, 0.1, 0.182, 0.223]])
    released = torch.tensor([[0.2098, 0.2262, 0.1328, 0.1, 0.1525, 0.1787]])
    assert torch.allclose(smoothed(HISTORY, 0.8, "paper"), paper, atol=6e-5)
    assert torch.allclose(smoothed(HISTORY, 0.8, "released"), released, atol=6e-5)
    assert torch.equal(smoothed(torch.zeros(1, 3, 6), 0.8, "paper"), torch.zeros(1, 6))
    equal = torch.tensor([0.1, 0.3, 0.2]).expand(1, 3, 3)
    assert torch.allclose(smoothed(equal, 1.0, "paper"), equal[:, 0] / 0.6)


def test_the_worked_example():
    """Spec: vla-pruner (a): {2, 3, 4} and {1, 4, 5} give {1, 2, 4}."""
    assert kept(sets_of(), criteria="prefill") == [2, 3, 4]
    assert kept(sets_of(), criteria="action") == [1, 4, 5]
    assert kept(sets_of(), criteria="action", decay="released") == [0, 1, 5]
    distance = cosine_distance(FEATURES)[0]
    pairs = {(1, 2): 0.8896, (1, 3): 0.8919, (1, 4): 1.0, (1, 5): 0.7844, (2, 3): 0.0215}
    pairs |= {(2, 4): 1.0, (2, 5): 1.0, (3, 4): 0.794, (3, 5): 0.7989, (4, 5): 0.0238}
    for (one, two), value in pairs.items():
        assert float(distance[one, two]) == pytest.approx(value, abs=6e-5)
    assert kept(sets_of()) == [1, 2, 4]
    for rows in ("text", "last"):
        assert kept(sets_of(rows=rows), prefill=rows) == [1, 2, 4]


def test_where_both_agree_nothing_is_thinned():
    same = PROMPT.expand(1, 3, 6)
    assert kept(sets_of(history=same)) == [2, 3, 4]


def test_the_window_must_be_full():
    """Rows alone: the second of two has had fewer steps, and keeps everything."""
    early = HISTORY.clone()
    early[:, 0] = torch.nan
    both = sets_of(FEATURES.expand(2, 6, 3), torch.cat([HISTORY, early]), PROMPT.expand(2, 6))
    mask = make_method("vla-pruner").select(both)
    assert mask[0].nonzero().flatten().tolist() == [1, 2, 4] and mask[1].all()


def test_the_order_of_the_tokens_doesn_t_matter():
    """But for first picks that tie: two tokens that are each other's nearest."""
    generator = torch.Generator().manual_seed(0)
    tried = 0
    for _ in range(60):
        features, history = (
            torch.randn(1, 20, 8, generator=generator),
            torch.rand(1, 3, 20, generator=generator),
        )
        prompt, order = torch.rand(1, 20, generator=generator), torch.randperm(20, generator=generator)
        first = kept(sets_of(features, history, prompt, keep=6))
        assert len(first) == 6
        union = set(kept(sets_of(features, history, prompt, keep=6), criteria="prefill"))
        union |= set(kept(sets_of(features, history, prompt, keep=6), criteria="action"))
        assert set(first) <= union
        part = cosine_distance(features)[0][sorted(union)][:, sorted(union)].fill_diagonal_(9)
        nearest = part.amin(1).sort(descending=True).values
        if float(nearest[0] - nearest[1]) < 1e-5:
            continue
        tried += 1
        moved = kept(sets_of(features[:, order], history[:, :, order], prompt[:, order], keep=6))
        assert sorted(order[moved].tolist()) == first
    assert tried > 40


def test_an_episode_on_a_model():
    model = tiny_llava().float()
    inputs = inputs_for(model)
    with torch.no_grad(), secateur.attach(model, "vla-pruner", target="25%") as attached:

        def episode():
            return [
                (model(**inputs).logits[:, -1], [row.tolist() for row in attached.kept[-1]]) for _ in range(5)
            ]

        first = episode()
        total = [32, 16, 0]
        for run, (_, rows) in enumerate(first):
            expected = total if run < 3 else [round(0.25 * n) for n in total]
            assert [len(row) for row in rows] == expected
        assert all(float(step.sum()) <= 1 for steps in attached.session.history for step in steps)
        attached.reset()
        for (logits, rows), (again, same) in zip(first, episode()):
            assert torch.equal(logits, again) and rows == same


def test_settings_that_make_no_sense():
    for match, wrong in (
        ("0 steps", {"window": 0}),
        ("outside 0..1", {"gamma": 1.5}),
        ("decay", {"decay": "x"}),
    ):
        with pytest.raises(SecateurError, match=match):
            make_method("vla-pruner", **wrong)
