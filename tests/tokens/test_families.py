"""Where visual tokens come from, tried on the models themselves; and vision transformers on their own."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
import transformers as tf
from reference import masked_layers, tower_blocks
from tiny_models import FAMILIES, IMAGE, inputs_for, make
from torch import Tensor, nn

from secateur.errors import SecateurError
from secateur.families.vlm import VLMS, Layout, facts_of, family_of, register_family
from secateur.families.vlm.facts import each_patch, grids, picture_sizes
from secateur.tokens.attach import attach
from secateur.tokens.input import encode, flat
from secateur.tokens.state import Missing, TokenSets


def without_attention(model: Any) -> None:
    """Every patch of the tower is then on its own."""
    for block in tower_blocks(model.get_encoder("image")):
        attention = next(getattr(block, n) for n in ("self_attn", "attn", "attention") if hasattr(block, n))
        for name in ("out_proj", "proj", "projection_layer", "o_proj"):
            if hasattr(attention, name):
                nn.init.zeros_(getattr(attention, name).weight)
                if getattr(attention, name).bias is not None:
                    nn.init.zeros_(getattr(attention, name).bias)


def features(model: Any, inputs: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        return flat(encode(model, "image", inputs))


def nudge(family: str, inputs: dict[str, Any], patch: int) -> dict[str, Any]:
    """The inputs with one patch of the tower changed."""
    pixels = inputs["pixel_values"].clone()
    if family.startswith("qwen"):
        pixels[patch] += 1
    else:
        view = pixels
        if pixels.dim() == 5:
            used = [3, 3, 5] if family.startswith("llava") else None
            keep = [(i, j) for i in range(pixels.shape[0]) for j in range(pixels.shape[1])
                    if (j < used[i] if used else bool((pixels[i, j] != 0).any()))]  # fmt: skip
            i, j = keep[patch // 16]
            view = pixels[i, j][None]
        else:
            view = pixels[patch // 16][None]
        row, column = divmod(patch % 16, 4)
        view[0, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] += 1
    return {**inputs, "pixel_values": pixels}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_patch_reaches_exactly_the_tokens_that_the_layout_says(family: str) -> None:
    dtype = torch.float32 if family == "paligemma2" else torch.float64
    model, inputs = make(family, dtype), inputs_for(family, dtype)
    without_attention(model)
    layout = family_of(model).layout(model, inputs)["image"]  # type: ignore[misc]
    before = features(model, inputs)
    assert len(before) == len(layout) == int((inputs["input_ids"] == IMAGE).sum())
    for patch in range(0, layout.total_patches, 7):
        after = features(model, nudge(family, inputs, patch))
        touched = ((after - before).abs().amax(1) > 1e-9).nonzero()[:, 0]
        said = (layout.patches == patch).any(1).nonzero()[:, 0]
        assert touched.tolist() == said.tolist()
    assert int(layout.newline.sum()) == ({"llava-next": 20, "llava-onevision": 20}.get(family, 0))


def test_tokens_that_were_resized_name_a_patch_that_reaches_them() -> None:
    model, inputs = make("llava-onevision"), inputs_for("llava-onevision")
    model.config.vision_aspect_ratio = "anyres_max_1"
    without_attention(model)
    layout = family_of(model).layout(model, inputs)["image"]  # type: ignore[misc]
    before = features(model, inputs)
    assert len(before) == len(layout) < 196
    for token in range(0, len(layout), 5):
        patch = int(layout.patches[token, 0])
        if patch >= 0:
            after = features(model, nudge("llava-onevision", inputs, patch))
            assert (after[token] - before[token]).abs().max() > 1e-9
        else:
            assert layout.newline[token]


def test_places_on_the_grid_and_patches_that_unpadding_took_away() -> None:
    """A picture of 16 x 30 in tiles of 16: the base crop, then 4 rows of 8 patches, of which unpadding takes none or some."""
    model, inputs = make("llava-next"), inputs_for("llava-next")
    seen: list[TokenSets] = []

    def select(sets: TokenSets) -> Tensor:
        seen.append(sets)
        keep = torch.zeros_like(sets.valid)
        keep[:, :8] = True
        return keep

    with torch.no_grad(), attach(model, select, target="50%", scope="crop") as attached:
        model(**inputs)
        (sets,) = seen
        assert len(sets) == 11 and sets.row.tolist() == [0] * 6 + [1] * 5
        assert sets.crop.tolist() == [0, 1, 2, 0, 1, 2, 0, 1, 2, 3, 4]
        assert sets.image.tolist() == [0, 0, 0, 1, 1, 1, 0, 0, 0, 0, 0]
        assert not sets.newline.any() and (sets.grid == 4).all()
        for s in range(11):
            place = sets.grid_row[s, sets.valid[s]] * 4 + sets.grid_col[s, sets.valid[s]]
            assert (place.diff() > 0).all()
        where = attached.coordinates("input")
        newlines = where[0]["column"] == 4
        assert int(newlines.sum()) == 12 and len(attached.kept["input"][0]) == 6 * 8 + 12
    seen.clear()
    with torch.no_grad(), attach(model, select, at="encoder:1", target="50%", scope="crop"):
        model(**inputs)
    (sets,) = seen
    assert sets.valid.all() and sets.valid.shape == (11, 16)
    assert int((sets.index < 0).sum()) == 11 * 16 - (196 - 20)
    assert torch.equal(sets.grid_row * 4 + sets.grid_col, torch.arange(16).expand(11, -1))


@pytest.mark.parametrize(("policy", "count"), [("keep", 8 * 6 + 12), ("drop", 8 * 6), ("compete", 8 * 2)])
def test_what_becomes_of_newlines(policy: str, count: int) -> None:
    model, inputs = make("llava-next"), inputs_for("llava-next")

    def first_eight(sets: TokenSets) -> Tensor:
        keep = torch.zeros_like(sets.valid)
        keep[:, :8] = True
        return keep

    chosen = attach(model, first_eight, target="50%", scope="image" if policy == "compete" else "crop")
    chosen.method.newlines = policy  # type: ignore[misc]
    with torch.no_grad(), chosen as attached:
        model(**inputs)
        assert len(attached.kept["input"][0]) == count


@pytest.mark.parametrize(
    ("family", "at", "image"),
    [
        ("qwen2-vl", "input", True),
        ("qwen2-vl", "layer:2", True),
        ("qwen3-vl", "input", True),
        ("qwen2.5-vl", "layer:2", False),
        ("qwen2.5-vl", "encoder:1", False),
    ],
)
def test_frames_and_video_tokens(family: str, at: str, image: bool) -> None:
    """Two frames of 4 x 4 patches in a video, an image before it: both kinds lose tokens, each in its own grid."""
    model = make(family)
    generator = torch.Generator().manual_seed(0)
    still = [7, *[IMAGE] * 4, 8] if image else []
    # in the third family's prompts a video's frames stand apart, with a time before each
    moving = [7, *[6] * 4, 8, 60, 7, *[6] * 4, 8] if family == "qwen3-vl" else [7, *[6] * 8, 8]
    ids = torch.tensor([[1, 20, *still, *moving, 50, 51]])
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values_videos": torch.randn(32, 48, generator=generator, dtype=torch.float64),
        "video_grid_thw": torch.tensor([[2, 4, 4]]),
        "mm_token_type_ids": (ids == IMAGE).long() + 2 * (ids == 6).long(),
    }
    if image:
        inputs["pixel_values"] = torch.randn(16, 48, generator=generator, dtype=torch.float64)
        inputs["image_grid_thw"] = torch.tensor([[1, 4, 4]])
    settings = {
        "max_new_tokens": 3,
        "do_sample": False,
        "output_logits": True,
        "return_dict_in_generate": True,
    }
    expected = torch.stack(model.generate(**inputs, **settings).logits)
    with attach(model, lambda sets: sets.valid, at=at, target="50%"):
        assert torch.equal(torch.stack(model.generate(**inputs, **settings).logits), expected)
    with attach(model, lambda sets: sets.index % 2 == 0, at=at, target="50%", scope="row") as attached:
        out = model.generate(**inputs, **settings)
        assert attached.kept[at][0].tolist() == list(range(0, 8 + 4 * image, 2))
        assert attached.coordinates(at)[0]["frame"].tolist() == [0, 0] * image + [0, 0, 1, 1]
    assert out.sequences[:, : ids.shape[1]].equal(ids)
    if at.startswith("encoder"):
        return
    from reference import generate

    gone = torch.zeros_like(ids, dtype=torch.bool)
    visual = ((ids == IMAGE) | (ids == 6)).nonzero()[:, 1]
    gone[0, visual[1::2]] = True
    reference = generate(model, family, inputs, {0 if at == "input" else 2: gone}, 1)[1]
    assert (out.logits[0] - reference[0]).abs().max() < 1e-6


def onevision_video(still: bool) -> dict[str, Tensor]:
    """Two rows: one video, and one video with (or without) a picture before it. 3 frames of 4 x 4 patches, halved:
    12 tokens and a newline."""
    generator = torch.Generator().manual_seed(3)
    picture = inputs_for("llava-onevision", rows=(1,))
    count = int((picture["input_ids"] == IMAGE).sum()) if still else 0
    clip = [7, *[6] * 13, 8]
    rows = [[1, 20, *clip, 50, 51], [1, 21, 7, *[IMAGE] * count, 8, *clip, 52, 53, 54]]
    width = max(map(len, rows))
    made = {
        "input_ids": torch.tensor([[0] * (width - len(row)) + row for row in rows]),
        "attention_mask": torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows]),
        "pixel_values_videos": torch.randn(2, 3, 3, 16, 16, generator=generator, dtype=torch.float64),
    }
    pictures = {name: picture[name] for name in ("pixel_values", "image_sizes")}
    return made | (pictures if still else {})


@pytest.mark.parametrize("still", [False, True])
@pytest.mark.parametrize("at", ["input", "layer:2"])
def test_a_video_whose_frames_are_interpolated(at: str, still: bool) -> None:
    """Dropping equals the reference, for a video alone and beside a picture; the reference masks columns and knows no layout."""
    from reference import generate
    from test_engine import run

    model, inputs = make("llava-onevision"), onevision_video(still)
    ids = inputs["input_ids"]
    expected = run(model, inputs)[1]
    with attach(model, lambda sets: sets.valid, at=at, target="50%"):
        assert torch.equal(run(model, inputs)[1], expected)
    visual = (ids == IMAGE) | (ids == 6)
    gone = (torch.rand(ids.shape, generator=torch.Generator().manual_seed(1)) < 0.5) & visual
    numbers = [gone[row, visual[row]] for row in range(2)]

    def select(sets: TokenSets) -> Tensor:
        keep = torch.ones_like(sets.valid)
        for s in range(len(sets)):
            there = sets.valid[s]
            keep[s, there] = ~numbers[int(sets.row[s])][sets.index[s, there]]
        return keep

    words, reference = generate(model, "llava-onevision", inputs, {0 if at == "input" else 2: gone}, 4)
    assert (reference[0] - expected[0]).abs().max() > 1e-3
    chosen = attach(model, select, at=at, target="50%", scope="row")
    chosen.method.newlines = "compete"  # type: ignore[misc]
    with chosen as attached:
        tokens, logits = run(model, inputs)
        beams = model.generate(**inputs, max_new_tokens=2, do_sample=False, num_beams=2)
    assert torch.equal(tokens, words) and (logits - reference).abs().max() < 1e-6
    assert beams.shape == (2, ids.shape[1] + 2)
    for row in range(2):
        assert attached.kept[at][row].tolist() == (~numbers[row]).nonzero()[:, 0].tolist()


def test_frames_of_a_video_and_their_newline() -> None:
    """A changed frame changes its 4 tokens and no other; the newline is the same whatever is shown."""
    model, inputs = make("llava-onevision"), onevision_video(False)
    layout = family_of(model).layout(model, inputs)["video"]  # type: ignore[misc]
    with torch.no_grad():
        before = flat(encode(model, "video", inputs))
        for video, frame in ((0, 1), (1, 2)):
            pixels = inputs["pixel_values_videos"].clone()
            pixels[video, frame] += torch.rand_like(pixels[video, frame])
            after = flat(encode(model, "video", {**inputs, "pixel_values_videos": pixels}))
            touched = (after - before).abs().amax(1) > 1e-9
            said = (layout.image == video) & (layout.frame == frame) & ~layout.newline
            assert torch.equal(touched, said)
    assert layout.newline.nonzero()[:, 0].tolist() == [12, 25]
    assert layout.grid_row[:5].tolist() == [0, 0, 1, 1, 0] and layout.grid_col[:5].tolist() == [0, 1, 0, 1, 0]
    with torch.no_grad(), attach(model, lambda sets: sets.index < 2, target="50%", scope="crop") as attached:
        model(**inputs)
        assert attached.coordinates("input")[1]["frame"].tolist() == [0, 0, 2]  # the newline stays


def test_videos_that_cannot_be_laid_out_are_refused() -> None:
    model, inputs = make("llava-onevision"), onevision_video(False)
    for more in ({"at": "encoder:1"}, {"records": ("encoder:-2",)}):
        with (
            pytest.raises(SecateurError, match="no patch belongs to one token"),
            attach(model, lambda sets: sets.valid, target="50%", **more),
        ):
            model(**inputs)
    for family, given in (("llava-clip", inputs), ("qwen2-vl", {"pixel_values_videos": torch.zeros(16, 48)})):
        given = {
            "input_ids": torch.tensor([[1, 6, 6, 40]]),
            **{k: v for k, v in given.items() if "pixel" in k},
        }
        model = make(family)
        with (
            pytest.raises(SecateurError, match="come from isn't known"),
            attach(model, lambda sets: sets.valid, target="50%"),
        ):
            model(**given)


# -- families of users --


@pytest.fixture
def vip() -> Any:
    """A VipLlava: features of five blocks side by side, then a projector; its type isn't among the known ones."""
    from tiny_models import IDS, clip, fill, llama

    config = tf.VipLlavaConfig(
        vision_config=clip(), text_config=llama(), vision_feature_layers=[-2, -3, 1], tie_word_embeddings=False, **IDS
    )  # fmt: skip
    yield fill(tf.VipLlavaForConditionalGeneration(config))
    VLMS.pop("vipllava", None)


