"""Real files for the small models.

easy-VQA: 4,000 pictures of one coloured shape with 38,575 questions (MIT licence), github.com/vzhou842/easy-VQA; the last
400 pictures are kept apart to measure on. NLVR (Suhr et al., ACL 2017, CC-BY-4.0), github.com/lil-lab/nlvr: is a sentence
true of three boxes of shapes? Its "dev" sentences are trained on, "hidden" is measured on; each box is a picture.
"""

from __future__ import annotations

import functools
import gzip
import io
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secateur.errors import SecateurError
from secateur.tasks.scenes.draw import ID, SIZE, WORDS, encode
from secateur.tasks.scenes.models import inputs, load_scenes
from secateur.tasks.scenes.questions import Group, accuracy
from secateur.tasks.scenes.train import Recipe
from secateur.utils.files import require_data
from secateur.utils.screen import Screen

TEST = 400
BOXES, BOX, APART = 3, 100, 150
"""NLVR's pictures: three boxes of 100 pixels, one every 150."""
Question = tuple[str, list[int], int, int]
"""(kind, word numbers, the answer's, number of the picture)."""


@dataclass(frozen=True, eq=False, repr=False)
class Real(Screen):
    """Pictures uint8 [N, 3, 64, 64], or [N, P, 3, 64, 64] where a question is about P of them in any order."""

    pictures: Tensor
    train: list[Question]
    test: list[Question]
    words: int = len(WORDS)
    """How many words there are; those beyond the scenes' own are numbered after them."""


def kind_of(question: str) -> str:
    """>>> kind_of("what color is the shape?"), kind_of("is there a circle?"), kind_of("what shape is present?")
    ('colour', 'yes or no', 'shape')
    """
    if "color" in question:
        return "colour"
    return "shape" if question.startswith("what") else "yes or no"


def _images(file: Path) -> Iterator[tuple[str, Any]]:
    """(name, decoded picture) of an .npz file of concatenated WebP files; decoded when asked: `picture()`."""
    try:
        from PIL import Image
    except ImportError as error:
        raise SecateurError("Pillow isn't installed", where=file.stem, fix="pip install pillow") from error
    stored = np.load(file)
    offsets, data = stored["offsets"], stored["data"].tobytes()
    for k, name in enumerate(stored["names"].tobytes().decode().split("\n")):
        part = data[offsets[k] : offsets[k + 1]]
        yield name, lambda part=part: Image.open(io.BytesIO(part)).convert("RGB")


@functools.lru_cache(maxsize=1)
def load_easy_vqa() -> Real:
    """Raises `SecateurError` without the files of SECATEUR_DATA, or without Pillow."""
    folder = require_data("easy_vqa")
    with gzip.open(folder / "train_questions.json.gz") as file:
        asked = json.load(file)["questions"]
    pictures = np.stack([np.asarray(picture()) for _, picture in _images(folder / "train_images.npz")])
    questions = [(kind_of(text), encode(text), ID[answer], int(k)) for text, answer, k in asked]
    first = len(pictures) - TEST
    return Real(
        torch.from_numpy(pictures).permute(0, 3, 1, 2).contiguous(),
        [question for question in questions if question[3] < first],
        [question for question in questions if question[3] >= first],
    )


