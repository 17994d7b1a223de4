"""LVLM_CSP: a few tokens in the first layers, all in the middle, and in the last those that [SEG] attends to.

"LVLM_CSP: Accelerating Large Vision Language Models via Clustering, Scattering, and Pruning for Reasoning Segmentation", 2025,
https://arxiv.org/abs/2504.10854. Spec: lvlm-csp.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from secateur.errors import SecateurError
from secateur.method import register
from secateur.taxonomy import record
from secateur.tokens.counts import amount_of
from secateur.tokens.grid import nearest
from secateur.tokens.instances import evenly, instances_of
from secateur.tokens.method import Facts, Stage, TokenMethod
from secateur.tokens.question import last_column
from secateur.tokens.select import strided, top_per_row
from secateur.tokens.state import Reduction, TokenSets


@register
@dataclass
class LvlmCsp(TokenMethod):
    """Clustering, scattering, pruning: layers 0 to l1 see N_c tokens, l1 to l2 all, the rest those that [SEG] attends to.

    >>> with secateur.attach(vlm, "lvlm-csp", target="12.5%", clusters="25%") as attached:  # doctest: +SKIP
    ...     vlm.generate(**inputs)

    The target is N_p: the share of an image's tokens, or their number, that layers from l2 on see; `clusters` is N_c, said the
    same way. Tokens that aren't chosen are parked before layer 0 and return before layer l1, at their own positions.
    `choose`: "uniform", every floor(N / N_c)-th token; "random"; "cls", those that CLS attends to in the block that feeds the
    projector; "seg", evenly from each instance of `attach(..., given={"instances": [masks for each row]})`, bool [instances, tokens of
    the row], the background being one more. `reenter`: a token returns as it was embedded, or with what its nearest chosen
    token was changed by ("delta"). `seg`: the number of the [SEG] token, whose last place in the prompt ranks the tokens; a prompt
    without it is refused. Without `seg` the last prompt token ranks them, as it must where [SEG] is yet to be written.

    Models whose first layers add visual features begin behind these. Reconstructed: N_c, N_p, l1 and l2 (16 and 22 of 32
    layers, a quarter and an eighth of the tokens: 65 % less), the state in which tokens return, quotas that don't add up, places
    within an instance.
    """

    clusters: str = field(
        default="25%", metadata={"help": "tokens of each image in the first layers: a share, or tokens=64"}
    )
    l1: int | None = field(
        default=None, metadata={"help": "the first layer that sees all; none: 16 of 32, scaled", "min": 0}
    )
    l2: int | None = field(
        default=None,
        metadata={"help": "the first layer that sees what is left; none: 22 of 32, scaled", "min": 1},
    )
    choose: str = field(
        default="uniform",
        metadata={
            "help": "which tokens stand for the others",
            "choices": ("uniform", "random", "cls", "seg"),
        },
    )
    reenter: str = field(
        default="embedding",
        metadata={"help": "the state in which tokens return", "choices": ("embedding", "delta")},
    )
    seg: int | None = field(
        default=None, metadata={"help": "number of the [SEG] token; none: the last of the prompt", "min": 0}
    )
    scope: ClassVar[str] = "image"
    positions: ClassVar[str] = "original"

    info = record("lvlm-csp")

    def stages(self, facts: Facts) -> list[Stage]:
        start, depth = facts.first_layer, facts.layers
        l1, l2 = self.l1, self.l2
        if l1 is None or l2 is None:
            usual = facts.spread((start, 16, 22), of=32)[1:] if start else facts.spread((16, 22), of=32)
            l1, l2 = (usual[0] if l1 is None else l1), (usual[1] if l2 is None else l2)
        if not l1 < l2 <= depth or 0 < l1 <= start:
            raise SecateurError(
                f"l1={l1} and l2={l2} aren't in order in a model of {depth} layers",
                where=self.name,
                fix=f"l1 of 0, or of {start + 1} or more, below l2 of {depth} at most",
            )
        block, entry, last = f"encoder:{facts.feature_block}", f"layer:{start}:entry", f"layer:{l2 - 1}"
        stages = []
        if l1:
            keep = amount_of(self.clusters, "clusters")
            read = (block,) if self.choose == "cls" else ()
            stages.append(Stage(f"layer:{start}", partial(self.cluster, keep), read, keep=keep, parks=True))
            read = (entry,) if self.reenter == "delta" else ()
            stages.append(Stage(f"layer:{l1}", partial(self.scatter, entry), read, keep=1.0, returns=True))
        if l2 < depth:
            stages.append(Stage(f"layer:{l2}", partial(self.prune, last), (last,)))
        return stages or [Stage("input", lambda sets: sets.valid)]

    def cluster(self, keep: float, sets: TokenSets) -> Tensor:
        """The tokens that the first layers see."""
        if isinstance(keep, int) and bool((sets.total < keep).any()):
            raise SecateurError(
                f"{keep} clusters are more than the {int(sets.total.min())} tokens of an image",
                where=self.name,
                fix='a smaller number, or a share such as clusters="25%"',
            )
        n = sets.valid.shape[1]
        if self.choose == "uniform":
            chosen = strided(sets.count, sets.keep, n)
        elif self.choose == "cls":
            chosen = top_per_row(
                sets.attention(f"encoder:{sets.facts.feature_block}", rows="cls"), sets.keep, sets.valid
            )
        elif self.choose == "random":
            drawn = torch.rand(sets.valid.shape, generator=sets.generator).to(sets.device)
            chosen = top_per_row(drawn, sets.keep, sets.valid)
        else:
            chosen = torch.zeros_like(sets.valid)
            for one, instance, valid, count in zip(
                chosen, instances_of(sets, self.name), sets.valid, sets.keep.tolist()
            ):
                one[valid] = evenly(instance[valid], count)
        sets.carried["chosen"] = chosen.float()
        return chosen

    def scatter(self, entry: str, sets: TokenSets) -> Tensor | Reduction:
        """All tokens, those that return as they were embedded or with the change of their nearest."""
        chosen = (sets.carried["chosen"] == 1) & sets.valid
        if self.reenter == "embedding" or torch.equal(chosen, sets.valid):
            return sets.valid
        change = (sets.features - sets.hidden(entry)).masked_fill(~chosen[..., None], 0)
        near = nearest(sets.grid_row, sets.grid_col, chosen, (sets.frame_of, sets.crop_of))
        moved = sets.features + change.gather(1, near[..., None].expand_as(change))
        index = Reduction.from_mask(sets.valid).index
        states = torch.where(chosen[..., None], sets.features, moved)
        return Reduction(index, states[:, : index.shape[1]].masked_fill((index < 0)[..., None], 0))

    def prune(self, last: str, sets: TokenSets) -> Tensor:
        """The tokens that [SEG] attends to most in the layer before."""
        if self.seg is None:
            return top_per_row(sets.attention(last, rows="last"), sets.keep, sets.valid)
        rows = last_column(sets, self.seg, self.name)
        return top_per_row(sets.attention(last, rows=rows), sets.keep, sets.valid)
