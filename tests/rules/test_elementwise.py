"""Arithmetic, comparisons and casts."""

import operator

import pytest
import torch

from bwsk_fx.rules.elementwise import widens
from bwsk_fx.verdict import Label, WitnessKind

X = torch.randn(2, 3, 4)
Y = torch.randn(2, 3, 4)
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGERS = (torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64)


@pytest.mark.parametrize(("forward", "back"), [(operator.add, operator.sub), (operator.sub, operator.add)])
def test_a_residual_is_undone_by_its_other_operand(verdict_of, forward, back):
    verdict = verdict_of(lambda x, y: forward(x, y), X, Y)
    assert (verdict.label, verdict.witness.kind, verdict.witness.names) == (
        Label.S,
        WitnessKind.OTHER_OPERAND,
        ("y",),
    )
    assert (verdict.witness.elements, verdict.witness.bytes) == (12, 48)
    torch.testing.assert_close(back(forward(X, Y), Y), X)


def test_a_static_or_constant_summand_is_no_witness(verdict_of):
    for function in (lambda weight, x: x + weight[0], lambda x: x + 1, lambda x: 1 - x, lambda x: x.add(1)):
        verdict = verdict_of(function, X)
        assert (verdict.label, verdict.witness.kind) == (Label.S, WitnessKind.NOTHING)


def test_a_value_with_itself(verdict_of):
    assert verdict_of(lambda x: x + x, X).label is Label.S
    assert verdict_of(lambda x: x - x, X).erasure.elements == 12
    assert verdict_of(lambda x: x * x, X).erasure.bits == 12
    assert verdict_of(lambda x: x / x, X).erasure.elements == 12


def test_scaling_by_a_number(verdict_of):
    for function in (lambda x: x * 3.0, lambda x: x / 3.0, lambda x: 3 * x):
        verdict = verdict_of(function, X)
        assert (verdict.label, verdict.confidence, verdict.witness.kind) == (Label.S, 0.8, WitnessKind.NOTHING)
    torch.testing.assert_close((X * 3.0) / 3.0, X)
    assert verdict_of(lambda x: x * 0, X).erasure.elements == 12


def test_products_of_two_values(verdict_of):
    verdict = verdict_of(lambda x, y: x * y, X, Y)
    assert (verdict.label, verdict.confidence, verdict.witness.names) == (Label.S, 0.5, ("y",))
    torch.testing.assert_close((X * Y) / Y, X)
    assert verdict_of(lambda weight, x: x * weight[0], X).witness.kind is WitnessKind.NOTHING
    assert verdict_of(lambda x, y: x * y, X, Y > 0).label is Label.K
    assert verdict_of(lambda x: torch.div(x, 2, rounding_mode="floor"), X).label is Label.K


@pytest.mark.parametrize(
    ("forward", "back"),
    [
        (torch.neg, torch.neg),
        (torch.exp, torch.log),
        (torch.log, torch.exp),
        (torch.sqrt, torch.square),
        (torch.reciprocal, torch.reciprocal),
        (lambda x: 1 / x, lambda y: 1 / y),
        (torch.expm1, torch.log1p),
        (torch.rsqrt, lambda y: y**-2),
        (lambda x: x**3, lambda y: y ** (1 / 3)),
    ],
)
def test_strictly_monotone_functions_are_undone(verdict_of, forward, back):
    positive = X.abs() + 0.1
    assert verdict_of(lambda x: forward(x), positive).label is Label.S
    torch.testing.assert_close(back(forward(positive)), positive)


@pytest.mark.parametrize("function", [torch.square, torch.abs, lambda x: x**2, torch.cosh])
def test_even_functions_erase_the_sign(verdict_of, function):
    assert verdict_of(lambda x: function(x), X).erasure.bits == 12
    torch.testing.assert_close(function(-X), function(X))


@pytest.mark.parametrize(
    "function", [torch.sin, torch.floor, lambda x: x.clamp(0, 1), lambda x: x > 0, lambda x: x % 2, torch.sign]
)
def test_many_to_one_functions_are_k(verdict_of, function):
    assert verdict_of(lambda x: function(x), X).label is Label.K


def test_choices_are_k(verdict_of):
    assert verdict_of(lambda x, y: torch.where(x > 0, x, y), X, Y).label is Label.K
    assert verdict_of(lambda x: x.masked_fill(x > 0, 0.0), X).label is Label.K


def test_complement_is_its_own_inverse_on_masks_only(verdict_of):
    assert verdict_of(lambda x: ~x, X > 0).label is Label.S
    assert verdict_of(lambda x: torch.logical_not(x), X > 0).label is Label.S
    assert verdict_of(lambda x: torch.logical_not(x), X).label is Label.K


@pytest.mark.parametrize(
    ("before", "after", "bits"),
    [
        (torch.float32, torch.bfloat16, 16),
        (torch.float32, torch.float16, 13),
        (torch.float64, torch.float32, 29),
        (torch.float16, torch.bfloat16, 3),
    ],
)
def test_narrowing_casts_erase_the_mantissas_tail(verdict_of, before, after, bits):
    verdict = verdict_of(lambda x: x.to(after), X.to(before))
    assert (verdict.label, verdict.confidence, verdict.erasure.bits) == (Label.K, 0.8, 12 * bits)


def test_widening_casts_are_undone_and_casts_to_integers_erase(verdict_of):
    for function in (lambda x: x.float(), lambda x: x.to(torch.float64), lambda x: x.type(torch.float32)):
        assert verdict_of(function, X.bfloat16()).label is Label.S
    assert verdict_of(lambda x: x.long(), X).label is Label.K


@pytest.mark.parametrize("before", [*FLOATS, *INTEGERS, torch.bool])
@pytest.mark.parametrize("after", [*FLOATS, *INTEGERS])
def test_widens_is_what_round_trips_show(before, after):
    """Extreme values survive a round trip exactly where the cast is said to widen."""
    if before.is_floating_point:
        info = torch.finfo(before)
        values = [info.max, info.min, info.tiny, info.smallest_normal, 1 + info.eps, -0.5, 3.0]
    elif before is torch.bool:
        values = [0, 1]
    else:
        info = torch.iinfo(before)
        values = [info.max, info.min, info.max - 1, info.max // 2, info.max // 2 + 1, 0, 1]
    x = torch.tensor(values, dtype=before)
    # 2**63 - 1 becomes 2**63 as a float and saturates on the way back: compare within the wider type as well.
    survived = torch.equal(x.to(after).to(before), x) and bool((x.to(after).double() == x.double()).all())
    if after.is_floating_point and before is torch.int64:
        survived = False
    assert widens(before, after) == survived
