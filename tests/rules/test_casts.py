"""Casts both ways: what fits is S, and what is cut off is counted."""

import pytest
import torch

from bwsk_fx.rules.sizes import widens
from bwsk_fx.verdict import Label

X = torch.randn(3, 4)
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
METHODS = ("float", "double", "half", "bfloat16", "int", "long", "bool", "short", "char", "byte")
METHODS += ("cfloat", "cdouble", "chalf")
INTEGERS = (torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64)


@pytest.mark.parametrize(
    ("before", "after", "bits"),
    [
        (torch.float32, torch.bfloat16, 16),
        (torch.float32, torch.float16, 13),
        (torch.float64, torch.float32, 29),
        (torch.float16, torch.bfloat16, 3),
        (torch.bfloat16, torch.float16, 0),
        (torch.complex128, torch.complex64, 2 * 29),
        (torch.complex64, torch.complex32, 2 * 13),
        (torch.int64, torch.int32, 32),
        (torch.int32, torch.uint8, 24),
        (torch.int16, torch.bool, 15),
        (torch.float32, torch.bool, 31),
    ],
)
def test_narrowing_casts_erase_bits(certified, before, after, bits):
    verdict = certified(torch.Tensor.to, X.to(before), after)
    assert (verdict.label, verdict.confidence, verdict.erasure.bits) == (Label.K, 0.8, 12 * bits)


@pytest.mark.parametrize("function", [lambda x: x.to(torch.bfloat16), torch.Tensor.bfloat16])
def test_narrowing_in_a_captured_graph_is_counted_per_sample(verdict_of, function):
    assert verdict_of(lambda x: function(x), torch.randn(2, 3, 4)).erasure.bits == 12 * 16


def test_every_cast_method_has_the_rule(certified):
    for method in METHODS:
        verdict = certified(getattr(torch.Tensor, method), X)
        expected = Label.S if method in ("float", "double", "cfloat", "cdouble") else Label.K
        assert (verdict.label, verdict.rule) == (expected, "casts.cast"), method


def test_casts_that_fit_are_undone(certified):
    for before, after in ((torch.bfloat16, torch.float32), (torch.int8, torch.float16), (torch.int32, torch.float64)):
        values = torch.arange(-5, 6).to(before)
        assert certified(torch.Tensor.to, values, after).label is Label.S
        assert certified(torch.Tensor.type_as, values, torch.zeros(1, dtype=after)).label is Label.S
        assert certified(torch.ops.aten._to_copy.default, values, dtype=after).label is Label.S


def test_integers_of_one_width_wrap_around(certified):
    values = torch.tensor([-128, -1, 0, 1, 127], dtype=torch.int8)
    assert certified(torch.Tensor.to, values, torch.uint8).label is Label.S
    assert certified(torch.Tensor.to, values, torch.int64).label is Label.S
    assert certified(torch.Tensor.to, values.view(torch.uint8), torch.int8).label is Label.S


def test_casts_between_floats_and_integers(certified):
    assert certified(torch.Tensor.long, X).label is Label.K
    assert certified(torch.Tensor.to, torch.arange(5), torch.float32).label is Label.K
    assert certified(torch.Tensor.to, X > 0, torch.float16).label is Label.S


def test_complex_numbers_lose_a_half(certified):
    assert certified(torch.Tensor.to, X.to(torch.complex64), torch.float32).erasure.elements == 6
    assert certified(torch.Tensor.to, X, torch.complex64).label is Label.S


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
