"""Rooms of MiniGrid, the policy that is trained in them, and how it is judged."""

import sys
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

import secateur
from secateur.cli.main import main
from secateur.errors import SecateurError
from secateur.tasks.minigrid.models import WEIGHTS, build, inputs, load_policy
from secateur.tasks.minigrid.rooms import (
    ACTIONS,
    AGENT,
    AHEAD,
    CELLS,
    DONE,
    EMPTY,
    FIRST,
    FORWARD,
    LONGEST,
    NAMED,
    RIGHT,
    THING,
    THINGS,
    VIEW,
    WALL,
    WORDS,
    begin,
    codes,
    draw,
    expert,
    make_room,
    prompt,
    record,
    renamed,
)
from secateur.tasks.minigrid.train import Learner, Recipe, stay, train_policy
from secateur.tokens.method import Stage, TokenMethod


def test_without_the_package_the_command_says_what_to_install(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "minigrid", None)
    assert main(["train", "minigrid", "--out", str(tmp_path / "policy"), "--steps", "1"]) == 2
    assert "pip install secateur[minigrid]" in " ".join(capsys.readouterr().err.split())


def test_without_a_policy_it_says_how_to_make_one(capsys, tmp_path):
    with pytest.raises(SecateurError, match="secateur train minigrid"):
        load_policy(tmp_path)


@pytest.fixture(scope="module")
def frames():
    pytest.importorskip("minigrid")
    return record(400, seed=1)


def test_the_expert_does_what_it_is_told_wherever_an_episode_begins():
    pytest.importorskip("minigrid")
    env = make_room()
    for seed in range(30):
        begin(env, seed)
        assert env.step_count == 0
        wants, last, reward = expert(env), None, 0
        while not reward and env.step_count < LONGEST:
            last = wants(last)
            reward = env.step(last)[1]
        assert reward > 0


def test_a_room_is_drawn_as_minigrid_draws_it():
    pytest.importorskip("minigrid")
    env = make_room()
    for seed in range(5):
        begin(env, seed)
        theirs = torch.from_numpy(env.get_pov_render(tile_size=8)).permute(2, 0, 1)
        assert torch.equal(draw(torch.from_numpy(codes(env))[None])[0], theirs)
        words = [WORDS[number] for number in prompt(env)]
        assert " ".join(words[:-1]).replace("-", " ") == env.mission


