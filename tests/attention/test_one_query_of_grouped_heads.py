"""A step of one query is dense, bit for bit, also where it comes as many queries as a group of heads has.

transformers 5.24 lays a masked step out so; TRANSFORMERS_SDPA_FORCE_GQA=1, or an older release, doesn't.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import secateur
from secateur.attention.layout import Layout
from secateur.attention.method import AttentionMethod
from secateur.attention.reach import Call, Watch, groups_of

GROUP = 4


class Nothing(AttentionMethod):
    """No block is read but those on the diagonal."""

    name = "nothing"

    def levels(self, q: Tensor, k: Tensor, layout: Layout, generator: torch.Generator) -> Tensor:
        return torch.zeros(*q.shape[:2], layout.rows, layout.columns, dtype=torch.int64)


def llama(heads: int = 2 * GROUP) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": heads, "num_key_value_heads": 2, "vocab_size": 64}
    config = LlamaConfig(**sizes, initializer_range=0.3, attn_implementation="sdpa")
    return LlamaForCausalLM(config).eval()


def holes(held: int, side: str) -> Tensor:
    """[2, held] with padding in both rows (in the first at least), the step's own key at the end."""
    mask = torch.ones(2, held, dtype=torch.int64)
    if side == "left":
        mask[0, 0] = 0
    elif side == "right":  # right before the step, in both rows: padding of the prompt
        mask[:, -2] = 0
    return mask


@torch.no_grad()
@pytest.mark.parametrize("packs", [True, False])
@pytest.mark.parametrize("side", ["left", "right", "none"])
@pytest.mark.parametrize("held", [GROUP - 1, GROUP, GROUP + 1, 4 * GROUP])
def test_a_step_is_dense(held: int, side: str, packs: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRANSFORMERS_SDPA_FORCE_GQA", "0" if packs else "1")
    model, mask = llama(), holes(held, side)
    ids = torch.randint(1, 64, (2, held), generator=torch.Generator().manual_seed(1))

    def step() -> Tensor:
        cache = model(ids[:, :-1], attention_mask=mask[:, :-1]).past_key_values
        with secateur.attach(model, Nothing(block_q=2, block_k=2)) if attach else torch.no_grad() as attached:
            out = model(ids[:, -1:], attention_mask=mask, past_key_values=cache).logits
        assert not attach or attached.report["attentions"] == attached.report["too_short"] == 0
        return out

    attach = False
    before = step()
    attach = True
    assert torch.equal(step(), before)


@torch.no_grad()
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_what_is_written_behind_a_short_prompt_is_the_models(cache: str) -> None:
    """The prompt is one block; every step is dense, one of them with as many keys as a group has heads."""
    model, mask = llama(), torch.tensor([[0, 1], [1, 1]])
    ids = torch.randint(1, 64, (2, 2), generator=torch.Generator().manual_seed(1))
    more: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False}
    more |= {"pad_token_id": 0, "cache_implementation": cache}
    before = model.generate(ids, **more)
    with secateur.attach(model, Nothing(block_q=2, block_k=2)) as attached:
        assert torch.equal(model.generate(ids, **more), before)
    assert attached.report["attentions"] == 0


@torch.no_grad()
def test_a_prompt_as_long_as_a_group_is_read_less() -> None:
    model = llama()
    ids = torch.randint(1, 64, (2, GROUP), generator=torch.Generator().manual_seed(1))
    for mask in (None, torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])):
        with secateur.attach(model, Nothing(block_q=2, block_k=2)) as attached:
            model(ids, attention_mask=mask)
        assert attached.report["attentions"] > 0 and attached.report["density"] < 1


@pytest.mark.parametrize("keys", [GROUP, 9])
@pytest.mark.parametrize("layout", ["packed", "plain"])
@pytest.mark.parametrize("masked", ["no", "shared", "by head"])
def test_both_layouts_run_as_they_were(keys: int, layout: str, masked: str) -> None:
    """By hand, so that both are seen whatever release of transformers is there."""
    make = torch.Generator().manual_seed(2)
    q = torch.randn(1, 2 * GROUP, 1, 8, generator=make)
    k, v = torch.randn(2, 1, 2, keys, 8, generator=make)
    mask = None if masked == "no" else torch.arange(keys).ne(keys - 2).view(1, 1, 1, keys)
    if masked == "by head":
        mask = mask.expand(1, 2 * GROUP, 1, keys)  # type: ignore[union-attr]
    every = {"attn_mask": mask, "enable_gqa": True}
    wanted = F.scaled_dot_product_attention(q, k, v, **every)  # type: ignore[arg-type]
    asked: list[Call] = []
    with Watch(asked.append, {1, GROUP}):  # type: ignore[arg-type]
        if layout == "plain":
            found = F.scaled_dot_product_attention(q, k, v, **every)  # type: ignore[arg-type]
        else:
            own = mask if masked != "by head" else mask.reshape(1, 2, GROUP, keys)  # type: ignore[union-attr]
            found = F.scaled_dot_product_attention(q.view(1, 2, GROUP, 8), k, v, attn_mask=own)
    assert not asked
    torch.testing.assert_close(found.reshape(wanted.shape), wanted)


def test_how_many_heads_share_keys_is_read_from_the_model() -> None:
    assert groups_of(llama()) == {1, GROUP} and groups_of(torch.nn.Linear(2, 2)) == {1}
