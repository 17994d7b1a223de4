"""How busy the machine is with the work of others."""

from __future__ import annotations

import os
import time
from typing import Any

import psutil


class Others:
    """How much of the processors other processes use, from when it is made until it is asked.

    >>> others = Others()
    >>> others.used() >= 0
    True
    """

    def __init__(self) -> None:
        self.begun, self.busy, self.own = time.perf_counter(), _busy(), _own()

    def used(self) -> float:
        """Processors that were busy with the work of others, on average."""
        seconds = max(time.perf_counter() - self.begun, 1e-3)
        busy, own = (_busy() - self.busy) / seconds, (_own() - self.own) / seconds
        if busy < 0.5 * own:  # a container that hides the processors' times
            busy = os.getloadavg()[0] if hasattr(os, "getloadavg") else own
        return max(0.0, busy - own)


def crowded(used: float, processors: int, threads: int) -> bool:
    """Whether that leaves less than the threads want; a tenth of the processors may be busy with small things.

    >>> crowded(0.1, 2, 2), crowded(1.0, 2, 2), crowded(1.0, 2, 1)
    (False, True, False)
    """
    return used > processors - min(threads, processors) + max(0.25, processors / 10)


def processors() -> list[int]:
    """The processors that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def _busy() -> float:
    """Seconds that our processors have worked, for anybody."""
    every = psutil.cpu_times(percpu=True)
    mine = [every[number] for number in processors() if number < len(every)]
    return sum(sum(times) - times.idle - getattr(times, "iowait", 0.0) - _guests(times) for times in mine)


def _guests(times: Any) -> float:
    """What Linux counts a second time, among user and nice."""
    return getattr(times, "guest", 0.0) + getattr(times, "guest_nice", 0.0)


def _own() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system
