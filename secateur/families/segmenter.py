"""A vision transformer of any library with heads behind some of its blocks: a class for every patch, enlarged to every pixel.

B pictures of H x W, n = h * w patches, D width, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secateur.errors import SecateurError
from secateur.families.vlm import family_of
from secateur.skipping.alive import gather_columns, pack, put_columns, readable
from secateur.skipping.work import weights_of


class TokenHead(nn.Module):
    """Class logits of each token by itself: a norm and a matrix. The probability of a class is a softmax over them.

    >>> TokenHead(8, 3)(torch.zeros(1, 5, 8))[0].shape
    torch.Size([1, 5, 3])
    """

    def __init__(self, width: int, classes: int):
        super().__init__()
        self.norm, self.out = nn.LayerNorm(width, elementwise_affine=False), nn.Linear(width, classes)

    def forward(self, x: Tensor, keys: Tensor | None = None) -> tuple[Tensor, None]:
        """(logits [B, n, C] of states [B, n, D], None: the head says nothing of the picture as a whole)."""
        return self.out(self.norm(x)), None

    def macs(self, tokens: Tensor) -> Tensor:
        """Multiply-adds [B] on so many tokens [B]."""
        return tokens * weights_of(self)

    @staticmethod
    def probabilities(logits: Tensor, presence: Tensor | None) -> Tensor:
        """[B, n, C]"""
        return logits.float().softmax(-1)


class MaskHead(nn.Module):
    """A query for each class reads the tokens; how it looks at them is its mask. The probability is presence times mask.

    Zhang et al. 2022, "SegViT", https://arxiv.org/abs/2210.05844 (the attention-to-mask head), as DToP uses it.

    >>> logits, presence = MaskHead(16, 3, heads=2)(torch.zeros(1, 5, 16))
    >>> logits.shape, presence.shape
    (torch.Size([1, 5, 3]), torch.Size([1, 3, 2]))
    """

    def __init__(self, width: int, classes: int, heads: int = 6, layers: int = 3):
        super().__init__()
        c = width // 2
        if c % heads:
            raise SecateurError(
                f"half of a width of {width} isn't divided by {heads} heads",
                where="MaskHead",
                fix="other heads",
            )
        self.project, self.norm = nn.Linear(width, c), nn.LayerNorm(c)
        self.queries = nn.Parameter(torch.randn(classes, c) * 0.02)
        self.layers = nn.ModuleList(_Layer(c, heads) for _ in range(layers))
        self.presence = nn.Linear(c, 2)

    def forward(self, x: Tensor, keys: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(mask logits [B, n, C], presence logits [B, C, 2], there and not) of states [B, n, D]; keys bool [B, n]: what is read."""
        tokens, q = self.norm(self.project(x)), self.queries.expand(len(x), -1, -1)
        for layer in self.layers:
            q, looks = layer(q, tokens, keys)
        return looks.mT, self.presence(q)

    def macs(self, tokens: Tensor) -> Tensor:
        """Multiply-adds [B] on so many tokens [B]; what the queries cost among themselves doesn't depend on them."""
        classes, c = self.queries.shape
        layers = len(self.layers)
        each = weights_of(self.project) + layers * (2 * c * c + 2 * classes * c)
        return tokens * each + layers * (14 * c * c + 2 * classes * c) * classes + 2 * c * classes

    @staticmethod
    def probabilities(logits: Tensor, presence: Tensor | None) -> Tensor:
        """[B, n, C]"""
        assert presence is not None
        return presence.float().softmax(-1)[:, None, :, 0] * logits.float().sigmoid()


class _Layer(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.own, self.to_q = (
            nn.MultiheadAttention(width, heads, 0.1, batch_first=True),
            nn.Linear(width, width),
        )
        self.to_k, self.to_v, self.out = (nn.Linear(width, width) for _ in range(3))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))
        self.drop = nn.Dropout(0.1)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.ReLU(), nn.Linear(4 * width, width))

    def forward(self, q: Tensor, tokens: Tensor, keys: Tensor | None) -> tuple[Tensor, Tensor]:
        """(queries [B, C, c], what they look at: mean of the heads' logits [B, C, n])."""
        q = self.norms[0](q + self.own(q, q, q, need_weights=False)[0])
        a, k, v = (
            f(x).unflatten(2, (self.heads, -1)).transpose(1, 2)
            for f, x in ((self.to_q, q), (self.to_k, tokens), (self.to_v, tokens))
        )
        looks = a @ k.mT / a.shape[-1] ** 0.5  # [B, heads, C, n]
        seen = looks if keys is None else looks.masked_fill(~keys[:, None, None], -torch.inf)
        mixed = (self.drop(seen.softmax(-1)) @ v).transpose(1, 2).flatten(2)
        q = self.norms[1](q + self.out(mixed))
        return self.norms[2](q + self.mlp(q)), looks.mean(1)


