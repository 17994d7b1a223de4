"""Statistics taken beside the run equal those of the whole attention matrix, which the model itself gives when asked."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from reference import slots_in_windows
from tiny_models import IMAGE, inputs_for, make
from torch import Tensor

from secateur.errors import SecateurError
from secateur.tokens.attach import attach
from secateur.tokens.state import Missing, TokenSets


def spy(model: Any, inputs: dict[str, Any], look: Any, at: str = "input", **settings: Any) -> Any:
    """What `look(sets)` found while everything stayed; the run must not change by it."""
    found: list[Any] = []

    def select(sets: TokenSets) -> Tensor:
        found.append(look(sets))
        return sets.valid

    with torch.no_grad():
        expected = model(**inputs).logits
        with attach(model, select, at=at, target="50%", **settings):
            assert torch.equal(model(**inputs).logits, expected)
    return found[0]


def attentions(family: str, inputs: dict[str, Any], dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """[B, H, L, L] of every decoder layer, from the model's own eager attention."""
    model = make(family, dtype)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        return model(**inputs, output_attentions=True).attentions


@pytest.fixture(scope="module")
def llava() -> Any:
    return make("llava-clip", torch.float32)


@pytest.fixture
def inputs() -> dict[str, Any]:
    return inputs_for("llava-clip", torch.float32)


@pytest.mark.parametrize("chunk", [128, 3])
@pytest.mark.parametrize("family", ["llava-clip", "llava-siglip", "qwen2.5-vl", "gemma3", "paligemma"])
def test_rows_of_a_decoder_layer(family: str, chunk: int, monkeypatch: Any) -> None:
    """Grouped queries, left padding, two images in one row, masks that see both ways; few rows and many."""
    monkeypatch.setattr("secateur.tokens.live.CHUNK", chunk)
    model, inputs = make(family, torch.float32), inputs_for(family, torch.float32)
    ids, mask = inputs["input_ids"], inputs["attention_mask"].bool()
    whole = attentions(family, inputs)[1]

    def look(sets: TokenSets) -> dict[str, Tensor]:
        weights = torch.linspace(0, 1, sets.valid.shape[1]).expand(len(sets), -1) * sets.valid
        found = {rows: sets.attention("layer:1", rows=rows) for rows in ("last", "text", "visual", "all")}
        found["weights"] = sets.attention("layer:1", rows=weights)
        found["heads"] = sets.attention("layer:1", rows="last", heads=True)
        found["over"] = sets.attention("layer:1", rows="last", over="visual")
        found["row"], found["valid"], found["image"] = sets.row, sets.valid, sets.image
        return found

    found = spy(model, inputs, look, at="layer:2", records=("layer:1",), scope="image")
    assert found["row"].tolist() == [0, 0, 1] and found["image"].tolist() == [0, 1, 0]
    for s, row in enumerate(found["row"].tolist()):
        columns = (ids[row] == IMAGE).nonzero()[:, 0]
        breaks = (columns.diff() > 1).nonzero()[:, 0]
        own = columns
        if len(breaks):
            own = columns[: breaks[0] + 1] if s == 0 else columns[breaks[0] + 1 :]
        seen = found["valid"][s]
        n = len(own)
        assert int(seen.sum()) == n
        attention = whole[row].mean(0)
        text = mask[row] & (ids[row] != IMAGE)
        after = text & (torch.arange(len(text)) > own[-1])
        expected = {
            "last": attention[-1, own],
            "text": attention[after][:, own].mean(0),
            "visual": attention[own][:, own].mean(0),
            "all": attention[mask[row]][:, own].mean(0),
            "weights": (torch.linspace(0, 1, len(seen))[:n, None] * attention[own][:, own]).sum(0),
        }
        for name, value in expected.items():
            assert torch.allclose(found[name][s, seen], value, atol=1e-6), name
            assert not found[name][s, ~seen].any()
        assert torch.allclose(found["heads"][s][:, seen], whole[row][:, -1, own], atol=1e-6)
        only = whole[row][:, -1, own]
        if not family.startswith("gemma"):
            only = (only / only.sum(-1, keepdim=True)).mean(0)
            assert torch.allclose(found["over"][s, seen], only, atol=1e-5)


