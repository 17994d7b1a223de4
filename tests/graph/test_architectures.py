"""Half of every prunable group of current architectures in one call, without a word about any of them.

The ones that take seconds run always, in shards of about equal length (`-k shard0`); the rest are marked slow.
`benchmarks/architectures.py` measures the whole list, one process a model.
"""

import importlib.util
from pathlib import Path

import pytest
import torch

from secateur.graph import trace
from secateur.surgery import cut_units, prove

pytest.importorskip("timm")

PATH = Path(__file__).parents[2] / "benchmarks" / "architectures.py"
SPEC = importlib.util.spec_from_file_location("architectures", PATH)
architectures = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(architectures)

NAMES = architectures.names()
SLOW = (
    "beit_ beitv2_ cait_ convmixer_ convnext_atto crossvit_ densenet121 efficientformer focalnet_ gcvit_ gernet_ hgnetv2_ "
    "hiera_ hrnet_ inception legacy_xception mambaout mixer_s32 mobilenetv4 mvitv2 nextvit nf_ pit_ rdnet resnet50 resnext50 "
    "samvit selecsls sequencer2d swin tresnet twins vgg11 visformer vit_relpos vitamin volo xception41"
)
QUICK = [n for n in NAMES if n.startswith("hf:") or not any(part in n for part in SLOW.split(" "))]
COARSE = 0.45
# hidden states that a model returns stay whole; four heads and four chunks of one stream leave no unit
KNOWN = {"hf:t5": 0.65, "hf:clip": 0.7, "timm:edgenext_xx_small": 0.65}

# as wide as published, and less deep where timm's constructors allow it
SHALLOW = {
    "timm:beit_base_patch16_224": {"depth": 3},
    "timm:beitv2_base_patch16_224": {"depth": 3},
    "timm:crossvit_tiny_240": {"depth": [[1, 2, 0]] * 3},
    "timm:densenet121": {"block_config": (2, 2, 4, 2)},
    "timm:dpn68": {"k_sec": (1, 1, 2, 1)},
    "timm:res2net50_26w_4s": {"layers": [1, 1, 2, 1]},
    "timm:samvit_base_patch16_224": {"depth": 3, "global_attn_indexes": [2]},
    "timm:swin_tiny_patch4_window7_224": {"depths": (1, 1, 2, 1)},
    "timm:swinv2_tiny_window8_256": {"depths": (1, 1, 2, 1)},
    "timm:tnt_s_patch16_224": {"depth": 3},
    "timm:vit_relpos_small_patch16_224": {"depth": 3},
}


def parameters():
    for n, name in enumerate(NAMES):
        marks = [] if name in QUICK else [pytest.mark.slow]
        yield pytest.param(name, id=f"shard{n % 4}-{name}", marks=marks)


def test_the_list_is_the_published_one():
    assert len(NAMES) == len(set(NAMES)) == 100
    assert set(QUICK) <= set(NAMES) and SHALLOW.keys() <= set(NAMES)


@pytest.mark.parametrize("name", parameters())
def test_half_of_everything(name):
    model, inputs = architectures.build(name, **SHALLOW.get(name, {}))
    before = sum(p.numel() for p in model.parameters())
    shapes = [tuple(o.shape) for o in architectures.outputs(model, architectures.one(inputs))]
    graph = trace(model, inputs)
    assert graph.rule_errors == []
    keep = architectures.halved(graph)
    assert prove(model, graph, keep, inputs) == {}
    assert architectures.heads_are_whole(graph, keep)
    cut_units(model, graph, keep)
    after = sum(p.numel() for p in model.parameters())
    assert after == graph.params(keep)
    assert [tuple(o.shape) for o in architectures.outputs(model, architectures.one(inputs))] == shapes
    assert after / before <= KNOWN.get(name, COARSE)
    loss = sum(
        o.float().sum() for o in architectures.outputs(model, inputs, grad=True) if o.is_floating_point()
    )
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
