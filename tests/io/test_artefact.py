"""Artefacts: what is written loads without secateur and computes the same numbers."""

import copy
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import secateur
from secateur.errors import SecateurError
from secateur.io import module as io_module
from secateur.io import transformers as io_transformers
from secateur.io.artefact import load, save_model
from secateur.io.reshape import compare, reshape
from secateur.pruning.plan import Plan

IDS = torch.arange(10).reshape(1, 10)

OUTSIDE = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "secateur":
            raise ImportError("secateur is blocked")
sys.meta_path.insert(0, Blocked())
import json
import torch
from pathlib import Path
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
torch.set_num_threads(1)
ids = torch.arange(10).reshape(1, 10)
out = {}
for folder in sorted(Path(sys.argv[1]).iterdir()):
    custom = (folder / "modeling_pruned.py").exists()
    try:
        AutoModelForCausalLM.from_pretrained(folder, **({} if custom else {"trust_remote_code": False}))
    except ValueError as error:
        assert custom and "trust_remote_code=True" in str(error), error
    else:
        assert not custom, "loaded silently without the code that re-shapes it"
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=custom).eval()
    with torch.no_grad():
        out[folder.name + "/logits"] = model(ids).logits
    for cache in (True, False):
        out[folder.name + f"/generate{cache:d}"] = model.generate(
            ids, max_new_tokens=6, do_sample=False, use_cache=cache, pad_token_id=0
        )
    if custom:  # fine-tuned and saved by transformers alone, it still loads
        model.save_pretrained(Path(sys.argv[2]) / folder.name)
        again = AutoModelForCausalLM.from_pretrained(Path(sys.argv[2]) / folder.name, trust_remote_code=True)
        out[folder.name + "/again"] = again.eval()(ids).logits.detach()
