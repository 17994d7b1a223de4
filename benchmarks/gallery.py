"""The gallery: pictures and texts of what the library does, and the page that shows them (docs/gallery.md).

python benchmarks/gallery.py docs/gallery                 # everything; a few minutes on two processors
python benchmarks/gallery.py docs/gallery --only pareto   # one part; the others stay as they are

Every part is a function that writes its picture and gives what the page says under it. Seeds are fixed, so a second run writes
the same pictures.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import secateur
from secateur.errors import SecateurError
from secateur.report.tokens import draw_kept, parts_kept, sheet
from secateur.utils.files import atomic_write_text

BLUE, ORANGE, GREY = "#0072b2", "#d55e00", "#8a8f8c"
"""Told apart by people who don't see red and green, on white and on black."""
KINDS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#f0e442")
PHOTO, CLASSIFIER, CLASS = "flower.jpg", "efficientnet-lite0", 985
"""Of scikit-learn; of a wheel; daisy."""
PROMPTS = ("The capital of France is", "Water boils at", "My favourite animal is the")


def save(pixels: Tensor, file: Path) -> None:
    """uint8 [H, W, 3] as a picture of few bytes: PNG with 64 colours, or JPEG by its ending."""
    from PIL import Image

    image = Image.fromarray(pixels.numpy())
    if file.suffix == ".jpg":
        image.save(file, quality=80, optimize=True)
    else:
        image.quantize(64).save(file, optimize=True)


# ---------------------------------------------------------------- kept tokens


def tokens(folder: Path, methods: Sequence[str] = (), image: int = 3, target: str = "25%") -> list[str]:
    """What every token method keeps of one picture, and what the model then answers."""
    from secateur.tasks.scenes.draw import encode
    from secateur.tasks.scenes.evaluate import picture
    from secateur.tasks.scenes.models import inputs, load_scenes, scenes_tokenizer

    model, tokenizer = load_scenes("llava", 0), scenes_tokenizer()
    pixels, known = picture(image)
    shown = pixels.permute(1, 2, 0)
    question, answer = known["where"]
    given = inputs(model, pixels[None, None], [encode(question)])
    panels, silent = [(draw_kept(shown, torch.ones(1, 1, dtype=torch.bool), 184), f"all: {answer}")], []
    for name in methods or secateur.list_methods(objects="T"):
        try:
            with secateur.attach(
                model, name, target=target, tokenizer=tokenizer, question=question
            ) as attached:
                with torch.no_grad():
                    written = model.generate(**given, max_new_tokens=3, do_sample=False)
                parts = parts_kept(attached)
            said = tokenizer.decode(
                written[0, given["input_ids"].shape[1] :], skip_special_tokens=True
            ).strip()
            panels.append((draw_kept(shown, parts[0].kept, 184), f"{name}: {said}"))
        except (SecateurError, IndexError) as error:
            silent.append(f"`{name}` ({escape(' '.join(str(error).split()))})")
    save(sheet([panels], across=6), folder / "tokens.png")
    lines = [
        f"“{question}” is asked about test picture {image} of `scenes`, and every method keeps {target} of the 64 visual tokens in",
        f"the end. Under each picture stands the answer; {answer} is right.",
        "",
        "![what each method kept: cells that left are dark](gallery/tokens.png)",
        "",
        f"One of them: `secateur tokens scenes --image {image} --method divprune --target {target} --out kept.png`",
    ]
    return lines + (["", f"Not drawn: {'; '.join(silent)}."] if silent else [])


# ---------------------------------------------------------------- groups


def architectures() -> dict[str, tuple[nn.Module, Any]]:
    """Five of different kinds, with random weights."""
    import timm

    from secateur.tasks.tiny import inputs_for, tiny_llama, tiny_llava, tiny_mixtral

    made: dict[str, tuple[nn.Module, Any]] = {}
    for name, size in (("resnet18", 64), ("vit_tiny_patch16_224", 224)):
        made[name] = timm.create_model(name).eval(), torch.zeros(1, 3, size, size)
    for name, build in (("a Llama", tiny_llama), ("a Mixtral", tiny_mixtral), ("a LLaVA", tiny_llava)):
        model = build().float()
        made[f"{name}, small"] = model, inputs_for(model)
    return made


