"""Beams, several turns, odd batches, other attention and caches, and what is refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from reference import generate
from test_engine import attach_drop, choose, dropped, dtype_of, run, tolerance
from tiny_models import IMAGE, VIDEO, inputs_for, make
from torch import Tensor
from transformers import DynamicCache

from secateur.errors import SecateurError
from secateur.tokens.attach import attach
from secateur.tokens.state import Reduction, TokenSets

DRIVERS = ["input", "layer:2"]


@pytest.fixture(scope="module")
def llava() -> Any:
    return make("llava-clip")


@pytest.fixture
def inputs() -> dict[str, Any]:
    return inputs_for("llava-clip")


def half(sets: TokenSets) -> Tensor:
    keep = torch.zeros_like(sets.valid)
    keep[:, ::2] = True
    return keep


def first_layer(at: str) -> int:
    return 0 if at == "input" else int(at[6:])


@pytest.mark.parametrize("family", ["llava-clip", "qwen2.5-vl", "gemma3", "idefics3"])
@pytest.mark.parametrize("at", DRIVERS)
def test_a_beam_has_the_score_of_its_tokens_forced_through_the_reference(family: str, at: str) -> None:
    model, inputs = make(family), inputs_for(family)
    gone = dropped(inputs, 0.5, 1)
    with attach_drop(model, inputs, at, gone):
        out = model.generate(
            **inputs, max_new_tokens=4, do_sample=False, num_beams=3, num_return_sequences=2, length_penalty=0.0,
            suppress_tokens=[IMAGE, VIDEO], output_scores=True, return_dict_in_generate=True,
        )  # fmt: skip
    prompt = inputs["input_ids"].shape[1]
    assert torch.equal(out.sequences[::2, :prompt], inputs["input_ids"])
    for answer in range(2):
        written = out.sequences[answer::2, prompt:]
        score = torch.zeros(3, dtype=torch.float64)
        for step in range(4):
            longer = dict(inputs)
            for name, value in (
                ("input_ids", None),
                ("attention_mask", 1),
                ("token_type_ids", 0),
                ("mm_token_type_ids", 0),
            ):
                if name in longer:
                    more = written[:, :step]
                    more = more if value is None else torch.full_like(more, value)
                    longer[name] = torch.cat([longer[name], more], 1)
            pad = torch.nn.functional.pad(gone, (0, step))
            _, logits = generate(model, family, longer, {first_layer(at): pad}, 1)
            score += logits[0].log_softmax(-1).gather(1, written[:, step : step + 1])[:, 0]
        assert torch.allclose(out.sequences_scores[answer::2].double(), score, atol=1e-5)


@pytest.mark.parametrize("family", ["llava-clip", "qwen2.5-vl", "gemma3", "paligemma", "llava-next"])
@pytest.mark.parametrize("at", DRIVERS)
def test_a_second_turn_on_the_same_cache_equals_a_fresh_run(family: str, at: str) -> None:
    model, inputs = make(family), inputs_for(family)
    gone = dropped(inputs, 0.5, 2)
    settings = {"max_new_tokens": 3, "do_sample": False, "suppress_tokens": [IMAGE, VIDEO]}
    with attach_drop(model, inputs, at, gone) as attached:
        first = model.generate(**inputs, **settings, return_dict_in_generate=True)
        more = torch.tensor([[51, 52], [53, 54], [55, 56]])
        ids = torch.cat([first.sequences, more], 1)
        new = {
            "input_ids": ids,
            "attention_mask": torch.cat([inputs["attention_mask"], torch.ones(3, 5).long()], 1),
        }
        kept = copy.deepcopy(attached.kept)
        second = model.generate(
            **new,
            past_key_values=first.past_key_values,
            **settings,
            output_logits=True,
            return_dict_in_generate=True,
        )
        assert all(torch.equal(a, b) for a, b in zip(kept[at], attached.kept[at]))
    fresh = dict(inputs) | new
    grown = ids.shape[1] - inputs["input_ids"].shape[1]
    for name, value in (("token_type_ids", 1 if family == "paligemma" else 0), ("mm_token_type_ids", 0)):
        if name in inputs:
            fresh[name] = torch.cat([inputs[name], torch.full((3, grown), value)], 1)
    wide = torch.nn.functional.pad(gone, (0, grown))
    expected, reference = generate(model, family, fresh, {first_layer(at): wide}, 3)
    assert torch.equal(second.sequences[:, : ids.shape[1]], ids)
    assert torch.equal(second.sequences[:, ids.shape[1] :], expected)
    assert (torch.stack(second.logits) - reference).abs().max() < tolerance(family)


@pytest.mark.parametrize("family", ["llava-clip", "qwen2-vl", "paligemma"])
@pytest.mark.parametrize("at", DRIVERS)
def test_forward_by_hand_step_by_step(family: str, at: str) -> None:
    """`model(...)` with its cache, without generate: a row without padding, as such loops are written."""
    model = make(family)
    one = inputs_for(family, rows=(1,))
    gone = dropped(one, 0.5, 2)
    expected, reference = generate(model, family, one, {first_layer(at): gone}, 4)
    with torch.no_grad(), attach_drop(model, one, at, gone):
        out, found = model(**one), []
        for _ in range(4):
            found.append(out.logits[:, -1])
            choice = out.logits[:, -1].clone()
            choice[:, [IMAGE, VIDEO]] = -torch.inf
            out = model(input_ids=choice.argmax(-1, keepdim=True), past_key_values=out.past_key_values)
    assert (torch.stack(found) - reference).abs().max() < tolerance(family)
    assert torch.equal(torch.stack(found).argmax(-1).T, reference.argmax(-1).T) and len(expected[0]) == 4


@pytest.mark.parametrize("at", DRIVERS)
def test_a_mask_of_ones_is_made_where_rows_become_ragged(llava: Any, at: str) -> None:
    """generate drops such a mask, and attention would then be plainly causal over the padding that dropping brings."""
    inputs = inputs_for("llava-clip", rows=(1, 1))
    length = int(inputs["attention_mask"].sum(1).min())
    ids = inputs["input_ids"][:, -length:].clone()
    ids[1] = torch.roll(ids[1], -1)
    ids[1, -1] = 77
    ids[0] = torch.where(ids[0] == 0, 41, ids[0])
    if int((ids == IMAGE).sum()) != 32:
        ids = torch.stack([ids[0], ids[0].roll(2)])
    inputs |= {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    gone = dropped(inputs, 0.5, 8)
    assert int(gone[0].sum()) != int(gone[1].sum())
    expected, reference = generate(llava, "llava-clip", inputs, {first_layer(at): gone}, 4)
    with attach_drop(llava, inputs, at, gone):
        tokens, logits = run(llava, inputs)
        del inputs["attention_mask"]
        again = run(llava, inputs)[1]
    assert torch.equal(tokens, expected) and (logits - reference).abs().max() < 1e-6
    assert torch.equal(again, logits)


@pytest.mark.parametrize("at", DRIVERS)
def test_right_padding_and_labels_in_forward(llava: Any, inputs: dict[str, Any], at: str) -> None:
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    lengths = mask.sum(1)
    right = {
        "input_ids": torch.stack([row.roll(int(n)) for row, n in zip(ids, lengths)]),
        "attention_mask": torch.stack([row.roll(int(n)) for row, n in zip(mask, lengths)]),
        "pixel_values": inputs["pixel_values"],
    }
    labels = right["input_ids"].masked_fill(right["attention_mask"] == 0, -100)
    labels[labels == IMAGE] = -100
    gone = dropped(right, 0.5, 4)
    with torch.no_grad(), attach_drop(llava, right, at, gone):
        out = llava(**right, labels=labels)
    for row in range(3):
        n = int(lengths[row] - gone[row].sum())
        one = _row(right, row)
        with torch.no_grad(), attach_drop(llava, one, at, gone[row : row + 1, : int(lengths[row])]):
            alone = llava(**one).logits[0]
        assert torch.allclose(out.logits[row, :n], alone, atol=1e-9)
    kept_labels = labels.masked_fill(gone, -100)
    losses = []
    for row in range(3):
        there = right["attention_mask"][row].bool() & ~gone[row]
        logits = out.logits[row, : int(there.sum())]
        losses.append(
            torch.nn.functional.cross_entropy(logits[:-1], kept_labels[row, there][1:], reduction="none")
        )
    counted = torch.cat(losses)
    counted = counted[counted != 0]
    assert torch.allclose(out.loss, counted.mean().to(out.loss.dtype), atol=1e-5)


def _row(inputs: dict[str, Any], row: int) -> dict[str, Any]:
    images = [(0, 2), (2, 3), (3, 3)][row]
    n = int(inputs["attention_mask"][row].sum())
    found = {k: inputs[k][row : row + 1, :n] for k in ("input_ids", "attention_mask")}
    if images[0] != images[1]:
        found["pixel_values"] = inputs["pixel_values"][images[0] : images[1]]
    return found


@pytest.mark.parametrize("at", DRIVERS)
def test_a_batch_equals_its_rows(llava: Any, inputs: dict[str, Any], at: str) -> None:
    with torch.no_grad(), attach(llava, half, at=at, target="50%"):
        together = llava(**inputs).logits[:, -1]
        for row in range(3):
            n = int(inputs["attention_mask"][row].sum())
            one = {k: inputs[k][row : row + 1, -n:] for k in ("input_ids", "attention_mask")}
            start = [0, 2, 3][row]
            if row < 2:
                one["pixel_values"] = inputs["pixel_values"][start : start + 2 - row]
            assert torch.allclose(llava(**one).logits[:, -1], together[row : row + 1], atol=1e-6)


@pytest.mark.parametrize("at", DRIVERS)
def test_a_generated_image_token_is_no_picture(llava: Any, inputs: dict[str, Any], at: str) -> None:
    """A word with the image token's number is read like another word with the same embedding."""
    model = copy.deepcopy(llava)
    with torch.no_grad():
        table = model.get_input_embeddings().weight
        table[IMAGE] = table[41]

    def forced(word: int) -> Tensor:
        def allowed(batch: int, ids: Tensor) -> list[int]:
            return [word]

        out = model.generate(
            **inputs, max_new_tokens=3, do_sample=False, prefix_allowed_tokens_fn=allowed, output_logits=True,
            return_dict_in_generate=True,
        )  # fmt: skip
        return torch.stack(out.logits)

    with attach(model, half, at=at, target="50%"):
        assert torch.equal(forced(IMAGE), forced(41))


