"""Maps of a text: which of its tokens the next one comes from, in a language model as it is.

A text is a picture of one row whose colours are the numbers of its embeddings, so every map of single pixels reads it.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from secateur.errors import SecateurError, require
from secateur.method import list_methods, method_class
from secateur.saliency import Map, as_saliency_method, saliency
from secateur.saliency.method import SaliencyMethod
from secateur.utils.running import device_of, evaluating, logits_of
from secateur.utils.screen import Screen

USUAL: dict[str, dict[str, Any]] = {"lrp": {"composite": "attn-lrp", "start": "logit"}}
"""Settings that a method has for texts where none are given."""


class NextToken(nn.Module):
    """A language model as a classifier of a picture of one row: [N, width, 1, tokens] -> logits of the next token [N, vocabulary]."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        takes = inspect.signature(type(model).forward).parameters
        self.last: dict[str, Any] = {"logits_to_keep": 1} if "logits_to_keep" in takes else {}

    def forward(self, x: Tensor) -> Tensor:
        embedded = x[:, :, 0].transpose(1, 2)
        return logits_of(self.model(inputs_embeds=embedded, use_cache=False, **self.last))[:, -1]


@dataclass(repr=False)
class TextMap(Screen):
    """What `text_saliency` gives: `values` [tokens], float32, and the `tokens` as they stand in the text, which joined are it.

    `additive`: the values are parts of the target's `logit`, with signs; else they say only how much. `target` and `word`:
    the id of the token that was asked for, and how it is written. `likeliest`: (word, id, probability) of the five next tokens
    that the model finds likeliest.
    """

    values: Tensor
    tokens: list[str]
    ids: list[int]
    method: str
    target: int
    word: str
    logit: float
    probability: float
    likeliest: list[tuple[str, int, float]]
    additive: bool
    hyperparameters: dict[str, Any] = dataclasses.field(default_factory=dict)


def text_methods() -> list[str]:
    """The names of the maps that read texts.

    >>> "lrp" in text_methods()
    True
    """
    kinds = {name: method_class(name) for name in list_methods()}
    return [name for name, cls in kinds.items() if issubclass(cls, SaliencyMethod) and cls.words]


def text_saliency(
    model: nn.Module,
    tokenizer: Any,
    text: str,
    method: str | SaliencyMethod = "lrp",
    target: int | str | None = None,
    **settings: Any,
) -> TextMap:
    """Which tokens of a text the logit of the next one comes from.

    >>> found = text_saliency(model, tokenizer, "The capital of France is")  # doctest: +SKIP
    >>> found.word, found.tokens[int(found.values.argmax())]  # doctest: +SKIP
    (' Paris', ' France')

    Parameters
    ----------
    model: a decoder of transformers, on any device, that takes `inputs_embeds`.
    tokenizer: its own.
    method: a map that reads texts (`text_methods()` lists them), by name or with its hyperparameters.
    target: the next token, by id or by how it is written (with or without a space before it, whichever is likelier);
        None: the likeliest.
    settings: hyperparameters of the method: composite, times_input, steps, ...

    `lrp` hands the logit on by the rules of AttnLRP (Achtibat et al. 2024, https://arxiv.org/abs/2402.05602); `composite=
    "epsilon"` by those of Ali et al. 2022, https://arxiv.org/abs/2202.07304, which keep nothing on the way. The model is left as it was.
    Raises `SecateurError`: a text of no or too many tokens, a target that is no single token, a method that reads no texts, a model that is
    no decoder, an operation without a rule.
    """
    if isinstance(method, str):
        settings = {**USUAL.get(method, {}), **settings}
    chosen = as_saliency_method(method, **settings)
    require(
        chosen.words,
        f"{chosen.name} reads pictures, not texts",
        where="text",
        fix=f"one of {', '.join(text_methods())}",
    )
    ids, tokens = _read(model, tokenizer, text)
    x = _embedded(model, ids)
    with evaluating(model), torch.no_grad():
        logits = NextToken(model)(x)[0].float()
    require(torch.isfinite(logits).all(), "the logits hold NaN or infinite values", where="model output")
    wanted = _target(tokenizer, target, logits)
    found: Map = saliency(NextToken(model), x, chosen, wanted)
    assert found.attribution is not None
    each = found.attribution[0, :, 0]  # [width, tokens]
    chances = logits.softmax(0)
    top = chances.topk(min(5, len(chances)))
    return TextMap(
        values=(each.sum(0) if found.additive else each.norm(dim=0)).cpu(),
        tokens=tokens,
        ids=ids.tolist(),
        method=chosen.name,
        target=wanted,
        word=tokenizer.decode([wanted]),
        logit=float(logits[wanted]),
        probability=float(chances[wanted]),
        likeliest=[(tokenizer.decode([int(i)]), int(i), float(p)) for p, i in zip(*top, strict=True)],
        additive=found.additive,
        hyperparameters=chosen.hyperparameters,
    )


