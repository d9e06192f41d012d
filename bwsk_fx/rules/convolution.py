"""Convolutions: linear maps that erase where they shrink, and are solved for where they do not."""

from __future__ import annotations

import math

from torch import nn
from torch.nn import functional as F

from bwsk_fx.rules.axis import AxisCall, Behaviour, Claim, Effect, axis_rule, claims
from bwsk_fx.rules.axis_table import Axis
from bwsk_fx.rules.axis_windows import Sliding
from bwsk_fx.rules.contraction import by_counting
from bwsk_fx.rules.deconvolution import condition, rebuild
from bwsk_fx.rules.registry import Call, erases, labels, others, preserves, unproven
from bwsk_fx.rules.sizes import as_int
from bwsk_fx.rules.undo import Undo
from bwsk_fx.rules.windows import MOST_WORK, Windows, full_rank, starved, unread, windows, work
from bwsk_fx.verdict import REFINED, Verdict


@labels(nn.Conv1d, nn.Conv2d, nn.Conv3d, F.conv1d, F.conv2d, F.conv3d)
@labels(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
@labels(F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d, atens="convolution")
def convolution(call: Call) -> Verdict:
    """S where the kernel's system has full rank for almost every kernel and can be solved; K where it shrinks."""
    form = windows(call)
    operand = call.args[0] if call.args else next(iter(call.kwargs.values()))
    if not call.is_dynamic(operand) or operand in (form.weight, form.bias):
        return unproven("only its kernel or bias is dynamic")
    image = [as_int(size) for size in call.before.shape[-len(form.kernel) :]]
    out = [as_int(size) for size in call.value.shape[-len(form.kernel) :]]
    if None in image or None in out:
        return by_counting(call, "its image varies with the batch")
    return _fixed(call, form, image, out)  # type: ignore[arg-type]


def _fixed(call: Call, form: Windows, image: list[int], out: list[int]) -> Verdict:
    channels, made = form.channels
    missing, cut = call.erased(), unread(form, image, out) * channels * form.groups
    if cut:
        why = f"no window reaches {cut} elements per sample, so they are cut off"
        return erases(why, max(cut, missing or 0), confidence=REFINED)
    if missing is not None and missing > 0:
        why = f"the result has {missing} elements per sample less than the operand"
        return erases(why, missing, confidence=REFINED)
    if (lost := starved(form, image, out)) > 0:
        why = f"dilation splits it into systems of their own, which have {lost} equations too few"
        return erases(why, lost, confidence=REFINED)
    if not full_rank(form, image, out):
        return unproven("its windows overlap, are padded or grouped such that no simple kernel shows its rank")
    if not form.tiles and not form.covers_padding and work(form, image, out) > MOST_WORK:
        size = channels * math.prod(image)
        return unproven(f"it has full rank for almost every kernel, but {size} unknowns are too many to solve for")
    if not (call.before.is_floating_point() or call.before.is_complex()):
        return unproven("whole numbers wrap around, and whether the map can be undone then depends on its kernel")
    why = (
        f"{channels * form.groups} → {made * form.groups} channels: the pseudo-inverse rebuilds the operand if the "
        "kernel's system has full rank, as it has for almost every kernel of this shape; certify shows it"
    )
    undo = Undo(rebuild, condition=condition)
    return preserves(why, others(call, 0), REFINED, undo=undo, domain="the kernel's system has full rank")


_SPATIAL_NAMES = {1: ("token",), 2: ("height", "width"), 3: ("depth", "height", "width")}


@axis_rule(nn.Conv1d, nn.Conv2d, nn.Conv3d, F.conv1d, F.conv2d, F.conv3d)
def convolution_axes(call: AxisCall) -> Effect:
    """Sums over input channels; maps windows where they tile the positions, and waits where they overlap."""
    kernel = _kernel_of(call)
    count = len(kernel)
    channel, positions = call.operand.layout[-count - 1], call.operand.layout[-count:]
    for axis, name in zip((channel, *positions), ("channel", *_SPATIAL_NAMES[count]), strict=True):
        call.axes.call(axis, name)
    said = claims(call.operand.layout[: -count - 1], Behaviour.MAP, "each sample is convolved on its own")
    outer = _channels(call, channel, call.shape[-count - 1], said)
    made = Sliding.of(call, kernel, Behaviour.REDUCE, stride=3, padding=4, dilation=5).moved(call, said)
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
