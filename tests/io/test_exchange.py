"""Models through ONNX and torch.export files: in, cut, out. onnxruntime is the independent judge of ONNX files."""

import json
import warnings

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper
from torch import nn
from torch.export import Dim

import secateur
from secateur.cli.main import main
from secateur.errors import SecateurError
from secateur.io.exchange import export, load_file

timm = pytest.importorskip("timm")
SETTINGS = {"method": "group-magnitude", "target": "macs<=50%", "seed": 0}


def resnet():
    from timm.models.resnet import BasicBlock, ResNet

    return ResNet(BasicBlock, [1, 1, 1, 1], channels=(8, 16, 24, 32), num_classes=5)


def mobilenet():
    return timm.create_model("mobilenetv3_small_050", num_classes=5)


def vit(depth=2):
    return timm.create_model(
        "vit_tiny_patch16_224",
        img_size=32,
        patch_size=8,
        embed_dim=48,
        num_heads=4,
        depth=depth,
        num_classes=5,
    )


def bert():
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=50,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=32,
        return_dict=False,
    )
    return BertForSequenceClassification(config)


MODELS = {"resnet": (resnet, 64), "mobilenet": (mobilenet, 64), "vit": (vit, 32), "bert": (bert, 0)}


def built(name):
    """(model with uneven norms, its inputs, their names) from a fixed seed."""
    torch.manual_seed(0)
    make, size = MODELS[name]
    model = make().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.5)
    if size:
        return model, (torch.randn(2, 3, size, size),), ["x"]
    ids = torch.randint(0, 50, (2, 12))
    return model, (ids, torch.ones_like(ids)), ["input_ids", "attention_mask"]


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    """name and suffix -> (file, model, inputs); each is exported once, with an open batch size."""
    folder, made = tmp_path_factory.mktemp("files"), {}

    def get(name, suffix):
        if (name, suffix) in made:
            return made[name, suffix]
        model, inputs, names = built(name)
        file = folder / f"{name}{suffix}"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if suffix == ".onnx":
                torch.onnx.export(
                    model,
                    inputs,
                    file,
                    dynamo=False,
                    input_names=names,
                    output_names=["logits"],
                    opset_version=17,
                    dynamic_axes={name: {0: "batch"} for name in [*names, "logits"]},
                )
            else:
                shapes = tuple({0: Dim.DYNAMIC} for _ in inputs)
                program = torch.export.export(model, inputs, dynamic_shapes=shapes, strict=False)
                torch.export.save(program, file)
        made[name, suffix] = file, model, inputs
        return made[name, suffix]

    return get


def ort(file, inputs):
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    names = [i.name for i in session.get_inputs()]
    return session.run(None, {n: v.numpy() for n, v in zip(names, inputs, strict=True)})


def first(output):
    return output[0] if isinstance(output, tuple) else output


def assert_close(a, b):
    np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("suffix", [".onnx", ".pt2"])
def test_a_read_file_gives_what_the_model_gave(files, name, suffix):
    file, model, inputs = files(name, suffix)
    with torch.no_grad():
        assert_close(first(load_file(file)(*inputs)), first(model(*inputs)))


@pytest.mark.parametrize("name", MODELS)
def test_an_onnx_file_comes_out_at_half_the_macs(files, name, tmp_path):
    file, _, inputs = files(name, ".onnx")
    model = load_file(file)
    example = tuple(x[:1] for x in inputs)
    pruned = secateur.prune(model, example, **SETTINGS)
    before, after = pruned.report["before"], pruned.report["after"]
    assert after["macs"] <= 0.5 * before["macs"]
    assert after["params"] < 0.9 * before["params"]
    small = tmp_path / "small.onnx"
    done = export(pruned.model, example, small)
    assert done["bytes"] == small.stat().st_size < 0.9 * file.stat().st_size
    with torch.no_grad():
        assert_close(
            ort(small, [torch.cat([x, x[:1]]) for x in inputs])[0],
            first(pruned.model(*[torch.cat([x, x[:1]]) for x in inputs])),
        )
    old, new = onnx.load(file), onnx.load(small)
    for side in ("input", "output"):
        assert list(getattr(old.graph, side)) == list(getattr(new.graph, side))
    weights = [
        sum(int(np.prod(t.dims)) for t in m.graph.initializer if t.data_type == TensorProto.FLOAT)
        for m in (old, new)
    ]
    assert weights[1] < 0.9 * weights[0]


