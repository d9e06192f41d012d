"""Convolutions: patches that tile the image are a linear map each; overlapping ones are beyond these rules."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from bwsk_fx.rules.affine import linear_map
from bwsk_fx.rules.axis import AxisCall, Behaviour, Claim, Effect, axis_rule, claims
from bwsk_fx.rules.axis_table import Axis
from bwsk_fx.rules.registry import Call, erases, labels, unproven
from bwsk_fx.rules.sizes import as_int
from bwsk_fx.verdict import REFINED, Verdict


@labels(nn.Conv1d, nn.Conv2d, nn.Conv3d, F.conv1d, F.conv2d, F.conv3d)
def convolution(call: Call) -> Verdict:
    """S as a patch embedding that does not shrink; K where the result has fewer elements; else GRAY."""
    kernel = _kernel(call)
    if kernel is None:
        return unproven("the kernel is itself dynamic")
    image = call.before.shape[-len(kernel) :]
    if not _tiles(call, kernel) or not all(map(as_int, image)):
        return _by_counting(call)
    channels, out = call.before.shape[-len(kernel) - 1], call.value.shape[-len(kernel) - 1]
    width = channels * math.prod(kernel)
    patches = math.prod(size // step for size, step in zip(image, kernel, strict=True))
    cut = channels * math.prod(image) - patches * width
    if cut:
        lost = cut + patches * max(width - out, 0)
        why = f"the kernel does not divide the image, so {cut} elements per sample are cut off"
        return erases(why, lost, confidence=REFINED)
    return linear_map(call, width, out, patches)


def _by_counting(call: Call) -> Verdict:
    missing = call.erased()
    if missing is not None and missing > 0:
        return erases(
            f"the result has {missing} elements per sample less than the operand", missing, confidence=REFINED
        )
    return unproven("its windows overlap, are padded, dilated or grouped, and the result is no smaller")


@labels(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
def transposed(call: Call) -> Verdict:
    """The mirror image of the patch embedding: every pixel becomes a patch of its own."""
    kernel = tuple(call.module.kernel_size)
    if not _tiles(call, kernel) or any(call.module.output_padding):
        return _by_counting(call)
    return linear_map(call, call.module.in_channels, call.module.out_channels * math.prod(kernel))


def _kernel(call: Call) -> tuple[int, ...] | None:
    if call.module is not None:
        return tuple(call.module.kernel_size)
    weight = call.argument(1, "weight")
    return None if call.is_dynamic(weight) else tuple(weight.meta["val"].shape[2:])


def _tiles(call: Call, kernel: tuple[int, ...]) -> bool:
    """Whether each element of the image is in exactly one window, as far as windows reach."""
    stride = _each(call.option(3, "stride", 1), kernel)
    padding = call.option(4, "padding", 0)
    unpadded = padding == "valid" or (not isinstance(padding, str) and not any(_each(padding, kernel)))
    plain = all(size == 1 for size in _each(call.option(5, "dilation", 1), kernel)) and call.option(6, "groups", 1) == 1
    return stride == kernel and unpadded and plain


def _each(option: Any, kernel: Sequence[int]) -> tuple[int, ...]:
    return tuple(option) if isinstance(option, (tuple, list, torch.Size)) else (option,) * len(kernel)


_SPATIAL_NAMES = {1: ("token",), 2: ("height", "width"), 3: ("depth", "height", "width")}


@axis_rule(nn.Conv1d, nn.Conv2d, nn.Conv3d, F.conv1d, F.conv2d, F.conv3d)
def convolution_axes(call: AxisCall) -> Effect:
    """Sums over input channels; maps positions where windows tile them, and waits where windows overlap."""
    kernel = _kernel_of(call)
    count = len(kernel)
    channel, positions = call.operand.layout[-count - 1], call.operand.layout[-count:]
    for axis, name in zip((channel, *positions), ("channel", *_SPATIAL_NAMES[count]), strict=True):
        call.axes.call(axis, name)
    said = claims(call.operand.layout[: -count - 1], Behaviour.MAP, "each sample is convolved on its own")
    outer = _channels(call, channel, call.shape[-count - 1], said)
    tiled = _tiled(call, kernel)
    made = [_position(call, dim, axis, tiled[dim], said) for dim, axis in enumerate(positions, start=-count)]
    return Effect(tuple(said), ((*call.operand.layout[: -count - 1], outer, *made),))


def _kernel_of(call: AxisCall) -> tuple[int, ...]:
    if isinstance(call.target, nn.Module):
        return tuple(call.target.kernel_size)  # type: ignore[arg-type]
    return call.option("weight", 1).shape[2:]


def _channels(call: AxisCall, channel: Axis | None, out: int, said: list[Claim]) -> Axis | None:
    """Say what happens to the channels, and return those of the result."""
    groups = call.option("groups", 6, 1)
    if channel is not None and groups == call.operand.shape[-len(_kernel_of(call)) - 1] == out:
        said += claims([channel], Behaviour.MAP, "each channel has a kernel of its own")
        return channel
    where = "" if groups == 1 else " within its group"
    said += claims([channel], Behaviour.REDUCE, f"each shard yields a partial sum{where}", role="input", produced=False)
    (outer,) = call.axes.fresh([out])
    call.axes.call(outer, "channel")
    why = "each shard of the kernels yields channels of its own"
    said += claims([outer], Behaviour.MAP, why, role="output", consumed=False)
    return outer


def _tiled(call: AxisCall, kernel: tuple[int, ...]) -> dict[int, bool]:
    """Tell for each spatial dimension whether its windows neither overlap nor reach over the border."""
    stride, dilation = (_each(call.option(name, place, 1), kernel) for name, place in (("stride", 3), ("dilation", 5)))
    padding = call.option("padding", 4, 0)
    around = kernel if padding == "same" else _each(0 if padding == "valid" else padding, kernel)
    plain = zip(kernel, stride, dilation, around, strict=True)
    tiles = [size <= step and spread == 1 and not pad for size, step, spread, pad in plain]
    return dict(enumerate(tiles, start=-len(kernel)))


def _position(call: AxisCall, dim: int, axis: Axis | None, tiled: bool, said: list[Claim]) -> Axis | None:
    if axis is None:
        return call.axes.fresh(call.shape[dim:])[0]
    if call.shape[dim] == 1:
        why = "one window covers the axis, and each shard yields a partial sum"
        said += claims([axis], Behaviour.REDUCE, why, produced=False)
        return None
    if tiled:
        said += claims([axis], Behaviour.MAP, "windows tile the axis, so whole windows yield whole outputs")
        return axis
    said += claims([axis], Behaviour.BARRIER, "windows reach into neighbouring shards (a halo) or over the border")
    return axis
