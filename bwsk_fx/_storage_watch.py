"""Watches the storages that operators return: when they live, and which are copies of parameters."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# `contiguous`, `to`, `type`, `half` and their like are one of these two below autograd.
_COPIES = frozenset({torch.ops.aten._to_copy.default, torch.ops.aten.clone.default})


@dataclass
class Recording:
    """Births (+bytes) and deaths (-bytes) of storages in order, each under a serial number.

    `kept` are the serial numbers of the parameters' gradients, `forward_events` counts the events of the forward pass.
    """

    events: list[tuple[int, int]] = field(default_factory=list)
    kept: frozenset[int] = frozenset()
    forward_events: int = 0

    def live_bytes(self) -> tuple[int, ...]:
        """Bytes alive after each event."""
        return tuple(itertools.accumulate(size for _, size in self.events))

    def peak(self, without: frozenset[int] = frozenset()) -> int:
        """The most bytes alive at one time, without those of some serial numbers."""
        deltas = (size for serial, size in self.events if serial not in without)
        return max(itertools.accumulate(deltas), default=0)


class StorageRecorder(TorchDispatchMode):
    """Writes the birth and the death of every storage that an operator returns."""

    def __init__(self, known: Iterable[int]) -> None:
        super().__init__()
        self.recording = Recording()
        self._known = set(known)
        self._alive: dict[int, tuple[int, weakref.ref[torch.UntypedStorage]]] = {}
        self._serials = itertools.count()

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tensors_in(result):
            self._meet(tensor.untyped_storage())
        return result

    def serial_of(self, tensor: Tensor) -> int | None:
        """The serial number of a tensor's storage, if it was born here and lives."""
        entry = self._alive.get(tensor.untyped_storage()._cdata)
        return entry[0] if entry else None

    def _meet(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._known or key in self._alive:
            return
        serial, size = next(self._serials), storage.nbytes()
        self.recording.events.append((serial, size))
        self._alive[key] = (serial, weakref.ref(storage, lambda _: self._bury(key, serial, size)))

    def _bury(self, key: int, serial: int, size: int) -> None:
        # The address may already belong to a younger storage; only its own entry is removed.
        if key in self._alive and self._alive[key][0] == serial:
            del self._alive[key]
        self.recording.events.append((serial, -size))


class CopyWatch(TorchDispatchMode):
    """Knows the storages that are casts or copies of parameters."""

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        super().__init__()
        self._parameters = {parameter.untyped_storage()._cdata for parameter in parameters}
        # Weak, so that copies are freed when they would be; an address alone can be another storage's by then.
        self._copies: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in _COPIES and self._is_whole_weight(args[0]):
            storage = result.untyped_storage()
            self._copies[storage._cdata] = weakref.ref(storage)
        return result

    def knows(self, storage: torch.UntypedStorage) -> bool:
        """Whether a storage is a copy of a parameter."""
        copy = self._copies.get(storage._cdata)
        return copy is not None and copy() is storage

    def _is_whole_weight(self, tensor: Tensor) -> bool:
        storage = tensor.untyped_storage()
        known = storage._cdata in self._parameters or self.knows(storage)
        return known and tensor.numel() * tensor.element_size() <= storage.nbytes()


def tensors_in(tree: Any) -> Iterator[Tensor]:
    """The tensors of a nested structure."""
    return (leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))