@pytest.mark.parametrize("name", MODELS)
def test_a_program_comes_out_at_half_the_macs(files, name, tmp_path):
    file, _, inputs = files(name, ".pt2")
    example = tuple(x[:1] for x in inputs)
    pruned = secateur.prune(load_file(file), example, **SETTINGS)
    before, after = pruned.report["before"], pruned.report["after"]
    assert after["macs"] <= 0.5 * before["macs"]
    assert after["params"] < 0.9 * before["params"]
    small = tmp_path / "small.pt2"
    export(pruned.model, example, small)
    program = torch.export.load(small)
    assert sum(p.numel() for p in program.parameters()) == after["params"]
    wide = [torch.cat([x, x[:1]]) for x in inputs]
    with torch.no_grad():
        assert_close(first(program.module()(*wide)), first(pruned.model(*wide)))


@pytest.mark.parametrize("name", ["resnet", "vit"])
def test_a_pruned_module_goes_to_both_formats(name, tmp_path):
    model, inputs, _ = built(name)
    pruned = secateur.prune(model, inputs, **SETTINGS)
    with torch.no_grad():
        expected = pruned.model(*inputs)
    for file in (tmp_path / "small.onnx", tmp_path / "small.pt2"):
        assert export(pruned.model, inputs, file)["difference"] < 1e-4
        again = load_file(file)
        assert_close(first(again(*inputs)).detach(), expected)
    assert_close(ort(tmp_path / "small.onnx", [x[:1] for x in inputs])[0], expected[:1])


def test_a_language_model_keeps_its_keyword_and_open_tokens(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = LlamaForCausalLM(config).eval()
    file = tmp_path / "llama.pt2"
    done = export(model, {"input_ids": torch.arange(12)[None]}, file)
    assert done["open"] == {"input_ids": [0, 1]} and model.config.use_cache
    read = load_file(file)
    example = read.example_inputs("1,9")
    pruned = secateur.prune(read, example, **SETTINGS)
    assert pruned.report["after"]["params"] < pruned.report["before"]["params"]
    export(pruned.model, example, tmp_path / "small.pt2")
    longer = torch.randint(0, 40, (3, 17))
    small = torch.export.load(tmp_path / "small.pt2").module()
    with torch.no_grad():
        assert_close(small(input_ids=longer)["logits"], pruned.model(longer)["logits"])


def test_an_onnx_file_becomes_a_program_with_its_open_batch(files, tmp_path):
    file, model, inputs = files("vit", ".onnx")
    done = export(load_file(file), tuple(x[:1] for x in inputs), tmp_path / "vit.pt2")
    assert done["open"] == {"x": [0]}
    with torch.no_grad():
        assert_close(torch.export.load(tmp_path / "vit.pt2").module()(*inputs), model(*inputs))


def test_a_dynamo_file_is_cut_along_the_groups_of_its_module(tmp_path):
    """The exporter stores all sizes and zero biases once; layers must be cut apart all the same."""
    model, inputs, _ = built("vit")
    file = tmp_path / "vit.onnx"
    torch.onnx.export(model, inputs, file, dynamo=True, verbose=False, dynamic_shapes=({0: Dim.DYNAMIC},))
    read = load_file(file)
    wanted = {(g.name, g.size) for g in secateur.trace(model, inputs).prunable(["heads", "neurons"])}
    found = {(g.name, g.size) for g in secateur.trace(read, inputs).prunable(["heads", "neurons"])}
    assert found == wanted and len(wanted) == 4
    pruned = secateur.prune(read, **SETTINGS)
    small = tmp_path / "small.onnx"
    export(pruned.model, inputs, small)
    with torch.no_grad():
        assert_close(ort(small, inputs)[0], pruned.model(*inputs))


def two_layers(path, op="Relu"):
    """y = W2 relu(W1 x + b1), opset 17, four hidden units of norms 4, 1, 3, 2."""
    first_, second = np.diag([4.0, 1.0, 3.0, 2.0]).astype(np.float32), np.ones((2, 4), np.float32)
    bias = np.array([0.5, 0.25, -0.5, 0.125], np.float32)
    nodes = [
        helper.make_node("Gemm", ["x", "first.weight", "first.bias"], ["h"], "first/Gemm", transB=1),
        helper.make_node(op, ["h"], ["a"], "act", domain="" if op == "Relu" else "my.company"),
        helper.make_node("Gemm", ["a", "second.weight"], ["y"], "second/Gemm", transB=1),
    ]
    graph = helper.make_graph(
        nodes,
        "two",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 2])],
        [
            onnx.numpy_helper.from_array(first_, "first.weight"),
            onnx.numpy_helper.from_array(bias, "first.bias"),
            onnx.numpy_helper.from_array(second, "second.weight"),
        ],
    )
    sets = [helper.make_opsetid("", 17), helper.make_opsetid("my.company", 1)]
    onnx.save(helper.make_model(graph, opset_imports=sets, ir_version=9), path)
    return path


