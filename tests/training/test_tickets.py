"""Lottery tickets: levels, step accounting, what every level begins with, rewinding; specs lottery-ticket, -rewinding."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import secateur
from secateur.errors import SecateurError
from secateur.training import fit
from secateur.training.losses import default_loss
from secateur.training.masks import density, full_masks, prune_smallest
from secateur.training.tickets import levels, rounds_to

STEPS = 12
PLAIN: dict[str, Any] = {"optimizer": "sgd", "lr": 0.1, "batch": 16, "warmup": 0.0, "clip": 0.0}


def pairs(count: int = 60) -> tuple[Tensor, Tensor]:
    x = torch.randn(count, 6, generator=torch.Generator().manual_seed(1))
    return x, (x[:, 0] > 0).long() + (x[:, 1] > 0).long()


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Dropout(0.1), nn.ReLU(), nn.Linear(16, 3))


def tensors(model: nn.Module) -> dict[str, Tensor]:
    return {name: t.detach().clone() for name, t in model.state_dict().items()}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


class Diary:
    """A loss that keeps the tensors the network had at each of its calls."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Tensor]] = []

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        self.seen.append(tensors(model))
        return default_loss(model, batch)


def run(
    method: str = "lottery-ticket", target: str = "30%", **settings: Any
) -> tuple[Any, list[dict[str, Tensor]]]:
    diary = Diary()
    settings = {**PLAIN, "steps": STEPS, "data": pairs(), "loss": diary, **settings}
    return secateur.train_prune(net(), method=method, target=target, **settings), diary.seen


def test_rounds_and_levels() -> None:
    assert rounds_to(0.2, 0.2) == 8 and rounds_to(0.8**3, 0.2) == 3 and rounds_to(1.0, 0.2) == 0
    assert rounds_to(0.2, 0.2, rounds=2) == 2
    # 600 weights to 51.2 %, 20 % a round: rounded up like the sheet's .8, .64, .511667
    assert levels({"w": 600}, 307, 3, share=0.512) == [480, 384, 307]
    lenet = {"fc1": 235_200, "fc2": 30_000, "out": 1_000}
    keep = int(0.512 * 265_200) + 729  # three rounds at 20 %, the output layer at 10 %
    found = levels(lenet, keep, 3, "layer", {"out": 0.5})
    assert found == [
        {"fc1": 188_160, "fc2": 24_000, "out": 900},
        {"fc1": 150_528, "fc2": 19_200, "out": 810},
        {"fc1": 120_422, "fc2": 15_360, "out": 729},
    ]
    with pytest.raises(SecateurError, match="can't prune 1.0"):
        rounds_to(0.2, 1.0)


@pytest.mark.parametrize(("method", "k"), [("lottery-ticket", 0), ("lottery-rewinding", 4)])
def test_each_level_begins_with_the_masked_early_weights(method: str, k: int) -> None:
    settings = {"rewind": str(k)} if k else {}
    pruned, seen = run(method, rounds=2, **settings)
    assert len(seen) == k + 3 * (STEPS - k)  # k + (n + 1) (T - k)
    early = seen[k]
    assert same(seen[0], tensors(net()))
    starts = [seen[k + level * (STEPS - k)] for level in range(3)]
    masks, before = [], None
    for level, start in enumerate(starts):
        masks.append({name: start[name] != 0 for name in ("0.weight", "4.weight")})
        for name, tensor in start.items():
            expected = early[name] * masks[level][name] if name in masks[level] else early[name]
            assert torch.equal(tensor, expected), f"{name} at level {level}"
        if before is not None:
            assert all(not (masks[level][n] & ~before[n]).any() for n in before)
        before = masks[level]
    # each mask is what the trained weights of the level before say: the last step of a level isn't in the diary, so the
    # end is computed with the loop alone
    share = 0.3**0.5
    first = round(144 * (1 - share) + 0.5)
    assert [int(sum(m.sum() for m in mask.values())) for mask in masks] == [144, 144 - first, 43]
    assert {n: m.sum().item() for n, m in pruned.plan.masks.items()} == {
        n: m.sum().item() for n, m in masks[2].items()
    }
    for step in seen[k + 2 * (STEPS - k) :]:  # the mask holds all through the training
        assert all(not step[name][~masks[2][name]].any() for name in masks[2])
    for name, mask in pruned.plan.masks.items():
        assert not pruned.model.get_parameter(name)[~mask].any()


def test_masks_come_from_the_trained_weights() -> None:
    pruned, _ = run(rounds=1)
    trained = net()
    fit(trained, pairs(), steps=STEPS, **PLAIN)
    weights = {name: trained.get_parameter(name) for name in ("0.weight", "4.weight")}
    expected = prune_smallest(weights, full_masks(weights), keep=43)
    assert all(torch.equal(mask, expected[name]) for name, mask in pruned.plan.masks.items())


