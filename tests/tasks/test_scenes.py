"""Scenes, their questions, the models trained on them, and the two commands that use them."""

import json
import re
from collections import Counter
from pathlib import Path

import pytest
import torch

from secateur.cli.main import main
from secateur.errors import SecateurError
from secateur.report.tokens import draw_kept
from secateur.tasks.scenes import train as scenes_train
from secateur.tasks.scenes.draw import (
    COLOURS,
    ID,
    IMAGE,
    KINDS,
    LONGEST,
    SHAPES,
    ask,
    decode,
    draw_scenes,
    encode,
    render,
)
from secateur.tasks.scenes.evaluate import above, accuracy, deviation, evaluate, picture, table, test_set
from secateur.tasks.scenes.models import (
    VARIANTS,
    WEIGHTS,
    build,
    frame,
    inputs,
    load_scenes,
    pixels,
    project,
    scenes_tokenizer,
    see,
)
from secateur.tasks.scenes.train import Recipe, Trainer, draw, drop, pack

SHIPPED = sorted(path.name.removeprefix("scenes-") for path in WEIGHTS.glob("scenes-*"))
test_set.__test__ = False  # type: ignore[attr-defined]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def things(scenes, row):
    """(colour, shape, row, column) of the objects of a scene, in words."""
    return [
        (list(COLOURS)[colour], SHAPES[shape], cell // 4, cell % 4)
        for cell, colour, shape, there in zip(
            scenes.cell[row].tolist(),
            scenes.colour[row].tolist(),
            scenes.shape[row].tolist(),
            scenes.there[row].tolist(),
        )
        if there
    ]


def answer(question: str, objects: list) -> str:
    """The answer, worked out from the words of the question alone."""
    if found := re.fullmatch(r"is there a (\w+) (\w+) \?", question):
        return "yes" if any(o[:2] == found.groups() for o in objects) else "no"
    if found := re.fullmatch(r"what color is the (\w+) \?", question):
        [only] = [o for o in objects if o[1] == found[1]]
        return only[0]
    if found := re.fullmatch(r"how many (\w+) shapes \?", question):
        return str(sum(o[0] == found[1] for o in objects))
    if found := re.fullmatch(r"how many (\w+?)e?s \?", question):
        names = {"circl": "circle", "squar": "square", "triangl": "triangle", "cross": "cross"}
        return str(sum(o[1] == names[found[1]] for o in objects))
    if found := re.fullmatch(r"where is the (\w+) (\w+) \?", question):
        [only] = [o for o in objects if o[:2] == found.groups()]
        return f"r{only[2]}c{only[3]}"
    found = re.fullmatch(r"is the (\w+) (\w+) (left of|right of|above|below) the (\w+) (\w+) \?", question)
    assert found, question
    [a] = [o for o in objects if o[:2] == (found[1], found[2])]
    [b] = [o for o in objects if o[:2] == (found[4], found[5])]
    holds = {"left of": a[3] < b[3], "right of": a[3] > b[3], "above": a[2] < b[2], "below": a[2] > b[2]}
    return "yes" if holds[found[3]] else "no"


@pytest.mark.parametrize("kind", KINDS)
def test_answers_follow_from_the_scene(kind):
    scenes = draw_scenes(300, generator(1))
    asked = ask(scenes, kind, generator(2))
    answers = Counter()
    for row in range(300):
        if not asked.asked[row]:
            continue
        objects, length = things(scenes, row), int(asked.length[row])
        question = decode(asked.words[row])
        assert len(question.split()) == length <= LONGEST[kind]
        given = decode([int(asked.answer[row])])
        assert given == answer(question, objects), question
        answers[given] += 1
        if kind in ("where", "relation"):
            for which in range(1 + (kind == "relation")):
                cell, at = int(asked.about[row, which]), int(asked.at[row, which])
                named = tuple(question.split()[at - 1 : at + 1])
                assert [(o[2] * 4 + o[3]) for o in objects if o[:2] == named] == [cell]
    assert sum(answers.values()) > 230
    most = answers.most_common(1)[0][1] / sum(answers.values())
    assert most < {"presence": 0.6, "relation": 0.6, "count": 0.6, "colour": 0.3, "where": 0.15}[kind]


def test_no_is_said_of_objects_that_come_close():
    scenes = draw_scenes(200, generator(3))
    asked = ask(scenes, "presence", generator(4))
    for row in (asked.answer == ID["no"]).nonzero()[:, 0].tolist():
        colour, shape = decode(asked.words[row]).split()[3:5]
        assert any(o[0] == colour or o[1] == shape for o in things(scenes, row))


def test_scenes_are_what_they_claim():
    scenes = draw_scenes(400, generator(5))
    counts = scenes.there.sum(1)
    assert sorted(set(counts.tolist())) == [2, 3, 4, 5, 6]
    assert all(len({o[2:] for o in things(scenes, row)}) == counts[row] for row in range(400))


def test_pictures_show_their_objects():
    draws = generator(6)
    scenes = draw_scenes(64, draws)
    pictures, owner = render(scenes, draws)
    assert pictures.dtype == torch.uint8 and pictures.shape == (64, 3, 64, 64)
    palette = torch.tensor(list(COLOURS.values())).float()
    right = total = 0
    for row in range(64):
        for k in range(6):
            mine = owner[row] == k
            if not scenes.there[row, k]:
                assert not mine.any()
                continue
            top, left = divmod(int(scenes.cell[row, k]), 4)
            for patch in mine.nonzero()[:, 0].tolist():
                y, x = divmod(patch, 8)
                assert abs(y - (2 * top + 0.5)) <= 1.5 and abs(x - (2 * left + 0.5)) <= 1.5
            middle = pictures[row, :, top * 16 + 7 : top * 16 + 9, left * 16 + 7 : left * 16 + 9].float()
            nearest = (palette - middle.mean((1, 2))).norm(dim=1).argmin()
            right += int(nearest == scenes.colour[row, k])
            total += 1
    assert right / total > 0.95


def test_one_seed_one_set():
    first, again, other = (draw(8, KINDS, generator(seed)) for seed in (7, 7, 8))
    assert torch.equal(first.pictures, again.pictures) and not torch.equal(first.pictures, other.pictures)
    assert all(torch.equal(a.words, b.words) for a, b in zip(first.asked, again.asked))
    small, large = test_set(8), test_set(80)
    by_kind = {(g.kind, len(g.questions[0])): g for g in large}
    for group in small:
        same = by_kind[group.kind, len(group.questions[0])]
        assert group.questions == same.questions[: len(group.questions)]
        assert torch.equal(group.pictures, same.pictures[: len(group.pictures)])


def test_words():
    assert decode(encode("Is there a red circle?")) == "is there a red circle ?"
    assert scenes_tokenizer()("Is there a red circle?").input_ids == encode("is there a red circle ?")
    with pytest.raises(SecateurError, match="wombat"):
        encode("is there a wombat ?")
    with pytest.raises(SecateurError, match="presence, colour"):
        ask(draw_scenes(1, generator()), "why", generator())


def one_forward(model, variant, picture_, question):
    """Logits after the question, through the class's own forward."""
    given = inputs(model, picture_[None], [question])
    return model(**given).logits[0, -1]


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_training_sees_what_the_class_computes(variant):
    model = build(variant, 3).eval()
    batch = draw(2, KINDS, generator(9))
    values = pixels(batch.pictures, variant)
    features = project(model, see(model, values)[0])
    if variant == "llava":
        wanted = model.get_image_features(values).pooler_output
    else:
        wanted = model.get_image_features(values.flatten(0, 1), torch.tensor([[1, 16, 16]] * 2)).pooler_output
    torch.testing.assert_close(features, torch.stack(list(wanted)), atol=1e-5, rtol=1e-4)
    every = torch.ones(2, 64, dtype=torch.bool)
    packed = pack(batch.asked, KINDS, every, every[:, 0] & False, variant)
    before, after = frame(variant)
    embedded = model.get_input_embeddings()(packed["ids"])
    start = len(before)
    embedded = torch.cat([embedded[:, :start], features, embedded[:, start + 64 :]], 1)
    hidden = model.model.language_model(
        inputs_embeds=embedded,
        attention_mask=packed["mask"],
        position_ids=packed["positions"],
        use_cache=False,
    ).last_hidden_state
    at = start + 64 + len(after)
    for kind, asked in zip(KINDS, batch.asked):
        for row in range(2):
            length = int(asked.length[row])
            wanted = one_forward(model, variant, batch.pictures[row], asked.words[row, :length].tolist())
            found = model.lm_head(hidden[row, at + length - 1])
            torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)
            if asked.asked[row]:
                assert packed["labels"][row, at + length - 1] == asked.answer[row]
        at += LONGEST[kind] + 1


