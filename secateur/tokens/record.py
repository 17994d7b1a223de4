"""Notes taken beside a running model: queries, keys, values, hidden states and module inputs of chosen layers.

Nothing is computed while the model runs; a `Live` source computes the rows that a method asks for afterwards, from q and k, in
chunks, without the L x L matrix. The model's own attention function runs as before.
"""

from __future__ import annotations

import copy
import sys
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from secateur.errors import SecateurError
from secateur.tokens.call import Current
from secateur.tokens.site import Site
from secateur.utils.versions import without_cache

Key = tuple[str, int]
"""A block: ("encoder" or "layer", number)."""
_TAPS: weakref.WeakKeyDictionary[nn.Module, Tap] = weakref.WeakKeyDictionary()


class Stopped(Exception):
    """Raised at the attention function when only the queries and keys are asked for."""


@dataclass(eq=False)
class Note:
    """What one attention module saw in one run; packed towers call it once a segment.

    q [B, H, L, d], k and v [B, H_kv, L, d].
    """

    q: list[Tensor] = field(default_factory=list)
    k: list[Tensor] = field(default_factory=list)
    v: list[Tensor] = field(default_factory=list)
    mask: list[Tensor | None] = field(default_factory=list)
    scale: float | None = None
    causal: bool = False
    columns: Tensor | None = None
    """[B, n] the column of each query slot (decoder layers)."""
    column_at: Tensor | None = None
    """[T] the column of each token of the table at that time; -1 where it had left (decoder layers)."""
    valid: Tensor | None = None
    """[B, n] which slots aren't padding (decoder layers)."""
    where: Tensor | None = None
    """[patches] flat slot of each patch; -1 where it has left (towers)."""
    states: Tensor | None = None
    """The block's output."""
    after: Tensor | None = None
    """`where` for the output, when tokens left inside the block (towers)."""
    modules: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """"attention" and "mlp": input after the norm, output before the residual."""

    def add(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: Any, causal: bool) -> None:
        self.q.append(q)
        self.k.append(k)
        self.v.append(v)
        self.mask.append(mask)
        self.scale, self.causal = scale, causal


@dataclass(eq=False)
class Tap:
    """On one attention module. `note` is None while nothing is to be recorded."""

    note: Note | None = None
    stop: bool = False
    rows: Callable[[Tensor, Tensor, Any], None] | None = None
    """Told once of q, k and the scale of the next run that isn't stopped."""

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: Any, causal: bool
    ) -> None:
        if self.rows is not None and not self.stop:
            told, self.rows = self.rows, None
            told(q, k, scale)
        if self.note is not None:
            # a static cache gives its whole buffer, and a mask as wide: the tokens of a prompt come first in it
            seen = q.shape[2]
            k, v = k[:, :, :seen], v[:, :, :seen]
            mask = mask[..., :seen] if mask is not None and mask.dim() == 4 else mask
            self.note.add(q, k, v, mask, scale, causal)
            if self.stop:
                raise Stopped


def _interface(base: str) -> str:
    """The name of an attention function, registered with transformers, that tells the tap and then calls `base`."""
    from transformers import AttentionInterface
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    name = f"secateur-{base}"

    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kw: Any
    ) -> Any:
        tap = _TAPS.get(module)
        if tap is not None:
            causal = kw.get("is_causal")
            causal = getattr(module, "is_causal", False) if causal is None else causal
            tap(query, key, value, attention_mask, kw.get("scaling"), bool(causal))
        if base == "eager":
            function = sys.modules[type(module).__module__].eager_attention_forward
        else:
            function = ALL_ATTENTION_FUNCTIONS[base]
        return function(module, query, key, value, attention_mask, **kw)

    AttentionInterface.register(name, attention)
    return name


class _Sdpa(TorchFunctionMode):
    """Sees scaled_dot_product_attention inside one module's forward."""

    def __init__(self, tap: Tap):
        super().__init__()
        self.tap = tap

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.nn.functional.scaled_dot_product_attention:
            q, k, v = args[:3]
            mask = args[3] if len(args) > 3 else kwargs.get("attn_mask")
            self.tap(q, k, v, mask, kwargs.get("scale"), bool(kwargs.get("is_causal", False)))
        return func(*args, **kwargs)


def part(block: nn.Module, *names: str) -> nn.Module:
    """The first module of these names that a block has."""
    for name in names:
        module = getattr(block, name, None)
        if isinstance(module, nn.Module):
            return module
    raise SecateurError(
        f"{type(block).__name__} has none of {', '.join(names)}", where="tokens", fix="its layout isn't known"
    )


def attention_of(block: nn.Module) -> nn.Module:
    return part(block, "self_attn", "attn", "attention", "mixer")


