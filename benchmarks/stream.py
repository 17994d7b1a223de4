"""`--stream` on a random Llama-like folder: resident memory against what was told before, and against the whole model.

python benchmarks/stream.py                      # 1.1 billion parameters (TinyLlama's shape), bfloat16, magnitude, wanda, sparsegpt, flap
python benchmarks/stream.py --layers 2           # smaller
python benchmarks/stream.py --layers 4 --experts 8 --methods reap    # a Mixtral-like one, 1024 wide, whose files hold experts one by one

The folder is written shard by shard; each run is a process of its own, and its peak is what the system says (VmHWM; ru_maxrss would
be the parent's where that had more), the memory that the libraries take before the run apart. `flap` cuts to 80 %, `reap` to half of
the experts, the others set half of the weights to zero.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil
import torch
from transformers import LlamaConfig, MixtralConfig
from transformers.core_model_loading import revert_weight_conversion

from secateur.io.folder import prune_folder
from secateur.io.hollow import empty_model, rows_apart
from secateur.io.shards import shard_name, write_index, write_shard
from secateur.utils.memory import give_back

TARGETS = {"flap": "80%"}


def write_model(folder: Path, layers: int, experts: int) -> int:
    """A random model in bfloat16, a shard a block; gives its parameters."""
    if experts:
        config = MixtralConfig(
            vocab_size=32000, hidden_size=1024, intermediate_size=2048, num_hidden_layers=layers, num_attention_heads=16,
            num_key_value_heads=4, num_local_experts=experts, architectures=["MixtralForCausalLM"],
        )  # fmt: skip
    else:
        config = LlamaConfig(
            vocab_size=32000, hidden_size=2048, intermediate_size=5632, num_hidden_layers=layers, num_attention_heads=32,
            num_key_value_heads=4, architectures=["LlamaForCausalLM"], tie_word_embeddings=False,
        )  # fmt: skip
    config.save_pretrained(folder)
    model = empty_model(folder)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    blocks = [[n for n in shapes if n.startswith(f"model.layers.{i}.")] for i in range(layers)]
    rest = [n for n in shapes if not n.startswith("model.layers.")]
    generator = torch.Generator().manual_seed(0)
    for number, names in enumerate([rest, *blocks]):
        tensors = {}
        for name in names:
            one = len(shapes[name]) == 1
            noise = torch.randn(shapes[name], generator=generator) * 0.02
            tensors[name] = (torch.ones(shapes[name]) if one else noise).to(torch.bfloat16)
        write_shard(folder / shard_name(number, layers + 1), revert_weight_conversion(model, tensors))
    write_index(folder)
    return sum(torch.Size(shape).numel() for shape in shapes.values())


def child(folder: str, out: str, method: str) -> None:
    """One run; prints what was told, and the peak above what the process had before."""
    torch.set_num_threads(1)
    with torch.no_grad():  # the libraries load and set up the rest when a model is first built and run
        with rows_apart(model := empty_model(folder)):
            model(torch.zeros(1, 8, dtype=torch.long))
        del model
    give_back()
    before = psutil.Process().memory_info().rss
    told: list[str] = []
    ids = torch.randint(32000, (8, 128), generator=torch.Generator().manual_seed(0))
    report = prune_folder(
        folder, out, method=method, target=TARGETS.get(method, "50%"), data=ids, announce=told.append
    )
    status = Path("/proc/self/status").read_text()
    peak = int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024  # type: ignore[index]
    found = re.match(r"needs about ([\d,]+) MB", told[0])
    assert found
    said = int(found[1].replace(",", "")) * 1e6
    print(
        json.dumps(
            {
                "before": before,
                "peak": peak,
                "said": said,
                "seconds": report["seconds"],
                "met": report["met"],
            }
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--experts", type=int, default=0)
    parser.add_argument("--methods", default="magnitude,wanda,sparsegpt,flap")
    parser.add_argument("--child", nargs=3)
    asked = parser.parse_args()
    if asked.child:
        return child(*asked.child)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "dense"
        count = write_model(folder, asked.layers, asked.experts)
        print(f"{count / 1e9:.2f} billion parameters, {2 * count / 1e9:.2f} GB in bfloat16, {4 * count / 1e9:.2f} GB in float32")  # fmt: skip
        for method in asked.methods.split(","):
            out = Path(scratch) / "out"
            words = [sys.executable, __file__, "--child", str(folder), str(out), method]
            done = subprocess.run(words, capture_output=True, text=True, check=False)
            if done.returncode:
                raise SystemExit(done.stderr)
            found = json.loads(done.stdout.splitlines()[-1])
            used = found["peak"] - found["before"]
            print(
                f"{method:10} peak {found['peak'] / 1e9:.2f} GB resident, of them {found['before'] / 1e9:.2f} GB libraries;"
                f" above them {used / 1e9:.2f} GB, {used / found['said']:.2f} of what was told;"
                f" {found['seconds']:.0f} s, met: {found['met']}",
                flush=True,
            )
            shutil.rmtree(out)


if __name__ == "__main__":
    main()
