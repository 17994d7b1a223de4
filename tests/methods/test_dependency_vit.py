"""Reversed attention, what leaves, and the dependency tree; numbers of the sheet, or by hand."""

import pytest
import torch

import secateur
from secateur import SecateurError
from secateur.families.reversed_vit import Messages, ReversedVit, forward_attention, reversed_attention
from secateur.methods.dependency_tree import DependencyTree, hanging, parents_of
from secateur.methods.dependency_vit import DependencyVit, stage_counts

LOGITS = torch.tensor([[0.0, 1, 2], [1, 0, 3], [0, 0, 4]])
V = torch.tensor([[1.0, 0], [0, 1], [1, 1]])


def example(alive=None):
    """q, k such that q k^T / sqrt(d) are the logits."""
    q, k = LOGITS[None, None] * 3**0.5, torch.eye(3)[None, None]
    return q, k, torch.nn.functional.pad(V, (0, 1))[None, None], alive


def test_the_worked_example_of_reversed_attention() -> None:
    q, k, v, _ = example()
    wanted = [[0.0900, 0.2447, 0.6652], [0.1142, 0.0420, 0.8438], [0.0177, 0.0177, 0.9647]]
    torch.testing.assert_close(forward_attention(q, k)[0, 0], torch.tensor(wanted), rtol=0, atol=6e-5)
    heads, message = torch.tensor([[[0.9], [0.5], [0.2]]]), torch.tensor([[0.8, 0.9, 0.1]])
    out, received = reversed_attention(q, k, v, heads, message)
    wanted = torch.tensor([[0.0652, 0.0517], [0.1766, 0.0193], [0.4983, 0.3990]])
    torch.testing.assert_close(out[0, 0, :, :2], wanted, rtol=0, atol=6e-5)
    torch.testing.assert_close(received[0], torch.tensor([0.1166, 0.1955, 0.8780]), rtol=0, atol=6e-5)
    # A^R itself: what arrives of values that are unit vectors
    sent, _ = reversed_attention(q, k, torch.eye(3)[None, None], heads, message)
    torch.testing.assert_close(sent[0, 0].sum(0), torch.tensor([0.72, 0.45, 0.02]))
    torch.testing.assert_close(sent[0, 0, 2], torch.tensor([0.4790, 0.3797, 0.0193]), rtol=0, atol=6e-5)


def test_the_worked_example_of_the_selector() -> None:
    given = torch.tensor([[0.2, 0.1, 0], [0.3, 0.5, 0.1]])
    net = ReversedVit(image=2, patch=1, channels=1, width=3, depth=1, heads=3).blocks[0].attention
    with torch.no_grad():
        net.selector.weight.copy_(torch.eye(3))
        made = net.chosen(given[None])
    wanted = torch.tensor([[0.6652, 0.2447, 0.0900], [0.1173, 0.8668, 0.0159]])
    torch.testing.assert_close(made[0], wanted, rtol=0, atol=6e-5)


def test_the_worked_counts() -> None:
    assert stage_counts(196, 4, 0.16) == [164, 132, 100, 69]
    assert stage_counts(100, 4, 0.2) == [80, 60, 40, 20]
    with pytest.raises(SecateurError, match="5 stages of 0.2 leave no token"):
        stage_counts(100, 5, 0.2)


def tokens(log_m, received):
    n = len(log_m)
    x = torch.arange(float(n))[None, :, None]
    return Messages(x, torch.tensor([log_m]), torch.tensor([received]), torch.arange(n)[None], n)


@pytest.mark.parametrize("score, kept", [("sent", [0, 1]), ("received", [1, 2])])
@pytest.mark.parametrize("masked", [False, True])
def test_the_two_readings_of_the_score_disagree(score, kept, masked) -> None:
    given = tokens(torch.tensor([0.72, 0.45, 0.02]).log().tolist(), [0.1166, 0.1955, 0.8780])
    method = DependencyVit(score=score)
    left = method.keep(given, method.scores(given, torch.Generator()), 2, masked)
    if masked:
        assert left.alive[0].nonzero().flatten().tolist() == kept
    else:
        assert left.positions.tolist() == [kept] and left.x.flatten().tolist() == kept


def test_of_equal_messages_the_first_stay() -> None:
    given = tokens([-1.0, -1.0, -1.0, 0.0], [0.0] * 4)
    left = DependencyVit().keep(given, given.log_m, 3)
    assert left.positions.tolist() == [[0, 1, 3]]


