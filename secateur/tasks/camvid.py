"""Street scenes of CamVid with the published ESPNet: a class for every pixel.

Only 30 pictures of CamVid's test split are here. Pruned without training, a network is judged by all of them (mIoU 55.3 %
before). To train, they are parted: 15 to train on, 5 for validation, 10 to be judged by.
"""

from __future__ import annotations

import torch
from torch import nn

from secateur.data.camvid import CLASSES, load_camvid
from secateur.measure.vision import segmentation
from secateur.tasks.augment import mirror
from secateur.tasks.networks.espnet import EspNet
from secateur.training.recipe import Recipe
from secateur.training.task import Task
from secateur.utils.files import require_data

FILE = "pretrained/espnet_p_2_q_8_camvid.pth"


def load_network(name: str = "espnet") -> nn.Module:
    """The published weights (12 classes, the last for what nobody labelled), in eval mode."""
    model = EspNet()
    model.load_state_dict(torch.load(require_data(FILE), map_location="cpu", weights_only=True))
    return model.eval()


def task(network: str, split: str, train: int | None, test: int | None) -> Task:
    """mIoU over 11 classes; split test, val, or all (to compare with what is published, without training here)."""
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
