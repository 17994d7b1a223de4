"""Windows that skip (lmd-vit) on drawn motion blur: what is covered, what is saved, and what the pictures lose.

    python benchmarks/skipping_lmd.py --seeds 0 --steps 2500 --out runs/lmd

For each seed a network is trained with windows that skip, and one as long without (`--only` one of the two). They are small: two
resolutions, 8 channels at first, crops of 32 pixels, motion across. Held out: 24 squares of 128 pixels to look at thresholds, 24 to be judged by.
Coverage: the share of the mask of what is blurred that lies in active windows, mean over the predictors. Work: multiply-adds of the blocks and
predictors, of the dense network's blocks. Correlation: of the work with the blurred area, over the pictures. Random: as many windows of
each picture and predictor, drawn.
"""

import argparse
import dataclasses
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from safetensors.torch import load_model, save_model

import secateur
from secateur.data.blurred import load_blurred
from secateur.families.windowed import WindowedUNet
from secateur.methods import lmd_vit
from secateur.tasks import blur
from secateur.tasks.registry import load_task
from secateur.training.fit import fit

torch.set_num_threads(1)
DECIDE = lmd_vit.decide


def build():
    return WindowedUNet(8, (2, 2, 2), (1, 2, 2))


def crops(batch, generator, side=32):
    """A square of each picture, all at one place."""
    high = batch[0].shape[-1] - side + 1
    top, left = torch.randint(high, (2,), generator=generator, device=generator.device).tolist()
    return tuple(part[..., top : top + side, left : left + side].contiguous() for part in batch)


def shuffled(scores, *args, **settings):
    """As many windows of each picture as the scores would keep, others."""
    kept = DECIDE(scores, *args, **settings).view(len(scores), -1)
    order = torch.rand(kept.shape, generator=torch.Generator().manual_seed(0)).argsort(1)
    return kept.gather(1, order).flatten()


def windows(model, data, **settings):
    """(coverage of the mask and active share elsewhere, of each predictor; work of each picture)"""
    x, _, mask = data
    with torch.no_grad(), secateur.attach(model, "lmd-vit", **settings) as attached:
        model(x)
    covered, idle = [], []
    for active in attached.active:
        small = F.adaptive_avg_pool2d(mask[:, None].float(), active.shape[1:])[:, 0] >= 0.5
        covered.append(float(active[small].float().mean()))
        idle.append(float(active[~small].float().mean()))
    return covered, idle, attached.work.share


def psnrs(model, data):
    x, sharp, mask = data
    each = [blur.psnr(model, x, sharp, where) for where in (None, mask, ~mask)]
    return "PSNR {:.3f} (blurred {:.3f}, sharp {:.2f})".format(*each)


def line(model, data, **settings):
    covered, idle, work = windows(model, data, **settings)
    area = data[2].float().mean((1, 2)).double()
    together = torch.corrcoef(torch.stack([area, work.double()]))[0, 1]
    untouched = windows(model, (data[1], *data[1:]), **settings)[2].mean()
    with secateur.attach(model, "lmd-vit", **settings):
        reached = psnrs(model, data)
    return (
        f"coverage {sum(covered) / len(covered):.3f} ({' '.join(f'{c:.2f}' for c in covered)}), elsewhere"
        f" {sum(idle) / len(idle):.3f} ({' '.join(f'{c:.2f}' for c in idle)}), work {work.mean():.3f}, of the sharp pictures"
        f" {untouched:.3f}, correlation with the area {together:.2f}; {reached}"
    )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--weight", type=float, default=1.0)
    parser.add_argument("--lr", type=float, default=5e-3)
    parser.add_argument("--stages", nargs="*", type=int, default=[])
    parser.add_argument("--only", choices=("lmd-vit", "dense"))
    parser.add_argument("--out", type=Path, help="where trained networks are kept and found again")
    args = parser.parse_args()
    train = load_blurred("train", blur.TRAINED, 64, angle=0.0)
    val, test = (load_blurred(split, 24, 128, angle=0.0) for split in ("val", "test"))
    task = dataclasses.replace(
        load_task("blur"), build=build, train=train, augment=crops, quality=None, inputs=train[0][:1]
    )
    same = torch.nn.Identity()
    same.scale = torch.nn.Parameter(torch.ones(()))
    print(f"input: {psnrs(same, test)}; {test[2].float().mean():.2f} is blurred", flush=True)
    settings = {"stages": tuple(args.stages)}
    for seed in args.seeds:
        for kind in (args.only,) if args.only else ("lmd-vit", "dense"):
            kept = args.out / f"{kind}-{seed}.safetensors" if args.out else None
            model = build()
            if kept and kept.exists():
                load_model(model, kept)
            elif kind == "lmd-vit":
                more = settings | {"weight": args.weight, "lr": args.lr}
                model = secateur.train_prune(task, method=kind, seed=seed, steps=args.steps, **more).model
            else:
                torch.manual_seed(seed)
                model = build()
                recipe = task.recipe.replace(lr=args.lr)
                fit(model, train, steps=args.steps, loss=task.loss, augment=crops, seed=seed, recipe=recipe)
            if kept:
                kept.parent.mkdir(parents=True, exist_ok=True)
                save_model(model, kept)
            model.eval()
            print(f"seed {seed}, {kind}, all windows: {psnrs(model, test)}", flush=True)
            if kind == "dense":
                continue
            for threshold in (0.5, 0.4, 0.3, 0.25, 0.2, 0.15):
                said = f"seed {seed}, {kind}, threshold {threshold}"
                print(f"{said}, val: {line(model, val, threshold=threshold, **settings)}", flush=True)
                print(f"{said}: {line(model, test, threshold=threshold, **settings)}", flush=True)
                with mock.patch.object(lmd_vit, "decide", shuffled):
                    print(f"{said}, random: {line(model, test, threshold=threshold, **settings)}", flush=True)


if __name__ == "__main__":
    main()
