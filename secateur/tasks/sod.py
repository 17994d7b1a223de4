"""Salient objects in photographs: heads that learn on the maps of a network that stays as it is, on ECSSD.

The backbone sees every picture once, and its mirror image; what it saw is kept, and the head learns from that.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from secateur.data.ecssd import at_size
from secateur.data.pictures import HALF, IMAGENET_MEAN, IMAGENET_STD
from secateur.errors import SecateurError, choose, require
from secateur.measure.salient import SalientFigures, salient_figures
from secateur.method import expect, make_method
from secateur.saliency.objects.features import feature_maps
from secateur.saliency.objects.method import Lesson, ObjectMethod, Objects, as_truth
from secateur.tasks.focus import NAME as FOCUS
from secateur.tasks.focus import load_focus
from secateur.tasks.vision import LITE, load_network
from secateur.training import fit
from secateur.training.recipe import Recipe
from secateur.training.train_prune import claim
from secateur.utils.files import atomic_directory, atomic_write_json, check_path
from secateur.utils.inputs import map_tensors
from secateur.utils.running import evaluating
from secateur.utils.schema import Entry, Size, parse, read_object
from secateur.utils.screen import Screen

RECIPE = Recipe(optimizer="adamw", lr=4e-3, weight_decay=1e-3, batch=8, warmup=0.1)
FILE, WEIGHTS = "objects.json", "head.safetensors"


class About(Entry):
    """What `Finder.save` writes beside the weights."""

    format: Literal["secateur-objects-1"]
    method: str
    hyperparameters: dict[str, Any]
    backbone: str
    size: Size
    channels: list[Size]
    about: dict[str, Any]


@dataclass(frozen=True, repr=False)
class Backbone(Screen):
    """A network that is looked at: how it is loaded, which of its layers are maps, and how it reads pictures."""

    name: str
    load: Callable[[], nn.Module]
    layers: str | tuple[str, ...]
    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


BACKBONES = {
    LITE: Backbone(LITE, lambda: load_network(LITE), "all", 160, HALF, HALF),
    FOCUS: Backbone(FOCUS, load_focus, ("blocks.3", "blocks.7", "norm"), 168, IMAGENET_MEAN, IMAGENET_STD),
}
"""By name. Sides are small, so that a CPU learns in minutes."""


def backbone(name: str) -> Backbone:
    """A backbone by its name. Raises `SecateurError` with the nearest."""
    return BACKBONES[choose(name, BACKBONES, what="backbone", where="backbone")]


def look(
    spec: Backbone, model: nn.Module, pictures: Sequence[Tensor], mirrored: bool = False, batch: int = 10
) -> list[Tensor]:
    """The backbone's maps of pictures (uint8 [3, height, width] of any sizes), fine to coarse, in half precision on the CPU.

    >>> maps = look(spec, spec.load(), load_ecssd("train")[0])  # doctest: +SKIP
    """
    parts = []
    mean, std = (torch.tensor(v)[:, None, None] for v in (spec.mean, spec.std))
    for start in range(0, len(pictures), batch):
        some = pictures[start : start + batch]
        for one in some:
            require(
                one.dim() == 3 and len(one) == 3 and one.dtype == torch.uint8,
                f"a tensor {tuple(one.shape)} of {one.dtype} is no picture",
                where="pictures",
                fix="give uint8 [3, height, width]",
            )
        empty = [one.new_zeros(one.shape[1:], dtype=torch.bool) for one in some]
        x = (at_size(some, empty, spec.size)[0] - mean) / std
        found = feature_maps(model, x.flip(-1) if mirrored else x, spec.layers)
        parts.append([m.half().cpu() for m in found])
    require(bool(parts), "there is no picture", where="pictures", fix="give at least one")
    return [torch.cat(level) for level in zip(*parts)]


def lessons(maps: Sequence[Tensor], masks: Tensor) -> dict[str, Tensor]:
    """What `learn` takes: maps, and masks bool [N, G, H, W] of which the empty ones come last, by name."""
    count = masks.flatten(2).any(2).sum(1)
    return {f"map{n}": m for n, m in enumerate(maps)} | {"masks": masks, "count": count}


def learn(
    method: ObjectMethod,
    data: Mapping[str, Tensor],
    *,
    steps: int,
    seed: int = 0,
    device: Any = None,
    **more: Any,
) -> nn.Module:
    """A head that learned from `lessons`, in eval mode. more: fields of a `Recipe`, and what else `fit` takes."""
    names = [name for name in data if name.startswith("map")]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = method.head([data[name].shape[1] for name in names]).to(device or "cpu")

    def loss(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        return method.loss(model, Lesson([batch[name] for name in names], batch["masks"], batch["count"]))

    fit(head, dict(data), steps=steps, loss=loss, seed=seed, recipe=RECIPE, description="objects", **more)
    return head.eval()


@dataclass(repr=False)
class Finder(Screen):
    """A backbone and a head that learned which objects stand out.

    >>> finder = load_objects("out/connnet")  # doctest: +SKIP
    >>> found = finder.find([picture])[0]  # doctest: +SKIP
    """

    method: ObjectMethod
    head: nn.Module
    spec: Backbone
    model: nn.Module
    about: dict[str, Any] = field(default_factory=dict)

    def find(self, pictures: Sequence[Tensor]) -> list[Objects]:
        """What stands out in each picture (uint8 [3, height, width]), at its own size."""
        maps = look(self.spec, self.model, pictures)
        return own_size(read(self.method, self.head, maps), [tuple(p.shape[1:]) for p in pictures])

    def save(self, folder: str | Path) -> None:
        """Weights of the head as safetensors, and what it is as JSON; the backbone goes by its name.

        Raises `SecateurError` for a backbone that has none, and where the folder is there.
        """
        backbone(self.spec.name)
        told = {
            "format": "secateur-objects-1",
            "method": self.method.name,
            "hyperparameters": self.method.hyperparameters,
            "backbone": self.spec.name,
            "size": self.spec.size,
            "channels": self.about["channels"],
            "about": self.about,
        }
        with atomic_directory(Path(folder).expanduser()) as partial:
            save_file({n: t.contiguous().cpu() for n, t in self.head.state_dict().items()}, partial / WEIGHTS)
            atomic_write_json(partial / FILE, told)


@torch.no_grad()
def read(method: ObjectMethod, head: nn.Module, maps: Sequence[Tensor], batch: int = 10) -> Objects:
    """What a head sees in these maps, at the size of what it draws."""
    first = next(head.parameters())
    parts = []
    with evaluating(head):
        for start in range(0, len(maps[0]), batch):
            some = [m[start : start + batch].to(first.device) for m in maps]
            parts.append(map_tensors(vars(method.read(head, some)), lambda t: t.cpu()))
    whole: dict[str, Any] = {
        n: None if parts[0][n] is None else torch.cat([p[n] for p in parts]) for n in parts[0]
    }
    return Objects(**whole)


def own_size(found: Objects, sizes: Sequence[tuple[int, ...]]) -> list[Objects]:
    """Of each picture what was found at its own size [height, width]: maps bilinear, masks and instances by nearest pixel."""

    def near(values: Tensor, size: tuple[int, ...]) -> Tensor:
        return F.interpolate(values[None].float(), size, mode="nearest-exact")[0].to(values.dtype)

    made = []
    for n, size in enumerate(sizes):
        saliency = F.interpolate(found.saliency[None, n : n + 1], size, mode="bilinear")[0].clamp(0, 1)
        parts = None if found.instances is None else near(found.instances[n : n + 1], size)
        made.append(Objects(saliency, near(found.masks[n], size)[None], found.scores[n : n + 1], parts))
    return made


def judge(found: Sequence[Objects], truths: Sequence[Tensor]) -> SalientFigures:
    """The figures of what was found (`Finder.find`) against true masks bool [height, width]."""
    return salient_figures([f.saliency[0] for f in found], truths, [f.masks[0, 0] for f in found])


def train_sod(
    method: str | ObjectMethod,
    pictures: Sequence[Tensor],
    masks: Sequence[Tensor],
    *,
    backbone: Backbone,
    steps: int = 300,
    seed: int = 0,
    device: Any = None,
    directory: str | Path | None = None,
    every: int = 100,
    **hyperparameters: Any,
) -> Finder:
    """A finder that learned from pictures (uint8 [3, height, width]) and their masks ([height, width] or [opinions, height, width]).

    >>> finder = train_sod("connnet", *load_ecssd("train"), backbone=BACKBONES["efficientnet-lite0"])  # doctest: +SKIP

    Every picture is seen as it is and mirrored. directory: what a stopped run needs to go on: the same call goes on to the same bits;
    every: steps between checkpoints. Raises `SecateurError`: masks of floats, of another size, empty ones, negative numbers of
    objects, pictures that are all object, a method that learns something else, and a directory of another run.
    """
    made = make_method(method, **hyperparameters)
    expect(made, "train_objects", "train_sod")
    assert isinstance(made, ObjectMethod)
    require(bool(pictures), "there is no picture", where="pictures", fix="give at least one")
    if len(pictures) != len(masks):
        raise SecateurError(
            f"{len(masks)} masks for {len(pictures)} pictures", where="masks", fix="give one of each"
        )
    stacked = stack_masks(pictures, masks, backbone.size)
    about: dict[str, Any] = {"steps": steps, "seed": seed, "pictures": len(pictures)}
    folder = None if directory is None else Path(directory).expanduser()
    own = {"method": made.name, **made.hyperparameters, "backbone": backbone.name, "size": backbone.size}
    claim(folder, {**own, **about})
    model = backbone.load().to(device or "cpu")
    maps = [
        torch.cat(two)
        for two in zip(look(backbone, model, pictures), look(backbone, model, pictures, mirrored=True))
    ]
    data = lessons(maps, torch.cat([stacked, stacked.flip(-1)]))
    file = None if folder is None else folder / WEIGHTS
    head = learn(made, data, steps=steps, seed=seed, device=device, checkpoint=file, every=every, about=own)
    return Finder(made, head, backbone, model, about | {"channels": [m.shape[1] for m in maps]})


def stack_masks(pictures: Sequence[Tensor], masks: Sequence[Tensor], size: int) -> Tensor:
    """bool [N, G, size, size]: masks [height, width] or [opinions, height, width] of pictures, empty opinions last.

    Raises `SecateurError` for what is no mask of its picture, and where all pictures are nothing but object.
    """
    truths = [as_truth(m, p.shape[1:], f"mask {n}") for n, (p, m) in enumerate(zip(pictures, masks))]
    if all(bool(truth.any(0).all()) for truth in truths):
        raise SecateurError(
            "every pixel of every picture is of an object, so there is nothing to tell apart",
            where="masks",
            fix="number what is no object 0",
        )
    stacked = torch.zeros(len(truths), max(map(len, truths)), size, size, dtype=torch.bool)
    for own, truth in zip(stacked, truths):
        there = truth[truth.flatten(1).any(1)]
        own[: len(there)] = F.interpolate(there[None].float(), (size, size), mode="area")[0] >= 0.5
    return stacked


def load_objects(folder: str | Path, device: Any = None) -> Finder:
    """What `Finder.save` wrote. Raises `SecateurError` where it isn't there or is of something else."""
    path = Path(folder).expanduser()
    require(
        (path / FILE).is_file(), "it holds no finder of objects", where=str(path), fix=check_path(path / FILE)
    )
    again = "train it again: secateur train sod"
    told = parse(About, read_object(path / FILE, again), str(path / FILE), again)
    method = make_method(told.method, **told.hyperparameters)
    expect(method, "train_objects", "load_objects")
    assert isinstance(method, ObjectMethod)
    spec = dataclasses.replace(backbone(told.backbone), size=told.size)
    head = method.head(told.channels)
    try:
        head.load_state_dict(load_file(path / WEIGHTS))
    except (SafetensorError, RuntimeError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise SecateurError(
            f"its weights can't be read ({reason})", where=str(path / WEIGHTS), fix=again
        ) from error
    where = device or "cpu"
    return Finder(method, head.to(where).eval(), spec, spec.load().to(where), told.about)
