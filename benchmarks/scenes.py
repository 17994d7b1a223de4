"""Which token method keeps which answers: accuracy on synthetic scenes by kind of question, and the work done.

    python benchmarks/scenes.py --methods all --targets 50,25,10 --seeds 0,1,2 [--variant llava] [--limit 256]

Prints a markdown table (mean and standard error over the models of the seeds, percent) and, for each target, how far
each method lies above random tokens, in points and in standard errors over the paired seeds. `--out FILE` keeps every
score as JSON; a run that finds scores of the same settings there goes on with what is missing.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import torch

from secateur.method import list_methods, method_class
from secateur.tasks.scenes.evaluate import Score, above, evaluate, table
from secateur.tasks.scenes.models import scenes_tokenizer
from secateur.tokens.method import TokenMethod
from secateur.utils.files import atomic_write_json

RANDOM = "random-tokens"
OWN = {name: {"text": "embeddings"} for name in ("recoverable-compression", "cdpruner")}
"""Settings that the bench must give: there is no contrastive text tower, so likeness is taken in word embeddings."""


def token_methods() -> list[str]:
    return [name for name in list_methods() if issubclass(method_class(name), TokenMethod)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--methods", default="all")
    parser.add_argument("--targets", default="50,25,10")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--variant", default="llava", help="llava, qwen, or a folder that train scenes wrote")
    parser.add_argument("--data", default="scenes", help="scenes, easy_vqa or nlvr")
    parser.add_argument("--limit", type=int, default=256, help="test pictures, up to five questions each")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    seeds = [int(seed) for seed in args.seeds.split(",")]
    methods = token_methods() if args.methods == "all" else args.methods.split(",")
    settings = {"variant": args.variant, "limit": args.limit, "data": args.data}
    kept = read(args.out, settings)
    jobs = [(None, "100%")] + [(m, f"{t}%") for t in args.targets.split(",") for m in methods]
    scores = []
    for method, target in jobs:
        parts = []
        for seed in seeds:
            key = f"{method or 'all tokens'} {target} {seed}"
            if key not in kept:
                kept[key] = one(method, target, seed, args).row()
                print(f"# {key}: {kept[key]['seconds']:.1f} s {kept[key]['missing'] or ''}", flush=True)
                if args.out and not kept[key]["missing"]:
                    atomic_write_json(args.out, {**settings, "scores": kept})
            parts.append(Score(**kept[key]))
        scores.append(joined(parts))
    print(f"\n{table(scores)}\n")
    for target in args.targets.split(","):
        mine = {s.method: s for s in scores if s.target == f"{target}%" and not s.missing}
        if RANDOM not in mine:
            continue
        print(f"above random tokens at {target} %, mean over the kinds:")
        for name, score in mine.items():
            if name != RANDOM:
                gap, errors = above(score, mine[RANDOM])
                times = "" if math.isnan(errors) else f", {errors:+.1f} standard errors"
                print(f"  {name}: {gap:+.1f} points{times}")


def one(method: str | None, target: str, seed: int, args: argparse.Namespace) -> Score:
    """The score of one seed's model; what went wrong is its `missing`."""
    extra = {"tokenizer": scenes_tokenizer(), **OWN.get(method or "", {})} if method else {}
    where = (args.variant, [seed], args.limit, args.batch, args.device, args.data)
    try:
        return evaluate(method, target, *where, **extra)
    except Exception as error:  # noqa: BLE001  one broken method must not end the table
        return Score(method or "", target, args.variant, missing=f"{type(error).__name__}: {error}")


def joined(parts: list[Score]) -> Score:
    """One score of several seeds'."""
    first = parts[0]
    return Score(
        first.method,
        first.target,
        first.variant,
        {kind: [part.accuracy[kind][0] for part in parts if part.accuracy] for kind in first.accuracy},
        sum(part.tokens_layers for part in parts) / len(parts),
        sum(part.seconds for part in parts),
        next((part.missing for part in parts if part.missing), None),
    )


def read(path: Path | None, settings: dict) -> dict[str, dict]:
    """Scores of an earlier run of the same settings."""
    if path is None or not path.exists():
        return {}
    found = json.loads(path.read_text())
    same = all(found.get(name) == value for name, value in settings.items())
    return found["scores"] if same else {}


if __name__ == "__main__":
    main()
