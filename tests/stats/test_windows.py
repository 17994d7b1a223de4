"""How far a masked model is from itself, by torch's own divergence."""

import copy

import pytest
import torch
import torch.nn.functional as F

from secateur.errors import SecateurError
from secateur.graph import trace
from secateur.stats.windows import draw_windows, kl_divergence, masked_divergence


def test_the_divergence_of_a_model_without_some_neurons(tiny_llama):
    model, ids = tiny_llama(initializer_range=0.2), torch.randint(0, 64, (3, 7))
    graph = trace(model, ids[:1])
    kept = torch.arange(10)
    found = masked_divergence(model, graph, {"model.layers.0.mlp:neurons": kept}, ids)
    pruned = copy.deepcopy(model)
    with torch.no_grad():
        pruned.model.layers[0].mlp.down_proj.weight[:, 10:] = 0
        p, q = (m(ids).logits.log_softmax(-1) for m in (model, pruned))
    assert found == pytest.approx(F.kl_div(q, p, reduction="sum", log_target=True).item() / 21, rel=1e-3)
    assert found == pytest.approx(kl_divergence(model, pruned, ids)) and found > 0


def drawn(data, count, length, seed=0):
    return draw_windows(data, count, length, torch.Generator().manual_seed(seed))


def test_windows_of_ids_are_consecutive_pieces_of_different_rows():
    ids = torch.arange(40).reshape(4, 10)
    found = drawn(ids, 3, 5)
    assert found.shape == (3, 5) and len({int(row[0]) // 10 for row in found}) == 3
    assert all(row.tolist() == list(range(int(row[0]), int(row[0]) + 5)) for row in found)
    starts = {int(drawn(ids, 1, 5, seed)[0, 0]) % 10 for seed in range(60)}
    assert starts == {0, 1, 2, 3, 4, 5}  # every window, the last one too
    assert drawn(ids, 9, 12).shape == (4, 10)  # what is short stays short


def test_long_rows_are_parted_only_where_there_are_too_few():
    """2 rows of 11 give 4 windows of 5; the last token of each is in none. Two windows are asked for: rows are enough."""
    ids = torch.arange(22).reshape(2, 11)
    assert sorted(int(row[0]) for row in drawn(ids, 9, 5)) == [0, 5, 11, 16]
    assert drawn(ids, 3, 5).shape == (3, 5) and drawn(ids, 3, 6).shape == (2, 6)
    assert {int(drawn(ids, 2, 5, seed)[0, 0]) % 11 for seed in range(60)} == set(range(7))


def test_inputs_in_dicts_are_cut_together_and_others_stay_whole():
    ids = torch.arange(10)[None]
    text = {"input_ids": ids, "attention_mask": ids + 100, "labels": torch.tensor(3)}
    (found,) = drawn(text, 5, 4)
    start = int(found["input_ids"][0, 0])
    assert found["input_ids"].tolist() == [list(range(start, start + 4))]
    assert (
        torch.equal(found["attention_mask"], found["input_ids"] + 100) and found["labels"] is text["labels"]
    )
    picture = {"input_ids": ids, "pixel_values": torch.zeros(1, 3)}
    assert drawn([picture], 1, 4)[0] is picture
    pair = (torch.zeros(2, 3), torch.zeros(2))
    assert drawn(pair, 1, 4) == [pair] and drawn([{"x": ids}], 1, 4)[0]["x"] is ids
    assert len(drawn([text] * 5, 3, 4)) == 3


def test_pictures_are_drawn_without_repeats_and_nothing_is_refused():
    pictures = torch.arange(6.0).reshape(6, 1)
    found = drawn(pictures, 4, 2).flatten().tolist()
    assert len(set(found)) == 4 and set(found) <= set(range(6))
    for data in (None, [], torch.zeros(0, 3)):
        with pytest.raises(SecateurError, match="nothing to draw from"):
            drawn(data, 1, 2)
