"""Cut half of every prunable group of 100 current architectures in one call; Torch-Pruning beside it.

    python benchmarks/architectures.py --out architectures.csv            # the whole list, both tools
    python benchmarks/architectures.py timm:resnet18 hf:llama --tools secateur
    python benchmarks/architectures.py --out architectures.csv --summary  # counts and times of a table

A process for each model and tool, one thread, the same limits of processor time and memory. A killed run goes on
where it was: rows that the table has are not measured again (--again does). Both results are judged by the same
function (`judge`). Times are processor seconds: trace_s and tp_graph_s build the graph, tp_groups_s builds it and
lists its groups, which is what a trace gives; total_s is the whole call with its proof, tp_total_s graph and cut.
Models are random: timm:NAME at the smallest legal image, hf:TYPE from a tiny config.
"""

from __future__ import annotations

import argparse
import csv
import multiprocessing
import resource
import signal
import statistics
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from secateur.utils.files import atomic_write_text

FIELDS = ["model", "status", "share", "trace_s", "total_s", "reason"]
FIELDS += ["tp_status", "tp_share", "tp_graph_s", "tp_groups_s", "tp_total_s", "tp_reason"]
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


def build(name: str, batch: int = 2, **smaller: Any) -> tuple[torch.nn.Module, Any]:
    """The model called `timm:...` or `hf:...` with random weights, and inputs for it. smaller: arguments for timm."""
    torch.manual_seed(0)
    source, _, kind = name.partition(":")
    if source == "timm":
        import timm

        model = timm.create_model(kind, pretrained=False, **smaller)
        model, size = smallest(kind, model, **smaller)
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


