"""Iterative magnitude pruning: train, remove the smallest survivors, go back to early weights, again.

Shared by `lottery-ticket` and `lottery-rewinding`; sources stand there.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

import torch
from torch import Tensor

from secateur.errors import SecateurError, choose
from secateur.pruning.allocate import divide
from secateur.training.checkpoint import Moments
from secateur.training.history import History
from secateur.training.job import Job
from secateur.training.masks import Masks, density, full_masks, prune_smallest, shuffled
from secateur.training.method import TrainMethod
from secateur.training.stability import angle, barrier, distance
from secateur.training.state import Hook
from secateur.utils.running import device_of

CONTROLS = ("reinit", "shuffle", "shuffle-global", "keep")
Level = dict[str, int] | int


@dataclass
class TicketMethod(TrainMethod):
    """The hyperparameters of iterative magnitude pruning, wherever the survivors go back to."""

    rate: float = field(default=0.2, metadata={"help": "largest share of the survivors that a round removes"})
    rounds: int | None = field(default=None, metadata={"help": "rounds; default: as many as rate needs"})
    scope: str = field(
        default="global",
        metadata={"help": "where weights compete: global or layer", "choices": ("global", "layer")},
    )
    output_rate: float = field(
        default=0.5, metadata={"help": "with scope layer, the last layer's rate as a share of the others'"}
    )
    skip: tuple[str, ...] = field(
        default=(), metadata={"help": "weights that stay whole, such as linear.weight"}
    )
    controls: tuple[str, ...] = field(
        default=(), metadata={"help": "trained beside it: reinit, shuffle, shuffle-global, keep"}
    )
    watch: int = field(
        default=0,
        metadata={"help": "steps between measurements while a level trains; the report names the best step"},
    )

    starts: ClassVar[str] = "init"

    def ticket(self, job: Job, **more: Any) -> Masks:
        """`find_ticket` with these."""
        shared = {item.name: getattr(self, item.name) for item in fields(TicketMethod)}
        return find_ticket(job, **shared, **more)


def weights_kept(job: Job) -> int:
    """How many of the prunable weights the target keeps."""
    total = sum(weight.numel() for weight in job.weights.values())
    if not total:
        raise SecateurError("it has no linear or convolution weights", where=type(job.model).__name__)
    others = sum(p.numel() for p in job.model.parameters()) - total
    return job.target.weights(total, others, job.method.name)


def rounds_to(share: float, rate: float, rounds: int | None = None) -> int:
    """How many rounds of at most `rate` leave `share`; `rounds` where it is given."""
    if not 0 < rate < 1:
        raise SecateurError(f"a round can't prune {rate} of the weights", where="rate", fix="such as 0.2")
    if rounds is not None and rounds < 1:
        raise SecateurError(f"{rounds} rounds", where="rounds", fix="give 1 or more")
    if share >= 1:
        return 0
    return rounds or max(1, math.ceil(math.log(share) / math.log(1 - rate) - 1e-9))


def levels(
    sizes: Mapping[str, int],
    keep: int,
    rounds: int,
    scope: str = "global",
    factors: Mapping[str, float] | None = None,
    share: float | None = None,
) -> list[Level]:
    """How many weights are left after each round, over all layers or ("layer") by name; the last is `keep` exactly.

    >>> levels({"w": 600}, 246, 4)
    [480, 384, 307, 246]

    Every round removes the share p = 1 - P^(1/rounds) of what is left, P = `share` or keep / all: rounded up over all
    layers, half to even in each. factors: what p is multiplied by in a layer.
    """
    total = sum(sizes.values())
    if not rounds:
        return []
    if scope == "global":
        rate, left, found = 1 - (share or keep / total) ** (1 / rounds), total, []
        for _ in range(rounds - 1):
            left = max(keep, left - math.ceil(rate * left - 1e-9))
            found.append(left)
        return [*found, keep]
    factors = {name: (factors or {}).get(name, 1.0) for name in sizes}

    def shares(rate: float) -> dict[str, float]:
        return {name: max(0.0, 1 - rate * factors[name]) ** rounds for name in sizes}

    low, high = 0.0, 1.0 / max(factors.values())
    for _ in range(60):
        middle = (low + high) / 2
        left_over = sum(size * shares(middle)[name] for name, size in sizes.items())
        low, high = (middle, high) if left_over > keep else (low, middle)
    state, steps = dict(sizes), []
    for _ in range(rounds - 1):
        state = {name: n - round(high * factors[name] * n) for name, n in state.items()}
        steps.append(state)
    last = divide(list(sizes.values()), list(shares(high).values()), keep)
    return [*steps, {name: min(n, state[name]) for name, n in zip(sizes, last)}]


def find_ticket(
    job: Job,
    *,
    rate: float,
    rounds: int | None,
    scope: str = "global",
    output_rate: float = 0.5,
    skip: Collection[str] = (),
    rewind: int = 0,
    restore_moments: bool = False,
    reset: bool = True,
    controls: Sequence[str] = (),
    pairs: int = 0,
    watch: int = 0,
) -> Masks:
    """Finds the ticket and trains it; the job's model ends as the trained ticket. Gives its masks.

    watch: steps between measurements of quality while a level trains; its best step then stands in the report.
    Trains rewind steps once, then from there to the end, once per level: rewind + (rounds + 1) * (steps - rewind) steps.
    """
    for control in controls:
        choose(control, CONTROLS, what="control", where="controls")
    weights = job.weights
    if unknown := [name for name in skip if name not in weights]:
        raise SecateurError(
            f"it has no weight {unknown[0]!r}", where="skip", fix=f"among {', '.join(list(weights)[:6])}, ..."
        )
    sizes = {
        name: weight.numel() for name, weight in weights.items() if scope == "global" or name not in skip
    }
    keep = weights_kept(job) - sum(w.numel() for n, w in weights.items() if n not in sizes)
    share = keep / sum(sizes.values())
    if share <= 0:
        raise SecateurError("the skipped layers alone are over the target", where="skip", fix="skip fewer")
    last = next(reversed(sizes))
    exact = job.target.value if job.target.kind == "share" and not skip else share
    counts = levels(sizes, keep, rounds_to(exact, rate, rounds), scope, {last: output_rate}, exact)
    initial = job.snapshot()
    if rewind:
        job.train("early", until=rewind)
    early, moments = job.snapshot(), job.moments if restore_moments and rewind else None
    masks, dense = full_masks(weights), None
    for level in range(len(counts) + 1):
        train_level(job, f"level-{level}", masks, rewind, moments, watch=watch)
        dense = job.snapshot() if dense is None else dense
        if level == len(counts):
            break
        masks = prune_smallest(job.weights, masks, keep=counts[level], scope=scope, skip=skip)
        if reset or level == len(counts) - 1:
            trained = job.snapshot()
            job.restore(early)
    if not counts:
        return masks
    ticket = job.snapshot()
    for control in controls:
        other = (
            masks
            if control in ("reinit", "keep")
            else shuffled(masks, job.generator(control), "layer" if control == "shuffle" else "global")
        )
        job.restore({"reinit": _fresh(job, initial, early), "keep": trained}.get(control, early))
        anew = control == "reinit"
        train_level(job, control, other, 0 if anew else rewind, None if anew else moments, watch=watch)
    if pairs:
        _stability(job, masks, early, dense or ticket, ticket, rewind, moments, pairs)
    job.restore(ticket)
    return masks


def train_level(
    job: Job,
    phase: str,
    masks: Masks,
    start: int,
    moments: Moments | None = None,
    seed: int | None = None,
    watch: int = 0,
) -> None:
    """From `start` to the end, under the masks; what came out goes into the report."""
    history = (
        History(job.task.quality, watch, job.task.sign) if watch and job.task.quality is not None else None
    )
    hooks: list[Hook] = [job.masked(masks), *([history] if history else [])]
    job.train(phase, start=start, after_step=hooks, moments=moments, seed=seed)
    job.note(phase=phase, density=density(masks), quality=job.quality())
    if history:
        step, value = history.best
        job.note(phase=phase, best_step=step, best_quality=value)


def _fresh(job: Job, initial: Mapping[str, Tensor], early: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Newly drawn weights: the network's own initialisation under another seed."""
    seed = int(torch.randint(2**31, (1,), generator=job.generator("reinit")).item())
    return reinitialised(job, seed, initial)


