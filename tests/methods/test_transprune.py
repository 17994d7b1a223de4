"""The worked examples and invariants of transprune."""

import torch

from secateur.method import make_method
from secateur.methods.transprune import variation
from secateur.testing import token_sets
from secateur.tokens.state import Facts


def row(*numbers):
    return torch.tensor([numbers], dtype=torch.float32)


def kept(mask):
    return mask[0].nonzero().squeeze(1).tolist()


def test_transprune_scores():
    """Spec: transprune (a): four positions, all of the image."""
    attention = (row([1, 0], [0, 2], [1, 1], [3, 4]), row([0, 1], [0, -1], [2, 2], [4, -3]))
    mlp = (row([1, 1], [1, 0], [0, 1], [1, -1]), row([1, 1], [0, 1], [0, -2], [1, 1]))
    for turn, expected in (
        ("code", [0.196612, 0.267223, 0.144659, 0.196612]),
        ("paper", [0.365529, 0.067235, 0.268941, 0.365529]),
    ):
        ratio, change = variation(*attention, turn)
        torch.testing.assert_close(
            ratio * change / change.sum(1, keepdim=True), row(*expected), atol=1e-6, rtol=0
        )
    changes = {}
    for name, pair in (("attention", attention), ("mlp", mlp)):
        changes["layer:6", name] = pair
        changes["layer:6", name, "whole"] = (*pair, torch.ones(1, 4, dtype=torch.bool))
    sets = token_sets(
        torch.zeros(1, 4, 2),
        keep=2,
        transition=changes,
        attention={("layer:7:peek", "text"): row(0.02, 0.01, 0.05, 0.04)},
    )
    assert kept(make_method("transprune").cut([6], "layer:7:peek", 0.0, sets)) == [2, 3]
    torch.testing.assert_close(
        sets.carried["variation"], row(0.268941, 0.463835, 1.213552, 0.393224), atol=1e-6, rtol=0
    )


def test_transprune_cuts_after_the_published_layers():
    method = make_method("transprune")
    assert [stage.at for stage in method.stages(Facts(layers=32))] == ["layer:7", "layer:9", "layer:12"]
    assert method.stages(Facts(layers=32))[1].records == (
        "layer:7:modules",
        "layer:8:modules",
        "layer:9:peek",
    )