def test_everything_kept_is_ordinary_training_bit_for_bit() -> None:
    pruned, seen = run(target="100%")
    plain = net()
    fit(plain, pairs(), steps=STEPS, **PLAIN)
    assert len(seen) == STEPS and same(tensors(pruned.model), tensors(plain))


def test_rewinding_to_step_0_is_the_original_method() -> None:
    original, _ = run(rounds=2)
    rewound, _ = run("lottery-rewinding", rounds=2, rewind="0it")
    assert same(tensors(original.model), tensors(rewound.model))


def test_momentum_starts_afresh_unless_asked_for() -> None:
    ends = {}
    for restore in (True, False):
        for momentum in (0.9, 0.0):
            pruned, _ = run(
                "lottery-rewinding", "100%", rewind="5it", restore_moments=restore, momentum=momentum
            )
            plain = net()
            fit(plain, pairs(), steps=STEPS, **{**PLAIN, "momentum": momentum})
            ends[restore, momentum] = same(tensors(pruned.model), tensors(plain))
    assert ends == {(True, 0.9): True, (True, 0.0): True, (False, 0.9): False, (False, 0.0): True}


def test_continued_training_resets_only_at_the_end() -> None:
    """Strategy 2 of the paper."""
    _, seen = run(rounds=2, reset=False)
    starts = [seen[level * STEPS] for level in range(3)]
    kept = starts[1]["0.weight"] != 0
    assert not torch.equal(starts[1]["0.weight"][kept], starts[0]["0.weight"][kept])
    kept = starts[2]["0.weight"] != 0
    assert torch.equal(starts[2]["0.weight"][kept], starts[0]["0.weight"][kept])


def test_controls_have_the_same_size_and_the_ticket_is_what_comes_out() -> None:
    plain, _ = run("lottery-rewinding", rounds=1, rewind="3it")
    pruned, seen = run(
        "lottery-rewinding", rounds=1, rewind="3it", controls=("reinit", "shuffle", "shuffle-global", "keep")
    )
    assert same(tensors(plain.model), tensors(pruned.model)) and same(
        dict(plain.plan.masks), dict(pruned.plan.masks)
    )
    level, at = STEPS - 3, 3 + 2 * (STEPS - 3)
    begins = {"reinit": seen[at], "shuffle": seen[at + STEPS], "shuffle-global": seen[at + STEPS + level]}
    begins["keep"] = seen[at + STEPS + 2 * level]
    masks = {name: mask for name, mask in pruned.plan.masks.items()}
    for control, start in begins.items():
        shapes = {name: start[name] != 0 for name in masks}
        assert density(shapes) == density(masks), control
        alike = all(torch.equal(shapes[name], masks[name]) for name in masks)
        assert alike == (control in ("reinit", "keep"))
        if control != "shuffle-global":
            assert all(shapes[name].sum() == masks[name].sum() for name in masks)
    early = seen[3]["0.weight"]
    mask = masks["0.weight"]
    assert not torch.isin(begins["reinit"]["0.weight"][mask], early).any()
    moved = begins["shuffle"]["0.weight"]
    assert torch.equal(moved[moved != 0], early[moved != 0])
    phases = [row["phase"] for row in pruned.report["phases"]]
    assert phases == ["early", "level-0", "level-1", "reinit", "shuffle", "shuffle-global", "keep"]


def test_stability_is_reported_for_both_masks() -> None:
    pruned, _ = run("lottery-rewinding", rounds=1, rewind="3it", stability=2)
    rows = {row["mask"]: row for row in pruned.report["phases"] if "mask" in row}
    assert set(rows) == {"ticket", "random"}
    plain, _ = run("lottery-rewinding", rounds=1, rewind="3it")
    assert same(tensors(plain.model), tensors(pruned.model))


