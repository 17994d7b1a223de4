"""The worked examples and invariants of the methods that choose tokens before the language model reads them."""

import math

import pytest
import torch

from secateur import SecateurError
from secateur.families.vlm import Facts
from secateur.method import make_method
from secateur.testing import token_sets
from secateur.tokens.greedy import cosine_distance, directions
from secateur.tokens.question import question_tokens, words
from secateur.tokens.state import Reduction

CLIP = Facts(layers=32, blocks=24, feature_block=-2, has_cls=True)
PLAIN = Facts(layers=28, blocks=32, feature_block=-1, has_cls=False, merge=4, mrope=True)
SITE = "encoder:-2"


def kept(method, sets, **settings):
    """Kept positions of each set, ascending."""
    found = make_method(method, **settings).select(sets)
    if isinstance(found, Reduction):
        return [[i for i in row if i >= 0] for row in found.index.tolist()]
    return [row.nonzero()[:, 0].tolist() for row in found]


def circle(degrees, norms=None):
    angles = torch.tensor([[math.radians(a) for a in degrees]])
    norms = torch.ones(len(degrees)) if norms is None else torch.tensor(norms)
    return torch.stack([angles.cos(), angles.sin()], 2) * norms[None, :, None]


def given(attention, keep, features=None, site=SITE, rows="cls", facts=CLIP, **more):
    scores = torch.tensor([attention])
    features = torch.randn(1, scores.shape[1], 4) if features is None else features
    return token_sets(features, keep, attention={(site, rows): scores}, facts=facts, **more)


def given_grid(scores):
    """Two rows of it may stay."""
    return given(scores.flatten().tolist(), 2 * scores.shape[1], rows="visual", grid=tuple(scores.shape))


class TestFasterVLM:
    HEADS = torch.tensor([[[0.05, 0.20, 0.10, 0.30, 0.15, 0.12], [0.25, 0.05, 0.10, 0.10, 0.20, 0.20]]])

    @pytest.mark.parametrize("keep, expected", [(1, [3]), (2, [3, 4]), (3, [3, 4, 5]), (4, [0, 3, 4, 5])])
    def test_heads_are_averaged(self, keep, expected):
        sets = token_sets(
            torch.randn(1, 6, 4), keep, attention={(SITE, "cls", "all", "heads"): self.HEADS}, facts=CLIP
        )
        assert kept("fastervlm", sets) == [expected]
        assert torch.allclose(
            sets.attention(SITE), torch.tensor([[0.150, 0.125, 0.100, 0.200, 0.175, 0.160]])
        )

    def test_patches_and_mask_are_permuted_together_and_budgets_are_nested(self):
        scores, order = torch.rand(30), torch.randperm(30)
        before = set()
        for keep in range(1, 31):
            found = set(kept("fastervlm", given(scores.tolist(), keep))[0])
            moved = kept("fastervlm", given(scores[order].tolist(), keep))[0]
            assert before < found and {int(order[i]) for i in moved} == found
            before = found

    def test_a_tower_without_cls_is_ranked_by_attention_received(self):
        sets = given([0.1, 0.4, 0.2, 0.3], 2, site="encoder:-1", rows="all", facts=PLAIN)
        assert kept("fastervlm", sets) == [[1, 3]]

    def test_it_reads_the_block_that_feeds_the_projector(self):
        (stage,) = make_method("fastervlm").stages(CLIP)
        assert stage.at == "input" and stage.records == ("encoder:-2",)


MID = [0.1, 0.2, 0.15, 0.9, 0.3, 0.05, 0.02, 0.01, 0.4, 0.11, 0.12, 0.13, 0.07, 0.06, 0.03, 0.04]
DEEP = [0.50, 0.10, 0.90, 0.95, 0.85, 0.20, 0.75, 0.99, 0.30, 0.80, 0.15, 0.25, 0.05, 0.35, 0.40, 0.45]


