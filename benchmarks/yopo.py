"""What visual tokens can do without: each part of `yopo` alone on the scenes, heads by their ratios and at random, tuned at 25 %.

    OMP_NUM_THREADS=1 python benchmarks/yopo.py [--parts harm,heads,tune,rivals] [--variant llava,qwen] [--seeds 0,1,2] [--limit 128]
    OMP_NUM_THREADS=1 python benchmarks/yopo.py --parts time

harm: mean accuracy over the kinds of question, untuned, with one part at a time. heads: as many at random, `--draws` times. equal: the largest
difference of logits between work that is skipped and work that is masked. rivals: token methods with as many multiply-adds, by the
same formula. tune: the model is trained on drawn scenes while the plan is attached, and as long without one.
time: processor seconds of a prefill of 576 visual tokens over the dense one's, in turn, on a random LLaVA of `--width`, beside
the share of multiply-adds. Every row is a JSON line in `--out`; what is there isn't run again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import secateur
from secateur.attention.work import VisualWork
from secateur.families.vlm import facts_of, family_of
from secateur.methods.yopo import YOPO
from secateur.tasks.scenes.answers import as_arguments, questions
from secateur.tasks.scenes.models import inputs, load_scenes
from secateur.tasks.scenes.questions import accuracy, test_set
from secateur.tokens.cost import visual_flops
from secateur.tokens.counts import amount_of
from secateur.tokens.heads import head_ratios
from secateur.training.fit import fit
from secateur.training.recipe import Recipe

ALONE: dict[str, dict[str, Any]] = {
    "last layer dropped": {"window": 0, "cut": 0.75},
    "half of the layers dropped": {"window": 0, "cut": 0.5},
    "three quarters of the heads": {"window": 0, "heads": 0.75},
    "half of the heads": {"window": 0, "heads": 0.5},
    "half of the heads, not silent": {"window": 0, "heads": 0.5, "silent": False},
    "window 5": {"window": 5},
    "window 3": {"window": 3},
    "window 3, causal": {"window": 3, "causal": True},
    "half of the neurons": {"window": 0, "neurons": 0.5},
    "a quarter of the neurons": {"window": 0, "neurons": 0.25},
}
RIVALS = ("fastv", "divprune", "fastervlm", "downsample", "random-tokens")


def prompts(model: Any, count: int = 100, seed: int = 1) -> list[dict[str, Tensor]]:
    """Questions about drawn scenes that no model was trained or is tested on."""
    drawn = questions(count, seed)
    words = [line[:n] for line, n in zip(drawn["words"].tolist(), drawn["length"].tolist())]
    return [inputs(model, drawn["pictures"], words)]


def share(plan: VisualWork, model: Any) -> float:
    """Of the visual tokens' multiply-adds, 64 tokens a picture."""
    parts = visual_flops(plan, facts_of(model, family_of(model)), [[64.0]] * plan.layers)
    return parts["left"] / parts["dense"]


class Notes:
    """A JSON line a row; what is there isn't worked out again."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.rows = (
            [json.loads(line) for line in path.read_text().splitlines()] if path and path.exists() else []
        )

    def get(self, work_out: Callable[[], dict[str, Any]], **key: Any) -> dict[str, Any]:
        for row in self.rows:
            if all(row.get(name) == value for name, value in key.items()):
                return row
        row = {**key, **work_out()}
        self.rows.append(row)
        print(json.dumps(row), flush=True)
        if self.path is not None:
            with self.path.open("a") as file:
                file.write(json.dumps(row) + "\n")
        return row


def judged(model: Any, limit: int) -> dict[str, Any]:
    found = accuracy(model, test_set(limit))
    return {"mean": statistics.mean(found.values()), "kinds": found}


def worked(model: Any, limit: int, given: dict[str, Any], seed: int = 0, **settings: Any) -> dict[str, Any]:
    with secateur.attach(model, "yopo", given=given, seed=seed, **settings) as attached:
        row = judged(model, limit)
        plan = attached.setup.work
        assert plan is not None
        return row | {"share": share(plan, model), "heads": plan.heads and [list(own) for own in plan.heads]}


def equal(model: Any, given: dict[str, Any]) -> dict[str, Any]:
    """The largest difference of the last word's logits between skipped and masked work, over the parts."""
    asked, worst = prompts(model, 64, seed=2)[0], {}
    for name, settings in {**ALONE, "25%": {"target": "25%"}}.items():
        logits = []
        for physical in (True, False):
            with torch.no_grad(), secateur.attach(model, "yopo", given=given, physical=physical, **settings):
                logits.append(model(**asked, logits_to_keep=1, use_cache=False).logits)
        worst[name] = float((logits[0] - logits[1]).abs().max())
    return {"worst": max(worst.values()), "each": worst}


