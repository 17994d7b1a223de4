"""How much each single weight matters: plain functions that any method can use. Higher scores stay, always.

Of the weight alone: `magnitude`, `l2`, `lamp`, `fpgm`. Of the inputs' Hessian: `obd`, `obs`. Of gradients of a loss over
batches: `taylor`, `snip`, `grasp`, `crop`, `fisher`, `hessian_diagonal`. Of the network alone: `synflow`.

>>> scores = score("snip", model, names, [(images, labels)])  # doctest: +SKIP

Spec: weight-baselines, items 1-6. Sources: magnitude, Han 2015 (arXiv 1506.02626); LAMP, Lee 2020 (2010.07611); FPGM, He
2018 (1811.00250); Taylor, Molchanov 2019 (1906.10771); SNIP, Lee 2018 (1810.02340); GraSP, Wang 2020 (2002.07376); CroP,
Rachwan 2022 (2206.10451); SynFlow, Tanaka 2020 (2006.05467); OBD, LeCun 1989; OBS, Hassibi 1993.

Gradients are taken in eval mode, but a BatchNorm that has never seen data uses the batch's statistics, so that an
untrained network is scored as it would be trained.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from secateur.errors import SecateurError
from secateur.stats.collect import default_loss, labelled_loss
from secateur.utils.batches import as_batches, labels_in, sequences_in
from secateur.utils.inputs import Inputs, map_tensors
from secateur.utils.running import call, device_of, evaluating, logits_of
from secateur.utils.types import Objective

OF_WEIGHTS = ("magnitude", "l2", "lamp", "fpgm", "bn-scale")
OF_INPUTS = ("obd", "obs")
OF_LOSS = ("taylor", "snip", "grasp", "crop", "fisher", "hessian-diagonal")
CRITERIA = (*OF_WEIGHTS, *OF_INPUTS, *OF_LOSS, "synflow")

# Of the weight alone


def magnitude(weight: Tensor) -> Tensor:
    """|w|."""
    return weight.detach().float().abs()


def l2(weight: Tensor) -> Tensor:
    """w²; summed over a unit it orders like its L2 norm."""
    return weight.detach().float().square()


def lamp(weight: Tensor) -> Tensor:
    """w² over the sum of the squares that aren't smaller, in the same tensor: comparable over layers.

    >>> lamp(torch.tensor([[1.0, -2.0], [0.0, 2.0]]))
    tensor([[0.1111, 0.5000],
            [0.0000, 1.0000]])

    Of equals the later one counts as the larger.
    """
    squares, order = l2(weight).flatten().sort(stable=True)
    rest = squares.flip(0).double().cumsum(0).flip(0).clamp_min(torch.finfo(torch.float32).tiny)
    return torch.empty_like(squares).scatter_(0, order, (squares / rest).float()).reshape(weight.shape)


def fpgm(weight: Tensor, dim: int = 0) -> Tensor:
    """The distance of each filter to all filters of its layer, in equal parts on its weights; small: replaceable.

    >>> fpgm(torch.tensor([[0.0, 0.0], [3.0, 4.0], [0.0, 0.0]])).sum(1)
    tensor([ 5., 10.,  5.])
    """
    rows = weight.detach().float().movedim(dim, 0).flatten(1)
    each = torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist").sum(1) / rows.shape[1]
    return each.reshape([-1 if d == dim else 1 for d in range(weight.dim())]).expand(weight.shape)


# Of the Hessian of a layer's inputs


def obd(weight: Tensor, hessian: Tensor) -> Tensor:
    """½ h_ii w²: what zeroing the weight costs, others unchanged. weight [out, in], hessian [in, in] or [in]."""
    diagonal = hessian.diagonal() if hessian.dim() == 2 else hessian
    return weight.float().square() * diagonal.float() / 2


def obs(weight: Tensor, inverse: Tensor) -> Tensor:
    """½ w² / [H⁻¹]_ii: what it costs when the row's others are set anew. weight [out, in], inverse [in, in] or [in].

    >>> obs(torch.tensor([[2.0, 1.0]]), torch.tensor([[0.5, 0.0], [0.0, 1.0]]))
    tensor([[4.0000, 0.5000]])
    """
    diagonal = inverse.diagonal() if inverse.dim() == 2 else inverse
    return weight.float().square() / diagonal.float() / 2


def inverse_diagonal(hessian: Tensor, damping: float = 0.01) -> Tensor:
    """[in]: the diagonal of (H + damping · mean(diag H) · I)⁻¹; a pseudo-inverse where that isn't positive definite."""
    damped = hessian.double().clone()
    damped.diagonal().add_(damping * hessian.diagonal().double().mean())
    factor, failed = torch.linalg.cholesky_ex(damped)
    if failed:
        return torch.linalg.pinv(damped, hermitian=True).diagonal().clamp_min(1e-12).float()
    return torch.cholesky_inverse(factor).diagonal().float()


