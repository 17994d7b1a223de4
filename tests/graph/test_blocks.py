"""Which modules are the blocks and which tensors the matrices, on nets whose numbers are counted by hand."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from secateur.errors import SecateurError
from secateur.graph.blocks import (
    check_weights,
    every_matrix,
    find_blocks,
    find_matrices,
    find_stacks,
    plain_experts,
)


def linear(n, m=None):
    return nn.Linear(n, m or n, bias=False)


def stack(*makers, count=2):
    return nn.ModuleList(nn.Sequential(*(make() for make in makers)) for _ in range(count))


@pytest.mark.parametrize(("channels", "path"), [(20, "blocks"), (21, "")])
def test_a_twentieth_of_the_weights_may_be_convolutions(channels, path):
    """Two blocks of 400 weights: 40 in convolutions are a twentieth of 800, 42 are more."""
    blocks = stack(lambda: linear(20), lambda: nn.Conv1d(1, channels, 1, bias=False))
    found = find_blocks(nn.ModuleDict({"blocks": blocks}))
    assert (found.path, len(found), found.repeated) == (path, 2 if path else 1, bool(path))


def test_depthwise_convolutions_are_no_matrices_of_a_stack():
    blocks = stack(lambda: linear(20), lambda: nn.Conv1d(40, 40, 3, groups=40))
    model = nn.ModuleDict({"blocks": blocks})
    assert find_blocks(model).path == "blocks"
    assert list(find_matrices(model)) == ["blocks.0.0.weight", "blocks.1.0.weight"]


@pytest.mark.parametrize(("width", "paths"), [(5, ["first"]), (6, ["second", "first"])])
def test_a_second_list_of_blocks_is_a_stack_above_a_twentieth(width, paths):
    """1,000 parameters in the first list; 2 * 5 * 5 = 50 in the second are a twentieth, 72 are more."""
    first = stack(lambda: linear(25, 20))
    model = nn.ModuleDict({"second": stack(lambda: linear(width)), "first": first})
    assert sum(p.numel() for p in first.parameters()) == 1000
    assert [stack.path for stack in find_stacks(model)] == paths
    assert [stack.start for stack in find_stacks(model)] == [0, 2][: len(paths)]
    assert find_blocks(model).path == "first"


def test_lists_inside_a_block_are_not_counted_beside_it():
    inner = [nn.ModuleDict({"parts": stack(lambda: linear(8), count=3)}) for _ in range(2)]
    assert find_blocks(nn.ModuleDict({"layers": nn.ModuleList(inner)})).path == "layers"


def test_blocks_are_two_or_more_of_one_class_with_layers_inside():
    block = lambda: nn.Sequential(linear(4))
    assert find_blocks(nn.ModuleDict({"one": nn.ModuleList([block()])})).path == ""
    assert find_blocks(nn.ModuleDict({"bare": nn.ModuleList([linear(4), linear(4)])})).path == ""
    mixed = nn.ModuleList([block(), nn.ModuleDict({"a": linear(4)})])
    assert find_blocks(nn.ModuleDict({"mixed": mixed})).path == ""
    assert find_blocks(nn.Sequential(block(), block())).path == ""  # the model itself is no list inside it
    row = find_blocks(nn.ModuleDict({"row": nn.Sequential(block(), block())}))
    assert (row.path, row.path_of(1)) == ("row", "row.1")


class Speaks(nn.Module):
    """What `transformers` calls a model that generates: a decoder below it, a head beside that."""

    def __init__(self, blocks, encoder_decoder=False, generates=True, tied=False):
        super().__init__()
        self.config = SimpleNamespace(is_encoder_decoder=encoder_decoder)
        self.body = nn.ModuleDict({"words": nn.Embedding(9, 4), "layers": blocks, "out": linear(4)})
        self.head, self.generates = linear(4, 9), generates
        if tied:
            self.head.weight = self.body["words"].weight

    def can_generate(self):
        return self.generates

    def get_decoder(self):
        return self.body

    def get_output_embeddings(self):
        return self.head


def test_a_language_models_blocks_are_its_decoders_even_a_single_one():
    block = lambda: nn.Sequential(linear(4))
    one = nn.ModuleList([block()])
    found = find_blocks(Speaks(one))
    assert (found.path, found.modules) == ("body.layers", (one[0],))
    assert find_blocks(Speaks(one, encoder_decoder=True)).path == ""
    assert find_blocks(Speaks(one, generates=False)).path == ""
    unlike = nn.ModuleList([block(), nn.ModuleDict({"a": linear(4)})])
    assert find_blocks(Speaks(unlike)).path_of(1) == "body.layers.1"


@pytest.mark.parametrize("tied", [False, True])
def test_heads_and_what_embeddings_share_are_no_matrices_of_a_share(tied):
    model = Speaks(nn.ModuleList([linear(4), linear(4)]), tied=tied)  # no blocks: the whole model counts
    assert find_blocks(model).path == ""
    inner = ["body.layers.0.weight", "body.layers.1.weight", "body.out.weight"]
    assert list(find_matrices(model)) == inner
    assert list(every_matrix(model)) == inner + ([] if tied else ["head.weight"])


def test_a_matrix_with_two_names_is_counted_once_and_whole_numbers_never():
    first, second = linear(4), linear(4)
    second.weight = first.weight
    counts = linear(4)
    counts.weight = nn.Parameter(torch.ones(4, 4, dtype=torch.int8), requires_grad=False)
    model = nn.ModuleDict({"a": first, "b": second, "c": counts, "d": nn.Conv2d(2, 3, 1)})
    assert list(find_matrices(model)) == list(every_matrix(model)) == ["a.weight", "d.weight"]
    assert list(find_matrices(first)) == list(every_matrix(first)) == ["weight"]


class Conv1D(nn.Module):
    """Weights [in, out], as those of GPT-2."""

    def __init__(self):
        super().__init__()
        self.nf, self.weight = 3, nn.Parameter(torch.arange(6.0).reshape(2, 3))
        self.bias = nn.Parameter(torch.zeros(3))


class Experts(nn.Module):
    """2 experts, 3 neurons on a width of 4, up with `up` rows; `turned`: [experts, in, out]; `said` by an attribute."""

    def __init__(self, turned=False, said=False, up=3):
        super().__init__()
        self.num_experts = 2
        up, down = ((2, 4, up), (2, 3, 4)) if turned else ((2, up, 4), (2, 4, 3))
        self.up_proj, self.down_proj = (nn.Parameter(torch.randn(s)) for s in (up, down))
        self.up_proj_bias = nn.Parameter(torch.randn(2, up[2] if turned else up[1]))
        self.flat = nn.Parameter(torch.randn(2, 1, 4))
        if said:
            self.is_transposed = turned


@pytest.mark.parametrize(
    ("turned", "said", "rows"),
    [(False, True, 3), (True, True, 3), (False, False, 6), (True, False, 6), (False, False, 3)],
)
def test_experts_are_rows_on_the_same_inputs_however_they_lie(turned, said, rows):
    """6 rows: gate and up in one, which tells the layouts apart. With 3 both fit: it is that of nn.Linear."""
    model = Experts(turned, said, rows)
    found = find_matrices(model)
    assert list(found) == ["up_proj", "down_proj"]  # a tensor with an axis of one is no matrix
    up, x, w = found["up_proj"], torch.randn(5, 4), model.up_proj.detach()
    assert (up.parts, up.numel, up.role, up.shape) == (2, 8 * rows, "up_proj", (2 * rows, 4))
    by_hand = torch.cat([x @ (expert if turned else expert.T) for expert in w], 1)
    torch.testing.assert_close(x @ up.weight().T, by_hand)
    assert torch.equal(up.unfold(up.weight()), w)
    assert up.bias[0] == "up_proj_bias" and up.bias[1] is model.up_proj_bias
    with_zeros = up.weight().clone()
    with_zeros[0] = 0
    up.set(with_zeros)
    assert int((model.up_proj == 0).sum()) == up.shape[1]


def test_transposed_layers_and_convolutions_lie_as_out_by_in():
    turned = every_matrix(nn.ModuleDict({"a": Conv1D()}))["a.weight"]
    assert (turned.kind, turned.shape, turned.parts, turned.role) == ("conv1d", (3, 2), 1, "a")
    assert turned.weight().tolist() == [[0, 3], [1, 4], [2, 5]]
    assert turned.unfold(turned.weight()).tolist() == [[0, 1, 2], [3, 4, 5]]
    assert turned.bias == ("a.bias", turned.module.bias)
    conv = find_matrices(nn.ModuleDict({"c": nn.Conv2d(4, 6, (2, 3), groups=2)}))["c.weight"]
    assert (conv.kind, conv.shape, conv.parts, conv.numel) == ("conv", (6, 12), 2, 72)
    assert every_matrix(conv.module)["weight"].parts == 2
    assert torch.equal(conv.unfold(conv.weight()), conv.module.weight)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_weight_that_is_no_number_is_named(bad):
    model = nn.Sequential(linear(2), linear(2))
    check_weights(every_matrix(model))
    with torch.no_grad():
        model[1].weight[0, 1] = bad
    with pytest.raises(SecateurError, match=r"1\.weight.*NaN or infinite"):
        check_weights(every_matrix(model))


def test_experts_run_one_by_one_within_and_as_before_after():
    class Part(Experts):
        def __init__(self, how):
            super().__init__()
            self.config = SimpleNamespace(_experts_implementation=how)

    other = nn.Module()
    other.config = SimpleNamespace(_experts_implementation="grouped_mm")  # no experts in it
    shared = Part("grouped_mm")
    twin = Part("batched_mm")
    twin.config = shared.config
    model = nn.ModuleList([shared, twin, Part(None), other])
    with pytest.raises(RuntimeError), plain_experts(model):
        assert [m.config._experts_implementation for m in model] == ["eager", "eager", None, "grouped_mm"]
        raise RuntimeError
    assert [m.config._experts_implementation for m in model] == [
        "grouped_mm",
        "grouped_mm",
        None,
        "grouped_mm",
    ]


@pytest.mark.parametrize(("width", "paths"), [(5, ["body.layers"]), (6, ["body.layers", "tower"])])
def test_a_tower_beside_a_decoder_is_a_stack_from_a_two_hundredth_on(width, paths):
    """2,000 parameters in the decoder's blocks; 2 * 5 in the tower are no more than a two hundredth, 2 * 6 are."""
    model = Speaks(stack(lambda: linear(50, 20)))
    model.tower = stack(lambda: linear(width, 1))
    assert [found.path for found in find_stacks(model)] == paths and find_blocks(model).path == "body.layers"


class Single(nn.Module):
    """A language model without a list of blocks, whose head isn't its embedding."""

    def __init__(self):
        super().__init__()
        self.embed, self.inner, self.head = nn.Embedding(7, 4), linear(4), linear(4, 7)

    def get_output_embeddings(self):
        return self.head


def test_the_output_head_of_a_language_model_is_left_out():
    assert list(find_matrices(Single())) == ["inner.weight"]
