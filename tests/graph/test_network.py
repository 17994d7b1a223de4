"""A network as a graph of channels and kernels, and back."""

import pytest
import torch
from torch import nn

from secateur import SecateurError
from secateur.graph.network import network
from secateur.tasks.networks.digits_cnn import DigitsCnn
from secateur.tasks.networks.digits_resnet import DigitsResNet


def tensors(model):
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def randomised(model):
    """No parameter equals what a missing one would be."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator))
    return model


def language(kind):
    """A tiny decoder or encoder of transformers."""
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 24}
    more = {"gpt2": {"n_embd": 16, "n_layer": 1, "n_head": 4, "n_positions": 8}}.get(kind, sizes)
    more |= {"num_key_value_heads": 2} if kind in ("llama", "phi3") else {}
    config = transformers.AutoConfig.for_model(
        kind, vocab_size=11, pad_token_id=0, bos_token_id=1, eos_token_id=2, **more
    )
    return transformers.AutoModel.from_config(config), torch.zeros(2, 4, dtype=torch.long)


def vision(name, size=64, **settings):
    timm = pytest.importorskip("timm")
    return timm.create_model(name, **settings), torch.zeros(2, 3, size, size)


def dense(growth=4):
    models = pytest.importorskip("torchvision").models
    return models.DenseNet(growth, (2, 2), 8, bn_size=2, num_classes=5), torch.zeros(2, 3, 32, 32)


def torch_vit():
    models = pytest.importorskip("torchvision").models
    return models.VisionTransformer(16, 8, 1, 2, 16, 24, num_classes=3), torch.zeros(2, 3, 16, 16)


def odd():
    """Grouped and transposed convolutions, a flattened picture, PReLU."""
    return nn.Sequential(
        nn.Conv2d(1, 6, 3),
        nn.PReLU(6),
        nn.ConvTranspose2d(6, 8, 2, groups=2),
        nn.Conv2d(8, 8, 3, groups=8),
        nn.Conv2d(8, 6, 1, groups=2),
        nn.Flatten(),
        nn.Linear(6 * 25, 3),
    ), torch.zeros(2, 1, 8, 8)


MANY = {
    "digits-cnn": lambda: (DigitsCnn(), torch.zeros(2, 1, 8, 8)),
    "digits-resnet": lambda: (DigitsResNet(), torch.zeros(2, 1, 8, 8)),
    "odd": odd,
    "densenet": dense,
    "torchvision vit": torch_vit,
    "vit": lambda: vision("test_vit", 160),
    "resnet": lambda: vision("test_resnet"),
    "convnext": lambda: vision("test_convnext"),
    "efficientnet": lambda: vision("test_efficientnet"),
    "regnet": lambda: vision("test_byobnet"),
    "mambaout": lambda: vision("test_mambaout"),
    "gpt2": lambda: language("gpt2"),
    "llama": lambda: language("llama"),
    "bert": lambda: language("bert"),
    "phi3": lambda: language("phi3"),
}


@pytest.mark.parametrize("name", MANY)
def test_back_and_forth_is_the_identity(name):
    model, inputs = MANY[name]()
    model = randomised(model.eval())
    graph, own = network(model, inputs), tensors(model)
    found = graph.write(*graph.read(own))
    assert all(torch.equal(value, own[key]) for key, value in found.items())
    parameters = {key for key, _ in model.named_parameters()}
    assert found.keys() | set(graph.left) >= parameters and not found.keys() & set(graph.left)
    # every kernel has ends, and what stays outside is no matrix of a layer
    assert len(graph.source) == sum(len(k.places) for k in graph.kernels) + graph.links
    assert int(torch.cat([graph.source, graph.target]).max()) < graph.nodes
    words = ("embed", "token", "pos", "wpe", "wte", "gamma", "bias", ".1.weight")
    assert all(own[key].dim() < 2 or any(w in key for w in words) for key in graph.left)
    assert torch.equal(torch.arange(graph.nodes), torch.unique(torch.cat([graph.source, graph.target])))


def test_digits_cnn_by_hand():
    """1 input and 16 + 32 + 32 + 10 channels; 16 + 16 x 32 + 32 x 32 + 32 x 10 kernels; the third norm's scale is that of its nodes."""
    model = randomised(DigitsCnn())
    graph = network(model, torch.zeros(2, 1, 8, 8))
    assert (graph.nodes, len(graph.source), graph.links) == (91, 1872, 0)
    nodes, edges = graph.read(tensors(model))
    third = slice(1 + 16 + 32, 1 + 16 + 32 + 32)
    assert torch.equal(nodes[third, 0], model.bn3.weight) and torch.equal(
        nodes[third, 2], model.bn3.running_mean
    )
    assert torch.equal(nodes[0], torch.tensor([1.0, 0, 0, 1, 0])) and torch.equal(
        nodes[-10:, 4], model.linear.bias
    )
    # the kernel from channel 5 of the second convolution to channel 7 of the third
    edge = 16 + 16 * 32 + 7 * 32 + 5
    assert (int(graph.source[edge]), int(graph.target[edge])) == (1 + 16 + 5, 1 + 16 + 32 + 7)
    assert torch.equal(edges[2][7 * 32 + 5], model.conv3.weight[7, 5].flatten())