def test_the_weakest_units_leave_a_graph_made_by_hand(tmp_path):
    file = two_layers(tmp_path / "two.onnx")
    small = tmp_path / "small.onnx"
    pruned = secateur.prune(load_file(file), method="group-magnitude", target="macs<=50%")
    export(pruned.model, torch.ones(1, 4), small)
    # the norms of the rows are 4, 1, 3 and 2, and all units go out with the same weights: units 0 and 2 stay
    tensors = {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(small).graph.initializer}
    np.testing.assert_array_equal(tensors["first.weight"], [[4, 0, 0, 0], [0, 0, 3, 0]])
    np.testing.assert_array_equal(tensors["first.bias"], [0.5, -0.5])
    x = torch.tensor([[1.0, 2, 3, 4]])
    # relu(4 * 1 + 0.5) + relu(3 * 3 - 0.5)
    np.testing.assert_allclose(ort(small, [x])[0], [[13, 13]])


def test_the_command_line_takes_and_writes_files(files, tmp_path, capsys):
    file, _, _ = files("vit", ".onnx")
    small = tmp_path / "small.onnx"
    assert main(["prune", str(file), "--target", "macs<=50%", "--out", str(small), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["method"] == "group-magnitude"
    assert report["after"]["macs"] <= 0.5 * report["before"]["macs"]
    assert report["export"]["difference"] < 1e-4
    model, tokenizer = secateur.load(small)
    assert tokenizer is None
    assert sum(p.numel() for p in model.parameters()) == report["after"]["params"]
    assert main(["prune", str(file), "--target", "macs<=50%", "--out", str(small)]) == 2
    assert "exists already" in capsys.readouterr().err
    assert main(["prune", str(file), "--target", "macs<=50%", "--out", str(tmp_path / "folder")]) == 2
    assert ".onnx" in capsys.readouterr().err
    assert main(["prune", str(file), "--target", "macs<=50%", "--input-shape", "1,3,16,16"]) == 2
    assert "[1, 3, 16, 16]" in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["small.onnx"]


@pytest.mark.parametrize("suffix", [".onnx", ".pt2"])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.97])
def test_a_truncated_file_is_named_and_nothing_is_written(files, suffix, share, tmp_path, capsys):
    data = files("vit", suffix)[0].read_bytes()
    broken = tmp_path / f"broken{suffix}"
    broken.write_bytes(data[: int(share * len(data))])
    with pytest.raises(SecateurError, match="broken"):
        load_file(broken)
    out = tmp_path / f"out{suffix}"
    assert main(["prune", str(broken), "--target", "macs<=50%", "--out", str(out)]) == 2
    said = capsys.readouterr().err
    assert str(broken) in said and said.count("\n") == 1
    assert list(tmp_path.iterdir()) == [broken]


def test_an_unknown_operation_is_named_with_its_node(tmp_path, capsys):
    file = two_layers(tmp_path / "odd.onnx", op="Frobnicate")
    out = tmp_path / "out.onnx"
    assert main(["prune", str(file), "--target", "macs<=50%", "--out", str(out)]) == 2
    said = capsys.readouterr().err
    assert "Frobnicate" in said and "node act" in said and not out.exists()


