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


def test_parts_of_complex_numbers(verdict_of, certified):
    for name in ("real", "imag"):
        verdict = certified(getattr, X.to(torch.complex64), name)
        assert (verdict.label, verdict.erasure.elements) == (Label.K, 12)
    assert certified(getattr, X, "real").label is Label.S
    assert certified(getattr, X.to(torch.complex64)[0], "H").label is Label.S
    assert verdict_of(lambda x: x.data, X).label is Label.S


REARRANGEMENTS = {
    "movedim": (torch.movedim, X, 0, 2),
    "squeeze": (torch.squeeze, X[:, None, None], (1, 2)),
    "atleast_3d": (torch.atleast_3d, X[0]),
    "rot90": (torch.rot90, X, 1, (1, 2)),
    "diag_embed": (torch.diag_embed, X),
    "diagflat": (torch.diagflat, X[0, 0]),
    "block_diag": (torch.block_diag, X[0], X[1] + 1),
    "column_stack": (torch.column_stack, (X[0], X[1])),
    "chunk_cat": (torch._chunk_cat, [X[0], X[1]], 0, 2),
    "meshgrid": (torch.meshgrid, X[0, 0], X[0, 1]),
    "cartesian_prod": (torch.cartesian_prod, X[0, 0], X[0, 1]),
    "combinations": (torch.combinations, X[0, 0], 2),
    "expand_as": ("expand_as", X[0], X),
    "bits": ("view", X, torch.int32),
    "copy twin": (torch.permute_copy, X, (1, 0, 2)),
    "in place": ("t_", X[0].clone()),
    "resize": ("resize_", X.clone(), (5, 5)),
    "sections": (torch.tensor_split, X, torch.tensor([1, 2]), 2),
    "hsplit": (torch.hsplit, X, 3),
    "aten": (torch.ops.aten._unsafe_view.default, X, [6, 4]),
}


@pytest.mark.parametrize("name", REARRANGEMENTS)
def test_rearrangements_are_certified(certified, name):
    assert certified(*REARRANGEMENTS[name]).label is Label.S


def test_counts_of_repetition(certified):
    three = torch.tensor([1.0, 2.0, 3.0])
    assert certified(torch.repeat_interleave, three, torch.tensor([1, 2, 1]), dynamic={id(three)}).label is Label.S
    zero = certified(torch.repeat_interleave, three, torch.tensor([2, 0, 2]), dynamic={id(three)})
    assert (zero.label, zero.erasure.elements) == (Label.K, 1)
    assert certified(torch.repeat_interleave, three, torch.tensor([1, 2, 1])).label is Label.GRAY
    assert certified(torch.repeat_interleave, torch.tensor([1, 0, 4])).label is Label.S
    assert certified("repeat", X, 0, 1, 1).erasure.elements == 24


def test_addresses_decide_about_strides(certified):
    assert certified(torch.as_strided, X, (4, 6), (1, 4)).label is Label.S
    overlapping = certified(torch.as_strided, X, (5, 4), (2, 1))
    assert (overlapping.label, overlapping.erasure.elements) == (Label.K, 24 - 12)
    # Of an operand with another layout, no more than counting is proven.
    assert certified(torch.as_strided, X.mT, (4, 6), (1, 4)).label is Label.GRAY
    assert certified("resize_", X.clone(), (2, 3)).erasure.elements == 18


def test_joins_that_round(certified):
    ones = torch.ones(2, dtype=torch.int64)
    floats = torch.ones(2)
    assert certified(torch.cat, (ones, floats)).label is Label.K
    assert certified(torch.cat, (ones, floats), dynamic={id(floats)}).label is Label.S
    assert certified(torch.cat, (floats, floats.double())).undo.operands == (0, 1)
    assert certified(torch.cat, (ones, torch.ones(2)), dynamic={id(ones)}).label is Label.K


def test_an_operand_of_which_only_the_shape_or_the_cuts_are_dynamic(certified):
    other, places = torch.ones(2, 3, 4), torch.tensor([1, 2])
    verdict = certified("expand_as", X, other, dynamic={id(other)})
    assert (verdict.label, verdict.erasure.elements) == (Label.K, 24)
    assert certified(torch.tensor_split, X, places, 2, dynamic={id(places)}).label is Label.GRAY
    assert certified(torch.repeat_interleave, X[0, 0, :2], places, dynamic={id(places)}).label is Label.GRAY


def test_an_unknown_attribute_is_gray(certified):
    assert certified(getattr, X, "is_leaf", dynamic={id(X)}).label is Label.GRAY
