"""Both names of the cache are met, and a peek never writes into it."""

import inspect
from types import SimpleNamespace

import pytest
import torch
import transformers
from transformers.cache_utils import DynamicCache

from secateur.measure import decode_latency
from secateur.utils import versions as compat


def old(hidden_states, past_key_values=None, use_cache=None):
    return hidden_states


def new(hidden_states, cache=None, use_cache=None):
    return hidden_states


@pytest.mark.parametrize("forward, name", [(old, "past_key_values"), (new, "cache"), (lambda x: x, None)])
def test_the_name_is_read_off_the_signature(forward, name):
    assert compat.cache_name(forward) == name


@pytest.mark.parametrize("name", ["past_key_values", "cache", "a_name_of_next_year"])
def test_a_cache_is_found_by_its_type_and_taken_out(name):
    cache = DynamicCache()
    given = {"attention_mask": torch.ones(1, 2), name: cache, "use_cache": True}
    assert compat.cache_in(given) is cache
    bare = compat.without_cache(given)
    assert bare[name] is None and bare["use_cache"] is False
    assert given[name] is cache and given["use_cache"] is True
    assert compat.without_cache({"x": 1}) == {"x": 1}


@pytest.mark.parametrize("name", ["past_key_values", "cache"])
def test_the_cache_of_an_output(name):
    assert compat.cache_of(SimpleNamespace(**{name: (1, 2)})) == (1, 2)
    assert compat.cache_of(SimpleNamespace(logits=0)) is None
    assert compat.cache_of(SimpleNamespace(**{name: None})) is None


@pytest.mark.parametrize("name", ["past_key_values", "cache"])
def test_a_token_is_timed_under_both_names(tiny_llama, name):
    """A model of the other release: its forward has the other name, its output too."""
    model = tiny_llama()
    inner, real = model.forward, compat.cache_name(model.forward)
    if name == "cache":

        def forward(input_ids, cache=None, use_cache=None):
            out = inner(input_ids, **{real: cache}, use_cache=use_cache)
            return SimpleNamespace(logits=out.logits, cache=compat.cache_of(out))
    else:

        def forward(input_ids, past_key_values=None, use_cache=None):
            out = inner(input_ids, **{real: past_key_values}, use_cache=use_cache)
            return SimpleNamespace(logits=out.logits, past_key_values=compat.cache_of(out))

    seen = []
    model.forward = forward
    model.register_forward_hook(lambda *call: seen.append(call[2]), always_call=True)
    assert decode_latency(model, torch.arange(8)[None], steps=2, warmup=1) > 0
    assert compat.cache_of(seen[-1]).get_seq_length() == 8 + 3


def test_layers_and_models_of_this_transformers_call_it_alike():
    """What the engine relies on: one name from the model down to the layer."""
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaModel

    names = {
        compat.cache_name(cls.forward)
        for cls in (LlamaDecoderLayer, LlamaModel, transformers.LlamaForCausalLM)
    }
    assert len(names) == 1 and None not in names, inspect.signature(LlamaDecoderLayer.forward)
