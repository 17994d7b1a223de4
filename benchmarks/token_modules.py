"""Trained token modules on scenes: covipal after either part of its training, and atp-llava, beside random, fastervlm and fastv.

    OMP_NUM_THREADS=1 python benchmarks/token_modules.py --seeds 0,1,2 --out modules.json --work modules
    OMP_NUM_THREADS=1 python benchmarks/token_modules.py --cost

One model, one set of modules and one order of the data a seed; 128 test pictures, a question of each kind about each. Rows are
compared at equal tokens x layers. A run that finds rows in --out and modules in --work goes on with what is missing. `--cost`: the scorer's
share of a prefill of 6 layers of 1024, 576 visual tokens, processor time.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from rows import keep
from token_prefill import SIDE, llava, prompt

import secateur
from secateur.families.vlm import facts_of, family_of
from secateur.method import make_method
from secateur.tasks.scenes.answers import as_arguments, questions
from secateur.tasks.scenes.models import DEPTH, TOKENS, load_scenes
from secateur.tasks.scenes.questions import accuracy, test_set
from secateur.tokens.modules import Trained
from secateur.training.recipe import Recipe
from secateur.utils.spread import quartiles

SCORER = {"guides": (2, 3)}
TRAININGS: dict[str, tuple[str, dict[str, Any], int, float, str | None]] = {
    "covipal, imitation": ("covipal", {"lesson": "imitation", **SCORER}, 200, 1e-3, None),
    "covipal": ("covipal", {"lesson": "gates", **SCORER}, 300, 1e-3, "covipal, imitation"),
    "atp-llava": ("atp-llava", {"counted": "hard"}, 150, 1e-2, None),
    "atp-llava, soft counts": ("atp-llava", {"counted": "soft"}, 150, 1e-2, None),
}
"""What is trained: the method, its settings, steps of 32 questions, the rate, and what it goes on from. The target is 25 %."""
ROWS = [
    ("random-tokens", "25%", {}),
    ("fastervlm", "25%", {}),
    ("covipal, imitation", "25%", {}),
    ("covipal", "25%", {}),
    ("random-tokens", "43.75%", {}),
    ("fastervlm", "43.75%", {}),
    ("fastv", "25%", {"k": 1}),
    ("covipal", "43.75%", {}),
    ("atp-llava", None, {}),
    ("atp-llava, soft counts", None, {}),
]


def trained(name: str, seed: int, work: Path, samples: int) -> Trained:
    folder = work / f"{name.replace(', ', '-').replace(' ', '-')}-{seed}"
    if (folder / "modules.json").is_file():
        return Trained.load(folder)
    method, settings, steps, lr, before = TRAININGS[name]
    start = None if before is None else trained(before, seed, work, samples)
    model = load_scenes("llava", seed)
    begun = time.process_time()
    result = secateur.train_tokens(
        model,
        method,
        data=questions(samples, seed),
        target="25%",
        steps=steps,
        seed=seed,
        weights=start,
        augment=as_arguments(model),
        recipe=Recipe(lr=lr, batch=32),
        **settings,
    )
    result.about["seconds"] = time.process_time() - begun
    result.save(folder)
    return result


def row(name: str, target: str | None, more: dict[str, Any], seed: int, options: Any) -> dict[str, Any]:
    weights = trained(name, seed, options.work, options.samples) if name in TRAININGS else None
    method = TRAININGS[name][0] if weights is not None else name
    model, counts, work = load_scenes("llava", seed), [], [0, 0]
    with secateur.attach(model, method, target=target, seed=seed, weights=weights, **more) as attached:

        def after() -> None:
            report = attached.report
            work[0] += report["before"]["visual_tokens"] // TOKENS
            work[1] += report["after"]["tokens_x_layers"]
            counts.append(
                torch.stack([torch.tensor([len(r) for r in rows]) for rows in attached.kept.values()])
            )

        found = accuracy(model, test_set(options.limit), after=after)
    each = torch.cat(counts, 1).double()  # [stages, pictures]
    made = {"row": name, "target": target, "seed": seed, "accuracy": found}
    made |= {"mean": statistics.mean(found.values()), "tokens_x_layers": work[1] / work[0]}
    made |= {"counts": each.mean(1).tolist(), "spread": each.mean(0).std().item()}
    return made | ({"training": weights.about} if weights is not None else {})


def table(rows: list[dict[str, Any]]) -> None:
    for name, target, _ in ROWS:
        mine = [r for r in rows if r["row"] == name and r["target"] == target]
        if mine:
            means = [r["mean"] for r in mine]
            work = statistics.mean(r["tokens_x_layers"] for r in mine)
            error = statistics.stdev(means) / len(means) ** 0.5 if len(means) > 1 else 0
            kinds = " | ".join(
                f"{statistics.mean(r['accuracy'][kind] for r in mine):.1f}" for kind in mine[0]["accuracy"]
            )
            print(
                f"| {name} | {target or '25%'} | {work:.0f} | {kinds} | {statistics.mean(means):.1f} ± {error:.1f} |"
            )


def cost(layers: int = 6, width: int = 1024, repeat: int = 7) -> None:
    model = llava(layers, width)
    ids = prompt(1, SIDE**2)
    full = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(1, 3, SIDE * 4, SIDE * 4),
    }
    facts = facts_of(model, family_of(model))
    module = make_method("covipal").modules(facts)[0]
    visual, words = torch.randn(1, SIDE**2, width), torch.randn(1, 64, width)
    times: dict[str, list[float]] = {"prefill": [], "scorer": []}
    with torch.no_grad():
        for _ in range(repeat + 1):
            for name, run in (
                ("prefill", lambda: model(**full, logits_to_keep=1)),
                ("scorer", lambda: module(visual, None, words, None)),
            ):
                begun = time.process_time()
                run()
                times[name].append(time.process_time() - begun)
    low, share, high = quartiles([s / p for s, p in zip(times["scorer"][1:], times["prefill"][1:])])
    print(
        f"scorer of width {module.down.out_features}: {1e3 * statistics.median(times['scorer'][1:]):.1f} ms, prefill"
        f" {1e3 * statistics.median(times['prefill'][1:]):.0f} ms, {share:.2%} ({low:.2%} to {high:.2%})"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--limit", type=int, default=128)
    parser.add_argument("--rows", default="", help="names of some rows, separated by semicolons")
    parser.add_argument("--samples", type=int, default=8192)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--work", type=Path, default=Path("token_modules"))
    parser.add_argument("--cost", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.cost:
        cost()
        return
    rows: list[dict[str, Any]] = []
    if options.out and options.out.exists():
        rows = json.loads(options.out.read_text())
    done = {(r["row"], r["target"], r["seed"]) for r in rows}
    print(f"all tokens: {TOKENS * DEPTH} tokens x layers")
    for seed in map(int, options.seeds.split(",")):
        for name, target, more in ROWS:
            asked = not options.rows or name in options.rows.split(";")
            if asked and (name, target, seed) not in done:
                keep(rows, row(name, target, more, seed, options), options.out)
    table(rows)


if __name__ == "__main__":
    main()
