"""Expected numbers are worked out by hand from the layers' shapes."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_model
from torch import nn

from secateur.errors import SecateurError
from secateur.measure import (
    decode_latency,
    latencies,
    latency,
    macs,
    params,
    params_nonzero,
    peak_memory,
    size_bytes,
)


def tied() -> nn.Module:
    model = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 10, bias=False))
    model[1].weight = model[0].weight
    return model


def test_a_tied_tensor_counts_once() -> None:
    model = tied()
    with torch.no_grad():
        model[0].weight.fill_(1)[0] = 0
    assert params(model) == 40
    assert params_nonzero(model) == 36
    assert size_bytes(model) == 160
    assert size_bytes(model.bfloat16()) == 80


def test_size_counts_persistent_buffers_and_agrees_with_the_file(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    assert size_bytes(model) == 4 * (8 * 3 * 9 + 8 + 4 * 8) + 8
    save_model(model, str(tmp_path / "m.safetensors"))
    assert size_bytes(model) < size_bytes(tmp_path) < size_bytes(model) + 1024
    assert size_bytes(tmp_path / "m.safetensors") == (tmp_path / "m.safetensors").stat().st_size
    with pytest.raises(SecateurError, match="no such file"):
        size_bytes(tmp_path / "gone")


class Attention(nn.Module):
    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] != k.shape[1])


def ones(*shape: int) -> torch.Tensor:
    return torch.ones(*shape)


@pytest.mark.parametrize(
    ("model", "inputs", "expected"),
    [
        (nn.Linear(3, 4), ones(2, 3), 2 * 3 * 4),
        (nn.Conv2d(4, 8, 3, groups=2, padding=1), {"input": ones(1, 4, 5, 5)}, 25 * 8 * 2 * 9),
        (nn.ConvTranspose2d(4, 8, 2, stride=2), ones(1, 4, 5, 5), 25 * 4 * 8 * 4),
        (Attention(), (ones(2, 4, 5, 8), ones(2, 4, 7, 8), ones(2, 4, 7, 6)), 2 * 4 * 5 * 7 * (8 + 6)),
        (Attention(), (ones(2, 4, 5, 8), ones(2, 2, 7, 8), ones(2, 2, 7, 8)), 2 * 4 * 5 * 7 * 16),
        (nn.MultiheadAttention(8, 2, batch_first=True), (ones(1, 5, 8),) * 3, 4 * 5 * 64 + 2 * 5 * 5 * 8),
        (
            nn.TransformerEncoderLayer(8, 2, 16, batch_first=True),
            ones(1, 5, 8),
            4 * 5 * 64 + 2 * 5 * 5 * 8 + 2 * 5 * 8 * 16,
        ),
        (nn.LSTM(4, 6), ones(3, 1, 4), 3 * 4 * 6 * (4 + 6)),
        (nn.GRU(4, 6), ones(3, 1, 4), 3 * 3 * 6 * (4 + 6)),
    ],
)
def test_macs_by_hand(model: nn.Module, inputs: object, expected: int) -> None:
    assert macs(model, inputs) == expected
    assert model.training, "the model's mode is given back"


@pytest.mark.parametrize("gqa", [True, False])
def test_macs_of_a_llama(tiny_llama: Callable[..., nn.Module], gqa: bool) -> None:
    length, kv = 6, 16 if gqa else 32
    a_layer = length * (2 * 32 * 32 + 2 * 32 * kv + 3 * 32 * 48) + 2 * length * length * 32
    expected = 2 * a_layer + length * 32 * 64
    assert macs(tiny_llama(gqa=gqa), {"input_ids": torch.zeros(1, length, dtype=torch.long)}) == expected


def test_macs_of_a_mixture_count_the_chosen_experts_only() -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=2,
    )
    length = 7
    attention = length * (2 * 32 * 32 + 2 * 32 * 16) + 2 * length * length * 32
    experts = length * 32 * 4 + length * 2 * 3 * 32 * 48
    expected = attention + experts + length * 32 * 64
    model = MixtralForCausalLM(config).eval()
    assert macs(model, {"input_ids": torch.zeros(1, length, dtype=torch.long)}) == expected


def test_peak_memory_is_weights_and_what_lives_at_once() -> None:
    model = nn.Sequential(nn.Linear(256, 1024), nn.ReLU(), nn.Linear(1024, 256), nn.Linear(256, 8))
    two_wide_activations = 2 * 128 * 1024 * 4
    assert peak_memory(model, torch.ones(128, 256)) == 4 * params(model) + two_wide_activations
    assert peak_memory(tied(), torch.zeros(1, dtype=torch.long)) == 160 + 4 * (4 + 10)


def test_latency_runs_the_model_as_often_as_said() -> None:
    calls = []
    model = nn.Linear(2, 2)
    model.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    assert latency(model, torch.ones(1, 2), repeats=3, warmup=2) > 0
    assert calls == [False] * 5
    with pytest.raises(SecateurError, match="repeats"):
        latency(model, torch.ones(1, 2), repeats=0)


def test_two_models_run_in_turn(tiny_llama: Callable[..., nn.Module]) -> None:
    order: list[str] = []
    models = {"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)}
    for name, model in models.items():
        model.register_forward_hook(lambda *_, name=name: order.append(name))
    (first, _), speed, why = latencies(list(models.values()), torch.ones(1, 2))
    assert "".join(order) == "ab" * (len(order) // 2) and len(order) >= 2 * (2 + 9)
    assert first["quartiles"]["forward_seconds"][0] <= first["forward_seconds"]
    assert speed["forward_seconds"]["pairs"] == len(order) // 2 - 2 and not why
    _, speed, _ = latencies([tiny_llama(), tiny_llama()], {"input_ids": torch.ones(1, 5).long()})
    assert (
        set(speed) == {"forward_seconds", "decode_seconds_per_token"}
        and speed["decode_seconds_per_token"]["pairs"] == 16
    )


def test_decoding_feeds_one_token_at_a_time(tiny_llama: Callable[..., nn.Module]) -> None:
    model, lengths = tiny_llama(), []
    model.model.embed_tokens.register_forward_hook(lambda _, args, out: lengths.append(out.shape[1]))
    assert decode_latency(model, torch.zeros(1, 5, dtype=torch.long), steps=3, warmup=1) > 0
    assert lengths == [5, 1, 1, 1, 1]


@pytest.mark.parametrize(
    "name", ["resnet50", "mobilenet_v2", "shufflenet_v2_x1_0", "vit_b_16", "convnext_tiny"]
)
def test_macs_and_params_are_those_that_torchvision_publishes(name: str) -> None:
    from torchvision.models import get_model, get_model_weights

    with torch.device("meta"):
        model, picture = get_model(name), torch.ones(1, 3, 224, 224)
    published = get_model_weights(name).IMAGENET1K_V1.meta
    assert params(model) == published["num_params"]
    assert macs(model, picture) == pytest.approx(published["_ops"] * 1e9, abs=0.5e6 + 0.001e9)


def test_a_parameter_that_is_handed_to_a_module() -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.token, self.layer = nn.Parameter(torch.ones(1, 3)), nn.Linear(3, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(x) + self.layer(self.token)

    assert macs(Tokens(), torch.ones(2, 3)) == 2 * 3 * 4 + 3 * 4
