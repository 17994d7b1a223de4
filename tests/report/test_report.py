"""Reports in the terminal and as HTML, from made-up runs whose figures are known."""

import io
import json
import re
from typing import Any

import pytest
import torch
from rich.console import Console

from secateur.pruning.plan import Plan
from secateur.pruning.report import command_line
from secateur.report import html, summary, terminal
from secateur.report.figures import layer_label, panels
from secateur.utils.spread import Speed


def figures(**more: Any) -> dict[str, Any]:
    return {
        "params": 1000,
        "params_nonzero": 1000,
        "macs": 8000,
        "size_bytes": 4000,
        "peak_memory_bytes": 5000,
    } | more


def structured() -> tuple[dict[str, Any], Plan]:
    """Four layers of eight neurons; layer i keeps 2 + i of them."""
    keep = {f"model.layers.{i}.mlp:neurons": torch.arange(2 + i) for i in range(4)}
    groups = [
        {"name": n, "kind": "neurons", "size": 8, "kept": len(k), "reason": None} for n, k in keep.items()
    ]
    groups.append(
        {"name": "embed:hidden", "kind": "hidden", "size": 16, "kept": 16, "reason": "a <table> fixes it"}
    )
    report = {
        "model": "tiny <b>model</b>",
        "method": "sample",
        "target": "50%",
        "met": True,
        "seed": 5,
        "out": None,
        "seconds": 75.0,
        "before": figures(
            perplexity={"ptb": 10.0}, accuracy={"piqa": {"acc": 0.75}}, latency={"forward_seconds": 0.2}
        ),
        "after": figures(params=600, macs=4000, perplexity={"ptb": 20.0}, accuracy={"piqa": {"acc": 0.5}})
        | {"latency": {"forward_seconds": 0.16}},
        "speed": {"forward_seconds": Speed.of([0.20, 0.21, 0.20, 0.19, 0.20], [0.16] * 5).as_dict()},
        "groups": groups,
        "weights": [],
        "notes": [],
        "hyperparameters": {"gamma": 3.0, "flag": False},
    }
    names = list(keep)
    plan = Plan(
        "sample", "50%", keep=keep, sizes=dict.fromkeys(names, 8), kinds=dict.fromkeys(names, "neurons")
    )
    return report, plan


def masked() -> tuple[dict[str, Any], Plan]:
    masks = {
        f"h.{i}.{part}.weight": torch.arange(16).reshape(4, 4) % 2 == i % 2 for i in range(3) for part in "ab"
    }
    report = {
        "model": "m",
        "method": "wanda",
        "target": "50%",
        "met": True,
        "seed": 0,
        "before": figures(perplexity={"ptb": 10.0}),
        "after": figures(params_nonzero=500, perplexity={"ptb": 5000.0}),
        "weights": [{"name": n, "size": m.numel(), "kept": int(m.sum())} for n, m in masks.items()],
    }
    return report, Plan("wanda", "50%", masks=masks)


def drawn(page: str) -> list[dict[str, Any]]:
    """The plots of a page."""
    found = re.search(r'<script type="application/json" id="figures">(.*?)</script>', page, re.DOTALL)
    assert found
    return json.loads(found[1])


def printed(report: dict[str, Any]) -> str:
    console = Console(width=100, record=True, file=io.StringIO())
    terminal.print_report(report, console)
    return console.export_text()


def test_numbers_are_written_for_people() -> None:
    assert [summary.number(x) for x in (134_515_008, 576, 12_345, 1.7e9, 0.5)] == [
        "134.5 M", "576", "12.35 k", "1.7 G", "0.5",
    ]  # fmt: skip
    assert [summary.in_bytes(x) for x in (512, 2048, 538_090_408)] == ["512 B", "2.048 kB", "538.1 MB"]
    assert [summary.in_seconds(x) for x in (5e-6, 0.0123, 2.5, 75, 7300)] == [
        "5 µs", "12.3 ms", "2.5 s", "1 min 15 s", "2 h 1 min",
    ]  # fmt: skip
    assert summary.figure("perplexity", float("inf")) == "–" and summary.figure("accuracy", 0.5) == "50.0 %"


