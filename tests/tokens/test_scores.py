"""Attention statistics against the full matrix, written out."""

import pytest
import torch

from secateur.tokens.scores import attention_rows, entropy, given_attention, received_attention


def full(q, k, mask=None, over=None, causal=False, scale=None):
    """[B, H, R, L] softmax probabilities the long way, in float64."""
    q, k = q.double(), k.double().repeat_interleave(q.shape[1] // k.shape[1], 1)
    logits = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    rows, length = logits.shape[-2:]
    if mask is not None:
        logits = logits.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else logits + mask
    if causal:
        seen = torch.ones(rows, length, dtype=torch.bool).tril(length - rows)
        logits = logits.masked_fill(~seen, -torch.inf)
    if over is not None:
        logits = logits.masked_fill(~over[:, None, None], -torch.inf)
    return logits.softmax(-1).nan_to_num()


@pytest.fixture
def qk():
    return torch.randn(2, 6, 37, 8), torch.randn(2, 3, 37, 8)


def near(found, expected, tolerance=1e-6):
    assert found.dtype == torch.float32
    assert torch.allclose(found.double(), expected, atol=tolerance)


@pytest.mark.parametrize("rows", [1, 5, 16, 128])
@pytest.mark.parametrize("causal", [False, True])
def test_received_is_the_mean_over_all_rows_whatever_the_chunk(qk, rows, causal):
    expected = full(*qk, causal=causal)
    near(received_attention(*qk, causal=causal, rows=rows), expected.mean((1, 2)))
    near(received_attention(*qk, causal=causal, rows=rows, heads=True), expected.mean(2))


def test_one_row_is_the_row_and_not_the_column(qk):
    q, k = qk
    near(attention_rows(q[:, :, :1], k), full(q, k)[:, :, 0].mean(1))
    assert not torch.allclose(attention_rows(q[:, :, :1], k).double(), full(q, k)[..., 0].mean(1), atol=1e-3)


def test_query_heads_share_key_heads_as_in_the_models():
    """Heads 0, 1 read key head 0, heads 2, 3 key head 1: seen in a case where each key head has its own favourite."""
    q, k = torch.ones(1, 4, 1, 1) * 200, torch.tensor([[[[1.0], [0.0]], [[0.0], [1.0]]]])
    assert attention_rows(q, k, heads=True, scale=1.0)[0].tolist() == [[1, 0], [1, 0], [0, 1], [0, 1]]


def test_weights_are_a_weighted_sum(qk):
    q, k = qk
    weights = torch.rand(2, 37)
    weights[:, 10:20] = 0
    expected = torch.einsum("br,bhrl->bl", weights.double(), full(q, k)) / 6
    near(received_attention(q, k, weights, rows=5), expected, 1e-5)
    near(attention_rows(q, k, weights), expected, 1e-5)


def test_masks_boolean_and_additive(qk):
    q, k = qk
    mask = torch.rand(2, 1, 37, 37) > 0.3
    mask |= torch.eye(37, dtype=torch.bool)
    expected = full(q, k, mask).mean((1, 2))
    added = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    for given in (mask, added):
        near(received_attention(q, k, mask=given, rows=8), expected)
        near(attention_rows(q, k, mask=given), expected)
    keys_alone = torch.rand(2, 1, 1, 37) > 0.5
    near(received_attention(q, k, mask=keys_alone, rows=8), full(q, k, keys_alone).mean((1, 2)))
    both = full(q, k, keys_alone & torch.ones(37, 37, dtype=torch.bool), causal=True).mean((1, 2))
    near(received_attention(q, k, mask=keys_alone, causal=True, rows=8), both)


def test_softmax_over_some_keys_gives_the_others_nothing(qk):
    q, k = qk
    over = torch.rand(2, 37) > 0.5
    found = received_attention(q, k, over=over, rows=8)
    near(found, full(q, k, over=over).mean((1, 2)))
    assert not found[~over].any() and torch.allclose(found.sum(1), torch.ones(2))


def test_a_row_that_sees_nothing_gives_zeros_not_nan():
    q, k = torch.randn(1, 2, 3, 4), torch.randn(1, 2, 5, 4)
    mask = torch.ones(1, 1, 3, 5, dtype=torch.bool)
    mask[0, 0, 1] = False
    near(attention_rows(q, k, mask=mask), full(q, k, mask).mean((1, 2)))


def test_later_rows_of_a_longer_sequence_see_their_past():
    q, k = torch.randn(1, 2, 4, 8), torch.randn(1, 2, 9, 8)
    near(received_attention(q, k, causal=True, rows=3), full(q, k, causal=True).mean((1, 2)))


def test_what_rows_give_to_some_keys(qk):
    q, k = qk
    to = torch.rand(2, 37) > 0.5
    near(given_attention(q, k, to, rows=8), (full(q, k) * to[:, None, None]).sum(-1).mean(1))


def test_half_precision_is_computed_in_float32(qk):
    q, k = (part.bfloat16() for part in qk)
    near(received_attention(q, k), full(q, k).mean((1, 2)))


def test_large_logits_do_not_overflow():
    q, k = torch.full((1, 1, 1, 4), 1e4), torch.full((1, 1, 3, 4), 1e4)
    assert torch.allclose(attention_rows(q, k), torch.full((1, 3), 1 / 3))


def test_received_attention_and_the_cls_share_sum_to_one(qk):
    assert torch.allclose(received_attention(*qk).sum(1), torch.ones(2))


def test_entropy_of_known_distributions():
    found = entropy(
        torch.tensor([[1.0, 1, 1, 1], [5, 0, 0, 0], [1, 1, 7, 9]]),
        torch.tensor([[True, True, True, True]] * 2 + [[True, True, False, False]]),
    )
    assert torch.allclose(found.exp(), torch.tensor([4.0, 1.0, 2.0], dtype=torch.float64))
