"""Comparisons that really run, on digits: equal budgets, runs that fail, that go on, and that are killed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import secateur
from secateur.cli.main import main
from secateur.comparison import read_rows
from secateur.comparison.networks import TaskWork
from secateur.comparison.run import check_reached
from secateur.errors import SecateurError

QUICK = {"test": 60, "samples": 32, "latency": False}
WORDS = [
    "compare",
    "digits",
    "--methods",
    "magnitude,wanda,group-magnitude",
    "--targets",
    "70%,50%",
    "--seeds",
    "2",
]
WORDS += ["--test", "60", "--samples", "32", "--no-latency"]
pytest.importorskip("sklearn")


def keys(rows):
    return [(row["method"], row["target"], row["seed"]) for row in rows]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    out = tmp_path_factory.mktemp("compared") / "out"
    methods = ["magnitude", "group-magnitude", "flap"]
    return secateur.compare("digits", methods, ["50%"], seeds=2, out=out, **QUICK)


def test_chance_and_the_dense_network_are_always_there_and_budgets_are_equal(found):
    assert keys(found.rows) == [
        (method, target, seed)
        for method, target in [
            ("dense", "100%"),
            ("random", "50%"),
            ("random-structured", "50%"),
            ("magnitude", "50%"),
            ("group-magnitude", "50%"),
            ("flap", "50%"),
        ]
        for seed in (0, 1)
    ]
    done = [row for row in found.rows if row["state"] == "done" and row["method"] != "dense"]
    assert len(done) == 8 and all(0.45 < row["params"] <= 0.5 for row in done)
    assert {row["macs"] == 1.0 for row in done if row["method"] == "magnitude"} == {True}
    assert all(row["macs"] < 0.7 for row in done if row["method"] == "group-magnitude")


def test_what_does_not_fit_is_a_row_with_the_reason(found):
    refused = [row for row in found.rows if row["state"] == "refused"]
    assert {row["method"] for row in refused} == {"flap"} and "nothing can be cut" in refused[0]["why"]


def test_a_row_equals_the_run_that_it_stands_for(found):
    from secateur.tasks import load_task

    task = load_task("digits", test=60)
    alone = secateur.prune(task.pretrained(), task.inputs, method="magnitude", target="params<=50%")
    row = next(row for row in found.rows if row["method"] == "magnitude")
    assert row["quality"] == task.quality(alone.model)
    assert row["params"] == alone.report["after"]["params_nonzero"] / alone.report["before"]["params"]
    assert sum(kept for _, kept, _ in row["layers"]) == sum(int(m.sum()) for m in alone.plan.masks.values())


def test_the_same_call_runs_nothing_twice_and_more_seeds_only_what_is_missing(found, monkeypatch):
    ran = []
    real = TaskWork.run
    monkeypatch.setattr(TaskWork, "run", lambda self, run: ran.append(run.key) or real(self, run))
    again = secateur.compare(
        "digits", ["magnitude", "group-magnitude", "flap"], ["50%"], seeds=2, out=found.folder, **QUICK
    )
    assert not ran and again.rows == found.rows
    secateur.compare("digits", ["magnitude"], ["50%"], seeds=3, out=found.folder, **QUICK)
    assert sorted(ran) == [(m, "50%", 2) for m in ("magnitude", "random", "random-structured")]


def test_an_error_nobody_foresaw_is_a_row_and_the_others_go_on(tmp_path, monkeypatch):
    real = TaskWork.run

    def run(self, run):
        if run.method == "magnitude":
            raise ZeroDivisionError("by nothing")
        return real(self, run)

    monkeypatch.setattr(TaskWork, "run", run)
    rows = secateur.compare(
        "digits", ["magnitude", "wanda"], ["50%"], seeds=1, out=tmp_path / "out", **QUICK
    ).rows
    states = {row["method"]: row["state"] for row in rows}
    assert states == {
        "dense": "done",
        "random": "done",
        "random-structured": "done",
        "magnitude": "failed",
        "wanda": "done",
    }
    assert "ZeroDivisionError: by nothing" in rows[3]["why"]


def test_equal_multiply_adds_leave_out_what_only_makes_zeros(tmp_path):
    rows = secateur.compare(
        "digits", ["wanda", "group-magnitude"], ["60%"], seeds=1, cost="macs", out=tmp_path / "out", **QUICK
    ).rows
    by_name = {row["method"]: row for row in rows}
    assert "random" not in by_name and by_name["random-structured"]["macs"] <= 0.6
    assert by_name["group-magnitude"]["macs"] <= 0.6 and "saves no multiply-adds" in by_name["wanda"]["why"]


def test_methods_that_train_and_those_that_do_not_are_trained_as_long(tmp_path):
    methods = ["lottery-ticket", "magnitude"]
    rows = secateur.compare(
        "digits", methods, ["50%"], seeds=1, steps=3, train=96, out=tmp_path / "out", **QUICK
    ).rows
    by_name = {row["method"]: row for row in rows}
    assert by_name["lottery-ticket"]["state"] == by_name["magnitude"]["state"] == "done"
    assert by_name["magnitude"]["params"] <= 0.5  # the zeros are held
    without = secateur.compare("digits", methods, ["50%"], seeds=1, out=tmp_path / "none", **QUICK).rows
    assert "--steps" in {row["method"]: row for row in without}["lottery-ticket"]["why"]


@pytest.mark.needs_data
def test_a_network_that_draws_is_calibrated_on_what_it_meets(tmp_path):
    """Its own inputs for what looks at layers, training pictures for the loss, and no map of what isn't a picture alone."""
    methods = ["taylor", "obspa", "lrp-pruning"]
    settings = {"cost": "macs", "samples": 8, "test": 10, "latency": False}
    rows = secateur.compare("mnist-dit", methods, ["80%"], 1, out=tmp_path / "out", **settings).rows
    by_name = {row["method"]: row for row in rows}
    assert [by_name[name]["state"] for name in ("dense", "taylor", "obspa")] == ["done"] * 3
    assert by_name["obspa"]["macs"] <= 0.8 and by_name["obspa"].get("map") is None
    assert by_name["lrp-pruning"]["state"] == "refused" and "no labels" in by_name["lrp-pruning"]["why"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["compare", "digts"], "did you mean digits"),
        (["compare", "digits", "--methods", "wnda"], "wanda"),
        (["compare", "digits", "--methods", "wanda,wanda"], "twice"),
        (["compare", "digits", "--targets", "2:4"], "isn't a share"),
        (["compare", "digits", "--seeds", "0"], "0 seeds"),
        (["compare", "digits", "--jobs", "0"], "0 jobs"),
        (["compare", "digits", "--cost", "tokens"], "tokens"),
        (["compare", "digits", "--samples", "-3"], "samples: -3 is out of range"),
        (["compare", "digits", "--threads", "0"], "threads: 0 is out of range"),
        (["compare", "digits", "--steps", "-1"], "steps: -1 is out of range"),
        (["compare", "digits", "--minutes", "0"], "minutes: 0.0 is out of range"),
        (["compare", "scenes", "--steps", "10"], "nothing is trained on scenes"),
        (["compare", "smollm2", "--train", "10"], "nothing is trained on smollm2"),
        (["compare", "scenes:llama", "--targets", "50%"], "one of scenes-llava-0"),
        (["compare", "digits", "--address", "1.2.3.4"], "--engine ray"),
    ],
)
def test_mistakes_are_one_line(words, said, capsys, tmp_path):
    assert main([*words, "--out", str(tmp_path / "out")]) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert said in error and "Traceback" not in error


