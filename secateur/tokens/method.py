"""What a token method is: a list of stages, each a place in the model and a function that chooses there."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from secateur.attention.work import VisualWork
from secateur.families.vlm import Facts
from secateur.method import Method
from secateur.tokens.state import Reduction, TokenSets
from secateur.utils.screen import Screen

Select = Callable[[TokenSets], "Tensor | Reduction"]
Loss = Callable[[Mapping[str, Tensor], Tensor], Tensor]
"""What the stages of a run noted, and the model's own loss of the answers -> scalar."""


@dataclass(frozen=True, repr=False)
class Glimpse(Screen):
    """A look at what is left of a prompt by some of the language model's layers, before a stage is asked.

    >>> Stage("input", self.select, ("layer:3",), glimpse=Glimpse((0, 1, 2, 3)))  # doctest: +SKIP

    `layers` run one after another and the others are passed over; what the stage records of them is there. `weights`: in place
    of their own while the look lasts, {"3.mlp.up_proj.weight": ...}; those of every parameter of every layer. Where images
    are pyramids it sees the coarsest level and the finest that was read.
    """

    layers: tuple[int, ...]
    weights: Mapping[str, Tensor] | None = None


@dataclass(frozen=True)
class Stage:
    """One place where tokens leave.

    >>> Stage(at="layer:2", select=self.select, records=("layer:1",), keep=0.5)  # doctest: +SKIP

    `at`: "tiles" (between the levels of an image pyramid, before the tower: `select` gives bool [S, tiles], the tiles of the
    next level that are read, row by row), "input" (projected features, before the language model), "layer:K" (before decoder layer K runs),
    "encoder:K" (before block K of the vision tower runs), or "encoder:K:mlp" (between its attention and its MLP).
    `select`: `TokenSets` -> bool [S, n] of what stays, or a `Reduction`. `records`: what the engine must note for it. `scope`: which tokens compete, None: the method's.
    `keep`: float, the share of the original count of each set; int, the count; None, what the target says.
    `bias`: the name of a carried number above 0 whose log is added to a token's attention logits as a key, in the layers
    that come (in the tower, the blocks after). Gradients reach the number. In the language model for one forward only.
    `positions`: "original" where a stage between layers leaves positions alone though the method's are "compact".
    `glimpse`: at "tiles" and "input", layers that look at the prompt first.
    `parks`: between layers, what leaves steps aside: it keeps its state and its position, until a later stage with `returns`,
    at which all that is parked competes again, with the state it had. A parked token is read and written by no layer.
    `clears`: everything leaves, and nothing is asked.
    """

    at: str
    select: Select
    records: tuple[str, ...] = ()
    scope: str | None = None
    keep: float | int | None = None
    bias: str | None = None
    positions: str | None = None
    glimpse: Glimpse | None = None
    parks: bool = False
    returns: bool = False
    clears: bool = False


@dataclass(frozen=True)
class Lesson:
    """A part of the training of a method's modules: `secateur.train_tokens`.

    >>> Lesson("gates", [Stage("input", self.weigh, bias="gate")], self.loss)  # doctest: +SKIP

    `stages`: in place of the method's own, while this lesson lasts; what they write to `sets.noted` and `sets.carried` may
    hold gradients. `loss`: see `Loss`.
    """

    name: str
    stages: list[Stage]
    loss: Loss


@dataclass(frozen=True)
class Memory:
    """What a method remembers of the runs of an episode: the attention that the last prompt token and all words written
    after it gave to each visual token, a mean over these rows, the heads and the `layers`.

    >>> Memory(layers=(15,), steps=3)  # doctest: +SKIP

    `steps`: how many runs are kept; a method sees them as `sets.history`. `carry`: a token that had left keeps what was
    remembered of it, rather than 0. `longest`: runs without a reset after which a warning is given.
    """

    layers: tuple[int, ...]
    steps: int
    carry: bool = False
    longest: int = 1000


