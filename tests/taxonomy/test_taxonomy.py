"""The taxonomy against the numbers of its sheet. Spec: survey-taxonomy, "How to check an implementation"."""

from collections import Counter

import pytest

from secateur.errors import SecateurError
from secateur.method import list_methods, method_class
from secateur.taxonomy import MethodInfo, filter_records, recommend, record
from secateur.taxonomy import axes as taxonomy
from secateur.taxonomy.axes import RECORDS, notation, parse, render
from secateur.taxonomy.published import counts, here

BASELINE_SHEETS = {"weight-baselines", "fastv", "none"}


def info(**changes: object) -> MethodInfo:
    values = {
        "title": "Wanda",
        "spec": "weight-baselines",
        "objects": "W",
        "granularity": "unstr",
        "speedup": "spec",
        "when": "PAT-PT",
        "criteria": "MAG",
        "order": "shot",
        "data": "calib",
    }
    return MethodInfo(**(values | changes))


def specs(found: list[MethodInfo]) -> list[str]:
    return [record.spec for record in found]


def test_counts_of_the_sheet() -> None:
    assert len(RECORDS) == 50 == len({record.spec for record in RECORDS})
    assert len(filter_records(RECORDS, objects="T")) == 23
    free = filter_records(RECORDS, training_free=True)
    assert len(free) == 26
    saliency = {"normgrad", "salient-relevance", "robustness-lottery"}
    assert {record.spec for record in free if record.granularity == "none"} == saliency
    assert Counter(record.decision for record in RECORDS) == {"stat": 18, "dyn": 26, None: 6}
    assert sum(record.kernel_needed for record in RECORDS) == 6
    assert Counter(notation(record, "granularity") for record in RECORDS) == {
        "token": 25,
        "struct": 13,
        "unstr": 4,
        "unstr/N:M": 1,
        "block": 1,
        "none": 6,
    }
    assert Counter(notation(record, "when") for record in RECORDS) == {
        "RT": 24,
        "PDT+RT": 1,
        "PAT": 8,
        "PAT-PT": 5,
        "PDT": 5,
        "any": 1,
        "none": 6,
    }


def test_queries_of_the_sheet() -> None:
    assert specs(filter_records(RECORDS, when="RT", training_free=True, criteria="TXT")) == [
        "recoverable-compression",
        "mmtok",
    ]
    free = {"nirvana", "tyr", "sd-prune", "ecoflap", "ecodiff"}
    assert set(specs(filter_records(RECORDS, weight_level=True, training_free=True))) == free
    weight_level = {record.spec for record in filter_records(RECORDS, weight_level=True)}
    either = {spec for spec in weight_level if "none" in record(spec).members("recovery")}
    assert either == free | {"spa", "yopo"}


def test_recommendation_of_the_sheet() -> None:
    found = recommend(RECORDS, hardware="gpu-dense", train=False, data="calib", model="llm")
    assert {record.spec for record, _ in found} == {"nirvana", "tyr"}
    found = recommend(RECORDS, hardware="gpu-dense", train=False, data="calib")
    assert {record.spec for record, _ in found} == {"nirvana", "tyr", "ecodiff"}
    assert all(record.speedup == "univ" and record.when == "PAT-PT" for record, _ in found)


@pytest.mark.parametrize(
    ("answers", "inside", "outside"),
    [
        ({"hardware": "storage", "data": "none"}, {"sd-prune"}, {"nirvana", "ecoflap", "divprune"}),
        ({"hardware": "sparse"}, {"ecoflap", "sd-prune", "tyr"}, {"lottery-ticket", "psa"}),
        ({"model": "vlm"}, {"divprune", "fastervlm"}, {"covipal", "psa", "ecoflap"}),
        ({"model": "vlm", "dynamic": False, "hardware": "sparse"}, {"ecoflap"}, {"divprune"}),
        (
            {"model": "cnn", "train": True, "data": "train"},
            {"lrp-pruning", "pagcp", "spa"},
            {"lottery-ticket", "vtrans"},
        ),
        (
            {"model": "cnn", "train": True, "data": "train", "trained": False},
            {"masksparsity", "pagcp"},
            {"lottery-ticket"},
        ),
        ({"model": "cnn", "goal": "training"}, {"consensus-subnetwork"}, {"pagcp", "masksparsity"}),
        ({"model": "diffusion"}, {"ecodiff"}, {"sd-prune"}),
        ({"model": "llm", "criteria": "SAL"}, {"nirvana"}, {"tyr"}),
        ({"model": "diffusion", "speedup": "spec", "granularity": "unstr"}, {"sd-prune"}, {"ecodiff"}),
        ({"model": "bert", "recovery": "train", "when": "PAT", "data": "train"}, {"vtrans"}, {"nirvana"}),
    ],
)
def test_recommendation_follows_the_answers(answers: dict, inside: set[str], outside: set[str]) -> None:
    found = {record.spec for record, _ in recommend(RECORDS, **answers)}
    assert inside <= found
    assert not outside & found


