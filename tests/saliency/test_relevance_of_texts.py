"""Relevance through decoders of language models: it is conserved, and it is what gradient times input is of a model whose
operations were replaced by hand."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from secateur.saliency import Composite, propagate
from secateur.saliency.text import NextToken

TINY = 1e-13


def decoder(kind="Llama", attention="sdpa", **more):
    """A random decoder of two blocks with two heads of keys for four of queries, in double precision."""
    import transformers

    torch.manual_seed(0)
    settings = {
        "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 4, "max_position_embeddings": 64, "attn_implementation": attention,
    }  # fmt: skip
    config = getattr(transformers, f"{kind}Config")(**{**settings, **more})
    model = getattr(transformers, f"{kind}ForCausalLM")(config).double().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.3)
            elif "norm" in name:
                nn.init.uniform_(parameter, 0.5, 1.5)
    return model


def row(model, length=7):
    """Embedded tokens as a picture of one row, [1, width, 1, length]."""
    ids = torch.arange(3, 3 + length)[None]
    return model.get_input_embeddings()(ids).detach().transpose(1, 2)[:, :, None]


def likeliest(logits):
    return logits * F.one_hot(logits.argmax(1), logits.shape[1])


def rules(attention):
    return Composite(conv="epsilon", linear="epsilon", epsilon=TINY, attention=attention)


@pytest.mark.parametrize(
    ("kind", "attention"),
    [*((kind, how) for kind in ("Llama", "Qwen3", "Mistral", "Olmo2") for how in ("sdpa", "eager")), ("Gemma2", "eager")],
)  # fmt: skip
def test_all_of_the_logit_arrives_at_the_tokens(kind, attention):
    model = decoder(kind, attention)
    x = row(model)
    with torch.no_grad():
        logit = NextToken(model)(x).max()
    found = propagate(NextToken(model), x, likeliest, rules("values"))
    assert found.sum().item() == pytest.approx(logit.item(), rel=1e-6)
    assert (found.sum(1).flatten().abs() > 1e-4).sum() >= 6, "it isn't all at one token"


def test_biases_keep_what_is_theirs():
    """Qwen2 adds biases to queries, keys and values: with those of the values gone, all of it arrives."""
    model = decoder("Qwen2")
    x = row(model)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.v_proj.bias.fill_(0.3)
    logit = NextToken(model)(x).max().item()
    lost = propagate(NextToken(model), x, likeliest, rules("values")).sum().item()
    assert abs(lost - logit) > 1e-3 * abs(logit)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.v_proj.bias.zero_()
    logit = NextToken(model)(x).max().item()
    assert propagate(NextToken(model), x, likeliest, rules("values")).sum().item() == pytest.approx(
        logit, rel=1e-6
    )


class Half(torch.autograd.Function):
    """The gradient is divided by a number."""

    @staticmethod
    def forward(ctx, x, by):
        ctx.by = by
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return g / ctx.by, None


class ByHand(TorchFunctionMode):
    """Operations whose gradient times input is relevance, written another way (Achtibat et al. 2024, section 3; LXT):
    norms divide by a constant, activations are factors, of a product each factor gets half."""

    def __init__(self, attention):
        super().__init__()
        self.attention = attention

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.rsqrt:
            return func(args[0].detach())
        if func is F.silu:
            x = args[0]
            return x * (func(x) / x).detach()
        if func is torch.Tensor.mul and all(t.requires_grad for t in args):
            return func(*(Half.apply(t, 2) for t in args))
        if func is F.scaled_dot_product_attention:
            q, k, v = args
            if self.attention == "values":
                return func(q.detach(), k.detach(), v, **kwargs)
            return func(Half.apply(q, 4), Half.apply(k, 4), Half.apply(v, 2), **kwargs)
        return func(*args, **kwargs)


@pytest.mark.parametrize("kind", ["Llama", "Qwen3", "Mistral"])
@pytest.mark.parametrize("attention", ["values", "softmax"])
def test_relevance_is_gradient_times_input_of_operations_replaced_by_hand(kind, attention):
    model = decoder(kind).requires_grad_(False)
    x = row(model).requires_grad_(True)
    with ByHand(attention):
        logits = NextToken(model)(x)
    (gradient,) = torch.autograd.grad(logits.max(), x)
    expected = (gradient * x).detach()
    assert expected.abs().max() > 1e-3
    found = propagate(NextToken(model), x, likeliest, rules(attention))
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-6 * expected.abs().max().item()), (
        "norms are in float32"
    )
    other = propagate(
        NextToken(model), x, likeliest, rules("values" if attention == "softmax" else "softmax")
    )
    assert not torch.allclose(other, expected, rtol=1e-2)


@pytest.mark.parametrize("more", [{}, {"sliding_window": 3}])
def test_attention_in_either_implementation_hands_on_the_same(more):
    found = []
    for attention in ("sdpa", "eager"):
        model = decoder("Mistral", attention, **more)
        found.append(propagate(NextToken(model), row(model), likeliest, rules("softmax")))
    assert torch.allclose(*found, rtol=1e-4, atol=1e-6), "`eager` takes its softmax in float32"


def test_a_softmax_hands_on_by_a_taylor_step():
    """By hand: x = (0, ln 3) has weights 1/4 and 3/4; with R = (1, 2) the sum is 3, so R_1 = 0 and R_2 = ln 3 (2 - 9/4)."""

    class Weights(nn.Module):
        def forward(self, x):
            return torch.softmax(x, -1)

    x = torch.tensor([[0.0, 3.0]]).double()
    x[0, 1] = x[0, 1].log()
    found = propagate(Weights(), x, lambda z: torch.tensor([[1.0, 2.0]]), rules("softmax"))
    assert torch.allclose(found, torch.tensor([[0.0, -0.25]]).double() * x[0, 1])
