"""What a method is: the kinds, and the registry that finds them by their folder.

A method is one file in `secateur/methods/`: a dataclass whose fields are the paper's hyperparameters, a taxonomy
record, what it needs to know about the data, and its score. Everything else (hooks, budgets, indices) is the engines'.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import pkgutil
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
from torch import Tensor

from secateur.errors import SecateurError
from secateur.taxonomy import MethodInfo, filter_records
from secateur.taxonomy import recommend as advise

if TYPE_CHECKING:
    from secateur.context import Context
    from secateur.graph.groups import Group
    from secateur.plan import Plan
    from secateur.select import Pattern
    from secateur.stats.layer import LayerStats
    from secateur.stats.stream import Block
    from secateur.training.job import Job


@dataclasses.dataclass
class Method:
    """The base of all methods. Fields of a subclass are its hyperparameters, with the paper's defaults."""

    name: ClassVar[str] = ""
    info: ClassVar[MethodInfo]
    needs: ClassVar[frozenset[str]] = frozenset()
    """Statistics the method reads, by the names of `secateur.stats`: input_norm, hessian, gradient, ..."""
    allocation: ClassVar[str] = "uniform"
    """How a share is divided over layers when the caller doesn't say: uniform, global, owl, per-kind."""

    def __post_init__(self) -> None:
        """Refuses a value that isn't among its field's `metadata["choices"]`."""
        for item in dataclasses.fields(self):
            known, value = item.metadata.get("choices"), getattr(self, item.name)
            if known and value not in known:
                listed = list(map(str, known))
                raise SecateurError(
                    f"there is no {item.name} {value!r}",
                    where=self.name,
                    fix=" or ".join(listed) if len(listed) == 2 else f"one of {', '.join(listed)}",
                )

    @property
    def hyperparameters(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


@dataclasses.dataclass
class WeightMethod(Method):
    """Removes single weights: a mask over every prunable matrix, unstructured or N:M.

    Write `score`; override `solve` when choosing and repairing happen together, as in SparseGPT.
    """

    scope: ClassVar[str] = "row"
    """Where weights compete: in their output row, in their layer, or globally."""
    propagate: ClassVar[bool] = True
    """Whether a block's statistics are gathered after the blocks before it were pruned."""

    def score(self, weight: Tensor, stats: LayerStats) -> Tensor:
        """[out, in] -> [out, in], higher = keep."""
        raise TypeError(f"{type(self).__name__} must define score")

    def scores(self, weight: Tensor, stats: LayerStats) -> Tensor:
        """`score`, part by part where rows have inputs of their own: experts, convolution groups."""
        return torch.cat([self.score(rows, own) for rows, own in stats.split(weight)])

    def solve(self, weight: Tensor, stats: LayerStats, pattern: Pattern) -> tuple[Tensor, Tensor]:
        """(new weight, kept mask), both [out, in]; the mask satisfies `pattern` exactly."""
        mask = pattern.select(self.scores(weight, stats))
        return weight.masked_fill(~mask, 0), mask

    def solve_block(self, block: Block, patterns: Mapping[str, Pattern]) -> dict[str, tuple[Tensor, Tensor]]:
        """`solve` for the matrices of one block, by name; override it to solve several at once."""
        return {
            name: self.solve(block.matrices[name].weight(), block.stats[name], pattern)
            for name, pattern in patterns.items()
        }


@dataclasses.dataclass
class UnitMethod(Method):
    """Removes whole units (heads, neurons, channels, layers): smaller dense tensors.

    Write `score` (or `scores`, when one pass gives those of all groups), and `repair` when what is left is corrected in
    closed form; override `plan` when the method divides the budget itself.
    """

    kinds: ClassVar[tuple[str, ...] | None] = None
    """The kinds of unit it cuts; None: every kind the graph has."""
    share_of: ClassVar[str] = "units"
    """What a bare percentage counts: "units" of every prunable group, or the "weights" inside a language model's blocks."""

    def score(self, group: Group, context: Context) -> Tensor:
        """[units], higher = keep."""
        raise TypeError(f"{type(self).__name__} must define score")

    def scores(self, context: Context) -> dict[str, Tensor]:
        """`score` by group name."""
        return {group.name: self.score(group, context) for group in context.groups}

    def repair(self, context: Context, keep: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Tensors (at their dense shape, by name) that replace the model's before the cut."""
        return {}

    def plan(self, context: Context) -> Plan:
        """Scores -> budget -> kept units -> repaired tensors."""
        keep = context.allocate(self.scores(context))
        return context.make_plan(keep=keep, values=self.repair(context, keep))


@dataclasses.dataclass
class TrainMethod(Method):
    """Prunes while the network is trained, on a task's data: `secateur.train_prune`.

    Write `prune`: phases of training (`job.train`), what is removed between or during them, and the plan at the end.
    """

    starts: ClassVar[str] = "init"
    """What the first phase begins with: "init", untrained weights, or "trained" ones."""
    removes: ClassVar[str] = "weights"
    """Single "weights" (zeros) or whole "units" (smaller tensors)."""
    kinds: ClassVar[tuple[str, ...] | None] = None
    """The kinds of unit it cuts, where it removes units; None: every kind the graph has."""
    share_of: ClassVar[str] = "units"
    """What a bare percentage counts, where it removes units: as for `UnitMethod`."""

    def prune(self, job: Job) -> Plan:
        """Trains `job.model` in phases and gives the plan. It is run again from its top when a run is resumed: finished
        phases are then read, so what lies between them must be a function of the model, the job and the seed."""
        raise TypeError(f"{type(self).__name__} must define prune")


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
    if key in registry:
        return registry[key]
    near = difflib.get_close_matches(key, registry, n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(near)}?" if near else "`secateur methods` lists them"
    raise SecateurError(f"there is no method {name!r}", where="method", fix=hint)


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
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.4)
            fix = f"did you mean {near[0]}?" if near else f"it takes {', '.join(known) or 'none'}"
            raise SecateurError(f"{cls.name} has no hyperparameter {key!r}", where="method", fix=fix)
    return cls(**{key: _coerce(cls, known[key], value) for key, value in hyperparameters.items()})


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


def seeded(seed: int, *parts: object) -> torch.Generator:
    """A CPU generator for one place in a run: the same seed and parts give the same numbers on every machine."""
    import hashlib

    digest = hashlib.sha256("/".join(map(str, (seed, *parts))).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))


Objective = Callable[[torch.nn.Module, Any], Tensor]
"""A scalar of a model and a batch: the loss, or what a method differentiates in its place."""
