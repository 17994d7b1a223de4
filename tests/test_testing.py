"""The checks that anyone's method can be held to: every method of the library passes them, and broken ones are found out."""

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch

import secateur
from secateur import SecateurError
from secateur.method import Method, method_class
from secateur.pruning.method import UnitMethod, WeightMethod
from secateur.saliency.method import Drawn, SaliencyMethod
from secateur.taxonomy import record
from secateur.testing import checks_for, run_check
from secateur.tokens.method import Stage, TokenMethod

EVERY = [(name, check) for name in secateur.list_methods() for check in checks_for(method_class(name))]


@pytest.mark.parametrize(("method", "check"), EVERY)
def test_every_method_passes(method: str, check: str) -> None:
    run_check(method_class(method), check)


@dataclass
class Forgetful(WeightMethod):
    """Scores that are drawn anew each time. No paper."""

    info = record("random")

    def score(self, weight, stats):
        return torch.rand(weight.shape)


@dataclass
class NotFinite(UnitMethod):
    """A score that isn't a number. No paper."""

    info = record("random-structured")
    kinds: ClassVar[tuple[str, ...] | None] = ("neurons",)

    def score(self, group, context):
        return torch.full((group.size,), torch.nan)


@dataclass
class Unsourced(WeightMethod):
    """Its record has a paper that no docstring names."""

    info = record("wanda")

    def score(self, weight, stats):
        return weight.abs()


@dataclass
class Restless(TokenMethod):
    """Keeps other tokens each time. No paper."""

    info = record("random-tokens")

    def stages(self, facts):
        return [Stage("input", self.choose)]

    def choose(self, sets):
        return torch.rand(sets.valid.shape).masked_fill(~sets.valid, -1).argsort(1).argsort(1) >= (
            sets.valid.shape[1] - sets.keep[:, None]
        )


@dataclass
class Small(SaliencyMethod):
    """Noise, and a weight that is changed. No paper."""

    info = record("gradient", arxiv=None)

    def draw(self, model: Any, image: Any, target: Any) -> Drawn:
        with torch.no_grad():
            next(model.parameters()).add_(1)
        return Drawn(torch.rand(len(image), 4, 4), torch.ones(len(image), dtype=torch.int64))


@pytest.mark.parametrize(
    ("cls", "check", "says"),
    [
        (Forgetful, "the same seed gives the same plan", "two plans"),
        (NotFinite, "the budget is met", "isn't a number"),
        (Unsourced, "the docstring names its source", "2306.11695"),
        (Restless, "the same seed keeps the same tokens", "differ"),
        (Small, "the map fits the picture", "two runs differ"),
        (Small, "the model is left alone", "the model changed"),
    ],
)
def test_a_broken_method_is_found_out(cls: type[Method], check: str, says: str) -> None:
    with pytest.raises(AssertionError, match=says) as found:
        run_check(cls, check)
    assert cls.__name__ in str(found.value) and check in str(found.value)


def test_something_else_is_no_method() -> None:
    class Bare(Method):
        pass

    with pytest.raises(SecateurError, match="of no kind"):
        checks_for(Bare)
