"""What one architecture's words attend to, layer by layer, as a small JSON file: where visual tokens can leave, and how many.

A reconstruction of the offline analysis of AdaToken-3D (https://arxiv.org/abs/2505.12782). Spec: adatoken-3d.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from secateur.errors import SecateurError, choose
from secateur.tokens.attach import attach
from secateur.tokens.state import TokenSets
from secateur.utils.files import atomic_write_json
from secateur.utils.progress import bar
from secateur.utils.schema import Count, Entry, Size, parse, read_object

Share = Annotated[float, Field(ge=0, le=1 + 1e-6)]
POINTS = 20
"""Parts of the axis of the curves that a file keeps."""
FIX = "make it again with secateur.tokens.profile.profile_attention"


class Profile(Entry):
    """Attention from probe words to visual tokens, averaged over prompts. Layers count from 0.

    >>> profile.gate, profile.keep  # doctest: +SKIP
    (2, [0.8, 0.7, 0.4, 0.4])
    """

    model: str
    """The class that was profiled."""
    layers: Size
    prompts: Size
    probe: Literal["last", "text"]
    tau: Annotated[float, Field(gt=0, le=1)]
    mass: list[Share]
    """The share of its attention that a layer gives to all visual tokens together."""
    stability: list[Annotated[float, Field(ge=-1 - 1e-6, le=1 + 1e-6)]]
    """Rank correlation of a layer's shares with the mean of all deeper ones; one fewer than layers."""
    curve: list[list[Share]]
    """What the largest 0, 5, ..., 100 % of the tokens hold of a layer's visual attention."""
    keep: list[Share]
    """The smallest share of the tokens that holds `tau` of it, here and in all deeper layers."""
    gate: Count | None
    """The first layer whose shares are stable: tokens can leave behind it. None: there is none."""
    withdraw: Count | None
    """The first layer behind it that hardly looks at visual tokens. None: there is none."""

    @model_validator(mode="after")
    def _fits(self) -> Profile:
        sizes = {"mass": self.layers, "stability": self.layers - 1, "curve": self.layers, "keep": self.layers}
        for name, size in sizes.items():
            if len(getattr(self, name)) != size:
                raise ValueError(f"{name} has {len(getattr(self, name))} entries, not {size}")
        if any(len(line) != POINTS + 1 for line in self.curve):
            raise ValueError(f"curve has a line that isn't of {POINTS + 1} points")
        if self.gate is not None and self.gate > self.layers - 2:
            raise ValueError(f"gate {self.gate} has no layer behind it")
        if self.withdraw is not None and not (
            self.gate is not None and self.gate < self.withdraw < self.layers
        ):
            raise ValueError(f"withdraw {self.withdraw} isn't behind the gate")
        return self

    def save(self, path: str | Path) -> None:
        """Writes it as JSON, beside and renamed."""
        atomic_write_json(path, self.model_dump())

    def check(self, where: str, **expected: Any) -> None:
        """Refuse the profile of another model or analysis: `profile.check("profile.json", layers=32, probe="last")`."""
        for name, value in expected.items():
            if getattr(self, name) != value:
                raise SecateurError(
                    f"it is of {name} {getattr(self, name)}, not {value}",
                    where=where,
                    fix="profile this model again",
                )

    @classmethod
    def load(cls, path: str | Path) -> Profile:
        """Reads what `save` wrote. Raises `SecateurError` with the place of what doesn't belong there."""
        return parse(cls, read_object(Path(path), FIX), str(path), FIX)


