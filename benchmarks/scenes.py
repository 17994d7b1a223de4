"""Which token method keeps which answers: accuracy on synthetic scenes by kind of question, and the work done.

    python benchmarks/scenes.py --methods all --targets 50,25,10 --seeds 0,1,2 [--variant llava] [--limit 256]

Prints a markdown table (mean and standard error over the models of the seeds, percent) and, for each target, how far
each method lies above random tokens, in points and in standard errors over the paired seeds. `--out FILE` keeps every
score as JSON; a run that finds scores of the same settings there goes on with what is missing.

    python benchmarks/scenes.py --equal work=144,64 time=0.8 --limit 64 --out equal.jsonl

gives every method the target at which it does the same work in place of the same target: so many tokens x layers a picture at
most, or a prefill that takes so much of the dense one's processor time (both run in turn, on seed 0, 64 questions at once). A
method that can't do so little is listed with the least that it can. `--out` takes a JSON line for each target tried and each
score, and a run goes on from there. Methods that must be trained come in by `--weights covipal=FOLDER,atp-llava=FOLDER`;
`{seed}` in a folder is the model's seed. `--data seg` judges by masks and `--data icl` by questions behind two demonstrations
(`scenes_judges.py`), at the same budgets; with one seed there is no standard error.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from scenes_judges import judge_of, prompts_of

from secateur.errors import SecateurError
from secateur.method import list_methods, method_class
from secateur.tasks.scenes.evaluate import Score, above, deviation, evaluate, table, target_of_work
from secateur.tasks.scenes.evaluate import settings_of as own_settings
from secateur.tasks.scenes.models import load_scenes
from secateur.tokens.attach import attach
from secateur.tokens.method import TokenMethod
from secateur.utils.files import atomic_write_json
from secateur.utils.spread import quartiles

RANDOM = "random-tokens"
SHARES = (0.02, 0.1, 0.25, 0.5, 0.8)
"""Targets at which prefills are timed; the one that meets a budget lies on the line between two of them."""


def token_methods() -> list[str]:
    return [name for name in list_methods() if issubclass(method_class(name), TokenMethod)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--methods", default="all")
    parser.add_argument("--targets", default="50,25,10")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--variant", default="llava", help="llava, qwen, or a folder that train scenes wrote")
    parser.add_argument(
        "--data", default="scenes", help="scenes, easy_vqa, nlvr; seg: masks; icl: demonstrations"
    )
    parser.add_argument("--limit", type=int, default=256, help="test pictures, up to five questions each")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--equal", nargs="+", default=[], help="work=144,64 time=0.8: equal cost, not target")
    parser.add_argument("--weights", default="", help="method=FOLDER,...: for methods that must be trained")
    parser.add_argument("--rounds", type=int, default=5, help="prefills of each kind that a time comes from")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.weights = dict(pair.split("=", 1) for pair in args.weights.split(",") if pair)
    seeds = [int(seed) for seed in args.seeds.split(",")]
    methods = token_methods() if args.methods == "all" else args.methods.split(",")
    if args.equal:
        return equal(methods, seeds, args)
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
    extra = settings_of(method, seed, args) if method else {}
    extra["judge"] = judge_of(args.data, args.variant, args.limit)
    where = (args.variant, [seed], args.limit, args.batch, args.device, args.data)
    try:
        return evaluate(method, target, *where, **extra)
    except Exception as error:  # noqa: BLE001  one broken method must not end the table
        return Score(method or "", target, args.variant, missing=f"{type(error).__name__}: {error}")


def settings_of(method: str, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """What `attach` is given for a method beside its target."""
    folder = args.weights.get(method)
    trained = {"weights": folder.format(seed=seed)} if folder else {}
    return {**own_settings(method), **trained}


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


def equal(methods: Sequence[str], seeds: Sequence[int], args: argparse.Namespace) -> None:
    """A table for each budget, every method at the target that meets it."""
    notes = Notes(args.out, {"variant": args.variant, "limit": args.limit, "data": args.data})
    bench = Bench(args, notes)
    columns: dict[str, list[Score]] = {}
    for kind, budgets in (given.split("=", 1) for given in args.equal):
        for budget in map(float, budgets.split(",")):
            whole = scored(None, "100%", seeds, args, notes)
            scores = [at_equal(method, kind, budget, bench, seeds) for method in methods]
            scores.sort(key=lambda s: -sum(s.mean) / len(s.mean) if s.mean else math.inf)
            what = (
                "tokens x layers a picture at most"
                if kind == "work"
                else "of the dense prefill's processor time"
            )
            print(f"\n{budget:g} {what}; kept: the target, and the measured prefill with its quartiles\n")
            print(f"{table([whole, *scores])}\n")
            columns[f"{kind} {budget:g}"] = scores
            base = next((s for s in scores if s.method == RANDOM and s.mean), None)
            for score in scores:
                if base is not None and score.mean and score is not base:
                    gap, errors = above(score, base)
                    print(f"  {score.method}: {gap:+.1f} points above random, {errors:+.1f} standard errors")
    if RANDOM in methods:
        print(f"\n{side_by_side(columns)}")


def side_by_side(columns: dict[str, list[Score]]) -> str:
    """A line a method: what it came to under every budget, and how far above random tokens with paired standard errors."""
    own = {name: ("prefill" if name.startswith("work") else "tokens x layers") for name in columns}
    titles = (
        f"{name}: kept{', prefill' * name.startswith('time')} | {own[name]} | mean | above random"
        for name in columns
    )
    lines = [f"| method | {' | '.join(titles)} |", "|---" * (1 + 4 * len(columns)) + "|"]
    for method in sorted({score.method for scores in columns.values() for score in scores}):
        cells = []
        for name, scores in columns.items():
            score, base = (next(s for s in scores if s.method == m) for m in (method, RANDOM))
            if score.missing:
                cells += [score.missing, "", "", ""]
                continue
            target, prefill, _ = re.split(r", | \(", score.target)
            if name.startswith("work"):
                cost = prefill
            else:
                target, cost = f"{target}, {prefill}", f"{score.tokens_layers:.0f}"
            gaps = [a - b for a, b in zip(score.mean, base.mean)]
            error = "" if len(gaps) < 2 else f" ± {deviation(gaps):.1f}"
            gap = "" if score is base else f"{sum(gaps) / len(gaps):+.1f}{error}"
            cells += [target, cost, f"{sum(score.mean) / len(score.mean):.1f}", gap]
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(lines)


def at_equal(method: str, kind: str, budget: float, bench: Bench, seeds: Sequence[int]) -> Score:
    """A method's score at the target that meets a budget."""
    notes, args = bench.notes, bench.args
    key = {"step": "search", "method": method, "kind": kind, "budget": budget}
    found = notes.get(lambda: bench.search(method, kind, budget), **key)
    if (target := found["target"]) is None:
        return Score(method, "", args.variant, missing=found["why"])
    score = scored(method, target, seeds, args, notes)
    times = notes.get(
        lambda: {"ratio": bench.times(method, [target], args.rounds)[target]},
        step="time",
        method=method,
        target=target,
    )
    low, ratio, high = times["ratio"]
    score.target = f"{target}, {ratio:.2f} x ({low:.2f} to {high:.2f})"
    return score


