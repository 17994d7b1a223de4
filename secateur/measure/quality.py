"""How well a language model does: perplexity of a text, accuracy on multiple-choice questions and on labelled texts."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secateur.data.choices import Item
from secateur.data.text import context
from secateur.errors import SecateurError
from secateur.measure.cost import accepts
from secateur.utils.progress import bar
from secateur.utils.running import device_of, evaluating, logits_of

Progress = Callable[[int, int], None]


@torch.no_grad()
def perplexity(
    model: nn.Module,
    ids: Tensor,
    seqlen: int = 512,
    batch: int = 4,
    limit: int | None = None,
    progress: Progress | None = None,
) -> float:
    """exp of the mean negative log-likelihood of a text's tokens, in consecutive windows that see nothing outside.

    >>> perplexity(model, encode(tokenizer, load_text("wikitext2")), seqlen=2048)  # doctest: +SKIP

    ids int64 [n]: the whole text, tokenised once. As in the pruning literature (GPTQ, SparseGPT, Wanda) the tail
    that fills no window is dropped, and a window's first token is not predicted; a text shorter than one window is
    one window. seqlen is cut to the model's context. batch: windows at once. limit: at most so many windows.
    progress(done, total) is called after each batch. Infinity where the likelihood is not finite.
    Raises SecateurError for fewer than two tokens.
    """
    seqlen = min(seqlen, context(model) or seqlen, len(ids))
    if seqlen < 2 or batch < 1:
        raise SecateurError(
            f"{len(ids)} tokens in windows of {seqlen}, {batch} at once: nothing to predict",
            where="perplexity",
            fix="give a longer text, seqlen of at least 2 and batch of at least 1",
        )
    windows = ids[: len(ids) // seqlen * seqlen].view(-1, seqlen)[:limit]
    device, total = device_of(model), 0.0
    with evaluating(model), bar("perplexity", len(windows)) as advance:
        for start in range(0, len(windows), batch):
            rows = windows[start : start + batch].to(device)
            for logits, row in zip(logits_of(model(rows)), rows, strict=True):
                total += F.cross_entropy(logits[:-1].float(), row[1:], reduction="sum").item()
            advance(len(rows))
            if progress:
                progress(start + len(rows), len(windows))
    mean = total / (len(windows) * (seqlen - 1))
    return math.exp(mean) if mean < 700 else math.inf


def accuracy(
    model: nn.Module,
    tokenizer: Any,
    items: Sequence[Item],
    batch_tokens: int = 2048,
    progress: Progress | None = None,
) -> dict[str, float]:
    """The share of questions answered right, zero-shot.

    >>> accuracy(model, tokenizer, load_items("piqa", limit=200))  # doctest: +SKIP
    {'acc': 0.67, 'acc_norm': 0.68}

    acc: the continuation of the highest log-likelihood; acc_norm: of the highest log-likelihood a byte of the
    choice (the answer without its leading space); the first wins a tie. For items of one continuation
    (lambada) just acc: each of its tokens is the likeliest. Contexts longer than the model's are cut on the left.
    batch_tokens: padded tokens in one forward; rows of like length go together, padded on the right.
    A log-likelihood that is not a number counts as minus infinity.
    Raises SecateurError for no items.
    """
    if not items:
        raise SecateurError("there are no questions", where="accuracy", fix="give at least one item")
    pairs = [pair for item in items for pair in zip(item.contexts, item.continuations, strict=True)]
    scores = loglikelihood(model, tokenizer, pairs, batch_tokens, progress)
    acc = norm = 0
    at = 0
    for item in items:
        likelihoods, greedy = zip(*scores[at : at + len(item.contexts)], strict=True)
        at += len(item.contexts)
        if len(likelihoods) == 1:
            acc += greedy[0]
            continue
        sizes = [max(1, len(choice.encode())) for choice in item.choices]
        per_byte = [value / size for value, size in zip(likelihoods, sizes, strict=True)]
        acc += likelihoods.index(max(likelihoods)) == item.label
        norm += per_byte.index(max(per_byte)) == item.label
    result = {"acc": acc / len(items)}
    return result if len(items[0].contexts) == 1 else result | {"acc_norm": norm / len(items)}


@torch.no_grad()
def classified(model: nn.Module, batches: Sequence[Mapping[str, Tensor]]) -> float:
    """The share of texts whose likeliest class is their label.

    >>> classified(model, as_batches(tokenizer, *load_sst2("test")))  # doctest: +SKIP
    0.9

    batches: what the model takes, as keywords, beside int64 `labels` [texts].
    Raises SecateurError for a model that doesn't give one row of logits for each text.
    """
    device, right, count = device_of(model), 0, 0
    with evaluating(model):
        for batch in batches:
            labels = batch["labels"].to(device)
            inputs = {name: value.to(device) for name, value in batch.items() if name != "labels"}
            logits = logits_of(model(**inputs))
            if logits.shape[:-1] != labels.shape:
                raise SecateurError(
                    f"{type(model).__name__} gives logits {list(logits.shape)} for {len(labels)} texts",
                    where="accuracy",
                    fix="give a model that classifies texts, such as sst2",
                )
            right += int((logits.argmax(-1) == labels).sum())
            count += len(labels)
    return right / count


def encode_pairs(tokenizer: Any, pairs: Sequence[tuple[str, str]]) -> list[tuple[list[int], int]]:
    """For each (context, continuation) the ids of both joined, and how many at the end are the continuation's.

    The two are tokenised as one text, so that a word is not torn where they meet; spaces that end a context
    are counted to the continuation (as in lm-evaluation-harness).
    """
    contexts = [context.rstrip() for context, _ in pairs]
    wholes = [context + continuation for context, continuation in pairs]
    ids = tokenizer(wholes, verbose=False)["input_ids"]
    heads = tokenizer(contexts, verbose=False)["input_ids"]
    return [(whole, max(1, len(whole) - len(head))) for whole, head in zip(ids, heads, strict=True)]


@torch.no_grad()
def loglikelihood(
    model: nn.Module,
    tokenizer: Any,
    pairs: Sequence[tuple[str, str]],
    batch_tokens: int = 2048,
    progress: Progress | None = None,
) -> list[tuple[float, bool]]:
    """For each (context, continuation): the continuation's log-likelihood, and whether greedy decoding gives it."""
    longest = context(model) or 1 << 30
    rows: dict[tuple[int, ...], list[tuple[int, list[int]]]] = {}
    for i, (ids, count) in enumerate(encode_pairs(tokenizer, pairs)):
        ids, count = ids[-longest - 1 :], min(count, longest)
        rows.setdefault(tuple(ids[:-1]), []).append((i, ids[-count:]))
    order = sorted(rows, key=len, reverse=True)  # the heaviest batch first: memory runs out at once or never
    if not all(order):
        raise SecateurError(
            "an empty context and a continuation of one token: nothing to predict it from", where="accuracy"
        )
    results = [(-math.inf, False)] * len(pairs)
    device, at = device_of(model), 0
    with evaluating(model), bar("questions", len(order)) as advance:
        while at < len(order):
            chosen = order[at : at + max(1, batch_tokens // len(order[at]))]
            for row, kept, logits in _rows(model, chosen, [rows[key] for key in chosen], device):
                for i, target in rows[row]:
                    first = len(row) - len(target)
                    wanted = logits[torch.searchsorted(kept, torch.arange(first, len(row)))].float()
                    tokens = torch.tensor(target, device=device)
                    value = wanted.log_softmax(-1).gather(1, tokens[:, None]).double().sum().item()
                    value = -math.inf if math.isnan(value) else value
                    results[i] = (value, bool((wanted.argmax(-1) == tokens).all()))
            at += len(chosen)
            advance(len(chosen))
            if progress:
                progress(at, len(order))
    return results


def _rows(
    model: nn.Module,
    chosen: list[tuple[int, ...]],
    targets: list[list[tuple[int, list[int]]]],
    device: torch.device,
) -> list[tuple[tuple[int, ...], Tensor, Tensor]]:
    """One forward of right-padded rows: each row, the positions whose logits were kept (CPU), those logits."""
    width = len(chosen[0])
    ids = torch.zeros(len(chosen), width, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    needed: set[int] = set()
    for r, (row, wants) in enumerate(zip(chosen, targets, strict=True)):
        ids[r, : len(row)] = torch.tensor(row)
        mask[r, : len(row)] = 1
        needed.update(range(len(row) - max(len(target) for _, target in wants), len(row)))
    kept, extra = torch.arange(width), {}
    if accepts(model, "logits_to_keep"):
        kept = torch.tensor(sorted(needed))
        extra["logits_to_keep"] = kept.to(device)
    if accepts(model, "attention_mask") and not mask.all():
        extra["attention_mask"] = mask.to(device)
    logits = logits_of(model(ids.to(device), **extra))
    return [(row, kept, values) for row, values in zip(chosen, logits, strict=True)]
