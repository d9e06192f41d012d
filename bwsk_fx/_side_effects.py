"""What a run leaves behind in modules, and how to take it back: attributes, values of buffers, remembered results."""

from __future__ import annotations

from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from logging import Logger
from types import FunctionType, ModuleType
from typing import Any

import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from bwsk_fx import _torch_private as private
from bwsk_fx._state_watch import version_of

# Key in `node.meta` of what no region can hold, with the reason: what is done once in a step would be done when the
# region is planned, or not be done as it was recorded.
STAYS_OUTSIDE = "stays_outside"
CHANGES = "changes"
NOT_REPEATED = "does what a trace would not repeat"
_OWN = frozenset(vars(nn.Module()))
_PLAIN = (bool, int, float, complex, str, bytes)
_CONTAINERS = (dict, list, set, OrderedDict, defaultdict, deque)
# What a module refers to, and does not hold.
_APART = (nn.Module, torch.Tensor, type, ModuleType, FunctionType, partial, Logger)


@dataclass(frozen=True)
class _Table:
    """A dictionary, list or set that a run may change, as it was.

    Attributes:
        name: The attribute that holds it; empty where its own keys are the names.
        held: The table itself.
        entries: Keys or places, with each value and how often that had been written into, if it is a tensor. Values
            are kept alive, so that no other object gets the identity of one.
    """

    name: str
    held: Any
    entries: dict[Any, tuple[Any, int]]

    @classmethod
    def of(cls, name: str, held: Any) -> _Table:
        return cls(name, held, _entries(held))

    def changed(self) -> str | None:
        """Name what is not as it was; None where everything is."""
        now = _entries(self.held)
        for key in {**self.entries, **now}:
            if key not in self.entries or key not in now or not _is_same(self.entries[key], now[key]):
                return self.name or str(key)
        return None

    def restore(self) -> None:
        """Put the entries back, where others have come."""
        if self.changed() is None and [*self.entries] == [*_entries(self.held)]:
            return
        values = {key: value for key, (value, _) in self.entries.items()}
        self.held.clear()
        if isinstance(self.held, dict):
            self.held.update(values)
        else:
            (self.held.update if isinstance(self.held, set) else self.held.extend)(values.values())


def _entries(table: Any) -> dict[Any, tuple[Any, int]]:
    items = table.items() if isinstance(table, dict) else enumerate(table)
    return {key: (value, version_of(value) if isinstance(value, torch.Tensor) else 0) for key, value in items}


def _is_same(one: tuple[Any, int], other: tuple[Any, int]) -> bool:
    (before, version), (now, count) = one, other
    return version == count and (before is now or (type(before) is type(now) in _PLAIN and before == now))


def _tables(module: nn.Module) -> Iterator[_Table]:
    """Yield what holds the state of a module itself: its attributes, and what is in containers and plain objects."""
    held = vars(module)
    for table in (module._parameters, module._buffers, held):
        yield _Table.of("", table)
    for name, value in held.items():
        if name not in _OWN:
            yield from (_Table.of(name, table) for table in _inside(value))


def _inside(value: Any, depth: int = 4) -> Iterator[Any]:
    if type(value) in _CONTAINERS:
        yield value
        for item in (value.values() if isinstance(value, dict) else value) if depth else ():
            yield from _inside(item, depth - 1)
    elif isinstance(value, tuple) and depth:
        for item in value:
            yield from _inside(item, depth - 1)
    elif type(getattr(value, "__dict__", None)) is dict and not isinstance(value, _APART):
        yield vars(value)


@contextmanager
def kept_attributes(module: nn.Module) -> Iterator[None]:
    """Give every module its attributes back, since a run may have put fakes there: caches, new buffers.

    Dictionaries, lists, sets and plain objects among the attributes get their contents back, and tensors that are
    neither parameters nor buffers their values: fake tensors are computed with those as they are.
    """
    parts = list(module.modules())
    tables = [table for part in parts for table in _tables(part)]
    registered = {id(tensor) for part in parts for tensor in (*part._parameters.values(), *part._buffers.values())}
    plain = {id(value): (value, version) for table in tables for value, version in table.entries.values()}
    values = [
        (value, version, value.detach().clone())
        for key, (value, version) in plain.items()
        if isinstance(value, torch.Tensor) and key not in registered and not private.is_fake(value)
    ]
    try:
        yield
    finally:
        for table in tables:
            table.restore()
        with torch.no_grad():
            for tensor, version, value in values:
                if version_of(tensor) != version:
                    tensor.copy_(value)


def changes_itself(module: nn.Module, run: Callable[[], Any]) -> tuple[Any, str | None]:
    """Run a module, and say what the run changes in it; None where nothing.

    Args:
        module: The module whose buffers, parameters and attributes are looked at, those of its children included, and
            what is in its dictionaries, lists, sets and plain objects.
        run: Runs it.

    Returns:
        What `run` returns, and the name of what it has written into or replaced.
    """
    tables = [(path, table) for path, part in module.named_modules() for table in _tables(part)]
    result = run()
    found = ((path, table.changed()) for path, table in tables)
    return result, next((f"{path}.{name}".lstrip(".") for path, name in found if name is not None), None)


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