@pytest.mark.parametrize(("at", "layer"), [("input", 0), ("layer:2", 2)])
def test_a_family_of_ones_own_in_a_few_lines(vip: Any, at: str, layer: int) -> None:
    from reference import generate
    from test_engine import attach_drop, dropped, run

    assert family_of(vip).name == "vipllava" and not family_of(vip).proven

    def layout(model: Any, inputs: Any) -> dict[str, Layout]:
        if inputs.get("pixel_values") is None:
            return {}
        return {"image": grids(picture_sizes(inputs["pixel_values"], 4), each_patch)}

    register_family(
        "vipllava",
        like="llava",
        layout=layout,
        feature_block=lambda model: -2,
        projector=lambda model: None,
    )
    inputs = inputs_for("llava-clip")
    gone = dropped(inputs, 0.5, 3)
    words, reference = generate(vip, "llava-clip", inputs, {layer: gone}, 4)
    # the proof is of the model without its dropout
    for module in vip.train().modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.5
    with torch.no_grad(), attach_drop(vip, inputs, at, gone):
        vip(**inputs)
    assert all(module.training for module in vip.modules())
    vip.eval()
    with attach_drop(vip, inputs, at, gone):
        tokens, logits = run(vip, inputs)
    assert torch.equal(tokens, words) and (logits - reference).abs().max() < 1e-6


