"""The worked examples and invariants of atp-llava."""

import pytest
import torch
from torch import nn

from secateur.errors import SecateurError
from secateur.families.vlm import Facts
from secateur.method import make_method
from secateur.methods.atp_llava import Thresholds, budget_loss, scaled, soft_mask, spread_out
from secateur.testing import token_sets
from secateur.tokens.scores import mean_logits

LOGITS = torch.tensor([[0.2, 0.4, -0.1, 0.3], [0.1, 0.5, 0, 0.2], [0.3, 0.1, 0.6, 0], [0, 0.2, 0.1, 0.7]])
CROSS = torch.tensor([[0.1, 0.5, 0.1, 0.1], [0.2, 0.4, 0.0, 0.2]]).mean(0)[None]
ALL = torch.ones(1, 4, dtype=torch.bool)


class Given(nn.Module):
    """These two thresholds, whatever the scores are."""

    def __init__(self, low, far):
        super().__init__()
        self.low, self.far = (nn.Parameter(torch.tensor([[x]])) for x in (low, far))

    def forward(self, means):
        self.means = means
        return self.low, self.far


def own(over):
    """One head, q = the logits and k = 1, no causal mask."""
    return mean_logits(LOGITS[None, None], torch.eye(4)[None, None], ALL, over, scale=1.0, causal=False)


def sets(low=0.25, far=0.5, **fields):
    modules = nn.ModuleList([Given(low, far)])
    logits = {("layer:4", "keys"): own("keys"), ("layer:4", "queries"): own("queries")}
    attention = {("layer:4", "text"): CROSS}
    return token_sets(
        torch.zeros(1, 4, 2),
        keep=1,
        grid=(2, 2),
        logits=logits,
        attention=attention,
        modules=modules,
        **fields,
    )


def test_self_and_cross_scores():
    """Spec: atp-llava (a)."""
    assert own("keys")[0].tolist() == pytest.approx([0.2, 0.2, 0.25, 0.25])
    assert own("queries")[0].tolist() == pytest.approx([0.15, 0.3, 0.15, 0.3])
    assert CROSS[0].tolist() == pytest.approx([0.15, 0.45, 0.05, 0.15])
    expected = {
        ("row", False): [0.175, 0.325, 0.15, 0.2],
        ("col", False): [0.15, 0.375, 0.1, 0.225],
        ("row", True): [0.125, 0.5, 0.5, 0.625],
    }
    for (reduce, normalize), wanted in expected.items():
        method = make_method("atp-llava", self_reduce=reduce, normalize=normalize)
        scores = method.scores(0, "layer:4", sets(), ALL)[0]
        assert scores[0].tolist() == pytest.approx(wanted, abs=1e-4)


def test_means_of_logits_count_what_a_token_may_see():
    """Against the whole matrix, grouped heads included."""
    torch.manual_seed(0)
    q, k = torch.randn(2, 4, 6, 8), torch.randn(2, 2, 6, 8)
    among = torch.rand(2, 6) < 0.7
    full = (q @ k.repeat_interleave(2, 1).mT * 0.3).mean(1)  # [2, 6, 6]
    for causal in (True, False):
        seen = among[:, None].expand(2, 6, 6) & (torch.ones(6, 6).tril().bool() if causal else True)
        rows = (full * seen).sum(2) / seen.sum(2).clamp(min=1)
        assert torch.allclose(mean_logits(q, k, among, "keys", 0.3, causal), rows, atol=1e-5)
        seen = among[:, :, None].expand(2, 6, 6) & (torch.ones(6, 6).tril().bool() if causal else True)
        columns = (full * seen).sum(1) / seen.sum(1).clamp(min=1)
        assert torch.allclose(mean_logits(q, k, among, "queries", 0.3, causal), columns, atol=1e-5)


