"""Rooms with a mission in words, seen by the one who walks in them: what a policy sees, and what the expert would do.

MiniGrid (Chevalier-Boisvert et al. 2023, "Minigrid & Miniworld", https://arxiv.org/abs/2306.13831, MIT) makes the rooms
and judges them; BabyAI's bot is the expert, and knows the map. A policy has no memory, so what the bot does should follow
from what is seen: while no named thing is in view, the expert goes ahead as long as the way is clear and the wall is more
than four cells away, and else turns right; rooms in which that goes round in circles (one in 25) are left out.
"""

from __future__ import annotations

import contextlib
import functools
import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from secateur.errors import SecateurError
from secateur.utils.screen import Screen

ROOM, OBJECTS = 9, 5
"""Cells along a room, walls counted; things in it."""
VIEW, TILE, FAR = 7, 8, 4
"""Cells along what is seen, the agent in the middle of the last row and looking up; pixels along a cell."""
CELLS = VIEW**2
LONGEST = 20
"""Steps after which an episode is lost; the expert needs 6 on average."""
ACTIONS = ("left", "right", "forward", "pickup", "drop", "toggle", "done")
LEFT, RIGHT, FORWARD, DONE = 0, 1, 2, 6
COLOURS = ("red", "green", "blue", "purple", "yellow", "grey")
KINDS = ("ball", "box", "key")
THINGS = tuple(f"{colour}-{kind}" for kind in KINDS for colour in COLOURS)
WORDS = ("<pad>", "<bos>", "<eos>", "<image>", "go", "to", "the", "a", "now", *THINGS, *ACTIONS)
"""A thing is one word, in the order of the tiles."""
ID = {word: number for number, word in enumerate(WORDS)}
PAD, BOS, EOS, IMAGE = 0, 1, 2, 3
NAMED = ID[THINGS[0]]
"""Words from here on are things, in the order of their tiles."""
FIRST = ID["left"]
"""Words from here on are actions, in their order."""
PROMPT, AHEAD = 5, 3
"""Words of a prompt, the thing last but one; actions that are foretold, the first of which is done."""
HIDDEN, EMPTY, WALL, THING = 0, 1, 2, 3
"""Numbers of tiles; a tile for each thing follows, then the agent's."""
AGENT = THING + len(THINGS)
TILES = AGENT + 1


def require_minigrid() -> None:
    """Raises `SecateurError` where the package is missing."""
    try:
        import minigrid  # noqa: F401
    except ImportError:
        raise SecateurError(
            "minigrid isn't installed", where="minigrid", fix="pip install secateur[minigrid]"
        ) from None


def make_room() -> Any:
    """BabyAI's level in which to go to a thing of one room."""
    require_minigrid()
    from minigrid.envs.babyai.goto import GoToLocal

    return GoToLocal(room_size=ROOM, num_dists=OBJECTS - 1)


def begin(env: Any, seed: int) -> None:
    """A new episode, which the expert can win: the first from `seed` on."""
    _reset(env, _winnable(seed))


@functools.cache
def _winnable(seed: int) -> int:
    env = make_room()
    while True:
        _reset(env, seed)
        wants, last = expert(env), None
        for _ in range(LONGEST):
            last = wants(last)
            if env.step(last)[1] > 0:
                return seed
        seed += 10**9 + 7


def _reset(env: Any, seed: int) -> None:
    with contextlib.redirect_stdout(io.StringIO()):  # it prints the rooms that it rejects
        env.reset(seed=seed % 2**31)


