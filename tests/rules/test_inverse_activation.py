"""Activation inputs from outputs: near the input, and with a slope that is nearly the input's own."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from bwsk_fx.rules import inverse_activation as activation
from bwsk_fx.rules.inverse_activation import VALLEYS, from_side, from_side_and_place, side_and_place

BF16, FP16 = torch.bfloat16, torch.float16


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


FUNCTIONS = {"gelu": F.gelu, "gelu_tanh": _gelu_tanh, "silu": F.silu}


def _value(name: str, x: Tensor) -> Tensor:
    gate, _ = VALLEYS[name].gate(x.double())
    return x.double() * gate


def _slope(name: str, x: Tensor) -> Tensor:
    gate, change = VALLEYS[name].gate(x.double())
    return gate + x.double() * change


def _normal(*shape: int, scale: float = 2.0, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_figures_of_a_valley_are_its_own(name):
    valley = VALLEYS[name]
    x = torch.tensor([valley.bottom, valley.end], dtype=torch.float64, requires_grad=True)
    gate, _ = valley.gate(x)
    (slope,) = torch.autograd.grad((x * gate).sum(), x, create_graph=True)
    (bend,) = torch.autograd.grad(slope.sum(), x)
    depth, last = (x * gate).tolist()
    assert abs(slope[0].item()) < 1e-8
    assert depth == pytest.approx(valley.depth, rel=1e-15)
    assert bend[0].item() == pytest.approx(valley.curvature, rel=1e-9)
    assert math.sqrt(math.log(depth / last)) == pytest.approx(valley.end_level, rel=1e-9)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_gate_is_that_of_the_operator_and_the_slope_its_gradient(name):
    x = torch.linspace(-6, 12, 2001, dtype=torch.float64, requires_grad=True)
    y = FUNCTIONS[name](x)
    (expected,) = torch.autograd.grad(y.sum(), x)
    gate, _ = VALLEYS[name].gate(x)
    torch.testing.assert_close(x * gate, y, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(_slope(name, x), expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("right", [True, False])
def test_every_half_precision_output_has_an_input_that_gives_it(name, right, dtype):
    """All numbers of the dtype that are outputs of the branch, as far as the valley goes."""
    valley = VALLEYS[name]
    y = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    last = _value(name, torch.tensor(valley.end)).item()
    y = y[(y.double() >= valley.depth) & ((y.double() < torch.inf) if right else (y.double() <= 2 * last))]
    x = from_side(y.float(), torch.tensor(right), name)
    assert ((x >= valley.bottom) if right else (x <= valley.bottom)).all()
    assert torch.equal(_value(name, x).to(dtype), y)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_float64_outputs_give_their_inputs(name):
    valley = VALLEYS[name]
    x = torch.cat([_normal(20_000), torch.linspace(valley.end + 0.1, 100, 20_000, dtype=torch.float64)])
    found = from_side_and_place(_value(name, x), side_and_place(x, name), name)
    torch.testing.assert_close(found, x, rtol=1e-12, atol=1e-9)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_float32_outputs_give_their_inputs_at_the_bottom_too(name):
    valley = VALLEYS[name]
    near = valley.bottom + torch.linspace(-0.01, 0.01, 200_001, dtype=torch.float64)
    x = torch.cat([_normal(200_000), near]).float()
    y = FUNCTIONS[name](x)
    found = from_side_and_place(y, side_and_place(x, name), name)
    loose = 5e-7 if name == "silu" else 4e-6
    torch.testing.assert_close(_slope(name, found), _slope(name, x), rtol=0.0, atol=loose)
    # Left of -2, PyTorch's own GELU has lost digits.
    torch.testing.assert_close(found[x > -2], x[x > -2], rtol=1e-6, atol=5e-6)
    # A side alone would leave a hundred times that error.
    assert (from_side(y, x > valley.bottom, name) - x).abs().max() > 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, BF16, FP16])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_what_underflows_gets_a_finite_input_with_no_slope(name, dtype):
    x = torch.tensor([-6.0, -20.0, -100.0, -1e4]).to(dtype)
    found = from_side(FUNCTIONS[name](x), x > 0, name)
    assert found.isfinite().all()
    torch.testing.assert_close(_slope(name, found), _slope(name, x), rtol=0.02, atol=2e-6)


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ends_and_nan_pass_through(name, dtype):
    x = torch.tensor([0.0, 1e-30, 50.0, 1e30, math.inf, math.nan], dtype=dtype)
    y = FUNCTIONS[name](x)
    found = from_side_and_place(y, side_and_place(x, name), name)
    # PyTorch's GELU of infinity is NaN on some machines.
    torch.testing.assert_close(found, torch.where(y.isnan(), y, x), rtol=1e-6, atol=0.0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, BF16, FP16, torch.float64])
@pytest.mark.parametrize("slope", [0.01, 0.2, 3.0])
def test_leaky_relu(slope, dtype):
    x = torch.cat([_normal(1000), torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan])]).to(dtype)
    found = activation.unbent(F.leaky_relu(x, slope), slope)
    eps = torch.finfo(dtype).eps
    # In float16, results below 6e-5 are subnormal.
    torch.testing.assert_close(found, x, rtol=2 * eps, atol=1e-5 if dtype is FP16 else 0.0, equal_nan=True)
    assert torch.equal(found[x > 0], x[x > 0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("function", "parameters"),
    [
        (F.elu, (1.0, 1.0, 1.0)),
        (lambda x: F.elu(x, 0.5), (0.5, 1.0, 1.0)),
        (lambda x: F.celu(x, 0.7), (0.7, 1.0, 1 / 0.7)),
        (F.selu, (1.6732632423543772, 1.0507009873554805, 1.0)),
    ],
    ids=["elu", "alpha", "celu", "selu"],
)
def test_exponential_units(function, parameters, dtype):
    x = torch.cat([_normal(1000).clamp(min=-6), torch.tensor([0.0, math.inf, math.nan])]).to(dtype)
    found, eps = activation.unit_input(function(x), *parameters), torch.finfo(dtype).eps
    # The slope is exp(x), and that of an error of ε in y is lost in x.
    tolerance = 4 * eps * (1 + (-parameters[2] * x).clamp(min=0).exp())
    assert ((found - x).abs() <= tolerance)[x.isfinite()].all()
    assert torch.equal(found.isnan(), x.isnan()) and found[-2] == math.inf


def test_an_exponential_unit_that_has_reached_its_limit_gets_a_finite_input():
    x = torch.tensor([-30.0, -1e4, -math.inf])
    found = activation.unit_input(F.elu(x), 1.0, 1.0, 1.0)
    assert ((found > -18) & (found < -16)).all()


@pytest.mark.parametrize("dtype", [torch.float32, BF16, FP16, torch.float64])
@pytest.mark.parametrize(("beta", "threshold"), [(1.0, 20.0), (2.0, 20.0), (0.5, 30.0)])
def test_softplus(beta, threshold, dtype):
    x = torch.cat([_normal(1000, scale=4.0), torch.tensor([-15.0, 0.0, 19.9, 20.1, 1e3, math.nan])]).to(dtype)
    found = activation.softplus_input(F.softplus(x, beta, threshold), beta, threshold)
    eps, subnormal = torch.finfo(dtype).eps, 1e-7 if dtype is FP16 else 0.0
    slope, expected = (torch.sigmoid(beta * value.double()) for value in (found, x))
    torch.testing.assert_close(slope, expected, rtol=16 * eps, atol=subnormal, equal_nan=True)


def test_softplus_that_underflows_gets_a_finite_input():
    for dtype in (torch.float32, FP16):
        found = activation.softplus_input(F.softplus(torch.tensor([-200.0, -1e4], dtype=dtype)), 1.0, 20.0)
        assert ((found < -80) & found.isfinite()).all()