def test_the_spatial_score():
    """Spec: atp-llava (a): one rate on 2 x 2, nested rates on 4 x 4."""
    place = torch.arange(4)[None]
    assert spread_out(place // 2, place % 2, (0.25,), 3.0).tolist() == [[0.25, 0, 0, 0]]
    place = torch.arange(16)[None]
    score = spread_out(place // 4, place % 4, (0.25, 0.0625), 3.0)[0]
    wanted = torch.zeros(16)
    wanted[0], wanted[[2, 8, 10]] = 0.8125, 0.25
    assert torch.equal(score, wanted)
    assert not spread_out(
        place // 4, place % 4, (0.5,), 3.0
    ).any()  # its stride rounds to 1, and its score to 0


@pytest.mark.parametrize(("far", "kept"), [(0.5, [1]), (0.2, [0, 1])])
def test_what_stays_is_above_either_threshold(far, kept):
    """Spec: atp-llava (a), col scores."""
    method = make_method("atp-llava", self_reduce="col", normalize=False, rates=(0.25,))
    mask = method.choose(0, "layer:4", sets(0.25, far))
    assert mask[0].nonzero().flatten().tolist() == kept


def test_soft_masks():
    """Spec: atp-llava (a): T = 10, theta_s = .5; and hard is soft above a half."""
    scores = torch.tensor([[0.15, 0.375, 0.1, 0.225]])
    spatial = torch.tensor([[0.25, 0, 0, 0]])
    low, far = torch.tensor([[0.25]]), torch.tensor([[0.5]])
    soft = soft_mask(scores, spatial, low, far, 10.0)
    assert soft[0].tolist() == pytest.approx([0.2689, 0.7773, 0.1824, 0.4378], abs=1e-4)
    assert torch.equal(soft > 0.5, (scores > low) | (spatial > far))


def test_the_loss_of_the_budget():
    """Spec: atp-llava (a): 8.5, 24 and 5.225."""
    counts, sizes = (
        [torch.tensor(x) for x in (288.0, 144.0, 72.0)],
        (torch.tensor(576.0), torch.tensor(144.0)),
    )
    for weights, wanted in (((1, 0), 8.5), ((0, 1), 24), ((0.05, 0.2), 5.225)):
        assert budget_loss(counts, (4, 14, 24), *sizes, *weights).item() == pytest.approx(wanted)


def test_thresholds_begin_at_about_a_half_and_all_three_maps_learn():
    torch.manual_seed(0)
    modules = Thresholds(64)
    low, far = modules(torch.rand(3, 2))
    assert (low - 0.5).abs().max() < 0.05 and (far - 0.5).abs().max() < 0.05
    method = make_method("atp-llava", layers=(4,))
    given = sets(target=0.25)
    given.modules = nn.ModuleList([modules])
    assert bool(method.weigh(0, "layer:4", given).all())
    method.loss(given.noted, torch.zeros(())).backward()
    for linear in (modules.join, modules.redundancy):
        assert linear.weight.grad.abs().max() > 0
    soft_mask(torch.zeros(3, 4), torch.ones(3, 4), *modules(torch.rand(3, 2)), 10.0).sum().backward()
    assert modules.spatial.weight.grad.abs().max() > 0


def test_thresholds_of_zero_keep_everything_and_of_one_the_best():
    method = make_method("atp-llava", self_reduce="col", normalize=False)
    assert bool(method.choose(0, "layer:4", sets(0.0, 0.0)).all())
    assert method.choose(0, "layer:4", sets(1.0, 1.0)).tolist() == [[False, True, False, False]]


def test_masks_multiply_and_hard_counts_have_the_soft_gradient():
    settings = {"self_reduce": "col", "normalize": False, "rates": (0.25,), "counted": "hard"}
    method = make_method("atp-llava", layers=(4, 14), **settings)
    given = sets(0.25, 0.5, target=0.25)
    given.modules.append(Given(0.2, 0.5))
    for number in (0, 1):
        method.weigh(number, "layer:4", given)
    first = torch.tensor([0.2689, 0.7773, 0.1824, 0.4378])
    second = torch.sigmoid(10 * (torch.tensor([0.15, 0.375, 0.1, 0.225]) - 0.2))
    assert torch.allclose(given.carried["mask"][0], first * second, atol=1e-3)
    assert given.carried["alive"].tolist() == [[0, 1, 0, 0]]  # 0.225 is above 0.2, but had left
    assert [given.noted[f"count {number}"].item() for number in (0, 1)] == pytest.approx([1, 1])
    given.noted["count 1"].backward()
    assert given.modules[0].low.grad < 0 and given.modules[1].low.grad < 0


def test_counts_differ_by_picture_in_one_batch():
    method = make_method("atp-llava", normalize=False)
    modules = nn.ModuleList([Given(0.5, 0.9)])
    two = token_sets(
        torch.zeros(2, 4, 2),
        keep=1,
        grid=(2, 2),
        logits={("layer:4", "keys"): torch.tensor([[1.0, 1, 1, 0], [1, 0, 0, 0]])},
        attention={("layer:4", "text"): torch.tensor([[0.5, 0.5, 0.5, 0], [0.5, 0, 0, 0]])},
        modules=modules,
    )
    assert method.choose(0, "layer:4", two).sum(1).tolist() == [3, 1]


def test_scores_are_scaled_within_what_is_there():
    values, there = torch.tensor([[1.0, 3.0, 9.0]]), torch.tensor([[True, True, False]])
    assert scaled(values, there)[0].tolist() == pytest.approx([0, 1, 0], abs=1e-5)
    assert scaled(torch.ones(1, 3), torch.ones(1, 3, dtype=torch.bool)).tolist() == [[0, 0, 0]]


def test_modules_stand_behind_their_layers():
    facts = Facts(layers=32, hidden=8, heads=2)
    stages = make_method("atp-llava").stages(facts)
    assert [(stage.at, stage.records) for stage in stages] == [
        ("layer:5", ("layer:4",)),
        ("layer:15", ("layer:14",)),
        ("layer:25", ("layer:24",)),
    ]
    with pytest.raises(SecateurError, match="need 4 layers or more"):
        make_method("atp-llava").stages(Facts(layers=3, hidden=8, heads=2))
    with pytest.raises(SecateurError, match="aren't in order"):
        make_method("atp-llava", layers=(14, 4)).modules(facts)