def test_a_family_that_keeps_everything_and_gives_other_logits_is_refused(vip: Any) -> None:
    """The model's forward does something with its pictures that features given from outside miss."""
    model, inputs = make("llava-clip"), inputs_for("llava-clip")
    register_family("vipllava", like="llava")
    model.config.model_type = "vipllava"
    with attach(model, lambda sets: sets.valid, target="50%"), torch.no_grad():
        model(**{**inputs_for("llava-clip", rows=(0,)), "pixel_values": None})
        cache = tf.DynamicCache()
        model(**inputs, past_key_values=cache)
        assert cache.get_seq_length() == inputs["input_ids"].shape[1]
    other = make("llava-clip")
    other.config.model_type = "vipllava"
    calls: list[int] = []
    tower = other.get_encoder("image")
    tower.register_forward_hook(lambda m, a, out: calls.append(1))
    other.model.multi_modal_projector.register_forward_hook(lambda m, a, out: out * len(calls))
    with (
        pytest.raises(SecateurError, match="gives other states"),
        attach(other, lambda sets: sets.valid, target="50%"),
    ):
        other(**inputs)
    assert "forward" not in vars(other)


def test_a_model_whose_layers_mix_tokens_beside_attention_is_refused(vip: Any) -> None:
    """Every token kept shows nothing; half of them dropped does."""
    inputs = inputs_for("llava-clip")
    handle = vip.model.language_model.layers[2].register_forward_hook(
        lambda m, a, out: out + out.cumsum(1) / 9
    )
    with torch.no_grad():
        for at in ("input", "layer:1"):
            with (
                attach(vip, lambda sets: sets.valid, at=at, target="50%"),
                pytest.raises(SecateurError, match=f"dropping tokens at {at} gives other states"),
            ):
                vip(**inputs)
            assert "forward" not in vars(vip)
        with attach(vip, lambda sets: sets.valid, at="layer:3", target="50%"):
            vip(**inputs)
    handle.remove()


