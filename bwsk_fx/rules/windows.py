"""Convolutions as systems of linear equations: where their windows lie, and which rank they have.

A system has full rank for almost every kernel as soon as it has full rank for one. Most kernels that are tried here
have a single tap per pair of channels: such a kernel copies a channel's elements to places of their own.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from bwsk_fx.rules.arguments import Arguments
from bwsk_fx.rules.contraction import value_of
from bwsk_fx.rules.spelling import function_name

# The largest system that is solved directly, in multiplications; some ten seconds of one processor core.
MOST_WORK = 2**36


@dataclass(frozen=True)
class Windows:
    """A convolution.

    Attributes:
        weight: The kernel, (out, in / groups, …), or (in, out / groups, …) where it is transposed.
        bias: What is added to each channel, else None.
        stride: Per spatial dimension, as all that follow.
        pads: Elements of padding before and after.
        dilation: The distance of two taps.
        groups: Into how many independent parts the channels fall.
        transposed: Whether the map is the transpose of a convolution.
        output_padding: Rows that a transposed convolution adds at the end.
        mode: What the padding is made of, in the words of `torch.nn.functional.pad`.
    """

    weight: Any
    bias: Any
    stride: tuple[int, ...]
    pads: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]
    groups: int
    transposed: bool
    output_padding: tuple[int, ...]
    mode: str = "constant"

    @property
    def kernel(self) -> tuple[int, ...]:
        """The kernel's spatial sizes."""
        return tuple(value_of(self.weight).shape[2:])

    @property
    def channels(self) -> tuple[int, int]:
        """Channels of operand and result, within a group."""
        one, two = value_of(self.weight).shape[:2]
        return (one // self.groups, two) if self.transposed else (two, one // self.groups)

    @property
    def tiles(self) -> bool:
        """Whether no two windows overlap, and none reaches over the border."""
        spread = [size for size in zip(self.kernel, self.dilation, strict=True) if size[0] > 1 and size[1] > 1]
        return self.stride == self.kernel and not any(map(any, self.pads)) and not spread

    @property
    def covers_padding(self) -> bool:
        """Whether every place where a window of stride one meets the operand is part of the result."""
        reach = [gap * (size - 1) for size, gap in zip(self.kernel, self.dilation, strict=True)]
        if any(step != 1 for step in self.stride) or self.mode != "constant":
            return False
        if self.transposed:
            return not any(map(any, self.pads))
        return all(min(pad) >= far for pad, far in zip(self.pads, reach, strict=True))


def windows(arguments: Arguments) -> Windows:
    """Read a convolution: a module, a function of `torch.nn.functional`, or an ATen operator."""
    if len(arguments.args) == 9:
        return _of_aten(arguments)
    weight, bias = arguments.option(1, "weight"), arguments.option(2, "bias")
    transposed = isinstance(arguments.module, nn.modules.conv._ConvTransposeNd) or (
        arguments.module is None and "transpose" in function_name(arguments)
    )
    dims = value_of(weight).dim() - 2
    dilation = each(arguments.option(7 if transposed else 5, "dilation", 1), dims)
    pads = _pads(arguments.option(4, "padding", 0), value_of(weight).shape[2:], dilation)
    mode = getattr(arguments.module, "padding_mode", "zeros")
    return Windows(
        weight,
        bias,
        each(arguments.option(3, "stride", 1), dims),
        pads,
        dilation,
        arguments.option(6, "groups", 1),
        transposed,
        each(arguments.option(5, "output_padding", 0), dims) if transposed else (0,) * dims,
        "constant" if mode == "zeros" else mode,
    )


def _of_aten(arguments: Arguments) -> Windows:
    _, weight, bias, stride, padding, dilation, transposed, more, groups = arguments.args
    dims = value_of(weight).dim() - 2
    pads = tuple((size, size) for size in each(padding, dims))
    return Windows(weight, bias, each(stride, dims), pads, each(dilation, dims), groups, transposed, each(more, dims))


def _pads(padding: Any, kernel: Sequence[int], dilation: Sequence[int]) -> tuple[tuple[int, int], ...]:
    if padding == "same":
        reach = [gap * (size - 1) for size, gap in zip(kernel, dilation, strict=True)]
        return tuple((far // 2, far - far // 2) for far in reach)
    sizes = (0,) * len(kernel) if padding == "valid" else each(padding, len(kernel))
    return tuple((size, size) for size in sizes)


def each(option: Any, dims: int) -> tuple[int, ...]:
    """Return an option for each spatial dimension."""
    given = tuple(option) if isinstance(option, (tuple, list, torch.Size)) else (option,)
    return given * dims if len(given) == 1 else given


# -- ranks ----------------------------------------------------------------------------------------------------------


def full_rank(form: Windows, image: Sequence[int], out: Sequence[int]) -> bool:
    """Whether almost every kernel of this shape has full column rank, as far as some simple kernels show it.

    They are products of a kernel per dimension, which has a single tap, or the same numbers for each channel.

    Args:
        form: The convolution.
        image: The operand's spatial sizes.
        out: The result's spatial sizes.
    """
    channels, made = form.channels
    for dim in range(len(image)):
        if form.transposed:
            places = _places(form, dim, image[dim], out[dim])
            made *= places if places else int(_regular(form, dim, image[dim], out[dim]))
        else:
            taps = _taps(form, dim, image[dim], out[dim])
            taps = 1 if taps != 1 and _regular(form, dim, image[dim], out[dim]) else taps
            channels = made + 1 if taps is None else channels * taps
    return channels <= made


def _taps(form: Windows, dim: int, size: int, out: int) -> int | None:
    """Return how many taps read every element of a dimension; None where no number of them is known to."""
    if form.kernel[dim] > _MANY_TAPS:
        return _taps_in_a_row(form, dim, size, out)
    uncovered, count = _ones(size), 0
    reads = [_reads(form, dim, tap, size, out) for tap in range(form.kernel[dim])]
    while uncovered:
        best = max(reads, key=lambda read: (read & uncovered).bit_count(), default=0)
        if not best & uncovered:
            return None
        uncovered &= ~best
        count += 1
    return count


def _taps_in_a_row(form: Windows, dim: int, size: int, out: int) -> int | None:
    """Return the stride, where as many neighbouring taps read every element."""
    stride = form.stride[dim]
    starts = range(form.kernel[dim] - stride + 1) if form.dilation[dim] == 1 or stride == 1 else ()
    offsets = (_offset(form, dim, tap) for tap in starts)
    return stride if any(offset <= 0 and offset + out * stride >= size for offset in offsets) else None


_MANY_TAPS = 32


def _ones(count: int) -> int:
    return (1 << count) - 1


def _reads(form: Windows, dim: int, tap: int, size: int, out: int) -> int:
    """Return the elements of a dimension that a tap reads, as the bits of a number."""
    offset, stride = _offset(form, dim, tap), form.stride[dim]
    if form.transposed:
        start, stop = max(0, -(offset // stride)), min(size, (out - 1 - offset) // stride + 1)
        return _ones(stop - start) << start if stop > start else 0
    skipped = max(0, -(offset // stride))
    start = offset + skipped * stride
    count = min(out - skipped, -(-(size - start) // stride))
    return 0 if count <= 0 else (_ones(count * stride) // _ones(stride)) << start


def _offset(form: Windows, dim: int, tap: int) -> int:
    return tap * form.dilation[dim] - form.pads[dim][0]


def _places(form: Windows, dim: int, size: int, out: int) -> int:
    """Return how many taps write the elements of a dimension to places of their own within the result."""
    offsets = [_offset(form, dim, tap) for tap in range(form.kernel[dim])]
    inside = [offset for offset in offsets if offset >= 0 and offset + (size - 1) * form.stride[dim] < out]
    return len({offset % form.stride[dim] for offset in inside})


def _regular(form: Windows, dim: int, size: int, out: int) -> bool:
    """Whether a kernel of some numbers has full column rank along one dimension, modulo a prime."""
    if out < size or size > _MOST_ELIMINATED:
        return False
    rows = [[0] * size for _ in range(out)]
    for tap in range(form.kernel[dim]):
        number = pow(7919, (tap + 1) ** 2, _PRIME)
        for at in range(size if form.transposed else out):
            there = at * form.stride[dim] + _offset(form, dim, tap)
            row, column = (there, at) if form.transposed else (at, there)
            if 0 <= row < out and 0 <= column < size:
                rows[row][column] = number
    return _has_full_rank(rows)


_PRIME = 2**31 - 1
_MOST_ELIMINATED = 32


def _has_full_rank(rows: list[list[int]]) -> bool:
    """Whether the columns of an integer matrix are independent modulo a prime, and so over the rationals."""
    for column in range(len(rows[0])):
        place = next((index for index in range(column, len(rows)) if rows[index][column]), None)
        if place is None:
            return False
        rows[column], rows[place] = rows[place], rows[column]
        pivot = rows[column]
        inverse = pow(pivot[column], -1, _PRIME)
        for index in range(column + 1, len(rows)):
            factor = rows[index][column] * inverse % _PRIME
            if factor:
                rows[index] = [(one - factor * other) % _PRIME for one, other in zip(rows[index], pivot, strict=True)]
    return True


def unread(form: Windows, image: Sequence[int], out: Sequence[int]) -> int:
    """Return how many elements of a channel no window reads, or a transposed convolution writes nowhere."""
    if form.mode != "constant":
        return 0
    read = 1
    for dim, size in enumerate(image):
        read *= _read(form, dim, size, out[dim])
    return math.prod(image) - read


def _read(form: Windows, dim: int, size: int, out: int) -> int:
    stride, taps = form.stride[dim], form.kernel[dim]
    if not form.transposed and stride <= taps and form.dilation[dim] == 1:
        # Neighbouring windows meet, and read all between the first and the last one.
        start = -form.pads[dim][0]
        return max(0, min(size, start + (out - 1) * stride + taps) - max(0, start))
    bits = 0
    for tap in range(taps):
        bits |= _reads(form, dim, tap, size, out)
    return bits.bit_count()


def starved(form: Windows, image: Sequence[int], out: Sequence[int]) -> int:
    """Return how many elements are lost since dilation splits them into classes, and some have too few results.

    An element only meets results whose index differs by the padding and a multiple of the dilation.
    """
    steps = [gap if size > 1 else 1 for gap, size in zip(form.dilation, form.kernel, strict=True)]
    if form.mode != "constant" or any(step != 1 for step in form.stride) or math.prod(steps) > 64:
        return 0
    sign = -1 if form.transposed else 1
    channels, made = form.channels
    lost = 0
    for classes in itertools.product(*map(range, steps)):
        mine = [_members(size, rest, step) for size, rest, step in zip(image, classes, steps, strict=True)]
        shifts = [(rest + sign * pad[0]) % step for rest, pad, step in zip(classes, form.pads, steps, strict=True)]
        theirs = [_members(size, rest, step) for size, rest, step in zip(out, shifts, steps, strict=True)]
        lost += max(0, channels * math.prod(mine) - made * math.prod(theirs))
    return lost * form.groups


def _members(size: int, rest: int, step: int) -> int:
    """Return how many of the first numbers leave a rest when divided by a step."""
    return max(0, -(-(size - rest) // step))


def work(form: Windows, image: Sequence[int], out: Sequence[int]) -> int:
    """Return about how many multiplications the direct solution of the system takes."""
    channels, made = form.channels
    columns, rows = channels * math.prod(image), made * math.prod(out)
    return form.groups * rows * columns**2
