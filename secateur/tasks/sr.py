"""Super-resolution: VDSR, CARN-M and RFDN, judged by their PSNR on Set5.

There is no DIV2K here: patches of 12 of Set14's 14 pictures, reduced bicubically, are what is trained on, the other two
are for validation. That is enough to tune a trained network, and little for one from scratch.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secateur.data.super_resolution import HELD_OUT, load_pairs, patches
from secateur.measure.vision import psnr
from secateur.tasks.augment import turn
from secateur.tasks.networks.super_resolution import CarnM, Rfdn, Vdsr
from secateur.training.recipe import Recipe
from secateur.training.task import Task
from secateur.utils.files import require_data

KINDS: dict[str, tuple[Any, str, tuple[int, ...]]] = {
    "carn-m": (CarnM, "carn_m.pth", (2, 3, 4)),
    "vdsr": (Vdsr, "VDSR.pth", (2, 3, 4)),
    "rfdn": (Rfdn, "RFDN_AIM.pth", (4,)),
}


def build(name: str) -> nn.Module:
    """`carn-m`, `carn-m-x3`, `carn-m-x4`, `vdsr` (x2), ..., `rfdn` (x4), untrained."""
    kind, _, scale = name.partition("-x")
    network, _, scales = KINDS[kind]
    return network(int(scale or scales[0]))


def load_network(name: str) -> nn.Module:
    """The published weights, in eval mode.

    >>> load_network("carn-m-x4")(torch.zeros(1, 3, 24, 24)).shape  # doctest: +SKIP
    torch.Size([1, 3, 96, 96])

    PSNR on Set5 at x2 / x3 / x4: CARN-M 37.68 / 34.06 / 31.89 dB, VDSR 37.56 / 33.72 / 31.25; RFDN 32.16 at x4.
    """
    model, file = build(name), KINDS[name.partition("-x")[0]][1]
    state = torch.load(require_data(f"pretrained/{file}"), map_location="cpu", weights_only=True)
    wanted = model.state_dict()
    state |= {key: value for key, value in wanted.items() if key.endswith(".shift")}
    other_scales = [key for key in state if key.startswith("upsample.") and key not in wanted]
    unused = [*other_scales, *(key for key in state if ".shifter." in key)]
    model.load_state_dict({key: value for key, value in state.items() if key not in unused})
    return model.eval()


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Mean absolute difference, of 0..1."""
    return F.l1_loss(model(batch[0]).float(), batch[1]) / float(model.peak)  # type: ignore[arg-type]


def task(network: str, split: str, train: int | None, test: int | None) -> Task:
    """64 x 64 patches of Set14 to train on (96 x 96 at x4); Set5 to be judged by, or two pictures of Set14 (val)."""
    model: Any = build(network)
    form = (model.scale, model.luma, model.peak, model.enlarged)
    if split == "val":
        held_out = load_pairs("set14", *form)[-HELD_OUT:][:test]
    else:
        held_out = load_pairs("set5", *form)[:test]
    return Task(
        name=f"sr:{network}",
        build=lambda: build(network),
        pretrained=lambda: load_network(network),
        train=patches("set14", *form, size=96 if model.scale == 4 else 64, limit=train),
        quality=lambda model: psnr(model, held_out),
        inputs=torch.zeros(1, *model.input_size),
        metric="psnr",
        loss=loss,
        recipe=Recipe(
            optimizer="adam", lr=1e-4, betas=(0.9, 0.99), batch=16, warmup=0, clip=0, precision="float32"
        ),
        epochs=10,
        augment=turn,
    )
