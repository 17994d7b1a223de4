"""VidCom2: frames unlike the rest of a video keep more tokens, and of each frame those unlike frame and video.

Liu et al. 2025, "Video Compression Commander: Plug-and-Play Inference Acceleration for Video Large Language Models",
https://arxiv.org/abs/2505.14454. There is no sheet: the facts are those of the released code, xuyang-liu16/VidCom2 at 944a17d.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from secateur.method import register
from secateur.taxonomy import record
from secateur.tokens.greedy import directions
from secateur.tokens.method import TokenMethod
from secateur.tokens.select import quotas, top_per_group
from secateur.tokens.state import TokenSets


@register
@dataclass
class VidCom2(TokenMethod):
    """Tokens far from the mean of their frame and of the video; frames far from the video's mean have more of them.

    >>> with secateur.attach(vlm, "vidcom2", target="25%") as attached:  # doctest: +SKIP
    ...     vlm.generate(**inputs)

    Projected features, of which the half of the channels that vary least over the video, at length 1. A token's nearness to a mean
    is the sum of exp(-d^2 / 2a), d their distance, a = 1/8, 1/4, 1/2, 1, 2. A frame's tokens are kept at target x
    (1 + p - 1/frames), p = softmax(-mean nearness to the video / temperature); they are those with the least nearness to
    frame and video together. A video's tokens are one set, its newline tokens stay; a picture is a video of one frame.
    compat: "paper" (default) divides the target over the frames so that it is met; "code" rounds frame by frame, one token at least,
    so that a few more or fewer stay. A budget below about one token a frame leaves frames without any in the first.

    Checked: the release's selection, run on the features of random models with videos of two to six frames, chose the tokens
    that "code" chose for 200 of 200 videos (Qwen2.5-VL, LLaVA-OneVision; two in a batch, padded; 10 to 50 %).
    """

    temperature: float = field(default=0.01, metadata={"help": "of the softmax over frames", "above": 0})
    compat: str = field(
        default="paper",
        metadata={"help": "counts: paper (met), code (rounded by frame)", "choices": ("paper", "code")},
    )
    scope: ClassVar[str] = "image"
    positions: ClassVar[str] = "compact"
    no_budget: ClassVar[Mapping[str, str]] = {"frame": "it divides a video's tokens over the frames itself"}

    info = record("vidcom2")

    def select(self, sets: TokenSets) -> Tensor:
        kept = torch.zeros_like(sets.valid)
        frames = sets.image_of * (int(sets.frame_of.max()) + 1) + sets.frame_of
        for i, (count, share) in enumerate(zip(sets.count.tolist(), sets.asked_share.tolist())):
            kept[i, :count] = self.video(sets.features[i, :count], frames[i, :count], sets.keep[i], share)
        return kept

    def video(self, x: Tensor, frame: Tensor, keep: Tensor, share: float) -> Tensor:
        """One set: x [n, D], frame [n] -> bool [n]."""
        _, frame, sizes = frame.unique(return_inverse=True, return_counts=True)
        x = x.float()
        quiet = x.var(0, correction=0).argsort(stable=True)[: max(x.shape[1] // 2, 1)]
        rows = directions(x[:, quiet], eps=1e-12)
        to_video = nearness(rows, rows.mean(0))
        to_frame = nearness(rows, means(rows, frame, sizes)[frame])
        unlike = -means(to_video[:, None], frame, sizes)[:, 0]
        more = (unlike / self.temperature).softmax(0)
        scale = 1 + more - more.mean()
        if self.compat == "code":
            counts = (sizes * (share * scale).clamp(max=1)).round().long().clamp(min=1)
        else:
            weights = scale * sizes
            counts = quotas((weights / weights.sum())[None], keep[None], sizes[None])[0]
        return top_per_group(-(to_video + to_frame)[None], frame[None], counts[None])[0]


def means(values: Tensor, group: Tensor, sizes: Tensor) -> Tensor:
    """[n, C] values -> [groups, C] the mean of each group."""
    sums = values.new_zeros(len(sizes), values.shape[1]).index_add_(0, group, values)
    return sums / sizes[:, None]


def nearness(rows: Tensor, centre: Tensor) -> Tensor:
    """Gaussian nearness of each row [n, C] to a centre [C] or [n, C], summed over five widths: [n].

    >>> nearness(torch.tensor([[1.0, 0.0]]), torch.tensor([1.0, 0.0]))
    tensor([5.])
    """
    apart = ((rows - centre) ** 2).sum(-1)
    return torch.stack([(-apart / (2 * 2.0**power)).exp() for power in range(-3, 2)]).sum(0)
