"""What a method is: the kinds, and the registry that finds them by their folder, in packages and in files.

A method is one file in `secateur/methods/`: a dataclass whose fields are the paper's hyperparameters, a taxonomy
record, what it needs to know about the data, and its score. Everything else (hooks, budgets, indices) is the engines'.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.util
import inspect
import pkgutil
import re
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from secateur.errors import SecateurError, SecateurWarning, choose
from secateur.taxonomy import MethodInfo, filter_records
from secateur.taxonomy import recommend as advise
from secateur.taxonomy.advice import combine
from secateur.taxonomy.measured import shipped
from secateur.utils.code import announced, origin, package_of, read_spec, run_file
from secateur.utils.ranges import check_fields
from secateur.utils.screen import counted, fit

KINDS = {
    "WeightMethod": "secateur.pruning.method",
    "UnitMethod": "secateur.pruning.method",
    "TrainMethod": "secateur.training.method",
    "SkipMethod": "secateur.training.skip",
    "TokenMethod": "secateur.tokens.method",
    "WorkMethod": "secateur.tokens.method",
    "SaliencyMethod": "secateur.saliency.method",
    "PromptMethod": "secateur.prompts.method",
    "ObjectMethod": "secateur.saliency.objects.method",
}
"""Where the kinds of method stand: each beside its engine. This file knows none of them."""
VERBS = {
    "prune": ("prunes without training", "secateur.prune, or `secateur prune`"),
    "train_prune": (
        "prunes while the network is trained",
        "secateur.train_prune, or `secateur train-prune`",
    ),
    "attach": ("removes visual tokens while a model runs", "secateur.attach, or `secateur tokens`"),
    "work": (
        "excuses visual tokens from work while a model runs",
        "secateur.attach, or `secateur tokens`",
    ),
    "attend": ("reads fewer keys while a model runs", "secateur.attach"),
    "prompts": ("trains prompts of a frozen model", "secateur.prompts.train_prompts"),
    "saliency": ("draws where a network looks", "secateur.saliency, or `secateur saliency`"),
    "train_objects": ("learns which objects stand out", "`secateur train sod`"),
}
"""What a method of each verb does, and where it is used."""
LIBRARY = "secateur.methods"
"""The package of this library's own methods, and the group of entry points in which others announce theirs."""


