"""Inverses of activation functions: the input from the output, with what tells two branches apart where there are two.

None of them is exact. They run in float32, in float64 for float64. Left out on purpose: `tanh` and `sigmoid`, whose
inputs are ill-conditioned where they saturate, and whose backward passes read the output anyway; ReLU and hardtanh,
which erase (their backward passes read masks, see `planning.simplify`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from bwsk_fx.rules.bits import pack_bits, unpack_bits
from bwsk_fx.rules.inverse import Inverse, WitnessWriter, calls, inverts
from bwsk_fx.rules.inverse_masks import packed

aten = torch.ops.aten
_HALVES = (torch.bfloat16, torch.float16)
# Where a slope that vanishes at the bottom is taken to be a straight line.
_NEAR_BOTTOM = 0.03
# A finer place than the side: how many there are, how wide the range is on which they repeat, and how far from the
# bottom they are looked at. Both in units of the error that rounding of y makes in x at the bottom.
_PLACES, _RING, _WINDOW = 2**14, 12.0, 600.0


@dataclass(frozen=True)
class Valley:
    """A function x S(x) that falls from zero to its only minimum and rises without end.

    Attributes:
        gate: Returns S and its derivative, to full relative precision left of zero.
        bottom: Where the minimum is.
        depth: The minimum, which is negative.
        curvature: The second derivative there.
        end: Left of it the value and its slope are zero for all purposes, and the gate loses its precision.
        end_level: The square root of log(depth / value) there.
    """

    gate: Callable[[Tensor], tuple[Tensor, Tensor]]
    bottom: float
    depth: float
    curvature: float
    end: float
    end_level: float


def _normal_gate(x: Tensor) -> tuple[Tensor, Tensor]:
    density = torch.exp(-0.5 * x * x) * (1 / math.sqrt(2 * math.pi))
    return torch.special.erfc(x * -math.sqrt(0.5)) * 0.5, density


def _tanh_gate(x: Tensor) -> tuple[Tensor, Tensor]:
    twice, cubic = 2 * math.sqrt(2 / math.pi), 0.044715
    argument = twice * (x + cubic * x * x * x)
    gate = torch.sigmoid(argument)
    return gate, twice * (1 + 3 * cubic * x * x) * gate * torch.sigmoid(-argument)


def _sigmoid_gate(x: Tensor) -> tuple[Tensor, Tensor]:
    gate = torch.sigmoid(x)
    return gate, gate * torch.sigmoid(-x)


# Bottom, depth, curvature, end and its level, from a bisection in float64.
VALLEYS = {
    "gelu": Valley(
        _normal_gate, -0.7517915246935645, -0.16997120747990363, 0.43149399231404695, -12.0, 8.435261710684458
    ),
    "gelu_tanh": Valley(
        _tanh_gate, -0.7524614220710162, -0.17004075057125406, 0.4304000910248586, -9.0, 7.900040595998609
    ),
    "silu": Valley(
        _sigmoid_gate, -1.278464542761074, -0.27846454276107385, 0.2178117057198001, -80.0, 8.622036234125037
    ),
}


@inverts(aten.gelu.default)
def gelu_inverse(node: fx.Node, witnesses: WitnessWriter) -> Iterator[Inverse]:
    """GELU's input from its output and the side of its minimum, near -0.7518, or near -0.7525 with `tanh`.

    PyTorch's GELU itself loses digits left of about -3 in float32, since 1 + erf cancels, and gives zero left of -5.5.
    There the slope that belongs to the rebuilt input is off by up to 4e-6, which matters only to a module whose
    activations are nearly all there.
    """
    exact = node.kwargs.get("approximate", "none") == "none"
    yield from _from_side(node, witnesses, "gelu" if exact else "gelu_tanh")


@inverts(aten.silu.default)
def silu_inverse(node: fx.Node, witnesses: WitnessWriter) -> Iterator[Inverse]:
    """SiLU's input from its output and the side of its minimum, near -1.2785."""
    yield from _from_side(node, witnesses, "silu")


