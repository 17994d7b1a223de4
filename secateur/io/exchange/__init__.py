"""ONNX and torch.export, in and out: `load_file` reads a model, `export` writes one and checks what it wrote.

>>> model = secateur.io.exchange.load_file("model.onnx")  # doctest: +SKIP
>>> pruned = secateur.prune(model, method="group-magnitude", target="macs<=50%")  # doctest: +SKIP
>>> secateur.export(pruned.model, model.example_inputs(), "small.onnx")  # doctest: +SKIP
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from secateur.errors import SecateurError
from secateur.graph.ties import ties
from secateur.io.exchange.program import Program, largest_difference
from secateur.io.gguf import export_gguf, is_gguf
from secateur.utils.files import atomic_write_bytes
from secateur.utils.inputs import Inputs, as_call
from secateur.utils.running import call, evaluating, unchanged, without_cache

__all__ = ["SUFFIXES", "Program", "check_packages", "export", "is_exchange", "load_file"]

SUFFIXES = (".onnx", ".pt2")


def is_exchange(path: str | Path | None) -> bool:
    """Whether a name is that of an ONNX file or a torch.export program."""
    return path is not None and str(path).lower().endswith(SUFFIXES)


def check_packages(path: str | Path) -> None:
    """Refuse to start work for an `.onnx` file without the packages that write and check it."""
    if str(path).lower().endswith(".onnx"):
        for name in ("onnx", "onnxruntime", "onnxscript"):
            if importlib.util.find_spec(name) is None:
                raise SecateurError(
                    f"the {name} package is missing", where="ONNX", fix="pip install secateur[onnx]"
                )


def load_file(path: str | Path) -> Program:
    """The model of an `.onnx` or `.pt2` file, in eval mode. Its `example_inputs()` fit it.

    Raises `SecateurError` for a file that is missing, damaged or truncated, and for operations that are not read.
    """
    if str(path).lower().endswith(".onnx"):
        from secateur.io.exchange.onnx_in import load_onnx

        return load_onnx(path)
    from secateur.io.exchange.pt2 import load_pt2

    return load_pt2(path)


def export(
    model: nn.Module,
    inputs: Inputs | None,
    path: str | Path,
    *,
    tolerance: float | None = None,
    tokenizer: Any = None,
) -> dict[str, Any]:
    """Write a model as `.onnx` or `.pt2`, after checking that what is written gives what the model gives; or as `.gguf`.

    >>> secateur.export(model, torch.randn(1, 3, 64, 64), "small.onnx")  # doctest: +SKIP
    {'path': 'small.onnx', 'bytes': 1034211, 'difference': 2.4e-07, 'open': {'x': [0]}}

    inputs: example inputs of `model.forward`: a tensor, a tuple or a dict. A model that was read from a file keeps the
    names and the open sizes of its inputs; any other gets an open batch size, and an open number of tokens, where its
    code allows it (`open` in the result says for which dims of which input).
    tolerance: of the outputs, relative to the largest (at least 1); default 1e-4, 1e-2 for half precision. ONNX is run
    in onnxruntime, `.pt2` is read again and run.

    tokenizer: goes into a `.gguf` file, which needs no inputs and is compared bit by bit (`secateur.io.gguf`).

    Nothing is written unless the check passes. Raises `SecateurError` where the model can't be expressed or differs;
    where rounding decides a choice of the model (topk of equal scores, say), it names the line.
    """
    path = Path(path).expanduser()
    if is_gguf(path):
        return export_gguf(model, path, tokenizer)
    if not is_exchange(path):
        raise SecateurError("neither .onnx nor .pt2", where=str(path), fix="end the name in .onnx or .pt2")
    if inputs is None:
        raise SecateurError("it needs example inputs", where=str(path), fix="give inputs")
    with unchanged(model.modules()), evaluating(model):
        with torch.no_grad(), without_cache(model):
            expected = _tensors(call(model, inputs))
        if path.suffix.lower() == ".onnx":
            from secateur.io.exchange.onnx_out import onnx_bytes, open_sizes, run_onnx

            data = onnx_bytes(model, inputs)
            got, free = run_onnx(data, inputs), open_sizes(data)
        else:
            from secateur.io.exchange import pt2

            program = pt2.export_program(model, inputs)
            data, free = pt2.program_bytes(program), pt2.open_sizes(program)
            args, kwargs = (
                model.own_call(inputs) if isinstance(model, pt2.ExportedModule) else as_call(inputs)
            )
            got = pt2.run_program(data, args, kwargs)
    if tolerance is None:
        full = all(
            p.dtype in (torch.float32, torch.float64) for p in model.parameters() if p.is_floating_point()
        )
        tolerance = 1e-4 if full else 1e-2
    try:
        worst = largest_difference(got, expected, str(path), tolerance)
    except SecateurError as error:
        if not (tied := ties(model, inputs)):
            raise
        raise SecateurError(
            f"{error.what}; rounding decides what the model picks in {'; '.join(tied[:3])}",
            where=str(path),
            fix="values that are equal there come in another order in each runtime: give inputs on which they differ",
        ) from error
    atomic_write_bytes(path, data)
    return {"path": str(path), "bytes": len(data), "difference": worst, "open": free}


def _tensors(value: Any) -> list[Tensor]:
    if hasattr(value, "to_tuple"):
        value = value.to_tuple()
    return [t for t in pytree.tree_leaves(value) if isinstance(t, Tensor)]
