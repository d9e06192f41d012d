"""Reductions and pooling: many elements become one."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from bwsk_fx.rules.axis import AxisCall, Behaviour, Effect, Value, along, axis_rule, broadcast
from bwsk_fx.rules.registry import Call, erases, fewer_elements, labels, preserves
from bwsk_fx.verdict import REFINED, Verdict


@labels(ops="sum mean amax amin prod logsumexp nansum nanmean median max min")
def reduce(call: Call) -> Verdict:
    """K by counting; over a dimension of size one it changes nothing."""
    missing = call.erased()
    if missing == 0 and len(call.operands) == 1:
        return preserves("the dimension has one element, so nothing is merged", confidence=REFINED)
    if missing is not None and missing > 0:
        return erases(f"it merges elements and erases {missing} per sample", missing, confidence=REFINED)
    return erases("it merges elements")


@labels(torch.functional.norm, torch.linalg.norm, torch.linalg.vector_norm, methods="norm", ops="var std")
def moment(call: Call) -> Verdict:
    """Norms and variances: even over one element the sign goes."""
    return fewer_elements(call, "it merges elements and drops their signs")


@labels(nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)
@labels(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)
@labels(nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d)
@labels(F.avg_pool1d, F.avg_pool2d, F.avg_pool3d, F.max_pool1d, F.max_pool2d, F.max_pool3d)
@labels(F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d)
@labels(F.adaptive_max_pool1d, F.adaptive_max_pool2d, F.adaptive_max_pool3d)
def pool(call: Call) -> Verdict:
    """Merges windows."""
    return fewer_elements(call, "it merges each window into one element")


@labels(ops="cumsum logcumsumexp")
def running(_: Call) -> Verdict:
    """Differences of neighbours undo a running sum."""
    return preserves("differences of neighbours rebuild the operand")


@labels(ops="cumprod cummax cummin")
def running_extreme(_: Call) -> Verdict:
    """A running maximum forgets what is smaller; a running product ends at the first zero."""
    return erases("elements behind a larger one (or a zero) leave no trace")


_REST = "each remaining element is reduced on its own"


@axis_rule(ops="sum mean nansum nanmean prod logsumexp var std var_mean std_mean count_nonzero")
@axis_rule(torch.functional.norm, torch.linalg.norm, torch.linalg.vector_norm, methods="norm")
def partial_axes(call: AxisCall) -> Effect:
    """Merges partial results that an all-reduce completes: sums, counts, moments."""
    position = 2 if "norm" in _name(call) else 1
    why = "each shard yields a partial result, and partial results add up"
    return along(call, call.dims("dim", position), Behaviour.REDUCE, why, _REST, keeps=False)


@axis_rule(ops="amax amin max min argmax argmin any all")
def extreme_axes(call: AxisCall) -> Effect:
    """Joins: the extreme of extremes, in any order and as often as you like."""
    if isinstance(call.option("other", 1), Value):
        return broadcast(call, "it acts on each element on its own once its operands are sharded alike")
    why = "each shard yields its extreme (with its index), and merging extremes is idempotent"
    return along(call, call.dims(), Behaviour.JOIN, why, _REST, keeps=False)


@axis_rule(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)
@axis_rule(F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d)
def global_pool_axes(call: AxisCall) -> Effect:
    """A mean over all positions; pooling to more than one position waits for them."""
    rank = call.operand.rank
    whole = tuple(dim for dim in range(2, rank) if call.shape[dim] == 1)
    if len(whole) == rank - 2:
        return along(call, whole, Behaviour.REDUCE, "each shard yields a partial sum", _REST, keeps=False)
    return along(call, range(2, rank), Behaviour.BARRIER, "windows depend on the whole axis", _REST, keeps=True)


def _name(call: AxisCall) -> str:
    return call.target if isinstance(call.target, str) else getattr(call.target, "__name__", "")