def groups(folder: Path, models: Mapping[str, tuple[nn.Module, Any]] | None = None) -> list[str]:
    """Every group of coupled slices as a box: its kind a colour, its share of the parameters the width."""
    from secateur.report.graph import describe_groups

    wide, left, row = 900, 210, 26
    parts, top, colours = [], 8, {}
    for name, (model, given) in (models or architectures()).items():
        found = describe_groups(secateur.trace(model, given))["groups"]
        parts.append(f'<text x="8" y="{top + 18}" class="t">{escape(name)}</text>')
        top += 26
        for kind in dict.fromkeys(group["kind"] for group in found):
            colour = colours.setdefault(kind, KINDS[len(colours) % len(KINDS)])
            same = [group for group in found if group["kind"] == kind]
            free = [group for group in same if not group["reason"]]
            units = sum(group["size"] for group in free)
            words = f"{len(free)} of {len(same)} groups, {units:,} units" if free else f"{len(same)}, not cut"
            parts.append(f'<text x="8" y="{top + 16}">{escape(kind.replace("_", " "))}</text>')
            parts.append(f'<text x="104" y="{top + 16}" class="s">{words}</text>')
            across, share = left + 60.0, (wide - left - 70) / max(1, len(same))
            for group in same:
                width = max(2.0, min(share - 2, 6 + 260 * group["params"]))
                look = f'fill="{colour}"' if not group["reason"] else f'fill="none" stroke="{GREY}"'
                title = f"{group['name']}: {group['size']:,}, {100 * group['params']:.1f} % of the parameters"
                title += f"; {group['reason']}" if group["reason"] else ""
                parts.append(
                    f'<rect x="{across:.1f}" y="{top + 4}" width="{width:.1f}" height="16" {look}>'
                    f"<title>{escape(title)}</title></rect>"
                )
                across += width + 2
            top += row
        top += 10
    style = "text{font:13px sans-serif;fill:#222}.t{font-weight:600}.s{fill:#555}svg{background:#fff}"
    svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {wide} {top}"><style>{style}</style><rect width="{wide}" height="{top}" fill="#fff"/>{"".join(parts)}</svg>\n'
    atomic_write_text(folder / "groups.svg", svg)
    return [
        "A group is a set of slices that leave together. Every box is one: the wider, the more of the parameters it holds a part of;",
        "an empty one can't be cut, and its tooltip (open the picture by itself) says why.",
        "",
        "![the groups of five architectures, by kind](gallery/groups.svg)",
        "",
        "Of your own model: `secateur inspect MODEL --html groups.html`, or `secateur.trace(model, inputs).explain()`.",
    ]


# ---------------------------------------------------------------- saliency


