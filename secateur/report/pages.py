"""Pages about the registered methods, written from their code: docstring, taxonomy record, hyperparameters.

python -m secateur.report.pages docs/methods
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

from secateur.attention.method import AttentionMethod
from secateur.method import Method, own_methods
from secateur.prompts.method import PromptMethod
from secateur.pruning.method import UnitMethod, WeightMethod
from secateur.report.catalogue import write_catalogue
from secateur.report.markdown import prose
from secateur.saliency.method import SaliencyMethod
from secateur.saliency.objects.method import ObjectMethod
from secateur.taxonomy import MethodInfo
from secateur.taxonomy.axes import AXES, MEANING, RECORDS, notation
from secateur.taxonomy.catalogue import FILE
from secateur.tokens.method import TokenMethod, WorkMethod
from secateur.training.method import TrainMethod
from secateur.training.skip import SkipMethod
from secateur.utils.files import atomic_write_text

GENERATED = (
    "<!-- written by `python -m secateur.report.pages docs/methods`; edit the method's file instead -->"
)

LABELS = {
    "objects": "objects",
    "granularity": "granularity",
    "speedup": "speed-up",
    "when": "when",
    "criteria": "criteria",
    "order": "order",
    "stages": "stages",
    "data": "data",
    "start": "starts from",
    "recovery": "recovery",
    "task": "task",
    "decision": "decision",
    "scope": "scope",
    "fusion": "combined with",
    "supervision": "supervision",
    "models": "models",
    "budget_exact": "budget met exactly",
    "budget_unit": "budget counted in",
}


def kind_of(cls: type[Method]) -> str:
    """What a method removes, in one word of the index; nothing where it draws a map."""
    if issubclass(cls, SaliencyMethod):
        return "nothing: a map"
    if issubclass(cls, ObjectMethod):
        return "nothing: objects are found"
    if issubclass(cls, WeightMethod):
        return "weights"
    if issubclass(cls, TrainMethod):
        return cls.removes
    if issubclass(cls, TokenMethod):
        return "tokens"
    if issubclass(cls, AttentionMethod):
        return "nothing: keys are read less"
    if issubclass(cls, WorkMethod):
        return "nothing: visual tokens do less"
    if issubclass(cls, PromptMethod):
        return "nothing: prompts are trained"
    return "units" if issubclass(cls, UnitMethod) else "other"


def _cell(text: object) -> str:
    return " ".join(str(text).split()).replace("|", r"\|")


def _table(header: Iterable[str], rows: Iterable[Iterable[object]]) -> list[str]:
    head = list(header)
    lines = ["| " + " | ".join(head) + " |", "| " + " | ".join("---" for _ in head) + " |"]
    return [*lines, *("| " + " | ".join(map(_cell, row)) + " |" for row in rows), ""]


def _spelled(info: MethodInfo, axis: str) -> str:
    """The members of an axis in words."""
    text = notation(info, axis)
    if text in ("any", "-") or axis not in AXES:
        return ""
    return ", ".join(
        MEANING[member] for member in AXES[axis] if member in info.members(axis) and member in MEANING
    )


def _docs(cls: type[Method]) -> tuple[str, str]:
    """(what it does, notes on reconstruction): the module's docstring, then the class's, paragraph by paragraph.

    A paragraph that starts with `Reconstruct`, `Depart` or `Differs` is a note.
    """
    module = inspect.getmodule(cls)
    texts = [(module.__doc__ if module else "") or "", cls.__dict__.get("__doc__") or ""]
    if texts[1].startswith(f"{cls.__name__}("):  # the signature that dataclass() writes
        texts[1] = ""
    body: list[str] = []
    notes: list[str] = []
    for text in texts:
        for paragraph in re.split(r"\n\s*\n", inspect.cleandoc(text)):
            note = re.match(r"(reconstruct|depart|differs)", paragraph.strip(), re.IGNORECASE)
            target = notes if note else body
            if paragraph.strip() and paragraph not in target:
                target.append(paragraph)
    return prose("\n\n".join(body)), prose("\n\n".join(notes))


def _hyperparameters(cls: type[Method]) -> list[str]:
    rows = []
    for field in dataclasses.fields(cls):
        if not field.init:
            continue
        default: object = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        shown = "required" if default is dataclasses.MISSING else f"`{default!r}`"
        rows.append((f"`{field.name}`", shown, field.metadata.get("help", "")))
    if not rows:
        return ["None.", ""]
    return _table(("name", "default", "meaning"), rows)


def _target(info: MethodInfo) -> str:
    return "2:4" if info.members("granularity") == {"N:M"} else "50%"


def _examples(cls: type[Method]) -> list[str]:
    name, target, info = cls.name, _target(cls.info), cls.info
    if issubclass(cls, SkipMethod):
        return _skip_examples(cls)
    if issubclass(cls, TrainMethod):
        return _train_examples(name)
    if issubclass(cls, TokenMethod):
        return _token_examples(cls)
    if issubclass(cls, SaliencyMethod):
        return _map_examples(name, cls.shown_on)
    if issubclass(cls, ObjectMethod):
        return _object_examples(name)
    if issubclass(cls, AttentionMethod):
        return _attention_examples(name)
    if issubclass(cls, WorkMethod):
        return _work_examples(name)
    if issubclass(cls, PromptMethod):
        return _prompt_examples(name)
    given = "model, " if "llm" in info.models else "model, inputs, "
    data = ", data=samples" if cls.needs else ""
    lines = [
        "```sh",
        f"secateur prune smollm2 --method {name} --target {target} --out out/{name}",
        "```",
        "",
        "```python",
        "import secateur",
        "",
        f'pruned = secateur.prune({given}method="{name}", target="{target}"{data})',
        f'pruned.save("out/{name}")',
        "```",
        "",
    ]
    field = next(
        (f for f in dataclasses.fields(cls) if f.init and isinstance(f.default, int | float | str)), None
    )
    if field is not None:
        lines += [f"Hyperparameters are keyword arguments: `{field.name}={field.default!r}`.", ""]
    if {"unstr", "N:M"} <= info.members("granularity"):
        lines += ["The target `2:4` keeps 2 of every 4 weights along the input.", ""]
    return lines


def _skip_examples(cls: type[SkipMethod]) -> list[str]:
    name, task = cls.name, cls.shown_on
    return [
        "```sh",
        f"secateur train-prune {task} --method {name} --out out/{name}",
        "```",
        "",
        "```python",
        "import secateur",
        "from secateur.tasks import load_task",
        "",
        f'pruned = secateur.train_prune(load_task("{task}"), method="{name}")',
        f'with secateur.attach(pruned.model, "{name}") as attached:',
        "    out = pruned.model(pictures)",
        "print(attached.work.share)  # of the multiply-adds, for each picture",
        "```",
        "",
    ]


def _train_examples(name: str) -> list[str]:
    return [
        "```sh",
        f"secateur train-prune digits --method {name} --target 50% --epochs 5 --out out/{name}",
        "```",
        "",
        "```python",
        "import secateur",
        "from secateur.tasks import load_task",
        "",
        f'pruned = secateur.train_prune(load_task("digits"), method="{name}", target="50%", epochs=5)',
        f'pruned.save("out/{name}")',
        "```",
        "",
    ]


def _token_examples(cls: type[TokenMethod]) -> list[str]:
    target = "" if cls.adaptive else ', target="25%"'
    trained = cls.modules is not TokenMethod.modules
    target += ', weights="out/modules"' if trained else ""
    target += "".join(f', given={{"{name}": {name}}}' for name in cls.asks)
    first = f"secateur train tokens scenes --method {cls.name} --target 25% --steps 250 --lr 0.001 --out out/modules"
    second = f"secateur tokens scenes --image 3 --method {cls.name} --target 25%{' --weights out/modules' if trained else ''}"
    shell = ["```sh", *([first] if trained else []), second, "```", ""]
    return [
        *([] if cls.asks else shell),
        "```python",
        "import secateur",
        "",
        f'with secateur.attach(model, "{cls.name}"{target}) as attached:',
        "    model.generate(**inputs)",
        "attached.kept, attached.report",
        "```",
        "",
    ]


def _object_examples(name: str) -> list[str]:
    return [
        "```sh",
        f"secateur train sod --method {name} --out out/{name}",
        f"secateur saliency out/{name} photo.jpg --out found.png",
        "```",
        "",
        "```python",
        "from secateur.tasks.sod import load_objects",
        "",
        f'found = load_objects("out/{name}").find([picture])[0]',
        "found.masks, found.scores, found.saliency",
        "```",
        "",
    ]


def _map_examples(name: str, network: str) -> list[str]:
    return [
        "```sh",
        f"secateur saliency {network} photo.jpg --method {name} --out map.png",
        "```",
        "",
        "```python",
        "import secateur",
        "",
        f'found = secateur.saliency(model, image, method="{name}", target=281)',
        'found.save("map.png", image)',
        "```",
        "",
    ]


def _work_examples(name: str) -> list[str]:
    return [
        "```sh",
        f"secateur tokens scenes --image 3 --method {name} --target 25%",
        "```",
        "",
        "```python",
        "import secateur",
        "from secateur.tokens.heads import head_ratios",
        "",
        'given = {"ratios": head_ratios(model, prompts)}',
        f'with secateur.attach(model, "{name}", target="25%", given=given) as attached:',
        "    model.generate(**inputs)",
        'attached.setup.work.save("work.json")',
        "```",
        "",
    ]


def _attention_examples(name: str) -> list[str]:
    return [
        "```python",
        "import secateur",
        "",
        f'with secateur.attach(model, "{name}", density="25%") as attached:',
        "    model(input_ids)",
        "attached.report",
        "```",
        "",
    ]


def _prompt_examples(name: str) -> list[str]:
    return [
        "```python",
        "from secateur.prompts import train_prompts",
        "",
        f'found = train_prompts(clip, tokenizer, (images, labels), classes, method="{name}")',
        "found.logits(others, other_classes)",
        "```",
        "",
    ]


def _budgets(cls: type[TokenMethod]) -> str:
    """What `attach(budget=...)` can't ask of a token method."""
    refused: dict[str, list[str]] = {}
    for budget, reason in cls.no_budget.items():
        refused.setdefault(reason, []).append(f'"{budget}"')
    said = [f"No budget {', '.join(names)}: {reason}." for reason, names in refused.items()]
    if cls.one_crop:
        said.append(f"No budget that several crops or frames share: {cls.one_crop}.")
    return "".join(f" {line}" for line in said)