@dataclasses.dataclass
class Method:
    """The base of all methods. Fields of a subclass are its hyperparameters, with the paper's defaults.

    >>> damping: float = field(default=0.01, metadata={"help": "of the Hessian", "above": 0, "max": 1})  # doctest: +SKIP

    A field's metadata says what it may be (`secateur.utils.ranges`): choices, min, max, above, below.
    """

    name: ClassVar[str] = ""
    """The class's name in lower case with hyphens, unless a class gives itself another; the file's in this library."""
    named: ClassVar[bool] = False
    """Whether a class gives itself its name."""
    verb: ClassVar[str] = ""
    """What runs it: "prune", "train_prune", "attach", "saliency" or "train_objects"; a kind of method sets it."""
    info: ClassVar[MethodInfo]
    """The record; what a class leaves out of it, or all of it, is as usual for its kind."""
    needs: ClassVar[frozenset[str]] = frozenset()
    """Statistics the method reads, by the names of `secateur.stats`: input_norm, hessian, gradient, ..."""
    allocation: ClassVar[str] = "uniform"
    """How a share is divided over layers when the caller doesn't say: uniform, global, per-kind; owl or own for single weights."""
    quick: ClassVar[Mapping[str, Any]] = {}
    """Hyperparameters with which a check is short (`secateur.testing`); the defaults are for real runs."""

    def __init_subclass__(cls, **keywords: Any) -> None:
        """Gives a class its name, and a whole record in place of a short one or none."""
        super().__init_subclass__(**keywords)
        cls.named = "name" in cls.__dict__
        if not cls.named:
            cls.name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "-", cls.__name__).lower()
        own = cls.__dict__.get("info")
        if not isinstance(own, MethodInfo):
            if own is not None:
                raise SecateurError(
                    f"info is a {type(own).__name__}",
                    where=f"method {cls.name}",
                    fix="set info = MethodInfo(...)",
                )
            own = MethodInfo()
        if own.short:
            above: Any = cls.__mro__[1]
            pattern = MethodInfo(**cls.usual()) if above.__name__ in (*KINDS, "Method") else above.info
            title = cls.name.replace("-", " ").capitalize()
            cls.info = own.completed(dataclasses.replace(pattern, name=cls.name), title)

    @classmethod
    def usual(cls) -> dict[str, Any]:
        """The axes of a record where a class says nothing of them; a kind of method adds its own."""
        return {
            "title": "",
            "spec": "none",
            "objects": "tool",
            "granularity": "none",
            "speedup": "none",
            "when": "none",
            "criteria": "none",
        }

    def __post_init__(self) -> None:
        """Refuses a hyperparameter outside the range that its field declares."""
        check_fields(self, self.name)

    def statistics(self) -> frozenset[str]:
        """What this method reads with these hyperparameters; `needs`, unless a method says otherwise."""
        return self.needs

    def lacks(self, function: str) -> SecateurError:
        """The error of a class that doesn't write what its kind asks for."""
        return SecateurError(f"{type(self).__name__} must define {function}", where=f"method {self.name}")

    @property
    def source(self) -> str:
        """Where a method that isn't this library's came from; empty for its own."""
        return origin(type(self))

    @property
    def hyperparameters(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


_REGISTRY: dict[str, type[Method]] = {}
T = TypeVar("T", bound=type[Method])


def register(cls: T) -> T:
    """Class decorator: the method is known by its name, as `name` says, everywhere that a name is taken.

    Running it again, as a cell of a notebook is, replaces the class.

    >>> @register
    ... class PeakFirst(WeightMethod):  # doctest: +SKIP
    ...     ...
    >>> secateur.prune(model, method="peak-first", target="50%")  # doctest: +SKIP

    Raises `SecateurError` where another method has the name.
    """
    own = cls.__module__.startswith(f"{LIBRARY}.")
    file = cls.__module__.rpartition(".")[2].replace("_", "-")
    name = file if own and not cls.named else cls.name
    other = _REGISTRY.get(name)
    again = other is not None and (other.__module__, other.__qualname__) == (cls.__module__, cls.__qualname__)
    taken = not own and importlib.util.find_spec(f"{LIBRARY}.{name.replace('-', '_')}") is not None
    if taken or (other is not None and not again):
        fix = "one method a file, named after the file" if own else 'give it another: name = "..."'
        raise SecateurError(
            f"two methods are named {name!r}", where=f"{cls.__module__}.{cls.__qualname__}", fix=fix
        )
    if "__dataclass_fields__" not in cls.__dict__:
        dataclasses.dataclass(cls)
    cls.name = name
    cls.info = dataclasses.replace(cls.info, name=name)
    _REGISTRY[name] = cls
    return cls


def methods_in(module: object) -> dict[str, type[Method]]:
    """The methods that a module defines itself, by the names of their classes."""
    classes = {name: value for name, value in vars(module).items() if inspect.isclass(value)}
    return {
        name: cls
        for name, cls in classes.items()
        if issubclass(cls, Method) and cls.__module__ == getattr(module, "__name__", "") and name[0] != "_"
    }


@functools.cache
def plugins() -> tuple[str, ...]:
    """The names of the methods that installed packages announce (entry points of the group `secateur.methods`).

    A package that fails is a `SecateurWarning`, once.
    """
    names: list[str] = []
    for point in announced(LIBRARY):
        try:
            found = point.load()
            if not inspect.isclass(found):
                names += [register(cls).name for cls in methods_in(found).values()]
                continue
            if not issubclass(found, Method):
                raise TypeError(f"{point.value} is no method")
            _REGISTRY.pop(found.name, None)
            found.name = point.name.lower().replace("_", "-")
            names.append(register(found).name)
        except (Exception, SystemExit) as error:  # noqa: BLE001  whatever it is, the others go on
            told = " ".join(f"{type(error).__name__}: {error}".split())
            warnings.warn(
                f"{package_of(point)}: its method {point.name!r} is left out ({told})", SecateurWarning, 2
            )
    return tuple(names)


def _load_all() -> dict[str, type[Method]]:
    package = importlib.import_module(LIBRARY)
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{module.name}")
    plugins()
    return _REGISTRY


def own_methods() -> dict[str, type[Method]]:
    """This library's own methods by name: what its pages and its catalogue are of."""
    own = {name: cls for name, cls in _load_all().items() if cls.__module__.startswith(f"{LIBRARY}.")}
    return dict(sorted(own.items()))


def method_class(name: str) -> type[Method]:
    """The class registered under `name`, or the one of `file.py:Class` or of a `file.py` with one method, which is run.

    Raises `SecateurError` with the nearest names when there is none, and where a file fails.
    """
    if (spec := read_spec(name)) is not None:
        return _of_file(*spec)
    registry = _load_all()
    key = name.strip().lower().replace("_", "-")
    error, fix = f"there is no method {name!r}", "`secateur methods` lists them"
    return registry[choose(key, registry, where="method", error=error, near=3, fix=fix)]


def _of_file(path: Path, name: str | None) -> type[Method]:
    found = methods_in(run_file(path))
    if not found:
        fix = f"define a subclass of {', '.join(KINDS)}"
        raise SecateurError("it defines no method", where=str(path), fix=fix)
    if name is None and len(found) > 1:
        fix = f"name one: {path}:{next(iter(found))}"
        raise SecateurError(f"it defines {' and '.join(found)}", where=str(path), fix=fix)
    cls = found[choose(name or next(iter(found)), found, what="method", where=str(path), near=1)]
    return cls if "__dataclass_fields__" in cls.__dict__ else dataclasses.dataclass(cls)


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
            entry = re.match(r"tuple\[(int|float)\b", str(field.type))
            kind: Any = (
                type(default[0]) if default else {"int": int, "float": float}[entry[1]] if entry else str
            )
            return tuple(kind(part.strip()) for part in value.split(",") if part.strip())
        return type(default)(value)
    except (KeyError, ValueError, IndexError) as error:
        raise SecateurError(
            f"{value!r} is not a {type(default).__name__}",
            where=f"{cls.name}.{field.name}",
            fix=f"e.g. {default}",
        ) from error


def list_methods(search: str | None = None, **filters: Any) -> list[str]:
    """Names of the registered methods, filtered by their taxonomy records; with `search` the best match first.

    >>> "wanda" in list_methods(when="PAT-PT", training_free=True)
    True
    >>> list_methods("determinantal point process")[0]
    'cdpruner'
    """
    records = sorted((cls.info for cls in _load_all().values()), key=lambda info: info.name)
    return [record.name for record in filter_records(records, search=search, **filters)]


class Advice(list[tuple[MethodInfo, str]]):
    """Records with reasons, best first, and `later`: what to add where one method isn't enough. Its repr is the first of them."""

    def __init__(self, found: Iterable[tuple[MethodInfo, str]] = (), later: Iterable[str] = ()):
        super().__init__(found)
        self.later = list(later)

    def __repr__(self) -> str:
        lines = [f"{place}. {info.name or info.spec}: {why}" for place, (info, why) in enumerate(self, 1)]
        return fit([f"Advice: {counted(len(self), 'method')}, best first", *lines])


def recommend(**situation: Any) -> Advice:
    """Registered methods that suit a situation, each with the reason, in the order of what was measured.

    >>> recommend(hardware="gpu-dense", train=False, data="calib", model="llm")  # doctest: +SKIP

    The questions and the advice are the survey's (`secateur.taxonomy.recommend`). `measured`: the comparisons that count, by
    default those that come with the library; `secateur.comparison.shipped.condensed(DIR)` reads your own.
    """
    situation.setdefault("measured", shipped())
    return Advice(advise([cls.info for cls in _load_all().values()], **situation), combine(**situation))


def __getattr__(name: str) -> Any:
    """The kinds of method by their old place: `from secateur.method import WeightMethod` goes on working."""
    if name in KINDS:
        return getattr(importlib.import_module(KINDS[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
