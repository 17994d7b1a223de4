"""Parts keep the share that the user gives them by name, and the rest makes up for it."""

import json

import pytest
import torch
from torch import nn

import secateur
from secateur import SecateurError
from secateur.cli.main import main
from secateur.pruning.share import read_shares, steer

ALLOCATIONS = ("uniform", "global", "per-kind", "owl")


def tokens(model):
    return torch.arange(48).reshape(2, 24) % model.config.vocab_size


def prunable(model):
    return {n: p for n, p in model.named_parameters() if ".layers." in n and p.dim() == 2}


def left(model):
    return {name: int((p != 0).sum()) for name, p in prunable(model).items()}


@pytest.mark.parametrize(
    ("method", "allocation"), [("magnitude", "per-kind"), *(("wanda", name) for name in ALLOCATIONS)]
)
def test_weights_obey_both(tiny_llama, method, allocation):
    model = tiny_llama()
    given = {"*.self_attn": "75%", "*.layers.1.mlp": 0.3}
    settings = {"data": tokens(model), "seqlen": 24, "allocation": allocation, "share": given}
    pruned = secateur.prune(model, method=method, target="60%", **settings)
    found, sizes = left(pruned.model), {n: p.numel() for n, p in prunable(model).items()}
    for name, size in sizes.items():
        if "self_attn" in name:
            assert found[name] == 0.75 * size
        elif ".layers.1.mlp" in name:
            assert found[name] == int(0.3 * size)
    assert sum(found.values()) == int(0.6 * sum(sizes.values())) and pruned.report["met"]
    assert pruned.plan.options["share"] == ["*.self_attn=75%", "*.layers.1.mlp=0.3"]


def test_random_shares_and_targets_are_obeyed_or_refused(tiny_llama):
    """What can be met is met to the weight; what can't be is refused with the shares' own total."""
    model = tiny_llama()
    sizes = {n: p.numel() for n, p in prunable(model).items()}
    total = sum(sizes.values())
    generator = torch.Generator().manual_seed(0)
    met = 0
    for _ in range(12):
        mlp, first, target = (round(float(x), 2) for x in 0.05 + 0.9 * torch.rand(3, generator=generator))
        given = {"*.mlp": mlp, "*.layers.0.*_proj": first, "*.layers.0.*.q_proj": first}
        counts = {n: int((first if ".layers.0." in n else mlp) * s + 1e-9) for n, s in sizes.items()}
        counts = {n: c for n, c in counts.items() if ".layers.0." in n or ".mlp." in n}
        free = sum(s for n, s in sizes.items() if n not in counts)
        asked = int(target * total + 1e-9)
        try:
            pruned = secateur.prune(model, method="magnitude", target=target, share=given)
        except SecateurError as error:
            assert sum(counts.values()) >= asked and "alone is over the target" in str(error)
            continue
        met += 1
        found = left(pruned.model)
        assert all(found[n] == c for n, c in counts.items())
        assert sum(found.values()) == min(asked, sum(counts.values()) + free) and pruned.report["met"]
    assert met >= 4


