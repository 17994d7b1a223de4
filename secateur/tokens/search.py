"""Search of a token method's hyperparameters: those whose answers stay nearest to the unpruned model's.

Yang et al. 2025, https://arxiv.org/abs/2508.05211 (VFlowOpt, section D): Gaussian-process optimisation of the cosine
between the last prompt token's final hidden state with and without pruning. No labels, no gradients.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secateur.errors import SecateurError
from secateur.tokens.attach import attach
from secateur.utils.progress import bar

BOUNDS = {"r1": (1.0, 1.5), "r2": (0.5333, 1.0), "t": (0.0, 50.0), "a": (3.0, 24.0), "alpha": (-1.0, 1.0)}
"""VFlowOpt's, for a target of 25%; r1 is in multiples of the target."""


def calibrate(
    model: nn.Module,
    samples: Sequence[Mapping[str, Any]],
    target: str = "25%",
    *,
    method: str = "vflowopt",
    bounds: Mapping[str, tuple[float, float]] | None = None,
    evaluations: int = 50,
    start: int = 27,
    seed: int = 42,
) -> dict[str, float]:
    """The best hyperparameters found for `method` at `target`, to pass to `attach`.

    >>> best = calibrate(vlm, [processor(...) for ... in thirty], target="25%")  # doctest: +SKIP
    >>> secateur.attach(vlm, "vflowopt", target="25%", **best)  # doctest: +SKIP

    samples: about 30 inputs of the model, each a dict of keyword arguments of `forward` (an image and a prompt).
    bounds: hyperparameter -> (low, high); None: those VFlowOpt was searched in. start: random settings before the model of
    the objective is used. The target's share times `r1` bounds the first stage, as published.
    Needs optuna (`pip install secateur[search]`). Raises `SecateurError` where no setting could be run.
    """
    try:
        import optuna
    except ImportError as error:
        raise SecateurError(
            "optuna isn't installed", where="calibrate", fix="pip install 'secateur[search]'"
        ) from error
    if not samples:
        raise SecateurError("there are no samples to calibrate on", where="calibrate", fix="about 30 inputs")
    share = float(target.rstrip("% ")) / 100 if isinstance(target, str) and "%" in target else 0.25
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    limits = dict(bounds or BOUNDS)
    if bounds is None:
        limits["r1"] = (share, min(1.0, 1.5 * share))
    dense = [final_state(model, sample) for sample in samples]
    study = optuna.create_study(
        direction="maximize", sampler=optuna.samplers.GPSampler(seed=seed, n_startup_trials=start)
    )
    with bar("calibrating", evaluations) as advance:

        def objective(trial: Any) -> float:
            chosen = {name: trial.suggest_float(name, *limit) for name, limit in limits.items()}
            advance(1)
            try:
                with attach(model, method, target=target, **chosen):
                    return sum(
                        agreement(final_state(model, sample), one) for sample, one in zip(samples, dense)
                    )
            except SecateurError as error:
                raise optuna.TrialPruned(str(error)) from error

        study.optimize(objective, n_trials=evaluations)
    done = [trial for trial in study.trials if trial.value is not None]
    if not done:
        raise SecateurError(
            "no setting could be run", where="calibrate", fix="give wider bounds or another target"
        )
    return dict(study.best_params)


@torch.no_grad()
def final_state(model: nn.Module, sample: Mapping[str, Any]) -> Tensor:
    """The last prompt token's hidden state after the final norm, [B, D]."""
    states: list[Tensor] = []
    handle = model.get_decoder().register_forward_hook(  # type: ignore[operator]
        lambda module, args, output: states.append(output.last_hidden_state[:, -1].detach())
    )
    try:
        model(**sample)
    finally:
        handle.remove()
    return states[-1]


def agreement(pruned: Tensor, dense: Tensor) -> float:
    """Mean cosine of two batches of states; 0 where it isn't a number."""
    return F.cosine_similarity(pruned.float(), dense.float(), dim=-1).nan_to_num(0).mean().item()