def tuned(variant: str, seed: int, args: argparse.Namespace, plan: VisualWork | None) -> dict[str, Any]:
    """Trained on drawn scenes, and judged, with the plan attached; without one the dense model trains as long."""
    model = load_scenes(variant, seed)
    data, augment = questions(args.samples, seed=7), as_arguments(model)

    def loss(learner: Any, batch: Any) -> Tensor:
        return learner(**batch, use_cache=False).loss

    def run() -> dict[str, Any]:
        losses = fit(
            model,
            data,
            steps=args.steps,
            loss=loss,
            augment=augment,
            seed=seed,
            recipe=Recipe(batch=32, lr=args.lr),
        )
        model.eval()
        return judged(model, args.limit) | {"last loss": statistics.mean(losses[-20:])}

    if plan is None:
        return run()
    with secateur.attach(model, "yopo", work=plan):
        return run() | {"share": share(plan, model)}


def rival(name: str, variant: str, seed: int, limit: int, wanted: float) -> dict[str, Any]:
    """A token method at the target whose visual tokens cost the share that is wanted, a layer's cost taken as linear in them."""
    model = load_scenes(variant, seed)
    settings: dict[str, Any] = {"k": 1} if name == "fastv" else {}
    # behind k of 4 layers: k + (4 - k) * target = 4 * wanted
    target = (4 * wanted - 1) / 3 if name == "fastv" else wanted
    with secateur.attach(model, name, target=max(target, 1 / 64), seed=seed, **settings) as attached:
        row = judged(model, limit)
        return row | {
            "share": attached.report["after"]["tokens_x_layers"]
            / attached.report["before"]["tokens_x_layers"]
        }


