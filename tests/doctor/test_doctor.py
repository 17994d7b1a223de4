"""`doctor` passes here, fails where a library changed under it, and never crashes or loses a row."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import secateur
from secateur.cli.main import main
from secateur.doctor.checks import CUT, SAVED, TOKENS, Subject
from secateur.doctor.subjects import Unfit, own_subject
from secateur.errors import SecateurError
from secateur.tasks import tiny

doctor = importlib.import_module("secateur.doctor")
BY_NAME = {check.name: check for check in (*TOKENS, CUT, SAVED)}


@pytest.fixture
def llava() -> Subject:
    model = tiny.tiny_llava()
    return Subject("tiny llava", model, tiny.inputs_for(model))


def states(rows: list[dict[str, Any]]) -> dict[str, str]:
    return {row["check"]: row["state"] for row in rows}


def test_everything_is_well_here_and_nobody_else_speaks(capfd: pytest.CaptureFixture[str]) -> None:
    code = main(["doctor", "--json"])
    out, err = capfd.readouterr()
    found = json.loads(out)
    bad = [(row["check"], row["model"], row["reason"]) for row in found["checks"] if row["state"] != "ok"]
    assert not bad and code == 0 and found["ok"] and err == ""
    assert len(found["checks"]) == 2 * len(TOKENS) + 4
    for row in found["checks"]:
        assert 0 <= row["error"] <= row["allowed"] <= 1e-4
        exact = row["check"].startswith("keep all")
        assert (row["allowed"] == 0) == exact and row["reason"] is None
    assert {row["package"] for row in found["versions"]} == set(doctor.tested_versions())


class Box:
    """A cache that no longer is one to those who look for its type."""

    def __init__(self, name: str, cache: Any):
        self.name, self.cache = name, cache


@pytest.fixture
def other_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """A decoder layer that takes its cache by another name, in another form."""
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer as Layer

    call, forward = Layer.__call__, Layer.forward

    def new_call(self: Any, *args: Any, **kwargs: Any) -> Any:
        for name in ("cache", "past_key_values"):
            if kwargs.get(name) is not None:
                kwargs["memory"] = Box(name, kwargs.pop(name))
        return call(self, *args, **kwargs)

    def new_forward(self: Any, hidden_states: Any, memory: Box | None = None, **kwargs: Any) -> Any:
        more = {} if memory is None else {memory.name: memory.cache}
        return forward(self, hidden_states, **more, **kwargs)

    monkeypatch.setattr(Layer, "__call__", new_call)
    monkeypatch.setattr(Layer, "forward", new_forward)


@pytest.fixture
def no_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    """A decoder layer that calls its mask something else, and doesn't hear the old name."""
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer as Layer

    forward = Layer.forward

    def deaf(self: Any, hidden_states: Any, attention_mask: Any = None, **kwargs: Any) -> Any:
        return forward(self, hidden_states, attention_mask=None, **kwargs)

    monkeypatch.setattr(Layer, "forward", deaf)


def test_a_decoder_layer_with_another_cache_is_found_out(other_cache: None) -> None:
    found = secateur.doctor()
    assert not found["ok"] and len(found["checks"]) == 2 * len(TOKENS) + 4
    mine = states([row for row in found["checks"] if row["model"] == "tiny llava"])
    assert mine["drop between layers, generate"] == mine["transprune (peeks at layers)"] == "failed"
    assert mine["drop between layers, left padding"] == "ok"
    others = [row for row in found["checks"] if row["model"] != "tiny llava"]
    assert {row["state"] for row in others} == {"ok"}
    for row in found["checks"]:
        if row["state"] == "failed":
            assert row["reason"] and row["means"] and "report this" in row["fix"]


def test_a_decoder_layer_that_ignores_its_mask_is_found_out(no_mask: None, llava: Subject) -> None:
    found = states([doctor._row(check, llava, "x") for check in TOKENS])
    assert found["drop between layers, left padding"] == found["feather (reads raw attention)"] == "failed"


def shifted(function: Callable[..., Any]) -> Callable[..., Any]:
    """Every position twice as far."""
    return lambda *args, **kwargs: function(*args, **kwargs) * 2


