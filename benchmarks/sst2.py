"""VTrans on MiniLM-L6 and SST-2: accuracy against parameters, embeddings included, beside Taylor and random units.

    python benchmarks/sst2.py --json rows.json           # about 25 CPU minutes; goes on where rows.json ends
    python benchmarks/sst2.py --smoke                    # does it run

The stream (and so the embeddings), heads and neurons may leave, until `params<=TARGET` of the whole network. VTrans trains masks and weights, or masks
alone, for `--steps` batches of 32 phrases, with the dense network's answers and states; Fast-VTrans sees only 3 % of the phrases. After the cut every
network, rivals too, is fine-tuned for `--tune` equal batches with the dense network's answers; "longer" rivals for as many as VTrans had in all.
Accuracy: the 872 sentences of GLUE's dev set.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from rows import keep

import secateur
from secateur.tasks import load_task
from secateur.training import fit
from secateur.training.distill import distillation

KINDS = ("hidden", "heads", "neurons")
VTRANS: dict[str, dict[str, Any]] = {
    "vtrans": {},
    "vtrans, 3 % of the data": {"data_share": 0.03},
    "vtrans, masks alone": {"masks_only": True},
}
RIVALS = ("taylor", "random-structured", "taylor, longer", "random-structured, longer")
METHODS = (*VTRANS, *RIVALS)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--targets", nargs="*", default=["50%", "30%"], help="parameters left")
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=METHODS)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--tune", type=int, default=80)
    parser.add_argument("--lr", type=float, default=2e-4)
    parser.add_argument("--kl", type=float, default=1e-6)
    parser.add_argument("--mask-lr", type=float, default=0.2)
    parser.add_argument("--seeds", nargs="*", type=int, default=[0])
    parser.add_argument("--train", type=int, default=20_000, help="phrases that batches are drawn from")
    parser.add_argument("--test", type=int, default=None)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--smoke", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.smoke:
        args.steps, args.tune, args.train, args.test, args.targets = 4, 2, 512, 64, ["50%"]
    task = load_task("sst2", train=args.train, test=args.test)
    rows: list[dict[str, Any]] = json.loads(args.json.read_text()) if args.json and args.json.exists() else []
    done = {(row["target"], row["method"], row["seed"]) for row in rows}
    for seed in args.seeds:
        for target in args.targets:
            for method in args.methods:
                if (target, method, seed) in done:
                    continue
                keep(
                    rows,
                    {
                        "target": target,
                        "method": method,
                        "seed": seed,
                        **run(task, method, target, seed, args),
                    },
                    args.json,
                )


def run(task: Any, method: str, target: str, seed: int, args: Any) -> dict[str, Any]:
    """One row: cut, fine-tune, measure."""
    started = time.process_time()
    found: dict[str, Any] = {}
    if method in VTRANS:
        pruned = secateur.train_prune(
            task, method="vtrans", target=f"params<={target}", kinds=KINDS, steps=args.steps, lr=args.lr, kl=args.kl,
            mask_lr=args.mask_lr, distil=0.5, distil_states=0.9, seed=seed, **VTRANS[method],
        )  # fmt: skip
        found["expected"] = pruned.report["phases"][0]["share_expected"]
        steps = args.tune
    else:
        name, _, longer = method.partition(", ")
        pruned = secateur.prune(
            task.pretrained(), task.inputs, method=name, target=f"params<={target}", kinds=KINDS, seed=seed
        )
        steps = args.tune + (args.steps if longer else 0)
    found["cut"] = task.quality(pruned.model)
    found["kept"] = {
        kind: sum(len(units) for name, units in pruned.plan.keep.items() if pruned.plan.kinds[name] == kind)
        for kind in KINDS
    }
    loss = distillation(task.pretrained(), weight=0.5)
    fit(pruned.model, task.train, steps=steps, seed=seed + 1, recipe=task.recipe, lr=args.lr, loss=loss)
    found["accuracy"] = task.quality(pruned.model)
    found["params"] = sum(p.numel() for p in pruned.model.parameters())
    return {**found, "cpu_seconds": time.process_time() - started}


if __name__ == "__main__":
    main()
