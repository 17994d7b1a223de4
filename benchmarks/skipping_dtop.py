"""Patches that leave a segmenting ViT early (dtop), on ECSSD and CamVid: what is lost, what is saved, and which pictures are easy.

    python benchmarks/skipping_dtop.py salient-patches
    python benchmarks/skipping_dtop.py camvid:camvid-patches
    python benchmarks/skipping_dtop.py salient-patches --train 0 1 2

The networks are frozen ViT-S/14 with linear heads behind blocks 3, 6, 9 and 12, fitted once (cached). Rows: the task's number, and the
share of the dense network's multiply-adds, over the held-out pictures. "random" lets as many patches of each picture go at each exit as
dtop would have, but any. --train seeds: the heads are trained on for an epoch with pruning on (`train_prune`), exits after 6 and 9, then measured.
"""

import argparse

import torch

import secateur
from secateur.methods.dtop import DToP
from secateur.tasks.registry import load_task

torch.set_num_threads(1)
STAGES = (5, 8)


class Random(DToP):
    """As many leave, whichever."""

    seed = 0

    def leaving(self, probabilities, alive):
        count = super().leaving(probabilities, alive).sum(1, keepdim=True)
        generator = torch.Generator().manual_seed(self.seed + int(alive.sum()))
        order = torch.rand(alive.shape, generator=generator).masked_fill(~alive, 2).argsort(1).argsort(1)
        return alive & (order < count)


def row(name, task, model, method):
    with method.attach(model) as attached:
        quality = task.quality(model)
    print(f"| {name} | {quality:.4f} | {attached.work.mean:.3f} |", flush=True)


def exact(task, model, count=3):
    """Masked against gathered, alone against together, and p0 = 1 against the network itself."""
    x = task.train[0][:count]
    with torch.no_grad():
        plain, made = model(x), {}
        for masked in (False, True):
            with secateur.attach(model, "dtop", masked=masked):
                made[masked] = model(x)
                alone = model(x[:1])
        with secateur.attach(model, "dtop", p0=1):
            same = torch.equal(model(x), plain)
    print(
        f"masked - gathered: {(made[True] - made[False]).abs().max():.1e} of {made[True].abs().max():.1f};",
        f"batch - single: {(made[True][:1] - alone).abs().max():.1e}; p0 = 1 bit-identical: {same}",
        flush=True,
    )


def easy(task, model, pictures):
    """How much leaves at each exit, picture by picture: the easiest, the median and the hardest fifth."""
    left = []
    with torch.no_grad(), secateur.attach(model, "dtop") as attached:
        for x in pictures.split(10):
            model(x)
            left.append(torch.stack([1 - alive.float().mean(1) for alive in attached.alive], 1))
    left = torch.cat(left)
    for number in range(left.shape[1]):
        sorted_ = left[:, number].sort(descending=True).values
        fifth = max(1, len(sorted_) // 5)
        print(
            f"exit {number + 1}: {(sorted_ > 0.5).float().mean():.2f} of the pictures let more than half go;",
            f"fifths {' '.join(f'{part.mean():.2f}' for part in sorted_.split(fifth))}",
            flush=True,
        )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("task")
    parser.add_argument("--p0", nargs="+", type=float, default=[0.9, 0.95, 0.98])
    parser.add_argument("--train", nargs="*", type=int, default=[])
    parser.add_argument("--test", type=int)
    parser.add_argument("--lr", type=float, default=3e-3)
    args = parser.parse_args()
    task = load_task(args.task, test=args.test)
    for seed in args.train:
        model = secateur.train_prune(
            task, method="dtop", stages=STAGES, seed=seed, lr=args.lr, epochs=1
        ).model
        print(f"seed {seed}: dense {task.quality(model):.4f}", flush=True)
        row(f"seed {seed}: p0 = 0.95, k = 5, exits after 6 and 9", task, model, DToP(stages=STAGES))
        row(f"seed {seed}: as many at random", task, model, Random(stages=STAGES))
        row(f"seed {seed}: k = 0", task, model, DToP(k=0, stages=STAGES))
    if args.train:
        return
    model = task.pretrained()
    exact(task, model)
    print(f"| dense | {task.quality(model):.4f} | 1 |", flush=True)
    row("p0 = 0.95, k = 5", task, model, DToP())
    row("as many at random", task, model, Random())
    row("p0 = 0.95, k = 0", task, model, DToP(k=0))
    row("p0 = 0.95, k = 5, exits after 6 and 9", task, model, DToP(stages=STAGES))
    row("as many at random, exits after 6 and 9", task, model, Random(stages=STAGES))
    for p0 in (0.95, 0.9):
        row(f"p0 = {p0}, k = 5, exit after 9 only", task, model, DToP(p0=p0, stages=STAGES[1:]))
    for p0 in args.p0:
        if p0 != 0.95:
            row(f"p0 = {p0}, k = 5", task, model, DToP(p0=p0))
    easy(task, model, load_pictures_of(args.task, args.test))


def load_pictures_of(name, limit):
    from secateur.tasks import camvid, salient_patches

    return (camvid if name.startswith("camvid") else salient_patches).pairs("test", limit)[0]


if __name__ == "__main__":
    main()