def _read(model: nn.Module, tokenizer: Any, text: str) -> tuple[Tensor, list[str]]:
    """(ids [tokens], what of the text each token is): special tokens by their names, all others joined are the text."""
    where = "text"
    require(isinstance(text, str) and text.strip(), "it is empty", where=where, fix="give some words")
    fast = getattr(tokenizer, "is_fast", False)
    encoded = tokenizer(text, return_offsets_mapping=fast)
    ids = encoded["input_ids"]
    special = set(getattr(tokenizer, "all_special_ids", ()))
    config: Any = getattr(model, "config", None)
    most = getattr(config, "max_position_embeddings", None) or math.inf
    require(ids, "the tokenizer makes no token of it", where=where, fix="give some words")
    require(
        len(ids) <= most, f"it is {len(ids)} tokens, the model reads {most}", where=where, fix="shorten it"
    )
    vocabulary = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    require(
        max(ids) < vocabulary,
        f"token {max(ids)} is outside the model's vocabulary of {vocabulary}",
        where="tokenizer",
        fix="give the tokenizer of this model",
    )
    tokens, end = [], 0
    for number, token in enumerate(ids):
        stop = encoded["offset_mapping"][number][1] if fast else 0
        if token in special or not fast:
            tokens.append(tokenizer.decode([token]))
        else:  # a token that ends inside of a character gets nothing, and the last one of it the character
            rest = encoded["offset_mapping"][number + 1 :]
            stop = end if any(begin < stop for begin, until in rest[:1] if until) else stop
            tokens.append(text[end:stop])
        end = max(end, stop)
    return torch.tensor(ids, device=device_of(model)), tokens


def _embedded(model: nn.Module, ids: Tensor) -> Tensor:
    """[1, width, 1, tokens]"""
    takes = "inputs_embeds" in inspect.signature(type(model).forward).parameters
    require(
        takes and hasattr(model, "get_input_embeddings"),
        f"{type(model).__name__} takes no embeddings",
        where="model",
        fix="give a decoder of transformers, such as smollm2",
    )
    with torch.no_grad():
        return model.get_input_embeddings()(ids[None]).transpose(1, 2)[:, :, None]  # type: ignore[operator]


def _target(tokenizer: Any, target: int | str | None, logits: Tensor) -> int:
    if target is None:
        return int(logits.argmax())
    if isinstance(target, int):
        require(
            0 <= target < len(logits) and not isinstance(target, bool),
            f"there is no token {target} of {len(logits)}",
            where="target",
            fix=f"give 0 to {len(logits) - 1}, or a word",
        )
        return target
    ways = [tokenizer.encode(way, add_special_tokens=False) for way in {target, " " + target}]
    single = [way[0] for way in ways if len(way) == 1]
    if not single:
        count = min(map(len, ways))
        raise SecateurError(
            f"{target!r} is {count} tokens" if count else f"{target!r} is no token",
            where="target",
            fix="name the first of them" if count else "name a word",
        )
    return max(single, key=lambda token: float(logits[token]))
