"""Statistics of every matrix of the dense model in one go."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secateur.errors import SecateurError
from secateur.graph.blocks import Matrix, check_weights, find_stacks
from secateur.stats.layer import OF_GRADIENTS, OF_INPUTS, LayerStats, check_needs
from secateur.stats.record import NotShared, Recorder, Stop
from secateur.utils.batches import as_batches, labels_in, sequences_in, token_mask
from secateur.utils.inputs import Inputs, as_call, map_tensors
from secateur.utils.running import device_of, evaluating, logits_of, run

Loss = Callable[[nn.Module, Any], Tensor]


def collect(
    model: nn.Module,
    batches: Any,
    needs: Iterable[str],
    matrices: Mapping[str, Matrix],
    *,
    loss: Loss | None = None,
    progress: Callable[..., Iterable] | None = None,
    batch_size: int | None = None,
    play: Callable[[int], None] | None = None,
) -> dict[str, LayerStats]:
    """Parameter name -> `LayerStats`, over the whole dense model.

    >>> stats = collect(model, ids, {"input_norm", "gradient"}, find_matrices(model))
    >>> stats["model.layers.0.mlp.up_proj.weight"].gradient.shape
    torch.Size([1536, 576])

    Parameters
    ----------
    batches, batch_size: as for `stream`.
    needs: any of input_norm, hessian, input_mean, input_var, input_abs, gradient, fisher.
    loss: (model, batch) -> scalar, for gradients; None: the causal language modelling loss of the ids, or the model's
        own where a batch holds labels. Those are means over tokens (or samples), and so is the gradient over all batches;
        with a loss of yours it is the mean over batches.
    play: runs the blocks that hold the matrices on a batch, by its number, for statistics of inputs; None: the model runs.

    The model is left as it was: modes, `requires_grad` flags and `.grad`.
    Raises `SecateurError` when a layer's values are NaN or infinite, or there is no loss to take.
    """
    needs = check_needs(frozenset(needs))
    check_weights(dict(matrices))
    if not needs:
        return {name: LayerStats(name=name) for name in matrices}
    device = device_of(model)
    if "fisher" in needs and "gradient" in needs and isinstance(batches, Tensor):
        batch_size = 1
    chunks = [map_tensors(batch, lambda t: t.to(device)) for batch in as_batches(batches, batch_size)]
    stats = _inputs(model, chunks, needs & OF_INPUTS, matrices, progress, play)
    if needs & OF_GRADIENTS:
        of_loss = loss or default_loss(model, chunks[0])
        shares = [1.0] * len(chunks) if loss else [float(predictions(model, batch)) for batch in chunks]
        gradient, fisher = _gradients(model, chunks, needs, matrices, of_loss, progress, shares)
        for name in matrices:
            stats[name] = LayerStats(
                stats[name].inputs, name=name, gradient=gradient.get(name), fisher=fisher.get(name)
            )
    return stats


def each_sample(
    model: nn.Module,
    data: Any,
    needs: Iterable[str],
    matrices: Mapping[str, Matrix],
    progress: Callable[..., Iterable] | None = None,
    play: Callable[[int], None] | None = None,
) -> Iterator[dict[str, LayerStats]]:
    """`collect` of one calibration sample after the other: each row of what is given.

    >>> norms = [stats["fc2.weight"].input_norm for stats in each_sample(model, ids, {"input_norm"}, matrices)]  # doctest: +SKIP
    """
    samples = singly(data)
    every = progress(samples, "samples", len(samples)) if progress else samples
    for number, sample in enumerate(every):
        own = None if play is None else lambda _, play=play, number=number: play(number)
        yield collect(model, [sample], needs, matrices, play=own)


def singly(data: Any) -> list[Inputs]:
    """Batches of one sample each.

    >>> [len(sample) for sample in singly(torch.zeros(3, 8))]
    [1, 1, 1]
    """
    return [one for batch in as_batches(data, 1) for one in _singles(batch, sequences_in(batch))]


def _inputs(
    model: nn.Module,
    batches: list[Inputs],
    needs: frozenset[str],
    matrices: Mapping[str, Matrix],
    progress: Callable[..., Iterable] | None,
    play: Callable[[int], None] | None = None,
) -> dict[str, LayerStats]:
    if not needs:
        return {name: LayerStats(name=name) for name in matrices}
    for share in (True, False):
        recorder = Recorder(model, matrices, needs, share, early=True)
        try:
            with torch.no_grad(), evaluating(model), recorder:
                every = progress(batches, "activations", len(batches)) if progress else batches
                forwards = _forwards(model, matrices)
                for number, batch in enumerate(every):
                    recorder.begin(batch)
                    with contextlib.suppress(Stop):
                        play(number) if play else next(forwards)(batch)
        except NotShared:
            continue
        break
    recorder.check()
    return recorder.stats


def _forwards(model: nn.Module, matrices: Mapping[str, Matrix]) -> Iterator[Callable[[Inputs], None]]:
    """What runs the model on a batch, for one batch after the other: all of it on the first, then as far as its last block,
    where the first saw each block once and in order, and all matrices lie in them."""
    stacks = find_stacks(model)
    blocks = stacks[-1]
    order: list[int] = []

    def watched(batch: Inputs) -> None:
        hooks = [
            module.register_forward_hook(lambda *_, n=n: order.append(n))
            for n, module in enumerate(blocks.modules)
        ]
        try:
            run(model, batch)
        finally:
            for hook in hooks:
                hook.remove()

    def stopped(batch: Inputs) -> None:
        hook = blocks.modules[-1].register_forward_hook(_stop)
        try:
            run(model, batch)
        finally:
            hook.remove()

    yield watched
    alone = len(stacks) == 1 and blocks.repeated
    inside = alone and all(matrix.block_path == blocks.path for matrix in matrices.values())
    ends = inside and order == list(range(len(blocks)))
    while True:
        yield stopped if ends else partial(run, model)


def _stop(*_: Any) -> None:
    raise Stop


def _gradients(
    model: nn.Module,
    batches: list[Inputs],
    needs: frozenset[str],
    matrices: Mapping[str, Matrix],
    loss: Loss,
    progress: Callable[..., Iterable] | None,
    shares: list[float],
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(mean over batches of the gradient, weighted by `shares`; mean over single samples of its square), [out, in]."""
    parameters = {name: matrix.parameter for name, matrix in matrices.items()}
    flags = {id(p): (p, p.requires_grad) for p in model.parameters()}
    gradient = {
        n: torch.zeros(m.shape, device=m.parameter.device) for n, m in matrices.items() if "gradient" in needs
    }
    fisher = {
        n: torch.zeros(m.shape, device=m.parameter.device) for n, m in matrices.items() if "fisher" in needs
    }
    samples = 0
    try:
        for parameter, _ in flags.values():
            parameter.requires_grad_(False)
        for wanted in parameters.values():
            wanted.requires_grad_(True)
        with torch.enable_grad(), evaluating(model):
            every = progress(batches, "gradients", len(batches)) if progress else batches
            for batch, share in zip(every, shares):
                size = sequences_in(batch)
                alone = size == 1
                if gradient:
                    for name, g in _backward(model, batch, loss, parameters):
                        g = matrices[name].fold(g).float()
                        gradient[name].add_(g, alpha=share / sum(shares))
                        if fisher and alone:
                            fisher[name] += g.square_()
                if fisher and not (gradient and alone):
                    for sample in _singles(batch, size):
                        for name, g in _backward(model, sample, loss, parameters):
                            fisher[name] += matrices[name].fold(g).float().square()
                samples += size
    finally:
        for parameter, flag in flags.values():
            parameter.requires_grad_(flag)
    for name in fisher:
        fisher[name] /= samples
    for name in matrices:
        for found in (gradient.get(name), fisher.get(name)):
            if found is not None and not torch.isfinite(found).all():
                raise SecateurError(
                    "its gradient is NaN or infinite", where=name, fix="check the loss and the data"
                )
    return gradient, fisher


