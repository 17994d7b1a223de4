"""The parts of a model that a target may name: a text encoder and a denoiser, a vision tower and a language model."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from secateur.errors import SecateurError, nearest
from secateur.graph.blocks import find_stacks


def parts_of(model: nn.Module) -> dict[str, str]:
    """The parts that hold a stack of blocks each, name -> module path, in the order of the modules; {} for one part.

    >>> parts_of(llava)  # doctest: +SKIP
    {'vision_tower': 'model.vision_tower', 'language_model': 'model.language_model'}

    A part is the largest module around a stack that holds no other; its name is the last of its path.
    """
    stacks = [stack.path for stack in find_stacks(model)]
    if len(stacks) < 2:
        return {}
    found: dict[str, str] = {}
    for path in stacks:
        names = path.split(".")
        for end in range(1, len(names) + 1):
            around = ".".join(names[:end])
            if not any(inside(other, around) for other in stacks if other != path):
                break
        own = around.rpartition(".")[2]
        found[around if own in found or own.isdigit() else own] = around
    return found


def inside(name: str, path: str) -> bool:
    """Whether a parameter or module lies in the module at `path`, or is it.

    >>> inside("unet.conv.weight", "unet"), inside("unet2.conv.weight", "unet")
    (True, False)
    """
    return name == path or name.startswith(f"{path}.")


def resolve_parts(model: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """The module path of each named part: a part of `parts_of`, a module's path, or the end of one that fits a single module.

    Raises `SecateurError` for a name that no module has, that several have, and for a part inside another.
    """
    known = parts_of(model)
    modules = [name for name, _ in model.named_modules() if name]
    found: dict[str, str] = {}
    for name in names:
        fits = [known[name]] if name in known else [path for path in modules if path == name]
        fits = fits or [path for path in modules if path.endswith(f".{name}")]
        outer = [path for path in fits if not any(path != other and inside(path, other) for other in fits)]
        if len(outer) != 1:
            told = list(known) or [
                n for n, child in model.named_children() if any(True for _ in child.parameters())
            ]
            ends = {path.rpartition(".")[2]: None for path in modules}
            near = nearest(name, [*known, *ends], count=1, cutoff=0.75)
            also = f"; did you mean {near[0]}?" if near and near[0] not in told else ""
            raise SecateurError(
                f"{len(outer)} modules are called {name!r}" if outer else f"there is no part {name!r}",
                where="target",
                fix=f"the parts are {', '.join(told)}{also}"
                if not outer
                else f"one of {', '.join(outer[:6])}",
            )
        found[name] = outer[0]
    for name, path in found.items():
        for other, around in found.items():
            if name != other and inside(path, around):
                raise SecateurError(
                    f"{name} lies in {other}", where="target", fix="name parts that stand beside each other"
                )
    return found
