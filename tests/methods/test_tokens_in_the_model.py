"""Worked examples of the methods that drop tokens inside the tower or the language model."""

import math
from functools import partial

import pytest
import torch

from secateur.errors import SecateurError
from secateur.method import make_method
from secateur.methods.flowcut import FlowCut, removed, strength
from secateur.methods.recoverable_compression import RecoverableCompression
from secateur.methods.transprune import variation
from secateur.methods.vflowopt import important
from secateur.testing import token_sets
from secateur.tokens.counts import last_ratio, outlier_factor, outliers
from secateur.tokens.reduce import clusters
from secateur.tokens.scores import likeness, patch_entropy
from secateur.tokens.state import Facts, Missing


def row(*numbers):
    return torch.tensor([numbers], dtype=torch.float32)


def kept(mask):
    return mask[0].nonzero().squeeze(1).tolist()


def test_fastv_keeps_what_the_last_token_attends_to():
    """Spec: fastv (a)."""
    a = row(0.10, 0.02, 0.05, 0.03, 0.20, 0.01, 0.04, 0.06)
    sets = token_sets(torch.zeros(1, 8, 2), keep=4, attention={("layer:1", "last"): a})
    assert kept(make_method("fastv").select(sets)) == [0, 2, 4, 7]


def test_fastv_counts_by_rounding_or_down():
    """Spec: fastv (a): n = 576, R = .9: 58 or 57."""
    scores = torch.rand(1, 576, generator=torch.Generator().manual_seed(0))
    for rounding, count in (("round", 58), ("int", 57)):
        method = make_method("fastv", rounding=rounding)
        share = 1 - 0.9
        sets = token_sets(
            torch.zeros(1, 576, 1),
            keep=round(576 * share),
            target=share,
            attention={("layer:1", "last"): scores},
        )
        assert len(kept(method.select(sets))) == count


FEATHER = row(
    0.05, 0.01, 0.02, 0.03, 0.09, 0.20, 0.04, 0.06, 0.07, 0.15, 0.02, 0.01, 0.03, 0.08, 0.10, 0.04
)  # fmt: skip


def test_feather_adds_a_grid_then_cuts_harder():
    """Spec: feather (a)."""
    method = make_method("feather")
    attention = {("layer:7:raw", "last", "visual"): FEATHER}
    first = token_sets(torch.zeros(1, 16, 1), keep=8, target=0.5, attention=attention)
    stay = kept(method.cut(7, first, grid=True))
    assert stay == [0, 3, 4, 5, 7, 8, 9, 12, 13, 14, 15]
    scores = row(3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5)
    second = token_sets(
        torch.zeros(1, 11, 1),
        keep=8,
        target=0.5,
        total=torch.tensor([16]),
        attention={("layer:15:raw", "last", "visual"): scores},
    )
    assert [stay[i] for i in kept(method.cut(15, second))] == [8, 12]


def test_transprune_scores():
    """Spec: transprune (a): four positions, all of the image."""
    attention = (row([1, 0], [0, 2], [1, 1], [3, 4]), row([0, 1], [0, -1], [2, 2], [4, -3]))
    mlp = (row([1, 1], [1, 0], [0, 1], [1, -1]), row([1, 1], [0, 1], [0, -2], [1, 1]))
    for turn, expected in (
        ("code", [0.196612, 0.267223, 0.144659, 0.196612]),
        ("paper", [0.365529, 0.067235, 0.268941, 0.365529]),
    ):
        ratio, change = variation(*attention, turn)
        torch.testing.assert_close(
            ratio * change / change.sum(1, keepdim=True), row(*expected), atol=1e-6, rtol=0
        )
    changes = {}
    for name, pair in (("attention", attention), ("mlp", mlp)):
        changes["layer:6", name] = pair
        changes["layer:6", name, "whole"] = (*pair, torch.ones(1, 4, dtype=torch.bool))
    sets = token_sets(
        torch.zeros(1, 4, 2),
        keep=2,
        transition=changes,
        attention={("layer:7:peek", "text"): row(0.02, 0.01, 0.05, 0.04)},
    )
    assert kept(make_method("transprune").cut([6], "layer:7:peek", 0.0, sets)) == [2, 3]
    torch.testing.assert_close(
        sets.carried["variation"], row(0.268941, 0.463835, 1.213552, 0.393224), atol=1e-6, rtol=0
    )