def test_stability_is_the_mean_over_pairs_of_what_the_weights_say() -> None:
    """The weights are those that the task's quality was asked about, in the order of the phases."""
    asked: list[tuple[dict[str, Tensor], float]] = []

    def quality(model: nn.Module) -> float:
        asked.append((tensors(model), sum(p.sum().item() for p in model.parameters()) ** 2))
        return asked[-1][1]

    pruned, _ = run("lottery-rewinding", rounds=1, rewind="3it", stability=2, quality=quality)
    assert (
        len(asked) == 1 + 2 + 2 * (14 + 1) + 2 + 3 + 1
    )  # before, levels, lines and their first ends, runs, after
    asked = asked[1:-1]
    seen = [weights for weights, _ in asked]
    dense, ends = seen[0], {"ticket": [seen[1], *seen[2:4]], "random": seen[19:22]}
    lines = {"ticket": asked[4:18], "random": asked[22:36]}
    for row in (row for row in pruned.report["phases"] if "mask" in row):
        first, *others = (
            torch.cat([end[name].flatten().double() for name in ("0.weight", "4.weight")])
            for end in ends[row["mask"]]
        )
        whole = torch.cat([dense[name].flatten().double() for name in ("0.weight", "4.weight")]) * (
            first != 0
        )
        between = [torch.nn.functional.cosine_similarity(first, end, dim=0) for end in (whole, *others)]
        turned = [angle.acos().rad2deg().item() for angle in between]
        assert row["prune_distance"] == pytest.approx((first - whole).norm().item())
        assert row["prune_angle"] == pytest.approx(turned[0])
        assert row["order_distance"] == pytest.approx(sum((first - end).norm().item() for end in others) / 2)
        assert row["order_angle"] == pytest.approx((turned[1] + turned[2]) / 2)
        values = [-value for _, value in lines[row["mask"]]]
        rises = [max(part) - (part[0] + part[-1]) / 2 for part in (values[:7], values[7:])]
        assert row["order_barrier"] == pytest.approx(sum(rises) / 2) and row["order_barrier"] > 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target": "2:4"}, "no N:M pattern"),
        ({"target": "macs<=50%"}, "no macs target"),
        ({"target": "params<=40"}, "lie outside linear"),
        ({"target": "2%", "scope": "layer"}, "empties the layer|would leave"),
        ({"controls": ("luck",)}, "no control 'luck'"),
        ({"skip": ("5.weight",)}, "no weight '5.weight'"),
        ({"scope": "row"}, "global or layer"),
        ({"rounds": 0}, "0 rounds"),
        ({"rate": 1.5}, "can't prune 1.5"),
        ({"method": "lottery-rewinding", "rewind": "soon"}, "isn't a step"),
        ({"method": "lottery-rewinding", "rewind": "12it"}, "leaves nothing to train"),
    ],
)
def test_nonsense_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SecateurError, match=message):
        run(**settings)


def test_steps_epochs_and_shares_say_where_to_rewind_to() -> None:
    """60 samples in batches of 16 are 3.75 steps an epoch."""
    for rewind, step in (("4", 4), ("1ep", 4), ("25%", 3), (2, 2)):
        pruned, _ = run("lottery-rewinding", "100%", rewind=rewind)
        assert pruned.report["phases"][0]["last_step"] == step


def test_skipped_layers_stay_whole_and_parameters_are_counted() -> None:
    pruned, _ = run(rounds=2, skip=("4.weight",), target="50%")
    assert pruned.plan.masks["4.weight"].all() and int(pruned.plan.masks["0.weight"].sum()) == 72 - 48
    layered, _ = run(rounds=2, skip=("4.weight",), target="50%", scope="layer")
    assert int(layered.plan.masks["0.weight"].sum()) == 72 - 48
    counted, _ = run(target="params<=100", rounds=1)
    assert counted.report["met"] and counted.report["after"]["params_nonzero"] <= 100
    assert sum(int(mask.sum()) for mask in counted.plan.masks.values()) == 100 - (195 - 144)


@pytest.mark.parametrize("target", ["params<=99", "params<=80"])
def test_skipped_layers_that_leave_nothing_for_the_others_are_refused(target: str) -> None:
    """195 parameters, 51 of them no weights: 48 weights are skipped, which is all that 99 have room for."""
    with pytest.raises(SecateurError, match="the skipped layers alone are over the target"):
        run(target=target, rounds=1, skip=("4.weight",), scope="layer")


def test_the_best_step_of_each_level_is_reported_and_watching_changes_nothing(tmp_path: Any) -> None:
    x, y = pairs()

    def quality(model: nn.Module) -> float:
        modes = [(m, m.training) for m in model.modules()]
        model.eval()
        with torch.no_grad():
            right = (model(x).argmax(1) == y).double().mean().item()
        for module, mode in modes:
            module.training = mode
        return right

    plain, seen = run(rounds=1, quality=quality)
    watched, _ = run(rounds=1, quality=quality, watch=5)
    assert same(tensors(plain.model), tensors(watched.model))
    judge = net()
    for level, row in enumerate(watched.report["phases"]):
        found = {}
        for step in (5, 10, 12):
            after = seen[level * STEPS + step] if step < STEPS else None
            judge.load_state_dict(after or tensors(plain.model))
            found[step] = quality(judge) if after or level == 1 else row["quality"]
        best = max(found.values())
        assert row["best_quality"] == best
        assert row["best_step"] == next(step for step, value in found.items() if value == best)

    calls: list[int] = []

    def stop(model: nn.Module, batch: Any) -> Tensor:
        calls.append(1)
        if len(calls) == 8:
            raise KeyboardInterrupt
        return default_loss(model, batch)

    settings = {
        "rounds": 1,
        "quality": quality,
        "watch": 5,
        "loss": stop,
        "resume": tmp_path / "run",
        "every": 6,
    }
    with pytest.raises(KeyboardInterrupt):
        run(**settings)
    resumed, _ = run(**settings)
    assert resumed.report["phases"] == watched.report["phases"]
