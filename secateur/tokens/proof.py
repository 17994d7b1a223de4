"""What the first inputs with pictures must show of a model whose family was registered or derived, before tokens may leave it.

Every token kept gives the same states to the last bit, and half of them dropped, where the method drops, what hiding the same
columns from attention gives. Shapes: B rows, L columns, L' those that are left, D width.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from secateur.errors import SecateurError
from secateur.families.vlm.facts import decoder_of
from secateur.tokens.call import Current
from secateur.tokens.decoder import ALONE, KEYED, DecoderDriver
from secateur.tokens.input import KINDS, InputDriver, formed, takes_positions
from secateur.tokens.method import Stage
from secateur.tokens.setup import Placed, Setup
from secateur.tokens.shorten import additive
from secateur.utils.running import evaluating


@dataclass
class Proven:
    """What is known of a model."""

    counts: bool = False
    """See `InputDriver.counts`."""
    takes_positions: bool = True
    """Its forward hands `position_ids` on to the language model."""
    places: set[tuple[str, int]] = field(default_factory=set)
    """Where dropping was proven: ("input", 0), or ("layer", K) before layer K."""


_PROVEN: weakref.WeakKeyDictionary[nn.Module, dict[tuple[str, ...], Proven]] = weakref.WeakKeyDictionary()
"""By what the inputs held: pictures, videos or both."""


def prove(setup: Setup, kwargs: Mapping[str, Any]) -> Proven:
    """What the model shows on these inputs, run once for each model, kind of inputs and place.

    Raises:
        SecateurError: a run gives other states than it should, with the place.
    """
    encoded = kwargs.get("mm_encoder_outputs") or {}
    kinds = tuple(k for k, name in KINDS.items() if kwargs.get(name) is not None or k in encoded)
    if setup.family.proven or not kinds:
        return Proven()
    shown = _PROVEN.setdefault(setup.model, {})
    names = inspect.signature(type(setup.model).forward).parameters
    others = ("labels", "past_key_values", "cache")
    given = {k: v for k, v in kwargs.items() if k in names and k not in others} | {"use_cache": False}
    with torch.no_grad(), evaluating(setup.model):
        if kinds not in shown:
            shown[kinds] = _prove_whole(setup, given)
        proven = shown[kinds]
        places = {
            (placed.kind, placed.number) for placed in setup.stages if placed.kind in ("input", "layer")
        }
        for place in sorted(places - proven.places):
            if place[0] == "input" and not proven.takes_positions:
                raise SecateurError(
                    "its forward doesn't hand position_ids on to the language model, which would count what is left anew",
                    where="attach",
                    fix="use a method that drops between layers",
                )
            _prove_dropping(setup, proven, given, place)
            proven.places.add(place)
    return proven


class _Done(Exception):
    """Raised behind the decoder, with its states."""


def _states(model: Any, kwargs: Mapping[str, Any]) -> Tensor:
    """[B, L, D] what the decoder gives in a forward of the untouched class, which is left there."""

    def stop(module: nn.Module, args: Any, output: Any) -> None:
        states = getattr(output, "last_hidden_state", None)
        raise _Done(output[0] if states is None else states)

    handle = decoder_of(model).register_forward_hook(stop)
    try:
        type(model).forward(model, **kwargs)
    except _Done as done:
        return done.args[0]
    finally:
        handle.remove()
    raise SecateurError("its forward doesn't run the decoder that it names", where="attach")


def _prove_whole(setup: Setup, given: dict[str, Any]) -> Proven:
    """Every token laid out and kept."""
    model, family = setup.model, setup.family
    whole = replace(setup, target=1.0, stages=(), sites={})
    expected = _states(model, given)
    for counts in (False, True) if family.observed else (False,):
        driver = InputDriver(whole, Current(), None, shortens=True, counts=counts)
        laid, call, _ = driver.prepare(dict(given), generating=False)
        if call is None:
            continue
        laid["mm_encoder_outputs"] = formed(laid["mm_encoder_outputs"], driver.forms)
        found = _states(model, laid)
        # padding may be given any position
        seen = laid["attention_mask"].bool()
        if found.shape == expected.shape and torch.equal(found[seen], expected[seen]):
            return Proven(counts, not family.observed or takes_positions(model, laid))
    raise SecateurError(
        f"with every token kept this model gives other states, so {family.name!r} isn't laid out as was "
        + ("derived" if family.observed else "registered"),
        where="attach",
        fix="register_family with what differs" if family.observed else "mend what register_family was given",
    )


def _prove_dropping(setup: Setup, proven: Proven, given: dict[str, Any], place: tuple[str, int]) -> None:
    """Every second visual token dropped at a place, and the same ones hidden from attention."""
    kind, number = place
    model, layers = setup.model, decoder_of(setup.model).layers
    kinds = getattr(decoder_of(model).config, "layer_types", None) or ()
    if set(kinds[number:]) - KEYED - ALONE:
        return  # no mask hides what a state or an index was made of
    whole = replace(setup, target=1.0, stages=(), sites={})
    label = f"layer:{number}" if kind == "layer" else "input"
    stage = Placed(Stage(label, _every_second, scope="row"), kind, number, label)
    # hidden tokens leave positions as they are
    half = replace(setup, target=0.5, stages=(stage,), sites={}, compact=False)

    driver = InputDriver(whole, Current(), None, counts=proven.counts)
    laid, _, _ = driver.prepare(dict(given), generating=False)
    full = _states(model, laid)
    encoded = {**given, "mm_encoder_outputs": laid["mm_encoder_outputs"]}

    current = Current()
    driver = InputDriver(half, current, None, counts=proven.counts)
    if kind == "input" and driver.window is not None and given["input_ids"].shape[1] > driver.window[1]:
        return  # where windows count columns, only compact positions are allowed, which no mask gives
    short, call, _ = driver.prepare(dict(encoded), generating=False)
    assert call is not None and call.mask is not None
    if kind == "layer":
        between = DecoderDriver(half, current, None, layers)
        try:
            between.begin(short, call, call.mask)
            with current.running(call):
                found = _states(model, short)
            assert between.run is not None
            last = between.run.now(len(layers))
            columns, real = last.mine, last.mine_valid
        finally:
            between.remove()
    else:
        short["mm_encoder_outputs"] = formed(short["mm_encoder_outputs"], driver.forms)
        found = _states(model, short)
        if current.columns is None:
            return  # too few tokens for one to leave
        columns, real = current.columns.clamp(min=0), current.columns >= 0
    gone = call.mask.clone()  # [B, L] columns that aren't left
    row, slot = real.nonzero(as_tuple=True)
    gone[row, columns[row, slot]] = False
    with _hidden(layers, number, gone, call.mask):
        expected = _states(model, laid)
    found, expected, full = found[row, slot], expected[row, columns[row, slot]], full[row, columns[row, slot]]
    error, effect, size = (_rms(x) for x in (found - expected, expected - full, expected))
    if not error <= 0.1 * effect + 4 * torch.finfo(expected.dtype).eps * size:
        raise SecateurError(
            f"dropping tokens at {label} gives other states than hiding them from attention (off by {error:.1e}, where "
            f"hiding moves them by {effect:.1e})",
            where="attach",
            fix="use a method that drops elsewhere",
        )


def _every_second(sets: Any) -> Tensor:
    return sets.valid & (sets.index % 2 == 0)


def _rms(values: Tensor) -> float:
    return float(values.float().square().mean().sqrt())


@contextmanager
def _hidden(layers: Any, first: int, gone: Tensor, mask: Tensor) -> Iterator[None]:
    """Layers from `first` on attend as if the columns `gone` [B, L] weren't there; `mask` [B, L] is False on padding."""
    length = gone.shape[1]
    itself = torch.eye(length, dtype=torch.bool, device=gone.device)
    hide = gone[:, None, None, :] & ~itself

    def before(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        names = list(inspect.signature(layer.forward).parameters)
        new = dict(zip(names, args)) | kwargs
        own = new.get("attention_mask")
        if own is None:
            seen = itself | itself.new_ones(length, length).tril() & mask[:, None, None, :]
            own = additive(seen, new[names[0]].dtype) if _eager(layer) else seen
        if own.dim() == 2:
            own = own * ~gone
        elif own.dtype == torch.bool:
            own = own & ~hide
        else:
            own = own.masked_fill(hide, torch.finfo(own.dtype).min)
        new["attention_mask"] = own
        return (new.pop(names[0]),), new

    handles = [layer.register_forward_pre_hook(before, with_kwargs=True) for layer in layers[first:]]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _eager(layer: nn.Module) -> bool:
    """Whether a layer's attention adds its mask to the logits."""
    configs = (getattr(module, "config", None) for module in layer.modules())
    return any(getattr(config, "_attn_implementation", None) == "eager" for config in configs)
