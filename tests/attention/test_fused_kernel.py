"""The Triton kernel against the reference: interpreted, translated for CUDA, and on a device where there is one."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

import secateur
from secateur.attention.kernel import fused, unfit
from secateur.attention.layout import Layout
from secateur.attention.pyramid import gathered, masked
from secateur.errors import SecateurError

TRITON = pytest.importorskip("triton", reason="triton isn't installed")


def drawn(n: int, m: int, width: int = 16) -> tuple[Tensor, Tensor, Tensor]:
    make = torch.Generator().manual_seed(n + m)
    shapes = ((2, 4, n, width), (2, 2, m, width), (2, 2, m, width))
    q, k, v = (torch.randn(shape, generator=make) for shape in shapes)
    return q, k, v


def some_levels(layout: Layout) -> Tensor:
    make = torch.Generator().manual_seed(5)
    index = torch.randint(5, (2, 4, layout.rows, layout.columns), generator=make)
    return torch.tensor((0, 1, 2, 4, 8))[index].where(layout.visible(), 0)


def differences(device: str) -> list[float]:
    """Kernel against reference: causal or not, padded or not, queries with nothing to read, blocks that are short."""
    found = []
    for causal in (False, True):
        for padded in (False, True):
            q, k, v = drawn(70, 100)
            layout, real = Layout(70, 100, 32, 16, causal), None
            if padded:
                real = torch.ones(2, 100, dtype=torch.bool)
                real[0, :40] = False
            levels = some_levels(layout)
            levels[0, 0, 0] = 0
            wanted = masked(q, k, v, levels, layout, real=real)
            there = (x if x is None else x.to(device) for x in (q, k, v, levels, real))
            q, k, v, levels, real = there  # type: ignore[assignment]
            out = fused(q, k, v, levels, layout, real=real)
            found.append(float((out.cpu() - wanted).abs().max()))
    return found


def test_interpreted_on_the_processor() -> None:
    code = (
        "import test_fused_kernel as t; found = t.differences('cpu'); print(found); assert max(found) < 2e-6"
    )
    here = os.path.dirname(__file__)
    path = os.pathsep.join([here, *filter(None, sys.path)])
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path},
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no accelerator")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_on_a_device(dtype: torch.dtype) -> None:
    assert max(differences("cuda")) < 2e-5
    q, k, v = (x.to("cuda", dtype) for x in drawn(1000, 1000, 64))
    layout = Layout(1000, 1000, 128, 64, causal=True)
    levels = some_levels(layout).cuda()
    levels = torch.where(layout.crossed("cuda"), 1, levels)
    assert unfit(q, k, v, layout) == ""
    close = 1e-4 if dtype == torch.float32 else 2e-2
    wanted = masked(q, k, v, levels, layout)
    torch.testing.assert_close(fused(q, k, v, levels, layout), wanted, atol=close, rtol=close)
    torch.testing.assert_close(gathered(q, k, v, levels, layout), wanted, atol=close, rtol=close)


def test_gradients_and_other_devices_are_refused() -> None:
    q, k, v = drawn(64, 64)
    layout = Layout(64, 64, 16, 16)
    with pytest.raises(SecateurError, match="on cpu"):
        fused(q, k, v, some_levels(layout), layout)
    from secateur.attention.kernel import _unfit

    assert _unfit(q, k, v, layout) == ""
    assert _unfit(q.requires_grad_(), k, v, layout) == "it has no gradients"
    with torch.no_grad():
        assert _unfit(q, k, v, layout) == ""
    assert "float64" in _unfit(q.detach().double(), k.double(), v.double(), layout)
    assert "aren't both one of" in _unfit(q.detach()[..., :12], k[..., :12], v[..., :12], layout)
    assert "blocks of 24" in _unfit(q.detach(), k, v, Layout(64, 64, 24, 16))


@torch.no_grad()
def test_the_report_says_why_keys_were_gathered() -> None:
    timm = pytest.importorskip("timm")
    model = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=2).eval()
    with secateur.attach(model, "psa", density="40%", block_q=8, block_k=8) as attached:
        model(torch.randn(1, 3, 64, 64))
    assert attached.report["paths"] == {"gathered: on cpu": 2}
