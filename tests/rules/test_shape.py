"""Rearrangements are undone by moving back."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bwsk_fx.verdict import Label, WitnessKind

X = torch.arange(2 * 3 * 4.0).view(2, 3, 4)

PAIRS = {
    "view": (lambda x: x.view(-1, 12), lambda y: y.view(-1, 3, 4)),
    "reshape": (lambda x: x.reshape(-1, 2, 6), lambda y: y.reshape(-1, 3, 4)),
    "flatten": (lambda x: x.flatten(1), lambda y: y.view(-1, 3, 4)),
    "unflatten": (lambda x: x.unflatten(2, (2, 2)), lambda y: y.flatten(2)),
    "transpose": (lambda x: x.transpose(1, 2), lambda y: y.transpose(1, 2)),
    "permute": (lambda x: x.permute(2, 0, 1), lambda y: y.permute(1, 2, 0)),
    "mT": (lambda x: x.mT, lambda y: y.mT),
    "unsqueeze": (lambda x: x.unsqueeze(1), lambda y: y.squeeze(1)),
    "contiguous": (lambda x: x.transpose(1, 2).contiguous(), lambda y: y.transpose(1, 2)),
    "roll": (lambda x: torch.roll(x, 1, dims=1), lambda y: torch.roll(y, -1, dims=1)),
    "flip": (lambda x: x.flip(1), lambda y: y.flip(1)),
    "expand": (lambda x: x.unsqueeze(1).expand(-1, 5, -1, -1), lambda y: y[:, 3]),
    "repeat": (lambda x: x.repeat(1, 1, 2), lambda y: y[..., 4:]),
    "pad": (lambda x: F.pad(x, (1, 2)), lambda y: y[..., 1:-2]),
    "pixel_shuffle": (lambda x: F.pixel_shuffle(x.view(-1, 4, 1, 3), 2), lambda y: F.pixel_unshuffle(y, 2)),
}


@pytest.mark.parametrize("name", PAIRS)
def test_moving_back_rebuilds_the_operand_exactly(verdict_of, name):
    forward, back = PAIRS[name]
    verdict = verdict_of(forward, X)
    assert (verdict.label, verdict.witness.kind) == (Label.S, WitnessKind.NOTHING)
    assert torch.equal(back(forward(X)).view_as(X), X)


def test_modules_that_rearrange(verdict_of):
    for module in (nn.Identity(), nn.Flatten(), nn.Unflatten(2, (2, 2)), nn.ConstantPad1d(1, 0.0)):
        assert verdict_of(module, X).label is Label.S


def test_joining_and_cutting(verdict_of):
    assert verdict_of(lambda x, y: torch.cat((x, y), dim=1), X, X + 1).label is Label.S
    assert verdict_of(lambda x, y: torch.stack((x, y), dim=1), X, X + 1).label is Label.S
    # The pieces are no operators of their own: the cut is what is counted.
    for function in (lambda x: x.chunk(2, -1)[0], lambda x: x.split(1, -1)[0], lambda x: x.unbind(1)[0]):
        verdict = verdict_of(function, X)
        assert (verdict.label, verdict.rule) == (Label.S, "shape.cut")


def test_negative_padding_crops(verdict_of):
    verdict = verdict_of(lambda x: F.pad(x, (-1, 0), mode="circular"), X)
    assert (verdict.label, verdict.erasure.elements) == (Label.K, 3)


def test_unknown_attributes_are_gray(verdict_of):
    assert verdict_of(lambda x: x.real, X.to(torch.complex64)).label is Label.GRAY
