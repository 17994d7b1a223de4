"""compare --geometry: what is gathered, kept and drawn, and what the sheet expects of real classifiers."""

import base64
import copy
import gzip
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import secateur
from secateur.cli.main import main
from secateur.comparison import Setup, read_rows, summary
from secateur.comparison.geometry import Lens, chosen, read_cloud, thumbnails
from secateur.comparison.networks import calibration
from secateur.comparison.rows import ABOUT, ROWS
from secateur.comparison.views import beside, views
from secateur.data.corruptions import SEVERITIES, common
from secateur.errors import SecateurError
from secateur.measure.geometry import distances, of_model
from secateur.report.comparison import comparison_html
from secateur.report.geometry import packed
from secateur.tasks import load_task

pytest.importorskip("sklearn")
SPEC = importlib.util.spec_from_file_location(
    "chromium", Path(__file__).parents[2] / "benchmarks" / "chromium.py"
)
assert SPEC and SPEC.loader
chromium: Any = importlib.util.module_from_spec(SPEC)
sys.modules["chromium"] = chromium
SPEC.loader.exec_module(chromium)

QUICK = {"test": 60, "samples": 32, "latency": False}
ASKED = {"geometry": True, "geometry_pictures": 40, "geometry_corruptions": "gaussian_noise,fog"}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    out = tmp_path_factory.mktemp("geometry") / "out"
    return secateur.compare("digits", ["magnitude"], ["60%"], seeds=2, out=out, **QUICK, **ASKED)


@pytest.fixture(scope="module")
def task():
    return load_task("digits")


@pytest.fixture(scope="module")
def lens(task):
    return Lens(task.pictures(200), common(1), task.pretrained())


def test_each_run_has_a_file_of_all_conditions_and_its_row_the_summary(found, task):
    rows = {(row["method"], row["seed"]): row for row in read_rows(found.folder)}
    row = rows["magnitude", 0]
    cloud = read_cloud(found.folder, row)
    assert [tuple(line[:2]) for line in row["geometry"]["conditions"]] == cloud.conditions
    assert cloud.conditions[:2] == [("clean", 0), ("gaussian_noise", 1)] and len(cloud.conditions) == 11
    assert cloud.metrics.shape == (11, 3, 40) and cloud.angles.shape == (11, 10, 40)
    # the clean condition is what the network itself gives
    alone = secateur.prune(task.pretrained(), task.inputs, method="magnitude", target="params<=60%").model
    shown = task.pictures(40)
    geometry = of_model(alone, shown.ready(shown.pixels), shown.labels)
    torch.testing.assert_close(cloud.metrics[0, 2], geometry.margin, atol=1e-4, rtol=1e-4)
    told = dict(zip(("name", "severity", "accuracy", "angle", "variance"), row["geometry"]["conditions"][0]))
    assert told["accuracy"] == pytest.approx(geometry.accuracy)
    assert told["variance"] == pytest.approx(geometry.summary()["angle_variance"], rel=1e-4)
    assert set(row["geometry"]) == {"conditions", "file"}  # the arrays are beside the rows
    dense = read_cloud(found.folder, rows["dense", 0])
    assert dense.clean.shape == (40, 1, 8, 8) and dense.corrupted.shape[0] == 11 and cloud.clean is None
    assert torch.equal(dense.clean, thumbnails(shown.pixels)) and dense.shown[:6] == dense.occluded


def test_the_views_have_a_place_for_every_model_and_condition(found):
    seen = views(found.folder, found.rows, [("magnitude", "60%")])
    assert [(one.method, one.seeds) for one in seen.models][:2] == [("dense", [0, 1]), ("magnitude", [0, 1])]
    assert len(seen.places) == 4 * 11 and len(seen.edges) == 43 and not seen.left
    one = seen.models[1]
    assert one.histogram.sum(1).tolist() == [40] * 11
    assert one.means["accuracy"][0] == pytest.approx(one.cloud.right[0].double().mean().item())
    assert seen.alike == [("gaussian_noise", "fog", pytest.approx(seen.alike[0][2]))]
    wrong = torch.cat([m.cloud.metrics[:, 2] for m in seen.models]) < 0
    assert set(seen.robust) == set((~wrong).all(0).nonzero().flatten().tolist())
    assert set(seen.fragile) == set(
        (wrong.any(0) & (seen.models[0].cloud.metrics[0, 2] > 0)).nonzero().flatten().tolist()
    )


def test_two_models_side_by_side(found):
    dense, pruned = (one.cloud for one in views(found.folder, found.rows, [("magnitude", "60%")]).models[:2])
    told = beside(pruned, dense, 5)
    ok = [cloud.predicted[5] == cloud.labels for cloud in (pruned, dense)]
    assert told["lost"] == [i for i in range(40) if ok[1][i] and not ok[0][i]]
    assert told["won"] == [i for i in range(40) if ok[0][i] and not ok[1][i]]
    label = int(dense.labels[0])
    own = dense.labels == label
    assert told["classes"][label][1]["norm_mean"] == pytest.approx(dense.metrics[5, 1][own].mean().item())
    same = beside(dense, dense)
    assert same["models"][0] == same["models"][1] and same["lost"] == same["won"] == []
    other = copy.copy(dense)
    other.labels = dense.labels.flip(0)
    with pytest.raises(SecateurError, match="the same pictures"):
        beside(dense, other)


