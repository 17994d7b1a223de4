"""`attach`: visual tokens leave an unmodified model while it runs; `detach`: the model is as it was.

What is put on the model lies on the instance (two wrapped methods, hooks, the config of a recorded layer), never on a class.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Self, overload

import torch
from torch import Tensor, nn

from secateur.attention.attend import Attending
from secateur.attention.method import AttentionMethod
from secateur.attention.work import VisualWork
from secateur.errors import SecateurError
from secateur.families.vlm import Facts, facts_of, family_of
from secateur.families.vlm.facts import decoder_of
from secateur.method import Method, make_method, method_class
from secateur.skipping.attached import Skipping
from secateur.tokens import cost, static
from secateur.tokens.call import Call, Current
from secateur.tokens.counts import amount_of
from secateur.tokens.decoder import DecoderDriver
from secateur.tokens.input import KINDS, InputDriver, Turn, formed
from secateur.tokens.method import Chosen, Excused, Select, TokenMethod, WorkMethod
from secateur.tokens.modules import Trained
from secateur.tokens.proof import prove
from secateur.tokens.record import Recorder
from secateur.tokens.session import Session
from secateur.tokens.sets import Table
from secateur.tokens.setup import Kept, Setup, make_setup, tower_of
from secateur.tokens.tower import TowerDriver
from secateur.tokens.work import WorkDriver
from secateur.training.skip import SkipMethod
from secateur.utils.screen import fit
from secateur.utils.tested import warn_outside_tested
from secateur.utils.versions import cache_in, cache_of

GUESSING = ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit", "use_mtp")
"""Settings of generate under which another model, or the prompt itself, guesses words that are then checked."""
CACHES = (None, "dynamic", "dynamic_full", "static", "hybrid", "hybrid_chunked", "sliding_window")
"""Kinds of cache that work between layers; the last three are older names of the static one."""
TOGETHER = 32
"""Forwards of a loop whose rows are worked out together, for a session."""
_ATTACHED: weakref.WeakKeyDictionary[nn.Module, Attached] = weakref.WeakKeyDictionary()


class Attached:
    """A model whose visual tokens are dropped. Use it as a context manager, or call `detach`.

    >>> attached.kept["input"][0]  # doctest: +SKIP
    tensor([  3,  17, 101])

    It wraps the model's `forward` and `generate`; the drivers of the three places do the rest, and `Current` is what they share.
    """

    def __init__(self, setup: Setup):
        self.setup = setup
        self.model, self.method = setup.model, setup.method
        self.clock = cost.Clock()
        self.recorder: Recorder | None = None
        self.tower: TowerDriver | None = None
        self.decoder: DecoderDriver | None = None
        self._current = Current(session=Session(setup.memory) if setup.memory is not None else None)
        self._depth = 0
        self._pending: tuple[Call, Turn | None] | None = None
        """What `generate` prepared, for the first forward inside it."""
        self._prompt = 0
        """Columns of the prompt that `generate` was handed."""
        self._mask: Tensor | None = None
        """[B, columns] of the step that `generate` prepared for a static cache, whose masks have four dimensions."""
        self._undo: list[Callable[[], None]] = []
        self._prefill: cost.Prefill | None = None
        try:
            self._install()
        except BaseException:
            self.detach()
            raise

    def __repr__(self) -> str:
        on = "on" if self.attached else "taken off"
        lines = [
            f"Attached: {self.method!r} {on} {type(self.model).__name__}",
            f"  target {self.setup.target}",
        ]
        lines += [
            f"  {stage}: {[len(row) for row in rows]} tokens stay in each row"
            for stage, rows in self.kept.items()
        ]
        return fit([*lines, "  .kept .report .table .columns; .detach()"])

    @property
    def facts(self) -> Facts:
        """Depths and widths of the model."""
        return self.setup.facts

    @property
    def kept(self) -> Kept:
        """`kept[stage][row]`: the numbers of the visual tokens of that row that stayed, ascending."""
        return self._current.kept

    @property
    def columns(self) -> Tensor | None:
        """[B, L'] the column of input_ids of each column the language model saw, -1 padding; None: all of them."""
        return self._current.columns

    @property
    def table(self) -> Table | None:
        """Where each visual token of the last run came from; None before the first."""
        return self._current.table

    @property
    def noted(self) -> Mapping[str, Tensor]:
        """What the method noted in the last run."""
        return self._current.noted

    @property
    def session(self) -> Session | None:
        """What the method remembers of earlier runs; None where it remembers nothing."""
        return self._current.session

    def reset(self, rows: Iterable[int] | None = None) -> None:
        """A new episode begins, in these batch rows or in all: a method that remembers earlier runs forgets them.

        >>> attached.reset(rows=[3])  # doctest: +SKIP

        Raises `SecateurError` for a row that there is not.
        """
        if self.session is not None:
            self.session.reset(rows)

    # -- putting it on --

    def _install(self) -> None:
        model, setup = self.model, self.setup
        if model in _ATTACHED:
            raise SecateurError(
                f"{_ATTACHED[model].method.name} is attached to this model already",
                where="attach",
                fix="detach it first",
            )
        tower, blocks = tower_of(setup)
        layers = [] if setup.plain else decoder_of(model).layers
        _ATTACHED[model] = self
        self._undo.append(lambda: _forget(model))
        if setup.sites:
            self.recorder = Recorder(self._current, setup.sites, blocks, layers)
            self._undo.append(self.recorder.remove)
        if setup.in_tower:
            self.tower = TowerDriver(setup, self._current, self.recorder, tower, blocks)
            self._undo.append(self.tower.remove)
        if setup.in_decoder:
            self.decoder = DecoderDriver(setup, self._current, self.recorder, layers)
            self._undo.append(self.decoder.remove)
            if setup.work is not None and not setup.work.dense:
                self._undo.append(WorkDriver(setup, self.decoder, layers).remove)
        self.input = InputDriver(setup, self._current, self.recorder)
        self._wrap("forward", self._plain_forward if setup.plain else self._forward)
        if not setup.plain:
            self._wrap("generate", self._generate)
            if setup.between_layers:
                self._wrap("prepare_inputs_for_generation", self._inputs)

    def _wrap(self, name: str, around: Callable[..., Any]) -> None:
        model = self.model
        own = model.__dict__.get(name)
        original = getattr(model, name)
        signature = inspect.signature(original)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            if args:
                bound = signature.bind_partial(*args)
                kwargs = {**bound.arguments, **kwargs}
            return around(original, kwargs)

        wrapped.__signature__ = signature  # type: ignore[attr-defined]
        wrapped.__doc__ = original.__doc__
        setattr(model, name, wrapped)

        def restore() -> None:
            if model.__dict__.get(name) is not wrapped:
                return
            if own is None:
                delattr(model, name)
            else:
                setattr(model, name, own)

        self._undo.append(restore)

    def detach(self) -> None:
        """Takes everything off; the model gives what it gave before, bit for bit. Twice is once."""
        while self._undo:
            self._undo.pop()()
        self._current.call = self._pending = None

    @property
    def attached(self) -> bool:
        return bool(self._undo)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.detach()

    @contextmanager
    def _restoring(self) -> Iterator[None]:
        """An error inside leaves the model as it was before `attach`."""
        try:
            yield
        except BaseException:
            self.detach()
            raise

    # -- running --

    def _forward(self, original: Callable[..., Any], kwargs: dict[str, Any]) -> Any:
        """A forward that the caller runs."""
        if self._depth:
            return self._step(original, kwargs)
        self.clock.start(self.model)
        with self._restoring():
            new, call, turn = self._prepare(kwargs, generating=False)
        # between layers it is only known afterwards which labels are left
        labels = new.pop("labels", None) if self.decoder is not None and call is not None else None
        out = self._run_forward(original, new, call, turn)
        if self.session is not None:
            self.session.close(least=TOGETHER)
        self.clock.mark(self.model)
        if labels is not None:
            assert self.decoder is not None
            labels = self.decoder.shorten(labels, -100)
            vocabulary = self.model.config.get_text_config().vocab_size
            out["loss"] = self.model.loss_function(logits=out.logits, labels=labels, vocab_size=vocabulary)
        return out

    def _prepare(
        self, kwargs: dict[str, Any], generating: bool
    ) -> tuple[dict[str, Any], Call | None, Turn | None]:
        if any(kwargs.get(name) is not None for name in KINDS.values()) or kwargs.get("mm_encoder_outputs"):
            self._current.clear()
        if self.decoder is not None:
            # what runs before the model itself passes its hooks by
            self.decoder.run = self.decoder.step = None
        if not self.setup.family.proven:
            self.input.counts = prove(self.setup, kwargs).counts
        new, call, turn = self.input.prepare(dict(kwargs), generating)
        self._current.noted = {} if call is None else call.noted
        if call is not None:
            self._current.table = call.table
            self._prefill = cost.Prefill(call, new)
        return new, call, turn

    def _step(self, original: Callable[..., Any], kwargs: dict[str, Any]) -> Any:
        """A forward inside generate."""
        pending, self._pending = self._pending, None
        if pending is None:
            kwargs = self.input.step(kwargs)
            out = self._run_forward(original, kwargs, None, None)
        else:
            call, turn = pending
            self._refuse_guesses(kwargs, call)
            rows = kwargs["input_ids"].shape[0] if kwargs.get("input_ids") is not None else call.table.rows
            call.expand = rows // call.table.rows
            if call.expand > 1 and self.session is not None:
                raise SecateurError(
                    "of several answers to one prompt none is what was done",
                    where="session",
                    fix="generate with num_beams=1 and num_return_sequences=1",
                )
            if turn is not None and kwargs.get("position_ids") is None:
                kwargs = {**kwargs, "position_ids": turn.rows(rows).positions}
            if call.mask is not None and self.decoder is not None and kwargs.get("use_cache") is False:
                raise _no_cache()
            out = self._run_forward(original, kwargs, call, turn)
        self.clock.mark(self.model)
        return out

    def _run_forward(
        self, original: Callable[..., Any], kwargs: dict[str, Any], call: Call | None, turn: Turn | None
    ) -> Any:
        cache = cache_in(kwargs)
        if kwargs.get("mm_encoder_outputs"):
            encoded = formed(kwargs["mm_encoder_outputs"], self.input.forms)
            kwargs = {**kwargs, "mm_encoder_outputs": encoded}
        if self.decoder is not None:
            mask = kwargs.get("attention_mask")
            if mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 2):
                if not self._depth and self.setup.between_layers and hasattr(cache, "_secateur_layers"):
                    raise SecateurError(
                        "a mask of four dimensions says nothing of layers that hold fewer tokens",
                        where="attach",
                        fix="give [rows, tokens]",
                    )
                mask = self._mask
            self.decoder.begin(kwargs, call, mask)
        # later steps choose nothing, so an error of theirs is the caller's and leaves the method on
        with self._current.running(call), self._restoring() if call is not None else nullcontext():
            out = original(**kwargs)
        cache = cache if cache is not None else cache_of(out)
        if turn is not None and cache is not None:
            cache._secateur_turn = turn
        if call is not None and self._prefill is not None:
            self._prefill.finish(cache)
        return out

    def _inputs(self, original: Callable[..., Any], kwargs: dict[str, Any]) -> Any:
        """Before `generate` makes the inputs of a step."""
        cache, mask = cache_in(kwargs), kwargs.get("attention_mask")
        self._mask = None
        if static.is_static(cache):
            # its masks are sized by the cache, so one that was reset must have its sizes back
            static.buffers_of(cache)
            if isinstance(mask, Tensor) and mask.dim() == 2:
                self._mask = mask if self._pending is not None else static.padded(mask, cache)
        return original(**kwargs)

    def _generate(self, original: Callable[..., Any], kwargs: dict[str, Any]) -> Any:
        if "inputs" in kwargs:
            kwargs = {**kwargs, "input_ids": kwargs["inputs"]}
            del kwargs["inputs"]
        self._refuse(kwargs)
        self.clock.start(self.model)
        with self._restoring(), torch.no_grad():
            new, call, turn = self._prepare(kwargs, generating=True)
        ids, short = kwargs.get("input_ids"), new.get("input_ids")
        removed = 0 if ids is None or short is None else ids.shape[1] - short.shape[1]
        if removed:
            new = self._shift(new, removed)
        self._pending = None if call is None else (call, turn)
        self._prompt = 0 if short is None else short.shape[1]
        self._depth += 1
        try:
            out = original(**new)
        finally:
            self._depth -= 1
            self._pending = self._mask = None
        sequences, cache = out if isinstance(out, Tensor) else out.sequences, cache_of(out)
        if self.session is not None:
            self.session.close(sequences[:, self._prompt :], self._ends(kwargs))
        self.clock.rest(self.model, sequences.shape[1] - self._prompt - 1)
        if call is not None and turn is not None and cache is not None:
            cache._secateur_turn = turn
        if removed and ids is not None and short is not None:
            return _with_prompt(out, ids, short)
        return out

    def _ends(self, kwargs: Mapping[str, Any]) -> list[int]:
        """The words that end an answer."""
        ends = kwargs.get("eos_token_id")
        for config in (kwargs.get("generation_config"), self.model.generation_config):
            ends = getattr(config, "eos_token_id", None) if ends is None else ends
        return [] if ends is None else torch.as_tensor(ends).flatten().tolist()

    def _shift(self, kwargs: dict[str, Any], removed: int) -> dict[str, Any]:
        """Lengths that count the prompt, for the shorter one."""
        new = dict(kwargs)
        for name in ("max_length", "min_length"):
            value = kwargs.get(name)
            for config in (kwargs.get("generation_config"), self.model.generation_config):
                value = getattr(config, name, None) if value is None else value
            if value and not (name == "max_length" and kwargs.get("max_new_tokens") is not None):
                new[name] = max(0, value - removed)
        return new

    def _refuse(self, kwargs: dict[str, Any]) -> None:
        """Refuses what would be silently wrong."""
        if any(placed.weighs for placed in self.setup.stages):
            raise SecateurError(
                "tokens that are weighed as keys don't leave, and their weights aren't kept for later steps",
                where="generate",
                fix="call the model itself, with use_cache=False",
            )
        if not self.setup.exact and self.session is None:
            return
        configs = (kwargs.get("generation_config"), self.model.generation_config)

        def setting(name: str) -> Any:
            value = kwargs.get(name)
            for config in configs:
                value = getattr(config, name, None) if value is None else value
            return value

        for name in GUESSING:
            if setting(name):
                raise _guesses(name)
        kind = setting("cache_implementation")
        if kind not in CACHES:
            raise SecateurError(
                f"a cache that is {kind} wasn't tried with layers that hold different tokens",
                where="generate",
                fix="use a dynamic or static one, or a method that drops at the input",
            )
        if setting("prefill_chunk_size"):
            raise SecateurError(
                "a prompt read in chunks shows no layer all of its tokens",
                where="generate",
                fix="leave prefill_chunk_size out, or use a method that drops at the input",
            )
        if setting("use_cache") is False:
            raise _no_cache()

    def _refuse_guesses(self, kwargs: Mapping[str, Any], call: Call) -> None:
        """Refuses a first forward that is longer than its prompt, whatever way of generating it comes from."""
        ids = kwargs.get("input_ids")
        exact = self.setup.exact or self.session is not None
        if exact and ids is not None and ids.shape[1] > self._prompt:
            raise _guesses("guessing")

    def _plain_forward(self, original: Callable[..., Any], kwargs: dict[str, Any]) -> Any:
        """A forward of a vision transformer on its own."""
        if self.tower is None:
            return original(**kwargs)
        self._current.kept = Kept()
        self.clock.start(self.model)
        with self._restoring(), self.tower.alone(kwargs):
            out = original(**kwargs)
        self.clock.mark(self.model)
        return out

    # -- what it tells --

    def coordinates(self, stage: str | int = -1) -> list[dict[str, Tensor]]:
        """Where the kept tokens lie, for each row: image, crop, frame, row, column, each [k].

        >>> attached.coordinates("input")[0]["row"]  # doctest: +SKIP

        Args:
            stage: a key of `kept`, or its number.

        Raises:
            SecateurError: no picture has run yet.
        """
        table = self.table
        if table is None:
            raise SecateurError("no picture has run yet", where="attach")
        names = {"image": table.image, "crop": table.crop, "frame": table.frame}
        names |= {"row": table.grid_row, "column": table.grid_col}
        coordinates = []
        for row, numbers in enumerate(self.kept[stage]):  # type: ignore[index]
            mine = (table.row[: table.visual] == row).nonzero()[:, 0].cpu()[numbers]
            coordinates.append({name: values.cpu()[mine] for name, values in names.items()})
        return coordinates

    def counts(self, stage: str | int = -1) -> list[list[dict[str, int]]]:
        """How many tokens each frame of each image kept, for each row: image, frame, kept, total.

        >>> attached.counts()[0]                                # doctest: +SKIP
        [{'image': 0, 'frame': 0, 'kept': 16, 'total': 64}, {'image': 1, 'frame': 0, 'kept': 16, 'total': 64}]

        Separators of grid rows don't count. A still is one frame; on Qwen-VL one of a video's is what the tower makes of
        `temporal_patch_size` pictures; -1: which frame a token comes from isn't known.

        Args:
            stage: a key of `kept`, or its number.

        Raises:
            SecateurError: no picture has run yet.
        """
        if self.table is None:
            raise SecateurError("no picture has run yet", where="attach")
        return self.table.counts(self._alive(stage))

    def _alive(self, stage: str | int) -> Tensor:
        """Rows of the table of the tokens that were left after a stage."""
        assert self.table is not None
        row = self.table.row[: self.table.visual].cpu()
        kept = enumerate(self.kept[stage])  # type: ignore[index]
        return torch.cat([(row == number).nonzero()[:, 0][mine] for number, mine in kept])

    @property
    def report(self) -> dict[str, Any]:
        """Tokens x layers, FLOPs, cache bytes, before and after; seconds of the last run."""
        return cost.report(self.setup, self.clock, self._prefill, self.table)


