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
from secateur.tokens.method import Facts, Stage, TokenMethod
from secateur.tokens.select import top_per_row
from secateur.tokens.state import Reduction, TokenSets


def strided(count: Tensor, keep: Tensor, n: int) -> Tensor:
    """bool [S, n]: places 0, step, 2 step, ... with a step of floor(count / keep), `keep` of them; both [S].

    >>> strided(torch.tensor([7]), torch.tensor([3]), 7).nonzero()[:, 1].tolist()
    [0, 2, 4]
    """
    place = torch.arange(n, device=count.device)
    step = (count // keep.clamp(min=1)).clamp(min=1)[:, None]
    return (place % step == 0) & (place // step < keep[:, None]) & (place < count[:, None])


def quotas(sizes: list[int], keep: int) -> list[int]:
    """How many of `keep` tokens each instance gets, by its size: one at least, all in all `keep`, or every token there is.

    >>> quotas([18, 9, 9], 10)
    [6, 2, 2]
    """
    total = sum(sizes)
    keep = min(keep, total)
    order = sorted(range(len(sizes)), key=lambda i: -sizes[i])
    taking_part = set(order[:keep])
    found = [max(1, keep * size // total) if i in taking_part else 0 for i, size in enumerate(sizes)]
    while sum(found) > keep:
        found[found.index(max(found))] -= 1
    while sum(found) < keep:
        for i in order:
            if found[i] < sizes[i] and sum(found) < keep:
                found[i] += 1
    return found


def of_instances(instance: Tensor, keep: int) -> Tensor:
    """bool [n]: the tokens that stand for instances, evenly along each; `instance` [n] says which each token belongs to."""
    members = [(instance == number).nonzero()[:, 0] for number in instance.unique().tolist()]
    chosen = torch.zeros(len(instance), dtype=torch.bool, device=instance.device)
    for mine, quota in zip(members, quotas([len(mine) for mine in members], keep)):
        if quota:
            chosen[
                mine[strided(torch.tensor([len(mine)]), torch.tensor([quota]), len(mine))[0].to(mine.device)]
            ] = True
    return chosen


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
                chosen, self.instances(sets), sets.valid, sets.keep.tolist()
            ):
                one[valid] = of_instances(instance[valid], count)
        sets.carried["chosen"] = chosen.float()
        return chosen

    def instances(self, sets: TokenSets) -> Tensor:
        """int64 [S, n]: the first of the given masks that a token is in; their number for the background."""
        masks = sets.given.get("instances")
        fix = 'attach(..., given={"instances": [bool [instances, tokens] for each row]})'
        if masks is None:
            raise SecateurError("there are no instances of the tokens", where=self.name, fix=fix)
        found = torch.zeros_like(sets.index)
        for one, row, index in zip(found, sets.row.tolist(), sets.index):
            mask = torch.as_tensor(masks[row]) if row < len(masks) else None
            if mask is None or mask.dim() != 2 or mask.shape[1] <= int(index.max()):
                raise SecateurError(
                    f"the instances of row {row} are "
                    + (
                        "missing"
                        if mask is None
                        else f"{list(mask.shape)}; it has {int(index.max()) + 1} tokens"
                    ),
                    where=self.name,
                    fix=fix,
                )
            mask = mask.bool().to(sets.device)[:, index.clamp(min=0)]
            background = torch.ones_like(mask[:1]) if len(mask) else mask.new_ones(1, len(index))
            one[:] = torch.cat([mask, background]).to(torch.uint8).argmax(0)
        return found

    def scatter(self, entry: str, sets: TokenSets) -> Tensor | Reduction:
        """All tokens, those that return as they were embedded or with the change of their nearest."""
        chosen = (sets.carried["chosen"] == 1) & sets.valid
        if self.reenter == "embedding" or torch.equal(chosen, sets.valid):
            return sets.valid
        change = (sets.features - sets.hidden(entry)).masked_fill(~chosen[..., None], 0)
        near = nearest(sets, chosen)
        moved = sets.features + change.gather(1, near[..., None].expand_as(change))
        index = Reduction.from_mask(sets.valid).index
        states = torch.where(chosen[..., None], sets.features, moved)
        return Reduction(index, states[:, : index.shape[1]].masked_fill((index < 0)[..., None], 0))

    def prune(self, last: str, sets: TokenSets) -> Tensor:
        """The tokens that [SEG] attends to most in the layer before."""
        if self.seg is None:
            return top_per_row(sets.attention(last, rows="last"), sets.keep, sets.valid)
        ids, there = sets.text("ids", of="query")
        columns = sets.text("columns", of="query")[0]
        place = torch.arange(ids.shape[1], device=ids.device)
        at = (
            torch.where((ids == self.seg) & there, place, -1).amax(1)
            if ids.shape[1]
            else sets.row.new_full((len(sets),), -1)
        )
        if bool((at < 0).any()):
            raise SecateurError(
                f"row {int(sets.row[at < 0][0])} has no token {self.seg} behind its last image",
                where=self.name,
                fix="put [SEG] into the prompt, or leave seg out: then the last token of the prompt ranks",
            )
        rows = columns.gather(1, at[:, None])
        return top_per_row(sets.attention(last, rows=rows), sets.keep, sets.valid)


def nearest(sets: TokenSets, chosen: Tensor) -> Tensor:
    """int64 [S, n]: the nearest chosen token on the grid, of the token's own frame and crop before others; ties: the first."""
    places = torch.stack([sets.grid_row, sets.grid_col], 2).double()
    apart = (places[:, :, None] - places[:, None]).square().sum(-1)
    other = (sets.frame_of[:, :, None] != sets.frame_of[:, None]) | (
        sets.crop_of[:, :, None] != sets.crop_of[:, None]
    )
    apart = apart + other * (apart.max() + 1)
    return apart.masked_fill(~chosen[:, None], torch.inf).argmin(2)
