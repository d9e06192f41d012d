"""Inverses of normalisations, all through x̂, the normalised input before scale and shift.

With x̂ and the statistics, the input is x̂ / rstd + mean and the output x̂ γ + β. Neither divides by γ, which would
amplify rounding where γ is small. Where every user casts the output to one half dtype, x̂ is kept in that dtype. The
input then comes back with that dtype's precision, so that it must not reach anything that needs more: a residual
stream that normalisations alone read does not, one whose sine is differentiated does.

BatchNorm is left out: in train mode it writes into buffers, or has x̂ in the dtype and size of its input.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, fx

from bwsk_fx.rules.inverse import Emit, Inverse, WitnessWriter, calls, inverts, passes_on

aten = torch.ops.aten
_HALVES = (torch.bfloat16, torch.float16)
_SUMS = (aten.add.Tensor, aten.sub.Tensor)
# What RMSNorm and its backward pass read its input by, where it is no operator of its own.
_RMS_NORM_PARTS = (aten.mul.Tensor, aten.mul.Scalar, aten.pow.Tensor_Scalar)
# With their backward passes. They are as exact as x̂ is.
_NORMALISATIONS = frozenset(
    packet
    for name in ("native_layer_norm", "native_group_norm", "_fused_rms_norm")
    for packet in (getattr(aten, name), getattr(aten, f"{name}_backward"))
)


@inverts(aten.native_layer_norm.default)
def layer_norm_inverse(node: fx.Node, witnesses: WitnessWriter) -> Iterator[Inverse]:
    """LayerNorm's input and output from x̂, beside mean and rstd."""
    operand, shape, gamma, beta, eps = node.args
    parts = _parts(node)
    if not {0, 1, 2} <= set(parts):
        return
    output, mean, rstd = parts[0], parts[1], parts[2]
    normalised = witnesses.call(node, aten.native_layer_norm.default, operand, shape, None, None, eps)
    xhat = _kept(witnesses.call(normalised, operator.getitem, normalised, 0), operand, output, witnesses)  # type: ignore[arg-type]
    wide = operand.meta["val"].dtype  # type: ignore[union-attr]
    yield Inverse(operand, (xhat, mean, rstd), calls(denormalise, wide), False, rule="LayerNorm input from x̂")  # type: ignore[arg-type]
    yield from _output_from(xhat, output, gamma, beta, "LayerNorm output from x̂")


@inverts(aten.native_group_norm.default)
def group_norm_inverse(node: fx.Node, witnesses: WitnessWriter) -> Iterator[Inverse]:
    """GroupNorm's input and output from x̂, beside mean and rstd, which have one element per sample and group."""
    operand, gamma, beta, *sizes = node.args
    parts = _parts(node)
    if not {0, 1, 2} <= set(parts):
        return
    output, mean, rstd = parts[0], parts[1], parts[2]
    normalised = witnesses.call(node, aten.native_group_norm.default, operand, None, None, *sizes)
    xhat = _kept(witnesses.call(normalised, operator.getitem, normalised, 0), operand, output, witnesses)  # type: ignore[arg-type]
    value = operand.meta["val"]  # type: ignore[union-attr]
    back = calls(denormalise_groups, value.dtype)
    yield Inverse(operand, (xhat, mean, rstd), back, False, rule="GroupNorm input from x̂")  # type: ignore[arg-type]
    columns = [-1, *(1 for _ in value.shape[2:])]
    yield from _output_from(xhat, output, gamma, beta, "GroupNorm output from x̂", columns)


@inverts(aten._fused_rms_norm.default)
def fused_rms_norm_inverse(node: fx.Node, witnesses: WitnessWriter) -> Iterator[Inverse]:
    """RMSNorm's input and output from x̂, beside rstd, where it is one operator."""
    operand, shape, gamma, eps = node.args
    parts = _parts(node)
    if not {0, 1} <= set(parts):
        return
    output, rstd = parts[0], parts[1]
    normalised = witnesses.call(node, aten._fused_rms_norm.default, operand, shape, None, eps)
    xhat = _kept(witnesses.call(normalised, operator.getitem, normalised, 0), operand, output, witnesses)  # type: ignore[arg-type]
    wide = operand.meta["val"].dtype  # type: ignore[union-attr]
    yield Inverse(operand, (xhat, rstd), calls(unscale, wide), False, rule="RMSNorm input from x̂")  # type: ignore[arg-type]
    yield from _output_from(xhat, output, gamma, None, "RMSNorm output from x̂")


