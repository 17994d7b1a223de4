"""Spoiled files on the command line: one line and exit code 2, or a result; never a traceback or a damaged file.

`FUZZ=5000 pytest tests/test_fuzz.py` draws more of them; `FUZZ_SEED` draws others.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import random
import shutil
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import secateur
from secateur.cli import main as cli
from secateur.pruning.plan import Plan

DRAWN = int(os.environ.get("FUZZ", "300"))
SEED = int(os.environ.get("FUZZ_SEED", "0"))
PARTS = max(4, DRAWN // 100)
WRONG: list[Any] = [
    None, True, False, 0, -1, 1.5, -0.5, 10**12, 2**63, 10**400, 1e308, "", "x", "50%", "0-999999999999", "../..", "\x00", "é\n",
    [], [1], [[]], [None], {}, {"x": 1}, {"tensor": [10**9, 10**9], "dtype": "float32"}, [1, -1], ["a"],
]  # fmt: skip


def places(value: Any) -> list[tuple[Any, Any]]:
    """(container, key) of every value inside."""
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else []
    return [(value, key) for key in keys] + [place for key in keys for place in places(value[key])]


def spoil_json(data: bytes, draw: random.Random) -> bytes:
    document = json.loads(data)
    for _ in range(draw.choice((1, 1, 2))):
        container, key = draw.choice(places(document))
        what = draw.randrange(4)
        if what == 0 and isinstance(container, dict):
            del container[key]
        elif what == 1 and isinstance(container, dict):
            container[f"{key}x"] = container.pop(key)
        else:
            container[key] = copy.deepcopy(draw.choice(WRONG))
        if not places(document):
            break
    return json.dumps(document).encode()


def spoil_bytes(data: bytes, draw: random.Random) -> bytes:
    spoiled = bytearray(data)
    what = draw.randrange(4)
    if what == 0:
        return bytes(spoiled[: draw.randrange(len(spoiled))])
    if what == 1:
        at = draw.randrange(len(spoiled))
        return bytes(spoiled[:at] + draw.randbytes(draw.randrange(1, 40)) + spoiled[at:])
    first = draw.choice((200, len(spoiled)))  # headers break more
    for _ in range(draw.choice((1, 4, 30))):
        spoiled[draw.randrange(min(first, len(spoiled)))] = draw.randrange(256)
    return bytes(spoiled)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3), nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.relu(self.first(x)).mean((-1, -2)))


pytest.importorskip("onnx")


@pytest.fixture(scope="module")
def good(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a file of each kind, as secateur wrote them."""
    root = tmp_path_factory.mktemp("good")
    shutil.copytree(tiny_folder, root / "model")
    name = "model.layers.0.mlp:neurons"
    plan = Plan("by-hand", "50%", keep={name: torch.arange(20)}, sizes={name: 48}, kinds={name: "neurons"})
    plan.inputs, plan.notes = {"input_ids": {"tensor": [1, 8], "dtype": "int64"}}, {"note": "by hand"}
    plan.masks["model.layers.1.mlp.up_proj.weight"] = torch.rand(48, 32) > 0.5
    (root / "plan").mkdir()
    plan.save(root / "plan")
    model, _ = secateur.load(tiny_folder)
    secateur.prune(model, method="flap", target="60%", kinds=("neurons",), samples=2, seqlen=16).save(
        root / "pruned"
    )
    torch.manual_seed(0)
    net, x = Net().eval(), torch.randn(1, 3, 8, 8)
    secateur.export(net, x, root / "net.pt2")
    secateur.export(net, x, root / "net.onnx")
    from PIL import Image

    Image.new("RGB", (16, 16), (200, 30, 90)).save(root / "picture.png")
    return root


PICTURE = "picture"
CASES: dict[str, tuple[str, Callable[[bytes, random.Random], bytes], list[str], int]] = {
    "plan show": ("plan/plan.json", spoil_json, ["plan", "show", "{root}/plan"], 4),
    "plan apply": ("plan/plan.json", spoil_json, ["plan", "apply", "{root}/plan", "{root}/model", "--out", "{root}/out"], 4),
    "plan tensors": ("plan/plan.safetensors", spoil_bytes, ["plan", "show", "{root}/plan"], 1),
    "config": ("model/config.json", spoil_json, ["measure", "{root}/model"], 5),
    "pruned config": ("pruned/config.json", spoil_json, ["measure", "{root}/pruned"], 3),
    "tokenizer": ("model/tokenizer.json", spoil_bytes, ["measure", "{root}/model"], 1),
    "weights": ("model/model.safetensors", spoil_bytes, ["measure", "{root}/model"], 2),
    "onnx": ("net.onnx", spoil_bytes, ["measure", "{root}/net.onnx"], 2),
    "pt2": ("net.pt2", spoil_bytes, ["measure", "{root}/net.pt2"], 2),
    "picture": ("picture.png", spoil_bytes, [PICTURE, "{root}/picture.png"], 1),
}  # fmt: skip
"""The file, how it is spoiled, the command that reads it, and how often it is drawn."""


def run(words: list[str]) -> int:
    if words[0] == PICTURE:
        from secateur.cli.tokens import read_picture
        from secateur.errors import SecateurError

        try:
            read_picture(words[1])
        except SecateurError:
            return 2
        return 0
    return cli.main([*words, "--json"])


def contents(folder: Path) -> dict[str, str]:
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


@pytest.mark.parametrize("part", range(PARTS))
def test_spoiled_files_give_a_line_or_a_result(
    part: int, good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SECATEUR_CACHE", str(tmp_path / "cache"))
    root = tmp_path / "files"
    shutil.copytree(good, root)
    kinds, weights = list(CASES), [case[3] for case in CASES.values()]
    wrong = []
    for number in range(part, DRAWN, PARTS):
        draw = random.Random(f"{SEED}/{number}")
        kind = draw.choices(kinds, weights)[0]
        name, spoil, words, _ = CASES[kind]
        spoiled = spoil((good / name).read_bytes(), draw)
        (root / name).write_bytes(spoiled)
        before = contents(root)
        try:
            code = run([word.format(root=root) for word in words])
            error = None if code in (0, 2) else f"exit code {code}"
        except BaseException as problem:  # noqa: BLE001
            last = traceback.extract_tb(problem.__traceback__)[-1]
            error = f"{type(problem).__name__}: {str(problem)[:150]} ({last.filename.rpartition('/')[2]}:{last.lineno})"
        said = capsys.readouterr()
        shutil.rmtree(root / "out", ignore_errors=True)
        if error is None and code == 2 and "secateur: " not in said.err and words[0] != PICTURE:
            error = f"no line: {said.err[-200:]}"
        if error is None and contents(root) != before:
            error = "a file was changed"
        if error is not None:
            wrong.append(f"{number} {kind}: {error}")
            if keep := os.environ.get("FUZZ_KEEP"):
                (Path(keep) / f"{number}-{Path(name).name}").write_bytes(spoiled)
        shutil.copy(good / name, root / name)
    assert not wrong, f"{len(wrong)} of them:\n" + "\n".join(wrong)
