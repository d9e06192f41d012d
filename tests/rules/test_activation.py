"""Which activations erase, how much, and that the others are undone."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bwsk_fx.verdict import Label, WitnessKind

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

    for name in ("gelu", "gelu_new", "gelu_fast", "quick_gelu", "gelu_pytorch_tanh", "silu"):
        assert verdict_of(ACT2FN[name], X).erasure.bits == 12, name


@pytest.mark.parametrize("activation", [nn.ReLU(), F.relu, torch.relu, torch.Tensor.relu])
def test_relu_erases_the_negative_half(verdict_of, activation):
    function = activation if isinstance(activation, nn.Module) else lambda x: activation(x)
    verdict = verdict_of(function, X)
    assert (verdict.label, verdict.erasure.elements) == (Label.K, 6)


@pytest.mark.parametrize("activation", [nn.Tanh(), nn.Sigmoid(), nn.ELU()])
def test_saturating_activations_erase_in_floating_point(verdict_of, activation):
    verdict = verdict_of(activation, X)
    assert (verdict.label, verdict.erasure) == (Label.K, None)
    sign = -1 if isinstance(activation, nn.ELU) else 1
    assert activation(torch.tensor(sign * 20.0)) == activation(torch.tensor(sign * 21.0))


def test_softplus_and_log_sigmoid_are_undone(verdict_of):
    for module, inverse in (
        (nn.Softplus(), lambda y: y + torch.log(-torch.expm1(-y))),
        (nn.LogSigmoid(), lambda y: y - torch.log(-torch.expm1(y))),
    ):
        assert verdict_of(module, X).label is Label.S
        torch.testing.assert_close(inverse(module(X.double())), X.double())


def test_leaky_relu_depends_on_its_slope(verdict_of):
    module = nn.LeakyReLU(0.1)
    verdict = verdict_of(module, X)
    assert (verdict.label, verdict.confidence) == (Label.S, 0.8)
    y = module(X)
    torch.testing.assert_close(torch.where(y < 0, y / 0.1, y), X)
    assert verdict_of(nn.LeakyReLU(0.0), X).erasure.elements == 6
    assert verdict_of(nn.LeakyReLU(-0.5), X).erasure.bits == 12
    assert verdict_of(lambda x: F.leaky_relu(x, 0.0), X).label is Label.K


@pytest.mark.parametrize("softmax", [F.softmax, F.log_softmax])
def test_softmax_is_undone_by_logsumexp(verdict_of, softmax):
    verdict = verdict_of(lambda x: softmax(x, dim=-1), X)
    assert (verdict.label, verdict.witness.kind, verdict.witness.names) == (
        Label.S,
        WitnessKind.BY_PRODUCTS,
        ("logsumexp",),
    )
    assert verdict.witness.elements == 3
    y = softmax(X, dim=-1)
    logs = y.log() if softmax is F.softmax else y
    torch.testing.assert_close(logs + X.logsumexp(-1, keepdim=True), X)


def test_softmax_that_narrows_erases(verdict_of):
    narrow = verdict_of(lambda x: F.softmax(x, dim=-1, dtype=torch.bfloat16), X)
    assert (narrow.label, narrow.erasure.bits) == (Label.K, 12 * 16)
    wide = verdict_of(lambda x: F.softmax(x, dim=-1, dtype=torch.float32), X.bfloat16())
    assert wide.label is Label.S
