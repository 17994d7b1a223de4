"""What differs between versions of the libraries underneath, met in one place.

The difference is read off the library itself (a parameter's name, a value's type), not off its version number, wherever
that is possible: what a fork or a release in between does is then right too.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

CACHE_NAMES = ("cache", "past_key_values")
"""What transformers calls the key/value cache: from 5.24, and before. Both are read; the new name wins."""


def cache_name(function: Callable[..., Any]) -> str | None:
    """The parameter by which a forward of transformers takes its cache; None where it takes none.

    >>> cache_name(lambda input_ids, past_key_values=None: None)
    'past_key_values'
    """
    parameters = inspect.signature(function).parameters
    return next((name for name in CACHE_NAMES if name in parameters), None)


def is_cache(value: Any) -> bool:
    """Whether it is a cache of transformers."""
    from transformers.cache_utils import Cache

    return isinstance(value, Cache)


def cache_in(kwargs: Mapping[str, Any]) -> Any:
    """The cache among keyword arguments or outputs, whatever its name; None where there is none.

    >>> cache_in({"hidden_states": 1, "use_cache": True}) is None
    True
    """
    return next((value for value in kwargs.values() if is_cache(value)), None)


def without_cache(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments of a layer with which it reads and writes no cache.

    >>> without_cache({"attention_mask": None, "use_cache": True})
    {'attention_mask': None, 'use_cache': False}
    """
    new = {name: None if is_cache(value) else value for name, value in kwargs.items()}
    return new | {"use_cache": False} if "use_cache" in new else new


def cache_of(output: Any) -> Any:
    """The cache that a model gave back; None where it gave none.

    >>> from types import SimpleNamespace
    >>> cache_of(SimpleNamespace(logits=0, past_key_values="kept"))
    'kept'
    """
    given = (getattr(output, name, None) for name in CACHE_NAMES)
    return next((cache for cache in given if cache is not None), None)