def test_dropped_tokens_are_not_seen():
    batch = draw(2, ("where",), generator(10))
    kept = torch.ones(2, 64, dtype=torch.bool)
    kept[0, 3:60] = False
    packed = pack(batch.asked, ("where",), kept, torch.tensor([True, False]), "llava")
    question = packed["mask"][:, 0, 65]
    assert question[0, 1:65].tolist() == kept[0].tolist() and question[1, :65].all()
    assert packed["positions"][0, [1, 2, 3, 61, 62, 63, 64, 65]].tolist() == [1, 2, 3, 4, 5, 6, 7, 8]
    assert packed["positions"][1, [1, 64, 65]].tolist() == [1, 64, 65]


def test_the_side_that_is_asked_for_is_told_at_the_question_mark():
    kinds = ("count", "relation", "where")
    asked = draw(40, kinds, generator(14)).asked
    packed = pack(
        asked, kinds, torch.ones(40, 64, dtype=torch.bool), torch.zeros(40, dtype=torch.bool), "qwen"
    )
    start = 1 + 64 + 1 + LONGEST["count"] + 1
    for row, told in enumerate(packed["side"]):
        words = decode(asked[1].words[row]).split()
        named = [n for n, side in enumerate(("left", "right", "above", "below")) if side in words]
        assert told[told >= 0].tolist() == named
        assert told[start + words.index("?")] == named[0] and len(named) == 1