def test_transprune_cuts_after_the_published_layers():
    method = make_method("transprune")
    assert [stage.at for stage in method.stages(Facts(layers=32))] == ["layer:7", "layer:9", "layer:12"]
    assert method.stages(Facts(layers=32))[1].records == (
        "layer:7:modules",
        "layer:8:modules",
        "layer:9:peek",
    )


def test_flowcut_removes_by_entropy():
    """Spec: flowcut (a): N = 8, T = 2."""
    attention = row(0.40, 0.20, 0.10, 0.05, 0.05, 0.05, 0.05, 0.05)
    valid = torch.ones_like(attention, dtype=torch.bool)
    found = [int(removed(attention, valid, torch.tensor([2]), left)) for left in (20, 4, 2, 0)]
    assert found == [0, 1, 1, 6]


@pytest.mark.parametrize(
    ("ratio", "expected"),
    [
        (0.95, [565, 553, 541, 529, 516, 502, 487, 470, 450, 423, 64]),
        (0.85, [544, 513, 482, 451, 420, 389, 357, 324, 288, 244, 64]),
    ],
)
def test_flowcut_schedule(ratio, expected, monkeypatch):
    """Spec: flowcut (a): N = 576, T = 64, 24 blocks."""
    monkeypatch.setattr(
        "secateur.methods.flowcut.entropy_share",
        lambda weights, valid: torch.tensor([1 - ratio**2], dtype=torch.float64),
    )
    count, counts = 576, []
    for block in range(1, 22, 2):
        some = torch.ones(1, count, dtype=torch.bool)
        count -= int(removed(some.float(), some, torch.tensor([64]), 22 - block - 1))
        counts.append(count)
    assert counts == expected


def test_flowcut_score_runs_over_the_blocks():
    """Spec: flowcut (a)."""
    values = row([1, -1], [0.5, 0.5], [1.9, 0], [0, -0.5])
    density = values.abs().sum(2)
    valid = torch.ones(1, 4, dtype=torch.bool)
    first = strength(*[row(0.05, 0.80, 0.05, 0.10)] * 2, density, valid)
    second = strength(row(0.3, 0.2, 0.3, 0.2), row(0.25, 0.25, 0.25, 0.25), density, valid)
    torch.testing.assert_close(first, row(0.20, 1.60, 0.19, 0.10))
    torch.testing.assert_close(second, row(1.10, 0.45, 1.045, 0.225))
    torch.testing.assert_close(0.5 * first + 0.5 * second, row(0.650, 1.025, 0.6175, 0.1625))


def test_flowcut_drops_at_every_second_block():
    facts = Facts(layers=32, blocks=24, feature_block=-2, has_cls=True)
    stages = [stage.at for stage in FlowCut().stages(facts)]
    assert stages[:-1] == [f"encoder:{block}" for block in range(1, 23)] and stages[-1] == "layer:2"


def test_likeness_counts_the_token_itself_when_asked():
    one, others = torch.tensor([[[1.0, 0.0]]]), torch.tensor([[[[0.0, 1.0], [1.0, 0.0]]]])
    valid = torch.ones(1, 2, dtype=torch.bool)
    e = math.e
    torch.testing.assert_close(likeness(one, others, valid), row(1 / (1 + e), e / (1 + e)))
    torch.testing.assert_close(
        likeness(one, others, valid, itself=True), row(1 / (1 + 2 * e), e / (1 + 2 * e))
    )


MAP = torch.tensor([[0.10, 0.60, 0.20, 0.10], [0.05, 0.70, 0.20, 0.05], [0.30, 0.30, 0.30, 0.10], [0.25] * 4])


@pytest.mark.parametrize(
    ("t", "expected"), [(0.9, [0.175, 0.5, 0.25, 0.075]), (1.2, [0.05, 0.70, 0.20, 0.05])]
)
def test_vflowopt_importance(t, expected):
    """Spec: vflowopt (a)."""
    crop, valid = torch.zeros(1, 4, dtype=torch.long), torch.ones(1, 4, dtype=torch.bool)
    weights = important(MAP.mean(0)[None], crop, valid, t)
    torch.testing.assert_close(weights @ MAP, row(*expected))


