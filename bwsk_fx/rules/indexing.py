"""Selection, lookup and sorting."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from bwsk_fx.rules.axis import AxisCall, Behaviour, Claim, Effect, Value, axis_rule, claims, opaque
from bwsk_fx.rules.axis_table import Axis
from bwsk_fx.rules.registry import Call, by_products, erases, fewer_elements, labels, preserves, unproven
from bwsk_fx.verdict import REFINED, Verdict


@labels(operator.getitem, methods="__getitem__")
def getitem(call: Call) -> Verdict:
    """Slices and numbers by counting; tensors as indices may pick an element twice and another one never."""
    index = call.argument(1, "index")
    if _has_tensor(index):
        return gather(call)
    return _counted(call)


@labels(ops="select narrow diagonal", methods="unfold")
def select(call: Call) -> Verdict:
    """Keeps a part of the operand."""
    return _counted(call)


def _counted(call: Call) -> Verdict:
    missing = call.erased()
    if missing is None:
        return unproven("how much it drops is not proportional to the batch")
    if missing > 0:
        return erases(f"it drops {missing} elements per sample", missing, confidence=REFINED)
    return preserves("it drops no element", confidence=REFINED)


@labels(ops="gather index_select take take_along_dim masked_select tril triu")
def gather(call: Call) -> Verdict:
    """Picks elements by index or mask; no more is proven than counting shows."""
    missing = call.erased()
    if missing is not None and missing > 0:
        return fewer_elements(call, "it picks fewer elements than there are")
    return unproven("whether its indices pick every element depends on them")


@labels(nn.Embedding, F.embedding)
def embedding(_: Call) -> Verdict:
    """A table lookup: the row tells its number."""
    return preserves("each result is a row of the static table, and finding it gives the index back if rows differ")


@labels(ops="sort")
def sort(call: Call) -> Verdict:
    """Values and indices together are the operand."""
    return preserves(
        "the indices, which it yields anyway, undo it", by_products("indices", elements=call.elements(), itemsize=8)
    )


@labels(ops="topk argsort argmax argmin nonzero count_nonzero unique bincount", methods="histc")
def ranking(call: Call) -> Verdict:
    """Keeps the largest, or only where they are."""
    if call.value.dtype is call.before.dtype:
        return fewer_elements(call, "only the largest elements are kept")
    return erases("only positions or counts are kept, and every value goes", call.elements())


@labels(ops="scatter scatter_add index_add index_copy index_fill index_put masked_scatter", methods="fill_ zero_ copy_")
@labels(operator.setitem, methods="__setitem__")
def overwrite(_: Call) -> Verdict:
    """Writes over parts of the operand."""
    return erases("what it writes over is gone")


def _has_tensor(index: Any) -> bool:
    leaves = pytree.tree_leaves(index)
    return any(isinstance(leaf, fx.Node) and isinstance(leaf.meta.get("val"), torch.Tensor) for leaf in leaves)


@axis_rule(operator.getitem, methods="__getitem__")
def getitem_axes(call: AxisCall) -> Effect:
    """Maps what it keeps; a number selects facts that one shard has."""
    index = call.args[1] if isinstance(call.args[1], tuple) else (call.args[1],)
    if any(isinstance(item, (Value, list)) for item in index):
        return opaque(call, "indices that are data can point into any shard")
    said: list[Claim] = []
    layout: list[Axis | None] = []
    dims = iter(range(call.operand.rank))
    for item in _without_ellipsis(index, call.operand.rank):
        if item is None:
            layout.append(None)
        elif isinstance(item, slice):
            layout.append(_sliced(call, next(dims), item, call.shape[len(layout)], said))
        else:
            said += selected(call.operand.layout[next(dims)])
    return Effect(tuple(said), (tuple(layout),))


def selected(axis: Axis | None) -> list[Claim]:
    """Return the claim on an axis of which one index is kept."""
    why = "one index is selected, which a single shard has"
    return claims([axis], Behaviour.MAP, why, role="selected", produced=False)


def _without_ellipsis(index: tuple[Any, ...], rank: int) -> list[Any]:
    missing = [slice(None)] * (rank - sum(item is not None and item is not Ellipsis for item in index))
    place = next((place for place, item in enumerate(index) if item is Ellipsis), None)
    return [*index, *missing] if place is None else [*index[:place], *missing, *index[place + 1 :]]


def _sliced(call: AxisCall, dim: int, item: slice, size: Any, said: list[Claim]) -> Axis | None:
    axis = call.operand.layout[dim]
    if axis is None or (size == call.operand.shape[dim] and item.step in (None, 1)):
        said += claims([axis], Behaviour.MAP, "all of the axis is kept")
        return axis
    if size == 1:
        said += selected(axis)
        return None
    part = call.axes.derived(call.axes.name(axis), [axis])
    why = "a range of its facts is kept, under new indices"
    said += claims([axis], Behaviour.MAP, why, role="operand", produced=False)
    said += claims([part], Behaviour.MAP, why, role="result", consumed=False)
    return part


@axis_rule(nn.Embedding, F.embedding)
def embedding_axes(call: AxisCall) -> Effect:
    """Maps indices, and features over shards of the table."""
    ids = call.operand.layout
    if len(ids) > 1:
        call.axes.call(ids[-1], "token")
    (features,) = call.axes.fresh(call.shape[-1:])
    call.axes.call(features, "feature")
    said = claims(ids, Behaviour.MAP, "each index is looked up on its own")
    why = "each shard of the table's columns yields features of its own"
    said += claims([features], Behaviour.MAP, why, role="output", consumed=False)
    return Effect(tuple(said), ((*ids, features),))