def rms_norm_inverse(node: fx.Node, witnesses: WitnessWriter) -> Iterator[Inverse]:
    """The input of x̂ = x · rstd, where rstd is the result of a `rsqrt`, which is positive: x = x̂ / rstd.

    RMSNorm is traced as such a product where it is not one operator. x̂ may then be kept in the dtype to which its
    users, past the scale, cast it.
    """
    operand, rstd = node.args
    if getattr(operand, "target", None) is aten.rsqrt.default:
        operand, rstd = rstd, operand
    if not isinstance(operand, fx.Node) or getattr(rstd, "target", None) is not aten.rsqrt.default:
        return
    value, wide = node.meta["val"], operand.meta["val"]
    if (value.shape, value.dtype) != (wide.shape, wide.dtype) or rstd is operand:
        return
    xhat, back = _kept(node, operand, node, witnesses), calls(unscale, wide.dtype)
    yield Inverse(operand, (xhat, rstd), back, False, rule="RMSNorm input from x̂", magnifies=True)  # type: ignore[arg-type]
    if xhat is not node:
        cast = calls(aten._to_copy.default, dtype=value.dtype)
        yield Inverse(node, (xhat,), cast, False, rule="RMSNorm x̂ from its half")


def denormalise(xhat: Tensor, mean: Tensor, rstd: Tensor, dtype: torch.dtype) -> Tensor:
    """Return x = x̂ / rstd + mean in `dtype`; `mean` and `rstd` broadcast over the normalised dimensions."""
    return torch.addcdiv(mean, xhat.to(mean.dtype), rstd).to(dtype)


