"""The blocks of any vision transformer run on the tokens that are alive; the model's own code sees all of them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from secateur.errors import SecateurError
from secateur.skipping.alive import additive, advance
from secateur.skipping.attached import Skipping
from secateur.skipping.work import block_macs

After = Callable[[int, Tensor, Tensor], Tensor]
"""(number of the block, states [B, N, D] behind it, bool [B, N] alive) -> bool [B, N] of what goes on."""
MASKS = ("attention_mask", "attn_mask")
TABLES = ("position_embeddings", "rotary_pos_emb", "rope")


def skip_blocks(
    attached: Skipping, blocks: Sequence[nn.Module], after: After, prefix: int = 0, masked: bool = False
) -> None:
    """From now on `after` is asked behind every block which tokens go on; those that don't stay as they are there.

    >>> skip_blocks(Skipping(vit, "mine"), vit.blocks, lambda number, x, alive: alive & (x.norm(dim=-1) > 1))  # doctest: +SKIP

    blocks: of one forward, in their order: (states [B, N, D], ...) -> states, with `attention_mask` or `attn_mask` where pictures may
    keep different numbers (else they run one by one). prefix: tokens in front (CLS, registers) that never leave. `attached.work`
    counts the blocks. masked: as in `advance`.

    Raises `SecateurError` where blocks are given a mask, or tables of positions.
    """
    alive: list[Tensor] = []

    def around(number: int, block: nn.Module) -> Callable[..., Tensor]:
        original = block.forward
        names = list(inspect.signature(original).parameters)
        mask = next((name for name in MASKS if name in names), None)

        def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            rest = dict(zip(names[1:], args)) | kwargs
            for name in (*MASKS, *TABLES):
                if rest.get(name) is not None:
                    raise SecateurError(
                        f"its blocks are given {name}",
                        where="attach",
                        fix="a model whose blocks see states alone",
                    )
            if number == 0:
                alive[:] = [torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)]
                attached.work.clear()
            now = alive[0]

            def run(states: Tensor, keys: Tensor | None) -> Tensor:
                if keys is None:
                    return original(states, **rest)
                if mask is not None:
                    return original(states, **{**rest, mask: additive(keys, states.dtype)})
                return _one_by_one(lambda one: original(one, **rest), states, keys)

            made = advance(run, x, now, masked)
            attached.work.add(
                block_macs(block, now.sum(1), x.shape[2]),
                block_macs(block, torch.full_like(now.sum(1), x.shape[1]), x.shape[2]),
            )
            stays = after(number, made, now) & now
            stays[:, :prefix] = True
            alive[:] = [stays]
            return made

        return forward

    for number, block in enumerate(blocks):
        attached.put(block, "forward", around(number, block))


def _one_by_one(run: Callable[[Tensor], Tensor], states: Tensor, keys: Tensor) -> Tensor:
    """Blocks that take no mask: each picture by itself."""
    made = states.clone()
    for row, there in enumerate(keys):
        made[row, there] = run(states[row, there][None])[0]
    return made
