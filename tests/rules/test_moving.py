"""Elements are followed by their numbers, constants are told from them, and large operands are only counted."""

import torch

from bwsk_fx.rules.moving import lost, moves
from bwsk_fx.rules.single import call_of
from bwsk_fx.verdict import Label


def test_lost_elements_are_the_ones_that_no_result_has():
    operand = torch.zeros(3, 4)
    call = call_of(torch.roll, (operand, 1), {}, operand)
    assert lost(call) == 0
    result = operand[:, :3]
    call = call_of(torch.narrow, (operand, 1, 0, 3), {}, result)
    assert lost(call) == 3


def test_constants_are_no_elements():
    operand = torch.zeros(2, 2)
    # The value is the number of an element.
    call = call_of(torch.constant_pad_nd, (operand, (-1, 1), 1.0), {}, operand)
    assert lost(call) == 2


def test_large_operands_are_counted():
    large = torch.zeros(1 << 13)
    call = call_of(torch.as_strided, (large, (1 << 13,), (1,)), {}, large)
    assert lost(call) is None
    assert moves(call, "it reads").label is Label.GRAY
    half = call_of(torch.as_strided, (large, (1 << 12,), (1,)), {}, large[: 1 << 12])
    assert moves(half, "it reads").erasure.elements == 1 << 12


def test_a_call_that_cannot_run_on_numbers_is_not_followed():
    operand = torch.zeros(4)
    assert lost(call_of(torch.roll, (operand, "one"), {}, operand)) is None
