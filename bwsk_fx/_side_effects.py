"""What a run leaves behind in modules, and how to take it back: attributes, values of buffers, remembered results."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, TypeGuard

import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized

# Key in `node.meta` of a leaf that no region can hold: what is done once in a step would be done when it is planned.
STAYS_OUTSIDE = "stays_outside"
_OWN = frozenset(vars(nn.Module()))


@contextmanager
def kept_attributes(module: nn.Module) -> Iterator[None]:
    """Give every module its attributes back, since a run may have put fakes there: caches, new buffers.

    Dictionaries, lists and sets among the attributes get their contents back.
    """
    parts = list(module.modules())
    tables: list[Any] = [table for part in parts for table in (part._parameters, part._buffers, vars(part))]
    tables += [value for part in parts for name, value in vars(part).items() if name not in _OWN and _is_table(value)]
    before = [table.copy() for table in tables]
    try:
        yield
    finally:
        for table, entries in zip(tables, before, strict=True):
            table.clear()
            (table.extend if isinstance(table, list) else table.update)(entries)


def changes_itself(module: nn.Module, run: Callable[[], Any]) -> tuple[Any, str | None]:
    """Run a module, and say what the run changes in it; None where nothing.

    Args:
        module: The module whose buffers, parameters and attributes are looked at, those of its children included.
        run: Runs it.

    Returns:
        What `run` returns, and the name of what it has written into or replaced.
    """
    before = dict(_state(module))
    result = run()
    changed = (name for name, state in _state(module) if before.get(name) != state)
    return result, next(changed, None)


def _state(module: nn.Module) -> Iterator[tuple[str, tuple[int, int]]]:
    for path, part in module.named_modules():
        for table in (part._parameters, part._buffers, vars(part)):
            for name, value in table.items():
                version = value._version if isinstance(value, torch.Tensor) and not value.is_inference() else 0
                yield f"{path}.{name}".lstrip("."), (id(value), version)


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


@contextmanager
def kept_parametrizations(module: nn.Module) -> Iterator[None]:
    """Give the buffers of parametrizations their values back: reading a spectrally normalised weight updates them."""
    with ExitStack() as stack:
        for part in module.modules():
            if is_parametrized(part):
                stack.enter_context(kept_buffers(part.parametrizations))  # type: ignore[arg-type]
        yield


def _is_table(value: object) -> TypeGuard[dict | list | set]:
    return type(value) in (dict, list, set)


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