@pytest.mark.parametrize("family", ["gemma3", "paligemma2"])
@pytest.mark.parametrize("layer", [1, 2])
def test_masks_are_made_anew_where_the_first_full_layer_is_already_shorter(family: str, layer: int) -> None:
    """transformers sizes every mask after its first full-attention layer (1 here), which has lost tokens."""
    dtype = dtype_of(family)
    model, inputs = make(family, dtype), inputs_for(family, dtype)
    gone = dropped(inputs, 0.7, 9)
    expected, reference = generate(model, family, inputs, {layer: gone}, 5)
    with attach_drop(model, inputs, f"layer:{layer}", gone):
        tokens, logits = run(model, inputs, max_new_tokens=5)
    assert torch.equal(tokens, expected) and (logits - reference).abs().max() < tolerance(family)


def test_sliding_windows_are_counted_in_original_columns_between_layers() -> None:
    model, inputs = make("gemma3"), inputs_for("gemma3")
    config = model.config.get_text_config()
    config.sliding_window = 12
    for layer in model.get_decoder().layers:
        if layer.self_attn.sliding_window is not None:
            layer.self_attn.sliding_window = 12
    gone = dropped(inputs, 0.5, 3)
    expected, reference = generate(model, "gemma3", inputs, {1: gone}, 5)
    wide = generate(make("gemma3"), "gemma3", inputs, {1: gone}, 5)[1]
    assert (wide - reference).abs().max() > 1e-3
    with attach_drop(model, inputs, "layer:1", gone):
        tokens, logits = run(model, inputs, max_new_tokens=5)
    assert torch.equal(tokens, expected) and (logits - reference).abs().max() < 1e-6
    with (
        pytest.raises(SecateurError, match="sliding window of 12"),
        attach_drop(model, inputs, "input", gone),
    ):
        run(model, inputs)
    with attach_drop(model, inputs, "input", gone, positions="compact"):
        run(model, inputs)


