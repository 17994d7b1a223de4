"""Runs that are stopped: by processor time, past searches that go on after errors."""

import contextlib
import signal
import threading
import time

import pytest

from secateur.comparison import run
from secateur.comparison.limit import OutOfTime, stopped_after
from secateur.comparison.networks import TaskWork
from secateur.comparison.rows import Run
from secateur.comparison.run import compare
from secateur.comparison.setup import Setup
from secateur.errors import SecateurError

pytest.importorskip("sklearn")


def busy():
    """Computes for ever, and goes on after whatever an error says."""
    while True:
        with contextlib.suppress(Exception):  # as a search does that skips candidates which fail
            sum(range(1000))


def test_computing_is_stopped_and_waiting_is_not():
    with pytest.raises(OutOfTime, match=r"after 0\.002 processor minutes"), stopped_after(0.002):
        busy()
    with stopped_after(0.002):
        time.sleep(0.3)  # more than 0.12 seconds, in which nothing is computed


def test_without_a_limit_and_afterwards_nothing_is_set():
    before = signal.getsignal(signal.SIGPROF)
    with stopped_after(None):
        assert signal.getsignal(signal.SIGPROF) is before
    with stopped_after(5):
        assert signal.getitimer(signal.ITIMER_PROF)[0] > 290
    assert signal.getitimer(signal.ITIMER_PROF) == (0, 0) and signal.getsignal(signal.SIGPROF) is before


def test_in_another_thread_it_says_that_it_cannot():
    said = []

    def inside():
        try:
            with stopped_after(1):
                pass
        except SecateurError as error:
            said.append(str(error))

    thread = threading.Thread(target=inside)
    thread.start()
    thread.join()
    assert "can't be stopped" in said[0]


def test_a_run_that_takes_too_long_is_a_row_and_the_others_go_on(tmp_path, monkeypatch):
    real = TaskWork.run
    monkeypatch.setattr(
        TaskWork, "run", lambda self, run: busy() if run.method == "wanda" else real(self, run)
    )
    settings = {"test": 60, "samples": 32, "latency": False, "minutes": 0.05}
    rows = compare("digits", ["wanda", "magnitude"], ["50%"], 1, out=tmp_path / "out", **settings).rows
    by_name = {row["method"]: row for row in rows}
    assert (by_name["wanda"]["state"], by_name["magnitude"]["state"]) == ("refused", "done")
    assert "stopped after 0.05 processor minutes" in by_name["wanda"]["why"]


def test_what_is_under_way_is_named(monkeypatch):
    told = []
    monkeypatch.setattr(run, "bar", lambda text: told.append(text) or contextlib.nullcontext())
    monkeypatch.setattr(run, "timed", lambda work, one: {"method": one.method})
    monkeypatch.setattr(run, "_work", lambda setup: None)
    assert run.one(Setup("digits"), Run("wanda", "60%", 2)) == {"method": "wanda"}
    assert told == ["wanda at 60%, seed 2"]
