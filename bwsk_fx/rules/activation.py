"""Activation functions that act on each element on their own."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bwsk_fx.rules.axis import AxisCall, Behaviour, Effect, axis_rule, claims, mapped, renumbered
from bwsk_fx.rules.bijections import one_bit_each, unchanged, undo_by
from bwsk_fx.rules.registry import Call, erases, fewer_elements, labels, preserves, unproven
from bwsk_fx.rules.sizes import short
from bwsk_fx.rules.spelling import plain_name, spellings
from bwsk_fx.rules.undo import Run, Undo
from bwsk_fx.verdict import REFINED, Verdict

_TRANSFORMERS = "transformers.activations."
_SELU_SCALE, _SELU_ALPHA = 1.0507009873554805, 1.6732632423543772


@labels(nn.GELU, nn.SiLU, nn.Mish, *spellings("gelu silu mish"))
@labels(*(_TRANSFORMERS + name for name in ("GELUActivation", "NewGELUActivation", "FastGELUActivation", "GELUTanh")))
@labels(*(_TRANSFORMERS + name for name in ("QuickGELUActivation", "AccurateGELUActivation", "SiLUActivation")))
@labels(_TRANSFORMERS + "MishActivation")
def two_branches(call: Call) -> Verdict:
    """Falls, then rises: an output near zero has two inputs."""
    return one_bit_each(call, "it has two monotone branches, and one bit per element tells them apart")


@labels(nn.ReLU, *spellings("relu"), _TRANSFORMERS + "ReLUSquaredActivation")
def relu(call: Call) -> Verdict:
    """Zeroes what is negative: half of the elements, if signs are even."""
    total = call.elements()
    half = None if total is None else total / 2
    why = "every negative element becomes zero: half of them, if both signs are equally frequent"
    return erases(why, half, expected=True)


@labels(nn.ReLU6, nn.Hardtanh, nn.Hardsigmoid, nn.Hardswish, nn.Threshold)
@labels(*spellings("relu6 hardtanh hardsigmoid hardswish threshold"), _TRANSFORMERS + "ClippedGELUActivation")
def flat_parts(_: Call) -> Verdict:
    """Constant over whole intervals; how many elements lie there depends on the data."""
    return erases("it is constant over whole intervals")


@labels(nn.Hardshrink, nn.Softshrink, *spellings("hardshrink softshrink"))
def shrink(call: Call) -> Verdict:
    """Zeroes what is small; nothing is as small as a width of zero."""
    width = call.option(1, "lambd", 0.5)
    if width <= 0:
        return unchanged(f"no element but zero is within {width} of zero")
    return erases("it is zero around zero", confidence=REFINED)


@labels(nn.Tanhshrink, F.tanhshrink)
def tanh_shrink(_: Call) -> Verdict:
    """Strictly increasing, but computed as a difference that cancels."""
    return unproven("x and tanh x cancel near zero, so that the result has no relative precision to rebuild x from")


@labels(nn.Softplus, *spellings("softplus"))
def softplus(call: Call) -> Verdict:
    """Undone by x = y + log(1 - exp(-beta y)) / beta; beyond the threshold it is the identity."""
    beta, threshold = call.option(1, "beta", 1), call.option(2, "threshold", 20)
    if beta <= 0:
        return unproven("softplus with a beta that is not positive is covered by no rule")
    # The branch below the threshold ends above the beginning of the linear one, by this much.
    overlap = math.log1p(math.exp(-threshold))
    if overlap > torch.finfo(call.value.dtype).eps ** 0.5 * max(threshold, 0):
        return erases("its two branches overlap, and values around the threshold have two inputs", confidence=REFINED)
    why = "it is strictly increasing and keeps its relative precision: x = y + log(1 - exp(-y))"
    undo = undo_by(partial(_softplus_inverse, beta, threshold))
    return preserves(why, undo=undo, domain="the result does not underflow")


def _softplus_inverse(beta: float, threshold: float, y: Tensor) -> Tensor:
    return torch.where(beta * y > threshold, y, y + torch.log(-torch.expm1(-beta * y)) / beta)


@labels(nn.LeakyReLU, *spellings("leaky_relu"))
def leaky_relu(call: Call) -> Verdict:
    """Invertible for a positive slope; with slope zero it is ReLU, with a negative one it folds."""
    return _slopes(call, call.option(1, "negative_slope", 0.01))


@labels(nn.RReLU, *spellings("rrelu"))
def randomized_leaky_relu(call: Call) -> Verdict:
    """Draws slopes while training, and takes their mean otherwise."""
    return _randomized(call, 1)


@labels(atens="rrelu_with_noise")
def leaky_relu_with_noise(call: Call) -> Verdict:
    """The same, with a buffer for the slopes."""
    return _randomized(call, 2)


def _randomized(call: Call, first: int) -> Verdict:
    lower, upper = call.option(first, "lower", 1 / 8), call.option(first + 1, "upper", 1 / 3)
    if call.option(first + 2, "training", False) and lower != upper:
        total = call.elements()
        why = "negative elements are scaled by random slopes: half of them, if both signs are equally frequent"
        return erases(why, None if total is None else total / 2, confidence=REFINED, expected=True)
    return _slopes(call, (lower + upper) / 2)


def _slopes(call: Call, slope: float) -> Verdict:
    """One of three: two positive slopes, a flat half, or a fold."""
    if slope > 0:
        why = f"both slopes are positive (1 and {slope}), so dividing by the slope undoes it"
        return preserves(why, confidence=REFINED, undo=undo_by(partial(_unbent, slope)))
    if slope == 0:
        return relu(call)
    return one_bit_each(call, "a negative slope folds the axis: one bit per element", REFINED)


def _unbent(slope: Any, y: Tensor) -> Tensor:
    return torch.where(y < 0, y / slope, y)


@labels(nn.PReLU, *spellings("prelu"), atens="_prelu_kernel")
def prelu(call: Call) -> Verdict:
    """Invertible as long as the learned slopes are positive."""
    weight = call.module.weight if call.module is not None else call.argument(1, "weight")
    if weight is call.operands[0]:
        return unproven("whether the slope comes back depends on signs")
    slopes = call.static(weight)
    if slopes is None:
        return unproven("the values of the slopes are not at hand, and decide between one-to-one and folded")
    if bool((slopes > 0).all()):
        why = "every slope is positive, so dividing by it undoes it"
        return preserves(why, confidence=REFINED, undo=Undo(_unbent_each))
    return erases("slopes that are zero or negative flatten or fold the axis", confidence=REFINED)


def _unbent_each(run: Run) -> Tensor:
    weight = run.module.weight if run.module is not None else run.argument(1, "weight")
    channels = [1, -1] + [1] * (run.output.dim() - 2)
    alike = weight.dim() == run.output.dim() and weight.dim() > 1
    slopes = weight if alike else weight.reshape(channels if weight.numel() > 1 else ())
    return _unbent(slopes.double(), run.output.double())


@labels(nn.ELU, nn.CELU, nn.SELU, *spellings("elu celu selu"))
def exponential_unit(call: Call) -> Verdict:
    """Linear above zero and exponential below: one-to-one for positive `alpha`."""
    alpha, scale, input_scale = _exponential_parameters(call)
    if not math.isfinite(alpha * scale * input_scale):
        return unproven("scales that are not finite are covered by no rule")
    if scale <= 0:
        return unproven("scales that are not positive are covered by no rule")
    if alpha * input_scale == 0:
        return relu(call)
    if alpha * input_scale < 0:
        return one_bit_each(call, "a negative alpha folds the axis: one bit per element", REFINED)
    why = "it is strictly increasing, and undone by the logarithm below zero"
    undo = undo_by(partial(_exponential_unit_inverse, alpha, scale, input_scale))
    dtype = call.value.dtype
    last = math.log(torch.finfo(dtype).eps) / input_scale
    domain = f"x > {last:.3g}, where the result rounds to its limit in {short(dtype)}"
    return preserves(why, confidence=REFINED, undo=undo, domain=domain)


def _exponential_parameters(call: Call) -> tuple[float, float, float]:
    """Return the height, the scale of the result, and the scale of the operand below zero."""
    name = plain_name(call)
    if name == "selu":
        return _SELU_ALPHA, _SELU_SCALE, 1.0
    alpha = call.option(1, "alpha", 1.0)
    if name == "celu":
        return alpha, 1.0, 1 / alpha
    positions: Callable[..., Any] = call.argument
    aten = isinstance(call.node.target, torch._ops.OpOverload)
    return (alpha, positions(2, "scale", 1.0), positions(3, "input_scale", 1.0)) if aten else (alpha, 1.0, 1.0)


def _exponential_unit_inverse(alpha: float, scale: float, input_scale: float, y: Tensor) -> Tensor:
    y = y / scale
    return torch.where(y > 0, y, torch.log1p(y / alpha) / input_scale)


@labels(nn.GLU, *spellings("glu"))
def gated_linear_unit(call: Call) -> Verdict:
    """Multiplies one half of the operand by the sigmoid of the other."""
    return fewer_elements(call, "two elements become one product")


@labels(_TRANSFORMERS + "LinearActivation")
def linear_activation(_: Call) -> Verdict:
    """Changes nothing."""
    return unchanged("it returns its operand")


@axis_rule(nn.GELU, nn.SiLU, nn.Mish, nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.Softplus, nn.Tanh, nn.Sigmoid, nn.ELU)
@axis_rule(nn.CELU, nn.SELU, nn.LogSigmoid, nn.Softsign, nn.Hardtanh, nn.Hardsigmoid, nn.Hardswish, nn.Threshold)
@axis_rule(nn.Hardshrink, nn.Softshrink, F.gelu, F.silu, F.mish, F.relu, F.relu6, F.leaky_relu, F.softplus, F.tanh)
@axis_rule(F.sigmoid, F.elu, F.celu, F.selu, F.logsigmoid, F.softsign, F.hardtanh, F.hardsigmoid, F.hardswish)
@axis_rule(F.threshold, ops="relu tanh sigmoid erf atan hardshrink")
@axis_rule(*(_TRANSFORMERS + name for name in ("GELUActivation", "NewGELUActivation", "FastGELUActivation")))
@axis_rule(*(_TRANSFORMERS + name for name in ("QuickGELUActivation", "AccurateGELUActivation", "SiLUActivation")))
@axis_rule(*(_TRANSFORMERS + name for name in ("ReLUSquaredActivation", "MishActivation", "GELUTanh")))
def activation_axes(call: AxisCall) -> Effect:
    """Maps every axis."""
    return mapped(call.operand.layout, "it acts on each element on its own")


@axis_rule(nn.PReLU, F.prelu, torch.prelu)
def prelu_axes(call: AxisCall) -> Effect:
    """Maps every axis; each channel has a slope of its own."""
    return mapped(call.operand.layout, "it acts on each element on its own")


@axis_rule(nn.GLU, F.glu)
def glu_axes(call: AxisCall) -> Effect:
    """Maps every axis; along the halved one the facts of the two halves meet under new indices."""
    place = call.option("dim", 1, -1) % call.operand.rank
    layout = list(call.operand.layout)
    whole = layout[place]
    said = claims((axis for axis in layout if axis is not whole), Behaviour.MAP, "each row is gated on its own")
    why = "an element and its gate lie half the axis apart"
    (layout[place],) = call.axes.fresh([call.shape[place]])
    call.axes.call(layout[place], "" if whole is None else call.axes.name(whole))
    said += renumbered(whole, layout[place], why, Behaviour.BARRIER)
    return Effect(tuple(said), (tuple(layout),))
