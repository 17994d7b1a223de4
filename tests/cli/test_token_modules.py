"""`secateur train tokens`: from drawn scenes or a file of examples to modules that `secateur tokens` takes."""

import json

import pytest
from safetensors.torch import load_file

from secateur.cli.main import main
from secateur.tasks.scenes.models import build, scenes_tokenizer

QUICK = ["--steps", "1", "--batch", "2"]
SCORER = ["--method", "covipal", "--width", "16", "--heads", "2"]


def test_from_scenes_to_an_answer(tmp_path, capsys):
    out = tmp_path / "scorer"
    line = ["train", "tokens", "scenes", *SCORER, *QUICK, "--samples", "8", "--out", str(out), "--json"]
    assert main(line) == 0
    about = json.loads(capsys.readouterr().out)
    assert [part["name"] for part in about["lessons"]] == ["imitation", "gates"] and about["frozen"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["scorer"]
    assert load_file(out / "modules.safetensors")["0.down.weight"].shape == (16, 128)
    ask = ["tokens", "scenes", "--method", "covipal", "--target", "25%", "--repeats", "1", "--json"]
    assert main([*ask, "--weights", str(out)]) == 0
    assert json.loads(capsys.readouterr().out)["after"]["visual_tokens"] == 16
    assert main(ask) == 2
    assert "secateur train tokens MODEL --method covipal" in capsys.readouterr().err
    assert main([*ask, "--weights", str(out), "--width", "32"]) == 2
    assert "[16, 128], and with these settings it is [32, 128]" in capsys.readouterr().err


def test_from_a_file_of_examples_and_a_model_that_learns_too(tmp_path, capsys):
    from PIL import Image
    from transformers import CLIPImageProcessor, LlavaProcessor

    folder, out = tmp_path / "model", tmp_path / "thresholds"
    build("llava").save_pretrained(folder)
    size = {"height": 64, "width": 64}
    LlavaProcessor(
        image_processor=CLIPImageProcessor(size=size, crop_size=size),
        tokenizer=scenes_tokenizer(),
        patch_size=8,
        vision_feature_select_strategy="default",
        image_token="<image>",
        num_additional_image_tokens=1,
    ).save_pretrained(folder)
    Image.new("RGB", (80, 60), "red").save(tmp_path / "photo.png")
    rows = [("how many circles ?", "2"), ("where is the red cross ?", "r1c2")]
    lines = [json.dumps({"image": "photo.png", "question": q, "answer": a}) for q, a in rows]
    (tmp_path / "asked.jsonl").write_text("\n".join(lines))
    line = ["train", "tokens", str(folder), "--method", "atp-llava", *QUICK, "--data"]
    line = [*line, str(tmp_path / "asked.jsonl"), "--no-frozen", "--out", str(out)]
    assert main([*line, "--lr", "0.01"]) == 0
    assert "thresholds" in capsys.readouterr().out
    before, after = (load_file(place / "model.safetensors") for place in (folder, out / "model"))
    assert any(not before[name].equal(after[name]) for name in before)
    ask = ["tokens", str(out / "model"), str(tmp_path / "photo.png"), "--prompt", "how many circles ?"]
    ask = [*ask, "--method", "atp-llava", "--weights", str(out), "--repeats", "1", "--json"]
    assert main(ask) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["after"]["tokens_x_layers"] < found["before"]["tokens_x_layers"]


def test_labels_are_the_answers_and_the_end(tmp_path):
    from PIL import Image
    from transformers import CLIPImageProcessor, LlavaProcessor

    from secateur.cli.token_modules import examples

    size = {"height": 64, "width": 64}
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessor(size=size, crop_size=size),
        tokenizer=scenes_tokenizer(),
        patch_size=8,
        vision_feature_select_strategy="default",
        image_token="<image>",
        num_additional_image_tokens=1,
    )
    Image.new("RGB", (8, 8)).save(tmp_path / "dot.png")
    asked = [("how many circles ?", "2"), ("where is the red cross ?", "r1c2")]
    rows = [{"image": str(tmp_path / "dot.png"), "question": q, "answer": a} for q, a in asked]
    made = examples(processor, rows)
    decode = scenes_tokenizer().decode
    assert [decode(row[row != -100]).split() for row in made["labels"]] == [["2", "<eos>"], ["r1c2", "<eos>"]]
    assert int((made["input_ids"] == scenes_tokenizer().convert_tokens_to_ids("<image>")).sum()) == 128


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--method", "fastv"], "no modules to train"),
        (["--method", "wanda"], "no visual tokens"),
        ([*SCORER, "--data", "x.jsonl"], "scenes are drawn"),
        ([*SCORER, "--steps", "0"], "too few"),
        ([*SCORER, "--target", "100%"], "no token leaves"),
        ([*SCORER, "--start", "nowhere"], "modules.json"),
        ([*SCORER, "--guides", "9"], "can't guide"),
    ],
)
def test_mistakes_are_one_line(flags, says, tmp_path, capsys):
    line = ["train", "tokens", "scenes", "--samples", "2", "--out", str(tmp_path / "out"), *flags]
    assert main(line) == 2
    printed = capsys.readouterr()
    assert says in printed.err and printed.err.count("secateur:") == 1 and "Traceback" not in printed.err
    assert not (tmp_path / "out").exists()


def test_broken_files_of_examples_are_named(tmp_path, capsys):
    file = tmp_path / "asked.jsonl"
    line = ["train", "tokens", "/nowhere", *SCORER, "--out", str(tmp_path / "out"), "--data", str(file)]
    for text, says in (
        ("", "no example"),
        ("{", "line 1: it isn't JSON"),
        ('\n{"image": "a.png", "question": "why"}', "line 2"),
    ):
        file.write_text(text)
        assert main(line) == 2
        assert says in capsys.readouterr().err
