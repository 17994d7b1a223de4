"""One forward and one backward of an untouched model: activations and gradients of layers, gradients of the input."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from secateur.errors import SecateurError
from secateur.utils.running import evaluating, frozen_weights, logits_of
from secateur.utils.screen import Screen


@contextlib.contextmanager
def undisturbed(model: nn.Module) -> Iterator[nn.Module]:
    """Eval mode, parameters without gradients, nothing in place; everything comes back as it was.

    >>> with undisturbed(model):
    ...     model(x.requires_grad_())  # a graph to the input alone

    Hooks of the caller stay and run.
    """
    in_place: list[Any] = [module for module in model.modules() if getattr(module, "inplace", None) is True]
    try:
        for module in in_place:
            module.inplace = False
        with evaluating(model), frozen_weights(model), torch.inference_mode(False), torch.enable_grad():
            yield model
    finally:
        for module in in_place:
            module.inplace = True


def _convolves(module: nn.Module) -> bool:
    return "conv" in type(module).__name__.lower() and next(module.children(), None) is None


class _Operations(TorchFunctionMode):
    """Sees the results of operations, of networks whose convolutions are no modules: those read from a file."""

    def __init__(
        self, seen: dict[tuple[int, ...], list[tuple[str, Tensor]]], convolutions: dict[tuple[int, ...], int]
    ):
        super().__init__()
        self.seen, self.convolutions, self.count = seen, convolutions, 0

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        found = func(*args, **(kwargs or {}))
        if (
            isinstance(found, Tensor)
            and found.dim() == 4
            and found.requires_grad
            and found.shape[2:].numel() > 1
        ):
            size = tuple(found.shape[2:])
            if "conv" in func.__name__:
                self.convolutions[size] = self.convolutions.get(size, 0) + 1
            self.count += 1
            self.seen[size] = [(f"operation {self.count} ({func.__name__})", found)]
        return found


@dataclass(repr=False)
class Layers(Screen):
    """The outputs of named layers, [N, C, H, W] or [N, tokens, C], caught while the model runs."""

    found: dict[str, Tensor] = field(default_factory=dict)

    @contextlib.contextmanager
    def catch(self, model: nn.Module, names: Sequence[str] | str) -> Iterator[None]:
        """names: dotted module names, or `last` or `all`: the end of the deepest stage of convolutions, or of every
        stage. A stage is what has one height and width; a stem (a single convolution) isn't one where others are."""
        handles: list[Any] = []
        seen: dict[tuple[int, ...], list[tuple[str, Tensor]]] = {}
        convolutions: dict[tuple[int, ...], int] = {}
        modules = dict(model.named_modules())

        def keep(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: Any, output: Any) -> None:
                if isinstance(output, tuple | list) and output:
                    output = output[0]
                if isinstance(output, Tensor):
                    self.found[name] = output

            return hook

        def watch(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: Any, output: Any) -> None:
                if isinstance(output, Tensor) and output.dim() == 4 and output.shape[2:].numel() > 1:
                    size = tuple(output.shape[2:])
                    given = args[0] if args and isinstance(args[0], Tensor) and args[0].dim() == 4 else output
                    before = tuple(given.shape[2:])
                    if before in seen and before != size and not isinstance(module, nn.Sequential):
                        # what still has the old size inside a block that leaves it is no end of a stage
                        seen[before] = [one for one in seen[before] if not one[0].startswith(name + ".")]
                    seen.setdefault(size, []).append((name, output))
                    if _convolves(module):
                        convolutions[size] = convolutions.get(size, 0) + 1

            return hook

        operations: Any = contextlib.nullcontext()
        try:
            if isinstance(names, str) and not any(map(_convolves, modules.values())):
                operations = _Operations(seen, convolutions)
            elif isinstance(names, str):
                handles += [m.register_forward_hook(watch(n)) for n, m in modules.items() if n]
            else:
                for name in names:
                    if name not in modules:
                        raise SecateurError(
                            f"there is no layer {name!r}",
                            where="layers",
                            fix="`model.named_modules()` lists them",
                        )
                    handles.append(modules[name].register_forward_hook(keep(name)))
            with operations:
                yield
        finally:
            for handle in handles:
                handle.remove()
        if isinstance(names, str):
            stages = {size: found[-1] for size, found in seen.items() if found}
            many = [size for size in stages if convolutions.get(size, 0) > 1]
            sizes = many or [size for size in stages if convolutions.get(size)]
            if not sizes:
                raise SecateurError(
                    f"{type(model).__name__} has no convolution, so no layer with a map of the picture",
                    where="layers",
                    fix="name the layers, or take gradient or lrp, which need none",
                )
            sizes.sort(key=lambda size: -size[0] * size[1])
            self.found = dict(stages[size] for size in (sizes[-1:] if names == "last" else sizes))
        else:
            for name in names:
                if name not in self.found:
                    raise SecateurError(
                        "it gave no tensor in this forward", where=f"layer {name}", fix="name another layer"
                    )


