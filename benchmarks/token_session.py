"""What remembering the attention of every written word costs, in a decode step.

    OMP_NUM_THREADS=1 python benchmarks/token_session.py               # 1024 tokens, 8 layers of 512

A small llava with random weights (llama: layers of 512 / 1376, 8 heads on 4) writes after a prompt of 1024 tokens, 900 of
them visual, of which half leave before layer 2; the later half of the layers is remembered. Processor time of a decode step,
and the share of it that the session's own functions take (all of it, that of the prompt's row too); medians.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers as tf

import secateur
from secateur.families.vlm import Facts
from secateur.tokens.method import Memory, Stage, TokenMethod
from secateur.tokens.state import TokenSets


@dataclass
class Half(TokenMethod):
    """Every other token leaves before layer 2. No paper."""

    def stages(self, facts: Facts) -> list[Stage]:
        return [Stage("layer:2", self.select)]

    def memory(self, facts: Facts) -> Memory:
        return Memory(tuple(range(facts.layers // 2, facts.layers)), 3)

    def select(self, sets: TokenSets) -> torch.Tensor:
        return sets.valid & (sets.index % 2 == 0)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--side", type=int, default=30, help="patches along a picture")
    parser.add_argument("--words", type=int, default=48)
    parser.add_argument("--repeat", type=int, default=5)
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

    def run(words: int) -> tuple[float, float]:
        """Milliseconds of a call, and those of the session in it."""
        with secateur.attach(model, Half(), target="50%") as attached:
            session, spent = attached.session, [0.0]
            assert session is not None

            def timed(function: Callable[..., None]) -> Callable[..., None]:
                def call(*args: Any, **more: Any) -> None:
                    start = time.process_time()
                    function(*args, **more)
                    spent[0] += time.process_time() - start

                return call

            session.note, session.close = timed(session.note), timed(session.close)  # type: ignore[method-assign]
            start = time.process_time()
            model.generate(**inputs, max_new_tokens=words, do_sample=False, suppress_tokens=[5])
            return (time.process_time() - start) * 1e3, spent[0] * 1e3

    run(2)
    steps, shares = [], []
    for _ in range(options.repeat):
        (short, _), (long, spent) = run(1), run(options.words + 1)
        steps.append((long - short) / options.words)
        shares.append(spent / (long - short))
    print(f"{options.layers} layers of {options.width}, {ids.shape[1]} tokens, one thread")
    print(
        f"a decode step {statistics.median(steps):.1f} ms, of which the session {100 * statistics.median(shares):.1f} %"
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