@pytest.mark.parametrize("at", ["input", "layer:2", "encoder:1"])
def test_eager_attention_gives_the_same(at: str) -> None:
    """Its masks are added, so a boolean one would count as 1.0."""
    model, inputs = make("llava-clip", torch.float32), inputs_for("llava-clip", torch.float32)
    select = half if at == "encoder:1" else choose(inputs, dropped(inputs, 0.5, 3))
    with attach(model, select, at=at, target="50%", scope="image"):
        expected = run(model, inputs)
    model.set_attn_implementation("eager")
    with attach(model, select, at=at, target="50%", scope="image"):
        found = run(model, inputs)
    assert torch.equal(found[0], expected[0]) and torch.allclose(found[1], expected[1], atol=1e-5)


def test_no_cache_and_chunks_work_at_the_input_and_are_refused_between_layers(
    llava: Any, inputs: dict[str, Any]
) -> None:
    others: list[dict[str, Any]] = [
        {"cache_implementation": "static"},
        {"prefill_chunk_size": 8},
        {"use_cache": False},
    ]
    # transformers before 5.23 reads padded rows wrongly in chunks, with no method attached.
    right = torch.equal(run(llava, inputs, prefill_chunk_size=8)[0], run(llava, inputs)[0])
    assert right or Version(transformers.__version__) < Version("5.23")
    with attach(llava, half, target="50%"):
        expected = run(llava, inputs)
        for more in others if right else others[::2]:
            tokens, logits = run(llava, inputs, **more)
            assert torch.equal(tokens, expected[0]) and torch.allclose(logits, expected[1], atol=1e-6)
    with attach(llava, half, at="layer:2", target="50%"):
        for more, word in zip(others[1:], ("chunks", "without a cache")):
            with pytest.raises(SecateurError, match=word):
                run(llava, inputs, **more)
        run(llava, inputs)


