"""Trained prompts as a folder: `prompts.json`, and the vectors as safetensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from secateur.errors import SecateurError, require
from secateur.method import Method, expect, make_method
from secateur.prompts.method import PromptMethod
from secateur.prompts.towers import Towers, class_ids
from secateur.prompts.train import Prompted, Prompts
from secateur.utils.files import atomic_directory, atomic_write_json, check_path
from secateur.utils.random import seeded
from secateur.utils.running import device_of, evaluating
from secateur.utils.schema import Entry, parse, read_object

LEAST = 0.99
"""Cosine from which two features are of one model, in whatever precision."""


class About(Entry):
    format: Literal["secateur-prompts"]
    version: Literal[1]
    method: str
    settings: dict[str, Any]
    classes: list[str] = Field(min_length=1)


def save_prompts(prompted: Prompted, folder: str | Path) -> None:
    """A new folder with `prompts.json` and `prompts.safetensors`, whole or not at all. The model itself isn't in it.

    >>> save_prompts(train_prompts(clip, tokenizer, data, ["cat", "dog"]), "cats")  # doctest: +SKIP

    Beside the prompts are features of the frozen model, by which `load_prompts` knows it again.
    Raises `SecateurError` where the folder is there.
    """
    about = {
        "format": "secateur-prompts", "version": 1, "method": prompted.method.name,
        "settings": prompted.method.hyperparameters, "classes": list(prompted.classes),
    }  # fmt: skip
    tensors = {name: value.detach() for name, value in prompted.prompts.state_dict().items()}
    tensors["witness"] = witness(prompted.model, prompted.tokenizer, prompted.method, prompted.classes)
    with atomic_directory(folder) as partial:
        save_file(
            {name: t.cpu().contiguous() for name, t in tensors.items()}, partial / "prompts.safetensors"
        )
        atomic_write_json(partial / "prompts.json", about)


def load_prompts(
    folder: str | Path, model: nn.Module, tokenizer: Any, method: type[Method] | None = None
) -> Prompted:
    """What `save_prompts` wrote, on the model that it was trained for, in any precision and on any device.

    >>> load_prompts("cats", clip, tokenizer).logits(images, ["cat", "horse"])  # doctest: +SKIP

    method: the class of your own method that trained them, where it isn't registered.
    Raises `SecateurError`: no such folder, files that are damaged, another model or tokenizer.
    """
    folder = Path(folder).expanduser()
    file, where = folder / "prompts.json", str(folder)
    require(file.is_file(), "there is no prompts.json", where=where, fix=check_path(folder, "save_prompts"))
    about = parse(About, read_object(file, "save them again"), where, "save them again")
    chosen = make_method(method or about.method, **about.settings)
    expect(chosen, "prompts", "load_prompts")
    assert isinstance(chosen, PromptMethod)
    try:
        tensors = load_file(folder / "prompts.safetensors")
        text, image, before = tensors["text"], tensors.get("image"), tensors["witness"]
    except (SafetensorError, OSError, KeyError) as error:
        raise SecateurError(
            f"its vectors can't be read ({error})", where=where, fix="save them again"
        ) from error
    widths = Towers(model).widths
    shapes = [(chosen.depth, chosen.text_tokens, widths[0]), (chosen.depth, chosen.image_tokens, widths[1])]
    for own, shape in zip((text, image), shapes, strict=True):
        there = tuple(own.shape) if own is not None else (shape[0], 0, shape[2])
        require(there == shape, f"prompts {there} where the towers take {shape}", where=where, fix="give the model that they were trained for")  # fmt: skip
    after = witness(model, tokenizer, chosen, about.classes).to(before)
    same = after.shape == before.shape and bool((after * before).sum(1).min() >= LEAST)
    require(same, "this model or tokenizer says other things than the one that they were trained for", where=where, fix="give that one")  # fmt: skip
    prompts = Prompts(text, image).to(device_of(model))
    return Prompted(model, tokenizer, prompts, chosen, tuple(about.classes))


@torch.no_grad()
def witness(model: nn.Module, tokenizer: Any, method: PromptMethod, classes: Any) -> Tensor:
    """Features [C + 1, D] of the frozen towers: of the class names, and of one picture of noise."""
    towers, device = Towers(model), device_of(model)
    with evaluating(model):
        ids, _ = class_ids(tokenizer, classes, method.text_tokens, towers.longest, towers.pads, method.words)
        config = towers.image_tower.config
        noise = torch.randn(1, 3, config.image_size, config.image_size, generator=seeded(0, "witness"))
        return torch.cat([towers.text(ids.to(device)), towers.image(noise.to(device))]).float().cpu()
