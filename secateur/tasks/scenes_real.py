"""Real files for the small models: easy-VQA, 4,000 pictures of one coloured shape with 38,575 questions (MIT licence).

Source: github.com/vzhou842/easy-VQA. The last 400 pictures are kept apart to measure on.
"""

from __future__ import annotations

import functools
import gzip
import io
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secateur.errors import SecateurError
from secateur.files import require_data
from secateur.tasks.scenes import ID, encode
from secateur.tasks.scenes_evaluate import Group, accuracy
from secateur.tasks.scenes_models import inputs, load_scenes
from secateur.tasks.scenes_train import Recipe

TEST = 400
KINDS = ("shape", "colour", "yes or no")


def kind_of(question: str) -> str:
    """>>> kind_of("what color is the shape?"), kind_of("is there a circle?"), kind_of("what shape is present?")
    ('colour', 'yes or no', 'shape')
    """
    if "color" in question:
        return "colour"
    return "shape" if question.startswith("what") else "yes or no"


@functools.lru_cache(maxsize=1)
def load_easy_vqa() -> tuple[Tensor, list[tuple[str, list[int], int, int]]]:
    """Pictures uint8 [4000, 3, 64, 64] and questions: (kind, word numbers, answer, picture).

    Raises `SecateurError` without the files of SECATEUR_DATA, or without Pillow.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise SecateurError("Pillow isn't installed", where="easy_vqa", fix="pip install pillow") from error
    folder = require_data("easy_vqa")
    with gzip.open(folder / "train_questions.json.gz") as file:
        asked = json.load(file)["questions"]
    stored = np.load(folder / "train_images.npz")
    offsets, data = stored["offsets"], stored["data"].tobytes()
    pictures = np.stack(
        [
            np.asarray(Image.open(io.BytesIO(data[offsets[k] : offsets[k + 1]])).convert("RGB"))
            for k in range(len(offsets) - 1)
        ]
    )
    questions = [(kind_of(text), encode(text), ID[answer], int(k)) for text, answer, k in asked]
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).contiguous(), questions


def easy_vqa_test(limit: int = 256) -> tuple[Group, ...]:
    """At most `limit` questions of each kind about the pictures kept apart, spread over them."""
    pictures, questions = load_easy_vqa()
    rows: dict[tuple[str, int], list[tuple[list[int], int, int]]] = {}
    for kind in KINDS:
        mine = [q for q in questions if q[0] == kind and q[3] >= len(pictures) - TEST]
        for _, words, answer, image in mine[:: max(1, len(mine) // limit)][:limit]:
            rows.setdefault((kind, len(words)), []).append((words, answer, image))
    return tuple(
        Group(
            kind,
            pictures[[row[2] for row in found]],
            [row[0] for row in found],
            torch.tensor([row[1] for row in found]),
            [row[2] for row in found],
        )
        for (kind, _), found in rows.items()
    )


def answer_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Cross-entropy of the answers to one batch of questions, each after its own picture."""
    pictures, questions = load_easy_vqa()
    rows = [questions[int(i)] for i in batch["question"]]
    given = inputs(model, pictures[[row[3] for row in rows]], [row[1] for row in rows])
    logits = model(**given, logits_to_keep=1, use_cache=False).logits[:, -1]
    return F.cross_entropy(logits.float(), torch.tensor([row[2] for row in rows], device=logits.device))


def train_easy_vqa(
    recipe: Recipe,
    device: str | torch.device = "cpu",
    work: str | Path | None = None,
    every: int = 500,
    resume: bool = True,
) -> tuple[nn.Module, dict[str, Any]]:
    """Tunes the shipped model of `recipe.variant` and `recipe.seed` for `recipe.joint` steps at `recipe.joint_lr`.

    >>> model, about = train_easy_vqa(Recipe(joint=300))  # doctest: +SKIP
    >>> about["accuracy"]  # doctest: +SKIP
    {'shape': ..., 'colour': ..., 'yes or no': ...}
    """
    from secateur.training import fit

    pictures, questions = load_easy_vqa()
    usable = [i for i, question in enumerate(questions) if question[3] < len(pictures) - TEST]
    model = load_scenes(recipe.variant, recipe.seed).to(device)
    file = Path(work) / "checkpoint.safetensors" if work else None
    if file and not resume:
        file.unlink(missing_ok=True)
    begun, cpu = time.monotonic(), time.process_time()
    losses = fit(
        model,
        {"question": torch.tensor(usable)},
        steps=recipe.joint,
        loss=answer_loss,
        seed=recipe.seed,
        lr=recipe.joint_lr,
        batch=recipe.batch,
        checkpoint=file,
        every=every,
        description=f"easy_vqa {recipe.variant} {recipe.seed}",
    )
    model.eval()
    about = {
        "data": "easy_vqa",
        "recipe": {
            "variant": recipe.variant,
            "seed": recipe.seed,
            "steps": recipe.joint,
            "lr": recipe.joint_lr,
        },
        "steps": recipe.joint,
        "seconds": round(time.monotonic() - begun, 1),
        "processor_seconds": round(time.process_time() - cpu, 1),
        "last_loss": round(sum(losses[-20:]) / len(losses[-20:]), 4),
        "accuracy": accuracy(model, easy_vqa_test()),
    }
    return model, about
