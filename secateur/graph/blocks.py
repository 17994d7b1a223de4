"""Where a model's repeated blocks are, and which tensors a share of weights counts: read off the module tree."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from secateur.errors import SecateurError
from secateur.utils.screen import Screen

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True, eq=False, repr=False)
class Blocks(Screen):
    """The blocks of one stack in order. `path` is the list's module path; "" with one module: the whole model is one block.

    start: how many blocks the stacks before it have; blocks are numbered through.
    """

    path: str
    modules: tuple[nn.Module, ...]
    start: int = 0

    @property
    def repeated(self) -> bool:
        return self.path != ""

    def path_of(self, index: int) -> str:
        return f"{self.path}.{index}" if self.repeated else ""

    def __len__(self) -> int:
        return len(self.modules)


@dataclass(frozen=True, eq=False, repr=False)
class Matrix(Screen):
    """One prunable tensor, seen as [out, in]; `name` as in `named_parameters()`.

    Linear [out, in]; convolution [out, in / groups * kernel]; `transformers.Conv1D` transposed; expert tensors
    [experts * out, in]. With `parts` > 1 (experts, convolution groups) the rows fall into that many equal runs, and
    every run has inputs of its own.
    """

    name: str
    path: str
    module: nn.Module
    attribute: str
    block: int
    kind: str
    parts: int = 1
    block_path: str = ""

    @property
    def role(self) -> str:
        """What it is within its block: `q_proj`, `fc1`, `gate_up_proj`."""
        return self.path.rpartition(".")[2] if self.attribute == "weight" else self.attribute

    @property
    def parameter(self) -> Tensor:
        return getattr(self.module, self.attribute)

    @property
    def bias(self) -> tuple[str, Tensor | None]:
        """The name of the bias that belongs to it, and the bias where there is one: `weight` has `bias`."""
        own = self.attribute
        attribute = own.replace("weight", "bias") if "weight" in own else f"{own}_bias"
        return f"{self.path}.{attribute}".lstrip("."), getattr(self.module, attribute, None)

    def weight(self) -> Tensor:
        """[out, in], detached; a view of the parameter where the layout allows."""
        return self.fold(self.parameter.detach())

    @property
    def shape(self) -> tuple[int, int]:
        shape = self.parameter.shape
        if self.kind == "conv1d":
            return shape[1], shape[0]
        if self.kind == "experts_transposed":
            return shape[0] * shape[2], shape[1]
        if self.kind == "experts":
            return shape[0] * shape[1], shape[2]
        return shape[0], shape[1:].numel()

    @property
    def numel(self) -> int:
        return self.parameter.numel()

    def fold(self, tensor: Tensor) -> Tensor:
        """A tensor laid out as the parameter (the weight, a mask) -> [out, in]."""
        if self.kind == "conv1d":
            return tensor.T
        if self.kind == "experts_transposed":
            return tensor.transpose(1, 2).reshape(self.shape)
        return tensor.reshape(self.shape)

    def unfold(self, tensor: Tensor) -> Tensor:
        """[out, in] -> laid out as the parameter."""
        shape = self.parameter.shape
        if self.kind == "conv1d":
            return tensor.T
        if self.kind == "experts_transposed":
            return tensor.reshape(shape[0], shape[2], shape[1]).transpose(1, 2)
        return tensor.reshape(shape)

    @torch.no_grad()
    def set(self, weight: Tensor) -> None:
        """Writes [out, in] values into the parameter, in its dtype."""
        self.parameter.copy_(self.unfold(weight))


SMALL, SMALL_TOWER = 0.05, 0.005
"""Lists with less than this share of the largest's parameters are no stack; of a decoder's, that stand outside it."""


def find_stacks(model: nn.Module) -> tuple[Blocks, ...]:
    """The stacks of repeated blocks that are made of matrices, in the order of the modules.

    >>> [(stack.path, len(stack)) for stack in find_stacks(model)]
    [('model.layers', 30)]

    An encoder and a decoder are two, and so are a vision tower and a language model. A model that isn't made of such stacks
    (convolutional nets) is one block.
    """
    root = language_model_of(model)
    prefix = next(name for name, module in model.named_modules() if module is root)
    lists: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        inside = root is model or name == prefix or name.startswith(f"{prefix}.")
        nested = any(name.startswith(f"{path}.") or not path for path in lists)
        if _repeated(module, alone=inside and root is not model) and not nested:
            lists[name] = module
    sizes = {name: sum(p.numel() for p in module.parameters()) for name, module in lists.items()}
    core = [n for n in lists if root is model or n == prefix or n.startswith(f"{prefix}.")]
    if not core:
        return (Blocks("", (model,)),)
    largest = max(sizes[name] for name in core)
    core = [name for name in core if sizes[name] > SMALL * largest]
    if "" in core or not all(_of_matrices(lists[name]) for name in core):
        return (Blocks("", (model,)),)
    around = [n for n in lists if n not in core and root is not model and not n.startswith(f"{prefix}.")]
    towers = [n for n in around if sizes[n] > SMALL_TOWER * largest and _of_matrices(lists[n])]
    found: list[Blocks] = []
    for name in [name for name in lists if name in core or name in towers]:
        modules = tuple(lists[name].children())
        found.append(Blocks(name, modules, sum(map(len, found))))
    return tuple(found)


def find_blocks(model: nn.Module) -> Blocks:
    """The stack that holds most parameters, of a language model's decoder; the whole model as one block where it has none.

    >>> blocks = find_blocks(model)
    >>> blocks.path, len(blocks)
    ('model.layers', 30)
    """
    return max(
        find_stacks(model), key=lambda stack: sum(p.numel() for m in stack.modules for p in m.parameters())
    )


def _of_matrices(module: nn.Module) -> bool:
    """Whether nearly all of its weights are matrices, and not convolutions'."""
    dense, convolved = 0, 0
    for part in module.modules():
        if isinstance(part, CONVS) and part.groups == 1:
            convolved += part.weight.numel()
        else:
            dense += sum(p.numel() for _, p, _ in _matrices_of(part))
    return dense > 0 and convolved <= 0.05 * dense


