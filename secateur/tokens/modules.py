"""Trained modules of a token method: safetensors and JSON in a folder, checked when they are read and when they are put on."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from secateur.errors import SecateurError
from secateur.families.vlm import Facts
from secateur.families.vlm.facts import decoder_of
from secateur.method import method_class
from secateur.tokens.method import TokenMethod
from secateur.utils.files import atomic_directory, atomic_write_json, check_path
from secateur.utils.running import device_of
from secateur.utils.schema import Count, Entry, Size, parse, read_object
from secateur.utils.screen import Screen

FORMAT = "secateur token modules 1"
AGAIN = "train them for this model: secateur train tokens MODEL --method NAME --target 25% --out DIR"


class _File(Entry):
    format: str
    method: str
    settings: dict[str, Any]
    target: float | int
    model: str
    layers: Size
    hidden: Size
    heads: Count
    about: dict[str, Any]


@dataclass(repr=False)
class Trained(Screen):
    """What `train_tokens` gives: the weights of a method's modules, and what they are for.

    >>> trained.save("scorer")                                      # doctest: +SKIP
    >>> secateur.attach(vlm, "covipal", weights="scorer", target="25%")  # doctest: +SKIP
    """

    method: str
    settings: dict[str, Any]
    """The method's hyperparameters while it was trained."""
    target: float | int
    """The share of the visual tokens that was to stay, or their number per image."""
    model: str
    """The class of the model that they were trained on; any other of the same sizes is taken too."""
    layers: int
    hidden: int
    heads: int
    state: dict[str, Tensor]
    about: dict[str, Any] = field(default_factory=dict)
    """How it went: steps and losses of each lesson, the seed."""

    def save(self, folder: str | Path) -> None:
        """A new folder with `modules.json` and `modules.safetensors`, whole or not at all."""
        values = {name: value for name, value in vars(self).items() if name != "state"}
        with atomic_directory(folder) as partial:
            tensors = {name: tensor.cpu().contiguous() for name, tensor in self.state.items()}
            save_file(tensors, partial / "modules.safetensors")
            atomic_write_json(partial / "modules.json", {"format": FORMAT, **values})

    @classmethod
    def load(cls, folder: str | Path) -> Trained:
        """What `save` wrote. Raises `SecateurError` where there is none, or its files are damaged."""
        folder = Path(folder).expanduser()
        if not (folder / "modules.json").is_file():
            raise SecateurError("there is no modules.json", where=str(folder), fix=check_path(folder, AGAIN))
        file = folder / "modules.json"
        own = parse(_File, read_object(file, AGAIN), str(file), AGAIN).model_dump()
        if own.pop("format") != FORMAT:
            raise SecateurError(f"its format isn't {FORMAT!r}", where=str(file), fix=AGAIN)
        try:
            state = load_file(folder / "modules.safetensors")
        except (SafetensorError, OSError) as error:
            raise SecateurError(
                f"its weights can't be read ({error})", where=str(folder), fix=AGAIN
            ) from error
        return cls(**own, state=state)

    def hyperparameters(self, method: Any) -> dict[str, Any]:
        """The settings of the training as keywords of `method`, a name or a class.

        Raises `SecateurError` where the modules are another method's.
        """
        cls: Any = method_class(method) if isinstance(method, str) else method
        name = getattr(cls, "name", "a function")
        if name != self.method:
            raise SecateurError(
                f"these are the modules of {self.method}, not of {name}", where="weights", fix=AGAIN
            )
        known = {item.name: item.default for item in dataclasses.fields(cls)}
        tuples = {name for name, default in known.items() if isinstance(default, tuple)}
        return {
            name: tuple(value) if name in tuples else value
            for name, value in self.settings.items()
            if name in known
        }

    def fill(self, modules: nn.Module, facts: Facts) -> None:
        """Puts the weights into the modules that the method made for a model.

        Raises `SecateurError` where they are of other sizes; the modules are then as they were.
        """
        for name in ("hidden", "layers", "heads"):
            if (mine := getattr(self, name)) != (its := getattr(facts, name)):
                what = {"hidden": "states of width", "layers": "layers:", "heads": "heads:"}[name]
                raise SecateurError(
                    f"they were trained for a model with {what} {mine}, and this one has {its}",
                    where="weights",
                    fix=AGAIN,
                )
        own = modules.state_dict()
        wrong = [n for n in {**own, **self.state} if _shape(own, n) != _shape(self.state, n)]
        if wrong:
            mine, its = _shape(self.state, wrong[0]), _shape(own, wrong[0])
            raise SecateurError(
                f"{wrong[0]} is {mine or 'missing'}, and with these settings it is {its or 'not there'}",
                where="weights",
                fix=f"leave the settings as they were trained, or {AGAIN}",
            )
        broken = [name for name, tensor in self.state.items() if not bool(torch.isfinite(tensor).all())]
        if broken:
            raise SecateurError(f"{broken[0]} isn't made of finite numbers", where="weights", fix=AGAIN)
        modules.load_state_dict(self.state)


def made(method: TokenMethod, facts: Facts, model: Any) -> nn.Module | None:
    """The modules of a method for a model before any training: its own, or copies of the model's layers; None: it has none.

    >>> made(LRSDIP(layers=(0, 1)), facts, model)["1"]  # doctest: +SKIP
    """
    modules, layers = method.modules(facts), method.copies(facts)
    if modules is not None or not layers:
        return modules
    own = decoder_of(model).layers
    if max(layers) >= len(own):
        raise SecateurError(
            f"there is no layer {max(layers)} to copy",
            where=method.name,
            fix=f"layers from 0 to {len(own) - 1}",
        )
    return nn.ModuleDict({str(n): copy.deepcopy(own[n]) for n in layers}).requires_grad_(True)


def _shape(state: Mapping[str, Tensor], name: str) -> list[int] | None:
    return list(state[name].shape) if name in state else None


def filled(
    method: TokenMethod,
    facts: Facts,
    weights: Trained | None,
    target: float | None,
    model: Any,
) -> nn.Module | None:
    """The modules of a method with trained weights, in eval mode, on the model's device; None where it has none, or copies
    of the model's layers and no weights for them: then these look themselves.

    Raises `SecateurError` for modules without weights, weights without modules, weights that don't fit, and another
    target than they were trained for where the method finds the counts itself.
    """
    if weights is None and method.copies(facts):
        return None
    with torch.random.fork_rng(devices=[]):
        modules = made(method, facts, model)
    if modules is None:
        if weights is not None:
            raise SecateurError(f"{method.name} has no modules", where="weights", fix="leave weights out")
        return None
    if weights is None:
        command = AGAIN.replace("NAME", method.name)
        raise SecateurError(
            f"{method.name} chooses with modules, and untrained ones choose at random",
            where="weights",
            fix=f"{command}; then attach(..., weights=DIR)",
        )
    weights.hyperparameters(type(method))
    if method.adaptive and target not in (None, 1.0, weights.target):
        raise SecateurError(
            f"its modules find the counts, and were trained for {weights.target}, not {target}",
            where="target",
            fix=f"leave it out, or {AGAIN}",
        )
    weights.fill(modules, facts)
    return modules.to(device_of(model)).requires_grad_(False).eval()