def _facts(cls: type[Method]) -> str:
    info = cls.info
    if issubclass(cls, TokenMethod):
        newlines = {"keep": "stay", "drop": "leave", "compete": "compete with the others"}[cls.newlines]
        training = "needs no training" if info.training_free else "trains"
        return (
            f"Removes visual tokens while the model runs; {training}; the tokens of one {cls.scope} compete; "
            f"position ids are {'counted anew' if cls.positions == 'compact' else 'kept'}; newline tokens {newlines}."
            + _budgets(cls)
        )
    if issubclass(cls, AttentionMethod):
        return "Reads fewer keys while the model runs and removes nothing; needs no training and no data."
    if issubclass(cls, WorkMethod):
        return "Spares visual tokens work while the model runs and removes none before the cut; needs no training; heads are ranked on prompts."
    if issubclass(cls, PromptMethod):
        return "Trains prompts in both towers of a frozen CLIP or SigLIP and removes nothing; only the training sees fewer patches."
    if issubclass(cls, SaliencyMethod):
        return f"Draws a map and removes nothing; {cls.runs} of the model as it is; needs no training."
    if issubclass(cls, ObjectMethod):
        return "Learns on the maps of a network that stays as it is, finds objects and removes nothing; needs masks to learn from."
    facts = [f"Removes {kind_of(cls)}" if kind_of(cls) != "other" else "Neither removes weights nor units"]
    facts.append("needs no training" if info.training_free else "trains")
    facts.append("reads `" + "`, `".join(sorted(cls.needs)) + "`" if cls.needs else "reads no statistics")
    if issubclass(cls, (WeightMethod, UnitMethod)):
        facts.append(f"divides a budget {'`' + cls.allocation + '`'} unless told otherwise")
    if issubclass(cls, UnitMethod) and cls.kinds:
        counted = "the weights in the blocks" if cls.share_of == "weights" else "the units of each group"
        facts.append(f"a bare percentage counts {counted}")
        facts.append(f"cuts {', '.join(kind.replace('_', ' ') for kind in cls.kinds)}")
    return "; ".join(facts) + "."


