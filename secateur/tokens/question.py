"""The words of a question among the tokens of its prompt. Spec: mmtok."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from secateur.errors import SecateurError
from secateur.tokens.state import TokenSets

STOP_WORDS = frozenset(
    re.findall(
        r"\w+",
        """a an the is are was were be been being have has had do does did it they he she we you i what where when why how
        who which and or but so if then question answer to for with by from at into onto upon""",
    )
)
SUFFIXES = (
    "Answer the question using a single word or phrase.",
    "Answer with the option's letter from the given choices directly.",
)


def words(question: str, plain: bool = False) -> list[str]:
    """The words that a question asks with; all of them where nothing else is left. `plain`: "Question: " and everything.

    >>> words("What color is the cup? Answer the question using a single word or phrase.")
    ['color', 'cup']
    """
    question = re.sub(r"^(\s*<image>\s*)+", "", question).strip() or "What do you see in this image?"
    if plain:
        return re.findall(r"\b\w+\b", "Question: " + question)
    for suffix in SUFFIXES:
        question = question.replace(suffix, "")
    every = re.findall(r"\b\w+\b", question)
    return [word for word in every if word.lower() not in STOP_WORDS] or every


def question_tokens(sets: TokenSets, plain: bool = False) -> tuple[Tensor, Tensor]:
    """Embeddings of the prompt's text tokens, [S, m, D], and which of them are words of the question, [S, m].

    The question is `question` of `attach`, one or a list by batch row, or else what the prompt says after the image. Its
    words are found with `tokenizer` among the prompt's own tokens; without one, or where none is found, every text token
    counts.
    """
    embeddings, real = sets.text("embeddings")
    tokenizer, question = sets.given.get("tokenizer"), sets.given.get("question")
    if tokenizer is None:
        return embeddings, real
    ids, chosen = sets.text("ids")[0], torch.zeros_like(real)
    for i, row in enumerate(sets.row.tolist()):
        own = ids[i][real[i]].tolist()
        asked = (
            question if isinstance(question, str) else question[row] if question else tokenizer.decode(own)
        )
        wanted = {token for word in words(asked, plain) for token in spelled(tokenizer, word, set(own))}
        chosen[i] = real[i] & torch.tensor([t in wanted for t in ids[i].tolist()], device=real.device)
    return embeddings, torch.where(chosen.any(1, keepdim=True), chosen, real)


def spelled(tokenizer: Any, word: str, known: set[int]) -> list[int]:
    """A word's tokens as the prompt has them: with or without a blank before it."""
    forms = [tokenizer.encode(form, add_special_tokens=False) for form in (word, f" {word}")]
    return next((form for form in forms if form and known.issuperset(form)), [])


def last_column(sets: TokenSets, token: int, who: str) -> Tensor:
    """int64 [S, 1]: the column of the last place of a token behind the images of each set's row.

    who: the method, for errors. Raises `SecateurError` where a row has none.
    """
    ids, there = sets.text("ids", of="query")
    columns = sets.text("columns", of="query")[0]
    found = (ids == token) & there
    if bool((without := ~found.any(1)).any()):
        raise SecateurError(
            f"row {int(sets.row[without][0])} has no token {token} behind its last image",
            where=who,
            fix="put it into the prompt, or don't ask for it",
        )
    place = torch.arange(ids.shape[1], device=ids.device)
    return columns.gather(1, torch.where(found, place, -1).amax(1, keepdim=True))
