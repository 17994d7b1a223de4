"""The tasks: what they hold, the published figures of their networks, and what goes wrong."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from secateur import SecateurError
from secateur.cli.main import main
from secateur.data import camvid, digits, pictures, super_resolution
from secateur.measure import measure
from secateur.measure.vision import psnr, segmentation
from secateur.tasks import TASKS, load_model, load_task
from secateur.tasks.augment import mirror, shift, turn
from secateur.tasks.networks.espnet import EspNet
from secateur.tasks.networks.super_resolution import CarnM, Rfdn, Vdsr
from secateur.tasks.registry import NETWORKS, calibration_set
from secateur.training import fit


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(
    ("network", "count"),
    [(Vdsr(), 664_704), (Rfdn(), 433_448), (EspNet(), 354_517)],
    ids=["vdsr", "rfdn", "espnet"],
)
def test_the_networks_have_the_published_sizes(network, count):
    assert sum(p.numel() for p in network.parameters()) == count


def test_carn_m_holds_one_of_the_three_last_stages():
    """414,811 parameters with all three; up2 and each half of up4 have 256 x 16 x 9 + 256, up3 576 x 16 x 9 + 576.

    Two fixed shifts of the colour, 12 each, are no parameters here.
    """
    sizes = [sum(p.numel() for p in CarnM(scale).parameters()) for scale in (2, 3, 4)]
    up2, up3 = 256 * 145, 576 * 145
    assert sizes[0] + up3 + 2 * up2 + 24 == 414_811
    assert (sizes[1] - sizes[0], sizes[2] - sizes[0]) == (up3 - up2, up2)


@pytest.mark.parametrize(("network", "scale"), [(CarnM(2), 2), (CarnM(3), 3), (CarnM(4), 4), (Rfdn(), 4)])
def test_pictures_grow_by_the_scale(network, scale):
    with torch.no_grad():
        assert network(torch.zeros(1, 3, 18, 20)).shape == (1, 3, 18 * scale, 20 * scale)


# ---------------------------------------------------------------- metrics


class Same(nn.Module):
    """Gives back what it gets."""

    def __init__(self, scale=1, luma=True, peak=1.0):
        super().__init__()
        self.scale, self.luma, self.peak = scale, luma, peak
        self.unused = nn.Parameter(torch.zeros(1))

    def forward(self, x):
        return x


def test_psnr_by_hand_leaves_out_the_border():
    """An error of 2.55 everywhere but at the border, where it is 255: 20 log10(255 / 2.55) = 40 dB."""
    made, wanted = torch.full((1, 1, 8, 8), 0.5), torch.full((1, 1, 8, 8), 0.51)
    wanted[..., 0, :] = wanted[..., :, -1] = 1.5
    assert psnr(Same(), [(made, wanted)]) == pytest.approx(40, abs=1e-3)


def test_psnr_of_colours_is_that_of_rounded_luma():
    """Grey of 100.4 is rounded to 100; luma of grey g is 16 + 219 g / 255, so 102 is 2 * 219 / 255 away."""
    made, wanted = torch.full((1, 3, 6, 6), 100.4), torch.full((1, 3, 6, 6), 102.0)
    expected = 20 * np.log10(255 / (2 * 219 / 255))
    assert psnr(Same(luma=False, peak=255.0), [(made, wanted)]) == pytest.approx(expected, abs=1e-3)


def test_mean_intersection_over_union_by_hand():
    """Three classes and a fourth that nobody labels; labels 0 0 1 1 2 2 and one ignored, guesses 0 1 1 1 3 2 and 0.

    Class 0: 1 of 2; class 1: 2 of 3; class 2: 1 of 2. Pixels: 4 of 6.
    """
    labels = torch.tensor([[[0, 0, 1, 1, 2, 2, -100]]])
    guesses = torch.tensor([[[0, 1, 1, 1, 3, 2, 0]]])
    logits = nn.functional.one_hot(guesses, 4).permute(0, 3, 1, 2).float()
    found = segmentation(Same(), logits, labels, 3)
    assert found["miou"] == pytest.approx((1 / 2 + 2 / 3 + 1 / 2) / 3) and found["acc"] == pytest.approx(
        4 / 6
    )


# ---------------------------------------------------------------- augmentation


def test_shifting_cuts_windows_out_of_the_padded_picture():
    x = torch.arange(2 * 2 * 5 * 4, dtype=torch.float32).reshape(2, 2, 5, 4)
    fill = torch.tensor([-1.0, -2.0])
    big = torch.stack([nn.functional.pad(x[:, c], (2, 2, 2, 2), value=fill[c].item()) for c in (0, 1)], 1)
    seen = set()
    for seed in range(30):
        for picture, moved in zip(big, shift(x, generator(seed), 2, fill, flip=True)):
            windows = {
                (down, right, flip): picture[:, down : down + 5, right : right + 4].flip(2 if flip else ())
                for down in range(5)
                for right in range(5)
                for flip in (False, True)
            }
            seen |= {place for place, window in windows.items() if torch.equal(window, moved)}
    assert len(seen) > 25 and {flip for *_, flip in seen} == {False, True}
    assert torch.equal(shift(x, generator(3), 2, fill), shift(x, generator(3), 2, fill))


def test_turning_keeps_pairs_together_in_all_eight_ways():
    large = torch.rand(64, 1, 4, 4, generator=generator())
    small = large[:, :, ::2, ::2] + large[:, :, 1::2, ::2] + large[:, :, ::2, 1::2] + large[:, :, 1::2, 1::2]
    x, y = turn((small, large), generator(1))
    assert torch.allclose(nn.functional.avg_pool2d(y, 2) * 4, x)
    ways = {tuple((v == large[i, 0].flatten()[0]).nonzero()[0].tolist()) for i, v in enumerate(y[:, 0])}
    assert ways == {(0, 0), (0, 3), (3, 0), (3, 3)}
    turned = {
        tuple((v == large[i, 0, 0, 1]).nonzero()[0].tolist()) for i, v in enumerate(y[:, 0])
    }  # where the second pixel of the first row is then
    assert len(turned) == 8


def test_labels_are_mirrored_with_their_pictures():
    x = torch.rand(16, 3, 2, 4, generator=generator())
    y = (x[:, 0] * 1000).long()
    a, b = mirror((x, y), generator(1))
    assert torch.equal((a[:, 0] * 1000).long(), b)
    changed = (a != x).flatten(1).any(1)
    assert changed.any() and not changed.all() and torch.equal(a[changed], x[changed].flip(3))


# ---------------------------------------------------------------- data


def test_digits_need_no_data_folder(monkeypatch):
    monkeypatch.setenv("SECATEUR_DATA", "/nowhere")
    parts = [digits.load_digits(split) for split in ("train", "val", "test")]
    assert [len(y) for _, y in parts] == [1200, 200, 397]
    every = torch.cat([x for x, _ in parts])
    assert abs(every.mean().item()) < 0.01 and abs(every.std().item() - 1) < 0.01
    assert all(len(y.unique()) == 10 for _, y in parts)
    with pytest.raises(SecateurError, match="split"):
        digits.load_digits("rest")


def test_digits_without_scikit_learn_say_what_to_install(monkeypatch):
    digits._read.cache_clear()
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(SecateurError, match=r"secateur\[digits\]"):
        digits.load_digits()


def test_the_digits_network_is_trained_by_a_seeded_recipe_and_kept(tmp_path, monkeypatch):
    from secateur.tasks import digits as task_module

    monkeypatch.setenv("SECATEUR_CACHE", str(tmp_path))
    torch.manual_seed(5)
    before = torch.get_rng_state()
    task = load_task("digits")
    network = task.pretrained()
    assert torch.equal(torch.get_rng_state(), before) and not network.training
    assert task.quality(network) > 0.97
    monkeypatch.setattr(task_module, "fit", None)
    again = load_model("digits-cnn")[0]
    assert all(torch.equal(a, b) for a, b in zip(network.state_dict().values(), again.state_dict().values()))
    assert measure(again, tasks=["digits"])["accuracy"]["digits"]["acc"] == task.quality(network)


def test_cifar_parts_are_apart(monkeypatch):
    """Shard k holds labels 10000 k + place: train is 0..34999 without a gap, val 35000..39999; no file is read in vain."""
    read = []

    def decoded(name):
        read.append(name)
        first = 10_000 * (9 if "test" in name else int(name[-5]))
        return np.zeros((10_000, 1, 1, 3), np.uint8), np.arange(first, first + 10_000)

    monkeypatch.setattr(pictures, "_decoded", decoded)
    monkeypatch.setattr(pictures, "require_data", str)
    assert pictures.load_pictures("cifar10", split="val")[1].tolist() == list(range(35_000, 40_000))
    assert pictures.load_pictures("cifar10", split="train")[1].tolist() == list(range(35_000))
    assert pictures.load_pictures("cifar10")[1].tolist() == list(range(90_000, 100_000))
    read.clear()
    assert pictures.load_pictures("cifar10", 10_001, split="train")[1].tolist() == list(range(10_001))
    assert read == ["cifar10/train_0.npz", "cifar10/train_1.npz"]
    with pytest.raises(SecateurError, match="split"):
        pictures.load_pictures("cifar10", split="all")


@pytest.mark.needs_data
@pytest.mark.parametrize("enlarged", [False, True])
@pytest.mark.parametrize("scale", [2, 3, 4])
def test_patches_lie_over_each_other(scale, enlarged):
    """A small patch, enlarged by repeating its pixels, is close to the large one, and to no other."""
    x, y = super_resolution.patches("set14", scale, luma=True, enlarged=enlarged, size=48, limit=40)
    assert y.shape == (40, 1, 48, 48) and x.shape[-1] == (48 if enlarged else 48 // scale)
    big = x if enlarged else nn.functional.interpolate(x, scale_factor=scale, mode="nearest")
    apart = (big[:, None] - y[None]).square().mean((2, 3, 4))
    assert (apart.argmin(1) == torch.arange(40)).float().mean() > 0.95


@pytest.mark.needs_data
def test_set14_trains_without_its_last_two_pictures():
    pairs = super_resolution.load_pairs("set14", 4)
    assert len(pairs) == 14 and len(super_resolution.load_pairs("set5", 3)) == 5
    assert all(large.shape[-1] == 4 * small.shape[-1] for small, large in pairs)
    held_out = sum(large.shape[-1] * large.shape[-2] for _, large in pairs[-2:])
    every, some = (super_resolution.patches("set14", 4, size=96, held_out=n)[0] for n in (0, 2))
    assert 0 < len(every) - len(some) <= held_out / 48**2
    with pytest.raises(SecateurError, match="scale"):
        super_resolution.load_pairs("set5", 5)
    with pytest.raises(SecateurError, match="set14"):
        super_resolution.load_pairs("set6", 2)


# ---------------------------------------------------------------- published figures


@pytest.mark.needs_data
@pytest.mark.parametrize(("network", "published"), [("carn-m-x4", 31.89), ("rfdn", 32.16)])
def test_networks_that_enlarge_reach_their_published_psnr(network, published):
    task = load_task(network, train=8)
    assert task.quality(task.pretrained()) == pytest.approx(published, abs=0.006)


@pytest.mark.needs_data
def test_vdsr_agrees_with_a_computation_of_its_own_in_numpy():
    """The second picture of Set5 at x3; the mean over the five is published as 33.72 dB."""
    from PIL import Image

    small, large = super_resolution.pixels("set5", 3)[1]
    weights = np.array([65.481, 128.553, 24.966]) / 255
    up = Image.fromarray(small).resize((large.shape[1], large.shape[0]), Image.Resampling.BICUBIC)
    luma = 16 + np.asarray(up) @ weights
    model = load_model("vdsr-x3")[0]
    with torch.no_grad():
        made = model(torch.from_numpy(luma / 255).float()[None, None])[0, 0].double().numpy() * 255
    error = (made.clip(0, 255) - 16 - large @ weights)[3:-3, 3:-3]
    expected = 10 * np.log10(255**2 / (error**2).mean())
    pairs = super_resolution.load_pairs("set5", 3, luma=True, enlarged=True)[1:2]
    assert psnr(model, pairs) == pytest.approx(expected, abs=1e-3) and 36 < expected < 37


@pytest.mark.needs_data
def test_espnet_reaches_its_published_figure_on_the_pictures_that_are_here():
    network = load_model("espnet")[0]
    figures = segmentation(network, *camvid.load_camvid(), len(camvid.CLASSES))
    assert round(figures["miou"], 3) == 0.553 and round(figures["acc"], 2) == 0.86


@pytest.mark.needs_data
def test_what_is_measured_on_pictures_is_refused_for_other_networks():
    with pytest.raises(SecateurError, match="enlarge"):
        measure(load_model("digits-cnn")[0], tasks=["set5"])
    assert measure(load_model("carn-m-x4")[0], tasks=["set5"], limit=1)["psnr"]["set5"] > 30


# ---------------------------------------------------------------- tasks by name


@pytest.mark.needs_data
@pytest.mark.parametrize("name", ["cifar10:resnet20", "sr:carn-m", "camvid", "digits"])
def test_a_step_of_training_lowers_nothing_but_the_loss(name):
    """Every task trains with its own recipe, augmentation and loss, and measures what it trained."""
    task = load_task(name, split="val", train=2, test=1)
    torch.manual_seed(0)
    network = task.build()
    before = [p.detach().clone() for p in network.parameters() if p.requires_grad]
    losses = fit(
        network, task.train, steps=2, loss=task.loss, augment=task.augment, recipe=task.recipe, batch=2
    )
    assert all(np.isfinite(losses))
    after = [p for p in network.parameters() if p.requires_grad]
    assert any(not torch.equal(a, b) for a, b in zip(before, after))
    assert np.isfinite(task.quality(network))
    with torch.no_grad():
        assert torch.isfinite(network.eval()(task.inputs[..., :64, :64])).all()


@pytest.mark.needs_data
def test_parts_of_the_imagenet_sample_do_not_overlap():
    """Each picture is of another class: of the even classes every second to train on, the last 50 of them for validation."""
    pytest.importorskip("timm")

    def judged(split, train):
        seen = []
        task = load_task("imagenet-sample", split=split, train=train, test=3)
        right = nn.Identity()
        right.register_parameter("only", nn.Parameter(torch.zeros(1)))
        right.register_forward_hook(
            lambda module, given, out: seen.append(given[0]) or torch.zeros(len(out), 1000)
        )
        task.quality(right)
        return task, torch.cat(seen)

    task, test = judged("test", 300)
    assert task.train[1].tolist() == list(range(0, 800, 4)) and test.shape == (3, 3, 224, 224)
    _, val = judged("val", 1)
    every = pictures.load_pictures("imagenet-sample", split="train")[0]
    assert torch.equal(val, every[200:203]) and torch.equal(task.train[0], every[:200])
    assert torch.equal(test, pictures.load_pictures("imagenet-sample", 3)[0])


def test_a_task_is_named_by_itself_its_network_or_both():
    assert TASKS == (
        "cifar10",
        "imagenet-sample",
        "digits",
        "sr",
        "camvid",
        "mnist",
        "digits-diffusion",
        "sst2",
        "text",
        "salient-patches",
        "blur",
    )
    assert load_task("digits").name == load_task("digits-cnn").name == load_task("digits:digits-cnn").name
    assert len({network for names in NETWORKS.values() for network in names}) == 27
    for name, hint in (("cifar", "cifar10"), ("cifar10:resnet21", "resnet"), ("sr:espnet", "carn-m")):
        with pytest.raises(SecateurError, match=hint):
            load_task(name)
    with pytest.raises(SecateurError, match="at least 1"):
        load_task("digits", train=0)
    with pytest.raises(SecateurError, match="test or val"):
        load_task("digits", split="all")


def test_camvid_parts_do_not_overlap():
    parts = [range(*camvid.SPLITS[name].indices(30)) for name in ("train", "val", "test")]
    assert sorted(i for part in parts for i in part) == list(range(30))


def test_networks_with_labelled_pictures_are_calibrated_on_those(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECATEUR_DATA", str(tmp_path))
    assert calibration_set("digits-cnn") == calibration_set("digits") == "digits"
    assert calibration_set("digits-heads") is None, "it has three labels a picture"
    assert calibration_set("resnet56") is None, "its data aren't there"
    assert calibration_set("smollm2") is None and calibration_set("vdsr") is None
    (tmp_path / "cifar10").mkdir()
    (tmp_path / "cifar10" / "train_0.npz").touch()
    assert calibration_set("resnet56") == "cifar10"
    (tmp_path / "camvid").mkdir()
    (tmp_path / "camvid" / "camvid_test_subset.tar").touch()
    assert calibration_set("espnet") == "camvid" and calibration_set("camvid-patches") is None


def test_prune_takes_a_tasks_own_data(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prune", "digits", "--target", "macs<=60%", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["method"] == "obspa", "group-magnitude is what is left without data"


def test_a_name_of_no_pictures_is_refused_with_those_that_there_are(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["prune", "digits", "--target", "macs<=60%", "--data", "digitz"]) == 2
    said = capsys.readouterr().err
    assert "reads no text" in said and "'digitz'; one of cifar10, imagenet-sample, digits, camvid" in said
