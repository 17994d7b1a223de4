"""The loop and the tickets on an accelerator: the same bits again, weights in float32, masks where the network is.

Skipped where there is none; `SECATEUR_TEST_DEVICE=cpu` runs the same checks on the processor.
"""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import secateur
from secateur.training.losses import default_loss

DEVICE = os.environ.get("SECATEUR_TEST_DEVICE", "cuda")
pytestmark = pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="no accelerator")


def run(**settings: Any) -> Any:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Dropout(0.2),
        nn.Flatten(),
        nn.Linear(512, 4),
    )
    generator = torch.Generator().manual_seed(1)
    labels = torch.arange(64) % 4
    x = torch.randn(4, 1, 8, 8, generator=generator)[labels] + torch.randn(64, 1, 8, 8, generator=generator)
    settings = {"device": DEVICE, "rounds": 1, "steps": 8, "batch": 16, "data": (x, labels), **settings}
    return secateur.train_prune(model, method="lottery-rewinding", target="20%", rewind="2it", **settings)


def test_stopped_and_resumed_on_cuda_gives_the_same_bits(tmp_path: Path) -> None:
    calls: list[int] = []

    def loss(model: nn.Module, batch: Any) -> Tensor:
        calls.append(1)
        if len(calls) == 12:
            raise KeyboardInterrupt
        return default_loss(model, batch)

    whole = run()
    with pytest.raises(KeyboardInterrupt):
        run(loss=loss, resume=tmp_path / "run", every=3)
    resumed = run(loss=loss, resume=tmp_path / "run", every=3)
    mine, theirs = whole.model.state_dict(), resumed.model.state_dict()
    assert {t.device.type for t in mine.values()} == {DEVICE} and whole.plan == resumed.plan
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert {p.dtype for p in whole.model.parameters()} == {torch.float32}
    for name, mask in whole.plan.masks.items():
        assert not whole.model.get_parameter(name).cpu()[~mask].any()