class TestHiPrune:
    def sets(self, keep, mid=MID, deep=DEEP, facts=CLIP, grid=None):
        maps = {("encoder:8", "all"): torch.tensor([mid]), ("encoder:-2", "all"): torch.tensor([deep])}
        return token_sets(torch.randn(1, len(mid), 4), keep, attention=maps, facts=facts, grid=grid)

    @pytest.mark.parametrize("edges", ["wrap", "clip"])
    def test_the_worked_example(self, edges):
        assert kept("hiprune", self.sets(8), alpha=0.6, edges=edges) == [[0, 2, 3, 4, 6, 7, 9, 15]]

    def test_edges_tell_when_the_wrapped_neighbour_is_not_wanted_anyway(self):
        """Token 4 wraps round from anchor 3; as a register it comes last."""
        deep = [*DEEP[:4], 0.0, *DEEP[5:]]
        assert 4 in kept("hiprune", self.sets(8, deep=deep), alpha=0.6, edges="wrap")[0]
        assert 4 not in kept("hiprune", self.sets(8, deep=deep), alpha=0.6, edges="clip")[0]

    @pytest.mark.parametrize("alpha", [0, 0.1, 0.5, 0.9, 1, 3, 5])
    @pytest.mark.parametrize("edges", ["wrap", "clip"])
    def test_the_budget_is_met_for_every_alpha_and_anchors_stay(self, alpha, edges):
        for keep in range(1, 17):
            found = kept("hiprune", self.sets(keep), alpha=alpha, edges=edges)[0]
            anchors = sorted(range(16), key=lambda i: -MID[i])[: round(keep * alpha / 5)]
            assert len(found) == keep and set(anchors) <= set(found)

    def test_without_anchors_the_deep_block_decides(self):
        assert kept("hiprune", self.sets(3), alpha=0) == [[2, 3, 7]]

    def test_with_the_deep_layer_as_middle_one_it_is_attention_received(self):
        assert make_method("hiprune", layer=23).sites(CLIP) == ("encoder:22", "encoder:-2")

    def test_layers_are_the_published_ones_counted_from_one_and_scale(self):
        assert make_method("hiprune").sites(CLIP) == ("encoder:8", "encoder:-2")
        assert make_method("hiprune").sites(PLAIN) == ("encoder:15", "encoder:-1")
        assert make_method("hiprune").sites(Facts(blocks=4, feature_block=-2, has_cls=True))[0] == "encoder:1"

    @pytest.mark.parametrize("keep, anchors", [(192, 4), (128, 3), (64, 1)])
    def test_published_anchor_counts(self, keep, anchors):
        """The first anchors are alone in the middle of a field; only their crosses can be told from registers."""
        mid = torch.zeros(576)
        mid[torch.tensor([100, 250, 400, 560, 30])] = torch.tensor([5.0, 4, 3, 2, 1])
        deep = torch.arange(576.0, 0, -1)
        found = set(kept("hiprune", self.sets(keep, mid.tolist(), deep.tolist(), grid=(24, 24)))[0])
        spots = [100, 250, 400, 560][:anchors]
        crosses = {p + step for p in spots for step in (0, 1, -1, 24, -24)} & set(range(576)) | (
            {575} if 560 in spots else set()
        )
        rest = [i for i in range(576) if i not in crosses][: keep - len(crosses)]
        assert found == crosses | set(rest)


class TestDivPrune:
    def test_the_worked_example_whatever_the_norms(self):
        for norms in (None, [1.0, 2, 1, 3, 1, 0.5]):
            sets = token_sets(circle([0, 10, 20, 90, 100, 200], norms), 4)
            assert kept("divprune", sets) == [[0, 2, 4, 5]]

    def test_exact_duplicates_are_never_chosen_twice(self):
        sets = token_sets(torch.ones(2, 9, 5), torch.tensor([4, 9]))
        assert [len(row) for row in kept("divprune", sets)] == [4, 9]

    def test_permuting_the_tokens_permutes_the_choice(self):
        x, order = torch.randn(1, 40, 8), torch.randperm(40)
        first = kept("divprune", token_sets(x, 11))[0]
        moved = kept("divprune", token_sets(x[:, order], 11))[0]
        assert sorted(int(order[i]) for i in moved) == first

    def test_published_cost_at_the_published_share(self):
        """Eleven prompts, 56 of 576 tokens left: mean 3.22796 and 0.51225 TFLOPs, mean ratio 15.6303 %."""
        from secateur.tokens.cost import layer_flops
        from secateur.tokens.counts import counts

        left = int(counts(torch.tensor([576]), 0.098))
        texts = (15, 15, 23, 83, 25, 113, 15, 39, 21, 91, 57)
        dense, pruned = (
            [32 * layer_flops(n + t, 4096, 11008, gated=False) / 1e12 for t in texts] for n in (576, left)
        )
        assert sum(dense) / 11 == pytest.approx(3.22796, abs=1e-5)
        assert sum(pruned) / 11 == pytest.approx(0.51225, abs=1e-5)
        assert sum(b / a for a, b in zip(dense, pruned)) / 11 == pytest.approx(0.156303, abs=1e-6)

    def test_newline_tokens_compete_and_an_image_is_one_set(self):
        cls = type(make_method("divprune"))
        assert cls.newlines == "compete" and cls.scope == "image"

    def test_its_smallest_distance_beats_random_choices(self):
        x = torch.randn(1, 60, 4)
        distance = cosine_distance(x)[0] + 9 * torch.eye(60)
        ours = kept("divprune", token_sets(x, 12))[0]
        least = distance[ours][:, ours].min()
        for seed in range(20):
            other = torch.randperm(60, generator=torch.Generator().manual_seed(seed))[:12]
            assert distance[other][:, other].min() < least


HOLO = circle([0, 5, 60, 120, 0, 0, 10, 90])
SEEN = [0.090, 0.100, 0.085, 0.095, 0.120, 0.110, 0.125, 0.130]


