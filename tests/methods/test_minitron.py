"""Minitron: activations by hand, the released scores on a random model, and blocks by influence and by loss."""

import copy

import pytest
import torch
from torch import nn

import secateur
from secateur import SecateurError


def test_mean_over_tokens_then_norm_over_sequences_by_hand():
    """Hidden units x1, x2 and -x1 - x2 of |x|: the first is loud once, the second always, the third more than both."""
    net = nn.Sequential(nn.Linear(2, 3, bias=False), nn.Identity(), nn.Linear(3, 1, bias=False))
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, -1.0]]))
    data = torch.tensor([[[6.0, 3.0], [0.0, 3.0], [0.0, 3.0]], [[0.0, 1.0], [0.0, 1.0], [0.0, 1.0]]])

    def left(**settings):
        pruned = secateur.prune(net, data[:1], method="minitron", target="67%", data=data, **settings)
        return pruned.plan.keep["0:neurons"].tolist(), pruned.scores["0:neurons"].tolist()

    # means 2, 3, 5 and 0, 1, 1
    keep, scores = left()
    assert keep == [1, 2] and scores == pytest.approx([2, 10**0.5, 26**0.5])
    # norms 6, √27, √(81 + 9 + 9) and 0, √3, √3
    keep, scores = left(over_tokens="l2", over_samples="mean")
    assert scores == pytest.approx([3, (27**0.5 + 3**0.5) / 2, (99**0.5 + 3**0.5) / 2]) and keep == [1, 2]
    keep, scores = left(over_tokens="l2")
    assert scores == pytest.approx([6, 30**0.5, 102**0.5]) and keep == [0, 2]


@pytest.fixture
def model(tiny_llama):
    model = tiny_llama(num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=4, head_dim=8)
    with torch.no_grad():
        for layer in model.model.layers:
            for norm in (layer.input_layernorm, layer.post_attention_layernorm):
                norm.weight.uniform_(0.5, 1.5)
    return model


@pytest.fixture
def ids():
    return torch.randint(0, 64, (5, 24), generator=torch.Generator().manual_seed(1))


def test_the_released_scores_on_a_random_model(model, ids):
    squares: dict[str, torch.Tensor] = {}

    def watch(name, module, of_input):
        def hook(module, args, output):
            value = (args[0] if of_input else output).float()  # [sequences, tokens, width]
            squares[name] = squares.get(name, 0) + value.abs().mean(1).pow(2).sum(0)

        return module.register_forward_hook(hook)

    handles = []
    for n, layer in enumerate(model.model.layers):
        handles += [
            watch(f"{n} mlp", layer.mlp.down_proj, True),
            watch(f"{n} heads", layer.self_attn.o_proj, True),
            watch(f"{n} stream a", layer.input_layernorm, False),
            watch(f"{n} stream b", layer.post_attention_layernorm, False),
        ]
    with torch.no_grad():
        model(ids[:3])
        model(ids[3:])
    for handle in handles:
        handle.remove()
    pruned = secateur.prune(model, method="minitron", target="params<=55%", data=ids)
    stream = torch.stack([value.sqrt() for name, value in squares.items() if "stream" in name]).sum(0)
    assert torch.allclose(pruned.scores["stem:hidden"], stream, rtol=1e-4)
    kept = pruned.plan.keep["stem:hidden"]
    assert set(kept.tolist()) == set(stream.topk(len(kept)).indices.tolist())
    for n in range(4):
        neurons = squares[f"{n} mlp"].sqrt()
        heads = torch.linalg.vector_norm(squares[f"{n} heads"].sqrt().view(8, 8), dim=1)
        groups = heads.view(4, 2).square().sum(1).sqrt()  # two heads over one key and value
        assert torch.allclose(pruned.scores[f"model.layers.{n}.mlp:neurons"], neurons, rtol=1e-4)
        assert torch.allclose(pruned.scores[f"model.layers.{n}.self_attn:kv_groups"], groups, rtol=1e-4)
        kept = pruned.plan.keep[f"model.layers.{n}.self_attn:kv_groups"]
        assert set(kept.tolist()) == set(groups.topk(len(kept)).indices.tolist())


def test_layers_stay_alike_so_that_the_config_says_it(model, ids, tmp_path):
    from transformers import AutoModelForCausalLM

    pruned = secateur.prune(
        model, method="minitron", target="60%", data=ids, kinds=("neurons", "hidden"), round_to=8
    )
    config = pruned.model.config
    assert config.hidden_size % 8 == 0 and config.hidden_size < 32
    pruned.save(tmp_path / "small")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    assert torch.equal(plain(ids).logits, pruned.model(ids).logits)


def test_depth_by_influence_is_shortgpt(model, ids):
    own = secateur.prune(model, method="minitron", target="50%", data=ids, axis="depth")
    other = secateur.prune(model, method="shortgpt", target="50%", data=ids)
    assert own.plan.keep["model.layers:layers"].tolist() == other.plan.keep["model.layers:layers"].tolist()


def test_depth_by_loss_without_each_block(model, ids):
    def without(index):
        clone = copy.deepcopy(model)
        del clone.model.layers[index]
        for n, layer in enumerate(clone.model.layers):
            layer.self_attn.layer_idx = n
        clone.config.num_hidden_layers = clone.model.config.num_hidden_layers = 3
        with torch.no_grad():
            return clone(ids, labels=ids, use_cache=False).loss.item()

    losses = [without(index) for index in range(4)]
    pruned = secateur.prune(model, method="minitron", target="75%", data=ids, axis="depth", blocks_by="loss")
    assert pruned.scores["model.layers:layers"].tolist() == pytest.approx(losses, abs=1e-5)
    gone = set(range(4)) - set(pruned.plan.keep["model.layers:layers"].tolist())
    assert gone == {losses.index(min(losses))}
    assert not any(module._forward_hooks for module in model.modules())


def test_an_axis_that_the_kinds_leave_nothing_of_is_refused(model, ids):
    with pytest.raises(SecateurError, match="axis depth"):
        secateur.prune(model, method="minitron", target="75%", data=ids, axis="depth", kinds=("neurons",))
