"""What docs/graph.md and the docstring of `Slice` show is what comes out."""

import doctest
from pathlib import Path

import torch
from torch import nn

from secateur.graph import Slice, trace

NAMES = {"torch": torch, "nn": nn, "trace": trace}
PAGE = Path(__file__).parents[2] / "docs" / "graph.md"


def test_examples_with_their_output() -> None:
    page = PAGE.read_text(encoding="utf-8").replace("```\n", "\n")
    for text in (page, Slice.__doc__ or ""):
        test = doctest.DocTestParser().get_doctest(text, dict(NAMES), "shown", None, 0)
        assert test.examples and doctest.DocTestRunner().run(test).failed == 0
