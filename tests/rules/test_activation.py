"""Which activations erase, how much, and that the others are undone."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bwsk_fx.verdict import Label

X = torch.linspace(-6, 6, 24).view(2, 3, 4)


@pytest.mark.parametrize("activation", [nn.GELU(), nn.GELU("tanh"), nn.SiLU(), nn.Mish(), F.gelu, F.silu])
def test_two_branches_are_one_bit_per_element(verdict_of, activation):
    function = activation if isinstance(activation, nn.Module) else lambda x: activation(x)
    verdict = verdict_of(function, X)
    assert verdict.label is Label.K
    assert (verdict.erasure.bits, verdict.erasure.elements) == (12, None)
    # The claim is about values: some output has two inputs, one on either side of the minimum.
    left, right = activation(torch.linspace(-5, -2, 50)), activation(torch.linspace(-0.5, 0, 5000))
    assert (left[:, None] - right).abs().min() < 1e-4


def test_activations_of_transformers(verdict_of):
    from transformers.activations import ACT2FN

    bits = ("gelu", "gelu_new", "gelu_fast", "gelu_accurate", "quick_gelu", "gelu_pytorch_tanh", "silu", "mish")
    for name in bits:
        assert verdict_of(ACT2FN[name], X).erasure.bits == 12, name
    for name in ("relu", "relu2"):
        assert verdict_of(ACT2FN[name], X).erasure.elements == 6, name
    for name in ("linear", "sigmoid", "tanh", "leaky_relu", "laplace"):
        assert verdict_of(ACT2FN[name], X).label is Label.S, name
    for name in ("gelu_10", "hardswish", "relu6"):
        assert verdict_of(ACT2FN[name], X).label is Label.K, name


@pytest.mark.parametrize("activation", [nn.ReLU(), F.relu, torch.relu, torch.Tensor.relu, F.relu_])
def test_relu_erases_the_negative_half(certified, activation):
    verdict = certified(activation, X)
    assert (verdict.label, verdict.erasure.elements, verdict.erasure.expected) == (Label.K, 12, True)


@pytest.mark.parametrize(
    "activation",
    [
        *(nn.ReLU6(), nn.Hardtanh(), nn.Hardsigmoid(), nn.Hardswish(), nn.Threshold(0.1, 2.0), F.relu6, F.hardtanh_),
        *(nn.Hardshrink(), nn.Softshrink(), F.hardshrink, F.softshrink),
    ],
)
def test_flat_parts_are_k(certified, activation):
    verdict = certified(activation, X)
    assert (verdict.label, verdict.erasure) == (Label.K, None)
    values = activation(torch.linspace(-9, 9, 1801))
    assert values.unique().numel() < values.numel()


def test_shrinking_by_nothing_changes_nothing(certified):
    for width in (0.0, -0.5):
        assert certified(F.hardshrink, X, width).label is Label.S
    assert certified(nn.Softshrink(0.0), X).label is Label.S


@pytest.mark.parametrize(
    "activation",
    [
        *(nn.ELU(), nn.ELU(0.3), nn.CELU(), nn.CELU(2.5), nn.SELU(), F.elu, F.elu_, F.celu, F.selu),
        *(nn.Softplus(), nn.Softplus(2.0, 30.0), F.softplus, nn.Tanh(), nn.Sigmoid(), nn.Softsign()),
        *(nn.LogSigmoid(), nn.LeakyReLU(0.1)),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_strictly_increasing_activations_are_undone(certified, activation, dtype):
    assert certified(activation, X.to(dtype)).label is Label.S


def test_exponential_units_depend_on_alpha(certified):
    assert certified(nn.ELU(0.0), X).erasure.elements == 12
    assert certified(nn.ELU(-1.0), X).erasure.bits == 24
    assert certified(nn.CELU(-1.5), X).label is Label.S
    assert certified(torch.ops.aten.elu.default, X, 0.5, 2.0, 0.7).label is Label.S
    assert certified(torch.ops.aten.elu.default, X, 0.5, -2.0, 0.7).label is Label.GRAY


def test_softplus_with_a_low_threshold_has_two_branches(certified):
    assert certified(nn.Softplus(1.0, 0.2), X).label is Label.K
    result = F.softplus(torch.tensor(0.19), 1.0, 0.2)
    assert F.softplus(result, 1.0, 0.2) == result
    assert certified(F.softplus, X, -1.0).label is Label.GRAY


def test_leaky_relu_depends_on_its_slope(verdict_of, certified):
    verdict = verdict_of(nn.LeakyReLU(0.1), X)
    assert (verdict.label, verdict.confidence) == (Label.S, 0.8)
    assert verdict_of(nn.LeakyReLU(0.0), X).erasure.elements == 6
    assert verdict_of(nn.LeakyReLU(-0.5), X).erasure.bits == 12
    assert certified(F.leaky_relu_, X, 0.2).label is Label.S


def test_prelu_looks_at_its_slopes(verdict_of, certified):
    module = nn.PReLU(3)
    assert certified(module, X).confidence == 0.8
    assert verdict_of(module, X).label is Label.S
    with torch.no_grad():
        module.weight[1] = -0.1
    assert verdict_of(module, X).label is Label.K
    weight = torch.tensor([0.5, 0.1, 2.0])
    assert certified(F.prelu, X, weight, dynamic={id(X)}).label is Label.S
    assert certified(F.prelu, X, weight).label is Label.GRAY
    assert certified(F.prelu, X[0, 0, 0], weight[:1], dynamic=None).label is Label.GRAY
    assert certified(nn.PReLU(), X[0, 0, 0]).label is Label.S


def test_random_slopes_are_lost_while_training(certified):
    assert certified(nn.RReLU().train(), X).erasure.elements == 12
    assert certified(nn.RReLU().eval(), X).label is Label.S
    assert certified(F.rrelu, X, training=False).label is Label.S
    assert certified(F.rrelu, X, 0.25, 0.25, True).label is Label.S
    assert certified(F.rrelu, X, training=True).label is Label.K


def test_gates_lose_a_half(certified, verdict_of):
    assert certified(nn.GLU(), X).erasure.elements == 12
    assert verdict_of(lambda x: F.glu(x, dim=-1), X).erasure.elements == 6


def test_a_difference_that_cancels_is_gray(certified):
    assert certified(nn.Tanhshrink(), X).label is Label.GRAY
    small = torch.tensor([1e-4, 1.01e-4])
    assert F.tanhshrink(small)[0] == F.tanhshrink(small)[1]
