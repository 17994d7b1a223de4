"""Streaming agrees with whole-model hooks, on models whose forwards differ, and leaves the model alone."""

import copy

import pytest
import torch
import transformers as hf
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from secateur import SecateurError
from secateur.graph.blocks import every_matrix, find_blocks, find_matrices
from secateur.stats.collect import collect
from secateur.stats.stream import Flow, stream

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "vocab_size": 64,
}
GROUPED = {**SIZES, "num_key_value_heads": 2}
MODELS = {
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**GROUPED)),
    "gemma2": lambda: hf.Gemma2ForCausalLM(hf.Gemma2Config(**GROUPED, head_dim=8, sliding_window=4)),
    "gemma3": lambda: hf.Gemma3ForCausalLM(
        hf.Gemma3TextConfig(
            **GROUPED,
            head_dim=8,
            sliding_window=4,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        )
    ),
    "gpt2": lambda: hf.GPT2LMHeadModel(
        hf.GPT2Config(n_embd=32, n_layer=3, n_head=4, vocab_size=64, bos_token_id=0, eos_token_id=0)
    ),
    "opt": lambda: hf.OPTForCausalLM(
        hf.OPTConfig(
            hidden_size=32,
            num_hidden_layers=3,
            ffn_dim=48,
            num_attention_heads=4,
            vocab_size=64,
            word_embed_proj_dim=32,
        )
    ),
}
IDS = torch.randint(0, 64, (6, 12), generator=torch.Generator().manual_seed(1))


EXPERTS = {
    "mixtral": lambda: hf.MixtralForCausalLM(
        hf.MixtralConfig(**GROUPED, num_local_experts=4, num_experts_per_tok=2)
    ),
    "gpt_oss": lambda: hf.GptOssForCausalLM(
        hf.GptOssConfig(**GROUPED, head_dim=8, num_local_experts=4, num_experts_per_tok=2)
    ),
    "llama4": lambda: hf.Llama4ForCausalLM(
        hf.Llama4TextConfig(
            **GROUPED, head_dim=8, intermediate_size_mlp=48, num_local_experts=4, num_experts_per_tok=1
        )
    ),
}
TWO_SIDED = {
    "t5": lambda: hf.T5ForConditionalGeneration(
        hf.T5Config(d_model=32, d_ff=48, d_kv=8, num_layers=2, num_heads=4, vocab_size=64)
    ),
    "bart": lambda: hf.BartForConditionalGeneration(
        hf.BartConfig(
            d_model=32,
            encoder_layers=2,
            decoder_layers=2,
            encoder_ffn_dim=48,
            decoder_ffn_dim=48,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            vocab_size=64,
            pad_token_id=0,
        )
    ),
}


def make(name):
    torch.manual_seed(0)
    return MODELS[name]().eval()


def plain(model, batches, matrices):
    """Hessians by forward hooks on the whole model, in float64."""
    sums, hooks, count = {}, [], 0

    def hook(name):
        def add(module, args):
            rows = args[0].reshape(-1, args[0].shape[-1]).double()
            sums[name] = sums.get(name, 0) + rows.T @ rows

        return add

    for name, matrix in matrices.items():
        hooks.append(matrix.module.register_forward_pre_hook(hook(name)))
    with torch.no_grad():
        for batch in batches:
            model(batch)
            count += len(batch)
    for handle in hooks:
        handle.remove()
    return {name: 2 / count * total for name, total in sums.items()}


