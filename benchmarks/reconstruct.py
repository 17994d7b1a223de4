"""SmolLM2 after a mask and a repair, against SparseGPT alone on the same calibration tokens.

    python benchmarks/reconstruct.py                               # seed 0, Brown, the table of docs/results.md
    python benchmarks/reconstruct.py --runs wanda:50%:reconstruct sparsegpt:50%: --seeds 0 1 2
    python benchmarks/reconstruct.py --runs flap:80%: flap:80%:reconstruct
    python benchmarks/reconstruct.py --cost                        # processor time as multiples of the calibration forwards

A run is METHOD:TARGET:REPAIR; without a repair the method does what it does itself. Calibration: 32 windows of 512 tokens;
evaluation: the first windows of WikiText-2 valid in bfloat16. Needs SECATEUR_DATA. One line a run, also as JSON in --out, which
a run that was stopped goes on from. Perplexities are also given as ratios to the dense model's and to SparseGPT's at the target.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from pathlib import Path

import torch

import secateur
from secateur.data.text import encode, load_calibration, load_text
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
    parser.add_argument("--windows", type=int, default=24, help="evaluate on so many windows of 512")
    parser.add_argument("--out", default=None, help="JSON lines; finished runs in it aren't run again")
    parser.add_argument("--cost", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    model, tokenizer = load_model(args.model)
    if args.cost:
        ids = load_calibration(model, tokenizer, args.data[0], args.samples, 512, args.seeds[0])
        return costs(model, ids)
    text = encode(tokenizer, load_text("wikitext2"))

    def evaluate(network: torch.nn.Module) -> float:
        return perplexity(copy.deepcopy(network).bfloat16(), text, 512, limit=args.windows)

    out = Path(args.out) if args.out else None
    done = [json.loads(line) for line in out.read_text().splitlines()] if out and out.exists() else []
    dense = next((row["perplexity"] for row in done if row["run"] == "dense"), None)
    if dense is None:
        dense = evaluate(model)
        record(out, done, {"run": "dense", "perplexity": dense})
    print(f"dense {dense:.2f}", flush=True)
    for data in args.data:
        for seed in args.seeds:
            ids = load_calibration(model, tokenizer, data, args.samples, 512, seed)
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
                    f"{data} seed {seed} {name:32s} {row['perplexity']:9.2f}  x dense {row['perplexity'] / dense:6.3f}"
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


def costs(model: torch.nn.Module, ids: torch.Tensor) -> None:
    """Processor time of whole runs over that of the model on the calibration tokens, and how a pass grows with depth."""

    def spent(work) -> float:
        start = time.process_time()
        work()
        return time.process_time() - start

    def forwards() -> None:
        with torch.no_grad(), evaluating(model):
            for batch in as_batches(ids):
                run(model, batch)

    once = spent(forwards)
    print(f"calibration forwards: {once:.1f} s, 1.00")
    streamed = spent(lambda: [None for _ in stream(model, ids, {"input_norm"}, secateur_matrices(model))])
    print(f"{'input norms, block by block':40s} {streamed / once:6.2f}")
    for name, settings in (
        ("wanda", {}),
        ("sparsegpt", {}),
        ("wanda", {"repair": "obs"}),
        ("wanda", {"repair": "reconstruct", "repair_passes": 1}),
        ("wanda", {"repair": "reconstruct"}),
    ):
        took = spent(lambda n=name, s=settings: secateur.prune(model, method=n, target="50%", data=ids, **s))
        print(f"{name + ' ' + ' '.join(map(str, settings.values())):40s} {took / once:6.2f}", flush=True)


def secateur_matrices(model: torch.nn.Module) -> dict:
    from secateur.graph.blocks import find_matrices

    return find_matrices(model)


if __name__ == "__main__":
    main()
