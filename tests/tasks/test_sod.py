"""Learning objects on the maps of any network: the folder, the picture's own size, and what is refused."""

import dataclasses
import json

import pytest
import torch
from torch import nn

from secateur import SecateurError
from secateur.methods.connnet import ConnNet
from secateur.saliency.objects.method import Lesson, Objects
from secateur.tasks import sod
from secateur.tasks.scenes.opinions import draw_opinions


def tiny() -> nn.Module:
    torch.manual_seed(5)
    return nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.ReLU(), nn.Conv2d(4, 6, 3, 2, 1))


@pytest.fixture
def spec(monkeypatch: pytest.MonkeyPatch) -> sod.Backbone:
    made = sod.Backbone("tiny", tiny, ("1", "2"), 32, (0.5,) * 3, (0.5,) * 3)
    monkeypatch.setitem(sod.BACKBONES, "tiny", made)
    return made


def scenes(count: int = 6) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    return draw_opinions(count, 0, 48)


def test_drawn_scenes_have_objects_apart_that_can_be_seen() -> None:
    pictures, masks = draw_opinions(20, 1, 64)
    assert {len(m) for m in masks} == {2, 3}
    for picture, own in zip(pictures, masks):
        assert picture.shape == (3, 64, 64) and not (own.sum(0) > 1).any() and own.flatten(1).any(1).all()
        inside = picture.float()[:, own.any(0)].mean(1)
        outside = picture.float()[:, ~own.any(0)].mean(1)
        assert (inside - outside).abs().max() > 5
    again = draw_opinions(20, 1, 64)
    assert all(torch.equal(a, b) for a, b in zip(pictures, again[0]))


@pytest.mark.parametrize(
    ("method", "own"), [("connnet", {"neighbours": 4}), ("psod", {"prompts": 2, "depth": 1})]
)
def test_what_learned_is_written_and_read_again(tmp_path, spec, method: str, own: dict) -> None:
    pictures, masks = scenes()
    finder = sod.train_sod(method, pictures, masks, backbone=spec, steps=3, width=8, **own)
    finder.save(tmp_path / "found")
    assert {file.name for file in (tmp_path / "found").iterdir()} == {sod.FILE, sod.WEIGHTS}
    read = sod.load_objects(tmp_path / "found")
    assert read.method == finder.method and read.about == finder.about
    other = torch.randint(0, 256, (3, 37, 61), dtype=torch.uint8)
    for picture, size in ((pictures[0], (48, 48)), (other, (37, 61))):
        first, second = finder.find([picture])[0], read.find([picture])[0]
        assert first.saliency.shape == (1, *size) and first.masks.shape[2:] == size
        assert torch.equal(first.saliency, second.saliency) and torch.equal(first.masks, second.masks)
    with pytest.raises(SecateurError):
        finder.save(tmp_path / "found")


def test_a_stopped_run_goes_on_to_the_same_bits(tmp_path, spec, monkeypatch: pytest.MonkeyPatch) -> None:
    pictures, masks = scenes()
    whole = sod.train_sod("connnet", pictures, masks, backbone=spec, steps=6, width=4)
    own = {"backbone": spec, "steps": 6, "width": 4, "directory": tmp_path / "run", "every": 2}
    loss, calls = ConnNet.loss, []

    def counted(self: ConnNet, head: nn.Module, lesson: Lesson) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return loss(self, head, lesson)

    monkeypatch.setattr(ConnNet, "loss", counted)
    with pytest.raises(KeyboardInterrupt):
        sod.train_sod("connnet", pictures, masks, **own)
    again = sod.train_sod("connnet", pictures, masks, **own)
    assert len(calls) == 6 + 2  # four of the six steps were kept
    for name, value in whole.head.state_dict().items():
        assert torch.equal(value, again.head.state_dict()[name]), name
    for change, said in (({"seed": 1}, "another seed"), ({"neighbours": 4}, "another neighbours")):
        with pytest.raises(SecateurError, match=said):
            sod.train_sod("connnet", pictures, masks, **own, **change)
    with pytest.raises(SecateurError, match="another data"):
        sod.train_sod("connnet", *draw_opinions(6, 1, 48), **own)


