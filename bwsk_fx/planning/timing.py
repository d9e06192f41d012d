"""Timing calls on the device itself: real tensors like the recorded ones, a stopwatch, and costs that are measured."""

from __future__ import annotations

import itertools
import math
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_map

from bwsk_fx import _torch_private as private
from bwsk_fx.errors import first_line
from bwsk_fx.planning.cost import Roofline
from bwsk_fx.planning.kernels import KernelCall, kernel_calls

aten = torch.ops.aten
# Between two runs this much memory is written, which leaves the operands where a step finds them: not in the core's
# own cache any more, but not all the way out in memory either.
_SWEPT_BYTES = 16 * 2**20
_MOST_RUNS = 100
# An accelerator's launches overlap with its work, so that calls are timed in batches that last about this long.
_BATCH_SECONDS = 2e-3


def clock_of(device: torch.device) -> Callable[[], float]:
    """Return the clock that times work on a device best, in seconds.

    On a CPU it is what the calling thread has had of the processor, waiting for its helpers included: no time that went
    to other work on the machine. Where that is too coarse for a single operator, and on accelerators, all time counts.
    """
    fine = time.get_clock_info("thread_time").resolution <= 1e-6
    return time.thread_time if device.type == "cpu" and fine else time.perf_counter


@dataclass(frozen=True)
class Stopwatch:
    """Times a function on a device: the least of several runs, which other work on the machine disturbs least.

    Attributes:
        device: Where the function runs.
        clock: Returns the time that runs take, in seconds.
        limit: Seconds to spend on one function.
        least_runs: Runs that are made even where they take longer.
        wall: Returns the time that counts for the limit, in seconds.
    """

    device: torch.device
    clock: Callable[[], float]
    limit: float = 0.02
    least_runs: int = 3
    wall: Callable[[], float] = time.perf_counter

    @classmethod
    def of(cls, device: torch.device, limit: float = 0.02) -> Stopwatch:
        """Return a stopwatch with the clock that suits a device."""
        return cls(device, clock_of(device), limit)

    def roughly(self, run: Callable[[], Any]) -> float:
        """Return the least seconds of three single calls of `run`, after a first one."""
        self._timed(run, 1)
        return min(self._timed(run, 1) for _ in range(3))

    def seconds(self, run: Callable[[], Any]) -> float:
        """Return the seconds of one call of `run`, with what it returns freed."""
        self._timed(run, 1)
        return self._on_host(run) if self.device.type == "cpu" else self._in_batches(run)

    def _on_host(self, run: Callable[[], Any]) -> float:
        least, end = math.inf, self.wall() + self.limit
        for runs in itertools.count(1):
            np.add(self._swept, 1, out=self._swept)
            least = min(least, self._timed(run, 1))
            if runs >= self.least_runs and (self.wall() >= end or runs >= _MOST_RUNS):
                return least
        raise AssertionError("unreachable")

    def _in_batches(self, run: Callable[[], Any]) -> float:
        once, end = self._timed(run, 1), self.wall() + self.limit
        size = max(1, min(_MOST_RUNS, round(_BATCH_SECONDS / max(once, 1e-9))))
        least = self._timed(run, size)
        while self.wall() < end:
            least = min(least, self._timed(run, size))
        return least / size

    def _timed(self, run: Callable[[], Any], times: int) -> float:
        self._wait()
        began = self.clock()
        for _ in range(times):
            run()
        self._wait()
        return self.clock() - began

    def _wait(self) -> None:
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)

    @cached_property
    def _swept(self) -> np.ndarray:
        return np.zeros(_SWEPT_BYTES, dtype=np.uint8)


def call_seconds(call: KernelCall, watch: Stopwatch) -> float:
    """Return the measured time of one ATen call on random tensors; random and autograd state stay as they are.

    Raises:
        Exception: Whatever the operator raises on such tensors.
    """
    with undisturbed(watch.device):
        args, kwargs = real_arguments(call)
        return watch.seconds(lambda: call.target(*args, **kwargs))


@contextmanager
def undisturbed(device: torch.device) -> Iterator[None]:
    """Allow real work in the middle of anything: no autograd, autocast or fake tensors; random state is put back."""
    if device.type == "cpu":
        kind, places = "cuda", []  # of no device: the CPU's state is kept anyway
    else:
        own = torch.accelerator.current_device_index() if device.index is None else device.index
        kind, places = device.type, [own]
    with (
        private.without_fake_mode(),
        torch.random.fork_rng(places, device_type=kind),
        torch.no_grad(),
        private.without_autocast(),
    ):
        yield


