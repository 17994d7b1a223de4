"""`secateur train-prune`: what it prints and writes, killed and resumed, refused; and training by two processes."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import secateur
from secateur.cli.main import main
from secateur.errors import SecateurError
from secateur.training import fit
from secateur.training.train_prune import claim

ROOT = Path(__file__).parents[2]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
RUN = [
    "train-prune",
    "digits",
    "--method",
    "lottery-rewinding",
    "--target",
    "20%",
    "--steps",
    "60",
    "--batch",
    "32",
]
RUN += [
    "--rounds",
    "2",
    "--rewind",
    "3it",
    "--seed",
    "4",
    "--train",
    "200",
    "--test",
    "50",
    "--every",
    "2",
    "--json",
]


def test_killed_at_a_random_step_and_resumed_gives_the_same_bits(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out, work = tmp_path / "out", tmp_path / "out.run"
    command = [sys.executable, "-m", "secateur.cli", *RUN, "--out", str(out)]
    victim = subprocess.Popen(
        command, env=ENVIRONMENT, cwd=ROOT, start_new_session=True, stdout=subprocess.DEVNULL
    )
    deadline, wait = time.time() + 200, random.Random().uniform(0, 0.2)
    while not list(work.glob("*level-*.safetensors")):
        assert victim.poll() is None and time.time() < deadline
        time.sleep(0.002)
    time.sleep(wait)
    os.killpg(victim.pid, signal.SIGKILL)
    victim.wait()
    assert not out.exists() and (work / "run.json").exists()
    found = sorted(work.glob("*.safetensors"))

    assert main([*RUN, "--out", str(out), "--lr", "0.5"]) == 2
    message = capsys.readouterr().err
    assert "begun with another lr" in message and "--no-resume" in message
    assert sorted(work.glob("*.safetensors")) == found

    assert main([*RUN, "--out", str(out)]) == 0 and not work.exists()
    assert main([*RUN, "--out", str(tmp_path / "whole")]) == 0
    resumed, whole = load_file(out / "model.safetensors"), load_file(tmp_path / "whole" / "model.safetensors")
    assert resumed.keys() == whole.keys() and all(torch.equal(resumed[n], whole[n]) for n in whole)
    one, two = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert one["phases"] == two["phases"] and one["met"] and one["weights"] == two["weights"]
    assert one["before"]["accuracy"].keys() == {"digits:digits-cnn"}
    assert sum(row["kept"] for row in one["weights"]) == int(0.2 * sum(row["size"] for row in one["weights"]))
    assert [row["phase"] for row in one["phases"]] == ["early", "level-0", "level-1", "level-2"]


def test_an_empty_folder_is_as_good_as_a_new_one(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "new"):
        claim(folder, {"seed": 0})
        claim(folder, {"seed": 0})
        with pytest.raises(SecateurError, match="another seed"):
            claim(folder, {"seed": 1})
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "notes.txt").write_text("mine")
    with pytest.raises(SecateurError, match="isn't empty"):
        claim(tmp_path / "used", {"seed": 0})


def test_no_resume_starts_again_and_removes_only_what_is_a_run(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out, work = tmp_path / "out", tmp_path / "out.run"
    work.mkdir()
    (work / "letters.txt").write_text("not a run")
    assert main([*RUN, "--out", str(out), "--no-resume"]) == 2
    assert "holds no run" in capsys.readouterr().err and (work / "letters.txt").exists()
    (work / "run.json").write_text('{"lr": 0.5}')
    assert main([*RUN, "--out", str(out)]) == 2 and (work / "letters.txt").exists()
    assert main([*RUN, "--out", str(out), "--no-resume"]) == 0 and not work.exists()


def test_without_a_folder_the_cache_keeps_an_unfinished_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECATEUR_CACHE", str(tmp_path))
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3)), torch.randn(48, 6)
    steps: list[int] = []

    def run(stop: int | None, resume: bool = True) -> Any:
        steps.clear()

        def loss(network: nn.Module, batch: Any) -> torch.Tensor:
            if len(steps) == stop:
                raise KeyboardInterrupt
            steps.append(len(steps))
            return nn.functional.cross_entropy(network(batch[0]), batch[1])

        settings: dict[str, Any] = {"method": "lottery-ticket", "target": "60%", "steps": 8, "every": 2}
        data = (x, (x[:, 0] > 0).long())
        return secateur.train_prune(model, data=data, loss=loss, resume=resume, rounds=2, **settings)

    whole = run(None, resume=False)
    total = len(steps)
    assert not list(tmp_path.glob("runs/*"))
    with pytest.raises(KeyboardInterrupt):
        run(11)
    assert list(tmp_path.glob("runs/*/run.json"))
    resumed = run(None)
    assert len(steps) == total - 10 and not list(
        tmp_path.glob("runs/*")
    )  # 8 of one level and 2 of the next are read
    assert resumed.plan == whole.plan


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["digits", "--method", "wanda", "--target", "20%"], "wanda prunes without training"),
        (["digit", "--method", "lottery-ticket", "--target", "20%"], "there is no task 'digit'"),
        (["digits", "--method", "lottery-tickets", "--target", "20%"], "did you mean lottery-ticket"),
        (["digits", "--method", "lottery-ticket", "--target", "macs<=20%"], "no macs target"),
        (["digits", "--method", "lottery-ticket", "--target", "20%", "--epochs", "0"], "no training"),
        (["digits", "--method", "lottery-ticket", "--target", "20%", "--rewind", "3"], "lottery-rewinding"),
        (["digits", "--method", "lottery-ticket", "--target", "20%", "--milestones", "a"], "isn't numbers"),
        (["digits", "--method", "lottery-ticket", "--target", "20%", "--device", "tpu"], "can't be used"),
        (["digits", "--method", "lottery-ticket", "--target", "20%", "--train", "9"], "no sample of class"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture
) -> None:
    assert main(["train-prune", *arguments]) == 2
    printed = capsys.readouterr()
    assert message in printed.err and printed.err.count("\n") == 1 and not printed.out


TWO = """
import sys, torch
torch.set_num_threads(1)
sys.path.insert(0, sys.argv[1])
from test_train_prune import shared
import torch.distributed as dist
found = shared()
if dist.get_rank() == 0:
    assert dist.get_world_size() == 2
    torch.save(found, sys.argv[2])
