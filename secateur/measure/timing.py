"""How long a forward takes, and a token. Medians after a warm-up; honest only on a machine that is doing nothing else."""

import statistics
import time

import torch
from torch import nn

from secateur.data.text import context
from secateur.errors import SecateurError
from secateur.measure.cost import run
from secateur.utils.inputs import Inputs
from secateur.utils.running import device_of, evaluating
from secateur.utils.versions import cache_name, cache_of


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
    return time.perf_counter()


def _positive(**values: int) -> None:
    for name, value in values.items():
        if value < 1:
            raise SecateurError(f"{value} is not a positive number", where=name)


def latency(model: nn.Module, inputs: Inputs, repeats: int = 5, warmup: int = 2) -> float:
    """Median seconds of `repeats` forwards on `inputs`, after `warmup` that do not count.

    >>> latency(nn.Linear(8, 8), torch.ones(1, 8)) > 0
    True
    """
    _positive(repeats=repeats)
    device, seconds = device_of(model), []
    with evaluating(model):
        for _ in range(warmup):
            run(model, inputs)
        for _ in range(repeats):
            start = _now(device)
            run(model, inputs)
            seconds.append(_now(device) - start)
    return statistics.median(seconds)


def decode_latency(model: nn.Module, prompt: torch.Tensor, steps: int = 16, warmup: int = 2) -> float:
    """Median seconds a new token of a causal language model takes after `prompt` [B, L], with its cache.

    The cache grows by one token a step, greedily; the prompt is cut so that all fit the model's context. Raises SecateurError where the model returns no cache.
    """
    _positive(steps=steps)
    device, seconds, longest = device_of(model), [], context(model)
    if longest:
        prompt = prompt[:, : max(1, longest - warmup - steps)]
    name = cache_name(model.forward)
    with evaluating(model), torch.no_grad():
        out = model(input_ids=prompt, use_cache=True)
        for _ in range(warmup + steps):
            cache = cache_of(out)
            if name is None or cache is None:
                raise SecateurError("gives no cache, so a token cannot be timed", where=type(model).__name__)
            token = out.logits[:, -1:].argmax(-1)
            start = _now(device)
            out = model(input_ids=token, use_cache=True, **{name: cache})
            seconds.append(_now(device) - start)
    return statistics.median(seconds[warmup:])
