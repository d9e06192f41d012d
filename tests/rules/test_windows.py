"""Ranks of convolutions: what simple kernels show, and what no kernel can do."""

import itertools
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bwsk_fx.rules.deconvolution import convolve
from bwsk_fx.rules.single import call_of
from bwsk_fx.rules.windows import full_rank, starved, unread, windows


def _form(layer: nn.Module, *size: int):
    x = torch.randn(1, layer.in_channels, *size)
    y = layer(x)
    return windows(call_of(layer, (x,), {}, y)), list(size), list(y.shape[2:])


def _rank(layer: nn.Module, *size: int) -> tuple[int, int]:
    """Rank and columns of the layer's matrix, for a random kernel."""
    torch.manual_seed(0)
    form, *_ = _form(layer, *size)
    columns = layer.in_channels * torch.Size(size).numel()
    units = torch.eye(columns, dtype=torch.double).reshape(columns, layer.in_channels, *size)
    made = convolve(replace(form, weight=torch.randn(layer.weight.shape, dtype=torch.double)), units)
    return int(torch.linalg.matrix_rank(made.flatten(1))), columns


LINES = [
    dict(zip(("kernel_size", "stride", "padding", "dilation"), values, strict=True))
    for values in itertools.product((1, 2, 3, 4), (1, 2, 3), (0, 1, 2), (1, 2, 3))
]


@pytest.mark.parametrize("channels", [(1, 1), (1, 3), (2, 3)])
@pytest.mark.parametrize("transposed", [False, True])
def test_claims_about_ranks_hold_for_random_kernels(channels, transposed):
    kind = nn.ConvTranspose1d if transposed else nn.Conv1d
    claimed = 0
    for options in LINES:
        layer = kind(*channels, **options)
        for size in (6, 7):
            try:
                form, image, out = _form(layer, size)
            except RuntimeError:  # the kernel is larger than the padded line
                continue
            rank, columns = _rank(layer, size)
            lost = max(starved(form, image, out), channels[0] * unread(form, image, out))
            assert columns - rank >= lost, options
            if full_rank(form, image, out) and not lost:
                assert rank == columns, options
                claimed += 1
            elif rank == columns:
                assert transposed or channels != (1, 1), ("nothing was claimed of", options)
    assert claimed > 20


def test_two_dimensions_multiply():
    form, image, out = _form(nn.Conv2d(1, 4, 3, stride=2, padding=1), 6, 6)
    assert full_rank(form, image, out)
    form, image, out = _form(nn.Conv2d(1, 3, 3, stride=2, padding=1), 6, 6)
    assert not full_rank(form, image, out)
    assert unread(form, image, out) == 0


def test_lines_that_strides_jump_over_are_unread():
    form, image, out = _form(nn.Conv2d(2, 9, (1, 2), stride=(2, 3)), 5, 7)
    # Three of five rows; columns 0, 1, 3 and 4 of seven.
    assert unread(form, image, out) == 35 - 3 * 4


@pytest.mark.parametrize("padding", ["same", "valid", 1])
def test_convolving_is_what_the_layer_does(padding):
    layer = nn.Conv2d(2, 4, (3, 2), padding=padding, groups=2, bias=False)
    x = torch.randn(1, 2, 6, 5)
    torch.testing.assert_close(convolve(windows(call_of(layer, (x,), {}, layer(x))), x), layer(x))
    weight = torch.randn(2, 3, 2, 2)
    form = replace(windows(call_of(F.conv_transpose2d, (x, weight, None, 2, 1, 1), {}, x)), weight=weight)
    torch.testing.assert_close(convolve(form, x), F.conv_transpose2d(x, weight, None, 2, 1, 1))
