"""GGUF files against llama.cpp: what comes next by the files that secateur wrote, as llama.cpp computes it, and its tokens.

    pip install xllamacpp==2026.10.11549  # llama.cpp
    python benchmarks/gguf_files.py --only llama qwen2      # tiny random models of each family
    python benchmarks/gguf_files.py --model small --data text.txt  # a folder, or smollm2

Prints for each family the largest difference of log-probabilities of the next token, over all tokens and up to five prompts, as a
share of the largest, and whether the tokens of a text agree.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import torch

import secateur
from secateur.families.gguf import FAMILIES
from secateur.io.gguf import export_gguf

PROMPTS = 5
TEXT = "The cat saw 12,345 dogs; naïve Ωmega isn't 漢字.\n\n  Two  spaces, done!"
SIZES: dict[str, Any] = {
    "vocab_size": 320, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1,
    "initializer_range": 0.15,
}  # fmt: skip
MORE: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": None, "head_dim": 16},
    "qwen3": {"head_dim": 16},
    "gemma": {"head_dim": 16},
    "gemma2": {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 64},
    "granite": {"embedding_multiplier": 2.0, "residual_multiplier": 0.5, "attention_multiplier": 0.1, "logits_scaling": 3.0},
    "llama3": {"rope_parameters": {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}},
    "linear": {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}},
}  # fmt: skip
ALSO = {"llama3": "llama", "linear": "llama", "layers differ": "llama"}


class Reader:
    """llama.cpp's server over a file, on one thread, with float32 keys and values."""

    def __init__(self, path: Path):
        import xllamacpp

        settings = xllamacpp.CommonParams()
        settings.model.path = str(path)
        settings.n_ctx, settings.n_parallel, settings.warmup, settings.verbosity = 512, 1, False, -1
        settings.cache_type_k = settings.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = 1
        settings.endpoint_props, settings.port = True, 0
        self.server = xllamacpp.Server(settings)

    def log_probabilities(self, ids: list[int], size: int) -> np.ndarray | None:
        """Of every token that may come next, [size]; None where the server gives none, as after half a character."""
        found = self.server.handle_completions({"prompt": ids, "n_predict": 1, "n_probs": size, "temperature": 0.0, "cache_prompt": False, "ignore_eos": True})  # fmt: skip
        found = json.loads(found) if isinstance(found, str | bytes) else found
        if not found["choices"][0]["logprobs"]:
            return None
        rows = found["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
        values = np.full(size, np.nan)
        for row in rows:
            values[row["id"]] = row["logprob"]
        return values

    def tokens(self, text: str) -> list[int]:
        """Of a text, with what is put around it."""
        body = json.dumps({"content": text, "add_special": True, "parse_special": True}).encode()
        request = urllib.request.Request(f"{self.server.listening_address}/tokenize", body, {"Content-Type": "application/json"})  # fmt: skip
        with urllib.request.urlopen(request) as answer:
            return json.load(answer)["tokens"]


def compared(model: Any, tokenizer: Any, folder: Path, name: str, text: str) -> str:
    """One row: the file, the largest difference of log-probabilities after some prompts, and whether tokens agree."""
    path = folder / f"{name}.gguf"
    told = export_gguf(model, path, tokenizer)
    size = model.get_input_embeddings().num_embeddings
    reader, gaps = Reader(path), list[float]()
    whole = tokenizer(text, add_special_tokens=False).input_ids
    for length in range(3, len(whole), 5):
        ids = whole[:length]
        if len(gaps) == PROMPTS or (got := reader.log_probabilities(ids, size)) is None:
            continue
        with torch.no_grad():
            wanted = model(torch.tensor([ids])).logits[0, -1].double().log_softmax(-1).numpy()
        assert np.isfinite(got).all(), f"{np.isnan(got).sum()} tokens weren't given"
        gaps.append(float(np.abs(got - wanted).max() / np.abs(wanted).max()))
    assert gaps, "no prompt was answered"
    same = "agree" if reader.tokens(text) == tokenizer(text).input_ids else "DIFFER"
    return f"{name:12s} {told['architecture']:8s} {told['bytes']:>12,} bytes  log-probabilities differ by {max(gaps):.1e} of the largest ({len(gaps)} prompts); tokens {same}"


def byte_tokenizer() -> Any:
    """Bytes, two special tokens and three merges."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = ["<s>", "</s>", *letters, "th", "the", "Ġth"]
    merges = [("t", "h"), ("th", "e"), ("Ġ", "th")]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def main() -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", default=[*FAMILIES, *ALSO])
    parser.add_argument("--model")
    parser.add_argument("--data")
    parser.add_argument("--dtype", default="float32")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if given.model:
            from secateur.data.text import load_text
            from secateur.tasks import load_model

            model, tokenizer = load_model(given.model, dtype=given.dtype)
            text = load_text(given.data)[:20_000] if given.data else TEXT
            print(compared(model, tokenizer, Path(folder), Path(given.model).name, text))
            return
        for name in given.only:
            torch.manual_seed(0)
            kind = ALSO.get(name, name)
            config = AutoConfig.for_model(kind, **SIZES, **MORE.get(name, {}))
            model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, given.dtype)).eval()
            with torch.no_grad():  # norms and biases that aren't ones and zeros
                for parameter in model.parameters():
                    if parameter.dim() < 2:
                        parameter += 0.1 * torch.randn_like(parameter)
            if name == "layers differ":
                settings = {"kinds": ("neurons", "kv_groups"), "allocation": "global"}
                model = secateur.prune(model, method="group-magnitude", target="60%", **settings).model
            print(compared(model, byte_tokenizer(), Path(folder), name, TEXT), flush=True)


if __name__ == "__main__":
    main()
