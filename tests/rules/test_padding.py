"""Padding keeps the operand in its middle; crops, triangles and windows keep what coverage says."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bwsk_fx.verdict import Label

X = torch.randn(2, 3, 5, 4)


@pytest.mark.parametrize("mode", ["constant", "reflect", "replicate", "circular"])
def test_every_mode_keeps_the_operand(certified, mode):
    verdict = certified(F.pad, X, (1, 2, 0, 1), mode=mode)
    assert (verdict.label, verdict.confidence) == (Label.S, 0.8)


@pytest.mark.parametrize(
    "module", [nn.ZeroPad2d(1), nn.ReflectionPad2d(1), nn.CircularPad2d(1), nn.ConstantPad2d(1, 7)]
)
def test_padding_modules(certified, module):
    assert certified(module, X).label is Label.S


def test_a_constant_that_looks_like_an_element_number(certified):
    assert certified(F.pad, X, (1, 1), value=3.0).label is Label.S


def test_crops_are_counted_where_other_sides_grow(certified):
    assert certified(F.pad, X, (-1, 2)).erasure.elements == 30
    assert certified(F.pad, X, (-1, -1, 3, -2)).erasure.elements == 6 * (20 - 2 * 3)
    assert certified(torch.constant_pad_nd, X, (0, -1)).erasure.elements == 30


@pytest.mark.parametrize("offset", range(-6, 7))
def test_triangles_are_counted(certified, offset):
    ones = torch.ones(2, 5, 4)
    for function in (torch.tril, torch.triu):
        missing = int((function(ones, offset) == 0).sum())
        verdict = certified(function, ones, offset)
        assert (verdict.label is Label.S) == (missing == 0)
        assert verdict.label is Label.S or verdict.erasure.elements == missing


@pytest.mark.parametrize(("size", "step"), [(1, 1), (2, 1), (2, 2), (2, 3), (3, 2), (5, 1), (4, 4)])
def test_windows_cover_or_leave_out(certified, size, step):
    operand = torch.arange(5.0).expand(2, 5).contiguous()
    missing = 5 - len(set(operand[0].unfold(0, size, step).flatten().tolist()))
    verdict = certified("unfold", operand, 1, size, step)
    assert (verdict.label is Label.S) == (missing == 0)
    assert verdict.label is Label.S or verdict.erasure.elements == 2 * missing


OPTIONS = [
    {"kernel_size": 2},
    {"kernel_size": 2, "stride": 2},
    {"kernel_size": 2, "stride": 3},
    {"kernel_size": 2, "stride": 3, "padding": 1},
    {"kernel_size": 2, "dilation": 2},
    {"kernel_size": (2, 1), "dilation": 3, "stride": (1, 2)},
    {"kernel_size": (5, 4)},
]


@pytest.mark.parametrize("options", OPTIONS)
def test_windows_of_images(certified, options):
    image = torch.arange(1, 21.0).view(1, 1, 5, 4)
    missing = 20 - len(set(F.unfold(image, **options).flatten().tolist()) - {0.0})
    verdict = certified(nn.Unfold(**options), image)
    assert (verdict.label is Label.S) == (missing == 0)
    assert verdict.label is Label.S or verdict.erasure.elements == missing


@pytest.mark.parametrize("options", OPTIONS)
def test_folds_add_up_what_overlaps(certified, options):
    ones = F.unfold(torch.ones(1, 1, 5, 4), **options)
    columns = torch.randn_like(ones)
    kept = int((F.fold(torch.ones_like(columns), (5, 4), **options) > 0).sum())
    verdict = certified(F.fold, columns, (5, 4), **options)
    assert (verdict.label is Label.S) == (kept == columns.numel())
    assert verdict.label is Label.S or verdict.erasure.elements == columns.numel() - kept


def test_windows_of_a_batch(verdict_of, certified):
    assert certified(F.unfold, X, 2, stride=2).erasure.elements == 2 * 3 * 4
    assert verdict_of(lambda x: x.unfold(3, 2, 2), X).label is Label.S
