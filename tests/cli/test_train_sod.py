"""`secateur train sod` and what `secateur saliency` draws with its folder."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from secateur.cli import main as cli
from secateur.data import ecssd
from secateur.methods.connnet import ConnNet
from secateur.tasks import sod
from secateur.tasks.scenes.opinions import draw_opinions


def tiny() -> nn.Module:
    torch.manual_seed(5)
    return nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.ReLU(), nn.Conv2d(4, 6, 3, 2, 1))


@pytest.fixture
def world(tmp_path, monkeypatch: pytest.MonkeyPatch):
    """A small backbone, drawn pictures in the place of photographs, and a picture file of 350 x 220."""
    made = sod.Backbone("tiny", tiny, ("1", "2"), 32, (0.5,) * 3, (0.5,) * 3)
    monkeypatch.setitem(sod.BACKBONES, "tiny", made)
    pictures, masks = draw_opinions(260, 0, 32)
    monkeypatch.setattr(ecssd, "require_data", lambda name: name)
    monkeypatch.setattr(ecssd, "_decoded", lambda file: (pictures, [m.any(0) for m in masks]))
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (220, 350, 3), np.uint8)).save(
        tmp_path / "photo.png"
    )
    return tmp_path


def run(capsys, *words: object, code: int = 0) -> str:
    assert cli.main(list(map(str, words))) == code
    told = capsys.readouterr()
    return told.out if code == 0 else told.err


@pytest.mark.parametrize("method", ["connnet", "psod"])
def test_trained_judged_written_and_drawn(world, capsys, method: str) -> None:
    out = world / method
    words = [
        "train",
        "sod",
        "--method",
        method,
        "--backbone",
        "tiny",
        "--steps",
        3,
        "--width",
        8,
        "--scenes",
        4,
    ]
    told = json.loads(run(capsys, *words, "--pictures", 12, "--out", out, "--json"))
    assert told["method"] == method and told["pictures"] == 16 and told["scenes"] == 4
    assert 0 <= told["figures"]["mae"] <= 1 and told["figures"].keys() >= {
        "f_max",
        "f_adaptive",
        "e_max",
        "s",
        "iou",
    }
    drawn = world / "found.png"
    found = json.loads(run(capsys, "saliency", out, world / "photo.png", "--out", drawn, "--json"))
    assert found["method"] == method and found["size"] == [220, 350]
    assert (found["instances"] is None) == (method == "psod")
    assert all(0 <= mask["score"] <= 1 for mask in found["masks"])
    picture, whole = np.asarray(Image.open(world / "photo.png")), np.asarray(Image.open(drawn))
    places = [
        x for x in range(whole.shape[1] - 350) if (whole[-14 - 220 : -14, x : x + 350] == picture).all()
    ]
    assert places == [14]  # the picture itself, at its own size
    text = run(capsys, "saliency", out, world / "photo.png", "--method", method)
    assert method in text and ("object" in text or "opinion" in text or "nothing stands out" in text)


def test_mistakes_are_one_line(world, capsys) -> None:
    out = world / "learned"
    run(capsys, "train", "sod", "--backbone", "tiny", "--steps", 1, "--pictures", 4, "--out", out)
    photo = world / "photo.png"
    for words, said in (
        (("saliency", out, photo, "--method", "psod"), "the folder holds connnet"),
        (("saliency", out, photo, "--target", "3"), "--target: it means nothing"),
        (("saliency", out, world / "none.png"), "no such picture"),
        (("saliency", "efficientnet-lite0", photo, "--method", "connnet"), "connnet must learn first"),
        (("train", "sod", "--method", "grad-cam", "--out", world / "x"), "doesn't learn objects"),
        (("train", "sod", "--backbone", "resnet", "--out", world / "x"), "backbone"),
        (("train", "sod", "--steps", "0", "--out", world / "x"), "--steps"),
        (
            ("train", "sod", "--neighbours", "5", "--backbone", "tiny", "--steps", "1", "--out", world / "x"),
            "neighbours",
        ),
        (("train", "sod", "--out", out), "learned"),
    ):
        told = run(capsys, *words, code=2)
        assert said in told and told.count("\n") == 1 and "Traceback" not in told
    assert not (world / "x").exists()


def test_what_ctrl_c_stopped_goes_on(world, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["train", "sod", "--backbone", "tiny", "--steps", 4, "--pictures", 6, "--every", 1, "--out"]
    run(capsys, *words, world / "whole")
    loss, calls = ConnNet.loss, []

    def counted(*args: object) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return loss(*args)

    monkeypatch.setattr(ConnNet, "loss", counted)
    assert "the same command again to continue" in run(capsys, *words, world / "parts", code=130)
    assert (world / "parts.run").is_dir() and not (world / "parts").exists()
    assert "another seed" in run(capsys, *words, world / "parts", "--seed", 1, code=2)
    run(capsys, *words, world / "parts")
    assert len(calls) == 4 + 1 and not (world / "parts.run").exists()
    read = [(world / name / sod.WEIGHTS).read_bytes() for name in ("whole", "parts")]
    assert read[0] == read[1]


def test_scenes_are_drawn_where_a_method_gives_several_opinions(world, capsys) -> None:
    """Any spelling of its name: the method says it, not the name."""
    words = ["train", "sod", "--backbone", "tiny", "--steps", 1, "--pictures", 2, "--width", 4, "--json"]
    for method, count in (("PSOD", 200), ("connnet", 0)):
        told = json.loads(run(capsys, *words, "--method", method, "--out", world / method))
        assert told["scenes"] == count and told["pictures"] == 2 + count


def test_help_shows_the_settings_of_the_method_that_is_named(capsys) -> None:
    assert "--neighbours" in run(capsys, "train", "sod", "--help")
    told = run(capsys, "train", "sod", "--method", "psod", "--help")
    assert "--prompts" in told and "--neighbours" not in told
