"""What stands where a count belongs is a count; every config that transformers makes by itself passes."""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import secateur
from secateur.errors import SecateurError
from secateur.io.trusted import check_config
from secateur.pruning.plan import Plan
from secateur.utils.schema import Entry

NO_COUNTS = [True, False, -1, 2.0, 1.5, math.nan, "8", 10**12, 2**63, None, [8]]


def test_a_field_may_begin_with_model() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        settings = type("Settings", (Entry,), {"__annotations__": {"model_args": int}})
    assert settings(model_args=3).model_args == 3


def written(folder: Path) -> dict[str, Any]:
    plan = Plan(
        "m",
        "50%",
        keep={"a:neurons": torch.arange(4)},
        sizes={"a:neurons": 8},
        kinds={"a:neurons": "neurons"},
    )
    plan.masks["w"] = torch.tensor([[True, False, True]])
    plan.inputs = {"x": {"tensor": [1, 8], "dtype": "int64"}}
    plan.save(folder)
    return json.loads((folder / "plan.json").read_text())


PLACES: dict[str, Any] = {
    "size": lambda d, v: d["groups"]["a:neurons"].update(size=v),
    "seed": lambda d, v: d.update(seed=v),
    "shape": lambda d, v: d["masks"]["w"].update(shape=[1, v]),
    "kept": lambda d, v: d["masks"]["w"].update(kept=v),
    "input": lambda d, v: d["inputs"]["x"].update(tensor=[1, v]),
    "version": lambda d, v: d.update(version=v),
}


@pytest.mark.parametrize("value", NO_COUNTS, ids=str)
@pytest.mark.parametrize("place", PLACES)
def test_a_plan_holds_counts(place: str, value: Any, tmp_path: Path) -> None:
    if place == "seed" and type(value) is int and value < 2**63:
        return  # any number of 64 bits is a seed
    document = written(tmp_path)
    Plan.load(tmp_path)
    PLACES[place](document, value)
    (tmp_path / "plan.json").write_text(json.dumps(document))
    with pytest.raises(SecateurError, match=r"plan\.json"):
        Plan.load(tmp_path)


@pytest.mark.parametrize("keep", ["0-99999999999", "8", "-1", "0_1", "1.0", "", "3-1", "٣"])
def test_units_are_below_the_size(keep: str, tmp_path: Path) -> None:
    document = written(tmp_path)
    document["groups"]["a:neurons"]["keep"] = keep
    (tmp_path / "plan.json").write_text(json.dumps(document))
    with pytest.raises(SecateurError, match=r"plan\.json"):
        Plan.load(tmp_path)


@pytest.mark.parametrize("field", ["hidden_size", "num_hidden_layers", "vocab_size", "num_attention_heads"])
@pytest.mark.parametrize("value", [True, -1, 2.0, 1e30, 10**12])
def test_a_config_holds_counts(field: str, value: Any, tiny_folder: Path, tmp_path: Path) -> None:
    document = json.loads((tiny_folder / "config.json").read_text())
    for inside in ({**document, field: value}, {**document, "text_config": {field: value}}):
        with pytest.raises(SecateurError, match=field):
            check_config(inside, "config.json")
    folder = tmp_path / "model"
    folder.mkdir()
    for file in tiny_folder.iterdir():
        (folder / file.name).symlink_to(file)
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(json.dumps({**document, field: value}))
    with pytest.raises(SecateurError, match=field):
        secateur.load(folder)


@pytest.mark.slow
def test_configs_of_transformers_pass() -> None:
    from transformers import CONFIG_MAPPING

    passed = 0
    for name in CONFIG_MAPPING:
        try:
            text = CONFIG_MAPPING[name]().to_json_string(use_diff=False)
        except Exception:  # noqa: BLE001, S112  some can't be made without arguments
            continue
        check_config(json.loads(text), name)
        passed += 1
    assert passed > 300