@functools.lru_cache(maxsize=1)
def load_nlvr() -> Real:
    """One picture a sentence: of the six orders of its boxes the first; training draws the others."""
    folder = require_data("nlvr")
    pictures: list[np.ndarray] = []
    parts: dict[str, list[tuple[list[str], int, int]]] = {}
    for split in ("dev", "hidden"):
        found = dict(_images(folder / f"{split}_images.npz"))
        with gzip.open(folder / f"{split}.jsonl.gz", "rt") as file:
            for line in file:
                example = json.loads(line)
                whole = found[f"{split}-{example['identifier']}-0"]()
                boxes = [whole.crop((APART * i, 0, APART * i + BOX, BOX)) for i in range(BOXES)]
                answer = ID["yes" if example["label"] == "true" else "no"]
                spoken = example["sentence"].lower().replace(".", " . ").replace(",", " ").split()
                parts.setdefault(split, []).append((spoken, answer, len(pictures)))
                pictures.append(np.stack([np.asarray(box.resize((SIZE, SIZE))) for box in boxes]))
    spoken_words = {word for part in parts.values() for spoken, _, _ in part for word in spoken}
    numbers = ID | {word: len(WORDS) + i for i, word in enumerate(sorted(spoken_words - ID.keys()))}
    made = {
        split: [
            ("true or false", [numbers[word] for word in spoken], answer, k) for spoken, answer, k in part
        ]
        for split, part in parts.items()
    }
    shown = torch.from_numpy(np.stack(pictures)).permute(0, 1, 4, 2, 3).contiguous()
    return Real(shown, made["dev"], made["hidden"], len(numbers))


REAL = {"easy_vqa": load_easy_vqa, "nlvr": load_nlvr}


def real_test(name: str, limit: int = 256) -> tuple[Group, ...]:
    """At most `limit` questions of each kind about the pictures kept apart, spread over them."""
    if name not in REAL:
        raise SecateurError(f"there is no data {name!r}", where="data", fix=f"scenes, {', '.join(REAL)}")
    real = REAL[name]()
    rows: dict[tuple[str, int], list[Question]] = {}
    for kind in dict.fromkeys(question[0] for question in real.test):
        mine = [question for question in real.test if question[0] == kind]
        for question in mine[:: max(1, len(mine) // limit)][:limit]:
            rows.setdefault((kind, len(question[1])), []).append(question)
    return tuple(
        Group(
            kind,
            real.pictures[[row[3] for row in found]],
            [row[1] for row in found],
            torch.tensor([row[2] for row in found]),
            [row[3] for row in found],
        )
        for (kind, _), found in rows.items()
    )


def answer_loss(name: str, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Cross-entropy of the answers to one batch of questions, each after its own picture or pictures."""
    real = REAL[name]()
    rows = [real.train[int(i)] for i in batch["question"]]
    pictures = real.pictures[[row[3] for row in rows]]
    if pictures.dim() == 5:
        pictures = pictures[:, torch.randperm(pictures.shape[1])]
    logits = model(
        **inputs(model, pictures, [row[1] for row in rows]), logits_to_keep=1, use_cache=False
    ).logits
    answers = torch.tensor([row[2] for row in rows], device=logits.device)
    return F.cross_entropy(logits[:, -1].float(), answers)


def train_real(
    name: str,
    recipe: Recipe,
    device: str | torch.device = "cpu",
    work: str | Path | None = None,
    every: int = 500,
    resume: bool = True,
) -> tuple[nn.Module, dict[str, Any]]:
    """Tunes the shipped model of `recipe.variant` and `recipe.seed` for `recipe.joint` steps at `recipe.joint_lr`.

    >>> model, about = train_real("easy_vqa", Recipe(joint=300))  # doctest: +SKIP
    >>> about["accuracy"]  # doctest: +SKIP
    {'shape': ..., 'colour': ..., 'yes or no': ...}
    """
    from secateur.training import fit

    real = REAL[name]()
    model = load_scenes(recipe.variant, recipe.seed)
    if real.words > model.get_input_embeddings().num_embeddings:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)
            model.resize_token_embeddings(real.words)
    model.to(device)
    file = Path(work) / "checkpoint.safetensors" if work else None
    if file and not resume:
        file.unlink(missing_ok=True)
    begun, cpu = time.monotonic(), time.process_time()
    losses = fit(
        model,
        {"question": torch.arange(len(real.train))},
        steps=recipe.joint,
        loss=functools.partial(answer_loss, name),
        seed=recipe.seed,
        lr=recipe.joint_lr,
        batch=recipe.batch,
        checkpoint=file,
        every=every,
        description=f"{name} {recipe.variant} {recipe.seed}",
    )
    model.eval()
    about = {
        "data": name,
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
        "accuracy": accuracy(model, real_test(name)),
    }
    return model, about
