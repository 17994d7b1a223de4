"""Tasks of lm-evaluation-harness, scored by the harness itself."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from torch import nn

from secateur.errors import SecateurError, nearest
from secateur.utils.running import evaluating

PREFIX = "lm-eval:"


def load_tasks(names: Sequence[str]) -> list[tuple[str, Any]]:
    """(name, task with its data) of each `lm-eval:NAME`; NAME is one of the harness, or a YAML file of a task.

    >>> load_tasks(["lm-eval:arc_easy"])  # doctest: +SKIP

    Raises SecateurError: lm-eval isn't installed, it knows no such task, or the task's data can't be read (without a network
    they must lie in the cache of `datasets`).
    """
    if not names:
        return []
    try:
        import datasets
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise SecateurError(
            "lm-eval isn't installed", where=names[0], fix="pip install 'secateur[lm-eval]'"
        ) from error
    datasets.disable_progress_bars()
    manager, loaded = TaskManager(), []
    for name in names:
        task = os.path.expanduser(name.removeprefix(PREFIX))
        try:
            found = manager.load([task])
        except KeyError as error:
            near = nearest(task, manager.all_tasks)
            fix = f"did you mean {PREFIX}{near[0]}?" if near else "`lm-eval ls tasks` lists them"
            raise SecateurError("lm-eval has no such task", where=name, fix=fix) from error
        except Exception as error:  # of the hub, of HTTP, of readers of files: one family of none
            reason = " ".join(str(error).split())[:300]
            raise SecateurError(
                f"its data can't be read ({type(error).__name__}: {reason})",
                where=name,
                fix="it needs a network once, or the data in the cache of `datasets`",
            ) from error
        loaded.append((name, found["tasks"]))
    return loaded


def score(
    model: nn.Module, tokenizer: Any, tasks: Any, limit: int | None = None, batch: int = 8
) -> tuple[dict[str, float], int]:
    """(metric -> value, number of questions) of a task from `load_tasks`.

    Of a group of tasks the harness' own mean. Raises SecateurError for a model that isn't transformers'.
    """
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        raise SecateurError(
            f"lm-eval runs models of transformers, this is {type(model).__name__}",
            where="tasks",
            fix="name secateur's own tasks",
        )
    with evaluating(model):
        runner = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch)
        found: Any = lm_eval.simple_evaluate(
            runner, tasks=[*tasks.values()], limit=limit, bootstrap_iters=0, log_samples=False
        )
    [values] = found["results"].values() if len(found["results"]) == 1 else [found["groups"].popitem()[1]]
    metrics = {
        key.removesuffix(",none"): float(value)
        for key, value in values.items()
        if isinstance(value, int | float) and "," in key and "_stderr" not in key
    }
    return metrics, sum(counts["effective"] for counts in found["n-samples"].values())