def test_the_page_is_given_what_was_measured(found):
    seen = views(found.folder, found.rows)
    data = packed(seen)
    raw = gzip.decompress(base64.b64decode(data["blob"]))
    shape = (len(seen.models), 11, 4, 40)
    numbers = np.frombuffer(raw, "<u2", int(np.prod(shape))).reshape(shape)
    for number, one in enumerate(seen.models):
        assert np.array_equal(numbers[number, :, 3], one.cloud.predicted.numpy())
        for what, (low, high) in enumerate(data["bounds"]):
            values = low + numbers[number, :, what] / 65535 * (high - low)
            np.testing.assert_allclose(values, one.cloud.metrics[:, what], atol=(high - low) / 65535)
    degrees = np.frombuffer(raw, "u1", offset=numbers.nbytes)[: shape[0] * 11 * 10 * 40]
    np.testing.assert_allclose(
        degrees.reshape(shape[0], 11, 10, 40), np.stack([m.cloud.angles for m in seen.models]), atol=0.6
    )
    few = packed(seen, limit=1)  # what is too much is in the table alone
    assert len(few["models"]) == 2 and [row["method"] for row in few["rest"]] == [
        m.method for m in seen.models[2:]
    ]


def test_a_missing_or_damaged_file_is_left_out_with_the_reason(found, tmp_path):
    rows = [row for row in found.rows if row["method"] in ("dense", "magnitude")]
    folder = tmp_path / "geometry"
    folder.mkdir()
    for row in rows[:3]:
        file = found.folder / "geometry" / row["geometry"]["file"]
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "magnitude-60-0.safetensors").write_bytes(b"nothing")
    seen = views(tmp_path, rows)
    assert [one.method for one in seen.models] == ["dense"]
    whys = {who[:3]: who[3] for who in seen.left}
    assert "can't be read" in whys["magnitude", "60%", 0] and "is missing" in whys["magnitude", "60%", 1]
    page = comparison_html(found.setup, rows, folder=tmp_path)
    assert "magnitude 60%, seed 1, isn&#39;t drawn" in page or "magnitude 60%, seed 1, isn't drawn" in page


def test_folders_from_before_are_read_and_go_on(tmp_path):
    out = tmp_path / "out"
    first = secateur.compare("digits", ["magnitude"], ["60%"], seeds=1, out=out, **QUICK)
    about = json.loads((out / ABOUT).read_text())
    assert not any(name.startswith("geometry") for name in about["setup"])
    assert Setup.read(about["setup"], "here") == first.setup and views(out, first.rows) is None
    again = secateur.compare("digits", ["magnitude"], ["60%"], seeds=1, out=out, **QUICK)
    assert again.rows == first.rows and (out / ROWS).read_text().count("\n") == len(first.rows)
    with pytest.raises(SecateurError, match="geometry"):  # its rows were made without
        secateur.compare("digits", ["magnitude"], ["60%"], seeds=1, out=out, **QUICK, **ASKED)
    with pytest.raises(SecateurError, match="its settings can't be read"):
        Setup.read(about["setup"] | {"newer": 1}, "here")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["scenes"], "no classifier of pictures"),
        (["digits-heads"], "no classifier of pictures"),
        (["digits", "--geometry-corruptions", "fogg"], "fog"),
        (["digits", "--geometry-corruptions", "fog,fog"], "named twice"),
        (["digits", "--geometry-corruptions", "saturate"], "no colours"),
        (["digits", "--geometry-pictures", "0"], "out of range"),
    ],
)
def test_mistakes_are_told_before_anything_is_written(words, said, capsys, tmp_path):
    assert main(["compare", *words, "--geometry", "--out", str(tmp_path / "out")]) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert said in error and "Traceback" not in error and not (tmp_path / "out").exists()


def test_names_of_corruptions():
    assert chosen("common", 3) == common() and len(chosen("all", 1)) == 18
    assert chosen("snow, fog", 3) == ("snow", "fog")


def test_more_severe_is_worse_and_small_margins_flip_first_under_noise(lens, task):
    cloud = lens.look(task.pretrained())
    by = {s: [k for k, (_, strength) in enumerate(cloud.conditions) if strength == s] for s in SEVERITIES}
    accuracy = [cloud.right[by[s]].double().mean().item() for s in SEVERITIES]
    margin = [cloud.metrics[by[s], 2].mean().item() for s in SEVERITIES]
    assert accuracy == sorted(accuracy, reverse=True) and margin == sorted(margin, reverse=True)
    flipped = cloud.right[0] & ~cloud.right[cloud.conditions.index(("gaussian_noise", 5))]
    clean = cloud.metrics[0, 2]
    assert flipped.sum() >= 3 and clean[flipped].mean() < clean[cloud.right[0] & ~flipped].mean() / 2


