"""Image pyramids: how pictures are cut, which tiles the tower sees, and that the rest is as if it had never been there."""

from dataclasses import dataclass

import pytest
import reference
import torch
from tiny_models import IMAGE, PAD, inputs_for, make
from torch import nn

from secateur import SecateurError
from secateur.families.vlm import family_of
from secateur.testing import token_sets
from secateur.tokens.attach import attach
from secateur.tokens.input import encode, flat
from secateur.tokens.method import Glimpse, Memory, Stage, TokenMethod
from secateur.tokens.pyramid import Level, levels, pyramid, scales, voted

GRIDS = [[Level(1, 1), Level(2, 2, 28, 32), Level(2, 3)], [Level(1, 1), Level(2, 2)]]
"""The first has a row of padding: 28 of 32 pixels."""
EACH = {"llava-clip": 16, "llava-siglip": 16, "paligemma": 16, "internvl": 4, "gemma3": 4, "idefics3": 4}


def numbers(grid):
    return [(level.rows, level.cols) for level in grid]


@pytest.mark.parametrize(
    ("size", "wanted", "grids"),
    [
        ((4000, 6000), [0.056, 0.168, 0.25, 0.5, 1], [(1, 1), (2, 3), (3, 5), (6, 9), (12, 18)]),
        ((1024, 1024), [0.3281, 0.9844, 1], [(1, 1), (3, 3), (4, 4)]),
        ((6329, 7099), [0.0473, 0.142, 0.25, 0.5, 1], [(1, 1), (3, 3), (5, 6), (10, 11), (19, 22)]),
    ],
)
def test_levels_of_pictures(size, wanted, grids):
    """Spec: lrs-dip (a)."""
    assert scales(*size) == pytest.approx(wanted, abs=6e-5)
    assert numbers(levels(*size)) == grids


def test_small_pictures_and_chosen_scales():
    assert numbers(levels(300, 200)) == [(1, 1)]
    assert numbers(levels(336, 336)) == [(1, 1)]
    assert numbers(levels(500, 400)) == [(1, 1), (2, 2)]
    assert numbers(levels(1024, 512, 64, scales_of=(0.25, 1))) == [(1, 1), (4, 2), (16, 8)]