def _with_prompt(out: Any, ids: Tensor, short: Tensor) -> Any:
    """What generate gave for the `short` prompt, with sequences that begin with the prompt as it was given."""

    def whole(sequences: Tensor) -> Tensor:
        times = sequences.shape[0] // ids.shape[0]
        return torch.cat([ids.repeat_interleave(times, 0), sequences[:, short.shape[1] :]], 1)

    if isinstance(out, Tensor):
        return whole(out)
    out.sequences = whole(out.sequences)
    return out


def _no_cache() -> SecateurError:
    return SecateurError(
        "without a cache every step would choose again", where="generate", fix="leave use_cache on"
    )


def _guesses(name: str) -> SecateurError:
    return SecateurError(
        f"{name} reads the prompt with guessed words behind it, which methods between layers would take for the question",
        where="generate",
        fix=f"leave {name} out, or use a method that drops at the input",
    )


def _forget(model: nn.Module) -> None:
    _ATTACHED.pop(model, None)


def _method(
    method: Any, at: str, records: tuple[str, ...], scope: str, hyperparameters: dict[str, Any]
) -> TokenMethod:
    """A token method from a name, a method or a function."""
    if callable(method) and not isinstance(method, type | Method):
        return Chosen(function=method, at=at, needs_records=tuple(records), competes=scope, **hyperparameters)
    chosen = make_method(method, **hyperparameters)
    if not isinstance(chosen, TokenMethod):
        raise SecateurError(
            f"{chosen.name} removes no visual tokens",
            where="attach",
            fix="use secateur.prune, or a token method",
        )
    return chosen


