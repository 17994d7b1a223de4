"""Synthetic pictures of coloured shapes with five kinds of question, each answered by one word.

A scene has two to six objects on a 4 x 4 grid of 16-pixel cells, moved by up to two pixels, over a grey gradient with
noise and up to three grey bars. Everything is drawn from one seeded generator, a batch at a time, on any device.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from secateur.errors import SecateurError
from secateur.utils.screen import Screen

COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 180, 60),
    "blue": (50, 80, 230),
    "yellow": (235, 215, 50),
    "purple": (160, 60, 200),
    "cyan": (60, 210, 220),
}
SHAPES = ("circle", "square", "triangle", "cross")
SIZE, PATCH, CELL, CELLS = 64, 8, 16, 4
GRID = SIZE // PATCH
MOST = 6
KINDS = ("presence", "colour", "count", "relation", "where")
LONGEST = {"presence": 6, "colour": 6, "count": 5, "relation": 10, "where": 6}
SPECIAL = ("<pad>", "<bos>", "<eos>", "<image>", "<video>", "<vision>", "</vision>", "<unk>")
ASKING = [
    "is",
    "there",
    "a",
    "what",
    "color",
    "the",
    "how",
    "many",
    "shapes",
    "where",
    "left",
    "right",
    "above",
    "below",
    "of",
    "?",
    "yes",
    "no",
]
PLACES = tuple(f"r{row}c{column}" for row in range(CELLS) for column in range(CELLS))
EASY_VQA = "shape image not in present does contain rectangle black gray teal brown"
NLVR = (
    "with block tower at one blocks are two box touching top and exactly items least only has three as towers edge on "
    "which item wall color closely that four over grey any bottom object objects contains different same all colors "
    "having corner each ll boxes it than stacked together second small height more an side bases five between none "
    "base other most middle or true false ."
)
OTHER = f"{EASY_VQA} {NLVR}".split()
WORDS = tuple(
    dict.fromkeys(
        (
            *SPECIAL,
            *ASKING,
            *COLOURS,
            *SHAPES,
            *(f"{s}s" for s in ("circle", "square", "triangle")),
            "crosses",
            *(str(n) for n in range(MOST + 1)),
            *PLACES,
            *OTHER,
        )
    )
)
ID = {word: number for number, word in enumerate(WORDS)}
PAD, BOS, EOS, IMAGE, VIDEO, VISION, END_VISION, UNKNOWN = (ID[word] for word in SPECIAL)
PLURALS = ("circles", "squares", "triangles", "crosses")


@dataclass(repr=False)
class Scenes(Screen):
    """`count` scenes; objects in columns, `there` says which of the six exist. All int64 but `there` (bool).

    cell: 0..15, row by row. colour: 0..5. shape: 0..3. `kind` is colour * 4 + shape.
    """

    cell: Tensor
    colour: Tensor
    shape: Tensor
    there: Tensor

    def __len__(self) -> int:
        return len(self.cell)

    @property
    def kind(self) -> Tensor:
        return self.colour * len(SHAPES) + self.shape

    def __getitem__(self, rows: Tensor | slice) -> Scenes:
        return Scenes(self.cell[rows], self.colour[rows], self.shape[rows], self.there[rows])


@dataclass(repr=False)
class Questions(Screen):
    """One question a scene. words: int64 [B, width], padded at the end; length, answer: int64 [B]; asked: bool [B],
    False where the scene has nothing to ask about. about: int64 [B, 2], the cell of the first and second object named,
    16 where it is absent, -1 where none or several fit; at: int64 [B, 2], which word names it, -1 likewise."""

    words: Tensor
    length: Tensor
    answer: Tensor
    asked: Tensor
    about: Tensor
    at: Tensor


def draw_scenes(count: int, generator: torch.Generator) -> Scenes:
    """`count` scenes on the generator's device.

    >>> scenes = draw_scenes(4, torch.Generator().manual_seed(0))
    >>> scenes.cell.shape
    torch.Size([4, 6])

    In about a third of the scenes half of the objects share one colour, so that there is something to count.
    """
    device = generator.device

    def chance(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, device=device)

    number = 2 + (chance(count, 1) * (MOST - 1)).long()
    cell = chance(count, CELLS**2).argsort(1)[:, :MOST]
    colour = (chance(count, MOST) * len(COLOURS)).long()
    shape = (chance(count, MOST) * len(SHAPES)).long()
    alike = (chance(count, 1) < 0.35) & (chance(count, MOST) < 0.5)
    colour = torch.where(alike, colour[:, :1], colour)
    return Scenes(cell, colour, shape, torch.arange(MOST, device=device) < number)


def _stamps() -> Tensor:
    """The four shapes, anti-aliased, [4, 16, 16] in 0..1."""
    fine = 4 * CELL
    centre, radius = (fine - 1) / 2, fine * 0.42
    y, x = torch.meshgrid(torch.arange(fine), torch.arange(fine), indexing="ij")
    x, y = (x - centre) / radius, (y - centre) / radius
    circle = x**2 + y**2 <= 1
    square = (x.abs() <= 0.85) & (y.abs() <= 0.85)
    triangle = (y <= 0.85) & (y >= -0.95) & (x.abs() <= (y + 0.95) / 1.8)
    cross = (x.abs() <= 0.3) & (y.abs() <= 0.95) | (y.abs() <= 0.3) & (x.abs() <= 0.95)
    return F.avg_pool2d(torch.stack([circle, square, triangle, cross]).float()[:, None], 4)[:, 0]


STAMPS = _stamps()


def render(scenes: Scenes, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Pictures uint8 [B, 3, 64, 64] and, for each of the 8 x 8 patches, the object on it: int64 [B, 64], -1 for none.

    >>> generator = torch.Generator().manual_seed(0)
    >>> pictures, owner = render(draw_scenes(4, generator), generator)
    >>> pictures.shape, pictures.dtype, owner.shape
    (torch.Size([4, 3, 64, 64]), torch.uint8, torch.Size([4, 64]))

    A patch belongs to an object that covers more than 15 % of it; where several do, to the one drawn last.
    """
    count, device = len(scenes), generator.device

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(shape, generator=generator, device=device)

    def normal(deviation: float, *shape: int) -> Tensor:
        return deviation * torch.randn(shape, generator=generator, device=device)

    line = torch.arange(SIZE, device=device)
    ramp = torch.linspace(-1, 1, SIZE, device=device)
    picture = (uniform(0.15, 0.75, count, 1) + normal(0.04, count, 3))[:, :, None, None]
    picture = picture + normal(0.08, count, 1, 1, 1) * ramp + normal(0.08, count, 1, 1, 1) * ramp[:, None]
    bars = (uniform(0, 4, count)).long()
    for number in range(3):
        thin, long = uniform(2, 4, count).long(), uniform(6, 14, count).long()
        flat = uniform(0, 1, count) < 0.5
        height, width = torch.where(flat, thin, long), torch.where(flat, long, thin)
        top, left = uniform(0, SIZE - 12, count).long(), uniform(0, SIZE - 12, count).long()
        rows = (line >= top[:, None]) & (line < (top + height)[:, None])
        columns = (line >= left[:, None]) & (line < (left + width)[:, None])
        bar = rows[:, :, None] & columns[:, None] & (bars > number)[:, None, None]
        picture = torch.where(bar[:, None], uniform(0.1, 0.9, count, 1, 1, 1), picture)
    stamps = STAMPS.to(device)
    palette = torch.tensor(list(COLOURS.values()), device=device) / 255
    owner = torch.full((count, GRID**2), -1, device=device)
    for k in range(MOST):
        row, column = scenes.cell[:, k] // CELLS, scenes.cell[:, k] % CELLS
        moved = uniform(-2, 3, count, 2).floor().long()
        top = (row * CELL + moved[:, 0]).clamp(0, SIZE - CELL)
        left = (column * CELL + moved[:, 1]).clamp(0, SIZE - CELL)
        u, v = line - top[:, None], line - left[:, None]
        inside = ((u >= 0) & (u < CELL))[:, :, None] & ((v >= 0) & (v < CELL))[:, None]
        u, v = u.clamp(0, CELL - 1), v.clamp(0, CELL - 1)
        cover = stamps[scenes.shape[:, k, None, None], u[:, :, None], v[:, None]]
        cover = cover * (inside & scenes.there[:, k, None, None])
        tint = palette[scenes.colour[:, k]] * uniform(0.8, 1.1, count, 1) + normal(0.02, count, 3)
        picture = torch.lerp(picture, tint.clamp(0, 1)[:, :, None, None], cover[:, None])
        owner[F.avg_pool2d(cover, PATCH).flatten(1) > 0.15] = k
    picture = picture + normal(0.03, count, 3, SIZE, SIZE)
    return (picture.clamp(0, 1) * 255).round().to(torch.uint8), owner


