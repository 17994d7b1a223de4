"""A comparison as advice reads it, from rows on disk."""

import json

import pytest

from secateur.comparison.rows import append, begin
from secateur.comparison.setup import Setup
from secateur.comparison.shipped import condensed, main
from secateur.errors import SecateurError


@pytest.fixture
def folder(tmp_path):
    """magnitude 0.5 and 0.7 against chance at 0.1 and 0.2, a method that was refused, and the dense model."""
    out = tmp_path / "out"
    out.mkdir()
    begin(out, Setup("digits", samples=8).as_json())
    for method, values in (("dense", [0.9, 0.9]), ("random", [0.1, 0.2]), ("magnitude", [0.5, 0.7])):
        for seed, value in enumerate(values):
            target = "100%" if method == "dense" else "50%"
            append(out, {"method": method, "target": target, "seed": seed, "state": "done", "quality": value, "metric": "accuracy", "sign": 1, "params": 0.5, "macs": 1.0})  # fmt: skip
    append(
        out, {"method": "flap", "target": "50%", "seed": 0, "state": "refused", "why": "nothing can be cut"}
    )
    return out


def test_what_is_kept(folder):
    found = condensed(folder, "cnn")
    assert found["models"] == ["cnn"] and found["dense"] == 0.9 and found["percent"]
    words = (
        "secateur compare digits --cost params --methods flap,magnitude --targets 50% --seeds 2 --samples 8"
    )
    assert found["command"] == words + " --out DIR" and (found["seeds"], found["test"]) == (2, None)
    best, chance, refused = found["lines"]
    assert best == {
        "method": "magnitude", "target": "50%", "quality": 0.6, "error": 0.1, "cost": 0.5, "rank": 1, "over": False, "why": None,
        "chance": pytest.approx([0.45, 0.0704], abs=1e-4),
    }  # fmt: skip
    assert (chance["method"], chance["rank"], chance["chance"]) == ("random", 2, None)
    assert refused["why"] == "refused: nothing can be cut" and refused["rank"] is None
    assert condensed(folder)["models"] == []


def test_the_file_is_written(folder, tmp_path):
    out = tmp_path / "m.json"
    assert main([f"cnn={folder}", "--out", str(out)]) == 0
    assert json.loads(out.read_text())["comparisons"] == [condensed(folder, "cnn")]


def test_a_comparison_takes_the_place_of_the_old_one_of_its_task_and_the_others_stay(folder, tmp_path):
    """No folder of those that are there already is needed."""
    out = tmp_path / "m.json"
    old = [{"task": task, "cost": cost, "steps": 0, "lines": [], "old": True} for task, cost in [("sst2", "macs"), ("digits", "params"), ("digits", "macs"), ("text", "macs")]]  # fmt: skip
    out.write_text(json.dumps({"version": "0", "comparisons": old}))
    assert main([f"cnn={folder}", "--out", str(out)]) == 0
    read = json.loads(out.read_text())["comparisons"]
    assert read == [old[0], condensed(folder, "cnn"), *old[2:]]
    assert main(["--drop", "digits", "--out", str(out)]) == 0
    assert [one["task"] for one in json.loads(out.read_text())["comparisons"]] == ["sst2", "text"]


def test_what_cannot_be_put_there_is_refused_and_the_file_stays(folder, tmp_path, capsys):
    out = tmp_path / "m.json"
    assert main([f"cnn={folder}", "--out", str(out)]) == 0
    before = out.read_text()
    for words, said in [
        ([f"cnn={folder}", f"mlp={folder}"], "two are of one task"),
        ([str(folder)], "names no kind of model"),
        ([f"cnn={tmp_path / 'none'}"], "no comparison is there"),
        (["--drop", "diggits"], "digits"),
    ]:
        assert main([*words, "--out", str(out)]) == 2
        assert said in capsys.readouterr().err and out.read_text() == before


def test_a_folder_without_a_comparison_is_refused(tmp_path):
    with pytest.raises(SecateurError, match="no comparison is there"):
        condensed(tmp_path)
    out = tmp_path / "new"
    out.mkdir()
    begin(out, Setup("digits").as_json())
    with pytest.raises(SecateurError, match="nothing is compared yet"):
        condensed(out)
