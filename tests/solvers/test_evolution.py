"""The evolutionary engine: exact budgets, elitism, stages, seeds."""

import torch

from secateur.solvers.evolution import Batch, Space, Stage, State, draw_tokens, evolve


def space(n: int = 10, reach: int = 4) -> Space:
    names = tuple(f"layer{i}" for i in range(n))
    pools = tuple("mlp" if i % 2 == 0 else "attention" for i in range(n))
    return Space(names, pools, (-reach,) * n, (reach,) * n)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def sums(state: State) -> tuple[int, int]:
    return sum(state[::2]), sum(state[1::2])


def test_moves_keep_the_sum_per_pool_and_the_ranges() -> None:
    where, rng, state = space(reach=2), generator(), (0,) * 10
    for _ in range(300):
        state = where.mutate(state, rng)
        assert sums(state) == (0, 0)
        assert all(-2 <= level <= 2 for level in state)


def test_the_number_of_moves_is_the_smaller_of_two_draws() -> None:
    """P(min of two dice of 4 = 1..4) = 7, 5, 3, 1 of 16; one move changes exactly two levels by one."""
    where, rng = space(400, reach=100), generator()
    counts = torch.zeros(5)
    for _ in range(1600):
        child = where.mutate((0,) * 400, rng)
        counts[sum(abs(level) for level in child) // 2] += 1
    expected = torch.tensor([0, 700, 500, 300, 100])
    assert (counts - expected).abs().max() < 80


def test_offspring_are_distinct_and_fewer_where_the_space_is_small() -> None:
    children = space().offspring((0,) * 10, 64, generator())
    assert len(children) == len(set(children)) == 64 and (0,) * 10 not in children
    tiny = Space(("a", "b"), ("x", "x"), (-1, -1), (1, 1))
    assert sorted(tiny.offspring((0, 0), 64, generator())) == [(-1, 1), (1, -1)]
    alone = Space(("a", "b"), ("x", "y"), (-4, -4), (4, 4))
    assert alone.offspring((0, 0), 8, generator()) == []
    assert evolve(alone, lambda *_: 0.0, [8], [Stage(8, 1)], generator()).state == (0, 0)


def distance(state: State, batch: Batch) -> float:
    goal = (3, -1, -2, 2, 0, -2, -1, 1, 0, 0)
    return float(sum((a - b) ** 2 for a, b in zip(state, goal)))


def test_it_finds_the_best_state_and_never_gets_worse_on_the_same_tokens() -> None:
    stages = [Stage(4, 8), Stage(16, 2)]
    found = evolve(space(), distance, [8, 8], stages, generator(), generations=40, offspring=32)
    assert found.state == (3, -1, -2, 2, 0, -2, -1, 1, 0, 0)
    assert found.history[-1] == 0
    assert all(b <= a for a, b in zip(found.history, found.history[1:]))


def test_same_seed_same_result() -> None:
    runs = [
        evolve(
            space(), distance, [8] * 4, [Stage(8, 4), Stage(16, 1)], generator(s), generations=5, offspring=8
        )
        for s in (0, 0, 1)
    ]
    assert runs[0] == runs[1] != runs[2]


def test_stages_see_what_they_are_given() -> None:
    calls: list[tuple[State, int]] = []

    def fitness(state: State, batch: Batch) -> float:
        calls.append((state, sum(take for _, take in batch)))
        return distance(state, batch)

    stages = [Stage(3, 5), Stage(10, 2), Stage(24, 1)]
    evolve(space(), fitness, [8, 8, 8], stages, generator(), generations=1, offspring=12)
    assert [tokens for _, tokens in calls] == [3] * 12 + [10] * 5 + [24] * 3
    assert calls[17][0] == (0,) * 10  # the parent joins before the last stage
    first = sorted(calls[:12], key=lambda call: distance(call[0], ()))
    assert {state for state, _ in calls[12:17]} <= {
        s for s, _ in first if distance(s, ()) <= distance(first[4][0], ())
    }


def test_the_parent_wins_a_tie() -> None:
    assert (
        evolve(space(), lambda *_: 1.0, [4], [Stage(4, 1)], generator(), generations=3, offspring=4).state
        == (0,) * 10
    )


def test_drawn_tokens() -> None:
    lengths = [10, 20, 30, 40]
    for tokens in (1, 10, 35, 99):
        batch = draw_tokens(lengths, tokens, generator(tokens))
        assert sum(take for _, take in batch) == tokens
        assert len({sample for sample, _ in batch}) == len(batch)
        assert all(0 < take <= lengths[sample] for sample, take in batch)
        assert sum(take < lengths[sample] for sample, take in batch) <= 1
    assert draw_tokens(lengths, 1000, generator()) == ((0, 10), (1, 20), (2, 30), (3, 40))
    assert {draw_tokens(lengths, 10, generator(s)) for s in range(20)} >= {((0, 10),), ((1, 10),)}


def test_fixed_samples_make_the_winner_monotone_and_the_parent_free() -> None:
    calls: list[tuple[State, Batch]] = []

    def fitness(state: State, batch: Batch) -> float:
        calls.append((state, batch))
        return distance(state, batch) + 0.1 * (hash(batch) % 97)  # another batch, another level

    stages = [Stage(3, 4), Stage(10, 1)]
    kwargs = {"generations": 12, "offspring": 6}
    found = evolve(space(), fitness, [8] * 6, stages, generator(), fixed=True, **kwargs)
    assert all(b <= a for a, b in zip(found.history, found.history[1:]))
    last = [(s, b) for s, b in calls if sum(take for _, take in b) == 10]
    assert len({b for _, b in last}) == 1 and len(last) == len(set(last)) <= 12 * 4 + 1
    calls.clear()
    evolve(space(), fitness, [8] * 6, stages, generator(), **kwargs)
    assert len({b for _, b in calls if sum(take for _, take in b) == 10}) > 6
