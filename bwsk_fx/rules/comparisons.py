"""Comparisons, predicates, and choices by a mask."""

from __future__ import annotations

import operator

import torch
from torch import Tensor

from bwsk_fx.rules.bijections import per_element
from bwsk_fx.rules.broadcasting import broadcasts, from_result, where_kept
from bwsk_fx.rules.registry import Call, erases, labels, preserves
from bwsk_fx.rules.spelling import plain_name, spellings
from bwsk_fx.rules.undo import Run, Undo, as_it_is
from bwsk_fx.verdict import Verdict

_EQUAL = {"eq": True, "ne": False, "not_equal": False}
_COMPARISONS = "gt lt ge le eq ne greater less greater_equal less_equal not_equal"


@labels(operator.gt, operator.lt, operator.ge, operator.le, operator.eq, operator.ne, *spellings(_COMPARISONS))
@labels(methods="__gt__ __lt__ __ge__ __le__ __eq__ __ne__")
@broadcasts
def comparison(call: Call) -> Verdict:
    """Leaves one bit of each operand, which is all that a mask has."""
    left, right = call.argument(0, "input"), call.argument(1, "other")
    other = right if left is call.operands[0] else left
    if call.before.dtype is torch.bool and isinstance(other, int) and other in (0, 1) and plain_name(call) in _EQUAL:
        keeps = bool(other) == _EQUAL[plain_name(call)]
        return from_result("it is the mask or its complement", as_it_is if keeps else _complement)
    return one_bit_left(call)


def _complement(run: Run) -> Tensor:
    return ~run.output


@labels(*spellings("isnan isinf isfinite isposinf isneginf isreal isclose"))
def one_bit_left(call: Call) -> Verdict:
    """Leaves a truth value of each element or less."""
    alike = call.value.dtype is torch.bool and call.value.shape == call.before.shape
    bits = per_element(call, 8 * call.before.itemsize - 1) if alike and call.before.dtype is not torch.bool else None
    return erases("all that is left is one bit", bits=bits)


@labels(*spellings("where"))
def where(call: Call) -> Verdict:
    """Takes one of two values; the other is gone."""
    if len(call.args) + len(call.kwargs) == 1:
        return _indices(call)
    mask, chosen = call.argument(0, "condition"), call.argument(1, "input", call.argument(1, "self"))
    if call.node.target in ("where", torch.Tensor.where):
        mask, chosen = call.argument(1, "condition"), call.argument(0, "self")
    known = call.static(mask)
    if known is None:
        return erases("where the mask decides against an element, it is gone")
    kept = known if chosen is call.operands[0] else ~known
    return _chosen(call, kept.to(torch.bool))


def _indices(call: Call) -> Verdict:
    if call.before.dtype is not torch.bool:
        return erases("all that is left is where elements are not zero")
    return preserves("the indices say where the mask is True", undo=Undo(_marked))


def _marked(run: Run) -> Tensor:
    mask = torch.zeros(run.before.shape, dtype=torch.bool)
    mask[tuple(run.output)] = True
    return mask


@labels(*spellings("masked_fill"))
@broadcasts
def masked_fill(call: Call) -> Verdict:
    """Overwrites what the mask marks."""
    mask, operand = call.argument(1, "mask"), call.argument(0, "input", call.argument(0, "self"))
    known = call.static(mask)
    if known is None:
        return erases("where the mask decides against an element, it is gone")
    if operand is not call.operands[0]:
        return erases("the fill value is broadcast to the mask") if not bool(known.any()) else _filled(call, known)
    return _chosen(call, ~known)


def _filled(call: Call, mask: Tensor) -> Verdict:
    return _chosen(call, mask)


def _chosen(call: Call, kept: Tensor) -> Verdict:
    return where_kept(call, kept, "the static mask keeps every element", as_it_is, "the static mask decides against it")
