"""The methods that CONTRIBUTING shows can be copied: each passes the checks that this library's own methods pass."""

import re
import sys
import types
from pathlib import Path

import pytest

from secateur.method import Method
from secateur.testing import checks_for, run_check

BLOCKS = re.findall(
    r"```python\n(.*?)```", (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text(), re.DOTALL
)


def shown(number: int) -> type[Method]:
    """The method of one block of code, run as a module of its own."""
    module = types.ModuleType(f"shown_{number}")
    sys.modules[module.__name__] = module
    exec(compile(BLOCKS[number], f"CONTRIBUTING.md, block {number}", "exec"), module.__dict__)  # noqa: S102  our own document
    [cls] = [v for v in vars(module).values() if isinstance(v, type) and v.__module__ == module.__name__]
    return cls


METHODS = [shown(number) for number in range(len(BLOCKS))]


def test_there_is_one_of_each_kind() -> None:
    kinds = [cls.__mro__[1].__name__ for cls in METHODS]
    assert kinds == ["WeightMethod", "UnitMethod", "TrainMethod", "TokenMethod"]


@pytest.mark.parametrize(("cls", "check"), [(cls, check) for cls in METHODS for check in checks_for(cls)])
def test_it_passes_the_checks(cls: type[Method], check: str) -> None:
    run_check(cls, check)
