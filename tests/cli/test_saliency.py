"""`secateur saliency`: what it prints, what it writes, and what it refuses."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from secateur import SecateurError
from secateur.cli import main as cli
from secateur.cli.saliency import class_name
from secateur.saliency.picture import draw_map, overlay, read_picture, save_png, window

Image = pytest.importorskip("PIL.Image")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random ResNet of two stages and seven classes, as transformers writes it."""
    from transformers import ResNetConfig, ResNetForImageClassification

    path = tmp_path_factory.mktemp("models") / "resnet"
    torch.manual_seed(0)
    config = ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[2, 2], layer_type="basic", num_labels=7, downsample_in_first_stage=False
    )  # fmt: skip
    ResNetForImageClassification(config).save_pretrained(path)
    return path


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / "photo.jpg"
    pixels = np.random.default_rng(0).integers(0, 255, (50, 70, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture
def run(capsys):
    def go(*words):
        code = cli.main(["saliency", *map(str, words)])
        out, err = capsys.readouterr()
        return code, out, err

    return go


def test_it_writes_the_overlay_and_prints_one_json_object(run, folder, photo, tmp_path):
    out = tmp_path / "map.png"
    code, printed, err = run(folder, photo, "--size", "48,64", "--target", 3, "--out", out, "--json")
    assert code == 0, err
    found = json.loads(printed)
    assert found["target"] == 3 and found["method"] == "normgrad" and found["size"] == [48, 64]
    assert len(found["likeliest"]) == 5 and sum(item["probability"] for item in found["likeliest"]) <= 1.001
    assert 0 <= found["peak"]["row"] < 48 and 0 <= found["peak"]["column"] < 64
    with Image.open(out) as picture:
        wide, tall = picture.size
        assert wide > 2 * 5 * 70 and tall > 5 * 50, "enlarged five times, as its longer side is 70"
        drawn = np.asarray(picture)
    with Image.open(photo) as original:
        large = np.asarray(original).repeat(5, 0).repeat(5, 1)
    found = [x for x in range(tall - 250) if np.array_equal(drawn[x : x + 250, 14:364], large)]
    assert len(found) == 1, "the picture itself stands on the left"


def test_hyperparameters_of_the_map_are_flags(run, folder, photo):
    code, printed, err = run(folder, photo, "--size", 32, "--layers", "all", "--weights", "1,3", "--json")
    assert code == 0, err
    found = json.loads(printed)
    assert len(found["layers"]) == 2 and found["hyperparameters"]["weights"] == [1.0, 3.0]
    code, printed, err = run(folder, photo, "--size", 32, "--method", "lrp", "--composite", "epsilon-plus")
    assert code == 0 and "likeliest classes" in printed, err


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (["--target", 7], "no class 7 of 7"),
        (["--method", "nomgrad"], "did you mean normgrad"),
        (["--out", "map.jpg"], "end the name in .png"),
        (["--mean", "0.5"], "can't normalise"),
        (["--mean", "a,b,c"], "no numbers"),
        (["--size", "big"], "no size"),
    ],
)
def test_mistakes_are_one_line(run, folder, photo, words, match):
    code, _, err = run(folder, photo, *([] if "--size" in words else ["--size", 32]), *words)
    assert code == 2 and match in err and err.count("\n") == 1


def test_pictures_and_models_that_are_none(run, folder, photo, tiny_folder, tmp_path):
    code, _, err = run(folder, tmp_path / "none.png")
    assert code == 2 and "no such picture" in err
    (tmp_path / "text.png").write_text("no picture")
    code, _, err = run(folder, tmp_path / "text.png", "--size", 32)
    assert code == 2 and "can't be read as a picture" in err
    code, _, err = run(folder, photo)
    assert code == 2 and "--size" in err
    code, _, err = run(tiny_folder, photo, "--size", 32)
    assert code == 2 and "reads text" in err


