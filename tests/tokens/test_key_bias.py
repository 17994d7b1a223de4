"""Tokens weighed as keys between layers, against attention worked out by hand from softmax, weights and values."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from test_every_token_method import single
from tiny_models import IMAGE, inputs_for, make
from torch import Tensor
from torch.overrides import TorchFunctionMode

from secateur.errors import SecateurError
from secateur.tokens.attach import attach
from secateur.tokens.method import Stage, TokenMethod
from secateur.tokens.state import TokenSets

FAMILIES = ("llava-clip", "qwen2.5-vl", "idefics3", "paligemma", "gemma3")


class Weighed(TorchFunctionMode):
    """Inside, each key counts `weights` [B, L] times in the softmax: exp(logit) * weight / sum of these."""

    def __init__(self, weights: Tensor):
        super().__init__()
        self.weights = weights

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is not torch.nn.functional.scaled_dot_product_attention:
            return func(*args, **kwargs)
        q, k, v = args[:3]
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        logits = q @ k.mT * (kwargs.get("scale") or q.shape[-1] ** -0.5)
        mask = kwargs.get("attn_mask")
        if mask is None:
            mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool)
            mask = mask.tril() if kwargs.get("is_causal") else mask
        if mask.dtype != torch.bool:
            mask = mask > -1
        share = (logits - logits.amax(-1, keepdim=True)).exp() * mask * self.weights[:, None, None]
        share = share / share.sum(-1, keepdim=True).clamp(min=1e-300)
        return share @ v


@contextmanager
def weighed(layers: Any, weights: dict[int, Tensor]) -> Iterator[None]:
    """Layer i attends with the weights [B, L] of the largest K <= i."""
    done = []
    for number, layer in enumerate(layers):
        if found := [k for k in weights if k <= number]:
            now = weights[max(found)]

            def run(*args: Any, forward: Any = layer.forward, w: Tensor = now, **kwargs: Any) -> Any:
                with Weighed(w):
                    return forward(*args, **kwargs)

            layer.forward = run
            done.append(layer)
    try:
        yield
    finally:
        for layer in done:
            del layer.forward


@dataclass
class Gates(TokenMethod):
    """Everything stays, and token i of a row weighs 1 / (1 + i % 5) at the first place, half of that at the second."""

    places: tuple[str, ...] = ("input", "layer:2")
    scope = "row"

    def stages(self, facts: Any) -> list[Stage]:
        return [Stage(at, self.weigh, bias="gate") for at in self.places]

    def weigh(self, sets: TokenSets) -> Tensor:
        before = sets.carried.get("gate")
        sets.carried["gate"] = 1.0 / (1 + sets.index % 5) if before is None else before / 2
        return sets.valid


def by_hand(inputs: dict[str, Tensor]) -> Tensor:
    """[B, L] the weights of `Gates` at its first place, found by walking along the ids."""
    weights = torch.ones(inputs["input_ids"].shape, dtype=torch.float64)
    for row, ids in enumerate(inputs["input_ids"]):
        for number, column in enumerate((ids == IMAGE).nonzero()[:, 0].tolist()):
            weights[row, column] = 1.0 / (1 + number % 5)
    return weights


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_of_keys_are_those_of_attention_by_hand(family: str) -> None:
    """Padded rows with two, one and no pictures, double precision, at the input and before a layer."""
    model, inputs = make(family), inputs_for(family)
    first = by_hand(inputs)
    second = torch.where(inputs["input_ids"] == IMAGE, first / 2, first)
    layers = model.get_decoder().layers
    for places, weights in (
        (("input",), {0: first}),
        (("input", "layer:2"), {0: first, 2: second}),
        (("layer:2",), {2: first}),
    ):
        with torch.no_grad():
            before = model(**inputs).logits
            with weighed(layers, weights):
                expected = model(**inputs).logits
            with attach(model, Gates(places), target="50%"):
                found = model(**inputs, use_cache=False).logits
        real = inputs["attention_mask"].bool()
        assert torch.allclose(found[real], expected[real], atol=1e-6), places
        assert not torch.allclose(found[0, -1], before[0, -1], atol=1e-3)
        assert torch.allclose(found[2][real[2]], before[2][real[2]], atol=1e-6)
        with torch.no_grad():
            assert torch.equal(model(**inputs).logits, before)


def weigh(value: float | Tensor) -> Any:
    def stage(sets: TokenSets) -> Tensor:
        gate = torch.as_tensor(value, dtype=torch.float32)
        sets.carried["gate"] = torch.where(sets.index % 2 == 0, gate, 1.0)
        return sets.valid

    return stage


@dataclass
class Even(TokenMethod):
    """Every other token of a picture weighs `value`."""

    value: Any = 1.0
    at: str = "layer:1"
    scope = "row"

    def stages(self, facts: Any) -> list[Stage]:
        return [Stage(self.at, weigh(self.value), bias="gate")]


@pytest.mark.parametrize("family", ["llava-clip", "qwen2.5-vl"])
@pytest.mark.parametrize("at", ["input", "layer:1"])
@torch.no_grad()
def test_a_weight_of_one_changes_no_bit_and_a_tiny_one_is_as_good_as_gone(family: str, at: str) -> None:
    """Spec: covipal (b), with the same positions: what is dropped at the stage is left out of the layers behind it."""
    model, inputs = make(family), inputs_for(family)
    before = model(**inputs).logits
    with attach(model, Even(1.0, at), target="50%"):
        assert torch.equal(model(**inputs, use_cache=False).logits, before)
    with attach(model, Even(1e-30, at), target="50%"):
        found = model(**inputs, use_cache=False).logits
    with attach(model, lambda sets: sets.valid & (sets.index % 2 == 1), at=at, scope="row", target="50%"):
        expected = model(**inputs).logits
    assert torch.allclose(found[:, -1], expected[:, -1], atol=1e-6)


def test_the_gradient_reaches_the_weight() -> None:
    """Against a difference quotient; the model's own parameters need none and get none."""
    model, inputs = make("llava-clip").requires_grad_(False), inputs_for("llava-clip")
    gate = torch.tensor(0.4, requires_grad=True)

    def loss(value: Any) -> Tensor:
        with attach(model, Even(value), target="50%"):
            return model(**inputs, use_cache=False).logits[:, -1].sum()

    loss(gate).backward()
    difference = (loss(0.41) - loss(0.39)) / 0.02
    assert gate.grad is not None and gate.grad.item() == pytest.approx(difference.item(), rel=1e-3)
    assert all(p.grad is None for p in model.parameters())


