"""The common checks of token methods: what each owes its user, on three designs of model, and that it runs on all."""

import copy
import itertools
import sys

import pytest
import torch
from tiny_models import FAMILIES, IMAGE, inputs_for, make

import secateur
from secateur import SecateurError
from secateur.families.vlm import Facts
from secateur.method import make_method, method_class
from secateur.testing import untrained
from secateur.tokens.attach import attach
from secateur.tokens.method import TokenMethod
from secateur.tokens.state import Missing

METHODS = [m for m in secateur.list_methods() if issubclass(method_class(m), TokenMethod)]
DESIGNS = ["llava-clip", "llava-siglip", "qwen2.5-vl"]
"""With CLS, without CLS, and with merged patches, windows and 3-D positions."""
SETTINGS = {"recoverable-compression": {"text": "embeddings"}, "cdpruner": {"text": "embeddings"}}
"""Where no text encoder is given."""
LAYERED = [m for m in METHODS if isinstance(n := getattr(method_class(m), "layers", None), tuple) and n]
NO_MASK = ("qwen2-vl", "qwen2.5-vl", "qwen3-vl", "internvl")
"""Their towers' blocks take no mask: ToMe can't weigh merged tokens there, and says so."""
NEEDS_CLS = {"recoverable-compression"}
DRAWS = {"random-tokens"}
"""What an image keeps depends on its place in the batch."""


@pytest.fixture(scope="module")
def models():
    made = {}

    def get(family, dtype=torch.float32):
        if (family, dtype) not in made:
            made[family, dtype] = (make(family, dtype), inputs_for(family, dtype))
        return made[family, dtype]

    return get


def settings(model, method, target="50%"):
    if method == "tome" and type(model).__name__.startswith(("Qwen", "InternVL")):
        return {"proportional": False}
    weights = untrained(model, method, target)
    given = {"given": dict(asked)} if (asked := method_class(method).asks) else {}
    return SETTINGS.get(method, {}) | given | ({} if weights is None else {"weights": weights})


def settled(attached, model, inputs):
    """Logits of a forward of which everything is known that the method remembers of earlier ones."""
    attached.reset()
    for _ in range(attached.setup.warm_up + 1):
        logits = model(**inputs).logits
    return logits


def run(model, inputs, method, target, seed=0):
    """What stayed by stage, the logits and the report of one forward, behind those that a method must remember."""
    with (
        torch.no_grad(),
        attach(model, method, target=target, seed=seed, **settings(model, method, target)) as attached,
    ):
        logits = settled(attached, model, inputs)
    return attached, logits


def plain(model, inputs):
    with torch.no_grad():
        return model(**inputs).logits


def lists(kept):
    return {stage: [row.tolist() for row in rows] for stage, rows in kept.items()}


def suits(family, method):
    return family == "llava-clip" or method not in NEEDS_CLS


BOTH = pytest.mark.parametrize(
    ("family", "method"), [(f, m) for f in DESIGNS for m in METHODS if suits(f, m)]
)


@pytest.mark.parametrize("method", METHODS)
def test_everything_kept_changes_nothing_bit_for_bit(models, method):
    for family in DESIGNS:
        model, inputs = models(family)
        before = plain(model, inputs)
        assert torch.equal(run(model, inputs, method, "100%")[1], before)
        assert torch.equal(plain(model, inputs), before)


def images(family):
    """Visual tokens of the images of each row."""
    return {"llava-clip": [[16, 16], [16], []], "llava-siglip": [[16, 16], [16], []]}.get(
        family, [[6, 4], [6], []]
    )


def wanted(family, share):
    return [sum(max(1, round(share * n)) for n in row) for row in images(family)]


