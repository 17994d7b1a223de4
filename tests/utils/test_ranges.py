"""Ranges that fields declare: what passes, what is refused, and how it is said."""

from dataclasses import dataclass, field
from typing import Any

import pytest

import secateur
from secateur.errors import SecateurError
from secateur.method import make_method
from secateur.utils.ranges import check_fields


@dataclass
class Trial:
    share: float | None = field(default=0.5, metadata={"min": 0, "max": 1})
    rate: float = field(default=0.1, metadata={"above": 0, "below": 1})
    counts: tuple[int, ...] = field(default=(1, 2), metadata={"min": 1})
    how: str = field(default="a", metadata={"choices": ("a", "b")})
    free: float = -5.0


@pytest.mark.parametrize(
    "values", [{}, {"share": 0}, {"share": 1}, {"share": None}, {"counts": ()}, {"how": "b"}, {"rate": 0.999}]
)
def test_bounds_are_inside_and_none_passes(values: dict[str, Any]) -> None:
    check_fields(Trial(**values))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"share": 1.01}, r"^share: 1.01 is outside 0\.\.1; give at least 0 and at most 1$"),
        ({"share": float("nan")}, "nan is outside"),
        ({"rate": 0.0}, "^rate: 0.0 is out of range; give above 0 and below 1$"),
        ({"rate": 1.0}, "out of range"),
        ({"counts": (2, 0)}, "^counts: 0 is out of range; give at least 1$"),
        ({"how": "c"}, "^how: there is no how 'c'; a or b$"),
    ],
)
def test_outside_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(SecateurError, match=message):
        check_fields(Trial(**values))


@pytest.mark.parametrize(
    ("method", "values"),
    [
        ("nirvana", {"gamma": 0.0}),
        ("nirvana", {"candidates": 0}),
        ("tyr", {"tokens": (0.0, 1.0)}),
        ("obspa", {"noise_std": 0.0}),
        ("spa", {"damping": -0.1}),
        ("iss-p", {"stage": 1.0}),
        ("masksparsity", {"tune_lr": 0.0}),
    ],
)
def test_methods_refuse_what_their_fields_exclude(method: str, values: dict[str, Any]) -> None:
    name = next(iter(values))
    with pytest.raises(SecateurError, match=f"^{method}.{name}: .* out of range"):
        make_method(method, **values)


def test_the_kinds_are_importable_from_their_old_place() -> None:
    from secateur import method

    assert method.WeightMethod is secateur.WeightMethod and method.UnitMethod is secateur.UnitMethod
    assert method.TrainMethod is secateur.TrainMethod
    with pytest.raises(AttributeError, match="OtherMethod"):
        method.OtherMethod  # noqa: B018
