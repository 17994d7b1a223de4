"""Models of several parts: every stack is seen, and a target may give each part its share."""

import copy

import pytest
import torch
from torch import nn

import secateur
from secateur import SecateurError
from secateur.graph.blocks import find_matrices, find_stacks
from secateur.graph.parts import parts_of, resolve_parts
from secateur.pruning.target import parse_target
from secateur.stats.collect import collect
from secateur.stats.stream import stream
from secateur.tasks.tiny import inputs_for, tiny_llava

TARGET = "vision_tower=60%,language_model=40%"


@pytest.fixture(scope="module")
def llava():
    return tiny_llava().float().eval()


@pytest.fixture(scope="module")
def inputs(llava):
    return dict(inputs_for(llava))


def test_tower_and_decoder_are_two_stacks_that_hold_every_matrix_of_their_blocks(llava):
    stacks = find_stacks(llava)
    assert [stack.start for stack in stacks] == [0, len(stacks[0])]
    assert parts_of(llava) == {"vision_tower": "model.vision_tower", "language_model": "model.language_model"}
    inside = {
        name
        for name, p in llava.named_parameters()
        if p.dim() == 2 and name.startswith(tuple(f"{stack.path}." for stack in stacks))
    }
    matrices = find_matrices(llava)
    assert set(matrices) == inside
    assert {m.block for m in matrices.values()} == set(range(sum(map(len, stacks))))


def test_a_language_model_has_no_parts(tiny_llama):
    model = tiny_llama()
    assert len(find_stacks(model)) == 1 and parts_of(model) == {}


def test_statistics_of_both_stacks_are_those_of_the_whole_model(llava, inputs):
    matrices = find_matrices(llava)
    expected = collect(llava, [inputs], {"input_norm"}, matrices)
    found = {}
    for block in stream(llava, [inputs], {"input_norm"}, matrices):
        found |= {name: stats.input_norm.clone() for name, stats in block.stats.items()}
    assert found.keys() == expected.keys()
    for name, norm in found.items():
        torch.testing.assert_close(norm, expected[name].input_norm, rtol=1e-5, atol=1e-6)


def test_the_decoder_sees_the_pruned_tower(llava, inputs):
    model = copy.deepcopy(llava)
    first = next(n for n in find_matrices(model) if "language_model" in n)
    for block in stream(model, [inputs], {"input_norm"}, find_matrices(model)):
        for name, matrix in block.matrices.items():
            if "vision_tower" in name:
                matrix.set(matrix.weight() * 0.5)
            elif name == first:
                seen = block.stats[name].input_norm.clone()
    pruned = collect(model, [inputs], {"input_norm"}, find_matrices(model))[first].input_norm
    dense = collect(llava, [inputs], {"input_norm"}, find_matrices(llava))[first].input_norm
    torch.testing.assert_close(seen, pruned)
    assert not torch.allclose(seen, dense)


def test_a_mask_of_the_text_hides_no_patches(llava, inputs):
    """Padding is left out of the decoder's statistics, and nothing of the tower's, whatever their lengths are."""
    matrices = find_matrices(llava)
    tower = next(n for n in matrices if "vision_tower" in n)
    patches = {}
    module = llava.get_submodule(matrices[tower].path)
    hook = module.register_forward_hook(lambda m, args, out: patches.update(rows=args[0].shape[:-1].numel()))
    llava(**inputs)
    hook.remove()
    rows = patches["rows"]
    batch = len(inputs["input_ids"])
    assert rows % batch == 0
    longer = rows // batch - inputs["input_ids"].shape[1]
    if longer > 0:  # as many text tokens as patches
        pad = torch.zeros(batch, longer, dtype=torch.long)
        inputs = {
            **inputs,
            "input_ids": torch.cat([pad + 1, inputs["input_ids"]], 1),
            "attention_mask": torch.cat([pad, torch.ones_like(inputs["input_ids"])], 1),
        }
    hidden = {**inputs, "attention_mask": inputs["attention_mask"].clone()}
    hidden["attention_mask"][:, :3] = 0
    shown = {**inputs, "attention_mask": torch.ones_like(inputs["input_ids"])}
    first, second = (collect(llava, [b], {"input_norm"}, matrices)[tower] for b in (hidden, shown))
    assert first.inputs.tokens == second.inputs.tokens == [rows]


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt", "ria", "owl"])
def test_each_part_keeps_its_share_exactly(llava, inputs, method):
    pruned = secateur.prune(llava, inputs=inputs, method=method, target=TARGET, data=[inputs])
    kept, size = {"tower": 0, "decoder": 0}, {"tower": 0, "decoder": 0}
    for name, matrix in find_matrices(llava).items():
        part = "tower" if name.startswith("model.vision_tower.") else "decoder"
        kept[part] += int((pruned.model.get_parameter(name) != 0).sum())
        size[part] += matrix.numel
    assert kept == {"tower": int(0.6 * size["tower"] + 1e-9), "decoder": int(0.4 * size["decoder"] + 1e-9)}
    assert pruned.report["met"]
    assert [(row["name"], row["kept"]) for row in pruned.report["parts"]] == [
        ("vision_tower", kept["tower"]),
        ("language_model", kept["decoder"]),
    ]
    whole = {n: p for n, p in llava.named_parameters() if "multi_modal_projector" in n}
    assert whole and all(torch.equal(pruned.model.get_parameter(n), p) for n, p in whole.items())