def test_tokens_may_leave_behind_weights() -> None:
    """A later stage without weights drops tokens: those that are left keep theirs."""
    model, inputs = make("llava-clip"), inputs_for("llava-clip")
    odd = lambda sets: sets.valid & (sets.index % 2 == 1)

    @dataclass
    class Both(TokenMethod):
        scope = "row"

        def stages(self, facts: Any) -> list[Stage]:
            return [Stage("input", Gates().weigh, bias="gate"), Stage("layer:2", odd, keep=0.5)]

    first = by_hand(inputs)
    even = torch.zeros_like(first)
    for row, ids in enumerate(inputs["input_ids"]):
        even[row, (ids == IMAGE).nonzero()[::2, 0]] = 1
    with torch.no_grad(), weighed(model.get_decoder().layers, {0: first, 2: first.where(even == 0, 1e-30)}):
        expected = model(**inputs).logits
    with torch.no_grad(), attach(model, Both(), target="50%"):
        found = model(**inputs, use_cache=False).logits
    assert torch.allclose(found[:, -1], expected[:, -1], atol=1e-6)


def test_what_cannot_be_weighed_is_named() -> None:
    model, inputs = make("llava-clip"), inputs_for("llava-clip")
    with attach(model, Even(0.5), target="50%"), pytest.raises(SecateurError, match="weighed as keys"):
        model.generate(**inputs, max_new_tokens=2)
    with attach(model, Even(0.5), target="50%") as attached, torch.no_grad():
        out = model(**inputs)
        step = torch.full((3, 1), 50)
        with pytest.raises(SecateurError, match="use_cache=False"):
            model(input_ids=step, past_key_values=out.past_key_values)
    attached = attach(model, Even(0.0), target="50%")
    with pytest.raises(SecateurError, match="isn't above 0"), torch.no_grad():
        model(**inputs, use_cache=False)
    assert not attached.attached


@torch.no_grad()
def test_a_row_alone_is_weighed_as_in_a_batch() -> None:
    model, inputs = make("llava-clip"), inputs_for("llava-clip")
    with attach(model, Gates(), target="50%"):
        batch = model(**inputs, use_cache=False).logits
        for row in (0, 1):
            alone = model(**single("llava-clip", inputs, row), use_cache=False).logits
            assert torch.allclose(alone[0, -1], batch[row, -1], atol=1e-6)
