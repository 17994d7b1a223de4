"""What dropping must equal: the model as it is, without a cache, every token in place, dropped columns masked in attention.

It shares no code with the token engine: masks go in through torch's own attention function, whatever a layer calls its mask.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from secateur.errors import SecateurError


class Seen(TorchFunctionMode):
    """Keeps q, k and the scale of the attention that runs inside."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Tensor, Tensor, float]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            self.calls.append((args[0], args[1], kwargs.get("scale") or args[0].shape[-1] ** -0.5))
        return func(*args, **kwargs)


class Masked(TorchFunctionMode):
    """Inside, attention doesn't see the columns `gone`, bool [B, L], except from themselves."""

    def __init__(self, gone: Tensor):
        super().__init__()
        self.gone = gone

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        q, k, v = args[:3]
        mask = args[3] if len(args) > 3 else kwargs.pop("attn_mask", None)
        length = k.shape[2]
        seen = ~self.gone[:, None, None, :] | torch.eye(length, dtype=torch.bool)  # [B, 1, L, L]
        if kwargs.pop("is_causal", False):
            seen = seen & torch.ones(q.shape[2], length, dtype=torch.bool).tril()
        if mask is not None:
            mask = mask[..., :length]
            hidden = torch.finfo(q.dtype).min
            seen = seen & mask if mask.dtype == torch.bool else mask.masked_fill(~seen, hidden)
        return func(q, k, v, attn_mask=seen, **kwargs)


@contextmanager
def without(model: Any, gone_at: Mapping[int, Tensor]) -> Iterator[None]:
    """Decoder layer i attends as if the columns gone_at[K], K the largest <= i, weren't there."""
    eager = model.config.get_text_config()._attn_implementation == "eager"
    changed = []
    for number, layer in enumerate(model.get_decoder().layers):
        latest = max((k for k in gone_at if k <= number), default=None)
        if latest is None:
            continue

        def run(
            *args: Any, forward: Any = layer.forward, gone: Tensor = gone_at[latest], **kwargs: Any
        ) -> Any:
            if not eager:
                with Masked(gone):
                    return forward(*args, **kwargs)
            mask = kwargs["attention_mask"]
            hidden = gone[:, None, None, :] & ~torch.eye(gone.shape[1], dtype=torch.bool)
            return forward(
                *args, **{**kwargs, "attention_mask": mask.masked_fill(hidden, torch.finfo(mask.dtype).min)}
            )

        layer.forward = run
        changed.append(layer)
    try:
        yield
    finally:
        for layer in changed:
            del layer.forward


@torch.no_grad()
def forward(model: Any, inputs: Mapping[str, Tensor], gone_at: Mapping[int, Tensor]) -> Tensor:
    """Logits [B, L, V] of the whole sequence."""
    with without(model, gone_at):
        return model(**inputs, use_cache=False).logits


@torch.no_grad()
def generate(
    model: Any, inputs: Mapping[str, Tensor], gone_at: Mapping[int, Tensor], steps: int, never: list[int]
) -> tuple[Tensor, Tensor]:
    """Greedy tokens [B, steps] and their logits [steps, B, V]; the whole sequence runs anew at every step.

    never: tokens that may not be chosen.
    """
    from secateur.families.vlm import family_of

    family, given = family_of(model), dict(inputs)
    mask = given["attention_mask"]
    positions = (mask.cumsum(1) - 1).clamp(min=0) + family.position_offset
    if family.mrope:
        positions = model._prepare_position_ids_for_generation(given["input_ids"], dict(given))
    tokens, logits = [], []
    for step in range(steps):
        gone = {k: F.pad(v, (0, step)) for k, v in gone_at.items()}
        with without(model, gone):
            out = model(**given, position_ids=positions, use_cache=False).logits[:, -1]
        logits.append(out)
        choice = out.clone()
        choice[:, never] = -torch.inf
        new = choice.argmax(-1, keepdim=True)
        tokens.append(new)
        more = {
            "input_ids": new,
            "attention_mask": torch.ones_like(new),
            "mm_token_type_ids": torch.zeros_like(new),
        }
        more["token_type_ids"] = torch.full_like(new, 1 if family.position_offset else 0)
        given |= {name: torch.cat([given[name], more[name]], 1) for name in more if name in given}
        positions = torch.cat([positions, positions[..., -1:] + 1], -1)
    return torch.cat(tokens, 1), torch.stack(logits)


@torch.no_grad()
def last_row(model: Any, inputs: Mapping[str, Tensor], layer: int) -> Tensor:
    """[B, L] attention of the last token at a decoder layer, averaged over the heads; rows padded on the left."""
    found = Seen()
    module = model.get_decoder().layers[layer]
    own = module.forward

    def run(*args: Any, **kwargs: Any) -> Any:
        with found:
            return own(*args, **kwargs)

    module.forward = run
    try:
        model(**inputs, use_cache=False)
    finally:
        del module.forward
    if not found.calls:
        raise SecateurError(
            "its attention isn't torch's, so no independent code can read it", where=type(model).__name__
        )
    q, k, scale = found.calls[0]
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    scores = (q[:, :, -1:] @ k.transpose(2, 3))[:, :, 0] * scale  # [B, H, L]
    hidden = inputs["attention_mask"][:, None] == 0
    return scores.masked_fill(hidden, -torch.inf).softmax(-1).mean(1)
