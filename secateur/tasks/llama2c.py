"""Tiny llama2.c checkpoints (karpathy/llama2.c, MIT, export.py version 0 and tokenizer.py) as transformers models."""

import struct
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from secateur.errors import SecateurError
from secateur.tasks.gguf import rotary_to_halves
from secateur.utils.files import require_data


def load_aidreams() -> tuple[nn.Module, Any]:
    """The 231 k parameter English model of SECATEUR_DATA and its tokenizer (vocabulary 512, context 128).

    >>> model, tokenizer = load_aidreams()  # doctest: +SKIP
    >>> model(**tokenizer("Once upon a time", return_tensors="pt")).logits.shape  # doctest: +SKIP
    torch.Size([1, 8, 512])
    """
    folder = require_data("pretrained")
    return load_weights(folder / "aidreams260K.bin"), load_tokenizer(folder / "aidreams_tok512.bin")


def load_weights(path: str | Path) -> nn.Module:
    """A LlamaForCausalLM, float32, from a llama2.c version-0 file.

    File: int32 dim, hidden, layers, heads, kv heads, vocabulary (negative: head not tied), context; float32
    embedding; for all layers each of attention norm, wq, wk, wv, wo, ffn norm, w1, w2, w3; final norm; two unused
    rotary tables; the head if not tied. Raises SecateurError for a file of another length.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    data = Path(path).read_bytes()
    if len(data) < 28:
        raise SecateurError("is not a llama2.c checkpoint", where=str(path))
    dim, hidden, layers, heads, kv_heads, vocab, context = struct.unpack("7i", data[:28])
    values, tied, vocab = (
        torch.from_numpy(np.frombuffer(data, np.float32, offset=28).copy()),
        vocab > 0,
        abs(vocab),
    )
    head_dim, used = dim // heads, 0

    def take(*shape: int) -> torch.Tensor:
        nonlocal used
        count = int(np.prod(shape))
        if used + count > values.numel():
            raise SecateurError("is not a llama2.c checkpoint (too short)", where=str(path))
        used += count
        return values[used - count : used].view(shape)

    kv = kv_heads * head_dim
    embedding = take(vocab, dim)
    stacked = {
        "input_layernorm": take(layers, dim),
        "self_attn.q_proj": take(layers, dim, dim),
        "self_attn.k_proj": take(layers, kv, dim),
        "self_attn.v_proj": take(layers, kv, dim),
        "self_attn.o_proj": take(layers, dim, dim),
        "post_attention_layernorm": take(layers, dim),
        "mlp.gate_proj": take(layers, hidden, dim),
        "mlp.down_proj": take(layers, dim, hidden),
        "mlp.up_proj": take(layers, hidden, dim),
    }
    state = {"model.embed_tokens.weight": embedding, "model.norm.weight": take(dim)}
    take(2, context, head_dim // 2)
    state["lm_head.weight"] = embedding if tied else take(vocab, dim)
    if used != values.numel():
        raise SecateurError("is not a llama2.c checkpoint (too long)", where=str(path))
    for name, stack in stacked.items():
        for i, weight in enumerate(stack):
            if name.endswith(("q_proj", "k_proj")):
                weight = rotary_to_halves(weight, heads if name.endswith("q_proj") else kv_heads)
            state[f"model.layers.{i}.{name}.weight"] = weight
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=dim,
        intermediate_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=context,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=tied,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = LlamaForCausalLM(config)
    model.load_state_dict(state)
    return model.eval()


def load_tokenizer(path: str | Path) -> Any:
    """A fast tokenizer from a llama2.c tokenizer file: byte-pair merges in the order of the tokens' scores.

    File: int32, then per token float32 score, int32 length, bytes. As in llama2.c a text starts with token 1 and
    a space is put before it; what is not in the vocabulary becomes bytes (tokens 3 to 258).
    """
    from tokenizers import AddedToken, Tokenizer, decoders, normalizers, processors
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    data, at = Path(path).read_bytes(), 4
    tokens, scores = [], []
    while at < len(data):
        score, length = struct.unpack_from("fi", data, at)
        tokens.append(data[at + 8 : at + 8 + length].decode("utf-8"))
        scores.append(score)
        at += 8 + length
    tokens[1:3] = ["<s>", "</s>"]
    vocab = {token.replace(" ", "▁"): i for i, token in enumerate(tokens)}
    merges = []
    for token in sorted(list(vocab)[259:], key=lambda token: -scores[vocab[token]]):
        splits = [(token[:k], token[k:]) for k in range(1, len(token))]
        merges += [(a, b) for a, b in splits if a in vocab and b in vocab]
    fast = Tokenizer(BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    fast.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    fast.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    fast.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in ("<unk>", "<s>", "</s>")]
    )
    fast.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=fast,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="</s>",
        clean_up_tokenization_spaces=False,
    )