def test_positions_that_never_reach_the_language_model_are_refused(vip: Any) -> None:
    decoder = vip.model.language_model
    handle = decoder.register_forward_pre_hook(
        lambda m, a, k: (a, {**k, "position_ids": None}), with_kwargs=True
    )
    chosen = attach(vip, lambda sets: sets.index % 2 == 0, target="50%")
    with torch.no_grad(), chosen, pytest.raises(SecateurError, match="doesn't hand position_ids on"):
        vip(**inputs_for("llava-clip"))
    handle.remove()


def test_a_decoder_that_counts_its_tokens_itself() -> None:
    """OPT's positions leave padding out, and no forward hands them over."""
    from tiny_models import IDS, clip, fill

    text = tf.OPTConfig(
        vocab_size=100, hidden_size=32, word_embed_proj_dim=32, ffn_dim=48, num_hidden_layers=4, num_attention_heads=4,
        max_position_embeddings=128, pad_token_id=0, eos_token_id=None,
    )  # fmt: skip
    config = tf.VipLlavaConfig(
        vision_config=clip(), text_config=text, vision_feature_layers=[-2, -3, 1], tie_word_embeddings=False, **IDS
    )  # fmt: skip
    model, inputs = fill(tf.VipLlavaForConditionalGeneration(config)), inputs_for("llava-clip")
    with torch.no_grad(), attach(model, lambda sets: sets.index % 2 == 0, target="50%") as attached:
        model(**inputs)
        assert attached.input.counts and len(attached.kept["input"][0]) == 16


