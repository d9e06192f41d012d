"""Patches that tile the image are linear maps; everything else is counted or unknown."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bwsk_fx.verdict import Label, WitnessKind

IMAGE = torch.randn(2, 3, 8, 8)


@pytest.mark.parametrize("out", [12, 20])
def test_a_patch_embedding_that_does_not_shrink_is_undone(verdict_of, out):
    torch.manual_seed(0)
    patches = nn.Conv2d(3, out, 2, stride=2).double()
    verdict = verdict_of(patches, IMAGE.double())
    assert (verdict.label, verdict.witness.kind, verdict.confidence) == (Label.S, WitnessKind.NOTHING, 0.8)
    y = patches(IMAGE.double()).flatten(2) - patches.bias[:, None]
    columns = torch.linalg.pinv(patches.weight.flatten(1)) @ y
    torch.testing.assert_close(F.fold(columns, (8, 8), 2, stride=2), IMAGE.double())


def test_a_patch_embedding_that_shrinks_erases_the_difference_for_every_patch(verdict_of):
    verdict = verdict_of(nn.Conv2d(3, 10, 2, stride=2), IMAGE)
    assert (verdict.label, verdict.confidence, verdict.erasure.elements) == (Label.K, 0.8, 16 * (12 - 10))


def test_pixels_that_no_patch_covers_are_cut_off(verdict_of):
    verdict = verdict_of(nn.Conv2d(3, 27, 3, stride=3), IMAGE)
    assert verdict.label is Label.K
    # Four patches of 27 numbers hold 6 × 6 of 8 × 8 pixels.
    assert verdict.erasure.elements == 3 * (64 - 36)
    assert "cut off" in verdict.rationale
    expanding = verdict_of(nn.Conv2d(3, 54, 3, stride=3), IMAGE)
    assert (expanding.label, expanding.erasure.elements) == (Label.K, 3 * (64 - 36))


@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 3, "padding": 1},
        {"kernel_size": 2, "stride": 2, "padding": 1},
        {"kernel_size": 2, "stride": 2, "groups": 3},
        {"kernel_size": 3, "padding": "same"},
    ],
)
def test_overlapping_padded_and_grouped_convolutions_are_gray(verdict_of, options):
    verdict = verdict_of(nn.Conv2d(3, 12, **options), IMAGE)
    assert (verdict.label, verdict.confidence) == (Label.GRAY, 0.3)


def test_a_smaller_result_erases_whatever_the_windows(verdict_of):
    verdict = verdict_of(nn.Conv2d(3, 4, 3, stride=2, padding=1), IMAGE)
    assert (verdict.label, verdict.erasure.elements) == (Label.K, 3 * 64 - 4 * 16)


def test_pointwise_and_one_dimensional_convolutions(verdict_of):
    assert verdict_of(nn.Conv2d(3, 3, 1), IMAGE).label is Label.S
    assert verdict_of(nn.Conv1d(3, 6, 2, stride=2), IMAGE[:, :, 0]).label is Label.S


def test_convolution_as_a_function(verdict_of):
    kernel = nn.Parameter(torch.randn(12, 3, 2, 2))
    assert verdict_of(lambda x: F.conv2d(x, kernel, stride=2), IMAGE).label is Label.S
    assert verdict_of(lambda x: F.conv2d(x, kernel), IMAGE).label is Label.GRAY
    assert verdict_of(lambda x, y: F.conv2d(x, y, stride=2), IMAGE, torch.randn(12, 3, 2, 2)).label is Label.GRAY


def test_transposed_patches(verdict_of):
    assert verdict_of(nn.ConvTranspose2d(3, 3, 2, stride=2), IMAGE).label is Label.S
    assert verdict_of(nn.ConvTranspose2d(12, 1, 2, stride=2), torch.randn(2, 12, 4, 4)).erasure.elements == 16 * 8
