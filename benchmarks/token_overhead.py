"""What attention statistics cost beside the model's own attention, in one run.

    OMP_NUM_THREADS=1 python benchmarks/token_overhead.py                # 2048 tokens, 4 layers of 512

A small llava with random weights (llama: 4 layers of 512 / 1376, 8 heads on 4; tower: 2 layers of 64) reads a prompt of
2048 tokens, 1936 of them visual. Every variant keeps all tokens, so that only scoring differs; the statistic is of ONE
layer. Processor milliseconds of a prefill, medians over rounds in which every variant runs once; "attached" keeps
everything and reads nothing. `eager` is the model's own way to give the whole matrix.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import transformers as tf

import secateur
from secateur.tokens.state import TokenSets


def llava(layers: int, width: int, side: int) -> Any:
    tower = tf.CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=side * 4,
        patch_size=4,
    )
    text = tf.LlamaConfig(
        hidden_size=width,
        intermediate_size=round(width * 2.6875),
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        vocab_size=1000,
        max_position_embeddings=8192,
    )
    torch.manual_seed(0)
    config = tf.LlavaConfig(vision_config=tower, text_config=text, image_token_id=5, vision_feature_layer=-1)
    return tf.LlavaForConditionalGeneration(config).eval()


def rows(kind: str) -> Callable[[TokenSets], torch.Tensor]:
    def select(sets: TokenSets) -> torch.Tensor:
        if kind:
            sets.attention("layer:1", rows=kind)
        return sets.valid

    return select


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--text", type=int, default=32, help="prompt tokens after the image")
    parser.add_argument("--repeat", type=int, default=7)
    options = parser.parse_args()
    side = int((options.length - options.text - 16) ** 0.5)
    model = llava(options.layers, options.width, side)
    ids = torch.full((1, options.length), 7)
    before = options.length - side**2 - options.text
    ids[0, before : before + side**2] = 5
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(1, 3, side * 4, side * 4),
    }

    def run(kind: str | None) -> float:
        record = () if not kind else ("layer:1",)
        eager = kind == "eager"
        if eager:
            model.set_attn_implementation("eager")
        attached = None
        if kind is not None and not eager:
            attached = secateur.attach(
                model, rows(kind), at="layer:2", target="50%", records=record, scope="row"
            )
        start = time.process_time()
        with torch.no_grad():
            model(**inputs, logits_to_keep=1, output_attentions=eager)
        seconds = time.process_time() - start
        if attached is not None:
            attached.detach()
        if eager:
            model.set_attn_implementation("sdpa")
        return seconds * 1e3

    variants: dict[str, str | None] = {
        "sdpa": None,
        "attached": "",
        "last row": "last",
        f"{options.text} text rows": "text",
        "received (all rows)": "all",
        "eager": "eager",
    }
    for kind in variants.values():
        run(kind)
    times: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(options.repeat):
        for name, kind in variants.items():
            times[name].append(run(kind))
    base = statistics.median(times["sdpa"])
    print(f"{options.layers} layers of {options.width}, {options.length} tokens, one thread")
    for name, values in times.items():
        middle = statistics.median(values)
        ratios = [v / b for v, b in zip(values, times["sdpa"])]
        print(
            f"{name:22s} {middle:8.0f} ms  {100 * (statistics.median(ratios) - 1):+6.1f} %   {middle / base:5.2f} x"
        )


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