@dataclass
class TokenMethod(Method):
    """Removes or merges visual tokens while the model runs; no weight changes.

    Write `select`, and override `stages` where tokens leave in more than one place. How many stay is `sets.keep`; what the
    caller asked for is `sets.target`.
    """

    verb: ClassVar[str] = "attach"
    scope: ClassVar[str] = "image"
    """Which tokens compete: those of one "crop", one "frame", one "image", or one batch "row"."""
    one_crop: ClassVar[str] = ""
    """Why tokens of several crops can't compete, where they can't: then `attach(budget=...)` is refused for pictures of several."""
    no_budget: ClassVar[Mapping[str, str]] = {}
    """Budgets ("frame", "image", "all") that the method can't follow, each with the reason."""
    positions: ClassVar[str] = "original"
    """Position ids of what stays: "original", or "compact" (counted again; on models with 2-D positions as "original")."""
    newlines: ClassVar[str] = "keep"
    """Separators between grid rows: "keep" (not in the sets, always stay), "drop", or "compete" with the others."""
    records: ClassVar[tuple[str, ...]] = ()
    """What the default stage reads: "encoder:-2", "layer:7", "layer:7:raw", "layer:7:modules", "layer:7:peek"."""
    adaptive: ClassVar[bool] = False
    """It finds the counts itself: the target may be None."""
    asks: ClassVar[Mapping[str, Any]] = {}
    """What it can't do without of `attach(..., given=...)`, each with an example that is checked on any model."""

    @classmethod
    def usual(cls) -> dict[str, Any]:
        own = {"objects": "T", "granularity": "token", "speedup": "univ", "when": "RT"}
        return {**super().usual(), **own, "data": "input", "decision": "dyn", "budget_unit": "tokens"}

    def select(self, sets: TokenSets) -> Tensor | Reduction:
        """The tokens that stay at the default stage.

        Args:
            sets: S sets of up to n visual tokens that compete, and what the model's statistics say about them.

        Returns:
            bool [S, n], True = stays, never where `sets.valid` is False; or a `Reduction` where tokens merge or move.

        Raises:
            Missing: the model has no statistic that the method can't do without.
        """
        raise self.lacks("select")

    def stages(self, facts: Facts) -> list[Stage]:
        """The places where tokens leave, in the order in which the model comes to them.

        Args:
            facts: depths and widths of the model; `facts.layer` and `facts.spread` scale published layers to its depth.

        Returns:
            At least one stage; `select` at the input unless overridden.
        """
        return [Stage(at="input", select=self.select, records=self.records)]

    def modules(self, facts: Facts) -> nn.Module | None:
        """Untrained modules for a model, which stages read as `sets.modules`; None: the method has none.

        Random weights are drawn from torch's global state, which the engine seeds.
        """
        return None

    def copies(self, facts: Facts) -> tuple[int, ...]:
        """Decoder layers of which trained copies may look at the prompt in place of the model's own (`Glimpse`); none: the
        method has no copies. A method without `modules` owns them: `train_tokens` trains them, `attach(weights=...)` takes them.
        """
        return ()

    def lessons(self, facts: Facts) -> list[Lesson]:
        """How the modules are trained, one after the other."""
        return []

    def memory(self, facts: Facts) -> Memory | None:
        """What is remembered from run to run, until `attached.reset()`; None: every run stands alone."""
        return None


@dataclass
class WorkMethod(Method):
    """Says what visual tokens take part in; none leaves before the plan's cut, and no weight changes.

    Write `work`; `secateur.attach(model, method)` runs it.
    """

    verb: ClassVar[str] = "work"
    instead: ClassVar[tuple[str, ...]] = ()
    """Hyperparameters that say how much is left of each part, where no target does."""

    @classmethod
    def usual(cls) -> dict[str, Any]:
        own = {"objects": "A H L N", "granularity": "struct", "speedup": "mixed", "when": "PAT"}
        return {**super().usual(), **own, "decision": "stat", "budget_unit": "heads"}

    def work(self, facts: Facts, target: float | None, given: Mapping[str, Any], seed: int) -> VisualWork:
        """The plan for a model.

        Args:
            facts: depths and widths of the model.
            target: the share of the visual tokens' multiply-adds that is left; 1: everything is as the model has it; None: as the
                hyperparameters say.
            given: what the caller passed to `attach` beside the hyperparameters.
            seed: of what is drawn.

        Raises:
            SecateurError: the target can't be met, or something is missing.
        """
        raise self.lacks("work")


@dataclass
class Excused(TokenMethod):
    """Every visual token stays: what stands in for the token method of a model that has none."""

    name: ClassVar[str] = "excused"
    adaptive: ClassVar[bool] = True

    def __repr__(self) -> str:
        return self.name

    def stages(self, facts: Facts) -> list[Stage]:
        return []


@dataclass
class Chosen(TokenMethod):
    """Any function of the sets in place of a method's name."""

    name: ClassVar[str] = "select"
    function: Select | None = None
    at: str = "input"
    needs_records: tuple[str, ...] = ()
    competes: str = "image"

    def stages(self, facts: Facts) -> list[Stage]:
        assert self.function is not None
        return [Stage(self.at, self.function, self.needs_records, scope=self.competes)]

    @property
    def hyperparameters(self) -> dict[str, object]:
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
