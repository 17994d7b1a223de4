"""The worked examples and invariants of ecoflap, and the allocations that any weight method takes."""

import pytest
import torch

import secateur
from secateur import SecateurError
from secateur.graph.blocks import find_matrices
from secateur.methods.ecoflap import ECoFLaP
from secateur.pruning.allocate import arithmetic_shares, coarse_to_fine


@pytest.mark.parametrize(
    ("sizes", "scores", "keep", "most", "expected"),
    [
        ([1000, 1000, 2000], [5, 1, 2], 2000, 0.6, [650, 450, 900]),
        ([1000] * 3, [20, 1, 1], 1500, 0.6, [672, 414, 414]),
        ([1000] * 3, [200, 1, 1], 1500, 0.8, [1000, 250, 250]),
        ([1000, 700, 300], [0, 0, 1], 1000, 0.6, [411, 289, 300]),
        ([1000] * 4, [3, 3, 3, 3], 2000, 0.6, [500] * 4),  # equal scores and sizes
        ([1000] * 4, [9, 1, 3, 3], 1200, 0.7, [300] * 4),  # a cap at the mean
        ([10, 10], [0, 0], 20, 1.0, [10, 10]),
    ],
)
def test_shares_of_the_sheet(sizes, scores, keep, most, expected):
    assert coarse_to_fine(sizes, scores, keep, most) == expected
    assert coarse_to_fine(sizes, [score * 1e-6 for score in scores], keep, most) == expected


def test_any_scores_meet_the_budget_and_the_cap():
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        count = int(torch.randint(2, 9, (), generator=generator))
        sizes = torch.randint(5, 900, (count,), generator=generator).tolist()
        scores = (torch.rand(count, generator=generator) ** 8).tolist()
        share = float(torch.rand((), generator=generator)) * 0.8 + 0.1
        keep, most = int(share * sum(sizes)), min(1.0, 1 - share + 0.1)
        kept = coarse_to_fine(sizes, scores, keep, most)
        assert sum(kept) == keep
        assert all(int(size * (1 - most)) <= n <= size for n, size in zip(kept, sizes, strict=True))


def test_nonsense_for_shares_is_refused():
    with pytest.raises(SecateurError, match="0 or more"):
        coarse_to_fine([10, 10], [1, -1], 10, 0.6)
    with pytest.raises(SecateurError, match="0 or more"):
        coarse_to_fine([10, 10], [1, float("nan")], 10, 0.6)
    with pytest.raises(SecateurError, match="8 weights stay of the 4 wanted"):
        coarse_to_fine([10, 10], [1, 1], 4, 0.6)


@pytest.fixture
def model(tiny_llama):
    return tiny_llama(num_hidden_layers=4, hidden_size=32, num_attention_heads=4, num_key_value_heads=2)


def ids(model):
    return torch.randint(0, model.config.vocab_size, (8, 16), generator=torch.Generator().manual_seed(0))


def shares(pruned, by_block=True):
    found: dict = {}
    for name, mask in pruned.plan.masks.items():
        key = name.split(".")[2] if by_block else name
        kept, size = found.get(key, (0, 0))
        found[key] = (kept + int(mask.sum()), size + mask.numel())
    return {key: kept / size for key, (kept, size) in found.items()}


def test_blocks_lose_by_their_scores_and_rows_alike(model, monkeypatch):
    wanted = {0: 5.0, 1: 1.0, 2: 1.0, 3: 1.0}
    scores = lambda self, context: {
        "scores": torch.tensor([wanted[m.block] for m in context.matrices.values()])
    }
    monkeypatch.setattr(ECoFLaP, "sensitivity", scores)
    pruned = secateur.prune(model, method="ecoflap", target="50%", data=ids(model))
    size = sum(m.numel for m in find_matrices(model).values()) // 4
    expected = coarse_to_fine([size] * 4, [5, 1, 1, 1], 2 * size, 0.6)
    assert [round(share * size) for share in shares(pruned).values()] == pytest.approx(expected, abs=7)
    mask = pruned.plan.masks["model.layers.0.mlp.up_proj.weight"]
    assert int(mask.sum(1).max() - mask.sum(1).min()) <= 1  # every row loses the same


def test_without_groups_it_is_the_local_method(model):
    data = ids(model)
    for local in ("wanda", "sparsegpt"):
        alone = secateur.prune(model, method=local, target="50%", data=data)
        own = secateur.prune(model, method="ecoflap", target="50%", data=data, local=local, groups="none")
        assert own.plan.masks.keys() == alone.plan.masks.keys()
        assert all(torch.equal(mask, alone.plan.masks[name]) for name, mask in own.plan.masks.items())


def test_the_same_shares_for_any_weight_method(model):
    data = ids(model)
    own = secateur.prune(model, method="ecoflap", target="40%", data=data)
    other = secateur.prune(model, method="magnitude", target="40%", data=data, allocation="coarse-to-fine")
    assert shares(own) == pytest.approx(shares(other), abs=1e-3)
    assert max(shares(own).values()) - min(shares(own).values()) > 0.01
    layers = secateur.prune(model, method="ecoflap", target="40%", data=data, groups="layer")
    assert len(set(shares(layers, by_block=False).values())) > 4


def test_arithmetic_shares_fall_by_a_step(model):
    assert arithmetic_shares(4, 0.5, 0.2) == pytest.approx([0.8, 0.6, 0.4, 0.2])
    data = ids(model)
    given = secateur.prune(model, method="wanda", target="50%", data=data, allocation="arithmetic:0.1")
    assert list(shares(given).values()) == pytest.approx([0.65, 0.55, 0.45, 0.35], abs=1e-3)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    searched = secateur.prune(model, method="wanda", target="50%", data=data, allocation="arithmetic")
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    told = searched.plan.notes["arithmetic"]
    losses = [float(part.split()[-1]) for part in told.partition(": ")[2].split(", ")]
    step = float(told.split()[4])
    assert len(losses) == 5
    assert step == pytest.approx(0.3333 / 5 * losses.index(min(losses)), abs=1e-3)


@pytest.mark.parametrize(
    ("allocation", "told"),
    [
        ("arithmetic:much", "isn't a number"),
        ("owl:3", "owl takes no number"),
        ("arithmetic:0.4", "outside 0..1"),
        ("arithmetik", "coarse-to-fine, arithmetic"),
    ],
)
def test_allocations_that_cannot_be_are_refused(model, allocation, told):
    with pytest.raises(SecateurError, match=told):
        secateur.prune(model, method="wanda", target="50%", data=ids(model), allocation=allocation)


def test_one_block_has_nothing_to_divide_over():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    data = [(torch.randn(4, 4), torch.randint(0, 4, (4,)))]
    with pytest.raises(SecateurError, match="groups=layer"):
        secateur.prune(model, method="ecoflap", target="50%", data=data)
    pruned = secateur.prune(model, method="ecoflap", target="50%", data=data, groups="layer")
    assert pruned.report["met"]
