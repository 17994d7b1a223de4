"""Which parameters the user wants left alone, by patterns of their names."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from torch import nn

from secateur.errors import SecateurError, nearest
from secateur.graph import Graph
from secateur.graph.parts import inside

Patterns = tuple[str, ...] | None
KEPT, OUTSIDE = "protected by keep", "outside only"
BEYOND = "outside the parts of the target"


def matches(name: str, pattern: str) -> bool:
    """Whether a parameter is meant: its name, or a module it lies in, fits the pattern.

    >>> matches("model.layers.0.mlp.up_proj.weight", "*.layers.0.*"), matches("lm_head.weight", "lm_head")
    (True, True)
    >>> matches("model.layers.10.mlp.up_proj.weight", "*.layers.1")
    False
    """
    parts = name.split(".")
    return any(fnmatchcase(".".join(parts[:end]), pattern) for end in range(1, len(parts) + 1))


def protected(
    names: Iterable[str], keep: Patterns, only: Patterns, parts: Sequence[str] = ()
) -> dict[str, str]:
    """Parameters that must stay as they are, with the reason: those that fit `keep`, those that fit none of `only`, and
    those in none of `parts` (module paths), where there are any.

    >>> protected(["a.weight", "b.weight"], ("a",), None)
    {'a.weight': "protected by keep 'a'"}
    """
    reasons = {}
    for name in names:
        pattern = next((p for p in keep or () if matches(name, p)), None)
        if pattern is not None:
            reasons[name] = f"{KEPT} {pattern!r}"
        elif only and not any(matches(name, p) for p in only):
            reasons[name] = f"{OUTSIDE} {', '.join(map(repr, only))}"
        elif parts and not any(inside(name, path) for path in parts):
            reasons[name] = BEYOND
    return reasons


def check_patterns(model: nn.Module, **patterns: Patterns) -> None:
    """Refuse a pattern that fits no parameter of the model, with the nearest names.

    Raises:
        SecateurError: nothing fits; it names the option and the pattern.
    """
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    modules = [name for name, _ in model.named_modules() if name]
    for option, given in patterns.items():
        for pattern in given or ():
            if not any(matches(name, pattern) for name in names):
                near = _nearest(pattern, [*modules, *names])
                fix = f"the nearest: {', '.join(near)}" if near else "`secateur inspect` shows the names"
                raise SecateurError(f"no parameter fits {pattern!r}", where=option, fix=fix)


def _nearest(pattern: str, names: Iterable[str]) -> list[str]:
    """Up to three patterns that would fit, for one that doesn't.

    >>> _nearest("*.mpl", ["model.layers.0.mlp", "model.norm"]), _nearest("mlp", ["model.layers.0.mlp"])
    (['*.mlp'], ['*.mlp'])
    """
    names = list(names)
    if any(matches(name, f"*.{pattern}") for name in names):
        return [f"*.{pattern}"]
    bare = pattern.strip("*.")
    if not pattern.startswith("*"):
        return nearest(bare, names, count=3, cutoff=0.3)
    length = bare.count(".") + 1
    ends = {".".join(name.split(".")[-length:]): None for name in names}
    return [f"*.{end}" for end in nearest(bare, ends, count=3, cutoff=0.3)]


def freeze_protected(graph: Graph, keep: Patterns, only: Patterns, parts: Sequence[str] = ()) -> None:
    """Groups that would take something from a protected parameter stay whole, with the reason."""
    reasons = protected(graph.shapes, keep, only, parts)
    for group in graph.groups:
        touched = [s.name for s in group.slices]
        for module in group.modules:  # a unit that is a whole block takes all that is in it
            touched += [name for name in graph.shapes if name.startswith(f"{module}.")]
        found = next((f"{name} is {reasons[name]}" for name in touched if name in reasons), None)
        if found and group.reason is None:
            group.reason = found
