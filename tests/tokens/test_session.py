"""What is remembered from run to run: the rows of prompt and written words, by batch row, until a reset."""

import copy
import warnings
from dataclasses import dataclass

import pytest
import torch
from tiny_models import IMAGE, inputs_for, make

from secateur import SecateurError
from secateur.tokens.attach import attach
from secateur.tokens.method import Memory, Stage, TokenMethod

LAYERS, WORDS = (1, 3), 4


@dataclass
class Watching(TokenMethod):
    """Every other token leaves before layer 2; layers 1 and 3 are remembered. No paper."""

    steps: int = 2
    longest: int = 1000
    carry: bool = False

    def stages(self, facts):
        return [Stage("layer:2", self.select)]

    def memory(self, facts):
        return Memory(LAYERS, self.steps, self.carry, self.longest)

    def select(self, sets):
        return sets.valid & (sets.index % 2 == 0)


@pytest.fixture(scope="module")
def given():
    model = make("llava-clip", torch.float32)
    model.set_attn_implementation("eager")
    return model, inputs_for("llava-clip", torch.float32)


def generate(model, inputs, words=WORDS, **more):
    return model.generate(**inputs, max_new_tokens=words, do_sample=False, suppress_tokens=[IMAGE], **more)


def by_hand(inputs, attentions, kept):
    """By row the mean of what the model itself gave as attention, over its last rows, heads and the two layers."""
    found = []
    for row, ids in enumerate(inputs["input_ids"]):
        visual = (ids == IMAGE).nonzero().flatten().tolist()
        whole = inputs["attention_mask"][row].nonzero().flatten().tolist()
        short = [c for c in whole if c not in visual or visual.index(c) in kept[row].tolist()]
        total = torch.zeros(len(visual))
        for layer in LAYERS:
            left = short if layer >= 2 else whole
            for step, forward in enumerate(attentions):
                row_of_last = forward[layer][row].mean(0)[-1]  # [keys]
                prompt = row_of_last[: len(row_of_last) - step][-len(left) :]
                for number, column in enumerate(visual):
                    if column in left:
                        total[number] += prompt[left.index(column)]
        found.append(total / len(LAYERS) / len(attentions))
    return found


def test_a_step_is_what_the_model_says_its_rows_attended_to(given):
    model, inputs = given
    with attach(model, Watching(), target="50%") as attached:
        for run in (1, 2, 3):
            out = generate(model, inputs, output_attentions=True, return_dict_in_generate=True)
            assert [len(steps) for steps in attached.session.history] == [min(run, 2)] * 3
        assert len(out.attentions) == WORDS
        expected = by_hand(inputs, out.attentions, attached.kept["layer:2"])
        for steps, wanted in zip(attached.session.history, expected):
            assert torch.allclose(steps[-1], wanted, atol=1e-6)
        assert all(0 < steps[-1].sum() < 1 for steps in attached.session.history[:2])


@pytest.mark.parametrize("early", [False, True])
def test_a_loop_of_forwards_remembers_what_generate_does(given, early):
    model, inputs = given
    with attach(model, Watching(), target="50%") as attached, torch.no_grad():
        written = generate(model, inputs)[:, inputs["input_ids"].shape[1] :]
        wanted = [steps[-1] for steps in attached.session.history]
        attached.reset()
        assert attached.session.history == []
        cache, mask = model(**inputs).past_key_values, inputs["attention_mask"]
        other = copy.deepcopy(cache)  # another conversation: its rows belong to no step
        if early:  # worked out after every forward, not when they are asked for
            close = attached.session.close
            attached.session.close = lambda *said, least=1: close(*said)
        for word in range(WORDS - 1):
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
            more = {"input_ids": written[:, word : word + 1], "attention_mask": mask}
            model(**more, past_key_values=cache)
            model(**more, past_key_values=other)
        for steps, one in zip(attached.session.history, wanted):
            assert len(steps) == 1
            assert torch.allclose(steps[0], one, atol=1e-6)


