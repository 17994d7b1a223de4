"""A look at a prompt by some layers of the language model, before tokens leave at the input; what a stage records is noted."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from secateur.errors import SecateurError
from secateur.families.vlm.facts import decoder_of
from secateur.tokens.call import Call, Current
from secateur.tokens.decoder import DecoderDriver
from secateur.tokens.method import Glimpse
from secateur.tokens.record import Recorder
from secateur.tokens.setup import Setup
from secateur.utils.files import check_path


def read_weights(file: str | Path) -> dict[str, Tensor]:
    """The weights of layers that look, for `Glimpse`: a safetensors file of {"0.mlp.up_proj.weight": ...}.

    >>> read_weights("rfm.safetensors")  # doctest: +SKIP

    Raises `SecateurError` where there is none, it is damaged or holds a number that isn't finite.
    """
    path = Path(file).expanduser()
    if not path.is_file():
        raise SecateurError("there is no such file", where=str(path), fix=check_path(path))
    try:
        weights = load_file(path)
    except (SafetensorError, OSError) as error:
        raise SecateurError(f"it can't be read ({error})", where=str(path)) from error
    for name, tensor in weights.items():
        if not bool(torch.isfinite(tensor).all()):
            raise SecateurError(f"{name} isn't made of finite numbers", where=str(path))
    return weights


class _Seen(Exception):
    """Raised behind the last of the layers."""


def look(
    setup: Setup,
    current: Current,
    recorder: Recorder | None,
    call: Call,
    kwargs: Mapping[str, Any],
    glimpse: Glimpse,
) -> None:
    """A forward of the untouched class on these arguments, whose layers are those of the glimpse, left behind the last."""
    model, layers = setup.model, decoder_of(setup.model).layers
    names = inspect.signature(type(model).forward).parameters
    others = ("labels", "past_key_values", "cache")
    given = {k: v for k, v in kwargs.items() if k in names and k not in others} | {"use_cache": False}
    mask: Tensor = given["attention_mask"]

    def stop(module: nn.Module, args: Any, output: Any) -> None:
        states = output[0] if isinstance(output, tuple) else output
        if states.dim() != 3 or states.shape[:2] != mask.shape:
            raise SecateurError(
                "its layers don't hand states on in a form that lets some be passed over",
                where="glimpse",
                fix="look with all layers up to the last",
            )
        raise _Seen

    whole = dataclasses.replace(setup, stages=(), memory=None)
    driver = DecoderDriver(whole, current, recorder, layers)
    last = layers[glimpse.layers[-1]].register_forward_hook(stop)
    try:
        driver.begin(given, call, mask)
        learning = setup.lesson is not None and torch.is_grad_enabled()
        with torch.set_grad_enabled(learning), current.running(call), _only(layers, glimpse):
            type(model).forward(model, **given)
    except _Seen:
        call.glimpses.append((len(glimpse.layers), mask.sum(1).cpu()))
        return
    finally:
        last.remove()
        driver.remove()
    raise SecateurError("its forward doesn't run the decoder that it names", where="glimpse")


@contextmanager
def _only(layers: Any, glimpse: Glimpse) -> Iterator[None]:
    """Layers that aren't of the glimpse hand on what they are given, and those that are have its weights."""
    passed = [layer for n, layer in enumerate(layers) if n not in glimpse.layers]
    forwards = [layer.__dict__.get("forward") for layer in passed]
    # the parameters themselves change places, so that gradients reach those of the look
    homes: dict[str, tuple[nn.Module, str]] = {}
    for n in glimpse.layers if glimpse.weights is not None else ():
        for path, module in layers[n].named_modules():
            for name in module._parameters:
                homes[".".join(filter(None, (str(n), path, name)))] = module, name
    own = {name: module._parameters[key] for name, (module, key) in homes.items()}
    try:
        for layer in passed:
            layer.forward = _hand_on
        for name, (module, key) in homes.items():
            module._parameters[key] = glimpse.weights.get(name)  # type: ignore[union-attr, assignment]
        yield
    finally:
        for name, (module, key) in homes.items():
            module._parameters[key] = own[name]
        for layer, forward in zip(passed, forwards):
            if forward is None:
                layer.__dict__.pop("forward", None)
            else:
                layer.forward = forward


def _hand_on(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return hidden_states