def test_vflowopt_entropy():
    """Spec: vflowopt (a): a softmax of the patches' entropies, times alpha, is added."""
    scores = row(0.175, 0.5, 0.25, 0.075) + 0.5 * row(1, 2, 0, 3).softmax(1)
    torch.testing.assert_close(scores, row(0.218572, 0.618441, 0.266029, 0.396957), atol=1e-6, rtol=0)
    pixels = torch.cat([torch.zeros(1, 1, 98), torch.full((1, 1, 98), 255.0)], 2)
    assert patch_entropy(pixels).item() == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize(("share", "mean"), [(0.5, 0.500773), (0.25, 0.250685), (0.1, 0.100002)])
def test_vflowopt_shipped_settings_meet_their_budget(share, mean):
    """Spec: vflowopt (a): the shipped third ratios give these means over 9, 9 and 10 layers; the derived one gives `share`."""
    _, _, (r1, r2, r3) = make_method("vflowopt").settings(share, (9, 9, 10))
    shipped = {0.5: 0.487, 0.25: 0.8773258, 0.1: 0.6011}[share]
    over = lambda last: (9 * r1 + 9 * r1 * r2 + 10 * r1 * r2 * last) / 28
    assert over(shipped) == pytest.approx(mean, abs=1e-6)
    assert over(r3) == pytest.approx(share, abs=1e-9)
    assert last_ratio(share, (r1, r2), (9, 9, 10)) == r3


def test_vflowopt_refuses_shares_that_leave_nothing_for_the_last_stage():
    with pytest.raises(SecateurError, match="third stage"):
        make_method("vflowopt", r1=0.9).settings(0.25, (9, 9, 10))


OUTLIERS = row(
    0.0116, 0.0132, 0.2000, 0.0140, 0.0101, 0.0109, 0.5000, 0.0147, 0.0157, 0.0174, 0.0182, 0.0189
)  # fmt: skip


def test_recoverable_outliers():
    """Spec: recoverable-compression (a)."""
    expected = row(
        -1.153, -0.882, -73.716, -0.980, -1.153, -1.153, -114.546, -1.035, -0.888, -1.170, -1.170, -1.170
    )  # fmt: skip
    torch.testing.assert_close(-outlier_factor(OUTLIERS, 3).float(), expected, atol=1e-3, rtol=0)
    assert kept(outliers(OUTLIERS, 3)) == [2, 6]
    assert kept(outliers(OUTLIERS, 10)) == [6] and not outliers(OUTLIERS, 20).any()


def test_recoverable_cluster():
    """Spec: recoverable-compression (a)."""
    x, v = torch.tensor([[1.0, 0], [0, 1], [2, 2]]), torch.tensor([0.3, 0.1, 0.05])
    centres, members, merged = clusters(x, v, torch.ones(3, 2), torch.zeros(3), 1, 32)
    assert centres.tolist() == [0] and members.tolist() == [1, 2]
    torch.testing.assert_close(merged, torch.tensor([[1.1, 0.2]]))
    torch.testing.assert_close(v[members] @ x[members], torch.tensor([0.1, 0.2]))


def recoverable_sets(n=60, keep=12, **more):
    random = partial(torch.randn, generator=torch.Generator().manual_seed(3))
    hidden = random(1, n, 6)
    return token_sets(
        hidden,
        keep,
        queries={("encoder:-1", "cls"): 3 * random(1, 2, 4), "encoder:-1": random(1, 2, n, 4)},
        keys={"encoder:-1": random(1, 2, n, 4), ("encoder:-1", "cls"): random(1, 2, 4)},
        hidden={"encoder:-2": hidden, "encoder:-1": random(1, n, 6)},
        project=lambda merged: merged,
        given={"text_encoder": lambda tokens, sets: random(1, n) ** 3},
        **more,
    )


