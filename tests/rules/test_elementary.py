"""Elementary functions: inverses on their domains, what repeats, and integers."""

import operator
import re

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bwsk_fx.rules import sound
from bwsk_fx.rules.elementary import _SATURATION, ALIASES, BIJECTIONS
from bwsk_fx.rules.round_trip import execute, round_trip
from bwsk_fx.verdict import Label, WitnessKind

REAL = torch.tensor([-2.5, -1.0, -0.3, 0.2, 0.75, 1.0, 2.0])
POSITIVE = torch.tensor([0.01, 0.3, 1.0, 1.5, 8.0])
UNIT = torch.tensor([0.05, 0.2, 0.5, 0.7, 0.95])
COMPLEX = torch.complex(REAL, REAL.flip(0) / 2)
DOMAINS = {"x > 0": POSITIVE, "x >= 0": POSITIVE, "x != 0": REAL, "x > -1": POSITIVE - 0.9, "x >= 1": POSITIVE + 1}


def sample(domain):
    return UNIT if domain is not None and "1" in domain and domain not in DOMAINS else DOMAINS.get(domain, REAL)


@pytest.mark.parametrize("name", [*BIJECTIONS, *ALIASES])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_strictly_monotone_functions_are_undone(certified, name, dtype):
    names = [holder for holder in (torch, torch.special, F) if hasattr(holder, name)]
    domain = BIJECTIONS[ALIASES.get(name, name)].domain
    for holder in names:
        verdict = certified(getattr(holder, name), sample(domain).to(dtype))
        assert (verdict.label, verdict.confidence, verdict.witness.kind) == (Label.S, 0.5, WitnessKind.NOTHING)
        assert verdict.rule == "elementary.strictly_monotone"
        if domain == _SATURATION:
            assert re.fullmatch(rf"\|x\| < \S+, where {domain} in {str(dtype)[6:]}", verdict.domain)
        else:
            assert verdict.domain == domain
    assert names or hasattr(torch.Tensor, name) or hasattr(operator, name) or hasattr(torch.ops.aten, name)


@pytest.mark.parametrize(
    ("function", "dtype", "last"),
    [(torch.tanh, torch.float32, 8.32), (torch.sigmoid, torch.float32, 15.9), (torch.erf, torch.bfloat16, 1.88)],
)
def test_saturation_begins_where_the_domain_says(function, dtype, last):
    x = torch.tensor([last * 0.95, last * 1.3]).to(dtype)
    executed = execute(function, (x,), {})
    verdict = sound.verdict(executed.call)
    assert verdict.domain.startswith(f"|x| < {last}")
    assert function(x[0]) < 1 == function(x[1])
    assert round_trip(executed, verdict).lost >= 1


@pytest.mark.parametrize("module", [nn.Tanh(), nn.Sigmoid(), nn.Softsign(), nn.LogSigmoid(), torch.Tensor.exp_])
def test_modules_and_in_place_twins(certified, module):
    assert certified(module, REAL).rule == "elementary.strictly_monotone"


@pytest.mark.parametrize("name", ["tanh", "sigmoid", "erf", "atan", "softsign", "exp", "expm1", "erfc"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saturated_elements_are_lost_and_not_wrong(name, dtype):
    operand = torch.tensor([-1e5, -300.0, -30.0, 0.5, 30.0, 300.0, 1e5], dtype=dtype)
    function = getattr(F if name == "softsign" else torch, name)
    executed = execute(function, (operand,), {})
    trip = round_trip(executed, sound.verdict(executed.call))
    assert trip.wrong == 0
    assert trip.lost >= 2


def test_complex_numbers_repeat_exponentials_and_not_logarithms(certified):
    for function in (torch.exp, torch.tanh, torch.sigmoid, torch.sinh, torch.sin, torch.abs, torch.square):
        assert certified(function, COMPLEX).label is Label.K
    for function in (
        torch.log,
        torch.sqrt,
        torch.reciprocal,
        torch.neg,
        torch.asin,
        torch.atanh,
        torch.log1p,
        F.softsign,
    ):
        assert certified(function, COMPLEX).label is Label.S


@pytest.mark.parametrize("name", ["abs", "cosh", "square", "sinc", "i0", "absolute"])
def test_even_functions_erase_the_sign(certified, name):
    verdict = certified(getattr(torch, name), REAL)
    assert (verdict.label, verdict.erasure.bits) == (Label.K, 7)
    torch.testing.assert_close(getattr(torch, name)(-REAL), getattr(torch, name)(REAL))


def test_periodic_functions_are_k(certified):
    for name in ("sin", "cos", "tan"):
        assert certified(getattr(torch, name), REAL).label is Label.K


def test_integers_are_tried_one_by_one(certified):
    short, long = torch.arange(-100, 100, dtype=torch.int8), torch.arange(-5, 5)
    assert certified(torch.neg, short).label is Label.S
    assert certified(torch.asinh, short).label is Label.S
    assert certified(torch.exp, short).label is Label.K  # exp(-128) and exp(-127) are zero
    assert certified(torch.sqrt, short).label is Label.K  # negative ones become NaN
    assert certified(torch.sqrt, short.abs().to(torch.uint8)).label is Label.S
    assert certified(torch.abs, short.to(torch.uint8)).label is Label.S
    assert certified(torch.asinh, long).label is Label.K  # 2**63 - 1 and its neighbour
    assert certified(torch.log, torch.tensor([True, False])).label is Label.S
    assert certified(torch.sigmoid, torch.tensor([True, False])).label is Label.S


def test_logit_that_clamps_erases(certified):
    assert certified(torch.logit, UNIT).label is Label.S
    assert certified(torch.special.logit, UNIT, 0.1).label is Label.K
    assert certified(torch.logit, UNIT, eps=0.1).confidence == 0.8


def test_operators_and_functions_in_captured_graphs(verdict_of):
    batch = torch.rand(2, 3, 4) + 0.1
    for function in (lambda x: -x, torch.exp, torch.log, torch.special.expm1, lambda x: x.rsqrt(), torch.arctan):
        assert verdict_of(lambda x, function=function: function(x), batch).label is Label.S
    assert verdict_of(lambda x: abs(x), batch).erasure.bits == 12
