"""Maps of one picture: which places the logit of a class comes from. One class a map, its fields the hyperparameters.

Spec: normgrad, salient-relevance, lrp-pruning.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from secateur.errors import SecateurError, choose
from secateur.saliency.record import Record, as_targets, record, undisturbed
from secateur.saliency.regions import sr_map
from secateur.saliency.relevance import COMPOSITES, as_composite, plain, propagate
from secateur.stats.windows import logits_of

CONTRIBUTIONS = ("conv1", "conv3", "scaling", "bias")
REDUCTIONS = ("norm", "positive", "sum", "max")
COMBINE = ("product", "sum")


def contribution_map(
    x: Tensor, g: Tensor, contribution: str = "conv1", reduction: str = "norm", kernel: int = 3
) -> Tensor:
    """[N, H, W]: how much each place contributes to the gradient of an imaginary identity layer's weights.

    >>> x = torch.tensor([[1.0, 0, 2], [2, 1, -1]])[None, :, None]
    >>> g = torch.tensor([[0.5, 1, -1], [-1, 0, 2]])[None, :, None]
    >>> contribution_map(x, g)
    tensor([[[2.5000, 1.0000, 5.0000]]])

    x, g: activations and their gradients, [N, C, H, W]. contribution: of the identity as a 1 x 1 convolution (x gᵀ), as a
    convolution of size `kernel` (`conv3`), as a scaling (x g) or as a bias (g); reduction: its Frobenius norm, the
    norm of its positive part, its sum, or its greatest entry. conv1 + norm is NormGrad, scaling + positive selective
    NormGrad, scaling + sum the linear approximation, bias + max the largest gradient.

    Source: Rebuffi et al. 2020, https://arxiv.org/abs/2004.02866.
    """
    if contribution not in CONTRIBUTIONS or reduction not in REDUCTIONS:
        raise SecateurError(
            f"there is no contribution {contribution!r} with reduction {reduction!r}",
            where="normgrad",
            fix=f"one of {', '.join(CONTRIBUTIONS)} with one of {', '.join(REDUCTIONS)}",
        )
    x, g = x.float(), g.float()
    if contribution == "conv3":
        if kernel % 2 == 0:
            raise SecateurError(f"kernel {kernel} has no middle", where="normgrad", fix="give an odd size")
        # of the zero-padded neighbourhood only norms, sums and extremes over it are needed
        pad = kernel // 2

        def around(t: Tensor) -> Tensor:
            return F.avg_pool2d(t, kernel, 1, pad) * kernel**2

        def extreme(t: Tensor) -> Tensor:
            return F.max_pool2d(F.pad(t, (pad,) * 4), kernel, 1).amax(1)

        if reduction == "norm":
            return around(x.square().sum(1, keepdim=True)).squeeze(1).sqrt() * g.norm(dim=1)
        if reduction == "positive":
            up, down = (
                around(p.square().sum(1, keepdim=True)).squeeze(1) for p in (x.clamp(min=0), x.clamp(max=0))
            )
            return (up * g.clamp(min=0).square().sum(1) + down * g.clamp(max=0).square().sum(1)).sqrt()
        if reduction == "sum":
            return around(x.sum(1, keepdim=True)).squeeze(1) * g.sum(1)
        ends = extreme(x), -extreme(-x)
        return torch.stack([a * b for a in ends for b in (g.amax(1), g.amin(1))]).amax(0)
    if contribution == "conv1":
        if reduction == "norm":
            return x.norm(dim=1) * g.norm(dim=1)
        if reduction == "positive":
            up, down = x.clamp(min=0).norm(dim=1), x.clamp(max=0).norm(dim=1)
            return (
                (up * g.clamp(min=0).norm(dim=1)).square() + (down * g.clamp(max=0).norm(dim=1)).square()
            ).sqrt()
        if reduction == "sum":
            return x.sum(1) * g.sum(1)
        return torch.stack([a * b for a in (x.amax(1), x.amin(1)) for b in (g.amax(1), g.amin(1))]).amax(0)
    each = x * g if contribution == "scaling" else g
    if reduction == "norm":
        return each.norm(dim=1)
    if reduction == "positive":
        return each.clamp(min=0).norm(dim=1)
    return each.sum(1) if reduction == "sum" else each.amax(1)


def cam(x: Tensor, g: Tensor) -> Tensor:
    """[N, H, W]: Grad-CAM of activations and gradients, [N, C, H, W].

    Selvaraju et al. 2017, https://arxiv.org/abs/1610.02391.
    """
    return (x.float() * g.float().mean((2, 3), keepdim=True)).sum(1).clamp(min=0)


def unit_range(values: Tensor) -> Tensor:
    """[N, H, W], each map from 0 to 1; a constant one is all zeros.

    >>> unit_range(torch.tensor([[[1.0, 2.0, 3.0]]]))
    tensor([[[0.0000, 0.5000, 1.0000]]])
    """
    low, high = values.amin((1, 2), keepdim=True), values.amax((1, 2), keepdim=True)
    return torch.where(high > low, (values - low) / (high - low).clamp_min(torch.finfo(values.dtype).tiny), 0)


def combine(maps: Sequence[Tensor], weights: Sequence[float] | None = None, how: str = "product") -> Tensor:
    """Maps [N, H, W] of several layers as one: each in its unit range, then the product of powers or the weighted sum.

    >>> combine([torch.tensor([[[0, 0.5, 1]]]), torch.tensor([[[0.25, 1, 0.5]]])], (0.25, 0.75), "sum")
    tensor([[[0.0000, 0.8750, 0.5000]]])

    The largest of their sizes; weights are divided by their sum, uniform where there are none.
    Raises `SecateurError` for another `how` and a wrong number of weights.
    """
    if how not in COMBINE:
        raise SecateurError(f"there is no combination {how!r}", where="normgrad", fix=" or ".join(COMBINE))
    given = [1.0] * len(maps) if weights is None else list(weights)
    if len(given) != len(maps) or min(given) < 0 or not sum(given) > 0:
        raise SecateurError(
            f"{given} can't weigh {len(maps)} layers", where="weights", fix="one each, not negative"
        )
    size = max((m.shape[1:] for m in maps), key=lambda s: s.numel())
    maps = [unit_range(resize(m, size)) for m in maps]
    shares = [w / sum(given) for w in given]
    parts = torch.stack([m**w if how == "product" else m * w for m, w in zip(maps, shares)])
    return parts.prod(0) if how == "product" else parts.sum(0)


def resize(values: Tensor, size: Sequence[int]) -> Tensor:
    """[N, h, w] -> [N, *size], bilinear."""
    if tuple(values.shape[1:]) == tuple(size):
        return values
    return F.interpolate(values[:, None], tuple(size), mode="bilinear", align_corners=False)[:, 0]


def as_grid(x: Tensor, image: Tensor, name: str) -> Tensor:
    """Activations as [N, C, H, W]; tokens [N, tokens, C] go on the grid of patches, without leading extra tokens.

    Raises `SecateurError` where there is no such grid.
    """
    if x.dim() == 4:
        return x
    if x.dim() == 3:
        height, width = image.shape[2:]
        for extra in range(min(9, x.shape[1])):
            tokens = x.shape[1] - extra
            rows = round((tokens * height / width) ** 0.5)
            if rows and tokens % rows == 0 and rows * width == (tokens // rows) * height:
                return x[:, extra:].transpose(1, 2).unflatten(2, (rows, tokens // rows))
    raise SecateurError(
        f"its output {tuple(x.shape)} is no map of the picture",
        where=f"layer {name}",
        fix="name another layer",
    )


class GuidedMode(TorchFunctionMode):
    """Only positive gradients come back through activation functions (guided backpropagation).

    Springenberg et al. 2015, https://arxiv.org/abs/1412.6806. Smooth activations are treated like ReLU.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        found = func(*args, **(kwargs or {}))
        if plain(func) in ACTIVATIONS and isinstance(found, Tensor) and found.requires_grad:
            return _PositiveGradient.apply(found)
        return found


