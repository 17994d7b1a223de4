"""The rules of lrs-dip by hand and inside a model; the levels, tiles and votes themselves are in tests/tokens/test_pyramid.py."""

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from secateur.errors import SecateurError
from secateur.methods.lrs_dip import LRSDIP, standing_out
from secateur.testing import token_sets
from secateur.tokens.attach import attach
from secateur.tokens.cost import llm_flops
from secateur.tokens.pyramid import Level

sys.path.insert(0, str(Path(__file__).parents[1] / "tokens"))
from test_pyramid import pyramid_inputs
from tiny_models import IMAGE, inputs_for, make

SITE = "layer:1"


def toy(level, scores, newline=None, target=0.5, **more):
    """One set with the attention of one head."""
    n = len(level)
    return token_sets(
        torch.zeros(1, n, 2),
        keep=n,
        target=target,
        attention={
            (SITE, "last", "visual", "heads"): torch.tensor([[scores]]),
            (SITE, "each column"): torch.zeros(1, 1, n),
        },
        level=torch.tensor([level]),
        newline=torch.tensor([newline or [False] * n]),
        **more,
    )


def test_a_share_of_the_finest_level_and_its_separators():
    """k = int(rho N), N with separators; the separators stay beside the best; the first of equal scores."""
    level = [0, 0, 1, 1, 1, 1, 1, 1, 1]
    scores = [0.9, 0.9, 0.1, 0.3, 0.2, 0.0, 0.3, 0.3, 0.05]
    newline = [False] * 5 + [True, False, False, True]
    for share, wanted in ((0.3, [3, 6, 5, 8]), (0.5, [3, 6, 7, 5, 8]), (1.0, range(2, 9)), (0.01, [3, 5, 8])):
        best, _ = LRSDIP().chosen(SITE, toy(level, scores, newline, share))
        assert best[0].nonzero()[:, 0].tolist() == sorted(wanted), share
    best, _ = LRSDIP().chosen(SITE, toy(level, scores, newline, 2))
    assert best[0].nonzero()[:, 0].tolist() == [3, 5, 6, 8]


def test_scores_are_a_softmax_over_the_level_in_each_head():
    """Two heads, of which the second looks at the thumbnail: both count the same."""
    both = torch.tensor([[[0.0, 0.6, 0.4], [0.9, 0.01, 0.09]]])
    sets = token_sets(
        torch.zeros(1, 3, 2), keep=3, target=0.5, level=torch.tensor([[0, 1, 1]]),
        attention={(SITE, "last", "visual", "heads"): both},
    )  # fmt: skip
    best, scores = LRSDIP().chosen(SITE, sets)
    assert scores[0].tolist() == pytest.approx([0, (0.6 + 0.1) / 2, (0.4 + 0.9) / 2])
    assert best[0].tolist() == [False, False, True]


def test_threshold():
    """Percentiles 5 and 95 of 0..20 are 1 and 19; above a tenth of the way is above 2.8."""
    scores = torch.arange(23.0)[None] - 1
    mine = torch.ones(1, 23, dtype=torch.bool)
    mine[0, 0] = mine[0, 22] = False
    assert standing_out(scores, mine)[0].nonzero()[:, 0].tolist() == list(range(4, 22))
    best, _ = LRSDIP(threshold=True).chosen(SITE, toy([0] * 4, [0.1, 0.2, 0.3, 0.4]))
    assert best[0].tolist() == [False, True, True, True]