assert "secateur" not in sys.modules
save_file(out, sys.argv[3])
"""


def cut_neurons(model: nn.Module, layer: int, keep: list[int]) -> None:
    mlp = model.model.layers[layer].mlp
    for name in ("gate_proj", "up_proj"):
        linear = getattr(mlp, name)
        linear.weight = nn.Parameter(linear.weight.detach()[keep])
        linear.out_features = len(keep)
    mlp.down_proj.weight = nn.Parameter(mlp.down_proj.weight.detach()[:, keep])
    mlp.down_proj.in_features = mlp.intermediate_size = len(keep)


def cut_kv_groups(model: nn.Module, layer: int, keep: list[int]) -> None:
    attention = model.model.layers[layer].self_attn
    queries = attention.num_key_value_groups

    def rows(heads: list[int]) -> list[int]:
        return [h * attention.head_dim + i for h in heads for i in range(attention.head_dim)]

    kv, q = rows(keep), rows([h * queries + i for h in keep for i in range(queries)])
    for name, index in (("q_proj", q), ("k_proj", kv), ("v_proj", kv)):
        linear = getattr(attention, name)
        linear.weight = nn.Parameter(linear.weight.detach()[index])
        linear.out_features = len(index)
    attention.o_proj.weight = nn.Parameter(attention.o_proj.weight.detach()[:, q])
    attention.o_proj.in_features = len(q)


def cut_layers(model: nn.Module, keep: list[int]) -> None:
    model.model.layers = nn.ModuleList(model.model.layers[i] for i in keep)
    for index, layer in enumerate(model.model.layers):
        layer.self_attn.layer_idx = index
    model.config.num_hidden_layers = len(keep)


def layers_plan(keep: list[int], size: int) -> Plan:
    name = "model.layers:layers"
    return Plan("by-hand", "50%", keep={name: torch.tensor(keep)}, sizes={name: size}, kinds={name: "layers"})


def every_form(tiny_llama: Callable[..., nn.Module], folder: Path) -> dict[str, nn.Module]:
    """Cut models by name, saved under `folder`."""
    models: dict[str, nn.Module] = {}

    def put(name: str, model: nn.Module, form: str, dense: Any, plan: Plan | None = None) -> None:
        about = save_model(model, folder / name, dense_config=dense, plan=plan)
        assert about["form"] == form, about
        models[name] = model

    model = tiny_llama(tie_word_embeddings=True)
    dense = copy.deepcopy(model.config)
    for layer in (0, 1):
        cut_neurons(model, layer, list(range(3, 31)))
    model.config.intermediate_size = 28
    put("uniform_neurons_tied", model, "plain", dense)

    model = tiny_llama(num_hidden_layers=4)
    dense = copy.deepcopy(model.config)
    cut_layers(model, [0, 3])
    put("fewer_layers", model, "plain", dense, layers_plan([0, 3], 4))

    model = tiny_llama(num_hidden_layers=3, tie_word_embeddings=True)
    dense = copy.deepcopy(model.config)
    cut_neurons(model, 0, [1, 5, 7])
    cut_kv_groups(model, 0, [1])
    cut_layers(model, [0, 2])
    put("layers_differ_tied", model, "custom", dense, layers_plan([0, 2], 3))

    model = tiny_llama()
    dense = copy.deepcopy(model.config)
    down = model.model.layers[1].mlp.down_proj
    down.bias = nn.Parameter(torch.randn(32))
    put("new_bias", model, "custom", dense)

    model = tiny_llama()
    dense = copy.deepcopy(model.config)
    model.model.layers[0].self_attn.scaling = 0.25
    put("attribute_only", model, "custom", dense)

    model = tiny_llama(hidden_size=48, num_attention_heads=6, head_dim=8, num_key_value_heads=6)
    dense = copy.deepcopy(model.config)
    for layer in (0, 1):
        cut_kv_groups(model, layer, [0, 1, 2, 3, 5])
    model.config.num_attention_heads = model.config.num_key_value_heads = 5  # 48 % 5: its config refuses
    put("uniform_but_refused", model, "custom", dense)
    return models


def test_transformers_artefacts_load_where_secateur_cannot_be_imported(
    tiny_llama: Callable[..., nn.Module], tmp_path: Path
) -> None:
    models = every_form(tiny_llama, tmp_path / "saved")
    script, out = tmp_path / "outside.py", tmp_path / "out.safetensors"
    script.write_text(OUTSIDE)
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path / "saved"), str(tmp_path / "again"), str(out)],
        check=False,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        cwd=tmp_path,
        env={"PATH": "", "HF_HOME": str(tmp_path / "hf"), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    got = load_file(out)
    for name, model in models.items():
        with torch.no_grad():
            torch.testing.assert_close(got[f"{name}/logits"], model(IDS).logits, rtol=0, atol=1e-6)
        tokens = model.generate(IDS, max_new_tokens=6, do_sample=False, pad_token_id=0)
        assert torch.equal(got[f"{name}/generate1"], tokens)
        assert torch.equal(got[f"{name}/generate0"], tokens)
        if f"{name}/again" in got:
            assert torch.equal(got[f"{name}/again"], got[f"{name}/logits"])


def test_load_gives_back_the_model_and_runs_no_code_of_the_folder(
    tiny_llama: Callable[..., nn.Module], tmp_path: Path
) -> None:
    for name, model in every_form(tiny_llama, tmp_path).items():
        if (code := tmp_path / name / "modeling_pruned.py").exists():
            assert len(code.read_text().splitlines()) < 90
            code.write_text("raise SystemExit('the code of the folder was run')")
        loaded, tokenizer = load(tmp_path / name)
        assert tokenizer is None and not loaded.training
        assert {n: tuple(p.shape) for n, p in loaded.named_parameters()} == {
            n: tuple(p.shape) for n, p in model.named_parameters()
        }
        with torch.no_grad():
            assert torch.equal(loaded(IDS).logits, model(IDS).logits)
        assert loaded.config.num_hidden_layers == len(loaded.model.layers)


@pytest.mark.parametrize(
    ("family", "kind", "form"),
    [
        ("Llama", "neurons", "plain"),
        ("Llama", "hidden", "plain"),
        ("Gemma2", "hidden", "custom"),
        ("GPT2", "heads", "custom"),
    ],
)
def test_what_surgery_cut_takes_the_simplest_form_that_computes_the_same(
    family: str, kind: str, form: str, tmp_path: Path
) -> None:
    """Modules keep stale numbers, such as the old intermediate_size, that nothing reads; but Gemma scales its embedding
    by the root of the dense width, and GPT-2 can't have heads that don't fill its width."""
    import transformers

    from secateur.graph import trace
    from secateur.surgery import cut_units

    sizes: dict[str, Any] = {
        "vocab_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "hidden_size": 32,
    }
    if family != "GPT2":
        sizes |= {"num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 48}
    config = getattr(transformers, f"{family}Config")(**sizes, max_position_embeddings=64)
    cls = getattr(transformers, f"{family}LMHeadModel" if family == "GPT2" else f"{family}ForCausalLM")
    model = cls(config).eval()
    dense = copy.deepcopy(model.config)
    graph = trace(model, {"input_ids": IDS})
    keep = {group.name: torch.arange(group.size // 2) for group in graph.prunable(kind)}
    cut_units(model, graph, keep)
    with torch.no_grad():
        expected = model(IDS).logits
    about = save_model(model, tmp_path / "out", dense_config=dense)
    assert about["form"] == form, about
    loaded, _ = load(tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(loaded(IDS).logits, expected)
        assert torch.equal(model(IDS).logits, expected)
    tokens = model.generate(IDS, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert torch.equal(loaded.generate(IDS, max_new_tokens=4, do_sample=False, pad_token_id=0), tokens)


def test_a_loaded_custom_model_is_cut_and_saved_again(
    tiny_llama: Callable[..., nn.Module], tmp_path: Path
) -> None:
    model = tiny_llama(num_hidden_layers=4)
    dense = copy.deepcopy(model.config)
    cut_neurons(model, 3, [0, 1, 2])
    cut_layers(model, [0, 2, 3])
    save_model(model, tmp_path / "one", dense_config=dense, plan=layers_plan([0, 2, 3], 4))
    model, _ = load(tmp_path / "one")
    before = copy.deepcopy(model.config)
    cut_layers(model, [1, 2])
    cut_neurons(model, 0, [4, 5])
    save_model(model, tmp_path / "two", dense_config=before, plan=layers_plan([1, 2], 3))
    document = json.loads((tmp_path / "two" / "config.json").read_text())
    assert document["pruned"]["blocks"] == {"model.layers": [2, 3]}
    assert document["num_hidden_layers"] == 4 and document["model_type"] == "pruned_llama"
    again, _ = load(tmp_path / "two")
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, model(IDS).logits)


def test_blocks_of_different_kinds_are_found_by_the_plan(tmp_path: Path) -> None:
    from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

    config = Qwen2MoeConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=24,
        moe_intermediate_size=8,
        shared_expert_intermediate_size=8,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_experts=4,
        num_experts_per_tok=2,
        mlp_only_layers=[1],
    )
    model = Qwen2MoeForCausalLM(config).eval()
    dense = copy.deepcopy(config)
    cut_layers(model, [0, 1, 3])
    model.config.layer_types = model.config.layer_types[:3]
    cut_neurons(model, 1, [0, 2])
    about = save_model(model, tmp_path / "moe", dense_config=dense, plan=layers_plan([0, 1, 3], 4))
    assert about["form"] == "custom"
    loaded, _ = load(tmp_path / "moe")
    with torch.no_grad():
        torch.testing.assert_close(loaded(IDS).logits, model(IDS).logits)


def test_conv1d_positions_and_attributes_of_another_family(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=16, n_layer=2, n_head=2, n_positions=32)).eval()
    dense = copy.deepcopy(model.config)
    mlp, keep = model.transformer.h[0].mlp, [0, 9, 20]
    mlp.c_fc.weight = nn.Parameter(mlp.c_fc.weight.detach()[:, keep])
    mlp.c_fc.bias = nn.Parameter(mlp.c_fc.bias.detach()[keep])
    mlp.c_proj.weight = nn.Parameter(mlp.c_proj.weight.detach()[keep])
    mlp.c_fc.nf = mlp.c_proj.nx = 3
    about = save_model(model, tmp_path / "gpt2", dense_config=dense)
    assert about["load"] == "AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)"
    loaded, _ = load(tmp_path / "gpt2")
    with torch.no_grad():
        assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    assert loaded.transformer.h[0].mlp.c_fc.nf == 3


def test_large_models_are_sharded(
    tiny_llama: Callable[..., nn.Module], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(io_transformers, "SHARD_BYTES", 20_000)
    model = tiny_llama(tie_word_embeddings=True)
    save_model(model, tmp_path / "plain")
    assert len(list((tmp_path / "plain").glob("model-*.safetensors"))) > 1
    loaded, _ = load(tmp_path / "plain")
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    net = Net()
    save_model(net, tmp_path / "net")
    assert len(list((tmp_path / "net").glob("model*.safetensors"))) == 1
    monkeypatch.setattr(io_module, "SHARD_BYTES", 300)
    save_model(net, tmp_path / "parts")
    assert len(list((tmp_path / "parts").glob("model-*.safetensors"))) > 1
    assert same_state(load(tmp_path / "parts", model=Net())[0], net)


def test_tokenizer_plan_and_report_lie_beside_the_weights(
    tiny_llama: Callable[..., nn.Module], tmp_path: Path
) -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {"<unk>": 0, "to": 1, "be": 2}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, "<unk>")))
    plan = layers_plan([0, 1], 2)
    plan.masks = {"lm_head.weight": torch.rand(64, 32) > 0.5}
    model = tiny_llama()
    cut_neurons(model, 0, [0])
    save_model(model, tmp_path / "out", tokenizer=tokenizer, plan=plan, report={"method": "by-hand"})
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["method"] == "by-hand" and report["artefact"]["form"] == "custom"
    assert "gate_proj.weight is [1, 32], the config says [48, 32]" in report["artefact"]["why"]
    assert Plan.load(tmp_path / "out") == plan
    _, found = load(tmp_path / "out")
    assert found("be")["input_ids"] == [2]
    pickles = [p.name for p in (tmp_path / "out").iterdir() if p.suffix in (".bin", ".pt", ".pkl", ".pth")]
    assert not pickles


def test_bfloat16_is_kept(tiny_llama: Callable[..., nn.Module], tmp_path: Path) -> None:
    model = tiny_llama().bfloat16()
    cut_neurons(model, 0, [0, 1])
    save_model(model, tmp_path / "out")
    loaded, _ = load(tmp_path / "out")
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    assert next(load(tmp_path / "out", dtype=torch.float32)[0].parameters()).dtype == torch.float32
    net = Net().bfloat16()
    save_model(net, tmp_path / "net")
    assert same_state(load(tmp_path / "net", model=Net())[0], net)


# Folders and disks


def test_a_folder_that_is_not_empty_is_refused(tiny_llama: Callable[..., nn.Module], tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(SecateurError, match="not empty"):
        save_model(tiny_llama(), tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]
    (tmp_path / "empty").mkdir()
    save_model(tiny_llama(), tmp_path / "empty")
    assert (tmp_path / "empty" / "config.json").exists()


@pytest.mark.parametrize("kind", ["transformers", "module"])
def test_a_full_disk_leaves_nothing(kind: str, tiny_llama: Callable[..., nn.Module], tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    model = tiny_llama() if kind == "transformers" else nn.Linear(200, 200)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))  # the system refuses longer files
    try:
        with pytest.raises(SecateurError, match="disk is full"):
            save_model(model, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["empty", "damaged", "truncated", "foreign class"])
def test_what_cannot_be_loaded_says_so(
    kind: str, tiny_llama: Callable[..., nn.Module], tmp_path: Path
) -> None:
    folder = tmp_path / "out"
    model = tiny_llama()
    cut_neurons(model, 0, [0, 1])
    save_model(model, folder)
    if kind == "empty":
        folder = tmp_path
    elif kind == "damaged":
        (folder / "config.json").write_text("{")
    elif kind == "truncated":
        weights = folder / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:1000])
    else:
        document = json.loads((folder / "config.json").read_text())
        document["pruned"]["class"] = "os:system"
        (folder / "config.json").write_text(json.dumps(document))
    with pytest.raises(SecateurError, match=str(folder)):
        load(folder)


# Modules that aren't transformers'


class Net(nn.Module):
    """A tied pair, a bare parameter, a buffer that isn't saved, a norm, a grouped convolution, a width in forward."""

    def __init__(self, width: int = 8):
        super().__init__()
        self.width = width
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)
        self.depthwise = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.scale = nn.Parameter(torch.rand(width))
        self.register_buffer("offset", torch.rand(width), persistent=False)
        self.first = nn.Linear(width, 6)
        self.second = nn.Linear(width, 6, bias=False)
        self.second.weight = self.first.weight
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        x = self.depthwise(torch.relu(self.norm(self.stem(x)))).mean((-1, -2))
        x = x.view(-1, self.width) * self.scale + self.offset
        return self.first(x) + self.second(x)


