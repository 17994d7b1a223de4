"""Prompts with a place for the thumbnail alone: room is made for the tiles that are read, as in a prompt of these tiles made by hand."""

import pytest
import torch
from test_pyramid import EACH, Zooming, pyramid_inputs, read_tiles
from tiny_models import IMAGE, PAD, make

from secateur import SecateurError
from secateur.tokens.attach import attach
from secateur.tokens.pyramid import Level
from secateur.tokens.room import room

GRIDS = [[Level(1, 1), Level(2, 2), Level(2, 3)], [Level(1, 1), Level(2, 2)]]
TILES = [11, 5]


def prompt(family, counts, inputs):
    """`inputs` with so many tiles' places in each row."""
    rows = []
    for ids, count in zip(inputs["input_ids"], counts):
        text = ids[(ids != IMAGE) & (ids != PAD)].tolist()
        rows.append([*text[:2], *[IMAGE] * (count * EACH[family]), *text[2:]])
    longest = max(map(len, rows))
    ids = torch.tensor([[PAD] * (longest - len(row)) + row for row in rows])
    out = {**inputs, "input_ids": ids, "attention_mask": (ids != PAD).long()}
    if "token_type_ids" in inputs:
        out["token_type_ids"] = (ids == IMAGE).long() * (family == "gemma3")
    return out


def by_hand(family, inputs):
    """The prompt of the tiles that `Zooming` reads, and no others."""
    read = [torch.tensor(row, dtype=torch.bool) for row in read_tiles()]
    out = prompt(family, [int(row.sum()) for row in read], inputs)
    pixels = inputs["pixel_values"]
    if family == "idefics3":
        out["pixel_values"] = torch.zeros(2, int(read[0].sum()), *pixels.shape[2:], dtype=pixels.dtype)
        for row, mine in enumerate(read):
            out["pixel_values"][row, : int(mine.sum())] = pixels[row, : len(mine)][mine]
    else:
        out["pixel_values"] = pixels[torch.cat(read)]
    return out


WRITING = {"max_new_tokens": 3, "do_sample": False, "suppress_tokens": [IMAGE, 6]}
WRITING |= {"output_logits": True, "return_dict_in_generate": True}


@pytest.mark.parametrize("family", list(EACH))
def test_as_a_prompt_of_the_read_tiles_by_hand(family):
    """Rows padded on the left, generation and one forward; a prompt with every place gives the same."""
    model, full = make(family), pyramid_inputs(family, grids=GRIDS)
    short, hand = prompt(family, [1, 1], full), by_hand(family, full)
    with torch.no_grad():
        wanted, whole = model.generate(**hand, **WRITING), model(**hand).logits[:, -1]
        with attach(
            model, Zooming(False), target="50%", positions="compact", given={"pyramid": GRIDS}
        ) as attached:
            written = [model.generate(**inputs, **WRITING) for inputs in (short, full)]
            logits = model(**short).logits[:, -1]
            kept = attached.kept["tiles"]
    assert torch.allclose(logits, whole, atol=1e-6)
    for out, inputs in zip(written, (short, full)):
        length = inputs["input_ids"].shape[1]
        assert torch.equal(out.sequences[:, :length], inputs["input_ids"])
        new = hand["input_ids"].shape[1]
        assert torch.equal(out.sequences[:, length:], wanted.sequences[:, new:])
        assert torch.allclose(torch.stack(out.logits), torch.stack(wanted.logits), atol=1e-6)
    # numbers, places and counts are those of the picture with all its tiles
    each = EACH[family]
    for row, mine in enumerate(read_tiles()):
        assert kept[row].tolist() == [t * each + i for t, yes in enumerate(mine) if yes for i in range(each)]
    assert attached.report["before"]["visual_tokens"] == sum(TILES) * each
    assert attached.report["after"]["visual_tokens"] == 12 * each
    # each new column is that of the thumbnail's last place
    thumbnail = (short["input_ids"] == IMAGE).long()
    last = [int(row.nonzero()[-1]) for row in thumbnail]
    for row, n in ((0, 7), (1, 5)):
        columns = attached.columns[row]
        assert columns[columns >= 0].bincount()[last[row]] == 1 + (n - 1) * each
    assert (
        torch.equal(attached.columns >= 0, hand["attention_mask"].bool())
        and attached.columns.max() == short["input_ids"].shape[1] - 1
    )


