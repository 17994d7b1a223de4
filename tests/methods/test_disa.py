"""DiSa: the sheet's numbers, what prompts leave alone, and exactness on random CLIPs and SigLIPs."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from secateur import SecateurError
from secateur.methods.disa import Disa, cross_interaction, directional, salient, self_regularisation
from secateur.prompts import Seen, load_prompts, save_prompts, train_prompts
from secateur.prompts.method import Patches
from secateur.prompts.towers import Towers, class_ids

VISION = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 16, "patch_size": 4}  # fmt: skip
TEXT = {"vocab_size": 40, "hidden_size": 12, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4, "max_position_embeddings": 16}  # fmt: skip


def clip():
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(0)
    text = {**TEXT, "eos_token_id": 39, "bos_token_id": 38, "pad_token_id": 0}
    return randomised(CLIPModel(CLIPConfig(text_config=text, vision_config=VISION, projection_dim=10)))


def siglip(width=12):
    from transformers import SiglipConfig, SiglipModel

    torch.manual_seed(0)
    text = {**TEXT, "hidden_size": width, "projection_size": 16}
    return randomised(SiglipModel(SiglipConfig(text_config=text, vision_config=VISION)))


def randomised(model):
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.3)
    return model.eval()


class Letters:
    """A token a letter, a is 1; a start (38) and an end (39) for CLIP, none for SigLIP."""

    pad_token_id = 0

    def __init__(self, start=True):
        self.start = start

    def __call__(self, text, add_special_tokens=True):
        inner = ["?abcdefghijklmnopqrstuvwxyz.".index(letter) for letter in text if letter != " "]
        return {"input_ids": [38, *inner, 39] if add_special_tokens and self.start else inner}


MODELS = {"clip": (clip, Letters()), "siglip": (siglip, Letters(False))}
QUICK = {"depth": 2, "text_tokens": 3, "image_tokens": 2, "words": "abc"}


def shots(count=3, classes=2):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count * classes, 3, 16, 16, generator=generator), torch.arange(classes).repeat(count)


def example(masked=None):
    f, g, f_p = torch.tensor([[0.8, 0.6]]), torch.eye(2), torch.tensor([[0.6, 0.8]])
    g_p = F.normalize(torch.tensor([[1, 0.5], [-0.2, 1]]), dim=1)
    masked = f_p if masked is None else masked
    return Seen(f_p, masked, f, g_p, g, torch.tensor([1]), torch.tensor([[0.9, 0.3], [0.0, 1.0]]), 10.0)


def test_the_sheets_numbers():
    seen = example()
    p = (10 * seen.frozen_image @ seen.frozen_text.T).softmax(1)
    p1 = (10 * seen.masked @ seen.frozen_text.T).softmax(1)
    p2 = (10 * seen.frozen_image @ seen.text.T).softmax(1)
    for found, expected in (
        (p, [0.880797, 0.119203]),
        (p1, [0.119203, 0.880797]),
        (p2, [0.996027, 0.003973]),
    ):
        assert found[0].tolist() == pytest.approx(expected, abs=1e-6)
    assert float(cross_interaction(seen)) == pytest.approx(1.523188 + 0.297142, abs=1e-5)
    assert float(cross_interaction(seen, "ce")) == pytest.approx(
        -(p1[0, 1].log() + p2[0, 1].log()).item(), abs=1e-5
    )
    assert float(F.cross_entropy(10 * seen.image @ seen.text.T, seen.labels)) == pytest.approx(
        2.374050, abs=1e-5
    )
    q = (10 * seen.image @ seen.text.T).softmax(1)
    divergence = float((p * (p / q).log()).sum()) / 2
    assert float(self_regularisation(seen, 0, 1)) == pytest.approx(0.2 + divergence, abs=1e-5)
    assert float(self_regularisation(seen, 1, 0)) == pytest.approx(0.192080 + divergence, abs=1e-5)
    whole = 2.374050 + 25 * 0.192080 + 10 * 0.2 + divergence + 1.820330
    toward = 1 - 0.8  # the prototype of class 1 is (0, 1)
    assert float(Disa().loss(seen)) == pytest.approx(whole + toward, abs=1e-4)
    assert float(Disa(cross=0, direction=0).loss(seen)) == pytest.approx(whole - 1.820330, abs=1e-4)


def test_direction_is_an_angle():
    f_p, mu = torch.tensor([[0.6, 0.8]]), torch.tensor([[0.9, 0.3]])
    assert float(directional(f_p, mu)) == pytest.approx(0.177808, abs=1e-6)
    for by in (0.1, 7.0):
        assert float(directional(f_p, by * mu)) == pytest.approx(0.177808, abs=1e-6)
        assert float(directional(by * f_p, mu)) == pytest.approx(0.177808, abs=1e-6)
    assert float(directional(mu, 3 * mu)) == pytest.approx(0, abs=1e-6)
    assert float(directional(mu, -mu)) == pytest.approx(2, abs=1e-6)
    assert float(directional(f_p, mu, "square")) == pytest.approx(0.34, abs=1e-6)


def test_the_sheets_mask_and_counts():
    features = torch.tensor([[[1, 0], [0.6, 0.8], [0, 1], [-1, 0]]])
    patches = Patches(features, torch.tensor([[1.0, 0.0]]), None)
    kept = Disa(ratio=0.5).keep(patches, torch.Generator())
    assert kept.tolist() == [[0, 1]]
    for ratio, count, expected in ((0.7, 10, 3), (0.3, 16, 12), (0.5, 5, 3), (0.99, 10, 1)):
        assert salient(torch.randn(2, count), ratio).shape == (2, expected)
    assert salient(torch.zeros(1, 4), 0.5).tolist() == [[0, 1]], "the lower of equals stays"


def test_prototypes_are_means_that_are_not_brought_to_length_one():
    unit = torch.tensor([[1.0, 0], [0.8, 0.6], [0, 1], [0, 1]])
    labels = torch.tensor([0, 0, 1, 1])
    means = torch.stack([unit[labels == c].mean(0) for c in (0, 1)])
    assert torch.allclose(means, torch.tensor([[0.9, 0.3], [0, 1]]))


@pytest.mark.parametrize("kind", MODELS)
def test_without_prompts_the_towers_are_the_models_own(kind):
    made, tokenizer = MODELS[kind]
    model, pixels = made(), torch.randn(2, 3, 16, 16)
    towers = Towers(model)
    ids, _ = class_ids(tokenizer, ["cat", "dog"], 3, towers.longest, towers.pads, "abc")
    with torch.no_grad():
        out = model(input_ids=ids, pixel_values=pixels)
        image, text = towers.image(pixels), towers.text(ids)
    assert torch.allclose(image, out.image_embeds, atol=1e-5) and torch.allclose(
        text, out.text_embeds, atol=1e-5
    )
    whole, patches, attention = towers.look(pixels)
    assert torch.allclose(whole, out.image_embeds, atol=1e-5) and patches.shape == (2, 16, image.shape[1])
    if kind == "siglip":
        assert attention is None
    else:
        model.set_attn_implementation("eager")
        with torch.no_grad():
            seen = model.vision_model(pixel_values=pixels, output_attentions=True).attentions[-1]
        assert torch.allclose(attention, seen[:, :, 0, 1:].mean(1), atol=1e-5)


@pytest.mark.parametrize("kind", MODELS)
def test_prompts_that_are_the_words_they_stand_for_change_no_text(kind):
    made, tokenizer = MODELS[kind]
    model = made()
    towers = Towers(model)
    ids, place = class_ids(tokenizer, ["cat", "horse"], 3, towers.longest, towers.pads, "abc")
    words = model.text_model.embeddings.token_embedding(ids[0, place : place + 3]).detach()
    assert torch.allclose(towers.text(ids, words[None], place), towers.text(ids), atol=1e-6)
    assert not torch.allclose(
        towers.text(ids, words[None] + torch.randn(3, 12), place), towers.text(ids), atol=1e-3
    )
    # a second block's prompts replace what the first made of them
    deep = torch.stack([words, torch.randn(3, 12)])
    other = torch.stack([torch.randn(3, 12), deep[1]])
    assert not torch.allclose(towers.text(ids, deep, place), towers.text(ids), atol=1e-3)
    if place and kind == "clip":
        assert not torch.allclose(towers.text(ids, deep, place), towers.text(ids, other, place), atol=1e-4), (
            "the name has read the first ones"
        )


def by_hand(model, pixels, prompts, keep):
    """CLIP's image tower written out: kept patches with their own positions, prompts behind them, new ones in each block."""
    tower = model.vision_model
    x = tower.pre_layrnorm(tower.embeddings(pixels))
    rows = []
    for one, at in zip(x, keep):
        hidden = torch.cat([one[:1], one[1:][at]])[None]
        for number, block in enumerate(tower.encoder.layers):
            if number < len(prompts):
                hidden = torch.cat([hidden[:, : 1 + len(at)], prompts[number][None]], 1)
            hidden = block(hidden, None)
            hidden = hidden[0] if isinstance(hidden, tuple) else hidden
        rows.append(hidden[0, 0])
    return F.normalize(model.visual_projection(tower.post_layernorm(torch.stack(rows))), dim=-1)


