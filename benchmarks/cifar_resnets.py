"""Accuracy of the four dense CIFAR-10 ResNets on all 10,000 test pictures: 91.73, 92.63, 93.10 and 93.39 %.

python benchmarks/cifar_resnets.py                    # two to three minutes on one core
python benchmarks/cifar_resnets.py resnet56 --test 1000
"""

from __future__ import annotations

import argparse

import torch

from secateur.tasks import vision


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("networks", nargs="*", default=list(vision.RESNETS))
    parser.add_argument("--test", type=int, help="test pictures, at most; all of them by default")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    x, y = vision.load_pictures("cifar10", args.test, split="test")
    for name in args.networks:
        print(
            f"{name}  {vision.accuracy(vision.load_network(name), x, y, 100):.2%} of {len(x):,}", flush=True
        )


if __name__ == "__main__":
    main()
