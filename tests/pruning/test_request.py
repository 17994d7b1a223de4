"""What a call asks for is read once: methods of another verb, targets that don't fit, allocations by name; and scores."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

import secateur
from secateur.errors import SecateurError
from secateur.pruning import allocate, weights
from secateur.pruning.request import read_request


@pytest.mark.parametrize(
    ("verb", "method", "target", "settings", "message"),
    [
        (
            "prune",
            "lottery-ticket",
            "50%",
            {},
            "^prune: lottery-ticket prunes while .*use secateur.train_prune",
        ),
        ("prune", "fastv", "50%", {}, "fastv removes visual tokens while a model runs.*use secateur.attach"),
        (
            "train_prune",
            "wanda",
            "50%",
            {},
            "^train_prune: wanda prunes without training.*use secateur.prune",
        ),
        ("prune", "wanda", "tokens=64", {}, "cuts weights, not tokens"),
        ("prune", "wanda", "macs<=50%", {}, "so no macs target"),
        ("prune", "taylor", "2:4", {}, "taylor makes no N:M pattern"),
        ("prune", "wanda", "params<=50%", {"schedule": "iterative:2"}, "schedule needs a share"),
        ("prune", "taylor", "50%", {"allocation": "owl"}, "no allocation for units 'owl'"),
        ("prune", "wanda", "50%", {"allocation": "pwl"}, "no allocation for weights 'pwl'"),
        ("prune", "wanda", "50%", {"kinds": ("neurns",)}, "^kinds: .*'neurns'; did you mean neurons"),
        ("prune", "taylor", "50%", {"kinds": ("neurns",)}, "^kinds: .*'neurns'; did you mean neurons"),
        ("train_prune", "lottery-ticket", "50%", {"kinds": ("head",)}, "^kinds: .*'head'; did you mean head"),
        ("prune", "wanda", "50%", {"kinds": ("neurons",)}, "^kinds: wanda sets single weights to zero"),
        ("prune", "taylor", "50%", {"kinds": "neurons"}, "^kinds: 'neurons' is text; give a tuple"),
        ("prune", "wanda", "50%", {"samples": 0}, "^samples: 0 is out of range"),
        ("prune", "wanda", "50%", {"floor": 2.0}, r"^floor: 2.0 is outside 0\.\.1"),
    ],
)
def test_what_does_not_fit_is_refused(
    verb: str, method: str, target: str, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(SecateurError, match=message):
        read_request(verb, method, target, settings)


@pytest.mark.parametrize("target", [0.3, "0.3", ".3"])
def test_a_share_without_a_percent_sign_says_what_it_was_taken_for(target: str | float) -> None:
    model = nn.Sequential(nn.Linear(10, 10), nn.ReLU(), nn.Linear(10, 4))
    pruned = secateur.prune(model, torch.randn(2, 10), method="magnitude", target=target)
    assert sum(int(mask.sum()) for mask in pruned.plan.masks.values()) == 42
    assert any("read as the share kept: 30 % stays" in note for note in pruned.report["notes"])
    plain = secateur.prune(model, torch.randn(2, 10), method="magnitude", target="30%")
    assert not any("read as" in note for note in plain.report["notes"])


@pytest.fixture
def first_half() -> Iterator[None]:
    """An allocation from outside, for weights and for units."""

    @weights.allocation("first-half")
    def keep_first(method: Any, context: Any, keep: int) -> Any:
        return weights.by_shares(
            method, context, keep, {n: float(i == 0) for i, n in enumerate(context.matrices)}
        )

    @allocate.order("first-half")
    def last_leaves(groups: Any) -> Any:
        return [[(g.name, unit) for unit in grain] for g in reversed(groups) for grain in g.grains()]

    yield
    del weights.ALLOCATIONS["first-half"], allocate.ORDERS["first-half"]


@pytest.mark.usefixtures("first_half")
def test_allocations_can_be_added_by_name() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
    x = torch.randn(2, 8)
    pruned = secateur.prune(model, x, method="magnitude", target="params<=66", allocation="first-half")
    kept = {name: int(mask.sum()) for name, mask in pruned.plan.masks.items()}
    assert kept == {
        "2.weight": 0,
        "4.weight": 0,
    }  # 66 less 18 biases are the 48 of the first layer, which is whole
    pruned = secateur.prune(model, x, method="group-magnitude", target="params<=100", allocation="first-half")
    first, second = (pruned.plan.keep.get(g.name, range(g.size)) for g in pruned.graph.groups if not g.reason)
    assert len(first) == 6 and len(second) < 8


@pytest.mark.parametrize("method", ["flap", "nirvana", "tyr"])
def test_scores_are_kept_or_the_report_says_why_not(
    method: str, tiny_llama: Callable[..., nn.Module]
) -> None:
    model = tiny_llama()
    vocabulary: Any = model.config.vocab_size
    ids = torch.randint(0, vocabulary, (4, 16), generator=torch.Generator().manual_seed(0))
    settings = {
        "flap": {},
        "nirvana": {"windows": 2, "length": 8, "candidates": 2},
        "tyr": {"rounds": 1, "generations": 1, "offspring": 2},
    }[method]
    pruned = secateur.prune(model, method=method, target="75%", data=ids, seqlen=16, **settings)
    cut = set(pruned.plan.keep)
    assert cut
    if method == "tyr":
        assert not pruned.scores and any("no unit has a score" in note for note in pruned.report["notes"])
    else:
        assert cut <= set(pruned.scores)
        assert all(len(pruned.scores[name]) == pruned.plan.sizes[name] for name in cut)
