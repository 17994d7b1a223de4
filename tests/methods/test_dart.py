"""The worked examples and invariants of dart."""

import torch
from token_examples import CLIP, circle

from secateur.method import make_method
from secateur.testing import token_sets

SITE = "layer:1"


def sets(keep, key_sizes=(1, 9, 1, 1, 8, 1), degrees=(0, 10, 20, 90, 100, 200), words=((5.0, 45),), **more):
    """Image tokens at these angles whose keys have these sizes; words as (size of the key, angle)."""
    sizes = torch.tensor(key_sizes, dtype=torch.float32)
    keys = torch.stack([sizes / 2, -sizes / 2], 1)[
        None, None
    ]  # [1, 1 head, n, 2]: the sum of |x| is the size
    text = torch.tensor([[[[size, 0.0]] for size, _ in words]]).view(1, len(words), 1, 2)
    states = circle([angle for _, angle in words]) if words else torch.zeros(1, 0, 2)
    return token_sets(
        circle(degrees),
        keep,
        keys={SITE: keys},
        text={f"{SITE}:keys": text, SITE: states},
        facts=CLIP,
        **more,
    )


def kept(sets, **settings):
    return [row.nonzero()[:, 0].tolist() for row in make_method("dart", **settings).select(sets)]


def test_the_worked_example():
    """Pivots are the tokens at 10 and 100 degrees and the word at 45. Four more may stay: two, one and one.

    10 is least like 200 (-0.98), then 90 (0.17); 100 is then least like 0 (-0.17); the word takes 20, the last one.
    """
    assert kept(sets(2), image_pivots=2) == [[1, 4]]
    assert kept(sets(3), image_pivots=2) == [[1, 4, 5]]
    assert kept(sets(4), image_pivots=2) == [[0, 1, 4, 5]]  # one each for the first two: 200, then 0
    assert kept(sets(5), image_pivots=2) == [
        [0, 1, 3, 4, 5]
    ]  # the word at 45: 90 and 20 left, cosines .71 and .91
    assert kept(sets(6), image_pivots=2) == [[0, 1, 2, 3, 4, 5]]


def test_only_the_words_with_the_largest_keys_are_pivots():
    """One image pivot at 10, one of two words: at 200 it likes 0 least (-0.94), at 20 it likes 100 (0.17)."""
    near, far = (1.0, 20), (5.0, 200)
    one = sets(3, words=(near, far))
    other = sets(3, words=((5.0, 20), (1.0, 200)))
    assert kept(one, image_pivots=1, text_pivots=1) == [
        [1, 2, 5]
    ]  # 10 takes 200; the far word takes 20: cosine -1
    assert kept(other, image_pivots=1, text_pivots=1) == [[1, 4, 5]]  # the near word takes 100: 0.17


def test_without_words_and_with_fewer_places_than_pivots():
    assert kept(sets(3, words=()), image_pivots=2) == [[1, 4, 5]]
    assert kept(sets(1)) == [[1]]
    assert kept(sets(6)) == [[0, 1, 2, 3, 4, 5]]


def test_padding_is_no_pivot_and_is_never_kept():
    valid = torch.tensor([[True, False, True, True, False, True]])
    assert kept(sets(3, valid=valid), image_pivots=1, text_pivots=0) == [
        [0, 3, 5]
    ]  # pivot 0: -.94 and 0 beat .94


def test_where_it_cuts():
    stage = make_method("dart").stages(CLIP)
    assert [(s.at, s.records) for s in stage] == [("layer:2", ("layer:1",))]
    assert make_method("dart", k=5).stages(CLIP)[0].at == "layer:5"


def test_the_settings_of_the_release():
    """Behind layer 2, four pivots of the picture and four of the text, as the release is launched."""
    method = make_method("dart")
    assert (method.k, method.image_pivots, method.text_pivots) == (2, 4, 4)
