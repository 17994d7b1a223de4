"""The worked examples and invariants of covipal."""

import pytest
import torch
from torch import nn

from secateur.errors import SecateurError
from secateur.families.vlm import Facts
from secateur.method import make_method
from secateur.methods.covipal import Scorer, imitation
from secateur.testing import token_sets

SCORES = torch.tensor([[0.0, 2.0, -1.0, 0.5]])
ALL = torch.ones(1, 4, dtype=torch.bool)


class Fixed(nn.Module):
    """A scorer that gives these scores, times a number that is trained."""

    def __init__(self, scores):
        super().__init__()
        self.scores, self.factor = scores, nn.Parameter(torch.ones(()))

    def forward(self, visual, seen, words, there):
        return self.scores * self.factor


def sets(scores=SCORES, **fields):
    count = scores.shape[1]
    text = {"embeddings": torch.zeros(1, 2, 3)}
    modules = nn.ModuleList([Fixed(scores)])
    return token_sets(torch.zeros(1, count, 3), text=text, modules=modules, **{"keep": 2, **fields})


def labels():
    """Spec: covipal (a): two heads, two rows of text, four visual tokens; summed over heads and rows."""
    one = [[0.10, 0.30, 0.05, 0.15], [0.20, 0.20, 0.10, 0.10]]
    two = [[0.05, 0.40, 0.05, 0.10], [0.10, 0.30, 0.20, 0.00]]
    return torch.tensor([one, two]).sum((0, 1))[None]


def test_the_labels_and_both_losses():
    """Spec: covipal (a)."""
    y = labels()
    assert y[0].tolist() == pytest.approx([0.45, 1.20, 0.40, 0.35])
    assert (y / y.sum())[0].tolist() == pytest.approx([0.1875, 0.5, 0.1667, 0.1458], abs=1e-4)
    assert SCORES.softmax(1)[0].tolist() == pytest.approx([0.0961, 0.7101, 0.0354, 0.1584], abs=1e-4)
    assert imitation(SCORES, y, ALL).item() == pytest.approx(0.19626, abs=1e-5)
    assert imitation(SCORES, y, ALL, "bce").item() == pytest.approx(0.57373, abs=1e-5)


@pytest.mark.parametrize("loss", ["kl", "bce"])
def test_padding_and_the_scale_of_the_labels_change_no_loss(loss):
    wide = torch.cat([SCORES, torch.full((1, 2), 9.0)], 1)
    y = torch.cat([labels() / 8, torch.full((1, 2), 3.0)], 1)
    there = torch.tensor([[True] * 4 + [False] * 2])
    assert imitation(wide, y, there, loss).item() == pytest.approx(
        imitation(SCORES, labels(), ALL, loss).item(), abs=1e-6
    )


def test_the_best_half_stays_and_counts_are_rounded_half_up():
    """Spec: covipal (a), and the rule of K."""
    method = make_method("covipal")
    kept = method.choose(0, "embeddings", sets(target=0.5))
    assert kept[0].nonzero().flatten().tolist() == [1, 3]
    five = torch.arange(5.0)[None]
    assert int(method.choose(0, "embeddings", sets(five, target=0.5)).sum()) == 3  # 2.5
    assert int(method.choose(0, "embeddings", sets(five, keep=1, target=0.01)).sum()) == 1


def test_several_layers_divide_the_share_evenly():
    """After the j-th of m layers max(1, floor(r^(j/m) n + 0.5)): 64 tokens at 12.5 % over three are 32, 16, 8."""
    method = make_method("covipal", layers=(0, 8, 16))
    many = sets(torch.randn(1, 64), target=0.125)
    left = [int((method.share(number, many) * 64 + 0.5).floor()) for number in range(3)]
    assert left == [32, 16, 8]
    facts = Facts(layers=32, hidden=64, heads=4)
    assert [stage.at for stage in method.stages(facts)] == ["input", "layer:8", "layer:16"]
    assert [len(make_method("covipal", layers=l).modules(facts)) for l in ((0,), (0, 8, 16))] == [1, 3]


