"""Attention methods on unmodified models: what is reached, what masks say, what is refused."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import secateur
from secateur.attention.estimate import antidiagonal, sampled
from secateur.attention.layout import Layout
from secateur.attention.levels import stretched
from secateur.attention.method import AttentionMethod
from secateur.attention.reach import read_mask
from secateur.errors import SecateurError
from secateur.methods.psa import PSA
from secateur.testing import inputs_for, tiny_llava

SMALL: dict[str, Any] = {"block_q": 16, "block_k": 16, "stride": 4}


def llama(**more: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    sizes |= {"num_key_value_heads": 2, "vocab_size": 64, "attn_implementation": "sdpa", **more}
    config = LlamaConfig(**sizes)
    return LlamaForCausalLM(config).eval()


def ids(rows: int = 2, length: int = 70) -> Tensor:
    return torch.randint(1, 64, (rows, length), generator=torch.Generator().manual_seed(1))


class Whole(AttentionMethod):
    """Every block that may be read is read whole."""

    name = "whole"

    def levels(self, q: Tensor, k: Tensor, layout: Layout, generator: torch.Generator) -> Tensor:
        return torch.ones(*q.shape[:2], layout.rows, layout.columns, dtype=torch.int64)


class Local(Whole):
    """The blocks on the diagonal alone."""

    name = "local"

    def levels(self, q: Tensor, k: Tensor, layout: Layout, generator: torch.Generator) -> Tensor:
        return torch.zeros(*q.shape[:2], layout.rows, layout.columns, dtype=torch.int64)


@torch.no_grad()
def test_all_levels_one_is_the_model_bit_for_bit() -> None:
    model = llama()
    before = model(ids()).logits
    with secateur.attach(model, Whole(block_q=16, block_k=16)) as attached:
        assert torch.equal(model(ids()).logits, before)
    assert attached.report["density"] == 1 and attached.report["attentions"] == 2


@torch.no_grad()
def test_padded_rows_give_what_they_give_alone() -> None:
    model, short = llama(), ids(1, 50)
    padded = torch.cat([torch.zeros(1, 16, dtype=torch.int64), short], 1)  # a whole block of padding
    both = torch.cat([padded, ids(1, 66)])
    mask = (torch.arange(66) >= torch.tensor([[16], [0]])).long()
    with secateur.attach(model, Local(block_q=16, block_k=16)):
        together = model(both, attention_mask=mask, position_ids=mask.cumsum(1).sub(1).clamp(min=0)).logits
        alone = model(short).logits
    torch.testing.assert_close(together[:1, 16:], alone, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_each_block_of_queries_reads_its_own_block() -> None:
    model = llama(num_hidden_layers=1)
    tokens = ids(1, 64)
    with secateur.attach(model, Local(block_q=16, block_k=16)) as attached:
        read = model(tokens).logits
    for start in range(0, 64, 16):
        own = slice(start, start + 16)
        alone = model(tokens[:, own], position_ids=torch.arange(64)[None, own]).logits
        torch.testing.assert_close(read[:, own], alone, atol=1e-5, rtol=1e-5)
    assert attached.report["density"] == pytest.approx(4 / 10)


@torch.no_grad()
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generate_reads_less_of_the_prompt_and_all_of_what_is_written(cache: str) -> None:
    model = llama()
    with secateur.attach(model, "psa", density="50%", **SMALL) as attached:
        out = model.generate(ids(), max_new_tokens=4, do_sample=False, cache_implementation=cache)
        first = model(ids()).logits[:, -1].argmax(-1)
    assert out.shape == (2, 74) and torch.equal(out[:, 70], first)
    assert (
        attached.report["attentions"] == 2 * 2
    )  # two layers, two prompts; steps of one query run as they are


@torch.no_grad()
@pytest.mark.parametrize("ahead", [32, 33])
def test_a_prompt_behind_a_cache(ahead: int) -> None:
    """With every block read as means of one key it is the model; where pieces don't fit the keys ahead, positions are sampled."""
    model, tokens = llama(initializer_range=0.3), ids(1, 90)
    whole = model(tokens).logits[:, ahead:]
    for density, close in (("100%", True), ("40%", False)):
        cache = model(tokens[:, :ahead]).past_key_values
        with secateur.attach(model, "psa", **{**SMALL, "density": density}) as attached:
            out = model(tokens[:, ahead:], past_key_values=cache).logits
        assert out.isfinite().all() and torch.allclose(out, whole, atol=1e-4) is close
        assert attached.report["attentions"] == 2


@torch.no_grad()
def test_short_prompts_are_dense_and_said_to_be() -> None:
    model = llama()
    before = model(ids(1, 16)).logits
    with secateur.attach(model, "psa", **SMALL) as attached:
        assert torch.equal(model(ids(1, 16)).logits, before)
    assert attached.report == {**attached.report, "density": 1.0, "attentions": 0, "too_short": 2}


