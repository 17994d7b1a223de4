"""What an attached method works with and never changes: the model, its facts, the stages and where they stand."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from secateur.attention.work import VisualWork
from secateur.errors import SecateurError, choose
from secateur.families.vlm import Facts, Family, facts_of, family_of
from secateur.families.vlm.facts import decoder_of
from secateur.tokens.method import Glimpse, Lesson, Memory, Stage, TokenMethod
from secateur.tokens.modules import Trained, filled
from secateur.tokens.sets import BUDGETS, SCOPES
from secateur.tokens.site import Site
from secateur.utils.screen import Screen

OLDEST = (5, 21)
"""The first transformers whose models all take `mm_encoder_outputs` as they give them; Idefics3 fails on its own until then."""


@dataclass(frozen=True)
class Placed:
    """A stage and where it stands in this model."""

    stage: Stage
    kind: str
    """"tiles", "input", "layer", "encoder" (before a block of the tower) or "inside" (between its attention and its MLP)."""
    number: int
    label: str
    """The key under which `Attached.kept` has it."""

    @property
    def weighs(self) -> bool:
        """Its tokens are weighed as keys in the language model."""
        return self.stage.bias is not None and self.kind in ("input", "layer")


class Kept(dict[str, list[Tensor]]):
    """What stayed, by stage ("input", "layer:2", or its number) and row."""

    def __missing__(self, key: Any) -> list[Tensor]:
        if isinstance(key, int) and -len(self) <= key < len(self):
            return list(self.values())[key]
        raise KeyError(key)


@dataclass(frozen=True, eq=False, repr=False)
class Setup(Screen):
    """What the drivers need of an attached model; made once by `make_setup`."""

    model: Any
    method: TokenMethod
    family: Family
    facts: Facts
    target: float | int | None
    """The share of the visual tokens that stays, their number (an image's, or whatever `budget` says), or None: the
    method finds it."""
    seed: int
    compact: bool
    """Position ids of what stays are counted again."""
    given: dict[str, Any]
    """What the caller handed to the method beside its hyperparameters."""
    stages: tuple[Placed, ...]
    sites: dict[str, Site]
    """What the stages have recorded, by the text that asks for it."""
    pad: int
    """The id that fills shortened prompts."""
    memory: Memory | None = None
    """What is remembered from run to run."""
    budget: str | None = None
    """What has a budget of its own: each "frame", each "image", or "all" of a row together; None: as the method has it."""
    glimpsed: frozenset[str] = frozenset()
    """Sites that only looks at the prompt record."""
    modules: nn.Module | None = None
    """The method's own modules."""
    lesson: Lesson | None = None
    """What they are being taught; its stages stand in place of the method's."""
    work: VisualWork | None = None
    """What visual tokens take part in; None: everything."""

    @property
    def plain(self) -> bool:
        """A vision transformer on its own."""
        return self.family.layout is None

    @property
    def whole(self) -> bool:
        """Everything stays, so no stage is asked."""
        return isinstance(self.target, float) and self.target == 1

    @property
    def in_tower(self) -> bool:
        """Something is dropped or recorded inside the vision tower."""
        stages = any(placed.kind in ("encoder", "inside") for placed in self.stages)
        return stages or any(site.tower for site in self.sites.values())

    @property
    def warm_up(self) -> int:
        """Runs after which everything is there that the method remembers."""
        return self.memory.steps if self.memory is not None else 0

    @property
    def between_layers(self) -> bool:
        """Tokens leave between the layers of the language model."""
        return any(placed.kind == "layer" for placed in self.stages)

    @property
    def exact(self) -> bool:
        """What runs first must be the prompt, whole, and what follows must know of it by its cache."""
        return self.between_layers or self.work is not None

    @property
    def in_decoder(self) -> bool:
        """Something is dropped or recorded between the layers of the language model."""
        read = (site for text, site in self.sites.items() if text not in self.glimpsed)
        weighed = any(placed.weighs for placed in self.stages)
        others = weighed or self.work is not None
        return self.between_layers or others or any(not site.tower for site in read)

    def stages_at(self, kind: str, number: int = 0) -> list[Placed]:
        return [placed for placed in self.stages if placed.kind == kind and placed.number == number]


def make_setup(
    model: Any,
    method: TokenMethod,
    *,
    target: float | None,
    seed: int,
    positions: str | None = None,
    given: dict[str, Any] | None = None,
    budget: str | None = None,
    weights: Trained | None = None,
    modules: nn.Module | None = None,
    lesson: Lesson | None = None,
    work: VisualWork | None = None,
) -> Setup:
    """The setup of a method on a model. `weights`: of its modules; `modules`, `lesson`: they are being trained.

    Raises:
        SecateurError: the model or one of the method's places can't work, with the reason.
    """
    family = family_of(model)
    plain = family.layout is None
    _check_transformers(plain)
    facts = facts_of(model, family)
    positions = positions or method.positions
    if positions not in ("original", "compact"):
        raise SecateurError(
            f"there are no positions {positions!r}", where="attach", fix="original or compact"
        )
    if budget is not None:
        _check_budget(budget, method, target, plain)
    stages = method.stages(facts) if lesson is None else lesson.stages
    numbered = _numbered([_place(stage, method, facts, plain) for stage in stages])
    if modules is None:
        modules = filled(method, facts, weights, target, model)
    copied = modules if method.copies(facts) else None
    numbered = tuple(_with_weights(placed, model, method, copied) for placed in numbered)
    _check_tiles(numbered, method)
    _check_parking(numbered, method)
    if work is not None:
        numbered += _cut(work, numbered, method, facts)
    memory = None if plain else method.memory(facts)
    layers = memory.layers if memory is not None else ()
    remembered = {f"layer:{n} over runs": Site.parse(f"layer:{n}", facts.layers, 0) for n in layers}
    remembered = {text: dataclasses.replace(site, form="rows") for text, site in remembered.items()}
    config = getattr(model, "config", None)
    text = getattr(config, "get_text_config", lambda: None)() or config
    pad = getattr(text, "pad_token_id", None)
    return Setup(
        model=model,
        method=method,
        family=family,
        facts=facts,
        target=target,
        seed=seed,
        # positions of two dimensions say where a patch lies, so there is nothing to count again
        compact=positions == "compact" and not family.mrope,
        given=given or {},
        stages=numbered,
        sites=_sites(numbered, facts) | remembered,
        pad=int(pad) if pad is not None else 0,
        memory=memory,
        budget=budget,
        glimpsed=_glimpsed(numbered, remembered),
        modules=modules,
        lesson=lesson,
        work=work,
    )


def _check_budget(budget: str, method: TokenMethod, target: float | None, plain: bool) -> None:
    choose(budget, tuple(BUDGETS), what="budget", where="attach")
    fix = "leave budget out: then it is as the method has it"
    if target is None:
        raise SecateurError("without a target there is nothing to divide", where="budget", fix=fix)
    if plain and budget != "image":
        raise SecateurError(
            "to a vision transformer on its own every picture is a row",
            where="budget",
            fix="leave budget out: every picture has its own",
        )
    if reason := method.no_budget.get(budget):
        raise SecateurError(f"{method.name} takes no budget={budget!r}: {reason}", where="budget", fix=fix)


def _check_transformers(plain: bool) -> None:
    import transformers

    version = tuple(int(p) for p in transformers.__version__.split(".")[:2] if p.isdigit())
    if not plain and version < OLDEST:
        raise SecateurError(
            f"transformers {transformers.__version__} is too old: not all of its models take mm_encoder_outputs",
            where="attach",
            fix=f"install transformers {OLDEST[0]}.{OLDEST[1]} or later",
        )


def _place(stage: Stage, method: TokenMethod, facts: Facts, plain: bool) -> Placed:
    where = f"{method.name}, stage {stage.at}"
    if (stage.scope or method.scope) not in SCOPES:
        raise SecateurError(f"there is no scope {stage.scope!r}", where=where, fix=", ".join(SCOPES))
    if (stage.parks or stage.returns) and not stage.at.startswith("layer"):
        raise SecateurError(
            "tokens are parked between decoder layers only", where=where, fix="stages at layer:K"
        )
    if stage.at in ("tiles", "input"):
        if plain:
            raise SecateurError(
                "a vision transformer on its own has no language model to shorten the input of",
                where=where,
                fix="use a stage at encoder:K",
            )
        if stage.at == "tiles":
            stage = dataclasses.replace(stage, scope="image")
        return Placed(stage, stage.at, 0, stage.at)
    if stage.glimpse is not None:
        raise SecateurError("only what stands before the language model looks ahead", where=where)
    site = Site.parse(stage.at, facts.layers, facts.blocks)
    if site.form == "mlp" and site.tower:
        return Placed(stage, "inside", site.number, f"encoder:{site.number}:mlp")
    if site.form:
        raise SecateurError(
            f"{stage.at!r} isn't a place for a stage", where=where, fix="tiles, input, layer:K or encoder:K"
        )
    kind = "encoder" if site.tower else "layer"
    if kind == "layer" and site.number < facts.first_layer:
        first = "layer" if facts.first_layer == 1 else f"{facts.first_layer} layers"
        raise SecateurError(
            f"tokens cannot leave before layer {site.number}: this model adds visual features to its first {first}",
            where=where,
            fix=f"use layer:{facts.first_layer} or later, or input",
        )
    return Placed(stage, kind, site.number, f"{kind}:{site.number}")


def _with_weights(placed: Placed, model: Any, method: TokenMethod, copied: nn.Module | None) -> Placed:
    """A stage whose look has layers of this model, and weights that fit them, on its device; those of `copied` if there are any."""
    glimpse, where = placed.stage.glimpse, f"{method.name}, stage {placed.label}"
    if glimpse is None:
        return placed
    layers = decoder_of(model).layers
    if not glimpse.layers or list(glimpse.layers) != sorted(
        {n for n in glimpse.layers if 0 <= n < len(layers)}
    ):
        raise SecateurError(
            f"layers {glimpse.layers} aren't layers of this model, in order",
            where=where,
            fix=f"numbers from 0 to {len(layers) - 1}, each once",
        )
    if copied is not None:
        if glimpse.weights is not None:
            raise SecateurError(
                "weights came twice for the layers that look", where=where, fix="a file, or weights=DIR"
            )
        weights: dict[str, Tensor] = dict(copied.named_parameters())
        return dataclasses.replace(
            placed, stage=dataclasses.replace(placed.stage, glimpse=Glimpse(glimpse.layers, weights))
        )
    if glimpse.weights is None:
        return placed
    own = {f"{n}.{name}": p for n in glimpse.layers for name, p in layers[n].named_parameters()}
    wrong = [n for n in {**own, **glimpse.weights} if _shape(own, n) != _shape(glimpse.weights, n)]
    if wrong:
        mine, its = _shape(own, wrong[0]), _shape(glimpse.weights, wrong[0])
        raise SecateurError(
            f"{wrong[0]} is {mine or 'not there'} in the model's layers {glimpse.layers}, and {its or 'not there'} in the weights",
            where=where,
            fix="weights of every parameter of these layers, trained on this model",
        )
    moved = {name: glimpse.weights[name].to(p) for name, p in own.items()}
    stage = dataclasses.replace(placed.stage, glimpse=dataclasses.replace(glimpse, weights=moved))
    return dataclasses.replace(placed, stage=stage)


def _shape(tensors: Mapping[str, Tensor], name: str) -> list[int] | None:
    return list(tensors[name].shape) if name in tensors else None


def _check_tiles(stages: tuple[Placed, ...], method: TokenMethod) -> None:
    tiles = [placed for placed in stages if placed.kind == "tiles"]
    if len(tiles) > 1:
        raise SecateurError("only one stage may choose tiles", where=method.name)
    towers = any(placed.kind in ("encoder", "inside") for placed in stages)
    if tiles and (towers or any(text.startswith("encoder") for p in stages for text in p.stage.records)):
        raise SecateurError(
            "in a tower that sees some of the tiles nothing is read or dropped",
            where=f"{method.name}, stage tiles",
        )


def _glimpsed(stages: tuple[Placed, ...], remembered: Mapping[str, Site]) -> frozenset[str]:
    looks = {text for p in stages if p.stage.glimpse is not None for text in p.stage.records}
    others = {text for p in stages if p.stage.glimpse is None for text in p.stage.records}
    return frozenset(looks - others - set(remembered))


def _check_parking(stages: tuple[Placed, ...], method: TokenMethod) -> None:
    """What is parked must return, and what returns was parked."""
    parks = [placed.number for placed in stages if placed.stage.parks]
    returns = [placed.number for placed in stages if placed.stage.returns]
    if not parks and not returns:
        return
    if not parks or not returns or min(returns) <= min(parks) or max(returns) <= max(parks):
        names = [
            " and ".join(f"layer:{n}" for n in sorted(numbers)) or "no layer" for numbers in (parks, returns)
        ]
        raise SecateurError(
            f"tokens are parked at {names[0]} and return at {names[1]}",
            where=method.name,
            fix="a stage with returns=True at a later layer than every one with parks=True",
        )


def _cut(
    work: VisualWork, stages: tuple[Placed, ...], method: TokenMethod, facts: Facts
) -> tuple[Placed, ...]:
    """The stage at which every visual token leaves, if there is one; refuses what a plan can't go with."""
    if not facts.layers:
        raise SecateurError(
            "a vision transformer on its own has no words that visual tokens stand beside",
            where="work",
            fix="a vision-language model",
        )
    work.check(facts.layers, facts.heads, facts.intermediate)
    if any(placed.weighs or placed.stage.glimpse is not None for placed in stages):
        raise SecateurError(
            f"{method.name} weighs tokens as keys, or looks ahead at the prompt, and a plan of visual work doesn't say how",
            where="work",
            fix="use another token method, or none",
        )
    if not work.leaves:
        return ()
    late = [p.label for p in stages if p.kind == "layer" and p.number >= work.last]
    if late:
        raise SecateurError(
            f"{method.name} chooses at {', '.join(late)}, and all visual tokens have left at layer {work.last}",
            where="work",
            fix="a later cut, or a method that chooses before",
        )
    stage = Stage(f"layer:{work.last}", lambda sets: torch.zeros_like(sets.valid), scope="row", clears=True)
    return (_place(stage, method, facts, plain=False),)


def _numbered(stages: list[Placed]) -> tuple[Placed, ...]:
    """Several stages at one place are told apart by their labels: "layer:2", "layer:2#2"."""
    count: dict[str, int] = {}
    numbered = []
    for placed in stages:
        again = count[placed.label] = count.get(placed.label, 0) + 1
        label = placed.label if again == 1 else f"{placed.label}#{again}"
        numbered.append(Placed(placed.stage, placed.kind, placed.number, label))
    return tuple(numbered)


def _sites(stages: tuple[Placed, ...], facts: Facts) -> dict[str, Site]:
    texts = [text for placed in stages for text in placed.stage.records]
    for text in texts:
        if text.endswith(":mlp"):
            raise SecateurError(f"{text!r} isn't a record", where="tokens", fix="record the block")
    return {text: Site.parse(text, facts.layers, facts.blocks) for text in texts}


def tower_of(setup: Setup) -> tuple[nn.Module, Any]:
    """The vision tower and its blocks ([] where they aren't known)."""
    tower = setup.model if setup.plain else setup.model.get_encoder("image")
    return tower, setup.family.blocks(tower) if setup.facts.blocks else []
