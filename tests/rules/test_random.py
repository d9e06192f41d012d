"""Dropout erases what it drops, and is S where it drops nothing; draws erase what they are drawn from."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bwsk_fx.rules.random import zero_rate
from bwsk_fx.verdict import Label, WitnessKind

X = torch.randn(2, 3, 4)
MODULES = (nn.Dropout, nn.Dropout1d, nn.AlphaDropout, nn.FeatureAlphaDropout)


@pytest.mark.parametrize(("rate", "training"), [(0.0, True), (0.0, False), (0.5, False)])
def test_dropout_that_drops_nothing_changes_nothing(verdict_of, certified, rate, training):
    module = nn.Dropout(rate).train(training)
    for operator in (module, lambda x: F.dropout(x, rate, training)):
        verdict = verdict_of(operator, X)
        assert (verdict.label, verdict.confidence, verdict.witness.kind) == (Label.S, 0.8, WitnessKind.NOTHING)
    for kind in MODULES:
        assert certified(kind(rate).train(training), X).label is Label.S


@pytest.mark.parametrize("rate", [0.1, 0.25, 1.0])
def test_dropout_erases_its_share(verdict_of, certified, rate):
    for operator in (nn.Dropout(rate), lambda x: F.dropout(x, rate, training=True), nn.AlphaDropout(rate)):
        verdict = verdict_of(operator, X)
        assert verdict.label is Label.K
        assert verdict.erasure.elements == pytest.approx(rate * 12)
    for kind in MODULES:
        assert certified(kind(rate), X).erasure.elements == pytest.approx(rate * 24)


@pytest.mark.parametrize(
    ("function", "args"),
    [
        (torch.dropout, (X, 0.25, True)),
        (torch.feature_alpha_dropout, (X, 0.25, True)),
        (torch.native_dropout, (X, 0.25, True)),
        (torch.native_dropout, (X, 0.25, None)),
        (torch.ops.aten.native_dropout.default, (X, 0.25, True)),
        (F.dropout3d, (torch.randn(1, 2, 3, 4), 0.25, True)),
    ],
)
def test_forms_of_dropout(certified, function, args):
    assert certified(function, *args).erasure.elements == pytest.approx(6)
    assert certified(function, args[0], args[1], False).label is Label.S


@pytest.mark.parametrize("rate", [0.25, 0.5])
@pytest.mark.parametrize("name", ["dropout", "dropout2d", "alpha_dropout", "feature_alpha_dropout"])
def test_dropout_inside_another_call_is_found_by_its_mask(certified, name, rate):
    def wrapped(x):
        return getattr(F, name)(x, rate, True)

    verdict = certified(wrapped, torch.randn(2, 3, 4, 4))
    assert (verdict.label, verdict.rule) == (Label.K, "composition")
    assert verdict.erasure.elements == pytest.approx(rate * 96)


def test_gradients_of_dropout(certified):
    backward = torch.ops.aten.native_dropout_backward.default
    assert certified(backward, X, X > 0, 2.0).label is Label.K


def test_random_values_are_dynamic_though_nothing_goes_into_them(verdict_of):
    verdict = verdict_of(lambda x: x + torch.rand(3, 4), X)
    assert verdict.witness.kind is WitnessKind.OTHER_OPERAND
    assert verdict_of(lambda weight, x: x + F.dropout(weight[:3], 0.5), X).witness.kind is WitnessKind.OTHER_OPERAND
    # Without dropping it is static.
    assert verdict_of(lambda weight, x: x + F.dropout(weight[:3], 0.0), X).witness.kind is WitnessKind.NOTHING


def test_a_draw_erases_its_probabilities(verdict_of, certified):
    assert verdict_of(lambda x: torch.bernoulli(x), torch.rand(2, 3, 4)).erasure.elements == 12
    assert verdict_of(lambda x: torch.rand_like(x), X).erasure.elements == 12
    assert certified(torch.multinomial, torch.rand(2, 5), 2).erasure.elements == 10
    # What is drawn from a normal distribution lies near its mean.
    assert certified(torch.normal, X, 1.0).label is Label.K
    assert certified(torch.normal, X, 1.0).erasure is None
    assert certified(torch.poisson, X.abs()).erasure.elements == 24
    assert certified(torch.randint_like, X, 5).erasure.elements == 24


@pytest.mark.parametrize(
    "name", ["uniform_", "normal_", "cauchy_", "exponential_", "geometric_", "log_normal_", "random_", "bernoulli_"]
)
def test_draws_in_place_overwrite(certified, name):
    args = (0.5,) if name in ("geometric_", "bernoulli_") else ()
    assert certified(name, X, *args).erasure.elements == 24
    assert certified(getattr(torch.Tensor, name), X, *args).erasure.elements == 24


class _Masks(nn.Module):
    def forward(self, x):
        kept = x.new_empty(x.shape[0], 1, 1).bernoulli_(0.75).div_(0.75)
        floors = torch.floor(0.75 + torch.rand(x.shape[0], 1, 1))
        return x * kept, floors * x, x * torch.rand(x.shape[0], 1, 1)


def test_masks_are_told_from_other_random_factors():
    import bwsk_fx

    graph = bwsk_fx.type_nodes(bwsk_fx.capture(_Masks(), X))
    products = [node for node in graph.graph.nodes if getattr(node.target, "__name__", node.target) == "mul"]
    rates = [max(zero_rate(operand) or 0 for operand in node.all_input_nodes) for node in products]
    assert rates == [pytest.approx(0.25), pytest.approx(0.25), 0]
    labels = [node.meta["bwsk"].label for node in products]
    assert labels == [Label.K, Label.K, Label.S]
    assert products[0].meta["bwsk"].erasure.elements == pytest.approx(3)
