"""A prefill with 11 % of the visual tokens, beside the same model fed that many from the start, in one run.

    OMP_NUM_THREADS=1 python benchmarks/token_prefill.py
    OMP_NUM_THREADS=1 python benchmarks/token_prefill.py --methods divprune,fastervlm --batch 4

A llava with random weights: a tower of 24 x 24 patches, a llama of 6 layers of 1024 (a 24-layer model of 1 B parameters,
scaled down: 4 times fewer layers, half as wide). "by hand" runs the tower, keeps the first 64 features and reads a
prompt with 64 places: what dropping can cost at least. Processor milliseconds of one prefill, medians over rounds in which
every variant runs once; the ratio is the median of the rounds' ratios.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch
import transformers as tf

import secateur
from secateur.tokens.input import flat
from secateur.utils.spread import quartiles

SIDE, KEEP, TEXT = 24, 64, 64


def llava(layers: int, width: int) -> Any:
    tower = tf.CLIPVisionConfig(
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=SIDE * 4,
        patch_size=4,
    )
    text = tf.LlamaConfig(
        hidden_size=width,
        intermediate_size=round(width * 2.6875),
        num_hidden_layers=layers,
        num_attention_heads=16,
        num_key_value_heads=4,
        vocab_size=1000,
        max_position_embeddings=8192,
    )
    torch.manual_seed(0)
    config = tf.LlavaConfig(vision_config=tower, text_config=text, image_token_id=5, vision_feature_layer=-2)
    return tf.LlavaForConditionalGeneration(config).eval()


def prompt(batch: int, places: int) -> torch.Tensor:
    ids = torch.randint(10, 1000, (batch, places + TEXT), generator=torch.Generator().manual_seed(0))
    ids[:, 16 : 16 + places] = 5
    return ids


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--methods", default="random-tokens,fastervlm,divprune,fastv")
    options = parser.parse_args()
    model = llava(options.layers, options.width)
    images = torch.randn(options.batch, 3, SIDE * 4, SIDE * 4)
    long, short = prompt(options.batch, SIDE**2), prompt(options.batch, KEEP)
    full = {"input_ids": long, "attention_mask": torch.ones_like(long), "pixel_values": images}

    def dense() -> None:
        model(**full, logits_to_keep=1)

    def by_hand() -> None:
        output = model.get_image_features(images, return_dict=True)
        output.pooler_output = list(flat(output).view(options.batch, SIDE**2, -1)[:, :KEEP])
        mask = torch.ones_like(short)
        model(input_ids=short, attention_mask=mask, mm_encoder_outputs={"image": output}, logits_to_keep=1)

    def timed(function: Any) -> float:
        start = time.process_time()
        with torch.no_grad():
            function()
        return 1e3 * (time.process_time() - start)

    def attached(method: str) -> float:
        with secateur.attach(model, method, target=f"tokens={KEEP}"):
            return timed(dense)

    methods = options.methods.split(",")
    times: dict[str, list[float]] = {}
    for _ in range(options.repeat + 1):
        times.setdefault("by hand", []).append(timed(by_hand))
        times.setdefault("all tokens", []).append(timed(dense))
        for method in methods:
            times.setdefault(method, []).append(attached(method))
    print(
        f"{options.layers} layers of {options.width}, batch {options.batch}, {KEEP} of {SIDE**2} visual tokens"
    )
    for name, values in times.items():
        low, ratio, high = quartiles([v / b for v, b in zip(values[1:], times["by hand"][1:])])
        print(
            f"{name:24s} {statistics.median(values[1:]):8.0f} ms   {ratio:5.2f} x by hand ({low:.2f} to {high:.2f})"
        )


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
