"""How long a forward takes, and a token. Medians after a warm-up; several models run in turn, so that all meet the same noise."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from secateur.data.text import context
from secateur.errors import SecateurError
from secateur.measure.cost import run
from secateur.measure.load import Others, crowded, processors
from secateur.utils.inputs import Inputs
from secateur.utils.running import device_of, evaluating
from secateur.utils.spread import Speed, quartiles
from secateur.utils.versions import cache_name, cache_of

ROUNDS, MOST, AWHILE = 9, 99, 0.5
"""Forwards that a reported time is the median of: at least, and at most within so many seconds."""
STEPS = 16
"""New tokens that a reported time is the median of."""
FORWARD, TOKEN = "forward_seconds", "decode_seconds_per_token"


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


def in_turn(
    calls: Sequence[Callable[[], Any]],
    rounds: int = ROUNDS,
    warmup: int = 2,
    clock: Callable[[], float] = time.perf_counter,
    awhile: float = 0.0,
) -> list[list[float]]:
    """Seconds of each call in each round: a b c, a b c, ... after `warmup` rounds that do not count.

    >>> first, second = in_turn([lambda: sum(range(10)), lambda: sum(range(20))], rounds=3)
    >>> len(first), len(second)
    (3, 3)

    Other work on the machine hits all of them alike: compare the pairs (`spread.Speed`), not the medians. clock: read
    before and after each call. awhile: go on beyond `rounds` (to 99 at most) until so many seconds have passed.
    """
    _positive(rounds=rounds)
    seconds: list[list[float]] = [[] for _ in calls]
    for _ in range(warmup):
        for call in calls:
            call()
    begun = time.perf_counter()
    while len(seconds[0]) < rounds or (
        len(seconds[0]) < MOST and time.perf_counter() - begun < awhile * len(calls)
    ):
        for call, own in zip(calls, seconds, strict=True):
            start = clock()
            call()
            own.append(clock() - start)
    return seconds


def forward_seconds(
    models: Sequence[nn.Module], inputs: Inputs, rounds: int = ROUNDS, warmup: int = 2, awhile: float = 0.0
) -> list[list[float]]:
    """Seconds of the forwards of each model on `inputs`, in turn."""
    device = device_of(models[0])
    with contextlib.ExitStack() as stack:
        for model in models:
            stack.enter_context(evaluating(model))
        calls = [lambda model=model: run(model, inputs) for model in models]
        return in_turn(calls, rounds, warmup, lambda: _now(device), awhile)


def token_seconds(
    models: Sequence[nn.Module], prompt: torch.Tensor, steps: int = STEPS, warmup: int = 2
) -> list[list[float]]:
    """Seconds of each new token of each causal language model after `prompt` [B, L], with their caches, in turn."""
    _positive(steps=steps)
    device = device_of(models[0])
    with contextlib.ExitStack() as stack:
        writers = []
        for model in models:
            stack.enter_context(evaluating(model))
            writers.append(_writing(model, prompt, warmup + steps))
            next(writers[-1])
        return in_turn([writer.__next__ for writer in writers], steps, warmup, lambda: _now(device))


@torch.no_grad()
def _writing(model: nn.Module, prompt: torch.Tensor, steps: int) -> Iterator[None]:
    """Reads the prompt, then writes a token each time it is asked, the likeliest one."""
    longest, name = context(model), cache_name(model.forward)
    if longest:
        prompt = prompt[:, : max(1, longest - steps)]
    out = model(input_ids=prompt, use_cache=True)
    while True:
        cache = cache_of(out)
        if name is None or cache is None:
            raise SecateurError("gives no cache, so a token cannot be timed", where=type(model).__name__)
        token = out.logits[:, -1:].argmax(-1)
        yield
        out = model(input_ids=token, use_cache=True, **{name: cache})


def latency(model: nn.Module, inputs: Inputs, repeats: int = 5, warmup: int = 2) -> float:
    """Median seconds of `repeats` forwards on `inputs`, after `warmup` that do not count.

    >>> latency(nn.Linear(8, 8), torch.ones(1, 8)) > 0
    True
    """
    _positive(repeats=repeats)
    return quartiles(forward_seconds([model], inputs, repeats, warmup)[0])[1]


def decode_latency(model: nn.Module, prompt: torch.Tensor, steps: int = STEPS, warmup: int = 2) -> float:
    """Median seconds a new token of a causal language model takes after `prompt` [B, L], with its cache.

    The cache grows by one token a step, greedily; the prompt is cut so that all fit the model's context. Raises SecateurError where the model returns no cache.
    """
    return quartiles(token_seconds([model], prompt, steps, warmup)[0])[1]


def latencies(
    models: Sequence[nn.Module], inputs: Inputs | None
) -> tuple[list[dict[str, Any]], dict[str, Any], dict[str, str]]:
    """What reports hold of the speed of one model, or of two that run in turn.

    >>> [before, after], speed, _ = latencies([nn.Linear(512, 512), nn.Linear(8, 512)], inputs)  # doctest: +SKIP
    >>> print(Speed.read(speed["forward_seconds"]))  # doctest: +SKIP
    1.7x (1.6 to 1.8)

    Gives for each model the medians `forward_seconds` and, for what generates, `decode_seconds_per_token`, with `quartiles`
    {key: [low, high]}, the `processors` and how many of them `others` used, and whether that is `crowded`; for two models
    `Speed` of each key, as a dict; and {key: why it wasn't timed}. Raises SecateurError without inputs.
    """
    if inputs is None:
        raise SecateurError(
            "latency needs inputs", where="measure", fix="give inputs, such as a batch of pictures"
        )
    others = Others()
    times, reasons = {FORWARD: forward_seconds(models, inputs, awhile=AWHILE)}, {}
    if all(getattr(model, "can_generate", bool)() for model in models):
        if not isinstance(inputs, Mapping) or set(inputs) != {"input_ids"}:
            reasons[TOKEN] = "a token is timed after token ids alone, and the inputs hold more"
        else:
            try:
                times[TOKEN] = token_seconds(models, inputs["input_ids"])
            except SecateurError as error:
                reasons[TOKEN] = str(error)
    used = others.used()
    found = [
        summed({key: seconds[place] for key, seconds in times.items()}, used) for place in range(len(models))
    ]
    speed = {}
    if len(models) == 2:
        speed = {key: Speed.of(*seconds).as_dict() for key, seconds in times.items()}
    return found, speed, reasons


def summed(seconds: Mapping[str, Sequence[float]], used: float) -> dict[str, Any]:
    """What reports hold of the times of one model by key, while others `used` so many processors: see `latencies`."""
    spans, count = {key: quartiles(values) for key, values in seconds.items()}, len(processors())
    return {key: middle for key, (_, middle, _) in spans.items()} | {
        "quartiles": {key: [low, high] for key, (low, _, high) in spans.items()},
        "processors": count,
        "others": round(used, 2),
        "crowded": crowded(used, count, torch.get_num_threads()),
    }