def test_a_flattened_picture_and_a_sum_of_two():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Conv2d(1, 3, 1), nn.Conv2d(3, 3, 3, padding=1)
            self.head = nn.Linear(12, 2)

        def forward(self, x):
            x = self.one(x)
            return self.head((x + self.two(x)).flatten(1))

    model = randomised(Net())
    graph = network(model, torch.zeros(2, 1, 2, 2))
    assert graph.nodes == 1 + 3 + 3 + 2
    # the two convolutions' channels meet, each with its own
    assert torch.stack([graph.source, graph.target], 1)[-3:].tolist() == [[1, 4], [2, 5], [3, 6]]
    _, edges = graph.read(tensors(model))
    # the four pixels of channel 1, as the second class reads them, are one kernel of an edge
    assert torch.equal(edges[2][1 * 3 + 1], model.head.weight[1, 4:8])


def test_permuted_channels_are_another_order_of_the_same_graph():
    """Nodes are found by labels, not by position: a shuffled network has the same kernels between the same channels."""
    first = randomised(DigitsCnn())
    second, order = DigitsCnn(), torch.randperm(32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        for key, value in second.state_dict().items():
            own = first.state_dict()[key]
            if key.startswith(("conv2", "bn2")) and own.dim():
                own = own[order]
            value.copy_(own[:, order] if key == "conv3.weight" else own)
    graph = network(first, torch.zeros(2, 1, 8, 8))
    (nodes, edges), (moved, shuffled) = graph.read(first.state_dict()), graph.read(second.state_dict())
    assert torch.equal(moved[17:49], nodes[17:49][order])
    assert torch.equal(shuffled[2].view(32, 32, 9), edges[2].view(32, 32, 9)[:, order])


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.cells, self.head = nn.LSTM(4, 8, batch_first=True), nn.Linear(8, 2)

    def forward(self, x):
        return self.head(self.cells(x)[0])


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        return self.layer(self.layer(x).relu())


@pytest.mark.parametrize(
    ("model", "shape", "why"),
    [
        (Recurrent(), (2, 5, 4), "cells.weight_ih_l0.*isn't a convolution or a matrix product"),
        (Twice(), (2, 4), "layer.weight.*used twice"),
        (nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 3))), (2, 4), "weight is computed"),
        (nn.Sequential(nn.ReLU()), (2, 4), "no convolution or matrix product"),
    ],
)
def test_what_cannot_be_said_is_refused_with_the_reason(model, shape, why):
    with pytest.raises(SecateurError) as error:
        network(model, torch.zeros(shape))
    import re

    assert re.search(why, str(error.value).replace("\n", " "))
