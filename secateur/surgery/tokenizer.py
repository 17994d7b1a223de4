"""A fast tokenizer with some of its tokens: what each is made of, which can't leave, and the smaller one.

Read and written as the JSON of the `tokenizers` library: BPE (byte-level or not), Unigram, WordPiece and WordLevel.
"""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from secateur.errors import SecateurError

MODELS = ("BPE", "Unigram", "WordPiece", "WordLevel")
FIX = "leave vocabulary out of kinds, or give a tokenizer.json of the tokenizers library"


@dataclass(frozen=True)
class Pieces:
    """A tokenizer's vocabulary: tokens by id, what each is merged from, and those that must stay, by reason."""

    tokens: dict[int, str]
    parts: dict[int, tuple[int, ...]]
    fixed: dict[str, set[int]]

    def characters(self, ids: Sequence[int]) -> set[int]:
        """Tokens of one character that occurs in these; none where bytes can spell everything."""
        if self.fixed["bytes"]:
            return set()
        used = {char for i in ids for char in self.tokens.get(i, "")} | {chr(n) for n in range(33, 127)}
        return {i for i, token in self.tokens.items() if token.removeprefix("##").removeprefix("▁") in used}


def read_pieces(tokenizer: Any) -> Pieces:
    """The vocabulary of a fast tokenizer of transformers.

    >>> pieces = read_pieces(tokenizer)  # doctest: +SKIP
    >>> [pieces.tokens[i] for i in pieces.parts[28120]]  # "walking" is "walk" and "ing"  # doctest: +SKIP

    `parts` are the tokens that the merges go through on their way to each, so that a set which holds the parts of its
    tokens splits text into the same tokens as the whole vocabulary wherever that takes none but tokens of the set.

    Raises `SecateurError` for a tokenizer without such a description, or of another kind.
    """
    document = _document(tokenizer)
    model = document["model"]
    vocabulary = _vocabulary(model)
    added = {item["id"]: item["content"] for item in document["added_tokens"]}
    names = {token: i for i, token in {**{i: t for t, i in vocabulary.items()}, **added}.items()}
    fixed: dict[str, set[int]] = {"special": {*added, *_processor_ids(document["post_processor"])}}
    if isinstance(model.get("unk_token"), str) and model["unk_token"] in names:
        fixed["special"].add(names[model["unk_token"]])
    if model["type"] == "Unigram" and model.get("unk_id") is not None:
        fixed["special"].add(model["unk_id"])
    fixed["bytes"] = {vocabulary[token] for token in _byte_tokens(document) if token in vocabulary}
    parts = _merged_from(model, vocabulary) if model["type"] == "BPE" else {}
    tokens = {i: token for token, i in vocabulary.items()} | added
    return Pieces(tokens, parts, fixed)


def trim_tokenizer(tokenizer: Any, kept: Sequence[int]) -> Any:
    """A copy of a fast tokenizer with these tokens, numbered from 0 in their order.

    >>> small = trim_tokenizer(tokenizer, kept)  # doctest: +SKIP
    >>> [kept[i] for i in small("text of kept tokens").input_ids] == tokenizer("text of kept tokens").input_ids  # doctest: +SKIP
    True

    Merges stay where both sides and the result do; special tokens, templates around a text and padding are renumbered.
    Text of other tokens falls to smaller pieces, to bytes, or to the unknown token.

    Raises `SecateurError` where a token that must stay isn't among them.
    """
    document = _document(tokenizer)
    new = {old: place for place, old in enumerate(sorted(kept))}
    for why, ids in read_pieces(tokenizer).fixed.items():
        if lost := sorted(ids - new.keys()):
            what = {"special": "a special token", "bytes": "the token of a byte"}[why]
            raise SecateurError(f"{what}, {lost[0]}, isn't kept", where="tokenizer", fix="keep it")
    model = document["model"]
    if model["type"] == "Unigram":
        model["vocab"] = [model["vocab"][i] for i in new if i < len(model["vocab"])]
        model["unk_id"] = new.get(model.get("unk_id"))
    else:
        model["vocab"] = {t: new[i] for t, i in model["vocab"].items() if i in new}
    if model["type"] == "BPE":
        model["merges"] = [
            merge
            for merge in model["merges"]
            if all(token in model["vocab"] for token in (*_pair(merge), _joined(model, *_pair(merge))))
        ]
    document["added_tokens"] = [{**item, "id": new[item["id"]]} for item in document["added_tokens"]]
    document["post_processor"] = _renumbered(document["post_processor"], new)
    if document.get("padding"):
        document["padding"]["pad_id"] = new[document["padding"]["pad_id"]]
    from tokenizers import Tokenizer

    small = copy.deepcopy(tokenizer)
    small._tokenizer = Tokenizer.from_str(json.dumps(document))
    _check(tokenizer, small, new)
    return small