def net(**more):
    torch.manual_seed(0)
    own = {"image": 8, "patch": 2, "channels": 1, "width": 16, "depth": 4, "heads": 2, "scale": 0.5}
    return ReversedVit(**{**own, **more}).eval()


PICTURES = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_one_head_and_whole_messages_are_the_transposed_attention() -> None:
    q, k, v, _ = example()
    out, received = reversed_attention(q, k, v, torch.ones(1, 3, 1), torch.ones(1, 3))
    torch.testing.assert_close(out, forward_attention(q, k).transpose(-1, -2) @ v)
    torch.testing.assert_close(received.sum(), torch.tensor(3.0))


@torch.no_grad()
def test_what_a_token_sends_is_its_message_which_never_grows() -> None:
    model = net()
    given, before = model.start(PICTURES), torch.ones(3, 16)
    for block, mask in zip(model.blocks, model.dependencies(PICTURES)):
        given = block(given)
        now = given.log_m.exp()
        torch.testing.assert_close(mask.sum(1), now)
        torch.testing.assert_close(mask.sum(2), given.received)
        assert ((now > 0) & (now < before)).all()
        before = now


@torch.no_grad()
def test_a_token_without_message_is_received_by_nobody_and_still_receives() -> None:
    attention = net().blocks[0].attention
    x = torch.randn(1, 5, 16, generator=torch.Generator().manual_seed(2))
    q, k, v = attention.parts(x)
    message = torch.tensor([[1.0, 0, 1, 1, 1]])
    out, _ = reversed_attention(q, k, v, attention.chosen(x), message)
    v[:, :, 1] = 100
    again, _ = reversed_attention(q, k, v, attention.chosen(x), message)
    torch.testing.assert_close(out, again)
    assert out[0, :, 1].abs().sum() > 0
    twice, _ = reversed_attention(q, k, v, attention.chosen(x), 2 * message)
    torch.testing.assert_close(twice, 2 * again)


@torch.no_grad()
def test_blocks_know_no_places() -> None:
    model = net()
    given = model.start(PICTURES)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(3))
    moved = Messages(given.x[:, order], given.log_m, given.received, given.positions, 16)
    for block in model.blocks:
        given, moved = block(given), block(moved)
    torch.testing.assert_close(given.x[:, order], moved.x, rtol=1e-4, atol=1e-5)


def test_gradients_of_the_masked_pass_are_those_of_the_gathered_one() -> None:
    model, found = net(), []
    for masked in (False, True):
        with secateur.attach(model, "dependency-vit", masked=masked):
            model.zero_grad()
            model(PICTURES).square().sum().backward()
        found.append([p.grad.clone() for p in model.parameters()])
    for a, b in zip(*found):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("score", ["sent", "received", "random"])
def test_masked_is_gathered_for_every_score(score) -> None:
    model = net()
    with secateur.attach(model, "dependency-vit", score=score, r=0.2) as attached:
        made = model(PICTURES)
        share = attached.work.share
    with secateur.attach(model, "dependency-vit", score=score, r=0.2, masked=True):
        torch.testing.assert_close(model(PICTURES), made, rtol=1e-5, atol=1e-5)
    assert (made - model(PICTURES)).abs().max() > 1e-3
    # 16 -> 12, 9, 6, 3 of tokens (width 16: 4 x 256 + controller 136 + selector 32 and 2 n 16 a token; MLP 2,048)
    attended, passed = (16, 12, 9, 6), (12, 9, 6, 3)
    macs = sum(n * (1024 + 136 + 32) + 2 * n * n * 16 for n in attended) + sum(n * 2048 for n in passed)
    whole = 4 * (16 * (1024 + 136 + 32 + 2048) + 2 * 16 * 16 * 16)
    assert share.tolist() == [pytest.approx(macs / whole)] * 3


