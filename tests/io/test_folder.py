"""`prune_folder`: what is pruned block by block from shards is what `prune` gives, and a failure leaves both folders alone."""

import errno
import hashlib
import json
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import secateur
from secateur.cli import main as cli
from secateur.errors import SecateurError
from secateur.io import shards, streamed
from secateur.io.folder import prune_folder

IDS = torch.randint(64, (4, 16), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def save(tmp_path: Path) -> Any:
    def go(model: Any, dtype: torch.dtype = torch.float32) -> Path:
        folder = tmp_path / "dense"
        shutil.rmtree(folder, ignore_errors=True)
        model.to(dtype).save_pretrained(folder, max_shard_size="20KB")
        return folder

    return go


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=64, n_positions=32, n_embd=16, n_layer=2, n_head=2)
    return GPT2LMHeadModel(config).eval()


def same(a: nn.Module, b: nn.Module) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)


def bits(folder: Path) -> dict[str, str]:
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted(folder.iterdir())}


@pytest.mark.parametrize(
    ("method", "target", "settings"),
    [
        ("wanda", "50%", {}),
        ("sparsegpt", "params<=70%", {}),
        ("magnitude", "2:4", {}),
        ("wanda", "50%", {"repair": "reconstruct", "repair_passes": 1}),
        ("magnitude", "50%", {"repair": "obs"}),
        ("wanda", "60%", {"allocation": "arithmetic:0.05", "keep": ("*.layers.0.mlp.*",)}),
    ],
)
def test_the_result_is_that_of_prune(
    method: str, target: str, settings: dict, tiny_llama: Any, save: Any, tmp_path: Path
) -> None:
    folder = save(tiny_llama(num_hidden_layers=3))
    before = bits(folder)
    told: list[str] = []
    report = prune_folder(folder, tmp_path / "out", method=method, target=target, data=IDS, announce=told.append, **settings)  # fmt: skip
    whole = secateur.prune(
        tiny_llama(num_hidden_layers=3), method=method, target=target, data=IDS, **settings
    )
    loaded, _ = secateur.load(tmp_path / "out")
    assert same(loaded, whole.model)
    assert report["met"] and report["after"]["params_nonzero"] == whole.report["after"]["params_nonzero"]
    rows = [{row["name"]: row["kept"] for row in r["weights"]} for r in (report, whole.report)]
    assert {name: rows[0][name] for name in rows[1]} == rows[1]
    assert bits(folder) == before and not (tmp_path / "out.run").exists() and "MB" in told[0]


@pytest.mark.parametrize("make", ["tied", "gpt2", "bfloat16"])
def test_tied_heads_other_layouts_and_dtypes(make: str, tiny_llama: Any, save: Any, tmp_path: Path) -> None:
    model = gpt2() if make == "gpt2" else tiny_llama(tie_word_embeddings=make == "tied")
    dtype = torch.bfloat16 if make == "bfloat16" else torch.float32
    folder = save(model, dtype)
    prune_folder(folder, tmp_path / "out", method="wanda", target="50%", data=IDS)
    dense = secateur.load(folder)[0].float()
    whole = secateur.prune(dense, method="wanda", target="50%", data=IDS).model
    assert same(secateur.load(tmp_path / "out")[0].float(), whole)


