"""Inverses of sums, scalings, LayerNorm and random masks."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator

import torch
from torch import fx

from bwsk_fx.rules.bits import pack_bits, unpack_bits
from bwsk_fx.rules.inverse import Emit, Inverse, WitnessWriter, calls, inverts

aten = torch.ops.aten
_HALVES = (torch.bfloat16, torch.float16)


@inverts(aten.add.Tensor, aten.sub.Tensor)
def residual(node: fx.Node, _: WitnessWriter) -> Iterator[Inverse]:
    """Either operand of a sum is the result less the other; the other operand is the witness."""
    left, right = node.args
    if node.kwargs or not _same_values(node, left):
        return
    undo, redo = (aten.sub.Tensor, aten.add.Tensor)
    if node.target is aten.sub.Tensor:
        undo, redo = redo, undo
    yield Inverse(left, (node, right) if isinstance(right, fx.Node) else (node,), _undo(undo, right), False, rule="sum")  # type: ignore[arg-type]
    if _same_values(node, right):
        tails = (node, left) if node.target is aten.add.Tensor else (left, node)
        yield Inverse(right, tails, calls(aten.sub.Tensor), False, rule="sum")  # type: ignore[arg-type]


@inverts(aten.mul.Tensor, aten.div.Tensor)
def scaling(node: fx.Node, _: WitnessWriter) -> Iterator[Inverse]:
    """A product with a non-zero number is undone by the quotient, and the other way round."""
    operand, factor = node.args
    if isinstance(factor, (int, float)) and factor and _same_values(node, operand):
        undo = aten.div.Tensor if node.target is aten.mul.Tensor else aten.mul.Tensor
        yield Inverse(operand, (node,), calls(undo, factor), False, rule="scaling")  # type: ignore[arg-type]


@inverts(aten.native_layer_norm.default)
def layer_norm(node: fx.Node, witnesses: WitnessWriter) -> Iterator[Inverse]:
    """LayerNorm through its normalised input x̂, kept in the compute dtype beside mean and rstd.

    y = x̂ γ + β and x = x̂ / rstd + mean. Neither divides by γ, which would amplify rounding where γ is small.
    """
    operand, shape, gamma, beta, eps = node.args
    parts = {user.args[1]: user for user in node.users}
    if not {0, 1, 2} <= set(parts):
        return
    output, mean, rstd = parts[0], parts[1], parts[2]
    normalised = witnesses.call(node, aten.native_layer_norm.default, operand, shape, None, None, eps)
    xhat = witnesses.call(normalised, operator.getitem, normalised, 0)
    narrow = _compute_dtype(output)
    if narrow is not None:
        xhat = witnesses.call(xhat, aten._to_copy.default, xhat, dtype=narrow)
    wide = operand.meta["val"].dtype  # type: ignore[union-attr]
    yield Inverse(operand, (xhat, mean, rstd), calls(denormalise, wide), False, rule="LayerNorm input from x̂")  # type: ignore[arg-type]
    affine = tuple(part for part in (gamma, beta) if isinstance(part, fx.Node))
    if len(affine) == 2:
        rescale = calls(scale_and_shift, output.meta["val"].dtype)
        yield Inverse(output, (xhat, *affine), rescale, False, rule="LayerNorm output from x̂")
    elif not affine:
        cast = calls(aten._to_copy.default, dtype=output.meta["val"].dtype)
        yield Inverse(output, (xhat,), cast, False, rule="LayerNorm output from x̂")


@inverts(aten.native_dropout.default, aten.bernoulli.p)
def random_mask(node: fx.Node, witnesses: WitnessWriter) -> Iterator[Inverse]:
    """A dropout mask from one bit per element: forward and backward see the very same mask."""
    mask = node
    if node.target is aten.native_dropout.default:
        masks = [user for user in node.users if user.args[1] == 1]
        if not masks:
            return
        mask = masks[0]
    value = mask.meta["val"]
    bits = witnesses.call(mask, pack_bits, mask)
    yield Inverse(mask, (bits,), calls(unpack_bits, tuple(value.shape), value.dtype), True, rule="packed mask")


def denormalise(xhat: torch.Tensor, mean: torch.Tensor, rstd: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return x = x̂ / rstd + mean in `dtype`; `mean` and `rstd` broadcast over the normalised dimensions."""
    return torch.addcdiv(mean, xhat.to(mean.dtype), rstd).to(dtype)


def scale_and_shift(xhat: torch.Tensor, gamma: torch.Tensor, beta: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return y = x̂ γ + β in `dtype`, computed in the dtype of γ."""
    return torch.addcmul(beta, xhat.to(gamma.dtype), gamma).to(dtype)


def _compute_dtype(output: fx.Node) -> torch.dtype | None:
    """Return the half dtype that every user of a LayerNorm output casts it to, if there is one."""
    dtypes = {user.meta["val"].dtype if user.target is aten._to_copy.default else None for user in output.users}
    dtype = dtypes.pop() if len(dtypes) == 1 else None
    return dtype if dtype in _HALVES else None


def _same_values(node: fx.Node, operand: object) -> bool:
    """Whether `operand` has the shape and dtype of the result, so that subtracting restores it."""
    if not isinstance(operand, fx.Node):
        return False
    result, value = node.meta["val"], operand.meta["val"]
    return value.shape == result.shape and value.dtype == result.dtype and value.dtype.is_floating_point


def _undo(target: Callable, other: object) -> Emit:
    return calls(target) if isinstance(other, fx.Node) else calls(target, other)
