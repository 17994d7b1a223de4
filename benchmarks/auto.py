"""`prune` without a method, on SmolLM2 beside methods as they are shipped, at equal multiply-adds and on the same calibration tokens.

    python benchmarks/auto.py                                   # macs<=80% and 60%: auto's candidates and their rivals
    python benchmarks/auto.py --targets 'macs<=80%' --runs 2ssp auto '2ssp attentions=0 repair=obs' --samples 16 --windows 12

A run is auto, or a method with settings: '2ssp attentions=0 repair=obs'. Calibration: windows of 512 tokens of the Brown corpus; evaluation: the first
windows of 512 of WikiText-2 valid. Needs SECATEUR_DATA. A line a run, also as JSON in --out, which a run that was stopped goes on from.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import statistics
import time
from pathlib import Path

import torch

import secateur
from secateur.data.text import encode, load_calibration, load_text
from secateur.errors import SecateurError
from secateur.measure import macs, perplexity
from secateur.measure import token_inputs as inputs_of
from secateur.tasks import load_model

BASE = "2ssp"
RUNS = (BASE, "auto", "flap", "nirvana", "shortgpt", "tyr", "random-structured")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--targets", nargs="+", default=["macs<=80%", "macs<=60%"])
    parser.add_argument("--runs", nargs="+", default=RUNS)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--windows", type=int, default=24)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--effort", type=int, default=1)
    parser.add_argument("--out", default=None)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    model, tokenizer = load_model(asked.model)
    inputs = inputs_of(model, 128)
    text = encode(tokenizer, load_text("wikitext2"))
    whole = macs(model, inputs)
    print(f"dense {perplexity(model, text, limit=asked.windows):.2f}", flush=True)
    done = {}
    if asked.out and Path(asked.out).exists():
        lines = map(json.loads, Path(asked.out).read_text().splitlines())
        done = {(line["run"], line["target"], line["seed"]): line for line in lines}
    for seed in asked.seeds:
        ids = load_calibration(model, tokenizer, "brown", asked.samples, 512, seed)
        for target in asked.targets:
            for name in asked.runs:
                line = done.get((name, target, seed))
                if line is None:
                    line = {
                        "run": name,
                        "target": target,
                        "seed": seed,
                        **one(model, name, target, ids, seed, asked.effort),
                    }
                    if "error" not in line:
                        network = line.pop("model")
                        line["left"] = macs(network, inputs) / whole
                        line["losses"] = losses(network, text, asked.windows)
                        line["perplexity"] = math.exp(sum(line["losses"]) / len(line["losses"]))
                    done[name, target, seed] = line
                    if asked.out:
                        with open(asked.out, "a") as file:
                            file.write(json.dumps(line) + "\n")
                told = (
                    line.get("error")
                    or f"perplexity {line['perplexity']:8.2f}{against(line, done.get((BASE, target, seed)))}  left {line['left']:.1%}"
                    f"  {line['cpu']:.0f} CPU s  {line['said']}"
                )
                print(f"{target:10} seed {seed}  {name:32} {told}", flush=True)


def losses(network: torch.nn.Module, text: torch.Tensor, windows: int) -> list[float]:
    """The mean loss of each window of 512 tokens; each holds as many, so that perplexity is exp of their mean."""
    each = text[: windows * 512].view(windows, 512)
    return [math.log(perplexity(network, window)) for window in each]


def against(line: dict, base: dict | None) -> str:
    """The ratio of perplexities to 2SSP's, and over windows in pairs the mean difference of losses by its standard error."""
    if base is None or base is line or "losses" not in base:
        return ""
    pairs = [a - b for a, b in zip(line["losses"], base["losses"], strict=True)]
    mean, error = statistics.mean(pairs), statistics.stdev(pairs) / math.sqrt(len(pairs))
    return f" ({math.exp(mean):.3f} of {BASE}, loss {mean:+.3f} ± {error:.3f})"


def one(model: torch.nn.Module, name: str, target: str, ids: torch.Tensor, seed: int, effort: int) -> dict:
    """A pruned copy, and what it took."""
    method, *said = name.split()
    settings = {key: int(value) if value.isdigit() else value for key, value in (s.split("=") for s in said)}
    if method == "auto":
        settings["effort"] = effort
    start = time.process_time()
    try:
        pruned = secateur.prune(
            copy.deepcopy(model),
            method=method,
            target=target,
            data=ids,
            seed=seed,
            inplace=effort == 1,
            **settings,
        )
    except SecateurError as error:
        return {"error": str(error)}
    said = pruned.report.get("auto", {}).get("why", "")[:60]
    return {
        "model": pruned.model,
        "cpu": time.process_time() - start,
        "said": said,
        "met": pruned.report["met"],
    }


if __name__ == "__main__":
    main()
