"""Methods of modules that remember results: what they remember of a run on fake tensors must not outlive it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def emptied_caches(module: nn.Module) -> Iterator[None]:
    """Empty the `functools.lru_cache`s of a module's and its children's methods, before and after.

    A position index that a method computed on fake tensors would otherwise be handed to every later call.
    """
    caches = list(_caches({type(part) for part in module.modules()}))
    for cache in caches:
        cache.cache_clear()
    try:
        yield
    finally:
        for cache in caches:
            cache.cache_clear()


def _caches(kinds: Iterable[type]) -> Iterator[Any]:
    for base in {base for kind in kinds for base in kind.__mro__}:
        for value in vars(base).values():
            function = getattr(value, "__func__", value)
            # A decorator of transformers wraps the cache once more, to leave it out while torch.compile traces.
            wrapped = [cell.cell_contents for cell in getattr(function, "__closure__", None) or () if _is_filled(cell)]
            yield from (each for each in (function, *wrapped) if callable(getattr(each, "cache_clear", None)))


def _is_filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:
        return False