def close(found, expected):
    return (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def halve(matrices):
    for matrix in matrices.values():
        weight = matrix.weight().clone()
        weight[:, ::2] = 0
        matrix.set(weight)


def untouched(model):
    return not any("forward" in m.__dict__ or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("name", MODELS)
def test_dense_statistics_are_those_of_the_whole_model(name):
    model = make(name)
    matrices = find_matrices(model)
    expected = plain(model, IDS.split(2), matrices)
    seen = set()
    for block in stream(model, IDS, {"hessian", "input_norm"}, matrices, propagate=False, batch_size=2):
        for key, stats in block.stats.items():
            assert close(stats.hessian, expected[key])
            assert torch.allclose(stats.input_norm, (expected[key].diagonal() / 2).sqrt().float(), rtol=1e-4)
            seen.add(key)
        halve(block.matrices)
    assert seen == set(matrices) and untouched(model)


@pytest.mark.parametrize("name", MODELS)
def test_with_propagation_a_block_sees_what_was_done_before_it(name):
    model = make(name)
    for block in stream(model, IDS, {"hessian"}, find_matrices(model), batch_size=2):
        assert untouched(model)
        expected = plain(model, IDS.split(2), block.matrices)
        for key, stats in block.stats.items():
            assert close(stats.hessian, expected[key])
        halve(block.matrices)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_a_resumed_run_gives_the_same_bits(name):
    whole, resumed = make(name), make(name)
    first = {}
    for block in stream(whole, IDS, {"hessian"}, find_matrices(whole), batch_size=2):
        if block.index == 2:
            first = {key: stats.hessian for key, stats in block.stats.items()}
            break
        halve(block.matrices)
    halve({key: matrix for key, matrix in find_matrices(resumed).items() if matrix.block < 2})
    [block] = list_blocks(resumed, skip=2)
    assert block[0] == 2 and first
    assert all(torch.equal(block[1][key], first[key]) for key in first)


def list_blocks(model, **options):
    return [
        (block.index, {key: stats.hessian for key, stats in block.stats.items()})
        for block in stream(model, IDS, {"hessian"}, find_matrices(model), batch_size=2, **options)
    ]


def test_layers_that_read_one_tensor_share_statistics_and_factor():
    model = make("llama")
    block = next(stream(model, IDS, {"hessian"}, find_matrices(model)))
    inputs = {key.split(".")[-2]: stats.inputs for key, stats in block.stats.items()}
    assert inputs["q_proj"] is inputs["k_proj"] is inputs["v_proj"]
    assert inputs["gate_proj"] is inputs["up_proj"]
    assert len({id(shared) for shared in inputs.values()}) == 4
    assert inputs["q_proj"].tokens == [IDS.numel()]


def test_a_block_s_factors_are_dropped_when_the_next_one_comes():
    model, held = make("llama"), []
    for block in stream(model, IDS, {"hessian"}, find_matrices(model)):
        assert [len(inputs._factors) for inputs in held] == [0] * len(held)
        inputs = next(iter(block.stats.values())).inputs
        inputs.factor()
        assert len(inputs._factors) == 1
        held.append(inputs)
    assert held and not any(inputs._factors for inputs in held)


class Deep(nn.Module):
    """Blocks of one matrix; between them the model writes into what they gave."""

    def __init__(self, depth):
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(depth))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
            x += 0.1
        return x


class Copies(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten.clone.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("propagate", [True, False])
def test_the_states_that_are_copied_grow_with_the_depth_and_not_with_its_square(propagate):
    counts = []
    for depth in (4, 8, 16):
        torch.manual_seed(0)
        model, x = Deep(depth).eval(), torch.randn(3, 4)
        matrices = find_matrices(model)
        assert len(find_blocks(model)) == depth
        expected = plain(model, [x], matrices)
        with Copies() as copies:
            for block in stream(model, [x], {"hessian"}, matrices, propagate=propagate):
                for key, stats in block.stats.items():
                    assert close(stats.hessian, expected[key])
        counts.append(copies.count)
    assert counts[2] - counts[1] == 2 * (counts[1] - counts[0]) > 0


class Twice(nn.Module):
    """Two layers that read one tensor in some batches and different ones in others."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.a(x) + self.b(x if x[0, 0] > 0 else x * 2)


def test_sharing_is_given_up_where_it_does_not_hold():
    model = Twice()
    batches = [torch.ones(2, 4), -torch.ones(2, 4)]
    [block] = [dict(b.stats) for b in stream(model, batches, {"input_norm"}, find_matrices(model))]
    assert torch.allclose(block["a.weight"].input_norm, torch.ones(4))
    assert torch.allclose(block["b.weight"].input_norm, torch.full((4,), (10 / 4) ** 0.5))


def test_padding_is_left_out():
    model = make("llama")
    matrices = find_matrices(model)
    padded = torch.cat([IDS, torch.zeros_like(IDS[:, :4])], 1)
    mask = torch.cat([torch.ones_like(IDS), torch.zeros_like(IDS[:, :4])], 1)
    expected = plain(model, [IDS], matrices)
    batch = {"input_ids": padded, "attention_mask": mask}
    for block in stream(model, [batch], {"hessian"}, matrices):
        for key, stats in block.stats.items():
            assert close(stats.hessian, expected[key]) and stats.tokens == IDS.numel()


def test_experts_see_only_the_tokens_routed_to_them():
    torch.manual_seed(0)
    config = hf.MixtralConfig(**GROUPED, num_local_experts=4, num_experts_per_tok=2)
    model = hf.MixtralForCausalLM(config).eval()
    experts = model.model.layers[0].mlp.experts
    calls = []
    hook = experts.register_forward_pre_hook(lambda module, args: calls.append(args[:2]))
    with torch.no_grad():
        dense = model(IDS).logits
    hook.remove()
    block = next(stream(model, IDS, {"input_norm", "hessian"}, find_matrices(model), batch_size=6))
    name = "model.layers.0.mlp.experts.gate_up_proj"
    hidden, chosen = calls[0]
    parts = list(block.stats[name].split(block.matrices[name].weight()))
    assert len(parts) == 4 and parts[0][0].shape == (96, 32)
    for expert, (rows, stats) in enumerate(parts):
        own = hidden[(chosen == expert).any(-1)]
        assert stats.tokens == len(own) and torch.equal(rows, experts.gate_up_proj[expert])
        assert close(stats.hessian, 2 / 6 * own.T.double() @ own.double())
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, dense)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "llama4"])
def test_padding_is_left_out_of_the_statistics_of_experts(family, side):
    """Padded rows give what the sequences give one by one, each without its padding."""
    torch.manual_seed(0)
    model = EXPERTS[family]().eval()
    lengths = (12, 5, 8)
    ids, mask = torch.zeros(3, 12, dtype=torch.int64), torch.zeros(3, 12, dtype=torch.int64)
    for row, length in enumerate(lengths):
        own = slice(0, length) if side == "right" else slice(12 - length, 12)
        ids[row, own], mask[row, own] = IDS[row, :length], 1
    place = (mask.cumsum(1) - 1).clamp(min=0)
    batch = {"input_ids": ids, "attention_mask": mask, "position_ids": place}
    alone = [IDS[row : row + 1, :length] for row, length in enumerate(lengths)]
    matrices = find_matrices(model)
    with torch.no_grad():
        dense = model(**batch).logits
    for gather in (collect, stream):
        found, expected = (
            gather(model, batches, {"hessian", "input_mean"}, matrices) for batches in ([batch], alone)
        )
        if gather is collect:
            pairs = [(found, expected)]
        else:
            pairs = [(dict(a.stats), dict(b.stats)) for a, b in zip(found, expected, strict=True)]
        for left, right in pairs:
            for name in left:
                weight = matrices[name].weight()
                for (_, a), (_, b) in zip(left[name].split(weight), right[name].split(weight)):
                    assert a.tokens == b.tokens, name
                    assert close(a.hessian, b.hessian.double())
                    assert close(a.input_mean, b.input_mean.double())
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, dense)
    assert not any("forward" in module.__dict__ for module in model.modules())


class Listed(nn.Module):
    """Experts in a list, each given the rows routed to it; the second ones are single layers. Rows go by their first number."""

    def __init__(self, width=2):
        super().__init__()
        self.first = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 3, bias=False), nn.ReLU(), nn.Linear(3, width, bias=False))
            for _ in range(2)
        )
        self.second = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(2))

    def forward(self, x):
        rows, out = x.flatten(0, 1), torch.zeros_like(x).flatten(0, 1)
        for experts in (self.first, self.second):
            for number, expert in enumerate(experts):
                where = (rows[:, 0] >= 2).long() == number
                out[where] += expert(rows[where])
        return out.view_as(x)


class Mixture(nn.Module):
    def __init__(self, scaled=1):
        super().__init__()
        self.layers = nn.ModuleList([Listed()])
        self.scaled = scaled

    def forward(self, hidden, attention_mask=None):
        for layer in self.layers:
            hidden = layer(hidden)
        return hidden


def test_padding_is_left_out_where_experts_are_modules_of_a_list():
    """Sums by hand; a row of padding is equal to one in view, and goes to the same expert."""
    torch.manual_seed(0)
    model = Mixture().eval()
    hidden = torch.tensor([[[1.0, 1], [2, 0], [9, 9]], [[3, 2], [1, 1], [1, 1]]])
    mask = torch.tensor([[1, 1, 0], [1, 1, 0]])
    batch = {"hidden": hidden, "attention_mask": mask}
    found = collect(model, [batch], {"hessian", "input_mean"}, every_matrix(model))
    expected = {0: [[1, 1], [1, 1]], 1: [[2, 0], [3, 2]]}
    for expert, rows in expected.items():
        rows = torch.tensor(rows).double()
        for name in (f"layers.0.first.{expert}.0.weight", f"layers.0.second.{expert}.weight"):
            assert found[name].tokens == 2, name
            assert close(found[name].hessian, 2 / 2 * rows.T @ rows)
            assert close(found[name].input_mean, rows.mean(0))
        inner = model.layers[0].first[expert][:2](rows.float()).double()
        name = f"layers.0.first.{expert}.2.weight"
        assert found[name].tokens == 2 and close(found[name].input_mean, inner.mean(0))
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


def test_the_experts_of_a_switch_transformer_see_no_padding():
    """All experts of a layer together saw the layer's inputs that are in view, in encoder and decoder."""
    torch.manual_seed(0)
    config = hf.SwitchTransformersConfig(
        d_model=32, d_ff=48, d_kv=8, num_layers=2, num_decoder_layers=2, num_heads=4, vocab_size=64, num_experts=4,
        expert_capacity=64, num_sparse_encoder_layers=1, num_sparse_decoder_layers=1, router_dtype="float32",
    )  # fmt: skip
    model = hf.SwitchTransformersForConditionalGeneration(config).eval()
    ids, answer = IDS[:2, :8] % 60 + 2, IDS[2:4, :6] % 60 + 2
    seen, written = torch.ones_like(ids), torch.ones_like(answer)
    seen[0, 5:], ids[0, 5:], written[1, 2:], answer[1, 2:] = 0, 0, 0, 0
    batch = {
        "input_ids": ids, "attention_mask": seen, "decoder_input_ids": answer, "decoder_attention_mask": written,
    }  # fmt: skip
    given = {}
    layers = {name: m for name, m in model.named_modules() if type(m).__name__.endswith("SparseMLP")}
    for name, module in layers.items():
        module.register_forward_pre_hook(lambda m, args, name=name: given.__setitem__(name, args[0]))
    stats = collect(model, [batch], {"hessian"}, find_matrices(model))
    assert len(given) == 2
    for name, x in given.items():
        rows = x[(seen if name.startswith("encoder") else written).bool()].double()
        own = [
            s for key, s in stats.items() if key.startswith(f"{name}.experts") and ".wi." in key and s.tokens
        ]
        assert sum(s.tokens for s in own) == len(rows) and len(own) > 1, name
        total = sum(s.hessian.double() for s in own)
        assert close(total, 2 / 2 * rows.T @ rows), name


def test_rows_that_cannot_be_followed_to_their_experts_are_said():
    class Scaled(Listed):
        def forward(self, x):
            return super().forward(x * 3)

    model = Mixture().eval()
    model.layers[0] = Scaled()
    batch = {"hidden": torch.rand(2, 3, 2), "attention_mask": torch.tensor([[1, 1, 0], [1, 1, 1]])}
    with pytest.warns(UserWarning, match="padding counts in its statistics"):
        collect(model, [batch], {"input_mean"}, every_matrix(model))


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_each_side_of_an_encoder_decoder_has_its_own_mask(family):
    """Encoder and decoder tokens of one length: each layer counts what its own side's mask shows."""
    torch.manual_seed(0)
    model = TWO_SIDED[family]().eval()
    ids, answer = IDS[:2, :8] % 60 + 2, IDS[2:4, :8] % 60 + 2
    seen, written = torch.ones_like(ids), torch.ones_like(ids)
    seen[0, 5:] = 0
    written[1, 3:] = 0
    batch = {
        "input_ids": ids,
        "attention_mask": seen,
        "decoder_input_ids": answer,
        "decoder_attention_mask": written,
    }
    matrices = find_matrices(model)
    inputs = {}
    hooks = [
        matrix.module.register_forward_pre_hook(
            lambda module, args, name=name: inputs.__setitem__(name, args[0].detach())
        )
        for name, matrix in matrices.items()
    ]
    with torch.no_grad():
        model(**batch)
    for hook in hooks:
        hook.remove()
    stats = collect(model, [batch], {"hessian"}, matrices)
    cross = 0
    for name, x in inputs.items():
        of_encoder = "encoder." in name and "decoder." not in name
        if ("EncDecAttention" in name or "encoder_attn" in name) and name.split(".")[-2] in (
            "k",
            "v",
            "k_proj",
            "v_proj",
        ):
            of_encoder, cross = True, cross + 1
        rows = x[(seen if of_encoder else written).bool()].double()
        assert close(stats[name].hessian, 2 / 2 * rows.T @ rows), name
    assert cross == 4


def test_convolutions_see_the_patches_they_multiply():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(4, 6, (3, 1), padding="same", dilation=(2, 1), groups=2, padding_mode="reflect"),
        nn.Flatten(),
        nn.Linear(6 * 16, 5),
    )
    images, matrices = torch.randn(3, 3, 8, 8), find_matrices(model)
    assert set(matrices) == {"0.weight", "2.weight", "4.weight"}
    [block] = [dict(b.stats) for b in stream(model, images, {"hessian"}, matrices)]
    rows = nn.functional.unfold(images, 3, padding=1, stride=2).transpose(1, 2).reshape(-1, 27).double()
    assert close(block["0.weight"].hessian, 2 / 3 * rows.T @ rows)
    # a product of rows and weight is the convolution itself, group by group
    hidden = model[1](model[0](images))
    padded = nn.functional.pad(hidden, model[2]._reversed_padding_repeated_twice, mode="reflect")
    for group, (weight, stats) in enumerate(block["2.weight"].split(matrices["2.weight"].weight())):
        own = padded[:, 2 * group : 2 * group + 2]
        patches = torch.stack([own[:, :, i : i + 4] for i in (0, 2, 4)], -1)
        rows = patches.permute(0, 2, 3, 1, 4).reshape(-1, 6).double()
        assert close(stats.hessian, 2 / 3 * rows.T @ rows)
        expected = model[2](hidden)[:, 3 * group : 3 * group + 3]
        product = (rows @ weight.T.double()).reshape(3, 4, 4, 3).permute(0, 3, 1, 2).float()
        assert torch.allclose(
            product + model[2].bias[3 * group : 3 * group + 3, None, None], expected, atol=1e-5
        )


def test_closing_early_and_failing_leave_the_model_intact():
    model = make("llama").train()
    model.model.layers[1].eval()
    state = copy.deepcopy(model.state_dict())
    blocks = stream(model, IDS, {"input_norm"}, find_matrices(model))
    next(blocks)
    blocks.close()
    model.model.layers[1].mlp.down_proj.forward = None
    with pytest.raises(TypeError):
        list(stream(model, IDS, {"input_norm"}, find_matrices(model)))
    del model.model.layers[1].mlp.down_proj.forward
    assert untouched(model) and model.training and not model.model.layers[1].training
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())


