import json

import pytest
import torch

from secateur.errors import SecateurError
from secateur.pruning.document import read_document, summarise
from secateur.pruning.plan import Masks, Plan, diff, from_ranges, to_ranges


def example():
    return Plan(
        method="taylor",
        target="50%",
        seed=3,
        hyperparameters={"order": "first"},
        inputs={"input_ids": {"tensor": [1, 16], "dtype": "int64"}},
        keep={"a:neurons": torch.tensor([0, 1, 2, 5]), "b:heads": torch.tensor([1])},
        sizes={"a:neurons": 8, "b:heads": 2},
        kinds={"a:neurons": "neurons", "b:heads": "heads"},
        masks={"w": torch.tensor([[True, False, True], [False, False, True]])},
        values={"w": torch.tensor([[1.0, 0.0, 2.0], [0.0, 0.0, 3.0]], dtype=torch.bfloat16)},
    )


def test_a_saved_plan_loads_equal(tmp_path):
    plan = example()
    plan.save(tmp_path)
    assert Plan.load(tmp_path) == plan
    assert Plan.load(tmp_path / "plan.json") == plan
    assert json.loads((tmp_path / "plan.json").read_text())["groups"]["a:neurons"]["keep"] == "0-2,5"


def test_an_edit_of_the_json_is_what_counts(tmp_path):
    example().save(tmp_path)
    path = tmp_path / "plan.json"
    path.write_text(path.read_text().replace('"0-2,5"', '"0-6"'))
    assert Plan.load(tmp_path).keep["a:neurons"].tolist() == list(range(7))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"0-2,5"', '"0-9"', "of 8"),
        ('"0-2,5"', '""', "keep at least one"),
        ('"0-2,5"', '"x"', "isn't a range"),
        ('"0-2,5"', '"5-2"', "backwards"),
        ('"secateur-plan"', '"other"', "isn't a plan"),
        ('"method"', '"metod"', "method: Field required"),
        ("{", "", "isn't JSON"),
    ],
)
def test_impossible_edits_are_named(tmp_path, old, new, message):
    example().save(tmp_path)
    path = tmp_path / "plan.json"
    path.write_text(path.read_text().replace(old, new, 1))
    with pytest.raises(SecateurError, match=message):
        Plan.load(tmp_path)


def test_a_truncated_tensor_file_is_named(tmp_path):
    example().save(tmp_path)
    path = tmp_path / "plan.safetensors"
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(SecateurError, match="damaged"):
        Plan.load(tmp_path)


def test_missing_plan(tmp_path):
    with pytest.raises(SecateurError, match="no plan"):
        Plan.load(tmp_path)


def test_diff_lists_what_differs():
    other = example()
    other.keep["a:neurons"] = torch.tensor([0, 1, 2, 6])
    other.masks["w"] = torch.ones(2, 3, dtype=torch.bool)
    rows = {row["name"]: row for row in diff(example(), other)}
    assert rows.keys() == {"a:neurons", "w"}
    assert rows["a:neurons"]["agree"] == pytest.approx(3 / 5)
    assert rows["w"] == {"name": "w", "first": 3, "second": 6, "agree": 0.5}
    assert diff(example(), example()) == []


def test_ranges_round_trip():
    for units in ([], [0], [3, 4, 5], [0, 2, 4], list(range(100))):
        assert from_ranges(to_ranges(units)) == units


def test_masks_are_held_as_bits():
    mask = torch.rand(64, 1024, generator=torch.Generator().manual_seed(0)) < 0.5
    masks = Masks({"w": mask})
    assert torch.equal(masks["w"], mask)
    assert sum(bits.numel() for bits, _ in masks._bits.values()) == mask.numel() // 8


def test_the_rows_of_a_plans_files_are_those_of_the_plan(tmp_path):
    masks = {"w": torch.tensor([[True, False, True], [False, False, True]])}
    values = {"b": torch.ones(3)}
    plan = Plan("m", "50%", keep={"g": torch.tensor([0, 2])}, sizes={"g": 4}, kinds={"g": "neurons"}, masks=masks, values=values)  # fmt: skip
    plan.save(tmp_path)
    assert summarise(*read_document(tmp_path)) == {"rows": plan.summary(), "values": ["b"]}
    assert plan.summary()[1] == {"name": "w", "kind": "weights", "size": 6, "kept": 3}


def test_the_kinds_of_which_a_list_may_lose_all_are_the_graphs() -> None:
    from secateur.graph import groups
    from secateur.pruning import document

    assert document.WHOLE == groups.WHOLE
