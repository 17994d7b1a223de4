"""Linear heads behind the blocks of a frozen vision transformer, fitted to what the patches of labelled pictures show."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from secateur.families.segmenter import Segmenter, TokenHead
from secateur.utils.files import atomic_file
from secateur.utils.progress import track

STAGES = (2, 5, 8, 11)
"""Blocks, from 0, of the twelve of a ViT-S."""
WIDTH, PATCH = 384, 14


def build(backbone: nn.Module, classes: int) -> Segmenter:
    """The backbone, frozen, with untrained heads behind blocks 3, 6, 9 and 12."""
    return Segmenter(backbone.requires_grad_(False), [TokenHead(WIDTH, classes) for _ in STAGES], STAGES)


def fitted(model: Segmenter, pictures: Tensor, labels: Tensor, file: Path) -> Segmenter:
    """The heads fitted to `labels` int64 [N, H, W] (-100: none) of pictures [N, 3, H, W]; once, then read from `file`."""
    if not file.is_file():
        shares = shares_of(labels, model.heads[0].out.out_features)  # type: ignore[union-attr, arg-type]
        for head, states in zip(model.heads, states_behind(model, pictures), strict=True):
            assert isinstance(head, TokenHead)
            fit_head(head, states, shares)
        file.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(file) as partial:
            save_file(
                {name: t.detach().contiguous() for name, t in model.heads.state_dict().items()}, partial
            )
    model.heads.load_state_dict(load_file(file))
    return model.eval()


def shares_of(labels: Tensor, classes: int) -> Tensor:
    """[N * n, C] how much of each patch's pixels each class has; rows of unlabelled pixels sum to less than 1.

    >>> shares_of(torch.zeros(1, 14, 28, dtype=torch.int64), 2).tolist()
    [[1.0, 0.0], [1.0, 0.0]]
    """
    wanted = F.one_hot(labels.clamp(min=0), classes) * (labels >= 0)[..., None]
    return F.avg_pool2d(wanted.permute(0, 3, 1, 2).float(), PATCH).flatten(2).mT.flatten(0, 1)


@torch.no_grad()
def states_behind(model: Segmenter, pictures: Tensor, batch: int = 8) -> list[Tensor]:
    """Behind each stage, the states of all patches, float16 [N * n, D]."""
    found: list[list[Tensor]] = [[] for _ in model.stages]
    hooks = [
        model.blocks[number].register_forward_hook(
            lambda block, args, out, rows=rows: rows.append(out[:, model.prefix :].half().flatten(0, 1))
        )
        for rows, number in zip(found, model.stages, strict=True)
    ]
    try:
        for some in track(pictures.split(batch), "features"):
            model.backbone(some)
    finally:
        for hook in hooks:
            hook.remove()
    return [torch.cat(rows) for rows in found]


def fit_head(head: TokenHead, states: Tensor, shares: Tensor, decay: float = 1e-4, steps: int = 60) -> None:
    """Logistic regression: the cross-entropy of `shares` [rows, C] of states [rows, D], to the end."""
    with torch.no_grad():
        rows = head.norm(states.float())
        head.out.weight.zero_()
        head.out.bias.zero_()
    optimizer = torch.optim.LBFGS(head.out.parameters(), max_iter=steps, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = -(shares * head.out(rows).log_softmax(-1)).sum() / shares.sum()
        loss = loss + decay * head.out.weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)


def normalised(pictures: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Pictures [N, 3, H, W] in 0..1 as a network wants them."""
    return (pictures - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