def test_the_image_tower_is_that_written_out_by_hand():
    model, pixels = clip(), torch.randn(2, 3, 16, 16)
    prompts, keep = torch.randn(2, 2, 16), torch.tensor([[0, 3, 7, 15], [1, 2, 5, 6]])
    with torch.no_grad():
        found = Towers(model).image(pixels, prompts, keep)
        assert torch.allclose(found, by_hand(model, pixels, prompts, keep), atol=1e-5)
        whole = Towers(model).image(pixels, prompts)
        everything = torch.arange(16).expand(2, -1)
        assert torch.allclose(whole, Towers(model).image(pixels, prompts, everything), atol=1e-6)
        zeroed = Towers(model).image(pixels, prompts, keep, drop=False)
    assert not torch.allclose(found, zeroed, atol=1e-3) and not torch.allclose(found, whole, atol=1e-3)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("settings", [{}, {"mask": "zero", "by": "random"}, {"cross": 0.0, "direction": 0.0}])
def test_only_prompts_are_trained_and_the_model_stays_as_it_was(kind, settings):
    made, tokenizer = MODELS[kind]
    model = made().train()
    model.vision_model.eval()
    model.logit_scale.requires_grad_(False)
    state = {n: t.clone() for n, t in model.state_dict().items()}
    found = train_prompts(
        model, tokenizer, shots(), ["cat", "dog"], epochs=15, lr=0.005, batch=6, **QUICK, **settings
    )
    assert all(torch.equal(state[n], t) for n, t in model.state_dict().items())
    assert model.training and not model.vision_model.training
    assert all(p.grad is None for p in model.parameters())
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["logit_scale"]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert found.prompts.text.shape == (2, 3, 12) and found.prompts.image.shape == (2, 2, 16)
    assert found.losses[-1] < found.losses[0]
    logits = found.logits(shots()[0], ["horse", "frog", "cat"])
    assert logits.shape == (6, 3) and torch.isfinite(logits).all()
    again = train_prompts(
        made(), tokenizer, shots(), ["cat", "dog"], epochs=15, lr=0.005, batch=6, **QUICK, **settings
    )
    assert torch.equal(again.prompts.text, found.prompts.text), "the seed decides"


