"""The worked examples and invariants of lvlm-csp. Numbers from its sheet, or by hand."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from token_examples import CLIP

from secateur import SecateurError
from secateur.families.vlm import Facts
from secateur.method import make_method
from secateur.testing import token_sets
from secateur.tokens.attach import attach
from secateur.tokens.instances import shares
from secateur.tokens.state import Reduction

sys.path.insert(0, str(Path(__file__).parents[1] / "tokens"))
from tiny_models import FAMILIES, IMAGE, _llava, fill, inputs_for, llama, make


def stages(facts=CLIP, **settings):
    return make_method("lvlm-csp", **settings).stages(facts)


def clustered(n, keep, **more):
    """What the first stage chooses of one image of n tokens."""
    settings = {key: more.pop(key) for key in ("choose", "clusters") if key in more}
    settings = {"clusters": f"tokens={keep}"} | settings
    sets = token_sets(torch.zeros(1, n, 2), keep, total=torch.tensor([n]), facts=CLIP, grid=(1, n), **more)
    return stages(**settings)[0].select(sets)[0].nonzero()[:, 0].tolist()


def test_uniform_clusters_take_every_step_th_token_and_may_leave_the_tail():
    assert clustered(256, 64) == list(range(0, 253, 4))
    assert clustered(576, 100) == list(range(0, 496, 5))


def test_shares_of_instances():
    assert shares([18, 2, 16], 8) == [4, 1, 3]
    assert shares([100, 1, 1, 1, 1], 8) == [4, 1, 1, 1, 1]
    assert shares([18, 9, 9], 10) == [6, 2, 2]
    # only the two largest take part; a full instance is skipped; no more than there are
    assert shares([3, 9, 4], 2) == [0, 1, 1]
    assert shares([1, 5], 6) == [1, 5]
    assert shares([2, 3], 9) == [2, 3]


def test_clusters_by_instance():
    """6 x 6 cells: an object of 18 (rows 0 to 2), one of 2, the background of 16: 4, 1 and 3 of them, evenly."""
    masks = torch.zeros(3, 36, dtype=torch.bool)
    masks[0, :18] = True
    masks[1, 17:20] = True  # cell 17 is the first's
    found = clustered(36, 8, choose="seg", given={"instances": [masks]})
    # every 4th of 18, the first of 18, 19, every 5th of the 16 that are left
    assert found == [0, 4, 8, 12, 18, 20, 25, 30]
    assert clustered(36, 6, choose="seg", given={"instances": [masks[:0]]}) == [0, 6, 12, 18, 24, 30]


def test_random_clusters_are_drawn_without_replacement_and_cls_ranks():
    drawn = {tuple(clustered(20, 7, choose="random", seed=seed)) for seed in range(4)}
    assert len(drawn) > 1 and {len(set(one)) for one in drawn} == {7}
    scores = torch.tensor([[0.1, 0.3, 0.3, 0.05, 0.25]])
    assert clustered(5, 3, choose="cls", attention={("encoder:-2", "cls"): scores}) == [1, 2, 4]


def test_seg_keeps_what_it_attends_to_in_raster_order():
    scores = torch.tensor([[0.02, 0.10, 0.05, 0.30, 0.01, 0.12]])
    stage = stages(l1=16, l2=22)[-1]
    assert stage.at == "layer:22" and stage.records == ("layer:21",)
    sets = token_sets(torch.zeros(1, 6, 2), 3, attention={("layer:21", "last"): scores}, facts=CLIP)
    assert stage.select(sets)[0].nonzero()[:, 0].tolist() == [1, 3, 5]


def test_the_row_of_the_last_seg_token_ranks():
    rows = torch.zeros(1, 12, 4)
    rows[0, 9] = torch.tensor([0.1, 0.4, 0.2, 0.3])
    rows[0, 11] = torch.tensor([0.4, 0.3, 0.2, 0.1])
    text = {
        ("ids", "query"): (torch.tensor([[40, 99, 41, 99, 42]]), torch.tensor([[True] * 5])),
        ("columns", "query"): (torch.tensor([[6, 7, 8, 9, 11]]), torch.tensor([[True] * 5])),
    }
    sets = token_sets(
        torch.zeros(1, 4, 2), 2, attention={("layer:21", "each column"): rows}, text=text, facts=CLIP
    )
    assert stages(seg=99)[-1].select(sets)[0].nonzero()[:, 0].tolist() == [1, 3]
    assert stages(seg=42)[-1].select(sets)[0].nonzero()[:, 0].tolist() == [0, 1]
    with pytest.raises(SecateurError, match="no token 98 behind its last image"):
        stages(seg=98)[-1].select(sets)


def test_tokens_return_as_they_were_or_with_the_change_of_their_nearest():
    """A row of five; 1 and 4 were chosen, changed by (1, 0) and (0, 2): 0, 2 follow 1, 3 follows 4, and of equals the first."""
    now = torch.tensor([[[0.0, 0], [2, 1], [2, 2], [3, 3], [4, 6]]])
    entry = torch.tensor([[[0.0, 0], [1, 1], [0, 0], [0, 0], [4, 4]]])
    chosen = torch.tensor([[0.0, 1, 0, 0, 1]])
    sets = token_sets(
        now, 5, hidden={"layer:0:entry": entry}, carried={"chosen": chosen}, facts=CLIP, grid=(1, 5)
    )
    assert stages()[1].select(sets).all() and stages()[1].returns
    found = stages(reenter="delta")[1].select(sets)
    assert isinstance(found, Reduction) and found.index.tolist() == [[0, 1, 2, 3, 4]]
    assert found.features.tolist() == [[[1, 0], [2, 1], [3, 2], [3, 5], [4, 6]]]
    tie = token_sets(
        now[:, :3], 3, hidden={"layer:0:entry": torch.tensor([[[-1.0, 0], [0, 0], [2, 0]]])},
        carried={"chosen": torch.tensor([[1.0, 0, 1]])}, facts=CLIP, grid=(1, 3),
    )  # fmt: skip
    assert stages(reenter="delta")[1].select(tie).features[0, 1].tolist() == [3, 1]


@pytest.mark.parametrize(
    ("layers", "given", "expected"),
    [
        (32, {}, ["layer:0", "layer:16", "layer:22"]),
        (4, {}, ["layer:0", "layer:2", "layer:3"]),
        (32, {"l1": 0}, ["layer:22"]),
        (32, {"l2": 32}, ["layer:0", "layer:16"]),
        (32, {"l1": 0, "l2": 32}, ["input"]),
    ],
)
def test_phases(layers, given, expected):
    assert [stage.at for stage in stages(Facts(layers=layers, blocks=24), **given)] == expected


def test_layers_out_of_order_are_named():
    deep = Facts(layers=12, blocks=24, first_layer=3)
    assert [stage.at for stage in stages(deep)] == ["layer:3", "layer:6", "layer:8"]
    for facts, wrong in (
        (CLIP, (22, 22)),
        (CLIP, (23, 16)),
        (CLIP, (16, 33)),
        (deep, (3, 8)),
        (deep, (2, 8)),
    ):
        with pytest.raises(SecateurError, match="aren't in order"):
            stages(facts, l1=wrong[0], l2=wrong[1])


def test_the_sheets_counts_in_a_model_of_32_layers():
    """256 tokens, 64 clusters, 32 left, 16 and 22: 90 tokens a layer, 64.84 % fewer; 14, 20 and 16: 82, 67.97 %."""
    import transformers as tf

    tower = tf.CLIPVisionConfig(
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=1,
        image_size=64,
        patch_size=4,
    )
    text = llama(
        num_hidden_layers=32, hidden_size=8, intermediate_size=8, num_attention_heads=2, num_key_value_heads=1
    )
    model = fill(_llava(tower, text, vision_feature_layer=-2, vision_feature_select_strategy="default"))
    ids = torch.tensor([[1, *[IMAGE] * 256, 40, 41]])
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(1, 3, 64, 64).double(),
    }
    for given, left, expected, less in (
        ({}, "12.5%", 90.0, 0.6484),
        ({"l1": 14, "l2": 20}, "tokens=16", 82.0, 0.6797),
    ):
        with (
            torch.no_grad(),
            attach(model, "lvlm-csp", target=left, clusters="tokens=64", **given) as attached,
        ):
            model(**inputs)
            report = attached.report
        assert report["after"]["equivalent_tokens"] == expected
        assert round(1 - report["after"]["tokens_x_layers"] / report["before"]["tokens_x_layers"], 4) == less
        assert attached.kept["layer:0"][0].tolist() == list(range(0, 256, 4))


@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "qwen3-vl"])
def test_phases_that_do_nothing(family):
    """l1 = 0 and l2 = L: the model itself, bit for bit. N_c = N: late pruning alone, from the same layer on."""
    dtype = torch.float32 if family == "paligemma2" else torch.float64
    model, inputs = make(family, dtype), inputs_for(family, dtype)
    with torch.no_grad():
        dense = model(**inputs).logits
        with attach(model, "lvlm-csp", target="25%", l1=0, l2=4):
            assert torch.equal(model(**inputs).logits, dense)
        for reenter in ("embedding", "delta"):
            with attach(model, "lvlm-csp", target="25%", clusters="100%", reenter=reenter) as attached:
                late = model(**inputs).logits, attached.kept["layer:3"]
            with attach(model, "lvlm-csp", target="25%", l1=0, l2=3) as attached:
                found = model(**inputs).logits, attached.kept["layer:3"]
            assert torch.allclose(late[0], found[0], atol=1e-9 if dtype is torch.float64 else 1e-5)
            assert all(torch.equal(a, b) for a, b in zip(late[1], found[1]))


def test_what_layers_are_given():
    """In [0, l1) the chosen tokens and all text, with their positions; at l1 the input's embeddings again, and all positions."""
    model, inputs = make("llava-clip"), inputs_for("llava-clip", rows=(1,))
    ids = inputs["input_ids"]
    seen = {}

    def note(number):
        def hook(layer, args, kwargs):
            seen.setdefault(number, []).append((args[0].clone(), kwargs["position_ids"].clone()))

        return hook

    layers = model.get_decoder().layers
    with torch.no_grad():
        handles = [
            layer.register_forward_pre_hook(note(n), with_kwargs=True) for n, layer in enumerate(layers)
        ]
        model(**inputs)
        for handle in handles:
            handle.remove()
        with attach(model, "lvlm-csp", target="25%", clusters="tokens=4"):
            handles = [
                layer.register_forward_pre_hook(note(n), with_kwargs=True) for n, layer in enumerate(layers)
            ]
            model(**inputs)
    for handle in handles:
        handle.remove()
    visual = (ids[0] == IMAGE).nonzero()[:, 0]
    here = (ids[0] != IMAGE).index_fill(0, visual[::4], True)
    for number in (0, 1):
        assert torch.equal(seen[number][1][1][0], seen[number][0][1][0, here])
    assert torch.equal(seen[0][1][0][0], seen[0][0][0][0, here])
    assert torch.equal(seen[2][1][1], seen[2][0][1]) and seen[2][1][0].shape == seen[2][0][0].shape
    assert torch.equal(seen[2][1][0][0, ~here], seen[0][0][0][0, ~here])
    assert seen[3][1][0].shape[1] == int((ids != IMAGE).sum()) + 4