def test_recommendation_says_why_and_puts_the_fitting_first() -> None:
    found = recommend(RECORDS, model="llm")
    assert [record.spec for record, _ in found] == ["nirvana", "tyr"]
    assert "one shot" in found[0][1] and "one shot" not in found[1][1]
    assert "expect a loss" in recommend(RECORDS, hardware="storage", data="none")[0][1]
    hard = recommend(RECORDS, model="cnn", train=True, data="train", high_ratio=True)
    assert hard[-1][0].spec == "metapruning" and "from scratch" in hard[0][1]


@pytest.mark.parametrize(
    "answers", [{"hardware": "tpu9"}, {"data": "some"}, {"model": "lllm"}, {"colour": "red"}]
)
def test_recommendation_refuses_unknown_answers(answers: dict) -> None:
    with pytest.raises(SecateurError):
        recommend(RECORDS, **answers)


def test_recommendation_leaves_out_chance_and_what_is_decided_once() -> None:
    magnitude = info(title="Magnitude", when="any", start="either", data="free", models="any")
    chance = info(title="Random", when="any", start="either", data="free", models="any", criteria="none")
    assert [record.title for record, _ in recommend([chance, magnitude], hardware="sparse")] == ["Magnitude"]
    assert recommend([chance, magnitude], hardware="sparse", model="vlm") == []


def test_table_round_trip() -> None:
    assert parse(render(RECORDS)) == list(RECORDS)
    odd = info(
        title="a|b", description="x | y", models="any", criteria="any", when="PAT/PAT-PT", fusion="KD,NAS"
    )
    assert parse(render([odd])) == [odd]
    assert odd.fusion == {"KD", "NAS"}


def test_the_sheets_own_rows_parse() -> None:
    row = (
        "| # | title (short) | spec | object | granularity | speed-up | when | how | order | data | start | recovery "
        "| task | decision | scope | fusion |\n" + "| --- " * 16 + "|\n"
        "| 22 | SPA | spa | C | struct | univ | any | LOSS+any | either | free/data | either | tune/none | orig | stat "
        "| glob | - |\n"
    )
    (spa,) = parse(row)
    assert spa.when == {"PBT", "PDT", "PAT", "PAT-PT", "RT"}
    assert len(spa.criteria) == 19 and "LOSS" in spa.criteria
    assert spa.order == {"shot", "iter"} and spa.data == {"free", "data"} and spa.recovery == {"tune", "none"}
    assert spa.fusion == frozenset() and not spa.training_free
    assert record("spa").members("when") == spa.members("when")


def test_a_record_as_typed_in() -> None:
    tyr = record("tyr")
    assert (tyr.arxiv, tyr.year, tyr.stages) == ("2503.09657", 2025, 4)
    assert (
        tyr.objects == {"H", "N"}
        and tyr.criteria == {"LOSS"}
        and tyr.fusion == {"search"}
        and tyr.scope == "glob"
    )
    assert record("connnet").order is None and record("connnet").criteria == {"none"}
    assert record("nirvana").recovery == {"none", "LoRA"} and record("ecoflap").scope == "glob->loc"
    assert record("tyr", stages=2, objects="N").objects == {"N"}
    assert record("tas").links == (
        "https://arxiv.org/abs/1905.09717",
        "https://github.com/D-X-Y/AutoDL-Projects",
    )


@pytest.mark.parametrize("spec", sorted(record.spec for record in RECORDS))
def test_every_record_is_complete(spec: str) -> None:
    system = record(spec)
    assert system.title and system.description.endswith(".") and system.arxiv and 2015 <= system.year <= 2026
    century, month = int(system.arxiv[:2]), int(system.arxiv[2:4])
    assert system.year == 2000 + century and 1 <= month <= 12
    if spec != "survey-taxonomy":
        assert system.models and system.supervision
    assert (system.budget_exact is None) == (system.budget_unit is None) == (system.granularity == "none")