def test_the_backbone_stays_as_it_was(spec) -> None:
    pictures, masks = scenes()
    finder = sod.train_sod("connnet", pictures, masks, backbone=spec, steps=2, width=4)
    assert all(
        torch.equal(a, b) for a, b in zip(finder.model.state_dict().values(), tiny().state_dict().values())
    )
    assert all(parameter.grad is None for parameter in finder.model.parameters())


def test_masks_and_instances_keep_their_numbers_at_any_size() -> None:
    numbers = torch.tensor([[[0, 7], [0, 7]]])
    small = Objects(torch.tensor([[[0.0, 1.0], [0.0, 1.0]]]), numbers[:, None] > 0, torch.ones(1, 1), numbers)
    large = sod.own_size(small, [(4, 6)])[0]
    assert large.instances.tolist() == [[[0, 0, 0, 7, 7, 7]] * 4] and large.masks.dtype == torch.bool
    assert large.saliency[0, 0].tolist() == pytest.approx([0, 0, 1 / 3, 2 / 3, 1, 1], abs=1e-6)


def test_judged_by_hand() -> None:
    mask = torch.tensor([[1, 1, 0, 0]]).bool()
    one = Objects(mask[None].float(), mask[None, None], torch.ones(1, 1))
    figures = sod.judge([one], [mask])
    assert figures.iou == 1 and figures.mae == 0 and figures.components == 1


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda m: m.float(), "mask 1: its numbers are float32"),
        (lambda m: m[:, :20], "mask 1: it is"),
        (lambda m: m & False, "mask 1: it shows no object"),
        (lambda m: -m.long(), "mask 1: an object has the number -1"),
    ],
)
def test_masks_that_are_none_are_refused_by_their_number(spec, change, said: str) -> None:
    pictures, masks = scenes()
    masks[1] = change(masks[1])
    with pytest.raises(SecateurError, match=said):
        sod.train_sod("connnet", pictures, masks, backbone=spec, steps=1)


def test_other_mistakes_are_named(spec, tmp_path) -> None:
    pictures, masks = scenes(2)
    for args, said in (
        ((pictures, masks[:1]), "1 masks for 2 pictures"),
        (([], []), "no picture"),
        ((pictures, [torch.ones(48, 48).bool()] * 2), "nothing to tell apart"),
        (([p.float() for p in pictures], masks), "no picture"),
    ):
        with pytest.raises(SecateurError, match=said):
            sod.train_sod("connnet", *args, backbone=spec, steps=1)
    with pytest.raises(SecateurError, match="magnitude prunes"):
        sod.train_sod("magnitude", pictures, masks, backbone=spec)
    with pytest.raises(SecateurError, match="efficientnet-lite0"):
        sod.backbone("efficientnet")
    with pytest.raises(SecateurError, match="holds no finder"):
        sod.load_objects(tmp_path)


def test_a_broken_folder_is_named(spec, tmp_path) -> None:
    finder = sod.train_sod("connnet", *scenes(2), backbone=spec, steps=1, width=4)
    finder.save(tmp_path / "found")
    told = json.loads((tmp_path / "found" / sod.FILE).read_text())
    for change, said in (
        ({"channels": [1, 2, 3]}, "weights can't be read"),
        ({"format": "secateur-objects-2"}, "format is secateur-objects-2"),
        ({"size": "32"}, "size is 32"),
        ({"method": "magnitude", "hyperparameters": {}}, "magnitude prunes"),
        ({"backbone": "resnet"}, "resnet"),
    ):
        (tmp_path / "found" / sod.FILE).write_text(json.dumps({**told, **change}))
        with pytest.raises(SecateurError, match=said):
            sod.load_objects(tmp_path / "found")
    (tmp_path / "found" / sod.FILE).write_text(json.dumps(told))
    (tmp_path / "found" / sod.WEIGHTS).write_bytes(b"{}")
    with pytest.raises(SecateurError, match="weights can't be read"):
        sod.load_objects(tmp_path / "found")
    unnamed = dataclasses.replace(finder, spec=dataclasses.replace(spec, name="mine"))
    with pytest.raises(SecateurError, match="mine"):
        unnamed.save(tmp_path / "other")
