"""The command line: what it prints, what it writes, and what it refuses."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import torch
from safetensors.torch import load_file

from secateur.cli import flags
from secateur.cli import main as cli
from secateur.comparison.rows import append, begin
from secateur.comparison.setup import Setup
from secateur.method import list_methods, method_class
from secateur.pruning.options import Options
from secateur.report import catalogue

# The tiny model: 2 blocks of q 32x32, k 16x32, v 16x32, o 32x32, three 32x48 and two norms; embedding and head of
# 257 tokens; a last norm.
MATRICES = 2 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 32 * 48)
PARAMS = MATRICES + 2 * 2 * 32 + 2 * 257 * 32 + 32
QUICK = ["--samples", "4", "--seqlen", "16"]

Run = Callable[..., Any]


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECATEUR_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs a command line that must succeed; gives what it printed, parsed where it is JSON."""

    def go(*words: object) -> Any:
        code = cli.main([str(word) for word in words])
        out, err = capsys.readouterr()
        assert code == 0, err
        return json.loads(out) if "--json" in words else out

    return go


def test_prune_prints_one_json_object_and_writes_what_transformers_loads(
    run: Run, tiny_folder: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    out = tmp_path / "out"
    found = run(
        "prune", tiny_folder, "--method", "group-magnitude", "--target", "50%", "--kinds", "neurons",
        "--seed", 3, "--out", out, "--json", *QUICK,
    )  # fmt: skip
    keys = {
        "params",
        "params_nonzero",
        "macs",
        "size_bytes",
        "perplexity",
        "accuracy",
        "seconds",
        "peak_memory_bytes",
    }
    assert keys <= found["before"].keys() and keys <= found["after"].keys()
    left = PARAMS - 2 * 24 * 3 * 32
    assert (found["before"]["params"], found["after"]["params"]) == (PARAMS, left)
    assert found["after"]["size_bytes"] == 4 * left
    assert (found["target"], found["met"], found["method"], found["seed"]) == (
        "50%",
        True,
        "group-magnitude",
        3,
    )
    assert found["out"] == str(out) and found["model"] == str(tiny_folder)
    assert found["command"].startswith("secateur prune ") and "--kinds neurons" in found["command"]
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.config.intermediate_size == 24 and model.num_parameters() == left
    assert json.loads((out / "report.json").read_text())["after"]["params"] == left


def test_prune_in_words_says_what_zeros_are_worth(run: Run, tiny_folder: Path, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    said = run("prune", tiny_folder, "--method", "wanda", "--target", "50%", "--report", page, *QUICK)
    assert "same size and speed without sparse kernels: the zeros are stored in dense tensors" in said
    assert f"{(PARAMS - MATRICES / 2) / PARAMS * 100:.1f} %" in said
    assert "wanda" in page.read_text() and "without sparse kernels" in page.read_text()


def test_every_option_and_hyperparameter_is_a_flag(run: Run, tiny_folder: Path) -> None:
    app, _ = cli.build(["prune", "x", "--method", "nirvana"])
    shown = {
        argument.name: argument.parameter.help for argument in app["prune"].assemble_argument_collection()
    }
    for kind in (Options, method_class("nirvana")):
        for item in dataclasses.fields(kind):
            assert shown[f"--{item.name.replace('_', '-')}"] == item.metadata["help"]
    found = run(
        "prune",
        tiny_folder,
        "--method=nirvana",
        "--target",
        "90%",
        "--gamma",
        "2.5",
        "--prove",
        "off",
        "--json",
        *QUICK,
    )
    assert found["hyperparameters"]["gamma"] == 2.5
    assert found["options"]["prove"] is False and found["options"]["samples"] == 4


def test_a_hyperparameter_with_the_name_of_a_general_flag_takes_the_methods_before_it() -> None:
    @dataclasses.dataclass
    class Sample:
        samples: int = 7
        depth: int = 2
        shape: tuple[int, ...] = (1, 2)
        maybe: float | None = None
        torch_thing: Any = None

    made = flags.settings(catalogue.settings(Sample), prefix="low-rank", taken={"samples"})
    hints = get_type_hints(made, include_extras=True)
    assert [(hints[item.name].__metadata__[0].name, item.default) for item in dataclasses.fields(made)] == [
        (("--low-rank-samples",), 7),
        (("--depth",), 2),
        (("--shape",), "1,2"),
        (("--maybe",), None),
    ]


def test_on_and_off() -> None:
    switches = {"--prove": True, "--json": False}
    read = flags.on_off
    assert read(["--prove", "off", "x"], switches) == ["--no-prove", "x"]
    assert read(["--prove", "on", "--json", "yes"], switches) == ["--prove", "--json"]
    assert read(["--prove=false", "--json=no"], switches) == ["--no-prove"]
    assert read(["--data", "off"], switches) == ["--data", "off"]


def test_recovery_trains_after_the_cut(run: Run, tiny_folder: Path) -> None:
    found = run(
        "prune", tiny_folder, "--method", "magnitude", "--target", "50%", "--recover", "lora", "--steps", 2, "--distill",
        "--json", *QUICK,
    )  # fmt: skip
    assert len(found["recovery"]["losses"]) == 2
    zeros = found["after"]["params"] - found["after"]["params_nonzero"]
    assert zeros == MATRICES / 2, "what was cut stays zero"
    assert found["cut"]["params_nonzero"] == found["after"]["params_nonzero"]


def test_measure(run: Run, tiny_folder: Path, tmp_path: Path) -> None:
    text = tmp_path / "some.txt"
    text.write_text("All happy families are alike; each unhappy family is unhappy in its own way. " * 20)
    found = run("measure", tiny_folder, "--tasks", text, "--limit", 3, "--seqlen", 64, "--latency", "--json")
    assert found["params"] == PARAMS and found["model"] == str(tiny_folder)
    # a model that has learnt nothing is about as lost as one that takes every byte for equally likely
    assert 150 < found["perplexity"][str(text)] < 450
    assert found["latency"]["forward_seconds"] > 0
    said = run("measure", tiny_folder)
    assert "31.97 k" in said
    half = run("measure", tiny_folder, "--dtype", "bfloat16", "--device", "cpu", "--json")
    assert (half["dtype"], half["size_bytes"]) == ("bfloat16", 2 * PARAMS)


def test_what_broke_is_first_and_both_models_are_timed_in_turn(
    run: Run, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The dense model is loaded again, as the first one was cut in place."""
    from secateur.utils import collapse

    monkeypatch.setattr(collapse, "TIMES", 0.5)  # a model that has learnt nothing has little to lose
    text, out = tmp_path / "some.txt", tmp_path / "small"
    text.write_text("All happy families are alike; each unhappy family is unhappy in its own way. " * 20)
    words = ("--tasks", text, "--limit", 3, "--latency", "--seqlen", 64, "--json")
    found = run("prune", tiny_folder, "--method", "group-magnitude", "--target", "50%", *words, "--out", out)
    assert (
        found["speed"]["forward_seconds"]["pairs"] >= 9 <= found["speed"]["decode_seconds_per_token"]["pairs"]
    )
    assert found["before"]["latency"]["forward_seconds"] > 0 < found["after"]["latency"]["forward_seconds"]
    assert (
        found["collapsed"][0].startswith("collapsed: perplexity")
        and "--recover lora" in found["collapsed"][1]
    )
    again = run("measure", out, "--against", tiny_folder, *words)
    assert again["before"]["params"] == PARAMS and again["after"]["params"] == found["after"]["params"]
    assert again["collapsed"][0] == found["collapsed"][0] and "forward_seconds" in again["speed"]
    said = run("measure", out, "--against", tiny_folder, "--tasks", text, "--limit", 3, "--seqlen", 64)
    assert said.startswith("collapsed: perplexity") and "left: " in said


@pytest.mark.needs_data
def test_tasks_before_and_after(run: Run) -> None:
    found = run(
        "prune", "aidreams", "--method", "magnitude", "--target", "20%", "--tasks", "wikitext2,piqa", "--limit", 2,
        "--json", "--seqlen", 64,
    )  # fmt: skip
    assert found["after"]["perplexity"]["wikitext2"] > found["before"]["perplexity"]["wikitext2"] > 1
    assert 0 <= found["after"]["accuracy"]["piqa"]["acc"] <= 1


def test_inspect(run: Run, tiny_folder: Path, tmp_path: Path) -> None:
    page = tmp_path / "groups.html"
    found = run("inspect", tiny_folder, "--html", page, "--json")
    groups = {group["name"]: group for group in found["groups"]}
    mlp = groups["model.layers.1.mlp:neurons"]
    assert (mlp["kind"], mlp["size"], mlp["reason"]) == ("neurons", 48, None)
    assert mlp["params"] == pytest.approx(3 * 32 * 48 / PARAMS)
    tokens = 16
    block = tokens * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 32 * 48) + 2 * tokens * tokens * 32
    assert found["macs"] == 2 * block + tokens * 32 * 257
    assert mlp["macs"] == pytest.approx(tokens * 3 * 32 * 48 / found["macs"])
    assert all(group["reason"] for name, group in groups.items() if "embed_tokens" in name)
    said = run("inspect", tiny_folder)
    assert "model.layers.0-1.mlp:neurons" in said and "2 × 48" in said
    html = page.read_text()
    assert "mlp.down_proj" in html and "http" not in html.split("<body>")[1]


def test_methods(run: Run) -> None:
    every = {row["name"] for row in run("methods", "--json")["methods"]}
    assert every == set(list_methods())
    fitting = run("methods", "--when", "PAT-PT", "--training-free", "--speedup", "univ", "--json")["methods"]
    names = {row["name"] for row in fitting}
    assert {"flap", "nirvana"} <= names and not {"wanda", "sparsegpt"} & names
    assert all("PAT-PT" in row["when"] and row["training_free"] for row in fitting)
    found = {row["name"] for row in run("methods", "input norm", "--json")["methods"]}
    assert "wanda" in found and "shortgpt" not in found
    one = run("methods", "nirvana", "--json")
    assert one["arxiv"] and "gamma" in [item["name"] for item in one["hyperparameters"]]
    assert "--gamma" in run("methods", "nirvana")


def test_recommend(run: Run) -> None:
    names = [
        row["name"]
        for row in run("recommend", "--hardware", "gpu-dense", "--model", "llm", "--json")["methods"]
    ]
    assert "nirvana" in names and "wanda" not in names
    published = run("recommend", "--published", "--model", "vlm", "--json")["methods"]
    assert len(published) > 5 and all(row["why"] for row in published)


def test_recommend_by_what_was_measured(run: Run, tmp_path: Path) -> None:
    shipped = run("recommend", "--model", "cnn", "--json")
    assert shipped["methods"][0]["why"].startswith("mean rank ") and shipped["later"]
    assert any(command.startswith("secateur compare digits") for command in shipped["measured"])
    out = tmp_path / "own"
    out.mkdir()
    begin(out, Setup("digits", cost="macs").as_json())
    qualities = {"dense": 0.9, "random-structured": 0.2, "obspa": 0.3, "spa": 0.4, "group-magnitude": 0.7}
    for method, quality in qualities.items():
        target = "100%" if method == "dense" else "50%"
        append(out, {"method": method, "target": target, "seed": 0, "state": "done", "quality": quality, "metric": "accuracy", "sign": 1, "params": 0.5, "macs": 0.5})  # fmt: skip
    own = run("recommend", "--model", "cnn", "--comparison", out, "--json")["methods"]
    assert [row["name"] for row in own] == ["group-magnitude", "obspa"]
    assert own[0]["why"].startswith(
        "mean rank 1.0 of 4 on digits (1 seed) at equal multiply-adds: accuracy 70.0 % at 50%"
    )
    text = run("recommend", "--model", "cnn")
    assert "Need more?" in text and "--comparison" in text
    assert cli.main(["recommend", "--comparison", str(tmp_path)]) == 2


def test_methods_by_words(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    query = "saliency-driven pruning of tokens without training"
    rows = run("methods", query, "--json")["methods"]
    assert len(rows) >= 10 and all("T" in row["objects"] and row["training_free"] for row in rows[:10])
    assert rows == run("methods", *query.split(), "--json")["methods"]
    assert run("methods", "gyroscopic", "lottery", "--json")["unknown_words"] == ["gyroscopic"]
    assert "gyroscopic" in run("methods", "gyroscopic", "lottery")
    for words, said in (
        (["xyzzy", "quux"], "described like that"),
        (["fastvv", "zebra"], "did you mean fastv"),
        (["lottery", "--when", "RT"], "filters"),
    ):
        assert cli.main(["methods", *words]) == 2
        assert said in capsys.readouterr().err


def test_the_published_systems(run: Run) -> None:
    found = run("methods", "--published", "--json")
    assert len(found["methods"]) == 50 and found["counts"]["token objects"] == 23
    rows = {row["spec"]: row for row in found["methods"]}
    assert rows["flowcut"]["here"] == ["flowcut"] and all(row["here"] for row in rows.values())
    assert all(row["description"] and row["links"] for row in rows.values())
    assert rows["tas"]["links"][0] == "https://arxiv.org/abs/1905.09717"
    text = run("methods", "--published")
    assert "50 systems, 23 token objects, 26 training-free, 18 static, 26 dynamic" in text
    assert "Keeps the patches to which the encoder's [CLS] token attends most." in text
    some = run("methods", "maps of pixels", "--published", "--json")["methods"]
    assert 0 < len(some) < 20


def test_methods_by_meaning(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from secateur.tasks import meaning

    def vectors(texts: list[str]) -> torch.Tensor:
        axes = [
            [1.0 if word in text.lower() else 0.0 for word in ("diverse", "distance", "ticket")]
            for text in texts
        ]
        found = torch.tensor(axes) + 1e-6
        return found / found.norm(dim=1, keepdim=True)

    monkeypatch.setattr(meaning, "vectors", vectors)
    rows = run("methods", "far apart in distance", "--by", "meaning", "--json")["methods"]
    assert "divprune" in {row["name"] for row in rows} and len(rows) < 20
    assert "unknown_words" not in run("methods", "distance", "--by", "meaning", "--json")
    monkeypatch.setattr(meaning, "vectors", lambda texts: torch.eye(len(texts)))
    assert cli.main(["methods", "nothing", "alike", "--by", "meaning"]) == 2
    assert "by meaning" not in capsys.readouterr().err


def test_plans(run: Run, tiny_folder: Path, tmp_path: Path) -> None:
    common = ["--method", "group-magnitude", "--json", *QUICK]
    for name, target in (("a", "50%"), ("b", "75%")):
        run("prune", tiny_folder, "--target", target, "--out", tmp_path / name, *common)
    shown = run("plan", "show", tmp_path / "a", "--json")
    rows = {row["name"]: row for row in shown["rows"]}
    assert rows["model.layers.0.mlp:neurons"] == {
        "name": "model.layers.0.mlp:neurons", "kind": "neurons", "size": 48, "kept": 24,
    }  # fmt: skip
    assert run("plan", "diff", tmp_path / "a", tmp_path / "a", "--json")["rows"] == []
    different = run("plan", "diff", tmp_path / "a", tmp_path / "b", "--json")["rows"]
    row = next(row for row in different if row["name"] == "model.layers.0.mlp:neurons")
    assert (row["first"], row["second"], row["agree"]) == (24, 36, pytest.approx(24 / 36))
    run("plan", "apply", tmp_path / "a", tiny_folder, "--out", tmp_path / "again", "--json")
    first, again = (load_file(tmp_path / name / "model.safetensors") for name in ("a", "again"))
    assert first.keys() == again.keys()
    assert all(torch.equal(first[name], again[name]) for name in first)


# ---------------------------------------------------------------- what is refused

BASE = ["prune", "MODEL", "--method", "wanda", "--target", "50%", *QUICK]
MISTAKES: list[tuple[list[str], tuple[str, ...]]] = [
    (["prune"], ("MODEL",)),
    (["prune", "MODEL", "--method", "wanda"], ("--target",)),
    (["prune", "MODEL", "--method", "wannda", "--target", "50%"], ("wannda", "wanda")),
    (["prune", "MODEL", "--method", "flap", "--target", "150%"], ("150%", "share kept")),
    (["prune", "MODEL", "--method", "flap", "--target", "macs"], ("quote", "macs<=50%")),
    (["prune", "MODEL", "--method", "flap", "--target", "soon"], ("soon", "2:4")),
    (["prune", "MODEL", "--method", "nirvana", "--target", "50%", "--gama", "1"], ("--gama", "--gamma")),
    (["prune", "MODEL", "--method", "nirvana", "--target", "50%", "--gamma", "x"], ("--gamma", "float")),
    ([*BASE, "--gamma", "1"], ("--gamma", "nirvana", "--help")),
    ([*BASE, "--seed", "x"], ("--seed", "int")),
    ([*BASE, "--schedule", "twice"], ("twice", "iterative:K")),
    ([*BASE, "--allocation", "weird"], ("weird", "uniform")),
    ([*BASE, "--floor", "2"], ("floor", "0..1")),
    ([*BASE, "--round-to", "0"], ("round_to",)),
    ([*BASE, "--tasks", "wikitext"], ("wikitext", "wikitext2")),
    ([*BASE, "--limit", "0"], ("--limit", "1 or more")),
    ([*BASE, "--recover", "qlora"], ("qlora", "lora")),
    ([*BASE, "--recover", "lora", "--steps", "0"], ("--steps",)),
    ([*BASE, "--kinds", "neurns"], ("neurns", "neurons")),
    ([*BASE, "--out", "FULL"], ("not empty", "new folder")),
    ([*BASE, "--out", "FULL/x"], ("is a file",)),
    ([*BASE, "--report", "FULL"], ("is a folder", ".html")),
    ([*BASE, "--report", "FULL/x/report.html"], ("is a file",)),
    ([*BASE, "surplus"], ("surplus",)),
    (["measure", "MODEL", "--device", "toaster"], ("toaster", "cpu")),
    (["prun", "MODEL"], ("prun", "prune")),
    (["--frob"], ("--frob",)),
    (["measure", "MODEL", "--tasks", "zzz"], ("zzz", "piqa")),
    (["measure", "MODEL", "--seqlen", "0"], ("--seqlen",)),
    (
        ["prune", "MODEL", "--method", "magnitude", "--target", "50%", "--prompts", "nowhere.txt"],
        ("no such file", "--prompts"),
    ),
    (
        ["prune", "MODEL", "--method", "magnitude", "--target", "50%", "--prompts", "FULL/empty"],
        ("it is empty",),
    ),
    (
        ["train-prune", "digits", "--method", "ecodiff", "--target", "50%", "--drawing", "steps"],
        ("'steps' isn't name=value",),
    ),
    (["inspect", "MODEL", "--html", "FULL"], ("is a folder",)),
    (["methods", "--when", "LATER"], ("LATER", "PAT")),
    (["methods", "--colour", "red"], ("--colour",)),
    (["methods", "wannda"], ("wannda", "wanda")),
    (["recommend", "--hardware", "abacus"], ("abacus", "gpu-dense")),
    (["plan", "show", "EMPTY"], ("no plan", "plan.json")),
    (["plan", "show", "FULL/x"], ("JSON",)),
    (["plan", "apply", "EMPTY", "MODEL", "--out", "EMPTY"], ("no plan",)),
    (["plan", "burn"], ("burn", "show")),
]


@pytest.mark.parametrize("words, expected", MISTAKES, ids=lambda value: " ".join(value)[:60])
def test_a_mistake_is_one_line_before_any_work(
    words: list[str],
    expected: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("secateur.tasks.load_model", never)
    for name in ("EMPTY", "FULL"):
        (tmp_path / name).mkdir()
    (tmp_path / "FULL" / "x").write_text("here first")
    (tmp_path / "FULL" / "empty").write_text(" \n")
    monkeypatch.chdir(tmp_path)
    assert cli.main([*words]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("secateur: ") and err.count("\n") == 1 and len(err) < 500
    for part in expected:
        assert part in err
    assert (tmp_path / "FULL" / "x").read_text() == "here first" and not list((tmp_path / "EMPTY").iterdir())


def test_mistakes_that_need_the_model(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    Path("blank.txt").write_text("")
    Path("binary.txt").write_bytes(b"\xff\xfe\x00")
    model = str(tiny_folder)
    cases: list[tuple[list[str], tuple[str, ...]]] = [
        (["prune", "empty", "--method", "flap", "--target", "50%"], ("empty", "no model")),
        (["inspect", "./nowhere"], ("nowhere", "no such folder")),
        (["measure", "smollm3"], ("smollm3", "smollm2")),
        (["measure", "someone/absent"], ("someone/absent", "hub")),
        (["measure", "blank.txt"], ("a file, not a model folder",)),
        (["prune", model, "--method", "wanda", "--target", "50%", "--data", "missing.txt"], ("missing.txt",)),
        (
            ["prune", model, "--method", "wanda", "--target", "50%", "--data", "blank.txt"],
            ("blank.txt", "empty"),
        ),
        (
            ["prune", model, "--method", "wanda", "--target", "50%", "--data", "binary.txt"],
            ("binary.txt", "UTF-8"),
        ),
        (["prune", model, "--method", "wanda", "--target", "macs<=50%"], ("macs", "structured")),
        (["prune", model, "--method", "flap", "--target", "2:4"], ("2:4", "unstructured")),
        (
            ["prune", model, "--method", "group-magnitude", "--target", "params<=10"],
            ("can't be met", "or more"),
        ),
        (["inspect", model, "--input-shape", "1,a"], ("--input-shape", "1,3,224,224")),
    ]
    for words, expected in cases:
        assert cli.main(words) == 2, words
        out, err = capsys.readouterr()
        assert out == "" and err.count("\n") == 1, err
        for part in expected:
            assert part in err, words


def test_a_bug_keeps_its_traceback(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["secateur.measure"], "params", lambda model: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        cli.main(["measure", str(tiny_folder)])


def test_memory_that_runs_out(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def greedy(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 80 GiB.\nmore")

    monkeypatch.setattr("secateur.tasks.load_model", greedy)
    assert cli.main(["measure", str(tiny_folder)]) == 2
    assert "out of memory" in capsys.readouterr().err


# ---------------------------------------------------------------- a process of its own


def process(code: str, *words: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs `code`, then the command line, in a fresh interpreter."""
    script = f"import sys\n{code}\nfrom secateur.cli.main import VERBS, main\nsys.exit(main())"
    given = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(Path(cli.__file__).parents[2]),
        **environment,
    }
    return subprocess.run(
        [sys.executable, "-c", script, *map(str, words)],
        capture_output=True,
        check=False,
        text=True,
        env=given,
        timeout=300,
    )


def test_stdout_is_json_and_nothing_else(tiny_folder: Path) -> None:
    noisy = "import secateur.measure.cost\nm = sys.modules['secateur.measure']; old = m.params_nonzero\n"
    noisy += "m.params_nonzero = lambda *a: (print('a library that talks'), old(*a))[1]"
    done = process(noisy, "measure", tiny_folder, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["params"] == PARAMS
    assert "a library that talks" in done.stderr


def test_ctrl_c(tiny_folder: Path, tmp_path: Path) -> None:
    code = "import os, signal, sys, secateur.pruning.prune\np = sys.modules['secateur.pruning.prune']\n"
    code += (
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell's background job ignores it
    )
    code += f"p.make_plan = lambda context: os.kill(os.getpid(), {int(signal.SIGINT)})"
    out = tmp_path / "out"
    done = process(code, "prune", tiny_folder, "--method", "wanda", "--target", "50%", "--out", out, *QUICK)
    assert (done.returncode, done.stdout) == (130, "")
    assert "interrupted" in done.stderr and "same command" in done.stderr and "Traceback" not in done.stderr
    assert not out.exists()


def test_a_full_disk(tiny_folder: Path, tmp_path: Path) -> None:
    # a limit on the size of files stands in for a disk: writing beyond it fails half-way in the same manner
    code = "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
    code += "resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))"
    page = tmp_path / "report.html"
    done = process(
        code, "prune", tiny_folder, "--method", "wanda", "--target", "50%", "--report", page, *QUICK
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert "the disk is full" in done.stderr and "Traceback" not in done.stderr
    assert list(tmp_path.glob("*report*")) == []


@pytest.mark.parametrize("verb", cli.VERBS)
def test_every_verb_has_help(verb, capsys):
    assert cli.main([*verb.split(), "--help"]) == 0
    assert f"Usage: secateur {verb}" in capsys.readouterr().out
