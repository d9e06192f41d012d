"""What a run leaves behind in modules, and how to take it back: attributes, values of buffers, remembered results."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


@contextmanager
def kept_attributes(module: nn.Module) -> Iterator[None]:
    """Give every module its attributes back, since a run may have put fakes there: caches, new buffers."""
    parts = list(module.modules())
    before = [(vars(part).copy(), part._parameters.copy(), part._buffers.copy()) for part in parts]
    try:
        yield
    finally:
        for part, (attributes, parameters, buffers) in zip(parts, before, strict=True):
            _restore(part._parameters, parameters)
            _restore(part._buffers, buffers)
            _restore(vars(part), attributes)


@contextmanager
def kept_buffers(module: nn.Module) -> Iterator[None]:
    """Give the buffers of a module and its children their values back."""
    values = [(buffer, buffer.clone()) for buffer in module.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in values:
                buffer.copy_(value)


def _restore(table: dict[str, Any], entries: Mapping[str, Any]) -> None:
    table.clear()
    table.update(entries)


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
