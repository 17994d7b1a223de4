"""`attach`: visual tokens leave an unmodified model while it runs; `detach`: the model is as it was.

What is put on the model lies on the instance (two wrapped methods, hooks, the config of a recorded layer), never on a class.
"""

from __future__ import annotations

import copy
import inspect
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Self

import torch
from torch import Tensor, nn

from secateur.errors import SecateurError
from secateur.families.vlm import facts_of, family_of
from secateur.method import Method, make_method
from secateur.pruning.target import parse_target
from secateur.tokens import cost as account
from secateur.tokens.call import Call
from secateur.tokens.decoder import LayerDriver
from secateur.tokens.input import KINDS, Turn, prepare, stacked
from secateur.tokens.method import Chosen, Select, Stage, TokenMethod
from secateur.tokens.record import Recorder
from secateur.tokens.sets import SCOPES, Table
from secateur.tokens.setup import Kept, Placed
from secateur.tokens.site import Site
from secateur.tokens.tower import EncoderDriver
from secateur.utils.tested import warn_outside_tested
from secateur.utils.versions import cache_in, cache_of

FLOOR = (5, 18)
_ATTACHED: weakref.WeakKeyDictionary[nn.Module, Attached] = weakref.WeakKeyDictionary()


class Attached:
    """A model whose visual tokens are dropped. Use it as a context manager, or call `detach`.

    `kept[stage][row]`: the numbers of the visual tokens of that row that stayed, ascending. `coordinates(stage)[row]`:
    where they lie. `columns` [B, L']: the column of input_ids behind each column the language model saw, -1 padding.
    `report`: tokens x layers, FLOPs and cache bytes before and after, and times.
    """

    def __init__(
        self,
        model: nn.Module,
        method: TokenMethod,
        *,
        amount: float | None,
        seed: int,
        positions: str | None,
        given: dict[str, Any],
    ):
        self.model: Any = model
        self.method = method
        self.family = family_of(model)
        self.plain = self.family.layout is None
        _check_transformers(self.plain)
        self.facts = facts_of(model, self.family)
        self.amount: float = 1.0 if amount is None else amount
        self.seed, self.given = seed, given
        self.free = amount is None
        self.whole = isinstance(amount, float) and amount == 1
        setattr(method, "share", amount if isinstance(amount, float) else None)  # noqa: B010
        setattr(method, "tokens", amount if isinstance(amount, int) else None)  # noqa: B010
        wanted = positions or method.positions
        if wanted not in ("original", "compact"):
            raise SecateurError(
                f"there are no positions {wanted!r}", where="attach", fix="original or compact"
            )
        self.compact = wanted == "compact" and not self.family.mrope
        self.kept: Kept = Kept()
        self.columns: Tensor | None = None
        self.call: Call | None = None
        self.table: Table | None = None
        self.recorder: Recorder | None = None
        self.encoder: EncoderDriver | None = None
        self.layers: LayerDriver | None = None
        self.recorder_sites_tower = False
        self.clock = account.Clock()
        self._depth = 0
        self._pending: tuple[Call, Turn | None] | None = None
        self._turn: Turn | None = None
        self._undo: list[Callable[[], None]] = []
        self._run: account.Run | None = None
        config = getattr(model, "config", None)
        text = getattr(config, "get_text_config", lambda: None)() or config
        pad = getattr(text, "pad_token_id", None)
        self.pad = int(pad) if pad is not None else 0
        self.placed = [self._place(stage) for stage in method.stages(self.facts)]
        labels: dict[str, int] = {}
        for i, placed in enumerate(self.placed):
            again = labels[placed.label] = labels.get(placed.label, 0) + 1
            if again > 1:
                self.placed[i] = Placed(placed.stage, placed.kind, placed.number, f"{placed.label}#{again}")
        try:
            self._install()
        except BaseException:
            self.detach()
            raise

    # -- putting it on --

    def _place(self, stage: Stage) -> Placed:
        facts, where = self.facts, f"{self.method.name}, stage {stage.at}"
        if (stage.scope or self.method.scope) not in SCOPES:
            raise SecateurError(f"there is no scope {stage.scope!r}", where=where, fix=", ".join(SCOPES))
        if stage.bias is not None and not stage.at.startswith("encoder"):
            raise SecateurError(
                "a bias of the attention is for the vision tower", where=where, fix="stages at encoder:K"
            )
        if stage.at == "input":
            if self.plain:
                raise SecateurError(
                    "a vision transformer on its own has no language model to shorten the input of",
                    where=where,
                    fix="use a stage at encoder:K",
                )
            return Placed(stage, "input", 0, "input")
        site = Site.parse(stage.at, facts.layers, facts.blocks)
        if site.form == "mlp" and site.tower:
            return Placed(stage, "inside", site.number, f"encoder:{site.number}:mlp")
        if site.form:
            raise SecateurError(
                f"{stage.at!r} isn't a place for a stage", where=where, fix="input, layer:K or encoder:K"
            )
        kind = "encoder" if site.tower else "layer"
        if kind == "layer" and site.number < facts.first_layer:
            reason = (
                f"this model adds visual features to its first {facts.first_layer} layers"
                if facts.first_layer > 1
                else "before layer 0 stands the input itself"
            )
            raise SecateurError(
                f"tokens cannot leave before layer {site.number}: {reason}",
                where=where,
                fix=f"use layer:{facts.first_layer} or later, or input",
            )
        return Placed(stage, kind, site.number, f"{kind}:{site.number}")

    def stages_at(self, kind: str, number: int = 0) -> list[Placed]:
        return [p for p in self.placed if p.kind == kind and p.number == number]

    def _install(self) -> None:
        model = self.model
        if model in _ATTACHED:
            raise SecateurError(
                f"{_ATTACHED[model].method.name} is attached to this model already",
                where="attach",
                fix="detach it first",
            )
        tower = model if self.plain else model.get_encoder("image")
        blocks: Any = self.family.blocks(tower) if self.facts.blocks else []
        layers = [] if self.plain else model.get_decoder().layers
        records = [text for p in self.placed for text in p.stage.records]
        for text in records:
            if text.endswith(":mlp"):
                raise SecateurError(f"{text!r} isn't a record", where="tokens", fix="record the block")
        sites = {text: Site.parse(text, self.facts.layers, self.facts.blocks) for text in records}
        self.recorder_sites_tower = any(site.tower for site in sites.values())
        _ATTACHED[model] = self
        self._undo.append(lambda: _forget(model))
        if sites:
            self.recorder = Recorder(self, sites, blocks, layers)
            self._undo.append(self.recorder.remove)
        if self.recorder_sites_tower or any(p.kind in ("encoder", "inside") for p in self.placed):
            self.encoder = EncoderDriver(self, tower, blocks)
            self._undo.append(self.encoder.remove)
        if any(p.kind == "layer" for p in self.placed) or any(not s.tower for s in sites.values()):
            self.layers = LayerDriver(self, layers)
            self._undo.append(self.layers.remove)
        self._wrap("forward", self._plain_forward if self.plain else self._forward)
        if not self.plain:
            self._wrap("generate", self._generate)

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
        self.call = self._pending = None

    @property
    def attached(self) -> bool:
        return bool(self._undo)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.detach()

    @contextmanager
    def running(self, call: Call | None) -> Iterator[None]:
        before, self.call = self.call, call
        try:
            yield
        finally:
            self.call = before

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
        if self._depth:
            return self._step(original, kwargs)
        self.clock.start(self.model)
        with self._restoring():
            new, call, turn = self._prepare(kwargs, generating=False)
        labels = new.pop("labels", None) if self.layers is not None and call is not None else None
        out = self._run_forward(original, new, call, turn)
        self.clock.mark(self.model)
        if labels is not None:
            assert self.layers is not None
            labels = self.layers.shorten(labels, -100)
            vocabulary = self.model.config.get_text_config().vocab_size
            out["loss"] = self.model.loss_function(logits=out.logits, labels=labels, vocab_size=vocabulary)
        return out

    def _prepare(
        self, kwargs: dict[str, Any], generating: bool
    ) -> tuple[dict[str, Any], Call | None, Turn | None]:
        pictures = any(kwargs.get(name) is not None for name in KINDS.values()) or kwargs.get(
            "mm_encoder_outputs"
        )
        if pictures:
            self.kept = Kept()
            self.columns = None
        new, call, turn = prepare(self, dict(kwargs), generating)
        if call is not None:
            self.table = call.table
            self._run = account.Run(self, call, new)
        return new, call, turn

    def _step(self, original: Callable[..., Any], kwargs: dict[str, Any]) -> Any:
        """A forward inside generate."""
        pending, self._pending = self._pending, None
        if pending is None:
            out = self._run_forward(original, kwargs, None, None)
        else:
            call, turn = pending
            rows = kwargs["input_ids"].shape[0] if kwargs.get("input_ids") is not None else call.table.rows
            call.expand = rows // call.table.rows
            if call.mask is not None and self.layers is not None and kwargs.get("use_cache") is False:
                raise SecateurError(
                    "without a cache every step would choose anew", where="generate", fix="leave use_cache on"
                )
            out = self._run_forward(original, kwargs, call, turn)
        self.clock.mark(self.model)
        return out

    def _run_forward(
        self, original: Callable[..., Any], kwargs: dict[str, Any], call: Call | None, turn: Turn | None
    ) -> Any:
        cache = cache_in(kwargs)
        if self.family.stacked and kwargs.get("mm_encoder_outputs"):
            kwargs = {**kwargs, "mm_encoder_outputs": stacked(kwargs["mm_encoder_outputs"])}
        if self.layers is not None:
            self.layers.begin(kwargs, call)
        with self.running(call), self._restoring() if call is not None else _nothing():
            out = original(**kwargs)
        cache = cache if cache is not None else cache_of(out)
        if turn is not None and cache is not None:
            cache._secateur_turn = turn
        if call is not None and self._run is not None:
            self._run.finish(cache)
        return out

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
        self._depth += 1
        try:
            out = original(**new)
        finally:
            self._depth -= 1
            self._pending = None
        cache = cache_of(out)
        if call is not None and turn is not None and cache is not None:
            cache._secateur_turn = turn
        return (
            self._with_prompt(out, ids, short) if removed and ids is not None and short is not None else out
        )

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

    @staticmethod
    def _with_prompt(out: Any, ids: Tensor, short: Tensor) -> Any:
        """Sequences that begin with the prompt as it was given."""

        def whole(sequences: Tensor) -> Tensor:
            times = sequences.shape[0] // ids.shape[0]
            return torch.cat([ids.repeat_interleave(times, 0), sequences[:, short.shape[1] :]], 1)

        if isinstance(out, Tensor):
            return whole(out)
        out.sequences = whole(out.sequences)
        return out

    def _refuse(self, kwargs: dict[str, Any]) -> None:
        """What would be silently wrong."""
        if self.layers is None or not any(p.kind == "layer" for p in self.placed):
            return
        configs = (kwargs.get("generation_config"), self.model.generation_config)

        def setting(name: str) -> Any:
            found = kwargs.get(name)
            for config in configs:
                found = getattr(config, name, None) if found is None else found
            return found

        kind = setting("cache_implementation")
        if kind not in (None, "dynamic", "dynamic_full"):
            raise SecateurError(
                f"a {kind} cache has one length for all layers, and tokens leave between them",
                where="generate",
                fix="leave cache_implementation out, or use a method that drops at the input",
            )
        if setting("prefill_chunk_size"):
            raise SecateurError(
                "a prompt read in chunks shows no layer all of its tokens",
                where="generate",
                fix="leave prefill_chunk_size out, or use a method that drops at the input",
            )
        if setting("use_cache") is False:
            raise SecateurError(
                "without a cache every step would choose anew", where="generate", fix="leave use_cache on"
            )

    def _plain_forward(self, original: Callable[..., Any], kwargs: dict[str, Any]) -> Any:
        assert self.encoder is not None or not self.placed
        if self.encoder is None:
            return original(**kwargs)
        self.kept = Kept()
        self.clock.start(self.model)
        with self._restoring(), self.encoder.alone(kwargs):
            out = original(**kwargs)
        self.clock.mark(self.model)
        return out

    # -- what it tells --

    def note_kept(self, label: str, table: Table) -> None:
        self.table = table
        self.kept[label] = table.numbers()

    def coordinates(self, stage: str | int = -1) -> list[dict[str, Tensor]]:
        """For each row where the kept tokens lie: image, crop, frame, row, column, each [k].

        >>> attached.coordinates("input")[0]["row"]  # doctest: +SKIP
        """
        if self.table is None:
            raise SecateurError("no picture has run yet", where="attach")
        kept, table = self.kept[stage], self.table  # type: ignore[index]
        found = []
        for row, numbers in enumerate(kept):
            mine = (table.row[: table.visual] == row).nonzero()[:, 0].cpu()[numbers]
            names = {"image": table.image, "crop": table.crop, "frame": table.frame}
            names |= {"row": table.grid_row, "column": table.grid_col}
            found.append({name: values.cpu()[mine] for name, values in names.items()})
        return found

    @property
    def report(self) -> dict[str, Any]:
        """Tokens x layers, FLOPs, cache bytes, before and after; seconds of the last run."""
        return account.report(self, self._run)