def _pick(allowed: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """For each row one of its True columns, and whether there is one."""
    draw = torch.rand(allowed.shape, generator=generator, device=allowed.device)
    return (draw * allowed + allowed).argmax(1), allowed.any(1)


def _at(values: Tensor, column: Tensor) -> Tensor:
    return values.gather(1, column[:, None])[:, 0]


def _ids(words: list[str] | tuple[str, ...], device: torch.device) -> Tensor:
    return torch.tensor([ID[word] for word in words], device=device)


def _fill(template: str, parts: dict[str, Tensor], count: int, device: torch.device) -> Tensor:
    columns = [
        parts[word] if word in parts else torch.full((count,), ID[word], device=device)
        for word in template.split()
    ]
    return torch.stack(columns, 1)


def ask(scenes: Scenes, kind: str, generator: torch.Generator) -> Questions:
    """One question of `kind` about each scene.

    >>> generator = torch.Generator().manual_seed(0)
    >>> asked = ask(draw_scenes(1, generator), "where", generator)
    >>> decode(asked.words[0]), WORDS[asked.answer[0]]  # doctest: +SKIP
    ('where is the green cross ?', 'r1c2')

    presence: "is there a red circle ?"; half of the answers are "no", about an object that shares its colour or its
    shape with one that is there. colour: "what color is the circle ?" of a shape that occurs once. count: "how many red
    shapes ?" or "how many circles ?". relation: "is the red circle left of the blue square ?" (right of, above, below), of
    two objects in different columns or rows. where: the row and column of an object that has no twin.

    Raises SecateurError for another kind.
    """
    count, device = len(scenes), scenes.cell.device
    colours, shapes = _ids(list(COLOURS), device), _ids(SHAPES, device)
    kinds, there = scenes.kind, scenes.there
    twins = (kinds[:, :, None] == kinds[:, None]) & there[:, None]
    alone = (twins.sum(2) == 1) & there
    nothing = torch.full((count,), -1, device=device)
    about, at = torch.stack([nothing, nothing], 1), torch.stack([nothing, nothing], 1)

    def coin(chance: float = 0.5) -> Tensor:
        return torch.rand(count, generator=generator, device=device) < chance

    if kind == "presence":
        chosen, _ = _pick(there, generator)
        table = torch.zeros(count, len(COLOURS) * len(SHAPES), dtype=torch.bool, device=device)
        table = table.scatter(1, kinds.where(there, kinds[:, :1]), True)
        every = torch.arange(table.shape[1], device=device)
        colour, shape = _at(scenes.colour, chosen)[:, None], _at(scenes.shape, chosen)[:, None]
        close = (every // len(SHAPES) == colour) | (every % len(SHAPES) == shape)
        absent, _ = _pick(close & ~table, generator)
        yes = coin()
        named = torch.where(yes, _at(kinds, chosen), absent)
        parts = {"COLOUR": colours[named // len(SHAPES)], "SHAPE": shapes[named % len(SHAPES)]}
        words = _fill("is there a COLOUR SHAPE ?", parts, count, device)
        answer = torch.where(yes, ID["yes"], ID["no"])
        unique = _at(alone, chosen)
        about[:, 0] = torch.where(yes, torch.where(unique, _at(scenes.cell, chosen), -1), CELLS**2)
        at[:, 0] = 4
        return Questions(words, nothing * 0 + 6, answer, torch.ones_like(yes), about, at)
    if kind == "colour":
        same = (scenes.shape[:, :, None] == scenes.shape[:, None]) & there[:, None]
        chosen, asked = _pick((same.sum(2) == 1) & there, generator)
        parts = {"SHAPE": shapes[_at(scenes.shape, chosen)]}
        words = _fill("what color is the SHAPE ?", parts, count, device)
        about[:, 0], at[:, 0] = _at(scenes.cell, chosen), 4
        return Questions(words, nothing * 0 + 6, colours[_at(scenes.colour, chosen)], asked, about, at)
    if kind == "count":
        by_colour, chosen = coin(), _pick(there, generator)[0]
        any_colour = (torch.rand(count, generator=generator, device=device) * len(COLOURS)).long()
        any_shape = (torch.rand(count, generator=generator, device=device) * len(SHAPES)).long()
        colour = torch.where(coin(0.75), _at(scenes.colour, chosen), any_colour)
        shape = torch.where(coin(0.85), _at(scenes.shape, chosen), any_shape)
        plurals = _ids(PLURALS, device)
        first = _fill("how many COLOUR shapes ?", {"COLOUR": colours[colour]}, count, device)
        second = _fill("how many SHAPE ? <pad>", {"SHAPE": plurals[shape]}, count, device)
        number = torch.where(
            by_colour,
            ((scenes.colour == colour[:, None]) & there).sum(1),
            ((scenes.shape == shape[:, None]) & there).sum(1),
        )
        answer = _ids([str(n) for n in range(MOST + 1)], device)[number]
        words = torch.where(by_colour[:, None], first, second)
        return Questions(words, torch.where(by_colour, 5, 4), answer, torch.ones_like(by_colour), about, at)
    if kind == "where":
        chosen, asked = _pick(alone, generator)
        parts = {
            "COLOUR": colours[_at(scenes.colour, chosen)],
            "SHAPE": shapes[_at(scenes.shape, chosen)],
        }
        words = _fill("where is the COLOUR SHAPE ?", parts, count, device)
        about[:, 0], at[:, 0] = _at(scenes.cell, chosen), 4
        return Questions(words, nothing * 0 + 6, _ids(PLACES, device)[about[:, 0]], asked, about, at)
    if kind == "relation":
        first, _ = _pick(alone, generator)
        others = alone.scatter(1, first[:, None], False)
        second, asked = _pick(others, generator)
        cells = torch.stack([_at(scenes.cell, first), _at(scenes.cell, second)], 1)
        row, column = cells // CELLS, cells % CELLS
        across = torch.where(column[:, 0] == column[:, 1], False, coin() | (row[:, 0] == row[:, 1]))
        before = coin()
        parts = {
            "COLOUR1": colours[_at(scenes.colour, first)],
            "SHAPE1": shapes[_at(scenes.shape, first)],
            "COLOUR2": colours[_at(scenes.colour, second)],
            "SHAPE2": shapes[_at(scenes.shape, second)],
            "SIDE": torch.where(before, ID["left"], ID["right"]),
            "LEVEL": torch.where(before, ID["above"], ID["below"]),
        }
        beside = _fill("is the COLOUR1 SHAPE1 SIDE of the COLOUR2 SHAPE2 ?", parts, count, device)
        over = _fill("is the COLOUR1 SHAPE1 LEVEL the COLOUR2 SHAPE2 ? <pad>", parts, count, device)
        gap = torch.where(across, column[:, 0] - column[:, 1], row[:, 0] - row[:, 1])
        answer = torch.where((gap < 0) == before, ID["yes"], ID["no"])
        about = cells
        at = torch.stack([nothing * 0 + 3, torch.where(across, 8, 7)], 1)
        words = torch.where(across[:, None], beside, over)
        return Questions(words, torch.where(across, 10, 9), answer, asked, about, at)
    raise SecateurError("no question is of this kind", where=kind, fix=f"one of {', '.join(KINDS)}")


def encode(text: str) -> list[int]:
    """Word numbers of a question in lower case; "?" is a word. Raises SecateurError for a word outside the vocabulary.

    >>> encode("Is there a red circle?")[-1] == ID["?"]
    True
    """
    words = text.lower().replace("?", " ? ").replace(".", " . ").replace(",", " ").split()
    if unknown := [word for word in words if word not in ID]:
        raise SecateurError(
            f"the model doesn't know {', '.join(map(repr, unknown[:5]))}",
            where=repr(text),
            fix="ask as in 'is there a red circle ?', 'how many squares ?', 'where is the blue cross ?'",
        )
    return [ID[word] for word in words]


def decode(ids: Tensor | list[int]) -> str:
    """Words of `encode`'s numbers, without the special ones.

    >>> decode(encode("how many circles ?"))
    'how many circles ?'
    """
    return " ".join(WORDS[int(i)] for i in ids if int(i) >= len(SPECIAL))
