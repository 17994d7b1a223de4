"""Who shares a budget: each frame, each image, or all pictures of a row together, for every token method."""

from types import SimpleNamespace

import pytest
import torch
from test_every_token_method import METHODS, settings, settled
from test_families import onevision_video
from tiny_models import VIDEO, inputs_for, make

import secateur
from secateur import SecateurError
from secateur.families.vlm.derived import _grids, _rows, rows_of
from secateur.tokens.select import top_per_row
from secateur.tokens.sets import make_table
from secateur.tokens.state import Missing

SHARE = 0.5
UNITS = {"images": {"frame": 3, "image": 3, "all": 2}, "videos": {"frame": 5, "image": 2, "all": 2}}
UNIT = {"frame": ("image", "frame"), "image": ("image",), "all": ()}


@pytest.fixture(scope="module")
def cases():
    """Rows of two, one and no images of 16 tokens; and two rows of a video: 3 frames of 8 tokens, 2 of 6."""
    generator = torch.Generator().manual_seed(1)
    rows = [[1, 7, *[VIDEO] * n, 8, *[50] * (i + 1)] for i, n in enumerate((24, 12))]
    ids = torch.tensor([[0] * (len(rows[0]) - len(row)) + row for row in rows])
    videos = {
        "input_ids": ids,
        "attention_mask": (ids != 0).long(),
        "mm_token_type_ids": 2 * (ids == VIDEO).long(),
        "pixel_values_videos": torch.randn(144, 48, generator=generator),
        "video_grid_thw": torch.tensor([[3, 4, 8], [2, 6, 4]]),
    }
    return {
        "images": (make("llava-clip", torch.float32), inputs_for("llava-clip", torch.float32)),
        "videos": (make("qwen2.5-vl", torch.float32), videos),
    }


def shared(attached, stage, budget):
    """[(kept, total)] of whatever has a budget."""
    found = {}
    for row, parts in enumerate(attached.counts(stage)):
        for part in parts:
            unit = (row, *(part[name] for name in UNIT[budget]))
            before = found.get(unit, (0, 0))
            found[unit] = (before[0] + part["kept"], before[1] + part["total"])
    return list(found.values())


def fits(method, kept, total):
    """Whether so many are what the method's own rule of counting gives."""
    want = round(SHARE * total)
    if method == "downsample":  # a limit
        return want / 2 < kept <= want
    if method == "atp-llava":  # its thresholds decide
        return 0 < kept <= total
    if method == "feather":  # a share, then its square
        return 0 < kept <= want
    if method == "tome":  # at most half of what a block has
        return want <= kept <= 2 * want
    if method in ("visiondrop", "vflowopt"):  # a mean over the layers
        return 0 < kept <= want
    if method in ("transprune", "pyramiddrop"):
        return kept == int(SHARE * total)
    return kept == want


@pytest.mark.parametrize("method", METHODS)
def test_the_budget_is_met_by_each_that_has_one_or_refused_with_a_reason(cases, method):
    refused = set()
    for kind, (model, inputs) in cases.items():
        if (kind, method) == ("videos", "recoverable-compression"):  # no CLS
            continue
        with torch.no_grad():
            before = model(**inputs).logits
        for budget in UNIT:
            try:
                with (
                    torch.no_grad(),
                    secateur.attach(
                        model, method, target="50%", budget=budget, **settings(model, method)
                    ) as attached,
                ):
                    assert settled(attached, model, inputs).isfinite().all()
                stage = 0 if method == "todre" else -1
                units = shared(attached, stage, budget)
                assert len(units) == UNITS[kind][budget]
                assert all(fits(method, kept, total) for kept, total in units), (kind, budget, units)
            except SecateurError as error:
                refused.add((kind, budget))
                assert "budget" in str(error), error
            with torch.no_grad():
                assert torch.equal(model(**inputs).logits, before)
    own = secateur.method.method_class(method)
    # pictures of one crop are refused only where several would share
    expected = {("images", "all"), ("videos", "image"), ("videos", "all")} if own.one_crop else set()
    expected |= {(kind, budget) for kind in cases for budget in own.no_budget}
    if method == "recoverable-compression":
        expected = {("images", "all")}
    assert refused == expected


def bright(sets):
    """Grey values of a picture, the whitest first."""
    return top_per_row(sets.pixels().mean(-1), sets.keep, sets.valid)


def kept_by(model, inputs, **more):
    with torch.no_grad(), secateur.attach(model, bright, **more) as attached:
        model(**inputs)
    return [[part["kept"] for part in row] for row in attached.counts()]


def test_pictures_that_share_a_budget_compete(cases):
    model, inputs = cases["images"]
    pixels = inputs["pixel_values"].clamp(-0.5, 0.5)
    pixels[1] += 3  # the first row's second picture is the brighter one everywhere
    inputs = {**inputs, "pixel_values": pixels}
    assert kept_by(model, inputs, target="25%", budget="image") == [[4, 4], [4], []]
    assert kept_by(model, inputs, target="25%", budget="all") == [[0, 8], [4], []]
    assert kept_by(model, inputs, target="75%", budget="all") == [[8, 16], [12], []]


