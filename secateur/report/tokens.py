"""What became of the visual tokens: kept ones drawn over the picture, and the figures before and after."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor

from secateur.report.summary import busy, seconds_within, speed_words
from secateur.report.terminal import table
from secateur.utils.spread import Speed

if TYPE_CHECKING:
    from secateur.tokens.attach import Attached

FRAME = (255, 255, 255)
GAP, STRIP, WIDE, ACROSS = 12, 26, 384, 8


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


def sheet(lines: Sequence[Sequence[tuple[Tensor, str]]], across: int = ACROSS) -> Tensor:
    """Lines of panels side by side on white, each panel with a line of text under it: uint8 [h, w, 3].

    >>> sheet([[(torch.zeros(40, 60, 3, dtype=torch.uint8), "before")] * 2]).shape
    torch.Size([90, 156, 3])

    across: how many panels stand beside each other before a line goes on below.
    Raises SecateurError where Pillow isn't installed.
    """
    from secateur.saliency.picture import _pillow, font

    image_module = _pillow()
    from PIL import ImageDraw

    broken = [line[i : i + across] for line in lines for i in range(0, len(line), across)]
    width = max(sum(panel.shape[1] + GAP for panel, _ in line) + GAP for line in broken)
    tall = [max(panel.shape[0] for panel, _ in line) + GAP + STRIP for line in broken]
    canvas = torch.full((sum(tall) + GAP, width, 3), 255, dtype=torch.uint8)
    texts, top = [], GAP
    for line, height in zip(broken, tall):
        left = GAP
        for panel, text in line:
            canvas[top : top + panel.shape[0], left : left + panel.shape[1]] = panel
            texts.append((text, left, top + height - GAP - STRIP + 6, panel.shape[1]))
            left += panel.shape[1] + GAP
        top += height
    image = image_module.fromarray(canvas.numpy())
    pen = ImageDraw.Draw(image)
    letters = font(15)
    for text, left, top, room in texts:
        while text and pen.textlength(text, font=letters) > room:
            text = text[:-1]
        pen.text((left, top), text, fill=(0, 0, 0), font=letters)
    return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(canvas.shape)


@dataclass(frozen=True)
class Part:
    """A grid of visual tokens: a picture, the tiles that it was cut into, one of its crops, or a frame of a video."""

    image: int
    frame: int
    kept: Tensor = field(repr=False)
    """bool [rows, columns]."""
    text: str = ""
    """What it is, where it isn't the whole picture or frame."""
    over: bool = True
    """It lies over the whole picture."""


def parts_kept(attached: Attached, stage: str | int = -1, row: int = 0) -> list[Part]:
    """What a stage kept of each picture and each frame of a row; nothing of pictures whose places aren't known.

    >>> [part.kept.sum().item() for part in parts_kept(attached)]  # doctest: +SKIP
    [16, 16]
    """
    table = attached.table
    assert table is not None
    mine = (table.row[: table.visual] == row).nonzero()[:, 0]
    there = torch.zeros(len(mine), dtype=torch.bool)
    there[attached.kept[stage][row]] = True  # type: ignore[index]
    image, frame, crop, line, inner, whole, size = (
        values[mine].cpu()
        for values in (
            table.image,
            table.frame,
            table.crop,
            table.newline,
            torch.stack([table.grid_row, table.grid_col], 1),
            table.whole,
            table.grid,
        )
    )

    def part(which: Tensor, place: Tensor, text: str = "", over: bool = True) -> Part:
        shape = (place[which].amax(0) + 1).tolist()
        kept = torch.zeros(shape, dtype=torch.bool)
        kept[tuple(place[which & there].T)] = True
        return Part(int(image[which][0]), int(frame[which][0]), kept, text, over)

    parts = []
    for number, when in torch.stack([image, frame], 1).unique(dim=0).tolist():
        which = (image == number) & (frame == when) & ~line & (size > 0).all(1)
        crops = crop[which].unique().tolist()
        tiles = which & (crop != crops[0]) if crops else which
        if len(crops) == 1:
            parts.append(part(which, inner))
        elif crops and not torch.equal(
            whole[tiles], inner[tiles]
        ):  # tiles are placed on the picture that they make
            parts += [part(which & ~tiles, inner), part(tiles, whole, "tiles")]
        else:
            parts += [part(which & (crop == c), inner, f"crop {c}", over=False) for c in crops]
    return parts