def test_shares_that_are_dropped():
    batch = draw(600, (), generator(11))
    kept, compact = drop(batch, Recipe(drop=0.5, least=0.1, bias=1.0, compact=0.25), generator(12))
    counts = kept.sum(1)
    assert 0.42 < (counts == 64).float().mean() < 0.6 and counts.min() >= 6
    assert 0.18 < compact.float().mean() < 0.32
    on, few = batch.owner >= 0, counts < 32
    assert kept[few][on[few]].float().mean() > 1.2 * kept[few][~on[few]].float().mean()


def tiny(**changes) -> Recipe:
    return Recipe(**{"batch": 2, "see": 2, "align": 1, "read": 3, "joint": 2, "polish": 1, **changes})


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_stopped_run_goes_on_to_the_same_weights(variant, tmp_path):
    whole = Trainer(tiny(variant=variant), compiled=False)
    whole.run()
    part = Trainer(tiny(variant=variant), compiled=False)
    part.run(tmp_path / "run.safetensors", stop=5)
    rest = Trainer(tiny(variant=variant), compiled=False)
    rest.load(tmp_path / "run.safetensors")
    rest.run()
    for (name, a), b in zip(whole.model.state_dict().items(), rest.model.state_dict().values()):
        assert torch.equal(a, b), name
    assert [line["stage"] for line in rest.log] == ["see", "align", "read", "joint", "polish"]
    other = Trainer(tiny(variant=variant, seed=1), compiled=False)
    with pytest.raises(SecateurError, match="another recipe"):
        other.load(tmp_path / "run.safetensors")


