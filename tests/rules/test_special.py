"""Special functions: a few are monotone, most are not."""

import pytest
import torch

from bwsk_fx.rules import sound
from bwsk_fx.rules.round_trip import execute, round_trip
from bwsk_fx.verdict import Label

REAL = torch.tensor([-5.5, -2.0, -0.6, 0.3, 1.0, 3.0])
POLYNOMIALS = [name for name in dir(torch.special) if "_polynomial_" in name]


@pytest.mark.parametrize("name", ["erfcx", "log_ndtr", "i1", "modified_bessel_i1"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_monotone_functions_are_undone_by_bisection(certified, name, dtype):
    verdict = certified(getattr(torch.special, name), REAL.to(dtype))
    assert (verdict.label, verdict.rule) == (Label.S, "special.bisection")


@pytest.mark.parametrize("name", ["erfcx", "log_ndtr", "i1"])
def test_bisection_at_the_ends_is_lost_and_not_wrong(name):
    operand = torch.tensor([-1e15, -1e5, -20.0, 0.0, 1.0, 20.0, 1e5, 1e15])
    executed = execute(getattr(torch.special, name), (operand,), {})
    assert round_trip(executed, sound.verdict(executed.call)).wrong == 0


@pytest.mark.parametrize(
    ("name", "one", "other"),
    [
        ("i1e", 0.5, 5.9),
        ("entr", 0.1, 0.7),
        ("gammaln", 1.0, 2.0),
        ("digamma", -0.2, -1.3),
        ("bessel_j1", 0.0, 3.8317059702075125),
        ("modified_bessel_k0", -1.0, -2.0),
        ("scaled_modified_bessel_k1", -1.0, -2.0),
    ],
)
def test_functions_that_take_a_value_twice_are_k(certified, name, one, other):
    function = getattr(torch.special, name)
    assert certified(function, REAL).label is Label.K
    # The claim is about values: a result of `one` is met again near `other`, or both are NaN.
    near = function(torch.linspace(other - 0.4, other + 0.4, 20001, dtype=torch.float64))
    value = function(torch.tensor(one, dtype=torch.float64))
    assert bool(value.isnan() and near[:3].isnan().all()) or float((near - value).abs().nan_to_num(1).min()) < 1e-2


def test_functions_of_two_operands_that_are_nan_on_a_half_line(certified):
    for name in ("gammainc", "gammaincc", "zeta"):
        function = getattr(torch.special, name)
        assert certified(function, REAL, REAL.abs()).label is Label.K
        assert function(torch.tensor([-1.0, -2.0]), torch.tensor(0.5)).isnan().all()


def test_the_normal_distribution_has_no_inverse_in_the_left_tail(certified):
    assert certified(torch.special.ndtr, REAL).label is Label.GRAY
    tail = torch.special.ndtr(torch.tensor([-9.0, -9.5], dtype=torch.float64))
    assert tail[0] == tail[1]
    assert certified(torch.special.ndtri, torch.tensor([0.01, 0.3, 0.9])).label is Label.S


@pytest.mark.parametrize("name", POLYNOMIALS)
def test_polynomials_are_one_to_one_in_degree_one_only(certified, name):
    function = getattr(torch.special, name)
    first = torch.ones(6)
    verdict = certified(function, REAL, first, dynamic={id(REAL)})
    assert (verdict.label, verdict.confidence) == (Label.S, 0.8)
    assert certified(function, REAL, 1).label is Label.S
    assert certified(function, REAL, 3).label is Label.K
    assert certified(function, REAL, first).label is Label.K
    assert certified(function, REAL, first + 1, dynamic={id(REAL)}).label is Label.K
    zeros = function(torch.linspace(-5, 5, 100001, dtype=torch.float64), 3).sign().diff().count_nonzero()
    assert zeros >= 3 or "laguerre" in name
