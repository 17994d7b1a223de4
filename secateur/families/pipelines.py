"""Pipelines of diffusers as one module: their text encoders and denoisers, as they are called while the pipeline draws."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from secateur.errors import SecateurError
from secateur.utils.inputs import map_tensors
from secateur.utils.random import seed_of
from secateur.utils.running import device_of, evaluating

PARTS = ("text_encoder", "unet", "transformer", "prior")
"""How the names of what is cut begin; all else (image decoders, safety checkers) stays as it is."""
PROMPTS = ("a photo of a dog", "a red house by the sea", "two people at a table", "a drawing of a tree")
PROMPTED = ("prompt", "class_labels")
CALIBRATED = 4
"""Steps of each drawing that calibration inputs are taken from."""


def is_pipeline(value: Any) -> bool:
    """Whether a value is a pipeline of diffusers; the library isn't imported."""
    names = {(cls.__module__.partition(".")[0], cls.__name__) for cls in type(value).__mro__}
    return ("diffusers", "DiffusionPipeline") in names


def as_module(
    model: Any, prompts: Sequence[Any] | None = None, drawing: Mapping[str, Any] | None = None
) -> Any:
    """The parts of a pipeline, or parts with other prompts or arguments; anything else as it is.

    Raises `SecateurError` for prompts or arguments of a pipeline where there is none.
    """
    if is_pipeline(model):
        return Parts(model, prompts, **(drawing or {}))
    if isinstance(model, Parts):
        other = Parts(
            model.pipeline,
            model.prompts if prompts is None else prompts,
            **(model.call | {**(drawing or {})}),
        )
        return model if prompts is None and drawing is None else other
    if prompts is not None or drawing is not None:
        raise SecateurError(
            "only a pipeline of diffusers takes them",
            where="prompts, drawing",
            fix="give inputs= and data= of the module",
        )
    return model


def components_of(pipeline: Any) -> dict[str, nn.Module]:
    """The text encoders and denoisers of a pipeline, by name."""
    found = {
        name: part
        for name, part in sorted(pipeline.components.items())
        if isinstance(part, nn.Module) and name.startswith(PARTS)
    }
    if not found:
        raise SecateurError(
            f"none of its parts is called {', '.join(PARTS)}",
            where=type(pipeline).__name__,
            fix="prune its modules one by one",
        )
    return found


