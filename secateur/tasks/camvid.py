"""Street scenes of CamVid with the published ESPNet: a class for every pixel.

Only 30 pictures of CamVid's test split are here. Pruned without training, a network is judged by all of them (mIoU 55.3 %
before). To train, they are parted: 15 to train on, 5 for validation, 10 to be judged by.
`camvid-patches`: a frozen ViT-S/14 with linear heads behind four of its blocks, fitted to the 15, on 280 x 378 pixels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secateur.data.camvid import CLASSES, MEAN, STD, load_camvid
from secateur.data.pictures import IMAGENET_MEAN, IMAGENET_STD
from secateur.families.segmenter import Segmenter
from secateur.measure.vision import segmentation
from secateur.tasks.augment import mirror
from secateur.tasks.focus import build_focus, load_focus
from secateur.tasks.networks.espnet import EspNet
from secateur.tasks.patch_heads import build, fitted, normalised
from secateur.training.recipe import Recipe
from secateur.training.task import Task
from secateur.utils.files import cache_dir, require_data

FILE = "pretrained/espnet_p_2_q_8_camvid.pth"
PATCHES, SIZE = "camvid-patches", (280, 378)


def pairs(split: str, limit: int | None = None) -> tuple[Tensor, Tensor]:
    """(pictures as the ViT wants them [N, 3, 280, 378], int64 labels [N, 280, 378])."""
    x, y = load_camvid(split, limit)
    bgr = x * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1) / 255
    rgb = F.interpolate(bgr.flip(1), SIZE, mode="bilinear", antialias=True).clamp(0, 1)
    labels = F.interpolate(y[:, None].float(), SIZE, mode="nearest-exact")[:, 0].long()
    return normalised(rgb, IMAGENET_MEAN, IMAGENET_STD), labels


def _patches() -> Segmenter:
    file = cache_dir() / f"{PATCHES}-1" / "heads.safetensors"
    return fitted(build(load_focus(), len(CLASSES)), *pairs("train"), file)


def load_network(name: str = "espnet") -> nn.Module:
    """The published weights (12 classes, the last for what nobody labelled), in eval mode; or the ViT with fitted heads."""
    if name == PATCHES:
        return _patches()
    model = EspNet()
    model.load_state_dict(torch.load(require_data(FILE), map_location="cpu", weights_only=True))
    return model.eval()


def task(network: str, split: str, train: int | None, test: int | None) -> Task:
    """mIoU over 11 classes; split test, val, or all (to compare with what is published, without training here)."""
    if network == PATCHES:
        return _task_of_patches(split, train, test)
    held_out = load_camvid(split, test)
    return Task(
        name=f"camvid:{network}",
        build=EspNet,
        pretrained=load_network,
        train=load_camvid("train", train),
        quality=lambda model: segmentation(model, *held_out, len(CLASSES))["miou"],
        inputs=torch.zeros(1, 3, 360, 480),
        metric="miou",
        recipe=Recipe(optimizer="adam", lr=5e-4, weight_decay=5e-4, batch=4, warmup=0, clip=0),
        epochs=10,
        augment=mirror,
        classes=None,
    )


def _task_of_patches(split: str, train: int | None, test: int | None) -> Task:
    held_out = pairs(split, test)
    return Task(
        name=f"camvid:{PATCHES}",
        build=lambda: build(build_focus(), len(CLASSES)),
        pretrained=_patches,
        train=pairs("train", train),
        quality=lambda model: segmentation(model, *held_out, len(CLASSES))["miou"],
        inputs=held_out[0][:1],
        metric="miou",
        recipe=Recipe(optimizer="adamw", lr=1e-3, batch=3, warmup=0.1, precision="float32"),
        epochs=4,
    )
