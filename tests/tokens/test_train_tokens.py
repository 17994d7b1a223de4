"""Modules of token methods: trained on the one loop, saved, attached; what they may see, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import IMAGE, inputs_for, make
from torch import Tensor, nn

import secateur
from secateur.errors import SecateurError
from secateur.families.vlm import Facts
from secateur.testing import untrained
from secateur.tokens.method import Lesson, Stage, TokenMethod
from secateur.tokens.modules import Trained
from secateur.tokens.state import TokenSets
from secateur.tokens.train import train_tokens
from secateur.training.recipe import Recipe

QUICK = {"target": "25%", "recipe": Recipe(lr=1e-2, batch=2, warmup=0.0)}
SCORER = {"width": 16, "heads": 2}


@pytest.fixture
def llava() -> Any:
    return make("llava-clip", torch.float32)


def batches(count: int = 3) -> list[dict[str, Tensor]]:
    """Prompts of two rows with two and one pictures, the last two words their answers."""
    made = []
    for seed in range(count):
        inputs = inputs_for("llava-clip", torch.float32, rows=(2, 1), seed=seed)
        labels = torch.full_like(inputs["input_ids"], -100)
        labels[:, -2:] = inputs["input_ids"][:, -2:]
        made.append({**inputs, "labels": labels})
    return made


def same(one: Mapping[str, Tensor], two: Mapping[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize(("method", "settings"), [("covipal", SCORER), ("atp-llava", {})])
def test_modules_learn_and_the_model_stays_as_it_was(
    llava: Any, method: str, settings: dict[str, Any]
) -> None:
    llava.train()
    llava.model.vision_tower.requires_grad_(False)
    before = {name: t.clone() for name, t in llava.state_dict().items()}
    flags = [p.requires_grad for p in llava.parameters()]
    trained = train_tokens(llava, method, data=batches(), steps=3, **settings, **QUICK)
    start = untrained(llava, secateur.method.make_method(method, **settings), "25%")
    assert start is not None and start.state.keys() == trained.state.keys()
    assert same(llava.state_dict(), before) and llava.training
    assert [p.requires_grad for p in llava.parameters()] == flags
    assert all(p.grad is None for p in llava.parameters())
    again = train_tokens(llava, method, data=batches(), steps=3, **settings, **QUICK)
    other = train_tokens(llava, method, data=batches(), steps=3, seed=1, **settings, **QUICK)
    assert same(again.state, trained.state) and not same(other.state, trained.state)
    assert [part["steps"] for part in trained.about["lessons"]] == [3] * (2 if method == "covipal" else 1)
    assert (trained.target, trained.hidden, trained.layers, trained.heads) == (0.25, 32, 4, 4)


def test_losses_fall_where_one_batch_is_learnt(llava: Any) -> None:
    recipe = Recipe(lr=1e-2, batch=2, warmup=0.0)
    trained = train_tokens(
        llava, "covipal", data=batches(1), target="25%", steps=12, recipe=recipe, guides=(3,), **SCORER
    )
    for part in trained.about["lessons"]:
        assert part["last"] < part["first"]


def test_a_stopped_training_goes_on_to_the_same_bits(llava: Any, tmp_path: Path) -> None:
    whole = train_tokens(llava, "covipal", data=batches(), steps=4, **SCORER, **QUICK)
    calls = []

    def stops(batch: Any, generator: torch.Generator) -> Any:
        calls.append(1)
        if len(calls) == 7:  # the third step of the second lesson
            raise KeyboardInterrupt
        return batch

    keep = {"directory": tmp_path / "run", "every": 1, "steps": 4, **SCORER, **QUICK}
    with pytest.raises(KeyboardInterrupt):
        train_tokens(llava, "covipal", data=batches(), augment=stops, **keep)
    later = []
    augment = lambda batch, generator: later.append(1) or batch
    resumed = train_tokens(llava, "covipal", data=batches(), augment=augment, **keep)
    assert same(resumed.state, whole.state) and len(later) == 2
    with pytest.raises(SecateurError, match="begun with another width"):
        train_tokens(llava, "covipal", data=batches(), **{**keep, "width": 32})


def test_saved_and_attached_they_choose_as_before(llava: Any, tmp_path: Path) -> None:
    trained = train_tokens(llava, "covipal", data=batches(), steps=2, layers=(0, 8), **SCORER, **QUICK)
    trained.save(tmp_path / "scorer")
    read = Trained.load(tmp_path / "scorer")
    assert same(read.state, trained.state) and read.about == trained.about
    inputs = inputs_for("llava-clip", torch.float32)
    kept = []
    for weights in (trained, tmp_path / "scorer", str(tmp_path / "scorer")):
        with torch.no_grad(), secateur.attach(llava, "covipal", weights=weights, target="25%") as attached:
            llava(**inputs)
            assert attached.method.width == 16 and attached.method.layers == (0, 8)
        kept.append({stage: [row.tolist() for row in rows] for stage, rows in attached.kept.items()})
    assert kept[0] == kept[1] == kept[2]
    assert [len(row) for row in attached.kept["input"]] == [16, 8, 0]
    assert [len(row) for row in attached.kept[-1]] == [8, 4, 0]
    with pytest.raises(SecateurError, match="isn't empty|not empty"):
        trained.save(tmp_path / "scorer")


def test_a_model_that_is_not_frozen_learns_too(llava: Any, tmp_path: Path) -> None:
    before = {name: t.clone() for name, t in llava.state_dict().items()}
    keep = {"directory": tmp_path / "run", "steps": 2, "frozen": False, **QUICK}
    trained = train_tokens(llava, "atp-llava", data=batches(), **keep)
    changed = [name for name, t in llava.state_dict().items() if not torch.equal(t, before[name])]
    assert any("language_model" in name for name in changed) and any("vision_tower" in n for n in changed)
    assert not trained.about["frozen"] and not llava.training


@dataclass
class Spy(TokenMethod):
    """Notes what a stage may read while its module is trained."""

    def modules(self, facts: Facts) -> nn.Module:
        return nn.Linear(1, 1)

    def lessons(self, facts: Facts) -> list[Lesson]:
        stage = Stage("layer:2", self.look, ("layer:1", "layer:0:entry"))
        return [Lesson("look", [stage], lambda noted, own: noted["x"] + 0 * own)]

    def look(self, sets: TokenSets) -> Tensor:
        ids, there = sets.text("ids")
        Spy.ids = [row[real].tolist() for row, real in zip(ids, there)]
        Spy.text, Spy.last = sets.attention("layer:1", rows="text"), sets.attention("layer:1", rows="last")
        assert sets.modules is not None
        sets.noted["x"] = sets.modules(torch.ones(1)).sum()
        return sets.valid


def test_the_modules_never_see_the_answers(llava: Any) -> None:
    """Words, text rows and the last row are those of the prompt alone: as where the answers aren't there at all."""
    (batch,) = batches(1)
    train_tokens(llava, Spy(), data=[batch], target="25%", steps=1, recipe=Recipe(lr=1e-9, batch=2))
    ids, text, last = Spy.ids, Spy.text, Spy.last
    short = {k: v[:, :-2] if v.dim() == 2 else v for k, v in batch.items() if k != "labels"}

    def read(sets: TokenSets) -> Tensor:
        Spy().look(sets_with(sets))
        return sets.valid

    def sets_with(sets: TokenSets) -> TokenSets:
        sets.modules = nn.Linear(1, 1)
        return sets

    with (
        torch.no_grad(),
        secateur.attach(llava, read, at="layer:2", records=("layer:1", "layer:0:entry"), target="50%"),
    ):
        llava(**short)
    assert ids == Spy.ids and IMAGE not in ids[0]
    assert torch.allclose(text, Spy.text, atol=1e-6) and torch.allclose(last, Spy.last, atol=1e-6)