def _backward(
    model: nn.Module, batch: Inputs, loss: Loss, parameters: dict[str, Tensor]
) -> Iterator[tuple[str, Tensor]]:
    value = loss(model, batch)
    if not isinstance(value, Tensor) or value.numel() != 1 or not value.requires_grad:
        raise SecateurError(
            "it must give a scalar tensor that depends on the weights",
            where="loss",
            fix="return e.g. model(**batch).loss",
        )
    if not torch.isfinite(value):
        raise SecateurError(f"the loss is {value.item()}", where="loss", fix="check the calibration data")
    found = torch.autograd.grad(value, list(parameters.values()), allow_unused=True)
    for name, g in zip(parameters, found):
        if g is not None:
            yield name, g


def _singles(batch: Inputs, size: int) -> Iterator[Inputs]:
    def cut(tensor: Tensor, i: int) -> Tensor:
        return tensor[i : i + 1] if tensor.dim() and len(tensor) == size else tensor

    for i in range(size):
        yield map_tensors(batch, partial(cut, i=i))


def default_loss(model: nn.Module, batch: Inputs) -> Loss:
    """The mean next-token loss of the ids for causal language models; the model's own loss where a batch has labels;
    `labelled_loss` where it is a pair (inputs, labels).

    Raises `SecateurError` for other models.
    """
    if labels_in(model, batch) is not None:
        return labelled_loss
    parameters = inspect.signature(type(model).forward).parameters
    if "labels" in parameters and hasattr(batch, "keys") and "labels" in batch:
        return lambda model, batch: model(**batch).loss
    config = getattr(model, "config", None)
    generates = getattr(model, "can_generate", lambda: False)()
    if not ({"input_ids", "labels"} <= set(parameters) and generates) or getattr(
        config, "is_encoder_decoder", False
    ):
        raise SecateurError(
            f"{type(model).__name__} has no loss of its own that could be taken",
            where="loss",
            fix="give pairs (inputs, labels), or pass loss=, a function of (model, batch) that gives a scalar",
        )
    return causal_lm_loss