def wide(width: int, layers: int) -> Any:
    """A random LLaVA with 576 visual tokens a picture."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=192,
        patch_size=8,
    )
    text = LlamaConfig(
        hidden_size=width,
        intermediate_size=width * 43 // 16,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 64,
        vocab_size=256,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=5,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        image_seq_length=576,
    )
    return LlavaForConditionalGeneration(config).eval()


def timed(args: argparse.Namespace) -> None:
    model = wide(args.width, args.depth)
    ids = torch.tensor([[1] * 8 + [5] * 576 + [7] * 24])
    given = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(1, 3, 192, 192),
    }
    facts = facts_of(model, family_of(model))
    half = tuple(range(facts.heads // 2))
    whole: dict[str, Any] = {
        "layers": facts.layers,
        "heads_each": facts.heads,
        "neurons_each": facts.intermediate,
    }
    plans = {
        "cut at half": {"cut": facts.layers // 2},
        "half of the heads": {"heads": (half,) * facts.layers},
        "half of the neurons": {"neurons": (facts.intermediate // 2,) * facts.layers},
        "window 5": {"window": 5},
        "25%": {
            "heads": (half,) * facts.layers,
            "neurons": (facts.intermediate // 2,) * facts.layers,
            "cut": facts.layers // 2,
        },
        "25%, window 5": {
            "heads": (half,) * facts.layers,
            "neurons": (facts.intermediate // 2,) * facts.layers,
            "cut": facts.layers // 2,
            "window": 5,
        },
    }

    def prefill(plan: VisualWork | None = None) -> tuple[float, float]:
        with torch.no_grad():
            if plan is None:
                begun = time.process_time()
                model(**given, logits_to_keep=1, use_cache=False)
                return time.process_time() - begun, 1.0
            with secateur.attach(model, "yopo", work=plan) as attached:
                begun = time.process_time()
                model(**given, logits_to_keep=1, use_cache=False)
                spent = time.process_time() - begun
                report = attached.report
                return spent, report["after"]["flops"] / report["before"]["flops"]

    prefill()
    for name, settings in plans.items():
        plan, ratios = VisualWork(**whole, **settings), []
        prefill(plan)
        for _ in range(args.rounds):
            dense = prefill()[0]
            spent, work = prefill(plan)
            ratios.append(spent / dense)
        middle = statistics.median(ratios)
        saved = "" if work > 0.99 else f"{(1 - middle) / (1 - work):.2f}"
        spread = f"{min(ratios):.3f} to {max(ratios):.3f}"
        print(f"| {name} | {work:.3f} | {middle:.3f} ({spread}) | {saved} |", flush=True)


def one(variant: str, seed: int, parts: list[str], args: argparse.Namespace, notes: Notes) -> None:
    """All that is asked of one model."""
    model = load_scenes(variant, seed)
    given = {"ratios": head_ratios(model, prompts(model))}
    key = {"variant": variant, "seed": seed, "limit": args.limit}

    def yopo(draw: int = 0, **settings: Any) -> Callable[[], dict[str, Any]]:
        return lambda: worked(model, args.limit, given, draw, **settings)

    notes.get(lambda: judged(model, args.limit), part="dense", **key)
    if "harm" in parts:
        for name, settings in ALONE.items():
            if args.alone and name not in args.alone.split(","):
                continue
            notes.get(yopo(**settings), part="harm", name=name, **key)
        notes.get(yopo(target=args.target), part="harm", name=f"all at {args.target}", **key)
        every = partial(worked, model, args.limit, {}, target=args.target)
        notes.get(every, part="harm", name=f"{args.target} with every head", **key)
    if "heads" in parts:
        for kept in (0.75, 0.5, 0.25):
            for draw in range(-1, args.draws):
                by = "ratio" if draw < 0 else "random"
                run = yopo(max(draw, 0), window=0, heads=kept, by=by)
                notes.get(run, part="heads", kept=kept, draw=draw, **key)
    if "equal" in parts:
        notes.get(lambda: equal(model, given), part="equal", **key)
    if "rivals" in parts:
        for name in RIVALS:
            run = partial(rival, name, variant, seed, args.limit, 0.4375 if name == "fastv" else 0.25)
            notes.get(run, part="rival", name=name, **key)
    if "tune" in parts:
        plan = YOPO(window=args.window).work(
            facts_of(model, family_of(model)), amount_of(args.target), given, seed
        )
        setting = {"steps": args.steps, "lr": args.lr, "target": args.target, "window": args.window, **key}
        for name, own in (("yopo", plan), ("dense", None)):
            notes.get(partial(tuned, variant, seed, args, own), part="tune", name=name, **setting)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--parts", default="harm,heads,equal,rivals,tune")
    parser.add_argument("--variant", default="llava,qwen")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--limit", type=int, default=128, help="test pictures")
    parser.add_argument("--draws", type=int, default=5, help="of heads at random")
    parser.add_argument("--target", default="25%")
    parser.add_argument("--alone", default="", help="of the parts alone, by name; default: all")
    parser.add_argument("--window", type=int, default=5, help="of the plan that is tuned for")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--samples", type=int, default=8192)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--depth", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    parts, notes = args.parts.split(","), Notes(args.out)
    if "time" in parts:
        return timed(args)
    for variant in args.variant.split(","):
        for seed in map(int, args.seeds.split(",")):
            one(variant, seed, parts, args, notes)


if __name__ == "__main__":
    main()
