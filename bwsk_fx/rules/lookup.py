"""Tables: rows that tell their number, and numbers that are written out."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from bwsk_fx.rules.axis import AxisCall, Behaviour, Effect, axis_rule, claims
from bwsk_fx.rules.moving import moves_back
from bwsk_fx.rules.registry import Call, erases, labels, preserves, unproven
from bwsk_fx.rules.undo import Run, Undo
from bwsk_fx.verdict import REFINED, Verdict

# Rows are compared while typing only where that takes well under a millisecond.
_COMPARED_ELEMENTS = 1 << 12
# Differences that are held at once while rows are searched for.
_SEARCHED_ELEMENTS = 1 << 24


@labels(nn.Embedding, F.embedding)
def embedding(call: Call) -> Verdict:
    """A table lookup: the row tells its number."""
    table = call.option(1, "weight")
    if call.is_dynamic(table):
        return _rows_of(call, table, call.argument(0, "input"))
    max_norm = call.option(3, "max_norm")
    prepare = None if max_norm is None else partial(_normalised, max_norm, call.option(4, "norm_type", 2.0))
    return look_up(call, table, call.argument(0, "input"), prepare)


@labels(torch.embedding, atens="embedding")
def embedding_of_table(call: Call) -> Verdict:
    """The same, with the table as the first argument."""
    table, index = call.argument(0, "weight"), call.argument(1, "indices")
    if call.is_dynamic(table):
        return _rows_of(call, table, index)
    return look_up(call, table, index)


@labels(atens="embedding_renorm")
def embedding_renorm(_: Call) -> Verdict:
    """Rows that are too long are scaled down."""
    return erases("how long its longest rows were goes")


def look_up(call: Call, table: Any, index: Any, prepare: Any = None) -> Verdict:
    """Return the verdict of `table[index]`, where the table is static and the index is the operand."""
    if not call.is_dynamic(index) or index.meta["val"].dtype not in (torch.int64, torch.int32):
        return unproven("what was looked up need not tell where from")
    values = call.static(table)
    if values is not None and values.numel() <= _COMPARED_ELEMENTS and values.dim() > 0 and prepare is None:
        distinct = torch.unique(values, dim=0).shape[0] if values.numel() else 0
        if distinct < values.shape[0]:
            return erases(f"only {distinct} of the table's {values.shape[0]} rows differ", confidence=REFINED)
    number = call.operands.index(index)
    undo = Undo(partial(_row_numbers, prepare), (number,))
    return preserves(
        "each row of the static table tells its number", undo=undo, domain="rows differ, and indices count from row 0"
    )


def _rows_of(call: Call, table: fx.Node, index: Any) -> Verdict:
    """Return the verdict of a lookup of which the table is the operand."""
    rows, named = table.meta["val"].shape, call.static(index)
    if named is None or not all(isinstance(size, int) for size in rows):
        return erases("rows that no index names go")
    missing = rows[0] - torch.unique(named).numel()
    if missing > 0:
        return erases(f"no index names {missing} rows", missing * rows[1], confidence=REFINED)
    undo = moves_back(call.operands.index(table))
    return preserves("each row is picked", confidence=REFINED, undo=undo)


def _normalised(max_norm: float, norm_type: float, table: Tensor) -> Tensor:
    """Return the rows as a lookup with `max_norm` yields them."""
    return F.embedding(torch.arange(len(table)), table.clone(), max_norm=max_norm, norm_type=norm_type)


def _row_numbers(prepare: Any, run: Run) -> Tensor:
    table = _table(run)
    table = prepare(table) if prepare is not None else table
    rows = table.detach().reshape(len(table), -1)
    found = run.output.reshape(-1, rows.shape[1])
    kept = max(1, _SEARCHED_ELEMENTS // max(1, rows.numel()))
    numbers = [torch.cdist(part.double(), rows.double()).argmin(1) for part in found.split(kept)]
    shape = run.output.shape[: run.output.dim() - table.dim() + 1]
    return torch.cat(numbers).view(shape)


def _table(run: Run) -> Tensor:
    if run.module is not None:
        return run.module.weight  # type: ignore[no-any-return]
    return next(tensor for tensor in run.tensors() if not tensor.is_meta and tensor.dim() > 0)


@labels(nn.EmbeddingBag, F.embedding_bag, torch.embedding_bag)
@labels(atens="embedding_bag _embedding_bag _embedding_bag_forward_only")
def embedding_bag(call: Call) -> Verdict:
    """Rows of a bag are merged; their order goes, and so do the rows that no bag names."""
    first, second = call.argument(0, "input"), call.argument(1, "weight")
    swapped = call.node.target is not F.embedding_bag and call.module is None
    index, table = (second, first) if swapped else (first, second)
    if call.is_dynamic(index):
        merges = call.is_dynamic(table) or _has_more(index, call.value)
        return erases("it merges the rows of each bag") if merges else unproven("a bag may have one row")
    if call.is_dynamic(table) and _has_more(table, call.value):
        return erases("there are fewer bags than rows")
    return unproven("whether sums of rows determine the rows depends on the bags")


def _has_more(node: fx.Node, bags: Tensor) -> bool:
    """Whether there are more indices (or rows of a table) than bags."""
    value = node.meta["val"]
    if value.dim() == 2 and not value.is_floating_point():
        return isinstance(value.shape[1], int) and value.shape[1] > 1
    sizes = (value.shape[0], bags.shape[0])
    return all(isinstance(size, int) for size in sizes) and sizes[0] > sizes[1]


@labels(F.one_hot, atens="one_hot")
def one_hot(_: Call) -> Verdict:
    """The place of the one is the operand."""
    return preserves("the place of the one is the operand", undo=Undo(_place_of_one))


def _place_of_one(run: Run) -> Tensor:
    return run.output.argmax(-1)


@labels(torch.unravel_index)
def unravel_index(call: Call) -> Verdict:
    """Coordinates instead of a number."""
    if call.argument(0, "indices") is not call.operands[0] or len(call.operands) > 1:
        return unproven("the shape varies, too")
    undo = Undo(_ravelled)
    return preserves("coordinates and shape tell the index", undo=undo, domain="indices count from 0")


def _ravelled(run: Run) -> Tensor:
    shape = run.argument(1, "shape")
    sizes = shape.tolist() if isinstance(shape, Tensor) else [shape] if isinstance(shape, int) else list(shape)
    steps = [math.prod(sizes[place + 1 :]) for place in range(len(sizes))]
    whole = torch.zeros(run.before.shape, dtype=run.before.dtype)
    return sum((part * step for part, step in zip(run.output, steps, strict=True)), whole)


@axis_rule(F.one_hot)
def one_hot_axes(call: AxisCall) -> Effect:
    """Maps every number; each shard of the classes is written by itself."""
    (classes,) = call.axes.fresh(call.shape[-1:])
    said = claims(call.operand.layout, Behaviour.MAP, "each number is written out on its own")
    said += claims([classes], Behaviour.MAP, "each class asks for itself", consumed=False)
    return Effect(tuple(said), ((*call.operand.layout, classes),))