def test_bad_input_is_named_and_the_model_left_as_it_was():
    model, inputs = make("llava-clip", torch.float32), inputs_for("llava-clip", torch.float32)
    with torch.no_grad():
        before = model(**inputs).logits
        for match, settings in (
            ("20 clusters are more than the 16 tokens", {"clusters": "tokens=20"}),
            ("clusters: 0 tokens", {"clusters": "tokens=0"}),
            ("clusters: .*doesn't say how many", {"clusters": "params<=5"}),
            ("has no token 99 behind", {"seg": 99}),
            ("no instances of the tokens", {"choose": "seg"}),
            (
                r"row 1 are \[2, 9\]; it has 16 tokens",
                {"choose": "seg", "given": {"instances": [torch.ones(1, 32), torch.ones(2, 9)]}},
            ),
            ("row 1 are missing", {"choose": "seg", "given": {"instances": [torch.ones(1, 32)]}}),
        ):
            with (
                pytest.raises(SecateurError, match=match),
                attach(model, "lvlm-csp", target="25%", **settings),
            ):
                model(**inputs)
            assert torch.equal(model(**inputs).logits, before)
        attached = attach(model, "lvlm-csp", target="25%")
        with pytest.raises(SecateurError, match="static cache.*need room again"):
            model.generate(**inputs, max_new_tokens=2, cache_implementation="static")
        assert not attached.attached and torch.equal(model(**inputs).logits, before)
