"""Normalisations: statistics that the operator yields anyway rebuild the input."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator, Sequence

import torch
from torch import fx, nn
from torch.nn import functional as F

from bwsk_fx.rules.axis import AxisCall, Behaviour, Effect, along, axis_rule, mapped
from bwsk_fx.rules.inverse import Inverse, WitnessWriter, calls, inverts
from bwsk_fx.rules.registry import Call, by_products, labels, preserves, unproven
from bwsk_fx.rules.sizes import elements
from bwsk_fx.verdict import REFINED, Verdict

aten = torch.ops.aten
_HALVES = (torch.bfloat16, torch.float16)

_DOMAIN = "where no scale is zero"


@labels(nn.LayerNorm, F.layer_norm, torch.layer_norm)
def layer_norm(call: Call) -> Verdict:
    """LayerNorm: mean and rstd undo it."""
    rows = _rows(call)
    witness = by_products("mean", "rstd", elements=None if rows is None else 2 * rows)
    return preserves(f"mean and rstd, which it yields anyway, rebuild the operand {_DOMAIN}", witness)


@labels(nn.RMSNorm, F.rms_norm, torch.rms_norm)
def rms_norm(call: Call) -> Verdict:
    """RMSNorm: rstd undoes it."""
    witness = by_products("rstd", elements=_rows(call))
    return preserves(f"rstd, which it yields anyway, rebuilds the operand {_DOMAIN}", witness)


@labels(nn.GroupNorm, F.group_norm, torch.group_norm)
def group_norm(call: Call) -> Verdict:
    """GroupNorm: the mean and rstd of each group undo it."""
    groups = call.option(1, "num_groups")
    witness = by_products("mean", "rstd", elements=2 * groups)
    return preserves(f"the {groups} means and rstds, which it yields anyway, rebuild the operand {_DOMAIN}", witness)


@labels(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
def batch_norm(call: Call) -> Verdict:
    """BatchNorm: the batch's statistics undo it in train mode, the running ones in eval mode."""
    if call.module.training or call.module.running_mean is None:
        # The statistics belong to the whole batch: per sample they are nothing, so no number is given.
        witness = by_products("mean", "rstd")
        return preserves(f"the batch's mean and rstd rebuild the operand {_DOMAIN}", witness, REFINED)
    return preserves(f"running statistics make it a static affine map, invertible {_DOMAIN}", confidence=REFINED)


@labels(F.batch_norm)
def functional_batch_norm(call: Call) -> Verdict:
    """`F.batch_norm`, whose mode is an argument."""
    training = call.argument(5, "training", False)
    if not isinstance(training, bool):
        return unproven("its mode is not a constant")
    if training:
        return preserves(
            f"the batch's mean and rstd rebuild the operand {_DOMAIN}", by_products("mean", "rstd"), REFINED
        )
    return preserves(f"running statistics make it a static affine map, invertible {_DOMAIN}", confidence=REFINED)


@labels(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
def instance_norm(call: Call) -> Verdict:
    """InstanceNorm: the mean and rstd of each channel undo it."""
    witness = by_products("mean", "rstd", elements=2 * call.module.num_features)
    return preserves(f"the channels' means and rstds rebuild the operand {_DOMAIN}", witness)


def _rows(call: Call) -> int | None:
    shape = call.option(1, "normalized_shape", ())
    total = elements(call.before)
    return total // math.prod(shape) if total is not None and shape else None


@axis_rule(nn.LayerNorm, F.layer_norm, torch.layer_norm, nn.RMSNorm, F.rms_norm, torch.rms_norm)
def last_dims_axes(call: AxisCall) -> Effect:
    """Waits for the normalised dimensions and maps the others."""
    shape = call.option("normalized_shape", 1)
    count = len(shape) if isinstance(shape, (tuple, list)) else 1
    rank = call.operand.rank
    call.axes.call(call.operand.layout[-1], "feature")
    return _normalized(call, range(rank - count, rank), "each vector is normalised on its own")


@axis_rule(nn.GroupNorm, F.group_norm, torch.group_norm)
def group_norm_axes(call: AxisCall) -> Effect:
    """Waits for channels and positions; samples are normalised on their own."""
    return _normalized(call, range(1, call.operand.rank), "each sample is normalised on its own")


@axis_rule(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
def instance_norm_axes(call: AxisCall) -> Effect:
    """Waits for positions; samples and channels are normalised on their own."""
    positions = range(call.operand.rank - len(call.operand.layout[2:]), call.operand.rank)
    return _normalized(call, positions, "each channel of each sample is normalised on its own")


@axis_rule(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
def batch_norm_axes(call: AxisCall) -> Effect:
    """Waits for batch and positions in train mode; in eval mode its statistics are constants."""
    if not call.target.training and call.target.running_mean is not None:
        return mapped(call.operand.layout, "running statistics make it a static affine map")
    dims = [dim for dim in range(call.operand.rank) if dim != 1]
    return _normalized(call, dims, "each channel has statistics of its own")


def _normalized(call: AxisCall, dims: Sequence[int], others: str) -> Effect:
    why = (
        "mean and variance need the whole axis before any element is scaled; the statistics alone would be a REDUCE of "
        "partial sums"
    )
    return along(call, dims, Behaviour.BARRIER, why, others, keeps=True)


@inverts(aten.native_layer_norm.default)
def layer_norm_inverse(node: fx.Node, witnesses: WitnessWriter) -> Iterator[Inverse]:
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
