"""Search by words: what holds more of what was asked for, in rarer words, comes first."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

_STOPS = """
a an and any are as at be by can do does for from how i in into is it its like me my no of on one or so than that the them this to use
uses using want was what when where which while who with without would you
approach based driven guided method methods model models network networks prune pruned prunes pruning system systems
"""
STOP = frozenset(_STOPS.split())
"""Words that tell no method from another; they count only where a search holds nothing else."""
ALIKE = (
    (
        r"\b(?:without|no|needs? no|free of)\s+(?:any\s+|further\s+|more\s+)?(?:re-?|fine-?)?(?:training|tuning)\b",
        " trainingfree ",
    ),
    (r"\btraining[- ]free\b", " trainingfree "),
    (
        r"\b(?:without|no|needs? no)\s+(?:any\s+)?(?:calibration\s+|training\s+)?data\b|\bdata[- ]free\b",
        " datafree ",
    ),
    (r"\bone[- ]shot\b", " oneshot "),
    (r"\b(?:large )?language models?\b", " llm "),
    (r"\b(?:vision[- ]language|multi-?modal)\b", " vlm "),
    (r"\b(?:vision|image) transformers?\b", " vit "),
    (r"\b(?:conv nets?|convnets?|convolutional(?: neural)? networks?)\b", " cnn "),
    (r"\bstate[- ]space(?: models?)?\b|\bmamba\b", " ssm "),
    (r"iz(?=ed\b|es?\b|ing\b|ations?\b)", "is"),
)
"""What is written in several ways, as one word."""
ALSO = {
    "S": "salient heatmap explanation attribution relevance",
    "SAL": "gradient relevance importance",
    "ATT": "saliency importance",
    "MAG": "smallest weights",
    "LOSS": "sensitivity hessian second-order taylor",
    "REG": "sparsity regularisation",
    "DIV": "redundancy duplicates similarity",
    "TXT": "question prompt query",
    "GATE": "learned predictor",
    "T": "visual patches",
    "P": "visual tokens",
    "L": "depth block",
    "C": "width filter",
    "F": "width channel",
    "N:M": "2:4 semi-structured",
    "unstr": "sparse sparsity",
    "KD": "knowledge distillation teacher",
    "NAS": "architecture search",
    "search": "searched",
    "dyn": "adaptive input-dependent",
    "vla": "robot vision-language-action",
    "diffusion": "image generation text-to-image",
    "clip": "image text retrieval",
    "cnn": "images classification",
    "llm": "transformer",
    "bert": "transformer encoder",
    "vit": "transformer",
}
"""By which words a member of an axis is looked for, beside its own and its meaning."""
ENDINGS = (
    "isations", "isation", "ations", "ation", "ating", "ated", "ates", "ate", "ities", "ity", "ions", "ion", "ings", "ing", "ies",
    "ised", "ises", "ise", "ive", "ed", "es", "ly", "y", "e",
)  # fmt: skip
ENOUGH = 0.5
"""How much of the best match's share a match must have."""
DERIVED = 0.8
"""What a word counts that stands on an axis, beside one in a title or description."""
NAMED = 1.2
"""What a word counts that is a word of the name."""


def stem(word: str) -> str:
    """A word without its ending: merging, merged and merges are one.

    >>> stem("merging"), stem("merges"), stem("sparsity"), stem("heads")
    ('merg', 'merg', 'spars', 'head')
    """
    for ending in ENDINGS:
        if word.endswith(ending) and len(word) - len(ending) >= 4:
            return word.removesuffix(ending)
    plural = len(word) > 3 and word.endswith("s") and not word.endswith("ss")
    return word[:-1] if plural else word


def stems(text: str) -> list[str]:
    """The words of a text, without endings; those of a search that tell nothing are left out by `asked`."""
    text = text.casefold()
    for pattern, word in ALIKE:
        text = re.sub(pattern, word, text)
    return [stem(word) for word in re.findall(r"[a-z0-9]+(?:[.:][a-z0-9]+)*", text)]


def asked(query: str) -> list[str]:
    """The words of a search that tell something, once each.

    >>> asked("pruning of tokens without training")
    ['token', 'trainingfree']
    """
    words = list(dict.fromkeys(stems(query)))
    telling = [word for word in words if word not in _STOP]
    return telling or words


_STOP = frozenset(stem(word) for word in STOP) | STOP


def ranked(query: str, documents: Sequence[tuple[str, str, str]]) -> list[tuple[int, float]]:
    """(number of the document, share of the search that it holds), best first.

    >>> ranked("merge tokens", [("a", "drops tokens", ""), ("b", "merges tokens", ""), ("c", "cuts heads", "")])[0]
    (1, 1.0)

    documents: the name, the text, and what was derived. Words weigh by how few documents hold them. A word of four letters
    or more may be a part of a name. What holds less than half as much as the best is left out.
    """
    words = asked(query)
    read = [
        (name.casefold(), set(stems(f"{name} {text}")), set(stems(derived)))
        for name, text, derived in documents
    ]
    held = {word: [_holds(word, *document) for document in read] for word in words}
    weights = {
        word: math.log(1 + len(read) / count) for word in words if (count := sum(1 for x in held[word] if x))
    }
    total = sum(weights.values())
    if not total:
        return []
    shares = [sum(weights[word] * held[word][n] for word in weights) / total for n in range(len(read))]
    best = max(shares)
    order = sorted(range(len(read)), key=lambda n: -shares[n])
    return [(n, shares[n]) for n in order if shares[n] >= ENOUGH * best]


def unknown(query: str, documents: Sequence[tuple[str, str, str]]) -> list[str]:
    """The words of a search that no document holds, as they are looked for."""
    read = [
        (name.casefold(), set(stems(f"{name} {text}")), set(stems(derived)))
        for name, text, derived in documents
    ]
    return [word for word in asked(query) if not any(_holds(word, *document) for document in read)]


def _holds(word: str, name: str, own: set[str], derived: set[str]) -> float:
    if word in stems(name):
        return NAMED
    if word in own or (len(word) >= 4 and word in name):
        return 1.0
    return DERIVED if word in derived else 0.0
