"""Experts of a small mixture leave, are merged or become vectors, by method: perplexity of held-out text, over seeds of the training.

    python benchmarks/experts.py --seeds 3 --steps 800
    python benchmarks/experts.py --official DIR

A Mixtral of three layers of 16 experts, two a token, learns the bytes of Brown; each method then removes a quarter and
half of every layer's experts on 32 windows of the text it was trained on. Random experts are the mean of three draws.
--official: what the code of github.com/CerebrasResearch/reap, cloned to DIR, removes of the same models on the same windows.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import secateur
from secateur.data.text import load_text
from secateur.graph import trace

LENGTH = 128
METHODS = ("reap", "ream", "mone", "group-magnitude", "random-structured")


def build(seed: int) -> nn.Module:
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(seed)
    config = MixtralConfig(
        vocab_size=256, hidden_size=64, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=4, num_local_experts=16, num_experts_per_tok=2, router_aux_loss_coef=0.01,
        max_position_embeddings=LENGTH, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return MixtralForCausalLM(config)


def train(model: nn.Module, text: Tensor, steps: int, seed: int) -> None:
    """AdamW at 3e-3, falling as a cosine, on 16 windows a step, with the router's balance loss."""
    draw = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 3e-3, total_steps=steps)
    model.train()
    for _ in range(steps):
        starts = torch.randint(0, len(text) - LENGTH, (16,), generator=draw)
        ids = torch.stack([text[s : s + LENGTH] for s in starts.tolist()])
        model(input_ids=ids, labels=ids, output_router_logits=True).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        optimiser.zero_grad()
    model.eval()


@torch.no_grad()
def perplexity(model: nn.Module, windows: Tensor) -> float:
    return math.exp(
        sum(float(model(input_ids=w, labels=w).loss) for w in windows.split(8)) / (len(windows) // 8)
    )


def pruned_perplexity(model: nn.Module, method: str, share: float, data: Tensor, held: Tensor) -> float:
    draws = range(3) if method.startswith("random") else range(1)
    found = []
    for seed in draws:
        pruned = secateur.prune(
            model,
            method=method,
            target=f"{share:.0%}",
            kinds=None if method == "mone" else ("experts",),
            data=data,
            seqlen=LENGTH,
            seed=seed,
        )
        found.append(perplexity(pruned.model, held))
    return sum(found) / len(found)


def official_agrees(model: nn.Module, folder: Path, data: Tensor) -> None:
    """Prints, for each layer, whether the released code removes the same experts at 25 and 50 %."""
    sys.path.insert(0, str(folder / "src"))
    from reap.pruning_metrics import initialize_pruning_state, update_pruning_state

    states: dict[str, Any] = {}

    def hook(name: str) -> Any:
        def seen(module: Any, args: Any, output: Any) -> None:
            x = args[0].flatten(0, -2)
            logits = x @ module.gate.weight.T
            count = logits.shape[1]
            picked = logits.topk(module.top_k, -1).indices
            outputs = [
                module.experts(x, torch.full((len(x), 1), e), torch.ones(len(x), 1)) for e in range(count)
            ]
            update_pruning_state(
                states.setdefault(name, initialize_pruning_state(count)), activations=torch.stack(outputs),
                selected_experts=picked, router_logits=logits, num_experts=count, renormalize_router_weights=True,
            )  # fmt: skip

        return seen

    layers = {n: m for n, m in model.named_modules() if n.endswith(".mlp")}
    handles = [m.register_forward_hook(hook(n)) for n, m in layers.items()]
    with torch.no_grad():
        for batch in data.split(8):
            model(input_ids=batch)
    for handle in handles:
        handle.remove()
    for share in (0.75, 0.5):
        plan = secateur.prune(model, method="reap", target=f"{share:.0%}", data=data, seqlen=LENGTH).plan
        for name, state in states.items():
            scores = state["reap"].mean
            gone = scores.topk(round((1 - share) * len(scores)), largest=False).indices
            ours = [e for e in range(len(scores)) if e not in plan.keep[f"{name}:experts"].tolist()]
            same = torch.allclose(
                scores[gone].sort().values, scores[ours].sort().values
            )  # which of equal ones leaves is open
            print(
                f"{share:.0%} {name}: official {sorted(gone.tolist())}, ours {ours}: {'same' if same else 'different'}"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--official", type=Path)
    given = parser.parse_args()
    text = torch.frombuffer(
        bytearray(load_text("brown").encode("utf-8", "replace")), dtype=torch.uint8
    ).long()
    learned, rest = text[: -len(text) // 10], text[-len(text) // 10 :]
    held = rest[: 64 * LENGTH].view(64, LENGTH)
    data = learned[: 32 * LENGTH].view(32, LENGTH)
    for seed in range(given.seeds):
        model, start = build(seed), time.process_time()
        train(model, learned, given.steps, seed)
        count = len(trace(model, data[:1]).prunable("experts"))
        print(
            f"seed {seed}: dense {perplexity(model, held):.4f}, {count} layers, {time.process_time() - start:.0f} s",
            flush=True,
        )
        if given.official:
            official_agrees(model, given.official, data)
        for share in (0.75, 0.5):
            row = {m: pruned_perplexity(model, m, share, data, held) for m in METHODS}
            told = ", ".join(f"{m} {p:.4f}" for m, p in row.items())
            print(f"seed {seed}, {share:.0%} of the experts: {told}", flush=True)


if __name__ == "__main__":
    main()