def test_a_run_goes_on_from_a_model():
    trainer = Trainer(tiny(start="llava", side=0.5), compiled=False)
    for (name, a), b in zip(
        trainer.model.state_dict().items(), load_scenes("llava", 0).state_dict().values()
    ):
        assert torch.equal(a, b), name
    assert trainer.about()["before"]["recipe"]["joint"] == 1500
    with pytest.raises(SecateurError, match="it is a llava, and a qwen is trained"):
        Trainer(tiny(variant="qwen", start="llava"), compiled=False)


def test_words_have_a_rate_of_their_own():
    trainer = Trainer(tiny(words=5.0, read_lr=1e-3, joint_lr=4e-4), compiled=False)
    words = trainer.model.get_input_embeddings().weight
    for stage, rate in ((2, 5e-3), (3, 2e-3)):
        trainer.stage = stage
        groups = trainer.groups()
        assert [group["lr"] for group in groups if any(p is words for p in group["params"])] == [rate]
        every = [id(p) for group in groups for p in group["params"]]
        text = trainer.model.model.language_model.parameters()
        assert len(every) == len(set(every)) and {id(p) for p in text} <= set(every)


@pytest.mark.parametrize("name", ["read_lr", "words"])
def test_rates_are_above_nothing(name):
    with pytest.raises(SecateurError, match=f"{name} is -1.0, and a rate is above 0"):
        scenes_train.train_scenes(tiny(**{name: -1.0}))


def test_the_tower_learns(monkeypatch):
    monkeypatch.setattr(scenes_train, "LOG_EVERY", 10)
    trainer = Trainer(tiny(batch=8, see=50, align=0, read=0, joint=0, polish=0), compiled=False)
    trainer.run()
    losses = [line["loss"] for line in trainer.log]
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("name", SHIPPED or ["none"])
def test_shipped_models_answer_as_recorded(name):
    """Recorded on 256 pictures; these are the first 128 of them."""
    variant, seed = name.split("-")
    model = load_scenes(variant, int(seed))
    found = accuracy(model, test_set(128))
    for kind, share in model.scenes["accuracy"].items():
        noise = 100 * ((share / 100) * (1 - share / 100) / 128) ** 0.5
        assert abs(found[kind] - share) <= 3 * noise + 2, (kind, found[kind], share)


def test_every_answer_needs_the_picture():
    model = load_scenes("llava", 0)
    groups = test_set(64)
    for group in groups:
        group.pictures.fill_(128)
    blind = accuracy(model, groups)
    test_set.cache_clear()
    assert blind["colour"] < 40 and blind["where"] < 25 and blind["presence"] < 70


def test_evaluate_counts_work_and_answers():
    score = evaluate("random-tokens", "25%", seeds=(0,), limit=16)
    assert score.tokens_layers == 16 * 4
    dense = evaluate(None, seeds=(0,), limit=16)
    assert dense.tokens_layers == 64 * 4 and set(dense.accuracy) == set(KINDS)
    assert dense.mean[0] > score.mean[0]
    lines = table([dense, score]).splitlines()
    assert len(lines) == 4 and all(line.count("|") == lines[0].count("|") for line in lines)


def test_standard_errors():
    assert deviation([1.0, 2.0, 3.0]) == pytest.approx(3**-0.5)
    one, two = (
        evaluate.__globals__["Score"]("a", "1%", "llava"),
        evaluate.__globals__["Score"]("b", "1%", "llava"),
    )
    one.accuracy, two.accuracy = {"count": [5.0, 7.0, 9.0]}, {"count": [1.0, 2.0, 3.0]}
    gap, errors = above(one, two)
    assert gap == pytest.approx(5.0) and errors == pytest.approx(5.0 / 3**-0.5)


def test_drawing_keeps_what_was_kept():
    shown = torch.full((64, 64, 3), 200, dtype=torch.uint8)
    kept = torch.zeros(8, 8, dtype=torch.bool)
    kept[2, 5] = True
    drawn = draw_kept(shown, kept, wide=160)
    assert drawn.shape == (160, 160, 3)
    assert drawn[50, 110].tolist() == [200] * 3 and drawn[40, 100].tolist() == [255] * 3
    assert drawn[10, 10].tolist() == [44] * 3