def test_nan_weights_and_activations_name_the_layer():
    model = make("llama")
    with torch.no_grad():
        model.model.layers[1].self_attn.k_proj.weight[0, 0] = float("nan")
    with pytest.raises(SecateurError, match=r"layers\.1\.self_attn\.k_proj"):
        list(stream(model, IDS, {"input_norm"}, find_matrices(model)))
    model = make("llama")
    with torch.no_grad():
        model.model.layers[0].post_attention_layernorm.weight[3] = float("inf")
    with pytest.raises(SecateurError, match=r"layers\.0\.mlp\.gate_proj.*NaN or infinite"):
        list(stream(model, IDS, {"hessian"}, find_matrices(model)))


def test_nothing_to_go_by_is_refused():
    model = make("llama")
    matrices = find_matrices(model)
    with pytest.raises(SecateurError, match="no calibration data"):
        list(stream(model, IDS[:0], {"hessian"}, matrices))
    with pytest.raises(SecateurError, match="collect"):
        list(stream(model, IDS, {"gradient"}, matrices))
    with pytest.raises(SecateurError, match="inputnorm"):
        list(stream(model, IDS, {"inputnorm"}, matrices))


def test_without_needs_the_model_is_not_run():
    model = make("llama")
    model.forward = None
    blocks = list(stream(model, None, set(), find_matrices(model)))
    assert [block.index for block in blocks] == [0, 1, 2]


