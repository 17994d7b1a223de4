"""Merging between a block's attention and its MLP, beside ToMe written out on a transformer's own modules."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import timm
import torch
import transformers as tf
from tiny_models import inputs_for, make
from torch import Tensor

from secateur.tokens.attach import attach


def merge_one(x: Tensor, k: Tensor, size: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """One picture: x [n, C] with CLS in front, keys [n, d], sizes [n]; the r most alike of the even tokens join odd ones.

    Bolya et al. 2023, appendix D, in loops: alternate tokens are A and B, CLS is never merged; order is kept.
    """
    patches = range(1, len(x))
    a, b = [i for i in patches if (i - 1) % 2 == 0], [i for i in patches if (i - 1) % 2 == 1]
    unit = k / k.norm(dim=-1, keepdim=True)
    best = []
    for i in a:
        scores = [float(unit[i] @ unit[j]) for j in b]
        j = max(range(len(b)), key=lambda t: scores[t])
        best.append((scores[j], i, b[j]))
    best.sort(key=lambda t: -t[0])
    sums, sizes = x * size[:, None], size.clone()
    for _, i, j in best[:r]:
        sums[j] += x[i] * size[i]
        sizes[j] += size[i]
    stays = [i for i in range(len(x)) if i not in {i for _, i, _ in best[:r]}]
    return (sums / sizes[:, None])[stays], sizes[stays]


def merge_as_released(x: Tensor, k: Tensor, size: Tensor, r: int, cls: bool) -> tuple[Tensor, Tensor]:
    """One picture as the released code has it, in loops: CLS is the first of the even places, and stays; what took tokens in goes last."""
    unit = k / k.norm(dim=-1, keepdim=True)
    best = []
    for i in range(0, len(x), 2):
        near = {j: float(unit[i] @ unit[j]) for j in range(1, len(x), 2)}
        into = max(near, key=lambda j: near[j])
        best.append((-torch.inf if cls and i == 0 else near[into], i, into))
    best.sort(key=lambda t: -t[0])
    sums, sizes = x * size[:, None], size.clone()
    for _, i, j in best[:r]:
        sums[j] += x[i] * size[i]
        sizes[j] += size[i]
    rest = [i for _, i, _ in best[r:]]
    order = [*(sorted(rest) if cls else rest), *range(1, len(x), 2)]
    return (sums / sizes[:, None])[order], sizes[order]


def by_hand(model: Any, images: Tensor, keep: list[int], merge: Any = merge_one) -> Tensor:
    """A timm transformer, block by block; `keep[b]` patches are left after block b. Final norm, [N, 1 + kept, C]."""
    x = model.norm_pre(model._pos_embed(model.patch_embed(images)))
    size = torch.ones(x.shape[:2], dtype=x.dtype)
    for block, left in zip(model.blocks, keep):
        attention = block.attn
        n, length, width = x.shape
        heads = attention.num_heads
        q, k, v = (
            attention.qkv(block.norm1(x)).view(n, length, 3, heads, width // heads).permute(2, 0, 3, 1, 4)
        )
        logits = q @ k.transpose(-1, -2) * (width // heads) ** -0.5 + size.log()[:, None, None]
        x = x + attention.proj((logits.softmax(-1) @ v).transpose(1, 2).reshape(n, length, width))
        leave = length - model.num_prefix_tokens - left
        pairs = [merge(x[i], k.mean(1)[i], size[i], leave) for i in range(n)]
        x, size = torch.stack([p[0] for p in pairs]), torch.stack([p[1] for p in pairs])
        x = x + block.mlp(block.norm2(x))
    return model.norm(x)


def tiny_vit(**more: Any) -> Any:
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224", depth=3, embed_dim=32, num_heads=4, img_size=16, patch_size=4, num_classes=5, **more
    )  # fmt: skip
    model = model.double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.normal_(0, 0.7 / parameter.shape[-1] ** 0.5)
    return model


def test_exact_tome_on_timm_equals_the_loops() -> None:
    model = tiny_vit()
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    seen: list[Tensor] = []
    handle = model.norm.register_forward_hook(lambda m, a, out: seen.append(out))
    with torch.no_grad():
        before = model(images)
        with attach(model, "tome", target="50%") as attached:
            after = model(images)
        kept = [len(rows[0]) for rows in attached.kept.values()]
        assert (
            kept[-1] == 8
            and sorted(kept, reverse=True) == kept
            and next(iter(attached.kept)) == "encoder:0:mlp"
        )
        expected = by_hand(model, images, kept)
        assert torch.allclose(seen[1], expected, atol=1e-6)
        assert not torch.allclose(before, after) and torch.equal(model(images), before)
        with attach(model, "tome", target="50%", exact=False):
            model(images)
        assert not torch.allclose(seen[-1], expected, atol=1e-3)
    handle.remove()
    assert all("forward" not in vars(m) for m in model.modules())


@pytest.mark.parametrize("cls", [True, False])
def test_tome_as_released_equals_the_loops(cls: bool) -> None:
    model = tiny_vit() if cls else tiny_vit(class_token=False, global_pool="avg")
    images = torch.randn(3, 3, 16, 16, dtype=torch.float64)
    with torch.no_grad():
        with attach(model, "tome", target="50%", compat="code") as attached:
            found = model(images)
        kept = [len(rows[0]) for rows in attached.kept.values()]
        merge = partial(merge_as_released, cls=cls)
        expected = model.forward_head(by_hand(model, images, kept, merge))
        assert torch.allclose(found, expected, atol=1e-6)
        with attach(model, "tome", target="50%"):
            assert not torch.allclose(model(images), expected, atol=1e-3)


@pytest.mark.parametrize("family", ["llava-clip", "llava-siglip"])
def test_pictures_merge_the_same_alone_and_together(family: str) -> None:
    """SigLIP's patches come transposed, in a batch only."""
    model, inputs = make(family), inputs_for(family, rows=(1, 1))
    ids = inputs["input_ids"].clone()
    ids[1] = ids[0]
    inputs["input_ids"], inputs["attention_mask"] = ids, inputs["attention_mask"].clone().fill_(1)
    with torch.no_grad(), attach(model, "tome", target="50%"):
        together = model(**inputs).logits
        for row in range(2):
            one = {name: tensor[row : row + 1] for name, tensor in inputs.items()}
            assert torch.allclose(model(**one).logits, together[row : row + 1], atol=1e-6)


