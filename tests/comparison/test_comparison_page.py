"""The page of a comparison in a real browser: it draws, sorts, filters and opens a run, quickly, without network."""

import html
import io
import json
import random
import re
import shutil
import subprocess

import pytest
from rich.console import Console

from secateur.comparison import Setup
from secateur.comparison.summary import Line
from secateur.report.comparison import comparison_html, print_comparison, refusals, sizes, write_comparison

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
NAMES = (
    "random",
    "random-structured",
    "magnitude",
    "wanda",
    "sparsegpt",
    "ria",
    "owl",
    "obspa",
    "spa",
    "group-magnitude",
)
PROBE = """<script>
addEventListener("load", async () => {
  while (!document.documentElement.dataset.drawn) await new Promise(done => setTimeout(done, 20));
  const $ = id => document.getElementById(id), rows = () => [...document.querySelectorAll("#board tbody tr")];
  const cells = number => rows().map(row => row.children[number].textContent);
  const timed = act => { const t = performance.now(); act(); return performance.now() - t; };
  const found = {rows: rows().length, plot: document.querySelectorAll("#pareto .scatterlayer .trace").length};
  const heads = [...document.querySelectorAll("#board thead button")], named = name => heads.findIndex(h => h.textContent === name);
  found.sort = timed(() => heads[named("accuracy")].click());
  found.best = cells(named("accuracy")).slice(0, 3).map(parseFloat);
  heads[named("accuracy")].click();
  found.worst = cells(named("accuracy")).slice(0, 3).map(parseFloat);
  found.sorted = document.querySelector("th[aria-sort]").getAttribute("aria-sort");
  const say = (control, value) => { control.value = value; control.dispatchEvent(new Event("input", {bubbles: true})); };
  found.filter = timed(() => say($("word"), "wanda"));
  found.named = [...new Set(cells(0))];
  say($("word"), "");
  say(document.querySelector("select[data-axis=granularity]"), "struct");
  found.structured = [...new Set(cells(0).map(name => name.replace(" ★", "")))].sort();
  say(document.querySelector("select[data-axis=granularity]"), "");
  say($("target"), "50%");
  found.target = [...new Set(cells(1))].sort();
  say($("target"), "");
  rows().find(row => row.textContent.startsWith("wanda")).querySelector("button").click();
  found.open = $("run").open;
  found.layers = document.querySelectorAll("#run .layer").length;
  found.bars = document.querySelectorAll("#run .histogram div").length;
  found.text = $("run").textContent.replace(/\\s+/g, " ");
  found.wide = document.documentElement.scrollWidth - innerWidth;
  const told = document.createElement("pre");
  told.id = "told";
  told.textContent = JSON.stringify(found);
  document.body.append(told);
});
</script>"""


def thousand():
    """1,000 rows of ten methods, with what a page of a run shows."""
    draw = random.Random(0)
    rows = []
    for method in NAMES:
        for target in range(10, 110, 10) if method != "dense" else (100,):
            for seed in range(10):
                share = target / 100 - 0.005
                row = {
                    "method": method,
                    "target": f"{target}%",
                    "seed": seed,
                    "state": "done",
                    "metric": "accuracy",
                }
                row |= {
                    "sign": 1,
                    "quality": share**0.5 - 0.1 * draw.random(),
                    "params": share,
                    "macs": share,
                }
                row |= {
                    "seconds": 1.5,
                    "speed": {"ratio": 1.2, "low": 1.1, "high": 1.3},
                    "peak_memory_bytes": 10**6,
                }
                row |= {"layers": [[f"blocks.{n}.mlp.weight", int(1000 * share), 1000] for n in range(60)]}
                row |= {"scores": {"low": 0.0, "high": 1.0, "kept": [3] * 24, "cut": [1] * 24}}
                row |= {"notes": {"hello": "<b>&</b>"}, "versions": {"torch": "2.14.1"}}
                rows.append(row)
    return rows


@pytest.fixture(scope="module")
def page():
    return comparison_html(Setup("digits"), thousand())


