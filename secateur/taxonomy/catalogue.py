"""What the code says about every method, as data: to list methods and to name their flags without importing them.

`catalogue.json` is written by `python -m secateur.report.pages`; a test compares it with the code.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from secateur.taxonomy.axes import MethodInfo

FILE = Path(__file__).with_suffix(".json")


@functools.cache
def catalogue() -> dict[str, Any]:
    """`methods` by name, and `settings`: the fields of the dataclasses that verbs share.

    A method: verb, info (the fields of its record), needs, doc, settings. A setting: name, type, default, help.

    >>> catalogue()["methods"]["ria"]["settings"][0]["name"]
    'a'
    """
    return json.loads(FILE.read_text(encoding="utf-8"))


def info(entry: Mapping[str, Any]) -> MethodInfo:
    """The taxonomy record of an entry."""
    return MethodInfo(**entry["info"])