def test_guessed_words_are_checked_at_the_input_and_refused_between_layers(llava: Any) -> None:
    """The first forward would read prompt and guesses together, so what attends to the prompt's last word would see a guess."""
    inputs, other = inputs_for("llava-clip", rows=(2,)), copy.deepcopy(llava)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.05)
    guesses: list[dict[str, Any]] = [{"prompt_lookup_num_tokens": 2}, {"assistant_model": other}]
    with attach(llava, half, target="50%"):
        tokens, _ = run(llava, inputs, max_new_tokens=6)
        for more in guesses:
            assert torch.equal(run(llava, inputs, max_new_tokens=6, **more)[0], tokens)
    with attach(llava, "fastv", target="50%") as attached:
        run(llava, inputs, max_new_tokens=6)
        kept = copy.deepcopy(attached.kept)
        for more in guesses:
            with pytest.raises(SecateurError, match="guessed words"):
                run(llava, inputs, max_new_tokens=6, **more)
        # a way of guessing that has no name here
        with pytest.raises(SecateurError, match="guessed words"), pytest.MonkeyPatch.context() as patch:
            patch.setattr("secateur.tokens.attach.GUESSING", ())
            run(llava, inputs, max_new_tokens=6, assistant_model=other)
        run(llava, inputs, max_new_tokens=6)
        assert torch.equal(attached.kept[0][0], kept[0][0])


def mistral(**more: Any) -> Any:
    from tiny_models import TEXT, _llava, clip, fill
    from transformers import MistralConfig

    text = MistralConfig(**{**TEXT, "tie_word_embeddings": False, **more})
    return fill(_llava(clip(), text, vision_feature_layer=-2, vision_feature_select_strategy="default"))


def test_a_window_that_is_one_number_holds_for_every_layer(inputs: dict[str, Any]) -> None:
    """A Mistral's config has no list of kinds of layers. Between layers windows are counted in the columns of the prompt."""
    model, gone = mistral(sliding_window=12), dropped(inputs, 0.5, 3)
    assert getattr(model.config.get_text_config(), "layer_types", None) is None
    expected, reference = generate(model, "llava-clip", inputs, {2: gone}, 5)
    wide = generate(mistral(sliding_window=None), "llava-clip", inputs, {2: gone}, 5)[1]
    assert (wide - reference).abs().max() > 1e-3
    with attach_drop(model, inputs, "layer:2", gone):
        tokens, logits = run(model, inputs, max_new_tokens=5)
    assert torch.equal(tokens, expected) and (logits - reference).abs().max() < 1e-6
    for at in ("input", "encoder:1"):
        with (
            pytest.raises(SecateurError, match="sliding window of 12"),
            attach(model, half, at=at, target="50%", scope="image"),
        ):
            run(model, inputs)


def test_a_window_that_the_answer_grows_beyond_is_refused_however_its_length_is_said(
    inputs: dict[str, Any],
) -> None:
    from transformers import GenerationConfig

    length = inputs["input_ids"].shape[1]
    model, gone = mistral(sliding_window=length + 3), dropped(inputs, 0.5, 3)
    expected, reference = generate(model, "llava-clip", inputs, {0: gone}, 3)
    settings = {"do_sample": False, "suppress_tokens": [IMAGE, VIDEO]}
    with attach_drop(model, inputs, "input", gone):
        tokens, logits = run(model, inputs, max_new_tokens=3)
        assert torch.equal(tokens, expected) and (logits - reference).abs().max() < 1e-6
    long: list[dict[str, Any]] = [
        {"max_new_tokens": 4},
        {"max_length": length + 4},
        {"generation_config": GenerationConfig(max_new_tokens=4)},
    ]
    for more in long:
        with (
            pytest.raises(SecateurError, match="more than the sliding window"),
            attach_drop(model, inputs, "input", gone),
        ):
            model.generate(**inputs, **({} if "generation_config" in more else settings), **more)
    # by hand, step by step
    with torch.no_grad(), attach_drop(model, inputs, "input", gone):
        out = model(**inputs)
        word = torch.full((3, 1), 50)
        for _ in range(3):
            out = model(input_ids=word, past_key_values=out.past_key_values)
        with pytest.raises(SecateurError, match="more than the sliding window"):
            model(input_ids=word, past_key_values=out.past_key_values)