ACTIVATIONS = {
    *(
        F.relu,
        torch.relu,
        Tensor.relu,
        F.relu6,
        F.hardtanh,
        F.leaky_relu,
        F.elu,
        F.gelu,
        F.silu,
        F.hardswish,
        F.mish,
    ),
    *(torch.relu_, Tensor.relu_, F.selu, F.celu),
}


class _PositiveGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g.clamp(min=0)


# ---------------------------------------------------------------- the registry


@dataclass
class Found:
    """What a kind of map found: `values` [N, H, W] of any size, the classes it asked for, the layers it read, and for
    maps of single pixels the signed `attribution` [N, C, H, W]."""

    values: Tensor
    targets: Tensor
    layers: tuple[str, ...] = ()
    attribution: Tensor | None = None


MAPS: dict[str, type[Kind]] = {}


@dataclass
class Kind:
    """The base of all kinds of map."""

    name: ClassVar[str] = ""
    source: ClassVar[str] = ""

    def __init_subclass__(cls, name: str = "", source: str = "") -> None:
        if name:
            cls.name, cls.source = name, source
            MAPS[name] = cls

    def draw(self, model: nn.Module, image: Tensor, target: Any) -> Found:
        """image: [N, C, H, W]."""
        raise TypeError(f"{type(self).__name__} must define draw")


