"""Selection: parts of an operand, by slices, numbers, indices or masks."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

from bwsk_fx.rules.axis import AxisCall, Behaviour, Claim, Effect, Value, aligned, axis_rule, claims, opaque, renumbered
from bwsk_fx.rules.axis_table import Axis
from bwsk_fx.rules.lookup import look_up
from bwsk_fx.rules.moving import axis_size, by_missing, counted, lost, moves_back
from bwsk_fx.rules.registry import Call, erases, fewer_elements, labels, preserves, unproven
from bwsk_fx.rules.targets import operator_name
from bwsk_fx.verdict import REFINED, Verdict


@labels(operator.getitem, methods="__getitem__")
def getitem(call: Call) -> Verdict:
    """Slices and numbers by counting; tensors as indices may pick an element twice and another one never."""
    index = call.argument(1, "index")
    items = index if isinstance(index, tuple) else (index,)
    if not any(_is_many(item) for item in items):
        return counted(call, "it keeps a part of each dimension", conclusive=True)
    if call.node.args[0] is not call.operands[0]:
        return look_up(call, call.node.args[0], items[0]) if len(items) == 1 else _unknown_indices()
    per_dim = [item for item in _without_ellipsis(items, call.before.dim()) if item is not None]
    if _is_grid(call.before, per_dim):
        return by_missing(0, "its indices count each dimension from start to end")
    return _by_masks(call, items) or _along_one(call, per_dim) or _picked(call, _samples_keep_apart(call.before, items))


@labels(ops="select narrow diagonal", atens="slice narrow")
@labels(torch.linalg.diagonal, atens="linalg_diagonal")
def select(call: Call) -> Verdict:
    """Keeps a part of the operand."""
    return counted(call, "it keeps a part of a dimension", conclusive=True)


@labels(ops="diag")
def diagonal(call: Call) -> Verdict:
    """The diagonal of a matrix, or a matrix with that diagonal."""
    if call.before.dim() == 1:
        return preserves("the operand is the diagonal of the result", confidence=REFINED, undo=moves_back())
    return select(call)


@labels(ops="index_select")
def index_select(call: Call) -> Verdict:
    """Picks indices of one dimension."""
    if call.node.args[0] is not call.operands[0]:
        at_start = call.argument(1, "dim") == 0
        return look_up(call, call.node.args[0], call.argument(2, "index")) if at_start else _unknown_indices()
    dim = call.argument(1, "dim")
    size = axis_size(call.before, dim)
    return _along(call, size, call.argument(2, "index")) or _picked(call, isinstance(size, int))


@labels(atens="index _unsafe_index")
def index_tensors(call: Call) -> Verdict:
    """Picks elements by one index tensor per dimension, or none."""
    indices = call.argument(1, "indices")
    if call.node.args[0] is not call.operands[0]:
        return look_up(call, call.node.args[0], indices[0]) if len(indices) == 1 else _unknown_indices()
    per_dim = [slice(None) if index is None else index for index in indices]
    found = _by_masks(call, indices) or _along_one(call, per_dim)
    return found or _picked(call, _samples_keep_apart(call.before, tuple(per_dim)))


@labels(ops="gather take take_along_dim masked_select", atens="_unsafe_masked_index")
def pick(call: Call) -> Verdict:
    """Picks elements by index or mask."""
    if call.node.args[0] is not call.operands[0]:
        return _unknown_indices()
    return _by_masks(call, [call.argument(1, "mask")]) or _picked(call, per_sample=False)


def _by_masks(call: Call, items: Sequence[Any]) -> Verdict | None:
    """Return the verdict of a dynamic mask, which leaves out elements for most of its values."""
    masks = [item for item in items if call.is_dynamic(item) and item.meta["val"].dtype is torch.bool]
    return fewer_elements(call, "elements that the mask leaves out go") if masks else None


def _along_one(call: Call, per_dim: Sequence[Any]) -> Verdict | None:
    """Return the verdict of picking along one dimension, where all others are taken whole."""
    many = [dim for dim, item in enumerate(per_dim) if _is_many(item)]
    whole = all(item == slice(None) for dim, item in enumerate(per_dim) if dim not in many)
    return _along(call, call.before.shape[many[0]], per_dim[many[0]]) if whole and len(many) == 1 else None


def _along(call: Call, size: Any, index: Any) -> Verdict | None:
    """Return the verdict of picking numbers along a dimension of this size; None where they are not at hand."""
    values = torch.tensor(index) if isinstance(index, list) and _are_numbers(index) else call.static(index)
    if values is None or values.dtype not in (torch.int64, torch.int32) or not isinstance(size, int):
        return None
    missing = size - torch.unique(values % size).numel()
    if missing == 0:
        return by_missing(0, "it picks elements by index")
    total = call.elements()
    amount = None if total is None else total // size * missing
    return erases(f"its index never picks {missing} of {size}", amount, confidence=REFINED)


def _is_grid(before: torch.Tensor, per_dim: Sequence[Any]) -> bool:
    """Whether indices count dimensions in full, each along an axis of its own, as masks of tokens are spread out."""
    if len(per_dim) != before.dim():
        return False
    axes: list[int] = []
    for size, item in zip(before.shape, per_dim, strict=True):
        if item == slice(None):
            continue
        if not (isinstance(item, fx.Node) and _counts_from_zero(item)):
            return False
        shape = item.meta["val"].shape
        long = [axis - len(shape) for axis, length in enumerate(shape) if not _same_size(length, 1)]
        if not _same_size(shape[long[0]] if long else 1, size) or len(long) > 1:
            return False
        axes += long
    return len(set(axes)) == len(axes)


def _counts_from_zero(node: fx.Node) -> bool:
    """Whether a node is `arange(size)`, with dimensions of size one added at most."""
    if node.op not in ("call_function", "call_method"):
        return False
    if node.target is torch.arange:
        return len(node.args) == 1 and not {"start", "end", "step"} & set(node.kwargs)
    source, *rest = node.args
    if not isinstance(source, fx.Node):
        return False
    keeps = node.target in ("unsqueeze", "view", "reshape") or (node.target is operator.add and rest == [0])
    if node.target is operator.getitem:
        items = rest[0] if isinstance(rest[0], tuple) else (rest[0],)
        keeps = all(item is None or item is Ellipsis or item == slice(None) for item in items)
    return keeps and _counts_from_zero(source)


def _same_size(one: Any, other: Any) -> bool:
    """Whether two sizes are equal for every batch; asking a symbolic size itself would fix the batch."""
    return str(one) == str(other)


def _are_numbers(index: Sequence[Any]) -> bool:
    return all(isinstance(item, int) and not isinstance(item, bool) for item in index)


def _picked(call: Call, per_sample: bool) -> Verdict:
    missing = lost(call, per_sample=per_sample)
    if missing is None:
        return counted(call, "it picks elements by index")
    return by_missing(missing, "it picks elements by index")


def _unknown_indices() -> Verdict:
    return unproven("what was picked need not tell where from")


def _is_many(item: Any) -> bool:
    """Whether an index is a list or a tensor."""
    if isinstance(item, fx.Node):
        return isinstance(item.meta.get("val"), torch.Tensor)
    return isinstance(item, (list, torch.Tensor))


def _samples_keep_apart(value: torch.Tensor, items: tuple[Any, ...]) -> bool:
    """Whether symbolic dimensions are taken whole, so that one sample stands for all."""
    if not _all_long(items):
        return False
    per_dim = [item for item in _without_ellipsis(items, value.dim()) if item is not None]
    pairs = zip(value.shape, per_dim, strict=True)
    return all(isinstance(size, int) or item == slice(None) for size, item in pairs)


def _all_long(items: Sequence[Any]) -> bool:
    """Whether each tensor among the indices stands for one dimension, as masks do not."""
    tensors = [item.meta["val"] for item in items if isinstance(item, fx.Node)]
    return all(isinstance(value, torch.Tensor) and value.dtype is torch.int64 for value in tensors)


@axis_rule(operator.getitem, methods="__getitem__")
def getitem_axes(call: AxisCall) -> Effect:
    """Maps what it keeps; a number selects facts that one shard has."""
    index = call.args[1] if isinstance(call.args[1], tuple) else (call.args[1],)
    if len(index) == call.operand.rank and all(isinstance(item, Value) and _counts(item.node) for item in index):
        return _spread(call, index)
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


def _spread(call: AxisCall, index: tuple[Value, ...]) -> Effect:
    """Follow `x[i, j]` where i and j count all indices of x, each in a dimension of its own: a transpose, in effect."""
    layout: list[Axis | None] = [None] * len(call.shape)
    for axis, size, item in zip(call.operand.layout, call.operand.shape, index, strict=True):
        ranges = [dim - item.rank for dim, own in enumerate(item.shape) if own != 1]
        if axis is None or len(ranges) != 1 or item.shape[ranges[0]] != size or layout[ranges[0]] is not None:
            return opaque(call, "indices that are data can point into any shard")
        own = item.layout[ranges[0]]
        layout[ranges[0]] = axis if own is None else call.axes.unify(axis, own)
    return Effect(tuple(claims(layout, Behaviour.MAP, "the indices count all of its facts")), (tuple(layout),))


def _counts(node: Any) -> bool:
    """Whether a tensor is 0, 1, 2, … along one dimension, by `torch.arange` and views of it."""
    if not isinstance(node, fx.Node):
        return False
    if node.target is torch.arange:
        return len(node.args) == 1 and not {"start", "step"} & set(node.kwargs)
    if node.target in (operator.add, torch.add, "add"):
        return node.args[1:] == (0,) and _counts(node.args[0])
    if node.target is operator.getitem:
        picks = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
        return all(pick in (None, slice(None)) for pick in picks) and _counts(node.args[0])
    return node.target in ("unsqueeze", "view", "reshape", "to", torch.unsqueeze) and _counts(node.args[0])


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
    said += renumbered(axis, part, why)
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


@axis_rule(ops="gather take_along_dim")
def gather_axes(call: AxisCall) -> Effect:
    """Waits along the axis that indices point into; the others meet index by index."""
    operand, index = call.inputs[:2]
    place = call.option("dim", 2 if "take" in operator_name(call.target) else 1)
    if place is None or operand.rank != index.rank:
        return opaque(call, "indices that are data can point into any shard")
    place %= operand.rank
    others = [tuple(None if dim == place else axis for dim, axis in enumerate(one.layout)) for one in (operand, index)]
    if any(operand.shape[dim] != index.shape[dim] for dim in range(index.rank) if dim != place):
        return opaque(call, "the indices leave elements out")
    layout, clashes = aligned(call.axes, others, index.rank)
    why = "indices that are data can point into any shard"
    said = claims(layout, Behaviour.MAP, "each row is indexed on its own")
    said += claims([operand.layout[place]], Behaviour.BARRIER, why, role="operand", produced=False)
    said += claims([index.layout[place]], Behaviour.MAP, "each index is looked up on its own", role="index")
    return Effect((*said, *clashes), ((*layout[:place], index.layout[place], *layout[place + 1 :]),))


@axis_rule(ops="index_select")
def index_select_axes(call: AxisCall) -> Effect:
    """Waits along the axis that indices point into, and maps the others."""
    operand, index = call.inputs[:2]
    place = call.option("dim", 1) % operand.rank
    rest = tuple(None if dim == place else axis for dim, axis in enumerate(operand.layout))
    said = claims(rest, Behaviour.MAP, "the same indices serve each row")
    why = "indices that are data can point into any shard"
    said += claims([operand.layout[place]], Behaviour.BARRIER, why, role="operand", produced=False)
    said += claims(index.layout, Behaviour.MAP, "each index is looked up on its own", role="index")
    made = index.layout[0] if index.layout else None
    return Effect(tuple(said), ((*rest[:place], made, *rest[place + 1 :]),))
