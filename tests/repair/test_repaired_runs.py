"""`prune(..., repair=)`: every method takes every repair, masks stay, the error falls, a killed run goes on to the same bits."""

import copy

import pytest
import torch
from torch import nn

import secateur
from secateur import SecateurError
from secateur.graph.blocks import find_matrices
from secateur.method import own_methods
from secateur.pruning.method import UnitMethod, WeightMethod
from secateur.pruning.resume import Checkpoint

IDS = torch.randint(0, 64, (16, 32), generator=torch.Generator().manual_seed(1))
UNSEEN = torch.randint(0, 64, (16, 32), generator=torch.Generator().manual_seed(2))
OF_UNITS = {"kinds": ("kv_groups", "neurons"), "prove": False}
WEIGHTS = [n for n, c in own_methods().items() if issubclass(c, WeightMethod) and n != "sd-prune"]
UNITS = [
    n
    for n, c in own_methods().items()
    if issubclass(c, UnitMethod) and not c.unrepaired and c.kinds not in (("experts",), ("novices",))
]


@pytest.fixture
def llama(tiny_llama):
    return tiny_llama(initializer_range=0.2, num_hidden_layers=3)


def off(model, other, ids=UNSEEN):
    """The error of the last hidden states, as a share of the dense model's square."""
    with torch.no_grad():
        a, b = (m.model(ids).last_hidden_state for m in (model, other))
    return float((a - b).square().sum() / a.square().sum())


def pruned(model, method, target="50%", **settings):
    settings = {"data": IDS, "seqlen": 32, **settings}
    return secateur.prune(model, method=method, target=target, **settings)


@pytest.mark.parametrize("method", WEIGHTS)
def test_every_method_of_single_weights_is_repaired(llama, method):
    alone, obs, fitted = (pruned(llama, method, repair=r) for r in ("none", "obs", "reconstruct"))
    assert off(llama, fitted.model) < off(llama, alone.model)
    assert off(llama, obs.model) < off(llama, alone.model)
    for result in (obs, fitted):
        for name, mask in result.plan.masks.items():
            weight = result.model.get_parameter(name)
            assert not weight[~mask].any() and torch.equal(weight, result.plan.values[name])
    assert fitted.report["after"]["params_nonzero"] == alone.report["after"]["params_nonzero"]
    again = copy.deepcopy(llama)
    secateur.apply_plan(again, fitted.plan)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), fitted.model.parameters()))


@pytest.mark.parametrize("method", UNITS)
def test_every_method_of_units_is_repaired(llama, method):
    cls = own_methods()[method]
    kinds = [k for k in ("kv_groups", "neurons") if cls.kinds is None or k in cls.kinds] or None
    settings = {**cls.quick, "prove": False, **({"kinds": tuple(kinds)} if kinds else {})}
    before = [p.clone() for p in llama.parameters()]
    try:
        alone = pruned(llama, method, "70%", repair="none", **settings)
    except SecateurError as error:
        pytest.skip(str(error))
    fitted = pruned(llama, method, "70%", repair="reconstruct", **settings)
    assert fitted.plan.keep.keys() == alone.plan.keep.keys()
    assert off(llama, fitted.model) < off(llama, alone.model)
    assert all(torch.equal(a, b) for a, b in zip(llama.parameters(), before))


@pytest.mark.parametrize("repair", ["bias", "obs"])
def test_what_read_a_unit_makes_up_for_it(llama, repair):
    alone, fitted = (pruned(llama, "taylor", "70%", repair=r, **OF_UNITS) for r in ("none", repair))
    assert off(llama, fitted.model, IDS) < off(llama, alone.model, IDS)
    biases = [name for name in fitted.plan.values if name.endswith("bias")]
    assert bool(biases) == (repair == "bias")


def test_n_m_keeps_its_pattern(llama):
    result = pruned(llama, "wanda", "2:4", repair="reconstruct")
    for name, matrix in find_matrices(result.model).items():
        assert ((matrix.weight() != 0).unflatten(1, (-1, 4)).sum(-1) <= 2).all(), name


def test_a_bias_that_is_new_makes_up_for_the_mean_exactly():
    """Two blocks y = W x with x always (1, 1, 1): what left is a constant, and the bias gives it back."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(3, 3, bias=False)

        def forward(self, x):
            return x + self.inner(torch.ones_like(x))

    torch.manual_seed(0)
    model = nn.Sequential(*[Block() for _ in range(2)])
    x = torch.randn(8, 3)
    result = secateur.prune(model, x, method="wanda", target="34%", data=x, repair="bias")
    assert torch.allclose(result.model(x), model(x), atol=1e-5)


def test_a_weight_with_a_double_gives_its_work_to_it():
    """Neurons in pairs, one a tenth of the other: w h + w/2 h/10 is 1.05 w h, which the one that stays can do alone."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))
    with torch.no_grad():
        model[0].weight[4:], model[0].bias[4:] = model[0].weight[:4] / 10, model[0].bias[:4] / 10
        model[2].weight[:, 4:] = model[2].weight[:, :4] / 2
    x = torch.randn(64, 4)
    result = secateur.prune(
        model, x, method="group-magnitude", target="50%", data=x, repair="obs", kinds=("channels", "neurons")
    )
    kept = next(iter(result.plan.keep.values())).tolist()
    assert sorted(k % 4 for k in kept) == [0, 1, 2, 3]
    assert torch.allclose(result.model(x), model(x), atol=1e-2)
    assert torch.allclose(result.model[2].weight, model[2].weight[:, :4] * 1.05, atol=1e-2)


