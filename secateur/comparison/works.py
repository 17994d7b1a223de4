"""The kinds of work by the names of tasks and models."""

from __future__ import annotations

from secateur.comparison.language import LanguageWork
from secateur.comparison.networks import TaskWork
from secateur.comparison.scenes import ScenesWork
from secateur.comparison.setup import Setup
from secateur.comparison.work import Work
from secateur.errors import choose
from secateur.tasks import models, registry


def work_of(setup: Setup) -> Work:
    """The work of this name: a task (`digits`, `cifar10:resnet20`, ...), `scenes`, or a language model.

    Raises `SecateurError` for a name nobody knows, with the nearest, and for a cost that it has none of.
    """
    kind = kind_of(setup.task)
    choose(setup.cost, kind.costs, error=f"{setup.task} has no cost {setup.cost!r}", where="cost")
    return kind(setup)


def kind_of(task: str) -> type[Work]:
    """The kind of work that a name means."""
    first = task.partition(":")[0]
    if first == "scenes":
        return ScenesWork
    if first in registry.NETWORKS or task in registry.OWNERS:
        return TaskWork
    if "/" in task or task.startswith("."):
        return LanguageWork
    names = dict.fromkeys(("scenes", *registry.TASKS, *registry.OWNERS, *models.NAMES))
    choose(task, tuple(names), error=f"there is no task {task!r}", where="task", near=3)
    return LanguageWork