def test_layers_that_index_their_keys_are_refused_between_layers() -> None:
    model = make("llava-clip")
    model.config.get_text_config().layer_types = ["full_attention", "indexed_attention"] * 2
    with pytest.raises(SecateurError, match="its indexed_attention layers keep other things"):
        attach(model, half, at="layer:2", target="50%")
    assert "forward" not in vars(model)


def test_layers_that_read_the_keys_of_earlier_ones_are_refused() -> None:
    model = make("llava-clip")
    model.config.get_text_config().kv_sharing_modes = [None, "store", "reuse", "reuse"]
    with pytest.raises(SecateurError, match="its layers from 2 on read the keys"):
        attach(model, half, at="layer:2", target="50%")
    attach(model, half, at="input", target="50%").detach()


def test_chunks_of_attention_are_refused_where_they_would_be_counted_anew(inputs: dict[str, Any]) -> None:
    model = mistral(sliding_window=None)
    model.config.get_text_config().attention_chunk_size = 16
    for at in DRIVERS:
        with (
            pytest.raises(SecateurError, match="attention chunk of 16"),
            attach(model, half, at=at, target="50%"),
        ):
            run(model, inputs)


def test_compact_positions_are_those_of_the_shorter_sequence(llava: Any, inputs: dict[str, Any]) -> None:
    """Shrunk by hand: the features that stay at their place in a shorter prompt, run by the untouched model."""
    gone = dropped(inputs, 0.5, 3)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    features = torch.cat(llava.model.get_image_features(inputs["pixel_values"]).pooler_output)
    found = []
    for row in range(3):
        there = mask[row].bool() & ~gone[row]
        embeds = llava.get_input_embeddings()(ids[row])
        image = ids[row] == IMAGE
        start = int((ids[:row] == IMAGE).sum())
        embeds = embeds.masked_scatter(image[:, None], features[start : start + int(image.sum())])
        with torch.no_grad():
            found.append(llava(inputs_embeds=embeds[there][None]).logits[0, -1])
    with attach_drop(llava, inputs, "input", gone, positions="compact"):
        assert torch.allclose(run(llava, inputs)[1][0], torch.stack(found).float(), atol=1e-6)
    with attach_drop(llava, inputs, "input", gone):
        assert not torch.allclose(run(llava, inputs)[1][0], torch.stack(found).float(), atol=1e-3)


@pytest.mark.parametrize("family", ["llava-clip", "gemma3"])
def test_compact_positions_between_layers(family: str) -> None:
    """Rotary positions of the later layers count what is left, in prefill and at every step."""
    model, inputs = make(family), inputs_for(family, rows=(2,))
    gone = dropped(inputs, 0.5, 3)
    left = (~gone).long().cumsum(1) - 1
    decoder = model.get_decoder()

    def outside(layer: Any, args: Any, kwargs: Any) -> Any:
        places = torch.cat([left, left[:, -1:] + torch.arange(1, 9)], 1)[:, : args[0].shape[1]]
        more = {"layer_type": layer.self_attn.layer_type} if family == "gemma3" else {}
        return args, {**kwargs, "position_embeddings": decoder.rotary_emb(args[0], places, **more)}

    handles = [layer.register_forward_pre_hook(outside, with_kwargs=True) for layer in decoder.layers[2:]]
    expected, reference = generate(model, family, inputs, {2: gone}, 4)
    for handle in handles:
        handle.remove()
    with attach_drop(model, inputs, "layer:2", gone, positions="compact"):
        tokens, logits = run(model, inputs)
    assert torch.equal(tokens, expected) and (logits - reference).abs().max() < 1e-6


@pytest.mark.parametrize("at", DRIVERS)
def test_tokens_in_another_order_and_new_features(llava: Any, at: str) -> None:
    """Survivors' places, ascending, go to the tokens in the order they are given out."""
    inputs = inputs_for("llava-clip", rows=(1,))

    def backwards(sets: TokenSets) -> Reduction:
        return Reduction(torch.tensor([[9, 4, 2]]))

    def written(sets: TokenSets) -> Reduction:
        return Reduction(torch.tensor([[2, 4, 9]]), sets.features[:, [9, 4, 2]])

    with torch.no_grad():
        with attach(llava, backwards, at=at, target="50%") as attached:
            first = llava(**inputs).logits
        assert attached.kept[at][0].tolist() == [2, 4, 9]
        with attach(llava, written, at=at, target="50%"):
            assert torch.equal(llava(**inputs).logits, first)
        with attach(llava, lambda s: Reduction(torch.tensor([[2, 4, 9]])), at=at, target="50%"):
            assert not torch.allclose(llava(**inputs).logits, first)


