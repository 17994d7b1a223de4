"""The worked examples and invariants of todre."""

import pytest
import torch
from token_examples import CLIP, PLAIN, circle, given, kept

from secateur.families.vlm import Facts
from secateur.method import make_method
from secateur.testing import token_sets


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