def test_where_prompts_say_what_the_words_say_nothing_is_lost():
    """No image prompts and the words themselves as text prompts: prompted is frozen, so both regularisers are zero."""
    model, tokenizer = clip(), Letters()
    towers = Towers(model)
    images, labels = shots()
    ids, place = class_ids(tokenizer, ["cat", "dog"], 3, towers.longest, towers.pads, "abc")
    words = model.text_model.embeddings.token_embedding(ids[0, place : place + 3]).detach()[None]
    with torch.no_grad():
        f, g = towers.image(images), towers.text(ids)
        f_p, g_p = towers.image(images, torch.zeros(1, 0, 16)), towers.text(ids, words, place)
    seen = Seen(f_p, f_p, f, g_p, g, labels, g, towers.scale)
    assert float(self_regularisation(seen, 25, 10)) == pytest.approx(0, abs=1e-4)
    assert float(cross_interaction(seen)) == pytest.approx(0, abs=1e-4)


def test_no_mask_equals_a_mask_that_keeps_everything():
    def run(**settings):
        return train_prompts(clip(), Letters(), shots(), ["cat", "dog"], epochs=2, **QUICK, **settings).losses

    assert run(ratio=0.0) == pytest.approx(run(ratio=0.01), rel=1e-4)
    assert run(ratio=0.0) != pytest.approx(run(ratio=0.5), rel=1e-4)