def test_wrong_inputs_are_named(files):
    model = load_file(files("vit", ".onnx")[0])
    with pytest.raises(SecateurError, match=r"input x: got the shape \[2, 3, 16, 16\]"):
        model(torch.zeros(2, 3, 16, 16))
    with pytest.raises(SecateurError, match="takes x"):
        model(torch.zeros(1), torch.zeros(1))
    with pytest.raises(SecateurError, match="no input"):
        model.example_inputs("1,3")


def test_an_open_size_has_to_be_given(tmp_path):
    model, inputs, names = built("bert")
    file = tmp_path / "bert.onnx"
    axes = {name: {0: "batch", 1: "tokens"} for name in names}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model, inputs, file, dynamo=False, input_names=names, dynamic_axes=axes, opset_version=17
        )
    read = load_file(file)
    with pytest.raises(SecateurError, match="--input-shape 1,16"):
        read.example_inputs()
    assert [tuple(x.shape) for x in read.example_inputs("1,9")] == [(1, 9), (1, 9)]
    pruned = secateur.prune(read, read.example_inputs("1,9"), **SETTINGS)
    export(pruned.model, read.example_inputs("1,9"), tmp_path / "small.onnx")
    with torch.no_grad():
        assert_close(ort(tmp_path / "small.onnx", inputs)[0], first(pruned.model(*inputs)))


def test_a_plan_is_applied_to_a_file(files, tmp_path, capsys):
    file, _, inputs = files("resnet", ".onnx")
    pruned = secateur.prune(load_file(file), **SETTINGS)
    pruned.plan.save(tmp_path)
    small = tmp_path / "small.onnx"
    assert main(["plan", "apply", str(tmp_path), str(file), "--out", str(small), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["after"]["params"] == pruned.report["after"]["params"]
    with torch.no_grad():
        assert_close(ort(small, inputs)[0], pruned.model(*inputs))


def test_a_file_that_would_differ_is_not_written(tmp_path, monkeypatch):
    model = load_file(two_layers(tmp_path / "two.onnx"))
    from secateur.io.exchange import onnx_out

    honest = onnx_out.run_onnx
    monkeypatch.setattr(onnx_out, "run_onnx", lambda data, inputs: [honest(data, inputs)[0] + 1])
    with pytest.raises(SecateurError, match="differ"):
        export(model, torch.ones(1, 4), tmp_path / "out.onnx")
    assert not (tmp_path / "out.onnx").exists()


def test_a_name_without_a_format_and_a_missing_package_are_told(tmp_path, monkeypatch):
    with pytest.raises(SecateurError, match="onnx"):
        export(nn.Linear(2, 2), torch.ones(1, 2), tmp_path / "model.bin")
    monkeypatch.setitem(__import__("sys").modules, "onnx", None)
    with pytest.raises(SecateurError, match=r"pip install secateur\[onnx\]"):
        load_file(tmp_path / "two.onnx")


def encoder_decoder():
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"vocab_size": 30, "d_model": 16, "d_kv": 4, "d_ff": 32, "num_layers": 1, "num_heads": 4}
    model = T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0))
    return model, {"input_ids": torch.randint(30, (2, 6)), "decoder_input_ids": torch.randint(30, (2, 4))}