@pytest.mark.parametrize(
    "settings, told",
    [
        ({"r": 0.25}, "4 stages of 0.25 leave no token"),
        ({"r": 0.24, "blocks": (1, 2, 3, 4)}, "the last stage leaves no token"),
        ({"blocks": (3, 7)}, "there are no blocks 3, 7 among 4"),
        ({"r": -0.1}, "out of range"),
        ({"r": float("nan")}, "out of range"),
        ({"score": "loudness"}, "score"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(settings, told) -> None:
    model = net(image=4, patch=2) if "last" in told else net()
    with pytest.raises(SecateurError, match=told):
        secateur.attach(model, "dependency-vit", **settings)
    assert model.skip is None


@torch.no_grad()
def test_messages_that_are_no_numbers_are_refused() -> None:
    model = net()
    model.blocks[0].attention.controller[2].weight.fill_(float("nan"))
    with secateur.attach(model, "dependency-vit"), pytest.raises(SecateurError, match="NaN"):
        model(PICTURES)


def test_pictures_and_sides_that_do_not_fit_are_refused() -> None:
    with pytest.raises(SecateurError, match="9 patches, and 16 have positions"):
        net()(torch.zeros(1, 1, 6, 6))
    with pytest.raises(SecateurError, match="8 doesn't divide into patches of 3"):
        net(patch=3)
    with pytest.raises(SecateurError, match="16 doesn't divide into heads: 3"):
        net(heads=3)


A_R = torch.tensor([[[0.0648, 0.0514, 0.0004], [0.1762, 0.0189, 0.0004], [0.4790, 0.3797, 0.0193]]])


def test_the_worked_parents() -> None:
    assert parents_of(A_R).tolist() == [[2, 2, 2]]
    total = hanging(parents_of(A_R), A_R.sum(1))
    torch.testing.assert_close(total, torch.tensor([[0.72, 0.45, 1.1901]]), rtol=0, atol=1e-4)


def mask_of(parents):
    """Each token sends 1 to its parent."""
    mask = torch.zeros(1, len(parents), len(parents))
    mask[0, list(parents), range(len(parents))] = 1.0
    return mask


@pytest.mark.parametrize(
    "sends_to, wanted",
    [
        ([1, 2, 0], [0, 2, 0]),  # all receive the same: the first of the circle is the root
        ([1, 0, 0, 2], [0, 0, 0, 2]),  # 0 receives more than 1
        ([1, 0, 1, 3], [1, 1, 1, 3]),  # 1 receives more, 3 is a root of its own
        ([1, 2, 3, 2, 4], [1, 2, 2, 2, 4]),  # a way into a circle of 2 and 3
    ],
)
def test_a_circle_is_broken_where_most_arrives(sends_to, wanted) -> None:
    assert parents_of(mask_of(sends_to)).tolist() == [wanted]


def test_of_equal_receivers_the_first_is_the_parent() -> None:
    mask = torch.tensor([[[0.1, 0.0, 0.0], [0.3, 0.5, 0.2], [0.3, 0.1, 0.5]]])
    assert parents_of(mask).tolist() == [[1, 1, 2]]


def test_what_hangs_on_a_root_is_everything() -> None:
    parents = torch.tensor([[1, 2, 2, 2], [0, 1, 2, 3]])
    values = torch.tensor([[1.0, 2, 4, 8]]).expand(2, -1)
    assert hanging(parents, values).tolist() == [[1, 3, 15, 8], [1, 2, 4, 8]]


@torch.no_grad()
def test_the_map_is_the_tree_of_the_last_block() -> None:
    model, picture = net(), PICTURES[:1]
    mask = model.dependencies(picture)[-1]
    for of, wanted in (
        ("sent", mask.sum(1)),
        ("received", mask.sum(2)),
        ("tree", hanging(parents_of(mask), mask.sum(1))),
    ):
        found = DependencyTree(of=of).draw(model, picture, 3)
        torch.testing.assert_close(found.values, wanted.view(1, 4, 4))
    # roots hold what all send together
    parents = parents_of(mask)
    roots = parents == torch.arange(16)
    torch.testing.assert_close(found.values.flatten(1)[roots].sum(), mask.sum())


def test_a_map_of_another_network_is_refused() -> None:
    with pytest.raises(SecateurError, match="Linear has no reversed attention"):
        secateur.saliency(torch.nn.Linear(4, 2), torch.zeros(1, 4, 4), method="dependency-tree")


def test_the_network_learns_with_it_on_from_the_start() -> None:
    task = DependencyVit.example()
    task.quality = lambda model: float(model.skip is not None)
    pruned = secateur.train_prune(task, method="dependency-vit", steps=2, batch=8)
    (row,) = pruned.report["phases"]
    assert row["phase"] == "lite" and row["quality"] == 1.0 and row["work"] < 0.7
    assert pruned.model.skip is None
