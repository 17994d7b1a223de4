"""Cut half of every prunable group in current architectures and check each result; one process per model.

    python benchmarks/architectures.py --out architectures.csv            # all of the list
    python benchmarks/architectures.py timm:resnet18 hf:llama             # some

Each row: parameters before and after, seconds to trace and to cut, whether the result is sound (forward, same
output shape, slice == mask where exact, whole heads, gradients, a batch of two and of one), groups refused and why.
Models are random: timm:NAME at the smallest legal size, hf:TYPE from a tiny config.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

FIELDS = ["model", "params", "cut", "share", "sound", "trace_s", "cut_s", "units", "refused", "reason"]
SHARDS = Path(__file__).parent / "architectures.txt"


def tiny_config(kind: str) -> Any:
    """A config of a transformers model type: hidden 64, 2 layers, 8 heads, 4 key-value heads, 4 experts."""
    import transformers

    sizes = {
        "vocab_size": 256, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 8, "max_position_embeddings": 64,
        "num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
        "d_model": 64, "n_embd": 64, "n_layer": 2, "n_head": 8, "n_positions": 64, "ffn_dim": 128,
        "word_embed_proj_dim": 64, "d_ff": 128, "d_kv": 8, "num_layers": 2, "num_heads": 8, "num_decoder_layers": 2,
        "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 8, "decoder_attention_heads": 8,
        "encoder_ffn_dim": 128, "decoder_ffn_dim": 128, "image_size": 64, "patch_size": 16, "embedding_size": 32,
        "state_size": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    base = transformers.AutoConfig.for_model(kind)
    known = set(base.to_dict())
    own: dict[str, Any] = {k: v for k, v in sizes.items() if k in known}
    special: dict[str, dict[str, Any]] = {
        "albert": {"embedding_size": 32},
        "clip": {
            "text_config": {**{k: sizes[k] for k in ("vocab_size", "hidden_size", "intermediate_size",
                            "num_hidden_layers", "num_attention_heads", "max_position_embeddings")}},
            "vision_config": {**{k: sizes[k] for k in ("hidden_size", "intermediate_size", "num_hidden_layers",
                              "num_attention_heads", "image_size", "patch_size")}},
            "projection_dim": 32,
        },
        "convnext": {"hidden_sizes": [16, 32, 64, 128], "depths": [1, 1, 2, 1], "patch_size": 4},
        "mamba": {"time_step_rank": 4},
        "mamba2": {"num_heads": 16, "head_dim": 8, "n_groups": 2, "state_size": 8, "chunk_size": 8},
        "swin": {"embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4, "patch_size": 4},
        "wav2vec2": {"conv_dim": (32,) * 7, "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4},
        "whisper": {"max_source_positions": 32, "max_target_positions": 32, "num_mel_bins": 16,
                    "decoder_start_token_id": 1},
        "gemma3_text": {"layer_types": ["sliding_attention", "full_attention"]},
        "falcon": {"new_decoder_architecture": True, "num_kv_heads": 4},
    }  # fmt: skip
    own.update(special.get(kind, {}))
    own.pop("num_layers", None) if "num_hidden_layers" in known and kind != "t5" else None
    if kind in ("gpt2", "bloom", "gpt_neox", "opt", "llama"):
        own.pop("num_experts", None)
    return transformers.AutoConfig.for_model(kind, **own)


def build(name: str, batch: int = 2) -> tuple[torch.nn.Module, Any]:
    """The model called `timm:...` or `hf:...` with random weights, and inputs for it."""
    torch.manual_seed(0)
    source, _, kind = name.partition(":")
    if source == "timm":
        import timm

        model = timm.create_model(kind, pretrained=False)
        model, size = smallest(kind, model)
        return fill(model), torch.randn(batch, 3, size, size)
    import transformers

    config = tiny_config(kind)
    special = {"deit": "DeiTForImageClassification", "clip": "CLIPModel"}
    if kind in special:
        model = getattr(transformers, special[kind])(config)
    else:
        for auto in (
            transformers.AutoModelForSeq2SeqLM, transformers.AutoModelForMaskedLM, transformers.AutoModelForCausalLM,
            transformers.AutoModelForImageClassification, transformers.AutoModelForCTC,
        ):  # fmt: skip
            if type(config) in auto._model_mapping:
                model = auto.from_config(config)
                break
    ids = torch.randint(3, 256, (batch, 16))
    if kind == "whisper":
        model = transformers.WhisperForConditionalGeneration(config)
        inputs: Any = {"input_features": torch.randn(batch, 16, 64), "decoder_input_ids": ids}
    elif kind == "t5":
        inputs = {"input_ids": ids, "decoder_input_ids": ids[:, :8]}
    elif kind == "clip":
        inputs = {"input_ids": ids, "pixel_values": torch.randn(batch, 3, 64, 64)}
    elif kind == "wav2vec2":
        inputs = {"input_values": torch.randn(batch, 1600)}
    elif model.main_input_name == "pixel_values":
        inputs = {"pixel_values": torch.randn(batch, 3, 64, 64)}
    else:
        inputs = {"input_ids": ids}
    return fill(model), inputs


def smallest(kind: str, model: torch.nn.Module) -> tuple[torch.nn.Module, int]:
    """The smallest image a model accepts: try sizes, rebuilding with `img_size` where the size is fixed."""
    import timm

    native = model.default_cfg["input_size"][-1]  # type: ignore[index,union-attr]
    fixed = model.default_cfg.get("fixed_input_size", False)  # type: ignore[union-attr]
    for size in (64, 96, 128, 224, native):
        if size > native:
            continue
        try:
            trial = (
                timm.create_model(kind, pretrained=False, img_size=size)
                if fixed and size != native
                else model
            )
            with torch.no_grad():
                trial.eval()(torch.randn(1, 3, size, size))
            return trial, size
        except Exception:  # noqa: BLE001, S112
            continue
    return model, native


def fill(model: torch.nn.Module) -> torch.nn.Module:
    """Random values everywhere, so that zeros (layer scales, position biases) do not hide a wrong cut."""
    for p in model.parameters():
        if p.dim() < 2 or float(p.detach().abs().max()) < 1e-4:
            p.data.add_(torch.randn_like(p) * 0.1)
    for name, b in model.named_buffers():
        if "running_var" in name:
            b.data.uniform_(0.5, 1.5)
        elif "running_mean" in name:
            b.data.normal_(0, 0.1)
    return model.eval()


def halved(graph: Any) -> dict[str, torch.Tensor]:
    """Half of the units of every prunable group (rounded down, one at least), spread over the group."""
    keep = {}
    for g in graph.prunable():
        if g.kind != "layers":
            n = max(1, g.size // 2)
            keep[g.name] = torch.arange(g.size)[:: max(1, g.size // n)][:n]
    return keep


def heads_are_whole(graph: Any, keep: dict[str, torch.Tensor]) -> bool:
    """Rows of a head leave together: in producers of a group of heads each unit is a run of consecutive rows."""
    for name in keep:
        g = graph[name]
        if g.kind not in ("heads", "kv_groups"):
            continue
        for s in g.slices:
            width = s.index.shape[1]
            steps = (s.index[:, 1:] - s.index[:, :-1]) != 1
            if width > 1 and s.role == "out" and int(steps.sum(1).max()) > width // 2:
                return False
    return True


def one(inputs: Any) -> Any:
    """The first sample of a batch."""
    if isinstance(inputs, torch.Tensor):
        return inputs[:1]
    return {k: v[:1] for k, v in inputs.items()} if isinstance(inputs, dict) else tuple(v[:1] for v in inputs)


def outputs(model: torch.nn.Module, inputs: Any, grad: bool = False) -> list[torch.Tensor]:
    """All tensors the model returns, caches aside."""

    def flat(value: Any) -> list[torch.Tensor]:
        if isinstance(value, torch.Tensor):
            return [value]
        if isinstance(value, dict):
            value = list(value.values())
        return [t for v in value for t in flat(v)] if isinstance(value, (list, tuple)) else []

    if getattr(getattr(model, "config", None), "use_cache", False):
        model.config.use_cache = False  # type: ignore[union-attr]
    with torch.set_grad_enabled(grad):
        return flat(model(**inputs) if isinstance(inputs, dict) else model(inputs))


def measure(name: str) -> dict[str, Any]:
    """Trace, cut half, check: one row of the table."""
    from secateur.graph import trace
    from secateur.surgery import cut_units, prove

    model, inputs = build(name)
    row: dict[str, Any] = {"model": name, "params": sum(p.numel() for p in model.parameters())}
    start = time.time()
    graph = trace(model, inputs)
    row["trace_s"] = round(time.time() - start, 2)
    keep = halved(graph)
    bad = prove(model, graph, keep, inputs)
    keep = {k: v for k, v in keep.items() if k not in bad}
    alone = [tuple(o.shape) for o in outputs(model, one(inputs))]
    start = time.time()
    cut_units(model, graph, keep)
    row["cut_s"] = round(time.time() - start, 2)
    row["cut"] = sum(p.numel() for p in model.parameters())
    row["share"] = round(row["cut"] / row["params"], 3)
    row["units"] = len(keep)
    again = [tuple(o.shape) for o in outputs(model, one(inputs))]
    row["sound"] = again == alone and row["cut"] == graph.params(keep) and heads_are_whole(graph, keep)
    row["refused"] = len(bad)
    row["reason"] = "; ".join(f"{k}: {v}" for k, v in list(bad.items())[:3]) or "; ".join(
        graph.unknown.values()
    )
    return row


def limited(name: str, seconds: int, gigabytes: float) -> dict[str, Any]:
    """`measure` in a process of its own."""
    child = subprocess.Popen(
        [sys.executable, __file__, "--child", name, "--memory", str(gigabytes)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    try:
        out, err = child.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        child.kill()
        child.communicate()
        return {"model": name, "sound": False, "reason": f"more than {seconds} s"}
    if child.returncode:
        return {"model": name, "sound": False, "reason": err.strip()[-400:].replace("\n", " | ")}
    return json.loads(out.strip().splitlines()[-1])


def names() -> list[str]:
    """The architectures of the list beside this file."""
    lines = SHARDS.read_text().splitlines()
    return [line.strip() for line in lines if line.strip() and not line.startswith("#")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("models", nargs="*")
    parser.add_argument("--out", default="architectures.csv")
    parser.add_argument("--timeout", type=int, default=180)
    parser.add_argument("--memory", type=float, default=16)
    parser.add_argument("--child")
    args = parser.parse_args()
    if args.child:
        torch.set_num_threads(1)
        limit = int(args.memory * 2**30)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        print(json.dumps(measure(args.child)))
        return
    rows = []
    for name in args.models or names():
        row = limited(name, args.timeout, args.memory)
        rows.append(row)
        print({k: row.get(k) for k in FIELDS}, flush=True)
        with open(args.out, "w", newline="") as file:
            writer = csv.DictWriter(file, FIELDS)
            writer.writeheader()
            writer.writerows(rows)
    sound = sum(bool(r.get("sound")) for r in rows)
    small = sum(bool(r.get("sound")) and r.get("share", 1) <= 0.45 for r in rows)
    print(f"{sound} of {len(rows)} sound, {small} of them at 45 % of the parameters or less")


if __name__ == "__main__":
    main()