def test_before_and_after_with_ratios() -> None:
    report, _ = structured()
    rows = {row.label: row.texts[1:] for row in summary.rows(report["before"], report["after"])}
    assert rows["parameters"] == ("1,000", "600", "60.0 %")
    assert rows["multiply-adds"] == ("8,000", "4,000", "50.0 %")
    assert rows["size"] == ("4 kB", "4 kB", "same")
    assert rows["time of one forward"] == ("200 ms", "160 ms", "80 %, not in turn")
    timed = {
        row.label: row.change for row in summary.rows(report["before"], report["after"], report["speed"])
    }
    assert timed["time of one forward"] == "1.25 × as fast (1.25 to 1.25)"
    assert rows["perplexity, ptb"] == ("10", "20", "× 2")
    assert rows["accuracy, piqa"] == ("75.0 %", "50.0 %", "-25.0 points")
    text = printed(report)
    assert re.search(r"neurons +4 +32 +14 +43.8 %", text)
    assert "embed:hidden: a <table> fixes it" in text and "met" in text and "1 min 15 s" in text


def test_the_first_lines_say_what_is_left() -> None:
    """By hand: 600 of 1,000 parameters and 4,000 of 8,000 multiply-adds; 500 of 1,000 that are not zero."""
    report, plan = structured()
    expected = "60.0 % of the parameters, 50.0 % of the multiply-adds"
    report["after"]["accuracy"] = report["before"]["accuracy"]
    assert printed(report).splitlines()[1] == f"left: {expected}"
    assert expected in html.report_html(report, plan)
    report, _ = masked()
    report["after"]["perplexity"] = {}
    assert printed(report).splitlines()[1].startswith("left: 50.0 % of the non-zero parameters, 100.0 % of")
    assert summary.left({"before": {}, "after": {}}) == ""


def test_notes_are_honest() -> None:
    report, _ = masked()
    notes = summary.notes(report)
    assert notes == ["same size and speed without sparse kernels: the zeros are stored in dense tensors"]
    report, _ = structured()
    assert summary.notes(report) == []
    report["speed"] = {"forward_seconds": Speed.of([0.20] * 9, [0.25] * 9).as_dict()}
    assert any("it is slower" in note for note in summary.notes(report))
    report["speed"] = {"forward_seconds": Speed.of([0.20, 0.24] * 5, [0.22] * 10).as_dict()}
    assert any("not measurably faster" in note for note in summary.notes(report))
    report["after"]["latency"] |= {"crowded": True, "others": 1.38, "processors": 2}
    assert any("other programs used 1.4 of 2" in note for note in summary.notes(report))
    report["met"] = False
    assert "the target was not met" in summary.notes(report)


def test_a_collapse_is_red_and_first_and_says_what_to_try() -> None:
    """Accuracy 95 -> 22.5 % with ten classes: 72.5 of 85 points above chance are gone."""
    report, plan = structured()
    report["before"] |= {"accuracy": {"digits": {"acc": 0.95}}, "chance": {"digits": 0.1}, "perplexity": {}}
    report["after"] |= {"accuracy": {"digits": {"acc": 0.225}}, "perplexity": {}}
    first, last = summary.alarms(report)
    assert first.startswith(
        "collapsed: accuracy, digits went from 95.0 % to 22.5 %: 85 % of what stood above"
    )
    assert "a milder target than 50%" in last and "recommend" in last and "--recover" not in last
    drawn_parts = terminal.report_tables(report)
    assert [str(part) for part in drawn_parts[:2]] == [first, last] and drawn_parts[0].style == "bold red"
    body = html.report_html(report, plan).split("<body>")[1]
    after = [t for p in drawn(html.report_html(report, plan)) for t in p["data"] if t.get("name") == "after"]
    assert [trace["marker"]["color"] for trace in after] == [["$bad"]]
    assert body.index(first) < body.index("target met") and 'role="alert"' in body
    report, plan = masked()
    first, last = summary.alarms(report)
    assert "perplexity, ptb went from 10 to 5,000: 500 times" in first and "--recover lora" in last
    report, plan = structured()
    report["after"]["accuracy"]["piqa"]["acc"] = 0.6
    assert summary.alarms(report) == [], "0.75 to 0.6 and twice the perplexity are losses, not collapses"
    assert 'role="alert"' not in html.report_html(report, plan)


