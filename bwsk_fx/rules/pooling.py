"""Pooling: windows of many elements become one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bwsk_fx import _torch_private as private
from bwsk_fx.rules.axis import AxisCall, Behaviour, Effect, axis_rule, claims
from bwsk_fx.rules.axis_windows import Sliding
from bwsk_fx.rules.registry import Call, erases, fewer_elements, labels, preserves, unproven, witness_of
from bwsk_fx.rules.separable import separable
from bwsk_fx.rules.sizes import elements
from bwsk_fx.rules.undo import Run, Undo, as_it_is
from bwsk_fx.verdict import OPERATOR, REFINED, Verdict


def _spatial_operators(names: str) -> tuple[Any, ...]:
    """Return what `torch.nn.functional` calls underneath, by space-separated names."""
    return private.operators(*(f"_C._nn.{name}" for name in names.split()))


def _spatial(call: Call) -> int:
    """Return the number of spatial dimensions, which every name of a pool tells."""
    names = (type(call.target).__name__, getattr(call.target, "__name__", ""), str(call.target))
    return next(int(name[place + 4]) for name in names for place in [name.lower().find("pool")] if place >= 0)


def _each(value: Any, spatial: int) -> list[int]:
    """Return an option that is one number for all dimensions, or one each."""
    values = list(value) if isinstance(value, (tuple, list)) else [value]
    return values * spatial if len(values) == 1 else values


def _windows(call: Call, spatial: int) -> tuple[list[int], list[int]]:
    """Return the windows' sizes and strides."""
    kernel = _each(call.option(1, "kernel_size"), spatial)
    stride = call.option(2, "stride")
    return kernel, kernel if stride in (None, [], ()) else _each(stride, spatial)


@labels(nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)
@labels(atens="avg_pool1d avg_pool2d avg_pool3d")
def average_pool(call: Call) -> Verdict:
    """Averages over windows, one dimension after the other."""
    spatial = _spatial(call)
    kernel, stride = _windows(call, spatial)
    padding = _each(call.option(3, "padding", 0), spatial)
    override = call.option(6, "divisor_override") if spatial > 1 else None
    if override is not None:
        return fewer_elements(call, "it merges each window into one element")
    ceil, padded = call.option(4, "ceil_mode", False), call.option(5, "count_include_pad", True)
    response = partial(_average, tuple(kernel), tuple(stride), tuple(padding), bool(ceil), bool(padded))
    return separable(call, spatial, response)


def _average(
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    ceil: bool,
    padded: bool,
    dim: int,
    before: int,
    after: int,
) -> Tensor:
    unit = torch.eye(before, dtype=torch.float64).unsqueeze(1)
    return F.avg_pool1d(unit, kernel[dim], stride[dim], padding[dim], ceil, padded)[:, 0, :after].mT


@labels(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)
@labels(F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d)
@labels(*_spatial_operators("adaptive_avg_pool2d adaptive_avg_pool3d"))
@labels(atens="adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d _adaptive_avg_pool2d _adaptive_avg_pool3d")
def adaptive_average_pool(call: Call) -> Verdict:
    """Averages over windows that fit the result; where none is left out, each window adds at most one new element."""
    return separable(call, _spatial(call), _adaptive, sure=True)


def _adaptive(_: int, before: int, after: int) -> Tensor:
    return F.adaptive_avg_pool1d(torch.eye(before, dtype=torch.float64).unsqueeze(1), after)[:, 0].mT


@labels(nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, F.max_pool1d, F.max_pool2d, F.max_pool3d)
@labels(F.max_pool1d_with_indices, F.max_pool2d_with_indices, F.max_pool3d_with_indices)
@labels(torch.max_pool1d, torch.max_pool2d, torch.max_pool3d, torch.max_pool1d_with_indices)
@labels(*_spatial_operators("max_pool2d_with_indices max_pool3d_with_indices"))
@labels(atens="max_pool1d max_pool2d max_pool3d")
@labels(atens="max_pool1d_with_indices max_pool2d_with_indices max_pool3d_with_indices")
def max_pool(call: Call) -> Verdict:
    """The largest element of each window."""
    missing = call.erased()
    if missing is None or missing > 0:
        return fewer_elements(call, "it merges each window into one element")
    spatial = _spatial(call)
    kernel, stride = _windows(call, spatial)
    if math.prod(kernel) == 1 and math.prod(stride) == 1:
        return preserves("each window is one element", confidence=REFINED, undo=Undo(as_it_is))
    dilation = _each(call.option(4, "dilation", 1), spatial)
    sizes = call.before.shape[-spatial:]
    # Padding is at most half a window, so a window of three has at least two elements.
    if any(k >= 3 and d == 1 and size >= 2 for k, d, size in zip(kernel, dilation, sizes, strict=True)):
        return erases("an element that is smaller than its neighbours leaves no trace", confidence=REFINED)
    return unproven("it has as many windows as elements, and some windows may hold one element alone")