def test_several_models_at_once(llava: Any, inputs: dict[str, Any]) -> None:
    other = make("gemma3")
    theirs = inputs_for("gemma3")
    with attach(llava, half, target="50%"):
        alone = run(llava, inputs)
    with attach(other, half, at="layer:2", target="50%"):
        alone_too = run(other, theirs)
    with attach(llava, half, target="50%") as a, attach(other, half, at="layer:2", target="50%") as b:
        assert torch.equal(run(llava, inputs)[1], alone[1])
        assert torch.equal(run(other, theirs)[1], alone_too[1])
        assert "input" in a.kept and "layer:2" in b.kept


def test_two_conversations_at_once_on_one_model(llava: Any, inputs: dict[str, Any]) -> None:
    """What a cache holds hangs on the cache."""
    second = inputs_for("llava-clip", rows=(1, 2, 0), seed=3)
    for at in DRIVERS:
        with torch.no_grad(), attach(llava, half, at=at, target="50%"):
            caches, separate = [], []
            for given in (inputs, second):
                out = llava(**given, past_key_values=DynamicCache(config=llava.config.get_text_config()))
                caches.append(out.past_key_values)
                separate.append(copy.deepcopy(out.past_key_values))
            word = torch.tensor([[44], [45], [46]])
            mixed = [llava(input_ids=word, past_key_values=cache).logits for cache in caches]
            for given, cache, found in zip((inputs, second), separate, mixed):
                assert torch.equal(llava(input_ids=word, past_key_values=cache).logits, found)
            assert not torch.equal(mixed[0], mixed[1])


# -- what is refused, and what is left behind --


def state(model: Any) -> tuple[Any, ...]:
    hooks = [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()]
    own = [sorted(k for k in vars(m) if k in ("forward", "generate")) for m in model.modules()]
    configs = [id(m.config) for m in model.modules() if hasattr(m, "config")]
    return hooks, own, configs


def test_an_error_inside_a_method_leaves_the_model_as_it_was(llava: Any, inputs: dict[str, Any]) -> None:
    before = state(llava)
    expected = run(llava, inputs)

    def broken(sets: TokenSets) -> Tensor:
        raise ZeroDivisionError("inside")

    for at in ("input", "layer:2", "encoder:1"):
        attached = attach(llava, broken, at=at, target="50%", records=("encoder:-2", "layer:1"))
        assert state(llava) != before
        with pytest.raises(ZeroDivisionError):
            run(llava, inputs)
        assert state(llava) == before and not attached.attached
        assert torch.equal(run(llava, inputs)[1], expected[1])
    for wrong, word in (
        (lambda s: s.valid.float(), "not a bool mask"),
        (lambda s: 3, "gave int"),
        (lambda s: Reduction(torch.zeros(len(s), 2, dtype=torch.int64)), "twice"),
        (lambda s: Reduction(torch.full((len(s), 1), 99)), "outside the sets"),
    ):
        with pytest.raises(SecateurError, match=word), attach(llava, wrong, target="50%"):
            run(llava, inputs)
        assert state(llava) == before


def test_attaching_twice_is_refused_and_detaching_twice_is_not(llava: Any, inputs: dict[str, Any]) -> None:
    before = state(llava)
    with attach(llava, half, target="50%") as attached:
        with pytest.raises(SecateurError, match="attached to this model already"):
            attach(llava, half, target="25%")
        run(llava, inputs)
        assert attached.attached
    attached.detach()
    assert state(llava) == before
    attach(llava, half, target="50%").detach()
    assert state(llava) == before


@pytest.mark.parametrize("at", DRIVERS)
def test_a_prompt_without_pictures_is_untouched(llava: Any, at: str) -> None:
    inputs = inputs_for("llava-clip", rows=(0, 0))
    tokens, logits = run(llava, inputs)
    with torch.no_grad():
        plain = llava(**inputs).logits
        with attach(llava, half, at=at, target="50%"):
            found = run(llava, inputs)
            assert torch.equal(found[0], tokens) and torch.equal(found[1], logits)
            assert torch.equal(llava(**inputs).logits, plain)


def test_targets_that_mean_nothing(llava: Any, inputs: dict[str, Any]) -> None:
    before = state(llava)
    for target, word in (("0%", "outside 0..1"), ("150%", "outside 0..1"), ("tokens=0", "0 tokens"), (None, "how many"),
                         ("params<=3", "how many"), ("many", "can't be read")):  # fmt: skip
        with pytest.raises(SecateurError, match=word):
            attach(llava, "random-tokens", target=target)
    expected = run(llava, inputs)
    with attach(llava, "random-tokens", target="tokens=999"):
        assert torch.equal(run(llava, inputs)[1], expected[1])
    assert state(llava) == before


