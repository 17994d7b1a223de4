"""ISS-P against one-shot magnitude pruning with equal training, on super-resolution at 90 % zeros.

    python benchmarks/iss_p.py                                      # VDSR x2, three seeds, 15 minutes of one core
    python benchmarks/iss_p.py --device cuda --jobs 6 --precision float32 --patch 64 --batch 16 --steps 20000
    python benchmarks/iss_p.py --smoke                              # a few steps: does it run

All begin with the same trained network and train for as many steps on the same patches of Set14 (there is no DIV2K here),
in the same order, with the same optimiser; the same share of every layer becomes zero. "one-shot" zeroes the smallest
weights at once and trains what is left for all steps. "iss-p" spends `--stage` of them on shrinking. "iht" is the same with
alpha 0. "random" zeroes weights by chance at once. "dense" trains on without pruning. Judged by PSNR on Set5 (or, to choose settings by, on two pictures of Set14 that
aren't trained on: `--split val`). `--start init` begins with untrained weights; "one-shot" then trains densely for the
stage, cuts, and trains on.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import statistics
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import ClassVar

import torch
from rows import spread

import secateur
from secateur.data.super_resolution import load_pairs, patches
from secateur.measure.vision import psnr
from secateur.methods.iss_p import IssP, smallest
from secateur.pruning.plan import Plan
from secateur.tasks import load_task
from secateur.taxonomy import record
from secateur.training.job import Job
from secateur.training.method import TrainMethod
from secateur.training.task import Task

METHODS = ("dense", "random", "one-shot", "iht", "iss-p")
task: Task
held_out: list[tuple[torch.Tensor, torch.Tensor]]


@dataclasses.dataclass
class OneShot(TrainMethod):
    """The smallest weights of every layer become zero at once."""

    at: float = 0.0
    by_chance: bool = False
    name: ClassVar[str] = "one-shot"
    info = record("iss-p")

    def prune(self, job: Job) -> Plan:
        first = round(self.at * job.steps)
        if first:
            job.train("dense", steps=first, lr_schedule="constant", warmup=0.0)
        ratio = 1 - job.target.value
        generator = job.generator("mask")
        masks = {}
        for name, weight in job.weights.items():
            ranked = (
                torch.rand(weight.shape, generator=generator).to(weight.device) if self.by_chance else weight
            )
            masks[name] = ~smallest(ranked, ratio)
        held = job.masked(masks)
        job.note(phase="cut", after_the_freeze=job.quality())
        job.train("tune", steps=job.steps - first, after_step=[held], moments=job.moments or None)
        return job.plan(masks=masks)


def one(method: str, seed: int, args: argparse.Namespace) -> dict[str, object]:
    """A run: its figures."""
    torch.set_num_threads(args.threads)
    started = time.perf_counter()
    begin = task.pretrained if args.start == "trained" else task.build
    made = dataclasses.replace(task, build=lambda: begin().to(memory_format=torch.channels_last))
    if args.device != "cpu":
        made.train = tuple(part.to(args.device) for part in made.train)
    made.quality = lambda model: psnr(model, held_out[2:3] or held_out[:1])
    keep = 1.0 if method == "dense" else args.keep
    chosen: TrainMethod = OneShot(args.stage if args.start == "init" else 0.0, method == "random")
    if method in ("iht", "iss-p"):
        chosen = IssP(alpha=0.0 if method == "iht" else args.alpha, stage=args.stage)
    pruned = secateur.train_prune(
        made,
        method=chosen,
        target=keep,
        steps=args.steps,
        seed=seed,
        device=args.device,
        lr=args.lr,
        batch=args.batch,
        precision=args.precision,
        lr_schedule="cosine",
    )
    report = pruned.report
    found = {
        "method": method,
        "seed": seed,
        "psnr": psnr(pruned.model, held_out),
    }
    for row in report["phases"]:
        found |= {key: row[key] for key in ("before_the_freeze", "after_the_freeze") if key in row}
    weights = [pruned.model.get_parameter(name) for name in pruned.plan.masks]
    found["zeros"] = sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)
    return found | {"seconds": time.perf_counter() - started}


def table(found: list[dict], methods: list[str]) -> None:
    print(
        f"\n{'method':10s} {'PSNR, mean':>10s} {'± 2 s.e.':>9s} {'zeros':>7s} {'at the freeze':>14s}   by seed"
    )
    for method in methods:
        rows = sorted((row for row in found if row["method"] == method), key=lambda row: row["seed"])
        if not rows:
            continue
        values = [row["psnr"] for row in rows]
        mean, error = spread(values)
        frozen = [row["after_the_freeze"] for row in rows if row.get("after_the_freeze") is not None]
        at = f"{statistics.mean(frozen):14.2f}" if frozen else f"{'':14s}"
        each = " ".join(f"{value:.3f}" for value in values)
        print(f"{method:10s} {mean:10.3f} {error:9.3f} {rows[0]['zeros']:7.1%} {at}   {each}")


def main() -> None:
    global task, held_out
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--network", default="vdsr", help="vdsr, vdsr-x3, carn-m, carn-m-x4, rfdn, ...")
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=METHODS)
    parser.add_argument("--keep", type=float, default=0.1, help="share of the weights that stays")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--stage", type=float, default=1 / 3, help="share of the steps that shrink")
    parser.add_argument("--alpha", type=float, default=0.95)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--patch", type=int, default=32, help="side of the large squares that are trained on")
    parser.add_argument(
        "--precision", default="bfloat16", help="bfloat16 or float32; pictures are judged in float32"
    )
    parser.add_argument("--start", choices=("trained", "init"), default="trained")
    parser.add_argument("--split", choices=("test", "val"), default="test")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=1, help="runs at once")
    parser.add_argument("--json", type=Path, help="where the figures go")
    parser.add_argument(
        "--smoke", action="store_true", help="six steps of two small batches, one picture, one seed"
    )
    args = parser.parse_args()
    limits = {}
    if args.smoke:
        args.steps, args.seeds, args.batch, limits = 6, 1, 2, {"train": 8, "test": 1}
    start = time.perf_counter()
    task = load_task(args.network, **limits)
    net = task.build()
    form = (net.scale, net.luma, net.peak, net.enlarged)
    held_out = load_pairs("set5", *form) if args.split == "test" else load_pairs("set14", *form)[-2:]
    task.train = patches("set14", *form, size=args.patch, limit=limits.get("train"))
    print(
        f"{task.name}, {len(task.train[0])} patches, {args.steps} steps of {args.batch}, lr {args.lr}, alpha {args.alpha}"
    )
    found: list[dict] = []
    runs = [(method, seed, args) for seed in range(args.seeds) for method in args.methods]
    with ProcessPoolExecutor(args.jobs, mp_context=multiprocessing.get_context("fork")) as pool:
        for done in as_completed([pool.submit(one, *run) for run in runs]):
            found.append(done.result())
            print(json.dumps(found[-1]), flush=True)
            if args.json:
                settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
                args.json.write_text(json.dumps({"settings": settings, "found": found}, indent=1))
    table(found, args.methods)
    print(f"\n{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
