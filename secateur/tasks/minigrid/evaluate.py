"""How often a policy does what it is told, in closed loop: every action changes what it sees next."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from secateur.tasks.minigrid.models import inputs, load_policy
from secateur.tasks.minigrid.rooms import (
    AHEAD,
    CELLS,
    DONE,
    FIRST,
    LONGEST,
    begin,
    codes,
    make_room,
    prompt,
)
from secateur.tokens.attach import Attached, attach


@dataclass
class Score:
    """How a policy does under one method; lists hold a number a seed of episodes."""

    method: str
    target: str
    success: list[float] = field(default_factory=list)
    """Percent of the episodes."""
    steps: list[float] = field(default_factory=list)
    """Of an episode, on average; a lost one has 20."""
    tokens_layers: list[float] = field(default_factory=list)
    """Visual tokens that a layer saw, summed over the layers, of a step."""
    seconds: float = 0.0


@torch.no_grad()
def play(
    policy: Any, seeds: Sequence[int], attached: Attached | None = None
) -> tuple[list[bool], list[int], float]:
    """Plays episodes side by side: which were won, how many steps each had, tokens x layers of all steps.

    >>> play(load_policy(), [1, 2])  # doctest: +SKIP
    ([True, True], [3, 9], ...)

    The policy says three actions, and does the first; what is no action is `done`, which changes nothing.
    """
    envs = [make_room() for _ in seeds]
    for env, seed in zip(envs, seeds):
        begin(env, seed)
    won, steps, work = [False] * len(envs), [0] * len(envs), 0.0
    going = list(range(len(envs)))
    if attached is not None:
        attached.reset()
    while going:
        cells = torch.stack([torch.from_numpy(codes(envs[number])) for number in going])
        words = torch.tensor([prompt(envs[number]) for number in going])
        given = inputs(policy, cells, words)
        written = policy.generate(**given, max_new_tokens=AHEAD, do_sample=False, eos_token_id=None)
        said = (written[:, given["input_ids"].shape[1]] - FIRST).tolist()
        work += CELLS * policy.config.text_config.num_hidden_layers * len(going)
        if attached is not None:
            before, after = attached.report["before"], attached.report["after"]
            work += after["tokens_x_layers"] - before["tokens_x_layers"]
        left = []
        for row, (number, action) in enumerate(zip(going, said)):
            _, reward, ended, _, _ = envs[number].step(action if action >= 0 else DONE)
            steps[number] += 1
            won[number] = reward > 0
            if not ended and steps[number] < LONGEST:
                left.append(row)
        if attached is not None and attached.session is not None:
            attached.session.keep(left)
        going = [going[row] for row in left]
    return won, steps, work


def evaluate(
    method: Any = None,
    target: str | float | None = None,
    episodes: int = 64,
    seeds: Sequence[int] = (0, 1, 2),
    policy: Any = None,
    name: str | None = None,
    **options: Any,
) -> Score:
    """Success of a policy (default: the one that comes with the library) under a token method, `episodes` a seed.

    >>> evaluate("vla-pruner", "12.5%", k=2).success  # doctest: +SKIP

    method None: every token stays. options: what `secateur.attach` takes. The rooms of the seeds are none that training saw.
    """
    policy = load_policy() if policy is None else policy
    score, begun = Score(name or str(method or "all tokens"), str(target or "100%")), time.process_time()
    for seed in seeds:
        rooms = [10**9 + 10**6 * seed + number for number in range(episodes)]
        if method is None:
            won, steps, work = play(policy, rooms)
        else:
            with attach(policy, method, target=target, seed=seed, **options) as attached:
                won, steps, work = play(policy, rooms, attached)
        score.success.append(100 * sum(won) / episodes)
        score.steps.append(sum(steps) / episodes)
        score.tokens_layers.append(work / sum(steps))
    score.seconds = time.process_time() - begun
    return score