def test_batch_size_changes_only_the_rounding():
    model = make("llama")
    one = collect(model, IDS, {"hessian"}, find_matrices(model), batch_size=1)
    all_ = collect(model, IDS, {"hessian"}, find_matrices(model), batch_size=6)
    assert all(close(one[key].hessian, all_[key].hessian) for key in one)


@pytest.mark.parametrize("name", MODELS)
def test_blocks_hold_all_matrices_but_embedding_and_head(name):
    model = make(name)
    blocks, matrices = find_blocks(model), find_matrices(model)
    assert len(blocks) == 3
    inside = {n for n, p in model.named_parameters() if n.startswith(blocks.path + ".") and p.dim() == 2}
    assert set(matrices) == inside
    for key, matrix in matrices.items():
        assert matrix.weight().shape == matrix.shape and key.startswith(blocks.path_of(matrix.block) + ".")
        assert torch.equal(matrix.unfold(matrix.weight()), model.get_parameter(key))


def test_blocks_without_a_matrix_are_no_stack():
    def model(*more):
        blocks = nn.ModuleList(nn.Sequential(nn.LayerNorm(4), *copy.deepcopy(more)) for _ in range(3))
        return nn.ModuleDict({"layers": blocks, "head": nn.Linear(4, 2)})

    assert (find_blocks(model()).path, len(find_blocks(model()))) == ("", 1)
    stack = find_blocks(model(nn.Linear(4, 4)))
    assert (stack.path, len(stack)) == ("layers", 3)