def maps(
    folder: Path,
    model: nn.Module | None = None,
    methods: Sequence[str] = (),
    side: int = 224,
    target: int | None = CLASS,
) -> list[str]:
    """Maps of one photograph side by side."""
    from importlib.resources import files

    from secateur.data.pictures import IMAGENET_MEAN, IMAGENET_STD
    from secateur.saliency import saliency_methods
    from secateur.saliency.picture import overlay, read_picture
    from secateur.tasks.models import load_model

    model = load_model(CLASSIFIER)[0] if model is None else model
    about = getattr(model, "pretrained_cfg", None) or {}
    photo = Path(str(files("sklearn.datasets").joinpath(f"images/{PHOTO}")))
    size = (side, side)
    x, pixels = read_picture(photo, size, about.get("mean", IMAGENET_MEAN), about.get("std", IMAGENET_STD))
    panels, silent = [(pixels, "the photograph")], []
    for name in methods or saliency_methods():
        try:
            found = secateur.saliency(model, x, name, target)
            panels.append((overlay(found.values, pixels), name))
        except SecateurError as error:
            silent.append(f"`{name}` ({escape(' '.join(str(error).split()))})")
    save(sheet([panels], across=4), folder / "saliency.jpg")
    lines = [
        f"What speaks for “daisy” in scikit-learn's photograph of a flower, in the eyes of `{CLASSIFIER}`. Warm: for it; cold: against it.",
        "The photograph is [by vultilion](https://www.flickr.com/photos/vultilion/6056698931/), CC BY 2.0.",
        "",
        "![the photograph and its maps by every method](gallery/saliency.jpg)",
        "",
        f"One of them: `secateur saliency {CLASSIFIER} photo.jpg --method normgrad --target {CLASS} --out map.png`",
    ]
    return lines + (["", f"Not drawn: {'; '.join(silent)}."] if silent else [])


# ---------------------------------------------------------------- Pareto


PANELS = (("digits", "macs"), ("cifar10", "macs"), ("scenes", "tokens"), ("mnist-dit", "macs"))


