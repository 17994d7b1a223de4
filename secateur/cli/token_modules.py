"""`secateur train tokens`: train the modules with which a token method chooses."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from secateur.cli.flags import OUTPUT, SWITCH, Settings, flag
from secateur.cli.shared import (
    JSON_HELP,
    RESUME_HELP,
    at_least,
    check_device,
    check_new_folder,
    quiet_stdout,
    show,
    work_folder,
)
from secateur.cli.tokens import MODEL, any_model, as_prompt, is_scene, scene_model, token_method
from secateur.cli.train import recipe_of
from secateur.errors import SecateurError


@dataclass(frozen=True, kw_only=True)
class TokenModules:
    """What is trained on, how long, and where it goes."""

    method: str = flag("a method with modules: covipal, atp-llava, lrs-dip, or file.py:Class")
    target: str = flag("what stays of the visual tokens: 25%, or tokens=64 a picture", "25%")
    data: str | None = flag(
        'a .jsonl file with lines of {"image": "file", "question": "...", "answer": "..."}; default, for scenes: drawn pictures',
        None,
    )
    samples: int = flag("questions about drawn pictures, for scenes", 8192)
    steps: int | None = flag("of each part of the training; default: once over the data", None)
    seed: int = flag("of the modules' weights and the order of the data", 0)
    frozen: bool = flag("the model stays as it is; no: it is trained too, and written to OUT/model", True)
    start: str | None = flag("go on from the modules in this folder", None)
    device: str = flag("cpu, cuda, cuda:1, mps, ...", "cpu")
    dtype: str | None = flag("float32, bfloat16 or float16; default: float32 on a cpu", None)
    out: Annotated[str, OUTPUT] = flag("a new folder for the modules")
    resume: Annotated[bool, OUTPUT] = flag(RESUME_HELP, True)
    every: Annotated[int, OUTPUT] = flag("steps between checkpoints", 100)
    json: Annotated[bool, OUTPUT, SWITCH] = flag(JSON_HELP, False)


def train_tokens(
    model: Annotated[str, MODEL], /, *, flags: TokenModules, settings: Settings, recipe: Settings
) -> None:
    """Train the modules of a token method on questions with answers; attach them with --weights, or `attach(..., weights=DIR)`.

    A run that was stopped goes on where it was: give the same command again.
    """
    check_new_folder(flags.out)
    at_least("--samples", flags.samples, 1)
    at_least("--steps", flags.steps, 1)
    name = token_method(flags.method)["name"] if ":" not in flags.method else flags.method
    check_device(flags.device)
    out = Path(flags.out).expanduser()
    work = work_folder(flags.out, flags.resume)
    with quiet_stdout():
        from secateur.tokens.modules import Trained
        from secateur.tokens.train import RECIPE
        from secateur.tokens.train import train_tokens as run

        taught = RECIPE.replace(**recipe_of(recipe))
        start = None if flags.start is None else Trained.load(flags.start)
        network, data, augment = _open(model, flags, taught.batch)
        trained = run(
            network,
            name,
            data=data,
            target=flags.target,
            steps=flags.steps,
            seed=flags.seed,
            frozen=flags.frozen,
            weights=start,
            augment=augment,
            recipe=taught,
            directory=work,
            every=flags.every,
            **vars(settings),
        )
        trained.save(out)
        if not flags.frozen:
            _save_model(model, network, out / "model")
        shutil.rmtree(work, ignore_errors=True)
    about = {**trained.about, "method": trained.method, "target": trained.target, "out": flags.out}
    show(about, flags.json, lambda console: _draw(about, console))


def _open(name: str, flags: TokenModules, batch: int) -> tuple[Any, Any, Any]:
    """The model, what it is trained on, and what makes arguments of that."""
    if is_scene(name):
        if flags.data is not None:
            raise SecateurError(
                "scenes are drawn", where="--data", fix="leave it out; --samples says how many"
            )
        from secateur.tasks.scenes.answers import as_arguments, questions

        model = scene_model(name, flags.device, flags.dtype)
        return model, questions(flags.samples, flags.seed), as_arguments(model)
    if flags.data is None:
        raise SecateurError(
            "there are no questions",
            where="--data",
            fix="a .jsonl file with lines of image, question, answer",
        )
    rows = read_examples(Path(flags.data).expanduser())
    model, processor = any_model(name, flags.device, flags.dtype)
    return model, [examples(processor, rows[at : at + batch]) for at in range(0, len(rows), batch)], None


def read_examples(file: Path) -> list[dict[str, str]]:
    """The lines of a file of examples; pictures lie where it does.

    Raises `SecateurError` with the line of the first that isn't one.
    """
    import json

    from secateur.utils.files import check_path

    if not file.is_file():
        raise SecateurError("there is no such file", where=f"--data {file}", fix=check_path(file))
    rows = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        where = f"{file}, line {number}"
        try:
            row = json.loads(line)
        except ValueError as error:
            raise SecateurError(f"it isn't JSON ({error})", where=where, fix="one object a line") from error
        names = ("image", "question", "answer")
        if not isinstance(row, dict) or any(not isinstance(row.get(n), str) or not row[n] for n in names):
            raise SecateurError(
                "it isn't an object with image, question and answer", where=where, fix="each a text"
            )
        rows.append({**row, "image": str(file.parent / row["image"])})
    if not rows:
        raise SecateurError("it holds no example", where=str(file), fix="one object a line")
    return rows


def examples(processor: Any, rows: Sequence[Mapping[str, str]]) -> dict[str, Any]:
    """A batch of `forward`'s arguments with labels: prompts with their answers, -100 but for these."""
    from secateur.utils.pictures import open_picture

    pictures = [[open_picture(row["image"])] for row in rows]
    prompts = [as_prompt(processor, row["question"]) for row in rows]
    end = getattr(processor.tokenizer, "eos_token", None) or ""
    joint = [
        f"{prompt}{'' if prompt[-1:].isspace() else ' '}{row['answer']}{end}"
        for prompt, row in zip(prompts, rows)
    ]
    made = dict(processor(images=pictures, text=joint, padding=True, return_tensors="pt"))
    asked = processor(images=pictures, text=prompts, padding=True, return_tensors="pt")["attention_mask"]
    place = made["attention_mask"].cumsum(1)
    hidden = (place <= asked.sum(1, keepdim=True)) | (made["attention_mask"] == 0)
    return {**made, "labels": made["input_ids"].masked_fill(hidden, -100)}


def _save_model(name: str, network: Any, folder: Path) -> None:
    """The model that was trained with its modules."""
    if is_scene(name):
        from secateur.tasks.scenes.models import save_scenes

        save_scenes(network, folder, network.scenes)
        return
    network.save_pretrained(folder)
    from transformers import AutoProcessor

    from secateur.tasks.models import model_folder

    AutoProcessor.from_pretrained(model_folder(name), trust_remote_code=False).save_pretrained(folder)


def _draw(about: Mapping[str, Any], console: Any) -> None:
    from secateur.report.terminal import table

    made = table("part", "steps", "first loss", "last loss", right=("steps", "first loss", "last loss"))
    for row in about["lessons"]:
        made.add_row(row["name"], str(row["steps"]), f"{row['first']:.4g}", f"{row['last']:.4g}")
    console.print(made)
    console.print(f"modules: {about['out']}")