def method_page(cls: type[Method]) -> str:
    """The page of one registered method, as markdown."""
    info = cls.info
    body, notes = _docs(cls)
    module = cls.__module__.replace(".", "/") + ".py"
    links = []
    for link in info.links:
        label = f"arXiv {info.arxiv}" if "arxiv.org" in link else link.removeprefix("https://github.com/")
        links.append(f"[{label}]({link})")
    where = [*links, f"`{module}`", f"Spec: {info.spec}"]
    lines = [f"# {info.title or cls.name}", "", GENERATED, "", f"`{cls.name}` · " + " · ".join(where), ""]
    if info.description:
        lines += [info.description, ""]
    lines += [_facts(cls), ""]
    if info.kernel_needed and not issubclass(cls, AttentionMethod):
        lines += [
            "The result is zeros in dense tensors: same size and speed without sparse kernels.",
            "",
        ]
    lines += ["## What it does", "", body or "No docstring.", ""]
    if notes:
        lines += ["## Reconstruction", "", notes, ""]
    lines += [
        "## Use",
        "",
        *_examples(cls),
        "## Hyperparameters",
        "",
        *_hyperparameters(cls),
        "## Place in the taxonomy",
        "",
    ]
    rows = [(label, f"`{notation(info, axis)}`", _spelled(info, axis)) for axis, label in LABELS.items()]
    flags = ("training_free", "needs_labels", "kernel_needed", "changes_shapes")
    rows += [
        (flag.replace("_", " "), "`yes`" if getattr(info, flag) else "`no`", "derived") for flag in flags
    ]
    lines += _table(("axis", "value", "in words"), rows)
    return "\n".join(lines).rstrip() + "\n"


