"""Windows that skip (lmd-vit) on the task blur: what is covered, what is saved, and what the pictures lose.

    python benchmarks/skipping_lmd.py --seeds 0 1 2 --steps 384

For each seed the network is trained with windows that skip, and a second one as long without. Held out: 24 squares of 128 pixels.
Coverage: the share of the mask of what is blurred that lies in active windows, mean over the predictors. Work: multiply-adds of the blocks and
predictors, of the dense network's blocks. Correlation: of the work with the blurred area, over the pictures.
"""

import argparse

import torch
import torch.nn.functional as F

import secateur
from secateur.data.blurred import load_blurred
from secateur.tasks import blur
from secateur.tasks.registry import load_task
from secateur.training.fit import fit

torch.set_num_threads(1)


def windows(model, data, settings):
    """(coverage of the mask, work of each picture, active share where nothing is blurred)"""
    x, _, mask = data
    with torch.no_grad(), secateur.attach(model.eval(), "lmd-vit", **settings) as attached:
        model(x)
    covered, idle = [], []
    for active in attached.active:
        small = F.adaptive_avg_pool2d(mask[:, None].float(), active.shape[1:])[:, 0] >= 0.5
        covered.append(float(active[small].float().mean()))
        idle.append(float(active[~small].float().mean()))
    return covered, attached.work.share, idle


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=384)
    parser.add_argument("--weight", type=float, default=0.1)
    parser.add_argument("--stages", nargs="*", type=int, default=[])
    args = parser.parse_args()
    task, data = load_task("blur"), load_blurred("test", blur.HELD_OUT, 128)
    blurred, sharp, mask = data
    settings = {"weight": args.weight, "stages": tuple(args.stages)}
    same = torch.nn.Identity()
    same.scale = torch.nn.Parameter(torch.ones(()))
    whole, region, rest = (blur.psnr(same, blurred, sharp, where) for where in (None, mask, ~mask))
    print(
        f"input: {whole:.2f} dB, blurred part {region:.2f}, sharp part {rest:.2f}; {mask.float().mean():.2f} is blurred"
    )
    for seed in args.seeds:
        model = secateur.train_prune(task, method="lmd-vit", seed=seed, steps=args.steps, **settings).model
        covered, work, idle = windows(model, data, settings)
        dense = blur.psnr(model, blurred, sharp)
        with secateur.attach(model, "lmd-vit", **settings):
            figures = [blur.psnr(model, blurred, sharp, where) for where in (None, mask, ~mask)]
        torch.manual_seed(seed)
        other = blur.build()
        fit(other, task.train, steps=args.steps, loss=task.loss, seed=seed, recipe=task.recipe)
        trained = [blur.psnr(other, blurred, sharp, where) for where in (None, mask, ~mask)]
        area = mask.float().mean((1, 2))
        together = torch.corrcoef(torch.stack([area.double(), work]))[0, 1]
        print(
            f"seed {seed}: coverage {sum(covered) / len(covered):.3f} ({' '.join(f'{c:.2f}' for c in covered)}), work {work.mean():.3f},",
            f"active elsewhere {sum(idle) / len(idle):.2f}, correlation with the area {together:.2f};",
            f"PSNR {figures[0]:.2f} (blurred {figures[1]:.2f}, sharp {figures[2]:.2f}), all windows {dense:.2f},",
            f"trained dense {trained[0]:.2f} (blurred {trained[1]:.2f}, sharp {trained[2]:.2f})",
            flush=True,
        )


if __name__ == "__main__":
    main()