class TestHoloV:
    def test_variance_weights_and_scores_of_the_worked_example(self):
        from secateur.methods.holov import holistic
        from secateur.tokens.select import even_runs, quotas

        runs, sizes = even_runs(torch.ones(1, 8, dtype=torch.bool), 2)
        variance = make_method("holov").variance(directions(HOLO, eps=1e-6), runs, sizes)
        expected = [0.423955, 0.402520, 0.092912, 0.212971, 0.364802, 0.364802, 0.316349, 0.007818]
        assert torch.allclose(variance, torch.tensor([expected]), atol=2e-6)
        seen = torch.tensor([SEEN]) * 1000
        scores, weights = holistic(seen, variance, runs, sizes, beta=1.0, tau=1.0)
        expected = [228.53, 231.52, 115.36, 164.59, 287.90, 277.90, 270.60, 133.60]
        assert torch.allclose(scores, torch.tensor([expected]), atol=0.006)
        assert torch.allclose(weights, torch.tensor([[0.432749, 0.567251]]), atol=1e-6)
        assert quotas(weights, 4, sizes).tolist() == [[1, 3]]
        weights = holistic(seen, variance, runs, sizes, beta=0.09, tau=1.0)[1]
        assert torch.allclose(weights, torch.tensor([[0.432749, 0.567251]]), atol=1e-6)

    @pytest.mark.parametrize("compat, expected", [("code", [1, 4, 6, 7]), ("paper", [1, 4, 5, 6])])
    def test_the_worked_example(self, compat, expected):
        assert kept("holov", given(SEEN, 4, HOLO), crops=2, compat=compat) == [expected]

    def test_the_order_of_the_code(self):
        sets = given(SEEN, 4, HOLO)
        assert kept("holov", sets, crops=2, compat="code", order="official") == [[1, 7, 6, 4]]
        valid = torch.tensor([[True] * 8, [True] * 5 + [False] * 3])
        both = token_sets(
            HOLO.expand(2, -1, -1),
            torch.tensor([4, 2]),
            valid=valid,
            attention={(SITE, "cls"): torch.tensor([SEEN, SEEN])},
            facts=CLIP,
        )
        found = kept("holov", both, crops=2, compat="code", order="official")
        assert found == [[1, 7, 6, 4], [4, 3]]  # means .0917 and .1075 of 3 and 2: quotas 0 and 2

    @pytest.mark.parametrize("compat", ["code", "paper"])
    def test_what_a_full_run_cannot_take_goes_to_the_others(self, compat):
        features = torch.ones(1, 8, 3)
        scores = [0.001] * 4 + [0.24, 0.25, 0.25, 0.25]
        assert kept("holov", given(scores, 6, features), crops=2, compat=compat) == [[0, 1, 4, 5, 6, 7]]

    def test_one_run_ranked_by_attention_is_fastervlm(self):
        scores = torch.rand(50).tolist()
        for keep in (1, 13, 49):
            sets = given(scores, keep)
            assert kept("holov", sets, crops=1, compat="code") == kept("fastervlm", sets)

    def test_quotas_follow_mean_attention_whatever_the_variance(self):
        from secateur.methods.holov import holistic
        from secateur.tokens.select import even_runs

        runs, sizes = even_runs(torch.ones(1, 576, dtype=torch.bool), 16)
        seen, x = torch.rand(1, 576) * 1000, directions(torch.randn(1, 576, 8))
        variance = make_method("holov").variance(x, runs, sizes)
        mean = seen.reshape(1, 16, 36).mean(2)
        for beta in (0.09, 1.0, 3.0):
            weights = holistic(seen, variance, runs, sizes, beta, 1.0)[1]
            assert torch.allclose(weights, mean / mean.sum(), atol=1e-5)

    @pytest.mark.parametrize("n, crops", [(10, 3), (7, 7), (5, 16), (1, 16), (23, 22)])
    def test_uneven_runs_single_tokens_and_more_runs_than_tokens(self, n, crops):
        for keep in range(1, n + 1):
            found = kept("holov", given(torch.rand(n).tolist(), keep), crops=crops)[0]
            assert len(found) == keep

    def test_a_run_of_one_token_is_scored_like_the_others(self):
        """Without the factor it would starve: here its attention is the highest of all."""
        scores = [0.5, 0.1, 0.1, 0.1]
        assert 0 in kept("holov", given(scores, 1, torch.randn(1, 4, 3)), crops=4)[0]

    def test_the_scale_of_attention_does_not_matter(self):
        for compat in ("code", "paper"):
            base, scaled = (
                kept("holov", given([a * c for a in SEEN], 4, HOLO), crops=2, compat=compat)
                for c in (1, 0.37)
            )
            assert base == scaled

    def test_every_run_with_a_whole_share_keeps_a_token(self):
        scores = torch.rand(576) + 0.5
        found = torch.tensor(kept("holov", given(scores.tolist(), 64))[0]) // 36
        assert set(found.tolist()) == set(range(16))

    def test_the_number_of_runs_without_cls_follows_qwen(self):
        """int(1.778 * 100 / 20) = 8 runs of 12 or 13 tokens; all attention in one run of 12 fills it, no more."""
        scores = torch.zeros(100)
        scores[88:] = 1.0
        sets = given(
            scores.tolist(), 20, site="encoder:-1", rows="all", facts=PLAIN, features=torch.ones(1, 100, 2)
        )
        assert kept("holov", sets)[0][-12:] == list(range(88, 100))