def test_a_picture_is_read_as_the_network_wants_it(tmp_path):
    pixels = np.zeros((20, 40, 3), np.uint8)
    pixels[:, 10:30] = (255, 0, 51)
    Image.fromarray(pixels).save(tmp_path / "p.png")
    x, shown = read_picture(tmp_path / "p.png", (20, 20), (0.5, 0, 0.2), (0.5, 1, 0.1))
    assert torch.allclose(x, torch.tensor([1.0, 0, 0])[:, None, None].expand(3, 20, 20), atol=1e-6)
    assert (shown == torch.tensor([255, 0, 51])).all()
    x, _ = read_picture(tmp_path / "p.png", (10, 30), (0,) * 3, (1,) * 3)
    assert x.shape == (3, 10, 30)


def test_the_map_lies_where_the_network_looked():
    """A picture of 400 x 600 for a network of 32 x 32: the square in the middle, 100 pixels from the left."""
    at = window((400, 600), (32, 32))
    assert at == (0, 100, 400, 400) and window((600, 400), (32, 64)) == (200, 0, 200, 400)
    values = torch.zeros(4, 4)
    values[1, 3] = 2.0
    picture = torch.full((400, 600, 3), 100, dtype=torch.uint8)
    drawn = draw_map(values, picture, at)
    size = 400 // 28
    panel = drawn[14 : 14 + 400, 14 + 600 + size :][:, :600]
    assert (panel[:, 95] == 35).all() and (panel[:, 505] == 35).all(), "what was not seen is dark and grey"
    spread = (panel.amax(2).int() - panel.amin(2).int())[:, 100:500]
    row, column = divmod(int(spread.argmax()), 400)
    assert 100 <= row < 200 and 300 <= column < 400
    wide = draw_map(
        values, torch.zeros(400, 330, 3, dtype=torch.uint8), lines=["a long name of a class " * 12]
    )
    assert wide.shape[1] > drawn.shape[1], "no word is cut off"


def test_classes_have_names():
    network = torch.nn.Linear(2, 2)
    assert class_name(network, 1) is None
    network.class_names = ("cat", "dog")
    assert class_name(network, 1) == "dog" and class_name(network, 2) is None
    config = SimpleNamespace(id2label={0: "LABEL_0", 1: "ship"})
    assert [class_name(SimpleNamespace(config=config), number) for number in (0, 1)] == [None, "ship"]


def test_an_overlay_shows_the_picture_in_grey_and_what_is_salient_in_colour(tmp_path):
    image = torch.rand(3, 8, 8)
    values = torch.zeros(8, 8)
    values[2, 5] = 4.0
    shown = overlay(values, image).int()
    spread = (shown.amax(2) - shown.amin(2)).double()
    assert shown.shape == (8, 8, 3) and spread.argmax() == 2 * 8 + 5
    values[6, 1] = -4.0
    signed = overlay(values, image).int()
    assert signed[2, 5, 0] > signed[2, 5, 2] and signed[6, 1, 2] > signed[6, 1, 0]
    save_png(overlay(values, image), tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as written:
        assert np.array_equal(np.asarray(written), overlay(values, image).numpy())
    with pytest.raises(SecateurError, match="the picture"):
        overlay(values, torch.rand(3, 9, 9))


def test_the_dependency_tree_of_a_network_with_reversed_attention(run, photo, monkeypatch, tmp_path):
    from safetensors.torch import save_file

    from secateur.tasks.cifar10 import OWN, VERSION

    monkeypatch.setenv("SECATEUR_CACHE", str(tmp_path))
    folder = tmp_path / f"cifar-dependency-vit-{VERSION}"
    folder.mkdir()
    save_file(OWN["cifar-dependency-vit"]().state_dict(), folder / "model.safetensors")
    code, printed, err = run(
        "cifar-dependency-vit", photo, "--method", "dependency-tree", "--out", tmp_path / "m.png", "--json"
    )
    assert code == 0, err
    found = json.loads(printed)
    assert found["size"] == [32, 32] and found["layers"] == ["blocks.5"] and (tmp_path / "m.png").exists()
