import collections
import gzip
import json

import pytest
import torch

import secateur
from secateur import SecateurError
from secateur.tasks.scenes.draw import ID, WORDS
from secateur.tasks.scenes.evaluate import accuracy
from secateur.tasks.scenes.models import IMAGE, TOKENS, inputs, load_scenes
from secateur.tasks.scenes.real import REAL, answer_loss, real_test, train_real
from secateur.tasks.scenes.train import Recipe
from secateur.utils.files import require_data


@pytest.mark.needs_data
def test_nlvr_has_the_sentences_of_its_files_and_three_boxes_each():
    real = REAL["nlvr"]()
    folder = require_data("nlvr")
    for split, part in (("dev", real.train), ("hidden", real.test)):
        with gzip.open(folder / f"{split}.jsonl.gz", "rt") as file:
            labels = collections.Counter(json.loads(line)["label"] for line in file)
        assert len(part) == {"dev": 989, "hidden": 985}[split] == sum(labels.values())
        assert sum(question[2] == ID["yes"] for question in part) == labels["true"]
        assert {question[2] for question in part} == {ID["yes"], ID["no"]}
    assert real.pictures.shape == (1974, 3, 3, 64, 64)
    assert real.words > len(WORDS) and max(max(q[1]) for q in real.train + real.test) == real.words - 1


@pytest.mark.needs_data
def test_a_blue_box_is_where_the_file_says():
    """The first dev picture: blue shapes in the first box only, a black one in the third only."""
    boxes = REAL["nlvr"]().pictures[REAL["nlvr"]().train[0][3]].int()
    blue = [int(((box[2] > 200) & (box[0] < 60)).sum()) for box in boxes]
    black = [int((box.sum(0) < 60).sum()) for box in boxes]
    assert blue[0] > 50 and blue[1:] == [0, 0] and black[2] > 200 and black[:2] == [0, 0]


@pytest.mark.needs_data
def test_easy_vqa_keeps_its_last_pictures_apart():
    real = REAL["easy_vqa"]()
    assert len(real.train) + len(real.test) == 38_575
    assert max(q[3] for q in real.train) == 3599 and {q[3] for q in real.test} == set(range(3600, 4000))


@pytest.mark.parametrize("variant", ["llava", "qwen"])
def test_several_pictures_a_question(variant):
    model = load_scenes(variant)
    pictures = torch.randint(0, 256, (2, 3, 3, 64, 64), dtype=torch.uint8)
    given = inputs(model, pictures, [[ID["is"], ID["there"]], [ID["is"]]])
    assert (given["input_ids"] == IMAGE).sum(1).tolist() == [3 * TOKENS] * 2
    with torch.no_grad(), secateur.attach(model, "divprune", target="25%") as attached:
        model(**given)
    assert [len(kept) for kept in attached.kept["input"]] == [3 * TOKENS // 4] * 2


@pytest.mark.needs_data
def test_new_words_are_learned_and_saved(tmp_path):
    from secateur.tasks.scenes.models import save_scenes

    recipe = Recipe(joint=2, batch=2)
    model, about = train_real("nlvr", recipe)
    assert model.get_input_embeddings().num_embeddings == REAL["nlvr"]().words
    assert set(about["accuracy"]) == {"true or false"}
    save_scenes(model, tmp_path / "out", about)
    loaded = load_scenes(tmp_path / "out")
    groups = real_test("nlvr", 16)
    assert accuracy(loaded, groups).keys() == accuracy(model, groups).keys()
    assert answer_loss("nlvr", loaded, {"question": torch.arange(2)}).isfinite()


def test_unknown_data_is_named():
    with pytest.raises(SecateurError, match="nlvr"):
        real_test("nlvr2")
