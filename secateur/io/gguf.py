"""Language models as GGUF files, for llama.cpp and what is built on it.

Names of tensors and keys come from the `gguf` package, what a family needs beside them from `families/gguf.py`. A model
whose layers differ is written under the one architecture that llama.cpp reads so.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from secateur.errors import SecateurError, choose
from secateur.families.gguf import ACTIVATIONS, FAMILIES, GgufFamily
from secateur.io.gguf_tokenizer import add_tokenizer, check_tokenizer
from secateur.utils.files import atomic_file

SUFFIX = ".gguf"
WHERE = "GGUF"
FOLDER = "save it as a folder instead"
TYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
FILE_TYPES = {"F32": 0, "F16": 1, "BF16": 32}


def is_gguf(path: str | Path | None) -> bool:
    """Whether a name is that of a GGUF file."""
    return path is not None and str(path).lower().endswith(SUFFIX)


def check_gguf(model: nn.Module, tokenizer: Any = None) -> GgufFamily:
    """Refuse a model or tokenizer that no GGUF file can hold, before any work is done; gives the facts of its family.

    Raises `SecateurError` for an architecture without a name there, and for what its config says beyond that.
    """
    config: Any = getattr(model, "config", None)
    kind = str(getattr(config, "model_type", type(model).__name__)).removeprefix("pruned_")
    choose(
        kind,
        FAMILIES,
        what="architecture",
        where=WHERE,
        error=f"there is no way to write a {kind} model",
        near=0,
        fix=f"{FOLDER}; what can be written: {', '.join(FAMILIES)}",
    )
    family = FAMILIES[kind]
    find: Any = getattr(model, "get_output_embeddings", lambda: None)
    head = find()
    if head is None:
        raise SecateurError(f"{type(model).__name__} writes no tokens", where=WHERE, fix=FOLDER)
    for name, holds, can in family.rules:
        if not holds(config):
            raise SecateurError(
                f"{name} is {getattr(config, name, None)}; llama.cpp's {family.architecture} reads {can}",
                where=WHERE,
                fix=FOLDER,
            )
    act = getattr(config, "hidden_act", None) or getattr(config, "hidden_activation", None)
    if act not in ACTIVATIONS.get(kind, ("silu",)):
        raise SecateurError(f"its activation is {act}", where=WHERE, fix=FOLDER)
    rope = _rope(config)
    if rope.get("rope_type", "default") not in ("default", "linear", "llama3"):
        raise SecateurError(f"its positions are scaled by {rope['rope_type']}", where=WHERE, fix=FOLDER)
    dtypes = {p.dtype for p in model.parameters()}
    if len(dtypes) > 1 or not dtypes <= TYPES.keys():
        raise SecateurError(f"its weights are {', '.join(sorted(map(str, dtypes)))}", where=WHERE, fix="give --dtype float32")  # fmt: skip
    if tokenizer is not None:
        check_tokenizer(tokenizer, model.get_input_embeddings().weight.shape[0])  # type: ignore[operator]
    return family


def export_gguf(model: nn.Module, path: str | Path, tokenizer: Any = None) -> dict[str, Any]:
    """Write a language model of transformers, pruned or not, as a GGUF file in its own precision.

    >>> export_gguf(pruned.model, "small.gguf", tokenizer=pruned.tokenizer)  # doctest: +SKIP
    {'path': 'small.gguf', 'bytes': 269134208, 'architecture': 'deci', 'tensors': 272}

    Matrices are float32, float16 or bfloat16 as the model is; vectors are float32, as llama.cpp wants them. The file is
    read back with the `gguf` package before it takes its name, and every tensor compared bit by bit. Without a tokenizer
    it holds none, and programs that read text can't use it.

    Raises `SecateurError` for an architecture, a config or a tokenizer that a GGUF file can't hold, and for a full disk;
    nothing is written then.
    """
    from gguf import GGUFWriter

    path = Path(path).expanduser()
    family = check_gguf(model, tokenizer)
    config: Any = model.config
    tensors = dict(_tensors(model, family))
    sizes = _layer_sizes(tensors, _head_dim(model, config), config)
    architecture = family.architecture
    if any(isinstance(value, list) for value in sizes.values()):
        if family.layered is None:
            raise SecateurError(
                f"its layers differ, and llama.cpp's {architecture} reads one width for all of them",
                where=WHERE,
                fix=f"cut with --uniform, or {FOLDER}",
            )
        architecture = family.layered
    with atomic_file(path) as partial:
        writer = GGUFWriter(partial, architecture)
        _add_numbers(writer, model, family, sizes)
        writer.add_file_type(FILE_TYPES[TYPES[next(model.parameters()).dtype]])
        add_tokenizer(writer, tokenizer, config, model.get_input_embeddings().weight.shape[0])  # type: ignore[operator]
        for name, tensor in tensors.items():
            kind, shape, data = _stored(tensor)
            writer.add_tensor_info(name, shape, data.dtype, data.nbytes, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in tensors.values():
            writer.write_tensor_data(_stored(tensor)[2])
        writer.close()
        _compare(partial, tensors)
        size = partial.stat().st_size
    return {"path": str(path), "bytes": size, "architecture": architecture, "tensors": len(tensors)}


def _rope(config: Any) -> Mapping[str, Any]:
    return getattr(config, "rope_parameters", None) or {}


def _head_dim(model: nn.Module, config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _tensors(model: nn.Module, family: GgufFamily) -> Iterator[tuple[str, Tensor]]:
    """(name in the file, values as they stand there) of every parameter; what is tied to the table of tokens is left out."""
    from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, get_tensor_name_map

    config: Any = model.config
    kinds = {name: kind for kind, name in MODEL_ARCH_NAMES.items()}
    kind: MODEL_ARCH = kinds[family.architecture]
    names = get_tensor_name_map(kind, config.num_hidden_layers)
    width = _head_dim(model, config)
    for own, parameter in model.named_parameters():
        name = names.get_name(own, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise SecateurError(f"there is no name for {own}", where=WHERE, fix=FOLDER)
        value = parameter.detach()
        leaf = name.split(".")[-2]
        if family.pairs and leaf in ("attn_q", "attn_k"):
            value = rotary_to_pairs(value, value.shape[0] // width)
        if family.shift and leaf.endswith("norm"):
            value = value.float() + family.shift
        yield name, value
    rope = _rope(config)
    if rope.get("rope_type") == "llama3":
        rotary = next(m for m in model.modules() if hasattr(m, "inv_freq"))
        plain = 1 / rope["rope_theta"] ** (torch.arange(0, width, 2).float() / width)
        yield "rope_freqs.weight", plain / rotary.inv_freq.float().cpu()


def rotary_to_pairs(weight: Tensor, heads: int) -> Tensor:
    """Rows of queries or keys from two rotated halves (transformers) to rotated pairs (llama.cpp).

    weight [heads * head_dim, ...]; within a head, row j * head_dim / 2 + i goes to row 2i + j.
    """
    rows = weight.shape[0]
    return weight.reshape(heads, 2, rows // heads // 2, -1).transpose(1, 2).reshape(weight.shape)


def _layer_sizes(tensors: Mapping[str, Tensor], width: int, config: Any) -> dict[str, int | list[int]]:
    """Numbers of heads, of key-value heads and of neurons: one where all layers agree, else a list."""
    sizes: dict[str, int | list[int]] = {}
    for key, leaf, each in (
        ("heads", "attn_q", width),
        ("kv_heads", "attn_k", width),
        ("neurons", "ffn_up", 1),
    ):
        found = []
        for layer in range(config.num_hidden_layers):
            name = f"blk.{layer}.{leaf}.weight"
            if name not in tensors:
                raise SecateurError(f"layer {layer} has no {leaf}", where=WHERE, fix=FOLDER)
            found.append(tensors[name].shape[0] // each)
        sizes[key] = found[0] if len(set(found)) == 1 else found
    return sizes


def _add_numbers(writer: Any, model: Any, family: GgufFamily, sizes: Mapping[str, Any]) -> None:
    from gguf import RopeScalingType

    config, width, rope = model.config, _head_dim(model, model.config), _rope(model.config)
    writer.add_name(str(getattr(config, "_name_or_path", "") or type(model).__name__))
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(sizes["neurons"])
    writer.add_head_count(sizes["heads"])
    writer.add_head_count_kv(sizes["kv_heads"])
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(width)
    writer.add_rope_freq_base(float(rope.get("rope_theta", 10000.0)))
    if rope.get("rope_type") == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope["factor"]))
    writer.add_vocab_size(model.get_input_embeddings().weight.shape[0])
    for key, value in family.numbers.items():
        number = value(config)
        add = writer.add_uint32 if isinstance(number, int) else writer.add_float32
        add(f"{writer.arch}.{key}", number)


def _stored(tensor: Tensor) -> tuple[Any, tuple[int, ...], np.ndarray]:
    """(type in the file, shape, bytes) of a tensor; vectors are float32."""
    from gguf import GGMLQuantizationType

    tensor = tensor.cpu().contiguous()
    if tensor.dim() < 2:
        tensor = tensor.float()
    kind = GGMLQuantizationType[TYPES[tensor.dtype]]
    if tensor.dtype == torch.bfloat16:
        data = tensor.view(torch.uint8).numpy()
        return kind, tuple(data.shape), data
    return kind, tuple(tensor.shape), tensor.numpy()


def _compare(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Read the file back, and compare every tensor bit by bit."""
    from gguf import GGUFReader

    found = {tensor.name: tensor for tensor in GGUFReader(path).tensors}
    for name, wanted in tensors.items():
        kind, _, data = _stored(wanted)
        same = name in found and found[name].tensor_type == kind and tuple(reversed(found[name].shape.tolist())) == tuple(wanted.shape)  # fmt: skip
        if not same or not np.array_equal(np.asarray(found[name].data).reshape(-1).view(np.uint8), data.reshape(-1).view(np.uint8)):  # fmt: skip
            raise SecateurError(f"{name} isn't what was written", where=str(path), fix="write it again")
