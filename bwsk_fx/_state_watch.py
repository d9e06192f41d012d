"""Watches a recorded run for what a graph or a region could not repeat: writes into state, random numbers."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.utils import _pytree as pytree

from bwsk_fx import _torch_private as private

WRITES = "writes"
# Norms write running statistics without a new version of the tensors: their places; the switch's place and name.
_NORMS: Mapping[Any, tuple[tuple[int, ...], int, str, bool]] = {
    functional.batch_norm: ((1, 2), 5, "training", False),
    torch.batch_norm: ((3, 4), 5, "training", False),
    torch.native_batch_norm: ((3, 4), 5, "training", False),
    functional.instance_norm: ((1, 2), 5, "use_input_stats", True),
    torch.instance_norm: ((3, 4), 5, "use_input_stats", True),
}
_STATISTICS = ("running_mean", "running_var")


class StateWatch:
    """Collects which of a model's own tensors the calls of a run write into.

    Args:
        tensors: Parameters and buffers by name, as the run sees them.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self._names: dict[int | None, list[str]] = {}
        for name, tensor in tensors.items():
            self._names.setdefault(private.storage_key(tensor), []).append(name)
        self._found: dict[str, None] = {}

    @contextmanager
    def during(self, func: Callable, args: tuple, kwargs: Mapping[str, Any]) -> Iterator[None]:
        """Look at the operands of one call before and after it."""
        operands = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        versions = [version_of(operand) for operand in operands]
        yield
        written = [one for one, version in zip(operands, versions, strict=True) if version_of(one) != version]
        for tensor in (*written, *_statistics_written(func, args, kwargs)):
            self._found.update(dict.fromkeys(self._names.get(private.storage_key(tensor), ())))

    def note_buffers(self, path: str, module: nn.Module) -> None:
        """Count all buffers of a module as written into, where nothing can be seen of what it does."""
        for name, buffer in module.named_buffers(prefix=path):
            self._found.update(dict.fromkeys(self._names.get(private.storage_key(buffer), (name,))))

    def take(self) -> tuple[str, ...]:
        """Return the names of the tensors that have been written into since the last call of this method."""
        found, self._found = tuple(self._found), {}
        return found


def version_of(tensor: torch.Tensor) -> int:
    """Return how often a tensor has been written into; inference tensors do not count."""
    return 0 if tensor.is_inference() else tensor._version


def _statistics_written(func: Callable, args: tuple, kwargs: Mapping[str, Any]) -> list[torch.Tensor]:
    if func not in _NORMS:
        return []
    places, switch, name, default = _NORMS[func]
    if not (args[switch] if switch < len(args) else kwargs.get(name, default)):
        return []
    statistics = [args[place] for place in places if place < len(args)]
    statistics += [kwargs.get(each) for each in _STATISTICS]
    return [tensor for tensor in statistics if isinstance(tensor, torch.Tensor)]


class PythonDraws:
    """Tells when random numbers are drawn outside of PyTorch, by `random` or `numpy.random`."""

    def __init__(self) -> None:
        self._before = _python_states()

    def happened(self) -> bool:
        """Whether any have been drawn since this was last asked."""
        before, self._before = self._before, _python_states()
        return before != self._before


@contextmanager
def kept_python_states() -> Iterator[None]:
    """Give `random` and `numpy.random` their states back."""
    python, numpy = random.getstate(), _numpy_random()
    state = numpy and numpy.get_state()
    try:
        yield
    finally:
        random.setstate(python)
        if numpy:
            numpy.set_state(state)


def _python_states() -> Hashable:
    numpy = _numpy_random()
    if numpy is None:
        return random.getstate()
    _, key, position, *rest = numpy.get_state()
    return random.getstate(), key.tobytes(), position, *rest


def _numpy_random() -> Any:
    """Return `numpy.random` where somebody has imported NumPy, which imports that part when it is first read."""
    return getattr(sys.modules.get("numpy"), "random", None)
