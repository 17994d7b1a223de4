"""What every method that chooses before the language model owes, on sets and through a model."""

import pytest
import torch
from token_examples import CLIP, PLAIN, best, everything, kept

from secateur import SecateurError

ALL = [
    "fastervlm",
    "hiprune",
    "divprune",
    "holov",
    "mmtok",
    "todre",
    "fopru",
    "vidcom2",
    "vispruner",
    "visionzip",
    "random-tokens",
    "uniform-grid",
    "downsample",
]


@pytest.mark.parametrize("facts", [CLIP, PLAIN], ids=["cls", "no-cls"])
@pytest.mark.parametrize("method", ALL)
def test_every_count_is_met_and_padding_never_chosen(method, facts):
    valid = torch.arange(16) < torch.tensor([16, 9, 4])[:, None]
    for keep in (1, 3, 4):
        found = kept(method, everything(sets=3, keep=keep, facts=facts, valid=valid))
        for row, count in zip(found, (16, 9, 4)):
            assert max(row) < count
            assert len(row) == keep if method != "downsample" else keep / 2 < len(row) <= keep


@pytest.mark.parametrize("method", ALL)
def test_all_that_there_are_stay_when_as_many_may(method):
    assert kept(method, everything(keep=16)) == [list(range(16))]


@pytest.mark.parametrize("method", ALL)
def test_half_precision_features(method):
    assert len(kept(method, everything(dtype=torch.bfloat16))[0]) == 4


@pytest.mark.parametrize("method", ["divprune", "holov", "mmtok", "todre"])
def test_features_that_are_not_numbers_are_named(method):
    sets = everything()
    sets.features[0, 3, 1] = torch.nan
    with pytest.raises(SecateurError, match="aren't finite"):
        kept(method, sets)


@pytest.mark.parametrize("method", ["fastervlm", "hiprune", "fopru", "visionzip", "vispruner"])
def test_attention_that_is_not_a_number_is_named(method):
    sets = everything()
    for scores in sets.source.maps.values():
        scores[0, 3] = torch.nan
    with pytest.raises(SecateurError, match="isn't a number"):
        kept(method, sets)


@pytest.fixture(scope="module")
def llava():
    """A tiny random LLaVA (CLIP tower of 4 blocks, 16 patches an image), three images in two rows, and its attention maps."""
    import transformers as tf

    torch.manual_seed(0)
    vision = tf.CLIPVisionConfig(
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=16,
        patch_size=4,
    )
    text = tf.LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=100,
        tie_word_embeddings=False,
    )
    config = tf.LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=5,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
    )
    model = tf.LlavaForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.normal_(0, 0.5)
    ids = torch.tensor([[1, 5, *[5] * 15, *[5] * 16, 30, 31, 32], [0] * 16 + [1, 5, *[5] * 15, 40, 41, 42]])
    inputs = {
        "input_ids": ids,
        "attention_mask": (ids != 0).long(),
        "pixel_values": torch.randn(3, 3, 16, 16),
    }
    tower = model.model.vision_tower
    tower.set_attn_implementation("eager")
    with torch.no_grad():
        seen = tower(inputs["pixel_values"], output_attentions=True, output_hidden_states=True)
    tower.set_attn_implementation("sdpa")
    return model, inputs, seen


def through(llava, method, keep, **settings):
    """Kept patches of each of the three images, as the model ran."""
    import secateur

    model, inputs, _ = llava
    with torch.no_grad(), secateur.attach(model, method, target=f"tokens={keep}", **settings) as attached:
        model(**inputs)
    first, second = (row.tolist() for row in attached.kept["input"])
    return [[i for i in first if i < 16], [i - 16 for i in first if i >= 16], second]