def real_arguments(call: KernelCall) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return a call's arguments with real tensors of the same shapes, strides, dtypes and devices.

    Floating-point values lie between 0.25 and 1.25, so that logarithms, roots and quotients are finite. Integers are
    indices in range where the operator is known to index with them, and else zero.
    """
    bound = _index_bound(call)
    made: dict[int, Tensor] = {}

    def real(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if id(value) not in made:
            made[id(value)] = _like(value, bound)
        return made[id(value)]

    args, kwargs = tree_map(real, (call.args, dict(call.kwargs)))
    return args, kwargs


def _like(fake: Tensor, bound: int) -> Tensor:
    extent = 1 + sum((size - 1) * stride for size, stride in zip(fake.shape, fake.stride(), strict=True))
    return _values(extent if fake.numel() else 0, fake, bound).as_strided(fake.shape, fake.stride())


def _values(count: int, like: Tensor, bound: int) -> Tensor:
    if like.is_floating_point() or like.is_complex():
        return torch.rand(count, device=like.device).add_(0.25).to(like.dtype)
    if like.dtype == torch.bool:
        return torch.rand(count, device=like.device) < 0.5
    return torch.randint(bound, (count,), device=like.device).to(like.dtype)


# Where an operator that indexes with integers says how many there are to choose from.
_INDEXED: dict[Any, Callable[..., int]] = {
    aten.embedding: lambda weight, *_: weight.shape[0],
    aten.embedding_dense_backward: lambda gradient, indices, count, *_: count,
    aten.gather: lambda operand, dim, *_: operand.shape[dim],
    aten.index_select: lambda operand, dim, *_: operand.shape[dim],
    aten.index_add: lambda operand, dim, *_: operand.shape[dim],
    aten.scatter: lambda operand, dim, *_: operand.shape[dim],
    aten.scatter_add: lambda operand, dim, *_: operand.shape[dim],
    aten.nll_loss_forward: lambda scores, *_: scores.shape[-1],
    aten.nll_loss_backward: lambda gradient, scores, *_: scores.shape[-1],
}


def _index_bound(call: KernelCall) -> int:
    rule = _INDEXED.get(getattr(call.target, "overloadpacket", None))
    return 1 if rule is None else max(1, rule(*call.args))


@dataclass
class MeasuredCosts:
    """The cost model that times each distinct ATen call once.

    Calls are the same when operator, numbers, shapes, strides, dtypes and devices are.

    Attributes:
        roofline: Stands in for calls that fail on random tensors; each such operator is warned of once.
        watch: Times calls.
        figures: Seconds by `call_key`; what is measured is put in.
        failures: First line of the error by operator, of those that cannot be timed.
    """

    roofline: Roofline
    watch: Stopwatch
    figures: MutableMapping[str, float]
    failures: dict[str, str] = field(default_factory=dict)
    _modelled: dict[str, float] = field(default_factory=dict, repr=False)

    def seconds(self, node: fx.Node) -> float:
        """Return the sum over the ATen calls that `node` makes."""
        return sum(map(self.call_seconds, kernel_calls(node)))

    @property
    def modelled_calls(self) -> int:
        """How many distinct calls have the roofline's time, since they could not be timed."""
        return len(self._modelled)

    def call_seconds(self, call: KernelCall) -> float:
        """Return the measured time of one ATen call."""
        key = call_key(call)
        if key in self._modelled:
            return self._modelled[key]
        if key not in self.figures:
            try:
                measured = call_seconds(call, self.watch)
            except Exception as error:
                return self._model(call, key, error)
            # What takes no time would count as a view, which costs nothing to have again.
            self.figures[key] = max(measured, 1e-9)
        return self.figures[key]

    def _model(self, call: KernelCall, key: str, error: Exception) -> float:
        operator = str(call.target)
        if operator not in self.failures:
            self.failures[operator] = f"{type(error).__name__}: {first_line(error)}"
            warnings.warn(
                f"{operator} cannot be timed on random tensors ({self.failures[operator]}), so that its time is "
                "modelled: plans weigh it less exactly",
                stacklevel=2,
            )
        self._modelled[key] = self.roofline.call_seconds(call)
        return self._modelled[key]


def call_key(call: KernelCall) -> str:
    """Write down what distinguishes a call: operator, numbers, and each tensor's dtype, shape, strides and device."""
    return f"{call.target}({_written([*call.args, *itertools.chain(*sorted(call.kwargs.items()))])})"


def _written(values: Iterable[Any]) -> str:
    return ", ".join(map(_one, values))


def _one(value: Any) -> str:
    if isinstance(value, Tensor):
        dtype = str(value.dtype).removeprefix("torch.")
        return f"{dtype}{[*value.shape]}{value.stride()}{value.device.type}".replace(" ", "")
    return f"[{_written(value)}]" if isinstance(value, (list, tuple)) else str(value)