"""


def shared(**settings: Any) -> dict[str, Any]:
    """A run with clipping, a loss term, a hook, augmentation and an extra trained tensor; no BatchNorm, no dropout."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.LayerNorm(16), nn.ReLU(), nn.Linear(16, 3))
    scale = nn.Parameter(torch.ones(3))
    x = torch.randn(48, 6, generator=torch.Generator().manual_seed(1))
    y = (x[:, 0] > 0).long() + (x[:, 1] > 0).long()

    def loss(model: nn.Module, batch: Any) -> torch.Tensor:
        return nn.functional.cross_entropy(model(batch[0]) * scale, batch[1])

    losses = fit(
        model,
        (x, y),
        steps=8,
        batch=8,
        lr=0.1,
        optimizer="sgd",
        clip=0.5,
        loss=loss,
        parameters=[*model.parameters(), scale],
        loss_terms=[lambda model, batch: 0.01 * scale.square().sum()],
        after_step=[lambda state: state.model[0].weight.data.mul_(0.99)],
        augment=lambda b, generator: (b[0] + 0.1 * torch.randn(b[0].shape, generator=generator), b[1]),
        **settings,
    )
    return {**model.state_dict(), "scale": scale.detach(), "losses": torch.tensor(losses)}


def test_two_processes_end_where_one_does(tmp_path: Path) -> None:
    script, out = tmp_path / "two.py", tmp_path / "two.pt"
    script.write_text(TWO)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    here = str(Path(__file__).parent)
    subprocess.run(
        [*torchrun, str(script), here, str(out)], check=True, env=ENVIRONMENT, cwd=ROOT, timeout=300
    )
    two, one = torch.load(out, weights_only=True), shared()
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-4, atol=1e-6)
