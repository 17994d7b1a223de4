"""Which versions count as tested, and the one warning."""

import warnings
from collections.abc import Iterator

import pytest

from secateur.errors import SecateurWarning
from secateur.utils import tested

SPAN = {"transformers": {"oldest": "5.18.0", "newest": "5.24.0"}}


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str | None]]:
    here: dict[str, str | None] = {"transformers": "5.24.0"}
    monkeypatch.setattr(tested, "tested_versions", lambda: SPAN)
    monkeypatch.setattr(tested, "version_of", here.get)
    tested.warn_outside_tested.cache_clear()
    yield here
    tested.warn_outside_tested.cache_clear()


@pytest.mark.parametrize(
    ("version", "state"),
    [
        ("5.18.0", "tested"),
        ("5.24.0", "tested"),
        ("5.24.3", "tested"),
        ("5.20.1+cpu", "tested"),
        ("5.18.0rc1", "older than tested"),
        ("5.17.9", "older than tested"),
        ("4.99.0", "older than tested"),
        ("5.25.0.dev0", "newer than tested"),
        ("6.0.0", "newer than tested"),
        ("mine", "unknown"),
        (None, "not installed"),
    ],
)
def test_states(installed: dict[str, str | None], version: str | None, state: str) -> None:
    installed["transformers"] = version
    (row,) = tested.compare_versions()
    assert row["state"] == state and row["installed"] == version
    assert tested.untested() == ([] if state in ("tested", "not installed") else ["transformers"])


def test_a_version_outside_is_told_once(installed: dict[str, str | None]) -> None:
    installed["transformers"] = "5.25.0"
    with pytest.warns(
        SecateurWarning, match=r"transformers 5.25.0 is newer.*5.18.0 to 5.24.0.*secateur doctor"
    ):
        tested.warn_outside_tested("transformers")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tested.warn_outside_tested("transformers")
        tested.warn_outside_tested("no-such-library")


def test_a_tested_version_is_silent(installed: dict[str, str | None]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tested.warn_outside_tested("transformers")


def test_the_data_names_ranges_that_pip_understands() -> None:
    from packaging.requirements import Requirement
    from packaging.version import Version

    assert {"transformers", "torch"} <= set(tested.tested_versions())
    for package, span in tested.tested_versions().items():
        wanted = Requirement(tested.requirement(package))
        assert wanted.name == package and Version(span["oldest"]) <= Version(span["newest"])
        assert wanted.specifier.contains(span["oldest"]) and wanted.specifier.contains(span["newest"])