@dataclass(repr=False)
class Record(Screen):
    """What one forward and one backward left: `logits` [N, classes], `targets` [N], and by layer name `activations` and
    `gradients` of the targets' logits; `input` and, where asked for, `input_gradient`, [N, C, H, W]."""

    logits: Tensor
    targets: Tensor
    input: Tensor
    activations: dict[str, Tensor]
    gradients: dict[str, Tensor]
    input_gradient: Tensor | None = None


def record(
    model: nn.Module,
    image: Tensor,
    target: Any = None,
    layers: Sequence[str] | str = (),
    *,
    pixels: bool = False,
    mode: Any = None,
) -> Record:
    """One forward, and one backward from the target's logit, with hooks on `layers`.

    >>> seen = record(resnet, x, target=3, layers=["layer4"])
    >>> seen.activations["layer4"].shape, seen.gradients["layer4"].shape
    (torch.Size([1, 512, 7, 7]), torch.Size([1, 512, 7, 7]))

    image: [N, C, H, W] on any device. target: see `as_targets`. layers: see `Layers.catch`. pixels: the gradient of the
    input too. mode: a context in which the forward runs, such as `GuidedMode()`.

    The model is left exactly as it was. Raises `SecateurError`: no such layer or class, logits that aren't [N, classes].
    """
    first = next(model.parameters(), image)
    caught = Layers()
    with undisturbed(model):
        x = image.detach().to(first.device, first.dtype).clone().requires_grad_(True)
        with caught.catch(model, layers), mode or contextlib.nullcontext():
            logits = logits_of(model(x))
        targets = as_targets(target, logits)
        score = logits.gather(1, targets[:, None]).sum()
        wanted = [*caught.found.values(), *([x] if pixels else [])]
        if not score.requires_grad:
            raise SecateurError(
                "the logits don't depend on the picture by anything differentiable",
                where=type(model).__name__,
            )
        found = torch.autograd.grad(score, wanted, allow_unused=True) if wanted else ()
    names = list(caught.found)
    gradients = {}
    for name, gradient in zip(names, found):
        if gradient is None:
            raise SecateurError(
                "the target doesn't depend on it", where=f"layer {name}", fix="name another layer"
            )
        gradients[name] = gradient
    return Record(
        logits=logits.detach(),
        targets=targets,
        input=x.detach(),
        activations={name: tensor.detach() for name, tensor in caught.found.items()},
        gradients=gradients,
        input_gradient=found[-1] if pixels else None,
    )


def as_targets(target: Any, logits: Tensor) -> Tensor:
    """[N] int64 class ids: the likeliest classes for None, one for all pictures, or one each.

    >>> as_targets(None, torch.tensor([[0.1, 0.9]]))
    tensor([1])

    Raises `SecateurError` for logits that aren't [N, classes], and a class that isn't one.
    """
    if logits.dim() != 2:
        raise SecateurError(
            f"the model gives {tuple(logits.shape)}, not [pictures, classes]",
            where="model output",
            fix="wrap it in a module that gives the logits of classes",
        )
    count, classes = logits.shape
    if not torch.isfinite(logits).all():
        raise SecateurError(
            "the logits hold NaN or infinite values", where="model output", fix="check the picture"
        )
    if target is None:
        return logits.argmax(1)
    try:
        values = torch.as_tensor(target, device=logits.device)
    except (TypeError, ValueError, RuntimeError):
        values = torch.empty(0)
    if values.dtype == torch.bool or values.is_floating_point() or values.is_complex() or values.dim() > 1:
        raise SecateurError(
            f"{target!r} is no class", where="target", fix="give a number, or one for each picture"
        )
    if values.dim() == 1 and len(values) != count:
        raise SecateurError(
            f"{len(values)} classes for {count} pictures",
            where="target",
            fix="give one, or one for each picture",
        )
    if ((values < 0) | (values >= classes)).any():
        wrong = values[(values < 0) | (values >= classes)].flatten()[0].item()
        raise SecateurError(
            f"there is no class {wrong} of {classes}", where="target", fix=f"give 0 to {classes - 1}"
        )
    return values.long().expand(count)