def test_a_number_is_that_of_whatever_has_the_budget(cases):
    model, inputs = cases["images"]
    found = {budget: kept_by(model, inputs, target="tokens=5", budget=budget) for budget in UNIT}
    assert found["frame"] == found["image"] == [[5, 5], [5], []]
    assert sum(found["all"][0]) == 5 and found["all"][1] == [5]
    assert kept_by(model, inputs, target="tokens=5") == [[5, 5], [5], []]
    video, inputs = cases["videos"]
    for budget, rows in {"frame": [[5] * 3, [5] * 2], "image": [5, 5], "all": [5, 5]}.items():
        with (
            torch.no_grad(),
            secateur.attach(video, "divprune", target="tokens=5", budget=budget) as attached,
        ):
            video(**inputs)
        kept = [[part["kept"] for part in row] for row in attached.counts()]
        assert kept == rows if budget == "frame" else [sum(row) for row in kept] == rows


def test_frames_of_a_budget_hold_the_best_of_each_frame(cases):
    """Attention received, frame by frame: the same tokens as by hand."""
    model, inputs = cases["videos"]
    seen = {}

    def received(sets):
        score = sets.features.float().norm(dim=2)
        for row, index, values in zip(sets.row.tolist(), sets.index, score):
            for i, value in zip(index.tolist(), values.tolist()):
                seen[row, i] = value
        return top_per_row(score, sets.keep, sets.valid)

    with torch.no_grad(), secateur.attach(model, received, target="25%", budget="frame") as attached:
        model(**inputs)
    expected = []
    for row, (frames, size, keep) in enumerate([(3, 8, 2), (2, 6, 2)]):  # 1.5 is rounded to even
        mine = []
        for frame in range(frames):
            places = range(frame * size, (frame + 1) * size)
            mine += sorted(sorted(places, key=lambda i: -seen[row, i])[:keep])
        expected.append(mine)
    assert [row.tolist() for row in attached.kept["input"]] == expected
    assert attached.counts()[1] == [
        {"image": 0, "frame": 0, "kept": 2, "total": 6},
        {"image": 0, "frame": 1, "kept": 2, "total": 6},
    ]


def test_a_videos_frames_are_crops_of_the_tower(cases):
    """So what works crop by crop works frame by frame: a coarse grid of 2 x 2 of each frame's 2 x 4 places."""
    model, inputs = cases["videos"]
    with torch.no_grad(), secateur.attach(model, "downsample", target="50%") as attached:
        model(**inputs)
    assert [part["kept"] for part in attached.counts()[0]] == [4, 4, 4]
    assert attached.table.crop[:24].tolist() == [0] * 8 + [1] * 8 + [2] * 8
    derived = _grids([(3, 2, 4), (2, 3, 2)])
    for name in ("image", "crop", "frame", "grid_row", "grid_col"):
        own = getattr(attached.table, name)[:36]
        found = getattr(derived, name)
        if name in ("image", "crop"):  # the table counts them within a row and an image
            found = torch.cat([found[:24], found[24:] - found[24]])
        assert torch.equal(own, found), name


def test_a_picture_beside_a_video_is_one_frame_and_separators_dont_count():
    """LLaVA-OneVision: a video of three frames of 4 tokens and a newline, in the second row behind a tiled picture."""
    model, inputs = make("llava-onevision"), onevision_video(still=True)
    with torch.no_grad(), secateur.attach(model, "fastv", target="50%", budget="frame") as attached:
        model(**inputs)
    one, two = attached.counts()
    assert [part["kept"] for part in one] == [2, 2, 2] and len(attached.kept["layer:2"][0]) == 7
    assert [part["kept"] for part in two][1:] == [2, 2, 2]
    assert two[0]["kept"] == round(two[0]["total"] / 2) and two[0]["frame"] == 0
    assert [part["image"] for part in two] == [0, 1, 1, 1]


def test_frames_that_nobody_can_tell_apart():
    """A video's features in one piece: no budget for each frame, and no method that asks for them."""
    output = SimpleNamespace(pooler_output=[torch.zeros(6, 4)])
    inputs = {"pixel_values_videos": torch.zeros(1, 3, 3, 8, 8)}
    layout = _rows(None, inputs, "video", output)
    assert layout.frame.tolist() == [-1] * 6
    table = make_table({"video": layout}, {"video": (torch.zeros(6).long(), torch.arange(6))}, 1)
    with pytest.raises(Missing, match=r"known frame.*budget=.image."):
        table.keys("frame")
    assert table.counts(table.alive)[0] == [{"image": 0, "frame": -1, "kept": 6, "total": 6}]
    apart = SimpleNamespace(pooler_output=[torch.zeros(2, 4)] * 3)
    assert _rows(None, inputs, "video", apart).frame.tolist() == [0, 0, 1, 1, 2, 2]
    assert rows_of([4, 4]).frame.tolist() == [0] * 8


@pytest.mark.parametrize(
    "match, settings",
    [
        ("no budget 'frames'.*frame", {"method": "divprune", "target": "25%", "budget": "frames"}),
        ("nothing to divide", {"method": "adatoken-3d", "budget": "image"}),
        (
            "catp takes no budget='all': it divides its target",
            {"method": "catp", "target": "25%", "budget": "all"},
        ),
        (
            "over the frames itself.*leave budget out",
            {"method": "vidcom2", "target": "25%", "budget": "frame"},
        ),
    ],
)
def test_what_makes_no_sense_is_named_before_anything_is_attached(cases, match, settings):
    model, inputs = cases["images"]
    with torch.no_grad():
        before = model(**inputs).logits
        with pytest.raises(SecateurError, match=match):
            secateur.attach(model, **settings)
        assert torch.equal(model(**inputs).logits, before)