def reinitialised(job: Job, seed: int, initial: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A draw of the task's untrained network; where the task has none to draw, each layer's `reset_parameters`."""
    from copy import deepcopy

    devices = [p.device for p in job.model.parameters() if p.device.type == "cuda"][:1]
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        fresh = job.task.build()
        same = all(torch.equal(t.cpu(), initial[n].cpu()) for n, t in fresh.named_parameters())
        if same:  # `build` gives a copy of one network
            fresh = deepcopy(fresh)
            for module in fresh.modules():
                if callable(again := getattr(module, "reset_parameters", None)):
                    again()
    device = device_of(job.model)
    found = {**dict(fresh.named_parameters()), **dict(fresh.named_buffers())}
    return {name: tensor.detach().to(device) for name, tensor in found.items()}


def _stability(
    job: Job,
    masks: Masks,
    early: Mapping[str, Tensor],
    dense: Mapping[str, Tensor],
    ticket: Mapping[str, Tensor],
    rewind: int,
    moments: Moments | None,
    pairs: int,
) -> None:
    """Distances, angles and barriers of paired runs, of the ticket and of a random mask with the same counts per layer.

    The barrier is in units of the task's quality; BatchNorm's statistics are interpolated with the weights.
    """
    random = shuffled(masks, job.generator("stability"))
    for kind, mask in (("ticket", masks), ("random", random)):
        ends: list[dict[str, Tensor]] = []
        for pair in range(pairs + 1):
            if kind == "ticket" and pair == 0:
                ends.append(dict(ticket))
                continue
            job.restore(early)
            train_level(job, f"stability-{kind}-{pair}", mask, rewind, moments, seed=job.seed + 7919 * pair)
            ends.append(job.snapshot())
        row = {
            "prune_distance": distance(dense, ends[0], mask),
            "prune_angle": angle(dense, ends[0], mask),
            "order_distance": sum(distance(ends[0], e, mask) for e in ends[1:]) / pairs,
            "order_angle": sum(angle(ends[0], e, mask) for e in ends[1:]) / pairs,
        }
        if (quality := job.task.quality) is not None:
            rises = [
                barrier(job.model, ends[0], e, lambda m: -job.task.sign * quality(m), points=7)[0]
                for e in ends[1:]
            ]
            row["order_barrier"] = sum(rises) / pairs
            job.restore(ends[0])
            row["quality"] = quality(job.model)
        job.note(phase=f"stability of the {kind} mask", rewind=rewind, mask=kind, **row)
