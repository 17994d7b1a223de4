"""Models and inputs that can't be pruned as they are: a named error or a sound result, and the model as it was."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import secateur
from secateur.errors import SecateurError

X = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """Three layers, 6 -> 8 -> 8 -> 4; `run` is the forward."""

    def __init__(self, run=None):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 4)
        self.register_buffer("calls", torch.zeros(1))
        self.run = run or (lambda net, x: net.c(F.relu(net.b(F.relu(net.a(x))))))

    def forward(self, *args, **kwargs):
        return self.run(self, *args, **kwargs)


def state(model):
    return {
        **{name: tensor.clone() for name, tensor in model.state_dict().items()},
        "modes": [m.training for m in model.modules()],
    }


def same(a, b):
    return a.keys() == b.keys() and all(
        torch.equal(a[k], b[k]) if isinstance(a[k], torch.Tensor) else a[k] == b[k] for k in a
    )


def pruned(model, inputs=X, target="50%", **settings):
    """The result or the error; in a copy and in place, and a failure leaves the model bit for bit as it was."""
    before, random = state(model), torch.get_rng_state()
    try:
        return secateur.prune(model, inputs, method="group-magnitude", target=target, **settings)
    except SecateurError as error:
        with pytest.raises(SecateurError):
            secateur.prune(model, inputs, method="group-magnitude", target=target, inplace=True, **settings)
        assert torch.equal(random, torch.get_rng_state())
        return error
    finally:
        assert same(before, state(model))


def refused(*args, match, **kwargs):
    error = pruned(*args, **kwargs)
    assert isinstance(error, SecateurError)
    assert match in str(error)
    return error


def turns(net, x):
    net.calls += 1
    h = F.relu(net.a(x))
    return net.c(h + net.b(h) if net.calls % 2 else h.flip(1))


def grows(net, x):
    net.calls += 1
    return net.c(net.a(x))[:, : 2 + int(net.calls) % 2]


def draws(net, x):
    return net.c(F.relu(net.a(x)) * torch.rand(3, 1))


def chooses(net, x):
    h = F.relu(net.a(x))
    return net.c(net.b(h) if torch.rand(()) > 0.5 else h)


@pytest.mark.parametrize("run", [turns, grows, draws, chooses])
def test_another_graph_at_each_call(run):
    refused(Net(run), match="gives other outputs for the same inputs")
    assert isinstance(pruned(Net(draws), prove=False), secateur.Pruned)


def test_random_numbers_without_effect_are_no_reason():
    def run(net, x):
        torch.rand(())
        return net.c(F.relu(net.a(x)))

    assert len(pruned(Net(run)).plan.keep["a:neurons"]) == 4


def adds_halves(net, x):
    h = net.a(x)
    v = h.view(-1, 2, 4)
    v[:, 0] += v[:, 1]
    v.transpose(1, 2).mul_(2)
    h[:, ::2].relu_()
    return net.c(net.b(h))


def test_writes_into_views_are_cut_soundly_or_left_with_a_reason():
    result = pruned(Net(adds_halves))
    assert list(result.plan.keep) == ["b:neurons"]
    masked = Net(adds_halves)
    secateur.surgery.mask_units(masked, result.graph, result.plan.keep)
    torch.testing.assert_close(result.model(X), masked(X))
    assert all(g["reason"] for g in result.report["groups"] if g["kept"] == g["size"])


def test_a_strided_view_has_no_rule():
    def run(net, x):
        h = net.a(x)
        torch.as_strided(h, (len(x), 4), (8, 2)).add_(1)
        return net.c(h)

    refused(Net(run), match="no rule for this as_strided (as_strided, test_bad_inputs.py:")


def test_a_module_used_twice_is_cut_once():
    result = pruned(Net(lambda net, x: net.c(net.b(F.relu(net.b(F.relu(net.a(x))))))))
    (kept,) = result.plan.keep.values()
    assert tuple(result.model.b.weight.shape) == (4, 4) and len(kept) == 4
    assert tuple(result.model(X).shape) == (3, 4)
    result.model(X).sum().backward()


def test_a_module_used_twice_where_it_cannot_shrink():
    class Loop(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.s, self.c = nn.Linear(6, 8), nn.Linear(8, 6), nn.Linear(6, 4)

        def forward(self, x):
            return self.c(self.s(F.relu(self.a(self.s(F.relu(self.a(x)))))))

    result = pruned(Loop())
    assert (result.model.a.out_features, result.model.s.out_features) == (4, 6)
    reasons = {g["name"]: g["reason"] for g in result.report["groups"]}
    assert "the input of a linear layer is fixed" in reasons["s:neurons"]


def test_outputs_are_frozen():
    def everything(net, x):
        h = net.a(x)
        g = net.b(h)
        return {"all": (net.c(g), h), "more": [g]}

    error = refused(Net(everything), match="nothing can be cut")
    assert str(error).count("it is an output of the model") >= 2


def test_classes_that_are_told_by_their_number_stay():
    result = pruned(Net(lambda net, x: net.c(F.relu(net.a(x))).argmax(1)))
    assert result.model.c.out_features == 4 and result.model.a.out_features == 4


@pytest.mark.parametrize(
    ("inputs", "match"),
    [
        (torch.randn(3, 7), "mat1 and mat2 shapes cannot be multiplied"),
        ((X, X), "takes 2 positional arguments but 3"),
        ({"y": X}, "unexpected keyword argument 'y'"),
        (X.long(), "must have the same dtype"),
        (X[:0], "returns no values"),
        ("x", "inputs is a str"),
        (None, "inputs can't be guessed"),
    ],
)
def test_wrong_inputs(inputs, match):
    refused(Net(lambda net, x: net.c(net.a(x))), inputs, match=match)


def test_a_model_that_fails_or_returns_nothing():
    def fails(net, x):
        raise ZeroDivisionError("by hand")

    refused(Net(fails), match="ZeroDivisionError: by hand")
    refused(Net(lambda net, x: None), match="returns no tensor")


@pytest.mark.parametrize("target", ["params<=1%", "macs<=1%"])
def test_more_than_can_be_cut_lists_what_is_frozen(target):
    error = refused(Net(), target=target, match="can't be met")
    assert "not cut: " in str(error) and "c:neurons: it is an output of the model" in str(error)


def test_what_running_changes_is_put_back():
    def counts(net, x):
        net.calls += 1
        return net.c(F.relu(net.a(x)))

    model = Net(counts).train()
    model.b.eval()
    result = pruned(model)
    assert float(result.model.calls) == 0
    assert result.model.training and not result.model.b.training and result.model.c.training
    secateur.prune(model, X, method="group-magnitude", target="50%", inplace=True)
    assert float(model.calls) == 0 and model.training and not model.b.training
