"""Docstrings as markdown, for the pages of methods and the docs site."""

from __future__ import annotations

import inspect
import re


def prose(text: str) -> str:
    """A docstring as markdown: doctests and indented blocks become code, stray markup is escaped.

    >>> print(prose("scores a_i * b_i, as `a_b`"))
    scores a\\_i \\* b\\_i, as `a_b`
    """
    out: list[str] = []
    code: str | None = None
    for line in [*re.sub(r" *# doctest: .*", "", inspect.cleandoc(text)).splitlines(), ""]:
        stripped = line.strip()
        after_blank = not out or not out[-1]
        if code is None and stripped.startswith(">>>"):
            code = "doctest"
            out.append("```python")
        elif code is None and line.startswith("    ") and after_blank:
            code = "indented"
            out.append("```")
        elif code and (not stripped if code == "doctest" else stripped and not line.startswith("    ")):
            while not out[-1]:
                out.pop()
            out += ["```", ""]
            code = None
        if code:
            out.append(line.removeprefix("    ") if code == "indented" else line)
        else:
            parts = re.split(r"(`[^`]*`|https?://\S+)", line)
            out.append(
                "".join(part if i % 2 else re.sub(r"([*_<])", r"\\\1", part) for i, part in enumerate(parts))
            )
    if code:
        out += ["```", ""]
    joined = re.sub(r"\n{3,}", "\n\n", "\n".join(out)).strip()
    return re.sub(r"(?<!/)(?<!\w)arXiv:? (\d{4}\.\d{4,5})", r"[arXiv \1](https://arxiv.org/abs/\1)", joined)
