import torch

from secateur.tokens.reduce import (
    best_of_cell,
    in_order,
    match_pairs,
    merge_nearest,
    pour,
    recycle_cells,
    weighted_sum,
    with_token,
)


def one(*rows):
    return torch.tensor([list(rows)], dtype=torch.float32)


def test_contextual_merge_of_visiondrop():
    """Spec: visiondrop, toy (a)."""
    metric = one([1, 0], [1, 1], [0.9, 0.1], [0, 1], [0.1, 1], [1, 0.05])
    features = one([1, 0], [2, 2], [3, 0], [4, 4], [0, 5], [6, 1])
    pool = torch.tensor([[True, False, True, False, True, True]])
    targets, merged = merge_nearest(features, metric, pool, 2)
    assert targets[0].nonzero().squeeze(1).tolist() == [0, 4]
    torch.testing.assert_close(merged[0, [0, 4]], torch.tensor([[5.5, 0.5], [0.0, 5.0]]))
    assert torch.equal(merged[0, [1, 3]], features[0, [1, 3]])


def test_merging_copies_doubles_and_no_target_changes_nothing():
    features = torch.ones(1, 4, 3)
    pool = torch.ones(1, 4, dtype=torch.bool)
    targets, merged = merge_nearest(features, features, pool, 1)
    assert targets[0].tolist() == [True, False, False, False]
    assert torch.equal(merged[0, 0], torch.full((3,), 2.0))
    targets, merged = merge_nearest(features, features, pool, 0)
    assert not targets.any() and torch.equal(merged, features)


def test_more_targets_than_tokens():
    features = torch.randn(1, 3, 2)
    targets, merged = merge_nearest(features, features, torch.tensor([[True, True, False]]), 5)
    assert targets[0].tolist() == [True, True, False] and torch.equal(merged, features)


def test_recycling_of_vflowopt():
    """Spec: vflowopt, toy (a): a 4x4 grid, features are the positions."""
    importance = torch.tensor(
        [[0.9, 0.1, 0.2, 0.8, 0.05, 0.15, 0.25, 0.1, 0.3, 0.02, 0.7, 0.1, 0.04, 0.06, 0.5, 0.12]]
    )
    features = torch.arange(16.0)[None, :, None]
    low = torch.zeros(1, 16, dtype=torch.bool)
    low[0, [1, 2, 4, 5, 6, 7, 8, 9, 11, 12, 13, 15]] = True
    place = torch.arange(16)[None]
    cells = place // 4 // 2 * 2 + place % 4 // 2
    kept, merged = recycle_cells(features, importance, cells, low)
    assert kept[0].nonzero().squeeze(1).tolist() == [5, 6, 8, 15]
    expected = torch.tensor([3.5, 4.727273, 9.142857, 13.181818])
    torch.testing.assert_close(merged[0, [5, 6, 8, 15], 0], expected)
    stay = kept | ~low
    assert stay[0].nonzero().squeeze(1).tolist() == [0, 3, 5, 6, 8, 10, 14, 15]


def test_a_cell_without_weight_gives_the_plain_mean_and_ties_go_to_the_first():
    features = torch.tensor([[[1.0], [3.0]]])
    both = torch.ones(1, 2, dtype=torch.bool)
    kept, merged = recycle_cells(features, torch.zeros(1, 2), torch.zeros(1, 2, dtype=torch.long), both)
    assert kept[0].tolist() == [True, False] and merged[0, 0].item() == 2.0
    best, home = best_of_cell(torch.ones(1, 3), torch.tensor([[0, 1, 1]]), torch.ones(1, 3, dtype=torch.bool))
    assert best[0].tolist() == [True, True, False] and home[0].tolist() == [0, 1, 1]


def test_weighted_sum():
    """Spec: recoverable-compression, toy (a), the remainder."""
    x, v = torch.tensor([[[1.0, 0], [0, 1], [2, 2]]]), torch.tensor([[0.3, 0.1, 0.05]])
    who = torch.tensor([[False, True, True]])
    torch.testing.assert_close(weighted_sum(x, v, who), torch.tensor([[0.1, 0.2]]))


def test_pairs_are_the_closest_across_the_two_halves():
    metric = one([1, 0], [0, 1], [0, 1], [1, 0.1], [1, 1], [0.5, 0.5])
    sources, into, _ = match_pairs(metric, torch.ones(1, 6, dtype=torch.bool), 2)
    # even places 0, 2, 4 -> their nearest odd place: 0 -> 3 (.995), 2 -> 1 (1), 4 -> 5 (1)
    assert sources[0].nonzero().squeeze(1).tolist() == [2, 4]
    assert into[0, [2, 4]].tolist() == [1, 5]


def test_padding_takes_no_part_in_matching():
    metric = torch.randn(1, 6, 4, generator=torch.Generator().manual_seed(0))
    valid = torch.tensor([[True] * 4 + [False] * 2])
    sources, into, _ = match_pairs(metric, valid, 3)
    alone, target, _ = match_pairs(metric[:, :4], valid[:, :4], 3)
    assert torch.equal(sources[:, :4], alone) and sources.sum() == 2 and not sources[0, 4:].any()
    assert torch.equal(into[:, :4][alone], target[alone])


def test_groups_of_unequal_size_one_after_the_other_and_a_token_for_what_leaves():
    features = torch.arange(1.0, 13).reshape(2, 6, 1)
    masks = torch.tensor(
        [[[0, 1, 0, 0, 0, 1], [0, 0, 0, 1, 0, 0]], [[1, 0, 0, 1, 0, 0], [0, 0, 0, 0, 0, 0]]], dtype=torch.bool
    )
    kept = in_order(list(masks), features)
    assert kept.index.tolist() == [[1, 5, 0, 3], [3, -1, -1, -1]]
    assert kept.features[..., 0].tolist() == [[2, 6, 1, 4], [10, 0, 0, 0]]
    free = torch.tensor([[0, 0, 1, 0, 1, 0], [1, 1, 1, 0, 1, 1]]).bool()
    token = torch.tensor([[50.0], [60.0]])
    after = with_token(kept, token, free)
    assert after.index.tolist() == [[1, 5, 0, 3, 2], [3, 0, -1, -1, -1]]
    assert after.features[..., 0].tolist() == [[2, 6, 1, 4, 50], [10, 60, 0, 0, 0]]
    before = with_token(kept, token, free, first=True)
    assert before.index.tolist() == [[2, 1, 5, 0, 3], [0, 3, -1, -1, -1]]
    assert before.features[..., 0].tolist() == [[50, 2, 6, 1, 4], [60, 10, 0, 0, 0]]
    nothing = with_token(kept, token, torch.zeros_like(free))
    assert nothing.index.tolist() == kept.index.tolist()


def test_what_is_poured_is_multiplied_by_its_weight():
    sums, mass = pour(
        torch.tensor([[[1.0], [2.0], [5.0], [7.0]]]),
        torch.tensor([[3, 3, 0, 1]]),
        torch.tensor([[True, True, True, False]]),
        torch.tensor([[0.5, 4.0, 2.0, 9.0]]),
    )
    assert sums[0, :, 0].tolist() == [10, 0, 0, 8.5] and mass[0].tolist() == [2, 0, 0, 4.5]