def test_rows_after_tokens_have_left(llava: Any, inputs: dict[str, Any]) -> None:
    """A later stage reads a layer that ran on what was left, through its own numbering of slots."""
    from test_engine import Two, choose, dropped

    first = dropped(inputs, 0.5, 5)
    seen: dict[str, Tensor] = {}

    def look(sets: TokenSets) -> Tensor:
        seen.update(a=sets.attention("layer:2", "last"), index=sets.index, row=sets.row, valid=sets.valid)
        return sets.valid

    ids = inputs["input_ids"]
    method = Two(choose(inputs, first), look, ("layer:2", "layer:3"), records=("layer:2",))
    with torch.no_grad(), attach(llava, method, target="50%"):
        llava(**inputs)
    eager = make("llava-clip", torch.float32)
    eager.set_attn_implementation("eager")
    from reference import masked_layers

    with torch.no_grad(), masked_layers(eager.get_decoder().layers, {2: first}, eager=True):
        whole = eager(**inputs, output_attentions=True).attentions[2].mean(1)
    for s, row in enumerate(seen["row"].tolist()):
        columns = (ids[row] == IMAGE).nonzero()[:, 0][seen["index"][s, seen["valid"][s]]]
        assert torch.allclose(seen["a"][s, seen["valid"][s]], whole[row, -1, columns], atol=1e-6)
        assert not first[row, columns].any() and len(columns)


@pytest.mark.parametrize("family", ["llava-clip", "qwen2.5-vl", "gemma3"])
def test_keys_and_entries_of_the_text(family: str) -> None:
    """Of the columns after a row's last image, in order; and the norm behind the last layer."""
    model, inputs = make(family, torch.float32), inputs_for(family, torch.float32)
    ids, mask = inputs["input_ids"], inputs["attention_mask"].bool()
    with torch.no_grad():
        states = model(**inputs, output_hidden_states=True).hidden_states

    def look(sets: TokenSets) -> dict[str, Any]:
        found: dict[str, Any] = {"row": sets.row, "valid": sets.valid, "own": sets.index}
        found["image"] = sets.hidden("layer:0:entry")
        found["entry"], found["keys"] = sets.text("layer:0:entry"), sets.text("layer:1:keys")
        found["last"] = sets.keys("layer:1", cls=True)
        found["norm"] = sets.final_norm(sets.text("layer:1")[0])
        return found

    found = spy(model, inputs, look, at="layer:2", records=("layer:1", "layer:0:entry"), scope="image")
    norm = model.get_decoder().norm
    for s, row in enumerate(found["row"].tolist()):
        images = (ids[row] == IMAGE).nonzero()[:, 0]
        after = [c for c in range(ids.shape[1]) if mask[row, c] and c > images[-1]]
        n = len(after)
        assert int(found["entry"][1][s].sum()) == int(found["keys"][1][s].sum()) == n
        assert torch.equal(found["entry"][0][s, :n], states[0][row, after])
        with torch.no_grad():
            assert torch.allclose(found["norm"][s, :n], norm(states[2][row, after]), atol=1e-6)
        assert torch.equal(found["keys"][0][s, n - 1], found["last"][s])
        own = images[found["own"][s, found["valid"][s]]]
        assert torch.equal(found["image"][s, found["valid"][s]], states[0][row, own])


def test_what_is_noted_lasts_one_run(llava: Any, inputs: dict[str, Any]) -> None:
    from test_engine import Two, choose, dropped

    seen: list[bool] = []
    chooser = choose(inputs, dropped(inputs, 0.5, 5))

    def early(sets: TokenSets) -> Tensor:
        assert not sets.noted
        sets.noted["words"] = sets.text("ids")[0]
        return chooser(sets)

    def late(sets: TokenSets) -> Tensor:
        seen.append(torch.equal(sets.noted["words"], sets.text("ids")[0]))
        return sets.valid

    with torch.no_grad(), attach(llava, Two(early, late, ("layer:2", "layer:3")), target="50%"):
        for _ in range(2):
            llava(**inputs)
    assert seen == [True, True]