def perturbed(load: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        model, tokenizer = load(*args, **kwargs)
        with torch.no_grad():
            next(model.parameters()).view(-1)[3] *= 1 + 1e-6
        return model, tokenizer

    return run


@pytest.mark.parametrize(
    ("name", "where", "change"),
    [
        (
            "keep all: bit-identical",
            "secateur.tokens.attach:Attached._run_forward",
            lambda f: lambda *a: _louder(f(*a), 1e-12),
        ),
        (
            "drop between layers, right padding",
            "secateur.tokens.attach:Attached._run_forward",
            lambda f: lambda *a: _louder(f(*a), 1e-4),
        ),
        ("drop at the input", "secateur.tokens.input:positions_of", shifted),
        ("attention read at a layer", "secateur.tokens.state:TokenSets.attention", None),
        ("cut equals masked", "secateur.surgery.cut:cut_modules", None),
        ("saved and loaded", "secateur.io.artefact:load", perturbed),
    ],
)
def test_each_check_can_fail(
    name: str, where: str, change: Any, llava: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, _, path = where.partition(":")
    owner: Any = importlib.import_module(module)
    *outer, leaf = path.split(".")
    for part in outer:
        owner = getattr(owner, part)
    own = getattr(owner, leaf)
    if name.startswith("attention"):

        def change(f: Any) -> Any:
            return lambda self, *a, **k: f(self, *a, **k).flip(-1)
    elif name.startswith("cut"):

        def change(f: Any) -> Any:
            def cut(model: nn.Module, *args: Any) -> Any:
                changes = f(model, *args)
                model.head.bias.data += 1e-3
                return changes

            return cut

    subject = llava
    if name in ("cut equals masked", "saved and loaded"):
        model = tiny.tiny_cnn()
        subject = Subject("tiny cnn", model, tiny.inputs_for(model))
    assert doctor._row(BY_NAME[name], subject, "x")["state"] == "ok"
    monkeypatch.setattr(owner, leaf, change(own))
    row = doctor._row(BY_NAME[name], subject, "x")
    assert row["state"] == "failed" and row["reason"] and row["means"]


def _louder(out: Any, by: float) -> Any:
    out.logits = out.logits * (1 + by)
    return out


def test_what_is_refused_is_a_row_with_the_reason(llava: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.import_module("secateur.tokens.setup"), "OLDEST", (99, 0))
    check = BY_NAME["drop at the input"]
    row = doctor._row(check, llava, "x")
    assert row["state"] == "failed" and "too old" in row["reason"]
    row = doctor._row(check, Subject("x", llava.model, llava.inputs, own=True), "x")
    assert row["state"] == "not run" and "too old" in row["reason"] and row["fix"] is None


def test_a_model_that_cannot_be_built_fails_in_all_of_its_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    def gone() -> Any:
        raise AttributeError("module transformers has no attribute Gone")

    made = doctor._made(gone, "gone")
    row = doctor._row(CUT, made, "gone")
    assert row["state"] == "failed" and "no attribute Gone" in row["reason"]


def test_the_fix_names_the_tested_range(monkeypatch: pytest.MonkeyPatch) -> None:
    tested = importlib.import_module("secateur.utils.tested")
    monkeypatch.setattr(
        tested, "tested_versions", lambda: {"transformers": {"oldest": "1.2.0", "newest": "1.9.3"}}
    )
    assert doctor._fix(CUT) == 'pip install "transformers>=1.2.0,<1.10"'


# -- the user's own model --


def test_a_config_keeps_its_kinds_and_loses_its_sizes() -> None:
    from transformers import Gemma3TextConfig, LlamaConfig

    small = tiny.shrink(
        LlamaConfig(rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5})
    )
    assert (small.hidden_size, small.num_hidden_layers, small.num_attention_heads) == (32, 4, 4)
    assert small.num_key_value_heads == 4 and small.vocab_size == 128
    assert small.rope_parameters == {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}
    assert tiny.shrink(LlamaConfig(num_key_value_heads=8)).num_key_value_heads == 2
    assert tiny.shrink(LlamaConfig(num_key_value_heads=1)).num_key_value_heads == 1
    assert tiny.shrink(LlamaConfig(hidden_size=16, num_attention_heads=4)).hidden_size == 16
    # five sliding layers to a full one: of each kind one stays
    kinds = tiny.shrink(Gemma3TextConfig()).layer_types
    assert kinds == ["sliding_attention"] * 3 + ["full_attention"]


def test_special_tokens_stay_different_ones() -> None:
    from transformers import Qwen2_5_VLConfig

    big = Qwen2_5_VLConfig(vision_start_token_id=151652, vision_end_token_id=151653)
    small = tiny.shrink(big)
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    ids = [getattr(small, name) for name in names]
    assert len(set(ids)) == 4 and 0 < min(ids) and max(ids) < tiny.FIRST_WORD
    assert sorted(names, key=lambda n: getattr(small, n)) == sorted(names, key=lambda n: getattr(big, n))


@pytest.mark.parametrize("name", ["LlavaNext", "Qwen3VL", "Gemma3", "Idefics3", "PaliGemma"])
def test_a_vision_language_model_of_full_size_becomes_a_tiny_one(name: str) -> None:
    import transformers

    subject = own_subject(getattr(transformers, f"{name}Config")())
    assert subject.name == f"{name}ForConditionalGeneration" and subject.without_tokens is None
    assert sum(p.numel() for p in subject.model.parameters()) < 500_000
    for check in ("drop between layers, left padding", "feather (reads raw attention)"):
        row = doctor._row(BY_NAME[check], subject, "x")
        assert row["state"] == "ok", row["reason"]


def test_a_model_without_tokens_to_drop_says_so_and_runs_the_rest() -> None:
    from transformers import Mistral3Config

    jobs = doctor._own(Mistral3Config())
    assert [getattr(job[0], "name", job[0]) for job in jobs] == [
        "visual tokens",
        "cut equals masked",
        "saved and loaded",
    ]
    row = doctor._row(*jobs[0])
    assert row["state"] == "not run" and "takes pictures isn't known" in row["reason"]


def test_a_mixture_of_experts_whose_kernels_know_no_double() -> None:
    from transformers import MixtralConfig

    subject = own_subject(MixtralConfig())
    assert doctor._row(CUT, subject, "x")["state"] == "ok"


def test_code_that_comes_with_a_folder_is_not_run(tmp_path: Path) -> None:
    trap = tmp_path / "ran"
    (tmp_path / "modeling_own.py").write_text(
        f"open({str(trap)!r}, 'w')\nclass OwnModel: pass\nclass OwnConfig: pass\n"
    )
    auto = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnModel"}
    config = {"model_type": "own", "architectures": ["OwnModel"], "auto_map": auto, "hidden_size": 64}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (job,) = doctor._own(str(tmp_path))
    row = doctor._row(*job)
    assert row["state"] == "not run" and "OwnModel" in row["reason"] and "is not run" in row["reason"]
    assert not trap.exists()


def test_folders_names_and_modules(tiny_folder: Path) -> None:
    assert own_subject(str(tiny_folder)).name == "LlamaForCausalLM"
    assert own_subject("scenes:qwen").name == "Qwen2_5_VLForConditionalGeneration"
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3))
    with pytest.raises(Unfit, match="can't be guessed"):
        own_subject(net)
    net.input_size = (3, 16, 16)  # type: ignore[assignment]
    assert doctor._row(CUT, own_subject(net), "x")["state"] == "ok"
    with pytest.raises(Unfit, match="too many"):
        own_subject(nn.Linear(3000, 3000))
    with pytest.raises(SecateurError, match="no network"):
        own_subject("no/such-model")
    with pytest.raises(SecateurError, match="isn't a model"):
        own_subject(3)