@torch.no_grad()
def test_vision_transformers_and_parts() -> None:
    timm = pytest.importorskip("timm")
    model = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=2).eval()
    picture = torch.randn(1, 3, 64, 64)
    before = model(picture)
    with secateur.attach(model, "psa", density="40%", block_q=8, block_k=8) as attached:
        assert not torch.equal(model(picture), before) and attached.report["density"] < 0.6
    with secateur.attach(model, "psa", part="blocks.1.attn", density="40%", block_q=8, block_k=8) as attached:
        model(picture)
        assert attached.report["attentions"] == 1
    assert torch.equal(model(picture), before)


@torch.no_grad()
def test_gradients_reach_the_weights() -> None:
    model = llama()
    with torch.enable_grad(), secateur.attach(model, "psa", density="50%", **SMALL):
        model(ids(), labels=ids()).loss.backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())


def test_masks_say_what_they_are() -> None:
    causal = torch.ones(6, 6, dtype=torch.bool).tril()
    real, is_causal = read_mask(causal.expand(2, 1, 6, 6), 6, 6)
    assert is_causal and bool(real.all())
    padded = causal & (torch.arange(6) >= 2)
    padded[:2] = True  # rows of padding hold anything
    real, is_causal = read_mask(torch.where(padded, 0.0, torch.finfo(torch.float32).min)[None, None], 6, 6)
    assert is_causal and real.tolist() == [[False, False, True, True, True, True]]
    assert read_mask(torch.ones(1, 1, 6, 6, dtype=torch.bool), 6, 6)[1] is False
    held = torch.zeros(
        1, 1, 3, 8, dtype=torch.bool
    )  # three queries behind two keys, in a static cache of eight
    held[0, 0] = torch.arange(8) <= torch.arange(3)[:, None] + 2
    real, is_causal = read_mask(held, 3, 8)
    assert is_causal and real.tolist() == [[True] * 5 + [False] * 3]


@pytest.mark.parametrize(
    ("mask", "match"),
    [
        (torch.ones(8, 8, dtype=torch.bool).tril() & ~torch.ones(8, 8, dtype=torch.bool).tril(-3), "windows"),
        (-torch.arange(64.0).view(8, 8) / 64, "adds a bias"),
        (torch.stack([torch.ones(8, 8).tril(), torch.ones(8, 8)]).bool()[None], "for all heads"),
    ],
)
def test_masks_that_are_not_known_are_refused(mask: Tensor, match: str) -> None:
    with pytest.raises(SecateurError, match=match):
        read_mask(mask, 8, 8)


def test_what_cannot_be_attached_is_named_and_leaves_the_model() -> None:
    model = llama()
    for settings, match in (
        ({"ends": (0.5, 0.4, 0.6, 0.7)}, "can't end at"),
        ({"density": "2:4"}, "needs a share"),
        ({"mask": "sometimes"}, "sometimes"),
        ({"target": "25%"}, "no use for it"),
        ({"part": "nowhere"}, "no module 'nowhere'"),
        ({"density": "50%", "mask": "energybound"}, "as much as the scores ask"),
        ({"ends": (0.1, float("nan"), 0.6, 0.7)}, "can't end at"),
        ({"mask": "thresholdbound", "ends": (0.7, 0.6, 0.8, 0.9)}, "can't end at"),
        ({"alike": (0.7, 0.6)}, "mean cosines"),
        ({"alike": (0.7, 0.6, float("nan"))}, "mean cosines"),
        ({"ends": (0.5, 0.4, 0.6, 0.7), "density": "100%"}, "can't end at"),
        ({"ends": (0.1, float("nan"), 0.6, 0.7), "density": "50%"}, "can't end at"),
        ({"ends": (0.0, 0.2, 0.3, 0.4), "density": "60%"}, "read 50.0% of the keys at most, not 60.0%"),
        ({"ends": (0.0, 0.0, 0.0, 0.0), "density": "60%"}, "read 0.0% of the keys at most"),
        ({"warmup": -1}, "warmup"),
        ({"block_k": 0}, "hold nothing"),
        ({"density": "50%", "block_q": 10, "block_k": 16, "stride": 4}, "don't divide blocks"),
        ({"density": "50%", "block_q": 16, "block_k": 12, "stride": 4}, "no level 8"),
    ):
        with pytest.raises(SecateurError, match=match), secateur.attach(model, "psa", **settings):
            model(ids(1, 300))
        assert "forward" not in model.__dict__
    eager = llama()
    eager.set_attn_implementation("eager")
    with pytest.raises(SecateurError, match="can't be reached"), secateur.attach(eager, "psa", **SMALL):
        eager(ids())
    dropping = llama(attention_dropout=0.5).train()
    with pytest.raises(SecateurError, match=r"model.eval\(\)"), secateur.attach(dropping, "psa", **SMALL):
        dropping(ids())
    unwritten = AttentionMethod(block_q=16, block_k=16)
    with pytest.raises(SecateurError, match="must define levels"), secateur.attach(model, unwritten):
        model(ids())
    with pytest.raises(SecateurError, match="places of its own"):
        secateur.attach(model, "random-tokens", target="50%", part="model")


