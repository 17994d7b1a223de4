"""What dropping must equal: unpatched modules, no cache, every token left in place, dropped columns masked.

It shares no gather, cache, position or grid code with the engine: masks go in through torch's own attention function.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from tiny_models import IMAGE, VIDEO
from torch import Tensor
from torch.overrides import TorchFunctionMode


class Masked(TorchFunctionMode):
    """Inside, attention doesn't see the flat key slots marked in `gone`; the calls take their slots one after another."""

    def __init__(self, gone: Tensor):
        super().__init__()
        self.gone, self.done = gone, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is not torch.nn.functional.scaled_dot_product_attention:
            return func(*args, **kwargs)
        q, k, v = args[:3]
        batch, _, length = k.shape[:3]
        gone = self.gone[self.done : self.done + batch * length].view(batch, length)
        self.done += batch * length
        mask = kwargs.pop("attn_mask", None) if len(args) < 4 else args[3]
        seen = ~gone[:, None, None, :] | torch.eye(length, dtype=torch.bool)
        if kwargs.pop("is_causal", False):
            seen = seen & torch.ones(q.shape[2], length, dtype=torch.bool).tril()
        if mask is not None:
            mask = mask[..., :length]
            seen = (
                seen & mask
                if mask.dtype == torch.bool
                else mask.masked_fill(~seen, torch.finfo(mask.dtype).min)
            )
        return func(q, k, v, attn_mask=seen, **kwargs)


@contextmanager
def masked_layers(layers: Any, gone_at: dict[int, Tensor], eager: bool = False) -> Iterator[None]:
    """Layer i attends as if the columns gone_at[K], K the largest <= i, weren't there. `gone` is [B, L] bool."""
    undo = []
    for number, layer in enumerate(layers):
        before = [k for k in gone_at if k <= number]
        if not before:
            continue
        gone = gone_at[max(before)]
        forward = layer.forward

        def run(*args: Any, forward: Any = forward, gone: Tensor = gone, **kwargs: Any) -> Any:
            if not eager:
                with Masked(gone.flatten()):
                    return forward(*args, **kwargs)
            mask = kwargs["attention_mask"]
            hidden = gone[:, None, None, :] & ~torch.eye(gone.shape[1], dtype=torch.bool)
            return forward(
                *args, **{**kwargs, "attention_mask": mask.masked_fill(hidden, torch.finfo(mask.dtype).min)}
            )

        layer.forward = run
        undo.append(layer)
    try:
        yield
    finally:
        for layer in undo:
            del layer.forward


@contextmanager
def returning(layers: Any, back: list[tuple[int, int, Tensor]]) -> Iterator[None]:
    """For each (since, at, columns [B, L] bool): layer `at` is given these columns as layer `since` was."""
    seen: dict[int, Tensor] = {}
    handles = []

    def hook(number: int) -> Any:
        def before(layer: Any, args: Any, kwargs: dict[str, Any]) -> Any:
            hidden = args[0] if args else kwargs["hidden_states"]
            for since, at, columns in back:
                if at == number:
                    hidden = torch.where(columns[..., None], seen[since], hidden)
            seen[number] = hidden
            return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})

        return before

    for number, layer in enumerate(layers):
        handles.append(layer.register_forward_pre_hook(hook(number), with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def slots_in_windows(grid: list[tuple[int, int, int]], side: int = 2) -> list[int]:
    """Patches of each tower slot where windows of `side` x `side` tokens (of 4 patches) are laid out one by one."""
    slots, start = [], 0
    for _, h, w in grid:
        rows, cols = h // 2, w // 2
        for top in range(0, rows, side):
            for left in range(0, cols, side):
                for r in range(top, min(top + side, rows)):
                    for c in range(left, min(left + side, cols)):
                        token = start + r * cols + c
                        slots += [4 * token + i for i in range(4)]
        start += rows * cols
    return slots


def generate(
    model: Any,
    family: str,
    inputs: dict[str, Any],
    gone_at: dict[int, Tensor],
    steps: int,
    tower: tuple[int, Tensor] | None = None,
    back: list[tuple[int, int, Tensor]] | None = None,
) -> tuple[Tensor, Tensor]:
    """Greedy tokens [B, steps] and their logits [steps, B, V]; the whole sequence is run anew at every step.

    `gone_at[K]`: bool [B, L], columns that layers K and above don't see. `tower` (block, bool [flat slots]): the same in
    the vision tower. `back`: see `returning`.
    """
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    positions = model._prepare_position_ids_for_generation(ids, dict(inputs))
    if family.startswith("paligemma"):
        positions = positions + 1
    eager = model.config.get_text_config()._attn_implementation == "eager"
    given = dict(inputs)
    tokens, logits = [], []
    for _ in range(steps):
        extra = given["input_ids"].shape[1] - ids.shape[1]
        gone = {k: torch.nn.functional.pad(v, (0, extra)) for k, v in gone_at.items()}
        blocks = tower_blocks(model.get_encoder("image"))
        inside = masked_layers(blocks, {tower[0]: tower[1][None]}) if tower else nullcontext()
        layers = model.get_decoder().layers
        again = [(since, at, torch.nn.functional.pad(v, (0, extra))) for since, at, v in back or []]
        with torch.no_grad(), inside, masked_layers(layers, gone, eager), returning(layers, again):
            out = model(**given, position_ids=positions, use_cache=False).logits[:, -1]
        logits.append(out)
        choice = out.clone()
        choice[:, [IMAGE, VIDEO]] = -torch.inf
        new = choice.argmax(-1, keepdim=True)
        tokens.append(new)
        given["input_ids"] = torch.cat([given["input_ids"], new], 1)
        given["attention_mask"] = torch.cat([given["attention_mask"], torch.ones_like(new)], 1)
        for name, value in (
            ("token_type_ids", 1 if family.startswith("paligemma") else 0),
            ("mm_token_type_ids", 0),
        ):
            if name in given:
                given[name] = torch.cat([given[name], torch.full_like(new, value)], 1)
        positions = torch.cat([positions, positions[..., -1:] + 1], -1)
    assert int(mask.sum())
    return torch.cat(tokens, 1), torch.stack(logits)


def tower_blocks(tower: Any) -> Any:
    for path in ("blocks", "encoder.layers", "encoder.layer"):
        try:
            return tower.get_submodule(path)
        except AttributeError:
            continue
    raise AttributeError(type(tower).__name__)
