"""llama2.c files against a forward and an encoder written here after run.c."""

import struct
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from secateur.errors import SecateurError
from secateur.tasks.llama2c import load_tokenizer, load_weights
from secateur.utils.files import require_data


def write_weights(path: Path, kv_heads: int, tied: bool) -> dict[str, Any]:
    dim, hidden, layers, heads, vocab, context = 16, 24, 2, 4, 20, 12
    kv, rng = dim // heads * kv_heads, np.random.default_rng(0)
    shapes = {
        "embedding": (vocab, dim),
        "norm1": (layers, dim),
        "wq": (layers, dim, dim),
        "wk": (layers, kv, dim),
        "wv": (layers, kv, dim),
        "wo": (layers, dim, dim),
        "norm2": (layers, dim),
        "w1": (layers, hidden, dim),
        "w2": (layers, dim, hidden),
        "w3": (layers, hidden, dim),
        "norm": (dim,),
        "rotary": (2, context, dim // heads // 2),
    }
    if not tied:
        shapes["head"] = (vocab, dim)
    w = {name: rng.normal(size=shape).astype(np.float32) * 0.5 for name, shape in shapes.items()}
    header = struct.pack("7i", dim, hidden, layers, heads, kv_heads, vocab if tied else -vocab, context)
    path.write_bytes(header + b"".join(value.tobytes() for value in w.values()))
    return w | {"heads": heads, "kv_heads": kv_heads}


def run_c(w: dict[str, Any], tokens: list[int]) -> np.ndarray:
    """The forward of karpathy/llama2.c run.c, one token after the other."""
    heads, kv_heads, dim = w["heads"], w["kv_heads"], w["embedding"].shape[1]
    size, logits = dim // heads, []
    keys: list[list[np.ndarray]] = [[] for _ in w["wq"]]
    values: list[list[np.ndarray]] = [[] for _ in w["wq"]]

    def norm(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
        return weight * x / np.sqrt((x * x).mean() + 1e-5)

    def rotate(x: np.ndarray, position: int) -> np.ndarray:
        out = x.copy()
        for i in range(0, len(x), 2):
            angle = position / 10000 ** ((i % size) / size)
            out[i] = x[i] * np.cos(angle) - x[i + 1] * np.sin(angle)
            out[i + 1] = x[i] * np.sin(angle) + x[i + 1] * np.cos(angle)
        return out

    for position, token in enumerate(tokens):
        x = w["embedding"][token].astype(np.float64)
        for n in range(len(w["wq"])):
            y = norm(x, w["norm1"][n])
            q = rotate(w["wq"][n] @ y, position)
            keys[n].append(rotate(w["wk"][n] @ y, position))
            values[n].append(w["wv"][n] @ y)
            mixed = np.zeros(dim)
            for h in range(heads):
                own = slice(h * size, (h + 1) * size)
                shared = slice(h // (heads // kv_heads) * size, (h // (heads // kv_heads) + 1) * size)
                scores = np.array([q[own] @ key[shared] / np.sqrt(size) for key in keys[n]])
                weights = np.exp(scores - scores.max())
                weights /= weights.sum()
                mixed[own] = sum(a * value[shared] for a, value in zip(weights, values[n], strict=True))
            x = x + w["wo"][n] @ mixed
            y = norm(x, w["norm2"][n])
            gate = w["w1"][n] @ y
            x = x + w["w2"][n] @ (gate / (1 + np.exp(-gate)) * (w["w3"][n] @ y))
        logits.append(w.get("head", w["embedding"]) @ norm(x, w["norm"]))
    return np.stack(logits)


@pytest.mark.parametrize(("kv_heads", "tied"), [(4, True), (2, True), (2, False)])
def test_logits_are_those_of_run_c(tmp_path: Path, kv_heads: int, tied: bool) -> None:
    w = write_weights(tmp_path / "m.bin", kv_heads, tied)
    tokens = [1, 5, 7, 7, 19, 0, 3]
    got = load_weights(tmp_path / "m.bin")(torch.tensor([tokens])).logits[0]
    torch.testing.assert_close(got, torch.from_numpy(run_c(w, tokens)).float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("change", [slice(0, -4), slice(0, 20)])
def test_a_file_of_the_wrong_length_is_refused(tmp_path: Path, change: slice) -> None:
    write_weights(tmp_path / "m.bin", 2, True)
    (tmp_path / "m.bin").write_bytes((tmp_path / "m.bin").read_bytes()[change])
    with pytest.raises(SecateurError, match=r"llama2\.c"):
        load_weights(tmp_path / "m.bin")


def encode_c(path: Path, text: str) -> list[int]:
    """The encoder of run.c: characters or bytes, then the best-scoring neighbours merged until none is left."""
    data, at, table = path.read_bytes(), 4, []
    while at < len(data):
        score, length = struct.unpack_from("fi", data, at)
        table.append((data[at + 8 : at + 8 + length], score))
        at += 8 + length
    index = {token: i for i, (token, _) in enumerate(table)}
    ids = [index[b" "]] if text else []
    for character in text:
        raw = character.encode()
        ids += [index[raw]] if raw in index else [byte + 3 for byte in raw]
    while True:
        pairs = [(table[a][0] + table[b][0], i) for i, (a, b) in enumerate(pairwise(ids))]
        known = [(table[index[token]][1], -i, index[token]) for token, i in pairs if token in index]
        if not known:
            return [1, *ids]
        _, i, token = max(known)
        ids[-i : -i + 2] = [token]


@pytest.mark.needs_data
@pytest.mark.parametrize(
    "text", ["Once upon a time, there was a dream.", "Zoë's  3 日本\nnew λ x", "aaaa  the", "a"]
)
def test_tokens_are_those_of_run_c(text: str) -> None:
    path = require_data("pretrained/aidreams_tok512.bin")
    tokenizer = load_tokenizer(path)
    assert tokenizer(text)["input_ids"] == encode_c(path, text)
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text


@pytest.mark.needs_data
def test_aidreams_has_the_stated_size_and_writes_english(aidreams: tuple[nn.Module, Any]) -> None:
    model, tokenizer = aidreams
    assert sum(p.numel() for p in model.parameters()) == 230_976
    prompt = tokenizer("Once upon a time", return_tensors="pt")["input_ids"]
    text = tokenizer.decode(
        model.generate(prompt, max_new_tokens=100, do_sample=False)[0], skip_special_tokens=True
    )
    english = {"a", "the", "of", "and", "to", "into", "like", "as", "in", "I"}
    assert len(english & set(text.replace(",", "").split())) >= 4, text