def test_moments_and_what_comes_next(frames):
    assert (frames.cells[:, CELLS - 1 - VIEW // 2] == AGENT).all() and (frames.cells == AGENT).sum() == 400
    seen, first = frames.goal.any(1), frames.actions[:, 0]
    assert 0.4 < seen.float().mean() < 0.95
    # where nothing that is named is in view, the expert goes ahead in the open, and else turns right
    column = frames.cells.view(-1, VIEW, VIEW)[:, :, VIEW // 2].flip(1)
    clear = (column[:, 1] == EMPTY) & ~(column[:, 1:5] == WALL).any(1)
    assert clear[~seen].any()
    assert torch.equal(first[~seen], torch.where(clear[~seen], FORWARD, RIGHT))
    # a thing right ahead ends the episode, so nobody goes on from there
    named = frames.goal.view(-1, VIEW, VIEW)[:, VIEW - 2, VIEW // 2]
    assert not named.any()
    # where the next action is known, it was obeyed, and stands first in the moment after
    known = (frames.actions[:-1, 1] >= 0) & (frames.actions[:-1, 1] != DONE)
    assert known.sum() > 200
    assert torch.equal(frames.actions[:-1, 1][known], frames.actions[1:, 0][known])


def test_other_names_change_nothing_but_names(frames):
    moved = renamed(frames, torch.Generator().manual_seed(0))
    assert torch.equal(moved.goal, frames.goal) and torch.equal(moved.actions, frames.actions)
    things = (frames.cells >= THING) & (frames.cells < AGENT)
    assert torch.equal(moved.cells[~things], frames.cells[~things])
    assert ((moved.cells[things] >= THING) & (moved.cells[things] < AGENT)).all()
    assert set(moved.words[:, -2].tolist()) == set(range(NAMED, NAMED + len(THINGS)))
    assert (moved.cells != frames.cells)[things].float().mean() > 0.9
    # things that were alike are alike, in each row by itself
    assert all(len(a.unique()) == len(b.unique()) for a, b in zip(moved.cells, frames.cells))


def test_a_share_of_the_steps_sees_fewer_cells_but_the_named(frames):
    draws = torch.Generator().manual_seed(0)
    found = [stay(frames, 0.5, draws) for _ in range(40)]
    assert 10 <= sum(kept.shape[1] < CELLS for kept in found) <= 30
    for kept in found:
        assert (kept.diff(dim=1) > 0).all()
        missing = torch.ones(400, CELLS, dtype=torch.bool).scatter(1, kept, False)
        assert not (missing & frames.goal).any()


def test_training_reads_what_the_model_reads(frames):
    learner = Learner(seed=0).eval()
    some = type(frames)(*(part[:4] for part in frames))
    given = inputs(learner.policy, some.cells, some.words)
    said = some.actions[:, : AHEAD - 1].clamp(min=0) + FIRST
    given["input_ids"] = torch.cat([given["input_ids"], said], 1)
    given["attention_mask"] = torch.ones_like(given["input_ids"])
    with torch.no_grad():
        wanted = learner.policy(**given).logits[:, -AHEAD:]
        found, asked = learner(some, torch.arange(CELLS).expand(4, -1))
    assert torch.allclose(found, wanted, atol=1e-4)
    assert asked.isfinite()


def test_fewer_cells_are_those_that_the_token_engine_leaves(frames):
    kept = torch.tensor([[0, 5, 20, 45]]).expand(3, -1)

    @dataclass
    class Given(TokenMethod):
        positions: ClassVar[str] = "original"

        def stages(self, facts):
            return [Stage("input", self.select)]

        def select(self, sets):
            return torch.zeros_like(sets.valid).scatter(1, kept, True)

    learner = Learner(seed=0).eval()
    some = type(frames)(*(part[:3] for part in frames))
    given = inputs(learner.policy, some.cells, some.words)
    with torch.no_grad(), secateur.attach(learner.policy, Given(), target="10%"):
        wanted = learner.policy(**given).logits[:, -1]
    with torch.no_grad():
        found, _ = learner(some, kept)
    assert torch.allclose(found[:, 0], wanted, atol=1e-4)


def test_training_again_gives_the_same_policy_also_after_a_stop(tmp_path):
    pytest.importorskip("minigrid")
    recipe = Recipe(frames=64, steps=3, batch=4)
    one, about = train_policy(recipe)
    assert about["steps"] == 3

    def stops(state):
        if state.step == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_policy(recipe, tmp_path, every=1, after_step=[stops])
    two, _ = train_policy(recipe, tmp_path, every=1)
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values()))


def test_episodes_are_played_to_their_end():
    pytest.importorskip("minigrid")
    from secateur.tasks.minigrid.evaluate import evaluate

    policy = build(seed=0).eval()
    dense = evaluate(episodes=2, seeds=(0,), policy=policy)
    whole = evaluate("vla-pruner", "100%", episodes=2, seeds=(0,), policy=policy, k=1)
    fewer = evaluate("vla-pruner", "12.5%", episodes=1, seeds=(0,), policy=policy, k=1)
    assert dense.success == whole.success and dense.steps == whole.steps and dense.steps[0] <= LONGEST
    assert dense.tokens_layers == whole.tokens_layers == [4 * CELLS]
    # three steps of an episode with all tokens, then 6 of 49 from layer 1 on
    steps = fewer.steps[0]
    expected = (min(steps, 3) * 4 * CELLS + max(steps - 3, 0) * (CELLS + 3 * 6)) / steps
    assert fewer.tokens_layers == [pytest.approx(expected)]


def test_a_policy_that_only_turns_is_no_winner(monkeypatch):
    pytest.importorskip("minigrid")
    from secateur.tasks.minigrid import evaluate

    policy = build(seed=0).eval()
    turns = torch.full((1, 1), FIRST + ACTIONS.index("right"))
    monkeypatch.setattr(
        policy, "generate", lambda input_ids, **_: torch.cat([input_ids, turns.expand(len(input_ids), 1)], 1)
    )
    won, steps, work = evaluate.play(policy, [0, 1, 2, 3])
    for victory, count in zip(won, steps):
        assert count <= 4 if victory else count == LONGEST
    assert not all(won) and work == sum(steps) * 4 * CELLS


@pytest.mark.skipif(not (WEIGHTS / "minigrid-0").is_dir(), reason="no policy is shipped")
def test_the_policy_that_comes_with_the_library_does_what_it_is_told():
    pytest.importorskip("minigrid")
    from secateur.tasks.minigrid.evaluate import evaluate

    about = load_policy().minigrid
    (share,) = evaluate(episodes=32, seeds=(5,)).success
    assert about["success"] > 89 and share > 78
