"""Units that leave a folder block by block: what lies there is what `prune` of the loaded model saves, to the bit."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import secateur
from secateur.errors import SecateurError
from secateur.io import by_block, renamed, streamed
from secateur.io.folder import prune_folder
from secateur.io.shards import Shards, read, write_shard
from secateur.surgery.cut import cut_modules
from secateur.surgery.mask import mask_units

IDS = torch.randint(64, (4, 16), generator=torch.Generator().manual_seed(1))
LOCAL = ("neurons", "kv_groups", "heads")


@pytest.fixture
def save(tmp_path: Path) -> Any:
    def go(model: Any, dtype: torch.dtype = torch.float32, name: str = "dense") -> Path:
        shutil.rmtree(tmp_path / name, ignore_errors=True)
        model.to(dtype).save_pretrained(tmp_path / name, max_shard_size="20KB")
        return tmp_path / name

    return go


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=32, n_embd=16, n_layer=2, n_head=2)).eval()


def qwen_moe() -> nn.Module:
    from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

    torch.manual_seed(0)
    config = Qwen2MoeConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, moe_intermediate_size=24, num_hidden_layers=2,
        shared_expert_intermediate_size=24, num_attention_heads=4, num_key_value_heads=2, num_experts=12, num_experts_per_tok=2,
    )  # fmt: skip
    return Qwen2MoeForCausalLM(config).eval()


def same(a: nn.Module, b: nn.Module) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)


def check_equal(folder: Path, out: Path, beside: Path, report: Any, **asked: Any) -> None:
    """Weights, plan, config, loader, config by layers and figures are those of `prune` and `save`."""
    whole = secateur.prune(secateur.load(folder)[0], **asked)
    whole.save(beside)
    assert same(secateur.load(out)[0], secateur.load(beside)[0])
    assert secateur.Plan.load(out) == secateur.Plan.load(beside)
    written = json.loads((beside / "report.json").read_text())
    assert report["artefact"] == written["artefact"] and report["met"] == written["met"]
    assert report["groups"] == written["groups"]
    for side in ("before", "after"):
        for key in ("params", "params_nonzero", "macs", "size_bytes"):
            known = report[side][key] is not None or key not in report[side]["not_measured"]
            assert not known or report[side][key] == written[side][key], (side, key)
    for name in ("config.json", "modeling_pruned.py", "per_layer/config.json", "generation_config.json"):
        assert (out / name).is_file() == (beside / name).is_file(), name
        assert not (out / name).is_file() or (out / name).read_bytes() == (beside / name).read_bytes(), name
    others = [{f.name for f in folder.iterdir() if f.suffix != ".safetensors"} for folder in (out, beside)]
    assert others[0] - {"model.safetensors.index.json"} == others[1]


@pytest.mark.parametrize(
    ("method", "target", "settings"),
    [
        ("flap", "70%", {}),
        ("flap", "params<=80%", {"allocation": "uniform", "kinds": ("neurons",)}),
        ("random-structured", "60%", {}),
        ("group-magnitude", "macs<=80%", {"kinds": LOCAL, "allocation": "global"}),
        ("2ssp", "75%", {"attentions": 0}),
        ("minitron", "70%", {"kinds": ("neurons", "kv_groups")}),
        ("minitron", "70%", {"axis": "depth"}),
        ("shortgpt", "60%", {}),
        ("group-magnitude", "size<=80%", {"kinds": ("neurons",), "keep": ("*.layers.1.*",), "round_to": 8}),
    ],
)
def test_the_folder_is_what_prune_saves(
    method: str, target: str, settings: dict, tiny_llama: Any, save: Any, tmp_path: Path
) -> None:
    folder = save(tiny_llama(num_hidden_layers=3))
    asked: dict[str, Any] = {"method": method, "target": target, "data": IDS, **settings}
    report = prune_folder(folder, tmp_path / "out", **asked)
    assert not (tmp_path / "out.run").exists()
    check_equal(folder, tmp_path / "out", tmp_path / "beside", report, **asked)


def test_other_layouts_stacked_experts_and_dtypes(tiny_llama: Any, save: Any, tmp_path: Path) -> None:
    folder = save(gpt2())
    report = prune_folder(folder, tmp_path / "out", method="flap", target="70%", data=IDS)
    check_equal(folder, tmp_path / "out", tmp_path / "beside", report, method="flap", target="70%", data=IDS)

    folder = save(tiny_llama(tie_word_embeddings=True), torch.bfloat16)
    prune_folder(folder, tmp_path / "half", method="random-structured", target="50%")
    small, _ = secateur.load(tmp_path / "half")
    whole = secateur.prune(secateur.load(folder)[0].float(), method="random-structured", target="50%").model
    assert small.dtype == torch.bfloat16 and same(small.float(), whole)
    assert json.loads((tmp_path / "half" / "config.json").read_text())["model_type"] == "llama"  # plain


def test_what_was_cut_is_cut_again_and_set_to_zero(tiny_llama: Any, save: Any, tmp_path: Path) -> None:
    folder = save(tiny_llama(num_hidden_layers=3))
    first: dict[str, Any] = {"method": "group-magnitude", "target": "80%", "kinds": ("neurons",), "allocation": "global"}  # fmt: skip
    about = prune_folder(folder, tmp_path / "one", **first)["artefact"]
    assert about["form"] == "custom" and about["per_layer_config"] == "per_layer/config.json"
    again: dict[str, Any] = {"method": "group-magnitude", "target": "60%", "kinds": LOCAL, "allocation": "global"}  # fmt: skip
    report = prune_folder(tmp_path / "one", tmp_path / "two", **again)
    check_equal(tmp_path / "one", tmp_path / "two", tmp_path / "beside", report, **again)

    report = prune_folder(tmp_path / "one", tmp_path / "zeros", method="wanda", target="50%", data=IDS)
    whole = secateur.prune(secateur.load(tmp_path / "one")[0], method="wanda", target="50%", data=IDS)
    assert same(secateur.load(tmp_path / "zeros")[0], whole.model)
    assert report["artefact"]["per_layer_config"] == "per_layer/config.json"
    layers = [(tmp_path / name / "per_layer/config.json").read_bytes() for name in ("one", "zeros")]
    assert layers[0] == layers[1]


@pytest.mark.parametrize(
    ("method", "target", "settings"),
    [("reap", "50%", {}), ("mone", "50%", {}), ("flap", "97%", {"kinds": ("kv_groups",)})],
)
def test_stacked_experts_whose_files_hold_them_one_by_one(
    method: str, target: str, settings: dict, save: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save(qwen_moe())
    assert "model.layers.0.mlp.experts.10.up_proj.weight" in Shards(folder).entries
    asked: dict[str, Any] = {"method": method, "target": target, "data": IDS, **settings}
    report = prune_folder(folder, tmp_path / "out", **asked)
    check_equal(folder, tmp_path / "out", tmp_path / "beside", report, **asked)
    ours, theirs = (Shards(tmp_path / name).entries for name in ("out", "beside"))
    assert {n: e.shape for n, e in ours.items()} == {n: e.shape for n, e in theirs.items()}
    if method == "reap":  # killed as the names are put back
        go, calls = renamed.write_shard, []

        def once(*given: Any) -> None:
            if calls:
                raise KeyboardInterrupt
            calls.append(go(*given))

        monkeypatch.setattr(renamed, "write_shard", once)
        with pytest.raises(KeyboardInterrupt):
            prune_folder(folder, tmp_path / "again", **asked)
        monkeypatch.setattr(renamed, "write_shard", go)
        prune_folder(folder, tmp_path / "again", **asked)
        for file in (tmp_path / "out").glob("*.safetensors"):
            assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes()
    if method == "mone":
        assert "vectors" in report["after"]["not_measured"]["macs"]


def test_weights_of_stacked_experts_and_one_that_is_missing(save: Any, tmp_path: Path) -> None:
    folder = save(qwen_moe())
    prune_folder(folder, tmp_path / "out", method="wanda", target="50%", data=IDS)
    whole = secateur.prune(secateur.load(folder)[0], method="wanda", target="50%", data=IDS)
    assert same(secateur.load(tmp_path / "out")[0], whole.model)
    assert Shards(folder).entries.keys() == Shards(tmp_path / "out").entries.keys()

    index = folder / "model.safetensors.index.json"
    named = json.loads(index.read_text())
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    kept = {n: t for n, t in read(folder / named["weight_map"][name]).items() if n != name}
    write_shard(folder / named["weight_map"].pop(name), kept)
    index.write_text(json.dumps(named))
    with pytest.raises(SecateurError, match=r"model.layers.1.mlp.experts.gate_up_proj can't be put together"):
        prune_folder(folder, tmp_path / "broken", method="reap", target="50%", data=IDS)
    assert not (tmp_path / "broken").exists()


def test_blocks_that_leave_after_a_kill_and_a_cut_that_is_wrong(
    tiny_llama: Any, save: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save(tiny_llama(num_hidden_layers=4))
    asked: dict[str, Any] = {"method": "shortgpt", "target": "50%", "data": IDS}
    prune_folder(folder, tmp_path / "whole", **asked)
    assert len(list((tmp_path / "whole").glob("model-*-of-00003.safetensors"))) == 3
    with monkeypatch.context() as patched:
        patched.setattr(streamed, "copy_shard", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            prune_folder(folder, tmp_path / "out", **asked)
        assert not (tmp_path / "out").exists()
    with monkeypatch.context() as patched:
        patched.setattr(by_block.Blocks, "_gathered", lambda *_: pytest.fail("scored again"))
        prune_folder(folder, tmp_path / "out", **asked)
    for file in (tmp_path / "whole").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "out" / file.name).read_bytes()

    def wrong(model: Any, graph: Any, keep: Any) -> None:  # passes by other blocks than those that leave
        mask_units(model, graph, {name: 3 - units for name, units in keep.items()})

    monkeypatch.setattr(by_block, "mask_units", wrong)
    with pytest.raises(SecateurError, match="without the blocks and past them differ by"):
        prune_folder(folder, tmp_path / "wrong", **{**asked, "target": "75%"})
    assert not (tmp_path / "wrong").exists()


@pytest.mark.parametrize(("method", "stop"), [("flap", "scored"), ("flap", "cut"), ("minitron", "scored")])
def test_a_run_that_was_killed_goes_on_to_the_same_bits(
    method: str, stop: str, tiny_llama: Any, save: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save(tiny_llama(num_hidden_layers=4))
    asked: dict[str, Any] = {"method": method, "target": "70%", "data": IDS, "kinds": ("neurons",)}
    prune_folder(folder, tmp_path / "whole", **asked)
    where = {"scored": (by_block.Blocks, "_own"), "cut": (streamed.Streamed, "finish_as")}[stop]
    go, calls = getattr(*where), []

    def until_two(self: Any, number: int, *rest: Any) -> Any:
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(number)
        return go(self, number, *rest)

    monkeypatch.setattr(*where, until_two)
    with pytest.raises(KeyboardInterrupt):
        prune_folder(folder, tmp_path / "out", **asked)
    monkeypatch.setattr(*where, lambda self, n, *rest: (calls.append(n), go(self, n, *rest))[1])
    prune_folder(folder, tmp_path / "out", **asked)
    assert calls[:4] == [0, 1, 2, 3]  # nothing is done twice
    for file in (tmp_path / "whole").rglob("*"):
        if file.is_file() and file.name != "report.json":
            assert file.read_bytes() == (tmp_path / "out" / file.relative_to(tmp_path / "whole")).read_bytes()


def test_memory_is_two_blocks_and_every_block_is_read_twice(
    tiny_llama: Any, save: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save(tiny_llama(num_hidden_layers=6))
    enter, held = streamed.Streamed.enter, []

    def watched(self: Any, number: int) -> None:
        enter(self, number)
        owned = [p for p in self.model.parameters() if p.untyped_storage().nbytes() > 4]
        inside = {name.split(".")[2] for name, p in self.model.named_parameters() if any(p is o for o in owned) and ".layers." in name}  # fmt: skip
        held.append(len(inside))

    monkeypatch.setattr(streamed.Streamed, "enter", watched)
    prune_folder(folder, tmp_path / "out", method="flap", target="70%", data=IDS)
    assert max(held) == 2


def test_a_cut_that_is_wrong_is_found(
    tiny_llama: Any, save: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(model: Any, graph: Any, keep: Any) -> Any:  # keeps other neurons than the plan says
        keep = {name: graph[name].size - 1 - units for name, units in keep.items()}
        return cut_modules(model, graph, keep)

    monkeypatch.setattr(by_block, "cut_modules", wrong)
    asked: dict[str, Any] = {"method": "group-magnitude", "target": "50%", "kinds": ("neurons",)}
    with pytest.raises(SecateurError, match="isn't provably right.*differ by"):
        prune_folder(save(tiny_llama()), tmp_path / "out", **asked)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"method": "taylor", "data": IDS}, "take 2ssp, flap, .*, reap or shortgpt, or prune it"),
        ({"method": "ream", "data": IDS}, "ream needs more than a block and what passes through it"),
        ({"method": "2ssp", "data": IDS}, "attentions are chosen by the loss of the whole.*attentions=0"),
        (
            {"method": "minitron", "data": IDS},
            r"the hidden of .* reach over several.*kinds=kv_groups,neurons",
        ),
        (
            {"method": "minitron", "axis": "depth", "blocks_by": "loss", "data": IDS},
            "blocks are chosen by the loss of the whole model.*blocks_by=influence",
        ),
        ({"method": "group-magnitude"}, r"the hidden of stem:hidden reach.*kinds=kv_groups,neurons"),
        ({"method": "flap", "data": IDS, "repair": "obs"}, r"units are repaired \(obs\) with the whole"),
        ({"method": "flap", "data": IDS, "schedule": "iterative:2"}, "rounds would read the model several"),
        (
            {"method": "flap", "data": IDS, "allocation": "measured"},
            "predictions of the whole model would be",
        ),
        ({"method": "flap", "data": IDS, "prove_export": True}, "torch.export takes whole models"),
        ({"method": "flap", "data": IDS, "target": "latency<=50%"}, "a cut copy of the whole model would"),
        ({"method": "flap", "data": IDS, "target": "1%"}, "can't be met"),
    ],
)
def test_what_needs_the_whole_model_is_refused(
    settings: dict, said: str, tiny_llama: Any, save: Any, tmp_path: Path
) -> None:
    with pytest.raises(SecateurError, match=said):
        prune_folder(save(tiny_llama()), tmp_path / "out", **{"target": "50%", **settings})
    assert not (tmp_path / "out").exists()
