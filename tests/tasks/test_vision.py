"""Pictures and the networks trained on them: shapes, classes, and the published accuracies."""

import math

import numpy as np
import pytest
import torch
from torch import nn

import secateur
from secateur import SecateurError
from secateur.data import calibration_batches
from secateur.data.pictures import normalise
from secateur.measure import measure
from secateur.tasks import load_model, vision
from secateur.tasks.networks.cifar_resnet import CifarResNet
from secateur.utils.files import cache_dir


def test_normalising_by_hand():
    pixels = np.array([0, 51, 255], np.uint8).reshape(1, 1, 1, 3)
    x = normalise(pixels, (0.0, 0.2, 0.5), (1.0, 0.5, 0.25))
    assert x.shape == (1, 3, 1, 1) and x.dtype == torch.float32
    assert x.flatten().tolist() == pytest.approx([0, 0, 2])


@pytest.mark.parametrize(("depth", "count"), [(20, 269722), (32, 464154), (44, 658586), (56, 853018)])
def test_the_residual_networks_have_the_published_sizes(depth, count):
    assert sum(p.numel() for p in CifarResNet(depth).parameters()) == count


def test_the_shortcut_takes_every_second_pixel_and_pads_channels_on_both_sides():
    block = CifarResNet(20).layer2[0].eval()
    for p in block.parameters():
        p.data.zero_()
    x = torch.rand(1, 16, 4, 4)
    y = block(x)
    assert torch.equal(y[:, 8:24], x[:, :, ::2, ::2])
    assert not y[:, :8].any() and not y[:, 24:].any()


def test_accuracy_counts_and_gives_the_mode_back():
    net = nn.Sequential(nn.Flatten(), nn.Linear(3, 3, bias=False)).train()
    with torch.no_grad():
        net[1].weight.copy_(torch.eye(3))
    pictures = torch.eye(3)[[0, 1, 2, 2]].reshape(4, 3, 1, 1)
    labels = torch.tensor([0, 1, 2, 0])
    assert vision.accuracy(net, pictures, labels, batch=3) == 0.75 and net.training


@pytest.mark.needs_data
def test_cifar_pictures_are_balanced_and_shuffled():
    x, y = vision.load_pictures("cifar10")
    assert x.shape == (10000, 3, 32, 32) and torch.bincount(y).tolist() == [1000] * 10
    some, labels = vision.load_pictures("cifar10", 200, split="train")
    assert some.shape == (200, 3, 32, 32) and len(labels.unique()) == 10
    assert not torch.equal(some, x[:200])


@pytest.mark.needs_data
def test_halves_of_the_imagenet_sample_share_no_class():
    parts = {
        split: vision.load_pictures("imagenet-sample", 6, split=split) for split in ("train", "test", "all")
    }
    assert parts["train"][1].tolist() == [0, 4, 8, 12, 16, 20]
    assert parts["test"][1].tolist() == [2, 6, 10, 14, 18, 22]
    assert torch.equal(parts["all"][0][::2], parts["train"][0][:3])
    assert parts["all"][0].shape == (6, 3, 224, 224) and parts["all"][0].abs().max() <= 1


@pytest.mark.needs_data
def test_a_resnet_by_name_is_as_good_as_published():
    """91.73 % on 10,000: on the first 500 within four standard errors."""
    model, tokenizer = load_model("resnet20")
    assert tokenizer is None and not model.training
    figures = measure(model, tasks=["cifar10"], limit=500, inputs=torch.zeros(1, 3, 32, 32))
    assert figures["accuracy"]["cifar10"]["acc"] == pytest.approx(
        0.9173, abs=4 * math.sqrt(0.9173 * 0.0827 / 500)
    )


@pytest.mark.slow
@pytest.mark.needs_data
def test_resnet20_gets_the_published_accuracy_on_all_test_pictures():
    x, y = vision.load_pictures("cifar10")
    assert vision.accuracy(vision.load_network("resnet20"), x, y) == pytest.approx(0.9173, abs=2e-4)


@pytest.mark.needs_data
def test_efficientnet_lite_knows_the_sample():
    """Published: 75.5 % on unseen pictures; the sample is partly what it was trained on."""
    pytest.importorskip("timm")
    if not (cache_dir() / f"{vision.LITE}-{vision.VERSION}").is_dir():
        pytest.skip("its weights aren't in the cache")
    x, y = vision.load_pictures("imagenet-sample", 24)
    assert vision.accuracy(vision.load_network("efficientnet-lite0"), x, y, 8) > 0.6


@pytest.mark.needs_data
def test_pruning_by_names_alone():
    """Example inputs come from the model, calibration pictures with labels from the name of the set."""
    batches = calibration_batches("cifar10", None, CifarResNet(20), samples=40)
    assert [x.shape[0] for x, _ in batches] == [16, 16, 8]
    model, _ = load_model("resnet20")
    settings = {"criterion": "snip", "data": "cifar10", "samples": 32}
    pruned = secateur.prune(model, method="spa", target="macs<=80%", **settings)
    assert pruned.report["met"] and pruned.model(torch.zeros(1, 3, 32, 32)).shape == (1, 10)


def test_unknown_names_are_refused():
    with pytest.raises(SecateurError, match="no network"):
        vision.load_network("resnet21")
    with pytest.raises(SecateurError, match="no pictures"):
        vision.load_pictures("cifar")
    with pytest.raises(SecateurError, match="no split"):
        vision.load_pictures("cifar10", split="validation")