def cut_net(net: Net, keep: list[int]) -> Net:
    for module, names in (
        (net.stem, ("weight", "bias")),
        (net.norm, ("weight", "bias", "running_mean", "running_var")),
        (net.depthwise, ("weight", "bias")),
        (net, ("scale", "offset")),
    ):
        for name in names:
            old = getattr(module, name)
            new = old.detach()[keep]
            setattr(module, name, nn.Parameter(new) if isinstance(old, nn.Parameter) else new)
    net.first.weight = net.second.weight = nn.Parameter(net.first.weight.detach()[:, keep])
    size = len(keep)
    net.width = net.stem.out_channels = net.norm.num_features = net.first.in_features = (
        net.second.in_features
    ) = size
    net.depthwise.in_channels = net.depthwise.out_channels = net.depthwise.groups = size
    return net


def same_state(one: nn.Module, other: nn.Module) -> bool:
    left = {**dict(one.named_parameters()), **dict(one.named_buffers())}
    right = {**dict(other.named_parameters()), **dict(other.named_buffers())}
    return left.keys() == right.keys() and all(
        left[k].dtype == right[k].dtype and torch.equal(left[k], right[k]) for k in left
    )


def run_loader(folder: Path, build: str) -> dict[str, Tensor]:
    """What load_pruned.py gives in a process without secateur and transformers: outputs on ones."""
    script = (
        "import sys\n"
        "class Blocked:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.partition('.')[0] in ('secateur', 'transformers'): raise ImportError(name)\n"
        "sys.meta_path.insert(0, Blocked())\n"
        "import torch\ntorch.set_num_threads(1)\nfrom load_pruned import load\nfrom safetensors.torch import save_file\n"
        f"{build}\n"
        "with torch.no_grad(): save_file({'y': model(torch.ones(1, 3, 64, 64))}, 'y.safetensors')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=folder,
        check=False,
        capture_output=True,
        text=True,
        env={"PATH": "", "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{folder}:{Path(__file__).parent}"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return load_file(folder / "y.safetensors")["y"]


def test_a_plain_module_is_rebuilt_from_a_dense_one(tmp_path: Path) -> None:
    net = cut_net(Net(), [0, 2, 7])
    about = save_model(net, tmp_path / "net")
    assert about["form"] == "module" and "isn't a transformers model" in about["why"]
    loaded, _ = load(tmp_path / "net", model=Net())
    x = torch.rand(2, 3, 5, 5)
    with torch.no_grad():
        assert torch.equal(loaded(x), net(x))
    assert same_state(loaded, net) and loaded.first.weight is loaded.second.weight
    assert loaded.depthwise.groups == 3 and repr(loaded) == repr(net)
    with pytest.raises(SecateurError, match="model="):
        load(tmp_path / "net")
    with pytest.raises(SecateurError, match="freshly built"):
        load(tmp_path / "net", model=nn.Linear(2, 2))


def test_a_timm_model_is_rebuilt_by_its_name_without_secateur(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    model = timm.create_model("resnet10t", num_classes=5, in_chans=3).eval()
    block = model.layer1[0]
    keep = [0, 3, 5]
    for module, dim in ((block.conv1, 0), (block.conv2, 1)):
        module.weight = nn.Parameter(module.weight.detach().index_select(dim, torch.tensor(keep)))
    block.conv1.out_channels = block.conv2.in_channels = block.bn1.num_features = 3
    for name in ("weight", "bias"):
        setattr(block.bn1, name, nn.Parameter(getattr(block.bn1, name).detach()[keep]))
    for name in ("running_mean", "running_var"):
        setattr(block.bn1, name, getattr(block.bn1, name)[keep])
    model.layer4 = nn.Sequential(*model.layer4)
    save_model(model, tmp_path / "net")
    document = json.loads((tmp_path / "net" / "model.json").read_text())
    assert document["timm"].pop("in_chans", 3) == 3  # said by a timm that keeps its arguments
    assert document["timm"] == {
        "model_name": "resnet10t",
        "pretrained": False,
        "num_classes": 5,
    }
    assert document["pruned"]["shapes"]["layer1.0.conv1.weight"] == [3, 64, 3, 3]
    assert len(document["pruned"]["shapes"]) == 6
    loaded, _ = load(tmp_path / "net")
    assert same_state(loaded, model)
    with torch.no_grad():
        expected = model(torch.ones(1, 3, 64, 64))
    torch.testing.assert_close(run_loader(tmp_path / "net", "model = load()"), expected)


def test_blocks_and_identities_of_a_plain_module(tmp_path: Path) -> None:
    def build() -> nn.Module:
        torch.manual_seed(1)
        return nn.Sequential(*[nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)) for _ in range(4)])

    model = build()
    table = {
        "blocks": {"": [0, 2, 3]},
        "identity": ["1.1"],
        "absent": {},
        "constants": [],
        "novices": [],
        "shapes": {},
        "attributes": {},
    }
    reshape(model, table)
    assert len(model) == 3 and torch.equal(model[1][0].weight, build()[2][0].weight)
    found = compare(model, build(), {"": [0, 2, 3]})
    assert found == table
    with pytest.raises(SecateurError, match="in the pruned model only"):
        compare(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), nn.Sequential(nn.Linear(2, 2)))