@pytest.mark.parametrize("family", ["llava-clip", "qwen2.5-vl", "idefics3", "internvl"])
def test_dropping_inside_a_block_spares_only_its_mlp(family: str) -> None:
    """Tokens that stay are the same whether the others leave inside block 1 or before block 2."""
    model, inputs = make(family), inputs_for(family)

    def half(sets: Any) -> Tensor:
        keep = torch.zeros_like(sets.valid)
        keep[:, ::2] = True
        return keep

    found = []
    with torch.no_grad():
        dense = model(**inputs).logits
        for at in ("encoder:1:mlp", "encoder:2"):
            with attach(model, half, at=at, target="50%", scope="crop") as attached:
                found.append(model(**inputs).logits)
            assert len(attached.kept[at][0]) < int((inputs["input_ids"][0] == 5).sum())
        assert torch.allclose(found[0], found[1], atol=1e-10)
        with attach(model, lambda s: s.valid, at="encoder:1:mlp", target="50%"):
            assert torch.allclose(model(**inputs).logits, dense, atol=1e-12)
        assert torch.equal(model(**inputs).logits, dense)


def test_exact_tome_on_a_tower_of_transformers() -> None:
    torch.manual_seed(0)
    model = tf.CLIPVisionModel(
        tf.CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=40,
            num_hidden_layers=3,
            num_attention_heads=4,
            image_size=16,
            patch_size=4,
        )
    ).eval()
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad(), attach(model, "tome", target="50%") as attached:
        assert model(images).last_hidden_state.shape == (2, 9, 32)
    assert [len(rows[0]) for rows in attached.kept.values()][-1] == 8