def denormalise_groups(xhat: Tensor, mean: Tensor, rstd: Tensor, dtype: torch.dtype) -> Tensor:
    """Return x = x̂ / rstd + mean in `dtype`; x̂ is (N, C, …), the statistics are (N, groups)."""
    channels, rest = xhat.shape[1], [1] * (xhat.dim() - 2)
    mean, rstd = (part.repeat_interleave(channels // part.shape[1], dim=1) for part in (mean, rstd))
    return denormalise(xhat, mean.view(*mean.shape, *rest), rstd.view(*rstd.shape, *rest), dtype)


def unscale(xhat: Tensor, rstd: Tensor, dtype: torch.dtype) -> Tensor:
    """Return x = x̂ / rstd in `dtype`; `rstd` broadcasts over the normalised dimensions."""
    return (xhat.to(rstd.dtype) / rstd).to(dtype)


def scale_and_shift(xhat: Tensor, gamma: Tensor, beta: Tensor, dtype: torch.dtype) -> Tensor:
    """Return y = x̂ γ + β in `dtype`, computed in the dtype of γ."""
    return torch.addcmul(beta, xhat.to(gamma.dtype), gamma).to(dtype)


def scale(xhat: Tensor, gamma: Tensor, dtype: torch.dtype) -> Tensor:
    """Return y = x̂ γ in `dtype`, computed in the dtype of γ."""
    return (xhat.to(gamma.dtype) * gamma).to(dtype)


def _parts(node: fx.Node) -> dict[object, fx.Node]:
    """Return the results of a node by their index, those that have a user."""
    return {user.args[1]: user for user in node.users if user.target is operator.getitem}


def _output_from(
    xhat: fx.Node, output: fx.Node, gamma: object, beta: object, rule: str, columns: Sequence[int] | None = None
) -> Iterator[Inverse]:
    """Yield y = x̂ γ + β; `columns` is the shape in which γ and β broadcast, None for their own."""
    affine = tuple(part for part in (gamma, beta) if isinstance(part, fx.Node))
    dtype = output.meta["val"].dtype
    if not affine:
        again: Emit = calls(aten._to_copy.default, dtype=dtype)
    elif isinstance(gamma, fx.Node):
        function = scale_and_shift if len(affine) == 2 else scale
        again = _with_views(function, dtype, columns)
    else:
        return
    yield Inverse(output, (xhat, *affine), again, False, rule=rule)


def _with_views(function: object, dtype: torch.dtype, columns: Sequence[int] | None) -> Emit:
    if columns is None:
        return calls(function, dtype)  # type: ignore[arg-type]

    def emit(graph: fx.Graph, tails: Sequence[fx.Node]) -> fx.Node:
        xhat, *affine = tails
        spread = [graph.call_function(aten.view.default, (part, list(columns))) for part in affine]
        return graph.call_function(function, (xhat, *spread, dtype))  # type: ignore[arg-type]

    return emit


def _kept(xhat: fx.Node, operand: fx.Node, output: fx.Node, witnesses: WitnessWriter) -> fx.Node:
    """Return x̂ in the dtype in which it is kept; an existing cast of it where there is one."""
    dtypes = _dtypes_read(output, witnesses, scaled=output is xhat)
    narrow = dtypes.pop() if len(dtypes) == 1 else None
    if narrow not in _HALVES or xhat.meta["val"].dtype == narrow or not _bears_rounding(operand, witnesses):
        return xhat
    casts = (user for user in xhat.users if user.target is aten._to_copy.default and user.meta["val"].dtype == narrow)
    return next(casts, None) or witnesses.call(xhat, aten._to_copy.default, xhat, dtype=narrow)


def _dtypes_read(value: fx.Node, witnesses: WitnessWriter, scaled: bool) -> set[torch.dtype | None]:
    """Return the dtypes in which a value and its views are read; None where they are read as they are.

    Args:
        value: The value.
        witnesses: Of its graph.
        scaled: Whether the value is x̂ itself: look behind its product with γ, and past the operators of the backward
            pass, which read x̂ for the gradient of γ.
    """
    found: set[torch.dtype | None] = set()
    for user in value.users:
        backward = scaled and witnesses.runs_backwards(user)
        if user.target is aten._to_copy.default:
            found.add(user.meta["val"].dtype)
        elif passes_on(user) or (scaled and user.target is aten.mul.Tensor and not backward):
            found |= _dtypes_read(user, witnesses, scaled)
        elif not backward:
            found.add(None)
    return found


def _bears_rounding(operand: fx.Node, witnesses: WitnessWriter) -> bool:
    """Whether normalisations alone differentiate a value, and what it is summed with and into.

    A sum gives each of its operands from the others, so that rounding of one value reaches all of them.
    """
    stream = _stream(operand)
    for value in stream:
        has_rms_norm = any(map(_is_rms_norm, value.users))
        for user in value.users.keys() - stream:
            if has_rms_norm and user.target in _RMS_NORM_PARTS:
                continue
            if _needs_precision(user, witnesses):
                return False
    return True


def _stream(value: fx.Node) -> set[fx.Node]:
    """Return the values of its dtype that sums and views connect with `value`, itself included."""
    stream, pending = {value}, [value]
    while pending:
        current = pending.pop()
        made_of = current.all_input_nodes if current.target in _SUMS or passes_on(current) else []
        made_into = [user for user in current.users if user.target in _SUMS or passes_on(user)]
        for other in {*made_of, *made_into} - stream:
            if getattr(other.meta.get("val"), "dtype", None) == value.meta["val"].dtype:
                stream.add(other)
                pending.append(other)
    return stream


def _needs_precision(reader: fx.Node, witnesses: WitnessWriter) -> bool:
    """Whether the backward pass reads what is computed from a value, on this side of a normalisation or a cast."""
    pending, seen = [reader], {reader}
    while pending:
        node = pending.pop()
        half = node.target is aten._to_copy.default and node.meta["val"].dtype in _HALVES
        if half or getattr(node.target, "overloadpacket", None) in _NORMALISATIONS or node.op != "call_function":
            continue
        if witnesses.runs_backwards(node):
            return True
        pending += node.users.keys() - seen
        seen |= node.users.keys()
    return False


def _is_rms_norm(node: fx.Node) -> bool:
    operands = node.all_input_nodes
    return node.target is aten.mul.Tensor and any(operand.target is aten.rsqrt.default for operand in operands)
