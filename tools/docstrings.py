"""Docstrings as the site shows them: the markdown that the methods' pages are made of, with sections and parameters as such."""

from __future__ import annotations

import re
import textwrap
from typing import Any

import griffe

from secateur.report.markdown import prose

UNDERLINED = re.compile(r"^(\w[\w ]*)\n-{3,}\n", re.MULTILINE)
INDENTED = re.compile(r"^(Args|Arguments|Parameters|Returns|Raises):\n((?: {4}.*(?:\n|$))+)", re.MULTILINE)
NAMED = re.compile(r"^(\*{0,2}[a-z]\w*(?:, [a-z]\w*)*): ", re.MULTILINE)


def as_markdown(text: str) -> str:
    """A docstring as markdown: sections in bold, and what they name as lists.

    >>> print(as_markdown("Adds.\\n\\nParameters\\n----------\\na: the first.\\nb, c: others."))
    Adds.
    <BLANKLINE>
    **Parameters**
    <BLANKLINE>
    - `a`: the first.
    - `b, c`: others.
    """
    text = INDENTED.sub(lambda m: f"{m[1]}\n---\n{textwrap.dedent(m[2])}\n", text)
    before, *sections = re.split(r"(?=^\w[\w ]*\n-{3,}\n)", text, flags=re.MULTILINE)
    listed = [NAMED.sub(r"- `\1`: ", UNDERLINED.sub(r"SECTION \1\n\n", section)) for section in sections]
    return re.sub(r"^SECTION (.*)$", r"**\1**", prose(before + "".join(listed)), flags=re.MULTILINE)


class Docstrings(griffe.Extension):
    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring:
            obj.docstring.value = as_markdown(obj.docstring.value)