@torch.no_grad()
def profile_attention(
    model: nn.Module,
    prompts: Iterable[Mapping[str, Any]],
    *,
    probe: str = "last",
    tau: float = 0.95,
    stable: float = 0.6,
    quiet: float = 0.05,
) -> Profile:
    """The profile of a vision-language model, from a forward of each batch of prompts with pictures.

    >>> profile_attention(vlm, [processor(...) for ... in thirty_two]).save("profile.json")  # doctest: +SKIP
    >>> secateur.attach(vlm, "adatoken-3d", profile="profile.json")  # doctest: +SKIP

    Args:
        model: of at least two decoder layers.
        prompts: keyword arguments of its `forward`; about 32 rows in all. Rows without pictures don't count.
        probe: whose attention: the "last" token's of the prompt, or of all "text" after the pictures.
        tau: what `keep` must hold.
        stable: the rank correlation above which a layer's shares count as stable.
        quiet: the mass below which a layer hardly looks.

    Returns:
        The profile; a row's pictures are one pool.

    Raises:
        SecateurError: no prompt has a picture, the model has one layer, or `tau` isn't in 0..1.
    """
    choose(probe, ("last", "text"), what="probe", where="profile_attention")
    if not 0 < tau <= 1:
        raise SecateurError(f"tau={tau} isn't a share of the attention", where="profile_attention")
    depth = len(model.get_decoder().layers)  # type: ignore[operator]
    if depth < 2:
        raise SecateurError(
            "a model of one layer has no layer behind which tokens could leave", where="profile_attention"
        )
    last = depth - 1
    sites = [*(f"layer:{layer}" for layer in range(last)), f"layer:{last}:peek"]
    rows: list[Tensor] = []

    def read(sets: TokenSets) -> Tensor:
        found = torch.stack([sets.attention(site, rows=probe) for site in sites], 1)  # [S, layers, n]
        rows.extend(one[:, there].double().cpu() for one, there in zip(found, sets.valid))
        return sets.valid

    # half a target, so that the stage is asked; it keeps everything
    with (
        attach(model, read, at=f"layer:{last}", records=tuple(sites), scope="row", target=0.5),
        bar("profiling") as advance,
    ):
        for batch in prompts:
            model(**batch)
            advance(1)
    if not rows:
        raise SecateurError("no prompt has a picture", where="profile_attention", fix="about 32 of them")
    shares = [row / row.sum(1, keepdim=True).clamp(min=1e-300) for row in rows]
    mass = torch.stack([row.sum(1) for row in rows]).mean(0)
    stability = torch.stack([agreement(row) for row in shares]).mean(0)
    curve = torch.stack([held(row, max(row.shape[1] for row in rows)) for row in shares]).mean(0)
    enough = curve >= tau - 1e-6
    reached = torch.where(enough.any(1), enough.int().argmax(1) / (curve.shape[1] - 1), 1.0)
    gate = next((layer for layer, value in enumerate(stability.tolist()) if value > stable), None)
    behind = [] if gate is None else mass[gate + 1 :].tolist()
    return Profile(
        model=type(model).__name__,
        layers=depth,
        prompts=len(rows),
        probe=probe,  # type: ignore[arg-type]
        tau=tau,
        mass=mass.tolist(),
        stability=stability.tolist(),
        curve=at_points(curve, POINTS).tolist(),
        keep=reached.flip(0).cummax(0).values.flip(0).tolist(),
        gate=gate,
        withdraw=next((gate + 1 + i for i, value in enumerate(behind) if value < quiet), None)
        if gate is not None
        else None,
    )


def ranks(values: Tensor) -> Tensor:
    """Ranks along the last axis from 1, equal values sharing their mean: [..., n] -> [..., n] float64.

    >>> ranks(torch.tensor([3.0, 1.0, 3.0]))
    tensor([2.5000, 1.0000, 2.5000], dtype=torch.float64)
    """
    lower = (values[..., None, :] < values[..., None]).sum(-1)
    equal = (values[..., None, :] == values[..., None]).sum(-1)
    return lower + (equal + 1) / 2.0


def agreement(shares: Tensor) -> Tensor:
    """Rank correlation (Spearman) of each layer's shares with the mean of all deeper layers': [layers, n] -> [layers - 1]."""
    layers = len(shares)
    deeper = torch.stack([shares[layer + 1 :].mean(0) for layer in range(layers - 1)])
    one, two = (part - part.mean(1, keepdim=True) for part in (ranks(shares[:-1]), ranks(deeper)))
    return (one * two).sum(1) / (one.norm(dim=1) * two.norm(dim=1)).clamp(min=1e-12)


def held(shares: Tensor, points: int) -> Tensor:
    """What the largest 0/points, 1/points, ... of the tokens hold, linear between tokens: [layers, n] -> [layers, points + 1]."""
    sums = shares.sort(dim=1, descending=True).values.cumsum(1)
    return at_points(torch.nn.functional.pad(sums, (1, 0)), points)


def at_points(curve: Tensor, points: int) -> Tensor:
    """A curve [layers, n + 1] over 0..1, read at points + 1 places, linear in between."""
    steps = curve.shape[1] - 1
    place = torch.arange(points + 1, dtype=torch.float64) * steps / points
    low = place.floor().long().clamp(max=steps)
    high = (low + 1).clamp(max=steps)
    return curve[:, low] + (place - low) * (curve[:, high] - curve[:, low])
