"""A map of a text as coloured words: one self-contained HTML file, and the same in a terminal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from secateur.report.html import render
from secateur.report.terminal import table
from secateur.saliency.text import TextMap
from secateur.utils.files import atomic_write_text

FAINT, STRONGEST = 0.05, 10
"""Share of the strongest value below which a word has no mark; how many words the first table has."""
FOR, AGAINST = (234, 121, 39), (70, 140, 208)
"""Orange and blue, which people who don't see red and green tell apart."""


def write_words(path: str | Path, found: TextMap, model: str = "model") -> None:
    """Write `words_html` to a file, whole or not at all.

    >>> write_words("words.html", text_saliency(model, tokenizer, "The capital of France is"))  # doctest: +SKIP
    """
    atomic_write_text(path, words_html(found, model))


def words_html(found: TextMap, model: str = "model") -> str:
    """The text with a colour behind each token, orange and underlined for the next one, blue and dotted against it."""
    rows = _rows(found)
    total = float(found.values.sum())
    facts = [
        ("model", model, ""),
        ("method", found.method, ""),
        ("next token", f"{visible(found.word)} ({found.probability:.1%})".replace("%", " %"), ""),
        ("its logit", f"{found.logit:.2f}", ""),
    ]
    if found.additive:
        facts.append(("the tokens add up to", f"{total:.2f}", ""))
    return render(
        "words.html",
        title=f"{visible(found.word).strip()}: where it comes from",
        word=visible(found.word),
        facts=facts,
        rows=rows,
        signed=any(row["value"] < 0 for row in rows),
        strongest=sorted(rows, key=lambda row: -row["strength"])[:STRONGEST],
        likeliest=[(visible(w), str(i), f"{p:.1%}".replace("%", " %")) for w, i, p in found.likeliest],
        settings=", ".join(
            f"{name}={value}" for name, value in found.hyperparameters.items() if value is not None
        ),
    )


def plain_words(found: TextMap, model: str, console: Console) -> None:
    """The words in a terminal: black on orange for the next token, underlined on blue against it; then the strongest ones."""
    chance = f"{found.probability:.1%}"
    console.print(f"[bold]{model}[/bold]  {found.method}  next token {visible(found.word)!r} ({chance})")
    text = Text()
    rows = _rows(found)
    for row in rows:
        if row["strength"] < FAINT:
            text.append(row["token"])
        else:
            colour = FOR if row["value"] > 0 else AGAINST
            mixed = [round(255 + (c - 255) * row["strength"]) for c in colour]
            line = "" if row["value"] > 0 else "underline "
            text.append(row["token"], f"{line}black on rgb({','.join(map(str, mixed))})")
    console.print(text)
    made = table("token", "value", right=["value"])
    for row in sorted(rows, key=lambda row: -row["strength"])[:STRONGEST]:
        made.add_row(visible(row["token"]), row["said"])
    console.print(made)


def visible(token: str) -> str:
    """A token in which spaces at its ends and breaks of lines can be seen.

    >>> visible(" Paris")
    '␣Paris'
    """
    inner = token.strip(" ")
    left = len(token) - len(token.lstrip(" ")) if inner else len(token)
    right = len(token) - left - len(inner)
    return "␣" * left + inner.replace("\n", "↵").replace("\t", "⇥") + "␣" * right or "·"


def _rows(found: TextMap) -> list[dict[str, Any]]:
    most = float(found.values.abs().max()) or 1.0
    return [
        {
            "token": token,
            "shown": token.replace("\n", "↵\n") or "·",
            "seen": visible(token),
            "value": value,
            "said": f"{value:+.3g}".replace("-", "\u2212") if found.additive else f"{value:.3g}",
            "strength": abs(value) / most,
            "mark": ("for" if value > 0 else "against") if abs(value) >= FAINT * most else "",
        }
        for token, value in zip(found.tokens, found.values.tolist(), strict=True)
    ]
