"""The worked examples and invariants of adatoken-3d, and profiles of models."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch

from secateur.errors import SecateurError
from secateur.method import make_method
from secateur.methods.adatoken_3d import AdaToken3D, gated
from secateur.testing import token_sets
from secateur.tokens.attach import attach
from secateur.tokens.method import Facts
from secateur.tokens.profile import Profile, agreement, held, profile_attention, ranks

sys.path.insert(0, str(Path(__file__).parents[1] / "tokens"))
from tiny_models import IMAGE, inputs_for, make

TOY = [0.30, 0.02, 0.01, 0.10, 0.01, 0.05, 0.01, 0.10]


def sets_of(mass, **more):
    mass = torch.tensor([mass], dtype=torch.float64)
    return token_sets(torch.zeros(*mass.shape, 1), keep=1, attention={("layer:3", "last"): mass}, **more)


def kept(mass, known=None, **settings):
    given = {key: settings.pop(key) for key in ("target", "given") if key in settings}
    sets = sets_of(mass, **given)
    return AdaToken3D(**settings).gate(3, known, sets)[0].nonzero()[:, 0].tolist()


def test_the_smallest_set_that_holds_the_share():
    """Spec: adatoken-3d (a); .95 is reached exactly by five, but for rounding."""
    assert kept(TOY, tau=0.9) == [0, 3, 5, 7]
    assert kept(TOY, tau=0.95) == [0, 1, 3, 5, 7]
    assert kept(TOY, tau=1.0) == list(range(8)) == kept(TOY, tau=0.5, r_min=1.0)
    assert kept([7 * value for value in TOY], tau=0.9) == [0, 3, 5, 7]
    assert len(kept([1.0] * 80)) == 76
    assert gated(torch.tensor(TOY), torch.tensor(TOY) > 0.04).tolist() == pytest.approx(
        [0.3, 0, 0, 0.1, 0, 0.05, 0, 0.1]
    )


def test_no_set_that_is_smaller_would_do():
    generator = torch.Generator().manual_seed(0)
    for tau in (0.3, 0.8, 0.95):
        mass = torch.rand(50, generator=generator).pow(4).tolist()
        mine = kept(mass, tau=tau, r_min=0.0)
        inside = sum(mass[i] for i in mine)
        assert inside >= (tau - 1e-6) * sum(mass) > inside - min(mass[i] for i in mine)
        order = torch.randperm(50, generator=generator).tolist()
        assert sorted(order[i] for i in kept([mass[i] for i in order], tau=tau, r_min=0.0)) == mine


def test_bounds_of_the_count():
    assert kept(TOY, tau=0.5, r_min=0.3) == [0, 3, 7]  # 2.4 tokens, rounded up; one token holds half
    assert kept(TOY, tau=0.95, r_max=0.3) == [0, 3]
    assert kept([0.0] * 20) == [0, 1]  # nothing is looked at: a tenth, of lowest index
    assert kept(TOY, target=0.125) == [0]
    with pytest.raises(SecateurError, match="r_min=0.5 is above r_max=0.2"):
        AdaToken3D(r_min=0.5, r_max=0.2)
    for name, value in (("tau", 0.0), ("tau", 1.5), ("voxel", 0.0), ("probe", "first")):
        with pytest.raises(SecateurError, match=f"adatoken-3d.{name}"):
            make_method("adatoken-3d", **{name: value})


def test_every_cube_keeps_a_token():
    """Cubes of edge 1: tokens 1 and 2 (the first has more mass), 4 and 6 (equal: the lower), and two that keep some."""
    places = [
        [0, 0, 0],
        [5.2, 0, 0],
        [5.9, 0, 0],
        [0.9, 0, 0],
        [0, -0.1, 0],
        [0, 0, 7],
        [0, -0.9, 0],
        [0, 0.5, 0.5],
    ]
    given = {"coordinates": torch.tensor([places])}
    assert kept(TOY, tau=0.9, voxel=1.0, given=given) == [0, 1, 3, 4, 5, 7]
    assert kept(TOY, tau=0.9, given=given) == [0, 3, 5, 7]
    with pytest.raises(SecateurError, match="there are no coordinates of the tokens"):
        kept(TOY, voxel=1.0)
    for wrong in ([places[:5]], [[[math.nan] * 3] * 8], [[[0.0, 1.0]] * 8]):
        with pytest.raises(SecateurError, match="coordinates of row 0"):
            kept(TOY, voxel=1.0, given={"coordinates": torch.tensor(wrong)})


def test_where_it_gates():
    method = AdaToken3D()
    assert [(s.at, s.records) for s in method.stages(Facts(layers=32))] == [("layer:4", ("layer:3",))]
    assert [s.at for s in method.stages(Facts(layers=4))] == ["layer:1"]
    assert [s.at for s in AdaToken3D(k=2, later=(5, 9)).stages(Facts(layers=12))] == [
        "layer:3",
        "layer:6",
        "layer:10",
    ]
    for settings in ({"k": 5, "later": (5,)}, {"k": 5, "later": (3,)}, {"k": 11}):
        with pytest.raises(SecateurError, match="ascending layers, 10 at most"):
            AdaToken3D(**settings).stages(Facts(layers=12))
    with pytest.raises(SecateurError, match="read a profile"):
        AdaToken3D(static=True)


# -- profiles --


def test_pieces_of_a_profile():
    """Ranks, correlations (scipy.stats.spearmanr: 0.8 and -1) and curves by hand."""
    assert ranks(torch.tensor([0.2, 0.1, 0.2, 0.4])).tolist() == [2.5, 1, 2.5, 4]
    shares = torch.tensor([[4.0, 3.0, 2.0, 1.0], [1.0, 2.0, 3.0, 4.0], [1.0, 3.0, 2.0, 4.0]])
    # layer 0 against the mean of 1 and 2 (1, 2.5, 2.5, 4); layer 1 against layer 2
    assert agreement(shares).tolist() == pytest.approx([-0.948683, 0.8], abs=1e-6)
    assert agreement(torch.ones(2, 4)).tolist() == [0]
    toy = torch.tensor([TOY], dtype=torch.float64) / 0.6
    assert held(toy, 8)[0].tolist() == pytest.approx(
        [0, 0.5, 0.66667, 0.83333, 0.91667, 0.95, 0.96667, 0.98333, 1], abs=1e-4
    )
    assert held(toy, 16)[0, 1:4].tolist() == pytest.approx([0.25, 0.5, 0.58333], abs=1e-4)


@pytest.fixture(scope="module")
def llava():
    return make("llava-clip", torch.float32)


@pytest.fixture(scope="module")
def profile(llava):
    return profile_attention(
        llava, [inputs_for("llava-clip", torch.float32, seed=seed) for seed in (0, 1)], stable=-1.0, quiet=1.0
    )


def test_a_profile_is_of_the_models_own_attention(llava, profile, tmp_path):
    """Mass and correlation from output_attentions; one row has no picture, and does not count."""
    eager = make("llava-clip", torch.float32)
    eager.set_attn_implementation("eager")
    rows = []
    for seed in (0, 1):
        inputs = inputs_for("llava-clip", torch.float32, seed=seed)
        with torch.no_grad():
            maps = eager(**inputs, output_attentions=True).attentions
        for row in (0, 1):
            visual = inputs["input_ids"][row] == IMAGE
            rows.append([[layer[row, :, -1].mean(0)[visual].tolist()] for layer in maps])
    mass = [sum(sum(row[layer][0]) for row in rows) / 4 for layer in range(4)]
    assert profile.mass == pytest.approx(mass, abs=1e-5)

    def spearman(a, b):
        first, second = (sorted(range(len(x)), key=x.__getitem__) for x in (a, b))
        place = [{i: r for r, i in enumerate(order)} for order in (first, second)]
        n = len(a)
        return 1 - 6 * sum((place[0][i] - place[1][i]) ** 2 for i in range(n)) / (n * (n * n - 1))

    last = [[spearman(row[2][0], row[3][0])] for row in rows]
    assert profile.stability[2] == pytest.approx(sum(value for (value,) in last) / 4, abs=1e-4)
    assert (profile.layers, profile.prompts, profile.gate, profile.withdraw) == (4, 4, 0, 1)
    assert profile.keep == sorted(profile.keep, reverse=True)
    for curve, share in zip(profile.curve, profile.keep):
        assert curve[0] == 0 and curve[20] == pytest.approx(1) and curve == sorted(curve)
        assert curve[min(20, math.ceil(share * 20))] >= 0.95 - 1e-6
    profile.save(tmp_path / "profile.json")
    assert Profile.load(tmp_path / "profile.json") == profile
    assert [path.name for path in tmp_path.iterdir()] == ["profile.json"]


def test_a_profile_decides_where_and_how_many(llava, profile, tmp_path):
    inputs = inputs_for("llava-clip", torch.float32)
    path = str(tmp_path / "profile.json")

    def run(changed=None, **settings):
        Profile.model_validate({**profile.model_dump(), **(changed or {})}).save(path)
        with torch.no_grad(), attach(llava, "adatoken-3d", profile=path, **settings) as attached:
            logits = llava(**inputs).logits
        return {stage: [len(row) for row in rows] for stage, rows in attached.kept.items()}, logits

    assert list(run()[0]) == ["layer:1"] and list(run(k=2)[0]) == ["layer:3"]
    counts = run(static=True)[0]["layer:1"]
    assert counts == [math.ceil(profile.keep[0] * n - 1e-9) for n in (32, 16, 0)]
    assert run({"gate": 1, "withdraw": 3}, withdraw=True)[0]["layer:3"] == [0, 0, 0]
    assert list(run({"gate": 1, "withdraw": 3})[0]) == ["layer:2"]
    with torch.no_grad():
        assert torch.equal(run({"gate": None, "withdraw": None})[1], llava(**inputs).logits)
    with pytest.raises(SecateurError, match="no layer behind which.*give k"):
        run({"gate": None, "withdraw": None}, target="50%")
    with pytest.raises(SecateurError, match="of tau 0.95, not 0.9"):
        run(static=True, tau=0.9)
    with pytest.raises(SecateurError, match="of probe last, not text"):
        run(probe="text")
    with pytest.raises(SecateurError, match="of layers 4, not 12"):
        AdaToken3D(profile=path).stages(Facts(layers=12))


def test_files_that_are_no_profiles_are_refused_by_name(profile, tmp_path):
    good = profile.model_dump()
    path = tmp_path / "profile.json"
    for text, said in (
        ("{", "isn't JSON"),
        ("[]", "isn't a JSON object"),
        (json.dumps({**good, "layers": True}), "layers is True"),
        (json.dumps({**good, "layers": 10**12}), "layers is 1000000000000"),
        (json.dumps({**good, "gate": 3}), "gate 3 has no layer behind it"),
        (json.dumps({**good, "gate": -1}), "gate is -1"),
        (json.dumps({**good, "withdraw": 4}), "withdraw 4 isn't behind the gate"),
        (json.dumps({**good, "keep": [2.0, 1, 1, 1]}), "keep.0 is 2.0"),
        (json.dumps({**good, "mass": [0.1]}), "mass has 1 entries, not 4"),
        (json.dumps({**good, "mass": [math.nan] * 4}), "mass.0 is nan"),
        (json.dumps({**good, "curve": [[0.0, 1.0]] * 4}), "isn't of 21 points"),
        (json.dumps({**good, "code": "print()"}), "code is print"),
    ):
        path.write_text(text)
        with pytest.raises(SecateurError, match=said) as error:
            AdaToken3D(profile=str(path)).stages(Facts(layers=4))
        assert str(path) in str(error.value)
    with pytest.raises(SecateurError, match="can't be read"):
        Profile.load(tmp_path / "none.json")


def test_what_cannot_be_profiled(llava):
    alone = {"input_ids": torch.tensor([[1, 40, 41]]), "attention_mask": torch.ones(1, 3, dtype=torch.int64)}
    with pytest.raises(SecateurError, match="no prompt has a picture"):
        profile_attention(llava, [alone])
    with pytest.raises(SecateurError, match="tau=0"):
        profile_attention(llava, [], tau=0.0)


def test_a_second_gate_keeps_a_subset_and_prompts_keep_their_own_counts(llava):
    inputs = inputs_for("llava-clip", torch.float32)
    with torch.no_grad(), attach(llava, "adatoken-3d", k=0, later=(2,), tau=0.6) as attached:
        llava(**inputs)
    first, second = (attached.kept[stage] for stage in ("layer:1", "layer:3"))
    for one, two in zip(first, second):
        assert set(two.tolist()) <= set(one.tolist())
    assert len(first[0]) / 32 != len(first[1]) / 16 and len(second[0]) < len(first[0]) < 32