def scored(
    method: str | None, target: str, seeds: Sequence[int], args: argparse.Namespace, notes: Notes
) -> Score:
    parts = [
        notes.get(
            lambda s=seed: one(method, target, s, args).row(),
            step="score",
            method=method or "",
            target=target,
            seed=seed,
        )
        for seed in seeds
    ]
    names = Score.__dataclass_fields__
    found = joined([Score(**{k: v for k, v in part.items() if k in names}) for part in parts])
    found.method = method or "all tokens"
    return found


class Notes:
    """What was found so far, a JSON line each; what is there already isn't worked out again."""

    def __init__(self, path: Path | None, settings: dict[str, Any]) -> None:
        self.path, self.settings = path, settings
        lines = path.read_text().splitlines() if path is not None and path.exists() else []
        self.rows = [json.loads(line) for line in lines]

    def get(self, work_out: Callable[[], dict[str, Any]], **key: Any) -> dict[str, Any]:
        key |= self.settings
        for row in self.rows:
            if all(row.get(name) == value for name, value in key.items()):
                return row
        row = {**work_out(), **key}
        self.rows.append(row)
        print("#", json.dumps(row), flush=True)
        if self.path is not None:
            with self.path.open("a") as file:
                file.write(json.dumps(row) + "\n")
        return row