def test_a_bare_share_is_that_of_all_parts(llava, inputs):
    pruned = secateur.prune(llava, inputs=inputs, method="magnitude", target="50%")
    assert [row["kept"] / row["size"] for row in pruned.report["parts"]] == pytest.approx(
        [0.5, 0.5], abs=1e-3
    )


def test_units_leave_by_part_and_what_is_not_named_stays(llava, inputs):
    settings = {"inputs": inputs, "method": "random-structured", "data": [inputs]}
    pruned = secateur.prune(llava, target="language_model=60%", **settings)
    assert pruned.report["met"] and all("language_model" in name for name in pruned.plan.keep)
    row = pruned.report["parts"][0]
    assert 0.5 < row["kept"] / row["size"] <= 0.6
    both = secateur.prune(llava, target=TARGET, **settings)
    assert [
        row["kept"] <= share * row["size"]
        for row, share in zip(both.report["parts"], (0.6, 0.4), strict=True)
    ]
    assert {name.split(".")[1] for name in both.plan.keep} == {"vision_tower", "language_model"}


def test_data_that_never_reaches_a_part_is_refused_with_the_way_out(llava):
    ids = torch.randint(1, 30, (2, 8))
    with pytest.raises(SecateurError, match="doesn't come by it.*keep='model.vision_tower"):
        secateur.prune(llava, inputs=ids, method="wanda", target="50%", data=ids)
    for settings in ({"target": "language_model=50%"}, {"target": "80%", "keep": ("model.vision_tower.*",)}):
        assert secateur.prune(llava, inputs=ids, method="wanda", data=ids, **settings).report["met"]


@pytest.mark.parametrize(
    ("target", "told"),
    [
        ("visiontower=50%", "no part 'visiontower'; the parts are vision_tower, language_model"),
        ("layers=50%", "2 modules are called 'layers'"),
        ("model=50%,language_model=40%", "language_model lies in model"),
        ("vision_tower=50%,vision_tower=40%", "named twice"),
        ("vision_tower=2:4", "is no share"),
        ("vision_tower=150%", "outside 0..1"),
        ("vision_tower=", "can't be read"),
    ],
)
def test_targets_of_parts_that_cannot_be(llava, inputs, target, told):
    with pytest.raises(SecateurError, match=told):
        secateur.prune(llava, inputs=inputs, method="magnitude", target=target)


def test_methods_that_divide_one_budget_say_so(llava, inputs):
    with pytest.raises(SecateurError, match="flap divides one budget"):
        secateur.prune(llava, inputs=inputs, method="flap", target=TARGET, data=[inputs])


def test_a_target_of_parts_is_read():
    target = parse_target("Text_Encoder=52.5%, unet=65%")
    assert [(name, goal.value) for name, goal in target.parts] == [("Text_Encoder", 0.525), ("unet", 0.65)]
    assert str(target) == "Text_Encoder=52.5%, unet=65%"


class Pipe(nn.Module):
    def __init__(self):
        super().__init__()
        self.text_encoder = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))
        self.unet = nn.Sequential(nn.Conv1d(1, 3, 1), nn.Linear(4, 4))

    def forward(self, x):
        return self.unet(self.text_encoder(x)[:, None])


def test_parts_without_stacks_are_named_by_their_modules():
    model = Pipe()
    assert resolve_parts(model, ["unet"]) == {"unet": "unet"}
    with pytest.raises(SecateurError, match="the parts are text_encoder, unet"):
        resolve_parts(model, ["vae"])
    pruned = secateur.prune(
        model, inputs=torch.randn(2, 4), method="magnitude", target="text_encoder=50%,unet=100%"
    )
    zeros = {n: int((p == 0).sum()) for n, p in pruned.model.named_parameters() if p.dim() > 1}
    assert sum(v for n, v in zeros.items() if n.startswith("text_encoder")) == 32
    assert sum(v for n, v in zeros.items() if n.startswith("unet")) == 0


def test_a_run_that_was_stopped_goes_on_in_the_second_stack(llava, inputs, tmp_path, monkeypatch):
    from secateur.methods.wanda import Wanda

    settings = {"inputs": inputs, "method": "wanda", "target": "50%", "data": [inputs]}
    whole = secateur.prune(llava, **settings)
    own, calls = Wanda.score, []

    def score(self, weight, stats):
        calls.append(stats.name)
        if len(calls) == stop:
            raise KeyboardInterrupt
        return own(self, weight, stats)

    stop = 40
    monkeypatch.setattr(Wanda, "score", score)
    with pytest.raises(KeyboardInterrupt):
        secateur.prune(llava, resume=tmp_path / "run", **settings)
    stop = 0
    calls.clear()
    resumed = secateur.prune(llava, resume=tmp_path / "run", **settings)
    assert 0 < len(calls) < 40 and not any("vision_tower" in name for name in calls)
    assert resumed.plan == whole.plan