def on_living(head: nn.Module, x: Tensor, alive: Tensor, masked: bool) -> tuple[Tensor, Tensor | None]:
    """What a head says of the patches bool [B, n] that are alive: ([B, n, C], presence). What stands at the others means nothing."""
    if bool(alive.all()):
        return head(x)
    seen = readable(alive)
    if masked:
        return head(x, seen)
    index, valid = pack(seen, right=True)
    logits, presence = head(gather_columns(x, index), valid)
    return put_columns(logits.new_zeros(*x.shape[:2], logits.shape[-1]), logits, index, valid), presence


class Segmenter(nn.Module):
    """A transformer as it comes from its library, and a head behind each of the blocks `stages`, the last of which answers.

    >>> vit = timm.create_model("vit_tiny_patch16_224", num_classes=0)  # doctest: +SKIP
    >>> net = Segmenter(vit, [TokenHead(192, 2) for _ in range(3)], stages=(3, 7, 11))  # doctest: +SKIP
    >>> net(torch.zeros(1, 3, 224, 224)).shape  # doctest: +SKIP
    torch.Size([1, 2, 224, 224])

    stages: numbers of blocks, from 0, ascending; the last is the last block. The earlier heads are for methods that let patches go.
    blocks, prefix: of a transformer of your own, the name of its list of blocks, and how many tokens stand before the patches.
    Raises `SecateurError` for a network that isn't a plain vision transformer, and heads that don't fit its blocks.
    """

    def __init__(
        self,
        backbone: nn.Module,
        heads: Sequence[nn.Module],
        stages: Sequence[int],
        blocks: str = "",
        prefix: int = 0,
    ):
        super().__init__()
        if not blocks:
            family = family_of(backbone)
            if family.layout is not None:
                raise SecateurError("it isn't a vision transformer", where="Segmenter", fix="give its tower")
            try:
                found, prefix = family.blocks(backbone), family.prefix(backbone)
            except AttributeError as error:
                raise _no_blocks("its blocks aren't where they are in others of its kind") from error
            blocks = next(name for name, module in backbone.named_modules() if module is found)
        self.backbone, self.heads, self.stages = backbone, nn.ModuleList(heads), tuple(stages)
        self.path, self.prefix = blocks, prefix
        if not isinstance(dict(backbone.named_modules()).get(blocks), nn.ModuleList | nn.Sequential):
            raise _no_blocks(f"it has no list of blocks named {blocks!r}")
        depth = len(self.blocks)
        ascending = list(self.stages) == sorted(set(self.stages)) and self.stages[:1] >= (0,)
        if not ascending or self.stages[-1] != depth - 1 or len(heads) != len(self.stages):
            raise SecateurError(
                f"{len(heads)} heads behind blocks {self.stages} of 0..{depth - 1}",
                where="Segmenter",
                fix=f"a head for each stage, in order, the last behind block {depth - 1}",
            )

    @property
    def blocks(self) -> Sequence[nn.Module]:
        return self.backbone.get_submodule(self.path)  # type: ignore[return-value]

    def forward(self, x: Tensor) -> Tensor:
        """Pictures [B, 3, H, W] -> [B, C, H, W]: class logits of a `TokenHead`, probabilities of a `MaskHead`."""
        seen: list[Tensor] = []
        hook = self.blocks[-1].register_forward_hook(lambda block, args, out: seen.append(out))
        try:
            self.backbone(x)
        finally:
            hook.remove()
        logits, presence = self.heads[-1](seen[0][:, self.prefix :])
        return self.enlarged(logits, presence, x)

    def enlarged(self, logits: Tensor, presence: Tensor | None, x: Tensor) -> Tensor:
        """What a head said of n patches [B, n, C], for every pixel of pictures x: [B, C, H, W]."""
        height, width = x.shape[-2:]
        rows = round((logits.shape[1] * height / width) ** 0.5)
        if rows * (logits.shape[1] // rows) != logits.shape[1]:
            raise SecateurError(
                f"{logits.shape[1]} patches are no grid of a picture of {height} x {width}", where="Segmenter"
            )
        values: Any = logits if presence is None else self.heads[-1].probabilities(logits, presence)  # type: ignore[operator]
        grid = values.mT.unflatten(2, (rows, -1))
        return F.interpolate(grid.float(), (height, width), mode="bilinear", align_corners=False)


def _no_blocks(what: str) -> SecateurError:
    return SecateurError(
        what, where="Segmenter", fix="name them and say how many tokens stand in front: blocks=, prefix="
    )
