"""Integers that wrap around, bit by bit: bitwise operators, shifts, divisors."""

from __future__ import annotations

import operator
from collections.abc import Callable

import torch
from torch import Tensor

from bwsk_fx.rules.bijections import per_element, unchanged
from bwsk_fx.rules.broadcasting import broadcasts, from_result, where_kept
from bwsk_fx.rules.registry import Call, erases, labels, preserves, unproven, witness_of
from bwsk_fx.rules.spelling import plain_name, spellings
from bwsk_fx.rules.undo import Run, Undo, as_it_is
from bwsk_fx.verdict import REFINED, Verdict


def trailing_zeros(number: int) -> int:
    """Return how often a number other than zero is even when it is halved again and again."""
    return (number & -number).bit_length() - 1


def odd_inverse(factor: Tensor) -> Tensor:
    """Return the inverses of odd integers, in the arithmetic of their dtype, which wraps around."""
    # An odd number is its own inverse modulo 8, and each step doubles the number of bits that are right.
    inverse = factor
    for _ in range(5):
        inverse = inverse * (2 - factor * inverse)
    return inverse


@labels(operator.invert, *spellings("bitwise_not logical_not"), methods="__invert__")
def complement(call: Call) -> Verdict:
    """Its own inverse on masks and integers."""
    if plain_name(call) == "logical_not" and call.before.dtype is not torch.bool:
        return erases("all that is left is one bit", bits=per_element(call, 8 * call.before.itemsize - 1))
    return preserves("doing it twice changes nothing", undo=Undo(_complement))


def _complement(run: Run) -> Tensor:
    return ~run.output if run.output.dtype is run.before.dtype else (run.output == 0)


@labels(operator.xor, operator.ixor, *spellings("bitwise_xor"), methods="__xor__ __ixor__ __rxor__")
@broadcasts
def exclusive_or(call: Call) -> Verdict:
    """Flips the bits that the other operand sets: doing it twice changes nothing."""
    return _flips(call, _flipped, "zero")


def _flips(call: Call, rebuild: Callable[[Run], Tensor], nothing: str) -> Verdict:
    left, right = call.argument(0, "input"), call.argument(1, "other")
    if left is right:
        return erases(f"a value and itself give {nothing}", call.elements(), confidence=REFINED)
    other = right if left is call.operands[0] else left
    return from_result("flipping the same bits again undoes it", rebuild, witness_of(call, other))


def _flipped(run: Run) -> Tensor:
    return run.output ^ run.other


@labels(*spellings("logical_xor"))
@broadcasts
def logical_xor(call: Call) -> Verdict:
    """On masks, as the bitwise operator; otherwise one bit is left."""
    if call.before.dtype is not torch.bool:
        return erases("all that is left is one bit", bits=per_element(call, 8 * call.before.itemsize - 1))
    return _flips(call, _flipped_truth, "False")


def _flipped_truth(run: Run) -> Tensor:
    return run.output ^ (run.other != 0)


@labels(operator.and_, operator.iand, *spellings("bitwise_and logical_and"), methods="__and__ __iand__ __rand__")
@broadcasts
def conjunction(call: Call) -> Verdict:
    """Zeroes the bits that the other operand does not set."""
    return _combined(call, keeps=True)


@labels(operator.or_, operator.ior, *spellings("bitwise_or logical_or"), methods="__or__ __ior__ __ror__")
@broadcasts
def disjunction(call: Call) -> Verdict:
    """Sets the bits that the other operand sets."""
    return _combined(call, keeps=False)


def _combined(call: Call, keeps: bool) -> Verdict:
    """The bits of the other operand that are `keeps` let the operand's bit through."""
    if call.before.dtype is not torch.bool and "logical" in plain_name(call):
        return erases("all that is left is one bit", bits=per_element(call, 8 * call.before.itemsize - 1))
    left, right = call.argument(0, "input"), call.argument(1, "other")
    if left is right:
        return unchanged("a value combined with itself is itself")
    other = right if left is call.operands[0] else left
    if isinstance(other, int) and call.before.dtype is call.value.dtype:
        return _with_number(call, other if keeps else ~other)
    known = call.static(other)
    if known is not None and known.dtype is torch.bool and call.before.dtype is torch.bool:
        kept = known if keeps else ~known
        return where_kept(call, kept, "the mask lets every bit through", as_it_is, "the static mask decides for it")
    return erases("where the other operand decides a bit, it is gone")


def _with_number(call: Call, kept: int) -> Verdict:
    width = 1 if call.before.dtype is torch.bool else 8 * call.before.itemsize
    lost = width - (kept % 2**width).bit_count()
    if lost == 0:
        return unchanged("the number lets every bit through")
    return erases(f"the number decides {lost} of {width} bits", bits=per_element(call, lost), confidence=REFINED)


@labels(operator.lshift, operator.rshift, operator.ilshift, operator.irshift)
@labels(*spellings("bitwise_left_shift bitwise_right_shift"))
@labels(methods="__lshift__ __rshift__ __ilshift__ __irshift__ __rlshift__ __rrshift__")
@broadcasts
def shift(call: Call) -> Verdict:
    """Moves bits, and those that leave the number are gone."""
    bits, places = call.argument(0, "input"), call.argument(1, "other")
    if call.value.is_floating_point():
        return unproven("shifts of floating-point numbers are covered by no rule")
    if not isinstance(places, int) or bits is not call.operands[0]:
        return erases("the bits that are moved out are gone")
    if places == 0:
        return unchanged("nothing is moved")
    return erases(f"{places} bits are moved out", bits=per_element(call, places), confidence=REFINED)


@labels(*spellings("gcd lcm"))
def common(_: Call) -> Verdict:
    """Common divisors and multiples: many pairs share one."""
    return erases("many pairs of numbers share it")
