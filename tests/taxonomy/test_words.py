"""Search by words: weights worked out by hand, and real searches with the answers that they must give."""

import math

import pytest

from secateur.method import list_methods
from secateur.taxonomy.axes import RECORDS, MethodInfo, filter_records, gist, record, searched
from secateur.taxonomy.catalogue import catalogue
from secateur.taxonomy.catalogue import info as info_of
from secateur.taxonomy.words import asked, ranked, stem, unknown

OWN = [info_of(entry) for entry in catalogue()["methods"].values()]
TOKENS = "saliency-driven pruning of tokens without training"


def search(query: str, records: list[MethodInfo] = OWN) -> list[str]:
    return [info.name or info.spec for info in filter_records(records, query)]


@pytest.mark.parametrize(
    "family",
    ["merge merges merged merging", "sparse sparsity", "diverse diversity", "head heads", "regularise regularisation regularised"],
)  # fmt: skip
def test_words_of_one_family_are_one(family: str) -> None:
    assert len({stem(word) for word in family.split()}) == 1


def test_words_that_differ_stay_apart() -> None:
    words = [
        "token",
        "tower",
        "layer",
        "loss",
        "last",
        "bias",
        "base",
        "mask",
        "map",
        "metric",
        "merge",
        "mean",
    ]
    assert len({stem(word) for word in words}) == len(words)


def test_ways_to_write_one_thing() -> None:
    for text in (
        "without training",
        "training-free",
        "no fine-tuning",
        "without any retraining",
        "needs no training",
    ):
        assert asked(text) == [stem("trainingfree")], text
    assert asked("quantized") == asked("quantised") and asked("Mamba") == asked("state space model")
    assert asked("2:4") == ["2:4"]
    assert asked("the pruning method") == ["the", stem("pruning"), stem("method")]  # nothing else is said


def test_weights_by_hand() -> None:
    documents = [
        ("a", "drops tokens", ""),
        ("b", "merges tokens", ""),
        ("c", "cuts heads", "merging"),
        ("merger", "x", ""),
    ]
    merge, token = math.log(1 + 4 / 3), math.log(1 + 4 / 2)
    found = dict(ranked("merge tokens", documents))
    total = merge + token
    expected = {1: 1.0, 0: token / total}  # c and merger hold less than half
    assert found == pytest.approx(expected)
    assert dict(ranked("merge", documents)) == pytest.approx(
        {1: 1.0, 2: 0.8, 3: 1.0}
    )  # a part of a name, and an axis
    assert ranked("zebra", documents) == [] and unknown("merge zebra", documents) == ["zebra"]


def test_pruning_of_tokens_without_training() -> None:
    infos = {info.name: info for info in OWN}
    first = [infos[name] for name in search(TOKENS)[:15]]
    assert all("T" in info.objects and info.training_free for info in first)
    assert all("ATT" in info.criteria or "SAL" in info.criteria for info in first)
    assert search(TOKENS) == search("tokens pruned training-free by saliency")
    among_all = {info.spec: info for info in RECORDS}
    first = [among_all[name] for name in search(TOKENS, list(RECORDS))[:10]]
    assert all("T" in info.objects and info.training_free for info in first)


@pytest.mark.parametrize(
    ("query", "first"),
    [
        ("input norm", {"ria", "wanda"}),
        ("evolutionary search", {"tyr"}),
        ("determinantal point process", {"cdpruner"}),
        ("frames of a video", {"vidcom2"}),
        ("removes whole blocks of a language model", {"shortgpt"}),
        ("winning lottery tickets", {"lottery-ticket", "lottery-rewinding"}),
        ("second-order weights", {"sparsegpt"}),
        ("merges tokens in the vision tower", {"tome"}),
        ("graph metanetwork", {"metapruning"}),
        ("2312.11983", {"flap"}),
        ("Theia-4869", {"cdpruner", "vispruner", "fastervlm"}),
        ("WANDA", {"wanda"}),
        ("merg", {"prumerge"}),
    ],
)
def test_real_searches(query: str, first: set[str]) -> None:
    assert set(search(query)[: len(first)]) & first, search(query)[:5]
    if len(first) < 3:
        assert set(search(query)[: len(first)]) == first, search(query)[:5]


def test_of_two_words_one_may_be_missing_from_every_record() -> None:
    assert search("gyroscopic lottery") == search("lottery")
    documents = [searched(info) for info in OWN]
    assert unknown("gyroscopic lottery of tokens", documents) == ["gyroscopic"]
    assert search("gyroscopic zebras") == []


def test_filters_and_words_together() -> None:
    found = filter_records(OWN, "attention", when="RT", objects="T", training_free=True)
    assert found and all("RT" in info.members("when") for info in found)
    assert list_methods("input norm")[:2] == search("input norm")[:2]
    assert list_methods() == sorted(list_methods())


def test_a_gist_says_what_a_record_says() -> None:
    assert gist(record("nirvana")).endswith(
        "Pruning of neurons and heads by saliency, after training, without retraining, without training."
    )
    assert gist(record("connnet")).endswith("A saliency map.")
    assert all(info.description in gist(info) for info in (*RECORDS, *OWN))
