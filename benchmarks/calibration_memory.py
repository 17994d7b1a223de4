"""The memory estimate against the measured peak, on SmolLM2-135M with 32 sequences of 512 tokens.

    python benchmarks/calibration_memory.py [--blocks 3]

Each method runs in a process of its own: the model is loaded and run once on a short input, the resident size is noted,
then its blocks are pruned. The measured figure is the highest resident size above that, with an allocator that gives
freed tensors back at once (MALLOC_MMAP_THRESHOLD_=131072). glibc's default keeps freed memory for later; the last figure
is the resident size with it. Linux.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
from pathlib import Path

METHODS = ("wanda", "sparsegpt")


def status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise SystemExit("needs Linux's /proc/self/status")


def measure(method_name: str, count: int, samples: int, length: int) -> None:
    import torch

    from secateur.graph.blocks import find_matrices
    from secateur.method import make_method
    from secateur.pruning.select import Pattern
    from secateur.stats.memory import estimate
    from secateur.stats.stream import stream
    from secateur.tasks import load_model

    torch.set_num_threads(1)
    model, _ = load_model("smollm2", dtype="float32")
    for parameter in model.parameters():
        # weights that are mapped from the file would be counted when they are first touched
        parameter.data = parameter.data.clone()
    ids = torch.randint(
        0, model.config.vocab_size, (samples, length), generator=torch.Generator().manual_seed(0)
    )
    method = make_method(method_name)
    matrices = find_matrices(model)
    with torch.no_grad():
        model(ids[:1, :16])
    gc.collect()
    before = status("VmRSS")
    predicted = estimate(model, ids, method.needs, matrices)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    with torch.no_grad():
        for block in stream(model, ids, method.needs, matrices):
            patterns = {n: Pattern(m.numel // 2, method.scope) for n, m in block.matrices.items()}
            for name, (weight, _) in method.solve_block(block, patterns).items():
                matrices[name].set(weight)
            if block.index + 1 == count:
                break
    print(json.dumps({"predicted": predicted, "measured": status("VmHWM") - before}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--method", choices=METHODS)
    parser.add_argument("--blocks", type=int, default=3)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--length", type=int, default=512)
    arguments = parser.parse_args()
    if arguments.method:
        measure(arguments.method, arguments.blocks, arguments.samples, arguments.length)
        return
    for method in METHODS:
        command = [sys.executable, __file__, "--method", method, "--blocks", str(arguments.blocks)]
        command += ["--samples", str(arguments.samples), "--length", str(arguments.length)]
        strict, default = (
            json.loads(
                subprocess.run(
                    command, check=True, capture_output=True, text=True, env={**os.environ, **extra}
                ).stdout.splitlines()[-1]
            )
            for extra in ({"MALLOC_MMAP_THRESHOLD_": "131072"}, {})
        )
        predicted, measured = strict["predicted"] / 1e6, strict["measured"] / 1e6
        print(
            f"{method:>10}: predicted {predicted:6.1f} MB, measured {measured:6.1f} MB "
            f"({predicted / measured - 1:+.0%}), glibc's default allocator {default['measured'] / 1e6:6.1f} MB"
        )


if __name__ == "__main__":
    main()
