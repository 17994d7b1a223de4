"""Which versions of the libraries are tested, in files that are written from pyproject.toml and from what is installed.

python tools/versions.py oldest   # constraints-oldest.txt: the lower bounds of pyproject.toml
python tools/versions.py newest   # constraints.txt: what is installed beside this Python
python tools/versions.py tested   # secateur/utils/tested.json: the first and last version of each library, from both files
python tools/versions.py show     # what is installed of what pyproject.toml asks for
python tools/versions.py fresh    # the direct dependencies of which an install without constraints takes another version
"""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
OLDEST, NEWEST, TESTED = (
    ROOT / "constraints-oldest.txt",
    ROOT / "constraints.txt",
    ROOT / "secateur/utils/tested.json",
)
# Builds of torch for the CPU or another GPU come without these, and torch pins those that it needs itself.
HARDWARE = ("nvidia-", "cuda-", "triton")
TOOLS = {"pip", "setuptools", "wheel", "secateur"}


def libraries(*extras: str) -> dict[str, Requirement]:
    """What pyproject.toml asks for by name: always, and with the extras (those that other extras consist of included)."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [
        *project["dependencies"],
        *(x for extra in extras for x in project["optional-dependencies"][extra]),
    ]
    found: dict[str, Requirement] = {}
    for requirement in map(Requirement, lines):
        if requirement.name == project["name"]:
            found |= libraries(*sorted(requirement.extras))
        else:
            found[canonicalize_name(requirement.name)] = requirement
    return found


def lower(requirement: Requirement) -> str:
    """The declared lower bound, such as "5.18.0"."""
    return max((s.version for s in requirement.specifier if s.operator in (">=", "==")), key=Version)


def read(file: Path) -> dict[str, str]:
    """The versions that a constraints file pins."""
    lines = [line for line in file.read_text().splitlines() if line and not line.startswith("#")]
    return {canonicalize_name(name): version for name, _, version in (line.partition("==") for line in lines)}


def write(file: Path, about: str, versions: dict[str, str]) -> None:
    file.write_text(f"# {about}\n" + "".join(f"{name}=={versions[name]}\n" for name in sorted(versions)))


def oldest() -> dict[str, str]:
    return {name: lower(requirement) for name, requirement in libraries("dev").items()}


def installed() -> dict[str, str]:
    # A build's own label (2.14.1+cpu) is left out: the constraint holds for every build of that release.
    found = {
        canonicalize_name(d.metadata["Name"]): d.version.partition("+")[0] for d in metadata.distributions()
    }
    return {n: v for n, v in found.items() if n not in TOOLS and not n.startswith(HARDWARE)}


def tested() -> dict[str, dict[str, str]]:
    """The oldest and newest tested version of each library that secateur may import."""
    first, last = read(OLDEST), read(NEWEST)
    return {name: {"oldest": first[name], "newest": last[name]} for name in sorted(libraries("all"))}


def fresh() -> dict[str, str]:
    """The direct dependencies of which an install without constraints takes another version than constraints.txt."""
    command = ["install", "--dry-run", "--ignore-installed", "--quiet", "--report", "-", "-e", ".[dev]"]
    run = subprocess.run(
        [sys.executable, "-m", "pip", *command], cwd=ROOT, stdout=subprocess.PIPE, check=True
    )
    found = {
        canonicalize_name(i["metadata"]["name"]): i["metadata"]["version"]
        for i in json.loads(run.stdout)["install"]
    }
    pinned = read(NEWEST)
    return {n: found[n] for n in libraries("dev") if found[n].partition("+")[0] != pinned[n]}


def main(step: str) -> str | None:
    if step == "oldest":
        write(OLDEST, "The lower bounds of pyproject.toml; written by `make update`.", oldest())
    elif step == "newest":
        write(NEWEST, "What `make demo` and `make test` install; written by `make update`.", installed())
    elif step == "tested":
        TESTED.write_text(json.dumps(tested(), indent=2) + "\n")
    elif step == "show":
        print(*(f"{name}=={installed()[name]}" for name in libraries("dev")))
    elif step == "fresh":
        print(" ".join(f"{name}=={version}" for name, version in fresh().items()))
    else:
        return __doc__
    return None


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:2] or [""]))
