"""What visual tokens take part in, decided once: data that can be saved, edited and loaded.

"Treat Visual Tokens as Text? But Your MLLM Only Needs Fewer Efforts to See", 2024, https://arxiv.org/abs/2410.06169. Spec: yopo.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pydantic import Field

from secateur.errors import SecateurError
from secateur.utils.files import atomic_write_json, check_path
from secateur.utils.schema import Count, Entry, Size, parse, read_object

FORMAT = "secateur visual work 1"
Neurons = int | tuple[int, ...]
"""The first so many, or those of these numbers."""


class _File(Entry):
    format: str
    layers: Size
    heads_each: Size
    neurons_each: Size
    window: int | None = None
    causal: bool = False
    heads: list[list[Count]] | None = None
    silent: bool = True
    neurons: list[Count | list[Count]] | None = None
    cut: int | None = None
    renormalise: bool = True
    physical: bool = True
    about: dict[str, Any] = Field(default_factory=dict)


@dataclass(frozen=True)
class VisualWork:
    """The work that a language model of `layers` layers, each of so many heads and neurons, does for visual tokens.

    >>> work = VisualWork(layers=4, heads_each=4, neurons_each=384, window=5, neurons=(192,) * 4, cut=2)
    >>> work.save("work.json")  # doctest: +SKIP
    >>> secateur.attach(model, "yopo", work="work.json")  # doctest: +SKIP

    window: a visual token sees the visual tokens of its picture at most (window - 1) / 2 rows and columns away; odd; None: as
    the model has it. causal: only those up to itself; otherwise also later ones, as released.
    heads: for each layer the heads that work for visual tokens; for the others visual keys weigh nothing after the softmax,
    which isn't normalised again. silent: they also give nothing to visual queries.
    neurons: for each layer how many of the first neurons work for visual tokens, or which.
    cut: the first layer without visual tokens; as many as there are layers: none is. renormalise: they leave there (the
    attention's softmax is over what is left); otherwise they stay, with no weight after the softmax, as released.
    physical: what isn't used isn't computed; otherwise everything is and is masked, as released.

    Raises `SecateurError` for a window that is even, numbers that no layer has, and a cut behind the last layer.
    """

    layers: int
    heads_each: int
    neurons_each: int
    window: int | None = None
    causal: bool = False
    heads: tuple[tuple[int, ...], ...] | None = None
    silent: bool = True
    neurons: tuple[Neurons, ...] | None = None
    cut: int | None = None
    renormalise: bool = True
    physical: bool = True
    about: dict[str, Any] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        if self.window is not None and (self.window < 1 or self.window % 2 == 0):
            raise SecateurError(
                f"a window of {self.window} has no middle", where="window", fix="an odd number, such as 5"
            )
        if self.cut is not None and not 0 <= self.cut <= self.layers:
            raise SecateurError(
                f"visual tokens can't leave at layer {self.cut} of {self.layers}",
                where="cut",
                fix=f"0 to {self.layers}; {self.layers}: they stay",
            )
        for name, rows in (("heads", self.heads), ("neurons", self.neurons)):
            if rows is not None and len(rows) != self.layers:
                raise SecateurError(
                    f"they are given for {len(rows)} layers of {self.layers}",
                    where=name,
                    fix="an entry a layer",
                )
        for layer, kept in enumerate(self.heads or ()):
            _check(kept, self.heads_each, "heads", layer)
        for layer, count in enumerate(self.neurons or ()):
            own = range(count) if isinstance(count, int) else count
            if isinstance(count, int) and not 0 <= count <= self.neurons_each:
                raise SecateurError(
                    f"layer {layer} has {self.neurons_each} neurons, not {count}",
                    where="neurons",
                    fix=f"0 to {self.neurons_each}",
                )
            _check(own, self.neurons_each, "neurons", layer)

    @property
    def last(self) -> int:
        """The first layer in which visual tokens have no part."""
        return self.layers if self.cut is None else self.cut

    @property
    def leaves(self) -> bool:
        """Visual tokens leave at the cut; otherwise they are masked from there on."""
        return self.last < self.layers and self.renormalise and self.physical

    def pruned(self, layer: int) -> list[int]:
        """Heads of a layer that do no work for visual tokens."""
        if self.heads is None:
            return []
        return [head for head in range(self.heads_each) if head not in self.heads[layer]]

    def count(self, layer: int) -> int:
        """Neurons of a layer that work for visual tokens."""
        own = self.neurons_each if self.neurons is None else self.neurons[layer]
        return own if isinstance(own, int) else len(own)

    @property
    def dense(self) -> bool:
        """The model's own work, all of it."""
        whole = all(self.count(n) == self.neurons_each for n in range(self.layers))
        return self.window is None and self.last == self.layers and whole and not any(map(self.pruned, range(self.layers)))  # fmt: skip

    def save(self, file: str | Path) -> None:
        """A JSON file that `load` reads; written whole or not at all."""
        atomic_write_json(Path(file).expanduser(), {"format": FORMAT, **asdict(self)})

    @classmethod
    def load(cls, source: str | Path | Mapping[str, Any] | VisualWork) -> VisualWork:
        """From a file that `save` wrote, or what it holds. Raises `SecateurError` with the entry that doesn't belong there."""
        if isinstance(source, VisualWork):
            return source
        fix = "write it with VisualWork(...).save(file)"
        if isinstance(source, str | Path):
            path = Path(source).expanduser()
            if not path.is_file():
                raise SecateurError("there is no such file", where=f"work {path}", fix=check_path(path))
            source, where = read_object(path, fix), str(path)
        else:
            where = "work"
        found = parse(_File, {"format": FORMAT, **source}, where, fix).model_dump()
        if found.pop("format") != FORMAT:
            raise SecateurError(f"its format isn't {FORMAT!r}", where=where, fix=fix)
        for name in ("heads", "neurons"):
            if found[name] is not None:
                found[name] = tuple(tuple(own) if isinstance(own, list) else own for own in found[name])
        return cls(**found)

    def check(self, layers: int, heads: int, neurons: int) -> None:
        """Raises `SecateurError` unless it was made for a model of these sizes."""
        for name, mine, its in (
            ("layers", self.layers, layers),
            ("heads", self.heads_each, heads),
            ("neurons", self.neurons_each, neurons),
        ):
            if mine != its:
                raise SecateurError(
                    f"it is for {mine} {name}{'' if name == 'layers' else ' a layer'}, and this model has {its}",
                    where="work",
                    fix="make it for this model",
                )


def _check(own: Any, each: int, name: str, layer: int) -> None:
    if len(set(own)) != len(own) or any(not 0 <= number < each for number in own):
        raise SecateurError(
            f"layer {layer} has {name} 0 to {each - 1}, each once, and not {list(own)}"[:200],
            where=name,
            fix="numbers of those that work for visual tokens",
        )
