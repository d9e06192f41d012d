"""Random draws made again: the generator's state is kept in place of what was drawn."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx

from bwsk_fx import _torch_private as private
from bwsk_fx.rules.inverse import Inverse, WitnessWriter

aten = torch.ops.aten


def replayed_draw(node: fx.Node, drawn: fx.Node, witnesses: WitnessWriter) -> Inverse:
    """Return the derivation of `drawn`, which is `node` or one of its results, from the generator's state before it.

    The state has 5056 bytes on a CPU and 16 on CUDA, whatever the size of what is drawn.
    """
    operand: fx.Node = node.args[0]  # type: ignore[assignment]
    state = witnesses.call(node.prev, generator_state, operand)
    value, part = operand.meta["val"], None if drawn is node else drawn.args[1]
    like = (tuple(value.shape), value.stride(), value.dtype, value.device)

    def emit(graph: fx.Graph, tails: Sequence[fx.Node]) -> fx.Node:
        return graph.call_function(draw_again, (tails[0], node.target, like, tuple(node.args[1:]), part))  # type: ignore[arg-type]

    return Inverse(drawn, (state,), emit, True, rule="replayed draw", compiles=False)


def generator_state(like: Tensor) -> Tensor:
    """Return the state of the default generator of a tensor's device, as bytes on the CPU."""
    state = _generator(like.device).get_state()
    return torch.empty(state.numel(), dtype=torch.uint8) if private.is_fake(like) else state


def draw_again(
    state: Tensor,
    target: Callable[..., Any],
    like: tuple[tuple[int, ...], tuple[int, ...], torch.dtype, torch.device],
    args: tuple[Any, ...],
    part: int | None,
) -> Tensor:
    """Draw what `target` drew when the generator was in `state`, and leave the generator as it is.

    Args:
        state: What `generator_state` returned.
        target: A random ATen operator, whose first operand decides sizes alone.
        like: Sizes, strides, dtype and device of that operand.
        args: Its other arguments.
        part: Which of its results is wanted; None where it has one.
    """
    shape, strides, dtype, device = like
    with _in_state(state, device):
        drawn = target(torch.empty_strided(shape, strides, dtype=dtype, device=device), *args)
    return drawn if part is None else drawn[part]


@contextmanager
def _in_state(state: Tensor, device: torch.device) -> Iterator[None]:
    if private.is_fake(state):
        yield
        return
    generator = _generator(device)
    current = generator.get_state()
    generator.set_state(state)
    try:
        yield
    finally:
        generator.set_state(current)


def _generator(device: torch.device) -> torch.Generator:
    if device.type == "cpu":
        return torch.default_generator
    index = torch.accelerator.current_device_index() if device.index is None else device.index
    return torch.get_device_module(device).default_generators[index]