def smallest(kind: str, model: torch.nn.Module, **smaller: Any) -> tuple[torch.nn.Module, int]:
    """The smallest image a model accepts: try sizes, rebuilding with `img_size` where the size is fixed."""
    import timm

    native = model.default_cfg["input_size"][-1]  # type: ignore[index,union-attr]
    fixed = model.default_cfg.get("fixed_input_size", False)  # type: ignore[union-attr]
    for size in (64, 96, 128, 224, native):
        if size > native:
            continue
        try:
            trial = (
                timm.create_model(kind, pretrained=False, img_size=size, **smaller)
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


def flat(value: Any) -> list[torch.Tensor]:
    """All tensors in nested lists, tuples and dictionaries."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [t for v in value for t in flat(v)] if isinstance(value, (list, tuple)) else []


def outputs(model: torch.nn.Module, inputs: Any, grad: bool = False) -> list[torch.Tensor]:
    """All tensors the model returns, caches aside."""
    if getattr(getattr(model, "config", None), "use_cache", False):
        model.config.use_cache = False  # type: ignore[union-attr]
    with torch.set_grad_enabled(grad):
        if isinstance(inputs, dict):
            return flat(model(**inputs))
        return flat(model(*inputs) if isinstance(inputs, tuple) else model(inputs))


def rows_kept(new: torch.Tensor, old: torch.Tensor) -> torch.Tensor | None:
    """Which rows of `old` are those of `new`, found by their values; None where the values aren't those of `old`."""
    values, order = old.detach().flatten().sort()
    place = torch.searchsorted(values, new.detach().flatten().contiguous()).clamp(max=len(values) - 1)
    if float((values[place] == new.flatten()).float().mean()) < 0.9:
        return None
    rows = torch.div(order[place], old[0].numel(), rounding_mode="floor").reshape(len(new), -1)
    return rows.mode(1).values


def mixed_heads(model: torch.nn.Module, dense: Mapping[str, torch.Tensor], graph: Any) -> str | None:
    """A projection whose heads keep different numbers of rows: they are then reshaped into heads of mixed rows."""
    now = dict(model.named_parameters(remove_duplicate=False))
    for g in graph.groups:
        if g.kind not in ("heads", "kv_groups"):
            continue
        for s in g.slices:
            if s.role != "out" or s.dim or dense[s.name].dim() < 2 or s.name not in now:
                continue
            kept = rows_kept(now[s.name], dense[s.name])
            if kept is None:
                continue
            left = torch.isin(s.index, kept).sum(1).tolist()
            if len({n for n in left if n}) > 1:
                return f"{s.name} keeps {left} rows of its heads"
    return None


def judge(
    model: torch.nn.Module, inputs: Any, shapes: list, dense: Mapping[str, torch.Tensor], graph: Any
) -> tuple[str, str]:
    """(sound or wrong, why): runs at batch 2 and 1, same output shapes, gradients, smaller, every head whole."""
    before, after = sum(t.numel() for t in dense.values()), sum(p.numel() for p in model.parameters())
    if after >= before:
        return "wrong", "nothing was cut, and nothing was said"
    try:
        found = outputs(model, inputs, grad=True), outputs(model, one(inputs))
        if [[tuple(o.shape) for o in outs] for outs in found] != shapes:
            return "wrong", "the outputs have other shapes"
        if not all(bool(torch.isfinite(o).all()) for outs in found for o in outs if o.is_floating_point()):
            return "wrong", "the output is not finite"
        sum(o.float().sum() for o in found[0] if o.requires_grad).backward()
    except Exception as error:  # noqa: BLE001
        return "wrong", f"the cut model fails: {told(error)}"
    mixed = mixed_heads(model, dense, graph)
    return ("wrong", mixed) if mixed else ("sound", "")


def told(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def started(name: str) -> tuple[torch.nn.Module, Any, list, dict[str, torch.Tensor], Any]:
    """A model, its inputs, output shapes at both batch sizes, its weights, and its groups for the judge."""
    from secateur.graph import trace

    model, inputs = build(name)
    shapes = [[tuple(o.shape) for o in outputs(model, i)] for i in (inputs, one(inputs))]
    dense = {n: p.detach().clone() for n, p in model.named_parameters()}
    return model, inputs, shapes, dense, trace


def with_secateur(name: str, say: Callable[[dict[str, Any]], None]) -> None:
    """One row's left half, told field by field so that what was measured before a limit is kept."""
    from secateur import SecateurError, prune

    model, inputs, shapes, dense, trace = started(name)
    before = sum(p.numel() for p in model.parameters())
    try:
        start = time.process_time()
        graph = trace(model, inputs)
        say({"trace_s": round(time.process_time() - start, 3)})
        start = time.process_time()
        pruned = prune(model, inputs, method="group-magnitude", target="50%", inplace=True)
        say({"total_s": round(time.process_time() - start, 2)})
    except SecateurError as error:
        say({"status": "refused", "reason": str(error)[:300]})
        return
    share = sum(p.numel() for p in pruned.model.parameters()) / before
    status, why = judge(pruned.model, inputs, shapes, dense, graph)
    if not why and share > 0.45:
        frozen = [
            g for g in pruned.report["groups"] if g["kept"] == g["size"] and "doesn't cut" not in g["reason"]
        ]
        frozen.sort(key=lambda g: -g["size"])
        why = "; ".join(f"{g['name']} ({g['size']}): {g['reason']}" for g in frozen[:3])
    say({"status": status, "share": round(share, 3), "reason": why})


def heads_of(model: torch.nn.Module, inputs: Any) -> list[torch.nn.Module]:
    """The layers whose outputs are the model's: those that Torch-Pruning's users name as `ignored_layers`."""
    made: list[tuple[torch.nn.Module, torch.Tensor]] = []
    kinds = (torch.nn.Linear, torch.nn.modules.conv._ConvNd)
    hooks = [
        m.register_forward_hook(lambda m, _, out: made.append((m, out)))
        for m in model.modules()
        if isinstance(m, kinds)
    ]
    outs = outputs(model, inputs)
    for hook in hooks:
        hook.remove()
    storages = {o.untyped_storage().data_ptr() for o in outs}
    found = [m for m, out in made if out.untyped_storage().data_ptr() in storages]
    sizes = {o.shape[-1] for o in outs if o.dim()}
    return found or [m for m, out in made if out.shape[-1] in sizes][-2:]


def with_torch_pruning(name: str, say: Callable[[dict[str, Any]], None]) -> None:
    """The right half: its magnitude pruner at half of the channels, the output layers named for it."""
    import torch_pruning as tp

    model, inputs, shapes, dense, trace = started(name)
    ignored = heads_of(model, inputs)
    before = sum(p.numel() for p in model.parameters())
    if not isinstance(inputs, dict):
        inputs = (inputs,) if isinstance(inputs, torch.Tensor) else inputs

    def tensors(out: Any) -> list[torch.Tensor]:
        return [t for t in flat(out) if t.requires_grad]

    start = time.process_time()
    tp.DependencyGraph().build_dependency(model, inputs, output_transform=tensors, verbose=False)
    say({"tp_graph_s": round(time.process_time() - start, 3)})
    start = time.process_time()
    pruner = tp.pruner.MagnitudePruner(
        model,
        inputs,
        importance=tp.importance.MagnitudeImportance(p=2),
        pruning_ratio=0.5,
        ignored_layers=ignored,
        output_transform=tensors,
    )
    groups = time.process_time()
    say({"tp_groups_s": round(groups - start, 3)})
    pruner.step()
    say({"tp_total_s": round(time.process_time() - start, 2)})
    model.zero_grad()
    fresh, _ = build(name)
    graph = trace(fresh, inputs)
    status, why = judge(model, inputs, shapes, dense, graph)
    share = sum(p.numel() for p in model.parameters()) / before
    say({"tp_status": status, "tp_share": round(share, 3), "tp_reason": why})


Work = Callable[[str, Callable[[dict[str, Any]], None]], None]
TOOLS: dict[str, Work] = {"secateur": with_secateur, "torch-pruning": with_torch_pruning}


def child(work: Work, name: str, pipe: Any, seconds: int, gigabytes: float, prefix: str) -> None:
    """One piece of work on one model under limits; it sends what it finds."""
    resource.setrlimit(resource.RLIMIT_AS, (int(gigabytes * 2**30),) * 2)
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 5))
    warnings.simplefilter("ignore")
    try:
        work(name, pipe.send)
    except Exception as error:  # noqa: BLE001  whatever a tool raises is its result
        pipe.send({f"{prefix}status": "crashed", f"{prefix}reason": told(error)})