def find_matrices(model: nn.Module) -> dict[str, Matrix]:
    """The matrices that a share of the weights counts, by parameter name, in the order of the modules.

    In stacks of blocks: Linear, `transformers.Conv1D` and expert tensors inside the blocks (embeddings, head and
    norms stay). Elsewhere: every Linear and convolution. A tensor shared with an embedding, or the output head of a
    language model, is left out.
    """
    stacks = find_stacks(model)
    place: dict[int, tuple[int, Blocks]] = {}
    for stack in stacks:
        for position, block in enumerate(stack.modules, stack.start):
            place |= {id(module): (position, stack) for module in block.modules()}
    kept_out = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    if (head := _output_head(model)) is not None and getattr(head, "weight", None) is not None:
        kept_out.add(id(head.weight))
    matrices: dict[str, Matrix] = {}
    seen: set[int] = set()
    for path, module in model.named_modules():
        if id(module) not in place:
            continue
        number, stack = place[id(module)]
        if isinstance(module, CONVS) and not stack.repeated:
            found: list[tuple[str, Tensor, str]] = [("weight", module.weight, "conv")]
        else:
            found = _matrices_of(module)
        for attribute, parameter, kind in found:
            if id(parameter) in kept_out or id(parameter) in seen or not parameter.is_floating_point():
                continue
            seen.add(id(parameter))
            parts = module.groups if kind == "conv" else len(parameter) if kind.startswith("experts") else 1
            name = f"{path}.{attribute}" if path else attribute
            matrices[name] = Matrix(name, path, module, attribute, number, kind, parts, stack.path)
    return matrices