def test_peek_is_what_the_layer_will_compute(llava: Any, inputs: dict[str, Any]) -> None:
    whole = attentions("llava-clip", inputs)[2].mean(1)

    def look(sets: TokenSets) -> tuple[Tensor, ...]:
        named = sets.attention("layer:2:peek", "last")
        assert torch.equal(named, sets.attention("layer:2", "last"))
        return named, sets.row, sets.valid, sets.keys("layer:2:peek"), sets.keys("layer:2:peek", rope=False)

    found, rows, valid, keys, raw = spy(
        llava, inputs, look, at="layer:2", records=("layer:2:peek",), scope="row"
    )
    with torch.no_grad():
        hidden = llava(**inputs, output_hidden_states=True).hidden_states[2]
    layer = llava.get_decoder().layers[2]
    own = layer.self_attn.k_proj(layer.input_layernorm(hidden)).view(3, -1, 2, 8).transpose(1, 2)
    for s, row in enumerate(rows.tolist()):
        columns = (inputs["input_ids"][row] == IMAGE).nonzero()[:, 0]
        assert torch.allclose(found[s, valid[s]], whole[row, -1, columns], atol=1e-6)
        assert torch.allclose(raw[s][:, valid[s]], own[row][:, columns], atol=1e-5)
        assert not torch.allclose(keys[s][:, valid[s]], own[row][:, columns], atol=1e-3)
        assert torch.allclose(keys[s].norm(dim=-1), raw[s].norm(dim=-1), atol=1e-4)


@pytest.mark.parametrize("family", ["llava-clip", "qwen2-vl"])
def test_raw_queries_and_keys_come_before_rotation(family: str) -> None:
    model, inputs = make(family, torch.float32), inputs_for(family, torch.float32)
    with torch.no_grad():
        hidden = model(**inputs, output_hidden_states=True).hidden_states[1]
    layer = model.get_decoder().layers[1]
    q = layer.self_attn.q_proj(layer.input_layernorm(hidden)).view(3, hidden.shape[1], 4, 8).transpose(1, 2)
    k = layer.self_attn.k_proj(layer.input_layernorm(hidden)).view(3, hidden.shape[1], 2, 8).transpose(1, 2)

    def look(sets: TokenSets) -> tuple[Tensor, ...]:
        over = sets.attention("layer:1:raw", "last", over="visual")
        return sets.queries("layer:1", rope=False), sets.keys("layer:1", rope=False), over, sets.valid

    queries, keys, over, valid = spy(model, inputs, look, at="layer:2", records=("layer:1:raw",), scope="row")
    for s in range(2):
        columns = (inputs["input_ids"][s] == IMAGE).nonzero()[:, 0]
        assert torch.allclose(queries[s][:, valid[s]], q[s][:, columns], atol=1e-5)
        assert torch.allclose(keys[s][:, valid[s]], k[s][:, columns], atol=1e-5)
        logits = torch.einsum("hd,hnd->hn", q[s, :, -1], k[s].repeat_interleave(2, 0)[:, columns]) / 8**0.5
        assert torch.allclose(over[s, valid[s]], logits.softmax(-1).mean(0), atol=1e-5)