def test_features_that_arent_numbers(llava: Any, inputs: dict[str, Any]) -> None:
    broken = inputs["pixel_values"].clone()
    broken[1, 0, 0, 0] = torch.nan
    before = state(llava)
    for at in ("input", "layer:2", "encoder:1"):
        with pytest.raises(SecateurError, match="finite"), attach(llava, half, at=at, target="50%"):
            run(llava, {**inputs, "pixel_values": broken})
        assert state(llava) == before


def test_models_and_places_that_cannot_work(llava: Any, inputs: dict[str, Any], tiny_llama: Any) -> None:
    import timm

    for model, word in (
        (tiny_llama(), "isn't a vision-language model"),
        (torch.nn.Linear(2, 2), "isn't a vision-language model"),
        (llava.model, "no language head"),
        (
            timm.create_model(
                "swin_tiny_patch4_window7_224", depths=(1, 1, 1, 1), img_size=64, window_size=2
            ),
            "windows",
        ),
        (timm.create_model("hiera_tiny_224"), "whole grid"),
    ):
        with pytest.raises(SecateurError, match=word):
            attach(model, half, target="50%")
    before = state(llava)
    for at, word in (
        ("layer:9", "outside"),
        ("encoder:9", "outside"),
        ("somewhere", "isn't a place"),
        ("layer:2:raw", "isn't a place for a stage"),
    ):
        with pytest.raises(SecateurError, match=word):
            attach(llava, half, at=at, target="50%")
    with pytest.raises(SecateurError, match="isn't a place"):
        attach(llava, half, target="50%", records=("layer:x",))
    with pytest.raises(SecateurError, match="scope"):
        attach(llava, half, target="50%", scope="planet")
    with pytest.raises(SecateurError, match="removes no visual tokens"):
        attach(llava, "wanda", target="50%")
    with pytest.raises(SecateurError, match="first 2 layers"):
        attach(make("qwen3-vl"), half, at="layer:1", target="50%")
    assert state(llava) == before
    flexible = make("llava-clip")
    flexible.model.language_model.config._attn_implementation_internal = "flex_attention"
    with pytest.raises(SecateurError, match="flex attention"):
        attach(flexible, half, at="layer:2", target="50%")


def test_inputs_that_cannot_be_shortened(llava: Any, inputs: dict[str, Any]) -> None:
    before = state(llava)
    embeds = llava.get_input_embeddings()(inputs["input_ids"])
    short = {**inputs, "pixel_values": inputs["pixel_values"][:2]}
    square = torch.ones(3, 1, 44, 44, dtype=torch.bool)
    for given, word in (
        ({"inputs_embeds": embeds, "pixel_values": inputs["pixel_values"]}, "inputs_embeds"),
        (short, "48 places for the 32 tokens"),
        ({**inputs, "attention_mask": square}, "four dimensions"),
        (
            {**inputs, "past_key_values": llava(input_ids=inputs["input_ids"][:, -3:]).past_key_values},
            "earlier turn",
        ),
    ):
        with pytest.raises(SecateurError, match=word), attach(llava, half, target="50%"):
            llava(**given)
        assert state(llava) == before


def test_an_old_transformers_is_named(llava: Any, monkeypatch: Any) -> None:
    import transformers

    monkeypatch.setattr(transformers, "__version__", "4.57.6")
    with pytest.raises(SecateurError, match=r"4\.57\.6 is too old.*5\.21"):
        attach(llava, half, target="50%")


def test_lengths_that_count_the_prompt(llava: Any, inputs: dict[str, Any]) -> None:
    prompt = inputs["input_ids"].shape[1]
    with attach(llava, half, target="50%"):
        out = llava.generate(**inputs, max_length=prompt + 3, do_sample=False)
        assert out.shape[1] == prompt + 3
        assert torch.equal(out[:, :prompt], inputs["input_ids"])
        assert torch.equal(llava.generate(inputs["input_ids"], **{k: v for k, v in inputs.items() if k != "input_ids"},
                                          max_new_tokens=3, do_sample=False), out)  # fmt: skip


def test_without_a_cache_a_stacked_family_is_given_its_tensor_at_every_step() -> None:
    model, inputs = make("internvl"), inputs_for("internvl")
    with attach(model, half, target="50%"):
        expected = run(model, inputs)
        tokens, logits = run(model, inputs, use_cache=False)
    assert torch.equal(tokens, expected[0]) and torch.allclose(logits, expected[1], atol=1e-6)