def every_matrix(model: nn.Module) -> dict[str, Matrix]:
    """All Linear, `transformers.Conv1D`, convolution and expert tensors, also heads and those outside the blocks.

    A tensor shared with an embedding is left out: changing it would change both.
    """
    shared = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    matrices: dict[str, Matrix] = {}
    for path, module in model.named_modules():
        found = _matrices_of(module)
        if isinstance(module, CONVS):
            found = [("weight", module.weight, "conv")]
        for attribute, parameter, kind in found:
            if id(parameter) in shared or not parameter.is_floating_point():
                continue
            shared.add(id(parameter))
            parts = module.groups if kind == "conv" else len(parameter) if kind.startswith("experts") else 1
            name = f"{path}.{attribute}" if path else attribute
            matrices[name] = Matrix(name, path, module, attribute, 0, kind, parts)
    return matrices


def check_weights(matrices: dict[str, Matrix]) -> None:
    """Raises `SecateurError`, naming the layer, when a weight is NaN or infinite."""
    for name, matrix in matrices.items():
        if not torch.isfinite(matrix.parameter).all():
            raise SecateurError(
                "the weights hold NaN or infinite values", where=name, fix="repair or reload the model"
            )


@contextlib.contextmanager
def plain_experts(module: nn.Module) -> Iterator[None]:
    """Within, expert layers multiply expert by expert, so that each one's inputs can be seen."""
    configs: dict[int, tuple[Any, Any]] = {}
    for part in module.modules():
        config = getattr(part, "config", None)
        if config is None or not _is_experts(part):
            continue
        if getattr(config, "_experts_implementation", "eager") not in (None, "eager"):
            configs.setdefault(id(config), (config, config._experts_implementation))
    try:
        for config, _ in configs.values():
            config._experts_implementation = "eager"
        yield
    finally:
        for config, implementation in configs.values():
            config._experts_implementation = implementation


def language_model_of(model: Any) -> nn.Module:
    """The decoder of a model that generates, such as a vision-language model's; else the model itself."""
    generates = getattr(model, "can_generate", lambda: False)
    if not hasattr(model, "get_decoder") or not generates():
        return model
    if getattr(model.config, "is_encoder_decoder", False):
        return model
    decoder = model.get_decoder()
    return decoder if isinstance(decoder, nn.Module) else model


def _output_head(model: Any) -> nn.Module | None:
    if not hasattr(model, "get_output_embeddings"):
        return None
    try:
        return model.get_output_embeddings()
    except (NotImplementedError, AttributeError):
        return None


def _repeated(module: nn.Module, alone: bool) -> bool:
    """A list of blocks of one class; `alone`: a single block, or several classes, will do in a ModuleList."""
    if not isinstance(module, nn.ModuleList | nn.Sequential):
        return False
    children = list(module.children())
    if not children or any(not list(child.children()) for child in children):
        return False
    same = len(children) > 1 and len({type(child) for child in children}) == 1
    return same or (alone and isinstance(module, nn.ModuleList))


def _is_experts(module: nn.Module) -> bool:
    if "expert" not in type(module).__name__.lower() and not hasattr(module, "num_experts"):
        return False
    return any(p.dim() == 3 for p in module.parameters(recurse=False))


def _matrices_of(module: Any) -> list[tuple[str, Tensor, str]]:
    """(attribute, parameter, kind) of the matrices the module itself owns, convolutions apart."""
    if isinstance(module, nn.Linear):
        return [("weight", module.weight, "linear")]
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf"):
        return [("weight", module.weight, "conv1d")]
    if isinstance(module, CONVS) or not _is_experts(module):
        return []
    tensors = {n: p for n, p in module.named_parameters(recurse=False) if p.dim() == 3 and min(p.shape) > 1}
    transposed = getattr(module, "is_transposed", None)
    if transposed is None:
        down = next((p for n, p in tensors.items() if "down" in n), None)
        up = next((p for n, p in tensors.items() if "up" in n), None)
        # without a gate in `up` both ways fit: then it is [experts, out, in], as in nn.Linear
        fits = up is not None and down is not None and up.shape[1] == down.shape[2]
        transposed = fits and up.shape[2] != down.shape[1]  # type: ignore[union-attr]
    return [(n, p, "experts_transposed" if transposed else "experts") for n, p in tensors.items()]