def test_what_modules_take_and_give(llava: Any, inputs: dict[str, Any]) -> None:
    layer = llava.get_decoder().layers[1]
    with torch.no_grad():
        states = llava(**inputs, output_hidden_states=True).hidden_states

    def look(sets: TokenSets) -> tuple[Any, ...]:
        return (
            sets.transition("layer:1", "mlp"),
            sets.transition("layer:1", "attention", whole=True),
            sets.hidden("layer:1"),
            sets.features,
            sets.valid,
        )

    mlp, whole, hidden, features, valid = spy(
        llava, inputs, look, at="layer:2", records=("layer:1:modules", "layer:1"), scope="row"
    )
    assert torch.equal(hidden[valid], features[valid])
    with torch.no_grad():
        given, out, real = whole
        assert torch.equal(real, inputs["attention_mask"].bool())
        assert torch.allclose(given, layer.input_layernorm(states[1]), atol=1e-6)
        middle = states[1] + out
        expected = layer.post_attention_layernorm(middle)
        for s in range(2):
            columns = (inputs["input_ids"][s] == IMAGE).nonzero()[:, 0]
            assert torch.allclose(mlp[0][s, valid[s]], expected[s, columns], atol=1e-5)
            assert torch.allclose(mlp[1][s, valid[s]], layer.mlp(expected)[s, columns], atol=1e-5)


# -- the tower --


def tower_attention(family: str, inputs: dict[str, Any], block: int) -> Any:
    model = make(family, torch.float32)
    tower = model.get_encoder("image")
    tower.set_attn_implementation("eager")
    with torch.no_grad():
        return tower(inputs["pixel_values"], output_attentions=True).attentions[block]


def test_rows_of_a_tower_with_cls(llava: Any, inputs: dict[str, Any]) -> None:
    whole = tower_attention("llava-clip", inputs, -2)

    def look(sets: TokenSets) -> dict[str, Tensor]:
        weights = torch.arange(16.0).expand(3, -1)
        found = {rows: sets.attention("encoder:-2", rows) for rows in ("cls", "all", "visual")}
        found["weights"] = sets.attention("encoder:-2", weights)
        found["heads"] = sets.attention("encoder:-2", "cls", heads=True)
        found["over"] = sets.attention("encoder:-2", "cls", over="visual")
        found["hidden"], found["first"] = sets.hidden("encoder:-2"), sets.hidden("encoder:-2", cls=True)
        found["projected"], found["features"] = sets.project(sets.hidden("encoder:-2")), sets.features
        found["values"] = sets.values("encoder:-2", cls=True)
        return found

    found = spy(llava, inputs, look, records=("encoder:-2",), scope="crop")
    attention = whole.mean(1)
    assert torch.allclose(found["cls"], attention[:, 0, 1:], atol=1e-6)
    assert torch.allclose(found["all"], attention.mean(1)[:, 1:], atol=1e-6)
    assert torch.allclose(found["visual"], attention[:, 1:].mean(1)[:, 1:], atol=1e-6)
    assert torch.allclose(
        found["weights"], torch.einsum("r,brk->bk", torch.arange(16.0), attention[:, 1:, 1:]), atol=1e-5
    )
    assert torch.allclose(found["heads"], whole[:, :, 0, 1:], atol=1e-6)
    assert torch.allclose(
        found["over"], (whole[:, :, 0, 1:] / whole[:, :, 0, 1:].sum(-1, keepdim=True)).mean(1), atol=1e-6
    )
    with torch.no_grad():
        tower = llava.get_encoder("image")
        states = tower(inputs["pixel_values"], output_hidden_states=True).hidden_states
    assert torch.equal(found["hidden"], states[-2][:, 1:])
    assert torch.equal(found["first"], states[-2][:, 0])
    block = tower.encoder.layers[-2]
    values = block.self_attn.v_proj(block.layer_norm1(states[-3]))[:, 0].view(3, 4, 6)
    assert torch.allclose(found["values"], values, atol=1e-5)
    assert torch.allclose(found["projected"], found["features"], atol=1e-6)


@pytest.mark.parametrize("family", ["gemma3", "internvl"])
def test_patches_are_averaged_to_tokens(family: str) -> None:
    """A token's number is the mean over its 2 x 2 patches of a 4 x 4 grid."""
    model, inputs = make(family, torch.float32), inputs_for(family, torch.float32)
    prefix = 1 if family == "internvl" else 0
    whole = tower_attention(family, inputs, -1).mean(1).mean(1)[:, prefix:]
    expected = torch.nn.functional.avg_pool2d(whole.view(3, 1, 4, 4), 2).flatten(1)
    found, rows, columns = spy(
        model,
        inputs,
        lambda sets: (sets.attention("encoder:-1", "all"), sets.grid_row, sets.grid_col),
        records=("encoder:-1",),
        scope="crop",
    )
    assert torch.allclose(found.gather(1, rows * 2 + columns), expected, atol=1e-6)
    assert sorted((rows * 2 + columns)[0].tolist()) == [0, 1, 2, 3]


