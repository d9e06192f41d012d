"""What a region runs: its forward and backward modules for one kind of input, with the plan they follow."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from torch import Tensor, fx

from bwsk_fx.planning.compiled import CompiledForward, CompiledGraph, compile_with_inductor
from bwsk_fx.planning.layouts import run
from bwsk_fx.planning.plan import Plan


def in_memory(tensor: Tensor) -> Tensor:
    """Return a tensor whose memory holds its numbers: graphs are traced without marks to conjugate or to negate."""
    return tensor.resolve_conj().resolve_neg()


@dataclass(frozen=True)
class Layout:
    """Sizes, strides, dtype and device with which a gradient enters a backward module."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, tensor: Tensor) -> Layout:
        """Read the layout of a tensor."""
        return cls(tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device)

    def applied_to(self, gradient: Tensor | None) -> Tensor:
        """Lay a gradient out as the backward module was traced, whose views depend on it; none is zero."""
        gradient = None if gradient is None else in_memory(gradient)
        if gradient is not None and gradient.stride() == self.strides:
            return gradient
        result = torch.empty_strided(self.shape, self.strides, dtype=self.dtype, device=self.device)
        return result.zero_() if gradient is None else result.copy_(gradient)


@dataclass(frozen=True)
class Program:
    """A planned region, ready to run.

    Attributes:
        forward: Takes the primals; returns `(outputs, kept)`.
        backward: Takes the list `[*kept, *static, *tangents]` and empties it; returns one gradient or None per
            primal.
        static: Indices of the static primals that the backward module reads.
        differentiable: Per output, whether it has a gradient.
        tangents: Per differentiable output, how its gradient looks.
        reads: Per primal, which of those gradients its own gradient depends on.
        plan: What is kept, recomputed and inverted.
        region: The region's name, for errors.
        compiler: What runs the two modules: `eager` runs them as they are, `inductor` generates code for them.
    """

    forward: fx.GraphModule
    backward: fx.GraphModule
    static: tuple[int, ...]
    differentiable: tuple[bool, ...]
    tangents: tuple[Layout, ...]
    reads: tuple[frozenset[int], ...]
    plan: Plan
    region: str
    compiler: str

    @cached_property
    def run_forward(self) -> Callable[..., tuple[tuple[Tensor, ...], tuple[Tensor, ...]]]:
        """Takes and returns what `forward` does.

        Raises:
            PlanError: Inductor cannot compile the region.
        """
        return partial(run, self.forward) if self.compiler == "eager" else self._compiled[0]

    @cached_property
    def run_backward(self) -> Callable[[list[Tensor]], Sequence[Tensor | None]]:
        """Takes and returns what `backward` does; errors as for `run_forward`."""
        return partial(run, self.backward) if self.compiler == "eager" else self._compiled[1]

    @cached_property
    def _compiled(self) -> tuple[CompiledForward, CompiledGraph]:
        return compile_with_inductor(self.forward, self.backward, self.region)
