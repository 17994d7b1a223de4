"""What became of visual tokens, drawn: every picture, its tiles, every frame of a video."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import secateur
from secateur import SecateurError
from secateur.cli.tokens import read_video, spread
from secateur.families.vlm.facts import each_patch, grids
from secateur.families.vlm.qwen import layout as qwen_layout
from secateur.report.tokens import kept_sheet, parts_kept
from secateur.tokens.sets import make_table
from secateur.tokens.setup import Kept

sys.path.append(str(Path(__file__).parents[1] / "tokens"))
from tiny_models import inputs_for, make

Image = pytest.importorskip("PIL.Image")


def ran(layouts, kept):
    """What an attached model would tell of one row whose first stage kept these tokens."""
    width = sum(map(len, layouts.values()))
    columns = torch.arange(width).split([len(layout) for layout in layouts.values()])
    places = {kind: (torch.zeros_like(own), own) for kind, own in zip(layouts, columns)}
    table = make_table(layouts, places, 1)
    return SimpleNamespace(table=table, kept=Kept(input=[torch.tensor(kept)]))


def video(t, h, w):
    model = SimpleNamespace(config=SimpleNamespace(vision_config=SimpleNamespace(spatial_merge_size=1)))
    given = {"pixel_values_videos": torch.zeros(1), "video_grid_thw": torch.tensor([[t, h, w]])}
    return qwen_layout(model, given)["video"]


def test_every_picture_and_frame_has_its_own_grid():
    attached = ran({"image": grids([(2, 3)], each_patch), "video": video(2, 1, 2)}, [0, 5, 7, 8])
    still, first, second = parts_kept(attached)
    assert still.kept.tolist() == [[True, False, False], [False, False, True]]
    assert (first.kept.tolist(), second.kept.tolist()) == ([[False, True]], [[True, False]])
    assert [(p.image, p.frame, p.over, p.text) for p in (still, first, second)] == [
        (0, 0, True, ""),
        (1, 0, True, ""),
        (1, 1, True, ""),
    ]


def test_the_sheet_shows_the_frame_that_tokens_come_from():
    """Four pictures make two frames: the first of each two lies under the second frame's tokens."""
    attached = ran({"video": video(2, 2, 2)}, [0, 7])
    shown = torch.arange(4).view(4, 1, 1, 1).expand(4, 8, 8, 3).mul(60).to(torch.uint8)
    sheet = kept_sheet([shown], {"input": parts_kept(attached)})
    line = 192 + 12 + 26
    assert sheet.shape == (2 * line + 12, 2 * 192 + 3 * 12, 3)
    assert (
        sheet[12 + 50, 12 + 50].tolist() == [0] * 3
        and sheet[12 + 50, 2 * 12 + 192 + 50].tolist() == [120] * 3
    )
    # kept cells are as bright as the picture, the others dark
    kept, gone = sheet[12 + line + 150, 24 + 192 + 150], sheet[12 + line + 50, 24 + 192 + 50]
    assert kept.tolist() == [120] * 3 and gone.tolist() == [26] * 3


def test_one_picture_is_one_line_as_before():
    attached = ran({"image": grids([(2, 2)], each_patch)}, [0])
    sheet = kept_sheet([torch.zeros(8, 8, 3, dtype=torch.uint8)], {"input": parts_kept(attached)})
    assert sheet.shape == (384 + 12 + 26 + 12, 2 * 384 + 3 * 12, 3)


def test_crops_that_nobody_placed_are_drawn_without_the_picture():
    layout = grids([(1, 2), (1, 2)], each_patch, image=[0, 0])
    one, two = parts_kept(ran({"image": layout}, [1, 2]))
    assert (one.text, one.over, two.text, two.over) == ("crop 0", False, "crop 1", False)
    assert (one.kept.tolist(), two.kept.tolist()) == ([[False, True]], [[True, False]])
    sheet = kept_sheet([torch.zeros(8, 8, 3, dtype=torch.uint8)], {"input": [one, two]})
    assert int(sheet[20, 300].max()) > 100  # a plain cell, not the black picture


def test_tiles_lie_on_the_picture_that_they_make():
    model, inputs = make("llava-next", torch.float32), inputs_for("llava-next", torch.float32, rows=(1,))
    with torch.no_grad(), secateur.attach(model, "random-tokens", target="50%") as attached:
        model(**inputs)
    base, tiles = parts_kept(attached)
    [counts] = attached.counts()[0]
    assert base.kept.shape == (4, 4) and tiles.text == "tiles" and tiles.kept.shape[1] == 8
    assert int(base.kept.sum() + tiles.kept.sum()) == counts["kept"] == round(counts["total"] / 2)
    assert base.kept.numel() + tiles.kept.numel() == counts["total"]


@pytest.mark.parametrize(("count", "most", "expected"), [(10, 4, [1, 3, 6, 8]), (3, 8, [0, 1, 2]), (0, 2, []), (7, 1, [3])])  # fmt: skip
def test_frames_at_even_distances(count, most, expected):
    assert spread(count, most) == expected


def test_videos_are_read_from_folders_and_animations(tmp_path):
    reds = [Image.new("RGB", (4, 2), (10 * n, 0, 0)) for n in range(6)]
    reds[0].save(tmp_path / "six.gif", save_all=True, append_images=reds[1:])
    assert read_video(str(tmp_path / "six.gif"), 3).shape == (3, 2, 4, 3)
    (tmp_path / "clip").mkdir()
    for number, red in enumerate(reds):
        red.save(tmp_path / "clip" / f"{number}.png")
    found = read_video(str(tmp_path / "clip"), 3)
    assert found[:, 0, 0, 0].tolist() == [10, 30, 50]
    Image.new("RGB", (5, 2)).save(tmp_path / "clip" / "3.png")
    (tmp_path / "none").mkdir()
    (tmp_path / "clip.mp4").write_bytes(b"no")
    for name, says in {"clip": "different sizes", "none": "no pictures", "clip.mp4": "ffmpeg", "x.gif": "no such"}.items():  # fmt: skip
        with pytest.raises(SecateurError, match=says):
            read_video(str(tmp_path / name), 3)