def test_shares_alone_leave_the_rest_whole_and_say_so(tiny_llama):
    model = tiny_llama()
    pruned = secateur.prune(model, method="magnitude", target="100%", share={"*.mlp.up_proj": "50%"})
    found, sizes = left(pruned.model), {n: p.numel() for n, p in prunable(model).items()}
    assert found == {n: s // 2 if "up_proj" in n else s for n, s in sizes.items()}
    assert any("everything else stays whole" in note for note in pruned.report["notes"])


def test_rounds_approach_the_share(tiny_llama):
    model = tiny_llama()
    settings = {"schedule": "iterative:3", "share": {"*.mlp": "40%"}}
    pruned = secateur.prune(model, method="magnitude", target="50%", **settings)
    found, sizes = left(pruned.model), {n: p.numel() for n, p in prunable(model).items()}
    assert all(found[n] == int(0.4 * s) for n, s in sizes.items() if ".mlp." in n)
    assert sum(found.values()) == sum(sizes.values()) // 2


@pytest.mark.parametrize("allocation", ["uniform", "global", "per-kind"])
@pytest.mark.parametrize("target", ["70%", "params<=80%", "macs<=75%"])
def test_units_obey_both(tiny_llama, allocation, target):
    model = tiny_llama()
    settings = {"seqlen": 24, "allocation": allocation, "kinds": ("neurons", "kv_groups")}
    given = {"*.layers.0.mlp.gate_proj": "50%", "*.layers.0.mlp.up_proj": "50%", "*.self_attn": 1}
    pruned = secateur.prune(model, method="group-magnitude", target=target, share=given, **settings)
    assert pruned.model.model.layers[0].mlp.up_proj.out_features == 24
    assert pruned.model.model.layers[0].self_attn.q_proj.out_features == 32
    report = pruned.report
    assert report["met"]
    if target == "70%":  # of 48 + 48 neurons and 2 + 2 groups
        kept = sum(
            g["kept"] for g in report["groups"] if g["kind"] in settings["kinds"] and g["size"] in (2, 48)
        )
        assert kept == int(0.7 * 100)
    key = target.partition("<=")[0]
    if key in ("params", "macs"):
        assert (
            0.9 * float(target[-3:-1]) / 100
            < report["after"][key] / report["before"][key]
            <= float(target[-3:-1]) / 100
        )


class Net(nn.Module):
    """`a` and `b` share their channels through a sum."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.c, self.head = nn.Conv2d(8, 6, 1), nn.Linear(6, 4)

    def forward(self, x):
        x = self.a(x).relu()
        return self.head(self.c(x + self.b(x)).relu().mean((2, 3)))


def cut(share, target="70%", **settings):
    x = torch.randn(2, 3, 8, 8)
    return secateur.prune(Net(), x, method="group-magnitude", target=target, share=share, **settings)


def test_coupled_units_are_steered_when_all_that_makes_them_is_named():
    assert cut({"a": "75%", "b": "75%"}).model.b.out_channels == 6
    with pytest.raises(
        SecateurError, match=r"share 'b': a:channels isn't steered by b: a\.weight makes its units too"
    ):
        cut({"b": "75%"})
    pruned = cut({"[bc]": "50%"})
    assert pruned.model.c.out_channels == 3 and any("isn't steered" in n for n in pruned.report["notes"])


def test_round_to_is_kept():
    assert cut({"a": "80%", "b": "80%"}, round_to=4).model.a.out_channels == 4


def test_searches_keep_the_shares(tiny_llama):
    model = tiny_llama(num_hidden_layers=3)
    settings = {
        "data": tokens(model),
        "seqlen": 24,
        "generations": 2,
        "offspring": 4,
        "share": {"*.layers.1.mlp*": "50%"},
    }
    pruned = secateur.prune(model, method="tyr", target="70%", **settings)
    assert pruned.model.model.layers[1].mlp.up_proj.out_features == 24 and pruned.report["met"]


@pytest.mark.parametrize(
    ("share", "target", "message"),
    [
        ({"*.mpl": "50%"}, "50%", r"share: no parameter fits '\*\.mpl'; the nearest: .*mlp"),
        ({"mlp": "50%"}, "50%", r"share: no parameter fits 'mlp'; the nearest: \*\.mlp"),
        ({"lm_head": "50%"}, "50%", r"share 'lm_head': lm_head\.weight: it isn't pruned"),
        ({"*.mlp": "90%"}, "40%", r"alone is over the target; ask for more than 54.0%"),
        ({"*.mlp": "50%"}, "2:4", r"target 2:4: N:M is the same share everywhere; leave share out"),
        ({"*.mlp": "0%"}, "50%", r"share '\*\.mlp=0%'.*outside 0\.\.1"),
        ({"*.mlp": "2:4"}, "50%", r"needs a share"),
        ({"*.mlp": 1e-9}, "50%", r"share: 1e-09 of the 1,536 weights of .*mlp\.[a-z_]+\.weight is less than one"),
        (("*.mlp",), "50%", r"'\*\.mlp' isn't a pattern with its share; such as '\*\.mlp=50%'"),
        (("a=50%", "a=40%"), "50%", r"share: 'a' is given twice"),
        ("*.mlp=50%", "50%", r"is text; give a dict"),
        ({"*.layers.0": "50%", "*.layers.*": "40%"}, "50%", r"share '\*\.layers\.0': all that fits it is steered by \*\.layers\.\*; give the general"),
    ],
)  # fmt: skip
def test_contradictions_are_named(tiny_llama, share, target, message):
    with pytest.raises(SecateurError, match=message):
        secateur.prune(tiny_llama(), method="magnitude", target=target, share=share)


def test_other_contradictions(tiny_llama):
    model = tiny_llama()
    with pytest.raises(SecateurError, match=r"0\.3 of '\*\.mlp' is under the floor 0\.5"):
        secateur.prune(model, method="magnitude", target="60%", share={"*.mlp": 0.3}, floor=0.5)
    with pytest.raises(SecateurError, match="protected by keep 'model.layers.0'"):
        secateur.prune(
            model, method="magnitude", target="60%", share={"*.layers.0.mlp": 0.3}, keep=("model.layers.0",)
        )
    with pytest.raises(SecateurError, match=r"0\.4 of the 2 kv_groups .* is less than 1; give 0\.5 or more"):
        secateur.prune(
            model, method="random-structured", target="60%", share={"*.self_attn.[qkv]_proj": 0.4}, seqlen=24
        )
    with pytest.raises(
        SecateurError, match=r"share 'lm_head': lm_head:neurons: it is an output of the model"
    ):
        secateur.prune(model, method="random-structured", target="60%", share={"lm_head": 0.4}, seqlen=24)
    with pytest.raises(
        SecateurError, match="with the shares that were given, and every other group at its floor"
    ):
        secateur.prune(model, method="random-structured", target="macs<=50%", share={"*": 0.9}, seqlen=24)
    with pytest.raises(SecateurError, match="keeps .* of the 48 neurons .*, and not 24"):
        settings = {
            "data": tokens(model),
            "seqlen": 24,
            "rounding": "paper",
            "share": {"*.gate_proj": 0.5, "*.up_proj": 0.5},
        }
        secateur.prune(model, method="flap", target="70%", **settings)


@pytest.mark.parametrize("named", [{"share": {"*.layers.0.mlp.[gu]*": 0.5}}, {"keep": ("*.layers.0.mlp",)}])
def test_uniform_is_not_broken_by_what_is_named(tiny_llama, named):
    model = tiny_llama()
    settings = {
        "method": "group-magnitude",
        "target": "macs<=80%",
        "seqlen": 24,
        "uniform": True,
        "kinds": ("neurons",),
    }
    with pytest.raises(
        SecateurError, match="uniform: .* of 48 neurons would stay of .*, and uniform makes layers alike"
    ):
        secateur.prune(model, **settings, **named)
    alike = secateur.prune(model, **settings, share={"*.mlp.[gu]*": 0.5}).model
    assert [block.mlp.up_proj.out_features for block in alike.model.layers] == [24, 24]


def test_units_in_rounds(tiny_llama):
    settings = {
        "schedule": "iterative:2",
        "seqlen": 24,
        "kinds": ("neurons",),
        "share": {"*.layers.1.mlp.[gu]*": 0.25},
    }
    pruned = secateur.prune(tiny_llama(), method="group-magnitude", target="50%", **settings)
    assert [block.mlp.up_proj.out_features for block in pruned.model.model.layers] == [36, 12]


def test_training_has_no_use_for_it():
    x, y = torch.randn(8, 4), torch.randint(2, (8,))
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    with pytest.raises(
        SecateurError,
        match="share: train_prune has no use for share; leave it out; of the options it takes floor",
    ):
        secateur.train_prune(
            net, method="lottery-ticket", target="50%", data=(x, y), steps=1, share={"0": 0.5}
        )


def test_a_later_pattern_wins():
    parts = {name: [name] for name in ("x.0.mlp", "x.1.mlp", "x.1.attn")}
    assert steer(parts, read_shares(("x.*=50%", "*.mlp=0.9", "x.1.mlp=20%")), {})[0] == {
        "x.0.mlp": 0.9,
        "x.1.mlp": 0.2,
        "x.1.attn": 0.5,
    }


def test_on_the_command_line(tiny_folder, tmp_path, capsys):
    flags = [
        "--method",
        "magnitude",
        "--target",
        "60%",
        "--share",
        "*.mlp=50%",
        "--share",
        "*.q_proj=90%",
        "--json",
    ]
    assert main(["prune", str(tiny_folder), *flags, "--out", str(tmp_path / "out")]) == 0
    report = json.loads(capsys.readouterr().out)
    rows = {row["name"]: row["kept"] / row["size"] for row in report["weights"]}
    assert report["met"] and report["options"]["share"] == ["*.mlp=50%", "*.q_proj=90%"]
    assert all(share == 0.5 for name, share in rows.items() if ".mlp." in name)
    assert all(abs(share - 0.9) < 0.001 for name, share in rows.items() if ".q_proj" in name)
    assert json.loads((tmp_path / "out" / "plan.json").read_text())["options"]["share"] == [
        "*.mlp=50%",
        "*.q_proj=90%",
    ]


def test_a_slip_of_the_flag_is_offered_its_flag(capsys):
    assert main(["prune", "tiny", "--method", "magnitude", "--target", "60%", "--shares", "a=50%"]) == 2
    assert "Did you mean --share?" in capsys.readouterr().err
    assert main(["prune", "tiny", "--method", "magnitude", "--target", "60%", "--lam", "1"]) == 2
    assert "--lam, which belongs to" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--share", "--keep", "--only", "--kinds"])
def test_an_empty_list_is_no_wish(capsys, flag):
    assert main(["prune", "tiny", "--method", "magnitude", "--target", "60%", flag, ""]) == 2
    assert capsys.readouterr().err == f"secateur: {flag}: it is empty; leave it out\n"
