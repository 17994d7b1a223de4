"""`method="auto"`: what it chooses, what it says of it, and that trials are judged on data that nothing was calibrated on."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import secateur
from secateur.cli import main as cli
from secateur.errors import SecateurError
from secateur.pruning import auto
from secateur.pruning.auto import Candidate
from secateur.pruning.prune import prune_with

IDS = torch.randint(64, (8, 16), generator=torch.Generator().manual_seed(1))
PICTURES = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(2))
TWO = (Candidate("flap", "one"), Candidate("group-magnitude", "other"))


def loss_on(model: nn.Module, ids: Tensor) -> float:
    with torch.no_grad():
        logits = model(ids).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).item()


def same(a: nn.Module, b: nn.Module) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)


def conv_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 4)
    )


def test_without_a_method_the_first_candidate_cuts_as_it_does_by_name(tiny_llama: Any) -> None:
    pruned = secateur.prune(tiny_llama(), target="macs<=90%", data=IDS)
    first = auto.UNITS["llm"][0]
    named = prune_with(tiny_llama(), method=first.method, target="macs<=90%", data=IDS, **first.settings)
    about = pruned.report["auto"]
    assert same(pruned.model, named.model) and pruned.report["met"]
    assert [line["method"] for line in about["tried"]] == [first.method] == [pruned.report["method"]]
    assert about["why"].startswith(f"{first.said} was chosen: ") and pruned.report["notes"][0].startswith(
        "auto: "
    )
    json.dumps(pruned.report)


@pytest.mark.parametrize(
    ("target", "hardware", "units"),
    [("50%", None, True), ("50%", "sparse", False), ("2:4", None, False), ("macs<=60%", "storage", True), ("params<=80%", "storage", False)],
)  # fmt: skip
def test_units_leave_where_zeros_bring_nothing(
    target: str, hardware: str | None, units: bool, tiny_llama: Any
) -> None:
    found = auto.candidates(tiny_llama(), auto.parse_target(target), hardware or "cpu", True, {})
    # of this model's parts, half of the neurons are too few for any of these targets
    deep = sorted(auto.UNITS["llm"], key=lambda candidate: candidate.method != "nirvana")
    assert list(found) == (deep if units else list(auto.WEIGHTS))
    kept = auto.candidates(tiny_llama(), auto.parse_target("50%"), "sparse", True, {"repair": "none"})
    assert all("repair" not in candidate.settings for candidate in kept)


def test_where_half_of_the_neurons_would_not_do_attention_gives_its_part(tiny_llama: Any) -> None:
    report = secateur.prune(tiny_llama(), target="macs<=55%", data=IDS).report
    assert report["auto"]["tried"][0]["said"] == "nirvana repair=obs" and report["met"]
    assert any(group["kind"] != "neurons" and group["kept"] < group["size"] for group in report["groups"])


def test_where_neurons_alone_may_leave_they_leave_as_measured(tiny_llama: Any) -> None:
    goal = auto.parse_target("macs<=70%")
    firsts = [
        auto.candidates(tiny_llama(), goal, "cpu", True, {"kinds": kinds})[0].method
        for kinds in (("neurons",), ("neurons", "kv_groups"), None)
    ]
    assert firsts == ["2ssp", "nirvana", "nirvana"]


def test_what_does_not_fit_is_passed_over_with_its_reason(
    tiny_llama: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    both = tuple(candidate for candidate in auto.UNITS["llm"] if candidate.method == "2ssp")
    monkeypatch.setitem(auto.UNITS, "llm", both)
    report = secateur.prune(tiny_llama(), target="macs<=45%", data=IDS).report
    assert [line["method"] for line in report["auto"]["tried"]] == ["2ssp", "2ssp"] and report["met"]
    assert "2ssp doesn't fit: " in report["auto"]["why"] and "can't be met" in report["auto"]["why"]
    assert any("attentions leave, those that perplexity misses least" in note for note in report["notes"])


@pytest.mark.parametrize(
    ("target", "enough"),
    [("macs<=95%", True), ("macs<=30%", False), ("params<=30%", False), ("size<=99%", True), ("30%", False), ("90%", True), ("latency<=1us", True)],
)  # fmt: skip
def test_it_is_told_whether_half_of_the_neurons_would_do(target: str, enough: bool, tiny_llama: Any) -> None:
    assert auto.half_of_the_neurons(tiny_llama(), auto.parse_target(target)) is enough


def test_half_of_the_neurons_is_counted_by_hand() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))  # 4 x 8 + 8 x 2 = 48, half: 24
    inputs = torch.randn(1, 4)
    assert auto.half_of_the_neurons(model, auto.parse_target("macs<=24"), inputs)
    assert not auto.half_of_the_neurons(model, auto.parse_target("macs<=23"), inputs)
    assert auto.half_of_the_neurons(model, auto.parse_target("params<=30"), inputs)  # 4 + 2 biases
    assert not auto.half_of_the_neurons(model, auto.parse_target("params<=29"), inputs)
    assert auto.half_of_the_neurons(model, auto.parse_target("size<=120B"), inputs)
    assert not auto.half_of_the_neurons(model, auto.parse_target("size<=119B"), inputs)


def test_without_data_nothing_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    pruned = secateur.prune(conv_net(), PICTURES[:1], target="50%")
    assert pruned.report["method"] == "group-magnitude"
    with pytest.raises(SecateurError, match="there are no data to judge on"):
        secateur.prune(conv_net(), PICTURES[:1], target="50%", effort=2)


def test_the_best_on_held_out_data_wins(tiny_llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(auto.UNITS, "llm", TWO)
    pruned = secateur.prune(tiny_llama(), target="60%", data=IDS, effort=2, kinds=("neurons",))
    tried = pruned.report["auto"]["tried"]
    losses = {}
    for candidate in TWO:  # of 8 rows the last two only judge
        model = prune_with(
            tiny_llama(), method=candidate.method, target="60%", data=IDS[:6], kinds=("neurons",)
        ).model
        losses[candidate.method] = loss_on(model, IDS[6:])
    assert {line["method"]: line["loss"] for line in tried} == pytest.approx(losses)
    assert pruned.report["method"] == min(losses, key=lambda name: losses[name])


def test_the_third_effort_also_divides_the_budget_in_other_ways(
    tiny_llama: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(auto.UNITS, "llm", TWO)
    tried = secateur.prune(tiny_llama(), target="60%", data=IDS, effort=3, allocation=None).report["auto"][
        "tried"
    ]
    assert [line["settings"].get("allocation") for line in tried] == [
        None,
        None,
        "global",
        "uniform",
        "per-kind",
    ]
    assert len({line["loss"] for line in tried}) > 2  # they aren't all one plan


def test_other_networks_are_judged_by_labels_or_by_their_outputs() -> None:
    net = conv_net()
    labels = torch.arange(8) % 4
    batches = [(PICTURES[:4], labels[:4]), (PICTURES[4:6], labels[4:6])]
    with torch.no_grad():
        wanted = F.cross_entropy(net(PICTURES[:6]), labels[:6]).item()
        changed = conv_net()
        changed[0].weight.mul_(0.5)
        away = ((changed(PICTURES) - net(PICTURES)).square().sum() / net(PICTURES).square().sum()).item()
    assert auto.judge_of(net, batches)(net) == pytest.approx(wanted)
    judge = auto.judge_of(net, [PICTURES[:4], PICTURES[4:]])
    assert (judge(net), judge(changed)) == (0, pytest.approx(away))


def test_a_candidate_that_does_not_fit_is_told(tiny_llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    bad = Candidate("flap", "one", {"kinds": ("channels",)})
    monkeypatch.setitem(auto.UNITS, "llm", (bad, TWO[1]))
    report = secateur.prune(tiny_llama(), target="80%", data=IDS).report
    assert report["method"] == "group-magnitude" and "flap doesn't fit: " in report["auto"]["why"]
    monkeypatch.setitem(auto.UNITS, "llm", (bad,))
    model = tiny_llama()
    with pytest.raises(SecateurError, match="no candidate fits \\(flap: .*nothing can be cut"):
        secateur.prune(model, target="80%", data=IDS, inplace=True)
    assert same(model, tiny_llama())


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"alpha": 1.0}, "alpha belongs to a method"),
        ({"effort": 4}, "effort: there is no effort 4"),
        ({"hardware": "cpuu"}, "there is no hardware 'cpuu'"),
        ({"effort": 2, "inplace": True}, "trials run on copies"),
        ({"method": "wanda", "effort": 2}, "they choose a method, and it is named"),
        ({"effort": 2, "data": IDS[:1]}, "one sample can't calibrate and judge"),
    ],
)
def test_what_makes_no_sense_is_refused(settings: dict, said: str, tiny_llama: Any) -> None:
    with pytest.raises(SecateurError, match=said):
        secateur.prune(tiny_llama(), **{"target": "80%", "data": IDS, **settings})


def test_the_command_line_needs_no_method(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["prune", str(tiny_folder), "--target", "80%", "--samples", "4", "--seqlen", "16", "--json"]
    assert cli.main([*asked, "--steps", "1", "--out", str(tmp_path / "out")]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["auto"]["effort"] == 1 and found["met"]
    assert (found["recovery"]["recover"], found["recovery"]["distill"], found["recovery"]["steps"]) == (
        "full",
        True,
        1,
    )
    for words, said in [
        (["--alpha", "1"], "Unknown option"),
        (["--method", "ria", "--effort", "2"], "they choose a method"),
    ]:
        assert cli.main([*asked, *words]) == 2
        assert said in capsys.readouterr().err
