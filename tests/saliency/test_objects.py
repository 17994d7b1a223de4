"""Objects that stand out: truths that are none, masks made smaller, and what is drawn of what was found."""

import pytest
import torch

from secateur import SecateurError
from secateur.saliency.objects.features import smaller
from secateur.saliency.objects.method import Objects, as_truth
from secateur.saliency.objects.picture import TINTS, draw_objects, tinted


@pytest.mark.parametrize(
    ("mask", "said"),
    [
        (torch.rand(4, 6), "float32"),
        (torch.zeros(4, 6).bool(), "no object"),
        (torch.full((4, 6), -1), "number -1"),
        (torch.ones(6, 4).long(), r"it is \(6, 4\), the picture \(4, 6\)"),
        (torch.ones(1, 1, 4, 6).long(), "the picture"),
        (torch.ones(0, 4, 6).long(), "no mask"),
        (None, "a NoneType is no mask"),
    ],
)
def test_truths_that_are_none_are_refused(mask: torch.Tensor, said: str) -> None:
    with pytest.raises(SecateurError, match=said):
        as_truth(mask, (4, 6))


def test_numbers_of_objects_and_several_opinions_are_truths() -> None:
    assert as_truth(torch.tensor([[0, 3], [1, 0]]), (2, 2)).tolist() == [[[False, True], [True, False]]]
    assert as_truth(torch.eye(2).bool()[None].expand(3, 2, 2), (2, 2)).shape == (3, 2, 2)


def test_a_smaller_mask_is_what_covers_half_of_a_pixel() -> None:
    masks = torch.tensor([[[[1, 1, 0, 0], [1, 0, 0, 1]]]]).bool()
    assert smaller(masks, (1, 2)).tolist() == [[[[True, False]]]]
    assert torch.equal(smaller(masks, (2, 4)), masks)


def found(instances: bool) -> Objects:
    masks = torch.zeros(1, 3, 330, 20, dtype=torch.bool)
    masks[0, 0, :100] = masks[0, 1, 200:] = True
    numbers = masks[:, 0].long() + 2 * masks[:, 1].long()
    return Objects(
        masks[:, 0].float(), masks, torch.tensor([[0.9, 0.4, 0.0]]), numbers if instances else None
    )


def test_instances_share_a_panel_and_each_opinion_has_one() -> None:
    """Panels of the picture's own size with gaps between them; an opinion without a mask has none."""
    picture = torch.full((330, 20, 3), 200, dtype=torch.uint8)
    one, two = (draw_objects(found(kind), picture) for kind in (True, False))
    gap = 14
    for drawn, panels in ((one, 3), (two, 4)):
        assert drawn.shape[0] == 330 + 2 * gap and drawn.shape[1] == panels * (20 + gap) + gap + 7 * gap
        assert torch.equal(drawn[gap : gap + 330, gap : gap + 20], picture)
    shown = one[gap : gap + 330, gap + 2 * (20 + gap) :][:, :20]
    assert torch.equal(shown, tinted(found(True).instances[0], picture))  # type: ignore[index]


def test_objects_have_colours_of_their_own_and_what_is_none_is_grey() -> None:
    picture = torch.full((1, 4, 3), 100, dtype=torch.uint8)
    drawn = tinted(torch.tensor([[0, 1, 2, len(TINTS) + 1]]), picture)[0]
    assert drawn[0].tolist() == [50, 50, 50]
    for pixel, tint in ((1, TINTS[0]), (2, TINTS[1]), (3, TINTS[0])):
        assert drawn[pixel].tolist() == pytest.approx([0.4 * 100 + 0.6 * c for c in tint], abs=1)


def test_what_was_found_in_another_picture_is_refused() -> None:
    with pytest.raises(SecateurError, match=r"\(1, 330, 20\), the picture \(20, 330\)"):
        draw_objects(found(True), torch.zeros(20, 330, 3, dtype=torch.uint8))
