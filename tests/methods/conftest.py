"""Plans without the cut, for tests of what a method decides."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from secateur.method import make_method
from secateur.pruning.context import Context
from secateur.pruning.options import Options
from secateur.pruning.plan import Plan
from secateur.pruning.target import parse_target


@pytest.fixture
def plan_of() -> Callable[..., Plan]:
    """`plan_of(model, "taylor", "70%", ids, element="square", allocation="global")`: the plan of a language model.

    The model is traced once and remembered.
    """
    graphs: dict[int, Any] = {}

    def plan(model: nn.Module, method: str, target: str, data: Any, **settings: Any) -> Plan:
        names = {f.name for f in dataclasses.fields(Options)}
        own = {f.name for f in dataclasses.fields(Context)} - {"model", "method", "target", "inputs", "data"}
        context = Context(
            model=model,
            method=make_method(method, **{k: v for k, v in settings.items() if k not in own | names}),
            target=parse_target(target),
            inputs={"input_ids": torch.ones(2, 8, dtype=torch.int64)},
            data=data,
            options=Options(**{k: v for k, v in settings.items() if k in names}),
            **{k: v for k, v in settings.items() if k in own},
        )
        if id(model) in graphs:
            context.graph = graphs[id(model)]
        graphs[id(model)] = context.graph
        return context.method.plan(context)

    return plan
