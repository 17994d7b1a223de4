"""yopo: heads ranked by how much they look at pictures, shares of a target, the paper's multiply-adds."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from secateur import SecateurError
from secateur.attention.work import VisualWork
from secateur.families.vlm import Facts
from secateur.methods.yopo import YOPO, shares
from secateur.testing import inputs_for, tiny_llava
from secateur.tokens.cost import visual_flops
from secateur.tokens.heads import head_ratio, head_ratios, standing, votes

SEVEN = Facts(layers=32, hidden=4096, intermediate=11008, heads=32, kv_heads=32)
THIRTEEN = Facts(layers=40, hidden=5120, intermediate=13824, heads=40, kv_heads=40)


def part(facts: Facts, heads: int, neurons: int, cut: int) -> VisualWork:
    first = tuple(range(heads))
    each = (facts.layers, facts.heads, facts.intermediate)
    return VisualWork(*each, heads=(first,) * facts.layers, neurons=(neurons,) * facts.layers, cut=cut)


def test_the_papers_multiply_adds() -> None:
    # it counts each twice: 7.63 and 14.89 T dense, 1.91 and 3.72 T at 25 %
    for facts, dense, quarter in ((SEVEN, "7.63", "1.91"), (THIRTEEN, "14.89", "3.72")):
        halves = part(facts, facts.heads // 2, facts.intermediate // 2, facts.layers // 2)
        found = visual_flops(halves, facts, [[576.0]] * facts.layers)
        assert f"{2 * found['dense'] / 1e12:.2f}" == dense
        assert f"{2 * found['left'] / 1e12:.2f}" == quarter
    least = visual_flops(part(SEVEN, 8, 2752, 16), SEVEN, [[576.0]] * 32)
    assert least["left"] / least["dense"] == 0.125


def test_the_parts_of_the_work_add_up() -> None:
    found = visual_flops(part(SEVEN, 8, 5504, 24), SEVEN, [[576.0, 0.0]] * 32)
    n, d, m = 576, 4096, 11008
    attention, inner = 4 * n * d**2 + 2 * n**2 * d, 3 * n * d * m
    assert found["layers"] == 8 * (attention + inner)
    assert found["heads"] == 24 * 0.75 * attention and found["neurons"] == 24 * 0.5 * inner
    assert found["left"] == 24 * (0.25 * attention + 0.5 * inner)


def test_ratios_of_two_heads() -> None:
    weights = torch.tensor([[[0.5, 0.1, 0.4], [0.5, 0.02, 0.48]]])
    ratios = head_ratio(weights, torch.tensor([[False, True, False]]))
    assert [round(r, 4) for r in ratios[0].tolist()] == [0.1111, 0.0204]
    kept = votes(ratios[:, None].expand(100, 1, 2), threshold=0.035)
    assert kept.tolist() == [[True, False]]


def test_a_head_needs_more_than_40_of_100_votes() -> None:
    ratios = torch.zeros(100, 1, 2)
    ratios[:40, 0, 0], ratios[:41, 0, 1] = 1.0, 1.0
    assert votes(ratios, 0.5).tolist() == [[False, True]]
    # the same rule as a score of each head: it is kept below any threshold under it
    made = torch.rand(100, 3, 5, generator=torch.Generator().manual_seed(0))
    for threshold in (0.4, 0.55, 0.6, 0.65):
        assert torch.equal(votes(made, threshold), standing(made) > threshold)


@torch.no_grad()
def test_ratios_are_those_of_the_models_own_weights() -> None:
    model = tiny_llava().double()
    inputs = inputs_for(model)
    found = head_ratios(model, [inputs])
    last = head_ratios(model, [inputs], rows="last")
    model.set_attn_implementation("eager")
    attentions = model(**inputs, output_attentions=True).attentions
    visual = inputs["input_ids"] == model.config.image_token_id
    row = int(visual.any(1).nonzero()[0])
    for layer, weights in enumerate(attentions):
        for own, given in ((weights[row].sum(1), found), (weights[row, :, -1], last)):
            wanted = own[:, visual[row]].sum(1) / own[:, ~visual[row]].sum(1)
            torch.testing.assert_close(given[0, layer].double(), wanted, atol=1e-5, rtol=1e-5)


def test_ratios_need_pictures() -> None:
    model = tiny_llava()
    with pytest.raises(SecateurError, match="no prompt holds a picture"):
        head_ratios(model, [{"input_ids": torch.tensor([[1, 8, 9]])}])
    with pytest.raises(SecateurError, match="rows"):
        head_ratios(model, [], rows="first")


def ratios(layers: int = 32, heads: int = 32) -> torch.Tensor:
    """Heads of lower numbers look more, and earlier layers do."""
    base = torch.arange(layers * heads).flip(0).view(layers, heads).float()
    return base.expand(3, layers, heads)


def test_the_papers_quarter_on_its_model() -> None:
    work = YOPO().work(SEVEN, 0.25, {"ratios": ratios()}, 0)
    assert work.window == 5 and work.cut == 16 and work.neurons == (5504,) * 32
    assert work.pruned(0) == work.pruned(1) == []
    # half of the heads on the mean of the layers that are left; the last of them look least
    assert sum(len(work.pruned(n)) for n in range(16)) == 16 * 16
    assert work.pruned(7) == [] and len(work.pruned(8)) == 32 and work.pruned(16) == []
    found = visual_flops(work, SEVEN, [[576.0]] * 32)
    assert found["left"] / found["dense"] == 0.25


def test_as_many_heads_at_random() -> None:
    plans = [YOPO(by="random").work(SEVEN, 0.25, {}, seed) for seed in (0, 0, 1)]
    assert plans[0] == plans[1] != plans[2]
    for work in plans:
        assert sum(len(work.pruned(n)) for n in range(16)) == 256
        assert work.pruned(0) == work.pruned(1) == []


def test_a_threshold_in_place_of_a_share() -> None:
    work = YOPO(threshold=1023 - 5 * 32, window=0).work(SEVEN, None, {"ratios": ratios()}, 0)
    assert [len(work.pruned(n)) for n in range(6)] == [0, 0, 0, 0, 0, 32] and work.neurons is None


@pytest.mark.parametrize("target", [0.75, 0.5, 0.25, 0.125, 0.05])
@pytest.mark.parametrize("heads", [True, False])
def test_a_target_is_met_on_the_mean_by_any_depth(target: float, heads: bool) -> None:
    for facts in (SEVEN, THIRTEEN, Facts(layers=4, hidden=128, intermediate=384, heads=4, kv_heads=4)):
        part, neurons, layers = shares(target, facts, heads)
        d, m = facts.hidden, facts.intermediate
        left = layers / facts.layers * (part * 4 * d + neurons * 3 * m) / (4 * d + 3 * m)
        reached = layers == 1 or left == pytest.approx(target)
        assert reached and 0 <= neurons <= 1 and 0 < part <= 1


def test_whole_work_is_dense() -> None:
    assert YOPO().work(SEVEN, 1.0, {}, 0).dense
    assert not YOPO().work(SEVEN, None, {}, 0).dense  # the window alone


@pytest.mark.parametrize(
    "wrong", [{"heads": 1.5}, {"neurons": -0.1}, {"cut": float("nan")}, {"by": "luck"}, {"window": -3}]
)
def test_fields_out_of_range_are_named(wrong: dict[str, Any]) -> None:
    with pytest.raises(SecateurError):
        YOPO(**wrong)


def test_a_grouped_model_counts_its_keys_once() -> None:
    facts = Facts(layers=1, hidden=64, intermediate=96, heads=8, kv_heads=2)
    found = visual_flops(VisualWork(1, 8, 96), facts, [[10.0]])
    assert found["dense"] == 10 * 64 * (64 * 2.5 + 2 * 10 + 3 * 96)