TEXT = {"embeddings": torch.tensor([[[0.9, 0.1, 0.0, 0.2]]])}
LIKE = torch.tensor([[1, 0.8, 0.1, 0], [0.8, 1, 0.2, 0], [0.1, 0.2, 1, 0.3], [0, 0, 0.3, 1]])


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
        class Letters:
            """A token a word; in the middle of a text a word carries its blank."""

            table = {"user": 1, " is": 2, " the": 3, " cup": 4, " red": 5, "?": 6, "is": 7}  # noqa: RUF012

            def encode(self, text, add_special_tokens=True):
                return [self.table[text]] if text in self.table else [99]

            def decode(self, ids):
                back = {number: word for word, number in self.table.items()}
                return "".join(back[i] for i in ids)

        text = {"embeddings": torch.randn(1, 6, 8), "ids": torch.tensor([[1, 2, 3, 4, 5, 6]])}
        sets = token_sets(torch.randn(1, 4, 8), 2, text=text, facts=CLIP)
        assert question_tokens(sets)[1].all()
        for extra in ({}, {"question": "is the cup red?"}, {"question": ["is the cup red?"]}):
            sets.given = {"tokenizer": Letters(), **extra}
            expected = [0, 3, 4] if not extra else [3, 4]
            assert question_tokens(sets)[1][0].nonzero()[:, 0].tolist() == expected


class TestToDRE:
    FEATURES = circle([0, 10, 20, 90, 100, 200], [3.0, 1, 2, 1, 5, 1])

    def sets(self, pivot, keep=4, **more):
        scores = [0.1] * 6
        scores[pivot] = 0.5
        return given(scores, keep, self.FEATURES, site="encoder:-1", **more)

    @pytest.mark.parametrize("pivot, expected", [(0, [0, 1, 4, 5]), (3, [0, 1, 3, 5])])
    def test_the_worked_example_whatever_the_norms(self, pivot, expected):
        assert kept("todre", self.sets(pivot)) == [expected]

    def test_farthest_first_from_the_pivot(self):
        assert kept("todre", self.sets(0), criterion="k_center") == [[0, 2, 4, 5]]

    def test_the_pivot_is_sought_in_the_thumbnail_but_in_all_frames_of_a_video(self):
        crops = torch.tensor([[0, 0, 0, 1, 1, 1]])
        assert make_method("todre").pivot(self.sets(4, crop_of=crops)).tolist() == [0]
        video = Facts(layers=32, blocks=24, has_cls=True, video=True)
        assert make_method("todre").pivot(self.sets(4, crop_of=crops, facts=video)).tolist() == [4]

    def test_without_cls_the_pivot_is_drawn_and_kept(self):
        pivots = set()
        for seed in range(12):
            sets = token_sets(self.FEATURES, 1, facts=PLAIN, seed=seed)
            pivots.add(kept("todre", sets)[0][0])
        assert len(pivots) > 2

    def test_removal_of_the_worked_example(self):
        """Text rows give [.04 .06] and [.03 .02] to the two visual tokens: 0.075 in all."""
        mean = torch.tensor([[0.035, 0.04]])
        sets = token_sets(torch.randn(1, 2, 4), 2, attention={("layer:27", "text"): mean}, facts=CLIP)
        assert not make_method("todre").remove("layer:27", sets).any()
        for tau, stays in ((0.05, True), (0.0, True), (1.01, False)):
            assert bool(make_method("todre", tau=tau).remove("layer:27", sets).all()) == stays

    @pytest.mark.parametrize("layers, layer", [(32, 28), (28, 24)])
    def test_the_layer_of_the_removal(self, layers, layer):
        method = make_method("todre")
        stages = method.stages(Facts(layers=layers, blocks=24))
        assert [s.at for s in stages] == ["input", f"layer:{layer}"]
        assert stages[1].records == (f"layer:{layer - 1}",) and stages[1].scope == "row"
        assert len(make_method("todre", removal=False).stages(CLIP)) == 1


