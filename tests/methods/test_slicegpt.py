"""SliceGPT with one rotation: components by hand, what a rotation leaves alone, and the released formulas on a random model."""

import copy

import pytest
import torch
from torch import nn

import secateur
from secateur import SecateurError
from secateur.graph import trace
from secateur.methods.slicegpt import principal
from secateur.solvers.rotation import changes_nothing, find_stream, rotated, scale_of
from secateur.stats.streams import second_moments
from secateur.surgery.changes import set_values


def test_principal_components_by_hand():
    """[[5, 4], [4, 5]] has (1, 1)/√2 with 9 and (1, -1)/√2 with 1."""
    values, vectors = principal(torch.tensor([[5.0, 4.0], [4.0, 5.0]]))
    assert values.tolist() == pytest.approx([9, 1])
    assert vectors[:, 0].abs().tolist() == pytest.approx([0.5**0.5] * 2)
    assert vectors[0, 1] * vectors[1, 1] < 0


@pytest.fixture
def make(tiny_llama):
    def build(**overrides):
        model = tiny_llama(num_hidden_layers=3, **overrides)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "norm" in name:
                    parameter.uniform_(0.5, 1.5)
                if "embed" in name:
                    parameter.mul_(50)  # so that the norms' epsilon is nothing beside it
        return model

    return build


@pytest.fixture
def ids():
    return torch.randint(0, 64, (5, 24), generator=torch.Generator().manual_seed(1))


def stream_of(model, ids):
    inputs = {"input_ids": ids[:2]}
    graph = trace(model, inputs)
    return find_stream(model, graph, graph["stem:hidden"], inputs), inputs


@pytest.mark.parametrize("tied", [False, True])
def test_a_rotation_of_the_whole_stream_changes_nothing(make, ids, tied):
    model = make(tie_word_embeddings=tied)
    stream, inputs = stream_of(model, ids)
    assert stream.reads["lm_head.weight"] == "model.norm"
    assert stream.reads["model.layers.1.mlp.up_proj.weight"] == "model.layers.1.post_attention_layernorm"
    turn = torch.linalg.qr(torch.randn(32, 32, dtype=torch.float64))[0]
    values = rotated(model, stream, turn)
    assert changes_nothing(model, values, inputs, 1e-5) is None
    other = copy.deepcopy(model)
    set_values(other, values)
    assert not other.config.tie_word_embeddings and model.config.tie_word_embeddings is tied
    assert not torch.allclose(other.model.embed_tokens.weight, model.model.embed_tokens.weight)
    # and a turn that is none is noticed
    assert changes_nothing(model, rotated(model, stream, 2 * turn), inputs, 1e-5) is not None


def test_moments_are_of_what_norms_are_given(make, ids):
    model = make()
    seen = []
    handle = model.model.layers[1].input_layernorm.register_forward_pre_hook(
        lambda m, args: seen.append(args[0])
    )
    with torch.no_grad():
        model(ids)
    handle.remove()
    x = seen[0].flatten(0, 1).double()
    path = "model.layers.1.input_layernorm"
    assert torch.allclose(
        second_moments(model, ids, [path], normalised=False)[path], x.T @ x / len(x), atol=1e-5
    )
    x = x / x.square().mean(1, keepdim=True).sqrt()
    assert torch.allclose(second_moments(model, ids, [path])[path], x.T @ x / len(x), atol=1e-4)


def test_the_released_formulas_with_one_rotation(make, ids):
    """Inputs: W · scale · Q; outputs: Qᵀ W; embeddings: E Q; the first k of each; norms divide by the dense width."""
    model = make()
    pruned = secateur.prune(model, method="slicegpt", target="75%", data=ids)
    kept = pruned.model.config.hidden_size
    norms = [name for name, module in model.named_modules() if "norm" in name.rpartition(".")[2]]
    moments = torch.stack([*second_moments(model, ids, norms).values()]).mean(0)
    turn = principal(moments)[1][:, :kept]
    expected = copy.deepcopy(model).double()

    class Norm(nn.Module):
        def forward(self, x):
            return x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) / 32 + 1e-6)

    def fold(linear, norm):
        linear.weight = nn.Parameter((linear.weight * norm.weight) @ turn)

    for layer in expected.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        for linear in (attention.q_proj, attention.k_proj, attention.v_proj):
            fold(linear, layer.input_layernorm)
        for linear in (mlp.gate_proj, mlp.up_proj):
            fold(linear, layer.post_attention_layernorm)
        for linear in (attention.o_proj, mlp.down_proj):
            linear.weight = nn.Parameter(turn.T @ linear.weight)
        layer.input_layernorm = layer.post_attention_layernorm = Norm()
    fold(expected.lm_head, expected.model.norm)
    expected.model.norm = Norm()
    expected.model.embed_tokens.weight = nn.Parameter(expected.model.embed_tokens.weight @ turn)
    assert torch.allclose(pruned.model(ids).logits.double(), expected(ids).logits, atol=1e-4)


def test_what_has_no_variance_leaves_without_a_loss(make, ids):
    """A stream that lies in 20 of 32 dimensions, in no coordinate alone."""
    model = make()
    basis = torch.linalg.qr(torch.randn(32, 20))[0]
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(model.model.embed_tokens.weight @ basis @ basis.T)
        for layer in model.model.layers:
            for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
                linear.weight.copy_(basis @ basis.T @ linear.weight)
    before = model(ids).logits
    pruned = secateur.prune(model, method="slicegpt", target="63%", data=ids)
    assert pruned.model.config.hidden_size == 20
    assert torch.allclose(pruned.model(ids).logits, before, atol=1e-4)


def test_a_tied_head_counts_when_parameters_are_bounded(make, ids, tmp_path):
    from transformers import AutoModelForCausalLM

    model = make(tie_word_embeddings=True)
    pruned = secateur.prune(model, method="slicegpt", target="params<=90%", data=ids, round_to=4)
    report = pruned.report
    assert report["after"]["params"] <= 0.9 * report["before"]["params"]
    assert pruned.model.lm_head.weight is not pruned.model.model.embed_tokens.weight
    pruned.save(tmp_path / "small")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    assert torch.equal(plain(ids).logits, pruned.model(ids).logits)


def test_scales_are_read_off_what_a_norm_does():
    class FromOne(nn.RMSNorm):  # as Gemma keeps it
        def forward(self, x):
            return nn.functional.rms_norm(x, (4,)) * (1 + self.weight)

    norm = FromOne(4)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([0.5, -0.2, 0.0, 1.0]))
    scale, added = scale_of(norm)
    assert scale.tolist() == pytest.approx([1.5, 0.8, 1.0, 2.0]) and added == 1
    with pytest.raises(SecateurError, match="LayerNorm isn't a norm by the root mean square"):
        scale_of(nn.LayerNorm(4))


def test_what_cannot_be_turned_is_refused_and_left_alone(ids):
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2
    )
    model = GPT2LMHeadModel(config).eval()
    before = model(ids).logits
    with pytest.raises(SecateurError, match="LayerNorm"):
        secateur.prune(model, method="slicegpt", target="75%", data=ids, inplace=True)
    assert torch.equal(model(ids).logits, before)
    with pytest.raises(SecateurError, match="and no neurons"):
        secateur.prune(model, method="slicegpt", target="75%", data=ids, kinds=("hidden", "neurons"))
    with pytest.raises(SecateurError, match="turns a stream once"):
        secateur.prune(model, method="slicegpt", target="75%", data=ids, schedule="iterative:2")
