"""`--also` traces further inputs: from a file with the inputs of forward, or of another shape."""

import json

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from secateur.cli import shared
from secateur.cli.main import main

PLUS, MINUS = torch.ones(2, 6), -torch.ones(2, 6)


class Branches(nn.Module):
    """Where the first number is negative, or there are three rows, another head reads the neurons."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.fc1, self.fc2 = nn.Linear(6, 10), nn.Linear(10, 4)
        self.other, self.three = nn.Linear(10, 4), nn.Linear(10, 4)

    def forward(self, x):
        hidden = self.fc1(x).relu()
        if len(x) == 3:
            return self.three(hidden)
        return self.other(hidden) if float(x[0, 0]) < 0 else self.fc2(hidden)


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(shared, "open_model", lambda *_: (Branches(), None))
    for name, x in (("plus", PLUS), ("minus", MINUS)):
        save_file({"x": x}, f"{name}.safetensors")
    (tmp_path / "bad.safetensors").write_text("no")


FLAGS = ["--input-shape", "plus.safetensors"]
BOTH = ["--also", "minus.safetensors", "--also", "3,6"]


def test_both_branches_are_cut_along(files, capsys):
    cut = ["prune", "net", *FLAGS, "--method", "group-magnitude", "--target", "50%", "--json"]
    assert main(cut) == 0
    alone = json.loads(capsys.readouterr().out)
    assert not alone["met"] and alone["unreached"] == ["other.weight", "three.weight"]
    assert main([*cut, *BOTH, "--out", "out"]) == 0
    both = json.loads(capsys.readouterr().out)
    assert both["met"] and "unreached" not in both
    assert main(["plan", "apply", "out", "net", *FLAGS, *BOTH, "--out", "again"]) == 0
    assert main(["inspect", "net", *FLAGS, *BOTH]) == 0
    assert "not reached" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("also", "message"),
    [
        ("minsu.safetensors", "--also minsu.safetensors: no such file; did you mean minus.safetensors?"),
        ("bad.safetensors", "--also bad.safetensors: it can't be read"),
        ("3;6", "--also: '3;6' isn't a shape"),
        ("3,7", "inputs: Branches fails on them"),
    ],
)
def test_what_is_no_input_is_named(files, capsys, also, message):
    assert main(["prune", "net", *FLAGS, "--also", also, "--method", "magnitude", "--target", "50%"]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1
