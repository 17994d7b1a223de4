"""The one family of errors: what went wrong, where, and what to do about it; and the checks that many places share."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from typing import TypeVar

T = TypeVar("T")
ESCAPES = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)|[@-Z\\-_])")


def plain_text(text: str) -> str:
    """Text without the codes by which a terminal colours it, which libraries put into their messages.

    >>> plain_text(chr(27) + "[31mred" + chr(27) + "[0m")
    'red'
    """
    return ESCAPES.sub("", text)


class SecateurError(Exception):
    """A mistake the user can mend.

    >>> raise SecateurError("the ratio 1.5 is outside 0..1", where="target", fix="give a share such as 50%")
    Traceback (most recent call last):
    ...
    secateur.errors.SecateurError: target: the ratio 1.5 is outside 0..1; give a share such as 50%
    """

    def __init__(self, what: str, *, where: str | None = None, fix: str | None = None):
        self.what = plain_text(what)
        self.where, self.fix = where and plain_text(where), fix and plain_text(fix)
        text = f"{self.where}: {self.what}" if where else self.what
        super().__init__(f"{text}; {self.fix}" if fix else text)


class SecateurWarning(UserWarning):
    """What a user should know before trusting a result, such as a library version that was never tested."""


def nearest(name: object, known: Iterable[object], *, count: int = 1, cutoff: float = 0.4) -> list[str]:
    """The names most like `name`, best first: one that differs in case only, else up to `count` by difflib's ratio.

    >>> nearest("wandaa", ["wanda", "ria"]), nearest("Ria", ["wanda", "ria"]), nearest("x", ["wanda"])
    (['wanda'], ['ria'], [])
    """
    names = list(dict.fromkeys(map(str, known)))
    same = [other for other in names if other.lower() == str(name).lower()]
    return same or difflib.get_close_matches(str(name), names, n=max(count, 1), cutoff=cutoff)


def one_of(known: Iterable[object]) -> str:
    """All names, as the fix of an error.

    >>> one_of(["cpu", "cuda"]), one_of(["2:4"])
    ('one of cpu, cuda', 'one of 2:4')
    """
    return f"one of {', '.join(dict.fromkeys(map(str, known)))}"


def choose(
    value: T,
    known: Iterable[object],
    *,
    what: str = "",
    where: str | None = None,
    error: str | None = None,
    near: int = 0,
    cutoff: float = 0.4,
    fix: str | None = None,
) -> T:
    """`value`, if it is among `known`.

    >>> choose("global", ("uniform", "global"), what="allocation", where="allocation")
    'global'
    >>> choose("globall", ("uniform", "global"), what="allocation", where="allocation", near=1)
    Traceback (most recent call last):
    ...
    secateur.errors.SecateurError: allocation: there is no allocation 'globall'; did you mean global?

    Args:
        value: what was asked for.
        known: the values that there are.
        what: the noun, for "there is no NOUN 'value'".
        where: the setting, flag or file of the error.
        error: the whole text in place of "there is no ...".
        near: how many similar values to offer; 0: the list of all of them.
        cutoff: how similar they must be, 0..1.
        fix: what to say where none is similar; default: the list.

    Raises:
        SecateurError: `value` is not among `known`.
    """
    known = list(known)
    if value in known:
        return value
    similar = nearest(value, known, count=near, cutoff=cutoff) if near else []
    advice = f"did you mean {' or '.join(similar)}?" if similar else fix or one_of(known)
    raise SecateurError(error or f"there is no {what} {value!r}", where=where, fix=advice)


def require(holds: object, what: str, *, where: str | None = None, fix: str | None = None) -> None:
    """Refuse to go on unless a condition holds.

    >>> require(0 <= 0.5 <= 1, "the share 0.5 is outside 0..1", where="target")

    Raises:
        SecateurError: it doesn't hold.
    """
    if not holds:
        raise SecateurError(what, where=where, fix=fix)
