"""No K label of PyTorch's operator database claims to erase more than the rank of the Jacobian allows.

By default each operator has three samples per dtype; `pytest -m opinfo` takes all samples in float64 and complex128.
Not held against Jacobians are expectations (ReLU, dropout), bits, and operands of more than 100 elements, or without
real or complex numbers; sizes bound all of them.
"""

import jacobians
import opinfo
import pytest
import torch

from bwsk_fx.rules import sound
from bwsk_fx.rules.registry import erases
from bwsk_fx.rules.round_trip import execute
from bwsk_fx.verdict import Label

CAPPED = pytest.param(3, id="capped")
ALL = pytest.param(None, id="all", marks=[pytest.mark.opinfo, pytest.mark.timeout(3600)])

# Derivatives that are not those of the operator; differences of its results agree with the amounts.
MISLEADING = {
    "as_strided_scatter": "its derivative does not reset what a source of one element or of other strides overwrites",
    "linalg.pinv.hermitian": "its derivative is that of the general pseudo-inverse, which reads both triangles",
}


@pytest.fixture(scope="module", params=[CAPPED, ALL])
def surveys(request):
    with torch.random.fork_rng():
        return [jacobians.survey(op, request.param) for op in opinfo.operators()]


def test_no_amount_is_false(surveys):
    assert {found.name: found.false[:3] for found in surveys if found.false} == {}


def test_many_amounts_are_held_against_jacobians(surveys):
    assert sum(found.checked > 0 for found in surveys) > 150
    checked = sum(found.checked for found in surveys)
    assert checked > 700
    assert sum(found.tight for found in surveys) > checked / 2


def test_autograd_misleads_only_where_that_is_known(surveys):
    assert {found.name for found in surveys if found.misled} == set(MISLEADING)


def _examined(function, verdict, *args):
    found = jacobians.Claims("")
    jacobians.examine(execute(function, args, {}), verdict, "here", found)
    return found


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_amounts_that_are_too_large_are_false(dtype):
    x = torch.randn(3, 4, dtype=dtype)
    assert _examined(lambda x: x.sum(1), erases("it sums", 9), x).false == []
    assert "rank" in _examined(lambda x: x.sum(1), erases("it sums", 9.5), x).false[0]
    assert "more than there is" in _examined(torch.exp, erases("it sums", 13), x).false[0]
    assert "more than there is" in _examined(torch.exp, erases("it sums", bits=12 * 8 * x.itemsize + 1), x).false[0]


def test_operators_without_a_derivative_are_differenced():
    x = torch.randn(3, 4, dtype=torch.double)
    assert _examined(lambda x: torch.histogram(x, 4), erases("it sums", 10), x).false == []
    found = _examined(lambda x: torch.histogram(x, 4), erases("it sums", 11), x)
    assert "rank 2 instead of at most 1" in found.false[0]


def test_differences_are_zero_where_a_count_jumps():
    x = torch.tensor([0.5, 1.0], dtype=torch.double)
    bins = torch.tensor([0.0, 0.5, 1.0], dtype=torch.double)
    executed = execute(lambda x: torch.histogram(x, bins), (x,), {})
    assert jacobians.differences(executed, executed.run.operands).abs().max() == 0


def test_expectations_are_not_held_against_single_calls():
    x = torch.rand(3, 4, dtype=torch.double)
    for function in (torch.relu, torch.nn.Dropout(0.5)):
        verdict = sound.verdict(execute(function, (x,), {}).call)
        assert verdict.label is Label.K
        assert verdict.erasure.elements == 6
        assert verdict.erasure.expected
        assert verdict.to_json()["erasure"] == {"elements": 6, "expected": True}
        assert _examined(function, verdict, x).checked == 0
