"""`scenes:seg`: masks of the objects that are asked for, and a reader that learns them from what the model comes to know."""

import torch

import secateur
from secateur.tasks.scenes import questions
from secateur.tasks.scenes.draw import CELL, PATCH, PLACES, decode
from secateur.tasks.scenes.models import load_scenes
from secateur.tasks.scenes.questions import TEST_SEED
from secateur.tasks.scenes.segment import MaskReader, overlap, referred, seen, states, train_reader, tune


def test_masks_lie_in_the_cell_that_answers_the_question():
    data = referred(64, TEST_SEED)
    groups = [group for group in questions.test_set(64) if group.kind == "where"]
    places = {tuple(p.flatten().tolist()): a for g in groups for p, a in zip(g.pictures, g.answers)}
    assert len(data) > 55 and all(decode(words).startswith("where is the ") for words in data.questions)
    # the pictures are the test's; an object moves by two pixels, so it may reach one patch beyond its cell
    for picture in data.pictures:
        assert tuple(picture.flatten().tolist()) in places
    for words, mask, owner in zip(data.questions, data.masks, data.owner):
        rows, columns = mask.nonzero()[:, 0] // 8, mask.nonzero()[:, 0] % 8
        assert rows.max() - rows.min() <= CELL // PATCH and columns.max() - columns.min() <= CELL // PATCH
        assert len(owner[mask].unique()) == 1 and int(owner[mask][0]) >= 0
        assert len(words) == 6 and len(PLACES) == 16
    half = data[:10]
    assert len(half) == 10 and half.questions == data.questions[:10]


def test_overlap_by_hand():
    reader = MaskReader(2, 3)
    with torch.no_grad():
        for parameter in reader.parameters():
            parameter.zero_()
        reader.figure.weight[0, 0] = 1
    features = torch.full((3, 64, 3), -1.0)
    features[:2, :4, 0] = 1  # patches 0 to 3 are found, in the third picture none
    masks = torch.zeros(3, 64, dtype=torch.bool)
    masks[0, 2:8] = True  # 2 of 8
    masks[1, :4] = True
    assert overlap(reader, torch.zeros(3, 2), features, masks).tolist() == [0.25, 1, 0]


def test_a_reader_learns_masks_and_needs_the_picture():
    model = load_scenes("llava", 0)
    reader = train_reader(model, pictures=320, steps=150)
    data = referred(48, TEST_SEED)
    features = seen(model, data)
    assert features.shape == (len(data), 64, 128) and not reader.training
    whole = float(overlap(reader, states(model, data), features, data.masks).mean())
    work, given = [], []
    with secateur.attach(model, "random-tokens", target="tokens=1") as attached:
        blind = states(
            model, data, 20, given.append, lambda: work.append(attached.report["after"]["visual_tokens"])
        )
    assert work == [20, 20, len(data) - 40] == [len(part) for part in given]
    assert whole > 0.5 and float(overlap(reader, blind, features, data.masks).mean()) < 0.3


def test_tuning_moves_the_language_model_alone_under_what_is_attached():
    model = load_scenes("llava", 0)
    reader = MaskReader(128, 128)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    seen_by = []
    with secateur.attach(model, "lvlm-csp", target="tokens=8", clusters="tokens=8") as attached:
        tune(model, reader, steps=2, batch=4, before=lambda part: seen_by.append(len(part)))
        lengths = attached.report["lengths"]
    # 7 words and 8, 8, 64, 8 visual tokens
    assert seen_by == [4, 4] and [row[0] for row in lengths] == [15, 15, 71, 15]
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved and all("language_model" in name for name in moved)
    assert all(parameter.requires_grad for parameter in model.parameters())