def test_a_count_is_per_image_in_every_scope(inputs: dict[str, Any]) -> None:
    """Row 0 has two images, row 1 one; of tiles an image's count is divided."""
    model = make("llava-clip")
    for scope, per_set in (("image", [5, 5, 5]), ("crop", [5, 5, 5]), ("row", [10, 5])):
        seen: list[list[int]] = []

        def look(sets: TokenSets, seen: list[list[int]] = seen) -> Tensor:
            seen.append(sets.keep.tolist())
            return sets.valid

        with torch.no_grad(), attach(model, look, target="tokens=5", scope=scope):
            model(**inputs)
        assert seen == [per_set]
    tiles, seen = make("llava-next"), []
    with torch.no_grad(), attach(tiles, look, target="tokens=9", scope="crop"):
        look.__defaults__ = (seen,)
        tiles(**inputs_for("llava-next"))
    assert [sum(seen[0][i:j]) for i, j in ((0, 3), (3, 6), (6, 11))] == [9, 9, 9]


def test_gradient_checkpointing_is_refused_between_layers(inputs: dict[str, Any]) -> None:
    model = make("llava-clip")
    model.train()
    model.gradient_checkpointing_enable()
    with attach(model, half, at="layer:2", target="50%"), pytest.raises(SecateurError, match="checkpointing"):
        model(**inputs)
    model.gradient_checkpointing_disable()
    with attach(model, half, at="layer:2", target="50%"):
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert model.get_decoder().layers[0].mlp.up_proj.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("at", DRIVERS)
def test_attention_that_is_told_only_which_keys_are_padding(at: str) -> None:
    """As flash attention is: a mask [B, keys] or none, causal by the order of what is left."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, flash_attention_mask

    def attention(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **kw: Any) -> Any:
        assert mask is None or mask.dim() == 2
        groups = q.shape[1] // k.shape[1]
        rows = []
        for b in range(len(q)):
            there = torch.ones(k.shape[2], dtype=torch.bool) if mask is None else mask[b].bool()
            mine = there[-q.shape[2] :]
            out = torch.zeros_like(q[b])
            keys, values = (t[b][:, there].repeat_interleave(groups, 0) for t in (k, v))
            n, m = int(mine.sum()), int(there.sum())
            seen = torch.arange(m) <= torch.arange(n)[:, None] + m - n
            logits = (q[b][:, mine] @ keys.transpose(-1, -2) * kw["scaling"]).masked_fill(~seen, -torch.inf)
            out[:, mine] = logits.softmax(-1) @ values
            rows.append(out.transpose(0, 1))
        return torch.stack(rows), None

    AttentionInterface.register("flash-by-hand", attention)
    AttentionMaskInterface.register("flash-by-hand", flash_attention_mask)
    model, inputs = make("llava-clip"), inputs_for("llava-clip")
    gone = dropped(inputs, 0.5, 3)
    with attach_drop(model, inputs, at, gone):
        expected = run(model, inputs)
    model.get_decoder().config._attn_implementation = "flash-by-hand"
    with attach_drop(model, inputs, at, gone):
        tokens, logits = run(model, inputs)
        first = model.generate(**inputs, max_new_tokens=2, do_sample=False, return_dict_in_generate=True)
        ids = torch.cat([first.sequences, torch.tensor([[51, 52]] * 3)], 1)
        mask = torch.cat([inputs["attention_mask"], torch.ones(3, 4).long()], 1)
        again = model.generate(
            input_ids=ids,
            attention_mask=mask,
            past_key_values=first.past_key_values,
            max_new_tokens=2,
            do_sample=False,
        )
        assert again.shape[1] == ids.shape[1] + 2
    assert torch.equal(tokens, expected[0]) and torch.allclose(logits, expected[1], atol=1e-6)


@pytest.mark.parametrize("at", [*DRIVERS, "encoder:1", "encoder:1:mlp"])
def test_bfloat16_stays_bfloat16(at: str) -> None:
    model, inputs = make("llava-clip", torch.bfloat16), inputs_for("llava-clip", torch.bfloat16)
    with torch.no_grad():
        dense = model(**inputs).logits
        with attach(model, half, at=at, target="50%", scope="crop", records=("encoder:0",)):
            out = model(**inputs)
            assert out.logits.dtype == torch.bfloat16 and torch.isfinite(out.logits[:, -1]).all()
            assert not torch.equal(out.logits[:2, -1], dense[:2, -1])
        assert torch.equal(model(**inputs).logits, dense)
