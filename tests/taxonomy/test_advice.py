"""Advice in the order of what was measured: places and texts against numbers worked out by hand."""

import math

import pytest

from secateur.errors import SecateurError
from secateur.taxonomy import recommend
from secateur.taxonomy.advice import combine
from secateur.taxonomy.axes import RECORDS
from secateur.taxonomy.catalogue import catalogue
from secateur.taxonomy.catalogue import info as info_of
from secateur.taxonomy.measured import fitting, shipped, standings

OWN = [info_of(entry) for entry in catalogue()["methods"].values()]


def line(method, target, rank, quality=0.5, error=0.01, chance=(0.25, 0.01), why=None):
    return {"method": method, "target": target, "rank": rank, "quality": quality, "error": error, "cost": 0.6, "over": False, "why": why, "chance": chance}  # fmt: skip


def comparison(*lines, models=(), cost="macs", steps=0, **more):
    about = {
        "task": "work",
        "metric": "accuracy",
        "sign": 1,
        "percent": True,
        "dense": 0.9,
        "command": "secateur compare work",
    }
    return {**about, "models": list(models), "cost": cost, "steps": steps, "lines": list(lines), **more}


MINE = comparison(
    line("tyr", "80%", 1, 0.8), line("flap", "80%", 2, 0.7), line("nirvana", "80%", 3), line("taylor", "80%", 4),
    line("flap", "40%", 1, 0.6), line("nirvana", "40%", 2), line("tyr", "40%", 3, chance=None), line("shortgpt", "40%", None, why="refused: no blocks"),
)  # fmt: skip


def names(**answers):
    return [info.name for info, _ in recommend(OWN, model="llm", **answers)]


def test_mean_ranks_order_it_and_what_has_none_comes_after():
    found = recommend(OWN, model="llm", measured=[MINE])
    order = [info.name for info, _ in found]
    # mean ranks: flap 1.5, tyr 2, nirvana 2.5, taylor 4 (of 4)
    assert order[:4] == ["flap", "tyr", "nirvana", "taylor"] and "shortgpt" in order[4:]
    why = {info.name: text for info, text in found}
    assert why["flap"].startswith(
        "mean rank 1.5 of 4 on work at equal multiply-adds: accuracy 70.0 ± 2.0 % at 80% (60.0% left, +25.0 against chance),"
        " 60.0 ± 2.0 % at 40% (60.0% left, +25.0 against chance); dense 90.0 %; "
    )
    assert "50.0 ± 2.0 % at 40% (60.0% left);" in why["tyr"]
    assert why["shortgpt"].startswith("no figures: on work it was refused: no blocks;")
    assert why["obspa"].startswith("not measured;")
    assert "it needs no training" in why["flap"]


def test_seeds_and_how_much_is_judged_stand_behind_the_task():
    known = standings([{**MINE, "seeds": 3, "test": 64}, {**MINE, "seeds": 1, "test": None}])["flap"].text
    assert "on work (3 seeds, judged on 64) at" in known and "on work (1 seed) at" in known


def test_a_method_of_other_models_is_there_where_it_has_figures_and_says_so():
    drawing = comparison(
        line("flap", "60%", 1), line("obspa", "60%", None, why="refused: no"), models=["diffusion"]
    )
    found = {info.name: why for info, why in recommend(OWN, model="diffusion", measured=[drawing])}
    assert next(iter(found)) == "flap" and "it was made for other models (llm)" in found["flap"]
    assert "obspa" not in found and "other models" not in found["ecodiff"]
    assert "flap" not in [info.name for info, _ in recommend(OWN, model="diffusion")]


def test_at_a_high_ratio_only_hard_targets_count():
    assert names(measured=[MINE], high_ratio=True)[:3] == ["flap", "nirvana", "tyr"]
    easy = comparison(*(one for one in MINE["lines"] if one["target"] == "80%"))
    assert names(measured=[easy], high_ratio=True)[:4] == ["tyr", "flap", "nirvana", "taylor"]


def test_without_figures_nothing_is_said_of_them():
    assert names() != [] and not any("measured" in why for _, why in recommend(OWN, model="llm"))
    assert set(names()) == set(names(measured=[MINE])) == set(names(measured=[]))


def test_chance_in_a_comparison_is_no_advice():
    with_chance = comparison(line("random-structured", "80%", 1), line("flap", "80%", 2))
    assert names(measured=[with_chance])[0] == "flap"