class Bench:
    """One batch of questions to seed 0's model, on which targets are looked for."""

    def __init__(self, args: argparse.Namespace, notes: Notes) -> None:
        self.args, self.notes, self.model = args, notes, load_scenes(args.variant, 0).to(args.device)
        self.given, self.pictures = prompts_of(args.data, self.model)

    def run(self, method: str | None = None, target: str = "100%") -> tuple[float, float]:
        """(processor seconds of a prefill, tokens x layers a picture)."""
        begun = time.process_time()
        if method is None:
            self.prefill()
            return time.process_time() - begun, math.nan
        with attach(self.model, method, target=target, **settings_of(method, 0, self.args)) as attached:
            if attached.setup.warm_up:
                raise SecateurError("it remembers steps of an episode, and questions are none")
            begun = time.process_time()
            self.prefill()
            return time.process_time() - begun, attached.report["after"]["tokens_x_layers"] / self.pictures

    def prefill(self) -> None:
        with torch.no_grad():
            self.model(**self.given, logits_to_keep=1, use_cache=False)

    def times(
        self, method: str, targets: Sequence[str], rounds: int
    ) -> dict[str, tuple[float, float, float]]:
        """Quartiles of the prefill's time at each target as a part of the dense one's; a round runs each once."""
        ratios: dict[str, list[float]] = {target: [] for target in targets}
        for number in range(rounds + 1):  # the first warms up
            dense = self.run()[0]
            for target in targets:
                ratio = self.run(method, target)[0] / dense
                if number:
                    ratios[target].append(ratio)
        return {target: quartiles(values) for target, values in ratios.items()}

    def search(self, method: str, kind: str, budget: float) -> dict[str, Any]:
        """The largest target that costs no more than the budget, or why there is none."""
        try:
            target, least = self._by_work(method, budget) if kind == "work" else self._by_time(method, budget)
        except Exception as error:  # noqa: BLE001  one broken method must not end the table
            name = "" if isinstance(error, SecateurError) else f"{type(error).__name__}: "
            return {"target": None, "why": f"{name}{error}"}
        unit = "" if kind == "work" else " x the dense prefill"
        return {"target": target, "why": None if target else f"can't do with less than {least:.3g}{unit}"}

    def _by_work(self, method: str, budget: float) -> tuple[str | None, float]:
        return target_of_work(lambda target: self.run(method, target)[1], budget)

    def _by_time(self, method: str, budget: float) -> tuple[str | None, float]:
        shares = [percent(share) for share in SHARES]
        curve = self.notes.get(
            lambda: {"ratios": self.times(method, shares, self.args.rounds)}, step="curve", method=method
        )
        middle = [curve["ratios"][share][1] for share in shares]
        if middle[0] > budget:
            return None, middle[0]
        last = max(i for i, ratio in enumerate(middle) if ratio <= budget)
        if last == len(SHARES) - 1:
            return percent(SHARES[-1]), budget
        part = (budget - middle[last]) / (middle[last + 1] - middle[last])
        return percent(SHARES[last] + part * (SHARES[last + 1] - SHARES[last])), budget


def percent(share: float) -> str:
    return f"{100 * share:.1f}%"


if __name__ == "__main__":
    main()