def test_states_lie_in_one_buffer_while_they_fit_and_in_the_order_of_their_memory():
    flow = Flow(nn.Identity(), (), [torch.zeros(1, 4), torch.zeros(1, 4)])
    flow.state_bytes = 64
    first = flow._room(torch.zeros(16), 0)
    assert flow.buffer is not None and len(flow.buffer) == 2 * 64 + 2 * 64
    turned = flow._room(torch.zeros(4, 2).T, 0)
    second, third = flow._room(torch.zeros(8, dtype=torch.float64), 1), flow._room(torch.zeros(17), 1)
    last, over = flow._room(torch.zeros(2), 1), flow._room(torch.zeros(1), 1)
    start = flow.buffer.data_ptr()
    places = [tensor.data_ptr() - start for tensor in (first, second, third)]
    assert places == [0, 64, 128] and turned.stride() == (1, 2)
    inside = range(start, start + len(flow.buffer))
    assert [t.data_ptr() in inside for t in (turned, last, over)] == [False, False, False]


def counted(module):
    """How often a module has run, as a list that grows."""
    calls = []
    module.register_forward_hook(lambda *_: calls.append(1))
    return calls


def test_a_block_runs_no_further_than_its_last_input_once_the_first_batch_has_shown_the_order():
    model = make("llama")
    runs = counted(model.model.layers[1].mlp.down_proj)
    seen = 0
    for block in stream(model, IDS, {"input_norm"}, find_matrices(model), batch_size=2):
        expected = plain(model, IDS.split(2), block.matrices)
        seen, before = len(runs), seen
        for key, stats in block.stats.items():
            assert torch.allclose(stats.input_norm, (expected[key].diagonal() / 2).sqrt().float(), rtol=1e-4)
        if block.index == 1:
            assert seen - before == 1 + 3  # one of three batches, and the three of `plain`