def test_words_behind_the_end_of_an_answer_count_for_nothing(given):
    model, inputs = given
    with attach(model, Watching(), target="50%") as attached:
        written = generate(model, inputs)[:, inputs["input_ids"].shape[1] :]
        end = int(written[0, 1])
        lengths = [row.index(end) + 1 if end in row else WORDS for row in written.tolist()]
        assert lengths[0] <= 2 and max(lengths) > lengths[0]
        wanted = []
        for row, length in enumerate(lengths):
            attached.reset()
            generate(model, inputs, length)
            wanted.append(attached.session.history[row][0])
        attached.reset()
        generate(model, inputs, eos_token_id=end, pad_token_id=0)
        for steps, one in zip(attached.session.history, wanted):
            assert torch.allclose(steps[0], one, atol=1e-6)


def test_a_token_that_left_has_0_or_what_was_remembered_of_it(given):
    model, inputs = given
    for carry in (False, True):
        method = Watching(carry=carry)
        method.memory = lambda facts, carry=carry: Memory((3,), 2, carry)
        method.select = lambda sets: sets.valid if sets.history.isnan().any() else sets.index % 2 == 0
        with attach(model, method, target="50%") as attached, torch.no_grad():
            for _ in range(3):
                model(**inputs)
            before, after = attached.session.history[0]
            assert (before > 0).all()
            assert (after[0::2] > 0).all()
            assert torch.equal(after[1::2], before[1::2] if carry else torch.zeros(16))


def test_rows_are_reset_one_by_one(given):
    model, inputs = given
    with attach(model, Watching(), target="50%") as attached, torch.no_grad():
        attached.reset()  # nothing to forget yet
        for _ in range(2):
            model(**inputs)
        attached.reset(rows=[1])
        assert [len(steps) for steps in attached.session.history] == [2, 0, 2]
        model(**inputs)
        assert [len(steps) for steps in attached.session.history] == [2, 1, 2]
        assert attached.session.runs == [3, 1, 3]
        with pytest.raises(SecateurError, match="no row 3"):
            attached.reset(rows=[3])
        with pytest.raises(SecateurError, match="no row 3"):
            attached.session.keep([0, 3])
        whole = attached.session.history
        attached.session.keep([2, 0])
        assert attached.session.history[1] is whole[0] and attached.session.runs == [3, 3]
    with attach(model, "random-tokens", target="50%") as attached:
        assert attached.session is None
        attached.reset()


def test_a_memory_of_other_pictures_is_forgotten_with_a_warning(given):
    model, inputs = given
    with attach(model, Watching(longest=4), target="50%") as attached, torch.no_grad():
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for _ in range(2):
                model(**inputs)
        with pytest.warns(UserWarning, match=r"3 rows became one of 1.*attached.reset\(\)"):
            model(**inputs_for("llava-clip", torch.float32, (1,)))
        assert attached.session.runs == [1]
        with pytest.warns(UserWarning, match="row 0 has 32 instead of 16 visual tokens.*forgotten"):
            model(**inputs_for("llava-clip", torch.float32, (2,)))
        assert attached.session.runs == [1]
        changed = inputs_for("llava-clip", torch.float32, (2,))
        changed["input_ids"][:, -5:] += 1
        with warnings.catch_warnings():  # a few words are what a state or a clock says
            warnings.simplefilter("error")
            model(**changed)
        changed["input_ids"][changed["input_ids"] != IMAGE] = 9
        with pytest.warns(UserWarning, match="row 0 has another prompt"):
            model(**changed)
        assert [len(steps) for steps in attached.session.history] == [2]
        model(**changed)
        with pytest.warns(UserWarning, match="5th step"):
            model(**changed)


def test_what_can_t_be_remembered_is_refused(given):
    model, inputs = given
    refused = [
        ("none is what was done", {"num_beams": 2}),
        ("static cache", {"cache_implementation": "static"}),
        ("guess", {"prompt_lookup_num_tokens": 2}),
        ("without a cache", {"use_cache": False}),
    ]
    for match, settings in refused:
        with attach(model, Watching(), target="50%"), pytest.raises(SecateurError, match=match):
            generate(model, inputs, **settings)
    gemma, others = make("gemma3", torch.float32), inputs_for("gemma3", torch.float32)
    for layer in gemma.model.language_model.layers:
        if layer.self_attn.sliding_window:
            layer.self_attn.sliding_window = 8
    gemma.config.text_config.sliding_window = 8
    method = Watching()
    method.memory = lambda facts: Memory((2,), 2)
    method.stages = lambda facts: [Stage("layer:3", method.select)]
    with attach(gemma, method, target="50%"), pytest.raises(SecateurError, match="without a window|window"):
        generate(gemma, others)
