"""What the user protects by name stays bit for bit, and the rest makes up for it."""

import json

import pytest
import torch
from torch import nn

import secateur
from secateur import SecateurError
from secateur.cli.main import main


def tokens(model):
    return torch.arange(48).reshape(2, 24) % model.config.vocab_size


def same(first, second, name):
    return torch.equal(first.state_dict()[name], second.state_dict()[name])


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
@pytest.mark.parametrize("allocation", ["uniform", "global", "per-kind"])
def test_protected_weights_stay_and_the_budget_is_met_exactly(tiny_llama, method, allocation):
    model = tiny_llama()
    settings = {"data": tokens(model), "seqlen": 24, "allocation": allocation}
    pruned = secateur.prune(model, method=method, target="60%", keep=("*.layers.0.mlp",), **settings)
    names = [n for n, p in model.named_parameters() if ".layers." in n and p.dim() == 2]
    for name in names:
        assert same(model, pruned.model, name) == name.startswith("model.layers.0.mlp")
    whole = sum(model.get_parameter(n).numel() for n in names)
    left = sum(int((pruned.model.get_parameter(n) != 0).sum()) for n in names)
    assert left == int(0.6 * whole) and pruned.report["met"]
    assert list(pruned.plan.options["keep"]) == ["*.layers.0.mlp"]


def test_only_is_the_other_way_round(tiny_llama):
    model = tiny_llama()
    pruned = secateur.prune(model, method="magnitude", target="80%", only=("*.mlp.up_proj", "*.q_proj"))
    changed = {name for name in model.state_dict() if not same(model, pruned.model, name)}
    assert changed == {
        f"model.layers.{i}.{part}.weight" for i in (0, 1) for part in ("mlp.up_proj", "self_attn.q_proj")
    }


def test_n_of_m_leaves_protected_matrices_whole(tiny_llama):
    pruned = secateur.prune(tiny_llama(), method="magnitude", target="2:4", keep=("*.layers.1",))
    assert pruned.plan.masks and not any(".layers.1." in name for name in pruned.plan.masks)


def test_protected_units_stay_and_the_report_says_why(tiny_llama):
    model = tiny_llama()
    pruned = secateur.prune(
        model, method="random-structured", target="macs<=75%", keep=("model.layers.0",), seqlen=24
    )
    for name in model.state_dict():
        if name.startswith("model.layers.0."):
            assert same(model, pruned.model, name)
    assert pruned.report["after"]["macs"] <= 0.75 * pruned.report["before"]["macs"]
    reasons = {g["name"]: g["reason"] for g in pruned.report["groups"]}
    assert "protected by keep 'model.layers.0'" in reasons["model.layers.0.mlp:neurons"]


def test_a_coupled_group_is_protected_by_any_of_its_tensors():
    """A residual couples both convolutions: protecting one protects the channels they share."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.same = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
            self.free, self.head = nn.Conv2d(8, 6, 1), nn.Linear(6, 4)

        def forward(self, x):
            x = self.stem(x).relu()
            return self.head(self.free(x + self.same(x)).relu().mean((2, 3)))

    torch.manual_seed(0)
    net = Net()
    x = torch.randn(2, 3, 8, 8)
    pruned = secateur.prune(net, x, method="group-magnitude", target="50%", keep=("same",))
    assert pruned.model.stem.out_channels == 8 and pruned.model.free.out_channels == 3


def test_what_cannot_be_is_named(tiny_llama):
    model = tiny_llama()
    with pytest.raises(
        SecateurError, match=r"keep: no parameter fits 'layers\.0\.mpl'.*nearest.*layers\.0\.mlp"
    ):
        secateur.prune(model, method="magnitude", target="50%", keep=("layers.0.mpl",))
    with pytest.raises(
        SecateurError, match="are protected, which alone is over the target.*ask for more than"
    ):
        secateur.prune(model, method="magnitude", target="20%", keep=("*.layers.0",))
    with pytest.raises(SecateurError, match="every weight is protected"):
        secateur.prune(model, method="magnitude", target="50%", keep=("model",))


def test_on_the_command_line(tiny_folder, tmp_path, capsys):
    flags = ["--method", "magnitude", "--target", "60%", "--keep", "lm_head,*.layers.0.*", "--json"]
    assert main(["prune", str(tiny_folder), *flags, "--out", str(tmp_path / "out")]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["met"] and all(".layers.1." in row["name"] for row in report["weights"])
