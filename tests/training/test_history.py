from types import SimpleNamespace

import pytest

from secateur.errors import SecateurError
from secateur.training.history import History


def run(every: int, steps: int, values: list[float], sign: int = 1) -> History:
    left = iter(values)
    history = History(lambda model: next(left), every, sign)
    for step in range(steps):
        history(SimpleNamespace(step=step, steps=steps, model=None))  # type: ignore[arg-type]
    assert next(left, None) is None
    return history


def test_measured_every_so_many_steps_and_after_the_last_the_first_best_counts() -> None:
    history = run(2, 5, [0.1, 0.7, 0.7])
    assert history.steps == [2, 4, 5] and history.best == (4, 0.7)
    assert run(1, 3, [0.5, 0.2, 0.1]).best == (1, 0.5)
    assert run(9, 4, [0.3]).best == (4, 0.3)
    assert run(1, 3, [9.5, 7.2, 7.2], sign=-1).best == (2, 7.2)
    again = History(lambda model: 0.0, 2)
    again.load_state_dict(history.state_dict())
    assert (again.steps, again.values) == ([2, 4, 5], [0.1, 0.7, 0.7])
    with pytest.raises(SecateurError, match="0 is less than 1"):
        History(lambda model: 0.0, 0)
