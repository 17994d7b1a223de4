"""A run that is really killed goes on at the block it was in and ends with the bit-identical plan."""

import os
import signal
import subprocess
import sys
import time

import pytest

import secateur

SCRIPT = """
import sys, time, torch
torch.set_num_threads(1)
import secateur
from secateur.pruning.resume import Checkpoint
from transformers import LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
model = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=6,
    num_attention_heads=4, num_key_value_heads=2)).eval()
ids = torch.randint(0, 64, (8, 32), generator=torch.Generator().manual_seed(1))
if sys.argv[3] == "slow":
    real = Checkpoint.save
    def save(self, key, tensors):
        real(self, key, tensors)
        time.sleep(0.5)  # so that the kill falls between blocks
    Checkpoint.save = save
pruned = secateur.prune(model, method=sys.argv[4], target="50%", data=ids, seqlen=32, resume=sys.argv[1])
import os
os.makedirs(sys.argv[2], exist_ok=True)
pruned.plan.save(sys.argv[2])
"""


def start(*args):
    return subprocess.Popen([sys.executable, "-c", SCRIPT, *map(str, args)], start_new_session=True)


@pytest.mark.parametrize("method", ["sparsegpt", "wanda"])
def test_kill_and_resume_end_with_the_identical_plan(tmp_path, method):
    steps, out = tmp_path / "steps", tmp_path / "resumed"
    victim = start(steps, out, "slow", method)
    deadline = time.time() + 120
    while len(done := sorted(steps.glob("*/*block*.safetensors"))) < 2:
        assert victim.poll() is None and time.time() < deadline
        time.sleep(0.02)
    os.killpg(victim.pid, signal.SIGKILL)
    victim.wait()
    assert not out.exists()
    done = sorted(steps.glob("*/*block*.safetensors"))
    assert 2 <= len(done) < 6
    watched = {path: path.stat().st_mtime_ns for path in done}

    resumed = start(steps, out, "slow", method)
    while out.exists() is False:
        assert resumed.poll() in (None, 0) and time.time() < deadline + 120
        for path, written in watched.items():  # finished blocks are read, not made again
            if path.exists():
                assert path.stat().st_mtime_ns == written
        time.sleep(0.02)
    assert resumed.wait() == 0
    assert not list(steps.glob("*/*")), "a finished run clears its steps"

    whole = start(tmp_path / "other", tmp_path / "whole", "fast", method)
    assert whole.wait() == 0
    assert secateur.Plan.load(out) == secateur.Plan.load(tmp_path / "whole")
