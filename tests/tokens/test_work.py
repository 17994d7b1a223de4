"""Visual work on whole models, beside an independent reference that computes everything and masks it."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from tiny_models import IMAGE, inputs_for, make
from torch import Tensor
from transformers import AttentionInterface

import secateur
from secateur import SecateurError
from secateur.attention.visual import Asked, attend, banded, neighbours
from secateur.attention.work import VisualWork
from secateur.families.vlm.facts import decoder_of
from secateur.tokens.attach import attach
from secateur.tokens.work import _bands

FAMILIES = ["llava-clip", "qwen2.5-vl"]
SIZES: dict[str, Any] = {"layers": 4, "heads_each": 4, "neurons_each": 48}
HEADS = ((0, 1, 3), (2,), (), (0, 1))
NEURONS = (24, (1, 5, 40), 0, 48)
"""The first half, some, none, all."""
PLANS: dict[str, dict[str, Any]] = {
    "window": {"window": 3},
    "causal window": {"window": 3, "causal": True},
    "heads": {"heads": HEADS},
    "heads that aren't silent": {"heads": HEADS, "silent": False},
    "neurons": {"neurons": NEURONS},
    "cut": {"cut": 2},
    "cut at once": {"cut": 0},
    "cut as released": {"cut": 2, "renormalise": False},
    "all": {"window": 3, "heads": HEADS, "neurons": NEURONS, "cut": 3},
    "all as released": {"window": 3, "heads": HEADS, "neurons": NEURONS, "cut": 3, "renormalise": False},
}


@pytest.fixture(scope="module")
def models() -> Any:
    made: dict[Any, Any] = {}

    def get(family: str, dtype: torch.dtype = torch.float64) -> Any:
        if (family, dtype) not in made:
            made[family, dtype] = make(family, dtype), inputs_for(family, dtype)
        return made[family, dtype]

    return get


def places(family: str, ids: Tensor) -> tuple[Tensor, Tensor]:
    """[B, L, 2] and [B, L]: row and column of each visual token, and its picture, by hand: grids of 4 x 4, or as given."""
    place, picture = torch.full((*ids.shape, 2), -99), torch.full(ids.shape, -1)
    for row, line in enumerate(ids.tolist()):
        columns = [c for c, word in enumerate(line) if word == IMAGE]
        if family == "llava-clip":
            sizes = [(4, 4)] * (len(columns) // 16)
        else:
            sizes = {10: [(2, 3), (2, 2)], 6: [(3, 2)], 0: []}[len(columns)]
        done = 0
        for number, (height, width) in enumerate(sizes):
            for k in range(height * width):
                column = columns[done + k]
                place[row, column] = torch.tensor([k // width, k % width])
                picture[row, column] = number
            done += height * width
    return place, picture


@contextmanager
def reference(model: Any, work: VisualWork, family: str, ids: Tensor) -> Iterator[None]:
    """The model with masks written out: nothing is skipped, nothing is shortened."""
    place, picture = places(family, ids)
    visual = picture >= 0  # [B, L]
    near = ((place[:, :, None] - place[:, None]).abs() <= ((work.window or 99) - 1) // 2).all(-1)
    near &= picture[:, :, None] == picture[:, None]

    def attention(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, scaling: float, **_: Any) -> Any:
        layer, length = module.layer_idx, q.shape[2]
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        causal = torch.ones(length, length, dtype=torch.bool).tril()
        may = causal[None, None] if mask is None else mask if mask.dtype == torch.bool else mask == 0
        may = may.expand(len(q), 1, length, length)
        columns = visual[:, :length]
        both = columns[:, :, None] & columns[:, None]
        last = work.layers if work.cut is None else work.cut
        if work.window is not None and layer < last:
            own = near[:, :length, :length] & (causal if work.causal else True)
            may = torch.where(both[:, None], own[:, None], may)
        if layer >= last and work.renormalise:
            may = may & (columns[:, :, None] | ~columns[:, None])[:, None]
        weights = (q @ k.mT * scaling).masked_fill(~may, torch.finfo(q.dtype).min).softmax(-1)
        if layer >= last and not work.renormalise:
            weights = weights * ~columns[:, None, None]
        pruned = [
            h for h in range(4) if layer < last and work.heads is not None and h not in work.heads[layer]
        ]
        weights[:, pruned] = weights[:, pruned] * ~columns[:, None, None]
        out = weights @ v
        if work.silent:
            out[:, pruned] = out[:, pruned] * ~columns[:, None, :, None]
        return out.transpose(1, 2).contiguous(), None

    AttentionInterface.register("by-hand", attention)
    undo = []
    for number, layer in enumerate(decoder_of(model).layers):
        config = layer.self_attn.config
        own = copy.copy(config)
        own._attn_implementation_internal = "by-hand"
        layer.self_attn.config = own
        undo.append(lambda module=layer.self_attn, config=config: setattr(module, "config", config))
        keep = torch.zeros(48, dtype=torch.bool)
        given = 48 if work.neurons is None or number >= (work.layers if work.cut is None else work.cut) else work.neurons[number]  # fmt: skip
        keep[list(range(given)) if isinstance(given, int) else list(given)] = True

        def before(module: Any, args: Any, keep: Tensor = keep) -> Any:
            return (args[0] * (keep | ~visual[:, : args[0].shape[1], None]),)

        undo.append(layer.mlp.down_proj.register_forward_pre_hook(before).remove)
    try:
        yield
    finally:
        for step in undo:
            step()


def words(inputs: Any) -> Tensor:
    """bool [B, L]: text that is there."""
    return inputs["attention_mask"].bool() & (inputs["input_ids"] != IMAGE)


@torch.no_grad()
@pytest.mark.parametrize("physical", [True, False])
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("family", FAMILIES)
def test_words_are_those_of_the_masks_written_out(
    models: Any, family: str, plan: str, physical: bool
) -> None:
    model, inputs = models(family)
    before = model(**inputs).logits
    work = VisualWork(**SIZES, **PLANS[plan], physical=physical)
    there = words(inputs)
    with reference(model, work, family, inputs["input_ids"]):
        wanted = model(**inputs).logits
    with attach(model, "yopo", work=work) as attached:
        found = model(**inputs).logits
    shorter = found.shape[1] < wanted.shape[1]
    assert shorter == work.leaves
    for row in range(3):
        mine, its = wanted[row][there[row]], found[row]
        its = its[-len(mine) :] if shorter else its[there[row]]
        torch.testing.assert_close(its, mine, atol=1e-10, rtol=0)
    assert not torch.allclose(wanted[0, -1], before[0, -1], atol=1e-4)
    assert torch.equal(model(**inputs).logits, before)
    assert attached.setup.work is work


@torch.no_grad()
@pytest.mark.parametrize("plan", PLANS)
def test_a_prompt_alone_has_no_mask_and_gives_the_same(models: Any, plan: str) -> None:
    model, inputs = models("llava-clip")
    real = inputs["attention_mask"][1].bool()
    one = {name: x[1:2, real] for name, x in inputs.items() if x.dim() == 2}
    one["pixel_values"] = inputs["pixel_values"][2:3]
    work = VisualWork(**SIZES, **PLANS[plan])
    with reference(model, work, "llava-clip", one["input_ids"]):
        wanted = model(**one).logits[:, -1]
    with attach(model, "yopo", work=work):
        torch.testing.assert_close(model(**one).logits[:, -1], wanted, atol=1e-10, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("plan", ["heads", "cut", "cut as released", "all", "all as released"])
@pytest.mark.parametrize("family", FAMILIES)
def test_later_steps_go_on_as_planned(models: Any, family: str, plan: str) -> None:
    model, inputs = models(family)
    work = VisualWork(**SIZES, **PLANS[plan])
    options = {"max_new_tokens": 4, "do_sample": False, "suppress_tokens": [IMAGE]}
    with reference(model, work, family, torch.nn.functional.pad(inputs["input_ids"], (0, 4))):
        wanted = model.generate(**inputs, **options, use_cache=False)
    dense = model.generate(**inputs, **options)
    with attach(model, "yopo", work=work):
        found = model.generate(**inputs, **options)
        beams = model.generate(**inputs, **options, num_beams=2)
    assert torch.equal(found, wanted)
    assert beams.shape == found.shape
    assert not torch.equal(dense, wanted) or plan == "heads"


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_a_plan_that_excuses_from_nothing_is_the_model(models: Any, family: str) -> None:
    model, inputs = models(family)
    before = model(**inputs).logits
    whole = VisualWork(**SIZES, heads=((0, 1, 2, 3),) * 4, neurons=(48,) * 4, cut=4)
    with attach(model, "yopo", work=whole):
        assert torch.equal(model(**inputs).logits, before)
    # a causal window that sees the whole picture; other pictures of the row are then out of sight
    one = {k: v for k, v in inputs.items()}
    if family == "llava-clip":
        real = inputs["attention_mask"][1].bool()
        one = {k: v[1:2, real] for k, v in inputs.items() if v.dim() == 2} | {"pixel_values": inputs["pixel_values"][2:3]}  # fmt: skip
        alone = model(**one).logits
        with attach(model, "yopo", work=VisualWork(**SIZES, window=7, causal=True)):
            torch.testing.assert_close(model(**one).logits, alone, atol=1e-12, rtol=0)


@torch.no_grad()
def test_prompts_without_pictures_are_untouched(models: Any) -> None:
    model, _ = models("llava-clip")
    ids = torch.tensor([[1, 8, 9, 10]])
    before, written = model(input_ids=ids).logits, model.generate(input_ids=ids, max_new_tokens=3)
    with attach(model, "yopo", work=VisualWork(**SIZES, **PLANS["all as released"])):
        assert torch.equal(model(input_ids=ids).logits, before)
        assert torch.equal(model.generate(input_ids=ids, max_new_tokens=3), written)


@torch.no_grad()
def test_neurons_change_no_word_of_the_same_layer(models: Any) -> None:
    """Words see them one layer later, through attention."""
    model, inputs = models("llava-clip")
    states: list[list[Tensor]] = []
    for work in (None, VisualWork(**SIZES, neurons=(48, 0, 48, 48))):
        seen: list[Tensor] = []
        hooks = [
            layer.register_forward_hook(lambda m, a, out, seen=seen: seen.append(out))
            for layer in decoder_of(model).layers
        ]
        if work is None:
            model(**inputs)
        else:
            with attach(model, "yopo", work=work):
                model(**inputs)
        states.append(seen)
        for hook in hooks:
            hook.remove()
    there = words(inputs)
    one, two = states
    torch.testing.assert_close(one[1][there], two[1][there], atol=1e-12, rtol=0)
    assert not torch.allclose(one[1][~there], two[1][~there])
    assert not torch.allclose(one[2][there], two[2][there])


@torch.no_grad()
def test_what_left_has_no_cache_and_no_later_layer(models: Any) -> None:
    model, inputs = models("llava-clip")
    with attach(model, "yopo", work=VisualWork(**SIZES, cut=2)) as attached:
        cache = model(**inputs, use_cache=True).past_key_values
    lengths = [layer.keys.shape[2] for layer in cache.layers]
    text = int(words(inputs).sum(1).max())
    assert lengths[0] == lengths[1] == inputs["input_ids"].shape[1] and lengths[2] == lengths[3] == text
    report = attached.report
    assert report["after"]["tokens_x_layers"] * 2 == report["before"]["tokens_x_layers"]


def test_a_line_of_a_grid_reads_the_lines_beside_it_and_the_words_before() -> None:
    place = torch.arange(24 * 24)
    near = neighbours(place // 24, place % 24, place * 0, 5)
    may = torch.ones(2, 620, 620, dtype=torch.bool).tril()
    may[:, 35:611, 35:611] = near
    lines = torch.full((2, 620), -1)
    lines[:, 35:611] = place // 24 + torch.tensor([[0], [24]])
    text = torch.cat([torch.arange(35), torch.arange(611, 620)]).expand(2, -1)
    bands = _bands(may, lines, text)
    assert bands.queries.shape == (48, 24) and bands.keys.shape == (48, 35 + 5 * 24)
    made = torch.Generator().manual_seed(0)
    asked = Asked(*torch.randn(3, 2, 2, 620, 4, generator=made, dtype=torch.float64), may[:, None], None)
    torch.testing.assert_close(banded(asked, bands), attend(asked), atol=1e-12, rtol=0)


@torch.no_grad()
def test_work_that_is_counted_is_work_that_is_done(models: Any) -> None:
    """Multiply-adds of all linear layers, as torch counts them, fall by what the formula says of each part."""
    from torch.utils.flop_counter import FlopCounterMode

    model, inputs = models("llava-clip")
    real = inputs["attention_mask"][1].bool()
    one = {name: x[1:2, real] for name, x in inputs.items() if x.dim() == 2}
    one["pixel_values"] = inputs["pixel_values"][2:3]

    def counted() -> float:
        with FlopCounterMode(display=False) as counter:
            model(**one, logits_to_keep=1)
        counts = counter.get_flop_counts()["Global"]
        return sum(n for op, n in counts.items() if "mm" in str(op) and "bmm" not in str(op)) / 2

    dense, n, d, m = counted(), 16, 32, 48
    keys = 2 / 4  # of heads of keys to heads
    plans: list[tuple[dict[str, Any], float]] = [
        ({"cut": 2}, 2 * n * d * (d * (2 + 2 * keys) + 3 * m)),
        ({"neurons": (24, 48, 0, 48)}, 3 * n * d * (24 + 48)),
        # queries and outputs of two heads a layer; values of one head of keys in two layers
        ({"heads": ((0, 1), (0, 2), (2, 3), (1, 2))}, n * d * (4 * 2 * d / 2 + 2 * keys * d / 2)),
    ]
    for plan, saved in plans:
        with attach(model, "yopo", work=VisualWork(**SIZES, **plan)) as attached:
            assert dense - counted() == saved
        parts = attached.report["visual_flops"]
        if "heads" not in plan:  # keys are still made, and products of queries and keys count too
            assert parts["neurons"] + parts["layers"] >= saved
        assert parts["dense"] == 4 * (n * d * (d * (2 + 2 * keys) + 3 * m) + 2 * n * n * d)


@torch.no_grad()
def test_beside_a_token_method(models: Any) -> None:
    model, inputs = models("llava-clip")
    work = VisualWork(**SIZES, window=3, neurons=(24,) * 4, cut=3)
    with attach(model, "fastv", target="50%", k=1, work=work) as attached:
        model(**inputs)
        visual = [[len(row) for row in rows] for rows in attached.kept.values()]
        parts = attached.report["visual_flops"]
    assert visual == [[16, 8, 0], [0, 0, 0]] and list(attached.kept) == ["layer:1", "layer:3"]
    # 48 tokens before fastv, 24 behind it: then and at the cut
    assert parts["dense"] - parts["left"] == parts["layers"] + parts["neurons"]
    assert attached.report["after"]["tokens_x_layers"] == 48 + 24 + 24
    with attach(model, "divprune", target="50%", work=work) as attached:
        assert model(**inputs).logits.isfinite().all()
    with pytest.raises(SecateurError, match="fastv chooses at layer:3, and all visual tokens have left"):
        attach(model, "fastv", target="50%", k=3, work=work)
    with pytest.raises(SecateurError, match="no use for it"):
        attach(model, "psa", work=work)


@torch.no_grad()
@pytest.mark.parametrize(
    ("match", "settings"),
    [
        ("for 3 layers, and this model has 4", {"work": VisualWork(3, 4, 48)}),
        ("for 2 heads a layer, and this model has 4", {"work": VisualWork(4, 2, 48)}),
        ("for 9 neurons a layer, and this model has 48", {"work": {**SIZES, "neurons_each": 9}}),
        ("the plan says", {"work": SIZES, "target": "50%"}),
        ("the plan says", {"work": SIZES, "window": 3}),
        ("leaves by choice", {"positions": "compact"}),
        ("a share such as", {"target": "tokens=3"}),
        ("prompts", {"heads": 0.5}),
        ("a target says", {"heads": 0.5, "target": "25%"}),
        ("threshold of nan", {"threshold": float("nan"), "given": {"ratios": torch.ones(1, 4, 4)}}),
        ("has no middle", {"window": 4}),
        ("ratios are", {"heads": 0.5, "given": {"ratios": torch.ones(1, 2, 4)}}),
    ],
)
def test_nonsense_is_named_and_the_model_left_alone(
    models: Any, match: str, settings: dict[str, Any]
) -> None:
    model, inputs = models("llava-clip")
    before = model(**inputs).logits
    with pytest.raises(SecateurError, match=match):
        attach(model, "yopo", **settings)
    assert torch.equal(model(**inputs).logits, before)


@torch.no_grad()
def test_a_window_larger_than_the_grid_is_named_when_the_picture_comes(models: Any) -> None:
    model, inputs = models("llava-clip")
    before = model(**inputs).logits
    attached = attach(model, "yopo", window=9)
    with pytest.raises(SecateurError, match="9 is larger than all that a grid of 4 x 4"):
        model(**inputs)
    assert not attached.attached and torch.equal(model(**inputs).logits, before)


@torch.no_grad()
def test_attention_that_cannot_be_reached_is_refused_with_the_reason() -> None:
    model, inputs = make("llava-clip", torch.float32), inputs_for("llava-clip", torch.float32)
    model.set_attn_implementation("eager")
    with pytest.raises(SecateurError, match="runs as eager.*sdpa"):
        attach(model, "yopo", window=3)
    with attach(model, "yopo", window=0, neurons=0.5, cut=0.5):  # these need none
        assert model(**inputs).logits.isfinite().all()
    from secateur.testing import tiny_llama

    with pytest.raises(SecateurError):
        attach(tiny_llama(), "yopo")


def test_a_static_cache_is_refused_where_its_keys_matter(models: Any) -> None:
    model, inputs = models("llava-clip")
    options = {"max_new_tokens": 3, "do_sample": False, "cache_implementation": "static"}
    attached = attach(model, "yopo", work=VisualWork(**SIZES, heads=HEADS))
    with pytest.raises(SecateurError, match="static cache"):
        model.generate(**inputs, **options)
    assert not attached.attached
    with attach(model, "yopo", work=VisualWork(**SIZES, cut=2)):
        found = model.generate(**inputs, **options)
        assert torch.equal(found, model.generate(**inputs, max_new_tokens=3, do_sample=False))


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_dtype(models: Any, dtype: torch.dtype) -> None:
    model, inputs = models("llava-clip", dtype)
    with attach(model, "yopo", work=VisualWork(**SIZES, **PLANS["all"])):
        assert model(**inputs).logits.isfinite().all()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_trains_while_it_is_on(models: Any, family: str) -> None:
    model, inputs = models(family)
    model = copy.deepcopy(model)
    labels = inputs["input_ids"].masked_fill(~words(inputs), -100)
    with attach(model, "yopo", work=VisualWork(**SIZES, **PLANS["all"])):
        model(**inputs, labels=labels, use_cache=False).loss.backward()
    for layer in decoder_of(model).layers[:2]:
        for linear in (layer.mlp.gate_proj, layer.self_attn.k_proj):
            given = linear.weight.grad
            assert given is not None and given.isfinite().all() and bool((given != 0).any())


@torch.no_grad()
@pytest.mark.parametrize("family", ["llava-next", "internvl", "paligemma", "gemma3", "smolvlm", "qwen3-vl"])
def test_other_families_run_and_physical_equals_masked(family: str) -> None:
    model, inputs = make(family, torch.float64), inputs_for(family, torch.float64)
    if family in ("paligemma", "gemma3"):
        model.set_attn_implementation("sdpa")
    before = model(**inputs).logits
    found = [
        run(model, inputs, VisualWork(**SIZES, heads=HEADS, neurons=(24,) * 4, cut=3, physical=physical))
        for physical in (True, False)
    ]
    torch.testing.assert_close(found[0], found[1], atol=1e-9, rtol=0)
    assert torch.equal(model(**inputs).logits, before)


def run(model: Any, inputs: Any, work: VisualWork) -> Tensor:
    with secateur.attach(model, "yopo", work=work):
        return model(**inputs).logits[:, -1]
