"""The worked examples and invariants of fastervlm."""

import pytest
import torch
from token_examples import CLIP, PLAIN, SITE, given, kept

from secateur.method import make_method
from secateur.testing import token_sets


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