def codes(env: Any) -> np.ndarray:
    """uint8 [49] the tile of each cell that the agent looks at, row by row."""
    grid, seen = env.gen_obs_grid()
    cells = np.full(CELLS, HIDDEN, np.uint8)
    for place, (item, visible) in enumerate(zip(grid.grid, seen.T.flat)):
        if visible:
            cells[place] = EMPTY if item is None else _tile(item)
    cells[CELLS - 1 - VIEW // 2] = AGENT
    return cells


def _tile(item: Any) -> int:
    if item.type == "wall":
        return WALL
    return THING + KINDS.index(item.type) * len(COLOURS) + COLOURS.index(item.color)


def prompt(env: Any) -> list[int]:
    """The mission in five words."""
    *words, colour, kind = env.mission.split()
    return [ID[word] for word in (*words, f"{colour}-{kind}", "now")]


def goal(cells: np.ndarray, words: list[int]) -> np.ndarray:
    """bool [49] the cells in which a thing lies that the mission names."""
    return cells == words[-2] - NAMED + THING


def expert(env: Any) -> Callable[[int | None], int]:
    """What gives the next action of the episode that begins, by the one that was taken last (None: there was none)."""
    from minigrid.utils.baby_ai_bot import BabyAIBot

    bot = BabyAIBot(env)
    bot.vis_mask[:] = True
    words = prompt(env)

    def wants(last: int | None) -> int:
        cells = codes(env)
        planned = int(bot.replan(last))
        if goal(cells, words).any():
            return planned
        ahead = cells.reshape(VIEW, VIEW)[-2::-1, VIEW // 2][:FAR]
        return FORWARD if ahead[0] == EMPTY and WALL not in ahead else RIGHT

    return wants


@functools.cache
def tiles() -> Tensor:
    """uint8 [22, 3, 8, 8] the pictures of the tiles."""
    require_minigrid()
    from minigrid.core.grid import Grid
    from minigrid.core.world_object import Ball, Box, Key, Wall

    items: list[Any] = [None, Wall(), *(kind(colour) for kind in (Ball, Box, Key) for colour in COLOURS)]
    drawn = [Grid.render_tile(None, tile_size=TILE)]
    drawn += [Grid.render_tile(item, highlight=True, tile_size=TILE) for item in items]
    drawn.append(Grid.render_tile(None, agent_dir=3, highlight=True, tile_size=TILE))
    return torch.from_numpy(np.stack(drawn).astype(np.uint8)).permute(0, 3, 1, 2).contiguous()


def draw(cells: Tensor) -> Tensor:
    """uint8 [B, 3, 56, 56] of tiles [B, 49]."""
    picked = tiles().to(cells.device)[cells.long()].view(-1, VIEW, VIEW, 3, TILE, TILE)
    return picked.permute(0, 3, 1, 4, 2, 5).reshape(-1, 3, VIEW * TILE, VIEW * TILE)


@dataclass(eq=False, repr=False)
class Frames(Screen):
    """N moments of episodes, and what the expert would do."""

    cells: Tensor
    """uint8 [N, 49]"""
    words: Tensor
    """int64 [N, 5]"""
    actions: Tensor
    """int64 [N, 3] the next three actions; -1 where they aren't known."""

    def __len__(self) -> int:
        return len(self.cells)

    def __iter__(self) -> Iterator[Tensor]:
        return iter((self.cells, self.words, self.actions))

    @property
    def goal(self) -> Tensor:
        """bool [N, 49] the cells in which a thing lies that the mission names."""
        return self.cells == self.words[:, -2:-1] - NAMED + THING


def record(frames: int, seed: int, noise: float = 0.2) -> Frames:
    """Moments of the expert's episodes, in which a `noise` share of the actions is drawn at random and put right afterwards.

    >>> record(2000, seed=0).actions.shape  # doctest: +SKIP
    torch.Size([2000, 3])
    """
    draws = np.random.default_rng(seed)
    env = make_room()
    kept: list[tuple[np.ndarray, list[int]]] = []
    plans: list[list[int]] = []
    while len(kept) < frames:
        _reset(env, int(draws.integers(2**31 - 1)))
        wants, last, won = expert(env), None, False
        wanted: list[int] = []
        taken: list[int] = []
        while not won and len(taken) < LONGEST:
            wanted.append(wants(last))
            kept.append((codes(env), prompt(env)))
            stray = draws.random() < noise
            last = int(draws.choice(3)) if stray else wanted[-1]
            taken.append(last)
            won = env.step(last)[1] > 0
        # what comes next is known as long as the expert was obeyed
        for start in range(len(wanted)):
            plan = [wanted[start]]
            for step in range(1, AHEAD):
                obeyed = taken[start : start + step] == wanted[start : start + step]
                after = wanted[start + step] if start + step < len(wanted) else DONE if won else -1
                plan.append(after if obeyed else -1)
            plans.append(plan)
    return Frames(
        torch.from_numpy(np.stack([cells for cells, _ in kept[:frames]])),
        torch.tensor([words for _, words in kept[:frames]]),
        torch.tensor(plans[:frames]),
    )


def renamed(frames: Frames, generator: torch.Generator) -> Frames:
    """The same moments with other things in the places of things: to the expert they are all alike."""
    order = torch.rand(len(frames), len(THINGS), generator=generator).argsort(1)
    kept = torch.arange(TILES).expand(len(frames), -1)
    table = torch.cat([kept[:, :THING], order + THING, kept[:, AGENT:]], 1)
    words = frames.words.clone()
    words[:, -2] = order.gather(1, words[:, -2:-1] - NAMED)[:, 0] + NAMED
    return Frames(table.gather(1, frames.cells.long()).to(frames.cells.dtype), words, frames.actions)