def methods_table(classes: Mapping[str, type[Method]]) -> str:
    """One row a method, with links to the pages."""
    rows = []
    for name, cls in classes.items():
        info = cls.info
        paper = f"[{info.arxiv}](https://arxiv.org/abs/{info.arxiv})" if info.arxiv else "-"
        shown = [
            f"[{name}]({name}.md)",
            _title(info.title),
            kind_of(cls),
            notation(info, "granularity"),
        ]
        shown += [notation(info, "when"), notation(info, "criteria"), notation(info, "data")]
        rows.append([*shown, "yes" if info.training_free else "no", paper])
    header = (
        "method",
        "name",
        "removes",
        "granularity",
        "when",
        "criteria",
        "data",
        "training-free",
        "arXiv",
    )
    return "\n".join(_table(header, rows)).rstrip() + "\n"


def _title(title: str) -> str:
    return title.split(" (")[0]


def index_page(classes: Mapping[str, type[Method]]) -> str:
    """`docs/methods/README.md`."""
    lines = ["# Methods", "", GENERATED, "", f"{len(classes)} methods, from their own records.", ""]
    lines += [methods_table(classes)]
    lines += [
        "The short forms are spelled out in [taxonomy.md](taxonomy.md), which also places the published systems."
    ]
    return "\n".join(lines) + "\n"


def taxonomy_page(classes: Mapping[str, type[Method]]) -> str:
    """`docs/methods/taxonomy.md`: the axes, and where the published systems stand on them."""
    by_spec: dict[str, list[str]] = {}
    for name, cls in classes.items():
        by_spec.setdefault(cls.info.spec, []).append(f"[{name}]({name}.md)")
    lines = ["# Taxonomy", "", GENERATED, ""]
    lines += ["Every method has one record. `secateur.list_methods` and `secateur methods` filter by it, and"]
    lines += [
        "`secateur.recommend` chooses by it. The axes are those of Cheng et al., *A Survey on Deep Neural Network"
    ]
    lines += [
        "Pruning* ([2308.06767](https://arxiv.org/abs/2308.06767)), extended to tokens, attention blocks, windows"
    ]
    lines += [
        "and saliency maps. `a/b` are alternatives, `a+b` go together, `any` is every member, `-` is not applicable.",
        "",
    ]
    members = []
    for axis, legal in AXES.items():
        words = [f"`{member}` {MEANING[member]}" if member in MEANING else f"`{member}`" for member in legal]
        members.append((LABELS[axis], ", ".join(words)))
    lines += ["## Axes", "", *_table(("axis", "members"), members)]
    lines += ["## Published systems", ""]
    lines += ["Our reading of the papers; the last column links to what this library has of each.", ""]
    axes = (
        "objects",
        "granularity",
        "speedup",
        "when",
        "criteria",
        "order",
        "data",
        "recovery",
        "decision",
        "models",
    )
    rows = []
    for info in RECORDS:
        title = f"[{_title(info.title)}](https://arxiv.org/abs/{info.arxiv})"
        here = ", ".join(by_spec.get(info.spec, ())) or "-"
        rows.append([title, *(notation(info, axis) for axis in axes), here])
    lines += _table(("system", *(LABELS[axis] for axis in axes), "here"), rows)
    return "\n".join(lines).rstrip() + "\n"


def pages() -> dict[str, str]:
    """Every page of `docs/methods`: file name -> markdown.

    >>> "README.md" in pages()
    True
    """
    classes = own_methods()
    methods = {f"{name}.md": method_page(cls) for name, cls in classes.items()}
    return {"README.md": index_page(classes), "taxonomy.md": taxonomy_page(classes), **methods}


def write_pages(folder: str | Path) -> list[Path]:
    """Writes the pages that changed, removes pages of methods that are gone, and returns what it touched."""
    folder, touched = Path(folder), []
    wanted = pages()
    for name, text in wanted.items():
        path = folder / name
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            atomic_write_text(path, text)
            touched.append(path)
    for path in sorted(folder.glob("*.md")):
        if path.name not in wanted and GENERATED in path.read_text(encoding="utf-8"):
            path.unlink()
            touched.append(path)
    return touched


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m secateur.report.pages", description="Write the pages of all methods."
    )
    parser.add_argument("folder", help="where the pages go, such as docs/methods")
    given = parser.parse_args(argv)
    touched = write_pages(given.folder)
    if write_catalogue():
        touched.append(FILE)
    print("\n".join(map(str, touched)) if touched else "nothing to change")
    return 0


if __name__ == "__main__":
    sys.exit(main())
