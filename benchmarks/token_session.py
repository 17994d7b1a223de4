"""What remembering the attention of every written word costs, in a decode step.

    OMP_NUM_THREADS=1 python benchmarks/token_session.py               # 1024 tokens, 8 layers of 512

A small llava with random weights (llama: layers of 512 / 1376, 8 heads on 4) writes after a prompt of 1024 tokens, 900 of
them visual, from which half leave before layer 2. Processor milliseconds of a decode step, medians over rounds in which both
variants run once: tokens leave and nothing is remembered; and the later half of the layers is.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import dataclass

import torch
import transformers as tf

import secateur
from secateur.families.vlm import Facts
from secateur.tokens.method import Memory, Stage, TokenMethod
from secateur.tokens.state import TokenSets


@dataclass
class Half(TokenMethod):
    """Every other token leaves before layer 2. No paper."""

    remembers: bool = False

    def stages(self, facts: Facts) -> list[Stage]:
        return [Stage("layer:2", self.select)]

    def memory(self, facts: Facts) -> Memory | None:
        return Memory(tuple(range(facts.layers // 2, facts.layers)), 3) if self.remembers else None

    def select(self, sets: TokenSets) -> torch.Tensor:
        return sets.valid & (sets.index % 2 == 0)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--side", type=int, default=30, help="patches along a picture")
    parser.add_argument("--words", type=int, default=16)
    parser.add_argument("--repeat", type=int, default=7)
    options = parser.parse_args()
    tower = tf.CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=options.side * 4,
        patch_size=4,
    )
    text = tf.LlamaConfig(
        hidden_size=options.width,
        intermediate_size=round(options.width * 2.6875),
        num_hidden_layers=options.layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        vocab_size=1000,
        max_position_embeddings=4096,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    config = tf.LlavaConfig(vision_config=tower, text_config=text, image_token_id=5, vision_feature_layer=-1)
    model = tf.LlavaForConditionalGeneration(config).eval()
    ids = torch.full((1, options.side**2 + 124), 7)
    ids[0, 16 : 16 + options.side**2] = 5
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(1, 3, options.side * 4, options.side * 4),
    }

    def run(remembers: bool, words: int) -> float:
        with secateur.attach(model, Half(remembers=remembers), target="50%"):
            start = time.process_time()
            model.generate(**inputs, max_new_tokens=words, do_sample=False, suppress_tokens=[5])
            return (time.process_time() - start) * 1e3

    steps: dict[bool, list[float]] = {False: [], True: []}
    for _ in range(options.repeat + 1):
        for remembers, times in steps.items():
            # what a call costs beside its decode steps is in both terms
            times.append((run(remembers, options.words + 1) - run(remembers, 1)) / options.words)
    without, withal = (statistics.median(times[1:]) for times in steps.values())
    ratios = [b / a for a, b in list(zip(*steps.values()))[1:]]
    print(f"{options.layers} layers of {options.width}, {ids.shape[1]} tokens, one thread")
    print(f"decode step, nothing remembered   {without:8.2f} ms")
    print(
        f"later half of the layers          {withal:8.2f} ms   {100 * (statistics.median(ratios) - 1):+.1f} %"
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