@pytest.mark.parametrize("target", ["50%", "25%", "tokens=3"])
@BOTH
def test_the_budget_is_met_by_the_rule_the_method_states(models, family, method, target):
    model, inputs = models(family)
    attached, _ = run(model, inputs, method, target)
    kept = {stage: [len(row) for row in rows] for stage, rows in attached.kept.items()}
    first, last = next(iter(kept.values())), list(kept.values())[-1]
    if target == "tokens=3":
        share, expected = (
            3 / (16 if family != "qwen2.5-vl" else 16 / 3),
            [3 * len(row) for row in images(family)],
        )
    else:
        share = float(target.rstrip("%")) / 100
        expected = wanted(family, share)
    assert last[2] == 0
    if method in ("visiondrop", "vflowopt"):
        layers = attached.report["after"]["tokens_x_layers"] / attached.report["before"]["tokens_x_layers"]
        assert layers == pytest.approx(share, abs=1 / 6 if family == "qwen2.5-vl" else 1 / 16)
    elif method == "atp-llava":  # its thresholds decide, and these are random
        assert all(0 < found <= sum(row) for found, row in zip(last, images(family)[:2]))
    elif method == "downsample":
        assert all(want / 2 < found <= want for found, want in zip(last, expected[:2]))
    elif method == "feather":
        n = [sum(row) for row in images(family)]
        assert all(share * total - 2 <= found for found, total in zip(first, n[:2]))
        assert all(0 < found <= max(2, share * share * before) for found, before in zip(last[:2], first))
    elif method == "todre":
        assert first == expected
    elif method == "tome":  # a block merges at most half of what it has, and these towers have two or three
        assert all(want <= found <= 2 * want for found, want in zip(last, expected[:2]))
        assert target != "50%" or last == expected
    elif method == "adatoken-3d" and target != "tokens=3":  # all pictures of a row are one pool
        assert last == [round(share * sum(row)) for row in images(family)]
    elif (
        method in ("transprune", "catp", "pyramiddrop", "lrs-dip") and target != "tokens=3"
    ):  # cut down, not rounded
        assert last == [sum(max(1, int(share * n)) for n in row) for row in images(family)]
    elif method == "vla-pruner" and target != "tokens=3":  # all pictures of a row compete
        assert last[:2] == [round(share * sum(row)) for row in images(family)[:2]]
    else:
        assert last == expected
    for (_, one), (stage, two) in itertools.pairwise(kept.items()):
        if stage in {placed.label for placed in attached.setup.stages if placed.stage.returns}:
            assert two == [sum(row) for row in images(family)]  # what was parked is back
        else:
            assert all(a >= b for a, b in zip(one, two))


@BOTH
def test_the_seed_decides_and_a_second_run_is_the_same(models, family, method):
    model, inputs = models(family)
    (one, first), (two, second) = (run(model, inputs, method, "50%", seed=3) for _ in range(2))
    assert lists(one.kept) == lists(two.kept) and torch.equal(first, second)
    with torch.no_grad(), attach(model, method, target="50%", seed=3, **settings(model, method)) as attached:
        for _ in range(2):
            settled(attached, model, inputs)
            assert lists(attached.kept) == lists(one.kept)


def single(family, inputs, row):
    """One row of `inputs` without its padding; rows have 2, 1 and 0 images."""
    real = inputs["attention_mask"][row].bool()
    part = {
        k: v[row : row + 1, real]
        for k, v in inputs.items()
        if v.dim() == 2 and v.shape == inputs["input_ids"].shape
    }
    pictures = [slice(0, 2), slice(2, 3)][row]
    if family == "qwen2.5-vl":
        sizes = inputs["image_grid_thw"].prod(1).tolist()
        start = sum(sizes[: pictures.start])
        return part | {
            "pixel_values": inputs["pixel_values"][start : start + sum(sizes[pictures])],
            "image_grid_thw": inputs["image_grid_thw"][pictures],
        }
    return part | {"pixel_values": inputs["pixel_values"][pictures]}


@pytest.mark.parametrize("method", [m for m in METHODS if m not in DRAWS])
def test_a_row_keeps_in_a_batch_what_it_keeps_alone(models, method):
    for family in ("llava-clip", "qwen2.5-vl"):
        if not suits(family, method) or (method == "todre" and family != "llava-clip"):
            continue
        model, inputs = models(family, torch.float64)
        batch, logits = run(model, inputs, method, "50%")
        for row in (0, 1):
            alone, own = run(model, single(family, inputs, row), method, "50%")
            assert {s: r[0] for s, r in lists(alone.kept).items()} == {
                s: r[row] for s, r in lists(batch.kept).items()
            }
            assert torch.allclose(own[0, -1], logits[row, -1], atol=1e-6)


@BOTH
def test_fewer_tokens_give_other_logits_where_there_are_images_and_the_same_where_not(models, family, method):
    model, inputs = models(family)
    before, (_, after) = plain(model, inputs), run(model, inputs, method, "25%")
    for row, image in enumerate((True, True, False)):
        same = torch.allclose(after[row, -1], before[row, -1], atol=1e-5)
        assert same != image


@pytest.mark.parametrize("method", METHODS)
def test_half_precision(models, method):
    for family in DESIGNS:
        if suits(family, method):
            model, inputs = models(family, torch.bfloat16)
            assert run(model, inputs, method, "50%")[1].isfinite().all()


@pytest.mark.parametrize("method", METHODS)
def test_a_picture_that_is_not_numbers_is_named_and_the_model_restored(models, method):
    model, inputs = models("llava-clip")
    before = plain(model, inputs)
    broken = inputs["pixel_values"].clone()
    broken[0, 0, 0, 0] = torch.nan
    with pytest.raises(SecateurError, match="finite|isn't a number"):
        run(model, {**inputs, "pixel_values": broken}, method, "50%")
    assert torch.equal(plain(model, inputs), before)


