"""Tokenizers in GGUF files: byte-level BPE as llama.cpp's "gpt2", BPE of characters with bytes behind them as its "llama"."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from secateur.errors import SecateurError
from secateur.families.gguf import SPLITS

WHERE = "GGUF"
FIX = "save the model as a folder, or pass no tokenizer"
NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
NAMES = {"bos": "bos", "eos": "eos", "unk": "unk", "pad": "pad"}


def check_tokenizer(tokenizer: Any, size: int) -> None:
    """Refuse a tokenizer that llama.cpp has no name for, or one with more tokens than the model."""
    document = _document(tokenizer)
    _kind(document)
    if len(tokenizer) > size:
        raise SecateurError(
            f"the tokenizer has {len(tokenizer)} tokens, the model {size}",
            where=WHERE,
            fix="give the model's own",
        )


def add_tokenizer(writer: Any, tokenizer: Any, config: Any, size: int) -> None:
    """The tokenizer's keys: tokens with their types, merges or scores, special tokens, chat template; `size` tokens."""
    if tokenizer is None:
        writer.add_tokenizer_model("none")
        return
    document = _document(tokenizer)
    model, split = _kind(document)
    tokens, kinds = _tokens(tokenizer, document, size)
    writer.add_tokenizer_model(model)
    writer.add_tokenizer_pre(split)
    writer.add_token_list(tokens)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in document["model"]["merges"]]
    if model == "llama":
        writer.add_token_scores(_scores(tokens, merges))
        writer.add_add_space_prefix(_prefixed(document))
    else:
        writer.add_token_merges(merges)
    writer.add_token_types(kinds)
    for ours, theirs in NAMES.items():
        token = getattr(tokenizer, f"{ours}_token_id", None)
        if token is None:
            token = getattr(config, f"{ours}_token_id", None)
        token = token[0] if isinstance(token, list) else token
        if token is not None and 0 <= token < size:
            getattr(writer, f"add_{theirs}_token_id")(token)
    ids = tokenizer("a").input_ids
    writer.add_add_bos_token(bool(ids) and ids[0] == tokenizer.bos_token_id)
    writer.add_add_eos_token(bool(ids) and ids[-1] == tokenizer.eos_token_id)
    if isinstance(template := getattr(tokenizer, "chat_template", None), str):
        writer.add_chat_template(template)


def _document(tokenizer: Any) -> dict[str, Any]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise SecateurError(f"{type(tokenizer).__name__} has no tokenizer.json", where=WHERE, fix=FIX)
    return json.loads(backend.to_str())


def _kind(document: Mapping[str, Any]) -> tuple[str, str]:
    """(tokenizer.ggml.model, tokenizer.ggml.pre)."""
    model = document["model"]
    if model["type"] != "BPE":
        raise SecateurError(
            f"llama.cpp reads no {model['type']} tokenizer of such a model", where=WHERE, fix=FIX
        )
    if model.get("byte_fallback"):
        return "llama", "default"
    steps = document["pre_tokenizer"] or {}
    steps = steps.get("pretokenizers", [steps]) if steps else []
    kinds = [step.get("type") for step in steps]
    if kinds == ["ByteLevel"] and steps[0]["use_regex"] and not steps[0]["add_prefix_space"]:
        return "gpt2", "gpt-2"
    digits = kinds == ["Digits", "ByteLevel"] and steps[0]["individual_digits"]
    if digits and steps[1]["use_regex"] and not steps[1]["add_prefix_space"]:
        return "gpt2", "smollm"
    if kinds == ["Split", "ByteLevel"] and not steps[1]["use_regex"]:
        pattern = steps[0]["pattern"].get("Regex", "")
        if pattern in SPLITS:
            return "gpt2", SPLITS[pattern]
    raise SecateurError(f"llama.cpp has no name for how its tokenizer splits text ({', '.join(map(str, kinds)) or 'not at all'})", where=WHERE, fix=FIX)  # fmt: skip


def _tokens(tokenizer: Any, document: Mapping[str, Any], size: int) -> tuple[list[str], list[int]]:
    """Every row's token and its type; rows that no token has are unused ones."""
    model = document["model"]
    tokens = [f"[PAD{i}]" for i in range(size)]
    kinds = [UNUSED] * size
    for token, i in model["vocab"].items():
        byte = model.get("byte_fallback") and len(token) == 6 and token.startswith("<0x")
        tokens[i], kinds[i] = token, BYTE if byte else NORMAL
    for item in document["added_tokens"]:
        tokens[item["id"]] = item["content"]
        kinds[item["id"]] = CONTROL if item["special"] else USER
    if (unknown := model.get("unk_token")) in model["vocab"] and model.get("byte_fallback"):
        kinds[model["vocab"][unknown]] = UNKNOWN
    return tokens, kinds


def _scores(tokens: list[str], merges: list[str]) -> list[float]:
    """What is merged first scores highest: minus the rank of the merge that makes a token."""
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(merges):
        left, right = merge.split(" ")
        ranks.setdefault(left + right, rank)
    return [-float(ranks.get(token, len(merges))) for token in tokens]


def _prefixed(document: Mapping[str, Any]) -> bool:
    """Whether a space is put before every text."""
    text = json.dumps([document["normalizer"], document["pre_tokenizer"]])
    return '"Prepend"' in text or '"prepend_scheme": "first"' in text or '"prepend_scheme": "always"' in text