def test_the_estimates_by_hand() -> None:
    make = torch.Generator().manual_seed(2)
    q, k = torch.randn(2, 1, 2, 32, 4, generator=make, dtype=torch.float64).unbind(0)
    layout = Layout(32, 32, 16, 16, causal=True)
    found = antidiagonal(q, k, layout, stride=4)
    wanted = torch.zeros(1, 2, 2, 2)
    for head in range(2):
        pieces = torch.full((8, 8), -torch.inf, dtype=torch.float64)
        for row in range(8):
            for column in range(row + 1):
                pairs = ((4 * row + 3 - i, 4 * column + i) for i in range(4))
                pieces[row, column] = sum(q[0, head, a] @ k[0, head, b] for a, b in pairs) / 2 / 4
        blocks = pieces.softmax(-1).view(2, 4, 2, 4).sum((1, 3))
        wanted[0, head] = blocks
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-6)
    every = sampled(q, k, Layout(32, 32, 16, 16), share=1.0)
    logits = q @ k.transpose(-1, -2) / 2
    weights = (logits - logits.amax(-1, keepdim=True)).exp().view(1, 2, 2, 16, 2, 16).amax((3, 5))
    torch.testing.assert_close(every, weights.float(), atol=1e-6, rtol=1e-6)


def test_the_estimate_strip_by_strip() -> None:
    """More rows of pieces than are multiplied at a time, behind other keys, groups of heads, blocks that are short."""
    make = torch.Generator().manual_seed(3)
    q, k = torch.randn(1, 4, 1190, 4, generator=make), torch.randn(1, 2, 1222, 4, generator=make)
    layout = Layout(1190, 1222, 16, 16, causal=True)
    found = antidiagonal(q, k, layout, stride=2)
    every = k.repeat_interleave(2, 1)
    pieces = q[:, :, 0::2] @ every[:, :, 1::2].mT + q[:, :, 1::2] @ every[:, :, 0::2].mT
    pieces = pieces / 4  # the root of four numbers, two products
    pieces = pieces.masked_fill(torch.ones(595, 611, dtype=torch.bool).triu(17), -torch.inf)
    weights = torch.nn.functional.pad(pieces.softmax(-1), (0, 5, 0, 5))
    wanted = weights.unflatten(-1, (-1, 8)).sum(-1).unflatten(-2, (-1, 8)).sum(-2)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("tail", [1, 5])
def test_a_short_last_block_is_sampled_too(tail: int) -> None:
    """What lies behind the end stands for the last token, whichever positions are drawn."""
    make = torch.Generator().manual_seed(5)
    q, k = torch.randn(2, 1, 1, 64 + tail, 8, generator=make).unbind(0)
    k[:, :, -1] = q[:, :, :64].mean(2) * 100
    for seed in range(5):
        found = sampled(
            q, k, Layout(64 + tail, 64 + tail, 32, 32), generator=torch.Generator().manual_seed(seed)
        )
        assert bool((found.amax(-1) > 0).all()) and bool((found[..., -1] > 0).any())


def test_density_stretches_the_ends() -> None:
    assert stretched((0.1, 0.15, 0.15, 0.35), 0.15) == pytest.approx((0.1, 0.15, 0.15, 0.35))
    ends = stretched((0.1, 0.15, 0.15, 0.35), 0.6)
    assert ends[3] == 1 and ends[0] + (ends[1] - ends[0]) / 2 + (1 - ends[2]) / 8 == pytest.approx(0.6)
    assert stretched((0.3, 0.3, 0.3, 0.3), 0.25) == pytest.approx((0.25,) * 4)
    assert stretched((0.0, 0.2, 0.2, 0.2), 0.5) == pytest.approx((0, 1, 1, 1))


def test_blocks_that_must_be_read_come_first_in_rank() -> None:
    q, k = torch.randn(2, 1, 1, 128, 8, generator=torch.Generator().manual_seed(4)).unbind(0)
    layout = Layout(128, 128, 16, 16, causal=True)
    levels = PSA(density="50%", **SMALL).levels(q, k, layout, torch.Generator())
    assert (levels.diagonal(dim1=-2, dim2=-1) == 1).all() and (levels[..., 0] == 1).all()
    assert (levels[0, 0, -1] == 1).sum() == 2  # int(8 blocks * 0.33), the first and the last


@torch.no_grad()
def test_an_attention_method_beside_a_token_method() -> None:
    model = tiny_llava().float().eval()
    inputs, part = inputs_for(model), "model.language_model"
    before = model(**inputs).logits
    read = []
    for first, second in (("fastv", "local"), ("local", "fastv")):
        with ExitStack() as both:
            for name in (first, second):
                if name == "fastv":
                    tokens = both.enter_context(secateur.attach(model, "fastv", target="50%", k=1))
                else:
                    keys = both.enter_context(secateur.attach(model, Local(block_q=8, block_k=8), part=part))
            read.append(model(**inputs).logits)
        assert keys.report["density"] < 1 and len(tokens.kept["layer:1"][0]) > 0
    torch.testing.assert_close(read[0], read[1])
    assert not torch.equal(read[0], before) and torch.equal(model(**inputs).logits, before)
