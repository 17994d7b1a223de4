import pytest
import torch

from secateur.errors import SecateurError
from secateur.pruning.allocate import Competitor, build_path, divide, follow, owl_shares
from secateur.pruning.target import parse_schedule, parse_target, rounds


@pytest.mark.parametrize(
    ("text", "kind", "value", "relative"),
    [
        ("50%", "share", 0.5, True),
        ("0.75", "share", 0.75, True),
        (0.25, "share", 0.25, True),
        ("100%", "share", 1.0, True),
        ("params<=100e6", "params", 100e6, False),
        ("params <= 1.5M", "params", 1.5e6, False),
        ("macs<=50%", "macs", 0.5, True),
        ("macs<=2G", "macs", 2e9, False),
        ("size<=200MB", "size", 200e6, False),
        ("size<=1GiB", "size", 2**30, False),
        ("latency<=8 ms", "latency", 0.008, False),
        ("latency<=0.5s", "latency", 0.5, False),
        ("tokens=64", "tokens", 64, False),
    ],
)
def test_targets_are_read(text, kind, value, relative):
    target = parse_target(text)
    assert (target.kind, target.relative) == (kind, relative)
    assert target.value == pytest.approx(value)


def test_patterns_keep_n_of_m():
    assert parse_target("2:4").n_m == (2, 4)
    assert parse_target("4:8").value == 0.5


@pytest.mark.parametrize(
    "text", ["150%", "1.5", "-10%", "0", "0%", "half", "params<=", "size<=3x", "4:2", "0:4", "macs<=120%", ""]
)
def test_nonsense_targets_say_what_to_write(text):
    with pytest.raises(SecateurError, match="target"):
        parse_target(text)


def test_a_limit_is_absolute_or_relative_to_the_dense_figure():
    assert parse_target("macs<=50%").limit(300) == 150
    assert parse_target("macs<=200").limit(300) == 200


def test_schedules():
    assert parse_schedule("once") == 1 and parse_schedule("iterative:4") == 4
    assert rounds(0.2, 4) == pytest.approx([0.8, 0.6, 0.4, 0.2])
    for text in ("iterative:0", "twice", "iterative"):
        with pytest.raises(SecateurError, match="schedule"):
            parse_schedule(text)


@pytest.mark.parametrize(
    ("sizes", "shares", "total", "expected"),
    [
        ([10, 10, 7], [0.5, 0.5, 0.5], 13, [5, 5, 3]),  # 3.5 is cut to 3
        ([10, 10, 7], [0.5, 0.5, 0.5], 14, [5, 5, 4]),
        ([4, 4], [1.0, 0.25], 5, [4, 1]),
        ([3, 3], [0.0, 0.0], 6, [3, 3]),
        ([100, 10], [0.9, 0.9], 50, [45, 5]),
    ],
)
def test_divide_meets_the_total_exactly(sizes, shares, total, expected):
    kept = divide(sizes, shares, total)
    assert sum(kept) == total
    assert all(0 <= k <= s for k, s in zip(kept, sizes))
    if expected != [45, 5]:
        assert kept == expected


def test_owl_shares_of_the_sheet():
    assert [1 - s for s in owl_shares([2, 5, 3], 0.3)] == pytest.approx([0.77111, 0.61111, 0.71778], abs=1e-5)
    assert owl_shares([4, 4], 0.5) == [0.5, 0.5]


def llama_like(layers=3):
    """Three KV groups of 294,912 weights and 1,536 neurons of 1,728 in each block, as in SmolLM2."""
    generator = torch.Generator().manual_seed(0)
    groups = []
    for i in range(layers):
        groups.append(Competitor(f"{i}.attn", "kv_groups", torch.rand(3, generator=generator)))
        groups.append(Competitor(f"{i}.mlp", "neurons", torch.rand(1536, generator=generator)))
    prices = {"attn": 294_912, "mlp": 1_728}
    return groups, lambda keep: sum(len(u) * prices[n.split(".")[1]] for n, u in keep.items())


@pytest.mark.parametrize("allocation", ["uniform", "global", "per-kind"])
@pytest.mark.parametrize("share", [0.97, 0.8, 0.5, 0.31])
def test_a_path_meets_a_share_within_one_unit_and_never_over(allocation, share):
    groups, cost = llama_like()
    limit = share * 3 * 3_538_944
    keep = follow(groups, build_path(groups, allocation), cost, limit)
    one = 1_728 * (3 if allocation == "uniform" else 1)
    assert limit - one < cost(keep) <= limit
    assert all(len(units) >= 1 for units in keep.values())
    if allocation == "uniform":
        assert len({len(keep[f"{i}.mlp"]) for i in range(3)}) == 1
        assert len({len(keep[f"{i}.attn"]) for i in range(3)}) == 1


@pytest.mark.parametrize(
    # a third of the heads stays until a third is to go: (0.8 * 3,538,944 - 884,736) / 1,728 neurons are kept, and so on
    ("share", "heads", "neurons"),
    [(0.8, 3, 1126), (0.6, 2, 887), (0.5, 2, 682)],
)
def test_uniform_shares_by_hand(share, heads, neurons):
    groups, cost = llama_like(1)
    keep = follow(groups, build_path(groups), cost, share * 3_538_944)
    assert len(keep["0.attn"]) == heads and len(keep["0.mlp"]) == neurons


def test_the_lowest_scores_leave_and_ties_keep_the_earlier():
    group = Competitor("g", "channels", torch.tensor([2.0, 1.0, 3.0, 1.0]))
    keep = follow([group], build_path([group]), lambda k: len(k["g"]), 3)
    assert keep["g"].tolist() == [0, 1, 2]


def test_global_compares_over_groups():
    a = Competitor("a", "channels", torch.tensor([5.0, 6.0, 7.0]))
    b = Competitor("b", "channels", torch.tensor([1.0, 2.0, 3.0]))
    keep = follow([a, b], build_path([a, b], "global"), lambda k: sum(map(len, k.values())), 4)
    assert (len(keep["a"]), keep["b"].tolist()) == (3, [2])


def test_round_to_keeps_multiples_and_floors_hold():
    group = Competitor("g", "neurons", torch.rand(30), floor=10, round_to=8)
    path = build_path([group])
    assert [len(step) for step in path] == [6, 8]  # 30 -> 24 -> 16, and 8 is below the floor
    keep = follow([group], path, lambda k: len(k["g"]), 20)
    assert len(keep["g"]) == 16


def test_a_target_below_the_floors_names_the_best_that_can_be_met():
    group = Competitor("g", "neurons", torch.rand(10), floor=5)
    with pytest.raises(SecateurError, match=r"target 3 can't be met.*5 is left"):
        follow([group], build_path([group]), lambda k: len(k["g"]), 3)


def test_everything_fits_when_the_limit_is_the_whole():
    groups, cost = llama_like(1)
    keep = follow(groups, build_path(groups), cost, 3_538_944)
    assert [len(u) for u in keep.values()] == [3, 1536]