def tap_on(block: nn.Module) -> tuple[Tap, Callable[[], None]]:
    """A tap, put on a block's attention, and the function that takes it off."""
    module = attention_of(block)
    if module in _TAPS:
        raise SecateurError(f"{type(module).__name__} is being recorded already", where="tokens")
    tap = Tap()
    config = getattr(module, "config", None)
    if config is not None and hasattr(config, "_attn_implementation"):
        base = config._attn_implementation or "eager"
        if "flash" in base or "flex" in base:
            raise SecateurError(
                f"attention can't be read beside {base}",
                where="tokens",
                fix='load the model with attn_implementation="sdpa"',
            )
        # a config of its own: other modules share the model's
        changed = copy.copy(config)
        changed._attn_implementation_internal = _interface(base)
        module.config = changed
        _TAPS[module] = tap

        def off() -> None:
            module.config = config
            _TAPS.pop(module, None)

        return tap, off
    # without a config (timm) the attention function can't be named, so the torch function is watched
    own = module.__dict__.get("forward")
    forward = module.forward

    def watched(*args: Any, **kwargs: Any) -> Any:
        if tap.note is None and tap.rows is None:
            return forward(*args, **kwargs)
        with _Sdpa(tap):
            return forward(*args, **kwargs)

    module.forward = watched
    _TAPS[module] = tap

    def restore() -> None:
        if own is None:
            del module.forward
        else:
            module.forward = own
        _TAPS.pop(module, None)

    return tap, restore


class Recorder:
    """The taps and hooks of one attached model, and the notes of its current call.

    `forms[block]`: what is noted of it: "" (q, k, v and output), "raw" (before rotation), "modules", "peek".
    """

    def __init__(self, current: Current, sites: Mapping[str, Site], blocks: Any, layers: Any):
        self.current = current
        self.taps: dict[Key, Tap] = {}
        self.undo: list[Callable[[], None]] = []
        self.notes: dict[tuple[str, int, str], Note] = {}
        self.forms: dict[Key, set[str]] = {}
        try:
            for site in sites.values():
                self.forms.setdefault(site.key, set()).add(site.form)
            for key, forms in self.forms.items():
                block = (blocks if key[0] == "encoder" else layers)[key[1]]
                if forms - {"modules", "entry"}:
                    self.taps[key], off = tap_on(block)
                    self.undo.append(off)
                if "" in forms:
                    self._watch_output(key, block)
                if "modules" in forms:
                    self._watch_modules(key, block)
        except BaseException:
            self.remove()
            raise

    def remove(self) -> None:
        while self.undo:
            self.undo.pop()()

    @property
    def on(self) -> bool:
        return self.current.call is not None

    def begin(
        self, key: Key, block: nn.Module, hidden: Tensor, kwargs: Mapping[str, Any], **marks: Any
    ) -> None:
        """Before a block runs on `hidden`. `marks`: fields of its notes that say where its slots lie."""
        forms = self.forms.get(key)
        if not forms or not self.on:
            return
        if "raw" in forms:
            self.notes[(*key, "raw")] = self.peek(key, block, hidden, kwargs, raw=True, **marks)
        if "" in forms:
            self.taps[key].note = self.notes[(*key, "")] = Note(**marks)
        if "modules" in forms:
            self.notes[(*key, "modules")] = Note(**marks)
        if "entry" in forms:
            self.notes[(*key, "entry")] = Note(states=hidden, **marks)

    def peek(
        self, key: Key, block: nn.Module, hidden: Tensor, kwargs: Mapping[str, Any], raw: bool, **marks: Any
    ) -> Note:
        """q, k and v of a block on `hidden`, beside the run: it stops at its attention and writes no cache.

        `raw`: before rotation.
        """
        arguments = without_cache(without_rotation(kwargs) if raw else kwargs)
        arguments.pop("hidden_states", None)
        tap = self.taps[key]
        before = tap.note
        note = Note(**marks)
        tap.note, tap.stop = note, True
        try:
            with torch.no_grad():
                block.forward(hidden, **arguments)
        except Stopped:
            pass
        finally:
            tap.note, tap.stop = before, False
        return note

    def _watch_output(self, key: Key, block: nn.Module) -> None:
        def after(module: nn.Module, args: Any, output: Any) -> None:
            note = self.notes.get((*key, ""))
            if self.on and note is not None and note.states is None:
                note.states = output[0] if isinstance(output, tuple) else output
            if key in self.taps:
                self.taps[key].note = None

        self.undo.append(block.register_forward_hook(after).remove)

    def _watch_modules(self, key: Key, block: nn.Module) -> None:
        parts = {"attention": attention_of(block), "mlp": part(block, "mlp")}
        for name, module in parts.items():

            def after(module: nn.Module, args: Any, kwargs: Any, output: Any, name: str = name) -> None:
                note = self.notes.get((*key, "modules"))
                if self.on and note is not None and name not in note.modules:
                    hidden = args[0] if args else kwargs["hidden_states"]
                    note.modules[name] = (hidden, output[0] if isinstance(output, tuple) else output)

            self.undo.append(module.register_forward_hook(after, with_kwargs=True).remove)


def without_rotation(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments of a block, with rotary tables that turn nothing."""
    changed = dict(kwargs)
    for name in ("position_embeddings", "rotary_pos_emb"):
        tables = changed.get(name)
        if isinstance(tables, tuple) and len(tables) == 2:
            changed[name] = (torch.ones_like(tables[0]), torch.zeros_like(tables[1]))
    return changed