def test_a_run_is_whole_where_a_layer_is_called_twice():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.a(self.b(self.a(x)))

    torch.manual_seed(0)
    model = nn.Sequential(*[Twice() for _ in range(2)])
    x = torch.randn(6, 4)
    for block in stream(model, x, {"input_norm"}, every_matrix(model), batch_size=2):
        first = model[0](x)
        rows = torch.cat([x, model[0].b(model[0].a(x)), first, model[1].b(model[1].a(first))])
        own = rows[:12], rows[12:]
        for number, part in enumerate(own):
            found = block.stats[f"{number}.a.weight"].input_norm
            assert torch.allclose(found, (part.square().sum(0) / 6).sqrt(), rtol=1e-5)


def test_the_other_side_runs_once_a_batch():
    torch.manual_seed(0)
    model = TWO_SIDED["bart"]().eval()
    batch = {"input_ids": IDS, "decoder_input_ids": IDS.flip(0)}
    matrices = {n: m for n, m in find_matrices(model).items() if "decoder" in n}
    expected = {}
    runs = counted(model.model.encoder)
    for block in stream(model, [batch, batch], {"input_norm"}, matrices):
        expected |= {name: stats.input_norm for name, stats in block.stats.items()}
    assert len(runs) == 2
    whole = collect(model, [batch, batch], {"input_norm"}, matrices)
    assert all(torch.allclose(whole[name].input_norm, norm, rtol=1e-5) for name, norm in expected.items())
