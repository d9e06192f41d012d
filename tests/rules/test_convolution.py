"""Convolutions are solved for where their systems have full rank; what no window reads, or does not fit, is lost."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bwsk_fx.rules import sound
from bwsk_fx.rules.round_trip import execute, round_trip
from bwsk_fx.verdict import Label, WitnessKind

IMAGE = torch.randn(2, 3, 8, 8)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("out", [12, 20])
def test_a_patch_embedding_that_does_not_shrink_is_undone(certified, out, bias):
    verdict = certified(nn.Conv2d(3, out, 2, stride=2, bias=bias).double(), IMAGE.double())
    assert (verdict.label, verdict.witness.kind, verdict.confidence) == (Label.S, WitnessKind.NOTHING, 0.8)
    assert "full rank" in verdict.domain


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
    assert verdict_of(nn.Conv2d(3, 12, 1, stride=2), IMAGE).erasure.elements == 3 * (64 - 16)


def test_what_a_transposed_convolution_crops_is_cut_off(certified):
    verdict = certified(nn.ConvTranspose1d(2, 6, 1, stride=2, padding=1), IMAGE[0, :2, 0])
    # Of eight elements at even places, the first one is cropped.
    assert (verdict.label, verdict.erasure.elements) == (Label.K, 2 * 2)


@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 3, "padding": 1},
        {"kernel_size": 2, "stride": 2, "padding": 1},
        {"kernel_size": 3, "padding": "same", "padding_mode": "circular"},
        {"kernel_size": 3, "padding": 2, "dilation": 2, "padding_mode": "reflect"},
        {"kernel_size": 3, "padding": 1, "groups": 3},
    ],
)
def test_overlapping_padded_and_grouped_convolutions_are_solved_for(certified, options):
    verdict = certified(nn.Conv2d(3, 12, **options).double(), IMAGE.double())
    assert (verdict.label, verdict.confidence) == (Label.S, 0.8)


@pytest.mark.parametrize("dilation", [1, 3])
@pytest.mark.parametrize("groups", [1, 6])
def test_a_causal_convolution_with_all_of_its_padding_is_divided_by_frequencies(certified, groups, dilation):
    layer = nn.Conv1d(6, 12, 4, padding=3 * dilation, dilation=dilation, groups=groups).double()
    # Solved directly, these would be twelve thousand unknowns.
    assert certified(layer, torch.randn(1, 6, 2000, dtype=torch.double)).label is Label.S


def test_transposed_convolutions_without_padding_are_divided_by_frequencies(certified):
    layer = nn.ConvTranspose2d(3, 5, 3, dilation=2).double()
    assert certified(layer, torch.randn(1, 3, 40, 40, dtype=torch.double)).label is Label.S


@pytest.mark.parametrize("options", [{"padding": 1}, {"stride": 2, "padding": 1}])
def test_a_convolution_can_lose_elements_but_rebuilds_none_wrongly(options):
    for seed in range(5):
        torch.manual_seed(seed)
        channels = 2 * math.prod(options.values()) ** 2
        executed = execute(nn.Conv2d(2, channels, 3, groups=2, **options), (torch.randn(1, 2, 8, 10),), {})
        trip = round_trip(executed, sound.verdict(executed.call))
        assert (trip.wrong, trip.note) == (0, "")
        assert trip.condition > 1


def test_systems_that_are_too_large_to_be_solved_are_gray(verdict_of):
    verdict = verdict_of(nn.Conv2d(64, 64, 3, padding=1), torch.randn(1, 64, 56, 56))
    assert (verdict.label, verdict.confidence) == (Label.GRAY, 0.3)
    assert "200704 unknowns" in verdict.rationale


def test_a_smaller_result_erases_whatever_the_windows(verdict_of):
    verdict = verdict_of(nn.Conv2d(3, 4, 3, stride=2, padding=1), IMAGE)
    assert (verdict.label, verdict.erasure.elements) == (Label.K, 3 * 64 - 4 * 16)


def test_dilation_splits_the_operand_into_classes(certified):
    # Two taps at odd distances: five odd places have six even neighbours, which they cannot determine.
    verdict = certified(nn.Conv1d(1, 1, 2, dilation=2, padding=1), torch.randn(1, 1, 11))
    assert (verdict.label, verdict.erasure.elements) == (Label.K, 1)
    even = certified(nn.Conv1d(1, 1, 2, dilation=2, padding=1).double(), torch.randn(1, 1, 12, dtype=torch.double))
    assert even.label is Label.S


def test_pointwise_and_one_dimensional_convolutions(certified):
    assert certified(nn.Conv2d(3, 3, 1), IMAGE).label is Label.S
    assert certified(nn.Conv1d(3, 6, 2, stride=2), IMAGE[:, :, 0]).label is Label.S
    assert certified(nn.Conv3d(1, 8, 2, stride=2), torch.randn(1, 4, 4, 4)).label is Label.S


def test_convolution_as_a_function(certified):
    kernel, bias = torch.randn(12, 3, 2, 2), torch.randn(12)
    static = certified(F.conv2d, IMAGE, kernel, stride=2, dynamic={id(IMAGE)})
    assert (static.label, static.witness.kind) == (Label.S, WitnessKind.NOTHING)
    assert certified(F.conv2d, IMAGE, kernel, bias, 2).witness.names == ("operand_1", "operand_2")
    assert certified(F.conv2d, IMAGE, kernel, dynamic={id(kernel)}).label is Label.GRAY
    patches = torch.randn(2, 12, 4, 4)
    assert certified(F.conv_transpose2d, patches, torch.randn(12, 1, 2, 2), None, 2).erasure.elements == 2 * 16 * 8


@pytest.mark.parametrize("transposed", [False, True])
def test_the_aten_operator_has_the_rule_of_its_functions(certified, transposed):
    arguments = (IMAGE, torch.randn(3, 3, 3, 3) + 9 * torch.eye(3)[:, :, None, None], None)
    options = ([1, 1], [1, 1], [1, 1], transposed, [0, 0], 1)
    verdict = certified(torch.ops.aten.convolution.default, *arguments, *options, dynamic={id(IMAGE)})
    assert verdict.rule == "convolution.convolution"
    assert verdict.label is Label.S


def test_transposed_patches(certified):
    assert certified(nn.ConvTranspose2d(3, 3, 2, stride=2), IMAGE).label is Label.S
    assert certified(nn.ConvTranspose2d(12, 1, 2, stride=2), torch.randn(2, 12, 4, 4)).erasure.elements == 2 * 16 * 8
    assert (
        certified(nn.ConvTranspose1d(4, 2, 4, stride=2, padding=1).double(), IMAGE[:, 0, :4].double()).label is Label.S
    )
    assert certified(nn.ConvTranspose1d(2, 2, 3, 2, 2, 1).double(), IMAGE[0, :2, 0].double()).label is Label.S


def test_an_image_that_varies_with_the_batch_is_gray(verdict_of):
    verdict = verdict_of(lambda weight, x: F.conv1d(x.T.unsqueeze(0), weight[:, :, None]), torch.randn(7, 4))
    assert verdict.label is Label.GRAY
