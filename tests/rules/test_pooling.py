"""Pools erase by counting, and are the identity where a window is one element."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bwsk_fx.verdict import Label, WitnessKind

IMAGE = torch.randn(2, 3, 6, 6)
LINE = torch.randn(2, 3, 8)


@pytest.mark.parametrize(
    ("module", "operand", "lost"),
    [
        (nn.AvgPool2d(2), IMAGE, 2 * 3 * 27),
        (nn.AvgPool1d(3), LINE, 2 * 3 * 6),
        (nn.AvgPool3d(2), torch.randn(1, 4, 4, 4), 64 - 8),
        (nn.MaxPool2d(3, 2), IMAGE, 2 * 3 * 32),
        (nn.MaxPool1d(2, return_indices=True), LINE, 2 * 3 * 4),
        (nn.AdaptiveAvgPool2d(1), IMAGE, 2 * 3 * 35),
        (nn.AdaptiveMaxPool2d((2, 3)), IMAGE, 2 * 3 * 30),
        (nn.FractionalMaxPool2d(2, output_size=3), IMAGE, 2 * 3 * 27),
        (nn.LPPool2d(2, 2), IMAGE, 2 * 3 * 27),
    ],
)
def test_pools_are_counted(certified, module, operand, lost):
    verdict = certified(module, operand)
    assert (verdict.label, verdict.erasure.elements) == (Label.K, lost)


@pytest.mark.parametrize(
    "module",
    [nn.AvgPool2d(1), nn.MaxPool2d(1), nn.MaxPool1d(1, 1), nn.AdaptiveAvgPool2d(6), nn.AdaptiveMaxPool2d((6, 6))],
)
def test_a_window_of_one_element_changes_nothing(certified, module):
    operand = LINE if "1d" in type(module).__name__ else IMAGE
    verdict = certified(module, operand)
    assert (verdict.label, verdict.witness.kind, verdict.confidence) == (Label.S, WitnessKind.NOTHING, 0.8)


@pytest.mark.parametrize("size", range(3, 10))
@pytest.mark.parametrize("padded", [True, False])
def test_overlapping_averages_are_decided_by_their_rank(certified, size, padded):
    verdict = certified(F.avg_pool1d, torch.randn(2, 3, size), 3, 1, 1, False, padded)
    # A band of three ones is singular for every third size.
    singular = size % 3 == 2
    assert verdict.label is (Label.K if singular else Label.S)


def test_a_dimension_that_grows_does_not_make_up_for_one_that_shrinks(certified):
    verdict = certified(F.adaptive_avg_pool2d, IMAGE, (3, 12))
    assert (verdict.label, verdict.erasure.elements) == (Label.K, 2 * 3 * 18)


@pytest.mark.parametrize("size", [6, 7, 8, 11, 12])
def test_adaptive_averages_that_grow(certified, size):
    assert certified(F.adaptive_avg_pool2d, IMAGE, (size, 6)).label is Label.S
    assert certified(nn.AdaptiveAvgPool1d(size + 2), LINE).label is Label.S


def test_overlapping_maxima_forget_small_elements(certified):
    assert certified(F.max_pool2d, IMAGE, 3, 1, 1).label is Label.K
    # Windows of two with padding leave the outer elements alone.
    assert certified(F.max_pool1d, LINE, 2, 1, 1).label is Label.GRAY


@pytest.mark.parametrize("function", [F.max_pool2d, torch.max_pool2d, torch.ops.aten.max_pool2d_with_indices.default])
def test_forms_of_max_pool(certified, function):
    assert certified(function, IMAGE, [2, 2]).erasure.elements == 2 * 3 * 27


def test_unpooling_finds_values_at_their_indices(certified):
    values, indices = F.max_pool2d(IMAGE, 2, return_indices=True)
    verdict = certified(F.max_unpool2d, values, indices, 2)
    assert (verdict.label, verdict.witness.kind, verdict.witness.elements) == (Label.S, WitnessKind.OTHER_OPERAND, 54)
    assert verdict.domain == "no index occurs twice"
    static = certified(nn.MaxUnpool2d(2), values, indices, dynamic={id(values)})
    assert (static.label, static.confidence) == (Label.S, 0.8)
    assert certified(F.max_unpool2d, values, indices * 0, 2, dynamic={id(values)}).label is Label.K


def test_captured_pools_count_per_sample(verdict_of):
    assert verdict_of(nn.AdaptiveAvgPool2d(1), IMAGE).erasure.elements == 3 * 35
    assert verdict_of(nn.MaxPool2d(2), IMAGE).erasure.elements == 3 * 27
    assert verdict_of(lambda x: F.avg_pool2d(x, 2), IMAGE).erasure.elements == 3 * 27