@pytest.mark.parametrize("block", [0, 1])
def test_windows_are_undone(block: int) -> None:
    """Block 0 attends within windows, block 1 over the picture; both are read in the order of the visual tokens."""
    model, inputs = make("qwen2.5-vl", torch.float32), inputs_for("qwen2.5-vl", torch.float32)
    tower = model.get_encoder("image")
    grid = [tuple(g) for g in inputs["image_grid_thw"].tolist()]
    slots = torch.tensor(slots_in_windows(grid))
    calls: list[Tensor] = []

    def eager(module: Any, q: Tensor, k: Tensor, v: Tensor, *args: Any, **kw: Any) -> Any:
        weights = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1)
        if module is tower.blocks[block].attn:
            calls.append(weights.mean(1).mean(1)[0])
        return (weights @ v).transpose(1, 2), weights

    from transformers import AttentionInterface

    AttentionInterface.register("by-hand", eager)
    before = tower.config._attn_implementation
    tower.config._attn_implementation = "by-hand"
    with torch.no_grad():
        tower(inputs["pixel_values"], grid_thw=inputs["image_grid_thw"])
    tower.config._attn_implementation = before
    assert len(calls) == (5 if block == 0 else 3)
    received = torch.empty(64)
    received[slots] = torch.cat(calls)
    expected = received.view(-1, 4).mean(1)
    found, valid = spy(
        model,
        inputs,
        lambda sets: (sets.attention(f"encoder:{block}", "all"), sets.valid),
        records=(f"encoder:{block}",),
    )
    assert torch.allclose(found[valid], expected, atol=1e-6)


def test_a_later_block_is_read_after_patches_have_left(llava: Any, inputs: dict[str, Any]) -> None:
    from dataclasses import dataclass

    from secateur.tokens.method import Stage, TokenMethod

    seen: list[Tensor] = []
    keep = torch.rand(3, 16, generator=torch.Generator().manual_seed(0)).argsort(1) < 8

    @dataclass
    class Late(TokenMethod):
        name = "late"
        scope = "crop"

        def stages(self, facts: Any) -> list[Stage]:
            return [Stage("encoder:1", lambda s: keep), Stage("input", self.look, ("encoder:2",))]

        def look(self, sets: TokenSets) -> Tensor:
            seen.extend([sets.attention("encoder:2", "cls"), sets.index, sets.row, sets.image])
            return sets.valid

    with torch.no_grad(), attach(llava, Late(), target="50%"):
        llava(**inputs)
    from reference import masked_layers

    tower = make("llava-clip", torch.float32).get_encoder("image")
    tower.set_attn_implementation("eager")
    gone = torch.cat([torch.zeros(3, 1, dtype=torch.bool), ~keep], 1)
    for layer in tower.encoder.layers:
        layer.register_forward_pre_hook(
            lambda m, a, kw: (a, {**kw, "attention_mask": torch.zeros(3, 1, 17, 17)}) if len(a) < 2 else (a[:1], {**kw, "attention_mask": torch.zeros(3, 1, 17, 17)}),
            with_kwargs=True,
        )  # fmt: skip
    with torch.no_grad(), masked_layers(tower.encoder.layers, {1: gone}, eager=True):
        whole = tower(inputs["pixel_values"], output_attentions=True).attentions[2].mean(1)[:, 0, 1:]
    for crop in range(3):
        assert torch.allclose(seen[0][crop], whole[crop, keep[crop]], atol=1e-6)


