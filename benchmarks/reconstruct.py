"""SmolLM2 after a mask and a repair, against SparseGPT alone on the same calibration tokens.

    python benchmarks/reconstruct.py                               # seed 0, Brown, the table of docs/results.md
    python benchmarks/reconstruct.py --runs wanda:50%:reconstruct sparsegpt:50%: --seeds 0 1 2
    python benchmarks/reconstruct.py --runs flap:80%: flap:80%:reconstruct
    python benchmarks/reconstruct.py --model aidreams --data self --samples 64 --seqlen 128 --windows 64 --seeds 0 1 2
    python benchmarks/reconstruct.py --cost                        # processor time as multiples of the calibration forwards
    python benchmarks/reconstruct.py --cost --layers 8 --only norms "wanda obs"

A run is METHOD:TARGET:REPAIR; without a repair the method does what it does itself. Calibration: 32 windows of 512 tokens;
evaluation: the first windows of WikiText-2 valid in bfloat16, or with `--data self` text that the dense model writes. Needs SECATEUR_DATA. One line a run, also as JSON in --out, which
a run that was stopped goes on from. Perplexities are also given as ratios to the dense model's and to SparseGPT's at the target.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import secateur
from secateur.data.text import encode, load_calibration, load_text, sample_from
from secateur.graph.blocks import find_matrices
from secateur.measure import perplexity
from secateur.stats.stream import stream
from secateur.tasks import load_model
from secateur.utils.batches import as_batches
from secateur.utils.running import evaluating, run

TARGETS = ("50%", "60%", "70%", "2:4")
"""What stays: 60% of the weights zero is 40% kept."""
KEPT = {"50%": "50%", "60%": "40%", "70%": "30%", "2:4": "2:4", "80%": "80%"}
RUNS = [f"{m}:{t}:{r}" for t in TARGETS for m, r in (("sparsegpt", ""), ("wanda", "reconstruct"))]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--data", nargs="+", default=["brown"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument(
        "--runs", nargs="+", default=RUNS, help="METHOD:ZEROS:REPAIR (units: METHOD:KEPT:REPAIR)"
    )
    parser.add_argument("--passes", type=int, default=2)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--windows", type=int, default=24, help="evaluate on so many windows of 512")
    parser.add_argument("--out", default=None, help="JSON lines; finished runs in it aren't run again")
    parser.add_argument("--cost", action="store_true")
    parser.add_argument("--layers", type=int, default=4, help="of the random model of --cost")
    parser.add_argument("--only", nargs="+", default=None, help="rows of --cost")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.cost:
        return costs(args.layers, args.samples, args.only)
    model, tokenizer = load_model(args.model)
    if args.data == ["self"]:
        text = sample_from(model, args.windows, args.seqlen, 1000).flatten()
    else:
        text = encode(tokenizer, load_text("wikitext2"))

    def evaluate(network: torch.nn.Module) -> float:
        network = network if args.data == ["self"] else copy.deepcopy(network).bfloat16()
        return perplexity(network, text, args.seqlen, limit=args.windows)

    out = Path(args.out) if args.out else None
    done = [json.loads(line) for line in out.read_text().splitlines()] if out and out.exists() else []
    dense = next((row["perplexity"] for row in done if row["run"] == "dense"), None)
    if dense is None:
        dense = evaluate(model)
        record(out, done, {"run": "dense", "perplexity": dense})
    print(f"dense {dense:.3f}", flush=True)
    for data in args.data:
        for seed in args.seeds:
            ids = load_calibration(model, tokenizer, data, args.samples, args.seqlen, seed)
            for name in args.runs:
                key = {
                    "run": name,
                    "data": data,
                    "seed": seed,
                    "passes": args.passes,
                    "samples": args.samples,
                }
                row = next((r for r in done if key.items() <= r.items()), None)
                if row is None:
                    method, target, repair = name.split(":") if name.count(":") == 2 else split_n_m(name)
                    settings = {"repair": repair or None, "repair_passes": args.passes, "prove": False}
                    settings["seqlen"] = args.seqlen
                    units = method not in ("sparsegpt", "wanda", "magnitude", "ria", "owl")
                    start = time.process_time()
                    pruned = secateur.prune(
                        model,
                        method=method,
                        target=target if units else KEPT.get(target, target),
                        data=ids,
                        seed=seed,
                        **settings,
                    )
                    seconds = time.process_time() - start
                    row = {**key, "perplexity": evaluate(pruned.model), "seconds": round(seconds)}
                    record(out, done, row)
                    del pruned
                base = f"sparsegpt:{name.split(':', 1)[1].rpartition(':')[0]}:"
                other = next(
                    (r for r in done if r["run"] == base and r["data"] == data and r["seed"] == seed), None
                )
                against = f"{row['perplexity'] / other['perplexity']:.3f}" if other else "-"
                print(
                    f"{data} seed {seed} {name:32s} {row['perplexity']:9.3f}  x dense {row['perplexity'] / dense:6.3f}"
                    f"  x sparsegpt {against}  {row['seconds']} s",
                    flush=True,
                )


def split_n_m(name: str) -> tuple[str, str, str]:
    method, n, m, repair = name.split(":")
    return method, f"{n}:{m}", repair


def record(out: Path | None, done: list[dict], row: dict) -> None:
    done.append(row)
    if out:
        with out.open("a") as file:
            file.write(json.dumps(row) + "\n")


def costs(layers: int, samples: int, only: list[str] | None) -> None:
    """Processor time of whole runs over that of the model's forwards on the same tokens; the model is random, of SmolLM2's shape."""
    torch.manual_seed(0)
    shape = {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
    }
    model = LlamaForCausalLM(LlamaConfig(vocab_size=512, num_hidden_layers=layers, **shape)).eval()
    ids = torch.randint(512, (samples, 512), generator=torch.Generator().manual_seed(0))

    def spent(work: Callable[[], object]) -> float:
        start = time.process_time()
        work()
        return time.process_time() - start

    def forwards() -> None:
        with torch.no_grad(), evaluating(model):
            for batch in as_batches(ids):
                run(model, batch)

    def norms() -> None:
        for _ in stream(model, ids, {"input_norm"}, find_matrices(model)):
            pass

    forwards()
    once = spent(forwards)
    print(f"{layers} layers, {samples} x 512 tokens, forwards alone: {once:.2f} s")
    works: dict[str, Callable[[], object]] = {"norms": norms}
    for name, repair in (
        ("wanda", "none"),
        ("sparsegpt", "none"),
        ("wanda", "obs"),
        ("wanda", "reconstruct"),
    ):
        for passes in (1, 2) if repair == "reconstruct" else (0,):
            key = f"{name} {repair} {passes}" if passes else f"{name} {repair}".removesuffix(" none")
            if key == "sparsegpt":
                repair = None
            works[key] = partial(
                secateur.prune,
                model,
                method=name,
                target="50%",
                data=ids,
                repair=repair,
                repair_passes=passes or 2,
            )
    for key, work in works.items():
        if not only or key in only:
            print(f"{key:24s} {spent(work) / once:6.2f}", flush=True)


if __name__ == "__main__":
    main()
