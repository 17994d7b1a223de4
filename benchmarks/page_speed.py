"""How long the page of a comparison takes to sort and to filter, in real time, in headless Chromium.

    python benchmarks/page_speed.py                # a minute of one core
    python benchmarks/page_speed.py --wide 400     # as a phone

Two pages of 1,000 rows with made-up figures and what a real row shows: ten seeds (100 lines in the leaderboard), and one seed (1,000
lines). Timed inside the page with performance.now: the whole handler of a click on a column's head, of a word typed into the
filter, and of a chosen target, with the layout it asks for ("handler"), and until the second frame from then on ("seen"). The plot
follows a filter 60 ms after the last key, and is timed on its own. Medians and the worst of 15; the machine's load is printed too, since other work makes all of it slower.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import tempfile
from pathlib import Path

from chromium import Chromium

from secateur.comparison import Setup
from secateur.method import list_methods, method_class
from secateur.report.comparison import comparison_html

ROWS, TIMES = 1000, 15
PROBE = """(async () => {
  const $ = id => document.getElementById(id), heads = [...document.querySelectorAll("#board thead button")], found = {};
  const say = (control, value) => { control.value = value; control.dispatchEvent(new Event("input", {bubbles: true})); };
  const frame = () => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)));
  const timed = async (name, act) => {
    await frame();
    const start = performance.now();
    act();
    document.body.getBoundingClientRect();
    const handled = performance.now() - start;
    await frame();
    (found[name] ??= []).push([handled, performance.now() - start]);
  };
  for (let n = 0; n < TIMES; n++) {
    await timed("sort", () => heads[3 + n % 3].click());
    await timed("filter by a word", () => say($("word"), "ma"));
    await timed("all again", () => say($("word"), ""));
    await timed("filter by a target", () => say($("target"), $("target").options[1 + n % 5].value));
    say($("target"), "");
    await timed("plot", () => plot(shown()));
  }
  const lines = data.lines.length, first = document.querySelectorAll("#board tbody tr").length;
  if (first < lines) {
    $("more").click();
    for (let n = 0; n < TIMES; n++) await timed("sort all lines", () => heads[3 + n % 3].click());
  }
  return JSON.stringify({times: found, lines, first});
})()"""


def rows(seeds: int) -> list[dict]:
    """1,000 rows: methods of the registry at ten targets, with so many seeds."""
    draw = random.Random(0)
    prune = [name for name in list_methods() if method_class(name).verb != "saliency"]
    names = prune[: ROWS // seeds // 10]
    targets = range(5, 100, 10) if len(names) * 10 * seeds >= ROWS else range(4, 100, 2)
    made = []
    for method in names:
        for target in targets:
            for seed in range(seeds):
                share = target / 100 - 0.005
                made.append(
                    {"method": method, "target": f"{target}%", "seed": seed, "state": "done", "metric": "accuracy", "sign": 1}
                    | {"quality": max(0.0, share) ** 0.5 - 0.1 * draw.random(), "params": share, "macs": share, "seconds": 1.5}
                    | {"speed": {"ratio": 1.2, "low": 1.1, "high": 1.3}, "peak_memory_bytes": 10**6}
                    | {"layers": [[f"blocks.{n}.mlp.weight", int(1000 * share), 1000] for n in range(60)]}
                    | {"scores": {"low": 0.0, "high": 1.0, "kept": [3] * 24, "cut": [1] * 24}, "versions": {"torch": "2"}}
                )  # fmt: skip
    return made[:ROWS]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--wide", type=int, default=1280)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, Chromium() as browser:
        for seeds in (10, 1):
            file = Path(folder) / f"{seeds}.html"
            file.write_text(comparison_html(Setup("digits"), rows(seeds)))
            browser.open(file, args.wide, 900)
            browser.wait("document.documentElement.dataset.drawn === 'yes'")
            found = json.loads(browser.value(PROBE.replace("TIMES", str(TIMES))))
            size = file.stat().st_size / 1e6
            print(
                f"\n{ROWS} rows, {found['lines']} lines ({found['first']} at first), {size:.1f} MB, {args.wide} px wide; load {os.getloadavg()[0]:.1f}"
            )
            print(f"{'ms':20s}{'handler':>16s}{'seen':>16s}")
            for name, pairs in found["times"].items():
                cells = [f"{statistics.median(v):.0f} ({max(v):.0f})" for v in zip(*pairs)]
                print(f"{name:20s}" + "".join(f"{cell:>16s}" for cell in cells))


if __name__ == "__main__":
    main()