def test_places_that_nothing_tells_are_missing(vip: Any) -> None:
    with (
        torch.no_grad(),
        attach(vip, "uniform-grid", target="50%"),
        pytest.raises(Missing, match="where this model's tokens lie"),
    ):
        vip(**inputs_for("llava-clip"))


def test_what_cannot_be_derived() -> None:
    small = tf.BlipConfig(
        vision_config={**V, "projection_dim": 8},
        text_config={"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4},
    )
    with torch.device("meta"):
        model = tf.BlipForConditionalGeneration(small)
    with pytest.raises(SecateurError, match="cannot leave blip: it has no get_image_features"):
        attach(model, lambda sets: sets.valid, target="50%")


def test_what_cannot_be_registered() -> None:
    for name, like, more, word in (
        ("llava", "llava", {}, "already"),
        ("mine", "lava", {}, "did you mean llava"),
        ("mine", "llava", {"layouts": None}, "did you mean layout"),
    ):
        with pytest.raises(SecateurError, match=word):
            register_family(name, like=like, **more)
        assert "mine" not in VLMS


# -- vision transformers on their own --

V = {
    "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 4, "num_attention_heads": 4, "image_size": 16, "patch_size": 4,
}  # fmt: skip


def plain(name: str) -> Any:
    torch.manual_seed(0)
    small = {"depth": 4, "embed_dim": 32, "num_heads": 4, "img_size": 16, "patch_size": 4, "num_classes": 5}
    made: dict[str, Any] = {
        "vit": lambda: tf.ViTModel(tf.ViTConfig(**V)),
        "vit-classifier": lambda: tf.ViTForImageClassification(tf.ViTConfig(**V)),
        "clip": lambda: tf.CLIPVisionModel(tf.CLIPVisionConfig(**V)),
        "siglip": lambda: tf.SiglipVisionModel(tf.SiglipVisionConfig(**V)),
        "dinov2": lambda: tf.Dinov2Model(tf.Dinov2Config(**V)),
        "dinov2-registers": lambda: tf.Dinov2WithRegistersModel(
            tf.Dinov2WithRegistersConfig(**V, num_register_tokens=2)
        ),
        "dinov3": lambda: tf.DINOv3ViTModel(tf.DINOv3ViTConfig(**V, num_register_tokens=2)),
        "timm-vit": lambda: timm.create_model("vit_tiny_patch16_224", **small),
        "timm-siglip": lambda: timm.create_model(
            "vit_base_patch16_siglip_224", **{**small, "num_classes": 0}
        ),
        "timm-dinov2": lambda: timm.create_model("vit_small_patch14_reg4_dinov2", **small),
        "timm-eva02": lambda: timm.create_model("eva02_tiny_patch14_224", **small),
        "timm-dinov3": lambda: timm.create_model("vit_small_patch16_dinov3", **small),
    }
    model = made[name]().double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.normal_(0, 0.5 / parameter.shape[-1] ** 0.5)
    return model


PLAIN = ("vit", "clip", "siglip", "dinov2", "dinov2-registers", "dinov3", "timm-vit", "timm-siglip", "timm-dinov2",
         "timm-eva02", "timm-dinov3")  # fmt: skip


def tokens_of(model: Any, images: Tensor) -> Tensor:
    """[N, tokens, C] after the last block and norm."""
    with torch.no_grad():
        if hasattr(model, "forward_features"):
            kept: list[Tensor] = []
            handle = model.norm.register_forward_hook(lambda m, a, out: kept.append(out))
            model(images)
            handle.remove()
            return kept[0]
        return model(images).last_hidden_state


@pytest.mark.parametrize("at", [1, 2])
@pytest.mark.parametrize("name", PLAIN)
def test_a_transformer_on_its_own_equals_the_masked_reference(name: str, at: int) -> None:
    model = plain(name)
    prefix = family_of(model).prefix(model)
    images = torch.randn(3, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    keep = torch.rand(3, 16, generator=torch.Generator().manual_seed(at)).argsort(1) < 7
    full = tokens_of(model, images)
    with attach(model, lambda s: s.valid, at=f"encoder:{at}", target="50%"):
        assert torch.equal(tokens_of(model, images), full)
    gone = torch.cat([torch.zeros(3, prefix, dtype=torch.bool), ~keep], 1)
    blocks = family_of(model).blocks(model)
    with masked_layers(blocks, {at: gone}):
        reference = tokens_of(model, images)
    assert (reference - full)[:, 0].abs().max() > 1e-6
    with attach(model, lambda s: keep, at=f"encoder:{at}", target="50%", scope="crop") as attached:
        found = tokens_of(model, images)
    stays = torch.cat([torch.ones(3, prefix, dtype=torch.bool), keep], 1)
    expected = reference[stays].view(3, prefix + 7, -1)
    assert found.shape == expected.shape and torch.allclose(found, expected, atol=1e-10)
    for row in range(3):
        assert attached.kept[f"encoder:{at}"][row].tolist() == keep[row].nonzero()[:, 0].tolist()
    assert torch.equal(tokens_of(model, images), full)


def test_patches_of_a_wide_picture_lie_on_a_wide_grid() -> None:
    """8 x 32 pixels in patches of 4: two rows of eight."""
    model = tf.ViTModel(tf.ViTConfig(**{**V, "image_size": (8, 32)})).eval()
    with torch.no_grad(), attach(model, lambda s: s.valid, at="encoder:1", target="50%") as attached:
        model(torch.randn(2, 3, 8, 32))
    where = attached.coordinates("encoder:1")[1]
    assert where["row"].tolist() == [0] * 8 + [1] * 8 and where["column"].tolist() == [*range(8)] * 2


@pytest.mark.parametrize("name", ["vit", "clip", "timm-vit"])
def test_pictures_that_keep_different_numbers(name: str) -> None:
    """Padded and masked where the head reads CLS; refused where it averages."""
    model = plain(name)
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    keep = torch.rand(2, 16, generator=torch.Generator().manual_seed(0)) < torch.tensor([[0.3], [0.8]])
    gone = torch.cat([torch.zeros(2, 1, dtype=torch.bool), ~keep], 1)
    with masked_layers(family_of(model).blocks(model), {2: gone}):
        reference = tokens_of(model, images)
    chosen = attach(model, lambda s: keep, at="encoder:2", target="50%", scope="crop")
    if name == "timm-vit":
        with chosen, pytest.raises(SecateurError, match="averages over padding"):
            model(images)
        assert "forward" not in vars(model)
        return
    with chosen:
        assert torch.allclose(tokens_of(model, images)[:, 0], reference[:, 0], atol=1e-10)


def test_a_tower_without_masks_wants_equal_numbers() -> None:
    for model, inputs in ((plain("dinov3"), None), (make("internvl"), inputs_for("internvl"))):

        def ragged(sets: TokenSets) -> Tensor:
            keep = sets.valid.clone()
            keep[0, 0] = False
            return keep

        with (
            attach(model, ragged, at="encoder:2", target="50%", scope="crop"),
            pytest.raises(SecateurError, match="no mask"),
        ):
            model(torch.randn(2, 3, 16, 16).double()) if inputs is None else model(**inputs)
        assert "forward" not in vars(model)


def test_a_classifier_reads_cls_of_what_is_left() -> None:
    model = plain("vit-classifier")
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    with torch.no_grad():
        before = model(images).logits
        with attach(model, lambda s: s.index % 2 == 0, at="encoder:1", target="50%"):
            after = model(pixel_values=images).logits
        assert after.shape == before.shape and not torch.allclose(after, before)
        assert torch.equal(model(images).logits, before)
    with pytest.raises(SecateurError, match="no language model"):
        attach(model, lambda s: s.valid, target="50%")


@pytest.mark.parametrize("name", ["clip", "timm-vit", "timm-eva02", "dinov3"])
def test_statistics_of_a_tower_on_its_own(name: str) -> None:
    """The CLS row by hand, from what reaches torch's attention function."""
    from torch.overrides import TorchFunctionMode

    model = plain(name)
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    rows: list[Tensor] = []

    class Look(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.nn.functional.scaled_dot_product_attention:
                q, k = args[:2]
                rows.append(
                    (q[:, :, :1] @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1).mean(1)[:, 0]
                )
            return func(*args, **(kwargs or {}))

    with torch.no_grad(), Look():
        model(images)
    prefix = family_of(model).prefix(model)
    found: list[Tensor] = []

    def look(sets: TokenSets) -> Tensor:
        found.append(sets.attention("encoder:1", "cls"))
        return sets.valid

    with (
        torch.no_grad(),
        attach(model, look, at="encoder:3", target="50%", records=("encoder:1",), scope="crop"),
    ):
        model(images)
    assert torch.allclose(found[0].double(), rows[1][:, prefix:], atol=1e-6)
    assert "forward" not in vars(model) and not any("forward" in vars(m) for m in model.modules())


def test_facts() -> None:
    model = make("qwen3-vl")
    facts = facts_of(model, family_of(model))
    assert (facts.layers, facts.blocks, facts.merge, facts.has_cls, facts.first_layer) == (4, 4, 4, False, 2)
    assert (facts.hidden, facts.intermediate, facts.heads, facts.kv_heads, facts.head_dim) == (
        32,
        48,
        4,
        2,
        8,
    )
    assert facts.gated and not facts.vision_gated and facts.mrope and facts.video
    clip = facts_of(plain("clip"), family_of(plain("clip")))
    assert (clip.layers, clip.blocks, clip.prefix, clip.vision_hidden, clip.vision_intermediate) == (
        0,
        4,
        1,
        32,
        40,
    )
    assert facts_of(plain("dinov3"), family_of(plain("dinov3"))).prefix == 3
    llava = facts_of(make("llava-clip"), family_of(make("llava-clip")))
    assert llava.feature_block == -2 and llava.tokenwise_projector and llava.has_cls
    assert llava.layer(8, of=32) == 1 and llava.block(-2) == 2 and llava.layer(0.5) == 2


def test_tiles_that_compete_together_lie_on_the_picture_they_make() -> None:
    """30 x 16 pixels in two tiles: 4 x 8 patches, rows of 8 and a newline behind them; the base crop by itself."""
    model, inputs = make("llava-next"), inputs_for("llava-next", rows=(1,))
    seen: list[TokenSets] = []

    def look(sets: TokenSets) -> Tensor:
        seen.append(sets)
        return sets.valid

    with torch.no_grad():
        chosen = attach(model, look, target="50%", scope="image")
        chosen.method.newlines = "compete"  # type: ignore[misc]
        with chosen:
            model(**inputs)
    (sets,) = seen
    place = torch.stack([sets.grid_row[0], sets.grid_col[0]], 1)
    assert place[:16].tolist() == [[r, c] for r in range(4) for c in range(4)]
    assert place[16:].tolist() == [[r, c] for r in range(4) for c in range(9)]
    assert sets.newline[0].nonzero()[:, 0].tolist() == [24, 33, 42, 51]
    assert sets.crop_of[0, 16:24].tolist() == [1] * 4 + [2] * 4 and sets.grid.tolist() == [[0, 0]]
