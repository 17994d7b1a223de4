"""Towers, vision transformers, diffusion transformers, decoders: whole levels are the model, fewer aren't, and detach gives it back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import secateur
from secateur.attention.layout import Layout
from secateur.attention.method import AttentionMethod
from secateur.testing import inputs_for, tiny_llama, tiny_llava

Run = Callable[[nn.Module], Tensor]


class Whole(AttentionMethod):
    """Every block that may be read is read whole."""

    name = "whole"

    def levels(self, q: Tensor, k: Tensor, layout: Layout, generator: torch.Generator) -> Tensor:
        return torch.ones(*q.shape[:2], layout.rows, layout.columns, dtype=torch.int64)


def hf_vit() -> tuple[nn.Module, str, Run]:
    from transformers import ViTConfig, ViTModel

    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    config = ViTConfig(**sizes, num_attention_heads=4, image_size=32, patch_size=4, initializer_range=0.3)
    picture = torch.randn(2, 3, 32, 32)
    return ViTModel(config), "", lambda model: model(picture).last_hidden_state


def timm_vit() -> tuple[nn.Module, str, Run]:
    timm = pytest.importorskip("timm")
    picture = torch.randn(2, 3, 64, 64)
    model = timm.create_model("vit_tiny_patch16_224", img_size=64, patch_size=8, depth=2)
    return model, "", lambda model: model(picture)


def tower() -> tuple[nn.Module, str, Run]:
    model = tiny_llava().float()
    inputs = inputs_for(model)
    return model, "model.vision_tower", lambda model: model(**inputs).logits


def vlm_decoder() -> tuple[nn.Module, str, Run]:
    model = tiny_llava().float()
    inputs = inputs_for(model)
    return model, "model.language_model", lambda model: model(**inputs).logits


def decoder() -> tuple[nn.Module, str, Run]:
    ids = torch.randint(8, 20, (2, 60))
    return tiny_llama().float(), "", lambda model: model(ids).logits


def dit() -> tuple[nn.Module, str, Run]:
    diffusers = pytest.importorskip("diffusers", reason="diffusers isn't installed")
    sizes: dict[str, Any] = {"sample_size": 16, "patch_size": 2, "in_channels": 4, "num_layers": 2}
    model = diffusers.DiTTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=8,
        out_channels=4,
        num_embeds_ada_norm=10,
        norm_num_groups=4,
        **sizes,
    )
    for p in model.parameters():
        nn.init.normal_(p, std=0.2)
    noise, step, label = torch.randn(2, 4, 16, 16), torch.tensor([3, 3]), torch.tensor([1, 2])
    return model, "", lambda model: model(noise, timestep=step, class_labels=label).sample


def cogvideo() -> tuple[nn.Module, str, Run]:
    diffusers = pytest.importorskip("diffusers", reason="diffusers isn't installed")
    model = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        time_embed_dim=8,
        text_embed_dim=8,
        num_layers=2,
        sample_width=8,
        sample_height=8,
        sample_frames=9,
        patch_size=2,
        temporal_compression_ratio=4,
        max_text_seq_length=8,
    )
    video, text, step = torch.randn(1, 3, 4, 8, 8), torch.randn(1, 8, 8), torch.tensor([5])
    return (
        model,
        "",
        lambda model: model(hidden_states=video, encoder_hidden_states=text, timestep=step).sample,
    )


class Joint(nn.Module):
    """A block of a diffusion transformer: attention over text and video together, shifted and scaled by the step."""

    def __init__(self) -> None:
        super().__init__()
        self.step, self.norm = nn.Linear(1, 64), nn.LayerNorm(32, elementwise_affine=False)
        self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 32)

    def forward(self, x: Tensor, step: float = 0.5) -> Tensor:
        shift, scale = self.step(torch.tensor([[step]])).chunk(2, -1)
        q, k, v = self.qkv(self.norm(x) * (1 + scale) + shift).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)
        return x + self.out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def joint() -> tuple[nn.Module, str, Run]:
    video = torch.randn(2, 8 + 48, 32)
    return nn.Sequential(Joint(), Joint()), "", lambda model: model(video)


MODELS = (hf_vit, timm_vit, tower, vlm_decoder, decoder, dit, cogvideo, joint)


@torch.no_grad()
@pytest.mark.parametrize("make", MODELS, ids=lambda make: make.__name__)
def test_whole_levels_less_and_off_again(make: Callable[[], tuple[nn.Module, str, Run]]) -> None:
    torch.manual_seed(0)
    model, part, run = make()
    model.eval()
    before = run(model)
    with secateur.attach(model, Whole(block_q=4, block_k=4), part=part) as attached:
        assert torch.equal(run(model), before)
    assert attached.report["attentions"] > 0 and attached.report["density"] == 1
    with secateur.attach(model, "psa", part=part, density="40%", block_q=8, block_k=8, stride=4) as attached:
        less = run(model)
    assert attached.report["density"] < 0.85 and attached.report["attentions"] > 0
    assert not torch.equal(less, before) and bool(less.isfinite().all())
    assert torch.equal(run(model), before)
    assert not any("forward" in module.__dict__ for module in model.modules())


@torch.no_grad()
def test_a_videos_order_on_a_diffusion_transformer() -> None:
    """With every key read in means of one the order changes nothing; the first steps stay dense."""
    torch.manual_seed(0)
    model, video = nn.Sequential(Joint(), Joint()).eval(), torch.randn(1, 8 + 48, 32)
    before = model(video)
    settings: dict[str, Any] = {"order": "gilbert", "grid": (3, 4, 4), "text": 8, "block_q": 8, "block_k": 8}
    with secateur.attach(model, "psa", ends=(1.0, 1.0, 1.0, 1.0), **settings):
        torch.testing.assert_close(model(video), before)
    with secateur.attach(model, "psa", density="30%", warmup=2, **settings) as attached:
        steps = [model(video) for _ in range(3)]
    assert torch.equal(steps[0], before) and torch.equal(steps[1], before)
    assert not torch.equal(steps[2], before)
    assert attached.report["warmup"] == 2 and attached.report["attentions"] == 2


@torch.no_grad()
def test_a_videos_grid_on_cogvideox() -> None:
    torch.manual_seed(0)
    model, _, run = cogvideo()
    before = run(model.eval())
    with secateur.attach(
        model, "psa", order="gilbert", grid=(3, 4, 4), text=8, block_q=8, block_k=8
    ) as attached:
        assert not torch.equal(run(model), before)
    assert attached.report["attentions"] == 2 and attached.report["density"] < 0.6
