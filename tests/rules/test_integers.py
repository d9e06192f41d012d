"""Bitwise operators, shifts and divisors."""

import operator

import pytest
import torch

from bwsk_fx.rules.integers import odd_inverse, trailing_zeros
from bwsk_fx.verdict import Label, WitnessKind

BYTES = torch.tensor([0, 1, 2, 100, 127, 128, 200, 255], dtype=torch.uint8)
LONG = torch.tensor([-(2**63), -7, -1, 0, 1, 2, 2**62, 2**63 - 1])
MASK = torch.tensor([True, False, True, True])


def test_complement_is_its_own_inverse_on_masks_and_integers(certified):
    for function in (operator.invert, torch.bitwise_not, torch.Tensor.__invert__):
        for operand in (MASK, BYTES, LONG):
            assert certified(function, operand).label is Label.S
    assert certified(torch.logical_not, MASK).label is Label.S
    verdict = certified(torch.logical_not, BYTES)
    assert (verdict.label, verdict.erasure.bits) == (Label.K, 8 * 7)
    assert certified(torch.logical_not, torch.randn(4)).erasure.bits == 4 * 31


@pytest.mark.parametrize("function", [operator.xor, torch.bitwise_xor, torch.Tensor.__rxor__, torch.logical_xor])
def test_exclusive_or_is_undone_by_the_other_operand(certified, function):
    other = MASK.flip(0)
    verdict = certified(function, MASK, other)
    assert (verdict.label, verdict.witness.kind) == (Label.S, WitnessKind.OTHER_OPERAND)
    assert certified(function, MASK, other, dynamic={id(MASK)}).witness.kind is WitnessKind.NOTHING
    assert certified(function, MASK, MASK).erasure.elements == 4


def test_exclusive_or_of_integers(certified):
    assert certified(torch.bitwise_xor, LONG, LONG.flip(0)).label is Label.S
    assert certified(torch.bitwise_xor, BYTES, 85).label is Label.S
    assert certified(torch.logical_xor, BYTES, BYTES.flip(0)).erasure.bits == 8 * 7


def test_and_and_or_let_some_bits_through(certified):
    assert certified(torch.bitwise_and, BYTES, BYTES.flip(0)).label is Label.K
    assert certified(torch.bitwise_and, BYTES, 0b1111).erasure.bits == 8 * 4
    assert certified(torch.bitwise_and, BYTES, 255).label is Label.S
    assert certified(torch.bitwise_or, BYTES, 0b111).erasure.bits == 8 * 3
    assert certified(torch.bitwise_or, BYTES, 0).label is Label.S
    assert certified(operator.and_, MASK, MASK).label is Label.S
    assert certified(torch.logical_or, torch.randn(4), MASK).erasure.bits == 4 * 31


def test_static_masks_are_looked_at(certified):
    other = torch.tensor([True, True, False, True])
    assert certified(torch.logical_and, MASK, other, dynamic={id(MASK)}).erasure.elements == 1
    assert certified(torch.logical_or, MASK, other, dynamic={id(MASK)}).erasure.elements == 3
    nothing = torch.zeros(4, dtype=torch.bool)
    assert certified(operator.or_, MASK, nothing, dynamic={id(MASK)}).label is Label.S


def test_shifts_move_bits_out(certified):
    assert certified(torch.bitwise_left_shift, BYTES, 3).erasure.bits == 8 * 3
    assert certified(operator.rshift, BYTES, 2).erasure.bits == 8 * 2
    assert certified(torch.bitwise_right_shift, LONG, 0).label is Label.S
    assert certified(torch.bitwise_right_shift, BYTES, BYTES % 4).label is Label.K


def test_common_divisors_are_k(certified):
    for function in (torch.gcd, torch.lcm):
        assert certified(function, LONG % 100, LONG % 7).label is Label.K


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64])
def test_odd_inverses(dtype):
    odd = torch.arange(1, 128, 2).to(dtype)
    assert (odd * odd_inverse(odd) == 1).all()
    assert [trailing_zeros(number) for number in (1, 12, -8, 2**40)] == [0, 2, 3, 40]