# Of a loss over batches


def taylor(
    model: nn.Module, batches: Any, names: Sequence[str], loss: Objective | None = None
) -> dict[str, Tensor]:
    """(g·w)², mean over batches."""
    total, count = _zeros(model, names), 0
    for found in gradients(model, batches, names, loss):
        for name, g in found.items():
            total[name] += (g * model.get_parameter(name).detach().float()).square()
        count += 1
    return {name: value / count for name, value in total.items()}


def snip(
    model: nn.Module, batches: Any, names: Sequence[str], loss: Objective | None = None
) -> dict[str, Tensor]:
    """|g·w| of the mean loss, over its sum over all weights."""
    g = mean_gradient(model, batches, names, loss)
    scores = {name: (g[name] * model.get_parameter(name).detach().float()).abs() for name in names}
    total = sum(value.double().sum().item() for value in scores.values())
    return {name: value / (total or 1.0) for name, value in scores.items()}


def grasp(
    model: nn.Module, batches: Any, names: Sequence[str], loss: Objective | None = None
) -> dict[str, Tensor]:
    """w·(Hg), over the sum's size: the highest of -w·(Hg) leave, whose removal raises the gradient's norm most.

    Without `loss`, labelled batches are scored at temperature 200.
    """
    products = hessian_gradient(model, batches, names, loss)
    total = abs(sum(value.double().sum().item() for value in products.values())) + 1e-10
    return {name: value / total for name, value in products.items()}


def crop(
    model: nn.Module, batches: Any, names: Sequence[str], loss: Objective | None = None
) -> dict[str, Tensor]:
    """|w·(Hg)|: how much the gradient flow depends on the weight."""
    return {name: value.abs() for name, value in hessian_gradient(model, batches, names, loss, 1.0).items()}


def fisher(
    model: nn.Module, batches: Any, names: Sequence[str], loss: Objective | None = None
) -> dict[str, Tensor]:
    """½ h w² with the diagonal Fisher h: the mean over single samples of g²."""
    total, count = _zeros(model, names), 0
    for found in gradients(
        model, [one for batch in as_batches(batches) for one in _singles(batch)], names, loss
    ):
        for name, g in found.items():
            total[name] += g.square()
        count += 1
    return {name: obd_of(model, name, value / count) for name, value in total.items()}


def hessian_diagonal(
    model: nn.Module,
    batches: Any,
    names: Sequence[str],
    loss: Objective | None = None,
    probes: int = 8,
    generator: torch.Generator | None = None,
) -> dict[str, Tensor]:
    """½ |h| w² with the diagonal h of the loss's Hessian, estimated as the mean of z·(Hz) over `probes` random signs z.

    Hutchinson's estimate, exact where the Hessian is diagonal; its error falls with the root of `probes`.
    """
    generator = generator or torch.Generator().manual_seed(0)
    total, batches = _zeros(model, names), as_batches(batches)
    with differentiable(model, names) as parameters:
        for _ in range(probes):
            signs = {
                name: (torch.randint(0, 2, p.shape, generator=generator) * 2 - 1).to(p.device, p.dtype)
                for name, p in parameters.items()
            }
            for batch in batches:
                first = _grad(_value(model, batch, loss), parameters, create_graph=True)
                product = sum((first[name] * sign).sum() for name, sign in signs.items())
                for name, value in _grad(product, parameters).items():
                    total[name] += (value * signs[name]).float() / (probes * len(batches))
    return {name: obd_of(model, name, value.abs()) for name, value in total.items()}