@pytest.mark.parametrize(
    ("method", "settings"),
    [("wanda", {}), ("sparsegpt", {}), ("wanda", {"repair": "reconstruct", "repair_passes": 1})],
)
def test_a_run_that_was_killed_goes_on_to_the_same_bits(
    method: str, settings: dict, tiny_llama: Any, save: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save(
        tiny_llama(num_hidden_layers=4), torch.bfloat16
    )  # what was rounded is what later blocks see
    asked: dict[str, Any] = {"method": method, "target": "50%", "data": IDS, **settings}
    prune_folder(folder, tmp_path / "whole", **asked)
    finish, done = streamed.Streamed.finish, []

    def until_two(self: Any, number: int) -> None:
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(number)
        finish(self, number)

    monkeypatch.setattr(streamed.Streamed, "finish", until_two)
    with pytest.raises(KeyboardInterrupt):
        prune_folder(folder, tmp_path / "out", **asked)
    assert not (tmp_path / "out").exists() and len(list((tmp_path / "out.run").glob("*.safetensors"))) == 2
    monkeypatch.setattr(streamed.Streamed, "finish", lambda self, n: (done.append(n), finish(self, n)))
    prune_folder(folder, tmp_path / "out", **asked)
    assert done == [0, 1, 2, 3]
    parts = [
        {n: d for n, d in bits(tmp_path / name).items() if n not in ("report.json", "README.md")}
        for name in ("whole", "out")
    ]
    assert parts[0] == parts[1]


def test_another_command_starts_again(tiny_llama: Any, save: Any, tmp_path: Path, monkeypatch: Any) -> None:
    folder = save(tiny_llama())
    monkeypatch.setattr(streamed.Streamed, "close", lambda self: 1 / 0)
    for target in ("50%", "60%"):
        with pytest.raises(ZeroDivisionError):
            prune_folder(folder, tmp_path / "out", method="magnitude", target=target)
    monkeypatch.undo()
    assert prune_folder(folder, tmp_path / "out", method="magnitude", target="50%")["met"]
    (tmp_path / "other.run").mkdir()
    (tmp_path / "other.run" / "mine.txt").touch()
    with pytest.raises(SecateurError, match="isn't a run of secateur"):
        prune_folder(folder, tmp_path / "other", method="magnitude", target="50%")


def test_a_disk_that_is_full_is_told_before_and_while(
    tiny_llama: Any, save: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save(tiny_llama())
    asked: dict[str, Any] = {"method": "magnitude", "target": "50%"}
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10))
    with pytest.raises(SecateurError, match=r"the disk has 0.0 GB left, the result needs"):
        prune_folder(folder, tmp_path / "out", **asked)
    monkeypatch.undo()

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shards, "save_file", full)
    with pytest.raises(SecateurError, match="the disk is full"):
        prune_folder(folder, tmp_path / "out", **asked)
    assert not (tmp_path / "out").exists() and not list((tmp_path / "out.run").glob("*.safetensors"))
    monkeypatch.undo()
    assert prune_folder(folder, tmp_path / "out", **asked)["met"]


def test_damaged_folders_are_named(tiny_llama: Any, save: Any, tmp_path: Path) -> None:
    def refused(folder: Path) -> str:
        with pytest.raises(SecateurError) as caught:
            prune_folder(folder, tmp_path / "out", method="magnitude", target="50%")
        assert not (tmp_path / "out").exists() and not (tmp_path / "out.run").exists()
        return str(caught.value)

    folder = save(tiny_llama())
    shard = sorted(folder.glob("model-*.safetensors"))[1]
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-10])
    assert f"{shard.name}: the shard is cut off" in refused(folder)
    shard.write_bytes(whole[:5])
    assert f"{shard.name}: the shard is cut off" in refused(folder)
    shard.unlink()
    assert f"{shard.name}: the shard is missing" in refused(folder)
    shard.write_bytes(whole)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    assert "the folder lacks model.layers.2" in refused(folder)
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 40}))
    assert "the config says [40, 32]" in refused(folder)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../../etc/passwd"}}')
    assert "doesn't map tensors to files beside it" in refused(folder)
    assert "holds neither" in refused(tmp_path / "dense" / "..")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"method": "owl"}, r"owl divides its budget \(owl\) by a look at all layers first"),
        ({"method": "magnitude", "scope": "global"}, "by a look at all layers first"),
        ({"method": "magnitude", "schedule": "iterative:2"}, "rounds would read the model several times"),
        ({"method": "magnitude", "everywhere": True}, "the head isn't read block by block"),
        ({"method": "wanda", "data": IDS, "repair": "bias"}, "no room for new biases"),
        ({"method": "wanda", "data": "self"}, "can't write text block by block"),
    ],
)
def test_what_needs_the_whole_model_is_refused(
    settings: dict, said: str, tiny_llama: Any, save: Any, tmp_path: Path
) -> None:
    with pytest.raises(SecateurError, match=said):
        prune_folder(save(tiny_llama()), tmp_path / "out", target="50%", **settings)
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.run").exists()


def test_the_command_line(tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["prune", str(tiny_folder), "--method", "magnitude", "--target", "50%", "--stream"]
    assert cli.main([*asked, "--json", "--out", str(tmp_path / "out")]) == 0
    assert json.loads(capsys.readouterr().out)["met"] and (tmp_path / "out" / "recipe.yaml").is_file()
    for more, said in [
        ([], "give --out DIR"),
        (["--out", "x", "--recover", "lora"], "measure and train the result afterwards"),
        (["--out", "x.onnx"], "the result is a folder"),
    ]:
        assert cli.main([*asked, *more]) == 2
        assert said in capsys.readouterr().err
