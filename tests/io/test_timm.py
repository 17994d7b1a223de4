"""timm models that timm itself can express: saved folders that `timm.create_model("local-dir:...")` loads."""

import functools
import json
from pathlib import Path

import pytest
import torch

import secateur
from secateur.errors import SecateurError
from secateur.io.artefact import save_model
from secateur.surgery import cut_units
from secateur.surgery.arguments import constructor_arguments, shape_distance

timm = pytest.importorskip("timm")

# Without its arguments a model that isn't its name's default gets a loader instead; the tests of that form run everywhere.
keeps_arguments = pytest.mark.skipif(
    not hasattr(timm.create_model("vit_tiny_patch16_224", depth=1), "_model_args"),
    reason=f"timm {timm.__version__} keeps no arguments of a model; timm 1.0.31 does",
)

VIT = {"img_size": 32, "embed_dim": 48, "num_heads": 4, "depth": 3, "num_classes": 7}


def vit(**changes):
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", **VIT, **changes).eval()


def outputs(model, x):
    with torch.no_grad():
        return model(x)


@keeps_arguments
@pytest.mark.parametrize(
    ("kinds", "target", "expected"),
    [
        (("neurons",), "25%", {"mlp_ratio": 1.0}),
        (("neurons", "hidden", "heads"), "50%", {"embed_dim": 24, "num_heads": 2}),
        (("layers",), "67%", {"depth": 2}),
    ],
)
def test_a_uniform_cut_loads_with_plain_timm(kinds, target, expected, tmp_path: Path) -> None:
    x = torch.randn(2, 3, 32, 32)
    model = vit()
    if kinds == ("layers",):
        graph = secateur.trace(model, x)
        group = next(g for g in graph.groups if g.kind == "layers")
        cut_units(model, graph, {group.name: torch.tensor([0, 2])})
        save_model(model, tmp_path / "small")
        cut = model
    else:
        pruned = secateur.prune(model, x, method="group-magnitude", target=target, kinds=kinds)
        pruned.save(tmp_path / "small")
        cut = pruned.model
    document = json.loads((tmp_path / "small" / "config.json").read_text())
    assert {key: document["model_args"][key] for key in expected} == expected
    assert not (tmp_path / "small" / "load_pruned.py").exists()
    loaded = timm.create_model(f"local-dir:{tmp_path / 'small'}", pretrained=True).eval()
    assert shape_distance(cut, loaded)[0] == 0
    torch.testing.assert_close(outputs(loaded, x), outputs(cut, x), rtol=1e-5, atol=1e-6)
    ours, _ = secateur.load(tmp_path / "small")
    torch.testing.assert_close(outputs(ours, x), outputs(cut, x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "given", "expected"),
    [
        ("convnext_atto", {}, {"dims": (20, 40, 80, 160)}),
        ("convnext_atto", {}, {"depths": (2, 1, 6, 2)}),
        ("resnet26d", {}, {"channels": (32, 64, 128, 256), "stem_width": 16}),
        ("resnet26", {}, {"base_width": 48}),
        ("vit_tiny_patch16_224", {"img_size": 32}, {"depth": 5, "embed_dim": 96}),
    ],
)
def test_the_arguments_of_a_model_are_found_from_its_shapes(name, given, expected) -> None:
    with torch.device("meta"):
        wanted = timm.create_model(name, **given, **expected)
    found = constructor_arguments(wanted, functools.partial(timm.create_model, name, **given))
    assert found == expected


def test_layers_that_differ_are_no_constructor_s() -> None:
    model = vit()
    graph = secateur.trace(model, torch.randn(1, 3, 32, 32))
    cut_units(model, graph, {"blocks.1.mlp:neurons": torch.arange(20)})
    calls = []

    def build(**values):
        calls.append(values)
        return vit(**values)

    assert constructor_arguments(model, build) is None
    assert calls == [{}]


def test_a_cut_that_timm_cannot_express_keeps_its_loader(tmp_path: Path) -> None:
    model = vit()
    graph = secateur.trace(model, torch.randn(1, 3, 32, 32))
    cut_units(model, graph, {"blocks.1.mlp:neurons": torch.arange(20)})
    about = save_model(model, tmp_path / "small")
    assert about["form"] == "module" and "vit_tiny" in about["why"]
    assert not (tmp_path / "small" / "config.json").exists()


def test_shapes_that_fit_are_not_enough(tmp_path: Path) -> None:
    """No argument sets the epsilon of the norms, which no shape shows."""
    model = vit()
    model.norm.eps = 0.5
    about = save_model(model, tmp_path / "small")
    assert about["form"] == "module"
    loaded, _ = secateur.load(tmp_path / "small")
    assert all(tensor.data_ptr() % 64 == 0 for tensor in loaded.parameters())
    x = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(outputs(loaded, x), outputs(model, x), rtol=1e-5, atol=1e-6)


@keeps_arguments
def test_the_dtype_is_kept_and_damage_is_named(tmp_path: Path) -> None:
    model = vit(mlp_ratio=2.0).to(torch.bfloat16)
    save_model(model, tmp_path / "small")
    loaded, _ = secateur.load(tmp_path / "small")
    assert next(loaded.parameters()).dtype == torch.bfloat16
    file = tmp_path / "small" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(SecateurError, match="timm can't load it"):
        secateur.load(tmp_path / "small")