@dataclass
class NormGrad(Kind, name="normgrad", source="Rebuffi et al. 2020, arXiv 2004.02866"):
    """How much each place contributes to the gradient of an imaginary identity layer's weights."""

    contribution: str = field(
        default="conv1", metadata={"help": ", ".join(CONTRIBUTIONS), "choices": CONTRIBUTIONS}
    )
    reduction: str = field(default="norm", metadata={"help": ", ".join(REDUCTIONS), "choices": REDUCTIONS})
    kernel: int = field(default=3, metadata={"help": "size of the convolution of conv3"})
    layers: str | tuple[str, ...] = field(
        default="last",
        metadata={"help": "last, all (the end of every stage of convolutions), or names with commas"},
    )
    combine: str = field(
        default="product", metadata={"help": "of several layers: product or sum", "choices": COMBINE}
    )
    weights: tuple[float, ...] | None = field(
        default=None, metadata={"help": "of the layers, shallow to deep"}
    )

    def draw(self, model: nn.Module, image: Tensor, target: Any) -> Found:
        seen = record(model, image, target, as_names(self.layers))
        maps = [self.of(x, g) for x, g in grids(seen)]
        values = maps[0] if len(maps) == 1 else combine(maps, self.weights, self.combine)
        return Found(values, seen.targets, tuple(seen.activations))

    def of(self, x: Tensor, g: Tensor) -> Tensor:
        return contribution_map(x, g, self.contribution, self.reduction, self.kernel)


@dataclass
class SelectiveNormGrad(NormGrad, name="selective-normgrad", source="Rebuffi et al. 2020, arXiv 2004.02866"):
    """NormGrad that counts only what speaks for the class: the norm of the positive part of x g."""

    contribution: str = field(
        default="scaling", metadata={"help": ", ".join(CONTRIBUTIONS), "choices": CONTRIBUTIONS}
    )
    reduction: str = field(
        default="positive", metadata={"help": ", ".join(REDUCTIONS), "choices": REDUCTIONS}
    )


@dataclass
class LinearApproximation(
    NormGrad, name="linear-approximation", source="Rebuffi et al. 2020, arXiv 2004.02866"
):
    """The sum over channels of activation times gradient; signed."""

    contribution: str = field(
        default="scaling", metadata={"help": ", ".join(CONTRIBUTIONS), "choices": CONTRIBUTIONS}
    )
    reduction: str = field(default="sum", metadata={"help": ", ".join(REDUCTIONS), "choices": REDUCTIONS})


@dataclass
class GradCam(Kind, name="grad-cam", source="Selvaraju et al. 2017, arXiv 1610.02391"):
    """Channels weighted by their mean gradient, where the sum is positive."""

    layers: str | tuple[str, ...] = field(default="last", metadata={"help": "last, or the name of one layer"})

    def draw(self, model: nn.Module, image: Tensor, target: Any) -> Found:
        seen = record(model, image, target, as_names(self.layers))
        maps = [cam(x, g) for x, g in grids(seen)]
        return Found(maps[0] if len(maps) == 1 else combine(maps), seen.targets, tuple(seen.activations))


@dataclass
class Gradient(Kind, name="gradient", source="Simonyan et al. 2013, arXiv 1312.6034"):
    """The largest absolute gradient over the colours of a pixel."""

    times_input: bool = field(default=False, metadata={"help": "multiply the gradient with the pixel"})

    def draw(self, model: nn.Module, image: Tensor, target: Any) -> Found:
        seen = record(model, image, target, pixels=True)
        return self.of(seen)

    def of(self, seen: Record) -> Found:
        assert seen.input_gradient is not None
        each = seen.input_gradient.float()
        if self.times_input:
            each = each * seen.input.float()
        return Found(each.abs().amax(1), seen.targets, attribution=each)


@dataclass
class GuidedBackprop(Gradient, name="guided-backprop", source="Springenberg et al. 2015, arXiv 1412.6806"):
    """The gradient that passes only where it is positive behind every activation function."""

    def draw(self, model: nn.Module, image: Tensor, target: Any) -> Found:
        return self.of(record(model, image, target, pixels=True, mode=GuidedMode()))


@dataclass
class GuidedGradCam(Kind, name="guided-grad-cam", source="Selvaraju et al. 2017, arXiv 1610.02391"):
    """Guided backpropagation times Grad-CAM."""

    layers: str | tuple[str, ...] = field(default="last", metadata={"help": "last, or the name of one layer"})

    def draw(self, model: nn.Module, image: Tensor, target: Any) -> Found:
        places = GradCam(layers=self.layers).draw(model, image, target)
        pixels = GuidedBackprop().draw(model, image, places.targets)
        assert pixels.attribution is not None
        each = pixels.attribution * resize(places.values, image.shape[2:])[:, None]
        return Found(each.abs().amax(1), places.targets, places.layers, each)