def test_two_processes_give_the_same_rows_as_one(tmp_path):
    words = [*WORDS, "--jobs", "2", "--out", str(tmp_path / "two"), "--json"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run(
        [sys.executable, "-m", "secateur", *words], check=True, env=environment, stdout=subprocess.DEVNULL
    )
    assert main([*WORDS, "--out", str(tmp_path / "one"), "--json"]) == 0
    one, two = (sorted(read_rows(tmp_path / name), key=lambda row: keys([row])) for name in ("one", "two"))
    assert keys(one) == keys(two) and len(one) == 2 + 2 * 2 * 5
    for a, b in zip(one, two):
        assert {n: a.get(n) for n in ("state", "quality", "params", "macs", "layers")} == {
            n: b.get(n) for n in ("state", "quality", "params", "macs", "layers")
        }


def test_a_comparison_that_is_killed_goes_on_without_a_row_lost_doubled_or_half_written(tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, "-m", "secateur", *WORDS, "--out", str(out), "--json"]
    file = out / "rows.jsonl"
    for wanted in (2, 9):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        limit = time.monotonic() + 120
        while time.monotonic() < limit and (not file.exists() or file.read_bytes().count(b"\n") < wanted):
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait()
    before = read_rows(out)
    assert 9 <= len(before) < 22
    with open(file, "ab") as torn:
        torn.write(b'{"method": "wan')  # as if the write itself had been cut off
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    rows = read_rows(out)
    assert rows[: len(before)] == before and len(rows) == len(set(keys(rows))) == 22
    assert all(json.loads(line) for line in file.read_text().splitlines())


def test_a_call_in_a_bare_script_says_what_to_do(tmp_path):
    script = tmp_path / "script.py"
    out = str(tmp_path / "out")
    script.write_text(
        f"import secateur\nsecateur.compare('digits', ['magnitude'], ['50%'], seeds=1, jobs=2, out={out!r})\n"
    )
    ended = subprocess.run([sys.executable, script], check=False, capture_output=True, text=True)
    assert ended.returncode and "if __name__ == '__main__'" in ended.stderr
    assert not (Path(out) / "rows.jsonl").exists()


def test_ray_gives_the_same_rows(tmp_path, found):
    pytest.importorskip("ray")
    methods = ["magnitude", "group-magnitude", "flap"]
    rows = secateur.compare(
        "digits", methods, ["50%"], seeds=2, jobs=2, engine="ray", out=tmp_path / "out", **QUICK
    ).rows
    first = {keys([row])[0]: row.get("quality") for row in found.rows if row["seed"] < 2}
    assert {keys([row])[0]: row.get("quality") for row in rows} == first


def test_without_ray_the_error_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(SecateurError, match=r"pip install 'secateur\[ray\]'"):
        secateur.compare(
            "digits", ["magnitude"], ["50%"], seeds=1, engine="ray", out=tmp_path / "out", **QUICK
        )


def test_token_methods_get_the_target_at_which_they_do_equal_work(tmp_path):
    methods = ["uniform-grid", "fastv", "vla-pruner", "salient-tokens"]
    rows = secateur.compare("scenes", methods, ["60%", "40%"], seeds=1, test=4, out=tmp_path / "out").rows
    found = {(row["method"], row["target"]): row for row in rows}
    grid, late = found["uniform-grid", "60%"], found["fastv", "60%"]
    assert 0.58 < grid["tokens"] <= 0.6 and 0.58 < late["tokens"] <= 0.6
    # what leaves behind the second of four layers must leave fewer
    assert float(late["target_given"].rstrip("%")) < float(grid["target_given"].rstrip("%"))
    assert len(next(iter(grid["kept"].values()))) == round(0.64 * grid["tokens"] * 100)
    whole = found["dense", "100%"]
    for row in (grid, late):
        assert 0.5 < row["macs"] < 1 == whole["macs"] and row["speed"]["pairs"] >= 9
        low, high = row["quartiles"]
        assert 0 < low <= row["forward_seconds"] <= high and set(row["not_measured"]) == {"seconds"}
    # tokens that leave in the tower's end free more than those that leave behind the second layer
    assert grid["peak_memory_bytes"] < late["peak_memory_bytes"] < whole["peak_memory_bytes"]
    assert "steps of an episode" in found["vla-pruner", "60%"]["why"]
    assert "given a map of every picture" in found["salient-tokens", "60%"]["why"]
    assert "can't do with less than 50.8%" in found["fastv", "40%"]["why"]


def test_an_address_where_nothing_answers_is_refused_at_once():
    with pytest.raises(SecateurError, match="address 127.0.0.1:9: nothing answers there"):
        check_reached("127.0.0.1:9")
    for known in (None, "auto", "local"):
        check_reached(known)
