"""What is in a batch: sequences, labels, masks, inputs."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, nn

from secateur.errors import SecateurError
from secateur.utils.inputs import Inputs, as_call

TOKENS_PER_BATCH = 2048
"""About how many tokens go through a model at once."""


def as_batches(batches: Any, batch_size: int | None = None) -> list[Inputs]:
    """A tensor [samples, ...] cut into batches; a list of batches as it is; a dict or a tuple as one batch.

    batch_size: samples in a batch; None: about 2048 tokens, or 16 pictures.
    """
    if isinstance(batches, Tensor):
        if batches.dim() and len(batches):
            if batch_size is None:
                batch_size = (
                    16 if batches.is_floating_point() else max(1, TOKENS_PER_BATCH // batches[0].numel())
                )
            return list(batches.split(batch_size))
        batches = []
    batches = [batches] if isinstance(batches, tuple) or hasattr(batches, "keys") else list(batches or [])
    if not batches:
        raise SecateurError(
            "there is no calibration data",
            where="data",
            fix="pass token ids [samples, length], or a list of batches",
        )
    return batches


def sequences_in(batch: Inputs) -> int:
    """How many samples a batch holds: the length of its first tensor."""
    args, kwargs = as_call(batch)
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor) and value.dim():
            return len(value)
        if isinstance(value, dict) and value:  # what one part of a pipeline is called with
            return sequences_in(value)
    raise SecateurError(
        "a batch holds no tensor", where="data", fix="pass a tensor, a tuple or a dict of tensors"
    )


def batch_numel(batch: Inputs) -> int:
    """The numbers in a batch's first tensor: ids, or pixels."""
    args, kwargs = as_call(batch)
    return next((v.numel() for v in (*args, *kwargs.values()) if isinstance(v, Tensor) and v.numel()), 1)


def token_mask(batch: Inputs, key: str = "attention_mask") -> Tensor | None:
    """[sequences, length] bool of the tokens that aren't padding; None when none is.

    key: the mask's name in the batch; an encoder-decoder has a `decoder_attention_mask` beside its encoder's.
    """
    mask = batch.get(key) if hasattr(batch, "get") else None
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        return None
    mask = mask.bool()
    return None if mask.all() else mask


def labels_in(model: nn.Module, batch: Inputs) -> Tensor | None:
    """The labels of a batch that is a pair (inputs, labels); None of one that is just inputs.

    >>> labels_in(nn.Linear(3, 2), (torch.zeros(4, 3), torch.zeros(4, dtype=torch.int64)))
    tensor([0, 0, 0, 0])

    A tuple or list of two is such a pair where the second is one integer a sample, or where the model takes one input.
    """
    if not isinstance(batch, tuple | list) or len(batch) != 2 or not isinstance(batch[1], Tensor):
        return None
    labels = batch[1]
    if labels.dim() == 1 and not labels.is_floating_point() and len(labels) == sequences_in(batch[:1]):
        return labels
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(model.forward).parameters.values()
    if any(p.kind is inspect.Parameter.VAR_POSITIONAL for p in parameters):
        return None
    return labels if sum(p.kind in kinds for p in parameters) == 1 else None


def inputs_of(model: nn.Module, batch: Inputs) -> Inputs:
    """The batch without its labels, where it is a pair."""
    return batch if labels_in(model, batch) is None else batch[0]
