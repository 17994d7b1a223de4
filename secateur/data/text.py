"""Text to calibrate on and to measure perplexity with: what every Python has, a file, a named set, the model itself."""

import functools
import gzip
import json
import lzma
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from secateur.data import hub
from secateur.errors import SecateurError, require
from secateur.utils.files import check_path, require_data
from secateur.utils.progress import track
from secateur.utils.running import device_of, evaluating
from secateur.utils.versions import cache_name, cache_of

SETS = {
    "wikitext2": "wikitext2_valid.txt.xz",
    "ptb": "ptb_valid.txt",
    "brown": "brown.txt.xz",
    "war_and_peace": "war_and_peace.txt.xz",
    "middlemarch": "middlemarch.txt.xz",
    "moby_dick": "moby_dick.txt.xz",
    "tiny_shakespeare": "tiny_shakespeare.txt.xz",
}
STREAM = "-"
NAMES = ("english", *SETS)
"""Every text that has a name; "english" is what every Python has, the part that is not calibrated on."""
OPENERS: dict[str, Any] = {".xz": lzma.open, ".gz": gzip.open}


def load_text(source: str | Path | None = None) -> str:
    """English text.

    >>> len(load_text()) > 300_000
    True

    source None: four fifths of the topics of Python's own help (465 kB), to calibrate on; "english": the last fifth, to
    measure on; a name in SETS: that file of SECATEUR_DATA; `hf:NAME:SPLIT:FIELD`: a data set (`data.hub`); "-": what
    is piped in; else a file: .txt, or .jsonl with a field "text" on each line (joined by an empty line), also .xz or .gz of these.
    Raises SecateurError for an unknown name, a missing or empty file, one that is not UTF-8, or a bad JSON line.
    """
    if source is None or source == "english":
        topics = _python_topics()
        cut = len(topics) * 4 // 5
        return topics[:cut] if source is None else topics[cut:]
    if str(source).startswith(hub.PREFIX):
        return _said(hub.load_rows(str(source)), str(source))
    if str(source) == STREAM:
        return _piped()
    path = require_data(f"text/{SETS[str(source)]}") if str(source) in SETS else Path(source).expanduser()
    if not path.is_file():
        fix = check_path(
            path, f"give a .txt or .jsonl file, {hub.PREFIX}NAME:SPLIT:FIELD, or one of {', '.join(NAMES)}"
        )
        raise SecateurError("no such text", where=str(source), fix=fix)
    try:
        with OPENERS.get(path.suffix, open)(path, "rt", encoding="utf-8") as file:
            text = file.read()
    except (UnicodeDecodeError, lzma.LZMAError, gzip.BadGzipFile, EOFError) as error:
        raise SecateurError(f"cannot be read as UTF-8 text ({error})", where=str(path)) from error
    if ".jsonl" in path.suffixes:
        text = _json_lines(text, str(path))
    return _said(text, str(path))


def _said(text: str, where: str) -> str:
    require(text.strip(), "the text is empty", where=where, fix="give one with words in it")
    return text


@functools.cache
def _piped() -> str:
    """What comes in on stdin, which can be read once."""
    require(
        not sys.stdin.isatty(), "nothing is piped in", where="data -", fix="cat FILE | secateur ... --data -"
    )
    try:
        return _said(sys.stdin.buffer.read().decode("utf-8"), "data -")
    except UnicodeDecodeError as error:
        raise SecateurError(f"cannot be read as UTF-8 text ({error})", where="data -") from error


def _python_topics() -> str:
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise SecateurError(
            "this Python has no pydoc_data to calibrate on",
            where="data",
            fix="give a text file (--data FILE)",
        ) from error
    return "\n\n".join(topics.values())


def _json_lines(text: str, where: str) -> str:
    texts = []
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            try:
                texts.append(json.loads(line)["text"])
                if not isinstance(texts[-1], str):
                    raise TypeError
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                raise SecateurError(
                    f'line {number} is not an object with a string "text"',
                    where=where,
                    fix='write {"text": "..."} a line',
                ) from error
    return "\n\n".join(texts)


def encode(tokenizer: Any, text: str, special: bool = False) -> torch.Tensor:
    """The token ids of a text, int64 [n]; `special`: with what the tokenizer puts around a text."""
    ids = tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]
    return torch.tensor(ids, dtype=torch.int64)


