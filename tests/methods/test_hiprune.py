"""The worked examples and invariants of hiprune."""

import pytest
import torch
from token_examples import CLIP, PLAIN, kept

from secateur.families.vlm import Facts
from secateur.method import make_method
from secateur.testing import token_sets

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