def _forget(model: nn.Module) -> None:
    _ATTACHED.pop(model, None)


@contextmanager
def _nothing() -> Iterator[None]:
    yield


def _check_transformers(plain: bool) -> None:
    import transformers

    version = tuple(int(p) for p in transformers.__version__.split(".")[:2] if p.isdigit())
    if not plain and version < FLOOR:
        raise SecateurError(
            f"transformers {transformers.__version__} is too old: its models don't take mm_encoder_outputs",
            where="attach",
            fix=f"install transformers {FLOOR[0]}.{FLOOR[1]} or later",
        )


def _amount(target: Any) -> float | int:
    parsed = parse_target(target)
    if parsed.kind == "share":
        return float(parsed.value)
    if parsed.kind == "tokens":
        if parsed.value < 1:
            raise SecateurError(
                "0 tokens would stay", where="target", fix="keep at least one, such as tokens=64"
            )
        return int(parsed.value)
    raise SecateurError(
        f"{parsed} doesn't say how many tokens stay", where="target", fix="a share such as 25%, or tokens=64"
    )


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
    given: dict[str, Any] | None = None,
    question: str | None = None,
    text_encoder: Any = None,
    tokenizer: Any = None,
    **hyperparameters: Any,
) -> Attached:
    """Lets visual tokens leave a model while it runs, until `detach` or the end of the `with` block.

    >>> with secateur.attach(model, "random-tokens", target="50%", seed=0) as attached:  # doctest: +SKIP
    ...     written = model.generate(**inputs, max_new_tokens=8)
    >>> attached.kept["input"][0]                                # doctest: +SKIP

    `method`: a name, or any function of `TokenSets` that gives a bool mask or a `Reduction`; it then stands `at` "input",
    "layer:K" or "encoder:K", may read `records`, and its tokens compete within `scope` (crop, image, row). `target`:
    the share of the visual tokens that stays (`25%`), or their number per image (`tokens=64`); methods that find it themselves
    need none. `positions`: "original"
    or "compact" in place of the method's. `question`, `text_encoder`, `tokenizer` and the entries of `given` are handed
    to the method. What generate returns begins with the prompt as it was given.
    Raises `SecateurError` for a model or a combination that can't work, with the reason; the model is then untouched.
    """
    if not isinstance(model, nn.Module):
        raise SecateurError(f"{type(model).__name__} isn't a model", where="attach")
    warn_outside_tested("timm" if type(model).__module__.startswith("timm.") else "transformers")
    if callable(method) and not isinstance(method, type | Method):
        chosen: Any = Chosen(
            function=method, at=at, needs_records=tuple(records), competes=scope, **hyperparameters
        )
    else:
        named: Any = method
        chosen = copy.copy(make_method(named, **hyperparameters))
    if not isinstance(chosen, TokenMethod):
        raise SecateurError(
            f"{chosen.name} removes weights, not tokens",
            where="attach",
            fix="use secateur.prune, or a token method",
        )
    extra = dict(given or {})
    for name, value in (("question", question), ("text_encoder", text_encoder), ("tokenizer", tokenizer)):
        if value is not None:
            extra[name] = value
    if target is None and not chosen.adaptive:
        raise SecateurError(
            f"{chosen.name} must be told how many tokens stay",
            where="target",
            fix="a share such as 25%, or tokens=64",
        )
    amount = None if target is None else _amount(target)
    return Attached(model, chosen, amount=amount, seed=seed, positions=positions, given=extra)
