"""Dropout erases what it drops, and is S where it drops nothing."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bwsk_fx.verdict import Label, WitnessKind

X = torch.randn(2, 3, 4)


@pytest.mark.parametrize(("rate", "training"), [(0.0, True), (0.0, False), (0.5, False)])
def test_dropout_that_drops_nothing_changes_nothing(verdict_of, rate, training):
    module = nn.Dropout(rate).train(training)
    for operator in (module, lambda x: F.dropout(x, rate, training)):
        verdict = verdict_of(operator, X)
        assert (verdict.label, verdict.confidence, verdict.witness.kind) == (Label.S, 0.8, WitnessKind.NOTHING)
    assert torch.equal(module(X), X)


@pytest.mark.parametrize("rate", [0.1, 0.25, 1.0])
def test_dropout_erases_its_share(verdict_of, rate):
    for operator in (nn.Dropout(rate), lambda x: F.dropout(x, rate, training=True), nn.AlphaDropout(rate)):
        verdict = verdict_of(operator, X)
        assert verdict.label is Label.K
        assert verdict.erasure.elements == pytest.approx(rate * 12)


def test_random_values_are_dynamic_though_nothing_goes_into_them(verdict_of):
    verdict = verdict_of(lambda x: x + torch.rand(3, 4), X)
    assert verdict.witness.kind is WitnessKind.OTHER_OPERAND
    assert verdict_of(lambda weight, x: x + F.dropout(weight[:3], 0.5), X).witness.kind is WitnessKind.OTHER_OPERAND
    # Without dropping it is static.
    assert verdict_of(lambda weight, x: x + F.dropout(weight[:3], 0.0), X).witness.kind is WitnessKind.NOTHING


def test_a_draw_erases_its_probabilities(verdict_of):
    assert verdict_of(lambda x: torch.bernoulli(x), torch.rand(2, 3, 4)).erasure.elements == 12
    assert verdict_of(lambda x: torch.rand_like(x), X).erasure.elements == 12
