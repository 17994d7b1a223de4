"""Tyr-the-Pruner: the sheet's worked examples, exact budgets, and that search and refit pay on a trained model."""

import copy
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import secateur
from secateur.errors import SecateurError
from secateur.methods.tyr import PAPER, Tyr
from secateur.pruning.context import Context
from secateur.pruning.resume import Checkpoint
from secateur.pruning.target import parse_target
from secateur.solvers.evolution import reach_of
from secateur.solvers.supernet import Candidates, Supernet, even_base, find_sublayers
from secateur.stats.divergence import TopKDivergence, topk_kl
from secateur.utils.inputs import default_inputs

QUICK: dict[str, Any] = {"rounds": 2, "generations": 3, "offspring": 6, "topk": 32}


def ids(model: nn.Module, rows: int = 8, length: int = 24) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, model.config.vocab_size, (rows, length), generator=generator)


def context(model: nn.Module, target: str = "75%", method: Tyr | None = None, **settings: Any) -> Context:
    settings = {"data": ids(model), **settings}
    return Context(
        model=model,
        method=method or Tyr(**QUICK),
        target=parse_target(target),
        inputs=default_inputs(model),
        **settings,
    )


@pytest.fixture
def llama(tiny_llama: Any) -> nn.Module:
    """Four blocks of 4 KV groups (two queries each) and 64 neurons."""
    model = tiny_llama(
        num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=4, head_dim=4, intermediate_size=64
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(6 if parameter.dim() == 2 else 1)
    return model


@pytest.mark.parametrize(
    ("sparsity", "units", "levels"),
    [
        (0.5, 8, [0, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1]),
        (0.125, 8, [0, 0.125, 0.25, 0.375, 0.5, 0.625]),
        (0.5, 32, [0.375 + i / 32 for i in range(9)]),
    ],
)
def test_levels(sparsity: float, units: int, levels: list[float]) -> None:
    low, high = reach_of(int(sparsity * units), 1, 0, units)
    assert [sparsity + level / units for level in range(low, high + 1)] == levels


def test_topk_kl() -> None:
    dense, candidate = torch.tensor([2.0, 1, 0, -1]), torch.tensor([1.0, 1, 1, 0])
    assert topk_kl(dense[:2], candidate[:2]).item() == pytest.approx(0.110944, abs=6e-7)
    assert topk_kl(dense, candidate).item() == pytest.approx(0.298805, abs=6e-7)


def test_divergence_reads_the_top_logits_of_the_taken_tokens(llama: nn.Module) -> None:
    data = ids(llama)
    divergence = TopKDivergence(llama, data, k=5)
    batch = ((0, 24), (3, 24), (5, 7))
    assert abs(divergence(batch)) < 1e-7
    with torch.no_grad():
        dense = llama(data).logits
        llama.lm_head.weight.mul_(0.5)
        changed = llama(data).logits
    total, count = 0.0, 0
    for sample, take in batch:
        for position in range(take - 1):
            values, where = dense[sample, position].topk(5)
            p, q = values.softmax(0), changed[sample, position, where].softmax(0)
            total += float((p * (p / q).log()).sum())
            count += 1
    assert divergence(batch) == pytest.approx(total / count, rel=1e-4)


def test_divergence_of_a_classifier_counts_samples() -> None:
    model = nn.Linear(3, 4)
    data = [torch.randn(1, 3), torch.randn(1, 3)]
    divergence = TopKDivergence(model, data, k=4)
    with torch.no_grad():
        before = [model(x) for x in data]
        model.bias[0] += 1
        expected = [float(topk_kl(b, model(x)).mean()) for b, x in zip(before, data)]
    assert divergence.lengths == [1, 1]
    assert divergence(((0, 1), (1, 1))) == pytest.approx(sum(expected) / 2, rel=1e-5)


def counts(plan: secateur.Plan, model: nn.Module) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {"kv_groups": [], "neurons": []}
    for index in range(model.config.num_hidden_layers):
        for kind, path, size in (("kv_groups", "self_attn", 4), ("neurons", "mlp", 64)):
            kept = plan.keep.get(f"model.layers.{index}.{path}:{kind}")
            found[kind].append(size if kept is None else len(kept))
    return found


def test_the_search_moves_units_within_a_kind_only(llama: nn.Module) -> None:
    with torch.no_grad():  # two layers that hardly matter: the search takes from them
        llama.model.layers[1].mlp.down_proj.weight.mul_(0.01)
        llama.model.layers[2].self_attn.o_proj.weight.mul_(0.01)
    run = context(llama, method=Tyr(**QUICK | {"generations": 8, "offspring": 12, "tokens": (0.5, 1.0)}))
    layers = find_sublayers(run.groups, run.matrices, run.graph.shapes)
    base = Counter()
    for layer, removed in zip(layers, even_base(run, layers)):
        base[layer.group.kind] += layer.size - removed
    plan = run.method.plan(run)
    found = counts(plan, llama)
    assert {kind: sum(kept) for kind, kept in found.items()} == base
    assert found["neurons"][1] < min(found["neurons"][i] for i in (0, 2, 3))
    assert found["kv_groups"][2] < 4
    assert min(found["neurons"] + found["kv_groups"]) >= 1
    steps = [part.split(" -> ") for part in plan.notes["search"].partition(": ")[2].split(", ")]
    assert len(steps) == 2 and all(float(after) <= float(before) for before, after in steps)
    assert float(steps[1][1]) < float(steps[0][0])


def test_the_base_is_even_and_the_budget_exact(llama: nn.Module) -> None:
    run = context(llama, "80%")
    layers = find_sublayers(run.groups, run.matrices, run.graph.shapes)
    kept: dict[str, list[int]] = {"kv_groups": [], "neurons": []}
    for layer, removed in zip(layers, even_base(run, layers)):
        kept[layer.group.kind].append(layer.size - removed)
    assert max(kept["neurons"]) - min(kept["neurons"]) <= 1
    assert kept["kv_groups"] in ([3, 3, 3, 3], [3, 4, 3, 3], [3, 3, 3, 4], [3, 4, 3, 4], [4, 3, 3, 3])
    neuron, group, dense = 3 * 32, (2 + 2 * 2) * 4 * 32, 4 * (64 * 3 * 32 + 4 * (2 + 2 * 2) * 4 * 32)
    total = sum(kept["neurons"]) * neuron + sum(kept["kv_groups"]) * group
    assert 0.8 * dense - neuron < total <= 0.8 * dense


@pytest.mark.parametrize("target", ["60%", "params<=70%", "macs<=70%"])
def test_end_to_end(llama: nn.Module, target: str) -> None:
    dense = copy.deepcopy(llama)
    settings = dict(method="tyr", target=target, data=ids(llama), **QUICK)
    first, second = (secateur.prune(llama, **settings) for _ in range(2))
    assert first.report["met"]
    assert first.plan == second.plan
    for a, b in zip(llama.parameters(), dense.parameters()):
        assert torch.equal(a, b)
    assert set(first.plan.values) <= {
        n for n, _ in llama.named_parameters() if n.endswith(("o_proj.weight", "down_proj.weight"))
    }
    assert any(not torch.equal(llama.get_parameter(n), v) for n, v in first.plan.values.items())


def test_uniform_cuts_all_layers_alike_and_searches_nothing(llama: nn.Module) -> None:
    pruned = secateur.prune(llama, method="tyr", target="50%", data=ids(llama), uniform=True)
    kept = counts(pruned.plan, llama)
    assert all(len(set(values)) == 1 for values in kept.values())
    assert "search" not in pruned.plan.notes


def test_heads_of_plain_attention_and_multiples_of_neurons(tiny_llama: Any) -> None:
    model = tiny_llama(gqa=False, intermediate_size=64)
    pruned = secateur.prune(model, method="tyr", target="60%", data=ids(model), round_to=8, **QUICK)
    kinds = {plan_kind for plan_kind in pruned.plan.kinds.values()}
    assert kinds == {"heads", "neurons"}
    assert all(len(k) % 8 == 0 for n, k in pruned.plan.keep.items() if n.endswith("neurons"))


def test_expected_weights_are_put_in_before_the_next_block(llama: nn.Module) -> None:
    run = context(llama)
    layers = find_sublayers(run.groups, run.matrices, run.graph.shapes)
    dense = {layer.name: layer.matrix.weight().clone() for layer in layers}
    seen: dict[str, dict[str, torch.Tensor]] = {}
    levels = [[0, 1, 3] if layer.group.kind == "kv_groups" else [0, 16, 32] for layer in layers]
    for expected in ("mean", "median", "off"):
        with Supernet(run, layers, Tyr().solve, expected=expected) as net:
            restore = net.restore
            net.restore = lambda: None  # type: ignore[method-assign]
            net.build("x", run.data, levels, [at[1] for at in levels])
            seen[expected] = {layer.name: layer.matrix.weight().clone() for layer in layers}
            for layer, at in zip(layers, levels):
                versions = [net.weight(layer, count) for count in at]
                shares = [1 - count / layer.size for count in at]
                mean = sum(w * s for w, s in zip(versions, shares)) / sum(shares)
                want = {"mean": mean, "median": versions[1], "off": dense[layer.name]}[expected]
                assert torch.allclose(seen[expected][layer.name], want, atol=1e-6)
                assert int((versions[2].abs().sum(0) == 0).sum()) == at[2] * layer.units.shape[1]
            net.restore = restore  # type: ignore[method-assign]
    for layer in layers:
        assert torch.equal(layer.matrix.weight(), dense[layer.name])


def test_a_version_is_the_least_squares_answer_on_what_reaches_it(llama: nn.Module) -> None:
    """The second block's output projection, with the first block already pruned."""
    run = context(llama)
    layers = find_sublayers(run.groups, run.matrices, run.graph.shapes)
    removed = [2 if layer.group.kind == "kv_groups" else 32 for layer in layers]
    with Supernet(run, layers, Tyr().solve) as net:
        net.build("x", run.data, [[count] for count in removed], removed)
        weights = [net.weight(layer, count) for layer, count in zip(layers, removed)]
        kept = [net.keep(layer, count) for layer, count in zip(layers, removed)]
    for layer, weight in zip(layers, weights):
        if layer.matrix.block == 0:
            layer.matrix.set(weight)
    target = next(i for i, layer in enumerate(layers) if "layers.1.self_attn" in layer.name)
    inputs: list[torch.Tensor] = []
    module = llama.model.layers[1].self_attn.o_proj
    module.register_forward_pre_hook(lambda _, args: inputs.append(args[0].flatten(0, 1)))
    with torch.no_grad():
        llama(run.data)
    x = inputs[0].double()
    hessian = x.T @ x
    hessian += 0.01 * hessian.diagonal().mean() * torch.eye(len(hessian))
    columns = layers[target].columns(kept[target])
    dense = module.weight.detach().double()
    best = torch.linalg.solve(hessian[columns][:, columns], (hessian @ dense.T)[columns]).T
    assert torch.allclose(weights[target][:, columns].double(), best, atol=1e-4)


def test_nothing_removed_everywhere_has_no_divergence(llama: nn.Module) -> None:
    run = context(llama)
    layers = find_sublayers(run.groups, run.matrices, run.graph.shapes)
    with Supernet(run, layers, Tyr().solve) as net:
        fitness = Candidates(net, run.data, 16)
        net.build("x", run.data, [[0, 1]] * len(layers), [1] * len(layers))
        fitness.center([1] * len(layers), [1] * len(layers))
        everything = tuple(enumerate(fitness.lengths))
        assert fitness((0,) * len(layers), everything) > 0
        assert fitness((-1,) * len(layers), everything) == 0


def test_a_killed_run_goes_on_and_ends_the_same(llama: nn.Module, tmp_path: Path) -> None:
    class Killed(Exception):
        pass

    def run(directory: Path | None, die_at: int = 10**9) -> secateur.Plan:
        steps = 0

        def progress(items: Any, *_: Any, **__: Any) -> Any:
            nonlocal steps
            for item in items:
                steps += 1
                if steps == die_at:
                    raise Killed
                yield item

        model = copy.deepcopy(llama)
        plan = None
        try:
            run = context(model, checkpoint=Checkpoint(directory), progress=progress)
            plan = run.method.plan(run)
        finally:
            assert all(torch.equal(a, b) for a, b in zip(model.parameters(), llama.parameters()))
        return plan

    whole = run(None)
    for die_at in (3, 6, 10):  # within a supernet, within a search, within the second supernet
        directory = tmp_path / str(die_at)
        with pytest.raises(Killed):
            run(directory, die_at)
        assert list(directory.iterdir())
        assert run(directory) == whole


def test_versions_on_disk_give_the_same_plan_and_are_removed(llama: nn.Module, tmp_path: Path) -> None:
    settings = dict(method="tyr", target="75%", data=ids(llama), **QUICK)
    memory = secateur.prune(llama, **settings).plan
    disk = secateur.prune(llama, offload=str(tmp_path), **settings).plan
    assert all(torch.equal(memory.keep[name], disk.keep[name]) for name in memory.keep)
    assert all(torch.equal(memory.values[name], disk.values[name]) for name in memory.values)
    assert not list(tmp_path.iterdir())


def test_the_published_hyperparameters_run(llama: nn.Module) -> None:
    method = Tyr(**PAPER | {"generations": 1, "offspring": 4, "rounds": 1})
    assert method.tokens == (2048, 16384, 131072) and method.survivors == (16, 4, 2) and method.topk == 8192
    assert method.plan(context(llama, method=method)).keep


def test_bad_settings_are_refused() -> None:
    with pytest.raises(SecateurError, match="one of mean, median, off"):
        Tyr(expected="average")
    with pytest.raises(SecateurError, match="one of each"):
        Tyr(tokens=(128.0,), survivors=(4, 2))
    with pytest.raises(SecateurError, match="one of each"):
        Tyr(tokens=(), survivors=())
    with pytest.raises(SecateurError, match="float17"):
        Tyr(dtype="float17")


@pytest.mark.needs_data
def test_search_and_refit_pay_on_a_trained_model(aidreams: tuple[nn.Module, Any]) -> None:
    """On text the model wrote itself: fresh text for the refit, the text it searched on for the search."""
    from secateur.data.text import sample_from
    from secateur.surgery import mask_units
    from secateur.surgery.changes import set_values

    model, _ = aidreams
    data, fresh = sample_from(model, 32, 96, seed=1), sample_from(model, 32, 96, seed=2)

    def divergence(plan: secateur.Plan, run: Context, where: torch.Tensor, refit: bool = True) -> float:
        pruned = copy.deepcopy(model)
        if refit:
            set_values(pruned, plan.values)
        mask_units(pruned, run.graph, plan.keep)
        with torch.no_grad():
            return float(topk_kl(model(where).logits, pruned(where).logits).mean())

    base = context(model, "70%", Tyr(generations=0), data=data)
    settings: dict[str, Any] = {"rounds": 2, "offspring": 12, "tokens": (0.125, 1.0), "survivors": (4, 1)}
    searched = context(model, "70%", Tyr(**settings, topk=256, supernet=1.0, final=False), data=data)
    even, found = base.method.plan(base), searched.method.plan(searched)
    assert divergence(even, base, fresh) < 0.8 * divergence(even, base, fresh, refit=False)
    assert divergence(found, searched, data) < divergence(even, base, data)
