"""Padding and its opposite: crops, triangles, and windows that slide over an operand."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from bwsk_fx.rules.axis import AxisCall, Behaviour, Claim, Effect, axis_rule, claims, renumbered
from bwsk_fx.rules.axis_table import Axis, Extent
from bwsk_fx.rules.moving import counted, moves_back
from bwsk_fx.rules.registry import Call, erases, labels, preserves, unproven
from bwsk_fx.rules.targets import operator_name
from bwsk_fx.rules.windows import each
from bwsk_fx.verdict import REFINED, Verdict


@labels(nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d, nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d)
@labels(nn.ReflectionPad1d, nn.ReflectionPad2d, nn.ReflectionPad3d, nn.CircularPad1d, nn.CircularPad2d)
@labels(nn.CircularPad3d, nn.ReplicationPad1d, nn.ReplicationPad2d, nn.ReplicationPad3d, F.pad, torch.constant_pad_nd)
@labels(atens="constant_pad_nd pad _pad_circular _pad_enum reflection_pad1d reflection_pad2d reflection_pad3d")
@labels(atens="replication_pad1d replication_pad2d replication_pad3d")
def pad(call: Call) -> Verdict:
    """Padding surrounds the operand; a negative width crops it."""
    widths = call.option(1, "pad" if call.module is None else "padding", ())
    if not all(isinstance(width, int) for width in widths):
        return unproven("its widths vary with the batch")
    if min(widths, default=0) >= 0:
        return preserves("the operand is the middle of the result", confidence=REFINED, undo=moves_back())
    return erases("a negative width crops the operand", _cropped(call, widths), confidence=REFINED)


def _cropped(call: Call, widths: Sequence[int]) -> float | None:
    """Return the elements outside of the box that negative widths leave."""
    total, kept = call.elements(), 1.0
    for dim, (before, after) in enumerate(zip(widths[::2], widths[1::2], strict=True), 1):
        cut = -min(before, 0) - min(after, 0)
        size = call.before.shape[-dim]
        if cut and not isinstance(size, int):
            return None
        kept *= 1 - cut / size if cut else 1
    return None if total is None else round(total * (1 - kept))


@labels(ops="tril triu")
def triangle(call: Call) -> Verdict:
    """Keeps one side of a diagonal of each matrix."""
    rows, columns = call.before.shape[-2:]
    offset, total = call.argument(1, "diagonal", 0), call.elements()
    if not all(isinstance(number, int) for number in (rows, columns, offset)):
        return unproven("its sizes vary with the batch")
    upper = "triu" in operator_name(call.target)
    below = _below_diagonal(rows, columns, offset - upper)
    missing = below if upper else rows * columns - below
    if missing == 0:
        return preserves("every element is on the side that it keeps", confidence=REFINED, undo=moves_back())
    amount = None if total is None else total // (rows * columns) * missing
    return erases("it keeps one side of a diagonal", amount, confidence=REFINED)


def _below_diagonal(rows: int, columns: int, offset: int) -> int:
    """Return how many elements of a matrix lie on or below a diagonal.

    It is the sum of clamp(row + offset + 1, 0, columns) over the rows.
    """
    start, end = offset, offset + rows

    def ramp(last: int) -> int:
        return max(last, 0) * (max(last, 0) + 1) // 2

    return ramp(end) - ramp(start) - ramp(end - columns) + ramp(start - columns)


@labels(methods="unfold", atens="unfold")
def windows(call: Call) -> Verdict:
    """Windows along one dimension; elements in none of them go."""
    dim, size, step = (call.argument(place, name) for place, name in ((1, "dimension"), (2, "size"), (3, "step")))
    length = call.before.shape[dim] if call.before.dim() else 1
    if not all(isinstance(number, int) for number in (length, size, step)):
        return counted(call, "it takes windows")
    count = (length - size) // step + 1
    covered = size + (count - 1) * step if step <= size else count * size
    return _by_coverage(call, length - covered, length, "it takes windows")


@labels(nn.Unfold, F.unfold, atens="im2col")
def image_windows(call: Call) -> Verdict:
    """Windows of an image as columns; S where every pixel is in some window."""
    image = call.before.shape[-2:]
    axes = _axes(call, image, first=1)
    if axes is None:
        return unproven("its sizes vary with the batch")
    kept = math.prod(_covered(*axis, size) for axis, size in zip(axes, image, strict=True))
    return _by_coverage(call, math.prod(image) - kept, math.prod(image), "it takes windows of the image")


@labels(nn.Fold, F.fold, atens="col2im")
def fold(call: Call) -> Verdict:
    """Adds windows up into an image; S where they neither overlap nor stick out."""
    image = _pair(call.option(1, "output_size"))
    axes = _axes(call, image, first=2)
    if axes is None:
        return unproven("its sizes vary with the batch")
    starts, offsets = ([len(axis[part]) for axis in axes] for part in (0, 1))
    given = math.prod(starts) * math.prod(offsets)
    kept = math.prod(_covered(*axis, size) for axis, size in zip(axes, image, strict=True))
    return _by_coverage(call, given - kept, given, "it adds up windows")


def _axes(call: Call, image: Sequence[int], first: int) -> list[tuple[range, range]] | None:
    """Return, per axis of an image, where windows start and which positions they have, relative to that."""
    names = ("kernel_size", "dilation", "padding", "stride")
    kernel, dilation, padding, stride = (
        _pair(call.option(first + place, name, 0 if name == "padding" else 1)) for place, name in enumerate(names)
    )
    if not all(isinstance(number, int) for number in (*image, *kernel, *dilation, *padding, *stride)):
        return None
    result = []
    for place in range(2):
        reach = dilation[place] * (kernel[place] - 1)
        starts = range(-padding[place], image[place] + padding[place] - reach, stride[place])
        result.append((starts, range(0, reach + 1, dilation[place])))
    return result


def _pair(value: Any) -> tuple[int, ...]:
    values = tuple(value) if isinstance(value, Iterable) else (value,)
    return values * 2 if len(values) == 1 else values


def _covered(starts: range, offsets: range, length: int) -> int:
    """Return how many of `length` positions lie in a window."""
    if starts and offsets.step == 1 and starts.step <= len(offsets):
        return max(min(starts[-1] + len(offsets), length) - max(starts[0], 0), 0)
    return len({place for start in starts for offset in offsets if 0 <= (place := start + offset) < length})


def _by_coverage(call: Call, missing: int, of: int, why: str) -> Verdict:
    if missing == 0:
        return preserves(f"{why}, and every element comes through on its own", confidence=REFINED, undo=moves_back())
    total = call.elements()
    amount = None if total is None else total // of * missing
    return erases(f"{why}, and {missing} of {of} elements do not come through on their own", amount, confidence=REFINED)


@axis_rule(F.pad, torch.constant_pad_nd, nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d, nn.ConstantPad1d, nn.ConstantPad2d)
@axis_rule(nn.ConstantPad3d, nn.ReflectionPad1d, nn.ReflectionPad2d, nn.ReflectionPad3d, nn.ReplicationPad1d)
@axis_rule(nn.ReplicationPad2d, nn.ReplicationPad3d, nn.CircularPad1d, nn.CircularPad2d, nn.CircularPad3d)
def pad_axes(call: AxisCall) -> Effect:
    """Maps every axis; along a padded one the facts get other indices, and constants or copies of facts join them."""
    said: list[Claim] = []
    pairs = zip(call.operand.layout, call.operand.shape, call.shape, strict=True)
    layout = tuple(_padded(call, axis, before, after, said) for axis, before, after in pairs)
    return Effect(tuple(said), (layout,))


def _padded(call: AxisCall, axis: Axis | None, before: Extent, after: Extent, said: list[Claim]) -> Axis | None:
    # Padding on one side and a crop on the other could leave the size as it is.
    widths = call.option("padding" if isinstance(call.target, nn.Module) else "pad", 1)
    if before == after and min(each(widths, 2)) >= 0:
        said += claims([axis], Behaviour.MAP, "it pads other axes")
        return axis
    made = call.axes.derived("" if axis is None else call.axes.name(axis), [] if axis is None else [axis])
    why = "its facts lie at other indices, among constants or copies of some of them"
    said += renumbered(axis, made, why)
    return made
