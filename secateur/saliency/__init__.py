"""Saliency: which places of a picture a class comes from, in any network, as a map and as a picture."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateur.errors import SecateurError
from secateur.method import list_methods, make_method, method_class
from secateur.saliency.maps import one_step, resize, unit_range
from secateur.saliency.method import SaliencyMethod
from secateur.saliency.picture import overlay, save_png
from secateur.saliency.relevance import COMPOSITES, Composite, propagate
from secateur.utils.screen import Screen

__all__ = [
    "COMPOSITES",
    "Composite",
    "Map",
    "SaliencyMethod",
    "as_saliency_method",
    "class_sensitivity",
    "propagate",
    "saliency",
    "saliency_methods",
]


@dataclass(repr=False)
class Map(Screen):
    """What `saliency` gives: `values` [H, W] (or [N, H, W]), float32, larger where more comes from; signed for some kinds.

    >>> found = secateur.saliency(model, image)  # doctest: +SKIP
    >>> found.save("map.png", image)  # doctest: +SKIP

    `target`: the class asked for, or one each. `layers`: those read. `attribution`: of kinds that look at single pixels,
    [C, H, W] (or [N, C, H, W]), signed; `additive` where its numbers are parts of the logit.
    """

    values: Tensor
    method: str
    target: int | list[int]
    layers: tuple[str, ...] = ()
    attribution: Tensor | None = None
    hyperparameters: dict[str, Any] = dataclasses.field(default_factory=dict)
    additive: bool = False

    def unit(self) -> Tensor:
        """The values of each map from 0 to 1; a constant one is all zeros."""
        return unit_range(self.values if self.values.dim() == 3 else self.values[None]).reshape(
            self.values.shape
        )

    def overlay(self, image: Tensor) -> Tensor:
        """The map in colour over its picture, uint8 [H, W, 3]. image: [3, H, W] or [1, 3, H, W], in any range."""
        if self.values.dim() != 2 and len(self.values) != 1:
            raise SecateurError(
                f"there are {len(self.values)} maps", where="overlay", fix="ask for one picture's map"
            )
        return overlay(self.values.reshape(self.values.shape[-2:]), image)

    def save(self, path: str | Path, image: Tensor) -> None:
        """`overlay` as a PNG file, written beside and renamed."""
        save_png(self.overlay(image), path)


def saliency_methods() -> list[str]:
    """The names of the methods that draw maps.

    >>> "normgrad" in saliency_methods()
    True
    """
    return [name for name in list_methods() if issubclass(method_class(name), SaliencyMethod)]


def as_saliency_method(method: str | SaliencyMethod, **settings: Any) -> SaliencyMethod:
    """A method that draws maps, by name and hyperparameters.

    >>> as_saliency_method("grad-cam", layers="last")
    GradCam(layers='last')

    Raises `SecateurError` for an unknown name, hyperparameter or value, and for a method that removes something.
    """
    chosen = make_method(method, **settings)
    if not isinstance(chosen, SaliencyMethod):
        raise SecateurError(
            f"{chosen.name} draws no map",
            where="saliency",
            fix=f"one of {', '.join(saliency_methods())}",
        )
    return chosen


def saliency(
    model: nn.Module,
    image: Tensor,
    method: str | SaliencyMethod = "normgrad",
    target: Any = None,
    *,
    meta: float = 0.0,
    blur: float = 0.0,
    **settings: Any,
) -> Map:
    """Where in the picture the logit of a class comes from.

    >>> found = secateur.saliency(resnet, image, method="normgrad", target=281, layers="all")  # doctest: +SKIP
    >>> found.values.shape  # doctest: +SKIP
    torch.Size([224, 224])

    Parameters
    ----------
    image: [C, H, W], or [N, C, H, W] for a map each; as the model takes it (normalised), on any device.
    method: the name of a map (`saliency_methods()` lists them), or one with its hyperparameters.
    target: the class, or one for each picture; None: the likeliest.
    meta: learning rate of a step of SGD towards the class before the map is made (0.0025 in the paper), which makes maps
        more particular to their class; negative: away from it. The model's weights come back.
    blur: sigma of a Gaussian over the map, as a share of the longer side (0.02 suits maps of single pixels).
    settings: hyperparameters of the method: layers, contribution, reduction, composite, ...

    One forward and one backward in eval mode. Modes, hooks, `requires_grad`, `.grad` and weights are left as they were.
    Raises `SecateurError`: a picture that isn't one or holds NaN, a class that isn't one, a map that is zero everywhere
    because nothing in the picture speaks for the class, no convolution to read, an operation without a rule.
    """
    chosen = as_saliency_method(method, **settings)
    if not isinstance(model, nn.Module):
        raise SecateurError(f"got a {type(model).__name__}", where="model", fix="pass a torch.nn.Module")
    pictures = _as_pictures(image)
    if meta:
        parts = []
        for index, one in enumerate(pictures):
            own = (
                target[index] if isinstance(target, Tensor | list | tuple) and len(target) > index else target
            )
            with one_step(model, one[None], own, meta) as targets:
                parts.append(chosen.draw(model, one[None], targets))
        values = torch.cat([resize(part.values, pictures.shape[2:]) for part in parts])
        targets, layers = torch.cat([part.targets for part in parts]), parts[0].layers
        each = [part.attribution for part in parts if part.attribution is not None]
        attribution, additive = torch.cat(each) if each else None, parts[0].additive
    else:
        found = chosen.draw(model, pictures, target)
        values, targets, layers = resize(found.values, pictures.shape[2:]), found.targets, found.layers
        attribution, additive = found.attribution, found.additive
    if blur:
        values = _blurred(values, blur * max(pictures.shape[2:]))
    for index, one in enumerate(values):
        if not torch.isfinite(one).all():
            raise SecateurError("the map holds NaN or infinite values", where=chosen.name, fix="use float32")
        if not one.any():
            which = f" {index}" if len(values) > 1 else ""
            raise SecateurError(
                f"the map is zero everywhere: nothing in picture{which} speaks for class {int(targets[index])}",
                where=chosen.name,
                fix="ask for a class that the picture shows, or leave target out for the likeliest",
            )
    single = image.dim() == 3
    listed = targets.tolist()
    return Map(
        values=values[0] if single else values,
        method=chosen.name,
        target=listed[0] if single else listed,
        layers=layers,
        attribution=attribution[0] if single and attribution is not None else attribution,
        hyperparameters={**chosen.hyperparameters, **({"meta": meta} if meta else {})},
        additive=additive,
    )


def class_sensitivity(
    model: nn.Module, image: Tensor, method: str | SaliencyMethod = "normgrad", **settings: Any
) -> float:
    """Spearman's correlation over pixels of the maps of the most and the least likely class: 1 is blind to the class.

    >>> class_sensitivity(resnet, image, "grad-cam")  # doctest: +SKIP

    image: [C, H, W]. NaN where a map is constant. Rebuffi et al. 2020, https://arxiv.org/abs/2004.02866.
    """
    from scipy.stats import spearmanr

    from secateur.saliency.record import record

    logits = record(model, _as_pictures(image)[:1]).logits[0]
    maps = []
    for target in (int(logits.argmax()), int(logits.argmin())):
        try:
            maps.append(saliency(model, image, method, target, **settings).values.flatten().cpu().numpy())
        except SecateurError as error:
            if "zero everywhere" not in str(error):
                raise
            return float("nan")
    return float(spearmanr(*maps).statistic)


def _as_pictures(image: Tensor) -> Tensor:
    if not isinstance(image, Tensor) or image.dim() not in (3, 4) or not image.numel():
        what = f"a tensor {tuple(image.shape)}" if isinstance(image, Tensor) else f"a {type(image).__name__}"
        raise SecateurError(f"{what} is no picture", where="image", fix="give [C, H, W] or [N, C, H, W]")
    if not image.is_floating_point():
        raise SecateurError(
            f"its numbers are {str(image.dtype).removeprefix('torch.')}",
            where="image",
            fix="give floats, normalised as the model wants them",
        )
    if not torch.isfinite(image).all():
        raise SecateurError("it holds NaN or infinite values", where="image", fix="check how it was read")
    return image if image.dim() == 4 else image[None]


def _blurred(values: Tensor, sigma: float) -> Tensor:
    reach = max(1, round(3 * sigma))
    at = torch.arange(-reach, reach + 1, device=values.device, dtype=values.dtype)
    kernel = torch.exp(-(at**2) / (2 * sigma**2))
    kernel = kernel / kernel.sum()
    reach = min(reach, min(values.shape[1:]) - 1)
    kernel = kernel[len(kernel) // 2 - reach : len(kernel) // 2 + reach + 1]
    padded = torch.nn.functional.pad(values[:, None], (reach,) * 4, mode="reflect")
    rows = torch.nn.functional.conv2d(padded, kernel[None, None, :, None])
    return torch.nn.functional.conv2d(rows, kernel[None, None, None, :])[:, 0] / kernel.sum() ** 2
