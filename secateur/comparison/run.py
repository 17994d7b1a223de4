"""`compare`: the runs that are missing, one after the other, on several processes, or over machines with Ray."""

from __future__ import annotations

import functools
import multiprocessing
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from secateur.comparison.geometry import kept
from secateur.comparison.rows import DENSE, Row, Run, append, begin, claimed, key_of, mend
from secateur.comparison.setup import Setup, shares
from secateur.comparison.work import by_chance, check_fit, timed
from secateur.comparison.works import kind_of, work_of
from secateur.errors import SecateurError, choose, require
from secateur.method import list_methods, make_method, method_class
from secateur.utils.progress import bar

ENGINES = ("local", "ray")
WAIT = 5.0
"""Seconds in which an address must answer."""


@dataclass(frozen=True)
class Compared:
    """A comparison as it lies on the disk: what was shared, its rows, and how many lines couldn't be read and were run again."""

    folder: Path
    setup: Setup
    rows: list[Row]
    damaged: int = 0


def compare(
    task: str,
    methods: Sequence[str] | str = "all",
    targets: Sequence[str] = ("80%", "60%", "40%"),
    seeds: int = 3,
    *,
    out: str | Path,
    jobs: int = 1,
    engine: str = "local",
    address: str | None = None,
    progress: Callable[[int], Callable[[Row], None]] | None = None,
    **settings: Any,
) -> Compared:
    """Runs every method on the same work at the same cost, with chance and the dense model beside them.

    >>> found = secateur.compare("digits", ["wanda", "group-magnitude"], ["60%"], seeds=2, out="out/digits")  # doctest: +SKIP
    >>> [(row["method"], row["seed"], row["quality"]) for row in found.rows]  # doctest: +SKIP

    task: a task (`digits`, `cifar10:resnet20`, ...), `scenes`, or a language model. methods: names, or "all" that fit the kind of work.
    targets: shares of the cost that may stay; `cost` says of what: params (that aren't zero), macs, tokens (times layers).
    seeds: 0..seeds-1 for each method and target. out: a folder; each run is a line of its `rows.jsonl` as soon as it ends, and
    the same call goes on with what is missing. jobs: processes. engine: local, or ray, at `address` (None: this machine).
    progress: called with the number of missing runs; what it gives, with each finished row.
    settings: fields of `Setup`: cost, steps, samples, train, test, latency, threads, minutes, geometry,
    geometry_pictures, geometry_corruptions.

    A method that doesn't fit, and a run that fails, is a row with the reason. Raises `SecateurError`: an unknown task, method or
    setting, a folder with something else, of another version or settings, or in which another comparison works now.
    """
    folder = Path(out).expanduser()
    kind = kind_of(task)
    known = Setup.__dataclass_fields__
    for name in settings:
        choose(name, tuple(known), what="setting", where="compare", near=2)
    setup = Setup(task, **{"cost": kind.costs[0], **settings})
    choose(setup.cost, kind.costs, error=f"{task} has no cost {setup.cost!r}", where="cost")
    for name in ("steps", "train"):
        if getattr(setup, name) and "train_prune" not in kind.verbs:
            raise SecateurError(f"nothing is trained on {task}", where=name, fix="leave it out")
    if setup.geometry:
        kind.check_geometry(setup)
    require(seeds >= 1, f"{seeds} seeds is nothing", where="seeds", fix="1 or more")
    require(jobs >= 1, f"{jobs} jobs is nothing", where="jobs", fix="1 or more")
    choose(engine, ENGINES, what="engine", where="engine", near=1)
    chosen = chosen_methods(setup, methods)
    wanted = [Run(DENSE, "100%", seed) for seed in range(seeds)]
    wanted += [
        Run(m, target, seed) for target in shares(list(targets)) for m in chosen for seed in range(seeds)
    ]
    with claimed(folder):
        begin(folder, setup.as_json())
        rows, damaged = mend(folder)
        done = {key_of(row) for row in rows}
        missing = [run for run in wanted if run.key not in done]
        tell = progress(len(missing)) if progress else lambda row: None
        for row in finished(setup, missing, jobs, engine, address):
            row = kept(folder, row)
            append(folder, row)
            rows.append(row)
            tell(row)
    return Compared(folder, setup, rows, damaged)


def chosen_methods(setup: Setup, methods: Sequence[str] | str) -> list[str]:
    """The methods, chance first: all that can run on this work, or those that are named and a random control of each kind.

    Raises `SecateurError` for a name nobody knows.
    """
    kind = kind_of(setup.task)
    mine = [name for name in list_methods() if fits(kind, name, setup)]
    if methods in ("all", ["all"], ("all",)):
        named = mine
    else:
        named = [methods] if isinstance(methods, str) else list(methods)
        named = [make_method(name).name for name in named]
        require(bool(named), "there is none", where="methods", fix="names, or all")
        require(len(set(named)) == len(named), "one is named twice", where="methods", fix="name each once")
    chance = [name for name in mine if by_chance(method_class(name))]
    return [*chance, *(name for name in named if name not in chance)]


