"""Models of packages that nothing here depends on go the whole way, where they are installed."""

import os

import pytest
import torch

import secateur


def test_a_detector_of_ultralytics(tmp_path, monkeypatch):
    """Built from its own yaml: cut, trained a step on boxes, saved, loaded, exported."""
    monkeypatch.setenv("YOLO_CONFIG_DIR", os.fspath(tmp_path))
    monkeypatch.setenv("YOLO_OFFLINE", "true")
    pytest.importorskip("ultralytics")
    from ultralytics.cfg import get_cfg
    from ultralytics.nn.tasks import DetectionModel

    def build():
        torch.manual_seed(0)
        return DetectionModel("yolov8n.yaml", nc=3, verbose=False).eval()

    x = torch.randn(2, 3, 64, 64)
    pruned = secateur.prune(build(), x, method="group-magnitude", target="macs<=50%")
    model = pruned.model
    assert pruned.report["met"] and pruned.graph.rule_errors == []
    assert not any("provably" in note for note in pruned.report["notes"])
    expected = model(x)[0].detach()

    pruned.save(tmp_path / "out")
    again, _ = secateur.load(tmp_path / "out", model=build())
    torch.testing.assert_close(again(x)[0], expected, rtol=0, atol=1e-5)
    assert secateur.export(model, x, tmp_path / "out.onnx")["difference"] < 1e-4

    model.args = get_cfg()
    boxes = {
        "batch_idx": torch.tensor([0.0, 1]),
        "cls": torch.tensor([[0.0], [2]]),
        "bboxes": torch.full((2, 4), 0.4),
    }
    before = model.model[0].conv.weight.detach().clone()
    loss = model.train()({"img": x, **boxes})[0].sum()
    loss.backward()
    torch.optim.SGD(model.parameters(), 1e-3).step()
    assert loss.isfinite() and not torch.equal(model.model[0].conv.weight, before)


def test_a_network_of_diffusers(tmp_path):
    """Its resampling layers assert their width, which has to follow the cut."""
    zoo = pytest.importorskip("diffusers")
    sizes = {"block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 8, "sample_size": 8}
    down, up = ("DownBlock2D", "AttnDownBlock2D"), ("AttnUpBlock2D", "UpBlock2D")
    torch.manual_seed(0)
    model = zoo.UNet2DModel(**sizes, down_block_types=down, up_block_types=up).eval()
    inputs = {"sample": torch.randn(2, 3, 8, 8), "timestep": torch.tensor([1, 2])}
    pruned = secateur.prune(model, inputs, method="group-magnitude", target="macs<=50%")
    assert pruned.report["met"] and not any("provably" in note for note in pruned.report["notes"])
    sampler = next(m for m in pruned.model.modules() if type(m).__name__ == "Downsample2D")
    assert sampler.channels == sampler.conv.in_channels < 16