def kept_sheet(pictures: Sequence[Tensor], stages: Mapping[str, Sequence[Part]]) -> Tensor:
    """The pictures, and what each stage kept of each picture and frame: uint8 [h, w, 3].

    >>> sheet = kept_sheet([photo, other], {"input": parts_kept(attached, "input")})  # doctest: +SKIP
    >>> secateur.saliency.picture.save_png(sheet, "kept.png")  # doctest: +SKIP

    pictures: of each image uint8 [H, W, 3], of a video [frames, H, W, 3]; the first of those that make one frame is shown.
    """
    frames: dict[int, int] = {}
    for part in chain(*stages.values()):
        frames[part.image] = max(frames.get(part.image, 0), part.frame + 1)
    several = len(pictures) > 1 or any(number > 1 for number in frames.values())

    def beneath(part: Part) -> Tensor:
        if not part.over:
            return torch.full((*part.kept.shape, 3), 200, dtype=torch.uint8)
        shown = pictures[part.image]
        return shown[part.frame * len(shown) // frames[part.image]] if shown.dim() == 4 else shown

    def name(part: Part) -> list[str]:
        moving = pictures[part.image].dim() == 4
        words = [f"{'video' if moving else 'image'} {part.image + 1}"] * (len(pictures) > 1)
        return words + [f"frame {part.frame + 1}"] * moving + [part.text] * bool(part.text)

    def drawn(part: Part) -> Tensor:
        return draw_kept(beneath(part), part.kept, WIDE // 2 if several else WIDE)

    lines = []
    for stage, parts in stages.items():
        unit = "" if several else " tokens"
        counts = [f"{int(part.kept.sum())} of {part.kept.numel()}{unit}" for part in parts]
        texts = [f"{', '.join([*name(part), stage])}: {count}" for part, count in zip(parts, counts)]
        lines.append([(drawn(part), text) for part, text in zip(parts, texts)])
    if not any(lines):
        stills = [picture[0] if picture.dim() == 4 else picture for picture in pictures]
        return sheet([[(picture, "the picture") for picture in stills]])
    whole = [part for part in next(iter(stages.values())) if part.over and not part.text]
    first = [(enlarge(beneath(part), drawn(part)), ", ".join(name(part)) or "the picture") for part in whole]
    return sheet([first, *lines] if several else [[*first, *chain(*lines)]])


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


def kept_of(part: Mapping[str, int], parts: Sequence[Mapping[str, int]]) -> str:
    """How many tokens a picture or frame kept, of `Attached.counts`.

    >>> kept_of({"image": 1, "frame": 0, "kept": 3, "total": 8}, [{"image": 0}, {"image": 1}])
    'image 2 3 of 8'
    """
    same = [other for other in parts if other["image"] == part["image"]]
    words = [f"image {part['image'] + 1}"] * (len(same) < len(parts))
    words += [f"frame {part['frame'] + 1}"] * (len(same) > 1)
    return f"{' '.join(words)} {part['kept']} of {part['total']}".strip()


def token_rows(found: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """(what, with all tokens, with those that were kept, how they differ), a line a figure."""
    why, lines = found.get("not_measured") or {}, []
    for title, key, scale in ROWS:
        before, after = found["before"].get(key), found["after"].get(key)
        if scale is None:
            lines.append((title, str(before), str(after), ""))
            continue
        if key in found.get("speed", {}):
            spans = [found[side]["latency"]["quartiles"][key] for side in ("before", "after")]
            first, last = (
                seconds_within(value, *span) for value, span in zip((before, after), spans, strict=True)
            )
            lines.append((title, first, last, speed_words(Speed.read(found["speed"][key]))))
            continue
        unit = UNITS.get(key, "")
        first, last = (
            "–" if value is None else (f"{value:,}" if scale == 1 else f"{value / scale:,.2f} {unit}")
            for value in (before, after)
        )
        ratio = f"{after / before:.2f}" if before and after is not None else ""
        lines.append((title, first, last, "not measured" if key in why else ratio))
    return lines


def print_tokens(found: Mapping[str, Any], console: Console) -> None:
    """Answers and costs with every token and with those that were kept, side by side."""
    for line in found.get("collapsed") or []:
        console.print(line, style="bold red", markup=False)
    console.print(f"[bold]{found['model']}[/]  {found['method']}  target {found['target']}")
    console.print(f"{found['prompt']}", style="italic", markup=False)
    shown = table("", "all tokens", "kept", "kept/all", right=("all tokens", "kept", "kept/all"))
    why = found.get("not_measured") or {}
    for line in token_rows(found):
        shown.add_row(*line)
    console.print(shown)
    for title, key, _ in ROWS:
        if key in why:
            console.print(f"note: {title} was not measured: {why[key]}", style="yellow", markup=False)
    if warning := busy(found["before"]):
        console.print(f"note: {warning}", style="yellow", markup=False)
    if not found.get("collapsed") and found["before"]["answer"] != found["after"]["answer"]:
        console.print("note: the answer is another one than with all tokens", style="yellow")
    if work := found.get("visual_flops"):
        parts = ", ".join(
            f"{work[name] / work['dense']:.0%} {name}" for name in ("layers", "heads", "neurons")
        )
        console.print(
            f"visual tokens' own multiply-adds: {work['left'] / work['dense']:.0%} left; saved by {parts}",
            markup=False,
        )
    for stage, count in found["kept"].items():
        parts = found["pictures"][stage]
        each = f": {', '.join(kept_of(part, parts) for part in parts)}" if len(parts) > 1 else ""
        console.print(f"{stage}: {len(count)} kept{each}", markup=False)
    if found.get("expected"):
        console.print(f"right answer: {found['expected']}", markup=False)
    if found.get("out"):
        console.print(f"picture: {found['out']}", markup=False)


def print_policy(about: Mapping[str, Any], out: str, console: Console) -> None:
    """What cloning an expert came to."""
    minutes = about["processor_seconds"] / 60
    console.print(
        f"success: {about['success']:.1f} % of the episodes, {about['episode_steps']:.1f} steps each"
    )
    console.print(f"{about['steps']:,} steps, {minutes:.1f} processor minutes; policy: {out}", markup=False)


def print_training(about: Mapping[str, Any], out: str, console: Console) -> None:
    """What a training run came to."""
    shown = table("question", "accuracy", right=("accuracy",))
    for kind, share in about["accuracy"].items():
        shown.add_row(kind, f"{share:.1f} %")
    console.print(shown)
    console.print(
        f"{about['steps']:,} steps, {about['seconds'] / 60:.1f} minutes; model: {out}", markup=False
    )