def test_state_that_is_not_tensors_is_refused(tmp_path: Path) -> None:
    class Odd(nn.Linear):
        def get_extra_state(self) -> dict[str, int]:
            return {"seen": 3}

        def set_extra_state(self, state: Any) -> None:
            pass

    with pytest.raises(SecateurError, match="more than tensors"):
        save_model(Odd(2, 2), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_tensor_written_by_hand_is_refused_where_it_is_too_few(tmp_path: Path) -> None:
    save_model(Net(), tmp_path / "net")
    state = load_file(tmp_path / "net" / "model.safetensors")
    del state["scale"]
    save_file(state, tmp_path / "net" / "model.safetensors")
    with pytest.raises(SecateurError, match="missing.*scale"):
        load(tmp_path / "net", model=Net())


def test_a_pickled_checkpoint_is_never_opened(tiny_llama: Callable[..., nn.Module], tmp_path: Path) -> None:
    save_model(tiny_llama(), tmp_path / "out")
    (tmp_path / "out" / "model.safetensors").unlink()
    (tmp_path / "out" / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    with pytest.raises(SecateurError, match="safetensors"):
        load(tmp_path / "out")


def test_a_config_with_an_infinity_comes_back(tmp_path):
    """JSON has no infinity: transformers writes it in another form, which has to be read as such."""
    from transformers import Mamba2Config, Mamba2ForCausalLM

    sizes = {
        "vocab_size": 20,
        "hidden_size": 16,
        "num_heads": 4,
        "head_dim": 8,
        "n_groups": 2,
        "state_size": 4,
    }
    torch.manual_seed(0)
    model = Mamba2ForCausalLM(Mamba2Config(**sizes, chunk_size=4, num_hidden_layers=1)).eval()
    ids = torch.randint(3, 20, (2, 5))
    pruned = secateur.prune(model, {"input_ids": ids}, method="group-magnitude", target="macs<=70%")
    pruned.save(tmp_path / "out")
    again, _ = secateur.load(tmp_path / "out")
    assert (tmp_path / "out" / "modeling_pruned.py").exists() and again.config.time_step_limit[1] == float(
        "inf"
    )
    torch.testing.assert_close(again(ids).logits, pruned.model(ids).logits)
