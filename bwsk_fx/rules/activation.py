"""Activation functions."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional as F

from bwsk_fx.rules.axis import AxisCall, Behaviour, Effect, along, axis_rule, mapped
from bwsk_fx.rules.registry import Call, by_products, erases, labels, preserves
from bwsk_fx.rules.sizes import as_int
from bwsk_fx.verdict import REFINED, Verdict

_TRANSFORMERS = "transformers.activations."


@labels(nn.GELU, nn.SiLU, nn.Mish, F.gelu, F.silu, F.mish)
@labels(*(_TRANSFORMERS + name for name in ("GELUActivation", "NewGELUActivation", "FastGELUActivation", "GELUTanh")))
@labels(*(_TRANSFORMERS + name for name in ("QuickGELUActivation", "AccurateGELUActivation", "SiLUActivation")))
def two_branches(call: Call) -> Verdict:
    """Falls, then rises: an output near zero has two inputs."""
    return erases("it has two monotone branches, and one bit per element tells them apart", bits=call.elements())


@labels(nn.ReLU, F.relu, ops="relu")
def relu(call: Call) -> Verdict:
    """Zeroes what is negative: half of the elements, if signs are even."""
    total = call.elements()
    half = None if total is None else total / 2
    return erases("every negative element becomes zero: half of them, if both signs are equally frequent", half)


@labels(nn.ReLU6, nn.Hardtanh, nn.Hardsigmoid, nn.Hardswish, nn.Hardshrink, nn.Softshrink, nn.Threshold)
@labels(F.relu6, F.hardtanh, F.hardsigmoid, F.hardswish, F.threshold, _TRANSFORMERS + "ReLUSquaredActivation")
@labels(ops="hardshrink")
def flat_parts(_: Call) -> Verdict:
    """Constant over whole intervals; how many elements lie there depends on the data."""
    return erases("it is constant over whole intervals")


@labels(nn.Tanh, nn.Sigmoid, nn.ELU, nn.CELU, nn.SELU, nn.Softsign)
@labels(F.tanh, F.sigmoid, F.elu, F.celu, F.selu, F.softsign, ops="tanh sigmoid erf atan")
def saturates(_: Call) -> Verdict:
    """One-to-one over the reals, but not in floating point: large inputs round to one output."""
    return erases("it saturates, so that large inputs round to one and the same output")


@labels(nn.Softplus, F.softplus)
def softplus(_: Call) -> Verdict:
    """Undone by x = y + log(1 - exp(-y))."""
    return preserves("it is strictly increasing and keeps its relative precision: x = y + log(1 - exp(-y))")


@labels(nn.LogSigmoid, F.logsigmoid)
def log_sigmoid(_: Call) -> Verdict:
    """The mirror image of softplus: -softplus(-x)."""
    return preserves("it is strictly increasing and keeps its relative precision: x = y - log(1 - exp(y))")


@labels(nn.LeakyReLU, F.leaky_relu)
def leaky_relu(call: Call) -> Verdict:
    """Invertible for a positive slope; with slope zero it is ReLU, with a negative one it folds."""
    slope = call.option(1, "negative_slope", 0.01)
    if slope > 0:
        return preserves(
            f"both slopes are positive (1 and {slope}), so dividing by the slope undoes it", confidence=REFINED
        )
    if slope == 0:
        return relu(call)
    return erases("a negative slope folds the axis: one bit per element", bits=call.elements(), confidence=REFINED)


@labels(nn.PReLU, F.prelu)
def prelu(_: Call) -> Verdict:
    """Invertible as long as the learned slopes are positive."""
    return preserves("dividing by the slope undoes it where every learned slope is positive, which certify checks")


@labels(nn.Softmax, nn.LogSoftmax, F.softmax, F.log_softmax, ops="softmax log_softmax")
def softmax(call: Call) -> Verdict:
    """Log-probabilities plus the logsumexp of each row are the logits."""
    result, total, width = call.value, call.elements(), as_int(call.before.shape[_dim(call)])
    if result.is_floating_point() and torch.finfo(result.dtype).eps > torch.finfo(call.before.dtype).eps:
        return erases("it also narrows the dtype", bits=narrowing(call, total), confidence=REFINED)
    rows = None if total is None or width is None else total // width
    witness = by_products("logsumexp", elements=rows)
    return preserves("log of the result plus the logsumexp of each row is the operand, short of underflow", witness)


def narrowing(call: Call, total: int | None) -> float | None:
    """Return the mantissa bits per sample between the first operand's dtype and the result's."""
    bits = math.log2(torch.finfo(call.value.dtype).eps / torch.finfo(call.before.dtype).eps)
    return None if total is None else total * bits


def _dim(call: Call) -> int:
    dim = call.option(1, "dim", -1)
    return dim if isinstance(dim, int) else -1


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


@axis_rule(nn.Softmax, nn.LogSoftmax, F.softmax, F.log_softmax, ops="softmax log_softmax")
def softmax_axes(call: AxisCall) -> Effect:
    """Waits for the axis that is normalised."""
    why = "the normaliser needs the whole axis; merging the logsumexp of each shard would make it a REDUCE"
    return along(call, call.dims(), Behaviour.BARRIER, why, "each row is on its own", keeps=True)
