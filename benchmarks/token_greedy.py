"""What greedy selection costs: the batched engine, a plain loop over single sets, and a prefill, in one run.

    OMP_NUM_THREADS=1 python benchmarks/token_greedy.py                # 64 of 576 tokens, 8 images
    OMP_NUM_THREADS=1 python benchmarks/token_greedy.py --n 2304 --keep 230 --batch 1

Processor milliseconds, the median of `--repeat`; the whole selection, from features to positions. The prefill is that of
a llama with 24 layers of 2048 / 5504, 32 heads on 8 (1.1 B parameters in its blocks): one layer on one image's sequence
is timed and multiplied by layers and images, so attention over a batch is counted as it is. Random weights and features.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from secateur.tokens import greedy

LAYERS = 24


def plain_max_min(features: Tensor, keep: int) -> Tensor:
    """DivPrune's released loop, set by set: every step takes the minimum over all that were picked."""
    rows = torch.nn.functional.normalize(features, dim=-1)
    distance = 1 - rows @ rows.mT
    chosen = torch.empty(keep, dtype=torch.int64)
    for step in range(keep):
        if step == 0:
            score = torch.topk(distance, 2, dim=0, largest=False).values[1]
        else:
            score = distance[chosen[:step]].amin(0)
        chosen[step] = score.argmax()
    return chosen.sort().values


def plain_max_sum(features: Tensor, keep: int) -> Tensor:
    rows = torch.nn.functional.normalize(features, dim=-1)
    score, chosen = rows @ rows[0], [0]
    score[0] = torch.inf
    for _ in range(keep - 1):
        chosen.append(int(score.argmin()))
        score += rows @ rows[chosen[-1]]
        score[chosen[-1]] = torch.inf
    return torch.tensor(chosen).sort().values


def gains(features: Tensor, text: Tensor) -> Tensor:
    rows, asked = (torch.nn.functional.normalize(x, dim=-1) for x in (features, text))
    parts = (
        (asked @ rows.mT / 0.02).softmax(-1) / text.shape[-2],
        0.5 * (rows @ rows.mT / 0.2).softmax(-1) / rows.shape[-2],
    )
    return torch.cat(parts, -2)


def plain_coverage(features: Tensor, text: Tensor, keep: int) -> Tensor:
    """MMTok's released loop, set by set: every step works out the gain of every candidate."""
    table = gains(features, text)
    best, chosen = torch.zeros(len(table)), []
    for _ in range(keep):
        worth = (table - best[:, None]).clamp(min=0).sum(0)
        worth[chosen] = -torch.inf
        chosen.append(int(worth.argmax()))
        best = torch.maximum(best, table[:, chosen[-1]])
    return torch.tensor(chosen).sort().values


def prefill(length: int) -> Callable[[], object]:
    """One decoder layer on one sequence."""
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

    config = LlamaConfig(
        hidden_size=2048,
        intermediate_size=5504,
        num_attention_heads=32,
        num_key_value_heads=8,
        attn_implementation="sdpa",
    )
    layer = LlamaDecoderLayer(config, 0).eval()
    hidden = torch.randn(1, length, 2048)
    angles = LlamaRotaryEmbedding(config)(hidden, torch.arange(length)[None])
    return lambda: layer(hidden, position_embeddings=angles, attention_mask=None)


def cost(run: Callable[[], object], repeat: int) -> float:
    run()
    times = []
    for _ in range(repeat):
        start = time.process_time()
        run()
        times.append((time.process_time() - start) * 1000)
    return statistics.median(times)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--n", type=int, default=576, help="tokens an image")
    parser.add_argument("--keep", type=int, default=64)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--text", type=int, default=64, help="text tokens of the prefill")
    parser.add_argument("--repeat", type=int, default=5)
    given = parser.parse_args()
    torch.manual_seed(0)
    batch, n, keep = given.batch, given.n, given.keep
    features, text = torch.randn(batch, n, given.width), torch.randn(batch, 8, given.width)
    first = torch.zeros(batch, dtype=torch.int64)
    whole = cost(prefill(n + given.text), given.repeat) * LAYERS * batch
    distance = greedy.cosine_distance
    runs: dict[str, tuple[Callable[[], Tensor], Callable[[], list[Tensor]]]] = {
        "max-min (divprune)": (
            lambda: greedy.max_min(distance(features), keep).mask(n),
            lambda: [plain_max_min(x, keep) for x in features],
        ),
        "max-sum (todre)": (
            lambda: greedy.max_sum(distance(features), keep, first=first).mask(n),
            lambda: [plain_max_sum(x, keep) for x in features],
        ),
        "coverage (mmtok)": (
            lambda: greedy.coverage(gains(features, text), keep).mask(n),
            lambda: [plain_coverage(x, t, keep) for x, t in zip(features, text)],
        ),
        "coverage, not lazy": (
            lambda: greedy.coverage(gains(features, text), keep, lazy=False).mask(n),
            lambda: [plain_coverage(x, t, keep) for x, t in zip(features, text)],
        ),
        "facility location": (
            lambda: greedy.facility_location(1 - distance(features), keep).mask(n),
            list,
        ),
    }
    print(f"{keep} of {n} tokens of {given.width}, batch {batch}; prefill {whole:,.0f} ms")
    print(f"{'criterion':22}{'engine ms':>11}{'of prefill':>12}{'loop ms':>11}{'same sets':>11}")
    for name, (ours, plain) in runs.items():
        took, other = cost(ours, given.repeat), cost(plain, given.repeat)
        theirs = plain()
        same = sum(torch.equal(row.nonzero()[:, 0], one) for row, one in zip(ours(), theirs))
        told = f"{other:11,.1f}{f'{same}/{len(theirs)}':>11}" if theirs else ""
        print(f"{name:22}{took:11,.1f}{took / whole:12.3%}{told}")


if __name__ == "__main__":
    main()