class TestFoPru:
    S = torch.tensor([[0.4, 0.3, 0.2, 0.1], [0.1, 0.6, 0.2, 0.1], [0.3, 0.4, 0.2, 0.1], [0.2, 0.5, 0.2, 0.1]])

    def test_the_axis_of_larger_variance(self):
        from secateur.methods.fopru import significance

        received, row = self.S.mean(0, keepdim=True), self.S.mean(1)[None]
        assert torch.allclose(received, torch.tensor([[0.25, 0.45, 0.20, 0.10]]))
        assert received.var().item() == pytest.approx(0.0216667, abs=1e-6)
        everything = torch.ones(1, 4, dtype=torch.bool)
        assert torch.equal(significance(received, row, everything), received)
        assert torch.equal(significance(row, received, everything), received)
        assert torch.equal(significance(received, received + 1, everything), received)

    def test_rank_and_row_of_the_worked_example(self):
        sets = given([0.25, 0.45, 0.20, 0.10], 2, rows="visual")
        assert kept("fopru", sets) == [[0, 1]]
        assert kept("fopru", sets, strategy="row") == [[0, 1]]

    def test_row_against_rank_on_three_by_three(self):
        scores = [0.30, 0.01, 0.02, 0.10, 0.12, 0.11, 0.05, 0.20, 0.02]
        assert kept("fopru", given(scores, 3, rows="visual")) == [[0, 4, 7]]
        for keep in (6, 7, 8):
            assert kept("fopru", given(scores, keep, rows="visual"), strategy="row") == [[0, 1, 2, 3, 4, 5]]
        assert len(kept("fopru", given(scores, 2, rows="visual"), strategy="row")[0]) == 3

    def test_logits_of_the_engines_own_example(self):
        heads = torch.tensor([[[-2.0, 5, 5], [-7, 3, 8], [-7, -7, -8]], [[6, 9, 8], [3, 10, 7], [2, 9, -9]]])
        q = heads[None] * 3**0.5
        k = torch.eye(3).expand(1, 2, 3, 3)
        sets = token_sets(torch.randn(1, 3, 4), 2, queries={SITE: q}, keys={SITE: k}, facts=CLIP, grid=(1, 3))
        received, row = make_method("fopru", scores="logits").candidates(sets)
        assert torch.allclose(row, torch.tensor([[5.166667, 4, -3.333333]]), atol=1e-5)
        assert torch.allclose(received, torch.tensor([[-0.833333, 4.833333, 1.833333]]), atol=1e-5)
        assert row.var().item() == pytest.approx(21.2315, abs=1e-3)
        assert received.var().item() == pytest.approx(8.0370, abs=1e-3)
        assert kept("fopru", sets, scores="logits") == [[0, 1]]

    def test_attention_given_leaves_out_what_goes_to_cls(self):
        q, k, cls = torch.randn(1, 2, 9, 4) * 3, torch.randn(1, 2, 9, 4), torch.randn(1, 2, 4) * 3
        full = (q @ torch.cat([cls[:, :, None], k], 2).mT / 2).softmax(-1)[..., 1:].mean(1)
        sets = token_sets(
            torch.randn(1, 9, 4),
            3,
            attention={(SITE, "visual"): full.mean(1)},
            queries={SITE: q},
            keys={SITE: k, (SITE, "cls"): cls},
            facts=CLIP,
        )
        received, row = make_method("fopru").candidates(sets)
        assert torch.allclose(row, full.mean(2), atol=1e-6) and torch.equal(received, full.mean(1))

    def test_rank_holds_at_least_the_significance_of_rows(self):
        for _ in range(5):
            scores = torch.rand(36)
            rank, row = (
                kept("fopru", given(scores.tolist(), 12, rows="visual"), strategy=s)[0]
                for s in ("rank", "row")
            )
            assert len(rank) == len(row) == 12 and scores[rank].sum() >= scores[row].sum()

    def test_permuting_rows_of_the_grid_permutes_the_rows_that_stay(self):
        scores, order = torch.rand(5, 4), torch.randperm(5)
        first = {i // 4 for i in kept("fopru", given_grid(scores), strategy="row")[0]}
        moved = {int(order[i // 4]) for i in kept("fopru", given_grid(scores[order]), strategy="row")[0]}
        assert moved == first and len(first) == 2

    def test_a_map_without_favourites_still_keeps_as_many(self):
        assert kept("fopru", given([0.25] * 4, 3, rows="visual")) == [[0, 1, 2]]


class TestBaselines:
    def test_random_draws_image_after_image_so_a_batch_is_its_images_in_turn(self):
        valid = torch.arange(30) < torch.tensor([30, 7, 19])[:, None]
        batch = token_sets(torch.randn(3, 30, 2), 5, valid=valid, seed=4)
        together = kept("random-tokens", batch)
        one = token_sets(torch.randn(1, 30, 2), 5, seed=4)
        singles = kept("random-tokens", one)
        for n in (7, 19):
            sets = token_sets(torch.randn(1, n, 2), 5)
            sets.generator = one.generator
            singles += kept("random-tokens", sets)
        assert together == singles and len({tuple(row) for row in together}) == 3

    def test_random_is_uniform(self):
        sets = token_sets(torch.randn(4000, 8, 1), 2)
        share = make_method("random-tokens").select(sets).float().mean(0)
        assert (share - 0.25).abs().max() < 0.03

    @pytest.mark.parametrize("height, width", [(24, 24), (3, 7), (1, 9), (16, 5)])
    def test_the_uniform_grid_keeps_exactly_the_target_and_covers_the_image(self, height, width):
        n = height * width
        for keep in {1, 2, 3, n // 4 or 1, n // 2, n - 1, n}:
            sets = token_sets(torch.randn(1, n, 2), keep, grid=(height, width))
            found = kept("uniform-grid", sets)[0]
            assert len(found) == len(set(found)) == keep
            if keep >= 4:
                centre = torch.tensor([[i // width, i % width] for i in found]).float().mean(0)
                middle = torch.tensor([(height - 1) / 2, (width - 1) / 2])
                assert ((centre - middle).abs() <= torch.tensor([height, width]) / 6 + 0.5).all()

    def test_a_quarter_of_an_even_grid_is_every_second_row_and_column(self):
        sets = token_sets(torch.randn(1, 576, 2), 144)
        assert kept("uniform-grid", sets)[0] == [r * 24 + c for r in range(1, 24, 2) for c in range(1, 24, 2)]

    def test_downsampling_to_a_quarter_is_two_by_two_average_pooling(self):
        x = torch.randn(2, 576, 3)
        found = make_method("downsample").select(token_sets(x, 144))
        pooled = torch.nn.functional.avg_pool2d(x.mT.reshape(2, 3, 24, 24), 2).flatten(2).mT
        assert torch.allclose(found.features, pooled, atol=1e-6)
        assert found.index[0, :3].tolist() == [0, 2, 4]

    @pytest.mark.parametrize(
        "height, width, keep", [(24, 24, 64), (27, 27, 182), (5, 3, 4), (1, 8, 3), (4, 4, 1)]
    )
    def test_downsampling_never_exceeds_the_target_and_averages_everything(self, height, width, keep):
        x = torch.randn(1, height * width, 2)
        found = make_method("downsample").select(token_sets(x, keep, grid=(height, width)))
        index = found.index[0].tolist()
        assert keep / 2 < len(index) <= keep and index == sorted(set(index))
        ones = make_method("downsample").select(token_sets(torch.ones_like(x), keep, grid=(height, width)))
        assert torch.allclose(ones.features, torch.ones_like(ones.features))

    def test_ragged_sets_are_pooled_each_by_itself(self):
        x = torch.randn(2, 16, 3)
        valid = torch.arange(16) < torch.tensor([16, 6])[:, None]
        row = torch.arange(16).expand(2, 16) // torch.tensor([[4], [3]])
        column = torch.arange(16).expand(2, 16) % torch.tensor([[4], [3]])
        sets = token_sets(
            x,
            torch.tensor([4, 2]),
            valid=valid,
            grid=torch.tensor([[4, 4], [2, 3]]),
            grid_row=row,
            grid_col=column,
        )
        found = make_method("downsample").select(sets)
        assert found.index[1].tolist()[2:] == [-1, -1]
        alone = token_sets(x[1:, :6], 2, grid=(2, 3))
        other = make_method("downsample").select(alone)
        assert torch.equal(found.index[1, :2], other.index[0])
        assert torch.allclose(found.features[1, :2], other.features[0])


def everything(n=16, sets=1, keep=4, dtype=torch.float32, facts=CLIP, valid=None):
    """Sets with all that any of these methods reads."""
    generator = torch.Generator().manual_seed(3)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    block = f"encoder:{facts.feature_block}"
    maps = {
        (site, rows): draw(sets, n).softmax(1)
        for site in (block, "encoder:8", "encoder:15", "encoder:-1")
        for rows in ("cls", "all", "visual")
    }
    if not facts.has_cls:
        maps = {key: value for key, value in maps.items() if key[1] != "cls"}
    return token_sets(
        draw(sets, n, 6).to(dtype),
        keep,
        attention=maps,
        hidden={block: draw(sets, n, 5).to(dtype)},
        queries={block: draw(sets, 2, n, 4)},
        keys={block: draw(sets, 2, n, 4)} | ({(block, "cls"): draw(sets, 2, 4)} if facts.has_cls else {}),
        text={"embeddings": draw(sets, 3, 6)},
        facts=facts,
        valid=valid,
    )


ALL = [
    "fastervlm",
    "hiprune",
    "divprune",
    "holov",
    "mmtok",
    "todre",
    "fopru",
    "random-tokens",
    "uniform-grid",
    "downsample",
]


@pytest.mark.parametrize("facts", [CLIP, PLAIN], ids=["cls", "no-cls"])
@pytest.mark.parametrize("method", ALL)
def test_every_count_is_met_and_padding_never_chosen(method, facts):
    valid = torch.arange(16) < torch.tensor([16, 9, 4])[:, None]
    for keep in (1, 3, 4):
        found = kept(method, everything(sets=3, keep=keep, facts=facts, valid=valid))
        for row, count in zip(found, (16, 9, 4)):
            assert max(row) < count
            assert len(row) == keep if method != "downsample" else keep / 2 < len(row) <= keep


@pytest.mark.parametrize("method", ALL)
def test_all_that_there_are_stay_when_as_many_may(method):
    assert kept(method, everything(keep=16)) == [list(range(16))]


@pytest.mark.parametrize("method", ALL)
def test_half_precision_features(method):
    assert len(kept(method, everything(dtype=torch.bfloat16))[0]) == 4


@pytest.mark.parametrize("method", ["divprune", "holov", "mmtok", "todre"])
def test_features_that_are_not_numbers_are_named(method):
    sets = everything()
    sets.features[0, 3, 1] = torch.nan
    with pytest.raises(SecateurError, match="aren't finite"):
        kept(method, sets)


@pytest.mark.parametrize("method", ["fastervlm", "hiprune", "fopru"])
def test_attention_that_is_not_a_number_is_named(method):
    sets = everything()
    for scores in sets.source.maps.values():
        scores[0, 3] = torch.nan
    with pytest.raises(SecateurError, match="isn't a number"):
        kept(method, sets)


@pytest.fixture(scope="module")
def llava():
    """A tiny random LLaVA (CLIP tower of 4 blocks, 16 patches an image), three images in two rows, and its attention maps."""
    import transformers as tf

    torch.manual_seed(0)
    vision = tf.CLIPVisionConfig(
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=16,
        patch_size=4,
    )
    text = tf.LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=100,
        tie_word_embeddings=False,
    )
    config = tf.LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=5,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
    )
    model = tf.LlavaForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.normal_(0, 0.5)
    ids = torch.tensor([[1, 5, *[5] * 15, *[5] * 16, 30, 31, 32], [0] * 16 + [1, 5, *[5] * 15, 40, 41, 42]])
    inputs = {
        "input_ids": ids,
        "attention_mask": (ids != 0).long(),
        "pixel_values": torch.randn(3, 3, 16, 16),
    }
    tower = model.model.vision_tower
    tower.set_attn_implementation("eager")
    with torch.no_grad():
        seen = tower(inputs["pixel_values"], output_attentions=True, output_hidden_states=True)
    tower.set_attn_implementation("sdpa")
    return model, inputs, seen


def through(llava, method, keep, **settings):
    """Kept patches of each of the three images, as the model ran."""
    import secateur

    model, inputs, _ = llava
    with torch.no_grad(), secateur.attach(model, method, target=f"tokens={keep}", **settings) as attached:
        model(**inputs)
    first, second = (row.tolist() for row in attached.kept["input"])
    return [[i for i in first if i < 16], [i - 16 for i in first if i >= 16], second]


def best(scores, keep):
    return [sorted(sorted(range(len(row)), key=lambda i: -row[i])[:keep]) for row in scores.tolist()]


class TestThroughAModel:
    """What is chosen while the model runs, against the model's own attention maps (eager) and states."""

    def test_fastervlm_takes_the_cls_row_of_the_block_before_the_last(self, llava):
        maps = llava[2].attentions[-2]
        assert through(llava, "fastervlm", 5) == best(maps[:, :, 0, 1:].mean(1), 5)
        assert best(maps[:, :, 1:, 0].mean(1), 5) != best(maps[:, :, 0, 1:].mean(1), 5)

    def test_hiprune_without_anchors_takes_attention_received_from_all_queries(self, llava):
        maps = llava[2].attentions[-2].mean((1, 2))[:, 1:]
        assert through(llava, "hiprune", 5, alpha=0.0) == best(maps, 5)

    def test_hiprune_anchors_come_from_the_layer_counted_from_one(self, llava):
        maps = llava[2].attentions[0].mean((1, 2))[:, 1:]
        found = through(llava, "hiprune", 6, alpha=1.0, layer=1)
        for kept_, anchor in zip(found, maps.argmax(1).tolist()):
            cross = {anchor, anchor - 1, anchor + 1, anchor - 4, anchor + 4}
            assert {min(max(i, 0), 15) for i in cross} <= set(kept_)

    def test_divprune_spreads_the_projected_features(self, llava):
        model, inputs, _ = llava
        with torch.no_grad():
            features = model.get_image_features(inputs["pixel_values"], return_dict=True).pooler_output
        expected = []
        for x in features:
            x = torch.nn.functional.normalize(x.double(), dim=-1)
            distance = (1 - x @ x.T).fill_diagonal_(torch.inf)
            chosen = [int(distance.amin(0).argmax())]
            while len(chosen) < 5:
                near = distance[chosen].amin(0)
                near[chosen] = -1
                chosen.append(int(near.argmax()))
            expected.append(sorted(chosen))
        assert through(llava, "divprune", 5) == expected

    def test_fopru_compares_attention_received_and_given_without_cls(self, llava):
        maps = llava[2].attentions[-2].mean(1)[:, 1:, 1:]
        received, given_ = maps.mean(1), maps.mean(2)
        scores = torch.where((given_.var(1) > received.var(1))[:, None], given_, received)
        assert through(llava, "fopru", 5) == best(scores, 5)
        logits = through(llava, "fopru", 5, scores="logits")
        assert all(len(row) == 5 for row in logits)

    def test_mmtok_covers_the_question_after_the_image_and_the_patches_before_the_projector(self, llava):
        model, inputs, seen = llava
        with torch.no_grad():
            features = model.get_image_features(inputs["pixel_values"], return_dict=True).pooler_output
            questions = [model.get_input_embeddings()(torch.tensor(q)) for q in ([30, 31, 32], [40, 41, 42])]
        found = through(llava, "mmtok", 5)
        for i, text in enumerate((questions[0], questions[0], questions[1])):
            t, v, h = (
                torch.nn.functional.normalize(x.double(), dim=-1)
                for x in (text, features[i], seen.hidden_states[-2][i, 1:])
            )
            table = torch.cat(
                [(t @ v.T / 0.02).softmax(1) / len(t), 0.5 * (h @ h.T / 0.2).softmax(1) / len(h)]
            )
            covered, chosen = torch.zeros(len(table), dtype=torch.float64), []
            for _ in range(5):
                gain = (table - covered[:, None]).clamp(min=0).sum(0)
                gain[chosen] = -1
                chosen.append(int(gain.argmax()))
                covered = torch.maximum(covered, table[:, chosen[-1]])
            assert found[i] == sorted(chosen)

    def test_holov_divides_the_budget_by_cls_attention(self, llava):
        maps = llava[2].attentions[-2][:, :, 0, 1:].mean(1)
        found = through(llava, "holov", 8, crops=4)
        for row, attention in zip(found, maps):
            share = attention.reshape(4, 4).mean(1)
            share = share / share.sum() * 8
            if share.max() <= 4:
                counts = torch.bincount(torch.tensor(row) // 4, minlength=4)
                assert ((counts - share).abs() < 1).all()

    def test_todre_starts_from_the_token_cls_attends_to_in_the_last_block(self, llava):
        pivots = llava[2].attentions[-1][:, :, 0, 1:].mean(1).argmax(1).tolist()
        assert through(llava, "todre", 1) == [[p] for p in pivots]

    @pytest.mark.parametrize(("tau", "left"), [(0.0, [10, 5]), (1.01, [0, 0])])
    def test_todre_takes_all_visual_tokens_out_at_the_deep_layer_or_none(self, llava, tau, left):
        import secateur

        model, inputs, _ = llava
        with secateur.attach(model, "todre", target="tokens=5", tau=tau) as attached:
            out = model.generate(**inputs, max_new_tokens=3, do_sample=False, suppress_tokens=[5])
        assert [len(row) for row in attached.kept["layer:3"]] == left
        assert out.shape == (2, inputs["input_ids"].shape[1] + 3)

    def test_todre_at_everything_removes_nothing_even_deep_in_the_model(self, llava):
        import secateur

        model, inputs, _ = llava
        with torch.no_grad():
            before = model(**inputs).logits
            with secateur.attach(model, "todre", target="100%", tau=1.01):
                assert torch.equal(model(**inputs).logits, before)

    def test_layers_after_the_removal_see_the_text_alone(self, llava):
        """What enters layer 3 without the removal, its text rows alone through that layer at their own positions."""
        import secateur

        model, inputs, _ = llava
        row = {key: value[:1] for key, value in inputs.items()} | {"pixel_values": inputs["pixel_values"][:2]}
        decoder, seen = model.model.language_model, {}

        def note(module, args, kwargs):
            seen["states"], seen["positions"] = args[0], kwargs["position_ids"]

        hook = decoder.layers[3].register_forward_pre_hook(note, with_kwargs=True)
        with torch.no_grad(), secateur.attach(model, "todre", target="tokens=5", removal=False) as attached:
            model(**row)
        hook.remove()
        text = row["input_ids"][0, attached.columns[0]] != 5
        states, positions = seen["states"][:, text], seen["positions"][:, text]
        with torch.no_grad():
            angles = decoder.rotary_emb(states, positions)
            mask = torch.ones(states.shape[1], states.shape[1]).tril().bool()[None, None]
            out = decoder.layers[3](states, attention_mask=mask, position_embeddings=angles)
            expected = model.lm_head(decoder.norm(out[0] if isinstance(out, tuple) else out))
            with secateur.attach(model, "todre", target="tokens=5", tau=1.01):
                found = model(**row).logits
        assert found.shape == expected.shape and torch.allclose(found, expected, atol=1e-5)
