"""Rows on disk: whole or not there, once each, for one process at a time, and never of other settings."""

import json

import pytest

from secateur.comparison import rows as store
from secateur.comparison.setup import Setup, shares
from secateur.errors import SecateurError, SecateurWarning

SETUP = Setup("digits").as_json()


def row(method="wanda", seed=0, **more):
    return {"method": method, "target": "60%", "seed": seed, "state": "done", "quality": 0.5, **more}


@pytest.fixture
def folder(tmp_path):
    with store.claimed(tmp_path / "out"):
        store.begin(tmp_path / "out", SETUP)
    return tmp_path / "out"


def test_rows_are_read_as_they_were_added(folder):
    for seed in range(3):
        store.append(folder, row(seed=seed))
    assert store.read_rows(folder) == [row(seed=seed) for seed in range(3)]


@pytest.mark.parametrize("cut", [1, 20, 60])
def test_a_half_written_row_is_as_if_it_had_never_begun(folder, cut):
    for seed in range(3):
        store.append(folder, row(seed=seed))
    file = folder / store.ROWS
    file.write_bytes(file.read_bytes()[:-cut])
    assert store.read_rows(folder) == [row(seed=0), row(seed=1)]
    assert store.mend(folder) == ([row(seed=0), row(seed=1)], 0)
    store.append(folder, row(seed=2))
    assert len(file.read_text().splitlines()) == 3 and store.read_rows(folder)[2] == row(seed=2)


@pytest.mark.parametrize(
    "line", ["{}", "not JSON", '{"method": "wanda", "target": "60%", "seed": 0, "state": "done"}', '["a"]']
)
def test_what_cannot_be_read_is_kept_apart_and_the_good_rows_stay(folder, line):
    store.append(folder, row(seed=0))
    with open(folder / store.ROWS, "a") as file:
        file.write(line + "\n")
    store.append(folder, row(seed=1))
    with pytest.warns(SecateurWarning, match="1 row can't be read, and left out"):
        assert store.read_rows(folder) == [row(seed=0), row(seed=1)]
    assert store.mend(folder) == ([row(seed=0), row(seed=1)], 1)
    assert (folder / store.DAMAGED).read_text() == line + "\n"
    assert store.mend(folder)[1] == 0


def test_of_a_row_that_is_there_twice_the_first_counts(folder):
    store.append(folder, row(quality=0.25))
    store.append(folder, row(quality=0.75))
    assert store.mend(folder)[0] == [row(quality=0.25)]
    assert len((folder / store.ROWS).read_text().splitlines()) == 1


def test_two_at_once_are_refused_and_the_folder_is_free_again_afterwards(folder):
    with (
        store.claimed(folder),
        pytest.raises(SecateurError, match="another comparison writes there"),
        store.claimed(folder),
    ):
        pass
    with store.claimed(folder):
        pass


@pytest.mark.parametrize(
    ("setup", "said"),
    [({"steps": 5}, "steps=0, not 5"), ({"task": "cifar10"}, "task='digits', not 'cifar10'")],
)
def test_other_settings_are_refused_by_name(folder, setup, said):
    store.append(folder, row())
    with pytest.raises(SecateurError, match=said):
        store.begin(folder, SETUP | setup)


def test_a_mistake_before_the_first_row_does_not_hold_the_folder(folder):
    store.begin(folder, SETUP | {"task": "cifar10"})
    assert store.read_about(folder)["setup"]["task"] == "cifar10"


def test_a_folder_of_another_version_or_of_something_else_is_refused(folder, tmp_path):
    (folder / store.ABOUT).write_text(json.dumps({"format": store.FORMAT, "version": 7, "setup": SETUP}))
    with pytest.raises(SecateurError, match="another version"):
        store.read_rows(folder)
    with pytest.raises(SecateurError, match="another version"):
        store.begin(folder, SETUP)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(SecateurError, match="something else in it: notes.txt"):
        store.begin(tmp_path, SETUP)
    with pytest.raises(SecateurError, match="no comparison is there"):
        store.read_rows(tmp_path)


@pytest.mark.parametrize(
    ("targets", "said"),
    [
        ([], "there is none"),
        (["macs<=50%"], "isn't a share"),
        (["100%"], "isn't a share"),
        (["50%", "0.5"], "twice"),
    ],
)
def test_targets_are_shares(targets, said):
    with pytest.raises(SecateurError, match=said):
        shares(targets)
