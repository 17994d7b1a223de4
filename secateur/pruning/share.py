"""Shares that the user gives to parts of a model by name, beside the target for the whole."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from secateur.errors import SecateurError
from secateur.graph import Group
from secateur.pruning.protect import matches
from secateur.pruning.target import parse_target

WHERE = "share"
ALONE = "the shares that were given meet the target alone, so everything else stays whole"


def read_shares(given: Sequence[str] | Mapping[str, object] | None) -> dict[str, float]:
    """The share kept of what fits each pattern, in the order given.

    >>> read_shares(("*.mlp=50%", "lm_head=0.9")), read_shares({"*.mlp": 0.5})
    ({'*.mlp': 0.5, 'lm_head': 0.9}, {'*.mlp': 0.5})

    Raises:
        SecateurError: it can't be read, a share is outside 0..1, or a pattern is given twice.
    """
    shares: dict[str, float] = {}
    for text in written(given) or ():
        pattern, equals, value = text.rpartition("=")
        if not equals or not pattern.strip():
            raise SecateurError(
                f"{text!r} isn't a pattern with its share", where=WHERE, fix="such as '*.mlp=50%'"
            )
        try:
            target = parse_target(value)
        except SecateurError as error:
            raise SecateurError(error.what, where=f"{WHERE} {text!r}", fix="such as '*.mlp=50%'") from error
        if pattern in shares:
            raise SecateurError(f"{pattern!r} is given twice", where=WHERE, fix="give it once")
        shares[pattern.strip()] = target.share(f"{WHERE} {pattern!r}")
    return shares


def written(given: Sequence[str] | Mapping[str, object] | None) -> tuple[str, ...] | None:
    """Shares as a plan and the command line write them; a mapping is taken too.

    >>> written({"*.mlp": 0.5})
    ('*.mlp=0.5',)
    """
    if isinstance(given, str):
        raise SecateurError(f"{given!r} is text", where=WHERE, fix="give a dict such as {'*.mlp': '50%'}")
    if isinstance(given, Mapping):
        given = [f"{pattern}={value}" for pattern, value in given.items()]
    return tuple(given) if given else None


def makers(group: Group) -> list[str]:
    """The parameters, or whole blocks, that make a group's units."""
    return list(group.modules) or [s.name for s in group.slices if s.role == "out"]


def steer(
    parts: Mapping[str, Sequence[str]],
    shares: Mapping[str, float],
    others: Mapping[str, tuple[Sequence[str], str]],
) -> tuple[dict[str, float], str]:
    """(the share of each part whose makers are all named, what is to be said about those that are named in part).

    >>> steer({"up": ["mlp.up.weight"], "hidden": ["emb.weight", "mlp.down.weight"]}, {"mlp": 0.5}, {})[0]
    {'up': 0.5}

    A later pattern wins over an earlier one.

    Args:
        parts: what can be steered, by name: the names of what makes it.
        others: what can't, likewise, with the reason.

    Raises:
        SecateurError: a pattern steers nothing; it says why.
    """

    order = list(shares)

    def last(name: str) -> str | None:
        return next((pattern for pattern in reversed(order) if matches(name, pattern)), None)

    found: dict[str, float] = {}
    in_part: dict[str, str] = {}
    used: set[str] = set()
    for part, names in parts.items():
        named = {name: last(name) for name in names}
        patterns = [pattern for pattern in named.values() if pattern]
        if patterns and all(named.values()):
            pattern = max(patterns, key=order.index)
            used |= set(patterns)
            found[part] = shares[pattern]
        elif patterns:
            alone = next(name for name, pattern in named.items() if not pattern)
            in_part[part] = (
                f"{part} isn't steered by {', '.join(dict.fromkeys(patterns))}: {alone} makes its units too"
            )
    for pattern in shares:
        if pattern in used:
            continue
        fits = lambda names: any(matches(name, pattern) for name in names)  # noqa: B023  used in this turn only
        whole = [f"{part}: {reason}" for part, (names, reason) in others.items() if fits(names)]
        partly = [reason for part, reason in in_part.items() if fits(parts[part])]
        later = [other for other in order[order.index(pattern) + 1 :] if other in used]
        why, fix = "nothing that fits it can be pruned", "`secateur inspect` shows what can"
        if any(fits(names) for names in parts.values()) and not partly:
            why, fix = f"all that fits it is steered by {', '.join(later)}", "give the general pattern first"
        elif partly or whole:
            why, fix = "; ".join((partly or whole)[:3]), "name all of it" if partly else fix
        raise SecateurError(why, where=f"{WHERE} {pattern!r}", fix=fix)
    return found, "; ".join(in_part.values())
