"""How the operand of a convolution is solved for: window by window, by frequencies, or as one system."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from bwsk_fx.rules.undo import Factors, Run, wide
from bwsk_fx.rules.windows import Windows, windows


def rebuild(run: Run) -> Tensor:
    """Return the operand of an executed convolution, solved for in float64."""
    form, operand = windows(run), _operand(run)
    dims = len(form.kernel)
    result = run.output.to(wide(run.output.dtype))
    if form.bias is not None:
        result = result - form.bias.to(result.dtype).reshape(-1, *[1] * dims)
    batched = result if operand.dim() == dims + 2 else result[None]
    image = tuple(operand.shape[-dims:])
    solve = _by_windows if form.tiles else _by_frequencies if form.covers_padding else _directly
    return solve(_factors(run, form, image), form, batched, image).reshape(operand.shape)


def condition(run: Run) -> float:
    """Return the condition number of an executed convolution's system."""
    form = windows(run)
    return _factors(run, form, tuple(_operand(run).shape[-len(form.kernel) :])).condition()


def _operand(run: Run) -> Any:
    return run.args[0] if run.args else next(iter(run.kwargs.values()))


def _factors(run: Run, form: Windows, image: tuple[int, ...]) -> Factors:
    if form.tiles:
        compute = partial(_window, form)
    elif form.covers_padding:
        compute = partial(_spectrum, form, tuple(run.output.shape[-len(image) :]))
    else:
        compute = partial(_system, form, image)
    return compute() if any(form.weight is operand for operand in run.operands) else run.once("system", compute)


def _by_windows(factors: Factors, form: Windows, result: Tensor, image: tuple[int, ...]) -> Tensor:
    """Solve for each window on its own."""
    dims, (channels, made), kernel = len(image), form.channels, form.kernel
    if not form.transposed:
        positions = tuple(result.shape[-dims:])
        columns = result.reshape(-1, form.groups, made, math.prod(positions))
        solved = factors.solve(columns).reshape(-1, form.groups * channels, *kernel, *positions)
        pairs = [2 + at + dims * kind for at in range(dims) for kind in (1, 0)]
        return solved.permute(0, 1, *pairs).reshape(-1, form.groups * channels, *image)
    for dim, size, step in zip(range(-dims, 0), image, kernel, strict=True):
        result = result.narrow(dim, 0, size * step)
    pairs_of = [size for pair in zip(image, kernel, strict=True) for size in pair]
    parts = result.reshape(-1, form.groups, made, *pairs_of)
    order = [*range(4, 3 + 2 * dims, 2), *range(3, 3 + 2 * dims, 2)]
    columns = parts.permute(0, 1, 2, *order).reshape(-1, form.groups, made * math.prod(kernel), math.prod(image))
    return factors.solve(columns)


def _window(form: Windows) -> Factors:
    """Return the kernel's matrix (result, operand) for one window, per group."""
    weight, (channels, made) = form.weight.detach(), form.channels
    if form.transposed:
        return Factors.of(weight.reshape(form.groups, channels, -1).mT)
    return Factors.of(weight.reshape(form.groups, made, -1))


def _directly(factors: Factors, form: Windows, result: Tensor, image: tuple[int, ...]) -> Tensor:
    grouped = result.reshape(result.shape[0], form.groups, -1).permute(1, 2, 0)
    return factors.solve(grouped).permute(2, 0, 1)


def _by_frequencies(factors: Factors, form: Windows, result: Tensor, image: tuple[int, ...]) -> Tensor:
    """Divide by the kernel's spectrum, where the result holds the whole of an unpadded convolution."""
    dims = tuple(range(-len(image), 0))
    sizes = result.shape[-len(image) :]
    channels, made = form.channels
    spectrum = torch.fft.fftn(result, dim=dims).reshape(-1, form.groups, made, math.prod(sizes))
    solved = factors.solve(spectrum.permute(1, 3, 2, 0))
    spread = solved.permute(3, 0, 2, 1).reshape(-1, form.groups * channels, *sizes)
    values = torch.fft.ifftn(spread, dim=dims)
    for dim, size in zip(dims, image, strict=True):
        before = 0 if form.transposed else form.pads[dim][0] - form.dilation[dim] * (form.kernel[dim] - 1)
        values = values.narrow(dim, before, size)
    return values if result.is_complex() else values.real


def _spectrum(form: Windows, sizes: Sequence[int]) -> Factors:
    """Return the kernel's matrices (out, in) per group and frequency."""
    channels, made = form.channels
    weight = form.weight.detach().to(wide(form.weight.dtype))
    if form.transposed:
        weight = weight.reshape(form.groups, channels, made, *form.kernel).transpose(1, 2)
    else:
        weight = weight.reshape(form.groups, made, channels, *form.kernel).flip([*range(-len(sizes), 0)])
    spread = weight.new_zeros(*weight.shape[:3], *sizes)
    spread[(..., *(slice(0, gap * size, gap) for gap, size in zip(form.dilation, form.kernel, strict=True)))] = weight
    spectrum = torch.fft.fftn(spread, dim=tuple(range(-len(sizes), 0)))
    return Factors.of(spectrum.flatten(3).permute(0, 3, 1, 2))


def _system(form: Windows, image: tuple[int, ...]) -> Factors:
    """Return the matrices (rows, columns) of all groups, found by convolving unit vectors."""
    channels, _ = form.channels
    columns = channels * math.prod(image)
    weight = form.weight.detach().to(wide(form.weight.dtype))
    units = torch.eye(columns, dtype=weight.dtype).reshape(columns, 1, channels, *image)
    units = units.expand(columns, form.groups, channels, *image).reshape(columns, -1, *image)
    made = convolve(replace(form, weight=weight), units)
    return Factors.of(made.reshape(columns, form.groups, -1).permute(1, 2, 0))


def convolve(form: Windows, values: Tensor) -> Tensor:
    """Return the convolution of a batch, without a bias."""
    dims = len(form.kernel)
    if form.transposed:
        function: Any = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[dims - 1]
        padding = tuple(pad for pad, _ in form.pads)
        more = (form.output_padding, form.groups, form.dilation)
        return function(values, form.weight, None, form.stride, padding, *more)
    function = (F.conv1d, F.conv2d, F.conv3d)[dims - 1]
    around = [size for pad in reversed(form.pads) for size in pad]
    padded = F.pad(values, around, form.mode)
    return function(padded, form.weight, None, form.stride, 0, form.dilation, form.groups)
