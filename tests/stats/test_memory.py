"""The memory estimate against what the profiler sees, and how it grows."""

from types import SimpleNamespace

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from secateur.graph.blocks import find_matrices
from secateur.method import make_method
from secateur.pruning.select import Pattern
from secateur.stats.memory import _choosing, estimate
from secateur.stats.stream import stream


def prune(model, ids, method):
    matrices = find_matrices(model)
    with torch.no_grad():
        for block in stream(model, ids, method.needs, matrices):
            patterns = {n: Pattern(m.numel // 2, method.scope) for n, m in block.matrices.items()}
            for name, (weight, _) in method.solve_block(block, patterns).items():
                matrices[name].set(weight)


def profiled_peak(function, *args):
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function(*args)
    now = peak = 0
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


@pytest.mark.parametrize("name", ["wanda", "sparsegpt"])
@pytest.mark.parametrize("samples", [4, 64])
def test_the_estimate_is_within_a_fifth_of_the_peak(tiny_llama, name, samples):
    model = tiny_llama(hidden_size=96, intermediate_size=256, num_hidden_layers=3)
    ids = torch.randint(0, 64, (samples, 64))
    method = make_method(name)
    predicted = estimate(model, ids, method.needs)
    measured = profiled_peak(prune, model, ids, method)
    assert 0.8 * measured < predicted < 1.2 * measured


def test_it_grows_with_samples_and_not_with_depth(tiny_llama):
    ids = torch.randint(0, 64, (64, 64))
    shallow, deep = (tiny_llama(num_hidden_layers=depth) for depth in (2, 6))
    needs = {"hessian"}
    assert estimate(shallow, ids, needs) == estimate(deep, ids, needs)
    more = estimate(shallow, torch.cat([ids, ids]), needs) - estimate(shallow, ids, needs)
    assert more == 64 * 64 * 32 * 4


def test_it_changes_nothing(tiny_llama):
    model = tiny_llama().train()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    estimate(model, torch.randint(0, 64, (4, 16)), {"hessian"})
    assert model.training and all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def test_choosing_takes_the_most_where_the_largest_matrix_is():
    def matrix(rows):
        return SimpleNamespace(shape=(rows, 8), numel=rows * 8, parts=1, parameter=torch.zeros(1))

    large, small = matrix(10), matrix(2)
    # scores, their partition and a masked copy: 12 bytes a weight; a result and its mask: 5
    assert _choosing({"a": large, "b": small}, {}) == 12 * 80
    assert _choosing({"a": small, "b": large}, {}) == 5 * 16 + 12 * 80
    assert _choosing({name: small for name in "a"}, {}) == 12 * 16
    many = {str(n): matrix(2) for n in range(5)}
    assert _choosing(many, {}) == 4 * 5 * 16 + 12 * 16
