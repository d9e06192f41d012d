"""Reductions and pooling: many elements become one."""

from __future__ import annotations

from functools import partial

import torch
from torch import fx, nn
from torch.nn import functional as F

from bwsk_fx.rules.axis import AxisCall, Behaviour, Effect, Value, along, axis_rule, broadcast
from bwsk_fx.rules.registry import Call, erases, fewer_elements, labels, preserves, unproven
from bwsk_fx.rules.sizes import elements, short, widens
from bwsk_fx.rules.sorting import same_element
from bwsk_fx.rules.targets import operator_name
from bwsk_fx.rules.undo import Run, Undo
from bwsk_fx.verdict import REFINED, Verdict


@labels(ops="sum mean amax amin prod logsumexp nansum nanmean median nanmedian mode kthvalue", methods="sum_to_size")
@labels(torch.special.logsumexp, atens="sum_to_size special_logsumexp")
def reduce(call: Call) -> Verdict:
    """K by counting; over a dimension of size one it changes nothing."""
    if call.erased() == 0 and len(call.operands) == 1:
        return _single(call)
    return fewer_elements(call, "it merges elements")


@labels(ops="all any", atens="_is_all_true _is_any_true")
def truth(call: Call) -> Verdict:
    """One truth value; of anything but booleans the values go."""
    if call.before.dtype is not torch.bool:
        return erases("only a truth value is left", call.elements(), confidence=REFINED)
    return reduce(call)


@labels(ops="max min")
def extreme(call: Call) -> Verdict:
    """Of a dimension, or of two operands element by element."""
    other = call.argument(1, "other")
    if isinstance(other, fx.Node) and isinstance(other.meta.get("val"), torch.Tensor):
        return erases("the other one of two elements goes")
    return reduce(call)


def _single(call: Call) -> Verdict:
    """Return the verdict of a reduction that has one element to merge at a time."""
    before, after = call.before.dtype, call.value.dtype
    if not widens(before, after):
        return erases(f"it also turns {short(before)} into {short(after)}")
    if after.is_complex and "logsumexp" in operator_name(call.target):
        return erases("a complex logarithm has many branches")
    return preserves(
        "the dimension has one element, so nothing is merged",
        confidence=REFINED,
        undo=Undo(same_element),
        domain="there is no NaN" if "nan" in operator_name(call.target) else None,
    )


@labels(ops="quantile nanquantile")
def quantile(call: Call) -> Verdict:
    """Quantiles of one element are that element; otherwise the order goes."""
    if not call.is_dynamic(call.argument(0, "input")):
        return unproven("only the levels are dynamic")
    dim, shape = call.argument(2, "dim"), call.before.shape
    merged = shape if dim is None else shape[dim : dim + 1 or None]
    if all(isinstance(size, int) and size == 1 for size in merged):
        return preserves("a quantile of one element is the element", confidence=REFINED, undo=Undo(_first_quantile))
    return fewer_elements(call, "only some quantiles are kept")


def _first_quantile(run: Run) -> torch.Tensor:
    return run.output.flatten()[: run.before.numel()].view(run.before.shape)


@labels(torch.var_mean, torch.std_mean, ops="aminmax", atens="_aminmax var_mean std_mean")
def pair(call: Call) -> Verdict:
    """Two numbers are left of the elements that it merges; of one element, the element."""
    before, after = call.elements(), elements(call.value)
    if before is None or after is None or after == 0:
        return fewer_elements(call, "two numbers are left")
    if call.erased() == 0:
        place = 0 if "aminmax" in operator_name(call.target) else 1
        undo = Undo(partial(_result, place))
        return preserves("the dimension has one element", confidence=REFINED, undo=undo)
    missing = before - 2 * after if call.erased() == before - after else before
    why = "two numbers are left of the elements"
    return erases(why, missing, confidence=REFINED) if missing > 0 else erases(why, bits=after, confidence=REFINED)


def _result(place: int, run: Run) -> torch.Tensor:
    return run.output[place].reshape(run.before.shape)  # type: ignore[no-any-return]


@labels(torch.functional.norm, torch.linalg.norm, torch.linalg.vector_norm, methods="norm")
@labels(torch.dist, methods="dist", atens="norm linalg_vector_norm linalg_norm dist")
def norm(call: Call) -> Verdict:
    """Norms: even of one element the sign goes."""
    if call.erased() == 0:
        total = call.elements()
        if call.before.is_complex():
            return erases("the phase goes", None if total is None else total / 2, confidence=REFINED)
        return erases("the sign goes", bits=total, confidence=REFINED)
    return fewer_elements(call, "it merges elements and drops their signs")


@labels(ops="var std")
def deviation(call: Call) -> Verdict:
    """Variances: the mean goes, too; of one element nothing is left."""
    if call.erased() == 0:
        return erases("one element has no variance", call.elements(), confidence=REFINED)
    return fewer_elements(call, "it merges elements")


@labels(ops="cov corrcoef")
def covariance(call: Call) -> Verdict:
    """The mean of each variable goes, and for correlations its scale."""
    if not call.is_dynamic(call.argument(0, "input")):
        return unproven("only the weights of observations are dynamic")
    return fewer_elements(call, "the means of variables go")


@labels(torch.segment_reduce, atens="segment_reduce _segment_reduce")
def segment_reduce(call: Call) -> Verdict:
    """Merges each segment into one element."""
    if not call.is_dynamic(call.argument(0, "data")):
        return unproven("only the lengths of segments are dynamic")
    missing = call.erased()
    if missing is not None and missing > 0:
        return fewer_elements(call, "it merges segments")
    lengths = call.static(call.kwargs.get("lengths"))
    offsets = call.static(call.kwargs.get("offsets"))
    lengths = offsets.diff(dim=-1) if lengths is None and offsets is not None else lengths
    if lengths is None:
        return unproven("whether a segment has two elements depends on their lengths")
    if bool((lengths > 1).any()):
        return erases("it merges the elements of a segment", confidence=REFINED)
    return unproven("each segment has at most one element")


_REST = "each remaining element is reduced on its own"


@axis_rule(ops="sum mean nansum nanmean prod logsumexp var std var_mean std_mean count_nonzero")
@axis_rule(torch.functional.norm, torch.linalg.norm, torch.linalg.vector_norm, methods="norm")
def partial_axes(call: AxisCall) -> Effect:
    """Merges partial results that an all-reduce completes: sums, counts, moments."""
    position = 2 if "norm" in operator_name(call.target) else 1
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
