"""Dropping tokens equals an independent reference without cache, in every family and by every driver."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from reference import generate, slots_in_windows
from tiny_models import FAMILIES, IMAGE, VIDEO, inputs_for, make
from torch import Tensor

from secateur.tokens.attach import attach
from secateur.tokens.state import TokenSets

STEPS = 4
FLOAT32 = {"paligemma2"}
"""Its attention is the eager one, which in float64 gives NaN on padded rows."""
SETTINGS = {"max_new_tokens": STEPS, "do_sample": False, "suppress_tokens": [IMAGE, VIDEO]}


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    made: dict[str, Any] = {}

    def get(family: str) -> tuple[Any, dict[str, Any]]:
        if family not in made:
            made[family] = make(family, dtype_of(family))
        return made[family], inputs_for(family, dtype_of(family))

    return get  # type: ignore[return-value]


def dtype_of(family: str) -> torch.dtype:
    return torch.float32 if family in FLOAT32 else torch.float64


def tolerance(family: str) -> float:
    return 5e-4 if family in FLOAT32 else 1e-6


def run(model: Any, inputs: dict[str, Any], **settings: Any) -> tuple[Tensor, Tensor]:
    out = model.generate(
        **inputs, **{**SETTINGS, **settings}, output_logits=True, return_dict_in_generate=True
    )
    return out.sequences[:, inputs["input_ids"].shape[1] :], torch.stack(out.logits)


def dropped(inputs: dict[str, Any], share: float, seed: int, before: Tensor | None = None) -> Tensor:
    """bool [B, L]: random visual columns, a different number in each row; includes `before`."""
    generator = torch.Generator().manual_seed(seed)
    ids = inputs["input_ids"]
    gone = (torch.rand(ids.shape, generator=generator) < share) & (ids == IMAGE)
    return gone if before is None else gone | before


def choose(inputs: dict[str, Any], gone: Tensor) -> Any:
    """A selection that lets exactly the columns `gone` go."""
    ids = inputs["input_ids"]
    numbers = [gone[row, ids[row] == IMAGE] for row in range(len(ids))]

    def select(sets: TokenSets) -> Tensor:
        keep = torch.ones_like(sets.valid)
        for s in range(len(sets)):
            there = sets.valid[s]
            keep[s, there] = ~numbers[int(sets.row[s])][sets.index[s, there]]
        return keep

    return select


class Two:
    """A method with two stages between layers."""

    def __new__(cls, first: Any, second: Any, at: tuple[str, str], **more: Any) -> Any:
        from dataclasses import dataclass

        from secateur.tokens.method import Stage, TokenMethod

        @dataclass
        class Staged(TokenMethod):
            name = "staged"
            newlines = "compete"
            positions = more.get("positions", "original")

            def stages(self, facts: Any) -> list[Stage]:
                return [Stage(at[0], first), Stage(at[1], second, more.get("records", ()))]

        return Staged()


def attach_drop(model: Any, inputs: dict[str, Any], at: str, gone: Tensor, **more: Any) -> Any:
    select = choose(inputs, gone)
    chosen = attach(model, select, at=at, target="50%", scope=more.pop("scope", "row"), **more)
    chosen.method.newlines = "compete"
    return chosen


@pytest.mark.parametrize("at", ["input", "layer:2", "layer:3", "encoder:1"])
@pytest.mark.parametrize("family", FAMILIES)
def test_everything_kept_is_bit_identical(models: Any, family: str, at: str) -> None:
    model, inputs = models(family)
    with torch.no_grad():
        logits, (tokens, steps) = model(**inputs).logits, run(model, inputs)
        for select, target in ((lambda sets: sets.valid, "50%"), (lambda sets: ~sets.valid, "100%")):
            with attach(model, select, at=at, target=target):
                assert torch.equal(model(**inputs).logits, logits)
                found = run(model, inputs)
                assert torch.equal(found[0], tokens) and torch.equal(found[1], steps)
        with attach_drop(model, inputs, "input", dropped(inputs, 0.5, 0)):
            assert not torch.equal(run(model, inputs)[1], steps)
        assert torch.equal(model(**inputs).logits, logits)
        again = run(model, inputs)
        assert torch.equal(again[0], tokens) and torch.equal(again[1], steps)
    assert "forward" not in vars(model) and "generate" not in vars(model)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_reference_is_the_model_where_nothing_is_dropped(models: Any, family: str) -> None:
    model, inputs = models(family)
    tokens, logits = run(model, inputs)
    expected, reference = generate(model, family, inputs, {}, STEPS)
    assert torch.equal(tokens, expected)
    assert (logits - reference).abs().max() < tolerance(family)


@pytest.mark.parametrize("family", FAMILIES)
def test_dropping_at_the_input_equals_the_reference(models: Any, family: str) -> None:
    model, inputs = models(family)
    gone = dropped(inputs, 0.5, 3)
    expected, reference = generate(model, family, inputs, {0: gone}, STEPS)
    with attach_drop(model, inputs, "input", gone) as attached:
        tokens, logits = run(model, inputs)
    assert torch.equal(tokens, expected)
    assert (logits - reference).abs().max() < tolerance(family)
    kept = [(inputs["input_ids"][r] == IMAGE).sum() - gone[r].sum() for r in range(3)]
    assert [len(k) for k in attached.kept["input"]] == kept and kept[0] != kept[1]


@pytest.mark.parametrize("layer", [2, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_dropping_between_layers_equals_the_reference(models: Any, family: str, layer: int) -> None:
    model, inputs = models(family)
    gone = dropped(inputs, 0.5, layer)
    expected, reference = generate(model, family, inputs, {layer: gone}, STEPS)
    with attach_drop(model, inputs, f"layer:{layer}", gone):
        tokens, logits = run(model, inputs)
        out = model(**inputs)
    assert torch.equal(tokens, expected)
    assert (logits - reference).abs().max() < tolerance(family)
    lengths = [out.past_key_values.get_seq_length(i) for i in range(4)]
    full = inputs["input_ids"].shape[1]
    short = int((inputs["attention_mask"].sum(1) - gone.sum(1)).max())
    assert lengths == [full] * layer + [short] * (4 - layer)


@pytest.mark.parametrize("family", ["llava-clip", "llava-next", "qwen2.5-vl", "gemma3", "paligemma"])
def test_stages_at_the_input_and_between_layers_compose(models: Any, family: str) -> None:
    model, inputs = models(family)
    for first_at, second_at, first_layer in (("input", "layer:2", 0), ("layer:2", "layer:3", 2)):
        first = dropped(inputs, 0.4, 5)
        second = dropped(inputs, 0.4, 6, before=first)
        expected, reference = generate(
            model, family, inputs, {first_layer: first, int(second_at[-1]): second}, STEPS
        )
        method = Two(choose(inputs, first), choose(inputs, second), (first_at, second_at))
        with attach(model, method, target="50%") as attached:
            tokens, logits = run(model, inputs)
        assert torch.equal(tokens, expected)
        assert (logits - reference).abs().max() < tolerance(family)
        for row in range(3):
            left = ~second[row, inputs["input_ids"][row] == IMAGE]
            assert attached.kept[-1][row].tolist() == left.nonzero()[:, 0].tolist()


def tower_gone(family: str, inputs: dict[str, Any], seed: int) -> tuple[Tensor, Tensor]:
    """(bool [B, L] columns, bool [flat tower slots]) of visual tokens that leave, equally many in each crop."""
    generator = torch.Generator().manual_seed(seed)
    ids = inputs["input_ids"]
    columns = torch.zeros_like(ids, dtype=torch.bool)
    count = int((ids == IMAGE).sum())
    if family.startswith("qwen"):
        leave = torch.rand(count, generator=generator) < 0.5
        grid = [tuple(g) for g in inputs["image_grid_thw"].tolist()]
        patches = leave.repeat_interleave(4)
        slots = slots_in_windows(grid) if family == "qwen2.5-vl" else list(range(4 * count))
        columns[ids == IMAGE] = leave
        return columns, patches[slots]
    prefix = 1 if family in ("llava-clip", "internvl") else 0
    per = count // 3
    leave = torch.zeros(3, per, dtype=torch.bool)
    for crop in range(3):
        leave[crop, torch.randperm(per, generator=generator)[: per // 2]] = True
    columns[ids == IMAGE] = leave.flatten()
    grid_side = int(per**0.5)
    spread = leave.view(3, grid_side, grid_side)
    if per == 4:
        spread = spread.repeat_interleave(2, 1).repeat_interleave(2, 2)
    flat = torch.cat([torch.zeros(3, prefix, dtype=torch.bool), spread.flatten(1)], 1)
    return columns, flat.flatten()


@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in ("llava-next", "llava-onevision")])
def test_dropping_in_the_tower_equals_the_reference(models: Any, family: str) -> None:
    model, inputs = models(family)
    columns, flat = tower_gone(family, inputs, 1)
    expected, reference = generate(model, family, inputs, {0: columns}, STEPS, tower=(1, flat))
    with attach_drop(model, inputs, "encoder:1", columns, scope="image") as attached:
        tokens, logits = run(model, inputs)
    assert torch.equal(tokens, expected)
    assert (logits - reference).abs().max() < tolerance(family)
    for row in range(3):
        stays = ~columns[row, inputs["input_ids"][row] == IMAGE]
        assert attached.kept["encoder:1"][row].tolist() == stays.nonzero()[:, 0].tolist()


@pytest.mark.parametrize("family", ["llava-next", "llava-onevision"])
def test_dropping_in_the_tower_before_tiles_are_joined(models: Any, family: str) -> None:
    """Half of the 16 patches of each of 11 crops leave, among them some that unpadding takes away later."""
    from secateur.families.vlm import family_of

    model, inputs = models(family)
    layout = family_of(model).layout(model, inputs)["image"]  # type: ignore[misc]
    keep = torch.rand(11, 16, generator=torch.Generator().manual_seed(0)).argsort(1) < 8
    prefix = 1 if family == "llava-next" else 0
    slots = torch.cat([torch.zeros(11, prefix, dtype=torch.bool), ~keep], 1).flatten()
    patch = layout.patches[:, 0]
    columns = torch.zeros_like(inputs["input_ids"], dtype=torch.bool)
    columns[inputs["input_ids"] == IMAGE] = (patch >= 0) & ~keep.flatten()[patch.clamp(min=0)]
    expected, reference = generate(model, family, inputs, {0: columns}, STEPS, tower=(2, slots))
    with attach(model, lambda sets: keep, at="encoder:2", target="50%", scope="crop"):
        tokens, logits = run(model, inputs)
    assert torch.equal(tokens, expected)
    assert (logits - reference).abs().max() < tolerance(family)


def test_tower_input_and_layers_compose(models: Any) -> None:
    """Three stages of three drivers in one run."""
    from dataclasses import dataclass

    from secateur.tokens.method import Stage, TokenMethod

    model, inputs = models("llava-clip")
    ids = inputs["input_ids"]
    first, flat = tower_gone("llava-clip", inputs, 1)
    second = dropped(inputs, 0.3, 11, before=first)
    third = dropped(inputs, 0.3, 12, before=second)

    @dataclass
    class Three(TokenMethod):
        name = "three"
        scope = "row"

        def stages(self, facts: Any) -> list[Stage]:
            at = ("encoder:1", "input", "layer:3")
            return [Stage(a, choose(inputs, gone)) for a, gone in zip(at, (first, second, third))]

    expected, reference = generate(model, "llava-clip", inputs, {0: second, 3: third}, STEPS, tower=(1, flat))
    with attach(model, Three(), target="50%") as attached:
        tokens, logits = run(model, inputs)
    assert torch.equal(tokens, expected) and (logits - reference).abs().max() < 1e-6
    for stage, gone in zip(("encoder:1", "input", "layer:3"), (first, second, third)):
        for row in range(3):
            stays = ~gone[row, ids[row] == IMAGE]
            assert attached.kept[stage][row].tolist() == stays.nonzero()[:, 0].tolist()


def test_sizes_weigh_in_the_towers_attention(models: Any) -> None:
    """log(size) is added to a merged token's logits as a key: equal to leaving its copies in place."""
    from dataclasses import dataclass

    from secateur.tokens.method import Stage, TokenMethod
    from secateur.tokens.state import Reduction

    model, inputs = models("llava-clip")
    tower = model.get_encoder("image")
    twins = inputs["pixel_values"].clone()
    twins[..., 4:8, 8:12] = twins[..., 4:8, 4:8]
    table = tower.embeddings.position_embedding.weight
    before = table.detach().clone()
    with torch.no_grad():
        table[7] = table[6]

    @dataclass
    class Twins(TokenMethod):
        name = "twins"
        scope = "crop"

        def stages(self, facts: Any) -> list[Stage]:
            return [Stage("encoder:1", self.join, bias="size")]

        def join(self, sets: TokenSets) -> Reduction:
            keep = sets.valid.clone()
            keep[:, 6] = False
            size = torch.ones_like(sets.valid, dtype=torch.float32)
            size[:, 5] = 2
            sets.carried["size"] = size
            return Reduction.from_mask(keep)

    given = {**inputs, "pixel_values": twins}
    with torch.no_grad():
        plain = torch.cat(model.get_image_features(twins).pooler_output).view(3, 16, -1)
        seen: list[Tensor] = []
        with attach(model, Twins(), target="50%"):
            handle = model.model.multi_modal_projector.register_forward_hook(
                lambda m, a, out: seen.append(out)
            )
            model(**given)
            handle.remove()
        others = [i for i in range(16) if i != 6]
        assert torch.allclose(seen[0][:, others], plain[:, others], atol=1e-10)
        table.copy_(before)