def zoomed(method, level, tiles, maps, scores, target=0.5, reading=None):
    """Tiles of the next level that are read."""
    here = max(level)
    n = level.count(here)
    width = maps[here][1]
    place = [0] * (len(level) - n)
    sets = toy(
        level, scores, target=target, reading=reading or here + 1, tiles=torch.tensor([tiles]), maps=torch.tensor([maps]),
        grid_row=torch.tensor([place + [i // width for i in range(n)]]),
        grid_col=torch.tensor([place + [i % width for i in range(n)]]),
    )  # fmt: skip
    found = method.zoom(SITE, sets)[0].nonzero()[:, 0].tolist()
    return found, sets.carried["voted"][0].tolist()


def test_which_levels_are_read_whole_and_which_by_votes():
    three = [(1, 1), (2, 2), (4, 4)], [(2, 2), (4, 4), (8, 8)]
    two = [(1, 1), (4, 4), (0, 0)], [(2, 2), (8, 8), (0, 0)]
    # a level between thumbnail and tiles is read whole, and no token votes
    assert zoomed(LRSDIP(), [0] * 4, *three, [0.4, 0.3, 0.2, 0.1]) == ([0, 1, 2, 3], [0] * 4)
    # without one the thumbnail votes: token (0, 0) lies on tile (0, 0), token (0, 1) on tile (0, 2)
    assert zoomed(LRSDIP(), [0] * 4, *two, [0.4, 0.3, 0.2, 0.1]) == ([0, 2], [1, 1, 0, 0])
    level, scores = [0] * 4 + [1] * 16, [0.9] * 4 + [0.0] * 16
    scores[4 + 0], scores[4 + 1], scores[4 + 15], scores[4 + 4] = 0.2, 0.1, 0.5, 0.05
    assert zoomed(LRSDIP(), level, *three, scores, target=3)[0] == [0, 1, 15]
    assert zoomed(LRSDIP(most=2), level, *three, scores, target=3)[0] == [0, 1]
    assert zoomed(LRSDIP(most=2, rank="scores"), level, *three, scores, target=3)[0] == [0, 15]


def test_how_many_levels_are_chosen_from():
    grids, maps = [(1, 1), (2, 2), (4, 4), (8, 8)], [(2, 2), (4, 4), (8, 8), (16, 16)]
    level, scores = [0] * 4 + [2] * 64, [0.0] * 4 + [1.0] + [0.0] * 63
    assert zoomed(LRSDIP(), level, grids, maps, scores, target=1)[0] == []
    assert zoomed(LRSDIP(zooms=2), level, grids, maps, scores, target=1)[0] == [0]
    # asked about the level after one of which nothing was read
    more = grids + [(16, 16)], maps + [(32, 32)]
    assert zoomed(LRSDIP(), level, *more, scores, target=1, reading=4)[0] == []


def test_what_stays_at_the_end():
    level, scores = [0, 0, 1, 1, 2, 2], [0.0, 0.0, 0.5, 0.1, 0.1, 0.3]
    pyramid = {"tiles": torch.ones(1, 3, 2), "maps": torch.ones(1, 3, 2)}
    voted = torch.tensor([[0.0, 0.0, 1.0, 0.0, torch.nan, torch.nan]])
    sets = toy(level, scores, target=1, carried={"voted": voted}, **pyramid)
    assert LRSDIP().prune(SITE, sets)[0].tolist() == [True, True, False, False, False, True]
    assert LRSDIP(concat_levels=True).prune(SITE, sets)[0].tolist() == [True, True, True, False, False, True]
    # a plain picture has no thumbnail to keep
    assert LRSDIP().prune(SITE, toy([0] * 4, [0.1, 0.4, 0.2, 0.3]))[0].tolist() == [False, True, False, True]


GRID = [[Level(1, 1), Level(2, 2), Level(4, 4)]]


def test_in_a_model():
    """Base read whole; then at most three tiles; of their tokens a quarter, beside the thumbnail."""
    model, inputs = make("llava-clip", torch.float32), pyramid_inputs("llava-clip", torch.float32, GRID)
    with torch.no_grad(), attach(model, "lrs-dip", target="25%", most=3, given={"pyramid": GRID}) as attached:
        model(**inputs)
        kept, report = attached.kept, attached.report
    tiles = sorted({n // 16 for n in kept["tiles"][0].tolist()})
    assert tiles[:5] == [0, 1, 2, 3, 4] and len(tiles) == 8
    stays = kept["input"][0]
    assert stays[:16].tolist() == list(range(16)) and len(stays) == 16 + 12
    assert all(int(n) // 16 in tiles[5:] for n in stays[16:])
    assert (report["before"]["tiles"], report["after"]["tiles"]) == (21, 8)
    # one look at the thumbnail, which votes for nothing, one at 16 + 64 tokens and one at 16 + 48; each with 6 words
    assert [int(seen) for _, seen in attached._prefill.call.glimpses] == [22, 86, 70]
    # two of the four layers look at the visual ones among them, and all four read the 28 that stay
    assert report["after"]["glimpse_tokens_x_layers"] == 2 * (16 + 80 + 64)
    assert report["after"]["tokens_x_layers"] == 2 * (16 + 80 + 64) + 4 * 28
    looks = sum(llm_flops([float(n)] * 2, attached.facts) for n in (22, 86, 70))
    assert report["after"]["glimpse_flops"] == looks
    assert report["after"]["flops"] == pytest.approx(looks + llm_flops([34.0] * 4, attached.facts))
    position = attached.columns.shape[1]
    assert position == 28 + 6


def test_the_chosen_are_those_that_the_layers_attend_to():
    """Plain pictures, against the attention that the model itself gives."""
    model, inputs = make("llava-clip", torch.float32), inputs_for("llava-clip", torch.float32)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        maps = model(**inputs, output_attentions=True).attentions[1][:, :, -1]
        with attach(model, "lrs-dip", target="25%") as attached:
            model(**inputs)
    for row, images in ((0, 2), (1, 1)):
        mine = maps[row][:, inputs["input_ids"][row] == IMAGE].view(4, images, 16)
        scores = (mine / mine.sum(2, keepdim=True)).mean(0)
        wanted = [i * 16 + int(n) for i in range(images) for n in scores[i].topk(4).indices]
        assert attached.kept["input"][row].tolist() == sorted(wanted)


def test_the_token_that_asks():
    model, inputs = make("llava-clip", torch.float32), inputs_for("llava-clip", torch.float32, rows=(1,))
    model.set_attn_implementation("eager")
    with torch.no_grad():
        maps = model(**inputs, output_attentions=True).attentions[1][0]
        visual = (inputs["input_ids"][0] == IMAGE).nonzero()[:, 0]
        for token, row in (("last", -1), ("next", int(visual[-1]) + 1)):
            with attach(model, "lrs-dip", target="25%", token=token) as attached:
                model(**inputs)
            mine = maps[:, row, visual]
            wanted = (mine / mine.sum(1, keepdim=True)).mean(0).topk(4).indices
            assert attached.kept["input"][0].tolist() == sorted(wanted.tolist())


def test_trained_layers_come_from_a_file(tmp_path):
    model, inputs = make("llava-clip", torch.float32), inputs_for("llava-clip", torch.float32)
    layers = model.get_decoder().layers
    own = {f"{n}.{name}": p.detach().clone() for n in (0, 2) for name, p in layers[n].named_parameters()}
    other = {name: tensor * torch.linspace(-2, 2, tensor.shape[-1]) for name, tensor in own.items()}
    kept = []
    for name, weights in (("own", own), ("other", other)):
        save_file(weights, tmp_path / f"{name}.safetensors")
        with torch.no_grad(), attach(
            model, "lrs-dip", target="25%", layers=(0, 2), rfm=str(tmp_path / f"{name}.safetensors")
        ) as attached:  # fmt: skip
            model(**inputs)
        kept.append([row.tolist() for row in attached.kept["input"]])
    with torch.no_grad(), attach(model, "lrs-dip", target="25%", layers=(0, 2)) as attached:
        model(**inputs)
    assert [row.tolist() for row in attached.kept["input"]] == kept[0] != kept[1]


def test_files_that_cant_be_used(tmp_path):
    model = make("llava-clip", torch.float32)
    with pytest.raises(SecateurError, match="no such file"):
        attach(model, "lrs-dip", target="25%", rfm=str(tmp_path / "none.safetensors"))
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"x" * 20)
    with pytest.raises(SecateurError, match="can't be read"):
        attach(model, "lrs-dip", target="25%", rfm=str(broken))
    nan = tmp_path / "nan.safetensors"
    save_file({"0.mlp.up_proj.weight": torch.full((48, 32), torch.nan)}, nan)
    with pytest.raises(SecateurError, match="finite"):
        attach(model, "lrs-dip", target="25%", layers=(0,), rfm=str(nan))
    with pytest.raises(SecateurError, match="most"):
        attach(model, "lrs-dip", target="25%", most=-1)
    attach(model, "lrs-dip", target="25%").detach()
