"""Params, MACs, bytes, latency, memory, perplexity and accuracy of a model, in one dict."""

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateur.data import camvid, choices, digits, hub, pictures, sst2, super_resolution, text
from secateur.errors import SecateurError
from secateur.measure import harness, timing, vision
from secateur.measure.cost import (
    accepts,
    macs,
    macs_and_memory,
    params,
    params_nonzero,
    peak_memory,
    size_bytes,
)
from secateur.measure.quality import accuracy, classified, perplexity
from secateur.measure.timing import decode_latency, in_turn, latencies, latency
from secateur.utils.inputs import Inputs, describe
from secateur.utils.running import device_of

__all__ = [
    "accuracy",
    "decode_latency",
    "in_turn",
    "latencies",
    "latency",
    "macs",
    "measure",
    "params",
    "params_nonzero",
    "peak_memory",
    "perplexity",
    "size_bytes",
]


def measure(
    model: nn.Module,
    tokenizer: Any = None,
    tasks: Sequence[str] = (),
    limit: int | None = None,
    seqlen: int = 512,
    batch: int = 4,
    latency: bool = False,
    inputs: Inputs | None = None,
    counted: Sequence[int] = (),
) -> dict[str, Any]:
    """What a model costs and how well it does, as a dict that JSON can hold.

    >>> measure(model, tokenizer, tasks=["wikitext2", "piqa"], limit=100)  # doctest: +SKIP
    {'params': 134515008, ..., 'perplexity': {'wikitext2': 25.4}, 'accuracy': {'piqa': {'acc': 0.67, ...}}, ...}
    >>> measure(resnet, inputs=torch.ones(1, 3, 224, 224), latency=True)["latency"]  # doctest: +SKIP
    >>> measure(espnet, tasks=["camvid"])["accuracy"]  # doctest: +SKIP
    {'camvid': {'miou': 0.553, 'acc': 0.8596}}

    tasks: a set of text or a text file (perplexity, see data.text), or a set of questions (accuracy, see
    data.choices), or of pictures (data.pictures, `digits`; `camvid`, with a label for each pixel; `set5`, `set14` for
    networks that enlarge them: PSNR), or of phrases (`sst2`); `hf:NAME:SPLIT:FIELD`, a text of `datasets`; `lm-eval:NAME`, a
    task that lm-evaluation-harness scores. limit: at most so many windows of a text and questions of a set. seqlen: tokens in a window,
    cut to the model's context. batch: windows at once, and questions of as many tokens. inputs: of the forward
    that macs, memory and latency are measured on; a language model gets [1, seqlen] token ids. counted: what `cost.counting` found for them already.

    Keys: params, params_nonzero, macs, size_bytes, peak_memory_bytes (macs and this are None without inputs),
    perplexity {task: x} (None where it is not finite), accuracy {task: {"acc", "acc_norm", "miou"}}, chance {task: what
    guessing gives}, questions {task: count}, psnr {task: dB}, seconds (of all of this), latency (`timing.latencies`:
    "forward_seconds", for language models "decode_seconds_per_token", their quartiles, how busy the machine was),
    not_measured {key: why} for every figure that is missing, and what was measured on: inputs (shapes), seqlen, limit,
    dtype, device, threads.
    Raises SecateurError for an unknown task or missing data, before any work, and for tasks without a tokenizer.
    """
    start = time.perf_counter()
    seqlen = min(seqlen, text.context(model) or seqlen)
    if inputs is None:
        inputs = token_inputs(model, seqlen)
    asked = [tasks] if isinstance(tasks, str) else list(tasks)
    texts, questions, shown = _load(
        model, [task for task in asked if not task.startswith(harness.PREFIX)], tokenizer, limit
    )
    others = harness.load_tasks([task for task in asked if task.startswith(harness.PREFIX)])
    first = next(model.parameters(), torch.empty(0))
    counts: Sequence[int | None] = counted
    if not counts:
        counts = (None, None) if inputs is None else macs_and_memory(model, inputs)
    result: dict[str, Any] = {
        "params": params(model),
        "params_nonzero": params_nonzero(model),
        "macs": counts[0],
        "size_bytes": size_bytes(model),
        "peak_memory_bytes": counts[1],
        "perplexity": {},
        "accuracy": {},
        "psnr": {},
        "chance": {},
        "questions": {},
        "latency": {},
        "not_measured": {} if inputs is not None else dict.fromkeys(("macs", "peak_memory_bytes"), NO_INPUTS),
        "inputs": None if inputs is None else describe(inputs),
        "seqlen": seqlen,
        "limit": limit,
        "dtype": str(first.dtype).removeprefix("torch."),
        "device": str(first.device),
        "threads": torch.get_num_threads(),
    }
    if latency:
        [result["latency"]], _, reasons = timing.latencies([model], inputs)
        result["not_measured"] |= reasons
    for name, ids in texts.items():
        value = perplexity(model, ids, seqlen, batch, limit)
        result["perplexity"][name] = value if math.isfinite(value) else None
        if not math.isfinite(value):
            result["not_measured"][f"perplexity, {name}"] = f"it is {value}"
    for name, items in questions.items():
        result["accuracy"][name] = accuracy(model, tokenizer, items, batch * seqlen)
        result["chance"][name] = choices.chance(items)
        result["questions"][name] = len(items)
    for name, theirs in others:
        values, result["questions"][name] = harness.score(model, tokenizer, theirs, limit)
        if "perplexity" in values:
            result["perplexity"][name] = values.pop("perplexity")
        result["accuracy"][name] = values
    for name, look in shown.items():
        for key, value in look().items():
            result[key][name] = value
    return result | {"seconds": time.perf_counter() - start}


