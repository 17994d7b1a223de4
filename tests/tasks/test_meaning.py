"""Sentences as vectors: means of a tiny BERT's states, and the real encoder where the cache has it."""

import pytest
import torch
from safetensors.torch import save_file
from transformers import BertConfig, BertModel, BertTokenizer

from secateur.cli.catalogue import found
from secateur.tasks import meaning, sst2
from secateur.taxonomy.axes import record
from secateur.utils.files import cache_dir

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "tokens", "leave", "heads", "stay"]


def test_the_mean_over_a_sentences_own_words(tmp_path, monkeypatch):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = BertConfig(vocab_size=len(WORDS), max_position_embeddings=16, **sizes)
    encoder = BertModel(config).eval()
    state = {name: value.contiguous() for name, value in encoder.state_dict().items()}
    save_file({**state, "embeddings.position_ids": torch.arange(16)[None]}, tmp_path / "model.safetensors")
    config.save_pretrained(tmp_path)
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS))
    BertTokenizer(vocab=str(tmp_path / "vocab.txt")).save_pretrained(tmp_path)
    monkeypatch.setattr(meaning, "encoder_folder", lambda: tmp_path)
    rows = meaning.vectors(["tokens leave", "heads stay tokens leave"])
    for row, ids in zip(rows, ([2, 5, 6, 3], [2, 7, 8, 5, 6, 3]), strict=True):
        with torch.no_grad():  # each alone, without padding
            mean = encoder(input_ids=torch.tensor([ids])).last_hidden_state[0].mean(0)
        torch.testing.assert_close(row, mean / mean.norm())


@pytest.mark.skipif(
    not (cache_dir() / f"{sst2.PACKAGE}-{sst2.PUBLISHED}" / "config.json").is_file(),
    reason="the encoder isn't in the cache",
)
def test_what_is_said_otherwise_is_found():
    some = [
        record(name) for name in ("divprune", "lottery-ticket", "lrp-pruning", "tas", "fastervlm", "sd-prune")
    ]
    assert (
        found("keep pieces of the picture that are unlike each other", some, "meaning")[0].spec == "divprune"
    )
    assert found("find the winning ticket", some, "meaning")[0].spec == "lottery-ticket"
    best = found("saliency-driven pruning of tokens without training", some, "meaning")
    assert {info.spec for info in best[:2]} == {"divprune", "fastervlm"}
    assert found("banana bread recipe", some, "meaning") == []
