"""Tokens that are alive: gathered and masked passes, ragged batches, the canvas, and blocks of other libraries."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from secateur import SecateurError
from secateur.measure import macs
from secateur.skipping.alive import additive, advance, gather_columns, pack, put_columns, write
from secateur.skipping.attached import Skipping, attached_to
from secateur.skipping.blocks import skip_blocks
from secateur.skipping.work import Work, block_macs


class Block(nn.Module):
    def __init__(self, width=16, heads=2):
        super().__init__()
        self.heads, self.norm = heads, nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x, attn_mask=None):
        q, k, v = self.qkv(self.norm(x)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask)
        return x + self.out(mixed.transpose(1, 2).flatten(2))


class Unmasked(Block):
    def forward(self, x):
        return super().forward(x)


class Stack(nn.Module):
    def __init__(self, kind=Block):
        super().__init__()
        self.blocks = nn.ModuleList(kind() for _ in range(3))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


@pytest.fixture
def block():
    torch.manual_seed(0)
    module = Block().eval()
    return lambda x, keys: module(x, None if keys is None else additive(keys, x.dtype))


ALIVE = torch.tensor([[1, 1, 0, 1, 0, 0], [0, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0]]).bool()


def states(count=3):
    return torch.randn(count, 6, 16, generator=torch.Generator().manual_seed(2))


@torch.no_grad()
@pytest.mark.parametrize("masked", [False, True])
def test_a_block_runs_on_the_living_alone_whatever_the_batch(block, masked) -> None:
    """Each picture against the block run on its living tokens by hand; the dead stay bit for bit, also where all are dead."""
    x = states()
    made = advance(block, x, ALIVE, masked)
    for row, alive in enumerate(ALIVE):
        assert torch.equal(made[row, ~alive], x[row, ~alive])
        if alive.any():
            torch.testing.assert_close(
                made[row, alive], block(x[row, alive][None], None)[0], rtol=1e-5, atol=1e-5
            )


def test_all_alive_is_the_block_bit_for_bit(block) -> None:
    everything = torch.ones(3, 6, dtype=torch.bool)
    assert torch.equal(advance(block, states(), everything), block(states(), None))
    assert torch.equal(advance(block, states(), everything, masked=True), block(states(), None))


@pytest.mark.parametrize("masked", [False, True])
def test_gradients_are_finite_and_reach_the_living(block, masked) -> None:
    """A picture of which nothing is alive would be a softmax over nothing."""
    x = states().requires_grad_()
    advance(block, x, ALIVE, masked).square().sum().backward()
    assert torch.isfinite(x.grad).all()
    assert (x.grad[0, 0] != 2 * x.detach()[0, 0]).any()
    torch.testing.assert_close(x.grad[2], 2 * x.detach()[2])


def test_gather_and_put_are_inverse() -> None:
    x = states()
    index, valid = pack(ALIVE, right=True)
    assert index.tolist() == [[0, 1, 3, 0, 0], [1, 2, 3, 4, 5], [0, 0, 0, 0, 0]]
    assert torch.equal(put_columns(x, gather_columns(x, index), index, valid), x)
    assert torch.equal(put_columns(x, gather_columns(x, index) + 1, index, valid), x + ALIVE[..., None])


def test_the_canvas_keeps_what_is_finished() -> None:
    first = write(torch.zeros(3, 6, 2), torch.ones(3, 6, 2), torch.ones(3, 6, dtype=torch.bool))
    second = write(first, torch.full((3, 6, 2), 2.0), ALIVE)
    assert torch.equal(second[..., 0], 1.0 + ALIVE)


@pytest.mark.parametrize("alive", [torch.ones(3, 6), torch.ones(3, 5, dtype=torch.bool)])
def test_a_mask_of_another_kind_or_size_is_refused(block, alive) -> None:
    with pytest.raises(SecateurError, match=r"the states are \[3, 6, 16\].*give bool \[3, 6\]"):
        advance(block, states(), alive)
    with pytest.raises(SecateurError, match="alive is"):
        write(states(), states(), alive)


def dropping(number, x, alive):
    """After block 0 the places of ALIVE stay, after block 1 the first of them."""
    return ALIVE[: len(x)] if number == 0 else alive & (alive.cumsum(1) <= 2)


@torch.no_grad()
@pytest.mark.parametrize("kind", [Block, Unmasked])
@pytest.mark.parametrize("masked", [False, True])
def test_blocks_of_a_model_run_on_what_is_alive(kind, masked) -> None:
    """Blocks that take no mask run picture by picture. The reference runs each block on indexed tokens."""
    torch.manual_seed(1)
    model, x = Stack(kind).eval(), states()
    dense = model(x)
    attached = Skipping(model, "mine")
    skip_blocks(attached, model.blocks, dropping, prefix=1, masked=masked)
    assert attached_to(model) is attached
    made = model(x)
    for row in range(3):
        want, alive = x[row], torch.ones(6, dtype=torch.bool)
        for number, block in enumerate(model.blocks):
            want = want.clone()
            want[alive] = kind.forward(block, want[alive][None])[0]
            alive = alive & dropping(number, x, alive[None].expand(3, -1) if number else None)[row]
            alive[0] = True
        torch.testing.assert_close(made[row], want, rtol=1e-5, atol=1e-5)
    attached.detach()
    attached.detach()
    assert attached_to(model) is None and torch.equal(model(x), dense)
    assert all("forward" not in vars(block) for block in model.blocks)


@torch.no_grad()
def test_work_is_what_the_forward_really_multiplies() -> None:
    """For each picture alone, what is counted by what was alive equals what the counter of operations sees."""
    torch.manual_seed(1)
    model, x = Stack().eval(), states()
    dense = macs(model, x[:1])
    with Skipping(model, "mine") as attached:
        skip_blocks(attached, model.blocks, dropping, prefix=1)
        model(x)
        together = attached.work.done.tolist()
        assert attached.work.whole.tolist() == [dense] * 3
        assert macs(model, x[:1]) == together[0] < dense
    counts = torch.tensor([6, 3, 2])
    assert together[0] == int(block_macs(model.blocks[0], counts, 16).sum())


@torch.no_grad()
def test_a_block_of_torch_s_own_attention_counts_its_fused_matrix() -> None:
    block = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
    assert int(block_macs(block, torch.tensor([6]), 16)) == macs(block, states(1))


def test_work_adds_up_picture_by_picture() -> None:
    work = Work()
    for done in ([1, 2], [3, 4]):
        work.add(torch.tensor(done), torch.tensor([4, 4]))
    assert work.share.tolist() == [0.5, 0.75]


def test_two_things_on_one_model_and_blocks_with_masks_are_refused() -> None:
    model = Stack()
    with Skipping(model, "mine") as attached:
        with pytest.raises(SecateurError, match="mine is attached to this model already"):
            Skipping(model, "yours")
        skip_blocks(attached, model.blocks, dropping)
        with pytest.raises(SecateurError, match="given attn_mask"):
            model.blocks[0](states(), attn_mask=torch.zeros(6, 6))
    Skipping(model, "yours").detach()