def test_a_folder_that_was_cut_unevenly_is_one_of_its_dense_class(
    tiny_llama: Callable[..., nn.Module], tmp_path: Path
) -> None:
    model = tiny_llama()
    pruned = secateur.prune(
        model, method="group-magnitude", target="60%", allocation="global", kinds=("neurons",)
    )
    pruned.save(tmp_path / "cut")
    assert "pruned" in json.loads((tmp_path / "cut" / "config.json").read_text())
    assert own_subject(tmp_path / "cut").name == "LlamaForCausalLM"


# -- the command --


def fake(*rows: dict[str, Any]) -> Any:
    full = [
        dict.fromkeys(("error", "allowed", "reason", "means", "fix")) | {"seconds": 0.1, "model": "m"} | r
        for r in rows
    ]
    span = {"package": "transformers", "installed": "9.9.0", "oldest": "5.18.0", "newest": "5.24.0"}
    return {
        "ok": all(row["state"] != "failed" for row in full),
        "versions": [{**span, "state": "newer than tested"}],
        "checks": full,
        "seconds": 1.0,
    }


@pytest.mark.parametrize("state", ["ok", "failed", "not run"])
def test_exit_codes_and_what_is_printed(
    state: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    told = {"reason": "off by 3", "means": "answers are wrong", "fix": 'pip install "transformers<5.25"'}
    found = fake(
        {"check": "first", "state": "ok", "error": 1e-8}, {"check": "second", "state": state, **told}
    )
    monkeypatch.setattr(doctor, "doctor", lambda model, progress: found)
    assert main(["doctor"]) == (1 if state == "failed" else 0)
    out = capsys.readouterr().out
    assert "first" in out and "second" in out and "newer than tested" in out
    assert ("pip install" in out) == (state != "ok")
    assert ("1 of 2 checks failed" in out) == (state == "failed")
    assert main(["doctor", "--json"]) == (1 if state == "failed" else 0)
    assert json.loads(capsys.readouterr().out)["checks"][1]["state"] == state


def test_a_name_that_nobody_knows_is_the_users_mistake(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "./no-such-folder"]) == 2
    assert "no folder has this name" in capsys.readouterr().err
