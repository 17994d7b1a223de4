"""Rows of a padded batch read what they read alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

import secateur

SMALL: dict[str, Any] = {"block_q": 16, "block_k": 16, "stride": 4, "density": "50%"}
LENGTHS = (70, 50, 33, 9)  # the last one is no longer than a block


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 64,
        "initializer_range": 0.3,
        "attn_implementation": "sdpa",
    }
    return LlamaForCausalLM(LlamaConfig(**sizes)).eval()


def bert() -> BertModel:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    sizes |= {
        "num_attention_heads": 4,
        "vocab_size": 64,
        "initializer_range": 0.3,
        "attn_implementation": "sdpa",
    }
    return BertModel(BertConfig(**sizes)).eval()


def batch(side: str, width: int) -> tuple[list[Tensor], Tensor, Tensor]:
    make = torch.Generator().manual_seed(1)
    alone = [torch.randint(1, 64, (1, length), generator=make) for length in LENGTHS]
    pads = [(width - length, 0) if side == "left" else (0, width - length) for length in LENGTHS]
    together = torch.cat([nn.functional.pad(row, pad) for row, pad in zip(alone, pads, strict=True)])
    mask = torch.cat(
        [nn.functional.pad(torch.ones_like(row), pad) for row, pad in zip(alone, pads, strict=True)]
    )
    return alone, together, mask


@torch.no_grad()
@pytest.mark.parametrize("width", [70, 83])  # also where every row is padded
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("estimate", ["antidiagonal", "sampled"])
def test_a_decoders_batch_equals_its_rows(estimate: str, side: str, width: int) -> None:
    model, (alone, together, mask) = llama(), batch(side, width)
    places = mask.cumsum(1).sub(1).clamp(min=0)
    with secateur.attach(model, "psa", estimate=estimate, **SMALL) as attached:
        both = model(together, attention_mask=mask, position_ids=places).logits
        assert attached.report["density"] < 0.75
        for row, ids in enumerate(alone):
            wanted = model(ids).logits[0]
            torch.testing.assert_close(both[row][mask[row] == 1], wanted, atol=1e-5, rtol=1e-5)
    plain = model(together, attention_mask=mask, position_ids=places).logits
    assert (both - plain)[0][mask[0] == 1].abs().max() > 0.01  # it did read less


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_an_encoders_batch_equals_its_rows(side: str) -> None:
    model, (alone, together, mask) = bert(), batch(side, 70)
    places = mask.cumsum(1).sub(1).clamp(min=0)
    with secateur.attach(model, "psa", **SMALL) as attached:
        both = model(together, attention_mask=mask, position_ids=places).last_hidden_state
        assert attached.report["density"] < 0.75
        for row, ids in enumerate(alone):
            wanted = model(ids).last_hidden_state[0]
            torch.testing.assert_close(both[row][mask[row] == 1], wanted, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_left_padded_batch_writes_what_its_rows_write() -> None:
    model, (alone, together, mask) = llama(), batch("left", 70)
    more: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    with secateur.attach(model, "psa", **SMALL):
        both = model.generate(together, attention_mask=mask, **more)[:, 70:]
        for row, ids in enumerate(alone):
            wanted = model.generate(ids, attention_mask=torch.ones_like(ids), **more)[0, ids.shape[1] :]
            assert torch.equal(both[row], wanted)


@torch.no_grad()
def test_whole_levels_leave_a_padded_batch_bit_for_bit() -> None:
    model, (_, together, mask) = llama(), batch("left", 70)
    before = model(together, attention_mask=mask).logits
    with secateur.attach(model, "psa", **{**SMALL, "density": "", "ends": (1.0, 1.0, 1.0, 1.0)}):
        assert torch.equal(model(together, attention_mask=mask).logits, before)