def test_tiles_are_the_picture():
    picture = torch.randint(0, 256, (3, 128, 192), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    made = pyramid(picture, 64)
    assert numbers(made.levels) == [(1, 1), (2, 3)] and made.tiles.dtype == torch.uint8
    assert torch.equal(made.tiles[1 + 4], picture[:, 64:, 64:128])
    # 128 x 192 into one tile: 43 rows of 64, and zeros below
    small = nn.functional.interpolate(picture[None].float(), (43, 64), mode="bilinear")[0].round()
    assert torch.equal(made.tiles[0][:, :43].float(), small) and not made.tiles[0][:, 43:].any()
    # 100 x 192 is enlarged only as far as its width allows
    low = pyramid(picture[:, :100], 64)
    assert numbers(low.levels) == [(1, 1), (2, 3)] and torch.equal(
        low.tiles[2][:, :, :], picture[:, :64, 64:128]
    )
    assert not low.tiles[1 + 3][:, 36:].any()
    real = pyramid(picture / 255, 64)
    assert real.tiles.dtype == torch.float32 and torch.equal(
        (real.tiles[5] * 255).round(), made.tiles[5].float()
    )


def test_where_padding_lies():
    assert Level(2, 3).map(48, 72) == (48, 72)
    # wider than its map: all columns; int(666 * 72 / 1008) rows
    assert Level(2, 3, 666, 1008).map(48, 72) == (47, 72)
    assert Level(2, 3, 672, 900).map(48, 72) == (48, 64)


@pytest.mark.parametrize(
    ("make_it", "says"),
    [
        (lambda: pyramid(torch.zeros(3, 1, 4000)), "1 x 4000 pixels would be 0 x 336"),
        (lambda: pyramid(torch.zeros(3, 4000, 1), 64), "4000 x 1 pixels would be 64 x 0"),
        (lambda: pyramid(torch.zeros(3, 0, 40)), "no tiles"),
        (lambda: pyramid(torch.zeros(3, 400, 400), 0), "no tiles"),
        (lambda: pyramid(torch.zeros(3, 400, 400), base=0), "no tiles"),
        (lambda: pyramid(torch.zeros(3, 400, 400), scales_of=(0, 1)), "0 x 0"),
        (lambda: pyramid(torch.zeros(1, 400, 400)), r"\[1, 400, 400\]"),
    ],
)
def test_pictures_that_leave_nothing(make_it, says):
    with pytest.raises(SecateurError, match=says):
        make_it()


def test_votes():
    """Spec: lrs-dip (a), tiles: without and with the separators of the four rows."""
    tokens = [(1, 3), (1, 4), (2, 3), (3, 5), (0, 0)]
    lines = [(row, 6) for row in range(4)]
    grid = [(r, c) for r in range(4) for c in range(7)]
    every = torch.tensor(grid)

    def tiles(chosen, **more):
        mask = torch.tensor([place in chosen for place in grid])
        won = voted(mask, every, (4, 7), (3, 5), **more)
        return {(t // 5, t % 5) for t in won.nonzero()[:, 0].tolist()}

    alone = {(0, 2), (1, 2), (2, 3), (0, 0)}
    assert tiles(tokens) == alone
    assert tiles(tokens + lines) == alone | {(0, 4), (1, 4), (2, 4)}
    # votes: two for (0, 2) and for (0, 4); the first of equal ones
    assert tiles(tokens + lines, most=1) == {(0, 2)}
    assert tiles(tokens + lines, most=2) == {(0, 2), (0, 4)}
    assert tiles(tokens + lines, most=3) == {(0, 0), (0, 2), (0, 4)}
    scores = torch.tensor([0.9 if place == (3, 5) else 0.1 for place in grid])
    assert tiles(tokens, most=1, weights=scores) == {(2, 3)}
    # float32 would give 2: 58 * 3 / 58 in floating point may fall short of 3
    assert voted(torch.tensor([True]), torch.tensor([[0, 57]]), (1, 58), (1, 29)).nonzero().item() == 28


def pyramid_inputs(family, dtype=torch.float64, grids=GRIDS):
    """Rows of one pyramid each, left-padded; a picture for every tile."""
    tiles = [sum(level.rows * level.cols for level in grid) for grid in grids]
    generator = torch.Generator().manual_seed(3)
    pixels = torch.randn(sum(tiles), 3, 16, 16, generator=generator, dtype=dtype)
    rows = [[1, 20, *[IMAGE] * (n * EACH[family]), 31, 40 + i, 50, 60] for i, n in enumerate(tiles)]
    longest = max(map(len, rows))
    ids = torch.tensor([[PAD] * (longest - len(row)) + row for row in rows])
    out = {"input_ids": ids, "attention_mask": (ids != PAD).long()}
    if family == "idefics3":
        most = max(tiles)
        padded = torch.zeros(len(grids), most, 3, 16, 16, dtype=dtype)
        for row, (part, n) in enumerate(zip(pixels.split(tiles), tiles)):
            padded[row, :n] = part
        pixels = padded
    if family in ("paligemma", "gemma3"):
        out["token_type_ids"] = (ids == IMAGE).long() * (family == "gemma3")
    return out | {"pixel_values": pixels}


@dataclass
class Zooming(TokenMethod):
    """All tiles of level 1, every third of the next; then every second token. No paper."""

    prunes: bool = True

    def stages(self, facts):
        return [Stage("tiles", self.zoom), *([Stage("input", self.prune)] if self.prunes else [])]

    def zoom(self, sets):
        here = sets.reading - 1
        grid = sets.tiles[:, sets.reading]
        number = torch.arange(int(grid.prod(1).max())).expand(len(sets), -1)
        return number % (3 if here else 1) == 0

    def prune(self, sets):
        return sets.valid & ((sets.index % 2 == 0) | (sets.level == 0))


def read_tiles(grids=GRIDS):
    """Which tiles `Zooming` reads, row by row."""
    return [[1] + [1] * 4 + [t % 3 == 0 for t in range(6)], [1] + [1] * 4][: len(grids)]


@pytest.mark.parametrize("family", list(EACH))
def test_tiles_left_out_are_as_if_hidden(family):
    """Against the untouched model without a cache, every tile encoded and in place, what left hidden from attention."""
    model, inputs = make(family), pyramid_inputs(family)
    each = EACH[family]
    with torch.no_grad(), attach(model, Zooming(), target="50%", given={"pyramid": GRIDS}) as attached:
        written = model.generate(
            **inputs, max_new_tokens=3, do_sample=False, suppress_tokens=[IMAGE, 6],
            output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip
    side = int(each**0.5)
    read = [[t for t, yes in enumerate(row) for _ in range(each) if yes] for row in read_tiles()]
    kept = [row.tolist() for row in attached.kept["tiles"]]
    # the last of the 2 * side rows of level 1 is padding: int(28 * 2 side / 32)
    high = 28 * 2 * side // 32
    padding = {
        (1 + 2 * r + c) * each + i
        for r in (0, 1) for c in (0, 1) for i in range(each) if r * side + i // side >= high
    }  # fmt: skip
    assert padding
    assert len(kept[0]) == len(read[0]) - len(padding) and not padding & set(kept[0])
    assert sorted({n // each for n in kept[0]}) == sorted(set(read[0]))
    assert kept[1] == list(range(5 * each))
    gone = torch.zeros_like(inputs["input_ids"], dtype=torch.bool)
    for row, ids in enumerate(inputs["input_ids"]):
        visual = (ids == IMAGE).nonzero()[:, 0]
        gone[row, visual] = True
        gone[row, visual[attached.kept[-1][row]]] = False
        assert len(attached.kept[-1][row]) < len(kept[row]) < len(visual) or row
    tokens, logits = reference.generate(model, family, inputs, {0: gone}, 3)
    assert torch.equal(written.sequences[:, inputs["input_ids"].shape[1] :], tokens)
    assert torch.allclose(torch.stack(written.logits), logits.float(), atol=1e-6)
    assert attached.report["after"]["tiles"] == 1 + 4 + 2 + 1 + 4
    assert attached.report["before"]["tiles"] == 11 + 5


def test_the_tower_sees_the_chosen_tiles_alone():
    model, inputs = make("llava-clip"), pyramid_inputs("llava-clip")
    seen, features = [], []
    tower = model.get_encoder("image")
    block = reference.tower_blocks(tower)[0]
    handle = block.register_forward_pre_hook(lambda m, args: seen.append(len(args[0])))

    def note(sets):
        features.append((sets.index, sets.valid, sets.features))
        return sets.valid

    @dataclass
    class Noting(Zooming):
        """No paper."""

        def prune(self, sets):
            return note(sets)

    with torch.no_grad(), attach(model, Noting(), target="50%", given={"pyramid": GRIDS}) as attached:
        model(**inputs)
        # two thumbnails, two levels of four, and two of the six
        assert seen == [2, 8, 2]
        share = attached.report["after"]["tower_flops"] / attached.report["before"]["tower_flops"]
        assert share == pytest.approx(12 / 16)
    handle.remove()
    with torch.no_grad():
        whole = flat(encode(model, "image", inputs)).view(16, 16, -1)
    direct = torch.cat([whole[:11].flatten(0, 1), whole[11:].flatten(0, 1)])
    (index, valid, found) = features[0]
    for row in (0, 1):
        at = index[row][valid[row]] + (11 * 16 if row else 0)
        assert torch.allclose(found[row][valid[row]], direct[at], atol=1e-12)
    assert not tower._forward_pre_hooks and not model.model.multi_modal_projector._forward_hooks


def test_all_of_a_pyramid_stays_bit_for_bit():
    model, inputs = make("llava-clip", torch.float32), pyramid_inputs("llava-clip", torch.float32)
    with torch.no_grad():
        before = model(**inputs).logits
        with attach(model, Zooming(), target="100%", given={"pyramid": GRIDS}):
            assert torch.equal(model(**inputs).logits, before)
        assert torch.equal(model(**inputs).logits, before)


def test_a_pyramid_is_one_image_in_the_table():
    """Budgets and places are those of the whole picture."""
    model, inputs = make("llava-clip", torch.float32), pyramid_inputs("llava-clip", torch.float32)
    with (
        torch.no_grad(),
        attach(model, "random-tokens", target="tokens=7", given={"pyramid": GRIDS}) as attached,
    ):
        model(**inputs)
        assert [len(row) for row in attached.kept[0]] == [7, 7]
    with torch.no_grad(), attach(model, Zooming(False), target="50%", given={"pyramid": GRIDS}) as attached:
        model(**inputs)
        where = attached.coordinates("tiles")[0]
    # the fourth tile of the last level is tile (1, 0) of 2 x 3, crop 8 of the picture
    assert sorted(set(where["crop"].tolist())) == [0, 1, 2, 3, 4, 5, 8] and set(where["image"].tolist()) == {
        0
    }
    table = attached.table
    last = (table.crop_id == 8).nonzero()[:, 0]
    assert table.level[last].unique().tolist() == [2] and table.tile[last].unique(dim=0).tolist() == [[1, 0]]
    assert table.whole[last[0]].tolist() == [4, 0] and table.whole[last[-1]].tolist() == [7, 3]


@pytest.mark.parametrize("family", ["llava-next", "llava-onevision"])
def test_the_models_own_tiles_are_a_pyramid(family):
    """A base crop and a grid of tiles; only the tiles asked for are read, and the rest is exact."""
    model, inputs = make(family), inputs_for(family)

    @dataclass
    class First(TokenMethod):
        """No paper."""

        newlines = "compete"

        def stages(self, facts):
            return [
                Stage(
                    "tiles",
                    lambda sets: (torch.arange(int(sets.tiles[:, 1].prod(1).max())) == 0).expand(
                        len(sets), -1
                    ),
                )
            ]

    with torch.no_grad(), attach(model, First(), target="50%", positions="original") as attached:
        out = model.generate(**inputs, max_new_tokens=2, do_sample=False, suppress_tokens=[IMAGE, 6])
    assert attached.report["after"]["tiles"] == 6 and attached.report["before"]["tiles"] == 11
    gone = torch.zeros_like(inputs["input_ids"], dtype=torch.bool)
    for row, ids in enumerate(inputs["input_ids"]):
        visual = (ids == IMAGE).nonzero()[:, 0]
        gone[row, visual] = True
        gone[row, visual[attached.kept["tiles"][row]]] = False
    tokens, _ = reference.generate(model, family, inputs, {0: gone}, 2)
    assert torch.equal(out[:, inputs["input_ids"].shape[1] :], tokens)


def test_a_session_remembers_the_same_numbers_whatever_tiles_are_read():
    model, inputs = make("llava-clip", torch.float32), pyramid_inputs("llava-clip", torch.float32)
    seen = []

    @dataclass
    class Remembering(Zooming):
        """No paper."""

        def memory(self, facts):
            return Memory(layers=(1,), steps=1)

        def zoom(self, sets):
            if sets.reading == 2:
                seen.append((sets.index[0].tolist(), sets.history[0, 0]))
            return super().zoom(sets)

    model.set_attn_implementation("sdpa")
    with torch.no_grad(), attach(model, Remembering(), target="50%", given={"pyramid": GRIDS}) as attached:
        for _ in range(2):
            model.generate(**inputs, max_new_tokens=2, do_sample=False, suppress_tokens=[IMAGE, 6])
        kept = set(attached.kept[-1][0].tolist())
    (index, first), (_, second) = seen
    assert bool(first.isnan().all())
    there = [n in kept for n in index]
    assert (second > 0).tolist() == there and any(there) and not all(there)


# -- a look ahead --


@dataclass
class Looking(TokenMethod):
    """No paper."""

    layers: tuple[int, ...] = (0, 1, 2, 3)
    weights: dict | None = None

    def stages(self, facts):
        site = f"layer:{self.layers[-1]}"

        def select(sets):
            self.seen = sets.attention(site, rows="last"), sets.queries(site), sets.keys(site)
            return sets.valid & (sets.index % 2 == 0)

        return [Stage("input", select, (site,), scope="row", glimpse=Glimpse(self.layers, self.weights))]


def weights_of(model, layers):
    every = model.get_decoder().layers
    return {f"{n}.{name}": p.detach().clone() for n in layers for name, p in every[n].named_parameters()}


def test_a_look_with_all_layers_is_the_models_own():
    """Spec: lrs-dip (b), copied weights and all layers attend as the model does."""
    model, inputs = make("llava-clip", torch.float32), inputs_for("llava-clip", torch.float32)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        maps = model(**inputs, output_attentions=True).attentions[3]  # [B, H, L, L]
    for weights in (None, weights_of(model, range(4))):
        method = Looking(weights=weights)
        with torch.no_grad(), attach(model, method, target="50%") as attached:
            model(**inputs)
        for row, ids in enumerate(inputs["input_ids"][:2]):
            wanted = maps[row, :, -1].mean(0)[ids == IMAGE]
            assert torch.allclose(method.seen[0][row, : len(wanted)], wanted, atol=1e-6)
        before, after = attached.report["before"], attached.report["after"]
        assert after["glimpse_flops"] == before["flops"]
        assert after["glimpse_tokens_x_layers"] == before["tokens_x_layers"] == 48 * 4
        assert after["tokens_x_layers"] == 48 * 4 + 24 * 4 and after["equivalent_tokens"] == 48 + 24


def test_layers_that_look_run_one_after_another_and_the_others_not():
    model, inputs = make("llava-clip", torch.float32), inputs_for("llava-clip", torch.float32, rows=(1,))
    method, layers = Looking(layers=(1, 3)), model.get_decoder().layers
    with torch.no_grad():
        before = model(**inputs).logits
        with attach(model, method, target="50%"):
            model(**inputs)
        hidden = model.get_input_embeddings()(inputs["input_ids"])
        features = model.model.get_image_features(inputs["pixel_values"]).pooler_output[0]
        hidden[inputs["input_ids"] == IMAGE] = features
        tables = model.get_decoder().rotary_emb(hidden, torch.arange(hidden.shape[1])[None])
        out = layers[1](hidden, attention_mask=None, position_embeddings=tables)
        states = layers[3].input_layernorm(out[0] if isinstance(out, tuple) else out)
        q = layers[3].self_attn.q_proj(states).view(1, -1, 4, 8).transpose(1, 2)
        cos, sin = (t[:, None] for t in tables)
        q = q * cos + torch.cat([-q[..., 4:], q[..., :4]], -1) * sin
        assert torch.allclose(method.seen[1][0], q[0][:, inputs["input_ids"][0] == IMAGE], atol=1e-5)
        assert torch.equal(model(**inputs).logits, before)
        assert all("forward" not in layer.__dict__ for layer in layers)


def test_trained_weights_are_there_for_the_look_only():
    model, inputs = make("llava-clip", torch.float32), inputs_for("llava-clip", torch.float32)
    other = {name: 2 * tensor for name, tensor in weights_of(model, (0, 1)).items()}
    state = {name: p.clone() for name, p in model.state_dict().items()}
    plain, turned = Looking((0, 1)), Looking((0, 1), other)
    with torch.no_grad():
        for method in (plain, turned):
            with attach(model, method, target="50%"):
                logits = model(**inputs).logits
            method.logits = logits
    assert not torch.allclose(plain.seen[1], turned.seen[1])
    assert torch.equal(plain.logits, turned.logits)
    assert all(torch.equal(state[name], p) for name, p in model.state_dict().items())


def test_a_look_needs_no_cache_of_its_own():
    """Methods at the input work with any cache, or none, and so do those that look first."""
    model, inputs = make("llava-clip"), inputs_for("llava-clip")
    written = []
    for more in ({}, {"use_cache": False}, {"cache_implementation": "static"}):
        with torch.no_grad(), attach(model, Looking((0, 1)), target="50%"):
            out = model.generate(**inputs, max_new_tokens=3, do_sample=False, suppress_tokens=[IMAGE], **more)
            written.append(out)
    assert torch.equal(written[0], written[1]) and torch.equal(written[0], written[2])


# -- what is refused --


@pytest.mark.parametrize(
    ("grids", "says"),
    [
        ([[Level(1, 1), Level(0, 3)]], "a level without tiles"),
        ([[]], "a level without tiles"),
        ([[Level(1, 1), Level(2, 2)]], "5 tiles, and 16 pictures"),
    ],
)
def test_pyramids_that_arent_those_of_the_pictures(grids, says):
    model, inputs = make("llava-clip", torch.float32), pyramid_inputs("llava-clip", torch.float32)
    before = model(**inputs).logits
    attached = attach(model, Zooming(), target="50%", given={"pyramid": grids})
    with pytest.raises(SecateurError, match=says):
        model(**inputs)
    assert not attached.attached and torch.equal(model(**inputs).logits, before)


def test_towers_whose_tiles_cant_go_alone():
    model, inputs = make("qwen2-vl", torch.float32), inputs_for("qwen2-vl", torch.float32, rows=(1,))
    inputs["image_grid_thw"] = torch.tensor([[1, 2, 2]] * 6)
    attached = attach(model, Zooming(), target="50%", given={"pyramid": [[Level(1, 1), Level(1, 5)]]})
    with pytest.raises(SecateurError, match="one sequence"):
        model(**inputs)
    assert not attached.attached


def test_tiles_that_a_model_interpolates_together():
    model, inputs = make("llava-onevision", torch.float32), inputs_for("llava-onevision", torch.float32, (1,))
    model.config.vision_aspect_ratio = "anyres_max_1"
    count = len(family_of(model).layout(model, inputs)["image"])
    inputs["input_ids"] = torch.tensor([[1, *[IMAGE] * count, 50]])
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    before = model(**inputs).logits
    attached = attach(model, Zooming(), target="50%")
    with pytest.raises(SecateurError, match="interpolates the tiles"):
        model(**inputs)
    assert not attached.attached and torch.equal(model(**inputs).logits, before)


def stages_of(*stages):
    @dataclass
    class Some(TokenMethod):
        """No paper."""

        def stages(self, facts):
            return list(stages)

    return Some()


def keep_all(sets):
    return sets.valid


@pytest.mark.parametrize(
    ("method", "says"),
    [
        (stages_of(Stage("tiles", keep_all), Stage("tiles", keep_all)), "only one stage"),
        (stages_of(Stage("tiles", keep_all), Stage("encoder:2", keep_all)), "some of the tiles"),
        (stages_of(Stage("tiles", keep_all, ("encoder:2",))), "some of the tiles"),
        (stages_of(Stage("layer:2", keep_all, glimpse=Glimpse((0,)))), "before the language model"),
        (Looking((1, 0)), "aren't layers of this model"),
        (Looking((0, 4)), "aren't layers of this model"),
        (Looking(()), "tuple index|aren't layers"),
    ],
)
def test_stages_that_cant_be(method, says):
    model = make("llava-clip", torch.float32)
    if method == Looking(()):
        method = stages_of(Stage("input", keep_all, glimpse=Glimpse(())))
    with pytest.raises(SecateurError, match=says):
        attach(model, method, target="50%")
    attach(model, "random-tokens", target="50%").detach()


def test_weights_of_another_width():
    model = make("llava-clip", torch.float32)
    good = weights_of(model, (0, 1))
    wide = {**good, "1.mlp.up_proj.weight": torch.zeros(64, 32)}
    less = {name: tensor for name, tensor in good.items() if name != "0.mlp.up_proj.weight"}
    with pytest.raises(SecateurError, match=r"up_proj.weight is \[48, 32\] in .* \[64, 32\] in the weights"):
        attach(model, Looking((0, 1), wide), target="50%")
    with pytest.raises(SecateurError, match="not there in the weights"):
        attach(model, Looking((0, 1), less), target="50%")


@pytest.mark.parametrize("answer", [True, torch.ones(2, 4), torch.ones(2, 5, dtype=torch.bool)])
def test_answers_that_are_no_tiles(answer):
    model, inputs = make("llava-clip", torch.float32), pyramid_inputs("llava-clip", torch.float32)
    attached = attach(model, lambda sets: answer, at="tiles", target="50%", given={"pyramid": GRIDS})
    with pytest.raises(SecateurError, match=r"not a bool mask \(2, 4\) of the next level's tiles"):
        model(**inputs)
    assert not attached.attached


def test_toy_sets_have_no_pyramid():
    assert token_sets(torch.zeros(1, 4, 2), keep=1).tiles is None