def test_blocks_that_left_are_made_up_for_by_the_one_before(llama):
    alone, fitted = (
        pruned(llama, "shortgpt", "67%", repair=r, repair_passes=4, prove=False)
        for r in ("none", "reconstruct")
    )
    assert off(llama, fitted.model) < off(llama, alone.model)


@pytest.mark.parametrize(("method", "settings"), [("sparsegpt", {}), ("taylor", OF_UNITS)])
def test_a_run_that_dies_goes_on_to_the_same_bits(llama, tmp_path, monkeypatch, method, settings):
    settings = {"repair": "reconstruct", "repair_passes": 1, **settings}
    whole = pruned(llama, method, "60%", **settings)
    real, saved = Checkpoint.save, []

    def save(self, key, tensors):
        real(self, key, tensors)
        saved.append(key)
        if "block-1" in key or "repair-1" in key:
            raise KeyboardInterrupt

    monkeypatch.setattr(Checkpoint, "save", save)
    with pytest.raises(KeyboardInterrupt):
        pruned(llama, method, "60%", resume=tmp_path, **settings)
    monkeypatch.setattr(Checkpoint, "save", real)
    assert [*tmp_path.glob("*/*1.safetensors")]
    again = pruned(llama, method, "60%", resume=tmp_path, **settings)
    assert again.plan == whole.plan


def test_low_precision_is_fitted_in_float32_and_stored_as_it_was(llama):
    low = copy.deepcopy(llama).bfloat16()
    alone, fitted = (pruned(low, "wanda", repair=r) for r in ("none", "reconstruct"))
    assert {p.dtype for p in fitted.model.parameters()} == {torch.bfloat16}
    assert off(low, fitted.model) < off(low, alone.model)


def test_padding_does_not_count(llama):
    mask = torch.ones_like(IDS)
    mask[:, 20:] = 0
    first = {"input_ids": IDS, "attention_mask": mask}
    other = {"input_ids": torch.where(mask.bool(), IDS, 63 - IDS), "attention_mask": mask}
    a, b = (pruned(llama, "wanda", repair="reconstruct", data=[batch]) for batch in (first, other))
    for name, value in a.plan.values.items():
        assert torch.allclose(value, b.plan.values[name], atol=1e-5)


def test_a_network_without_blocks_is_one_block():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=2), nn.ReLU(), nn.Flatten(),
        nn.Linear(8 * 36, 5),
    ).eval()  # fmt: skip
    x = torch.randn(64, 3, 8, 8)
    for method, target in (("magnitude", "50%"), ("group-magnitude", "60%")):
        results = [
            secateur.prune(net, x[:2], method=method, target=target, data=x, repair=r)
            for r in ("none", "obs", "reconstruct")
        ]
        errors = [float((r.model(x) - net(x)).detach().square().mean()) for r in results]
        assert errors[1] < errors[0] and errors[2] < errors[0]


def test_a_protected_matrix_keeps_its_weights(llama):
    name = "model.layers.1.mlp.up_proj.weight"
    result = pruned(llama, "wanda", "60%", repair="reconstruct", keep=(name,))
    assert name not in result.plan.values
    assert torch.equal(result.model.get_parameter(name), llama.get_parameter(name))


def test_what_can_take_no_repair_says_so(llama):
    with pytest.raises(SecateurError, match="there is no repair 'rebuild'"):
        pruned(llama, "wanda", repair="rebuild")
    for method in ("sd-prune", "slicegpt"):
        with pytest.raises(SecateurError, match=f"{method} takes none"):
            pruned(llama, method, repair="none")
    with pytest.raises(SecateurError, match="schedule=once"):
        pruned(llama, "wanda", repair="obs", schedule="iterative:2")
    with pytest.raises(SecateurError, match="everywhere"):
        pruned(llama, "wanda", repair="obs", everywhere=True)
    with pytest.raises(SecateurError, match="the biases that it adds"):
        pruned(llama, "wanda", "params<=70%", repair="bias")
    with pytest.raises(SecateurError, match="reach over several blocks"):
        pruned(llama, "group-magnitude", "80%", repair="obs", kinds=("hidden",), prove=False)


def test_a_run_in_place_that_fails_takes_back_what_it_added(llama, monkeypatch):
    before = {name: p.clone() for name, p in llama.named_parameters()}
    from secateur.pruning import fitted

    real, blocks = fitted.Fitted.block, []

    def block(self, *args):
        blocks.append(1)
        if len(blocks) == 3:
            raise RuntimeError("the third block fails")
        return real(self, *args)

    monkeypatch.setattr(fitted.Fitted, "block", block)
    with pytest.raises(RuntimeError, match="third"):
        pruned(llama, "wanda", repair="bias", inplace=True)
    after = dict(llama.named_parameters())
    assert after.keys() == before.keys() and all(torch.equal(after[n], before[n]) for n in before)