class Convolutional(nn.Module):
    """Two towers, the one of pictures without tokens."""

    def __init__(self):
        super().__init__()
        self.text_model, self.vision_model = clip().text_model, nn.Conv2d(3, 4, 3)
        self.logit_scale = nn.Parameter(torch.zeros(()))

    get_text_features = get_image_features = None


def test_mistakes_are_named():
    images, labels = shots()
    run = {
        "model": clip(),
        "tokenizer": Letters(),
        "data": (images, labels),
        "classes": ["cat", "dog"],
        **QUICK,
    }

    def refused(match, **changed):
        given = {**run, **changed}
        with pytest.raises(SecateurError, match=match):
            train_prompts(given.pop("model"), given.pop("tokenizer"), given.pop("data"), given.pop("classes"), epochs=1, **given)  # fmt: skip

    refused("no patch tokens", model=Convolutional())
    refused("no towers", model=nn.Linear(2, 2))
    refused(
        "'hippopotamus' is 18 tokens with 3 prompts, the text tower reads 16", classes=["cat", "hippopotamus"]
    )
    refused("all pictures are of one class", data=(images, torch.zeros(6).long()))
    refused("no picture of cow", classes=["cat", "dog", "cow"])
    refused("labels aren't all 0 to 1", data=(images, labels + 1))
    refused("NaN", data=(images * torch.nan, labels))
    refused("no pairs", data=(images, labels[:3]))
    refused("4 is more than the 3 blocks", depth=4)
    refused("two are alike", classes=["cat", "cat"])
    refused("'' is no name", classes=["cat", ""])
    refused("the image tower has no CLS", model=siglip(), tokenizer=Letters(False), by="cls")
    with pytest.raises(SecateurError, match="trains prompts of a frozen model"):
        import secateur

        secateur.prune(copy.deepcopy(run["model"]), method="disa", target="50%")


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("image_tokens", [0, 2])
def test_saved_prompts_come_back(name, image_tokens, tmp_path):
    make, tokenizer = MODELS[name]
    images, _ = shots()
    settings = {**QUICK, "image_tokens": image_tokens, "ratio": 0.5, "lr": 0.1}
    found = train_prompts(make(), tokenizer, shots(), ["cat", "dog"], epochs=2, **settings)
    save_prompts(found, tmp_path / "kept")
    assert {file.name for file in (tmp_path / "kept").iterdir()} == {"prompts.json", "prompts.safetensors"}
    again = load_prompts(tmp_path / "kept", make(), tokenizer)
    assert again.method == found.method and again.classes == ("cat", "dog")
    assert torch.equal(again.logits(images, ["cow", "fox"]), found.logits(images, ["cow", "fox"]))


def test_saved_prompts_know_their_model(tmp_path):
    tokenizer, kept = Letters(), tmp_path / "kept"
    save_prompts(train_prompts(clip(), tokenizer, shots(), ["cat", "dog"], epochs=1, **QUICK), kept)
    for tower in ("text_model", "vision_model"):
        other = clip()
        for parameter in getattr(other, tower).parameters():
            nn.init.normal_(parameter, std=0.3)
        with pytest.raises(SecateurError, match="says other things"):
            load_prompts(kept, other, tokenizer)
    with pytest.raises(SecateurError, match="where the towers take"):
        load_prompts(kept, siglip(width=24), Letters(False))
    with pytest.raises(SecateurError, match=r"no prompts\.json"):
        load_prompts(tmp_path / "nothing", clip(), tokenizer)
    (kept / "prompts.safetensors").write_bytes(b"{}")
    with pytest.raises(SecateurError, match="can't be read"):
        load_prompts(kept, clip(), tokenizer)
