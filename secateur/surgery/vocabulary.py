"""What names tokens by number outside the tensors: configs and padding rows."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from secateur.errors import SecateurError

NAMED = ("token_id", "token_ids", "token_index", "token_idx")
"""Endings of fields that hold the number of a token, or several."""
BARRED = ("suppress_tokens", "begin_suppress_tokens", "bad_words_ids")
"""Fields with tokens that are never written: those that leave are taken out of them."""


def named_tokens(model: nn.Module, size: int) -> dict[str, list[int]]:
    """Tokens that a model's configs name, by field: they must stay.

    >>> named_tokens(model, 49152)  # doctest: +SKIP
    {'bos_token_id': [1], 'eos_token_id': [2], 'pad_token_id': [2]}

    size: of the vocabulary. Raises `SecateurError` where parts of the model have vocabularies of their own.
    """
    every = (getattr(part, "vocab_size", None) for config in _configs(model) for part in _parts(config))
    sizes = {int(found) for found in every if found}
    if len(sizes) > 1:
        raise SecateurError(
            f"its parts have vocabularies of their own ({', '.join(map(str, sorted(sizes)))} tokens)",
            where="vocabulary",
            fix="leave vocabulary out of kinds",
        )
    found: dict[str, list[int]] = {}
    for config in _configs(model):
        for part in _parts(config):
            for name, value in list(vars(part).items()):
                if name.endswith(NAMED):
                    ids = [i for i in _numbers(value) if 0 <= i < size]
                    found[name] = list(dict.fromkeys([*found.get(name, []), *ids]))
    for path, module in model.named_modules():
        if (
            isinstance(module, nn.Embedding)
            and module.num_embeddings == size
            and module.padding_idx is not None
        ):
            found.setdefault(f"{path}.padding_idx", [module.padding_idx])
    return {name: ids for name, ids in found.items() if ids}


def check_named(model: nn.Module, size: int, kept: Tensor) -> None:
    """Refuse to drop a token that a config of the model names."""
    stay = set(kept.tolist())
    for name, ids in named_tokens(model, size).items():
        if lost := [i for i in ids if i not in stay]:
            raise SecateurError(
                f"token {lost[0]} isn't kept, and {name} of the config names it",
                where="vocabulary",
                fix=f"keep it, or set {name} to another",
            )


def renumber(model: nn.Module, size: int, kept: Tensor) -> dict[str, Any]:
    """Put the numbers of tokens in configs and modules right, in place; gives the fields of the model's own config that changed."""
    new = {old: place for place, old in enumerate(kept.tolist())}
    before = copy.deepcopy(getattr(model, "config", None))
    for config in _configs(model):
        for part in _parts(config):
            for name, value in list(vars(part).items()):
                if name.endswith(NAMED):
                    setattr(part, name, _mapped(value, new, size))
                elif name in BARRED and value:
                    setattr(part, name, [v for v in value if all(i in new for i in _numbers(v))])
                    setattr(part, name, _mapped(getattr(part, name), new, size))
                elif name == "vocab_size" and value == size:
                    setattr(part, name, len(kept))
    own = getattr(model, "config", None)
    if own is None:
        return {}
    pairs = zip(_parts(before), _parts(own), _prefixes(own))
    return {
        f"{prefix}{name}": value
        for old, part, prefix in pairs
        for name, value in vars(part).items()
        if (name.endswith(NAMED) or name in (*BARRED, "vocab_size")) and value != getattr(old, name, None)
    }


def _configs(model: nn.Module) -> Iterator[Any]:
    """Every config that a module of the model keeps, and what it writes by."""
    seen: set[int] = set()
    for module in model.modules():
        for name in ("config", "generation_config"):
            config = getattr(module, name, None)
            if hasattr(config, "to_dict") and id(config) not in seen:
                seen.add(id(config))
                yield config


def _parts(config: Any) -> list[Any]:
    """A config, and those inside it that speak of a vocabulary."""
    inside = [v for v in vars(config).values() if hasattr(v, "to_dict") and getattr(v, "vocab_size", None)]
    return [config, *inside]


def _prefixes(config: Any) -> list[str]:
    names = [n for n, v in vars(config).items() if hasattr(v, "to_dict") and getattr(v, "vocab_size", None)]
    return ["", *(f"{name}." for name in names)]


def _numbers(value: Any) -> list[int]:
    if isinstance(value, bool) or value is None:
        return []
    if isinstance(value, int):
        return [value]
    return [i for item in value for i in _numbers(item)] if isinstance(value, list | tuple) else []


def _mapped(value: Any, new: Mapping[int, int], size: int) -> Any:
    if isinstance(value, list | tuple):
        return type(value)(_mapped(item, new, size) for item in value)
    inside = isinstance(value, int) and not isinstance(value, bool) and 0 <= value < size
    return new[value] if inside else value
