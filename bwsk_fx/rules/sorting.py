"""Sorting, ranking and counting: what is left of the order, and of the values."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bwsk_fx.rules.axis import AxisCall, Behaviour, Effect, along, axis_rule, mapped, opaque
from bwsk_fx.rules.registry import Call, erases, fewer_elements, labels, preserves, target_name, unproven
from bwsk_fx.rules.sizes import is_batched
from bwsk_fx.rules.targets import operator_name
from bwsk_fx.rules.undo import Run, Undo
from bwsk_fx.verdict import REFINED, Verdict


@labels(ops="sort")
def sort(_: Call) -> Verdict:
    """Values and indices together are the operand."""
    return preserves("its two results, values and indices, are the operand", undo=Undo(_scattered))


@labels(ops="topk")
def topk(call: Call) -> Verdict:
    """The largest elements and where they were: all of them, or fewer."""
    if call.erased() == 0:
        return preserves("it keeps every element and its index", confidence=REFINED, undo=Undo(_scattered))
    return fewer_elements(call, "only the largest elements are kept")


def _scattered(run: Run) -> Tensor:
    values, indices = run.output
    # `topk` has the number of elements before the dimension; for `stable` sorts it is a keyword.
    place = 2 if "topk" in operator_name(run.target) else 1
    dim = run.argument(place, "dim", -1)
    dim = dim if isinstance(dim, int) and not isinstance(dim, bool) else -1
    return torch.empty_like(values).scatter(dim, indices, values)


@labels(ops="msort")
def msort(call: Call) -> Verdict:
    """Sorted values without their indices: the order goes, log₂ n! bits of n elements."""
    size = call.before.shape[0] if call.before.dim() else 1
    if size == 1:
        return preserves("one element is in order", confidence=REFINED, undo=Undo(same_element))
    if not isinstance(size, int):
        return erases("the order goes")
    rows = math.prod(call.before.shape[1:])
    return erases("the order goes", bits=rows * math.lgamma(size + 1) / math.log(2), confidence=REFINED)


@labels(ops="argsort argmax argmin count_nonzero histc")
@labels(torch.bucketize, torch.searchsorted, torch.isin, atens="bucketize searchsorted isin")
def positions(call: Call) -> Verdict:
    """Positions, ranks and counts."""
    return erases("only positions or counts are kept, and every value goes", call.elements())


@labels(ops="bincount histogram", atens="_histogramdd_from_bin_tensors")
@labels(torch.histogramdd, atens="_histogramdd_bin_edges _histogramdd_from_bin_cts")
def histogram(call: Call) -> Verdict:
    """Counts; where it also chooses the bins, their outer edges are the smallest and the largest element."""
    if not call.is_dynamic(call.args[0]):
        return unproven("sums of weights, or bins that are given back, may tell them")
    why, total = "only positions or counts are kept, and every value goes", call.elements()
    if not _chooses_bins(call):
        return erases(why, total)
    several = "histogramdd" in target_name(call)
    if total == 1 and not several and not is_batched(call.before):
        why = "the bins lie around its one element"
        return preserves(why, confidence=REFINED, undo=Undo(_middle_of_bins))
    features = call.before.shape[-1] if several else 1
    kept = 0 if is_batched(call.before) else 2 * features
    if total is None or total > kept:
        why = f"only counts are kept, and the smallest and the largest element of {features} features"
        return erases(why, None if total is None else total - kept, confidence=REFINED)
    return unproven("the edges of the bins tell the smallest and the largest element")


def _middle_of_bins(run: Run) -> Tensor:
    _, edges = run.output
    return ((edges[0] + edges[-1]) / 2).reshape(run.before.shape)


def _chooses_bins(call: Call) -> bool:
    """Whether the edges of the bins come from the elements."""
    bins = call.argument(1, "bins", 100)
    numbers = all(isinstance(each, int) for each in (bins if isinstance(bins, (tuple, list)) else (bins,)))
    return "bincount" not in target_name(call) and numbers and call.kwargs.get("range") is None


@labels(ops="equal allclose hash_tensor is_same_size is_nonzero")
def answer(call: Call) -> Verdict:
    """One answer about all elements."""
    return erases("one answer is left of all elements", call.elements())


@labels(ops="nonzero argwhere nonzero_static", atens="nonzero_numpy")
def nonzero(call: Call) -> Verdict:
    """Where elements are not zero, which is all there is to know of booleans."""
    if call.before.dtype is not torch.bool:
        return erases("only positions are kept, and every value goes", call.elements())
    if "static" in str(call.node.target):
        return unproven("the list of positions may be cut short")
    return preserves("all other elements are False", confidence=REFINED, undo=Undo(_true_at))


def _true_at(run: Run) -> Tensor:
    result = torch.zeros(run.before.shape, dtype=torch.bool)
    listed = run.output if isinstance(run.output, tuple) else tuple(run.output.unbind(-1))
    if result.dim() == 0:
        return result.fill_(run.output[0].numel() > 0 if isinstance(run.output, tuple) else len(run.output) > 0)
    result[listed] = True
    return result


@labels(ops="unique")
def unique(call: Call) -> Verdict:
    """Distinct values; with `return_inverse`, each element's place among them as well."""
    return _distinct(call, call.argument(2, "return_inverse"), call.argument(4, "dim"))


