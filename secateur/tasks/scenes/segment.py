"""`scenes:seg`: the object that a question names, as a mask over the 8 x 8 patches of its picture.

A read-out in the manner of segmenters with a [SEG] token. The state of the prompt's last token is held against the vision
tower's own features of each patch and against a vector of the patch's place. The language model is left as it is, so what
drops visual tokens changes that state alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secateur.tasks.scenes.models import TOKENS, inputs, pixels, see, variant_of
from secateur.tasks.scenes.questions import PART
from secateur.tasks.scenes.train import draw
from secateur.utils.screen import Screen

INNER = 64
TRAINING_SEED = 60_000_000


@dataclass(eq=False, repr=False)
class Referred(Screen):
    """Pictures uint8 [n, 3, 64, 64], questions ("where is the red circle ?") as word numbers, and masks bool [n, 64]."""

    pictures: Tensor
    questions: list[list[int]]
    masks: Tensor
    owner: Tensor
    """int64 [n, 64]: the object on each patch, -1 for none."""

    def __getitem__(self, rows: slice | Tensor) -> Referred:
        numbers = torch.arange(len(self))[rows].tolist()
        words = [self.questions[number] for number in numbers]
        return Referred(self.pictures[rows], words, self.masks[rows], self.owner[rows])

    def __len__(self) -> int:
        return len(self.pictures)


def referred(pictures: int, seed: int) -> Referred:
    """A question about an object without a twin, and its patches, for each of that many drawn pictures that has one.

    >>> len(referred(64, 0))  # doctest: +SKIP
    63

    With the seed of `questions.TEST_SEED` the pictures are those that token methods are judged by. A patch belongs to an
    object that covers more than 15 % of it.
    """
    parts = []
    for part in range(-(-pictures // PART)):
        batch = draw(PART, ("where",), torch.Generator().manual_seed(seed + part))
        asked = batch.asked[0]
        named = (batch.scenes.cell == asked.about[:, :1]) & batch.scenes.there
        mask = batch.owner == named.int().argmax(1)[:, None]
        usable = asked.asked & mask.any(1)
        usable[pictures - part * PART :] = False
        words = asked.words[:, : int(asked.length[0])]
        parts.append([each[usable] for each in (batch.pictures, words, mask, batch.owner)])
    found, words, masks, owner = (torch.cat(each) for each in zip(*parts))
    return Referred(found, words.tolist(), masks, owner)


def state(model: Any, data: Referred) -> Tensor:
    """[n, D] what the output embedding is given at each prompt's last token."""
    caught: list[Tensor] = []
    handle = model.get_output_embeddings().register_forward_pre_hook(
        lambda module, args: caught.append(args[0][:, -1].float())
    )
    try:
        model(**inputs(model, data.pictures, data.questions), logits_to_keep=1, use_cache=False)
    finally:
        handle.remove()
    return caught[0]


@torch.no_grad()
def states(
    model: Any,
    data: Referred,
    batch: int = 64,
    before: Callable[[Referred], None] = lambda part: None,
    after: Callable[[], None] = lambda: None,
) -> Tensor:
    """[n, D] of `state` for all of them. `before` is called with each batch, `after` when it is done."""
    found = []
    for start in range(0, len(data), batch):
        part = data[slice(start, start + batch)]
        before(part)
        found.append(state(model, part))
        after()
    return torch.cat(found)


@torch.no_grad()
def seen(model: Any, data: Referred, batch: int = 64) -> Tensor:
    """[n, 64, C] the tower's features of each visual token, a mean over its patches."""
    variant = variant_of(model)
    parts = [pixels(data.pictures[i : i + batch], variant) for i in range(0, len(data), batch)]
    return torch.cat([see(model, part)[0].float().mean(2) for part in parts])


class MaskReader(nn.Module):
    """Logits of a mask, [n, 64], of a state [n, D] and the tower's features [n, 64, C]."""

    def __init__(self, width: int, eye: int) -> None:
        super().__init__()
        self.ask = nn.Linear(width, INNER)
        self.what = nn.Linear(eye, INNER)
        self.where = nn.Parameter(torch.zeros(TOKENS, INNER))
        self.figure = nn.Linear(eye, 1)

    def forward(self, state: Tensor, features: Tensor) -> Tensor:
        keys = self.what(features) + self.where
        return (keys @ self.ask(state)[..., None])[..., 0] / INNER**0.5 + self.figure(features)[..., 0]


def train_reader(
    model: Any, seed: int = 0, pictures: int = 2048, steps: int = 800, batch: int = 128
) -> MaskReader:
    """A reader for a model in which every token stays; the model isn't changed.

    >>> reader = train_reader(load_scenes("llava"))  # doctest: +SKIP
    """
    data = referred(pictures, TRAINING_SEED + 1000 * seed)
    given, features, masks = states(model, data), seen(model, data), data.masks.float()
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        reader = MaskReader(given.shape[1], features.shape[2])
    optimizer = torch.optim.AdamW(reader.parameters(), lr=3e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        rows = torch.randint(len(data), (batch,), generator=generator)
        loss = F.binary_cross_entropy_with_logits(reader(given[rows], features[rows]), masks[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return reader.eval()


def tune(
    model: Any,
    reader: MaskReader,
    seed: int = 0,
    steps: int = 100,
    batch: int = 32,
    rate: float = 5e-4,
    before: Callable[[Referred], None] = lambda part: None,
) -> None:
    """Trains the language model and the reader together on the masks, in place, under whatever is attached to the model.

    >>> with secateur.attach(model, "lvlm-csp", target="12.5%"):  # doctest: +SKIP
    ...     tune(model, reader)

    The tower and the projector stay. `before` is called with each batch.
    """
    data = referred(steps * batch, TRAINING_SEED + 1000 * seed + 500)
    generator = torch.Generator().manual_seed(seed)
    parameters = [*model.get_decoder().parameters(), *reader.parameters()]
    frozen = [p for p in model.parameters() if p.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(False)
    for parameter in parameters:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, steps, pct_start=0.1)
    for _ in range(steps):
        part = data[torch.randint(len(data), (batch,), generator=generator)]
        before(part)
        logits = reader(state(model, part), seen(model, part))
        loss = F.binary_cross_entropy_with_logits(logits, part.masks.float())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
    for parameter in frozen:
        parameter.requires_grad_(True)


@torch.no_grad()
def overlap(reader: MaskReader, given: Tensor, features: Tensor, masks: Tensor) -> Tensor:
    """[n] intersection over union of each mask that is read (logits above 0) with the true one."""
    found = reader(given, features) > 0
    return (found & masks).sum(1) / (found | masks).sum(1).clamp(min=1)
