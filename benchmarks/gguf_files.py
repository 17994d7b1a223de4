"""GGUF files against llama.cpp: the logits of what secateur wrote, as llama.cpp's own reader computes them, and its tokens.

    pip install llama-cpp-py-sync==0.11739
    python benchmarks/gguf_files.py --only llama qwen2      # tiny random models of each family
    python benchmarks/gguf_files.py --model small --data text.txt  # a folder, or smollm2

Prints for each family the largest difference of logits over the largest logit, and whether the tokens of a text agree.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from secateur.families.gguf import FAMILIES
from secateur.io.gguf import export_gguf

TEXT = "The cat saw 12,345 dogs; naïve Ωmega isn't 漢字.\n\n  Two  spaces, done!"
SIZES: dict[str, Any] = {
    "vocab_size": 320, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128,
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
ALSO = {"llama3": "llama", "linear": "llama"}


def reader_logits(path: Path, ids: list[int]) -> np.ndarray:
    """Logits [tokens, vocabulary] as llama.cpp computes them in float32."""
    from llama_cpp_py_sync._cffi_bindings import get_ffi, get_lib

    ffi, lib = get_ffi(), get_lib()
    quiet = ffi.callback("void(int, const char*, void*)", lambda level, text, _: None)
    lib.llama_log_set(quiet, ffi.NULL)
    lib.llama_backend_init()
    settings = lib.llama_model_default_params()
    model = lib.llama_model_load_from_file(str(path).encode(), settings)
    if model == ffi.NULL:
        raise SystemExit(f"{path}: llama.cpp can't read it")
    context = lib.llama_context_default_params()
    context.n_ctx, context.n_batch, context.n_threads = 512, 512, 1
    if hasattr(context, "flash_attn_type"):
        context.flash_attn_type = 0
    context.type_k = context.type_v = 0  # float32 keys and values
    state = lib.llama_init_from_model(model, context)
    batch = lib.llama_batch_init(len(ids), 0, 1)
    batch.n_tokens = len(ids)
    for place, token in enumerate(ids):
        batch.token[place], batch.pos[place], batch.n_seq_id[place] = token, place, 1
        batch.seq_id[place][0], batch.logits[place] = 0, 1
    if lib.llama_decode(state, batch):
        raise SystemExit(f"{path}: llama.cpp can't run it")
    size = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model))
    rows = [np.frombuffer(ffi.buffer(lib.llama_get_logits_ith(state, k), 4 * size), np.float32).copy() for k in range(len(ids))]  # fmt: skip
    lib.llama_batch_free(batch)
    lib.llama_free(state)
    lib.llama_model_free(model)
    return np.stack(rows)


def reader_tokens(path: Path, text: str) -> list[int]:
    """The tokens of a text as llama.cpp splits it, with what it puts around a text."""
    from llama_cpp_py_sync._cffi_bindings import get_ffi, get_lib

    ffi, lib = get_ffi(), get_lib()
    settings = lib.llama_model_default_params()
    settings.vocab_only = True
    model = lib.llama_model_load_from_file(str(path).encode(), settings)
    raw = text.encode()
    room = ffi.new("int32_t[]", len(raw) + 16)
    count = lib.llama_tokenize(lib.llama_model_get_vocab(model), raw, len(raw), room, len(raw) + 16, True, True)
    lib.llama_model_free(model)
    return list(room[0:count])


def compared(model: Any, tokenizer: Any, folder: Path, name: str, text: str) -> str:
    path = folder / f"{name}.gguf"
    told = export_gguf(model, path, tokenizer)
    size = model.get_input_embeddings().num_embeddings
    ids = torch.randint(0, size, (1, 48), generator=torch.Generator().manual_seed(0))
    if tokenizer is not None:
        ids = torch.tensor([tokenizer(text, add_special_tokens=False).input_ids[:256]])
    with torch.no_grad():
        wanted = model.float()(ids).logits[0].numpy()
    got = reader_logits(path, ids[0].tolist())
    gap = float(np.abs(got - wanted).max() / np.abs(wanted).max())
    line = f"{name:16s} {told['architecture']:8s} {told['bytes']:>12,} bytes  logits differ by {gap:.1e} of the largest"
    if tokenizer is not None:
        same = reader_tokens(path, text) == tokenizer(text).input_ids
        line += f"  tokens {'agree' if same else 'DIFFER'}"
    return line


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
            print(compared(model, None, Path(folder), name, ""))


if __name__ == "__main__":
    main()
