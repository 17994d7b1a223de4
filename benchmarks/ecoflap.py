"""Shares of blocks by what the loss hangs on (ECoFLaP) against equal, outlier, arithmetic and random shares, with Wanda in all.

    python benchmarks/ecoflap.py                         # SmolLM2: about 40 CPU minutes
    python benchmarks/ecoflap.py --scenes                # tower and decoder of three small vision-language models: 15
    python benchmarks/ecoflap.py --smoke                 # a tiny model: does it run

With --scenes: the mean accuracy over five kinds of question, all methods calibrated on the same 80 questions about pictures of
their own. Else: perplexity of WikiText-2 valid after 60 and 70 % of the weights in the blocks are zero, the same Brown tokens for all; and how
zeroth and first order agree (Spearman over blocks). Sensitivity is measured on `--windows` x `--length` tokens, and
shared by both targets.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

import secateur
from secateur.data.text import encode, load_calibration, load_text
from secateur.graph.blocks import find_matrices, find_stacks
from secateur.measure import perplexity
from secateur.pruning.allocate import coarse_to_fine
from secateur.stats.sensitivity import first_order, zeroth_order
from secateur.tasks import load_model
from secateur.tasks.scenes.draw import KINDS
from secateur.tasks.scenes.models import inputs, load_scenes
from secateur.tasks.scenes.questions import accuracy, test_set
from secateur.tasks.scenes.train import draw

ORDERS = ("zeroth", "first")
SHARES = ("uniform", "owl", "arithmetic", "zeroth", "first", "random")


def blocks_of(model: nn.Module) -> dict[int, list[str]]:
    found: dict[int, list[str]] = {}
    for name, matrix in find_matrices(model).items():
        found.setdefault(matrix.block, []).append(name)
    return found


def given(model: nn.Module, scores: list[float], share: float) -> tuple[str, ...]:
    """Shares of the blocks as patterns of `share=`."""
    matrices, blocks = find_matrices(model), blocks_of(model)
    sizes = [sum(matrices[name].numel for name in names) for names in blocks.values()]
    kept = coarse_to_fine(sizes, scores, int(share * sum(sizes)), 1 - share + 0.1)
    path = next(iter(matrices.values())).block_path
    return tuple(
        f"{path}.{block}.*={count / size:.6f}" for block, count, size in zip(blocks, kept, sizes, strict=True)
    )


def rank_correlation(a: list[float], b: list[float]) -> float:
    ranks = [torch.tensor(x).argsort().argsort().double() for x in (a, b)]
    return float(torch.corrcoef(torch.stack(ranks))[0, 1])


def scene_batches(model: nn.Module, seed: int) -> list[dict[str, torch.Tensor]]:
    """Questions with their answers about pictures that are no test pictures, for calibration and for the loss."""
    batch = draw(16, KINDS, torch.Generator().manual_seed(990_000 + seed))
    rows: dict[int, list[tuple[torch.Tensor, list[int]]]] = {}
    for asked in batch.asked:
        for row in range(16):
            if asked.asked[row]:
                length = int(asked.length[row])
                words = [*asked.words[row, :length].tolist(), int(asked.answer[row])]
                rows.setdefault(length, []).append((batch.pictures[row], words))
    found = []
    for own in rows.values():
        given = inputs(model, torch.stack([picture for picture, _ in own]), [words for _, words in own])
        labels = torch.full_like(given["input_ids"], -100)
        labels[:, -1] = given["input_ids"][:, -1]
        found.append({**given, "labels": labels})
    return found


def scenes(args: argparse.Namespace) -> None:
    questions = test_set(args.pictures)
    mean = lambda model: statistics.mean(accuracy(model, questions).values())
    table: dict[tuple[str, str], list[float]] = {}
    for seed in range(args.seeds):
        model = load_scenes("llava", seed)
        data = scene_batches(model, seed)
        matrices = find_matrices(model)
        both = [order(model, data, matrices).scores for order in (zeroth_order, first_order)]
        agree = rank_correlation(*([found[name] for name in matrices] for found in both))
        print(json.dumps({"seed": seed, "dense": mean(model), "rank_correlation": agree}), flush=True)
        for target in args.targets:
            for how in ("uniform", "owl", "ecoflap", "ecoflap, first order", "random"):
                values = []
                for number in range(args.draws if how == "random" else 1):
                    settings: dict[str, Any] = {"method": "wanda"}
                    if how == "owl":
                        settings["allocation"] = "owl"
                    elif how.startswith("ecoflap"):
                        order = "first" if "first" in how else "zeroth"
                        settings = {"method": "ecoflap", "order": order, "windows": 10_000, "batch": 1}
                    elif how == "random":
                        settings["share"] = random_shares(model, float(target.rstrip("%")) / 100, number)
                    pruned = secateur.prune(model, data[0], target=target, data=data, seed=seed, **settings)
                    values.append(mean(pruned.model))
                parts = {r["name"]: r["kept"] / r["size"] for r in pruned.report["parts"]}
                table.setdefault((target, how), []).append(statistics.mean(values))
                print(
                    json.dumps({"seed": seed, "target": target, "shares": how, "accuracy": values, **parts}),
                    flush=True,
                )
    for (target, how), values in table.items():
        error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")
        each = ", ".join(f"{value:.1f}" for value in values)
        print(f"{target:5s} {how:22s} {statistics.mean(values):6.1f} ± {error:.1f} s.e.  ({each})")


def random_shares(model: nn.Module, share: float, seed: int) -> tuple[str, ...]:
    """Shares of blocks of both stacks from random scores, under the same cap."""
    matrices = find_matrices(model)
    members: dict[tuple[str, int], list[str]] = {}
    for name, matrix in matrices.items():
        members.setdefault((matrix.block_path, matrix.block), []).append(name)
    sizes = [sum(matrices[n].numel for n in names) for names in members.values()]
    scores = torch.rand(len(sizes), generator=torch.Generator().manual_seed(seed)).tolist()
    kept = coarse_to_fine(sizes, scores, int(share * sum(sizes)), 1 - share + 0.1)
    start = {stack.path: stack.start for stack in find_stacks(model)}
    return tuple(
        f"{path}.{block - start[path]}.*={count / size:.6f}"
        for (path, block), count, size in zip(members, kept, sizes, strict=True)
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--data", default="brown")
    parser.add_argument("--targets", nargs="*", default=["40%", "30%"])
    parser.add_argument("--calibration", type=int, default=16, help="windows of 256 tokens for Wanda")
    parser.add_argument("--windows", type=int, default=8, help="samples of the sensitivity")
    parser.add_argument("--length", type=int, default=64, help="tokens of these")
    parser.add_argument("--eval", type=int, default=16, help="windows of 512 tokens")
    parser.add_argument("--draws", type=int, default=2, help="random shares")
    parser.add_argument(
        "--orders", nargs="*", default=list(ORDERS), choices=ORDERS, help="zeroth takes 18 CPU minutes"
    )
    parser.add_argument(
        "--dtype", default="bfloat16", choices=("bfloat16", "float32"), help="of the evaluation"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--scenes", action="store_true")
    parser.add_argument("--seeds", type=int, default=3, help="models, with --scenes")
    parser.add_argument("--pictures", type=int, default=128, help="test pictures, with --scenes")
    parser.add_argument("--smoke", action="store_true")
    args = parser.parse_args()
    if args.scenes:
        torch.set_num_threads(args.threads)
        scenes(args)
        return
    torch.set_num_threads(args.threads)
    if args.smoke:
        args.model, args.calibration, args.windows, args.length, args.eval, args.draws = (
            "aidreams",
            2,
            2,
            16,
            2,
            1,
        )
    model, tokenizer = load_model(args.model)
    ids = load_calibration(model, tokenizer, args.data, args.calibration, 256, args.seed)
    text = encode(tokenizer, load_text("wikitext2"))
    matrices, blocks = find_matrices(model), blocks_of(model)

    def evaluate(network: nn.Module) -> float:
        return perplexity(copy.deepcopy(network).to(getattr(torch, args.dtype)), text, 512, limit=args.eval)

    scores: dict[str, list[float]] = {}
    small = ids[: args.windows, : args.length]
    for order in args.orders:
        started = time.process_time()
        found = (zeroth_order if order == "zeroth" else first_order)(model, small, matrices)
        scores[order] = [sum(found.scores[name] for name in names) for names in blocks.values()]
        print(f"{order} order: {time.process_time() - started:.0f} CPU s", flush=True)
    if len(scores) == 2:
        print(
            f"rank correlation of the two orders over blocks: {rank_correlation(*scores.values()):.2f}",
            flush=True,
        )
    print(f"dense: {evaluate(model):.2f}", flush=True)
    rows: list[dict[str, Any]] = []
    for target in args.targets:
        share = float(target.rstrip("%")) / 100
        for how in [how for how in SHARES if how not in ORDERS or how in scores]:
            values = []
            for number in range(args.draws if how == "random" else 1):
                settings: dict[str, Any] = {}
                if how in ("owl", "arithmetic"):
                    settings["allocation"] = how
                elif how != "uniform":
                    generator = torch.Generator().manual_seed(number)
                    of_blocks = scores.get(how) or torch.rand(len(blocks), generator=generator).tolist()
                    settings["share"] = given(model, of_blocks, share)
                pruned = secateur.prune(
                    model, method="wanda", target=target, data=ids, seed=args.seed, **settings
                )
                kept = pruned.report["after"]["params_nonzero"] / pruned.report["before"]["params_nonzero"]
                values.append(evaluate(pruned.model))
            rows.append(
                {"target": target, "shares": how, "perplexity": statistics.mean(values), "nonzero": kept}
            )
            print(json.dumps(rows[-1]), flush=True)
            if args.json:
                args.json.write_text(json.dumps({"scores": scores, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
