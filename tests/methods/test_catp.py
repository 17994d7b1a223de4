"""The worked examples and invariants of catp; the counts and rankings inside a model."""

import itertools
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from secateur.errors import SecateurError
from secateur.method import make_method
from secateur.methods.catp import CATP, covering, relevance
from secateur.testing import token_sets
from secateur.tokens.attach import attach
from secateur.tokens.greedy import facility_location
from secateur.tokens.method import Facts

sys.path.insert(0, str(Path(__file__).parents[1] / "tokens"))
from tiny_models import IMAGE, inputs_for, make

TOY = torch.tensor([[[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [-1.0, 0.2]]])
TEXT = torch.tensor([[[0.0, 1.0]]])
ALL = torch.ones(1, 4, dtype=torch.bool)


def objective(features, text, weight, chosen):
    """The sheet's F(Y), written out."""

    def alike(a, b):
        return (sum(x * y for x, y in zip(a, b)) / math.hypot(*a) / math.hypot(*b) + 1) / 2

    covered = sum(max(alike(x, features[j]) for j in chosen) for x in features)
    return covered + weight * sum(alike(features[j], text) for j in chosen)


def test_coverage_and_likeness_to_text():
    """Spec: catp (a), first stage."""
    picks = covering(TOY, TEXT, torch.tensor([2]), ALL, 0.7)
    assert picks.order.tolist() == [[2, 1]]
    assert picks.values[0].tolist() == pytest.approx([3.3533, 1.3304], abs=1e-4)
    rows, text = TOY[0].tolist(), TEXT[0, 0].tolist()
    every = {pair: objective(rows, text, 0.7, pair) for pair in itertools.combinations(range(4), 2)}
    assert max(every, key=every.get) == (1, 2)
    assert every[1, 2] == pytest.approx(4.68365, abs=1e-5)
    assert picks.values.sum().item() == pytest.approx(4.68365, abs=1e-5)
    # a text of zeros is no text: likeness counts for nothing
    assert covering(TOY, 0 * TEXT, torch.tensor([1]), ALL, 100.0).values.item() == pytest.approx(
        2.6533, abs=1e-4
    )


def test_greedy_is_near_the_best_and_its_ends_are_what_they_should_be():
    features = torch.randn(6, 8, 3, generator=torch.Generator().manual_seed(0))
    text = torch.randn(6, 1, 3, generator=torch.Generator().manual_seed(1))
    valid = torch.ones(6, 8, dtype=torch.bool)
    keep = torch.full((6,), 3)
    found = covering(features, text, keep, valid, 0.7)
    for lazy in (True, False):
        unit = torch.nn.functional.normalize(features, dim=-1)
        plain = facility_location((unit @ unit.mT + 1) / 2, keep, valid, lazy=lazy)
        assert torch.equal(covering(features, text, keep, valid, 0.0).order, plain.order)
    aligned = torch.nn.functional.cosine_similarity(features, text, dim=-1)
    assert torch.equal(
        covering(features, text, keep, valid, 1e4).order, aligned.argsort(1, descending=True)[:, :3]
    )
    for rows, words, order, value in zip(
        features.tolist(), text[:, 0].tolist(), found.order.tolist(), found.values
    ):
        best = max(objective(rows, words, 0.7, chosen) for chosen in itertools.combinations(range(8), 3))
        mine = objective(rows, words, 0.7, order)
        assert (1 - 1 / math.e) * best <= mine <= best + 1e-9
        assert value.sum().item() == pytest.approx(mine, abs=1e-4)


@pytest.mark.parametrize("asked", [1, 10, 11, 27, 48])
def test_a_number_of_tokens_halves_what_must_go_exactly(asked):
    """A share in float32 falls short of a whole number: with 1 of 49 asked for, 24 of the 25 stayed."""
    text = {("embeddings", "image"): torch.ones(1, 1, 2)}
    sets = token_sets(torch.randn(1, 49, 2), keep=asked, target=asked, text=text)
    assert int(make_method("catp").cover(sets).sum()) == (49 + asked) // 2


def row_of(image_of, now, before, hidden, share, asked, half=None):
    """One row after the first stage kept everything, or `half` of each image's tokens."""
    number = torch.tensor([image_of])
    sizes = torch.bincount(number[0]).tolist()
    total = [n if half is None else half for n in sizes]
    carried = {
        "tokens": torch.tensor([[total[i] / sizes[i] for i in image_of]]),
        "image": torch.tensor([[1 / sizes[i] for i in image_of]]),
    }
    return token_sets(
        torch.zeros(1, len(image_of), 2),
        keep=1,
        attention={("layer:2", "last"): now, ("layer:1", "last"): before},
        hidden={"layer:2": hidden, "layer:3": hidden},
        text={
            ("layer:2", "query", "visual"): asked,
            ("layer:3", "context", "visual"): asked,
            ("layer:3", "query"): asked,
        },
        image_of=number,
        target=share,
        carried=carried,
    )


def test_growth_of_attention_and_likeness_to_the_query():
    """Spec: catp (a), second stage: order 1, 3, 0, 2; a fifth token is the query image's."""
    now, before = torch.tensor([[0.05, 0.02, 0.10, 0.01]]), torch.tensor([[0.02, 0.04, 0.03, 0.01]])
    cosine = torch.tensor([[0.3, 0.8, -0.2, 0.5]])
    torch.testing.assert_close(relevance(now, before, cosine, 0.6), torch.tensor([[0.21, 0.48, -0.05, 0.30]]))
    angles = torch.cat([cosine, torch.tensor([[-1.0]])], 1).acos()
    hidden = torch.stack([angles.cos(), angles.sin()], -1)
    pad = torch.zeros(1, 1)
    for share, kept in ((0.25, [1, 4]), (0.5, [1, 3, 4]), (0.75, [0, 1, 3, 4]), (0.1, [1, 4])):
        sets = row_of(
            [0, 0, 1, 1, 2],
            torch.cat([now, pad], 1),
            torch.cat([before, pad], 1),
            hidden,
            share,
            TEXT[..., [1, 0]],
        )
        assert CATP().rank_context("layer:1", "layer:2", sets)[0].nonzero()[:, 0].tolist() == kept


@pytest.mark.parametrize(
    ("shots", "share", "first", "context", "query"),
    [(4, 1 - 0.778, 351, 511, 127), (3, 1 / 9, 320, 192, 64), (3, 64, 320, 192, 64)],
)
def test_counts(shots, share, first, context, query):
    """Spec: catp, budget toy: images of 576 tokens; the third gives a number an image."""
    n = (shots + 1) * 576
    image_of = torch.arange(shots + 1).repeat_interleave(576)[None]
    small = token_sets(
        torch.randn(1, 576, 2, generator=torch.Generator().manual_seed(0)),
        keep=64,
        target=share,
        text={("embeddings", "image"): torch.ones(1, 1, 2)},
    )
    assert int(CATP().cover(small).sum()) == first
    assert len(image_of[0]) == n
    left = (shots + 1) * first
    values = torch.rand(2, 1, left, generator=torch.Generator().manual_seed(0))
    hidden = torch.randn(1, left, 2, generator=torch.Generator().manual_seed(0))
    images = torch.arange(shots + 1).repeat_interleave(first).tolist()
    sets = row_of(images, *values, hidden, share, torch.ones(1, 1, 2), half=576)
    stay = CATP().rank_context("layer:1", "layer:2", sets)[0]
    assert (int(stay[:-first].sum()), int(stay[-first:].sum())) == (context, first)
    stay = CATP().rank_query("layer:3", sets)[0]
    assert (int(stay[:-first].sum()), int(stay[-first:].sum())) == (left - first, query)


def test_layers():
    at = {layers: [s.at for s in CATP().stages(Facts(layers=layers))] for layers in (4, 28, 32, 40)}
    assert at[4] == ["input", "layer:2", "layer:3"]
    assert at[28] == at[32] == ["input", "layer:7", "layer:8"] and at[40][1] == "layer:11"
    with pytest.raises(SecateurError, match="k=2.*k=1 or less"):
        CATP(k=2).stages(Facts(layers=4))
    with pytest.raises(SecateurError, match="catp.k: 0 is out of range"):
        make_method("catp", k=0)


# -- in a model --


@pytest.fixture(scope="module")
def llava():
    return make("llava-clip", torch.float32)


@dataclass
class OnlyLayers(CATP):
    """The first stage keeps everything."""

    def cover(self, sets):
        one = torch.ones_like(sets.valid, dtype=torch.float32)
        sets.carried["tokens"], sets.carried["image"] = one, one / sets.total[:, None]
        return sets.valid


def test_rankings_are_those_of_the_models_own_attention_and_states(llava):
    """Row 0: two images, text behind each; what the model gives with output_attentions, ranked by hand."""
    inputs = inputs_for("llava-clip", torch.float32)
    with torch.no_grad(), attach(llava, OnlyLayers(), target="25%") as attached:
        llava(**inputs)
    eager = make("llava-clip", torch.float32)
    eager.set_attn_implementation("eager")
    with torch.no_grad():
        out = eager(**inputs, output_attentions=True, output_hidden_states=True)
    visual = (inputs["input_ids"][0] == IMAGE).nonzero()[:, 0]
    context, query = visual[:16], visual[16:]
    states, sample = out.hidden_states[2][0], slice(int(query[0]), None)
    growth = out.attentions[1][0, :, -1].mean(0) - out.attentions[0][0, :, -1].mean(0)
    cosine = torch.nn.functional.cosine_similarity(states, states[sample].mean(0)[None])
    scores = (growth.clamp(min=0) + 0.6 * cosine)[context]
    best = sorted(range(16), key=lambda i: -scores[i])[:4]
    assert attached.kept["layer:2"][0].tolist() == [*sorted(best), *range(16, 32)]
    assert len(attached.kept["layer:2"][1]) == 16  # one image: there is no context
    assert [len(row) for row in attached.kept["layer:3"]] == [8, 4, 0]


def test_an_image_alone_is_judged_by_its_text(llava):
    inputs = inputs_for("llava-clip", torch.float32)
    with torch.no_grad(), attach(llava, OnlyLayers(), target="25%") as attached:
        llava(**inputs)
    with torch.no_grad():
        states = llava(**inputs, output_hidden_states=True).hidden_states[3][1]
    visual = (inputs["input_ids"][1] == IMAGE).nonzero()[:, 0]
    cosine = torch.nn.functional.cosine_similarity(states, states[int(visual[-1]) + 1 :].mean(0)[None])[
        visual
    ]
    assert attached.kept["layer:3"][1].tolist() == sorted(sorted(range(16), key=lambda i: -cosine[i])[:4])


def test_demonstrations_in_another_order_keep_the_same_of_each_picture(llava):
    inputs = inputs_for("llava-clip", torch.float32, rows=(3,))
    swapped = {name: value.clone() for name, value in inputs.items()}
    first, size = int((inputs["input_ids"][0] == IMAGE).nonzero()[0]) - 1, 16 + 3
    one, two = slice(first, first + size), slice(first + size, first + 2 * size)
    swapped["input_ids"][0, one], swapped["input_ids"][0, two] = (
        inputs["input_ids"][0, two],
        inputs["input_ids"][0, one],
    )
    swapped["pixel_values"] = inputs["pixel_values"][[1, 0, 2]]
    kept = []
    for given in (inputs, swapped):
        with torch.no_grad(), attach(llava, "catp", target="50%") as attached:
            llava(**given)
        kept.append(attached.kept["input"][0])
    numbers = kept[1].clone()
    numbers[kept[1] < 16] += 16
    numbers[(kept[1] >= 16) & (kept[1] < 32)] -= 16
    assert torch.equal(numbers.sort().values, kept[0])
    assert len(kept[0]) == 36 and not torch.equal(kept[0], kept[1])


def test_a_demonstration_without_text_is_refused_by_name(llava):
    ids = torch.tensor([[1, *[IMAGE] * 32, 40, 41]])
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)),
    }
    with torch.no_grad():
        before = llava(**inputs).logits
        attached = attach(llava, "catp", target="50%")
        with pytest.raises(
            SecateurError, match='image 0 of row 0 is a demonstration without text.*bare="zero"'
        ):
            llava(**inputs)
        assert not attached.attached and torch.equal(llava(**inputs).logits, before)
        with attach(llava, "catp", target="50%", bare="zero") as attached:
            llava(**inputs)
    assert [len(rows[0]) for rows in attached.kept.values()] == [24, 20, 16]
