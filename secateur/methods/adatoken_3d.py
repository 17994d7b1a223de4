"""AdaToken-3D: as many spatial tokens stay as hold most of the attention that the words give to space.

Zhang et al. 2025, "AdaToken-3D: Dynamic Spatial Gating for Efficient 3D Large Multimodal-Models Reasoning",
https://arxiv.org/abs/2505.12782. Spec: adatoken-3d. `secateur.tokens.profile` makes the profile of a model.
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
from secateur.tokens.counts import by_mass, ceils, floors
from secateur.tokens.method import Facts, Stage, TokenMethod
from secateur.tokens.profile import Profile
from secateur.tokens.reduce import best_of_cell
from secateur.tokens.select import top_per_row
from secateur.tokens.state import TokenSets


def gated(attention: Tensor, keep: Tensor) -> Tensor:
    """The soft form of the gate, for analysis: attention [..., n] to tokens that leave is 0, and isn't spread anew."""
    return attention * keep


@register
@dataclass
class AdaToken3D(TokenMethod):
    """The smallest set of a prompt's visual tokens that holds `tau` of layer k's visual attention stays behind it.

    >>> from secateur.tokens.profile import profile_attention
    >>> profile_attention(vlm, prompts).save("profile.json")  # doctest: +SKIP
    >>> with secateur.attach(vlm, "adatoken-3d", profile="profile.json") as attached:  # doctest: +SKIP
    ...     vlm.generate(**inputs)

    Without a target each prompt keeps its own count; with one exactly as many stay, by the same ranking. Layers count from
    0. The profile says which layer is the first whose ranking is that of the deeper ones (k, where none is given), how many
    each layer needs on average (`static`) and where the words hardly look any more (`withdraw`: all leave there). A
    profile without such a layer lets nothing leave. `voxel` and `given={"coordinates": ...}`, [tokens, 3] for each row in
    the order of its visual tokens, keep at least one token in every cube of that edge. All pictures of a row are one pool.

    Reconstructed: everything but the idea, from the abstract.
    """

    tau: float = field(
        default=0.95, metadata={"help": "share of the attention that stays", "above": 0, "max": 1}
    )
    profile: str = field(default="", metadata={"help": "JSON file of `profile_attention`"})
    k: int | None = field(
        default=None,
        metadata={"help": "the layer that gates, from 0; none: the profile's, or 3 of 32, scaled", "min": 0},
    )
    later: tuple[int, ...] = field(default=(), metadata={"help": "deeper layers that gate again", "min": 0})
    r_min: float = field(default=0.1, metadata={"help": "least share of the tokens", "min": 0, "max": 1})
    r_max: float = field(default=1.0, metadata={"help": "largest share of the tokens", "above": 0, "max": 1})
    probe: str = field(
        default="last",
        metadata={"help": "whose attention: the last word's or all", "choices": ("last", "text")},
    )
    static: bool = field(default=False, metadata={"help": "the profile's mean count for every prompt"})
    withdraw: bool = field(default=False, metadata={"help": "all leave where the profile says so"})
    voxel: float | None = field(
        default=None,
        metadata={"help": "edge of cubes that keep a token each, in units of the coordinates", "above": 0},
    )
    scope: ClassVar[str] = "row"
    positions: ClassVar[str] = "original"
    adaptive: ClassVar[bool] = True

    info = record("adatoken-3d")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.r_min > self.r_max:
            raise SecateurError(f"r_min={self.r_min:g} is above r_max={self.r_max:g}", where=self.name)
        if (self.static or self.withdraw) and not self.profile:
            raise SecateurError(
                "static and withdraw read a profile of the model",
                where=self.name,
                fix="profile=FILE, which secateur.tokens.profile.profile_attention makes",
            )

    def known(self, facts: Facts) -> Profile | None:
        """The profile, where there is one: of this depth, this probe and, for static counts, this tau."""
        if not self.profile:
            return None
        found = Profile.load(self.profile)
        found.check(
            self.profile, layers=facts.layers, probe=self.probe, **({"tau": self.tau} if self.static else {})
        )
        return found

    def stages(self, facts: Facts) -> list[Stage]:
        known = self.known(facts)
        first = self.k
        if first is None and known is not None and known.gate is None:
            return [Stage(f"layer:{facts.layers - 1}", self.nothing, keep=1.0)]
        if first is None:
            first = known.gate if known is not None else facts.spread((4,), of=32)[0] - 1
        assert first is not None
        gates = [first, *self.later]
        if gates != sorted(set(gates)) or gates[-1] > facts.layers - 2:
            raise SecateurError(
                f"gates behind layers {gates} of {facts.layers}",
                where=self.name,
                fix=f"ascending layers, {facts.layers - 2} at most",
            )
        stages = [Stage(f"layer:{k + 1}", partial(self.gate, k, known), (f"layer:{k}",)) for k in gates]
        end = known.withdraw if known is not None and self.withdraw else None
        if end is not None:
            stages = [stage for k, stage in zip(gates, stages) if k + 1 < end]
            stages.append(Stage(f"layer:{end}", lambda sets: torch.zeros_like(sets.valid), keep=1.0))
        return stages

    def nothing(self, sets: TokenSets) -> Tensor:
        if sets.target is not None:
            raise SecateurError(
                "the profile found no layer behind which tokens can leave",
                where=str(self.profile),
                fix="give k, or no target: then everything stays",
            )
        return sets.valid

    def gate(self, layer: int, known: Profile | None, sets: TokenSets) -> Tensor:
        mass = sets.attention(f"layer:{layer}", rows=self.probe)
        if sets.target is not None:
            counts = sets.keep
        elif self.static:
            assert known is not None
            counts = ceils(known.keep[layer] * sets.total)
        else:
            least, most = ceils(self.r_min * sets.total), floors(self.r_max * sets.total)
            counts = by_mass(mass, self.tau, sets.valid).clamp(min=least).clamp(max=most)
        kept = top_per_row(mass, counts.clamp(min=1), sets.valid)
        return kept if self.voxel is None else kept | self.alone(mass, kept, self.voxel, sets)

    def alone(self, mass: Tensor, kept: Tensor, edge: float, sets: TokenSets) -> Tensor:
        """[S, n]: the token of most mass of every cube that keeps none."""
        cubes = (sets.per_token("coordinates", 3) / edge).floor().long()
        groups = cubes.flatten(0, 1).unique(dim=0, return_inverse=True)[1].view_as(sets.index)
        held = torch.zeros(len(sets), int(groups.max()) + 1, dtype=torch.int64, device=sets.device)
        held.scatter_add_(1, groups, kept.long())
        return best_of_cell(mass, groups, sets.valid)[0] & (held.gather(1, groups) == 0)