def is_kind(method: Any, kind: type[Method]) -> bool:
    """Whether it is a method of a kind, or the name or class of one."""
    if isinstance(method, str):
        method = method_class(method)
    return isinstance(method, kind) or (isinstance(method, type) and issubclass(method, kind))


@overload
def attach(model: nn.Module, method: SkipMethod | type[SkipMethod], **settings: Any) -> Skipping: ...
@overload
def attach(
    model: nn.Module, method: TokenMethod | type[TokenMethod] | Select, **settings: Any
) -> Attached: ...
@overload
def attach(
    model: nn.Module, method: AttentionMethod | type[AttentionMethod], **settings: Any
) -> Attending: ...
@overload
def attach(model: nn.Module, method: WorkMethod | type[WorkMethod], **settings: Any) -> Attached: ...
@overload
def attach(model: nn.Module, method: str | Method | type[Method], **settings: Any) -> Any: ...


def attach(
    model: nn.Module,
    method: str | Method | type[Method] | Select,
    *,
    target: Any = None,
    at: str = "input",
    records: tuple[str, ...] = (),
    scope: str = "image",
    seed: int = 0,
    positions: str | None = None,
    budget: str | None = None,
    given: dict[str, Any] | None = None,
    question: str | None = None,
    text_encoder: Any = None,
    tokenizer: Any = None,
    weights: str | Path | Trained | None = None,
    work: str | Path | Mapping[str, Any] | VisualWork | None = None,
    part: str = "",
    **hyperparameters: Any,
) -> Attached | Attending | Skipping:
    """Lets visual tokens leave a model while it runs, or its attention read less, until `detach` or the end of the `with` block.

    >>> with secateur.attach(model, "random-tokens", target="50%", seed=0) as attached:  # doctest: +SKIP
    ...     written = model.generate(**inputs, max_new_tokens=8)
    >>> attached.kept["input"][0]                                # doctest: +SKIP

    What generate returns begins with the prompt as it was given.

    Args:
        model: a vision-language model or vision transformer, as it comes from its library.
        method: a name, a `TokenMethod`, or any function of `TokenSets` that gives a bool mask or a `Reduction`.
        target: the share of the visual tokens that stays ("25%"), or their number per image ("tokens=64"); methods that
            find it themselves need none.
        at: where a function stands: "input", "layer:K" or "encoder:K".
        records: what a function reads, such as "encoder:-2".
        scope: which tokens compete for a function: those of a "crop", a "frame", an "image" or a "row".
        seed: of everything that is drawn. Refused, but for 0, where a network skips while it works: there nothing is drawn by it.
        positions: "original" or "compact" in place of the method's.
        budget: what the target is the budget of, and what competes for it: each "frame" of a video, each "image" (a video is
            one), or "all" pictures of a row together. None: as the method has it, a share of every crop, image or row, a
            number per image.
        given: handed to the method as `sets.given`, with `question`, `text_encoder` and `tokenizer`.
        question: one, or a list by batch row.
        text_encoder: for methods that compare pictures with text.
        tokenizer: of the model.
        work: what visual tokens take part in, beside a token method, or for yopo in place of its own plan: a `VisualWork` or its file.
        part: of an attention method (such as psa): the module whose attention reads less, by name; the whole model where it is
            left out. Such methods take seed and hyperparameters beside it, and nothing else of the above.
        weights: of a method with modules: the folder that `train_tokens` was saved in, or what it gave. Hyperparameters are
            then those of the training, where they aren't given.
        **hyperparameters: fields of the method.

    Returns:
        `Attached`: what stayed, where it lies, what it cost, and `detach`; `Attending` for an attention method; `Skipping` for one
        that trains networks to skip (such as dtop), which takes its hyperparameters and `masked`, and nothing else of the above.

    Raises:
        SecateurError: a model or a combination that can't work, with the reason; the model is then untouched.
    """
    if not isinstance(model, nn.Module):
        raise SecateurError(f"{type(model).__name__} isn't a model", where="attach")
    warn_outside_tested("timm" if type(model).__module__.startswith("timm.") else "transformers")
    if is_kind(method, AttentionMethod):
        taken = {
            "target": target,
            "positions": positions,
            "budget": budget,
            "given": given,
            "question": question,
        }
        taken |= {"text_encoder": text_encoder, "tokenizer": tokenizer, "weights": weights}
        taken |= {"work": work}
        for name in (name for name, value in taken.items() if value is not None):
            raise SecateurError(
                "an attention method has no use for it",
                where=name,
                fix="leave it out; density= says how much is read",
            )
        return Attending(model, make_method(method, **hyperparameters), part, seed)  # type: ignore[arg-type]
    if is_kind(method, SkipMethod):
        taken = {"target": target, "positions": positions, "budget": budget, "question": question}
        taken |= {"given": given, "text_encoder": text_encoder, "tokenizer": tokenizer, "weights": weights}
        taken |= {"work": work, "part": part or None, "seed": seed or None}
        for name in (name for name, value in taken.items() if value is not None):
            raise SecateurError(
                "a network that skips while it works has no use for it",
                where=name,
                fix="leave it out; the method's own settings say how much is skipped, and what a control draws",
            )
        masked = bool(hyperparameters.pop("masked", False))
        return make_method(method, **hyperparameters).attach(model, masked)  # type: ignore[arg-type, attr-defined]
    if part:
        raise SecateurError("a token method has places of its own", where="part", fix="leave it out")
    plan = None if work is None else VisualWork.load(work)
    named = {"question": question, "text_encoder": text_encoder, "tokenizer": tokenizer}
    extra = dict(given or {}) | {name: value for name, value in named.items() if value is not None}
    if is_kind(method, WorkMethod):
        for name, value in {"positions": positions, "budget": budget, "weights": weights}.items():
            if value is not None:
                raise SecateurError(
                    "no visual token leaves by choice, so there is no use for it",
                    where=name,
                    fix="leave it out",
                )
        return _working(model, method, plan, target, seed, extra, hyperparameters)
    trained = Trained.load(weights) if isinstance(weights, str | Path) else weights
    if trained is not None and not isinstance(method, Method):
        hyperparameters = {**trained.hyperparameters(method), **hyperparameters}
    chosen = _method(method, at, records, scope, hyperparameters)
    if target is None and not chosen.adaptive:
        raise SecateurError(
            f"{chosen.name} must be told how many tokens stay",
            where="target",
            fix="a share such as 25%, or tokens=64",
        )
    amount = None if target is None else amount_of(target)
    setup = make_setup(
        model,
        chosen,
        target=amount,
        seed=seed,
        positions=positions,
        given=extra,
        budget=budget,
        weights=trained,
        work=plan,
    )
    return Attached(setup)