def calibration(
    tokenizer: Any, text: str, samples: int = 128, seqlen: int = 512, seed: int = 0
) -> torch.Tensor:
    """Random windows of a text, int64 [samples, seqlen], on the CPU; the same seed gives the same windows.

    >>> windows = calibration(tokenizer, load_text(), samples=8, seqlen=256)  # doctest: +SKIP

    Windows may overlap, and hold no special tokens. Raises SecateurError for an empty text and for one of fewer
    than `seqlen` tokens.
    """
    if samples < 1 or seqlen < 1:
        raise SecateurError(
            f"{samples} windows of {seqlen} tokens is nothing", where="calibration", fix="ask for at least 1"
        )
    if not text.strip():
        raise SecateurError("the text is empty", where="calibration", fix="give text with words in it")
    ids = encode(tokenizer, text)
    if len(ids) < seqlen:
        raise SecateurError(
            f"the text has {len(ids)} tokens, fewer than one window of {seqlen}",
            where="calibration",
            fix=f"give a longer text, or a window of at most {len(ids)}",
        )
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(ids) - seqlen + 1, (samples,), generator=generator)
    return ids[starts[:, None] + torch.arange(seqlen)]


def sample_from(
    model: nn.Module,
    samples: int = 128,
    seqlen: int = 512,
    seed: int = 0,
    start: int | None = None,
    batch: int = 16,
) -> torch.Tensor:
    """Windows that a causal language model writes itself, int64 [samples, seqlen], on the CPU. No data at all.

    >>> windows = sample_from(model, samples=8, seqlen=256)  # doctest: +SKIP

    Each begins with the token `start`, by default the model's begin-of-text token, else its end-of-text token, else
    one drawn at random, and goes on at temperature 1. Raises SecateurError for a model that has no vocabulary.
    """
    config: Any = getattr(model, "config", None)
    vocabulary = getattr(config, "vocab_size", None)
    if vocabulary is None:
        raise SecateurError("writes no text to calibrate on", where=type(model).__name__, fix="give data")
    if samples < 1 or seqlen < 1:
        raise SecateurError(
            f"{samples} windows of {seqlen} tokens is nothing", where="calibration", fix="ask for at least 1"
        )
    generator = torch.Generator().manual_seed(seed)
    if start is None:
        start = next((i for i in (config.bos_token_id, config.eos_token_id) if isinstance(i, int)), None)
    if start is None:
        first = torch.randint(vocabulary, (samples, 1), generator=generator)
    else:
        first = torch.full((samples, 1), start)
    with evaluating(model):
        return torch.cat(
            [
                _write(model, rows, seqlen, device_of(model), generator)
                for rows in track(first.split(batch), "writing calibration text")
            ]
        )


@torch.no_grad()
def _write(
    model: nn.Module, ids: torch.Tensor, seqlen: int, device: torch.device, generator: torch.Generator
) -> torch.Tensor:
    name, cache, step = cache_name(model.forward), None, ids
    while ids.shape[1] < seqlen:
        out = model(input_ids=step.to(device), **({} if name is None else {name: cache, "use_cache": True}))
        cache = cache_of(out)
        probabilities = out.logits[:, -1].float().softmax(-1).cpu()
        token = torch.multinomial(probabilities, 1, generator=generator)
        ids = torch.cat([ids, token], 1)
        step = token if cache is not None else ids
    return ids


def load_calibration(
    model: nn.Module,
    tokenizer: Any,
    data: str | Path | None = None,
    samples: int = 128,
    seqlen: int = 512,
    seed: int = 0,
) -> torch.Tensor:
    """What `--data` means: None, a file or a set (see load_text), or "self": text sampled from the model.

    int64 [samples, seqlen]; windows are cut to the model's context where that is shorter.
    """
    seqlen = min(seqlen, context(model) or seqlen)
    if data == "self":
        return sample_from(model, samples, seqlen, seed)
    if tokenizer is None:
        raise SecateurError(
            "there is no tokenizer, so text cannot be read", where="data", fix='give "self", or token ids'
        )
    return calibration(tokenizer, load_text(data), samples, seqlen, seed)


def context(model: nn.Module) -> int | None:
    """The longest sequence, in tokens, that a language model's config admits; None where it says nothing."""
    config: Any = getattr(model, "config", None)
    for part in (config, getattr(config, "text_config", None)):
        for name in ("max_position_embeddings", "n_positions", "max_seq_len"):
            if isinstance(getattr(part, name, None), int):
                return getattr(part, name)
    return None