class Parts(nn.Module):
    """The parts of a pipeline that can be cut. Its inputs are what each part is called with.

    >>> parts = Parts(pipe, prompts=["a photo of a cat"], num_inference_steps=4, guidance_scale=5.0)  # doctest: +SKIP
    >>> parts(**parts.example_inputs())["unet"]  # doctest: +SKIP

    prompts: what is drawn for calibration, in turn: texts, or class numbers; None: four texts, or the classes 0 to 3.
    call: further arguments of the pipeline.

    Raises `SecateurError` where the pipeline has no such parts, or takes neither prompts nor classes.
    """

    def __init__(self, pipeline: Any, prompts: Sequence[Any] | None = None, **call: Any):
        super().__init__()
        for name, part in components_of(pipeline).items():
            self.add_module(name, part)
        self.training = any(part.training for part in self.children())
        self.pipeline = pipeline
        known = inspect.signature(type(pipeline).__call__).parameters
        self.asks = next((name for name in PROMPTED if name in known), "")
        if not self.asks:
            raise SecateurError(
                f"it takes neither {' nor '.join(PROMPTED)}",
                where=type(pipeline).__name__,
                fix="prune its modules one by one",
            )
        if unknown := next((name for name in call if name not in known), None):
            raise SecateurError(
                f"it takes no {unknown!r}", where=type(pipeline).__name__, fix=", ".join([*known][1:])
            )
        if prompts is not None and (isinstance(prompts, str) or not len(prompts)):
            raise SecateurError("it isn't a list of prompts", where="prompts", fix='such as ["a red house"]')
        self.prompts = list(
            prompts if prompts is not None else PROMPTS if self.asks == "prompt" else range(4)
        )
        self.call = call

    def _apply(self, fn: Any, recurse: bool = True) -> Parts:
        """What isn't cut goes along to another device or dtype."""
        super()._apply(fn, recurse)
        own = {id(part) for part in self.children()}
        for part in self.pipeline.components.values():
            if isinstance(part, nn.Module) and id(part) not in own:
                part._apply(fn)
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Parts:
        """The parts are copied, and the scheduler, which counts steps; what isn't cut is shared."""
        pipeline = copy.copy(self.pipeline)
        for name in components_of(pipeline):
            setattr(pipeline, name, copy.deepcopy(getattr(self.pipeline, name), memo))
        pipeline.scheduler = copy.deepcopy(self.pipeline.scheduler)
        return Parts(pipeline, self.prompts, **self.call)

    def forward(self, **calls: Mapping[str, Any]) -> dict[str, Any]:
        """What each named part gives for its own arguments."""
        return {name: self.get_submodule(name)(**given) for name, given in calls.items()}

    def example_inputs(self, shape: str | None = None) -> dict[str, dict[str, Any]]:
        """What each part gets first where two prompts are drawn. Raises `SecateurError` for a part that isn't called."""
        found = {name: calls[0] for name, calls in self._calls([0, 1], 1).items()}
        if missing := next((name for name, _ in self.named_children() if name not in found), None):
            raise SecateurError(
                f"{type(self.pipeline).__name__} doesn't call it while it draws",
                where=missing,
                fix="cut it alone",
            )
        return found

    def calibration_inputs(self, samples: int, seed: int = 0) -> list[dict[str, dict[str, Any]]]:
        """What the parts get while so many drawings are made, in batches of at most 4 drawings; of up to four of their steps."""
        batches: list[dict[str, dict[str, Any]]] = []
        for first in range(0, samples, 4):
            numbers = [*range(first, min(first + 4, samples))]
            calls = self._calls(numbers, None, seed)
            counts = {name: len(found) for name, found in calls.items()}
            for place in range(min(CALIBRATED, max(counts.values()))):
                at = {n: place * c // min(CALIBRATED, max(counts.values())) for n, c in counts.items()}
                batches.append({name: calls[name][at[name]] for name in calls})
        return batches

    @torch.no_grad()
    def _calls(
        self, numbers: Sequence[int], steps: int | None, seed: int = 0
    ) -> dict[str, list[dict[str, Any]]]:
        """The arguments of every call of each part, by their names, in the order of the parts."""
        seen: dict[str, list[dict[str, Any]]] = {name: [] for name, _ in self.named_children()}

        def through(**calls: Any) -> dict[str, Any]:
            for name, given in calls.items():
                # one drawing's latents may be written in place by the next step
                seen[name].append(map_tensors(given, lambda tensor: tensor.clone()))
            return self(**calls)

        extra = {"num_inference_steps": steps} if steps else {}
        self.draw(self.seeds(len(numbers), seed), torch.tensor(numbers), through, **extra)
        return {name: calls for name, calls in seen.items() if calls}

    def seeds(self, count: int, seed: int) -> Tensor:
        """A seed for the noise of each drawing, int64 [count]."""
        return torch.tensor([seed_of(seed, "pipeline", number) for number in range(count)])

    def draw(self, seeds: Tensor, asked: Tensor, through: Any = None, **extra: Any) -> Tensor:
        """The latents [B, ...] behind the last step, for prompts by number.

        through: what is called in place of these parts, such as this module behind gates. With gradients on, each call of a part
        keeps its arguments alone, and is run again on the way back.
        """
        pipeline = self.pipeline
        arguments = {
            self.asks: [self.prompts[int(number) % len(self.prompts)] for number in asked],
            "generator": [torch.Generator().manual_seed(int(seed)) for seed in seeds],
            **self.call,
            **extra,
        }
        bars = getattr(pipeline, "_progress_bar_config", None)
        pipeline.set_progress_bar_config(disable=True)
        try:
            with evaluating(self), _routed(self, through or self), _watched(pipeline.scheduler) as states:
                try:
                    # without the decorator that turns gradients off
                    inspect.unwrap(type(pipeline).__call__)(pipeline, **arguments)
                except _Drawn:
                    pass
        finally:
            pipeline._progress_bar_config = bars if bars is not None else {}
        return states[-1][: len(seeds)]

    def check_sampler(self) -> None:
        """Refuse a pipeline whose drawing isn't a function of its seed, or has no gradient."""
        where = type(self.pipeline.scheduler).__name__
        seeds, asked = self.seeds(1, 0), torch.tensor([0])
        drawn = []
        device = device_of(self)
        devices = [device] if device.type == "cuda" else []
        for state in (1, 2):
            with torch.random.fork_rng(devices=devices), torch.no_grad():
                torch.manual_seed(state)
                drawn.append(self.draw(seeds, asked))
        if not torch.equal(*drawn):
            raise SecateurError(
                "two drawings from one seed differ: the sampler isn't a function of its seed",
                where=where,
                fix="take a scheduler that draws no noise of its own, such as DDIMScheduler",
            )
        with torch.enable_grad():
            differentiable = any(p.requires_grad for p in self.parameters())
            if differentiable and not self.draw(seeds, asked).requires_grad:
                raise SecateurError(
                    "its drawing has no gradient",
                    where=where,
                    fix="take another scheduler, such as DDIMScheduler",
                )


class _Drawn(Exception):
    """The last step is done; nothing is decoded."""


@contextmanager
def _watched(scheduler: Any) -> Iterator[list[Tensor]]:
    """The states that the scheduler's steps give; behind the last one `_Drawn` is raised."""
    states: list[Tensor] = []
    step = scheduler.step

    @functools.wraps(step)
    def watched(*args: Any, **kwargs: Any) -> Any:
        given = step(*args, **kwargs)
        states.append(given[0] if isinstance(given, tuple) else given.prev_sample)
        if len(states) == len(scheduler.timesteps):
            raise _Drawn
        return given

    scheduler.step = watched
    try:
        yield states
    finally:
        del scheduler.step


@contextmanager
def _routed(parts: Parts, through: Any) -> Iterator[None]:
    """Calls of the parts go through another callable, which may call them in turn."""

    def route(name: str, module: nn.Module) -> Any:
        own, signature = module.forward, inspect.signature(module.forward)
        run: Any = lambda given: through(**{name: given})[name]

        @functools.wraps(own)
        def forward(*args: Any, **kwargs: Any) -> Any:
            bound = signature.bind(*args, **kwargs)
            given = dict(bound.arguments)
            for key, parameter in signature.parameters.items():
                if parameter.kind is parameter.VAR_KEYWORD:
                    given |= given.pop(key, {})
            module.forward = own
            try:
                if torch.is_grad_enabled():
                    return checkpoint(run, given, use_reentrant=False)
                return run(given)
            finally:
                module.forward = forward

        return forward

    before = {name: module.__dict__.get("forward") for name, module in parts.named_children()}
    for name, module in parts.named_children():
        module.forward = route(name, module)
    try:
        yield
    finally:
        for name, module in parts.named_children():
            if (own := before[name]) is not None:
                module.forward = own
            else:
                module.__dict__.pop("forward", None)
