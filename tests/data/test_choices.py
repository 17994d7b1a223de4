"""Prompts as EleutherAI/lm-evaluation-harness writes them, spelled out; counts as the README of the data says."""

import gzip
import json
from pathlib import Path

import pytest

from secateur.data.choices import SETS, load_items
from secateur.errors import SecateurError

ASKED = "Question: Is it so?\nAnswer:"
CASES = {
    "arc_easy": ({"question": "Is it so?", "choices": ["yes", "no"]}, ASKED, [" yes", " no"]),
    "arc_challenge": ({"question": "Is it so?", "choices": ["yes", "no"]}, ASKED, [" yes", " no"]),
    "commonsense_qa": ({"question": "Is it so?", "choices": ["yes", "no"]}, ASKED, [" yes", " no"]),
    "piqa": ({"question": "Is it so?", "choices": ["do a", "do b"]}, ASKED, [" do a", " do b"]),
    "openbookqa": (
        {"question": "Predators eat", "choices": ["lions", "grass"]},
        "Predators eat",
        [" lions", " grass"],
    ),
    "sciq": (
        {"passage": " A fact.", "question": "Is it so?", "choices": ["a", "b"]},
        f"A fact.\n{ASKED}",
        [" a", " b"],
    ),
    "boolq": (
        {"passage": "A fact.", "question": "is it so", "choices": ["no", "yes"]},
        "A fact.\nQuestion: is it so?\nAnswer:",
        [" no", " yes"],
    ),
    "rte": (
        {"passage": "A fact.", "question": "It is so.", "choices": ["entailment", "not_entailment"]},
        "A fact.\nQuestion: It is so. True or False?\nAnswer:",
        [" True", " False"],
    ),
    "copa": (
        {"passage": "The woman retired. ", "question": "effect", "choices": ["She slept.", "He slept."]},
        "The woman retired therefore",
        [" she slept.", " he slept."],
    ),
    "social_iqa": (
        {"passage": "Tracy left.", "question": "Why?", "choices": ["a", "b", "c"]},
        "Q: Tracy left. Why?\nA:",
        [" a", " b", " c"],
    ),
    "hellaswag": (
        {"question": "Roof: A man [substeps] sits [title] he", "choices": ["rips  it [x].", "starts."]},
        "Roof: A man sits. he",
        [" rips it .", " starts."],
    ),
    "lambada": (
        {"text": "I see a stone.\n\nI don't care about signs"},
        "I see a stone.\n\nI don't care about",
        [" signs"],
    ),
}


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def lines(name: str, *items: dict) -> None:
        (tmp_path / "commonsense_mc").mkdir(exist_ok=True)
        text = "".join(json.dumps(item) + "\n" for item in items)
        (tmp_path / "commonsense_mc" / f"{SETS[name][0]}.jsonl.gz").write_bytes(gzip.compress(text.encode()))
        monkeypatch.setenv("SECATEUR_DATA", str(tmp_path))

    return lines


@pytest.mark.parametrize("name", CASES)
def test_prompts(name: str, write) -> None:
    data, context, continuations = CASES[name]
    write(name, data | {"label": 1})
    (item,) = load_items(name)
    assert set(item.contexts) == {context}
    assert len(item.contexts) == len(item.continuations)
    assert list(item.continuations) == continuations
    assert item.label == (0 if name == "lambada" else 1)
    assert list(item.choices) == [c[1:] for c in continuations]


def test_winogrande_scores_what_follows_the_blank(write) -> None:
    write(
        "winogrande",
        {"question": "Sarah beat Maria so _ got a medal.", "choices": ["Sarah", "Maria"], "label": 0},
    )
    (item,) = load_items("winogrande")
    assert item.contexts == ("Sarah beat Maria so Sarah", "Sarah beat Maria so Maria")
    assert item.continuations == (" got a medal.", " got a medal.")


def test_all_sets_have_a_prompt_case() -> None:
    assert {*CASES, "winogrande"} == set(SETS)


def test_limit_and_errors(write, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    write("piqa", *[{"question": str(i), "choices": ["a", "b"], "label": 0} for i in range(5)])
    assert [i.contexts[0] for i in load_items("piqa", 2)] == ["Question: 0\nAnswer:", "Question: 1\nAnswer:"]
    assert len(load_items("piqa", 9)) == 5
    with pytest.raises(SecateurError, match="limit"):
        load_items("piqa", 0)
    with pytest.raises(SecateurError, match=r"pica.*piqa"):
        load_items("pica")
    with pytest.raises(SecateurError, match="SECATEUR_DATA"):
        load_items("copa")


@pytest.mark.needs_data
def test_the_sets_have_their_stated_sizes_and_sound_items() -> None:
    items = {name: load_items(name) for name in SETS}
    assert {name: len(value) for name, value in items.items()} == {
        "arc_easy": 1188,
        "arc_challenge": 586,
        "piqa": 919,
        "hellaswag": 5021,
        "boolq": 1635,
        "winogrande": 634,
        "openbookqa": 250,
        "sciq": 500,
        "copa": 50,
        "rte": 139,
        "social_iqa": 977,
        "commonsense_qa": 611,
        "lambada": 2577,
    }
    for name, value in items.items():
        for item in value:
            assert 0 <= item.label < len(item.contexts) == len(item.continuations) == len(item.choices)
            assert all(c.startswith(" ") and c.strip() for c in item.continuations), (name, item)
            assert all(c.strip() for c in item.contexts), (name, item)
