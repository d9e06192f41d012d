"""Fourier transforms are undone by the transform back; cropping and real results erase."""

import pytest
import torch
from torch import fft

from bwsk_fx.verdict import Label

REAL = torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(0))
COMPLEX = torch.randn(2, 4, 5, dtype=torch.cfloat, generator=torch.Generator().manual_seed(1))
NORMS = [None, "forward", "backward", "ortho"]


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", ["fft", "ifft", "rfft", "ihfft"])
def test_transforms_are_undone(certified, name, norm):
    operand = REAL if name in ("rfft", "ihfft") else COMPLEX
    for rank in ("", "2", "n"):
        assert certified(getattr(fft, name + rank), operand, norm=norm).label is Label.S
    assert certified(getattr(fft, name), operand, 9, 1, norm).label is Label.S
    assert certified(getattr(fft, name), operand, 3, 1, norm).erasure.elements == 2 * 5 * 1
    assert certified(getattr(fft, name + "n"), operand, (3, 7), (2, 1)).erasure.elements == 2 * 4 * 2


def test_transforms_of_real_numbers_are_real_again(certified):
    assert certified(fft.fft, REAL).label is Label.S
    assert certified(fft.fftn, REAL.double(), dim=(0, 2)).label is Label.S
    assert certified(fft.ifft, torch.arange(6)).label is Label.S


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", ["irfft", "hfft"])
def test_real_results_read_real_parts_at_the_ends(certified, name, norm):
    one = getattr(fft, name)
    # Of five complex numbers, the first and last one count by their real parts.
    assert certified(one, COMPLEX, norm=norm).erasure.elements == 8 * 1
    assert certified(one, COMPLEX, 9, norm=norm).erasure.elements == 8 * 0.5
    assert certified(one, REAL, norm=norm).label is Label.S
    # Columns of four are folded: two of them meet.
    assert certified(getattr(fft, name + "2"), REAL, norm=norm).erasure.elements == 2 * 2 * 1
    assert certified(getattr(fft, name + "n"), REAL[:, :2], norm=norm).label is Label.S


@pytest.mark.parametrize("is_complex", [False, True])
@pytest.mark.parametrize("sizes", [(4, 8), (3, 8), (5, 7), (6, 6)])
@pytest.mark.parametrize("function", [fft.irfft2, fft.hfft2])
def test_what_real_results_erase_is_the_rank_that_they_lack(certified, function, sizes, is_complex):
    operand = torch.randn(4, 5, dtype=torch.cdouble if is_complex else torch.double)
    units = torch.eye(20, dtype=operand.dtype).reshape(20, 4, 5)
    units = torch.cat([units, 1j * units]) if is_complex else units
    rank = torch.linalg.matrix_rank(function(units, s=sizes).flatten(1))
    lacking = (len(units) - int(rank)) / (2 if is_complex else 1)
    verdict = certified(function, operand, s=sizes)
    if lacking:
        assert verdict.erasure.elements == lacking
    else:
        assert verdict.label is not Label.K


@pytest.mark.parametrize("function", [fft.fftshift, fft.ifftshift])
def test_shifts_move_elements(certified, function):
    assert certified(function, REAL).label is Label.S
    assert certified(function, REAL, 2).label is Label.S
    assert certified(function, REAL, dim=(0, -1)).label is Label.S


@pytest.mark.parametrize("norm", [0, 1, 2])
def test_transforms_of_aten(certified, norm):
    aten = torch.ops.aten
    assert certified(aten._fft_c2c.default, COMPLEX, [1, 2], norm, True).label is Label.S
    assert certified(aten._fft_r2c.default, REAL, [1, 2], norm, True).label is Label.S
    assert certified(aten._fft_r2c.default, REAL, [2], norm, False).label is Label.S
    assert certified(aten._fft_c2r.default, COMPLEX, [2], norm, 8).label is Label.K
