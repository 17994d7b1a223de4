"""Text to train a small language model on: the Brown corpus and two novels, in windows of 128 tokens."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from secateur.data.text import load_text
from secateur.measure import perplexity
from secateur.tasks.llama2c import load_aidreams
from secateur.training.recipe import Recipe
from secateur.training.task import Task

RECIPE = Recipe(optimizer="adamw", lr=1e-3, batch=16, weight_decay=0.01, warmup=0.05)
SOURCES = ("brown", "middlemarch", "moby_dick")
WINDOW = 128
PARTS = {"train": (0.0, 0.9), "val": (0.9, 0.95), "test": (0.95, 1.0)}
"""Of each source, in characters."""


def load_ids(split: str, limit: int | None = None, sources: tuple[str, ...] = SOURCES) -> Tensor:
    """int64 [windows, 128]: a part of each source, tokenised line by line; at most `limit` windows, as many of each."""
    tokenizer = load_aidreams()[1]
    first, last = PARTS[split]
    each = -(-limit // len(sources)) if limit else None
    found = []
    for source in sources:
        text = load_text(source)
        part = text[int(first * len(text)) : int(last * len(text))]
        if each:
            part = part[: 6 * WINDOW * each]
        lines = [line for line in part.splitlines() if line.strip()]
        ids = tokenizer(lines, add_special_tokens=False, verbose=False)["input_ids"]
        flat = torch.tensor([i for line in ids for i in line])
        found.append(flat[: len(flat) // WINDOW * WINDOW].view(-1, WINDOW)[:each])
    return torch.cat(found)[:limit]


def load_network(name: str = "text-llama") -> nn.Module:
    """The 231 k parameter model `aidreams`, which was trained on stories."""
    return load_aidreams()[0]


def build() -> nn.Module:
    model = load_network()
    return type(model)(model.config)


def task(network: str, split: str, train: int | None, test: int | None) -> Task:
    """Windows of 128 tokens to train on; perplexity of others, 128 of them unless said (lower is better)."""
    held_out = load_ids(split, test or 128)
    return Task(
        name=f"text:{network}",
        build=build,
        pretrained=load_network,
        train=load_ids("train", train),
        quality=lambda model: perplexity(model, held_out.flatten(), WINDOW, batch=16),
        inputs=held_out[:1],
        metric="perplexity",
        recipe=RECIPE,
        epochs=1,
    )