def _from_side(node: fx.Node, witnesses: WitnessWriter, name: str) -> Iterator[Inverse]:
    """Yield x from y and a witness of which of two inputs it was.

    The slope is zero at the bottom, so that an error of ε in y becomes one of about √(2 ε / curvature) in x there. In
    half precision gradients hardly notice, and one bit per element tells the sides apart. In float32 all other rounding
    is so much smaller that they do (measured: up to 4.6 times eager's error), so that two bytes per element hold the
    side and a finer place.
    """
    operand: fx.Node = node.args[0]  # type: ignore[assignment]
    rule = f"{name} input from output"
    if node.meta["val"].dtype not in _HALVES:
        code = witnesses.call(node, side_and_place, operand, name)
        yield Inverse(operand, (node, code), calls(from_side_and_place, name), False, rule=rule, magnifies=True)
        return
    side = witnesses.call(node, aten.gt.Scalar, operand, VALLEYS[name].bottom)
    for bits in packed(side, witnesses, pack_bits, unpack_bits, rule):

        def emit(graph: fx.Graph, tails: Sequence[fx.Node], bits: Inverse = bits) -> fx.Node:
            return graph.call_function(from_side, (tails[0], bits.emit(graph, tails[1:]), name))

        yield Inverse(operand, (node, *bits.tails), emit, False, rule=rule, magnifies=True)


def from_side(result: Tensor, right: Tensor, name: str) -> Tensor:
    """Return x with x S(x) = `result`, on the right of the bottom where `right` is true and on the left elsewhere.

    Newton's method on √Q(x) = t, where t² = Q is y - depth on the right and log(depth / y) on the left: both are
    quadratic at the bottom and x is a smooth function of t all the way, nearly a straight line for GELU's left branch.
    Where the result has underflowed to zero on the left, x is the valley's end, whose slope is zero like that of the
    true x.
    """
    valley, y = VALLEYS[name], _computed(result)
    level = torch.where(right, y - valley.depth, _log_over(valley, y)).clamp(min=0).sqrt()
    x = valley.bottom + torch.where(right, _right_guess(valley, level), _left_guess(valley, level))
    for _ in range(3 if y.dtype is torch.float32 else 5):
        x = x + _step(valley, x, y, level, right)
        x = torch.where(right, x.clamp(min=valley.bottom), x.clamp(min=valley.end, max=valley.bottom))
    # Beyond the gate's reach the function is the identity, at infinity too.
    return torch.where(y > -valley.end, y, x).to(result.dtype)


def side_and_place(operand: Tensor, name: str) -> Tensor:
    """Return an int16 per element: on which side of the bottom it is, and its place on a fine grid that repeats."""
    valley, x = VALLEYS[name], _computed(operand)
    pitch = _pitch(valley, x.dtype)
    place = torch.floor((x - valley.bottom).clamp(-1.0, 1.0) / pitch).remainder(_PLACES)
    return torch.where(x > valley.bottom, place + _PLACES, place).to(torch.int16)


def from_side_and_place(result: Tensor, code: Tensor, name: str) -> Tensor:
    """Return x like `from_side`; near the bottom, the nearest x on the grid that has the place in `code`."""
    valley, x = VALLEYS[name], from_side(result, code >= _PLACES, name)
    pitch = _pitch(valley, x.dtype)
    ahead = (code % _PLACES + 0.5) - (x - valley.bottom) / pitch
    nearest = (ahead + _PLACES / 2).remainder(_PLACES) - _PLACES / 2
    near = (x - valley.bottom).abs() < _WINDOW / _RING * _PLACES * pitch
    return torch.where(near, x + nearest * pitch, x)


def _pitch(valley: Valley, dtype: torch.dtype) -> float:
    """Return the distance of two places."""
    unit = math.sqrt(torch.finfo(dtype).eps * -valley.depth / valley.curvature)
    return _RING * unit / _PLACES


def _computed(value: Tensor) -> Tensor:
    return value if value.dtype is torch.float64 else value.float()


def _log_over(valley: Valley, y: Tensor) -> Tensor:
    """Return log(depth / y) for y < 0, at most what it is at the valley's end, and that from zero on."""
    return torch.log(valley.depth / y.clamp(max=-1e-37)).clamp(max=valley.end_level**2)


def _left_guess(valley: Valley, level: Tensor) -> Tensor:
    """Return a parabola through the bottom, with the right slope there, and through the end."""
    slope = math.sqrt(-2 * valley.depth / valley.curvature)
    bend = ((valley.bottom - valley.end) / valley.end_level - slope) / valley.end_level
    return -level * (slope + bend * level)


def _right_guess(valley: Valley, level: Tensor) -> Tensor:
    """Return a line with the right slope at the bottom, or the identity, whichever is nearer."""
    slope, identity = math.sqrt(2 / valley.curvature), level * level + (valley.depth - valley.bottom)
    return torch.where(level > slope, identity, torch.minimum(slope * level, identity))


