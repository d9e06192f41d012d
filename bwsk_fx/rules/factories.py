"""Factories: tensors that take a shape from an operand, and ranges between two operands."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from bwsk_fx.rules.axis import AxisCall, Effect, axis_rule
from bwsk_fx.rules.registry import Call, erases, labels, preserves, unproven
from bwsk_fx.rules.sizes import short, widens
from bwsk_fx.rules.undo import Run, Undo
from bwsk_fx.verdict import REFINED, Verdict

_FACTORIES = "empty_like zeros_like ones_like full_like"
_METHODS = "new_zeros new_ones new_empty new_full new_empty_strided"


@labels(torch.empty_like, torch.zeros_like, torch.ones_like, torch.full_like, methods=_METHODS)
@labels(atens=f"{_FACTORIES} {_METHODS}")
def made(call: Call) -> Verdict:
    """Takes a tensor for its shape, not for its values."""
    return erases("only the operand's shape is used", call.elements())


def is_made(node: Any) -> bool:
    """Whether a node is such a tensor: it depends on an operand's shape, and there is nothing to rebuild of it."""
    if not isinstance(node, fx.Node) or node.op not in ("call_function", "call_method"):
        return False
    target: Any = node.target
    name = target if isinstance(target, str) else getattr(getattr(target, "overloadpacket", target), "__name__", "")
    return name in _FACTORIES.split() or name in _METHODS.split()


@labels(torch.linspace, atens="linspace")
def linear_range(call: Call) -> Verdict:
    """The first element is the start, the last one is the end."""
    return _range(call, None)


@labels(torch.logspace, atens="logspace")
def logarithmic_range(call: Call) -> Verdict:
    """Powers of a base: the logarithms of the ends are the operands."""
    return _range(call, call.argument(3, "base", 10.0))


def _range(call: Call, base: float | None) -> Verdict:
    steps = call.argument(2, "steps")
    starts = call.is_dynamic(call.argument(0, "start"))
    if not isinstance(steps, int) or (base is not None and (base <= 0 or base == 1)):
        return unproven("its number of steps or its base varies")
    if not widens(call.before.dtype, call.value.dtype):
        return erases(f"it rounds to {short(call.value.dtype)}")
    if steps < (1 if starts else 2):
        return erases("it has no element at that end", call.elements(), confidence=REFINED)
    undo = Undo(partial(_end, 0 if starts else -1, base))
    return preserves("an element of the range is the operand", confidence=REFINED, undo=undo)


def _end(place: int, base: float | None, run: Run) -> Tensor:
    value = run.output[place]
    if base is not None:
        value = value.log() / torch.tensor(base, dtype=value.dtype).log()
    return value.view(run.before.shape)


@axis_rule(methods=_METHODS)
def made_axes(call: AxisCall) -> Effect:
    """Claims nothing: the operand gives its dtype and device, and every shard can make the result."""
    return Effect((), tuple(map(call.axes.fresh, call.shapes)))