def test_tokens_command(tmp_path, capsys):
    out = tmp_path / "kept.png"
    flags = ["--method", "random-tokens", "--target", "25%", "--repeats", "1", "--json", "--out", str(out)]
    assert main(["tokens", "scenes", "--image", "3", *flags]) == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found["kept"]["input"]) == 16 == found["after"]["visual_tokens"]
    assert found["before"]["tokens_x_layers"] == 256 and found["after"]["tokens_x_layers"] == 64
    assert found["after"]["flops"] < found["before"]["flops"]
    assert found["after"]["kv_bytes"] < found["before"]["kv_bytes"]
    assert (found["prompt"], found["expected"]) in picture(3)[1].values()
    assert (
        main(
            [
                "tokens",
                "scenes",
                "--image",
                "3",
                *flags[:4],
                "--repeats",
                "5",
                "--max-new-tokens",
                "2",
                "--json",
            ]
        )
        == 0
    )
    speed = json.loads(capsys.readouterr().out)["speed"]["seconds_to_first_token"]
    assert speed["pairs"] == 5 and 0 < speed["low"] <= speed["ratio"] <= speed["high"]
    from PIL import Image

    image = Image.open(out)
    assert image.width > 2 * 384 and image.height > 384


def test_tokens_command_on_several_pictures(tmp_path, capsys):
    """Every picture and frame has its count and its panel; the question is about the last picture."""
    out = tmp_path / "kept.png"
    flags = ["--method", "random-tokens", "--target", "25%", "--repeats", "1", "--max-new-tokens", "1"]
    assert main(["tokens", "scenes", "3", "5", *flags, "--budget", "all", "--json", "--out", str(out)]) == 0
    found = json.loads(capsys.readouterr().out)
    one, two = found["pictures"]["input"]
    assert (one["image"], two["image"], one["total"], two["total"]) == (0, 1, 64, 64)
    assert one["kept"] + two["kept"] == 32 == len(found["kept"]["input"]) and one["kept"] != two["kept"]
    assert (found["prompt"], found["expected"]) in picture(5)[1].values()
    from PIL import Image

    # two lines of two panels of 192 pixels
    assert Image.open(out).size == (2 * 192 + 3 * 12, 2 * (192 + 12 + 26) + 12)
    assert main(["tokens", "scenes", "3", "5", *flags]) == 0
    assert "input: 32 kept: image 1 16 of 64, image 2 16 of 64" in capsys.readouterr().out


def test_tokens_command_on_a_video(tmp_path, capsys):
    from PIL import Image
    from transformers import (
        PreTrainedTokenizerFast,
        Qwen2_5_VLProcessor,
        Qwen2VLImageProcessor,
        Qwen2VLVideoProcessor,
    )

    model, folder, clip = build("qwen"), tmp_path / "model", tmp_path / "clip"
    model.save_pretrained(folder)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=scenes_tokenizer()._tokenizer,
        pad_token="<pad>",
        extra_special_tokens={"image_token": "<image>", "video_token": "<video>"},
    )
    size = {"shortest_edge": 64, "longest_edge": 64**3}
    own = {"patch_size": 4, "temporal_patch_size": 2, "merge_size": 2, "size": size}
    processor = Qwen2_5_VLProcessor(Qwen2VLImageProcessor(**own), tokenizer, Qwen2VLVideoProcessor(**own))
    processor.save_pretrained(folder)
    clip.mkdir()
    for number in range(12):
        Image.new("RGB", (32, 16), (20 * number, 0, 0)).save(clip / f"{number:02}.png")
    out = tmp_path / "kept.png"
    command = ["tokens", str(folder), "--video", str(clip), "--frames", "6", "--prompt", "how many circles ?"]
    flags = ["--target", "50%", "--budget", "frame", "--repeats", "1", "--json", "--out", str(out)]
    assert main([*command, *flags]) == 0
    found = json.loads(capsys.readouterr().out)["pictures"]["input"]
    assert [(part["frame"], part["kept"] / part["total"]) for part in found] == [(0, 0.5), (1, 0.5), (2, 0.5)]
    assert Image.open(out).width == 3 * 192 + 4 * 12