def test_what_trains_is_compared_with_the_trained_whole() -> None:
    """Before training the network knows nothing, so that nothing could be lost from there."""
    report = {
        "task": {"name": "digits", "metric": "accuracy"},
        "before": {"accuracy": {"digits": {"acc": 0.1}}, "chance": {"digits": 0.1}},
        "after": {"accuracy": {"digits": {"acc": 0.3}}},
        "phases": [{"density": 1.0, "quality": 0.9}, {"density": 0.02, "quality": 0.3}],
    }
    first, last = summary.alarms(report)
    assert "went from 90.0 % to 30.0 %: 75 % of" in first and "--epochs" in last
    report["phases"][0]["quality"] = 0.35
    assert summary.alarms(report) == []


def test_times_have_the_digits_that_their_spread_supports() -> None:
    report, plan = structured()
    report["before"]["latency"] = {"forward_seconds": 0.447, "quartiles": {"forward_seconds": [0.431, 0.47]}}
    report["after"]["latency"] = {
        "forward_seconds": 0.2657,
        "quartiles": {"forward_seconds": [0.2651, 0.2662]},
    }
    pairs = Speed.of([1.70, 1.59, 1.79, 1.68, 1.61, 1.75, 1.6, 1.77], [1.0] * 8)
    report["speed"] = {"forward_seconds": pairs.as_dict()}
    [row] = [row for row in summary.rows(report["before"], report["after"], report["speed"]) if row.speed]
    assert row.texts[1:] == ("450 ms", "266 ms", "1.7 × as fast (1.6 to 1.8)")
    [bars] = [
        p["data"][0]
        for p in drawn(html.report_html(report, plan))
        if "parameters" in p["data"][0].get("y", "")
    ]
    at = bars["y"].index("time of one forward")
    assert bars["x"][at] == pytest.approx(100 / pairs.ratio)
    assert bars["text"][at] == " 1.7 × as fast"


def test_an_html_report_is_whole_and_safe() -> None:
    report, plan = structured()
    page = html.report_html(report, plan)
    body = page.split('id="figures"')[0]
    assert "<b>model</b>" not in body and "tiny &lt;b&gt;model&lt;/b&gt;" in body
    assert "a &lt;table&gt; fixes it" in body
    assert not re.search(r'(src|href)=["\']?(https?:)?//', page) and "<link" not in page
    assert "--seed 5" in body and "--gamma 3.0 --no-flag" in body
    assert "prefers-color-scheme: dark" in page
    assert len(page) < 3_000_000


def test_the_plots_show_the_figures_of_the_report() -> None:
    report, plan = structured()
    plots = drawn(html.report_html(report, plan))
    bars = next(p["data"][0] for p in plots if p["data"][0].get("x") == ["0", "1", "2", "3"])
    assert bars["y"] == [25.0, 37.5, 50.0, 62.5]
    strip = next(p["data"][0] for p in plots if "rows" in p["data"][0])
    assert strip["y"] == ["0", "1", "2", "3"]
    assert strip["rows"][2] == {"size": 8, "keep": "0-3"}
    speed = next(p["data"][0] for p in plots if "after, measured" in p["data"][0]["y"])
    times = dict(zip(speed["y"], speed["x"], strict=True))
    assert times == pytest.approx(
        {"after, measured": 160, "after, if time<br>followed multiply-adds": 100, "before, measured": 200}
    )


def test_single_weights_are_shown_by_layer_and_matrix() -> None:
    report, plan = masked()
    plots = drawn(html.report_html(report, plan))
    grid = next(p["data"][0] for p in plots if p["data"][0]["type"] == "heatmap" and p["data"][0].get("xgap"))
    assert grid["x"] == ["0", "1", "2"] and grid["y"] == ["b", "a"]
    assert grid["z"] == [[50.0] * 3] * 2
    inputs = [
        p["data"][0] for p in plots if p["data"][0]["type"] == "heatmap" and not p["data"][0].get("xgap")
    ]
    assert len(inputs) == 2
    assert inputs[0]["z"][:2] == [[1.0, 0.0, 1.0, 0.0], [0.0, 1.0, 0.0, 1.0]]


