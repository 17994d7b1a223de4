"""VLA-Pruner: what the words look at while they are read, and what the actions looked at in the last steps.

Liu et al. 2025, "VLA-Pruner: Temporal-Aware Dual-Level Visual Token Pruning for Efficient Vision-Language-Action
Inference", https://arxiv.org/abs/2511.16449. Spec: vla-pruner.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import ClassVar

import torch
from torch import Tensor

from secateur.errors import SecateurError, choose
from secateur.method import register
from secateur.taxonomy import record
from secateur.tokens.greedy import cosine_distance, max_min
from secateur.tokens.method import Facts, Memory, Stage, TokenMethod
from secateur.tokens.select import top_per_row
from secateur.tokens.state import TokenSets

ENTRY = "layer:0:entry"


@register
@dataclass
class VLAPruner(TokenMethod):
    """The tokens that the prompt attends to and those that recent actions attended to, thinned to the farthest of both.

    >>> with secateur.attach(policy, "vla-pruner", target="25%") as attached:  # doctest: +SKIP
    ...     for episode in episodes:
    ...         attached.reset()
    ...         for inputs in episode:
    ...             policy.generate(**inputs, max_new_tokens=7)

    A run over pictures is a control step, and the words it writes are the action. In the first `window` steps of an episode
    everything stays; without `attached.reset()` an episode begins with the memory of the one before. All pictures of a
    row compete. k: the first layer that sees fewer tokens; layer k - 1 ranks them by the mean attention of all prompt
    rows (`prefill`: "all", as in the paper, "text" or "last", which the released code also has). The action's criterion
    is the attention of the last prompt row and the written words, in the later half of the layers (`layers`: "half";
    "released": layer 15 of 32), a sum over the last steps with weights gamma, gamma^2, ... from the newest on. decay:
    "paper"; "released" gives the oldest the largest weight, as the released code does. carry: a token that had left keeps
    its last value, rather than 0, with which it comes back by the prompt's criterion alone. criteria: "both", or one
    alone, for comparison.
    The released layers (`fastv_forward`) with the weights of random models, one picture a row, and random histories that
    were smoothed as released kept the same tokens as decay "released" in 40 of 40, with logits to 1e-6; the release rounds
    the smoothed history to bfloat16 before it ranks, which was left out.
    """

    k: int = 3
    window: int = 3
    gamma: float = 0.8
    decay: str = field(default="paper", metadata={"choices": ("paper", "released")})
    prefill: str = field(default="all", metadata={"choices": ("all", "text", "last")})
    layers: str = field(default="half", metadata={"choices": ("half", "released")})
    carry: bool = False
    criteria: str = field(default="both", metadata={"choices": ("both", "prefill", "action")})
    scope: ClassVar[str] = "row"
    positions: ClassVar[str] = "original"

    info = record("vla-pruner")

    def __post_init__(self) -> None:
        for option in fields(self):
            if "choices" in option.metadata:
                choose(
                    getattr(self, option.name), option.metadata["choices"], what=option.name, where=self.name
                )
        if self.window < 1:
            raise SecateurError(f"{self.window} steps are no memory", where="window", fix="give 1 or more")
        if not 0 < self.gamma <= 1:
            raise SecateurError(f"{self.gamma} is outside 0..1", where="gamma", fix="such as 0.8")

    def stages(self, facts: Facts) -> list[Stage]:
        return [Stage(f"layer:{self.k}", self.select, (f"layer:{self.k - 1}", ENTRY))]

    def memory(self, facts: Facts) -> Memory:
        half = tuple(range(facts.layers // 2, facts.layers))
        layers = half if self.layers == "half" else (facts.layer(15, of=32),)
        return Memory(layers, self.window, carry=self.carry)

    def select(self, sets: TokenSets) -> Tensor:
        assert sets.history is not None
        ready = ~sets.history[:, 0].isnan().any(1)  # [S] the window is full
        prompt = sets.attention(f"layer:{self.k - 1}", rows=self.prefill)
        action = smoothed(sets.history, self.gamma, self.decay).nan_to_num()
        best = [top_per_row(scores, sets.keep, sets.valid) for scores in (prompt, action)]
        if self.criteria != "both":
            chosen = best[self.criteria == "action"]
        else:
            both = best[0] | best[1]
            distance = cosine_distance(sets.hidden(ENTRY), sets.valid)
            chosen = max_min((distance + distance.mT) / 2, sets.keep, both).mask(both.shape[1])
        return torch.where(ready[:, None], chosen, sets.valid)


def smoothed(history: Tensor, gamma: float, decay: str) -> Tensor:
    """[S, w, n] steps, the newest last -> [S, n] their weighted sum, divided by what it sums to where that isn't 0.

    >>> smoothed(torch.tensor([[[1.0, 0.0], [0.0, 1.0]]]), 0.5, "paper")
    tensor([[0.3333, 0.6667]])
    """
    steps = history.shape[1]
    back = (
        torch.arange(steps, 0, -1, device=history.device)
        if decay == "paper"
        else torch.arange(steps, device=history.device)
    )
    total = (history * (gamma**back)[:, None]).sum(1)
    whole = total.sum(1, keepdim=True)
    return total / torch.where(whole == 0, 1, whole)