def test_where_the_new_columns_come_from():
    here = torch.tensor([[False, False, True, True], [True, True, False, False]])
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])
    assert room(here, mask, [2, 3], 2).tolist() == [
        [-1, -1, 0, 1, 2, 3, 3, 3],
        [0, 1, 1, 1, 1, 1, 2, 3],
    ]
    assert room(here.flip(1), mask.flip(1), [3, 2], 2).tolist() == [
        [0, 1, 1, 1, 1, 1, 2, 3],
        [0, 1, 2, 3, 3, 3, -1, -1],
    ]
    # two pictures in one row; thumbnails alone; a place too few
    assert room(torch.ones(1, 4, dtype=torch.bool), torch.ones(1, 4), [1, 2], 2).tolist() == [
        [0, 1, 2, 3, 3, 3]
    ]
    assert room(here, mask, [1, 1], 2) is None
    assert room(here, mask, [2, 3], 4) is None and room(here, mask, [2, 3], 1) is None


def test_a_later_turn_on_the_cache():
    """The cache holds the tiles that were read; the conversation is the caller's."""
    model, full = make("llava-clip"), pyramid_inputs("llava-clip", grids=GRIDS)
    short, hand = prompt("llava-clip", [1, 1], full), by_hand("llava-clip", full)
    more = torch.tensor([[70, 71], [72, 73]])

    def two_turns(inputs):
        first = model.generate(**inputs, **WRITING)
        cache = getattr(first, "past_key_values", None) or first.cache
        ids = torch.cat([first.sequences, more], 1)
        mask = torch.cat(
            [inputs["attention_mask"], torch.ones(2, ids.shape[1] - inputs["input_ids"].shape[1])], 1
        )
        second = model.generate(input_ids=ids, attention_mask=mask.long(), past_key_values=cache, **WRITING)
        assert torch.equal(second.sequences[:, : ids.shape[1]], ids)
        return second.sequences[:, ids.shape[1] :], torch.stack(second.logits)

    with torch.no_grad():
        wanted = two_turns(hand)
        with attach(model, Zooming(False), target="50%", positions="compact", given={"pyramid": GRIDS}):
            found = two_turns(short)
    assert torch.equal(found[0], wanted[0]) and torch.allclose(found[1], wanted[1], atol=1e-6)


def test_everything_stays_in_a_short_prompt():
    model, full = make("llava-clip"), pyramid_inputs("llava-clip", grids=GRIDS)
    short = prompt("llava-clip", [1, 1], full)
    labels = torch.where(short["input_ids"] >= 50, short["input_ids"], -100)
    with torch.no_grad():
        whole = torch.where(full["input_ids"] >= 50, full["input_ids"], -100)
        wanted = model(**full, labels=whole)
        with attach(model, Zooming(), target="100%", given={"pyramid": GRIDS}):
            found = model(**short, labels=labels)
    assert torch.allclose(found.logits, wanted.logits, atol=1e-6)
    assert found.loss.item() == pytest.approx(wanted.loss.item(), abs=1e-9)


def test_what_is_refused():
    model, full = make("llava-clip"), pyramid_inputs("llava-clip", grids=GRIDS)
    short = prompt("llava-clip", [1, 1], full)
    positions = torch.arange(short["input_ids"].shape[1])[None].expand(2, -1)
    for inputs, says in (
        ({**short, "position_ids": positions}, "positions came with a prompt"),
        (prompt("llava-clip", [2, 1], full), "48 places for the 256 tokens"),
        ({**short, "pixel_values": full["pixel_values"][:-1]}, "32 places for the 240 tokens"),
    ):
        before = model(**full).logits
        attached = attach(model, Zooming(), target="50%", given={"pyramid": GRIDS})
        with pytest.raises(SecateurError, match=says):
            model(**inputs)
        assert not attached.attached and torch.equal(model(**full).logits, before)