def fits(kind: Any, name: str, setup: Setup) -> bool:
    """Whether a method can be run on this kind of work at all; a model may still refuse it."""
    try:
        check_fit(kind, method_class(name), name, setup)
    except SecateurError:
        return False
    return True


def finished(setup: Setup, runs: Sequence[Run], jobs: int, engine: str, address: str | None) -> Iterator[Row]:
    """The rows of the runs, each as soon as it ends."""
    if not runs:
        return
    if engine == "ray":
        yield from on_ray(setup, runs, jobs, address)
    elif jobs == 1:
        torch.set_num_threads(setup.threads)
        for run in runs:
            yield one(setup, run)
    else:
        yield from in_processes(setup, runs, jobs)


@functools.lru_cache(maxsize=2)
def _work(setup: Setup) -> Any:
    return work_of(setup)


def one(setup: Setup, run: Run) -> Row:
    """The row of one run, in this process; a bar says which it is, and for how long it has been under way."""
    with bar(f"{run.method} at {run.target}, seed {run.seed}"):
        return timed(_work(setup), run)


def in_processes(setup: Setup, runs: Sequence[Run], jobs: int) -> Iterator[Row]:
    """Of a process that dies the runs that were under way are done again, one at a time, so that the culprit is known."""
    left = list(runs)
    while left:
        died: list[Run] = []
        with _pool(setup, jobs) as pool:
            waiting: dict[Future[Row], Run] = {}
            while left or waiting:
                while left and len(waiting) < 2 * jobs:
                    run = left.pop(0)
                    waiting[pool.submit(one, setup, run)] = run
                ended, _ = wait(waiting, return_when=FIRST_COMPLETED)
                for future in ended:
                    run = waiting.pop(future)
                    try:
                        yield future.result()
                    except BrokenExecutor:
                        died.append(run)
                if died:
                    died += waiting.values()
                    break
        for run in died:
            with _pool(setup, 1) as pool:
                try:
                    yield pool.submit(one, setup, run).result()
                except BrokenExecutor:
                    yield {
                        **dict(zip(("method", "target", "seed"), run.key)),
                        "state": "failed",
                        "why": "its process died, perhaps for want of memory",
                    }


def _pool(setup: Setup, jobs: int) -> ProcessPoolExecutor:
    """Processes that have begun. Raises `SecateurError` where they can't."""
    pool = ProcessPoolExecutor(
        jobs, mp_context=multiprocessing.get_context("spawn"), initializer=_prepare, initargs=(setup.threads,)
    )
    try:
        pool.submit(os.getpid).result()
    except BrokenExecutor as error:
        raise SecateurError(
            "its processes end before they begin",
            where=f"compare, jobs={jobs}",
            fix="in a script, call it under `if __name__ == '__main__':`, since each process reads the script again; or jobs=1",
        ) from error
    return pool


def _prepare(threads: int) -> None:
    os.environ["SECATEUR_PROGRESS"] = "0"
    torch.set_num_threads(threads)


def on_ray(setup: Setup, runs: Sequence[Run], jobs: int, address: str | None) -> Iterator[Row]:
    """On a Ray cluster; `jobs` runs at a time for a cluster of one's own (address None).

    Raises `SecateurError` where ray isn't installed or can't be reached.
    """
    try:
        import ray
    except ImportError as error:
        raise SecateurError(
            "ray isn't installed", where="engine", fix="pip install 'secateur[ray]'"
        ) from error
    check_reached(address)
    try:
        own = {} if address else {"num_cpus": jobs * setup.threads, "include_dashboard": False}
        ray.init(address=address, ignore_reinit_error=True, log_to_driver=False, **own)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise SecateurError(
            f"ray can't be reached ({str(error).splitlines()[0]})",
            where=f"address {address}",
            fix="start it there, or leave the address out",
        ) from error
    try:
        task = ray.remote(num_cpus=setup.threads, max_retries=1)(_on_worker)
        waiting = {task.remote(setup, run): run for run in runs}
        while waiting:
            ended, _ = ray.wait(list(waiting), num_returns=1)
            for handle in ended:
                run = waiting.pop(handle)
                try:
                    yield ray.get(handle)
                except ray.exceptions.RayError as error:
                    named = dict(zip(("method", "target", "seed"), run.key))
                    yield {**named, "state": "failed", "why": str(error).splitlines()[0]}
    finally:
        ray.shutdown()


def check_reached(address: str | None) -> None:
    """Refuses `host:port` where nothing answers, which Ray itself would try for minutes; other forms (`auto`) are Ray's to read."""
    host, _, port = (address or "").removeprefix("ray://").rpartition(":")
    if not (host and port.isdigit()):
        return
    try:
        socket.create_connection((host, int(port)), timeout=WAIT).close()
    except (OSError, OverflowError) as error:
        raise SecateurError(
            f"nothing answers there ({error})",
            where=f"address {address}",
            fix="start Ray there, or leave the address out for a cluster of this machine",
        ) from error


def _on_worker(setup: Setup, run: Run) -> Row:
    _prepare(setup.threads)
    return one(setup, run)