def test_several_comparisons_are_averaged_by_the_share_of_the_rank():
    other = comparison(line("nirvana", "50%", 1), line("tyr", "50%", 2), task="other")
    places = standings([MINE, other])
    # mean rank over the number of methods: (2/4 + 2/2) / 2 and (2.5/4 + 1/2) / 2
    assert places["tyr"].place == pytest.approx(0.75) and places["nirvana"].place == pytest.approx(0.5625)
    assert places["flap"].place == pytest.approx(0.375) and math.isnan(places["shortgpt"].place)
    assert places["tyr"].text.count("mean rank") == 2


def test_figures_without_percent_or_error():
    only = comparison(line("flap", "80%", 1, 12.346, None, (-3.2, None)), metric="perplexity", sign=-1, percent=False, dense=9.9, steps=20)  # fmt: skip
    text = standings([only])["flap"].text
    over = comparison({**line("flap", "40%", 1), "over": True})
    assert "at 40% (60.0% left, more than asked, +25.0 against chance)" in standings([over])["flap"].text
    assert text == (
        "mean rank 1.0 of 1 on work at equal multiply-adds, trained on for 20 steps: perplexity 12.35 at 80%"
        " (60.0% left, -3.20 against chance); dense 9.90"
    )


def test_comparisons_that_fit():
    cnn = comparison(models=["cnn"])
    params = comparison(models=["cnn"], cost="params")
    trained = comparison(models=["cnn"], steps=100)
    llm = comparison(models=["llm"])
    every = [cnn, params, trained, llm]
    assert fitting(every, {"cnn"}, True, False) == [cnn]
    assert fitting(every, {"cnn"}, False, False) == [params]
    assert fitting(every, {"cnn"}, True, True) == [trained]
    assert fitting(every, set(), True, False) == [cnn, llm]
    assert fitting(every, {"vit"}, True, False) == []
    own = comparison()
    assert fitting([own], {"vit"}, False, True) == [own]


def test_the_comparisons_that_come_along():
    methods = catalogue()["methods"]
    assert {kind for one in shipped() for kind in one["models"]} >= {"cnn", "llm", "vlm"}
    for one in shipped():
        assert one["command"].startswith("secateur compare ") and one["cost"] in ("params", "macs", "tokens")
        by_target: dict[str, list] = {}
        for row in one["lines"]:
            assert row["method"] in methods and (row["rank"] is None) == (row["why"] is not None)
            if row["rank"]:
                by_target.setdefault(row["target"], []).append(row)
        assert by_target
        for rows in by_target.values():
            assert sorted(row["rank"] for row in rows) == list(range(1, len(rows) + 1))
            qualities = [one["sign"] * row["quality"] for row in sorted(rows, key=lambda row: row["rank"])]
            assert qualities == sorted(qualities, reverse=True)


def test_goals():
    assert names(goal="storage") == names(hardware="storage")
    assert "wanda" in names(goal="storage") and "wanda" not in names()
    training = {record.spec for record, _ in recommend(RECORDS, goal="training", model="cnn")}
    # those that begin before or with the training, not those that cut a trained network
    assert "consensus-subnetwork" in training and not training & {"masksparsity", "pagcp", "lrp-pruning"}
    with pytest.raises(SecateurError, match="goal 'sped'"):
        recommend(RECORDS, goal="sped")


def test_a_model_that_is_not_trained_is_trained_first():
    found = {
        r.spec: why for r, why in recommend(RECORDS, model="cnn", train=True, data="train", trained=False)
    }
    assert "train the whole model first" in found["pagcp"]
    assert "train the whole model first" not in found["masksparsity"]
    trained = {r.spec: why for r, why in recommend(RECORDS, model="cnn", train=True, data="train")}
    assert found.keys() == trained.keys() and "first" not in trained["pagcp"]


def test_what_the_survey_adds():
    found = {info.name: why for info, why in recommend(OWN, hardware="gpu-2:4", model="llm")}
    assert "--target 2:4" in found["wanda"] and "--target 2:4" not in found["flap"]
    assert "LoRA" in {info.spec: why for info, why in recommend(RECORDS, model="llm")}["nirvana"]
    tuned = {info.name: why for info, why in recommend(OWN, model="llm", train=True, data="train")}
    assert "fine-tune" in tuned["flap"]


def test_what_comes_later_comes_in_order():
    assert combine() == ["quantise last, after everything that prunes or trains"]
    every = combine(train=True, heterogeneous=True, hardware="gpu-2:4", criteria="MAG")
    assert [text.split()[0] for text in every] == ["distil", "search", "remove", "quantise"]
    assert combine(model="vlm") == []
    with pytest.raises(SecateurError, match="hardware"):
        combine(hardware="abacus")
