"""What each choice in `reconstruct` is worth: the same run with one of them made otherwise, on a small trained model.

    python benchmarks/reconstruct_study.py [--target 50%] [--seeds 0 1 2]

The model of 231,000 parameters, 64 windows of 128 tokens that it writes itself, magnitude masks; perplexity on 64 other windows, the
mean over seeds. Needs SECATEUR_DATA.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

import secateur
from secateur.data.text import sample_from
from secateur.measure import perplexity
from secateur.repair import blocks, steps
from secateur.stats.stream import states_of
from secateur.tasks import load_model


def plain(found: Sequence[Tensor], wanted: Sequence[Tensor], counts: Tensor | None = None) -> Tensor:
    """The mean square of the error, whatever a token's state should be."""
    return sum(((made - should) ** 2).mean() for made, should in zip(found, wanted))  # type: ignore[return-value]


def own_inputs(work: Any, number: int) -> steps.Case:
    """What the dense block gives for the inputs of the pruned one."""
    args, kwargs = work.given(work.pruned, number)
    with torch.no_grad():
        wanted = states_of(work.whole(*args, **kwargs))
    return work.given(work.pruned, number), wanted, work.counts(wanted[0])


@contextmanager
def rated(rate: float) -> Iterator[None]:
    init = blocks.Repair.__init__
    with patch.object(blocks.Repair, "__init__", lambda self, *a, **k: init(self, *a, **{**k, "rate": rate})):
        yield


VARIANTS: dict[str, Callable[[], Any]] = {
    "as it is": lambda: patch.object(steps, "MANY", steps.MANY),
    "no least squares before": lambda: patch.object(blocks._Work, "order", lambda self: []),
    "no steps behind (obs)": lambda: patch.object(blocks._Work, "steps", lambda self: {}),
    "steps of 2,048 tokens": lambda: patch.object(steps, "TOKENS", 2048),
    "steps of 256 tokens": lambda: patch.object(steps, "TOKENS", 256),
    "the plain square": lambda: patch.object(steps, "relative_error", plain),
    "dense block on pruned inputs": lambda: patch.object(blocks._Work, "case", own_inputs),
    "a third of the rate": lambda: rated(0.004),
    "three times the rate": lambda: rated(0.036),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--target", default="50%")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", default=list(VARIANTS))
    args = parser.parse_args()
    torch.set_num_threads(1)
    model, _ = load_model("aidreams")
    text = sample_from(model, 64, 128, 1000).flatten()
    data = {seed: sample_from(model, 64, 128, seed) for seed in args.seeds}
    print(f"{'dense':32s} {perplexity(model, text, 128):8.3f}")
    for name in args.only:
        found = []
        for seed, ids in data.items():
            with VARIANTS[name]():
                pruned = secateur.prune(
                    model,
                    method="magnitude",
                    target=args.target,
                    data=ids,
                    seed=seed,
                    seqlen=128,
                    repair="reconstruct",
                )
            found.append(perplexity(pruned.model, text, 128))
        print(
            f"{name:32s} {sum(found) / len(found):8.3f}   {' '.join(f'{v:.3f}' for v in found)}", flush=True
        )


if __name__ == "__main__":
    main()