def synflow(model: nn.Module, inputs: Inputs, names: Sequence[str]) -> dict[str, Tensor]:
    """|θ·∂R/∂θ|, R the sum of the outputs for inputs of ones when all that the model holds is made positive.

    Token ids are replaced by embeddings of ones. One round; the paper repeats 100 times (`schedule="iterative:100"`).
    In float64, because R grows with the depth.

    Raises `SecateurError` where R isn't finite, or no gradient reaches a weight.
    """
    positive = copy.deepcopy(model).double().eval()
    with torch.no_grad():
        for tensor in [*positive.parameters(), *positive.buffers()]:
            if tensor.is_floating_point():
                tensor.abs_()
    with differentiable(positive, names) as parameters:
        output = logits_of(call(positive, _ones(positive, inputs)))
        flow = output.sum()
        found = _grad(flow, parameters) if torch.isfinite(flow) else {}
    if not any(g.any() for g in found.values()):
        raise SecateurError(
            f"the flow through {type(model).__name__} is {flow.item():g}, and no weight changes it",
            where="synflow",
            fix="use another criterion",
        )
    return {name: (parameters[name].detach() * g).abs().float() for name, g in found.items()}


# By name


def score(
    criterion: str,
    model: nn.Module,
    names: Sequence[str],
    batches: Any = None,
    loss: Objective | None = None,
    *,
    inputs: Inputs | None = None,
    generator: torch.Generator | None = None,
) -> dict[str, Tensor]:
    """Scores of the parameters `names`, each of its parameter's shape, float32, higher = keep.

    criterion: one of OF_WEIGHTS, OF_LOSS or `synflow` (which needs `inputs`); `obd` and `obs` go by layers' Hessians,
    and `bn-scale` is the magnitude of a normalisation's scale.
    loss: (model, batch) -> scalar; None: cross-entropy for pairs (inputs, labels), next-token loss for token ids.

    Raises `SecateurError` for an unknown criterion, missing data, or a score that isn't finite.
    """
    if criterion in OF_WEIGHTS:
        of_weight = {"magnitude": magnitude, "bn-scale": magnitude, "l2": l2, "lamp": lamp, "fpgm": fpgm}[
            criterion
        ]
        return {name: of_weight(model.get_parameter(name)) for name in names}
    if criterion == "synflow":
        if inputs is None:
            raise SecateurError("it needs example inputs", where=criterion, fix="pass inputs=")
        scores = synflow(model, inputs, names)
    elif criterion in OF_LOSS:
        functions: dict[str, Callable[..., dict[str, Tensor]]] = {
            "taylor": taylor,
            "snip": snip,
            "grasp": grasp,
            "crop": crop,
            "fisher": fisher,
            "hessian-diagonal": partial(hessian_diagonal, generator=generator),
        }
        scores = functions[criterion](model, batches, names, loss)
    else:
        raise SecateurError(
            f"there is no criterion {criterion!r} of single weights",
            where="criterion",
            fix=", ".join(CRITERIA),
        )
    for name, value in scores.items():
        if not torch.isfinite(value).all():
            raise SecateurError(
                f"its {criterion} score isn't finite", where=name, fix="check the loss and the data"
            )
    return scores


# Gradients


@contextlib.contextmanager
def differentiable(model: nn.Module, names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """The parameters `names`, which alone require gradients within; flags and modes come back.

    A BatchNorm whose statistics are still those it was made with normalises by the batch, and keeps them.
    """
    flags = {parameter: parameter.requires_grad for parameter in model.parameters()}
    fresh = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and _untrained(m)]
    try:
        with evaluating(model), torch.enable_grad(), _plain_attention():
            for norm in fresh:
                norm.training, norm.track_running_stats = True, False
            for parameter in flags:
                parameter.requires_grad_(False)
            parameters: dict[str, Tensor] = {name: model.get_parameter(name) for name in names}
            for chosen in parameters.values():
                chosen.requires_grad_(True)
            yield parameters
    finally:
        for norm in fresh:
            norm.track_running_stats = True
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)


def gradients(
    model: nn.Module, batches: Any, names: Sequence[str], loss: Objective | None = None
) -> Iterator[dict[str, Tensor]]:
    """The gradient of the loss of each batch, float32, by parameter name; zeros where the loss doesn't depend on it."""
    with differentiable(model, names) as parameters:
        for batch in as_batches(batches):
            yield {name: g.float() for name, g in _grad(_value(model, batch, loss), parameters).items()}


def mean_gradient(
    model: nn.Module, batches: Any, names: Sequence[str], loss: Objective | None = None
) -> dict[str, Tensor]:
    """The gradient of the mean over batches of the loss."""
    batches = as_batches(batches)
    total = _zeros(model, names)
    for found in gradients(model, batches, names, loss):
        for name, g in found.items():
            total[name] += g / len(batches)
    return total