def pareto(folder: Path) -> list[str]:
    """Quality over cost, from the comparisons that come with the library."""
    from secateur.taxonomy.measured import FILE

    every = json.loads(Path(FILE).read_text(encoding="utf-8"))["comparisons"]
    wide, high = 460, 330
    drawn, commands = [], []
    for place, (task, cost) in enumerate(PANELS):
        found = [c for c in every if (c["task"], c["cost"], c["steps"]) == (task, cost, 0)]
        lines = [line for c in found for line in c["lines"] if line["quality"] is not None]
        x, y = (place % 2) * wide, (place // 2) * high
        drawn.append(f'<g transform="translate({x} {y})">{_panel(task, cost, lines, found[0]["dense"])}</g>')
        commands += [f"- {task}, {cost}: `{c['command']}`" for c in found]
    style = "text{font:12px sans-serif;fill:#222}.t{font-weight:600;font-size:14px}.s{fill:#555}"
    total = f"{2 * wide} {2 * high}"
    atomic_write_text(
        folder / "pareto.svg",
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {total}"><style>{style}</style><rect width="{2 * wide}" height="{2 * high}" fill="#fff"/>{"".join(drawn)}</svg>\n',
    )
    return [
        "Every method that was compared, at what its result costs; the line joins those that no other beats in both. Triangles are chance,",
        "the dashed line is the model before the cut. Without training after the cut.",
        "",
        "![quality over cost in four comparisons](gallery/pareto.svg)",
        "",
        "From the comparisons that come with the library:",
        "",
        *commands,
    ]


def front(points: Sequence[tuple[float, float, str]]) -> list[tuple[float, float, str]]:
    """The (cost, quality, name) that no cheaper or equal one beats, cheapest first.

    >>> front([(0.8, 0.9, "a"), (0.6, 0.7, "b"), (0.7, 0.6, "c")])
    [(0.6, 0.7, 'b'), (0.8, 0.9, 'a')]
    """
    best: list[tuple[float, float, str]] = []
    for point in sorted(points, key=lambda p: (p[0], -p[1])):
        if not best or point[1] > best[-1][1]:
            best.append(point)
    return best


def _panel(task: str, cost: str, lines: Sequence[Mapping[str, Any]], dense: float) -> str:
    left, top, wide, high = 46, 34, 390, 240
    points = [(line["cost"], line["quality"], line["method"]) for line in lines]
    low = min(c for c, *_ in points) - 0.03
    floor = min(q for _, q, _ in points) - 0.09

    def at(share: float, quality: float) -> tuple[float, float]:
        return left + wide * (share - low) / (1 - low), top + high * (1 - (quality - floor) / (1.02 - floor))

    parts = [f'<text x="{left}" y="20" class="t">{task}: accuracy over {cost} left</text>']
    for tick in range(0, 101, 20):
        if tick / 100 >= floor:
            _, y = at(1, tick / 100)
            parts.append(f'<path d="M{left} {y:.1f}h{wide}" stroke="#ddd"/>')
            parts.append(f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end" class="s">{tick} %</text>')
        if tick / 100 >= low:
            x, _ = at(tick / 100, floor)
            parts.append(
                f'<text x="{x:.1f}" y="{top + high + 18}" text-anchor="middle" class="s">{tick} %</text>'
            )
    _, y = at(1, dense)
    parts.append(f'<path d="M{left} {y:.1f}h{wide}" stroke="#222" stroke-dasharray="4 4"/>')
    best = front([point for point in points if not point[2].startswith("random")])
    for c, q, name in points:
        x, y = at(c, q)
        title = f"<title>{escape(name)}: {100 * q:.1f} % at {100 * c:.1f} %</title>"
        if name.startswith("random"):
            parts.append(
                f'<path d="M{x:.1f} {y - 6:.1f}l6 10h-12z" fill="none" stroke="{ORANGE}" stroke-width="1.5">{title}</path>'
            )
        else:
            colour = BLUE if (c, q, name) in best else GREY
            parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{colour}">{title}</circle>')
    joined = " ".join(f"{x:.1f},{y:.1f}" for x, y in (at(c, q) for c, q, _ in best))
    parts.append(f'<polyline points="{joined}" fill="none" stroke="{BLUE}" stroke-width="1.5"/>')
    placed: list[tuple[float, float]] = []
    for c, q, name in reversed(best):
        x, y = at(c, q)
        y += 16
        while any(abs(x - other) < 110 and abs(y - beside) < 13 for other, beside in placed):
            y += 13
        placed.append((x, y))
        parts.append(f'<text x="{min(x + 7, left + wide - 90):.1f}" y="{y:.1f}">{escape(name)}</text>')
    return "".join(parts)


# ---------------------------------------------------------------- digits


def digits(folder: Path, count: int = 20, steps: int = 300, target: str = "macs<=70%") -> list[str]:
    """Drawings of a network that draws digits: whole, cut, and cut and trained for a moment."""
    from secateur.tasks.digits_diffusion import SEEDS, flow_loss, load_network, load_pictures, nearest_digits
    from secateur.tasks.networks.digits_diffusion import prompts, sampler
    from secateur.training import fit
    from secateur.training.recipe import Recipe
    from secateur.training.sampling import draw, visited

    model, drawing = load_network(), sampler()
    sides: dict[str, nn.Module] = {"before": model}
    samples = visited(model, drawing, 16, 0)
    pruned = secateur.prune(
        model, samples[0], method="group-magnitude", target=target, data=samples, inplace=False
    )
    rows = []

    def show(name: str, network: nn.Module) -> None:
        pictures, _ = draw(network.eval(), drawing, count, SEEDS["test"])
        right = (nearest_digits(pictures) == prompts(count)[1]).float().mean().item()
        grey = ((1 - pictures[:, 0].clamp(-1, 1)) * 127.5).round().to(torch.uint8)
        grey = torch.nn.functional.pad(grey, (1, 1, 1, 1), value=255)
        strip = torch.cat(list(grey.repeat_interleave(4, 1).repeat_interleave(4, 2)), 1)
        rows.append(
            (strip[..., None].expand(-1, -1, 3), f"{name}: {right:.0%} are the digit that was asked for")
        )

    show("before", sides["before"])
    show(f"after, {target}", pruned.model)
    fit(
        pruned.model,
        load_pictures("train"),
        steps=steps,
        seed=0,
        loss=flow_loss,
        recipe=Recipe(optimizer="adamw", lr=1e-3, batch=64, warmup=0.1),
        description="training what is left",
    )
    show(f"and {steps} steps of training", pruned.model)
    save(sheet([[row] for row in rows]), folder / "digits.png")
    return [
        "`digits-diffusion` draws digits from prompts; its channels leave by `group-magnitude`, and what is left is trained for a moment.",
        "",
        f"![digits drawn before the cut, after it, and after {steps} steps of training](gallery/digits.png)",
        "",
        "See [models that draw](diffusion.md) for methods that are made for it.",
    ]


# ---------------------------------------------------------------- texts


CUTS = (("magnitude", "70%"), ("magnitude", "50%"), ("wanda", "50%"))


def texts(
    folder: Path, model: str = "smollm2", cuts: Sequence[tuple[str, str]] = CUTS, words: int = 24
) -> list[str]:
    """What a language model says before and after, greedily."""
    from secateur.tasks.models import load_model

    names, columns = ["as it is"], []
    for cut in (None, *cuts):
        network, tokenizer = load_model(model)
        if cut is not None:
            secateur.prune(
                network,
                method=cut[0],
                target=cut[1],
                samples=8,
                seqlen=128,
                tokenizer=tokenizer,
                inplace=True,
            )
            names.append(f"`{cut[0]}`, {cut[1]} of the weights kept")
        columns.append([_continued(network, tokenizer, prompt, words) for prompt in PROMPTS])
    lines = [
        f"`{model}` before and after single weights were set to zero, greedy. Nothing is trained after the cut.",
        "",
    ]
    for place, prompt in enumerate(PROMPTS):
        lines += [f"**{prompt}** …", "", "| model | goes on |", "| --- | --- |"]
        lines += [f"| {name} | {column[place]} |" for name, column in zip(names, columns, strict=True)] + [""]
    return [*lines, f"One of them: `secateur prune {model} --method wanda --target 50% --out out/sparse`"]


def _continued(model: Any, tokenizer: Any, prompt: str, words: int) -> str:
    given = tokenizer(prompt, return_tensors="pt")
    with torch.no_grad():
        ids = model.generate(**given, max_new_tokens=words, do_sample=False)[0, given["input_ids"].shape[1] :]
    text = " ".join(tokenizer.decode(ids, skip_special_tokens=True).split())
    return escape(text).replace("|", "\\|").replace("*", "\\*").replace("_", "\\_").replace("`", "\\`")


# ---------------------------------------------------------------- the page

PARTS: dict[str, tuple[str, Callable[[Path], list[str]]]] = {
    "tokens": ("Kept tokens of every method", tokens),
    "groups": ("The groups of five architectures", groups),
    "saliency": ("Saliency maps side by side", maps),
    "pareto": ("Quality over cost", pareto),
    "digits": ("Digits, before and after", digits),
    "texts": ("Texts of a dense and of pruned models", texts),
}
TOP = "<!-- written by `make gallery` (benchmarks/gallery.py) -->\n# Gallery\n"


def page(file: Path, told: Mapping[str, Sequence[str]]) -> None:
    """Write the page; parts that aren't `told` stay as they are in it."""
    before: dict[str, str] = {}
    if file.is_file():
        for section in file.read_text(encoding="utf-8").split("\n## ")[1:]:
            title, _, body = section.partition("\n")
            before[title] = body.strip()
    sections = []
    for name, (title, _) in PARTS.items():
        body = "\n".join(told[name]).strip() if name in told else before.get(title)
        if body:
            sections.append(f"## {title}\n\n{body}\n")
    atomic_write_text(file, "\n".join([TOP, *sections]))


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="of the pictures; the page lies beside it, under its name")
    parser.add_argument("--only", default=",".join(PARTS), help=f"some of {', '.join(PARTS)}, with commas")
    asked = parser.parse_args(argv)
    asked.folder.mkdir(parents=True, exist_ok=True)
    for name in asked.only.split(","):
        print(f"{name} ...", file=sys.stderr)
        page(asked.folder.with_suffix(".md"), {name: PARTS[name][1](asked.folder)})


if __name__ == "__main__":
    main()
