"""What a user looks at fits a screen of 80 columns and 24 lines, and begins with what matters."""

import dataclasses
import importlib
import pkgutil
import re

import pytest
import torch
from torch import nn

import secateur
from secateur import Plan
from secateur.doctor import Findings
from secateur.method import Method
from secateur.pruning.report import Report
from secateur.saliency.record import record
from secateur.taxonomy.axes import RECORDS
from secateur.training.task import Task
from secateur.utils.screen import brief, fit

INSIDE = {
    "tokens.call",
    "tokens.decoder",
    "tokens.input",
    "tokens.record",
    "tokens.static",
    "io.exchange.pt2",
}
"""Files with parts of engines that no one is handed."""


def fits(shown: str, begins: str) -> None:
    lines = shown.splitlines()
    assert len(lines) <= 24 and max(map(len, lines)) <= 80, shown
    assert shown.startswith(begins), shown


@pytest.fixture(scope="module")
def deep():
    """Forty blocks with long names."""
    torch.manual_seed(0)
    blocks = {
        f"a_block_with_a_name_that_is_far_too_long_for_any_screen_{i}": nn.Sequential(
            nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8)
        )
        for i in range(40)
    }
    return nn.Sequential(*blocks.values(), nn.Linear(8, 4)), torch.randn(2, 8)


def test_results_of_prune(deep, tmp_path):
    model, x = deep
    pruned = secateur.prune(model, x, method="group-magnitude", target="50%", prove=False)
    fits(repr(pruned), "Pruned Sequential: group-magnitude, target 50%, met\n  params ")
    fits(repr(pruned.plan), "Plan of group-magnitude for 50%, seed 0\n  ")
    fits(repr(pruned.report), "Report: group-magnitude, target 50%, met\n  params ")
    fits(repr(pruned.graph), "Graph of ")
    fits(repr(pruned.graph.groups[0]), "Group('")
    fits(repr(pruned.graph.groups[0].slices[0]), "Slice(name='")
    assert len(repr(pruned.graph).splitlines()) < 20 and "… " in repr(pruned.graph)
    pruned.save(tmp_path / "out")
    assert repr(Plan.load(tmp_path / "out")) == repr(pruned.plan)
    masked = secateur.prune(model, x, method="magnitude", target="50%")
    fits(repr(masked), "Pruned Sequential: magnitude, target 50%, met\n  params_nonzero ")
    assert "weights: 5," in repr(masked.plan) and "stay, in 81 tensors" in repr(masked.plan)


def test_numbers_of_a_report():
    figures = {"params": 100, "macs": None, "perplexity": {"text": 20.0}, "accuracy": {}, "psnr": {}}
    after = figures | {"params": 50, "perplexity": {"text": 31.5}}
    report = Report(method="m", target="50%", met=False, before=figures, after=after, notes=["one note"])
    assert repr(report).splitlines()[:4] == [
        "Report: m, target 50%, NOT met",
        "  params 100 -> 50 (50.0 %)",
        "  perplexity, text: 20.0 -> 31.5",
        "  one note",
    ]


def test_results_of_training():
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    data = (torch.randn(32, 4), torch.randint(2, (32,)))
    pruned = secateur.train_prune(net, method="lottery-ticket", target="50%", data=data, steps=4)
    fits(repr(pruned), "Pruned Sequential: lottery-ticket, target 50%, met")
    fits(repr(Task("pairs", lambda: net, data)), "Task(name='pairs', build=")


def test_results_of_maps():
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5)
    ).eval()
    x = torch.randn(3, 8, 8)
    fits(repr(secateur.saliency(net, x, "gradient")), "Map(values=float32 [8, 8], method='gradient'")
    fits(repr(record(net, x[None], 1, ["0"])), "Record(logits=float32 [1, 5], targets=int64 [1]")


def test_records_and_methods():
    for info in RECORDS:
        fits(repr(info), "MethodInfo(title=")
    for name in secateur.list_methods():
        assert len(repr(secateur.method.method_class(name)())) < 8 * 80


def test_lists_of_advice_and_of_checks():
    fits(repr(secateur.recommend(hardware="gpu-dense")), "Advice: ")
    rows = [{"check": f"check {i}", "model": "tiny", "state": "ok"} for i in range(30)]
    rows[3] |= {"state": "failed", "reason": "it differs " * 20}
    found = Findings(
        ok=False, versions=[{"package": "torch", "installed": "9", "state": "newer"}], checks=rows
    )
    fits(
        repr(found),
        "doctor: NOT ok: 29 ok, 1 failed; keys: ok, versions, checks\n  failed: check 3, tiny: it differs",
    )
    assert repr(found).splitlines()[-1] == "  torch 9: newer"


def test_every_dataclass_with_tensors_shows_itself_briefly():
    """A generated repr prints every number of a tensor."""
    for module in pkgutil.walk_packages(secateur.__path__, "secateur."):
        file = module.name.partition(".")[2]
        if file.startswith("cli") or file.endswith("__main__") or file in INSIDE:
            continue
        for name, cls in vars(importlib.import_module(module.name)).items():
            if (
                isinstance(cls, type)
                and cls.__module__ == module.name
                and dataclasses.is_dataclass(cls)
                and not issubclass(cls, Method)
                and name[0] != "_"
            ):
                holds = " ".join(str(item.type) for item in dataclasses.fields(cls) if item.repr)
                generated = hasattr(cls.__repr__, "__wrapped__")
                assert not generated or not re.search("Tensor|Module", holds), f"{module.name}.{name}"


def test_helpers():
    assert brief(nn.Linear(1, 1)) == "Linear" and brief([nn.Linear(1, 1)] * 9) == "9 of Linear"
    assert brief({"a": torch.zeros(2)}) == "1 of Tensor" and brief(test_helpers) == "test_helpers"
    assert fit(map(str, range(100))).splitlines()[-2:] == ["14", "… 85 lines more"]