def test_a_page_of_a_thousand_rows_is_small_and_fetches_nothing(page):
    assert len(page) < 8e6
    script = re.sub(r'<script type="text/plain" id="plotly">.*?</script>', "", page, flags=re.DOTALL)
    assert (
        not re.search(r"(src|href)\s*=\s*[\"']?https?:", script)
        and "fetch(" not in script
        and "@import" not in script
    )
    assert "<b>&</b>" not in page  # a note can't bring markup in


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
@pytest.mark.parametrize("size", ["1280,900", "400,800"])
def test_in_a_browser_it_draws_sorts_filters_and_opens_a_run(page, tmp_path, size):
    file = tmp_path / "page.html"
    file.write_text(page.replace("</body>", PROBE + "</body>"))
    shown = [
        CHROMIUM,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--window-size={size}",
        f"--user-data-dir={tmp_path / 'user'}",
    ]
    dumped = subprocess.run(
        [*shown, "--virtual-time-budget=20000", "--dump-dom", file.as_uri()],
        check=True,
        capture_output=True,
        text=True,
        timeout=180,
    ).stdout
    found = json.loads(html.unescape(re.search(r'<pre id="told">(.*?)</pre>', dumped, re.DOTALL)[1]))
    assert found["rows"] == 100 and found["plot"] == len(NAMES) + 1
    assert found["best"] == sorted(found["best"], reverse=True) and found["worst"] == sorted(found["worst"])
    assert found["best"][0] > found["worst"][0] and found["sorted"] == "ascending"
    assert found["named"] in (["wanda"], ["wanda", "wanda ★"], ["wanda ★", "wanda"])
    assert found["structured"] == ["group-magnitude", "obspa", "random-structured", "spa"]
    assert found["target"] == ["50%"]
    assert found["open"] and found["layers"] == 60 and found["bars"] == 24
    assert "secateur compare digits --methods wanda" in found["text"] and "hello: <b>&</b>" in found["text"]
    assert found["wide"] <= 0  # nothing but the table scrolls sideways


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
def test_of_many_lines_the_first_are_shown_and_then_all(tmp_path):
    rows = [row | {"seed": 0, "target": f"{n // 10 + 1}%"} for n, row in enumerate(thousand()[::4])]
    probe = """<script>addEventListener("load", () => {
      const $ = id => document.getElementById(id), count = () => document.querySelectorAll("#board tbody tr").length;
      const found = [count(), $("more").textContent];
      $("more").click();
      found.push(count(), $("more").hidden);
      const told = document.createElement("pre"); told.id = "told"; told.textContent = JSON.stringify(found); document.body.append(told);
    });</script>"""
    for n, row in enumerate(rows):
        row["method"] = NAMES[n % 10]
    file = tmp_path / "page.html"
    file.write_text(comparison_html(Setup("digits"), rows).replace("</body>", probe + "</body>"))
    shown = [
        CHROMIUM,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={tmp_path / 'user'}",
        "--dump-dom",
    ]
    dumped = subprocess.run([*shown, file.as_uri()], check=True, capture_output=True, text=True, timeout=180)
    found = json.loads(html.unescape(re.search(r'<pre id="told">(.*?)</pre>', dumped.stdout, re.DOTALL)[1]))
    assert found == [200, "the first 200 are shown; all 250", 250, True]


def test_the_file_is_written_whole(tmp_path, page):
    write_comparison(tmp_path / "page.html", Setup("digits"), thousand())
    assert (tmp_path / "page.html").read_text() == page
    assert [p.name for p in tmp_path.iterdir()] == ["page.html"]


def test_methods_that_share_a_reason_are_named_together():
    lines = [Line(m, t, why=why) for m, t, why in [("flap", "80%", "no blocks"), ("tyr", "80%", "no blocks"), ("flap", "60%", "no blocks"), ("tyr", "60%", "no blocks"), ("spa", "60%", "no blocks"), ("wanda", "60%", "slow")]]  # fmt: skip
    assert refusals(lines) == [("flap, tyr", "80%, 60%", "no blocks"), ("spa", "60%", "no blocks"), ("wanda", "60%", "slow")]  # fmt: skip


def test_the_table_says_how_much_it_rests_on_and_fits_eighty_columns():
    lines = [Line("a", "80%", [0, 1, 2])]
    assert sizes(Setup("digits", test=64), lines) == "3 seeds, judged on 64 at most, ± is two standard errors"
    assert sizes(Setup("smollm2"), [Line("a", "80%", [0])]) == "1 seed, judged on 16 at most"
    rows = [{"method": method, "target": "40%", "seed": seed, "state": "done", "quality": 0.5 + 0.3 * (method != "random-tokens") + seed / 1000, "metric": "accuracy", "sign": 1, "tokens": 0.391} for method in ("random-tokens", "recoverable-compression") for seed in range(3)]  # fmt: skip
    rows[-1]["quality"] += 0.0003
    console = Console(width=80, file=io.StringIO())
    print_comparison(Setup("scenes", cost="tokens"), rows, console)
    text = console.file.getvalue()
    assert "+30.0 (<0.001)" in text and "speed" not in text
