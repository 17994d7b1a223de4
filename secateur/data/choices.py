"""Zero-shot sets as pairs of a context and its continuations, with the prompts of EleutherAI/lm-evaluation-harness.

One departure: commonsense_qa asks for the answer itself, as OLMo does, and not for its letter, at which small
models guess. The files hold half of the items of each set (SECATEUR_DATA, folder commonsense_mc).
"""

import gzip
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from secateur.errors import SecateurError, choose
from secateur.utils.files import require_data


@dataclass(frozen=True)
class Item:
    """One question: `contexts[i]` is followed by `continuations[i]`; `choices[i]` is what acc_norm divides by (bytes)."""

    contexts: tuple[str, ...]
    continuations: tuple[str, ...]
    choices: tuple[str, ...]
    label: int


def _ask(context: str, choices: list[str], label: int) -> Item:
    return Item((context,) * len(choices), tuple(f" {c}" for c in choices), tuple(choices), label)


def _question(d: dict[str, Any]) -> Item:
    return _ask(f"Question: {d['question']}\nAnswer:", d["choices"], d["label"])


def _bare(d: dict[str, Any]) -> Item:
    return _ask(d["question"], d["choices"], d["label"])


def _hellaswag(d: dict[str, Any]) -> Item:
    def clean(text: str) -> str:
        return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")

    return _ask(clean(d["question"]), [clean(c) for c in d["choices"]], d["label"])


def _boolq(d: dict[str, Any]) -> Item:
    return _ask(f"{d['passage']}\nQuestion: {d['question']}?\nAnswer:", d["choices"], d["label"])


def _sciq(d: dict[str, Any]) -> Item:
    return _ask(f"{d['passage'].lstrip()}\nQuestion: {d['question']}\nAnswer:", d["choices"], d["label"])


def _rte(d: dict[str, Any]) -> Item:
    return _ask(
        f"{d['passage']}\nQuestion: {d['question']} True or False?\nAnswer:", ["True", "False"], d["label"]
    )


def _copa(d: dict[str, Any]) -> Item:
    word = {"cause": "because", "effect": "therefore"}[d["question"]]
    choices = [c[0].lower() + c[1:] for c in d["choices"]]
    return _ask(f"{d['passage'].strip()[:-1]} {word}", choices, d["label"])


def _social_iqa(d: dict[str, Any]) -> Item:
    return _ask(f"Q: {d['passage']} {d['question']}\nA:", d["choices"], d["label"])


def _winogrande(d: dict[str, Any]) -> Item:
    before, after = d["question"].split("_", 1)
    rest = f" {after.strip()}"
    contexts = tuple(before + choice for choice in d["choices"])
    return Item(contexts, (rest,) * len(contexts), (rest[1:],) * len(contexts), d["label"])


def _lambada(d: dict[str, Any]) -> Item:
    context, word = d["text"].rsplit(" ", 1)
    return Item((context,), (f" {word}",), (word,), 0)


SETS: dict[str, tuple[str, Callable[[dict[str, Any]], Item]]] = {
    "arc_easy": ("arc_easy.test", _question),
    "arc_challenge": ("arc_challenge.test", _question),
    "piqa": ("piqa.validation", _question),
    "hellaswag": ("hellaswag.validation", _hellaswag),
    "boolq": ("boolq.validation", _boolq),
    "winogrande": ("winogrande_xl.validation", _winogrande),
    "openbookqa": ("openbookqa.test", _bare),
    "sciq": ("sciq.validation", _sciq),
    "copa": ("copa.validation", _copa),
    "rte": ("rte.validation", _rte),
    "social_iqa": ("social_iqa.validation", _social_iqa),
    "commonsense_qa": ("commonsense_qa.validation", _question),
    "lambada": ("lambada_openai.test", _lambada),
}


def chance(items: Sequence[Item]) -> float:
    """The share of these questions that guessing answers; 0 where the answer is a word and not one of several.

    >>> chance([_ask("Q", ["a", "b"], 0), _ask("Q", ["a", "b", "c", "d"], 1)])
    0.375
    """
    return sum(1 / len(item.choices) if len(item.choices) > 1 else 0.0 for item in items) / len(items)


def load_items(name: str, limit: int | None = None) -> list[Item]:
    """The first `limit` items of a set, in the order of the file.

    >>> load_items("openbookqa", 1)[0].continuations[0]  # doctest: +SKIP
    ' make more phone calls'

    An item with one continuation (lambada) is right where every one of its tokens is the likeliest.
    Raises SecateurError for an unknown name, a missing file, or a limit below 1.
    """
    choose(name, SETS, error="no such set of questions", where=name)
    if limit is not None and limit < 1:
        raise SecateurError(f"{limit} items is nothing", where="limit", fix="ask for at least 1")
    file, item = SETS[name]
    with gzip.open(require_data(f"commonsense_mc/{file}.jsonl.gz"), "rt", encoding="utf-8") as lines:
        return [item(json.loads(line)) for line in islice(lines, limit)]