@labels(atens="_unique _unique2")
def unique_values(call: Call) -> Verdict:
    """Distinct values of the whole operand."""
    return _distinct(call, call.argument(2, "return_inverse"), None)


@labels(atens="unique_dim")
def unique_slices(call: Call) -> Verdict:
    """Distinct slices along a dimension."""
    return _distinct(call, call.argument(3, "return_inverse"), call.argument(1, "dim"))


@labels(ops="unique_consecutive")
def unique_consecutive(call: Call) -> Verdict:
    """Runs of equal values; with `return_inverse` or `return_counts` they can be written out again."""
    inverse, counts = call.argument(1, "return_inverse"), call.argument(2, "return_counts")
    return _distinct(call, inverse, call.argument(3, "dim"), counts)


@labels(atens="unique_dim_consecutive")
def unique_consecutive_slices(call: Call) -> Verdict:
    """Runs of equal slices along a dimension."""
    inverse, counts = call.argument(2, "return_inverse"), call.argument(3, "return_counts")
    return _distinct(call, inverse, call.argument(1, "dim"), counts)


def _distinct(call: Call, inverse: Any, dim: int | None, counts: Any = False) -> Verdict:
    if inverse is True:
        undo = Undo(partial(_by_inverse, dim))
        return preserves("distinct values and each element's place", confidence=REFINED, undo=undo)
    if counts is True:
        undo = Undo(partial(_by_counts, dim))
        return preserves("values and how often each follows", confidence=REFINED, undo=undo)
    if is_single(call):
        return preserves("one element is distinct", confidence=REFINED, undo=Undo(same_element))
    return erases("the order goes, and how often values occur")


def _by_inverse(dim: int | None, run: Run) -> Tensor:
    values, inverse = run.output[:2]
    return values[inverse].view(run.before.shape) if dim is None else values.index_select(dim, inverse)


def _by_counts(dim: int | None, run: Run) -> Tensor:
    rebuilt = run.output[0].repeat_interleave(run.output[-1], dim=dim or 0)
    return rebuilt.view(run.before.shape)


def is_single(call: Call) -> bool:
    """Whether the first operand has one element, whatever the batch."""
    return all(isinstance(size, int) and size == 1 for size in call.before.shape)


def same_element(run: Run) -> Tensor:
    """Rebuild an operand that the (first) result has the elements of, in order."""
    result = run.value
    return result.reshape(run.before.shape)


@labels(methods="item", atens="_local_scalar_dense item")
def item(_: Call) -> Verdict:
    """One element as a number."""
    return preserves("the number is the element", undo=Undo(_as_tensor))


def _as_tensor(run: Run) -> Tensor:
    return torch.tensor(run.output, dtype=run.before.dtype).view(run.before.shape)


@labels(methods="to_sparse to_sparse_coo to_sparse_csr to_sparse_csc to_dense", atens="_to_sparse _to_dense to_dense")
def sparse(_: Call) -> Verdict:
    """Another layout of the same elements."""
    return preserves("zeros are left out, and put back", undo=Undo(_dense))


def _dense(run: Run) -> Tensor:
    return run.output.to_dense()  # type: ignore[no-any-return]


_ORDER = "its order is that of the whole axis"
_ROWS = "each row is ordered on its own"


@axis_rule(ops="sort argsort topk msort")
def sort_axes(call: AxisCall) -> Effect:
    """Waits along the sorted axis; what comes out lies at places of its own."""
    name = operator_name(call.target)
    # They act on one dimension where none is named: the last, and `msort` on the first.
    dim = 0 if name == "msort" else call.option("dim", 2 if name == "topk" else 1, -1)
    dims = (dim % call.operand.rank,)
    effect = along(call, dims, Behaviour.BARRIER, _ORDER, _ROWS, keeps=True)
    claims = [replace(claim, produced=claim.behaviour is Behaviour.MAP) for claim in effect.claims]
    # Where an element comes out depends on the others: the sorted axis is another one than before.
    fresh = [call.axes.fresh(shape) for shape in call.shapes]
    layouts = tuple(
        tuple(
            own if dim in dims else axis for dim, (own, axis) in enumerate(zip(new, call.operand.layout, strict=True))
        )
        for new in fresh
    )
    return Effect(tuple(claims), layouts)


@axis_rule(ops="median nanmedian quantile nanquantile kthvalue mode")
def rank_axes(call: AxisCall) -> Effect:
    """Waits along the axis of which one element is picked by its rank."""
    place = 2 if operator_name(call.target) in ("quantile", "nanquantile", "kthvalue") else 1
    if len(call.shape) > call.operand.rank:
        return opaque(call, "several ranks at once have no axis rule")
    return along(call, call.dims("dim", place), Behaviour.BARRIER, _ORDER, _ROWS, keeps=False)


@axis_rule(torch.bucketize)
def bucket_axes(call: AxisCall) -> Effect:
    """Maps every axis of what is sorted in; all bounds are needed."""
    return mapped(call.operand.layout, "each element is sorted in on its own")