@pytest.mark.parametrize("keep", [None, 1, 2, 7, 30, 59])
def test_recoverable_meets_a_target_and_copies_main_tokens(keep):
    method = RecoverableCompression(neighbours=(8, 8))
    sets = recoverable_sets(keep=keep or 60, target=keep)
    found = method.select(sets)
    index = found.index[0]
    assert (index >= 0).all() and len(index.unique()) == len(index)
    if keep is not None:
        assert len(index) == keep
    copied = (found.features[0] == sets.features[0, index]).all(1)
    assert copied[0] and len(index) < 60


def test_recoverable_counts_clusters_by_channels_as_released():
    """Spec: recoverable-compression, step 6: 3 outliers among 60 give int(1024 * 3 / 60) = 51, or of 20 main tokens 1."""
    values = torch.cat([torch.linspace(0, 1, 57), torch.tensor([50.0, 80.0, 120.0])])
    for compat, expected in (("code", 51), ("paper", 1)):
        method = RecoverableCompression(compat=compat)
        assert int(outliers(values[None], 10).sum()) == 3
        assert method.count(values, torch.arange(60), method.number(20, 1024)) == expected


def test_recoverable_says_what_is_missing():
    sets = recoverable_sets()
    sets.given.clear()
    with pytest.raises(Missing, match="text encoder"):
        RecoverableCompression().select(sets)


def visiondrop_sets(**more):
    random = partial(torch.rand, generator=torch.Generator().manual_seed(5))
    given = {
        "keys": {"encoder:-2": random(1, 2, 16, 4)},
        "hidden": {("encoder:-2", "cls"): torch.full((1, 3), 7.0)},
        "project": lambda hidden: 2 * hidden,
    }
    return token_sets(random(1, 16, 3), keep=4, **{**given, **more})


def test_visiondrop_passes_the_cls_token_on_and_merges_one_in_eight():
    """Spec: visiondrop, steps 1 to 3: 1.5 x 4 = 6 tokens: CLS, four dominant, one contextual."""
    scores = torch.linspace(0, 1, 16)[None]
    sets = visiondrop_sets(attention={("encoder:-2", "cls"): scores})
    found = make_method("visiondrop").before(sets)
    assert found.features[0, 0].tolist() == [14.0] * 3
    assert found.index[0, 1:5].tolist() == [12, 13, 14, 15] and found.index.shape == (1, 6)
    assert torch.equal(found.features[0, 1:5], sets.features[0, 12:])
    assert found.index[0, 5] == 0 and found.index[0, 0] not in found.index[0, 1:]


def test_visiondrop_merges_before_the_projector():
    """By hand: R = all but token 3; targets 0 (every third of three, one of them), mean of 1 and 2 added, then squared."""
    hidden = torch.tensor([[[1.0], [2.0], [4.0], [9.0]]])
    sets = token_sets(
        hidden.square(),
        keep=2,
        keys={"encoder:-2": torch.ones(1, 1, 4, 2)},
        hidden={"encoder:-2": hidden},
        attention={("encoder:-2", "all"): torch.tensor([[0.0, 0.1, 0.2, 0.7]])},
        project=torch.square,
    )
    method = make_method("visiondrop", first=1.0000001)
    found = method.before(sets)
    assert found.index.tolist() == [[3, 0]]
    assert found.features[0, :, 0].tolist() == [81.0, (1 + (2 + 4) / 2) ** 2]


def test_visiondrop_without_cls_uses_attention_received():
    sets = visiondrop_sets(attention={("encoder:-2", "all"): torch.linspace(1, 0, 16)[None]}, hidden={})
    found = make_method("visiondrop").before(sets)
    assert found.index[0].tolist() == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize(("target", "sizes"), [(32, [(42, 6), (30, 5), (22, 4), (16, 3)])])
def test_visiondrop_schedule(target, sizes):
    """Spec: visiondrop: the published setting for 32 tokens."""
    sets = token_sets(torch.zeros(1, 576, 1), keep=target)
    method = make_method("visiondrop")
    found = [tuple(int(part) for part in method.counts(sets, stage)) for stage in range(4)]
    assert found == sizes and sum(map(sum, found)) * 8 / 32 == 32.0
