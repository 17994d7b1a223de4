"""Tokens that are parked and return equal a reference in which they stay in place, are masked meanwhile, and are put back as they were."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from reference import generate
from test_engine import SETTINGS, STEPS, choose, dropped, dtype_of, run, tolerance
from tiny_models import FAMILIES, IMAGE, VIDEO, inputs_for, make
from torch import Tensor

from secateur.errors import SecateurError
from secateur.families.vlm.facts import Facts
from secateur.tokens.attach import attach
from secateur.tokens.cost import llm_flops
from secateur.tokens.method import Stage, TokenMethod
from secateur.tokens.state import TokenSets


def staged(*stages: Stage, **fields: Any) -> TokenMethod:
    @dataclass
    class Staged(TokenMethod):
        name = "staged"
        scope = "row"
        newlines = "compete"
        positions = fields.get("positions", "original")

        def stages(self, facts: Facts) -> list[Stage]:
            return list(stages)

    return Staged()


def everything(sets: TokenSets) -> Tensor:
    return sets.valid


def phases(
    inputs: dict[str, Any], parked: Tensor, gone: Tensor | None, at: tuple[int, ...], **fields: Any
) -> Any:
    """Few, all, fewer: `parked` from at[0] to at[1], `gone` from at[2] on."""
    stages = [
        Stage(f"layer:{at[0]}", choose(inputs, parked), parks=True),
        Stage(f"layer:{at[1]}", everything, returns=True),
    ]
    if gone is not None:
        stages.append(Stage(f"layer:{at[2]}", choose(inputs, gone)))
    return staged(*stages, **fields)


def setting(family: str, inputs: dict[str, Any]) -> tuple[Any, dict[int, Tensor], Any]:
    """A method of three phases and what the reference needs of it; two where visual features are added in two of four layers."""
    at = (2, 3) if family == "qwen3-vl" else (0, 2, 3)
    parked = dropped(inputs, 0.6, 1)
    gone = None if len(at) == 2 else dropped(inputs, 0.5, 2)
    masks = {at[0]: parked, at[1]: torch.zeros_like(parked)} | ({at[2]: gone} if gone is not None else {})
    return phases(inputs, parked, gone, at), masks, [(at[0], at[1], parked)]


@pytest.fixture(scope="module")
def llava() -> Any:
    return make("llava-clip")


@pytest.mark.parametrize("family", FAMILIES)
def test_parking_and_returning_equals_the_reference(family: str) -> None:
    """Three padded rows that park different numbers; few, all, fewer keys in the caches; and nothing is left on the model."""
    model, inputs = make(family, dtype_of(family)), inputs_for(family, dtype_of(family))
    method, masks, back = setting(family, inputs)
    with torch.no_grad():
        before = model(**inputs).logits
    expected, reference = generate(model, family, inputs, masks, STEPS, back=back)
    forgotten = generate(model, family, inputs, masks, 1)[1][0]
    with attach(model, method, target="50%") as attached:
        tokens, logits = run(model, inputs)
        with torch.no_grad():
            cache = model(**inputs).past_key_values
    assert torch.equal(tokens, expected)
    assert (logits - reference).abs().max() < tolerance(family)
    assert (forgotten - reference[0]).abs().max() > 10 * tolerance(family)
    full = inputs["attention_mask"].sum(1)
    starts = sorted(masks)
    seen = [masks[max(s for s in starts if s <= n)] if n >= starts[0] else None for n in range(4)]
    widths = [int((full - (0 if gone is None else gone.sum(1))).max()) for gone in seen]
    assert [layer.get_seq_length() for layer in cache.layers] == widths and widths[starts[0]] < widths[
        starts[1]
    ]
    for stage, gone in zip(attached.kept, masks.values()):
        for row in range(3):
            stays = ~gone[row, inputs["input_ids"][row] == IMAGE]
            assert attached.kept[stage][row].tolist() == stays.nonzero()[:, 0].tolist()
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, before)


@pytest.mark.parametrize("family", ["llava-clip", "qwen2.5-vl", "gemma3"])
def test_parking_twice_dropping_meanwhile_and_returning_behind_a_shorter_input(family: str) -> None:
    model, inputs = make(family), inputs_for(family)
    short = dropped(inputs, 0.2, 3)
    first = dropped(inputs, 0.4, 4, before=short)
    lost = dropped(inputs, 0.3, 5) & ~first
    second = dropped(inputs, 0.5, 6) & ~first & ~lost
    method = staged(
        Stage("input", choose(inputs, short)),
        Stage("layer:0", choose(inputs, first), parks=True),
        Stage("layer:1", choose(inputs, lost)),
        Stage("layer:1", choose(inputs, second), parks=True),
        Stage("layer:3", everything, returns=True),
    )
    masks = {0: first, 1: first | lost | second, 3: short | lost}
    back = [(0, 3, first & ~short), (1, 3, second)]
    expected, reference = generate(model, family, inputs, masks, STEPS, back=back)
    with attach(model, method, target="50%") as attached:
        tokens, logits = run(model, inputs)
    assert torch.equal(tokens, expected) and (logits - reference).abs().max() < 1e-6
    assert [sum(map(len, rows)) for rows in attached.kept.values()] == [
        int(((inputs["input_ids"] == IMAGE) & ~gone).sum())
        for gone in (short, first, first | lost, masks[1], masks[3])
    ]


def test_beams_a_second_turn_and_two_conversations(llava: Any) -> None:
    inputs = inputs_for("llava-clip")
    method, masks, back = setting("llava-clip", inputs)
    more = torch.tensor([[51, 52], [53, 54], [55, 56]])
    with attach(llava, method, target="50%"):
        beams = llava.generate(**inputs, **SETTINGS, num_beams=2, num_return_sequences=2)
        first = llava.generate(**inputs, **SETTINGS, return_dict_in_generate=True)
        words = (inputs["input_ids"] > 8) * 1
        llava.generate(**inputs | {"input_ids": inputs["input_ids"] + words}, **SETTINGS)
        ids = torch.cat([first.sequences, more], 1)
        mask = torch.cat([inputs["attention_mask"], torch.ones(3, STEPS + 2).long()], 1)
        new = {"input_ids": ids, "attention_mask": mask}
        tokens, logits = run(llava, new | {"past_key_values": copy.deepcopy(first.past_key_values)})
        _, again = run(llava, new | {"past_key_values": first.past_key_values})
    wide = {k: torch.nn.functional.pad(v, (0, STEPS + 2)) for k, v in masks.items()}
    returned = [(a, b, torch.nn.functional.pad(v, (0, STEPS + 2))) for a, b, v in back]
    expected, reference = generate(llava, "llava-clip", inputs | new, wide, STEPS, back=returned)
    assert torch.equal(tokens, expected) and (logits - reference).abs().max() < 1e-6
    assert torch.equal(again, logits)
    # the better beam is at least as likely as the greedy answer
    prompt = inputs["input_ids"].shape[1]
    assert (
        _likelihood(llava, inputs, masks, back, beams[::2, prompt:])
        .ge(_likelihood(llava, inputs, masks, back, first.sequences[:, prompt:]) - 1e-9)
        .all()
    )


def _likelihood(model: Any, inputs: dict[str, Any], masks: Any, back: Any, written: Tensor) -> Tensor:
    score = torch.zeros(len(written), dtype=torch.float64)
    for step in range(STEPS):
        ids = torch.cat([inputs["input_ids"], written[:, :step]], 1)
        mask = torch.cat([inputs["attention_mask"], torch.ones_like(written[:, :step])], 1)
        wide = {k: torch.nn.functional.pad(v, (0, step)) for k, v in masks.items()}
        returned = [(a, b, torch.nn.functional.pad(v, (0, step))) for a, b, v in back]
        longer = inputs | {"input_ids": ids, "attention_mask": mask}
        logits = generate(model, "llava-clip", longer, wide, 1, back=returned)[1][0]
        logits[:, [IMAGE, VIDEO]] = -torch.inf
        score += logits.log_softmax(-1).gather(1, written[:, step : step + 1])[:, 0]
    return score


@pytest.mark.parametrize("family", ["llava-clip", "qwen2-vl"])
def test_a_loop_of_forwards_whose_model_counts_the_cache(family: str) -> None:
    model, one = make(family), inputs_for(family, rows=(1,))
    method, masks, back = setting(family, one)
    _, reference = generate(model, family, one, masks, STEPS, back=back)
    with torch.no_grad(), attach(model, method, target="50%"):
        out, found = model(**one), []
        cache = out.past_key_values
        short, full = cache.layers[0].get_seq_length(), one["input_ids"].shape[1]
        assert cache.get_seq_length() == full > short == cache.layers[0].keys.shape[2]
        for step in range(STEPS):
            found.append(out.logits[:, -1])
            choice = out.logits[:, -1].clone()
            choice[:, [IMAGE, VIDEO]] = -torch.inf
            out = model(input_ids=choice.argmax(-1, keepdim=True), past_key_values=cache)
            assert cache.get_seq_length() == full + step + 1
    assert (torch.stack(found) - reference).abs().max() < 1e-6


def test_right_padding_eager_attention_and_labels() -> None:
    inputs = inputs_for("llava-clip", torch.float32)
    model = make("llava-clip", torch.float32)
    lengths = inputs["attention_mask"].sum(1).tolist()
    right = inputs | {
        name: torch.stack([row.roll(n) for row, n in zip(inputs[name], lengths)])
        for name in ("input_ids", "attention_mask")
    }
    labels = right["input_ids"].masked_fill(right["attention_mask"] == 0, -100)
    parked = dropped(right, 0.6, 4)
    with torch.no_grad(), attach(model, phases(right, parked, None, (0, 2)), target="50%"):
        out = model(**right, labels=labels)
    model.set_attn_implementation("eager")
    with torch.no_grad(), attach(model, phases(right, parked, None, (0, 2)), target="50%"):
        eager = model(**right).logits
    model.set_attn_implementation("sdpa")
    # everything is back, so there are as many states as tokens were given
    assert out.logits.shape[1] == right["input_ids"].shape[1]
    for row, n in enumerate(lengths):
        one = {name: right[name][row : row + 1, :n] for name in ("input_ids", "attention_mask")}
        if row < 2:
            one["pixel_values"] = right["pixel_values"][[slice(0, 2), slice(2, 3)][row]]
        with (
            torch.no_grad(),
            attach(model, phases(one, parked[row : row + 1, :n], None, (0, 2)), target="50%"),
        ):
            alone = model(**one).logits[0]
        assert torch.allclose(out.logits[row, :n], alone, atol=1e-5)
        assert torch.allclose(eager[row, :n], alone, atol=1e-5)
    flat = torch.nn.functional.cross_entropy(
        out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100
    )
    assert torch.allclose(out.loss, flat, atol=1e-5)


def test_compact_positions_close_up_while_tokens_are_parked(llava: Any) -> None:
    """Equal to the same tokens given alone, for the layers in which the others are parked."""
    inputs = inputs_for("llava-clip", rows=(1,))
    model = make("llava-clip")
    parked = dropped(inputs, 0.6, 4)
    seen: list[Tensor] = []
    handle = (
        model.get_decoder()
        .layers[2]
        .register_forward_pre_hook(
            lambda layer, args, kwargs: seen.append(kwargs["position_ids"]), with_kwargs=True
        )
    )
    states: list[Tensor] = []
    first = model.get_decoder().layers[1].register_forward_hook(lambda layer, args, out: states.append(out))
    with torch.no_grad():
        with attach(model, phases(inputs, parked, None, (0, 2), positions="compact"), target="50%"):
            model(**inputs)
        with attach(model, choose(inputs, parked), target="50%", positions="compact", scope="row"):
            model(**inputs)
    handle.remove()
    first.remove()
    length = inputs["input_ids"].shape[1]
    assert seen[0].tolist() == [list(range(length))]
    assert torch.allclose(states[0], states[1], atol=1e-9) and states[0].shape[1] == length - int(
        parked.sum()
    )


def test_a_run_costs_what_was_alive_in_each_layer(llava: Any) -> None:
    inputs = inputs_for("llava-clip")
    method, masks, _ = setting("llava-clip", inputs)
    with torch.no_grad(), attach(llava, method, target="50%") as attached:
        llava(**inputs)
        report = attached.report
    rows = inputs["attention_mask"].sum(1)
    lengths = [(rows - masks[k].sum(1)).tolist() for k in (0, 0, 2, 3)]
    assert report["lengths"] == lengths
    visual = int((inputs["input_ids"] == IMAGE).sum())
    assert report["after"]["tokens_x_layers"] == sum(visual - int(masks[k].sum()) for k in (0, 0, 2, 3))
    assert report["after"]["flops"] == sum(
        llm_flops([layer[row] for layer in lengths], attached.facts) for row in range(3)
    )
    assert report["after"]["kv_bytes"] == sum(3 * max(layer) for layer in lengths) * 2 * 2 * 8 * 8


def test_a_stage_before_the_first_layer_equals_one_at_the_input(llava: Any) -> None:
    inputs = inputs_for("llava-clip")
    gone = dropped(inputs, 0.5, 7)
    with attach(llava, choose(inputs, gone), at="input", target="50%", scope="row"):
        tokens, logits = run(llava, inputs)
    with attach(llava, choose(inputs, gone), at="layer:0", target="50%", scope="row"):
        found = run(llava, inputs)
        second = run(llava, inputs, num_beams=1)
    assert torch.equal(found[0], tokens) and (found[1] - logits).abs().max() < 1e-9
    assert torch.equal(second[1], found[1])


def test_what_cannot_work_is_named_and_the_model_left_as_it_was(llava: Any) -> None:
    inputs = inputs_for("llava-clip")
    with torch.no_grad():
        before = llava(**inputs).logits
    park, back = Stage("layer:1", everything, parks=True), Stage("layer:2", everything, returns=True)
    early = Stage("layer:1", everything, returns=True)
    wrong = (
        ("parked at layer:1 and return at no layer", (park,)),
        ("parked at no layer and return at layer:2", (back,)),
        ("parked at layer:1 and return at layer:1", (park, early)),
        (
            "parked at layer:1 and layer:3 and return at layer:2",
            (park, back, Stage("layer:3", everything, parks=True)),
        ),
        ("between decoder layers only", (Stage("input", everything, parks=True), back)),
    )
    for match, stages in wrong:
        with pytest.raises(SecateurError, match=match):
            attach(llava, staged(*stages), target="50%")
    method = setting("llava-clip", inputs)[0]
    for match, chosen, at in (
        ("need room again", method, ""),
        ("would hold less", choose(inputs, dropped(inputs, 0.5, 1)), "layer:0"),
    ):
        attached = attach(llava, chosen, target="50%", **({"at": at, "scope": "row"} if at else {}))
        with pytest.raises(SecateurError, match=match):
            run(llava, inputs, cache_implementation="static")
        assert not attached.attached
    deep = make("qwen3-vl")
    with pytest.raises(SecateurError, match="first 2 layers"):
        attach(deep, choose(inputs, dropped(inputs, 0.5, 1)), at="layer:0", target="50%")
    with torch.no_grad():
        assert torch.equal(llava(**inputs).logits, before)