@labels(nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d)
@labels(F.adaptive_max_pool1d, F.adaptive_max_pool2d, F.adaptive_max_pool3d)
@labels(F.adaptive_max_pool1d_with_indices, F.adaptive_max_pool2d_with_indices, F.adaptive_max_pool3d_with_indices)
@labels(torch.adaptive_max_pool1d, *_spatial_operators("adaptive_max_pool2d adaptive_max_pool3d"))
@labels(atens="adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d")
def adaptive_max_pool(call: Call) -> Verdict:
    """The largest element of windows that fit the result."""
    if tuple(call.before.shape) == tuple(call.value.shape):
        return preserves("each window is one element", confidence=REFINED, undo=Undo(as_it_is))
    return _counted(call)


@labels(nn.FractionalMaxPool2d, nn.FractionalMaxPool3d, F.fractional_max_pool2d, F.fractional_max_pool3d)
@labels(F.fractional_max_pool2d_with_indices, F.fractional_max_pool3d_with_indices)
@labels(*_spatial_operators("fractional_max_pool2d fractional_max_pool3d"))
@labels(nn.LPPool1d, nn.LPPool2d, nn.LPPool3d, F.lp_pool1d, F.lp_pool2d, F.lp_pool3d)
@labels(atens="fractional_max_pool2d fractional_max_pool3d")
def other_pool(call: Call) -> Verdict:
    """Pools with random windows, and norms over windows."""
    return _counted(call)


def _counted(call: Call) -> Verdict:
    missing = call.erased()
    if missing is not None and missing > 0:
        return erases("it merges each window into one element", missing, confidence=REFINED)
    return unproven("it has as many windows as elements")


@labels(nn.MaxUnpool1d, nn.MaxUnpool2d, nn.MaxUnpool3d, F.max_unpool1d, F.max_unpool2d, F.max_unpool3d)
@labels(*_spatial_operators("max_unpool2d max_unpool3d"), atens="max_unpool2d max_unpool3d")
def max_unpool(call: Call) -> Verdict:
    """Values are put at given places of a plane of zeros, and found there again."""
    indices, spatial = call.argument(1, "indices"), _spatial(call)
    places = call.static(indices)
    if places is not None and _repeats(places.flatten(-spatial)):
        return erases("a value that is put where another was erases it", confidence=REFINED)
    witness = witness_of(call, indices)
    confidence = OPERATOR if places is None else REFINED
    undo = Undo(partial(_gathered, spatial))
    return preserves("each value is found at its index", witness, confidence, undo=undo, domain="no index occurs twice")


def _repeats(places: Tensor) -> bool:
    ordered = places.sort(-1).values
    return bool((ordered[..., 1:] == ordered[..., :-1]).any())


def _gathered(spatial: int, run: Run) -> Tensor:
    indices = run.argument(1, "indices")
    return run.output.flatten(-spatial).gather(-1, indices.flatten(-spatial)).view(indices.shape)


@labels(atens="max_pool2d_with_indices_backward max_pool3d_with_indices_backward")
def max_pool_backward(call: Call) -> Verdict:
    """Gradients are put where the largest elements were."""
    source = call.argument(1, "self")
    if call.is_dynamic(source):
        return erases("of the pool's operand only the shape is used", elements(source.meta["val"]), confidence=REFINED)
    return unproven("gradients of windows that overlap are added up")


@axis_rule(nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)
def average_axes(call: AxisCall) -> Effect:
    """Sums within windows; samples and channels are pooled on their own."""
    return _pooled(call, Behaviour.REDUCE, dilation=99)


@axis_rule(nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, F.max_pool1d, F.max_pool2d, F.max_pool3d)
@axis_rule(torch.max_pool1d, torch.max_pool2d, torch.max_pool3d)
def largest_axes(call: AxisCall) -> Effect:
    """Joins within windows; samples and channels are pooled on their own."""
    return _pooled(call, Behaviour.JOIN, dilation=4)


def _pooled(call: AxisCall, inside: Behaviour, dilation: int) -> Effect:
    count = int(getattr(call.target, "__name__", type(call.target).__name__).lower().split("pool")[1][0])
    leading = call.operand.layout[:-count]
    said = claims(leading, Behaviour.MAP, "each channel of each sample is pooled on its own")
    kernel = tuple(_each(call.option("kernel_size", 1), count))
    made = Sliding.of(call, kernel, inside, stride=2, padding=3, dilation=dilation).moved(call, said)
    return Effect(tuple(said), ((*leading, *made),) * len(call.shapes))
