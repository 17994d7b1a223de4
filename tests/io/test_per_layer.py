"""The config that transformers reads layer by layer, beside the loader of a model whose layers differ."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import secateur
from secateur.graph import trace
from secateur.io.artefact import save_model
from secateur.surgery import cut_units

IDS = torch.arange(12)[None]


@pytest.fixture
def uneven(tiny_llama: Callable[..., Any]) -> Any:
    """Layers of 48, 48 and 11 neurons, of 4, 2 and 4 key-value heads with two queries each."""
    model = tiny_llama(num_hidden_layers=3, num_attention_heads=8, num_key_value_heads=4)
    graph = trace(model, {"input_ids": IDS})
    keep = {
        "model.layers.1.self_attn:kv_groups": torch.tensor([0, 2]),
        "model.layers.2.mlp:neurons": torch.arange(11),
    }
    cut_units(model, graph, keep)
    return model


def test_every_layer_that_differs_is_said(uneven: Any, tmp_path: Path) -> None:
    about = save_model(uneven, tmp_path / "out")
    assert about["form"] == "custom" and about["per_layer_config"] == "per_layer/config.json"
    document = json.loads((tmp_path / "out/per_layer/config.json").read_text())
    assert document["model_type"] == "llama" and document["architectures"] == ["LlamaForCausalLM"]
    assert document["per_layer_config"] == {
        "1": {"num_attention_heads": 4, "num_key_value_heads": 2},
        "2": {"intermediate_size": 11},
    }
    loaded, _ = secateur.load(tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(loaded(IDS).logits, uneven(IDS).logits)


def test_transformers_reads_it_and_builds_each_layer(uneven: Any, tmp_path: Path) -> None:
    save_model(uneven, tmp_path / "out")
    config = AutoConfig.from_pretrained(tmp_path / "out/per_layer")
    if not hasattr(config, "is_heterogeneous"):
        pytest.skip("transformers before 5.24 has no per_layer_config")
    assert config.is_heterogeneous and config.per_layer_attributes == {
        "intermediate_size",
        "num_attention_heads",
        "num_key_value_heads",
    }
    for place, layer in enumerate(uneven.model.layers):
        own = type(layer)(config.per_layer_config[place], place)
        assert {n: p.shape for n, p in own.named_parameters()} == {
            n: p.shape for n, p in layer.named_parameters()
        }


@pytest.mark.xfail(
    strict=True, reason="transformers reads per_layer_config and doesn't build layers by it yet"
)
def test_transformers_loads_it_without_code_of_ours(uneven: Any, tmp_path: Path) -> None:
    """When this passes, the folder needs no loader any more: make plain folders of it."""
    save_model(uneven, tmp_path / "out")
    config = AutoConfig.from_pretrained(tmp_path / "out/per_layer")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", config=config)
    with torch.no_grad():
        assert torch.equal(loaded(IDS).logits, uneven(IDS).logits)


def test_layers_that_left_and_what_no_config_says(tiny_llama: Callable[..., Any], tmp_path: Path) -> None:
    model = tiny_llama(num_hidden_layers=4)
    pruned = secateur.prune(model, method="group-magnitude", kinds=("layers",), target="75%")
    graph = trace(pruned.model, {"input_ids": IDS})
    cut_units(pruned.model, graph, {"model.layers.0.mlp:neurons": torch.arange(20)})
    save_model(pruned.model, tmp_path / "out")
    document = json.loads((tmp_path / "out/per_layer/config.json").read_text())
    assert document["num_hidden_layers"] == 3 and document["per_layer_config"] == {
        "0": {"intermediate_size": 20}
    }
    odd = tiny_llama()
    odd.model.layers[0].mlp.up_proj.bias = torch.nn.Parameter(torch.ones(48))
    about = save_model(odd, tmp_path / "odd")
    assert about["per_layer_config"] == "no fields of the config build layer 0"
    assert not (tmp_path / "odd/per_layer").exists()