def _working(
    model: nn.Module,
    method: Any,
    plan: VisualWork | None,
    target: Any,
    seed: int,
    given: dict[str, Any],
    hyperparameters: dict[str, Any],
) -> Attached:
    """A model on which a method, or the plan in its place, says what visual tokens take part in."""
    chosen = make_method(method, **hyperparameters)
    assert isinstance(chosen, WorkMethod)
    if plan is not None and (target is not None or hyperparameters):
        said = next(iter(hyperparameters), "target")
        raise SecateurError(
            "the plan says what is done",
            where=said,
            fix="leave it out, or leave work out and let the method plan",
        )
    if plan is None:
        facts, amount = facts_of(model, family_of(model)), 1.0 if target is None else amount_of(target)
        if not isinstance(amount, float):
            raise SecateurError(
                f"{chosen.name} keeps all tokens and spares them work",
                where="target",
                fix="a share such as 25%",
            )
        if not facts.layers:
            raise SecateurError(
                "a vision transformer on its own has no words that visual tokens stand beside",
                where="attach",
                fix="a vision-language model",
            )
        plan = chosen.work(facts, None if target is None else amount, given, seed)
    stays = Excused()
    stays.name = chosen.name  # type: ignore[misc]
    return Attached(make_setup(model, stays, target=None, seed=seed, given=given, work=plan))