class TestThroughAModel:
    """What is chosen while the model runs, against the model's own attention maps (eager) and states."""

    def test_fastervlm_takes_the_cls_row_of_the_block_before_the_last(self, llava):
        maps = llava[2].attentions[-2]
        assert through(llava, "fastervlm", 5) == best(maps[:, :, 0, 1:].mean(1), 5)
        assert best(maps[:, :, 1:, 0].mean(1), 5) != best(maps[:, :, 0, 1:].mean(1), 5)

    def test_hiprune_without_anchors_takes_attention_received_from_all_queries(self, llava):
        maps = llava[2].attentions[-2].mean((1, 2))[:, 1:]
        assert through(llava, "hiprune", 5, alpha=0.0) == best(maps, 5)

    def test_hiprune_anchors_come_from_the_layer_counted_from_one(self, llava):
        maps = llava[2].attentions[0].mean((1, 2))[:, 1:]
        found = through(llava, "hiprune", 6, alpha=1.0, layer=1)
        for kept_, anchor in zip(found, maps.argmax(1).tolist()):
            cross = {anchor, anchor - 1, anchor + 1, anchor - 4, anchor + 4}
            assert {min(max(i, 0), 15) for i in cross} <= set(kept_)

    def test_divprune_spreads_the_projected_features(self, llava):
        model, inputs, _ = llava
        with torch.no_grad():
            features = model.get_image_features(inputs["pixel_values"], return_dict=True).pooler_output
        expected = []
        for x in features:
            x = torch.nn.functional.normalize(x.double(), dim=-1)
            distance = (1 - x @ x.T).fill_diagonal_(torch.inf)
            chosen = [int(distance.amin(0).argmax())]
            while len(chosen) < 5:
                near = distance[chosen].amin(0)
                near[chosen] = -1
                chosen.append(int(near.argmax()))
            expected.append(sorted(chosen))
        assert through(llava, "divprune", 5) == expected

    def test_visionzip_takes_the_patches_of_the_cls_row_and_evenly_spaced_others(self, llava):
        scores = llava[2].attentions[-2][:, :, 0, 1:].sum(1)
        for found, best_ in zip(through(llava, "visionzip", 8), best(scores, 6)):
            rest = [i for i in range(16) if i not in best_]
            assert {*best_, rest[0]} <= set(found) and len(found) == 8

    def test_vispruner_thins_what_the_cls_row_leaves(self, llava):
        maps = llava[2].attentions[-2][:, :, 0, 1:].mean(1)
        states = torch.nn.functional.normalize(llava[2].hidden_states[-2][:, 1:], dim=-1)
        expected = []
        for scores, x in zip(maps.tolist(), states):
            order = sorted(range(16), key=lambda i: -scores[i])
            important, left = order[:3], order[3:]
            while len(left) > 3:
                near = {i: max(float(x[i] @ x[j]) for j in left[1::2]) for i in left[::2]}
                even = sorted(left[::2], key=lambda i: -near[i])
                left = even[min(2, len(left) - 3) :] + left[1::2]
            expected.append(sorted(important + left))
        assert through(llava, "vispruner", 6, at_once=2) == expected

    def test_prumerge_keeps_the_outliers_of_each_picture_and_a_rest_token(self, llava):
        """Attention as one head over the whole width, by the projections of the tower's last block."""
        import secateur

        model, inputs, seen = llava
        block = getattr(model.model.vision_tower, "vision_model", model.model.vision_tower).encoder.layers[-1]
        with torch.no_grad():
            states = block.layer_norm1(seen.hidden_states[-2])
            q, k = block.self_attn.q_proj(states), block.self_attn.k_proj(states)
            maps = (q[:, :1] @ k.mT / q.shape[-1] ** 0.5).softmax(-1)[:, 0, 1:]
            with secateur.attach(model, "prumerge", target=None) as attached:
                model(**inputs)
        first, second = (row.tolist() for row in attached.kept["input"])
        found = [[i for i in first if i < 16], [i - 16 for i in first if i >= 16], second]
        sizes = []
        for scores, places in zip(maps.double(), found):
            low, high = (torch.quantile(scores, share) for share in (0.25, 0.75))
            out = (scores > high + 1.5 * (high - low)).nonzero()[:, 0].tolist()
            assert set(out) <= set(places) and len(places) == len(out) + 1
            sizes.append(len(out))
        assert len(set(sizes)) > 1

    def test_fopru_compares_attention_received_and_given_without_cls(self, llava):
        maps = llava[2].attentions[-2].mean(1)[:, 1:, 1:]
        received, given_ = maps.mean(1), maps.mean(2)
        scores = torch.where((given_.var(1) > received.var(1))[:, None], given_, received)
        assert through(llava, "fopru", 5) == best(scores, 5)
        logits = through(llava, "fopru", 5, scores="logits")
        assert all(len(row) == 5 for row in logits)

    def test_mmtok_covers_the_question_after_the_image_and_the_patches_before_the_projector(self, llava):
        model, inputs, seen = llava
        with torch.no_grad():
            features = model.get_image_features(inputs["pixel_values"], return_dict=True).pooler_output
            questions = [model.get_input_embeddings()(torch.tensor(q)) for q in ([30, 31, 32], [40, 41, 42])]
        found = through(llava, "mmtok", 5)
        for i, text in enumerate((questions[0], questions[0], questions[1])):
            t, v, h = (
                torch.nn.functional.normalize(x.double(), dim=-1)
                for x in (text, features[i], seen.hidden_states[-2][i, 1:])
            )
            table = torch.cat(
                [(t @ v.T / 0.02).softmax(1) / len(t), 0.5 * (h @ h.T / 0.2).softmax(1) / len(h)]
            )
            covered, chosen = torch.zeros(len(table), dtype=torch.float64), []
            for _ in range(5):
                gain = (table - covered[:, None]).clamp(min=0).sum(0)
                gain[chosen] = -1
                chosen.append(int(gain.argmax()))
                covered = torch.maximum(covered, table[:, chosen[-1]])
            assert found[i] == sorted(chosen)

    def test_holov_divides_the_budget_by_cls_attention(self, llava):
        maps = llava[2].attentions[-2][:, :, 0, 1:].mean(1)
        found = through(llava, "holov", 8, crops=4)
        for row, attention in zip(found, maps):
            share = attention.reshape(4, 4).mean(1)
            share = share / share.sum() * 8
            if share.max() <= 4:
                counts = torch.bincount(torch.tensor(row) // 4, minlength=4)
                assert ((counts - share).abs() < 1).all()

    def test_todre_starts_from_the_token_cls_attends_to_in_the_last_block(self, llava):
        pivots = llava[2].attentions[-1][:, :, 0, 1:].mean(1).argmax(1).tolist()
        assert through(llava, "todre", 1) == [[p] for p in pivots]

    @pytest.mark.parametrize(("tau", "left"), [(0.0, [10, 5]), (1.01, [0, 0])])
    def test_todre_takes_all_visual_tokens_out_at_the_deep_layer_or_none(self, llava, tau, left):
        import secateur

        model, inputs, _ = llava
        with secateur.attach(model, "todre", target="tokens=5", tau=tau) as attached:
            out = model.generate(**inputs, max_new_tokens=3, do_sample=False, suppress_tokens=[5])
        assert [len(row) for row in attached.kept["layer:3"]] == left
        assert out.shape == (2, inputs["input_ids"].shape[1] + 3)

    def test_todre_at_everything_removes_nothing_even_deep_in_the_model(self, llava):
        import secateur

        model, inputs, _ = llava
        with torch.no_grad():
            before = model(**inputs).logits
            with secateur.attach(model, "todre", target="100%", tau=1.01):
                assert torch.equal(model(**inputs).logits, before)

    def test_layers_after_the_removal_see_the_text_alone(self, llava):
        """What enters layer 3 without the removal, its text rows alone through that layer at their own positions."""
        import secateur

        model, inputs, _ = llava
        row = {key: value[:1] for key, value in inputs.items()} | {"pixel_values": inputs["pixel_values"][:2]}
        decoder, seen = model.model.language_model, {}

        def note(module, args, kwargs):
            seen["states"], seen["positions"] = args[0], kwargs["position_ids"]

        hook = decoder.layers[3].register_forward_pre_hook(note, with_kwargs=True)
        with torch.no_grad(), secateur.attach(model, "todre", target="tokens=5", removal=False) as attached:
            model(**row)
        hook.remove()
        text = row["input_ids"][0, attached.columns[0]] != 5
        states, positions = seen["states"][:, text], seen["positions"][:, text]
        with torch.no_grad():
            angles = decoder.rotary_emb(states, positions)
            mask = torch.ones(states.shape[1], states.shape[1]).tril().bool()[None, None]
            out = decoder.layers[3](states, attention_mask=mask, position_embeddings=angles)
            expected = model.lm_head(decoder.norm(out[0] if isinstance(out, tuple) else out))
            with secateur.attach(model, "todre", target="tokens=5", tau=1.01):
                found = model(**row).logits
        assert found.shape == expected.shape and torch.allclose(found, expected, atol=1e-5)