def _document(tokenizer: Any) -> dict[str, Any]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or not hasattr(backend, "to_str"):
        raise SecateurError(
            f"{type(tokenizer).__name__} can't be cut: it has no description that can be edited",
            where="tokenizer",
            fix=FIX,
        )
    document = json.loads(backend.to_str())
    kind = document["model"]["type"]
    if kind not in MODELS or document["model"].get("continuing_subword_prefix") and kind == "BPE":
        raise SecateurError(f"a {kind} tokenizer of this form can't be cut", where="tokenizer", fix=FIX)
    return document


def _vocabulary(model: dict[str, Any]) -> dict[str, int]:
    if model["type"] == "Unigram":
        return {token: i for i, (token, _) in enumerate(model["vocab"])}
    return dict(model["vocab"])


def _byte_tokens(document: dict[str, Any]) -> list[str]:
    """The tokens that spell any text: letters for bytes, or <0x00> to <0xFF>."""
    if document["model"].get("byte_fallback"):
        return [f"<0x{byte:02X}>" for byte in range(256)]
    if '"ByteLevel"' in json.dumps([document["pre_tokenizer"], document["decoder"]]):
        from tokenizers.pre_tokenizers import ByteLevel

        suffix = document["model"].get("end_of_word_suffix") or ""
        letters = ByteLevel.alphabet()
        return [*letters, *(letter + suffix for letter in letters if suffix)]
    return []


def _pair(merge: Any) -> tuple[str, str]:
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right


def _joined(model: dict[str, Any], left: str, right: str) -> str:
    return left + right


def _merged_from(model: dict[str, Any], vocabulary: dict[str, int]) -> dict[int, tuple[int, ...]]:
    """Every token that the merges pass on the way to each, by id."""
    ranks = {_pair(merge): rank for rank, merge in enumerate(model["merges"])}
    suffix = model.get("end_of_word_suffix") or ""
    parts: dict[int, tuple[int, ...]] = {}
    for token, i in vocabulary.items():
        bare = token.removesuffix(suffix) if suffix else token
        symbols = list(bare)
        if suffix and token.endswith(suffix) and symbols:
            symbols[-1] += suffix
        passed = list(symbols)
        while len(symbols) > 1:
            best = min(itertools.pairwise(symbols), key=lambda pair: ranks.get(pair, len(ranks)))
            if best not in ranks:
                break
            place, merged = 0, []
            while place < len(symbols):
                if tuple(symbols[place : place + 2]) == best:
                    merged.append(best[0] + best[1])
                    place += 2
                else:
                    merged.append(symbols[place])
                    place += 1
            symbols = merged
            passed += merged
        if symbols == [token] and len(token) > 1:
            parts[i] = tuple(dict.fromkeys(vocabulary[p] for p in passed if p in vocabulary and p != token))
    return parts


def _processors(processor: Any) -> Iterator[dict[str, Any]]:
    if isinstance(processor, dict):
        yield processor
        for inner in processor.get("processors") or ():
            yield from _processors(inner)


def _processor_ids(processor: Any) -> set[int]:
    """Tokens that are put around a text."""
    ids: set[int] = set()
    for one in _processors(processor):
        for named in (one.get("special_tokens") or {}).values():
            ids |= {*named["ids"]}
        ids |= {one[key][1] for key in ("sep", "cls") if isinstance(one.get(key), list)}
    return ids


def _renumbered(processor: Any, new: dict[int, int]) -> Any:
    for one in _processors(processor):
        for named in (one.get("special_tokens") or {}).values():
            named["ids"] = [new[i] for i in named["ids"]]
        for key in ("sep", "cls"):
            if isinstance(one.get(key), list):
                one[key][1] = new[one[key][1]]
    return processor


def _check(old: Any, small: Any, new: dict[int, int]) -> None:
    """The smaller tokenizer gives every kept token its new number."""
    before, after = old.backend_tokenizer, small.backend_tokenizer
    for i, place in new.items():
        token = before.id_to_token(i)
        if token is not None and after.token_to_id(token) != place:
            raise SecateurError(
                f"token {token!r} would be {after.token_to_id(token)}, not {place}",
                where="tokenizer",
                fix=FIX,
            )