def predictions(model: nn.Module, batch: Inputs) -> int:
    """Over how many predictions the default loss of a batch is a mean: next tokens that aren't padding, or samples."""
    if (labels := labels_in(model, batch)) is not None:
        return len(labels)
    args, kwargs = as_call(batch)
    if isinstance(labels := kwargs.get("labels"), Tensor):
        generates = getattr(model, "can_generate", lambda: False)()
        shifted = generates and not getattr(getattr(model, "config", None), "is_encoder_decoder", False)
        return int((labels[..., shifted:] != -100).sum())
    ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
    mask = token_mask(batch)
    return ids[:, 1:].numel() if mask is None else int(mask[:, 1:].sum())


def labelled_loss(model: nn.Module, batch: Inputs, temperature: float = 1.0) -> Tensor:
    """Of a pair (inputs, labels): cross-entropy of the logits over `temperature`, mean squared error for float labels.

    >>> labelled_loss(nn.Identity(), (torch.zeros(1, 2), torch.tensor([1])))
    tensor(0.6931)
    """
    logits = logits_of(run(model, batch)).float()
    labels = batch[1].to(logits.device)
    if labels.is_floating_point():
        return F.mse_loss(logits, labels.float())
    return F.cross_entropy(logits / temperature, labels.long())


def causal_lm_loss(model: nn.Module, batch: Inputs) -> Tensor:
    """The mean next-token loss; padding doesn't count."""
    args, kwargs = as_call(batch)
    ids = kwargs.pop("input_ids", None)
    ids = args[0] if ids is None else ids
    labels = ids
    if (mask := token_mask(batch)) is not None:
        labels = ids.masked_fill(~mask, -100)
    return model(input_ids=ids, labels=labels, **{"use_cache": False, **kwargs}).loss
