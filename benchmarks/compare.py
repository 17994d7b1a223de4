"""What a comparison costs beside its runs, and what two processes gain.

    python benchmarks/compare.py                 # digits, all methods, four targets, three seeds: two minutes of two idle cores
    python benchmarks/compare.py --smoke         # one method: does it run

Printed: runs, how much longer a comparison takes than its runs add up to (processor time, start and imports left out: one
process that has them behind it), and how many times as fast two processes are as one (wall time, start and imports included; it
says nothing on a busy machine, so the machine's load is printed too).
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path

import secateur
from secateur.comparison import Compared


def timed(out: Path, jobs: int, args: argparse.Namespace) -> tuple[Compared, float, float]:
    """(the comparison, wall seconds, processor seconds of this process)."""
    wall, cpu = time.perf_counter(), time.process_time()
    found = secateur.compare(
        args.task, args.methods, args.targets, args.seeds, out=out, jobs=jobs, latency=False, steps=args.steps
    )
    return found, time.perf_counter() - wall, time.process_time() - cpu


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--task", default="digits")
    parser.add_argument("--methods", nargs="*", default=["all"])
    parser.add_argument("--targets", nargs="*", default=["80%", "60%", "40%", "20%"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=0)
    parser.add_argument("--smoke", action="store_true")
    args = parser.parse_args()
    if args.smoke:
        args.methods, args.targets, args.seeds = ["magnitude"], ["50%"], 1
    with tempfile.TemporaryDirectory() as folder:
        secateur.compare(args.task, ["magnitude"], ["50%"], 1, out=Path(folder) / "first", latency=False)
        one, wall, cpu = timed(Path(folder) / "one", 1, args)
        _, faster, _ = timed(Path(folder) / "two", 2, args)
    runs = sum(row["cpu_seconds"] for row in one.rows)
    states = [row["state"] for row in one.rows]
    print(f"{len(states)} runs: {', '.join(f'{states.count(s)} {s}' for s in dict.fromkeys(states))}")
    print(f"one process: {wall:.0f} s; beside its runs {(cpu - runs) / runs:.1%} of processor time")
    print(
        f"two processes: {faster:.0f} s, {wall / faster:.2f} times as fast; load of the machine {os.getloadavg()[0]:.1f}"
    )


if __name__ == "__main__":
    main()