NO_INPUTS = "no example inputs were given"
SEEN = (*pictures.SETS, "digits", "camvid", "sst2", *super_resolution.SETS)
"""Sets of pictures, and of phrases, that `measure` knows."""
CLASSES = {"cifar10": 10, "imagenet-sample": 1000, "digits": 10}
"""Into how many classes their pictures are sorted."""


def seen(
    model: nn.Module, name: str, limit: int | None = None, tokenizer: Any = None
) -> Callable[[], dict[str, Any]]:
    """Loads a set of SEEN; what it gives measures a network on it: {"accuracy": {"acc": ..}} or {"psnr": ..}.

    Beside an accuracy stand `chance`, what guessing gives, and `questions`, of how many pictures it is the share.

    Raises SecateurError for missing data, pairs of pictures given to a network that doesn't enlarge them, and phrases
    without a tokenizer.
    """
    if name in super_resolution.SETS:
        if not hasattr(model, "scale") or not hasattr(model, "peak"):
            raise SecateurError(
                f"{type(model).__name__} doesn't say by how much it enlarges pictures",
                where=name,
                fix="give vdsr, carn-m, rfdn, or a model with scale, luma, peak and enlarged",
            )
        form: Any = (model.scale, model.luma, model.peak, model.enlarged)
        pairs = super_resolution.load_pairs(name, *form)[:limit]
        return lambda: {"psnr": vision.psnr(model, pairs)}
    if name == "camvid":
        scenes = camvid.load_camvid("all", limit)
        classes = len(camvid.CLASSES)
        return lambda: {"accuracy": vision.segmentation(model, *scenes, classes), "chance": 1 / classes}
    if name == "sst2":
        batches = sst2.as_batches(tokenizer, *sst2.load_sst2("test", limit))
        count = sum(len(batch["labels"]) for batch in batches)
        return lambda: {
            "accuracy": {"acc": classified(model, batches)},
            "chance": 1 / 2,
            "questions": count,
        }
    x, labels = digits.load_digits("test", limit) if name == "digits" else pictures.load_pictures(name, limit)
    about = {"chance": 1 / CLASSES[name], "questions": len(labels)}
    return lambda: {"accuracy": {"acc": vision.accuracy(model, x, labels)}, **about}


def _load(
    model: nn.Module, tasks: Sequence[str], tokenizer: Any, limit: int | None
) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Callable[[], dict[str, Any]]]]:
    shown = {task: seen(model, task, limit, tokenizer) for task in tasks if task in SEEN}
    tasks = [task for task in tasks if task not in shown]
    if tasks and tokenizer is None:
        raise SecateurError("tasks need a tokenizer", where="measure", fix="give the model's tokenizer")
    if limit is not None and limit < 1:
        raise SecateurError(f"{limit} is not a positive number", where="limit", fix="ask for at least 1")
    texts, questions = {}, {}
    for task in tasks:
        if task in choices.SETS:
            questions[task] = choices.load_items(task, limit)
        elif task in text.NAMES or task.startswith(hub.PREFIX) or Path(task).exists():
            texts[task] = text.encode(tokenizer, text.load_text(task), special=True)
        else:
            names = ", ".join([*text.NAMES, *choices.SETS, *SEEN])
            raise SecateurError("no such task", where=task, fix=f"give a text file, or one of {names}")
    return texts, questions, shown


def token_inputs(model: nn.Module, seqlen: int) -> dict[str, Tensor] | None:
    """What a language model is counted and timed on: [1, seqlen] token ids, cut to its context; None for other models."""
    config = getattr(model, "config", None)
    size = getattr(config, "vocab_size", None)
    if size is None or not accepts(model, "input_ids") or getattr(config, "is_encoder_decoder", False):
        return None
    length = min(seqlen, text.context(model) or seqlen)
    return {"input_ids": torch.arange(length, device=device_of(model))[None] % size}
