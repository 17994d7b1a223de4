"""What a method is: the kinds, and the registry that finds them by their folder.

A method is one file in `secateur/methods/`: a dataclass whose fields are the paper's hyperparameters, a taxonomy
record, what it needs to know about the data, and its score. Everything else (hooks, budgets, indices) is the engines'.
"""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, TypeVar

from secateur.errors import SecateurError, choose
from secateur.taxonomy import MethodInfo, filter_records
from secateur.taxonomy import recommend as advise
from secateur.utils.ranges import check_fields

KINDS = {
    "WeightMethod": "secateur.pruning.method",
    "UnitMethod": "secateur.pruning.method",
    "TrainMethod": "secateur.training.method",
    "TokenMethod": "secateur.tokens.method",
    "SaliencyMethod": "secateur.saliency.method",
}
"""Where the kinds of method stand: each beside its engine. This file knows none of them."""
VERBS = {
    "prune": ("prunes without training", "secateur.prune, or `secateur prune`"),
    "train_prune": (
        "prunes while the network is trained",
        "secateur.train_prune, or `secateur train-prune`",
    ),
    "attach": ("removes visual tokens while a model runs", "secateur.attach, or `secateur tokens`"),
    "saliency": ("draws where a network looks", "secateur.saliency, or `secateur saliency`"),
}
"""What a method of each verb does, and where it is used."""


@dataclasses.dataclass
class Method:
    """The base of all methods. Fields of a subclass are its hyperparameters, with the paper's defaults.

    >>> damping: float = field(default=0.01, metadata={"help": "of the Hessian", "above": 0, "max": 1})  # doctest: +SKIP

    A field's metadata says what it may be (`secateur.utils.ranges`): choices, min, max, above, below.
    """

    name: ClassVar[str] = ""
    verb: ClassVar[str] = ""
    """What runs it: "prune", "train_prune", "attach" or "saliency"; a kind of method sets it."""
    info: ClassVar[MethodInfo]
    needs: ClassVar[frozenset[str]] = frozenset()
    """Statistics the method reads, by the names of `secateur.stats`: input_norm, hessian, gradient, ..."""
    allocation: ClassVar[str] = "uniform"
    """How a share is divided over layers when the caller doesn't say: uniform, global, per-kind; owl or own for single weights."""
    quick: ClassVar[Mapping[str, Any]] = {}
    """Hyperparameters with which a check is short (`secateur.testing`); the defaults are for real runs."""

    def __post_init__(self) -> None:
        """Refuses a hyperparameter outside the range that its field declares."""
        check_fields(self, self.name)

    def statistics(self) -> frozenset[str]:
        """What this method reads with these hyperparameters; `needs`, unless a method says otherwise."""
        return self.needs

    @property
    def hyperparameters(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


_REGISTRY: dict[str, type[Method]] = {}
T = TypeVar("T", bound=type[Method])


def register(cls: T) -> T:
    """Class decorator: the method is known by its file's name (`random_structured.py` -> `random-structured`)."""
    name = cls.__module__.rpartition(".")[2].replace("_", "-")
    if name in _REGISTRY and _REGISTRY[name].__qualname__ != cls.__qualname__:
        raise SecateurError(
            f"two methods are named {name!r}",
            where=cls.__module__,
            fix="one method a file, named after the file",
        )
    if not isinstance(cls.__dict__.get("info"), MethodInfo):
        raise SecateurError(
            "it has no taxonomy record",
            where=f"method {name}",
            fix="set info = MethodInfo(...) or record(...)",
        )
    cls.name = name
    cls.info = dataclasses.replace(cls.info, name=name)
    _REGISTRY[name] = cls
    return cls


def _load_all() -> dict[str, type[Method]]:
    package = importlib.import_module("secateur.methods")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{module.name}")
    return _REGISTRY


def method_class(name: str) -> type[Method]:
    """The class registered under `name`.

    Raises `SecateurError` with the nearest names when there is none.
    """
    registry = _load_all()
    key = name.strip().lower().replace("_", "-")
    error, fix = f"there is no method {name!r}", "`secateur methods` lists them"
    return registry[choose(key, registry, where="method", error=error, near=3, fix=fix)]


def make_method(method: str | Method | type[Method], **hyperparameters: Any) -> Method:
    """A method from its name and hyperparameters.

    >>> make_method("ria", a=0.5)
    Ria(a=0.5)
    """
    if isinstance(method, Method):
        return dataclasses.replace(method, **hyperparameters) if hyperparameters else method
    cls = method_class(method) if isinstance(method, str) else method
    known = {field.name: field for field in dataclasses.fields(cls) if field.init}
    for key in hyperparameters:
        error, fix = f"{cls.name} has no hyperparameter {key!r}", f"it takes {', '.join(known) or 'none'}"
        choose(key, known, where="method", error=error, near=1, fix=fix)
    return cls(**{key: _coerce(cls, known[key], value) for key, value in hyperparameters.items()})


def expect(method: Method | type[Method], verb: str, where: str = "") -> None:
    """Refuse a method that another verb runs, with the name of that verb.

    Raises `SecateurError`.
    """
    if method.verb != verb:
        does, use = VERBS.get(method.verb, ("is of no kind that can be run", "a method of another kind"))
        raise SecateurError(f"{method.name} {does}", where=where or verb, fix=f"use {use}")


def _coerce(cls: type[Method], field: dataclasses.Field, value: Any) -> Any:
    """Text from a command line becomes the type of the field's default."""
    default = field.default
    if not isinstance(value, str) or isinstance(default, str) or default is dataclasses.MISSING:
        return value
    try:
        if isinstance(default, bool):
            return {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}[
                value.lower()
            ]
        if default is None:
            return None if value.lower() == "none" else float(value) if "." in value else int(value)
        if isinstance(default, tuple):
            kind = type(default[0]) if default else str
            return tuple(kind(part.strip()) for part in value.split(",") if part.strip())
        return type(default)(value)
    except (KeyError, ValueError, IndexError) as error:
        raise SecateurError(
            f"{value!r} is not a {type(default).__name__}",
            where=f"{cls.name}.{field.name}",
            fix=f"e.g. {default}",
        ) from error


def list_methods(search: str | None = None, **filters: Any) -> list[str]:
    """Names of the registered methods, filtered by their taxonomy records.

    >>> "wanda" in list_methods(when="PAT-PT", training_free=True)
    True
    """
    records: Iterable[MethodInfo] = [cls.info for cls in _load_all().values()]
    return sorted(record.name for record in filter_records(records, search=search, **filters))


def recommend(**situation: Any) -> list[tuple[MethodInfo, str]]:
    """Registered methods that suit a situation, each with the reason.

    >>> recommend(hardware="gpu-dense", train=False, data="calib", model="llm")  # doctest: +SKIP

    The questions and the advice are the survey's (`secateur.taxonomy.recommend`).
    """
    return advise([cls.info for cls in _load_all().values()], **situation)


def __getattr__(name: str) -> Any:
    """The kinds of method by their old place: `from secateur.method import WeightMethod` goes on working."""
    if name in KINDS:
        return getattr(importlib.import_module(KINDS[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