def _step(valley: Valley, x: Tensor, y: Tensor, level: Tensor, right: Tensor) -> Tensor:
    """Return Newton's step; near the bottom, where it is 0 / 0, by the slope there."""
    gate, change = valley.gate(x)
    value, slope = x * gate, gate + x * change
    reached = torch.where(right, value - valley.depth, torch.log(valley.depth / torch.where(right, -1.0, value)))
    root = reached.clamp(min=0).sqrt()
    sides = (math.sqrt(2 / valley.curvature), -math.sqrt(-2 * valley.depth / valley.curvature))
    # Near zero y has a relative precision that its difference from the depth has not.
    steep = torch.where(right, (y - value) / slope, (level - root) * -2 * root * value / slope)
    flat = (x - valley.bottom).abs() < _NEAR_BOTTOM
    return torch.where(flat, (level - root) * torch.where(right, *sides), steep)


@inverts(aten.leaky_relu.default)
def leaky_relu_inverse(node: fx.Node, _: WitnessWriter) -> Iterator[Inverse]:
    """Leaky ReLU's input, for a positive slope: y, over the slope below zero."""
    (slope,) = _numbers(node, 0.01)
    if slope >= torch.finfo(node.meta["val"].dtype).tiny:
        rule = "leaky ReLU input from output"
        yield Inverse(node.args[0], (node,), calls(unbent, slope), False, rule=rule, magnifies=slope < 1)  # type: ignore[arg-type]


def unbent(result: Tensor, slope: float) -> Tensor:
    """Return x of y = x above zero and `slope` x below."""
    return torch.where(result < 0, result / slope, result)


@inverts(aten.elu.default, aten.celu.default)
def exponential_unit_inverse(node: fx.Node, _: WitnessWriter) -> Iterator[Inverse]:
    """The input of ELU, CELU and SELU, in float32 and float64: the logarithm below zero.

    y + α has lost its relative precision where x is below log ε, which is -16 in float32; x is at least about that.
    In half precision that begins at -5, too near to ordinary values.
    """
    alpha, scale, input_scale = _exponential_parameters(node)
    if node.meta["val"].dtype not in _HALVES and min(alpha, scale, input_scale) > 0:
        back = calls(unit_input, alpha, scale, input_scale)
        yield Inverse(node.args[0], (node,), back, False, rule="ELU input from output", magnifies=True)  # type: ignore[arg-type]


def _exponential_parameters(node: fx.Node) -> tuple[float, float, float]:
    if node.target is aten.celu.default:
        (alpha,) = _numbers(node, 1.0)
        return alpha, 1.0, 1.0 / alpha if alpha else 0.0
    alpha, scale, input_scale = _numbers(node, 1.0, 1.0, 1.0)
    return alpha, scale, input_scale


def unit_input(result: Tensor, alpha: float, scale: float, input_scale: float) -> Tensor:
    """Return x of y = `scale` x above zero and `scale` `alpha` (exp(`input_scale` x) - 1) below."""
    y = result / scale
    below = torch.log1p((y / alpha).clamp(min=torch.finfo(y.dtype).eps / 2 - 1)) / input_scale
    return torch.where(y > 0, y, below)


@inverts(aten.softplus.default)
def softplus_inverse(node: fx.Node, _: WitnessWriter) -> Iterator[Inverse]:
    """Softplus' input: x = y + log(1 - exp(-β y)) / β, which keeps the gradient's relative precision.

    A result that has underflowed to zero gives an x of about -87 / β, whose gradient is as good as zero.
    """
    beta, threshold = _numbers(node, 1.0, 20.0)
    # The branch below the threshold ends above the beginning of the linear one, by this much.
    overlap = math.log1p(math.exp(-threshold))
    if beta > 0 and overlap <= torch.finfo(node.meta["val"].dtype).eps ** 0.5 * threshold:
        back = calls(softplus_input, beta, threshold)
        yield Inverse(node.args[0], (node,), back, False, rule="softplus input from output", magnifies=True)  # type: ignore[arg-type]


def softplus_input(result: Tensor, beta: float, threshold: float) -> Tensor:
    """Return x of y = log(1 + exp(`beta` x)) / `beta`, or y = x above the threshold."""
    y = _computed(result)
    below = y + torch.log(-torch.expm1(-beta * y.clamp(min=torch.finfo(y.dtype).tiny))) / beta
    return torch.where(beta * y > threshold, y, below).to(result.dtype)


def _numbers(node: fx.Node, *defaults: float) -> list[float]:
    """Return the numbers behind a call's operand, with the operator's own for those that are left out."""
    given: list[Any] = list(node.args[1:])
    return [*given, *defaults[len(given) :]]
