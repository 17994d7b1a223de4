"""Tasks by name: a network, data to train it on, and a number that says how well it does."""

from __future__ import annotations

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

from torch import nn

from secateur.errors import SecateurError, choose
from secateur.utils.files import data_dir

if TYPE_CHECKING:
    from secateur.training.task import Task

NETWORKS = {
    "cifar10": ("resnet20", "resnet32", "resnet44", "resnet56", "cifar-vim", "cifar-dependency-vit"),
    "imagenet-sample": ("efficientnet-lite0",),
    "digits": ("digits-cnn", "digits-resnet", "digits-heads", "digits-vim", "digits-dependency-vit"),
    "sr": ("carn-m", "carn-m-x3", "carn-m-x4", "vdsr", "vdsr-x3", "vdsr-x4", "rfdn"),
    "camvid": ("espnet", "camvid-patches"),
    "mnist": ("mnist-dit",),
    "digits-diffusion": ("digits-diffusion",),
    "sst2": ("minilm",),
    "text": ("text-llama",),
    "salient-patches": ("vit-s-patches",),
    "blur": ("windowed-unet",),
}
"""The networks of each task, its default first. A task is a module of this package."""
MODULES = {
    "imagenet-sample": "imagenet_sample",
    "mnist": "mnist_dit",
    "salient-patches": "salient_patches",
    "digits-diffusion": "digits_diffusion",
}
TASKS = tuple(NETWORKS)
OWNERS = {network: task for task, names in NETWORKS.items() for network in names}
LABELLED = {
    "cifar10": "cifar10/train_0.npz",
    "imagenet-sample": "imagenet_sample/part_a.tar",
    "camvid": "camvid/camvid_test_subset.tar",
}
"""Tasks whose training pictures and labels calibrate their networks, and where they lie."""
SPLITS = ("test", "val", "all")


def load_task(
    name: str, split: str = "test", train: int | None = None, test: int | None = None, device: Any = None
) -> Task:
    """A task to train and prune on.

    >>> task = load_task("cifar10:resnet56")  # doctest: +SKIP
    >>> task.quality(task.pretrained())  # doctest: +SKIP
    0.9339

    name: `cifar10`, `digits`, `sr`, `camvid`, `sst2`, ..., also with a network (`sr:vdsr-x3`), or the network alone (`vdsr-x3`).
    split: what quality is measured on: `test`, or `val`, to choose by. train, test: at most so many samples to train on
    and to be judged by. device: where the training data lies; default: the CPU.

    Raises `SecateurError` for an unknown task, network or split, and missing data.
    """
    wanted, _, network = name.partition(":")
    if wanted in OWNERS and not network:
        wanted, network = OWNERS[wanted], wanted
    known = NETWORKS.get(wanted, ())
    network = network or next(iter(known), "")
    if network not in known:
        known = known or (*TASKS, *OWNERS)
        error = f"there is no task {name!r}"
        choose(network or wanted, known, where="task", error=error, near=1, cutoff=0.6)
    for what, count in (("train", train), ("test", test)):
        if count is not None and count < 1:
            raise SecateurError(f"{count} samples is nothing", where=what, fix="ask for at least 1")
    if split not in SPLITS or (split == "all" and wanted != "camvid"):
        raise SecateurError(f"there is no split {split!r}", where=name, fix="test or val")
    made = _module(wanted).task(network, split, train, test)
    if device is not None:
        from secateur.utils.inputs import map_tensors

        made.train = map_tensors(made.train, lambda tensor: tensor.to(device))
    return made


def load_network(name: str) -> nn.Module:
    """The trained network of this name in eval mode; a task's name means its default network."""
    network = NETWORKS[name][0] if name in NETWORKS else name
    return _module(OWNERS[network]).load_network(network)


def load_tokenizer(name: str) -> Any:
    """The tokenizer of a task's network; None where it reads no text."""
    found = getattr(_module(OWNERS.get(name, name)), "load_tokenizer", None)
    return found() if found else None


def calibration_set(name: str) -> str | None:
    """The labelled set that a task's network is calibrated on where no data are named; None where there is none, or it isn't there.

    >>> calibration_set("smollm2")
    """
    task = OWNERS.get(name, name)
    if name in (
        "digits-heads",
        "camvid-patches",
    ):  # three labels a picture; pictures of another size and colour order
        return None
    if task == "digits":
        return task if importlib.util.find_spec("sklearn") else None
    root = data_dir()
    return task if root and task in LABELLED and (root / LABELLED[task]).is_file() else None


def _module(name: str) -> Any:
    return importlib.import_module(f"secateur.tasks.{MODULES.get(name, name)}")