def mixture():
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = {
        "vocab_size": 30,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
    }
    experts = {"num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2}
    return MixtralForCausalLM(MixtralConfig(**sizes, **experts)), {"input_ids": torch.randint(30, (2, 6))}


@pytest.mark.parametrize("build", [encoder_decoder, mixture])
def test_caches_and_experts_are_written(build, tmp_path):
    """The parts of an encoder-decoder have configs of their own; stacked experts have no ONNX operation."""
    torch.manual_seed(0)
    model, inputs = build()
    before = model.config.to_dict()
    pruned = secateur.prune(model, inputs, **SETTINGS)
    found = export(pruned.model, inputs, tmp_path / "out.onnx")
    assert found["difference"] < 1e-5
    assert found["open"] == {name: [0, 1] for name in inputs}
    assert model.config.to_dict() == before
    if hasattr(model, "decoder"):
        assert model.decoder.config.use_cache
    else:
        assert pruned.model.get_experts_implementation() == model.get_experts_implementation()


def test_an_exporter_s_error_is_told_by_its_cause():
    from secateur.io.exchange.pt2 import told

    try:
        try:
            raise ValueError("no function for it\nand more")
        except ValueError as cause:
            raise RuntimeError("\x1b[96mThis is step 3/3\x1b[0m") from cause
    except RuntimeError as error:
        assert told(error) == "ValueError: no function for it"
        error.__cause__ = None
        assert told(error) == "RuntimeError: This is step 3/3"


class Projected(nn.Module):
    """An LSTM with a projection, and a squeeze of an axis that is longer than one."""

    def __init__(self):
        super().__init__()
        self.memory = nn.LSTM(4, 6, proj_size=3, bias=False, bidirectional=True, batch_first=True)

    def forward(self, x):
        return self.memory(x)[0].squeeze(1)


def test_what_onnx_lacks_is_written_by_its_parts(tmp_path):
    torch.manual_seed(0)
    result = secateur.export(Projected(), torch.randn(2, 2, 4), tmp_path / "a.onnx")
    assert result["difference"] < 1e-5


class Checked(nn.Module):
    """Its code checks values: a file can't."""

    def forward(self, x):
        torch._assert_async((x.abs() < 9).all(), "too large")
        return x * 2


def test_checks_of_values_are_left_out_of_a_file(tmp_path):
    assert secateur.export(Checked(), torch.randn(2, 3), tmp_path / "a.onnx")["difference"] == 0


class Packed(nn.Module):
    def __init__(self):
        super().__init__()
        self.memory = nn.GRU(4, 3, batch_first=True)

    def forward(self, x, lengths):
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True)
        return nn.utils.rnn.pad_packed_sequence(self.memory(packed)[0], batch_first=True)[0]


def test_a_model_that_a_program_can_t_express_is_refused_with_its_reason(tmp_path):
    with pytest.raises(SecateurError, match="packed sequence, whose sizes are values"):
        secateur.export(Packed(), (torch.randn(2, 3, 4), torch.tensor([3, 2])), tmp_path / "a.pt2")
    assert not (tmp_path / "a.pt2").exists()


class Picks(nn.Module):
    """The best two of four rows by their scores, which `spread` pulls apart."""

    def __init__(self, spread: float):
        super().__init__()
        self.scores = nn.Parameter(torch.tensor([3.0, 3.0 - spread, 3.0 - 2 * spread, 0.0]))
        self.rows = nn.Parameter(torch.arange(4.0))

    def forward(self, x):
        return x * self.rows[(self.scores * x.mean()).topk(2).indices]


@pytest.mark.parametrize("spread", [1.0, 1e-7])
def test_a_choice_that_rounding_decides_is_named_where_a_file_differs(tmp_path, monkeypatch, spread):
    from secateur.io.exchange import onnx_out

    monkeypatch.setattr(onnx_out, "onnx_bytes", lambda model, inputs: b"")
    monkeypatch.setattr(onnx_out, "open_sizes", lambda data: {})
    monkeypatch.setattr(onnx_out, "run_onnx", lambda data, inputs: [torch.tensor([9.0, 9.0])])
    with pytest.raises(SecateurError, match="differ") as error:
        export(Picks(spread).eval(), torch.tensor([1.0, 2.0]), tmp_path / "out.onnx")
    told = spread < 1e-3 and r"picks in topk (test_exchange.py:"
    assert (told in str(error.value)) if told else ("picks" not in str(error.value))


class Found(nn.Module):
    """As many rows as score above zero."""

    def forward(self, x):
        found = x[x[:, 0] > 0]
        return found if found.numel() > 4 else found + 1


def test_a_branch_on_a_number_of_finds_is_refused_with_its_line(tmp_path):
    with pytest.raises(
        SecateurError, match=r"number of boxes, .*test_exchange.py:\d+: return found if found.numel"
    ):
        export(Found(), torch.randn(6, 2), tmp_path / "out.pt2")
