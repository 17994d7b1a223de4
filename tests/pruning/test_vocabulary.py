"""The vocabulary as a kind of unit: which tokens stay, what the smaller model and tokenizer give, and what is refused."""

from __future__ import annotations

import copy
import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

import secateur
from secateur import SecateurError
from secateur.data.text import encode
from secateur.graph import trace
from secateur.pruning.tokens import rank_tokens
from secateur.surgery import cut_units
from secateur.surgery.prove_tokens import prove_tokens
from secateur.surgery.tokenizer import read_pieces, trim_tokenizer
from secateur.surgery.vocabulary import named_tokens

TEXT = "the cat saw the other cat and the catamaran"
WORDS = ["th", "the", "ca", "cat", "at", "an", "and", "Ġth", "Ġthe", "Ġca", "Ġcat", "Ġs", "Ġsa", "Ġsaw", "zz"]
MERGES = [("t", "h"), ("c", "a"), ("Ġ", "th"), ("Ġ", "ca"), ("Ġth", "e"), ("Ġca", "t"), ("th", "e"), ("ca", "t"), ("a", "n"), ("an", "d"), ("Ġ", "s"), ("Ġs", "a"), ("Ġsa", "w"), ("a", "t"), ("z", "z")]  # fmt: skip


def byte_level() -> PreTrainedTokenizerFast:
    """Two special tokens, 256 bytes, 15 merges; <s> before every text. 273 tokens."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<s>", "</s>", *letters, *WORDS])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=MERGES))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in ("<s>", "</s>")])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def unigram() -> PreTrainedTokenizerFast:
    pieces = [("<unk>", 0.0), ("▁the", -2.0), ("▁cat", -3.0), ("▁", -4.0), ("t", -6.0), ("h", -6.0), ("e", -6.0), ("c", -6.0), ("a", -6.0), ("▁dog", -3.0), ("dog", -5.0), ("é", -9.0)]  # fmt: skip
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


def word_piece() -> PreTrainedTokenizerFast:
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "cat", "##s", "the", "c", "##a", "##t", "dog", "##dle", "t", "##h", "##e", "é"]  # fmt: skip
    tokenizer = Tokenizer(models.WordPiece({t: i for i, t in enumerate(tokens)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]")  # fmt: skip


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text(TEXT)
    return file


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def model(request: Any, tiny_llama: Callable[..., Any]) -> Any:
    return tiny_llama(vocab_size=280, tie_word_embeddings=request.param, bos_token_id=0, eos_token_id=[1, 272], pad_token_id=1)  # fmt: skip


def test_a_token_is_kept_with_the_merges_that_lead_to_it() -> None:
    tokenizer = byte_level()
    pieces, ids = read_pieces(tokenizer), tokenizer.get_vocab()
    # Ġ c a t -> Ġ ca t -> Ġca t -> Ġcat: neither "cat" nor "at", which are merged later, is passed
    parts = [pieces.tokens[i] for i in pieces.parts[ids["Ġcat"]]]
    assert parts[:4] == ["Ġ", "c", "a", "t"] and set(parts[4:]) == {"ca", "Ġca"}
    assert pieces.fixed["special"] == {0, 1} and len(pieces.fixed["bytes"]) == 256


@pytest.mark.parametrize("make", [byte_level, unigram, word_piece])
def test_text_of_kept_tokens_gives_the_same_tokens_by_their_new_numbers(make: Any, tmp_path: Path) -> None:
    tokenizer = make()
    whole = encode(tokenizer, TEXT, special=True)
    pieces = read_pieces(tokenizer)
    kept = {*whole.tolist(), *pieces.fixed["special"], *pieces.fixed["bytes"]}
    kept |= {part for i in list(kept) for part in pieces.parts.get(i, ())}
    kept = sorted(kept | pieces.characters(sorted(kept)))
    assert len(kept) < len(tokenizer)
    small = trim_tokenizer(tokenizer, kept)
    small.save_pretrained(tmp_path)
    for each in (small, PreTrainedTokenizerFast.from_pretrained(tmp_path)):
        assert len(each) == len(kept)
        assert [kept[i] for i in encode(each, TEXT, special=True)] == whole.tolist()
        for name in ("bos_token", "eos_token", "unk_token", "pad_token", "cls_token", "sep_token"):
            token = getattr(tokenizer, name)
            assert token is None or kept[getattr(each, f"{name}_id")] == tokenizer.convert_tokens_to_ids(
                token
            )
    assert len(tokenizer) > len(small)  # the one that was given is as it was


def test_other_text_falls_to_smaller_pieces() -> None:
    tokenizer = byte_level()
    kept = [i for t, i in tokenizer.get_vocab().items() if t not in ("zz", "Ġsaw", "Ġcat")]
    small = trim_tokenizer(tokenizer, kept)
    other = "zz saw the cat: Ωmega"
    assert small.decode(small(other, add_special_tokens=False).input_ids) == other
    assert small.tokenize("zz cat") == ["z", "z", "Ġca", "t"]


def test_a_token_that_must_stay_is_not_dropped_in_silence() -> None:
    tokenizer = byte_level()
    with pytest.raises(SecateurError, match="a special token, 0, isn't kept"):
        trim_tokenizer(tokenizer, range(1, 273))
    with pytest.raises(SecateurError, match="the token of a byte, 7"):
        trim_tokenizer(tokenizer, [i for i in range(273) if i != 7])
    with pytest.raises(SecateurError, match="has no description"):
        trim_tokenizer(object(), [0])


def test_the_order_is_special_tokens_then_counts_and_parts_before_what_they_make(
    model: Any, text: Path
) -> None:
    tokenizer = byte_level()
    ids = tokenizer.get_vocab()
    tokens = rank_tokens(model, tokenizer, text)
    assert tokens.fixed == 2 + 256 + 1  # 272 is an end of text by the config, and its two z are bytes
    place = {int(i): n for n, i in enumerate(tokens.order)}
    counts = encode(tokenizer, TEXT).bincount(minlength=280)
    assert torch.equal(tokens.counts, counts) and int(counts[ids["Ġthe"]]) == 2
    assert place[ids["Ġcat"]] < place[ids["Ġthe"]] < place[ids["Ġsaw"]] < place[ids["at"]]
    for token in ("Ġthe", "Ġcat", "Ġsaw", "the", "and"):
        assert all(place[part] < place[ids[token]] for part in read_pieces(tokenizer).parts[ids[token]])
    used = set(tokens.first(float("inf")).tolist())
    assert set(counts.nonzero().reshape(-1).tolist()) <= used
    assert tokens.order[-7:].tolist() == list(range(273, 280))  # rows that no token has leave first


def test_the_cut_model_gives_the_dense_models_logits_on_kept_tokens(
    model: Any, text: Path, tmp_path: Path
) -> None:
    tokenizer = byte_level()
    pruned = secateur.prune(model, target="vocabulary=used", data=text, tokenizer=tokenizer)
    kept = pruned.plan.tokens
    assert kept is not None
    old = encode(tokenizer, TEXT)[None]
    new = encode(pruned.tokenizer, TEXT)[None]
    assert torch.equal(kept[new], old)
    with torch.no_grad():
        wanted, got = model(old).logits[..., kept], pruned.model(new).logits
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)
    config = pruned.model.config
    assert config.vocab_size == len(kept) == pruned.model.get_input_embeddings().num_embeddings
    assert (config.bos_token_id, config.pad_token_id) == (0, 1)
    assert config.eos_token_id == pruned.model.generation_config.eos_token_id == [1, len(kept) - 1]
    assert model.config.vocab_size == 280 and model.config.eos_token_id == [1, 272]
    left = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in pruned.model.parameters())
    assert left == (280 - len(kept)) * 32 * (1 if model.config.tie_word_embeddings else 2)
    pruned.save(tmp_path / "out")
    again, tokens = secateur.load(tmp_path / "out")
    assert torch.equal(again(encode(tokens, TEXT)[None]).logits, got)
    from transformers import AutoModelForCausalLM

    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "out")(new).logits, got)


def test_a_plan_is_applied_to_a_fresh_model(model: Any, text: Path, tmp_path: Path) -> None:
    pruned = secateur.prune(model, target="vocabulary=265", data=text, tokenizer=byte_level())
    pruned.plan.save(tmp_path)
    plan, fresh = secateur.Plan.load(tmp_path), copy.deepcopy(model)
    assert plan == pruned.plan and plan.method == "token-frequency"
    secateur.apply_plan(fresh, plan)
    for name, tensor in fresh.state_dict().items():
        assert torch.equal(tensor, pruned.model.state_dict()[name])
    edited = copy.deepcopy(plan)
    edited.keep = {name: units[units != 0] for name, units in plan.keep.items()}
    untouched = copy.deepcopy(model)
    with pytest.raises(SecateurError, match="token 0 isn't kept, and bos_token_id of the config names it"):
        secateur.apply_plan(untouched, edited)
    assert untouched.config.vocab_size == 280 and torch.equal(
        untouched.get_input_embeddings().weight, model.get_input_embeddings().weight
    )


def test_with_a_target_the_rarest_leave_first_and_with_other_kinds_the_method_cuts_the_rest(
    model: Any, text: Path
) -> None:
    dense = sum(p.numel() for p in model.parameters())
    alone = secateur.prune(model, kinds=("vocabulary",), target="params<=98%", data=text, tokenizer=byte_level())  # fmt: skip
    each = 32 * (1 if model.config.tie_word_embeddings else 2)
    left = sum(p.numel() for p in alone.model.parameters())
    assert 0.98 * dense - each < left <= 0.98 * dense and alone.report["met"] is True
    settings: dict[str, Any] = {"data": text, "tokenizer": byte_level()}
    both = secateur.prune(
        model, method="group-magnitude", kinds=("vocabulary", "neurons"), target="params<=80%", **settings
    )
    used = secateur.prune(model, target="vocabulary=used", **settings)
    assert torch.equal(both.plan.tokens, used.plan.tokens)
    assert {both.plan.kinds[name] for name in both.plan.keep} == {"vocabulary", "neurons"}
    assert sum(p.numel() for p in both.model.parameters()) <= 0.8 * dense
    assert both.report["met"] is True


def test_token_ids_do_in_place_of_text(model: Any) -> None:
    ids = torch.tensor([[5, 5, 9, 270], [5, 9, 11, 5]])
    tokens = rank_tokens(model, None, ids)
    assert tokens.order[:3].tolist() == [0, 1, 272] and tokens.order[3:7].tolist() == [5, 9, 11, 270]
    again = rank_tokens(model, None, [{"input_ids": ids, "labels": torch.tensor([[-100, 5]])}])
    assert int(again.counts[5]) == 5 and again.used == 7


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"target": "vocabulary=1"}, "1 token can't do: 259 must stay"),
        ({"target": "vocabulary=used", "data": None}, "the tokens that stay are those of your text"),
        ({"target": "vocabulary=used", "data": "self"}, "the tokens that stay are those of your text"),
        ({"target": "vocabulary=used", "tokenizer": None}, "there is no tokenizer"),
        ({"target": "vocabulary=used", "data": torch.tensor([[400]])}, "token 400 of a vocabulary of 280"),
        ({"target": "vocabulary=300", "kinds": ("neurons",)}, "it says nothing of other kinds"),
        ({"target": "params<=1%", "kinds": ("vocabulary",)}, "can't be met: with every group at its floor"),
        ({"target": "50%", "kinds": ("vocabulary",), "schedule": "iterative:2"}, "cut at once"),
        ({"target": "vocabulary=used", "keep": ("*embed_tokens*",)}, "nothing can be cut"),
        ({"target": "2:4", "kinds": ("vocabulary",)}, "makes no N:M pattern"),
        ({"target": "vocabulary=used", "method": "flap"}, "flap scores no tokens"),
        ({"target": "params<=90%", "kinds": ("vocabulary",), "method": "wanda"}, "wanda scores no tokens"),
    ],
)
def test_what_cannot_be_done_is_one_named_error(
    model: Any, text: Path, settings: dict[str, Any], match: str
) -> None:
    before = copy.deepcopy(model.state_dict())
    given = {"data": text, "tokenizer": byte_level(), **settings}
    with pytest.raises(SecateurError, match=match):
        secateur.prune(model, inplace=True, **given)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert model.config.vocab_size == 280


def test_training_cuts_no_vocabulary(model: Any) -> None:
    from secateur.pruning.request import read_request

    with pytest.raises(SecateurError, match="train_prune cuts no vocabulary"):
        read_request("train_prune", "lottery-ticket", "50%", {"kinds": ("vocabulary",)})


def test_a_vocabulary_that_is_not_what_it_seems_is_caught_by_the_proof(
    tiny_llama: Callable[..., Any],
) -> None:
    model = tiny_llama(vocab_size=32)

    class Odd(type(model)):  # type: ignore[misc]
        """Logits that depend on how many tokens there are."""

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            out = super().forward(*args, **kwargs)
            out.logits = out.logits * self.lm_head.weight.shape[0] ** 0.5
            return out

    model.__class__ = Odd
    inputs = {"input_ids": torch.arange(10)[None]}
    graph = trace(model, inputs, vocabulary=True)
    assert graph["model.embed_tokens:vocabulary"].reason is None
    why = prove_tokens(model, graph, "model.embed_tokens:vocabulary", torch.arange(8), inputs)
    assert why is not None and why.startswith("outputs on kept tokens differ")


def encoder_decoder() -> tuple[Any, dict[str, Any]]:
    from transformers import BartConfig, BartForConditionalGeneration

    config = BartConfig(vocab_size=64, d_model=32, encoder_ffn_dim=48, decoder_ffn_dim=48, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4, decoder_attention_heads=4)  # fmt: skip
    ids = torch.arange(10)[None]
    return BartForConditionalGeneration(config), {"input_ids": ids, "decoder_input_ids": ids[:, :5]}


def masked() -> tuple[Any, dict[str, Any]]:
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4)  # fmt: skip
    return BertForMaskedLM(config), {"input_ids": torch.arange(10)[None]}


@pytest.mark.parametrize("make", [encoder_decoder, masked])
def test_heads_with_biases_and_encoder_decoders_are_cut_too(make: Any) -> None:
    model, inputs = make()
    model.eval()
    graph = trace(model, inputs, vocabulary=True)
    (group,) = graph.prunable("vocabulary")
    kept = torch.tensor([0, 1, 2, 3, 17, 40])
    assert prove_tokens(model, graph, group.name, kept, inputs) is None
    assert all(i in (0, 1, 2) for ids in named_tokens(model, 64).values() for i in ids)
    changes = cut_units(model, graph, {group.name: kept})
    assert changes.uniform and model.config.vocab_size == 6
    assert sum(p.numel() for p in model.parameters()) == graph.params({group.name: kept})


def test_without_being_asked_the_vocabulary_is_frozen(model: Any) -> None:
    graph = trace(model, {"input_ids": torch.arange(10)[None]})
    assert not graph.prunable("vocabulary")
    assert str(graph["model.embed_tokens:neurons"].reason).startswith("rows are looked up by index")


def test_a_full_disk_leaves_nothing(model: Any, text: Path, tmp_path: Path, monkeypatch: Any) -> None:
    pruned = secateur.prune(model, target="vocabulary=used", data=text, tokenizer=byte_level())

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(type(pruned.tokenizer), "save_pretrained", full)
    with pytest.raises(SecateurError, match="the disk is full; nothing was written"):
        pruned.save(tmp_path / "out")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))
