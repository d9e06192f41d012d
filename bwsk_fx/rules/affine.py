"""Linear maps by a weight and products of matrices: they erase where they contract."""

from __future__ import annotations

import operator
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from bwsk_fx.rules.arguments import Arguments
from bwsk_fx.rules.axis import AxisCall, Behaviour, Claim, Effect, Value, aligned, axis_rule, claims, opaque
from bwsk_fx.rules.axis_table import Axis
from bwsk_fx.rules.contraction import Terms, product, value_of
from bwsk_fx.rules.registry import Call, labels
from bwsk_fx.verdict import Verdict

# Letters of batch dimensions, from the last one backwards; factors have the letters that follow.
BATCH = "ZYXWVUTSRQPONMLKJIHGFEDCBA"


@labels(nn.Linear, F.linear, atens="linear")
def linear(call: Call) -> Verdict:
    """A linear map by a weight (out, in)."""
    return product(call, linear_terms)


@labels("transformers.pytorch_utils.Conv1D")
def transposed_linear(call: Call) -> Verdict:
    """A linear map by a weight (in, out)."""
    return product(call, transposed_linear_terms)


def linear_terms(arguments: Arguments) -> Terms:
    """Read `linear(input, weight, bias)`, or an `nn.Linear`."""
    operand, weight = first(arguments), arguments.option(1, "weight")
    leading = batch(value_of(operand).dim() - 1)
    out = "o" if value_of(weight).dim() == 2 else ""
    return Terms(operand, weight, (leading + "i", out + "i", leading + out), arguments.option(2, "bias"))


def transposed_linear_terms(arguments: Arguments) -> Terms:
    """Read a `Conv1D` of transformers."""
    operand = first(arguments)
    leading = batch(value_of(operand).dim() - 1)
    return Terms(operand, arguments.module.weight, (leading + "i", "io", leading + "o"), arguments.module.bias)


def first(arguments: Arguments) -> Any:
    """Return the first argument, whatever its name."""
    return arguments.args[0] if arguments.args else next(iter(arguments.kwargs.values()))


def batch(count: int) -> str:
    """Return the letters of `count` batch dimensions, which meet from the last one backwards."""
    return BATCH[:count][::-1]


@labels(operator.matmul, ops="matmul mm bmm mv", methods="__matmul__")
@labels(torch.linalg.matmul)
def matmul(call: Call) -> Verdict:
    """A product of matrices or vectors; the factor at hand needs as many rows (columns) as the other has unknowns."""
    return product(call, matmul_terms)


@labels(methods="__rmatmul__")
def reflected_matmul(call: Call) -> Verdict:
    """A product of matrices whose second factor comes first."""
    return product(call, reflected_matmul_terms)


def matmul_terms(arguments: Arguments) -> Terms:
    """Read `matmul(input, other)`."""
    left = arguments.argument(0, "input", arguments.kwargs.get("self"))
    names = (name for name in ("mat2", "vec", "tensor2") if name in arguments.kwargs)
    return _matrices(left, arguments.argument(1, "other", arguments.kwargs.get(next(names, ""))))


def reflected_matmul_terms(arguments: Arguments) -> Terms:
    """Read `other.__rmatmul__(input)`."""
    return _matrices(arguments.argument(1, "other"), first(arguments))


def _matrices(left: Any, right: Any) -> Terms:
    a, b = (value_of(factor).dim() for factor in (left, right))
    row, column = "r" if a > 1 else "", "c" if b > 1 else ""
    mine, theirs = batch(a - 2 if a > 1 else 0), batch(b - 2 if b > 1 else 0)
    return Terms(left, right, (f"{mine}{row}i", f"{theirs}i{column}", f"{max(mine, theirs, key=len)}{row}{column}"))


@axis_rule(nn.Linear, F.linear, "transformers.pytorch_utils.Conv1D")
def linear_axes(call: AxisCall) -> Effect:
    """Maps everything but the input features, whose products are partial sums."""
    *leading, inner = call.operand.layout
    (outer,) = call.axes.fresh(call.shape[-1:])
    call.axes.call(inner, "feature")
    call.axes.call(outer, "feature")
    said = claims(leading, Behaviour.MAP, "the same weight serves each vector on its own")
    said += summed(inner, role="input")
    why = "each shard of the weight yields outputs of its own"
    said += claims([outer], Behaviour.MAP, why, role="output", consumed=False)
    return Effect(tuple(said), ((*leading, outer),))


def summed(axis: Axis | None, role: str) -> list[Claim]:
    """Return the claim on an axis that a product sums over."""
    why = "each shard yields a partial sum of the products"
    return claims([axis], Behaviour.REDUCE, why, role=role, produced=False)


@axis_rule(operator.matmul, methods="__matmul__", ops="matmul mm bmm")
def matmul_axes(call: AxisCall) -> Effect:
    """Maps rows and columns, sums the inner axis, and waits where one axis is both rows and columns."""
    left, right = call.inputs[0], call.inputs[-1]
    if min(left.rank, right.rank) < 2:
        return opaque(call, "products with vectors have no axis rule")
    said: list[Claim] = []
    *batch, row, column = _product_layout(call, left, right, said)
    if call.axes.overlap([column], [*batch, row]):
        # Rows and columns are the same facts, as queries and keys are: columns need an identity of their own.
        said += _gathered(column, right, "every row meets every column of the same axis", "column")
        column = call.axes.new("key")
    why = "each shard of the columns yields columns of the result"
    said += claims([column], Behaviour.MAP, why, role="column", consumed=column == right.layout[-1])
    said += _inner_claims(call, left, right, [*batch, row])
    return Effect(tuple(said), ((*batch, row, column),))


def _product_layout(call: AxisCall, left: Value, right: Value, said: list[Claim]) -> list[Axis | None]:
    """Return the axes of a matrix product, and say what it does to all of them but the columns."""
    batch, clashes = aligned(call.axes, [left.layout[:-2], right.layout[:-2]], len(call.shape) - 2)
    row = left.layout[-2]
    said += claims(batch, Behaviour.MAP, "each matrix of the batch is multiplied on its own")
    said += claims([row], Behaviour.MAP, "each row of the first matrix meets all of the second", role="row")
    said += clashes
    return [*batch, row, right.layout[-1]]


def _inner_claims(call: AxisCall, left: Value, right: Value, kept: list[Axis | None]) -> list[Claim]:
    mine, theirs = left.layout[-1], right.layout[-2]
    if mine is None or theirs is None:
        return []
    if call.axes.overlap([theirs], kept):
        why = "every row sums over all of this axis, along which the rows are sharded too"
        return [*summed(mine, role="inner"), *_gathered(theirs, right, why, "inner")]
    if call.axes.relabelled(mine, theirs):
        why = "its facts meet others under other indices"
        return [*summed(mine, role="inner"), *_gathered(theirs, right, why, "inner")]
    return summed(call.axes.unify(mine, theirs), role="inner")


def _gathered(axis: Axis | None, value: Value, why: str, role: str) -> list[Claim]:
    return claims([axis], Behaviour.BARRIER, why, role=role, produced=False, moved=value.bytes_per_sample)


@axis_rule(ops="addmm baddbmm")
def added_product_axes(call: AxisCall) -> Effect:
    """A matrix product, to which a shared or sharded summand comes."""
    summand, left, right = call.inputs[:3]
    inner = replace(call, args=(left, right), kwargs={})
    product = matmul_axes(inner)
    layout, clashes = aligned(call.axes, [product.layouts[0], summand.layout], len(call.shape))
    return Effect((*product.claims, *clashes), (layout,))
