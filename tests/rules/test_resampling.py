"""Resampling that drops no pixel is undone; otherwise the pixels that are lost are counted."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bwsk_fx.verdict import Label, WitnessKind

LINE, IMAGE, CUBE = torch.randn(2, 3, 5), torch.randn(2, 3, 5, 4), torch.randn(1, 2, 3, 4, 2)
SMOOTH = [("linear", LINE), ("bilinear", IMAGE), ("bicubic", IMAGE), ("trilinear", CUBE), ("area", IMAGE)]


@pytest.mark.parametrize(("mode", "operand"), SMOOTH)
@pytest.mark.parametrize("scale", [1, 1.5, 2, 3])
def test_smooth_enlargement_is_undone(certified, mode, operand, scale):
    verdict = certified(F.interpolate, operand, scale_factor=scale, mode=mode)
    assert (verdict.label, verdict.confidence) == (Label.S, 0.8)
    assert verdict.undo.condition is not None
    copy.deepcopy(verdict)


@pytest.mark.parametrize(("mode", "operand"), SMOOTH[:4])
def test_aligned_corners(certified, mode, operand):
    assert certified(F.interpolate, operand, scale_factor=2, mode=mode, align_corners=True).label is Label.S


@pytest.mark.parametrize(("mode", "operand"), [*SMOOTH, ("nearest", IMAGE), ("nearest-exact", IMAGE)])
def test_reduction_is_counted(certified, mode, operand):
    size = [max(1, length - 1) for length in operand.shape[2:]]
    verdict = certified(F.interpolate, operand, size=size, mode=mode)
    lost = operand.numel() - operand.shape[0] * operand.shape[1] * torch.Size(size).numel()
    assert (verdict.label, verdict.erasure.elements) == (Label.K, lost)


@pytest.mark.parametrize("mode", ["nearest", "nearest-exact"])
@pytest.mark.parametrize("scale", [1, 1.5, 2, 2.7])
def test_nearest_enlargement_copies_every_pixel(certified, mode, scale):
    for operand in (LINE, IMAGE, CUBE):
        assert certified(F.interpolate, operand, scale_factor=scale, mode=mode).label is Label.S


def test_a_scale_may_leave_a_pixel_out_though_the_size_stays(certified):
    operand = torch.arange(2.0).view(1, 1, 2)
    assert F.interpolate(operand, scale_factor=1.3).tolist() == [[[0.0, 0.0]]]
    assert certified(F.interpolate, operand, scale_factor=1.3).erasure.elements == 1


def test_one_dimension_grows_and_another_shrinks(certified):
    assert certified(F.interpolate, IMAGE, size=(10, 2), mode="bilinear").erasure.elements == 2 * 3 * 10


def test_antialiased_reduction(certified):
    verdict = certified(F.interpolate, IMAGE, size=(3, 3), mode="bilinear", antialias=True)
    assert verdict.erasure.elements == 2 * 3 * 11
    assert certified(F.interpolate, IMAGE, size=(8, 8), mode="bicubic", antialias=True).label is Label.S


@pytest.mark.parametrize(
    ("function", "args"),
    [
        (torch.ops.aten.upsample_nearest2d.default, (IMAGE, [10, 8])),
        (torch.ops.aten.upsample_nearest2d.vec, (IMAGE, None, [2.0, 2.0])),
        (torch.ops.aten.upsample_bilinear2d.default, (IMAGE, [10, 8], False)),
        (torch.ops.aten.upsample_bicubic2d.vec, (IMAGE, None, False, [2.0, 2.0])),
        (torch.ops.aten._upsample_bilinear2d_aa.default, (IMAGE, [7, 8], False)),
    ],
)
def test_aten_forms(certified, function, args):
    assert certified(function, *args).label is Label.S


@pytest.mark.parametrize("module", [nn.Upsample(scale_factor=2), nn.UpsamplingNearest2d(9), nn.UpsamplingBilinear2d(9)])
def test_modules(certified, verdict_of, module):
    assert certified(module, IMAGE).label is Label.S
    verdict = verdict_of(module, IMAGE)
    assert (verdict.label, verdict.witness.kind) == (Label.S, WitnessKind.NOTHING)


def test_large_maps_that_no_theorem_covers_are_not_factored(certified):
    wide = torch.randn(1, 1, 3, 65)
    assert certified(F.interpolate, wide, scale_factor=2, mode="bicubic").label is Label.GRAY
    assert certified(F.interpolate, wide, scale_factor=2, mode="bilinear").label is Label.S


def test_samples_on_a_grid(certified):
    image, grid = torch.randn(1, 2, 4, 4), torch.rand(1, 3, 3, 2) * 2 - 1
    both = certified(F.grid_sample, image, grid, align_corners=False)
    assert (both.label, both.erasure.elements) == (Label.K, 32 + 18 - 18)
    corner = torch.full((1, 9, 9, 2), -1.0)
    static = certified(F.grid_sample, image, corner, align_corners=True, dynamic={id(image)})
    assert (static.label, static.erasure.elements) == (Label.K, 2 * 15)
    everywhere = F.affine_grid(torch.eye(2, 3)[None], [1, 2, 9, 9], align_corners=True)
    assert certified(F.grid_sample, image, everywhere, align_corners=True, dynamic={id(image)}).label is Label.GRAY
