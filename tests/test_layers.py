"""The house's contract: a room imports only rooms that stand below it, and no two files import each other in a circle.

Every import counts, also those under TYPE_CHECKING and inside functions.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "secateur"

FLOORS = [
    {"errors"},
    {"utils", "taxonomy"},
    {"method"},
    {"data", "skipping"},
    {"families", "attention"},
    {"graph"},
    {"surgery", "gates"},
    {"measure"},
    {"stats"},
    {"repair"},
    {"pruning"},
    {"scores", "solvers"},
    {"training", "saliency"},
    {"tokens", "io", "prompts"},
    {"methods"},
    {"tasks"},
    {"testing", "doctor", "comparison"},
    {"report"},
    {"cli"},
]
"""From the ground up. Rooms of one floor don't know each other."""
KNOWN: set[tuple[str, str]] = {
    ("secateur.pruning.prune", "secateur.io.artefact"),
}
"""Arrows that point up: a result of `prune` can save itself. It only ever shrinks."""
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}


def name_of(file: Path) -> str:
    parts = file.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {name_of(file): file for file in sorted(PACKAGE.rglob("*.py"))}


def room_of(module: str) -> str:
    return module.split(".")[1] if "." in module else "secateur"


def imports(module: str) -> set[str]:
    """The modules of the package that a file imports, by name."""
    tree = ast.parse(FILES[module].read_text(encoding="utf-8"))
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name in FILES}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module in FILES:
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name for name in inner if name in FILES} or {node.module}
    return found - {module}


ARROWS = {module: {o for o in imports(module) if (module, o) not in KNOWN} for module in FILES}


@pytest.mark.parametrize("module", [m for m in FILES if room_of(m) in FLOOR])
def test_a_room_imports_only_rooms_below_it(module: str) -> None:
    own = room_of(module)
    wrong = sorted(
        other
        for other in ARROWS[module]
        if room_of(other) != own and FLOOR.get(room_of(other), len(FLOORS)) >= FLOOR[own]
    )
    assert not wrong, f"{module} ({own}) imports {', '.join(wrong)}: these rooms stand on its floor or above"


def test_every_room_has_a_floor() -> None:
    rooms = {room_of(module) for module in FILES} - {"secateur", "__main__"}
    assert rooms <= set(FLOOR), "a new room needs a floor"


def test_known_exceptions_are_still_there() -> None:
    """One that was mended leaves the list."""
    assert all(other in imports(module) for module, other in KNOWN)


def test_no_circles() -> None:
    """Tarjan's strongly connected components over the files."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    circles: list[list[str]] = []

    def visit(module: str) -> None:
        index[module] = low[module] = len(index)
        stack.append(module)
        for other in ARROWS[module]:
            if other not in index:
                visit(other)
            if other in stack:
                low[module] = min(low[module], low[other])
        if low[module] == index[module]:
            circle = stack[stack.index(module) :]
            del stack[stack.index(module) :]
            if len(circle) > 1:
                circles.append(sorted(circle))

    for module in FILES:
        if module not in index:
            visit(module)
    assert not circles, "\n".join(" <-> ".join(circle) for circle in circles)


def test_every_room_says_what_is_in_it() -> None:
    rooms = {folder for folder in PACKAGE.iterdir() if (folder / "__init__.py").is_file()}
    silent = [room.name for room in rooms if not (room / "README.md").is_file()]
    assert rooms and not silent
