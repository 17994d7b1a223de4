"""What is declared, what is pinned and what is said to be tested agree."""

import importlib.util
import json
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LISTS = [PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()]
DECLARED = {r.name: r for lines in LISTS for r in map(Requirement, lines) if r.name != "secateur"}
OLDEST, NEWEST = (
    dict(line.split("==") for line in (ROOT / name).read_text().splitlines() if "==" in line)
    for name in ("constraints-oldest.txt", "constraints.txt")
)
TESTED = json.loads((ROOT / "secateur/utils/tested.json").read_text())
DEVELOPMENT = {
    "pytest",
    "pytest-timeout",
    "pytest-xdist",
    "ruff",
    "mypy",
    "zennit",
    "mkdocs-material",
    "mkdocstrings",
}


def test_the_oldest_constraints_are_the_declared_lower_bounds() -> None:
    bounds = {
        name: next(s.version for s in r.specifier if s.operator == ">=")
        for name, r in DECLARED.items()
        if name
        # in no set of extras that is installed for the tests
        not in ("torch-pruning", "diffusers", "ray", "minigrid", "datasets", "lm-eval")
    }
    assert bounds == OLDEST


def test_the_constraints_lie_within_the_bounds() -> None:
    assert {name for name in OLDEST if name not in NEWEST} == set()
    assert [name for name in OLDEST if NEWEST[name] not in DECLARED[name].specifier] == []


def test_what_is_said_to_be_tested_is_what_the_constraints_install() -> None:
    assert TESTED.keys() == OLDEST.keys() - DEVELOPMENT
    assert TESTED == {name: {"oldest": OLDEST[name], "newest": NEWEST[name]} for name in TESTED}


def test_every_library_that_is_used_has_an_upper_bound() -> None:
    open_ended = [n for n in TESTED if not any(s.operator in ("<", "==") for s in DECLARED[n].specifier)]
    assert open_ended == []


def test_constraints_hold_on_any_hardware() -> None:
    assert [n for n in NEWEST if n.startswith(("nvidia", "cuda", "triton"))] == []
    assert [v for v in NEWEST.values() if "+" in v or "@" in v] == []


def test_extras_made_of_extras_are_read_and_bounds_are_the_lower_ones(monkeypatch, tmp_path) -> None:
    spec = importlib.util.spec_from_file_location("versions", ROOT / "tools/versions.py")
    versions = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(versions)
    (tmp_path / "pyproject.toml").write_text(
        '[project]\nname = "p"\ndependencies = ["A_b<3,>=1.2"]\n'
        '[project.optional-dependencies]\nx = ["c==2.0"]\ny = ["p[x]", "d>=0.10"]\nz = ["e>=1"]\n'
    )
    monkeypatch.setattr(versions, "ROOT", tmp_path)
    assert {n: versions.lower(r) for n, r in versions.libraries("y").items()} == {
        "a-b": "1.2",
        "c": "2.0",
        "d": "0.10",
    }


@pytest.mark.parametrize("extra", PROJECT["optional-dependencies"])
def test_a_library_has_one_range_wherever_it_is_named(extra: str) -> None:
    for requirement in map(Requirement, PROJECT["optional-dependencies"][extra]):
        if requirement.name != "secateur":
            assert requirement.specifier == DECLARED[requirement.name].specifier