def test_derived_flags() -> None:
    assert info().training_free and info(recovery="none/LoRA").training_free
    assert not info(recovery="tune/none").training_free and not info(recovery="LoRA").training_free
    assert not record("survey-taxonomy").training_free
    assert (
        info(supervision="supervised").needs_labels and not info(supervision="supervised/self").needs_labels
    )
    assert info().kernel_needed and not record("yopo").kernel_needed
    assert record("divprune").changes_shapes and record("tyr").changes_shapes and not info().changes_shapes


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"decision": "dyn"}, "run time"),
        ({"speedup": "univ"}, "sparse kernels"),
        ({"granularity": "N:M", "speedup": "mixed"}, "sparse kernels"),
        ({"when": "PBT", "start": "pre"}, "init"),
        ({"stages": 2}, "one shot"),
        ({"stages": 0, "order": "iter"}, "stages"),
        ({"granularity": "none"}, "granularity"),
        ({"objects": "S"}, "granularity"),
        ({"objects": "-"}, "prunes nothing"),
        ({"order": "-"}, "order is missing"),
        ({"objects": "Q"}, "'Q'"),
        ({"criteria": "MAGG"}, "MAG"),
        ({"recovery": "LORA"}, "LoRA"),
        ({"task": "none"}, "'none'"),
        ({"data": 3}, "not text"),
    ],
)
def test_illegal_records_are_refused(changes: dict, word: str) -> None:
    with pytest.raises(SecateurError, match=word):
        info(**changes)


def test_legal_neighbours_of_the_illegal() -> None:
    info(when="PDT+RT", decision="dyn", order="iter", stages=3)
    info(when="PBT", start="init")
    info(when="PBT/PAT", start="either")
    info(
        objects="S",
        granularity="none",
        speedup="none",
        when="none",
        order="-",
        data="-",
        decision="-",
        task="-",
        scope="-",
    )


def test_filters() -> None:
    assert specs(filter_records(RECORDS, "pyramid attention"))[:2] == ["lrs-dip", "psa"]
    assert set(specs(filter_records(RECORDS, search="magnitude sparse kernels after"))[:3]) == {
        "lottery-rewinding",
        "sd-prune",
        "lottery-ticket",
    }
    assert specs(filter_records(RECORDS, granularity="N:M")) == ["iss-p"]
    assert specs(filter_records(RECORDS, objects="Win/P")) == ["lrs-dip", "disa", "lmd-vit"]
    assert len(filter_records(RECORDS, order=None)) == 6
    assert specs(filter_records(RECORDS, fusion="NAS")) == ["tas"]
    assert specs(filter_records(RECORDS, year=2017)) == ["salient-relevance"]
    assert len(filter_records(RECORDS, training_free=None)) == 50
    with pytest.raises(SecateurError, match="training_free"):
        filter_records(RECORDS, trainingfree=True)
    with pytest.raises(SecateurError, match="PAT-PT"):
        filter_records(RECORDS, when="PATPT")


def test_the_page_of_the_field() -> None:
    found = counts(RECORDS)
    assert found["systems"] == 50 and found["token objects"] == 23 and found["training-free"] == 26
    assert found["static"] == 18 and found["dynamic"] == 26 and found["need sparse kernels"] == 6
    assert found["granularity"] == {
        "token": 25,
        "struct": 13,
        "none": 6,
        "unstr": 4,
        "unstr/N:M": 1,
        "block": 1,
    }
    own = [method_class(name).info for name in list_methods()]
    assert here(record("spa"), own) == ["obspa", "spa"] and here(record("spa"), []) == []
    assert here(record("survey-taxonomy"), own) == ["secateur methods", "secateur recommend"]


def test_unknown_specs_and_tables() -> None:
    with pytest.raises(SecateurError, match="nirvana"):
        record("nirwana")
    with pytest.raises(SecateurError, match="no table"):
        parse("nothing")
    with pytest.raises(SecateurError, match="colour"):
        parse("| colour |\n| --- |\n| red |\n")
    with pytest.raises(SecateurError, match="cells"):
        parse("| spec | name |\n| --- | --- |\n| a |\n")


def test_every_registered_method_has_its_own_record() -> None:
    known = {system.spec for system in RECORDS} | BASELINE_SHEETS
    for name in list_methods():
        system = method_class(name).info
        assert system.name == name and system.spec in known and system.title
        assert parse(render([system])) == [system]


def test_every_member_is_an_axis_member() -> None:
    members = {member for axis in taxonomy.AXES.values() for member in axis}
    assert taxonomy.MEANING.keys() <= members