def test_a_time_that_cannot_be_measured_keeps_its_row(capsys):
    flags = ["--method", "random-tokens", "--target", "25%", "--repeats", "1", "--max-new-tokens", "1"]
    assert main(["tokens", "scenes", "--image", "3", *flags]) == 0
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    [row] = [line for line in lines if line.startswith("time per token")]
    assert row.endswith("not measured")
    assert "note: time per token was not measured: the answer is a single token" in lines


def test_tokens_command_on_any_model(tmp_path, capsys):
    from PIL import Image
    from transformers import CLIPImageProcessor, LlavaProcessor

    model, folder = build("llava"), tmp_path / "model"
    model.save_pretrained(folder)
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
    command = ["tokens", str(folder), str(tmp_path / "photo.png"), "--prompt", "how many circles ?", "--json"]
    assert main([*command, "--method", "uniform-grid", "--target", "tokens=16", "--repeats", "1"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["before"]["visual_tokens"] == 64 and found["after"]["visual_tokens"] == 16


@pytest.mark.parametrize(
    "wrong, says",
    [
        (["scenes", "--image", "99999"], "no test picture"),
        (["scenes", "--prompt", "is there a wombat ?"], "wombat"),
        (["scenes:mamba"], "no model is called"),
        (["scenes", "--method", "wanda"], "no visual tokens"),
        (["scenes", "--target", "0%"], "target"),
        (["scenes", "--out", "kept.jpg"], ".png"),
        (["scenes", "nowhere.png"], "nowhere.png"),
        (["/nowhere", "--prompt", "why ?"], "needs a picture"),
        (
            ["scenes", "3", "5", "--method", "downsample", "--budget", "all"],
            "its coarse grid lies over one crop",
        ),
        (["scenes", "--budget", "frames"], "one of frame, image, all"),
        (["scenes", "--video", "clip.gif"], "scenes are stills"),
        (["/nowhere", "--video", "clip.mp4", "--prompt", "why ?"], "clip.mp4"),
    ],
)
def test_mistakes_are_one_line(wrong, says, capsys):
    assert main(["tokens", *wrong]) == 2
    printed = capsys.readouterr()
    assert says in printed.err and printed.err.count("\n") == 1 and not printed.out


def test_train_command(tmp_path, capsys):
    out = tmp_path / "model"
    steps = [
        "--see",
        "1",
        "--align",
        "1",
        "--read",
        "1",
        "--joint",
        "1",
        "--polish",
        "1",
        "--batch",
        "2",
        "--limit",
        "4",
    ]
    assert main(["train", "scenes", "--seed", "5", *steps, "--out", str(out), "--json"]) == 0
    about = json.loads(capsys.readouterr().out)
    assert about["recipe"]["seed"] == 5 and about["steps"] == 5 and set(about["accuracy"]) <= set(KINDS)
    model = load_scenes(out)
    assert torch.equal(model.lm_head.weight, model.get_input_embeddings().weight)
    assert json.loads((out / "scenes.json").read_text())["recipe"]["read"] == 1
    assert not Path(f"{out}.run").exists()
    assert main(["train", "scenes", "--slots", "why", "--out", str(tmp_path / "other")]) == 2
    assert "why" in capsys.readouterr().err


def test_inputs_are_padded_on_the_left():
    made = inputs(build("qwen"), torch.zeros(2, 3, 64, 64, dtype=torch.uint8), [[10, 11, 12], [10]])
    assert made["input_ids"][1, :2].tolist() == [0, 0] and made["attention_mask"].sum(1).tolist() == [69, 67]
    assert (made["mm_token_type_ids"] == (made["input_ids"] == IMAGE)).all()
    assert made["pixel_values"].shape == (512, 96)