def test_what_a_model_does_not_have_is_named(llava: Any, inputs: dict[str, Any]) -> None:
    siglip = make("llava-siglip", torch.float32)
    before = siglip(**inputs).logits

    def ask(model: Any, look: Any, word: str, **settings: Any) -> None:
        def tried(sets: TokenSets) -> bool:
            with pytest.raises(Missing, match=word):
                look(sets)
            return True

        assert spy(model, inputs, tried, **settings)

    ask(siglip, lambda s: s.attention("encoder:-1", "cls"), "no CLS token", records=("encoder:-1",))
    ask(siglip, lambda s: s.hidden("encoder:-1", cls=True), "no CLS token", records=("encoder:-1",))
    ask(
        llava,
        lambda s: s.attention("encoder:-1", "cls"),
        'put "encoder:-1" into the records',
        records=("encoder:-2",),
    )
    ask(llava, lambda s: s.attention("layer:1", "last"), "runs later", records=("layer:1",))
    ask(
        llava,
        lambda s: s.attention("layer:1", "cls"),
        "CLS token in a language model",
        records=("layer:1",),
        at="layer:2",
    )
    assert torch.equal(siglip(**inputs).logits, before)
    with (
        pytest.raises(SecateurError, match="recorded already"),
        attach(llava, lambda s: s.valid, target="50%", records=("layer:1",)),
    ):
        from secateur.tokens.record import tap_on

        tap_on(llava.get_decoder().layers[1])


def test_text_and_pixels(llava: Any, inputs: dict[str, Any]) -> None:
    inputs["pixel_values"] = inputs["pixel_values"].clamp(-1, 1)

    def look(sets: TokenSets) -> tuple[Any, ...]:
        return sets.text("ids"), sets.text("embeddings"), sets.pixels(), sets.row

    (ids, there), (embeddings, _), pixels, rows = spy(llava, inputs, look, scope="row")
    for s, row in enumerate(rows.tolist()):
        given = inputs["input_ids"][row][inputs["attention_mask"][row].bool()]
        text = given[int((given == IMAGE).nonzero().max()) + 1 :]
        assert ids[s, there[s]].tolist() == text.tolist()
        assert torch.equal(embeddings[s, there[s]], llava.get_input_embeddings()(text))
    colour = (inputs["pixel_values"][0, :, 4:8, 8:12] * 0.5 + 0.5) * 255
    grey = 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2]
    assert torch.allclose(pixels[0, 6], grey.flatten(), atol=1e-3)


def test_carried_numbers_follow_their_tokens(llava: Any, inputs: dict[str, Any]) -> None:
    """Written at the input over images, read between layers over rows, after tokens left and others moved."""
    from dataclasses import dataclass

    from secateur.tokens.method import Stage, TokenMethod

    seen: list[TokenSets] = []

    @dataclass
    class Carrying(TokenMethod):
        name = "carrying"

        def stages(self, facts: Any) -> list[Stage]:
            return [
                Stage("input", self.write),
                Stage("layer:1", self.half),
                Stage("layer:3", self.read, scope="row"),
            ]

        def write(self, sets: TokenSets) -> Tensor:
            assert not sets.carried
            sets.carried["mine"] = sets.index * 10.0 + sets.row[:, None]
            return sets.index % 3 != 0

        def half(self, sets: TokenSets) -> Tensor:
            assert torch.equal(
                sets.carried["mine"][sets.valid], (sets.index * 10.0 + sets.row[:, None])[sets.valid]
            )
            return sets.index % 2 == 0

        def read(self, sets: TokenSets) -> Tensor:
            seen.append(sets)
            return sets.valid

    with torch.no_grad(), attach(llava, Carrying(), target="50%") as attached:
        llava(**inputs)
    (sets,) = seen
    numbers = [n for n in range(32) if n % 3 and n % 2 == 0]
    assert sets.index[0, sets.valid[0]].tolist() == numbers == attached.kept["layer:3"][0].tolist()
    assert sets.carried["mine"][0, sets.valid[0]].tolist() == [n * 10.0 for n in numbers]
    assert sets.carried["mine"][1, sets.valid[1]].tolist() == [n * 10.0 + 1 for n in numbers if n < 16]
    assert sets.total.tolist() == [32, 16]
