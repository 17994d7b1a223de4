"""Text by the image it follows: ids, states of layers and attention rows, against a walk along the prompt by hand."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from test_engine_records import attentions, spy
from tiny_models import IMAGE, PAD, inputs_for, make
from torch import Tensor

from secateur.errors import SecateurError
from secateur.tokens.attach import attach
from secateur.tokens.method import Stage, TokenMethod
from secateur.tokens.state import Missing, TokenSets

FAMILIES = ("llava-clip", "llava-next", "qwen2.5-vl", "idefics3", "paligemma")


def owned(ids: Tensor, mask: Tensor) -> list[tuple[list[int], list[int]]]:
    """For each image of a row the columns of its tokens, and of the text behind it. Pictures are runs of placeholders."""
    images: list[tuple[list[int], list[int]]] = []
    before = PAD
    for column, (word, real) in enumerate(zip(ids.tolist(), mask.tolist())):
        if real and word == IMAGE:
            if before != IMAGE:
                images.append(([], []))
            images[-1][0].append(column)
        elif real and images:
            images[-1][1].append(column)
        before = word
    return images


@pytest.fixture(scope="module")
def llava() -> Any:
    return make("llava-clip", torch.float32)


def prompts(family: str, right: bool = False, **more: Any) -> dict[str, Any]:
    """Rows of two, one and no images, padded on the left, or on the right."""
    inputs = inputs_for(family, torch.float32, **more)
    if right:
        for row, mask in enumerate(inputs["attention_mask"]):
            empty = int((mask == 0).sum())
            for name in ("input_ids", "attention_mask"):
                inputs[name][row] = inputs[name][row].roll(-empty)
    return inputs


@pytest.mark.parametrize(
    ("family", "right"),
    [*((family, False) for family in FAMILIES), ("llava-clip", True), ("llava-next", True)],
)
def test_ids_and_columns(family: str, right: bool) -> None:
    inputs = prompts(family, right)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]

    def look(sets: TokenSets) -> dict[Any, Any]:
        ways: tuple[str | int, ...] = ("question", "query", "image", "context", 0, 1, 7)
        found = {of: (*sets.text("ids", of), sets.text("columns", of)[0]) for of in ways}
        found["whole"] = (
            *sets.text("ids", "image", visual=True),
            sets.text("columns", "image", visual=True)[0],
        )
        embedded, there = sets.text("embeddings", "image")
        words = make(family, torch.float32).get_input_embeddings()(sets.text("ids", "image")[0])
        assert torch.equal(embedded[there], words[there])
        return found | {"sets": (sets.row, sets.image)}

    found = spy(make(family, torch.float32), inputs, look, scope="image")
    rows, images = found.pop("sets")
    assert rows.tolist() == [0, 0, 1] and images.tolist() == [0, 1, 0]
    for s, (row, image) in enumerate(zip(rows.tolist(), images.tolist())):
        walk = owned(ids[row], mask[row])
        last, (visual, text) = walk[-1], walk[image]
        expected = {
            "question": last[1],
            "query": last[1],
            "image": text,
            "context": [column for _, words in walk[:-1] for column in words],
            "whole": visual + text,
            0: walk[0][1],
            1: walk[1][1] if len(walk) > 1 else [],
            7: [],
        }
        for of, columns in expected.items():
            words, there, at = found[of]
            assert at[s, there[s]].tolist() == columns, of
            assert words[s, there[s]].tolist() == ids[row, columns].tolist(), of


def test_tags_between_the_tokens_of_an_image_are_not_its_text(llava: Any) -> None:
    """Idefics names its tiles in between; the words before the first image are of none."""
    ids = torch.tensor([[1, 9, IMAGE, IMAGE, IMAGE, IMAGE, 40, 41]])
    model = make("idefics3", torch.float32)
    pixels = torch.randn(1, 1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    tagged = torch.tensor([[1, 9, IMAGE, IMAGE, 50, IMAGE, IMAGE, 40, 41]])
    for given, columns, whole in ((ids, [6, 7], range(2, 8)), (tagged, [7, 8], range(2, 9))):
        inputs = {"input_ids": given, "attention_mask": torch.ones_like(given), "pixel_values": pixels}

        def look(sets: TokenSets) -> tuple[Tensor, ...]:
            return sets.text("columns", "image")[0], sets.text("columns", "image", visual=True)[0]

        text, every = spy(model, inputs, look)
        assert text[0].tolist() == columns and every[0].tolist() == list(whole)


def test_a_prompt_that_ends_with_its_picture(llava: Any) -> None:
    """The query is then empty; the question is all of the text, as it was."""
    ids = torch.tensor([[1, 30, *[IMAGE] * 16, 31, *[IMAGE] * 16]])
    pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}

    def look(sets: TokenSets) -> list[list[int]]:
        with pytest.raises(Missing, match="one image for a set of several"):
            sets.text("ids", "image")
        return [sets.text("ids", of)[0][sets.text("ids", of)[1]].tolist() for of in ("question", "query", 0)]

    assert spy(llava, inputs, look, scope="row") == [[1, 30, 31], [], [31]]


@dataclass
class Half(TokenMethod):
    """Some tokens leave at the input and before layer 1; what is read after that is put on `seen`."""

    name = "half"
    look: Any = None

    def stages(self, facts: Any) -> list[Stage]:
        return [
            Stage("input", lambda sets: sets.valid & (sets.index % 3 != 0)),
            Stage("layer:1", lambda sets: sets.valid & (sets.index % 2 == 0)),
            Stage("layer:3", self.read, ("layer:0", "layer:2"), scope="row"),
        ]

    def read(self, sets: TokenSets) -> Tensor:
        self.look(sets)
        return sets.valid


@pytest.mark.parametrize("beams", [0, 2])
@pytest.mark.parametrize(
    ("family", "right"), [("llava-clip", False), ("llava-clip", True), ("qwen2.5-vl", False)]
)
def test_states_after_tokens_have_left(family: str, right: bool, beams: int) -> None:
    """States of layers 0 and 2, of text by its image, are those that went through the layers at these columns."""
    model, inputs = make(family, torch.float32), prompts(family, right)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    passed: dict[int, Tensor] = {}

    def keep(number: int) -> Any:
        def hook(module: Any, args: Any, output: Any) -> None:
            states = output[0] if isinstance(output, tuple) else output
            passed.setdefault(number, states[:: max(1, beams)])

        return hook

    seen: dict[Any, Any] = {}

    def look(sets: TokenSets) -> None:
        seen["row"] = sets.row
        for of in ("query", "context", 0):
            for visual in (False, True):
                for layer in (0, 2):
                    seen[of, visual, layer] = sets.text(f"layer:{layer}", of, visual)
        with pytest.raises(Missing, match="layer:1"):
            sets.text("layer:1", "query")

    handles = [model.get_decoder().layers[n].register_forward_hook(keep(n)) for n in (0, 2)]
    with torch.no_grad(), attach(model, Half(look=look), target="50%") as attached:
        if beams:
            model.generate(
                **inputs, max_new_tokens=2, num_beams=beams, do_sample=False, suppress_tokens=[IMAGE]
            )
        else:
            model(**inputs)
        columns, dropped = attached.columns, attached.kept["layer:1"]
    for handle in handles:
        handle.remove()
    assert columns is not None
    for s, row in enumerate(seen["row"].tolist()):
        walk = owned(ids[row], mask[row])
        visual = [column for tokens, _ in walk for column in tokens]
        gone = set(visual) - {visual[number] for number in dropped[row].tolist()}
        # columns of the prompt in the order of the sequence of each layer
        first = [c for c in columns[row].tolist() if c >= 0]
        lists = {0: first, 2: [c for c in first if c not in gone]}
        for (of, with_visual, layer), (states, there) in [item for item in seen.items() if item[0] != "row"]:
            chosen = {"query": walk[-1:], "context": walk[:-1], 0: walk[:1]}[of]
            wanted = [c for tokens, words in chosen for c in (tokens if with_visual else []) + words]
            order = [c for c in lists[layer] if c in wanted]
            sequence = passed[layer][row]
            start = 0 if right else len(sequence) - len(lists[layer])
            expected = sequence[[start + lists[layer].index(c) for c in order]]
            assert torch.allclose(states[s, there[s]], expected, atol=1e-6), (row, of, with_visual, layer)


def test_attention_rows_of_given_words(llava: Any) -> None:
    inputs = prompts("llava-clip")
    whole = attentions("llava-clip", inputs)[1].mean(1)  # [B, L, L]

    def look(sets: TokenSets) -> tuple[Tensor, ...]:
        columns = sets.text("columns", "context")[0]
        single = sets.text("columns", "query")[0][:, 1:2]
        with pytest.raises(Missing, match="row of text in a vision tower"):
            sets.attention("encoder:-2", rows=single)
        with pytest.raises(SecateurError, match="no text of 'verse'"):
            sets.text("ids", "verse")
        context, word = (sets.attention("layer:1", rows=rows) for rows in (columns, single))
        return context, word, sets.valid

    context, word, valid = spy(
        llava, inputs, look, at="layer:2", records=("layer:1", "encoder:-2"), scope="row"
    )
    for row in (0, 1):
        walk = owned(inputs["input_ids"][row], inputs["attention_mask"][row])
        visual = [column for tokens, _ in walk for column in tokens]
        rows = [column for _, words in walk[:-1] for column in words]
        expected = whole[row, rows][:, visual].mean(0) if rows else torch.zeros(len(visual))
        assert torch.allclose(context[row, valid[row]], expected, atol=1e-6)
        assert torch.allclose(word[row, valid[row]], whole[row, walk[-1][1][1], visual], atol=1e-6)
