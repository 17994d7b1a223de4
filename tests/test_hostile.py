"""Files that want to run something: a canary file appears if anything of theirs is run."""

from __future__ import annotations

import json
import os
import pickle
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import secateur
from secateur.cli import main as cli
from secateur.errors import SecateurError
from secateur.io.artefact import save_model
from secateur.pruning.plan import Plan


class Bomb:
    """Pickled, it makes the file that it names when it is read."""

    def __init__(self, canary: Path):
        self.canary = canary

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.canary),)


@pytest.fixture
def canary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("SECATEUR_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "canary"
    yield file
    assert not file.exists(), "something of the file was run"


def code(canary: Path) -> str:
    return f'x"\n__import__("os").mkdir({str(canary)!r})\ny = "'


def refused(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """Runs a command line that must be refused in one line; gives that line."""
    assert cli.main([str(word) for word in words]) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("secateur: ")
    return line


def edit(file: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    document = json.loads(file.read_text())
    change(document)
    file.write_text(json.dumps(document))


@pytest.fixture
def custom(tiny_llama: Callable[..., nn.Module], tmp_path: Path) -> Path:
    """A folder of a model whose layers differ."""
    model = tiny_llama()
    mlp = model.model.layers[0].mlp
    for linear in (mlp.gate_proj, mlp.up_proj):
        linear.weight = nn.Parameter(linear.weight.detach()[:5])
        linear.out_features = 5
    mlp.down_proj.weight = nn.Parameter(mlp.down_proj.weight.detach()[:, :5])
    mlp.down_proj.in_features = mlp.intermediate_size = 5
    assert save_model(model, tmp_path / "custom")["form"] == "custom"
    return tmp_path / "custom"


FIELDS: dict[str, Callable[[dict[str, Any], str], Any]] = {
    "model_type": lambda d, text: d.update(model_type=text),
    "class name": lambda d, text: d["pruned"].update({"class": d["pruned"]["class"] + text}),
    "class of a test": lambda d, _: d["pruned"].update({"class": "transformers.testing_utils:TestCasePlus"}),
    "module": lambda d, text: d["pruned"].update({"class": f"transformers.models.{text}:LlamaModel"}),
    "another class": lambda d, _: d["pruned"].update({"class": "transformers.models.llama.modeling_llama:nn"}),
    "no class": lambda d, _: d["pruned"].pop("class"),
    "kernel": lambda d, _: d.update(attn_implementation="someone/kernel"),
}  # fmt: skip


@pytest.mark.parametrize("field", FIELDS)
def test_a_pruned_folder_runs_nothing_of_its_config(
    field: str, custom: Path, canary: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edit(custom / "config.json", lambda document: FIELDS[field](document, code(canary)))
    with pytest.raises(SecateurError, match=r"config\.json"):
        secateur.load(custom)
    refused(capsys, "measure", custom)
    refused(capsys, "prune", custom, "--method", "magnitude", "--target", "50%", "--out", custom.parent / "o")
    assert not (custom.parent / "o").exists()


def test_auto_map_is_not_followed(custom: Path, canary: Path) -> None:
    edit(custom / "config.json", lambda d: d["auto_map"].update({"AutoTokenizer": code(canary)}))
    (custom / "modeling_pruned.py").write_text(f"import os\nos.mkdir({str(canary)!r})\n")
    model, _ = secateur.load(custom)
    assert not type(model).is_remote_code(), (
        "transformers would copy the folder's code when it saves the model"
    )


@pytest.mark.parametrize(
    "names", [["AutoModelForCausalLM"], [], ["pipeline"], ["os"], "LlamaForCausalLM", [3]]
)
def test_a_folder_names_a_model_of_transformers(
    names: Any, tiny_llama: Callable[..., nn.Module], canary: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "plain"
    tiny_llama().save_pretrained(folder)
    (folder / "code.py").write_text(f"import os\nos.mkdir({str(canary)!r})\n")
    remote = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
    edit(
        folder / "config.json", lambda d: d.update(architectures=names, auto_map=remote, model_type="unknown")
    )
    with pytest.raises(SecateurError, match="plain"):
        secateur.load(folder)


def test_what_is_written_again_holds_no_text_of_a_config(
    tiny_llama: Callable[..., nn.Module], canary: Path, tmp_path: Path
) -> None:
    tiny_llama().save_pretrained(tmp_path / "plain")
    edit(tmp_path / "plain" / "config.json", lambda document: document.update(model_type=code(canary)))
    try:
        model, _ = secateur.load(tmp_path / "plain")
    except SecateurError:
        return
    pruned = secateur.prune(model, method="flap", target="50%", kinds=("neurons",), samples=2, seqlen=16)
    pruned.save(tmp_path / "small")
    assert "__import__" not in (tmp_path / "small" / "modeling_pruned.py").read_text()
    secateur.load(tmp_path / "small")


def test_an_adapter_beside_a_model_is_refused(tiny_llama: Callable[..., nn.Module], tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "plain")
    (tmp_path / "plain" / "adapter_config.json").write_text('{"base_model_name_or_path": "someone/model"}')
    with pytest.raises(SecateurError, match="adapter"):
        secateur.load(tmp_path / "plain")


# timm

ARGUMENTS: dict[str, Any] = {
    "checkpoint_path": "PICKLE",
    "pretrained_cfg": {"file": "PICKLE", "custom_load": True},
    "pretrained_cfg_overlay": {"file": "PICKLE"},
    "cache_dir": "/tmp",
    "features_only": True,
    "pruned": True,
    "act_layer": "PICKLE",
    "depth": 10**12,
    "no_such_argument": 1,
}


@pytest.mark.parametrize("form", ["module", "plain"])
@pytest.mark.parametrize("key", [*ARGUMENTS, "hub name"])
def test_timm_gets_only_what_describes_an_architecture(
    form: str, key: str, canary: Path, tmp_path: Path
) -> None:
    timm = pytest.importorskip("timm")
    pickled = tmp_path / "weights.pth"
    pickled.write_bytes(pickle.dumps(Bomb(canary)))
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, embed_dim=48, num_heads=4, depth=2)
    folder = tmp_path / "model"
    if form == "module":
        mlp = model.blocks[0].mlp
        mlp.fc1 = nn.Linear(48, 5)
        mlp.fc2 = nn.Linear(5, 48)
    if form == "plain" and not hasattr(model, "_model_args"):
        pytest.skip(f"timm {timm.__version__} keeps no arguments of a model, so no plain folder is written")
    assert save_model(model, folder)["form"] == form
    secateur.load(folder)
    value = json.loads(json.dumps(ARGUMENTS.get(key)).replace("PICKLE", str(pickled)))

    def change(document: dict[str, Any]) -> None:
        if key == "hub name":
            document["timm" if form == "module" else "architecture"] = (
                {**document["timm"], "model_name": "hf-hub:someone/model"}
                if form == "module"
                else "hf-hub:someone/model"
            )
        else:
            document["timm" if form == "module" else "model_args"][key] = value

    edit(folder / ("model.json" if form == "module" else "config.json"), change)
    with pytest.raises(SecateurError, match="model"):
        secateur.load(folder)


def test_a_backbone_of_timm_inside_a_config_reads_no_checkpoint(canary: Path, tmp_path: Path) -> None:
    document = {
        "model_type": "timm_wrapper",
        "architectures": ["TimmWrapperModel"],
        "architecture": "resnet18",
    }
    document["model_args"] = {"checkpoint_path": str(tmp_path / "weights.pth")}  # type: ignore[assignment]
    (tmp_path / "weights.pth").write_bytes(pickle.dumps(Bomb(canary)))
    (tmp_path / "config.json").write_text(json.dumps(document))
    save_file({"x": torch.ones(1)}, tmp_path / "model.safetensors")
    with pytest.raises(SecateurError, match="checkpoint_path"):
        secateur.load(tmp_path)


# Other files


def test_a_pt2_archive_with_pickles(canary: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.export.save(torch.export.export(nn.Linear(3, 2), (torch.ones(1, 3),)), tmp_path / "good.pt2")
    bomb = pickle.dumps(Bomb(canary))
    with zipfile.ZipFile(tmp_path / "good.pt2") as archive:
        entries = {item: archive.read(item) for item in archive.namelist()}
    assert any("sample_inputs" in item for item in entries)
    for number, spoiled in enumerate(entries):
        file = tmp_path / f"bad{number}.pt2"
        with zipfile.ZipFile(file, "w") as archive:
            for item, data in entries.items():
                archive.writestr(item, bomb if item == spoiled else data)
        cli.main(["measure", str(file)])
    (tmp_path / "plain.pt2").write_bytes(bomb)
    refused(capsys, "measure", tmp_path / "plain.pt2")


def test_an_onnx_file_reads_no_file_outside_its_folder(
    canary: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    onnx = pytest.importorskip("onnx")
    (tmp_path / "secret").write_bytes(bytes(range(64)))
    helper, kind = onnx.helper, onnx.TensorProto
    weight = onnx.TensorProto(name="w", data_type=kind.FLOAT, dims=[4, 4], data_location=kind.EXTERNAL)
    weight.external_data.add(key="location", value="../secret")
    node = helper.make_node("MatMul", ["x", "w"], ["y"], doc_string=code(canary))
    ends = [helper.make_tensor_value_info(name, kind.FLOAT, [1, 4]) for name in "xy"]
    model = helper.make_model(helper.make_graph([node], "g", ends[:1], ends[1:], [weight]))
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "m.onnx").write_bytes(model.SerializeToString())
    refused(capsys, "measure", tmp_path / "folder" / "m.onnx")
    (tmp_path / "pickle.onnx").write_bytes(pickle.dumps(Bomb(canary)))
    refused(capsys, "measure", tmp_path / "pickle.onnx")


def test_a_plan_runs_nothing(
    tiny_folder: Path, canary: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "model.layers.0.mlp:neurons"
    plan = Plan("by-hand", "50%", keep={name: torch.arange(4)}, sizes={name: 48}, kinds={name: "neurons"})
    plan.notes = {"note": code(canary)}
    plan.inputs = {"input_ids": {"tensor": [1, 8], "dtype": "hub.load"}}
    plan.save(tmp_path)
    refused(capsys, "plan", "apply", tmp_path, tiny_folder, "--out", tmp_path / "out")
    plan.inputs = {"input_ids": {"tensor": [1, 8], "dtype": "int64"}}
    plan.save(tmp_path)
    assert cli.main(["plan", "apply", str(tmp_path), str(tiny_folder), "--out", str(tmp_path / "out")]) == 0
    for file in (tmp_path / "out").glob("*.py"):
        assert "__import__" not in file.read_text()
    secateur.load(tmp_path / "out")
    (tmp_path / "plan.safetensors").write_bytes(pickle.dumps(Bomb(canary)))
    refused(capsys, "plan", "show", tmp_path)
    refused(capsys, "plan", "apply", tmp_path, tiny_folder, "--out", tmp_path / "out2")


def test_calibration_text_is_text(
    tiny_folder: Path, canary: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("data.pt", "data.npy", "data.pkl"):
        (tmp_path / name).write_bytes(pickle.dumps(Bomb(canary)))
        options = [
            "--method",
            "wanda",
            "--target",
            "50%",
            "--data",
            tmp_path / name,
            "--out",
            tmp_path / "out",
        ]
        refused(capsys, "prune", tiny_folder, *options)


POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n"


def test_pictures_are_read_by_no_other_program(
    canary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from secateur.cli.tokens import read_picture
    from secateur.saliency.picture import read_picture as read_for_a_network

    gs = tmp_path / "gs"
    gs.write_text(f"#!/bin/sh\nmkdir -p {canary}\n")
    gs.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    for name, data in (("a.png", POSTSCRIPT), ("b.png", pickle.dumps(Bomb(canary)))):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(SecateurError, match="picture"):
            read_picture(str(tmp_path / name))
        with pytest.raises(SecateurError, match="picture"):
            read_for_a_network(tmp_path / name, (8, 8), (0.5,) * 3, (0.5,) * 3)


RUNS = r"^(exec|eval|compile|torch\.load|pickle\.loads?)$|exec_module$|spec_from_loader$"


def test_nothing_of_the_package_runs_text() -> None:
    """`exec`, `eval`, loaders of text and pickles occur nowhere."""
    sources = sorted(Path(secateur.__file__).parent.rglob("*.py"))
    import ast

    wrong = []
    for file in sources:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                safe = called == "torch.load" and "weights_only=True" in ast.unparse(node)
                # what `--method file.py` names; test_plugins shows that no plan leads there
                safe |= (file.name, called) == ("code.py", "spec.loader.exec_module")
                if not safe and re.search(RUNS, called):
                    wrong.append(f"{file.name}:{node.lineno} {called}")
    assert not wrong
    callers = [file.name for file in sources if "run_file(" in file.read_text(encoding="utf-8")]
    assert callers == ["method.py", "code.py"]


def test_weights_are_untouched_by_loading(custom: Path) -> None:
    before = load_file(custom / "model.safetensors")
    secateur.load(custom)
    after = load_file(custom / "model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)
