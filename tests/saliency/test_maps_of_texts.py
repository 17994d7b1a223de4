"""Maps of texts: which tokens the next one comes from, through a small decoder and its tokenizer of bytes."""

import copy
import json

import pytest
import torch
from torch import nn

from secateur import SecateurError
from secateur.cli import main as cli
from secateur.report.words import visible, words_html
from secateur.saliency.text import NextToken, TextMap, text_methods, text_saliency
from secateur.tasks import load_model


@pytest.fixture(scope="module")
def decoder(tiny_folder):
    model, tokenizer = load_model(tiny_folder)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(10)
    return model, tokenizer


@pytest.fixture
def run(capsys):
    def go(*words):
        code = cli.main(["saliency", *map(str, words)])
        out, err = capsys.readouterr()
        return code, out, err

    return go


class Sums(nn.Module):
    """A language model by hand: the logit of token 2 is the sum of all embedded numbers, each weighted by its place."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(3, 2)
        self.config = type("Config", (), {"max_position_embeddings": 8})()
        with torch.no_grad():
            self.table.weight.copy_(torch.tensor([[1.0, 2.0], [0.0, -3.0], [4.0, 0.0]]))

    def get_input_embeddings(self):
        return self.table

    def forward(self, input_ids=None, inputs_embeds=None, use_cache=None):
        x = self.table(input_ids) if inputs_embeds is None else inputs_embeds
        place = torch.arange(1.0, x.shape[1] + 1)[None, :, None]
        score = (x * place).sum((1, 2))
        return torch.stack([0 * score, 0 * score, score], -1)[:, None]


class Letters:
    """Token 0 is a, 1 is b, 2 is c."""

    all_special_ids = ()

    def __call__(self, text, return_offsets_mapping=False):
        return {"input_ids": ["abc".index(letter) for letter in text]}

    def encode(self, text, add_special_tokens=True):
        return ["abc".index(letter) for letter in text.strip()]

    def decode(self, ids):
        return "".join("abc"[i] for i in ids)


@pytest.mark.parametrize(
    ("method", "settings", "expected"),
    [
        # places 1 and 2: (1 + 2) * 1 = 3 and -3 * 2 = -6
        ("lrp", {}, [3.0, -6.0]),
        ("gradient", {"times_input": True}, [3.0, -6.0]),
        ("integrated-gradients", {"steps": 2}, [3.0, -6.0]),
        ("occlusion", {}, [3.0, -6.0]),
        # the gradient is (1, 1) and (2, 2): its length is sqrt(2) and 2 sqrt(2)
        ("gradient", {}, [2**0.5, 8**0.5]),
        ("smoothgrad", {"samples": 2}, [2**0.5, 8**0.5]),
    ],
)
def test_by_hand(method, settings, expected):
    found = text_saliency(Sums(), Letters(), "ab", method, 2, **settings)
    assert found.values.tolist() == pytest.approx(expected, abs=1e-4)
    assert found.tokens == ["a", "b"] and found.word == "c" and found.logit == -3.0
    assert found.additive is (expected[1] < 0)


def test_the_map_names_what_the_model_says_next(decoder):
    model, tokenizer = decoder
    text = "The cat."
    found = text_saliency(model, tokenizer, text)
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    with torch.no_grad():
        logits = model(ids).logits[0, -1]
    assert found.ids == ids[0].tolist() and found.target == int(logits.argmax())
    assert found.logit == pytest.approx(float(logits.max()), rel=1e-4)
    assert found.probability == pytest.approx(float(logits.softmax(0).max()), rel=1e-4)
    assert [i for _, i, _ in found.likeliest] == logits.topk(5).indices.tolist()
    kept = text_saliency(model, tokenizer, text, composite="epsilon")
    assert float(kept.values.sum()) == pytest.approx(found.logit, rel=1e-2)


@pytest.mark.parametrize("method", ["gradient", "integrated-gradients", "lrp", "occlusion", "smoothgrad"])
def test_every_map_leaves_the_model_as_it_was(decoder, method):
    model, tokenizer = decoder
    model = copy.deepcopy(model).train()
    state = {n: t.clone() for n, t in model.state_dict().items()}
    found = text_saliency(model, tokenizer, "word by word", method, "x")
    assert found.values.shape == (12,) and torch.isfinite(found.values).all() and found.values.std() > 0
    assert model.training and all(m.training for m in model.modules())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert all(torch.equal(state[n], t) for n, t in model.state_dict().items())


def test_the_maps_that_read_texts():
    assert text_methods() == ["gradient", "integrated-gradients", "lrp", "occlusion", "smoothgrad"]


def test_the_tokens_joined_are_the_text(decoder):
    """A character of several tokens stands at the last of them."""
    model, tokenizer = decoder
    text = "näh 🙂 ok"
    found = text_saliency(model, tokenizer, text, "gradient")
    assert len(found.tokens) == len(text.encode()) and "".join(found.tokens) == text
    assert found.tokens[1:3] == ["", "ä"] and found.tokens[5:9] == ["", "", "", "🙂"]


def test_a_word_is_named_with_or_without_a_space(decoder):
    model, tokenizer = decoder
    assert text_saliency(model, tokenizer, "ab", "gradient", "z").target == tokenizer.encode("z")[0]
    assert text_saliency(model, tokenizer, "ab", "gradient", 7).target == 7
    with pytest.raises(SecateurError, match="'zebra' is 5 tokens"):
        text_saliency(model, tokenizer, "ab", "gradient", "zebra")
    with pytest.raises(SecateurError, match="no token 257 of 257"):
        text_saliency(model, tokenizer, "ab", "gradient", 257)


def test_mistakes_are_named(decoder):
    model, tokenizer = decoder
    for text in ("", "  \n"):
        with pytest.raises(SecateurError, match="it is empty"):
            text_saliency(model, tokenizer, text)
    with pytest.raises(SecateurError, match="129 tokens, the model reads 128"):
        text_saliency(model, tokenizer, "a" * 129)
    with pytest.raises(SecateurError, match="grad-cam reads pictures, not texts"):
        text_saliency(model, tokenizer, "ab", "grad-cam")
    with pytest.raises(SecateurError, match="takes no embeddings"):
        text_saliency(Blind(), Letters(), "ab")
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.lm_head.weight[3, 3] = torch.nan
    with pytest.raises(SecateurError, match="NaN"):
        text_saliency(broken, tokenizer, "ab")


class Blind(Sums):
    def forward(self, input_ids):
        return super().forward(input_ids)


def test_half_precision_says_much_the_same(decoder):
    model, tokenizer = decoder
    exact, half = (
        text_saliency(copy.deepcopy(model).to(dtype), tokenizer, "half of it", target="a").values
        for dtype in (torch.float32, torch.bfloat16)
    )
    assert half.dtype == torch.float32
    assert torch.corrcoef(torch.stack([exact, half]))[0, 1] > 0.9


def some(values, tokens=("Paris", " <b>", "\nx")):
    values = torch.tensor(values)
    return TextMap(
        values, list(tokens), [1, 2, 3], "lrp", 5, " it", 2.5, 0.25, [(" it", 5, 0.25)], True, {"start": "logit", "low": None}
    )  # fmt: skip


def test_the_page_tells_signs_apart_without_colour_and_needs_nothing_else():
    page = words_html(some([2.0, -1.0, 0.01]))
    assert '<span class="for" style="--s:1.000" title="+2">Paris</span>' in page
    assert '<span class="against" style="--s:0.500" title="\u22121"> &lt;b&gt;</span>' in page
    assert '<span title="+0.01">↵\nx</span>' in page, "what is next to nothing has no mark"
    assert "solid" in page and "dotted" in page and "prefers-color-scheme: dark" in page
    assert not any(word in page for word in ("http:", "https:", "<script", "<link", "<img"))
    plain = words_html(some([2.0, 1.0, 0.5]))
    assert 'class="against"' not in plain and "speaks against" not in plain
    assert [visible(t) for t in (" a", "  ", "", "a\nb ")] == ["␣a", "␣␣", "·", "a↵b␣"]


def test_the_command_prints_json_and_writes_the_page(run, tiny_folder, tmp_path):
    out = tmp_path / "words.html"
    code, printed, err = run(tiny_folder, "--text", "a cat", "--target", "b", "--out", out, "--json")
    assert code == 0, err
    found = json.loads(printed)
    assert [row["text"] for row in found["tokens"]] == list("a cat") and found["word"] == "b"
    assert found["method"] == "lrp" and found["hyperparameters"]["composite"] == "attn-lrp"
    assert out.read_text().count("<span") > 5
    code, printed, err = run(
        tiny_folder, "--text=a cat", "--composite", "epsilon-plus-flat", "--json", "--method", "lrp"
    )
    assert json.loads(printed)["hyperparameters"]["composite"] == "epsilon-plus-flat", err
    code, printed, err = run(tiny_folder, "--text", "a cat", "--method", "gradient", "--times-input")
    assert code == 0 and "next token" in printed, err


@pytest.mark.parametrize(
    ("words", "match"),
    [
        ([], "nothing is given to look at"),
        (["photo.jpg", "--text", "a"], "a picture and a text are given"),
        (["--text", ""], "it is empty"),
        (["--text", "a", "--out", "map.png"], "end the name in .html"),
        (["--text", "a", "--size", "32"], "it is for pictures"),
        (["--text", "a", "--method", "normgrad"], "reads pictures, not texts"),
        (["--text", "a", "--target", "bc"], "'bc' is 2 tokens"),
    ],
)
def test_mistakes_on_the_command_line_are_one_line(run, tiny_folder, words, match):
    code, _, err = run(tiny_folder, *words)
    assert code == 2 and match in err and err.count("\n") == 1


def test_a_classifier_of_pictures_reads_no_text(run):
    code, _, err = run("digits", "--text", "a")
    assert code == 2 and "without a tokenizer" in err


def test_the_wrapped_model_gives_the_logits_of_the_model(decoder):
    model, _ = decoder
    ids = torch.tensor([[5, 9, 7]])
    x = model.get_input_embeddings()(ids).transpose(1, 2)[:, :, None]
    assert torch.allclose(NextToken(model)(x), model(ids).logits[:, -1], atol=1e-6)