def hessian_gradient(
    model: nn.Module,
    batches: Any,
    names: Sequence[str],
    loss: Objective | None = None,
    temperature: float = 200.0,
) -> dict[str, Tensor]:
    """w·(Hg), g and H of the mean over batches of the loss; without `loss`, logits are divided by `temperature`."""
    batches = as_batches(batches)
    if loss is None and labels_in(model, batches[0]) is not None:
        loss = partial(labelled_loss, temperature=temperature)
    g = mean_gradient(model, batches, names, loss)
    total = _zeros(model, names)
    with differentiable(model, names) as parameters:
        for batch in batches:
            first = _grad(_value(model, batch, loss), parameters, create_graph=True)
            product = sum((first[name] * g[name].to(first[name].dtype)).sum() for name in names)
            for name, value in _grad(product, parameters).items():
                total[name] += value.float() / len(batches)
    return {name: value * model.get_parameter(name).detach().float() for name, value in total.items()}


def obd_of(model: nn.Module, name: str, diagonal: Tensor) -> Tensor:
    """½ h w² of a parameter, h of its shape."""
    return model.get_parameter(name).detach().float().square() * diagonal / 2


def _zeros(model: nn.Module, names: Sequence[str]) -> dict[str, Tensor]:
    return {name: torch.zeros_like(model.get_parameter(name), dtype=torch.float32) for name in names}


def _value(model: nn.Module, batch: Inputs, loss: Objective | None) -> Tensor:
    batch = map_tensors(batch, lambda tensor: tensor.to(device_of(model)))
    value = (loss or default_loss(model, batch))(model, batch)
    if not isinstance(value, Tensor) or value.numel() != 1 or not value.requires_grad:
        raise SecateurError(
            "it must give a scalar tensor that depends on the weights",
            where="loss",
            fix="return e.g. cross_entropy(model(x), y)",
        )
    if not torch.isfinite(value):
        raise SecateurError(f"the loss is {value.item()}", where="loss", fix="check the calibration data")
    return value


def _grad(value: Any, parameters: Mapping[str, Tensor], create_graph: bool = False) -> dict[str, Tensor]:
    if not isinstance(value, Tensor) or not value.requires_grad:
        return {name: torch.zeros_like(p) for name, p in parameters.items()}
    found = torch.autograd.grad(
        value, list(parameters.values()), allow_unused=True, create_graph=create_graph
    )
    return {name: torch.zeros_like(p) if g is None else g for (name, p), g in zip(parameters.items(), found)}


def _plain_attention() -> Any:
    """The attention kernel that can be differentiated twice."""
    return torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)


def _untrained(norm: Any) -> bool:
    return bool(
        norm.track_running_stats
        and norm.running_mean is not None
        and not norm.running_mean.any()
        and (norm.running_var == 1).all()
    )


def _singles(batch: Inputs) -> list[Inputs]:
    size = sequences_in(batch)

    def one(tensor: Tensor, at: int) -> Tensor:
        return tensor[at : at + 1] if tensor.dim() and len(tensor) == size else tensor

    return [map_tensors(batch, partial(one, at=at)) for at in range(size)]


def _ones(model: nn.Module, inputs: Inputs) -> Inputs:
    """Inputs of ones, float64, one sample; embeddings in the place of token ids."""
    device = device_of(model)
    embeddings: Any = getattr(model, "get_input_embeddings", lambda: None)()
    if isinstance(inputs, dict) and "input_ids" in inputs and embeddings is not None:
        shape = (*inputs["input_ids"][:1].shape, embeddings.weight.shape[1])
        return {"inputs_embeds": torch.ones(shape, dtype=torch.float64, device=device), "use_cache": False}

    def ones(tensor: Tensor) -> Tensor:
        dtype = torch.float64 if tensor.is_floating_point() else tensor.dtype
        return torch.ones_like(tensor[:1], dtype=dtype, device=device)

    return map_tensors(inputs, ones)


NORMALISE = ("none", "sum", "mean", "max", "gaussian")


def normalise(scores: Tensor, how: str) -> Tensor:
    """[units] of one group, made comparable with other groups.

    >>> normalise(torch.tensor([5.0, 2.0, 6.0]), "mean")
    tensor([1.1538, 0.4615, 1.3846])
    """
    if how == "none":
        return scores
    if how == "gaussian":
        return (scores - scores.mean()) / scores.std().clamp_min(torch.finfo(scores.dtype).tiny)
    size = scores.abs()
    total = {"sum": size.sum(), "mean": size.mean(), "max": size.max()}[how]
    return scores / total.clamp_min(torch.finfo(scores.dtype).tiny)
