"""`secateur train minigrid`: clone a bot that acts in rooms, as a small vision-language-action model."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from secateur.cli.flags import OUTPUT, SWITCH, Settings, flag
from secateur.cli.shared import JSON_HELP, RESUME_HELP, check_new_folder, quiet_stdout, show


@dataclass(frozen=True, kw_only=True)
class Rooms:
    """Where the policy is written, and how it is judged."""

    threads: int | None = flag("threads of the processor; default: as many as there are cores", None)
    out: Annotated[str, OUTPUT] = flag("a new folder for the policy")
    resume: Annotated[bool, OUTPUT] = flag(RESUME_HELP, True)
    every: Annotated[int, OUTPUT] = flag("steps between checkpoints", 100)
    episodes: Annotated[int, OUTPUT] = flag("episodes to be judged by at the end", 64)
    json: Annotated[bool, OUTPUT, SWITCH] = flag(JSON_HELP, False)


def train_minigrid(*, flags: Rooms, settings: Settings) -> None:
    """Train a small vision-language-action model that does what it is told in rooms of MiniGrid (pip install secateur[minigrid]).

    It clones the bot that comes with the rooms. A run that was stopped goes on where it was: give the same command again.
    """
    import torch

    from secateur.report.tokens import print_policy
    from secateur.tasks.minigrid.evaluate import evaluate
    from secateur.tasks.minigrid.models import save_policy
    from secateur.tasks.minigrid.train import Recipe, train_policy

    check_new_folder(flags.out)
    out = Path(flags.out).expanduser()
    if flags.threads:
        torch.set_num_threads(flags.threads)
    work = out.with_name(out.name + ".run")
    with quiet_stdout():
        policy, about = train_policy(Recipe(**vars(settings)), work, flags.every, flags.resume)
        score = evaluate(policy=policy, episodes=flags.episodes, seeds=(0,))
        about |= {"success": score.success[0], "episode_steps": score.steps[0]}
        save_policy(policy, out, about)
        shutil.rmtree(work, ignore_errors=True)
    show({**about, "out": flags.out}, flags.json, lambda console: print_policy(about, flags.out, console))