@pytest.mark.parametrize("method", METHODS)
def test_pictures_whose_patches_are_all_alike(models, method):
    """No place, no content: every patch gives the same token."""
    model, inputs = models("llava-clip")
    model = copy.deepcopy(model)
    for name, parameter in model.named_parameters():
        if "vision_tower" in name and ("position_embedding" in name or "patch_embedding" in name):
            parameter.data.zero_()
    attached, logits = run(model, inputs, method, "50%")
    assert logits.isfinite().all()
    for rows in lists(attached.kept).values():
        for row in rows:
            assert row == sorted(set(row))


@pytest.mark.parametrize("method", METHODS)
def test_generation_goes_on_from_what_is_kept(models, method):
    model, inputs = models("llava-clip")
    with attach(model, method, target="50%", **settings(model, method)) as attached, torch.no_grad():
        for _ in range(attached.setup.warm_up):
            model(**inputs)
        written = model.generate(**inputs, max_new_tokens=3, do_sample=False, suppress_tokens=[IMAGE])
        # a prefill of `generate` doesn't count padding, which matters to the size of rotated keys
        positions = {"position_ids": (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)}
        beside = inputs | (positions if method == "dart" else {})
        assert lists(attached.kept) == lists(run_beside(model, beside, method).kept)
    assert written.shape == (3, inputs["input_ids"].shape[1] + 3)


def run_beside(model, inputs, method):
    """The same method on a copy: a model can be attached to once only."""
    return run(copy.deepcopy(make("llava-clip", torch.float32)), inputs, method, "50%")[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_method_runs_on_every_family_or_says_what_is_missing(models, family):
    model, inputs = models(family)
    before = plain(model, inputs)
    for method in METHODS:
        try:
            attached, logits = run(model, inputs, method, "50%")
        except Missing as error:
            assert method in NEEDS_CLS and "CLS" in str(error), (method, str(error))
        except SecateurError as error:  # it adds visual features to its first two layers of four
            assert family == "qwen3-vl" and "need 5 layers or more" in str(error), (method, str(error))
        else:
            assert logits.isfinite().all(), method
            assert sum(map(len, attached.kept[-1])) < sum(map(sum, images_of(attached))), method
        assert torch.equal(plain(model, inputs), before), method


@pytest.mark.parametrize("family", NO_MASK)
def test_a_tower_without_masks_is_refused_where_one_is_needed(models, family):
    model, inputs = models(family)
    before = plain(model, inputs)
    attached = attach(model, "tome", target="50%")
    with pytest.raises(SecateurError, match="take no mask.*proportional=False"), torch.no_grad():
        model(**inputs)
    assert not attached.attached
    assert torch.equal(plain(model, inputs), before)


def images_of(attached):
    return [[int((attached.table.row[: attached.table.visual] == row).sum())] for row in range(3)]


@pytest.mark.parametrize("method", METHODS)
def test_nonsense_is_named_and_the_model_left_alone(models, method):
    model, inputs = models("llava-clip")
    before = plain(model, inputs)
    for match, wrong in (
        ("0%|outside", {"target": "0%"}),
        ("outside", {"target": "150%"}),
        ("tokens", {"target": "tokens=0"}),
        ("no hyperparameter", {"target": "50%", "shrubbery": 1}),
    ):
        with pytest.raises(SecateurError, match=match):
            attach(model, method, **wrong)
    assert torch.equal(plain(model, inputs), before)


@pytest.mark.parametrize("method", LAYERED)
@pytest.mark.parametrize("layers", [(16, 8), (8, 8), (-2, 8), ()])
def test_layers_that_are_not_in_order_are_named(method, layers):
    """Scaled to a depth, 16 and 8 of 32 would be taken for 16 and 17."""
    facts = Facts(layers=32, hidden=64, heads=4)
    with pytest.raises(SecateurError, match="^layers: .*(aren't in order|there is none)"):
        make_method(method, layers=layers).stages(facts)


@pytest.mark.parametrize("method", METHODS)
def test_the_record_and_the_docstring_name_their_source(method):
    cls = method_class(method)
    info, doc = cls.info, (sys.modules[cls.__module__].__doc__ or "") + (cls.__doc__ or "")
    assert (
        info.name == method
        and "T" in info.objects
        and info.when == "RT"
        and info.budget_unit in ("token", "tokens")
    )
    assert "https://arxiv.org/abs/" in doc if info.arxiv else "No paper" in doc
    assert cls.positions in ("original", "compact") and cls.newlines in ("keep", "drop", "compete")