def limited(work: Work, name: str, seconds: int, gigabytes: float, prefix: str = "") -> dict[str, Any]:
    """What `work` finds in a process of its own, with `seconds` of processor time (five times that by the clock)."""
    context = multiprocessing.get_context("fork")
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=child, args=(work, name, send, seconds, gigabytes, prefix))
    process.start()
    send.close()
    row: dict[str, Any] = {}
    end = time.monotonic() + 5 * seconds
    try:
        while receive.poll(max(0, end - time.monotonic())):
            row |= receive.recv()
        process.kill()
    except EOFError:
        pass
    process.join()
    if f"{prefix}status" not in row:
        late = process.exitcode in (-signal.SIGXCPU, -signal.SIGKILL)
        row[f"{prefix}status"] = "timed out" if late else "crashed"
        row[f"{prefix}reason"] = f"more than {seconds} s" if late else f"exit status {process.exitcode}"
    return row


def names() -> list[str]:
    """The architectures of the list beside this file."""
    lines = SHARDS.read_text().splitlines()
    return [line.strip() for line in lines if line.strip() and not line.startswith("#")]


def read(path: Path) -> dict[str, dict[str, str]]:
    """A table written before, by model."""
    if not path.is_file():
        return {}
    with path.open(newline="") as file:
        return {row["model"]: {key: row.get(key, "") for key in FIELDS} for row in csv.DictReader(file)}


def write(path: Path, rows: Mapping[str, Mapping[str, Any]]) -> None:
    import io

    text = io.StringIO()
    writer = csv.DictWriter(text, FIELDS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows.values())
    atomic_write_text(path, text.getvalue())


def summary(rows: list[Mapping[str, Any]]) -> str:
    """Counts for both tools, and the times of their graphs on the models that both finish."""

    def numbers(key: str, among: list[Mapping[str, Any]]) -> list[float]:
        return [float(r[key]) for r in among if r.get(key)]

    lines = []
    for prefix, tool in (("", "secateur"), ("tp_", "torch-pruning")):
        done = [r for r in rows if r.get(f"{prefix}status")]
        counts = {
            status: sum(r[f"{prefix}status"] == status for r in done)
            for status in ("sound", "refused", "wrong", "crashed", "timed out")
        }
        small = sum(r[f"{prefix}status"] == "sound" and float(r[f"{prefix}share"]) <= 0.45 for r in done)
        told = ", ".join(f"{n} {status}" for status, n in counts.items())
        lines.append(f"{tool}: of {len(done)}: {told}; {small} sound at 45 % of the parameters or less")
    traces = numbers("trace_s", list(rows))
    if traces:
        lines.append(f"trace: median {statistics.median(traces):.2f} s, most {max(traces):.2f} s")
    totals = numbers("total_s", list(rows))
    if totals:
        lines.append(f"whole call: median {statistics.median(totals):.2f} s, most {max(totals):.2f} s")
    both = [r for r in rows if r.get("trace_s") and r.get("tp_groups_s")]
    if both:
        ours, graph, groups = (
            statistics.median(numbers(key, both)) for key in ("trace_s", "tp_graph_s", "tp_groups_s")
        )
        lines.append(
            f"on the {len(both)} models that both finish, medians: trace {ours:.3f} s, "
            f"torch-pruning's graph {graph:.3f} s, graph and groups {groups:.3f} s"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("models", nargs="*")
    parser.add_argument("--out", type=Path, default=Path("architectures.csv"))
    parser.add_argument("--tools", nargs="+", choices=list(TOOLS), default=list(TOOLS))
    parser.add_argument("--timeout", type=int, default=60, help="processor seconds for a model and a tool")
    parser.add_argument("--memory", type=float, default=16, help="GB of address space")
    parser.add_argument("--again", action="store_true", help="measure rows again that the table has")
    parser.add_argument("--summary", action="store_true", help="only sum up the table")
    args = parser.parse_args()
    rows: dict[str, dict[str, Any]] = dict(read(args.out))
    if not args.summary:
        import timm  # noqa: F401  every child has them by being forked
        import transformers  # noqa: F401

        import secateur  # noqa: F401

        if "torch-pruning" in args.tools:
            import torch_pruning  # noqa: F401
        torch.set_num_threads(1)
        for name in args.models or names():
            row = rows.setdefault(name, {"model": name})
            for tool in args.tools:
                prefix = "" if tool == "secateur" else "tp_"
                if row.get(f"{prefix}status") and not args.again:
                    continue
                row.update(dict.fromkeys((f for f in FIELDS[1:] if f.startswith("tp_") == bool(prefix)), ""))
                row.update(limited(TOOLS[tool], name, args.timeout, args.memory, prefix))
                write(args.out, rows)
                print(
                    {
                        k: v
                        for k, v in row.items()
                        if v != "" and k.startswith("tp_") == bool(prefix) or k == "model"
                    },
                    flush=True,
                )
    print(summary([rows[name] for name in args.models or names() if name in rows]))


if __name__ == "__main__":
    main()