@dataclass
class Lrp(Kind, name="lrp", source="Bach et al. 2015, doi 10.1371/journal.pone.0130140"):
    """Layer-wise relevance: what each pixel has in the class's logit, by rules that hand all of it on."""

    composite: str = field(
        default="epsilon-plus-flat", metadata={"help": ", ".join(COMPOSITES), "choices": tuple(COMPOSITES)}
    )
    start: str = field(
        default="one", metadata={"help": "what is handed on: one, or the logit", "choices": ("one", "logit")}
    )
    low: float | None = field(
        default=None, metadata={"help": "least pixel, for a box rule; default: of the picture"}
    )
    high: float | None = field(default=None, metadata={"help": "greatest pixel"})

    def draw(self, model: nn.Module, image: Tensor, target: Any) -> Found:
        composite = as_composite(self.composite, low=self.low, high=self.high)
        targets: list[Tensor] = []

        def start(logits: Tensor) -> Tensor:
            targets.append(as_targets(target, logits))
            one = F.one_hot(targets[0], logits.shape[1]).to(logits)
            return logits * one if self.start == "logit" else one

        each = propagate(model, image, start, composite)
        assert each is not None
        return Found(each.float().sum(1), targets[0], attribution=each.float())


@dataclass
class SalientRelevance(Kind, name="salient-relevance", source="Li et al. 2017, arXiv 1712.08268"):
    """Areas that stand out in the relevance of the pixels, by context-aware saliency detection."""

    composite: str = field(
        default="z-conv", metadata={"help": ", ".join(COMPOSITES), "choices": tuple(COMPOSITES)}
    )
    colour: bool = field(
        default=True, metadata={"help": "look at the relevance of the colours as an L*a*b picture"}
    )
    longer: int = field(default=250, metadata={"help": "longer side at which patches are compared, pixels"})

    def draw(self, model: nn.Module, image: Tensor, target: Any) -> Found:
        found = Lrp(composite=self.composite, start="logit").draw(model, image, target)
        assert found.attribution is not None
        maps = [sr_map(one.abs(), colour=self.colour, longer=self.longer) for one in found.attribution]
        return Found(torch.stack(maps), found.targets, attribution=found.attribution)


def as_names(layers: str | Sequence[str]) -> str | tuple[str, ...]:
    """`last` and `all` as they are; names, with commas or in a sequence, as a tuple."""
    if isinstance(layers, str):
        return (
            layers
            if layers in ("last", "all")
            else tuple(part.strip() for part in layers.split(",") if part.strip())
        )
    return tuple(layers)


def grids(seen: Record) -> Iterator[tuple[Tensor, Tensor]]:
    for name, x in seen.activations.items():
        yield as_grid(x, seen.input, name), as_grid(seen.gradients[name], seen.input, name)


# ---------------------------------------------------------------- meta-saliency


@contextmanager
def one_step(model: nn.Module, image: Tensor, target: Any, rate: float) -> Iterator[Tensor]:
    """The model after one step of SGD on the cross-entropy of `target` (all parameters, eval mode), then as it was.

    Gives the targets. image: [1, C, H, W], as a batch would mix pictures. Rebuffi et al. 2020, meta-saliency.
    """
    first = next(model.parameters())
    with undisturbed(model):
        image = image.detach().to(first.device, first.dtype).clone()
        trained = [p for p in model.parameters() if p.is_floating_point()]
        for parameter in trained:
            parameter.requires_grad_(True)
        logits = logits_of(model(image))
        targets = as_targets(target, logits)
        found = torch.autograd.grad(F.cross_entropy(logits.float(), targets), trained, allow_unused=True)
    before = [p.detach().clone() for p in trained]
    try:
        with torch.no_grad():
            for parameter, gradient in zip(trained, found):
                if gradient is not None:
                    parameter.sub_(rate * gradient)
        yield targets
    finally:
        with torch.no_grad():
            for parameter, value in zip(trained, before):
                parameter.copy_(value)


def make_kind(method: str | Kind, settings: Mapping[str, Any]) -> Kind:
    """A kind of map by name and hyperparameters.

    Raises `SecateurError` with the nearest names for another name, and for another hyperparameter or value.
    """
    if isinstance(method, Kind):
        return dataclasses.replace(method, **settings) if settings else method
    key = str(method).strip().lower().replace("_", "-")
    cls = MAPS[choose(key, MAPS, where="saliency", error=f"there is no map {method!r}", near=2)]
    fields = {item.name: item for item in dataclasses.fields(cls)}
    for name, value in settings.items():
        if name not in fields:
            known = ", ".join(fields) or "none"
            raise SecateurError(
                f"{key} has no hyperparameter {name!r}", where="saliency", fix=f"it takes {known}"
            )
        choices = fields[name].metadata.get("choices")
        if choices:
            choose(value, choices, what=name, where=key)
    return cls(**settings)