def test_gates_are_sigmoids_with_a_penalty_for_the_budget():
    """Spec: covipal (a): the gates of the toy; (mean - r)^2 by hand."""
    method = make_method("covipal")
    given = sets(target=0.5)
    assert bool(method.weigh(0, "embeddings", given).all())
    assert given.carried["gate"][0].tolist() == pytest.approx([0.5, 0.8808, 0.2689, 0.6225], abs=1e-4)
    mean = (0.5 + 0.880797 + 0.268941 + 0.622459) / 4
    assert given.noted["budget 0"].item() == pytest.approx((mean - 0.5) ** 2, abs=1e-6)
    own = torch.tensor(2.0)
    total = make_method("covipal", beta=3.0).answers(given.noted, own)
    assert total.item() == pytest.approx(2 + 3 * (mean - 0.5) ** 2, abs=1e-5)
    total.backward()
    assert given.modules[0].factor.grad.abs() > 0


def test_gates_scaled_to_the_budget_have_no_penalty():
    method = make_method("covipal", hold="softmax")
    given = sets(target=0.5)
    method.weigh(0, "embeddings", given)
    # 0.5 x 4 x softmax, at most 1
    assert given.carried["gate"][0].tolist() == pytest.approx([0.1922, 1.0, 0.0708, 0.3168], abs=1e-3)
    assert method.answers(given.noted, torch.tensor(2.0)).item() == 2


def test_the_scorer_reads_the_words_but_not_their_order_nor_padding():
    torch.manual_seed(0)
    scorer = Scorer(12, 16, 4)
    visual, words = torch.randn(2, 5, 12), torch.randn(2, 3, 12)
    scores = scorer(visual, None, words, None)
    assert scores.shape == (2, 5)
    assert torch.allclose(scorer(visual, None, words.flip(1), None), scores, atol=1e-5)
    assert not torch.allclose(scorer(visual, None, -words, None), scores, atol=1e-3)
    seen, there = torch.ones(2, 7, dtype=torch.bool), torch.ones(2, 4, dtype=torch.bool)
    seen[:, 5:], there[:, 3:] = False, False
    padded = scorer(
        torch.cat([visual, torch.randn(2, 2, 12)], 1),
        seen,
        torch.cat([words, torch.randn(2, 1, 12)], 1),
        there,
    )
    assert torch.allclose(padded[:, :5], scores, atol=1e-5)


def test_the_width_is_an_eighth_of_the_models():
    widths = {4096: 512, 1024: 128, 128: 64}
    for hidden, width in widths.items():
        facts = Facts(layers=4, hidden=hidden, heads=4)
        with torch.device("meta"):
            assert make_method("covipal").modules(facts)[0].down.out_features == width


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"layers": (8, 0)}, "aren't in order"),
        ({"layers": ()}, "there is none"),
        ({"width": 12}, "isn't divided by 8 heads"),
        ({"layers": (0, 16), "guides": (2,)}, "can't guide"),
        ({"guides": (9,)}, "can't guide"),
        ({"loss": "mse"}, "mse"),
    ],
)
def test_settings_that_cannot_work_are_named(settings, match):
    facts = Facts(layers=4, hidden=32, heads=4)
    with pytest.raises(SecateurError, match=match):
        method = make_method("covipal", **settings)
        method.modules(facts)
        method.lessons(facts)


def test_the_guide_is_at_055_of_the_depth_unless_it_is_named():
    facts = Facts(layers=32, hidden=32, heads=4)
    lesson = make_method("covipal").lessons(facts)[0]
    assert [stage.at for stage in lesson.stages] == ["input", "layer:18"]
    lesson = make_method("covipal", guides=(20, 24)).lessons(facts)[0]
    assert lesson.stages[-1].records == ("layer:20", "layer:24:peek")
    names = {name: make_method("covipal", lesson=name).lessons(facts) for name in ("imitation", "gates")}
    assert {name: [part.name for part in parts] for name, parts in names.items()} == {
        "imitation": ["imitation"],
        "gates": ["gates"],
    }
