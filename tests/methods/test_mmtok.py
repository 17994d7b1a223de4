"""The worked examples and invariants of mmtok."""

import pytest
import torch
from token_examples import CLIP, SITE, kept

from secateur.testing import token_sets
from secateur.tokens.question import question_tokens, words

TEXT = {"embeddings": torch.tensor([[[0.9, 0.1, 0.0, 0.2]]])}


LIKE = torch.tensor([[1, 0.8, 0.1, 0], [0.8, 1, 0.2, 0], [0.1, 0.2, 1, 0.3], [0, 0, 0.3, 1]])


class Letters:
    """A token a word; in the middle of a text a word carries its blank."""

    table = {"user": 1, " is": 2, " the": 3, " cup": 4, " red": 5, "?": 6, "is": 7}  # noqa: RUF012

    def encode(self, text, add_special_tokens=True):
        return [self.table[text]] if text in self.table else [99]

    def decode(self, ids):
        back = {number: word for word, number in self.table.items()}
        return "".join(back[i] for i in ids)


class TestMMTok:
    def sets(self, keep, text=None, n=6, facts=CLIP, **more):
        generator = torch.Generator().manual_seed(5)
        return token_sets(
            torch.randn(1, n, 8, generator=generator),
            keep,
            hidden={f"encoder:{facts.feature_block}": torch.randn(1, n, 5, generator=generator)},
            text={"embeddings": torch.randn(1, 3, 8, generator=generator) if text is None else text},
            facts=facts,
            **more,
        )

    def test_calibration_of_the_worked_example(self):
        from secateur.methods.mmtok import shares

        one, four = torch.ones(1, 1, dtype=torch.bool), torch.ones(1, 4, dtype=torch.bool)
        text = shares(TEXT["embeddings"], 0.02, one, four)
        assert torch.allclose(text, torch.tensor([[[1.0, 0, 0, 0]]]), atol=1e-6)
        image = 0.5 * shares(LIKE[None], 0.2, four, four)
        expected = torch.tensor([0.090205, 0.033185, 0.001002, 0.000608])
        assert torch.allclose(image[0, 0], expected, atol=1e-6)

    def test_the_worked_example_through_the_method(self):
        """Rows with these inner products: a Cholesky factor for the image, unit axes for the text."""
        hidden = torch.linalg.cholesky(LIKE.double()).float()[None]
        norm = torch.tensor([0.9, 0.1, 0.0, 0.2])
        features = torch.zeros(1, 4, 5)
        features[0, :, 0] = norm
        features[0, torch.arange(4), torch.arange(1, 5)] = (1 - norm**2).sqrt()
        text = torch.tensor([[[1.0, 0, 0, 0, 0]]])
        for keep, expected in ((1, [0]), (2, [0, 3]), (3, [0, 2, 3])):
            sets = token_sets(features, keep, hidden={SITE: hidden}, text={"embeddings": text}, facts=CLIP)
            assert kept("mmtok", sets) == [expected]
        silent = token_sets(features, 1, hidden={SITE: hidden}, text={"embeddings": text}, facts=CLIP)
        assert kept("mmtok", silent, tau_text=1e9) == [[1]]

    def test_order_and_number_of_text_tokens_do_not_matter(self):
        text = torch.randn(1, 4, 8)
        base = kept("mmtok", self.sets(3, text, n=30))
        assert kept("mmtok", self.sets(3, text[:, [2, 0, 3, 1]], n=30)) == base
        assert kept("mmtok", self.sets(3, torch.cat([text, text], 1), n=30)) == base

    def test_without_image_coverage_one_text_token_picks_its_best_match_then_the_first(self):
        text = torch.randn(1, 1, 8)
        sets = self.sets(3, text, n=30)
        likeness = torch.nn.functional.cosine_similarity(sets.features[0], text[0], dim=1)
        best = int(likeness.argmax())
        found = kept("mmtok", sets, alpha=0.0, tau_text=1e-4)[0]
        assert found == sorted([best, *[i for i in range(30) if i != best][:2]])

    def test_the_question_changes_the_choice(self):
        first, second = (self.sets(2, torch.randn(1, 2, 8), n=60) for _ in range(2))
        assert kept("mmtok", first) != kept("mmtok", second)

    def test_padding_of_squares_is_never_chosen_but_when_all_stay(self):
        """640 x 426 in 336 x 336: scaled 224, 56 above and below, four rows of 14 each."""
        from secateur.methods.mmtok import padding

        place = torch.arange(576)[None]
        out = padding(place // 24, place % 24, torch.tensor([[24, 24]]), (640, 426)).reshape(24, 24)
        assert out[:4].all() and out[20:].all() and not out[4:20].any()
        tall = padding(place // 24, place % 24, torch.tensor([[24, 24]]), (426, 640)).reshape(24, 24)
        assert torch.equal(tall, out.T)
        odd = padding(place // 24, place % 24, torch.tensor([[24, 24]]), (400, 300)).reshape(24, 24)
        assert odd[:3].all() and not odd[3:21].any() and odd[21:].all()
        sets = self.sets(40, n=576)
        assert not set(kept("mmtok", sets, padded_from=(640, 426))[0]) & set(
            out.flatten().nonzero()[:, 0].tolist()
        )
        assert len(kept("mmtok", self.sets(576, n=576), padded_from=(640, 426))[0]) == 576
        assert len(kept("mmtok", self.sets(500, n=576), padded_from=(640, 426))[0]) == 16 * 24

    @pytest.mark.parametrize(
        "question, expected",
        [
            ("<image>\nWhat color is the Cup?", ["color", "Cup"]),
            ("How many dogs?\nAnswer the question using a single word or phrase.", ["many", "dogs"]),
            ("What is it?", ["What", "is", "it"]),
            ("", ["see", "in", "this", "image"]),
        ],
    )
    def test_words_of_a_question(self, question, expected):
        assert words(question) == expected

    def test_words_without_the_filter(self):
        assert words("Is it red?", plain=True) == ["Question", "Is", "it", "red"]

    def test_words_are_found_among_the_tokens_of_the_prompt(self):
        text = {"embeddings": torch.randn(1, 6, 8), "ids": torch.tensor([[1, 2, 3, 4, 5, 6]])}
        sets = token_sets(torch.randn(1, 4, 8), 2, text=text, facts=CLIP)
        assert question_tokens(sets)[1].all()
        for extra in ({}, {"question": "is the cup red?"}, {"question": ["is the cup red?"]}):
            sets.given = {"tokenizer": Letters(), **extra}
            expected = [0, 3, 4] if not extra else [3, 4]
            assert question_tokens(sets)[1][0].nonzero()[:, 0].tolist() == expected

    def test_each_row_has_its_own_question_and_one_without_words_counts_all_its_text(self):
        text = {"embeddings": torch.randn(2, 6, 8), "ids": torch.tensor([[1, 2, 3, 4, 5, 6]] * 2)}
        sets = token_sets(torch.randn(2, 4, 8), 2, text=text, facts=CLIP)
        sets.given = {"tokenizer": Letters(), "question": ["is the cup red?", "where?"]}
        assert [row.nonzero()[:, 0].tolist() for row in question_tokens(sets)[1]] == [
            [3, 4],
            [0, 1, 2, 3, 4, 5],
        ]
