"""Coding and decoding of masks as connectivity, by the worked example and on real masks."""

import numpy as np
import pytest
import torch
from scipy import ndimage

from secateur import SecateurError
from secateur.data.ecssd import load_ecssd
from secateur.saliency.objects.connectivity import OFFSETS, decode, encode, instances, links, mutual, voted

MASK = torch.tensor([[0, 1, 1], [0, 1, 0], [0, 0, 0]])


def test_the_worked_example() -> None:
    cube = encode(MASK)
    assert [tuple(place) for place in cube.nonzero().tolist()] == [
        (1, 1, 1),
        (2, 1, 1),
        (3, 0, 2),
        (4, 0, 1),
        (5, 0, 2),
        (6, 0, 1),
    ]
    said = torch.where(cube, 0.9, 0.1)
    said[4, 0, 1] = 0.4  # one side no longer says that (0, 1) and (0, 2) belong together
    kept = links(said)
    assert not kept[4, 0, 1] and not kept[3, 0, 2] and int(kept.sum()) == 4
    assert torch.equal(decode(said), MASK.bool())
    assert voted(said)[MASK.bool()].tolist() == pytest.approx([0.81] * 3)
    assert voted(said)[~MASK.bool()].tolist() == pytest.approx([0.01] * 6)


def test_of_four_neighbours_the_channels_are_those_of_eight() -> None:
    mask = torch.rand(9, 7, generator=torch.Generator().manual_seed(0)) > 0.4
    assert torch.equal(encode(mask, 4), encode(mask)[[1, 3, 4, 6]])


def test_links_are_said_by_both_sides_and_counted_by_neighbours() -> None:
    mask = torch.rand(9, 7, generator=torch.Generator().manual_seed(1)) > 0.4
    cube = encode(mask)
    for c, (dy, dx) in enumerate(OFFSETS[8]):
        for y, x in cube[c].nonzero().tolist():
            assert cube[7 - c, y + dy, x + dx]
    around = ndimage.convolve(mask.numpy().astype(int), [[1, 1, 1], [1, 0, 1], [1, 1, 1]], mode="constant")
    assert np.array_equal(cube.sum(0).numpy(), around * mask.numpy())


def test_flipping_the_picture_swaps_channels() -> None:
    mask = torch.rand(5, 6, generator=torch.Generator().manual_seed(2)) > 0.4
    swapped = [2, 1, 0, 4, 3, 7, 6, 5]
    assert torch.equal(encode(mask.flip(1)), encode(mask).flip(2)[swapped])


def test_the_product_of_both_sides_by_hand() -> None:
    cube = torch.zeros(4, 1, 2)
    cube[2, 0, 0], cube[1, 0, 1] = 0.5, 0.25  # left says right, right says left
    assert mutual(cube)[2, 0].tolist() == [0.125, 0] and mutual(cube)[1, 0].tolist() == [0, 0.125]


@pytest.mark.needs_data
@pytest.mark.parametrize("neighbours", [8, 4])
def test_every_mask_comes_back_but_for_single_pixels(neighbours: int) -> None:
    """Single pixels are found by scipy's labels, not by this code."""
    shape = ndimage.generate_binary_structure(2, 2 if neighbours == 8 else 1)
    lost = 0
    for mask in load_ecssd()[1]:
        label, _ = ndimage.label(mask.numpy(), shape)
        sizes = np.bincount(label.ravel())
        whole = mask.numpy() & (sizes[label] > 1)
        cube = encode(mask, neighbours)
        assert np.array_equal(decode(cube).numpy(), whole)
        found = instances(cube)
        assert int(found.max()) == int((sizes[1:] > 1).sum())
        lost += int((sizes[1:] == 1).sum())
    assert lost > 0  # some masks have single pixels, so the exception is used


def test_instances_are_parted_by_numbers_and_join_without() -> None:
    touching = torch.tensor([[1, 1, 2, 2], [1, 1, 2, 2], [0, 0, 0, 0], [5, 5, 0, 1]])
    assert instances(encode(touching)).tolist() == [[1, 1, 2, 2], [1, 1, 2, 2], [0, 0, 0, 0], [3, 3, 0, 0]]
    joined = instances(encode(touching > 0))
    assert joined.tolist() == [[1, 1, 1, 1], [1, 1, 1, 1], [0, 0, 0, 0], [2, 2, 0, 0]]
    apart = torch.tensor([[1, 1, 0, 1, 1]])
    assert instances(encode(apart)).tolist() == [[1, 1, 0, 2, 2]]


def test_instances_are_numbered_by_their_first_pixel_in_any_batch() -> None:
    masks = torch.rand(2, 3, 12, 11, generator=torch.Generator().manual_seed(3)) > 0.6
    found = instances(encode(masks))
    assert found.shape == (2, 3, 12, 11)
    for mask, own in zip(masks.flatten(0, 1).numpy(), found.flatten(0, 1).numpy()):
        label, _ = ndimage.label(mask, np.ones((3, 3)))
        first = [own.ravel()[np.flatnonzero(own == n)[0]] for n in range(1, own.max() + 1)]
        places = [np.flatnonzero(own == n)[0] for n in range(1, own.max() + 1)]
        assert first == sorted(first) and places == sorted(places)
        for number in range(1, own.max() + 1):
            assert len(np.unique(label[own == number])) == 1


def test_nothing_in_nothing_out() -> None:
    empty = torch.zeros(4, 5, dtype=torch.bool)
    assert not encode(empty).any() and not decode(encode(empty)).any() and not instances(encode(empty)).any()


@pytest.mark.parametrize(
    ("mask", "said"),
    [
        (torch.rand(3, 3), "float32"),
        (torch.tensor([[0, -2]]), "number -2"),
        (torch.zeros(3, dtype=torch.long), "no mask"),
        (torch.zeros(0, 3, dtype=torch.long), "no mask"),
        ([[0, 1]], "a list is no mask"),
    ],
)
def test_what_is_no_mask_is_refused(mask: object, said: str) -> None:
    with pytest.raises(SecateurError, match=said):
        encode(mask)  # type: ignore[arg-type]


def test_neighbours_are_four_or_eight() -> None:
    with pytest.raises(SecateurError, match="6 neighbours"):
        encode(MASK, 6)
