"""The measures of salient objects: the numbers of PySODMetrics, and by hand."""

import numpy as np
import pytest
import torch

from secateur import SecateurError
from secateur.measure.salient import salient_figures


def drawn() -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Soft discs beside their true discs, with a pattern over them; the last picture has no object."""
    y, x = np.mgrid[0:24, 0:32]
    maps, truths = [], []
    for k, (cy, cx, r, s) in enumerate(
        [(10, 12, 6, 3.0), (5, 25, 4, 1.0), (20, 4, 8, 6.0), (12, 16, 9, 0.3)]
    ):
        soft = 1 / (1 + np.exp((np.hypot(y - cy - 1, x - cx + 2) - r) / s))
        maps.append(np.round((0.9 * soft + 0.1 * ((7 * y + 13 * x + k) % 17) / 17) * 255) / 255)
        truths.append((y - cy) ** 2 + (x - cx) ** 2 <= r * r)
    maps.append(maps[0])
    truths.append(np.zeros((24, 32), bool))
    return [torch.from_numpy(m) for m in maps], [torch.from_numpy(t) for t in truths]


def test_the_numbers_of_pysodmetrics() -> None:
    """PySODMetrics 1.4.2 on these five maps, as 8-bit pictures."""
    found = salient_figures(*drawn())
    assert found.f_max == pytest.approx(0.6465519266020651, abs=1e-12)
    assert found.f_adaptive == pytest.approx(0.6152323869101006, abs=1e-12)
    assert found.f_curve[[10, 100, 200]] == pytest.approx([0.23237851, 0.64628239, 0.4173321], abs=1e-8)
    assert found.e_max == pytest.approx(0.9243666342869904, abs=1e-12)
    assert found.e_adaptive == pytest.approx(0.8911003562675563, abs=1e-12)
    assert found.s == pytest.approx(0.7133613453539673, abs=1e-12)
    assert found.mae == pytest.approx(0.1984539591658661, abs=1e-12)


def test_overlap_and_pieces_by_hand() -> None:
    truth = torch.tensor([[1, 1, 1, 1], [0, 0, 0, 0], [0, 0, 0, 0]]).bool()
    mask = torch.tensor([[1, 1, 0, 0], [0, 0, 1, 0], [1, 0, 0, 1]]).bool()  # corners join pieces
    found = salient_figures([mask.float()], [truth], [mask])
    assert found.each["iou"] == [2 / 7] and found.each["components"] == [2.0]
    precision, recall = 2 / 5, 2 / 4
    assert found.f_max == pytest.approx(
        max(1.3 * precision * recall / (0.3 * precision + recall), 1.3 / 3 / (0.1 + 1))
    )
    assert found.mae == pytest.approx(5 / 12)


def test_nothing_found_where_there_is_nothing_is_right() -> None:
    empty = torch.zeros(3, 4)
    found = salient_figures([empty], [empty.bool()])
    assert found.iou == 1 and found.mae == 0 and found.s == 1 and found.components == 0


@pytest.mark.parametrize(
    ("maps", "truths", "masks", "said"),
    [
        ([], [], None, "no prediction"),
        ([torch.zeros(2, 2)], [], None, "1 maps and 1 masks for 0 truths"),
        ([torch.zeros(2, 2)], [torch.zeros(2, 3).bool()], None, r"the map is \(2, 2\), its truth \(2, 3\)"),
        ([torch.zeros(2, 2)], [torch.zeros(2, 2)], None, "its truth is of floats"),
        ([torch.zeros(2, 2)], [torch.zeros(2, 2).bool()], [torch.zeros(2, 2)], "its mask is of floats"),
        ([torch.full((2, 2), 255.0)], [torch.zeros(2, 2).bool()], None, "floats in 0..1"),
        ([torch.full((2, 2), torch.nan)], [torch.zeros(2, 2).bool()], None, "floats in 0..1"),
        ([torch.zeros(2, 2).long()], [torch.zeros(2, 2).bool()], None, "floats in 0..1"),
    ],
)
def test_what_cannot_be_judged_is_refused(maps: list, truths: list, masks: list | None, said: str) -> None:
    with pytest.raises(SecateurError, match=said):
        salient_figures(maps, truths, masks)
