"""What the tests of token methods share: facts, small sets, and what a method keeps of them."""

import math

import torch

from secateur.families.vlm import Facts
from secateur.method import make_method
from secateur.testing import token_sets
from secateur.tokens.state import Reduction

CLIP = Facts(layers=32, blocks=24, feature_block=-2, has_cls=True)


PLAIN = Facts(layers=28, blocks=32, feature_block=-1, has_cls=False, merge=4, mrope=True)


SITE = "encoder:-2"


def kept(method, sets, **settings):
    """Kept positions of each set, ascending."""
    found = make_method(method, **settings).select(sets)
    if isinstance(found, Reduction):
        return [[i for i in row if i >= 0] for row in found.index.tolist()]
    return [row.nonzero()[:, 0].tolist() for row in found]


def circle(degrees, norms=None):
    angles = torch.tensor([[math.radians(a) for a in degrees]])
    norms = torch.ones(len(degrees)) if norms is None else torch.tensor(norms)
    return torch.stack([angles.cos(), angles.sin()], 2) * norms[None, :, None]


def given(attention, keep, features=None, site=SITE, rows="cls", facts=CLIP, **more):
    scores = torch.tensor([attention])
    features = torch.randn(1, scores.shape[1], 4) if features is None else features
    return token_sets(features, keep, attention={(site, rows): scores}, facts=facts, **more)


def given_grid(scores):
    """Two rows of it may stay."""
    return given(scores.flatten().tolist(), 2 * scores.shape[1], rows="visual", grid=tuple(scores.shape))


def everything(n=16, sets=1, keep=4, dtype=torch.float32, facts=CLIP, valid=None):
    """Sets with all that any of these methods reads."""
    generator = torch.Generator().manual_seed(3)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    block = f"encoder:{facts.feature_block}"
    maps = {
        (site, rows): draw(sets, n).softmax(1)
        for site in (block, "encoder:8", "encoder:15", "encoder:-1")
        for rows in ("cls", "all", "visual")
    }
    if not facts.has_cls:
        maps = {key: value for key, value in maps.items() if key[1] != "cls"}
    return token_sets(
        draw(sets, n, 6).to(dtype),
        keep,
        attention=maps,
        hidden={block: draw(sets, n, 5).to(dtype)},
        queries={block: draw(sets, 2, n, 4)},
        keys={block: draw(sets, 2, n, 4)} | ({(block, "cls"): draw(sets, 2, 4)} if facts.has_cls else {}),
        text={"embeddings": draw(sets, 3, 6)},
        facts=facts,
        valid=valid,
    )


def best(scores, keep):
    return [sorted(sorted(range(len(row)), key=lambda i: -row[i])[:keep]) for row in scores.tolist()]
