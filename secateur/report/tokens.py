"""What became of the visual tokens: kept ones drawn over the picture, and the figures before and after."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor

from secateur.report.summary import busy, seconds_within, speed_words
from secateur.report.terminal import table
from secateur.utils.spread import Speed

FRAME = (255, 255, 255)
GAP, STRIP, WIDE = 12, 26, 384


def draw_kept(picture: Tensor, kept: Tensor, wide: int = WIDE) -> Tensor:
    """The picture with a frame around each kept cell and the others dark: uint8 [H, W, 3] -> uint8 [h, w, 3].

    >>> draw_kept(torch.zeros(64, 64, 3, dtype=torch.uint8), torch.eye(8).bool()).shape
    torch.Size([384, 384, 3])

    kept: bool [rows, columns], the cells of the grid that lies over the whole picture. wide: pixels across, rounded so
    that cells are whole pixels.
    """
    rows, columns = kept.shape
    cell = max(4, round(wide / columns))
    width = cell * columns
    tall = max(4, round(picture.shape[0] / picture.shape[1] * width / rows))
    size = (tall * rows, width)
    small = picture.shape[0] <= size[0] // 2
    large = F.interpolate(
        picture.permute(2, 0, 1)[None].float(), size=size, mode="nearest" if small else "bilinear"
    )[0]
    over = kept.repeat_interleave(tall, 0).repeat_interleave(cell, 1)
    grey = large.mean(0, keepdim=True).expand(3, -1, -1) * 0.22
    drawn = torch.where(over, large, grey)
    edge = torch.zeros(size, dtype=torch.bool)
    edge[::tall] = edge[tall - 1 :: tall] = True
    edge[:, ::cell] = edge[:, cell - 1 :: cell] = True
    drawn = torch.where(edge & over, torch.tensor(FRAME)[:, None, None].float(), drawn)
    return drawn.permute(1, 2, 0).round().clamp(0, 255).to(torch.uint8)


def enlarge(picture: Tensor, like: Tensor) -> Tensor:
    """The picture as it is, at the size of a drawing: uint8 [H, W, 3] -> [h, w, 3]."""
    size = like.shape[:2]
    mode = "nearest" if picture.shape[0] <= size[0] // 2 else "bilinear"
    large = F.interpolate(picture.permute(2, 0, 1)[None].float(), size=tuple(size), mode=mode)[0]
    return large.permute(1, 2, 0).round().clamp(0, 255).to(torch.uint8)


def sheet(panels: Sequence[tuple[Tensor, str]]) -> Tensor:
    """Panels of equal height side by side on white, each with a line of text under it: uint8 [h, w, 3].

    >>> sheet([(torch.zeros(40, 60, 3, dtype=torch.uint8), "before")] * 2).shape
    torch.Size([90, 156, 3])

    Raises SecateurError where Pillow isn't installed.
    """
    from secateur.saliency.picture import _pillow, font

    image_module = _pillow()
    from PIL import ImageDraw

    height = max(panel.shape[0] for panel, _ in panels)
    width = sum(panel.shape[1] + GAP for panel, _ in panels) + GAP
    canvas = torch.full((height + 2 * GAP + STRIP, width, 3), 255, dtype=torch.uint8)
    left, places = GAP, []
    for panel, _ in panels:
        canvas[GAP : GAP + panel.shape[0], left : left + panel.shape[1]] = panel
        places.append(left)
        left += panel.shape[1] + GAP
    image = image_module.fromarray(canvas.numpy())
    pen = ImageDraw.Draw(image)
    letters = font(15)
    for (panel, text), place in zip(panels, places):
        while text and pen.textlength(text, font=letters) > panel.shape[1]:
            text = text[:-1]
        pen.text((place, height + GAP + 6), text, fill=(0, 0, 0), font=letters)
    return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(canvas.shape)


def grids(coordinates: Mapping[str, Tensor], shape: tuple[int, int]) -> Tensor:
    """bool [rows, columns]: which cells of the first crop of the first image the kept tokens lie on."""
    kept = torch.zeros(shape, dtype=torch.bool)
    if len(coordinates["row"]):
        first = (coordinates["image"] == coordinates["image"].min()) & (
            coordinates["crop"] == coordinates["crop"].min()
        )
        kept[coordinates["row"][first], coordinates["column"][first]] = True
    return kept


ROWS = (
    ("answer", "answer", None),
    ("visual tokens", "visual_tokens", 1),
    ("tokens x layers", "tokens_x_layers", 1),
    ("prefill multiply-adds", "flops", 1e6),
    ("key/value cache", "kv_bytes", 1e3),
    ("time to first token", "seconds_to_first_token", 1e-3),
    ("time per token", "seconds_per_token", 1e-3),
)
UNITS = {"flops": "M", "kv_bytes": "kB", "seconds_to_first_token": "ms", "seconds_per_token": "ms"}


def token_alarms(found: Mapping[str, Any]) -> list[str]:
    """What to say where the answer was right with every token and no longer is, and, last, what to try.

    >>> token_alarms({"expected": "red", "before": {"answer": "red"}, "after": {"answer": "blue"}, "target": "10%"})[0]
    'the answer was right with all tokens (red) and is wrong with those that were kept (blue)'
    """
    was, now, right = found["before"]["answer"], found["after"]["answer"], found.get("expected")
    if right is None or was != right or now == right:
        return []
    wrong = f"the answer was right with all tokens ({was}) and is wrong with those that were kept ({now})"
    ways = f"a milder target than {found['target']}, or another method (`secateur methods --objects T` lists them)"
    return [wrong, f"what to try: {ways}; one question says little, so ask several"]


def print_tokens(found: Mapping[str, Any], console: Console) -> None:
    """Answers and costs with every token and with those that were kept, side by side."""
    for line in found.get("collapsed") or []:
        console.print(line, style="bold red", markup=False)
    console.print(f"[bold]{found['model']}[/]  {found['method']}  target {found['target']}")
    console.print(f"{found['prompt']}", style="italic", markup=False)
    shown = table("", "all tokens", "kept", "kept/all", right=("all tokens", "kept", "kept/all"))
    why = found.get("not_measured") or {}
    for title, key, scale in ROWS:
        before, after = found["before"].get(key), found["after"].get(key)
        if scale is None:
            shown.add_row(title, str(before), str(after), "")
            continue
        if key in found.get("speed", {}):
            spans = [found[side]["latency"]["quartiles"][key] for side in ("before", "after")]
            times = [seconds_within(value, *span) for value, span in zip((before, after), spans, strict=True)]
            shown.add_row(title, *times, speed_words(Speed.read(found["speed"][key])))
            continue
        unit = UNITS.get(key, "")
        texts = [
            "–" if value is None else (f"{value:,}" if scale == 1 else f"{value / scale:,.2f} {unit}")
            for value in (before, after)
        ]
        ratio = f"{after / before:.2f}" if before and after is not None else ""
        shown.add_row(title, *texts, "not measured" if key in why else ratio)
    console.print(shown)
    for title, key, _ in ROWS:
        if key in why:
            console.print(f"note: {title} was not measured: {why[key]}", style="yellow", markup=False)
    if warning := busy(found["before"]):
        console.print(f"note: {warning}", style="yellow", markup=False)
    if not found.get("collapsed") and found["before"]["answer"] != found["after"]["answer"]:
        console.print("note: the answer is another one than with all tokens", style="yellow")
    for stage, count in found["kept"].items():
        console.print(f"{stage}: {len(count)} kept", markup=False)
    if found.get("expected"):
        console.print(f"right answer: {found['expected']}", markup=False)
    if found.get("out"):
        console.print(f"picture: {found['out']}", markup=False)


def print_training(about: Mapping[str, Any], out: str, console: Console) -> None:
    """What a training run came to."""
    shown = table("question", "accuracy", right=("accuracy",))
    for kind, share in about["accuracy"].items():
        shown.add_row(kind, f"{share:.1f} %")
    console.print(shown)
    console.print(
        f"{about['steps']:,} steps, {about['seconds'] / 60:.1f} minutes; model: {out}", markup=False
    )