def test_untrained_modules_are_refused_with_the_command_that_trains(llava: Any) -> None:
    for method in ("covipal", "atp-llava"):
        with pytest.raises(SecateurError, match=f"at random.*secateur train tokens MODEL --method {method}"):
            secateur.attach(llava, method, target="25%")
    llava.generate  # noqa: B018  nothing lies on the model
    assert "forward" not in llava.__dict__


def test_weights_that_do_not_fit_are_named_and_the_model_left_alone(llava: Any, tmp_path: Path) -> None:
    trained = untrained(llava, secateur.method.make_method("covipal", **SCORER), "25%")
    assert trained is not None
    inputs = inputs_for("llava-clip", torch.float32)
    before = llava(**inputs).logits
    wide = untrained(make("qwen2.5-vl", torch.float32), "covipal", "25%")
    assert wide is not None
    wide.hidden = 48

    def put(match: str, method: Any = "covipal", weights: Any = trained, **more: Any) -> None:
        with pytest.raises(SecateurError, match=match):
            secateur.attach(llava, method, weights=weights, **{"target": "25%", **more})
        assert torch.equal(llava(**inputs).logits, before)

    put("for a model with states of width 48, and this one has 32", weights=wide)
    put(r"down.weight is \[16, 32\], and with these settings it is \[64, 32\]", width=64)
    put("modules.1.*missing|1.norm.weight is missing", layers=(0, 16))
    put("modules of covipal, not of atp-llava", "atp-llava")
    put("no modules", secateur.method.make_method("fastv"))
    put("modules of covipal, not of fastv", "fastv")
    put("there is no modules.json", weights=tmp_path / "nowhere")
    broken = Trained(**{**vars(trained), "state": {k: v * torch.nan for k, v in trained.state.items()}})
    put("isn't made of finite numbers", weights=broken)
    thresholds = untrained(llava, "atp-llava", "25%")
    put("trained for 0.25, not 0.5", "atp-llava", thresholds, target="50%")

    trained.save(tmp_path / "scorer")
    file = tmp_path / "scorer" / "modules.json"
    own = json.loads(file.read_text())
    for change, match in (
        ({"hidden": "32"}, "hidden is 32"),
        ({"format": "old"}, "its format isn't"),
        ({"surprise": 1}, "surprise"),
    ):
        file.write_text(json.dumps({**own, **change}))
        put(match, weights=tmp_path / "scorer")
    file.write_text(json.dumps(own))
    weights = tmp_path / "scorer" / "modules.safetensors"
    save_file({k: v for k, v in load_file(weights).items() if "qkv" not in k}, weights)
    put("qkv.weight is missing", weights=tmp_path / "scorer")
    weights.write_bytes(b"no tensors")
    put("can't be read", weights=tmp_path / "scorer")


def test_what_cannot_be_trained_is_named(llava: Any) -> None:
    def bad(match: str, method: Any = "covipal", **more: Any) -> None:
        with pytest.raises(SecateurError, match=match):
            train_tokens(llava, method, **{"data": batches(1), "steps": 1, **QUICK, **more})
        assert "forward" not in llava.__dict__

    (batch,) = batches(1)
    words = {"input_ids": torch.full((2, 6), 50), "labels": torch.full((2, 6), 50)}
    bad("no modules to train", "fastv")
    bad("removes visual tokens|prunes", "wanda")
    bad("no token leaves", target="100%")
    bad("no labels", data=[{k: v for k, v in batch.items() if k != "labels"}])
    bad("cover all of its prompt", data=[{**batch, "labels": batch["input_ids"]}])
    bad("no picture", data=[words])
    bad("no samples", data=[])
    bad("nearest|no hyperparameter", shrubbery=1)
    bad("can't guide", guides=(7,))