def test_scores_of_kept_and_cut_units() -> None:
    report, plan = structured()
    report["scores"] = {name: [8.0 - unit for unit in range(8)] for name in plan.keep}
    plot = next(p for p in drawn(html.report_html(report, plan)) if p["layout"].get("barmode") == "stack")
    counts = {trace["name"]: sum(trace["y"]) for trace in plot["data"]}
    assert counts == {"kept": 14, "cut": 18}


def test_a_report_with_little_in_it_still_draws() -> None:
    page = html.report_html({"method": "m", "target": "100%", "seed": 0, "before": {}, "after": {}})
    assert drawn(page) == [] and "secateur prune MODEL --method m" in page
    printed({"method": "m", "target": "100%"})


def test_the_command_says_what_was_asked_for() -> None:
    options = {
        "keep": ["lm_head"],
        "share": ["*.mlp=50%"],
        "samples": 8,
        "seqlen": 512,
        "prove": False,
        "kinds": None,
    }
    report = {"method": "own", "source": "mine.py:Own sha256:0123", "target": "50%", "options": options}
    assert command_line(report) == (
        "secateur prune MODEL --method mine.py:Own --target 50% --seed 0"
        " --keep lm_head --share '*.mlp=50%' --samples 8 --no-prove"
    )


def test_alike_groups_are_one_row() -> None:
    rows = [
        {"name": f"h.{i}.mlp", "kind": "neurons", "size": 8, "reason": None, "params": 0.1, "macs": None}
        for i in (0, 1, 2, 5)
    ]
    merged = terminal.merge_alike([*rows, {**rows[0], "name": "h.7.mlp", "size": 9}])
    assert [(row["name"], row["count"]) for row in merged] == [("h.{0-2,5}.mlp", 4), ("h.7.mlp", 1)]
    assert merged[0]["params"] == pytest.approx(0.4) and merged[0]["macs"] is None


def test_labels_of_layers() -> None:
    assert layer_label(["a.layers.0.mlp:neurons", "a.layers.11.mlp:neurons"]) == ["0", "11"]
    assert layer_label(["stage1.conv:channels", "stage2.conv:channels"]) == [
        "stage1.conv",
        "stage2.conv",
    ]
    assert layer_label(["only:channels"]) == ["only"]
    assert panels(["b.0.x:n", "b.1.x:n", "stem:n"]) == [([0, 1], ["0", "1"]), ([2], ["stem"])]


HOSTILE = '</script><script>document.title = "owned"</script><img src=x onerror="document.title=1">'


def test_hostile_names_come_out_as_text() -> None:
    """Names of modules, reasons, notes, settings and the model come from files of others."""
    report, plan = structured()
    report |= {"model": HOSTILE, "method": HOSTILE, "notes": [HOSTILE], "command": HOSTILE}
    report["groups"][0]["name"] = report["groups"][-1]["reason"] = f"a (b) {HOSTILE}"
    report["hyperparameters"][HOSTILE] = HOSTILE
    plan.keep = {HOSTILE + name: units for name, units in plan.keep.items()}
    plan.sizes = {HOSTILE + name: size for name, size in plan.sizes.items()}
    plan.kinds = {HOSTILE + name: HOSTILE for name in plan.kinds}
    report["scores"] = {name: list(range(8)) for name in plan.keep}
    page = html.report_html(report, plan)
    clean = html.report_html(*structured())
    assert page.count("<script") == clean.count("<script") and page.count("</script") == clean.count(
        "</script"
    )
    assert "<img" not in page and "owned" in page


def test_a_reason_is_shown_whole() -> None:
    report, plan = structured()
    report["groups"][-1]["reason"] = "rows (of a table) are looked up (embed at model.py:12)"
    page = html.report_html(report, plan)
    assert 'rows (of a table) are looked up<br><small class="soft">embed at model.py:12</small>' in page
    told = io.StringIO()
    terminal.print_report(report, Console(file=told, width=200))
    assert "embed:hidden: rows (of a table) are looked up\n" in told.getvalue()
