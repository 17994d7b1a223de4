"""Static caches where tokens leave between layers: equal to the reference without cache, and steps that compile to one graph."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from reference import generate
from test_engine import Two, attach_drop, choose, dropped, run, tolerance
from test_every_token_method import METHODS, lists, settings, suits
from tiny_models import IMAGE, VIDEO, _llava, clip, fill, inputs_for, llama, make
from torch import Tensor
from transformers import CompileConfig, DynamicCache, StaticCache
from transformers.cache_utils import StaticLayer

from secateur.errors import SecateurError
from secateur.tokens.attach import attach

STATIC = {"cache_implementation": "static"}


@pytest.fixture(scope="module")
def llava() -> Any:
    return make("llava-clip")


@pytest.fixture
def inputs() -> dict[str, Any]:
    return inputs_for("llava-clip")


@pytest.fixture
def graphs() -> Iterator[list[int]]:
    """Operations of each graph that is compiled."""
    torch._dynamo.reset()
    yield []
    torch._dynamo.reset()


def counting(graphs: list[int]) -> Any:
    def backend(graph: Any, example: Any) -> Any:
        graphs.append(len(graph.graph.nodes))
        return graph.forward

    return backend


def compiled(graphs: list[int]) -> dict[str, Any]:
    """Settings of generate under which its steps are compiled, in one graph each."""
    config = CompileConfig(fullgraph=True, backend=counting(graphs), mode=None)
    config._compile_all_devices = True
    return {**STATIC, "compile_config": config}


def small() -> Any:
    """Three layers, so that compiling takes less."""
    text = llama(num_hidden_layers=3)
    return fill(_llava(clip(), text, vision_feature_layer=-2, vision_feature_select_strategy="default"))


def narrow(model: Any, window: int) -> Any:
    config = model.config.get_text_config()
    config.sliding_window = window
    for layer in model.get_decoder().layers:
        if layer.self_attn.sliding_window is not None:
            layer.self_attn.sliding_window = window
    return model


@pytest.mark.parametrize(
    ("family", "layer"),
    [("llava-clip", 1), ("qwen2.5-vl", 3), ("qwen3-vl", 2), ("gemma3", 1), ("paligemma", 2), ("idefics3", 2)],
)
def test_a_static_cache_gives_what_the_reference_gives(family: str, layer: int) -> None:
    """Three padded rows that keep different numbers."""
    model, inputs = make(family, torch.float64), inputs_for(family)
    gone = dropped(inputs, 0.6, layer)
    expected, reference = generate(model, family, inputs, {layer: gone}, 5)
    with attach_drop(model, inputs, f"layer:{layer}", gone) as attached:
        tokens, logits = run(model, inputs, max_new_tokens=5, **STATIC)
    assert torch.equal(tokens, expected) and (logits - reference).abs().max() < tolerance(family)
    bytes_ = [attached.report[when]["kv_bytes"] for when in ("before", "after")]
    assert bytes_[1] < bytes_[0]


def test_layers_behind_a_stage_have_shorter_buffers(llava: Any, inputs: dict[str, Any]) -> None:
    gone = dropped(inputs, 0.6, 1)
    left = inputs["attention_mask"].bool() & ~gone
    leave = inputs["input_ids"].shape[1] - int(left.sum(1).max())
    cache = StaticCache(config=llava.config.get_text_config(), max_cache_len=60)
    with torch.no_grad(), attach_drop(llava, inputs, "layer:2", gone):
        llava(**inputs, past_key_values=cache)
    assert leave > 5 and [layer.keys.shape[2] for layer in cache.layers] == [60, 60, 60 - leave, 60 - leave]


def test_eager_attention_whose_masks_are_added() -> None:
    model, inputs = make("llava-clip", torch.float32), inputs_for("llava-clip", torch.float32)
    gone = dropped(inputs, 0.6, 1)
    model.set_attn_implementation("eager")
    with attach_drop(model, inputs, "layer:2", gone):
        expected, found = run(model, inputs), run(model, inputs, **STATIC)
    assert torch.equal(found[0], expected[0]) and torch.allclose(found[1], expected[1], atol=1e-5)


@pytest.mark.parametrize("positions", ["original", "compact"])
def test_windows_that_are_shorter_than_the_prompt(positions: str) -> None:
    model, inputs = narrow(make("gemma3"), 12), inputs_for("gemma3")
    gone = dropped(inputs, 0.5, 3)
    with attach_drop(model, inputs, "layer:1", gone, positions=positions):
        expected, reference = run(model, inputs, max_new_tokens=6)
        tokens, logits = run(model, inputs, max_new_tokens=6, **STATIC)
    assert torch.equal(tokens, expected) and (logits - reference).abs().max() < 1e-6
    if positions == "original":
        assert torch.equal(tokens, generate(model, "gemma3", inputs, {1: gone}, 6)[0])


def test_steps_compile_to_one_graph(graphs: list[int]) -> None:
    """One stage at the input and one behind it, with compact positions; compiled before, while and after the method is attached."""
    model, inputs = small(), inputs_for("llava-clip")
    gone = dropped(inputs, 0.4, 3)
    both = Two(
        choose(inputs, gone), choose(inputs, dropped(inputs, 0.4, 4, gone)), ("input", "layer:1"), positions="compact"
    )  # fmt: skip
    settings = compiled(graphs)
    dense = run(model, inputs, **settings)
    assert len(graphs) == 1
    with attach(model, both, target="50%") as attached:
        expected, reference = run(model, inputs)
        for _ in range(2):
            tokens, logits = run(model, inputs, **settings)
            assert torch.equal(tokens, expected) and (logits - reference).abs().max() < 1e-6
        assert len(graphs) == 2 and attached.report["seconds_per_token"] > 0
    assert not torch.equal(reference, dense[1])
    again = run(model, inputs, **settings)
    assert torch.equal(again[0], dense[0]) and torch.equal(again[1], dense[1]) and len(graphs) == 2


def test_sliding_layers_compile_too(graphs: list[int]) -> None:
    """transformers counts their tokens in Python, which gives a second graph, without a method as well."""
    model, inputs = narrow(make("gemma3"), 12), inputs_for("gemma3")
    model.get_decoder().layers = model.get_decoder().layers[:3]
    model.config.get_text_config().num_hidden_layers = 3
    gone = dropped(inputs, 0.6, 3)
    with attach_drop(model, inputs, "layer:1", gone):
        expected, reference = run(model, inputs)
        tokens, logits = run(model, inputs, **compiled(graphs))
    assert torch.equal(tokens, expected) and (logits - reference).abs().max() < 1e-6
    assert len(graphs) == 2


def steps(model: Any, given: dict[str, Any], cache: Any, forward: Any) -> list[Tensor]:
    """Logits after a prompt, and of three words after it, by hand."""
    out = model(**given, past_key_values=cache)
    found = [out.logits[:, -1]]
    for word in (50, 51, 52):
        out = forward(input_ids=torch.tensor([[word]]), past_key_values=cache)
        found.append(out.logits[:, -1])
    return found


def test_a_step_that_is_compiled_by_hand(graphs: list[int]) -> None:
    model, inputs = small(), inputs_for("llava-clip", rows=(1,))
    config = model.config.get_text_config()
    with torch.no_grad(), attach(model, "fastv", target="25%"):
        expected = steps(model, inputs, DynamicCache(config=config), model)
        step = torch.compile(model, backend=counting(graphs), fullgraph=True)
        found = steps(model, inputs, StaticCache(config=config, max_cache_len=64), step)
    for a, b in zip(expected, found, strict=True):
        assert torch.allclose(a, b, atol=1e-6)
    assert len(graphs) == 1


@pytest.mark.parametrize("at", ["input", "layer:2"])
def test_a_cache_that_is_reset_forgets_the_pictures(llava: Any, at: str) -> None:
    def half(sets: Any) -> Tensor:
        return sets.index % 2 == 0

    one, other = inputs_for("llava-clip", rows=(1,)), inputs_for("llava-clip", rows=(2,), seed=1)
    config = llava.config.get_text_config()
    static = StaticCache(config=config, max_cache_len=64)
    words = {"input_ids": torch.arange(40, 80)[None]}
    with torch.no_grad(), attach(llava, half, at=at, target="50%"):
        for given in (one, other, words, one):
            static.reset()
            expected = steps(llava, given, DynamicCache(config=config), llava)
            for a, b in zip(expected, steps(llava, given, static, llava), strict=True):
                assert torch.allclose(a, b, atol=1e-6)
        out = llava.generate(**words, max_new_tokens=3, do_sample=False)
        static.reset()
        assert torch.equal(
            llava.generate(**words, max_new_tokens=3, do_sample=False, past_key_values=static), out
        )
        static.reset()
        # a compiled step must not ask whether there is anything in the cache, so the answer is in its masks
        llava(**one, past_key_values=static)
        static.reset()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.compiler, "is_compiling", lambda: True)
            short = {"input_ids": torch.arange(40, 50)[None]}
            found = steps(llava, short, static, llava)
        for a, b in zip(steps(llava, short, DynamicCache(config=config), llava), found, strict=True):
            assert torch.allclose(a, b, atol=1e-6)


def test_more_turns_beams_and_crops(llava: Any, inputs: dict[str, Any]) -> None:
    """A second turn whose rows are padded, on the cache of the first."""
    gone = dropped(inputs, 0.5, 2)
    settings = {"max_new_tokens": 3, "do_sample": False, "suppress_tokens": [IMAGE, VIDEO]}
    found = []
    config = llava.config.get_text_config()
    with attach_drop(llava, inputs, "layer:2", gone):
        for cache in (DynamicCache(config=config), StaticCache(config=config, max_cache_len=90)):
            first = llava.generate(**inputs, **settings, past_key_values=cache)
            ids = torch.cat([first, torch.tensor([[0, 0, 51], [0, 52, 53], [54, 55, 56]])], 1)
            ones = torch.ones(3, 3).long()
            mask = torch.cat(
                [inputs["attention_mask"], ones, torch.tensor([[0, 0, 1], [0, 1, 1], [1, 1, 1]])], 1
            )
            second = llava.generate(
                input_ids=ids, attention_mask=mask, past_key_values=cache, **settings, output_logits=True,
                return_dict_in_generate=True,
            )  # fmt: skip
            mask = torch.cat([mask, torch.ones(3, 1).long()], 1)
            if hasattr(StaticLayer, "crop"):  # not in transformers 5.21
                cache.crop(-2)
            else:
                mask = torch.cat([mask, torch.ones(3, 2).long()], 1)
            with torch.no_grad():
                out = llava(input_ids=torch.full((3, 1), 60), attention_mask=mask, past_key_values=cache)
            found.append((second.sequences, torch.stack(second.logits), out.logits))
        beams = [
            llava.generate(**inputs, **settings, num_beams=3, **more, output_scores=True, return_dict_in_generate=True)
            for more in ({}, STATIC)
        ]  # fmt: skip
    (ids, logits, last), (static_ids, static_logits, static_last) = found
    assert torch.equal(ids, static_ids) and torch.allclose(logits, static_logits, atol=1e-6)
    assert torch.allclose(last, static_last, atol=1e-6)
    assert torch.equal(beams[0].sequences, beams[1].sequences)
    assert torch.allclose(beams[0].sequences_scores, beams[1].sequences_scores, atol=1e-6)


@pytest.mark.parametrize("family", ["llava-clip", "qwen2.5-vl"])
def test_every_method_reads_and_keeps_the_same_with_a_static_cache(family: str) -> None:
    """Attention gives the whole buffer then, of which only the prompt was there."""
    model, inputs = make(family), inputs_for(family)
    tried = []
    for method in METHODS:
        more = settings(model, method)
        if not suits(family, method):
            continue
        found = []
        for cache in ({}, STATIC):
            with attach(model, method, target="50%", **more) as attached:
                if attached.setup.warm_up and cache:
                    with pytest.raises(SecateurError, match="isn't read off a static cache"):
                        run(model, inputs, max_new_tokens=2, **cache)
                elif any(placed.stage.parks for placed in attached.setup.stages) and cache:
                    with pytest.raises(SecateurError, match="need room again"):
                        run(model, inputs, max_new_tokens=2, **cache)
                elif attached.setup.in_decoder:
                    found.append((*run(model, inputs, max_new_tokens=2, **cache), lists(attached.kept)))
        for (words, logits, kept), (static_words, static_logits, static_kept) in itertools.pairwise(found):
            tried.append(method)
            assert kept == static_kept and torch.equal(words, static_words), method
            assert torch.allclose(logits, static_logits, atol=1e-6), method
    assert len(tried) >= 5


def test_what_is_refused_of_caches_between_layers(llava: Any, inputs: dict[str, Any]) -> None:
    def refused(word: str, **more: Any) -> None:
        with attach(llava, "fastv", target="50%"), pytest.raises(SecateurError, match=word):
            run(llava, inputs, **more)

    refused("that is offloaded wasn't tried", cache_implementation="offloaded")
    refused("that is quantized wasn't tried", cache_implementation="quantized")
    cache = StaticCache(config=llava.config.get_text_config(), max_cache_len=90)
    with torch.no_grad(), attach(llava, "fastv", target="50%"):
        llava(**inputs, past_key_values=cache)
        for mask, word in (
            (torch.ones(3, 1, 1, 90).bool(), "four dimensions"),
            (torch.ones(3, 1).long(), "whole conversation"),
        ):
            with pytest.raises(SecateurError, match=word):
                llava(
                    input_ids=torch.full((3, 1), 50),
                    past_key_values=copy.deepcopy(cache),
                    attention_mask=mask,
                )
