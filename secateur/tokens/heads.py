"""How much each head of a language model looks at pictures, on prompts of anyone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from secateur.attention.visual import Asked
from secateur.attention.work import VisualWork
from secateur.errors import SecateurError, choose
from secateur.families.vlm import facts_of, family_of
from secateur.families.vlm.facts import decoder_of
from secateur.tokens.attach import Attached
from secateur.tokens.method import Excused
from secateur.tokens.setup import make_setup
from secateur.tokens.work import Seen, WorkDriver
from secateur.utils.running import evaluating


def head_ratios(model: nn.Module, prompts: Iterable[Mapping[str, Any]], rows: str = "all") -> Tensor:
    """float32 [samples, layers, heads]: attention to visual tokens over attention to all others.

    >>> ratios = head_ratios(model, prompts)  # doctest: +SKIP
    >>> secateur.attach(model, "yopo", target="25%", given={"ratios": ratios})  # doctest: +SKIP

    Args:
        model: a vision-language model.
        prompts: keyword arguments of its forward; each row that holds a picture is a sample.
        rows: sums over "all" query rows of a sample, or its "last", which is what a first decoding step sees.

    Raises:
        SecateurError: no picture in any prompt, or attention that can't be reached.
    """
    choose(rows, ("all", "last"), what="rows", where="head_ratios")
    facts = facts_of(model, family_of(model))
    dense = VisualWork(facts.layers, facts.heads, facts.intermediate)
    setup = make_setup(model, Excused(), target=None, seed=0, work=dense)
    found: list[Tensor] = []
    layers: list[Tensor] = []

    def listen(number: int, asked: Asked, seen: Seen) -> None:
        layers.append(looks(asked, seen, rows))

    with torch.no_grad(), evaluating(model), Attached(setup) as attached:
        assert attached.decoder is not None
        driver = WorkDriver(setup, attached.decoder, decoder_of(model).layers, listen)
        try:
            for given in prompts:
                layers.clear()
                model(**{**given, "use_cache": False})
                if layers:
                    found.append(torch.stack(layers, 1)[~layers[0].isnan().any(1)])
        finally:
            driver.remove()
    if not sum(map(len, found)):
        raise SecateurError(
            "no prompt holds a picture", where="prompts", fix="prompts as the model will see them"
        )
    return torch.cat(found).cpu()


def looks(asked: Asked, seen: Seen, rows: str) -> Tensor:
    """float32 [B, H]: the sum of the weights on visual keys over that on the others; NaN for rows without a picture."""
    group = asked.q.shape[1] // asked.k.shape[1]
    keys = asked.k.repeat_interleave(group, 1)
    q = asked.q if rows == "all" else asked.q[:, :, -1:]
    may = asked.may.expand(-1, -1, asked.q.shape[2], -1)[:, :, -q.shape[2] :]
    scale = asked.q.shape[-1] ** -0.5 if asked.scale is None else asked.scale
    logits = (q @ keys.transpose(-1, -2)).float() * scale
    weights = logits.masked_fill(~may, torch.finfo(torch.float32).min).softmax(-1)
    if rows == "all":
        weights = weights * seen.valid[:, None, -q.shape[2] :, None]
    on = weights.sum(2)  # [B, H, M]
    return head_ratio(on, seen.keys, seen.valid).masked_fill(~seen.keys.any(1, keepdim=True), torch.nan)


def head_ratio(weights: Tensor, visual: Tensor, valid: Tensor | None = None) -> Tensor:
    """[B, H]: attention to visual keys over attention to the keys before and behind them.

    >>> weights = torch.tensor([[[.5, .1, .4], [.5, .02, .48]]])
    >>> head_ratio(weights, torch.tensor([[False, True, False]])).round(decimals=4)
    tensor([[0.1111, 0.0204]])

    weights: [B, H, M], not negative. visual, valid: bool [B, M].
    """
    others = ~visual if valid is None else ~visual & valid
    on, off = ((weights * mask[:, None]).sum(-1) for mask in (visual, others))
    return on / off.clamp(min=torch.finfo(torch.float32).tiny)


def votes(ratios: Tensor, threshold: float, share: float = 0.4) -> Tensor:
    """bool [layers, heads]: heads that more than `share` of the samples keep, each by a ratio above the threshold.

    >>> ratios = torch.tensor([[[.1111, .0204]]]).expand(5, 1, 2)
    >>> votes(ratios, 0.035).tolist()
    [[True, False]]

    ratios: [samples, layers, heads]. Raises `SecateurError` for a threshold that isn't a number of 0 or more.
    """
    if not threshold >= 0:
        raise SecateurError(f"a threshold of {threshold}", where="threshold", fix="0 or more, such as 0.035")
    return (ratios > threshold).float().mean(0) > share


def standing(ratios: Tensor, share: float = 0.4) -> Tensor:
    """float32 [layers, heads]: the threshold below which `votes` keep each head.

    >>> standing(torch.tensor([.1, .2, .3, .4, .5])[:, None, None]).item()
    0.30000001192092896

    ratios: [samples, layers, heads]; of five samples more than 0.4 must vote for a head: three.
    """
    needed = min(int(share * len(ratios)) + 1, len(ratios))
    return ratios.sort(0, descending=True).values[needed - 1]