def test_pruned_hard_angles_are_larger_and_seeds_lie_nearer_than_methods(lens, task):
    shown = lens.pictures
    seen = {}
    for method in ("wanda", "sparsegpt", "random"):
        for seed in (0, 1):
            data = calibration(task, task.pretrained(), 128, seed)
            cut = secateur.prune(
                task.pretrained(), task.inputs, method=method, target="params<=10%", data=data, seed=seed
            )
            seen[method, seed] = of_model(cut.model, shown.ready(shown.pixels), shown.labels)
    cut = secateur.prune(task.pretrained(), task.inputs, method="magnitude", target="params<=10%")
    dense = of_model(task.pretrained(), shown.ready(shown.pixels), shown.labels)
    hard = of_model(cut.model, shown.ready(shown.pixels), shown.labels)
    assert hard.angle.mean() > dense.angle.mean() + 10
    apart, names = distances(list(seen.values())), [method for method, _ in seen]
    pairs = [(names[i] == names[j], apart[i, j]) for i in range(6) for j in range(i)]
    same, other = (np.mean([d for alike, d in pairs if alike == which]) for which in (True, False))
    assert same < 0.75 * other


@pytest.mark.skipif(chromium.program() is None, reason="no Chromium is installed")
def test_in_a_browser_what_is_picked_in_one_view_is_marked_in_all(found, tmp_path):
    file = tmp_path / "page.html"
    file.write_text(comparison_html(found.setup, found.rows, folder=found.folder))
    assert len(summary(found.setup, found.rows)) == 4 and file.stat().st_size < 8e6
    marked = """(() => ({
      local: [...document.querySelectorAll("#local .picked")].map(e => +e.dataset.i).sort((a, b) => a - b),
      lines: [...document.querySelectorAll("#global .line.picked")].map(e => +e.dataset.i).sort((a, b) => a - b),
      tiles: [...document.querySelectorAll("#pictures [aria-pressed=true]")].map(e => +e.dataset.i).sort((a, b) => a - b),
      cells: [...document.querySelectorAll("#cells button b")].map(e => e.textContent),
      full: [...document.querySelectorAll("#alike .place")].map(e => +e.getAttribute("fill-opacity")),
      patches: [...document.querySelectorAll("#patches [aria-pressed=true]")].length,
      many: +document.getElementById("many").textContent, said: document.getElementById("said").textContent,
      wide: document.documentElement.scrollWidth - innerWidth}))()"""
    middle = "(e => { e.scrollIntoView({block: 'center'}); const b = e.getBoundingClientRect(); return [b.left + b.width / 2, b.top + b.height / 2]; })"
    with chromium.Chromium() as browser:
        browser.open(file, 1280, 900)
        browser.wait("document.documentElement.dataset.views === 'yes'")
        # a click on a point of one view
        browser.drag(*[browser.value(middle + "(document.querySelector('#local .dot'))")] * 2)
        one = browser.value(marked)
        assert one["many"] == 1 and one["local"] == one["lines"] == one["tiles"] and len(one["local"]) == 1
        assert len(one["cells"]) == 4 * 3 and set(one["cells"]) <= {"0/1", "1/1"}
        assert set(one["full"]) <= {0, 1}
        # a box over all points, then a picture's own button takes it away again
        left, top, right, bottom = browser.value(
            "(e => { const b = e.getBoundingClientRect(); return [b.left + 2, b.top + 2, b.right - 2, b.bottom - 2]; })(document.getElementById('local'))"
        )
        browser.drag((left, top), (right, bottom))
        assert browser.value(marked)["many"] == 40
        browser.value("document.querySelector('#pictures button').click()")
        assert browser.value(marked)["many"] == 39
        # a patch's picture, by keyboard
        browser.value(
            "document.querySelector('[data-pick=none]').click(); document.querySelector('#patches button').focus()"
        )
        browser.press(" ", " ")
        patch = browser.value(marked)
        assert patch["patches"] == 1 and patch["local"] == patch["lines"] and len(patch["lines"]) == 1
        # the lines by keyboard: to the next axis, the first picture on it, and pick
        browser.value("document.getElementById('global').focus()")
        for key in ("Escape", "ArrowRight", "ArrowDown", " "):
            browser.press(key)
        line = browser.value(marked)
        assert line["many"] == 1 and line["said"].endswith("picked") and line["local"] == line["tiles"]
        # a cell chooses the model and the condition
        browser.value("document.querySelector('#cells tbody tr:nth-child(3) td:nth-child(3) button').click()")
        assert (
            browser.value("document.getElementById('condition').selectedOptions[0].textContent")
            == "gaussian noise 3"
        )
        assert browser.value("document.getElementById('model-a').selectedIndex") == 2
        assert line["wide"] <= 0
        # a phone in the dark: a tap
        browser.open(file, 360, 740, dark=True, touch=True)
        browser.wait("document.documentElement.dataset.views === 'yes'")
        browser.tap(*browser.value(middle + "(document.querySelector('#local .dot'))"))
        tapped = browser.value(marked)
        assert tapped["many"] == 1 and tapped["lines"] == tapped["local"] and tapped["wide"] <= 0
