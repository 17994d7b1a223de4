"""Recipes: a command line as a YAML file, and the file that repeats a run."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from secateur.errors import SecateurError, choose, require
from secateur.utils.about import library_versions
from secateur.utils.files import atomic_write_bytes, check_path

NAME = "recipe.yaml"
"""What lies in the folder of a result."""
KEYS = ("verb", "arguments", "flags", "versions")
READ, WRITTEN = "--recipe", "--save-recipe"
FIX = "write verb:, arguments: and flags:, as `secateur VERB ... --save-recipe FILE.yaml` does"


def expand(argv: Sequence[str], verbs: Iterable[str]) -> list[str]:
    """The command line with the recipe it names in it; what stands on the line itself wins.

    >>> expand(["prune", "--recipe", "half.yaml", "--seed", "1"], ["prune"])  # doctest: +SKIP
    ['prune', 'smollm2', '--method=wanda', '--target=50%', '--seed', '1']

    Raises SecateurError for a file that can't be read, isn't a recipe, is another verb's, or names code of its own
    as its method (a recipe that came with a model runs nothing that the user didn't name).
    """
    line, path = without(argv, READ)
    if path is None:
        return line
    where = f"{READ} {path}"
    recipe = read(path)
    verb, flags = recipe["verb"], recipe["flags"]
    choose(verb, verbs, what="verb", where=where, near=1)
    words = verb.split()
    given = line[: next((i for i, token in enumerate(line) if token.startswith("-")), len(line))]
    if given and given[: len(words)] != words:
        raise SecateurError(f"it is for `{verb}`", where=where, fix=f"secateur {verb} {where}")
    rest = line[len(words) :] if given else line
    count = next((i for i, token in enumerate(rest) if token.startswith("-")), len(rest))
    arguments = rest[:count] or recipe["arguments"]
    said = {
        "--" + re.sub("^--(no-)?", "", token.partition("=")[0])
        for token in rest[count:]
        if token.startswith("--")
    }
    kept = {name: value for name, value in flags.items() if f"--{name}" not in said}
    if re.search(r"\.py(:|$)", str(kept.get("method", ""))):
        raise SecateurError(
            f"it names code, {kept['method']}, which only a command line may",
            where=where,
            fix=f"look at that file, then say so: --method {kept['method']}",
        )
    spread = [f"--{name}={text}" for name, value in kept.items() for text in _texts(value)]
    return [*words, *arguments, *spread, *rest[count:]]


def read(path: str) -> dict[str, Any]:
    """A recipe's verb, arguments and flags; every value is text, as on a command line."""
    import yaml

    where, file = f"{READ} {path}", Path(path).expanduser()
    file = file / NAME if file.is_dir() else file
    require(file.is_file(), "no such file", where=where, fix=check_path(file))
    try:
        # every scalar as it is written: to YAML 1.1 a target of 2:4 is the number 124
        found = yaml.load(file.read_text("utf-8"), Loader=yaml.BaseLoader)
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        reason = " ".join(str(error).split())
        raise SecateurError(f"it can't be read ({reason})", where=where, fix=FIX) from error
    require(isinstance(found, dict) and "verb" in found, "it isn't a recipe", where=where, fix=FIX)
    for key in found:
        choose(key, KEYS, what="key", where=where, near=1)
    arguments, flags = found.get("arguments") or [], found.get("flags") or {}
    arguments = [arguments] if isinstance(arguments, str) else arguments
    plain = isinstance(found["verb"], str) and isinstance(arguments, list) and isinstance(flags, dict)
    require(
        plain and all(isinstance(text, str) for text in arguments), "it isn't a recipe", where=where, fix=FIX
    )
    for name, value in flags.items():
        texts = value if isinstance(value, list) else [value]
        simple = all(isinstance(text, str) for text in texts)
        require(simple, f"{name} is neither text nor a list of texts", where=where, fix="write `name: value`")
    _tell(found.get("versions"), where)
    flags = {name.removeprefix("--").replace("_", "-"): value for name, value in flags.items()}
    return {"verb": " ".join(found["verb"].split()), "arguments": arguments, "flags": flags}


def write(path: str | Path, verb: str, arguments: Sequence[str], flags: Mapping[str, Any]) -> None:
    """The recipe that repeats a run, written beside and renamed."""
    import yaml

    found = {
        "verb": verb,
        "arguments": [str(text) for text in arguments],
        "flags": {name: list(value) if isinstance(value, tuple) else value for name, value in flags.items()},
        "versions": library_versions(),
    }
    head = f"# secateur {READ} FILE repeats this run; flags on the command line win\n"
    text = head + yaml.safe_dump(found, sort_keys=False, allow_unicode=True)
    atomic_write_bytes(Path(path).expanduser(), text.encode())


def without(argv: Sequence[str], name: str) -> tuple[list[str], str | None]:
    """The line without a flag, and the flag's value; None where it isn't there."""
    line = list(argv)
    for index, token in enumerate(line):
        if token == name:
            require(index + 1 < len(line), "it needs a file", where=name, fix=f"{name} FILE.yaml")
            return line[:index] + line[index + 2 :], line[index + 1]
        if token.startswith(f"{name}="):
            return line[:index] + line[index + 1 :], token.partition("=")[2]
    return line, None


def _texts(value: str | list[str]) -> list[str]:
    """The values of a flag, one for each time it stands on the line; none for what is left open."""
    return [text for text in ([value] if isinstance(value, str) else value) if text not in ("", "~", "null")]


def _tell(versions: Any, where: str) -> None:
    """Say on stderr where the libraries differ from those that the recipe was written with."""
    now = library_versions()
    then = versions if isinstance(versions, dict) else {}
    other = [
        f"{name} {then[name]}, now {now[name]}"
        for name in now
        if name != "platform" and name in then and then[name] != now[name]
    ]
    if other:
        print(f"{where}: written with {'; '.join(other)}: figures may differ", file=sys.stderr)
