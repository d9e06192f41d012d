"""Inverses of operators that move elements without changing them. All exact: a view, or one copy."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, fx

from bwsk_fx.rules.inverse import Emit, Inverse, WitnessWriter, calls, inverts, is_dense, laid_out, view_back

aten = torch.ops.aten


@inverts(aten.view.default, aten._unsafe_view.default, aten.reshape.default)
def view_inverse(node: fx.Node, _: WitnessWriter) -> Iterator[Inverse]:
    """A view of all elements goes back to the operand's sizes, where the operand is contiguous."""
    operand = node.args[0].meta["val"]  # type: ignore[union-attr]
    if operand.is_contiguous():
        yield view_back(node, aten.view.default, list(operand.shape))


@inverts(aten.t.default, aten.detach.default, aten.alias.default)
def self_inverse(node: fx.Node, _: WitnessWriter) -> Iterator[Inverse]:
    """Doing it twice changes nothing."""
    yield view_back(node, node.target)  # type: ignore[arg-type]


@inverts(aten.transpose.int)
def transpose_inverse(node: fx.Node, _: WitnessWriter) -> Iterator[Inverse]:
    """Swapping two dimensions again restores them."""
    yield view_back(node, aten.transpose.int, *node.args[1:])


@inverts(aten.permute.default)
def permute_inverse(node: fx.Node, _: WitnessWriter) -> Iterator[Inverse]:
    """The inverse permutation restores the order."""
    dims = [dim % len(node.args[1]) for dim in node.args[1]]  # type: ignore[union-attr, operator, arg-type]
    yield view_back(node, aten.permute.default, [dims.index(dim) for dim in range(len(dims))])


@inverts(aten.unsqueeze.default)
def unsqueeze_inverse(node: fx.Node, _: WitnessWriter) -> Iterator[Inverse]:
    """Dropping the new dimension restores the operand."""
    yield view_back(node, aten.squeeze.dim, node.args[1])


@inverts(aten.squeeze.dim, aten.squeeze.dims, aten.squeeze.default)
def squeeze_inverse(node: fx.Node, _: WitnessWriter) -> Iterator[Inverse]:
    """Putting the dropped dimensions back restores the operand, where it has the strides that they get."""
    before, after = node.args[0].meta["val"], node.meta["val"]  # type: ignore[union-attr]
    named: Any = node.args[1] if len(node.args) > 1 else list(range(before.dim()))
    places = sorted({dim % max(before.dim(), 1) for dim in ([named] if isinstance(named, int) else named)})
    dropped = [place for place in places if before.dim() and before.shape[place] == 1]

    def emit(graph: fx.Graph, tails: Sequence[fx.Node]) -> fx.Node:
        (result,) = tails
        for place in dropped:
            result = graph.call_function(aten.unsqueeze.default, (result, place))
        return result

    for place in dropped:
        after = after.unsqueeze(place)
    if dropped and after.stride() == before.stride():
        yield Inverse(node.args[0], (node,), emit, True, True, f"inverse of {node.target}")  # type: ignore[arg-type]


@inverts(aten.expand.default)
def expand_inverse(node: fx.Node, _: WitnessWriter) -> Iterator[Inverse]:
    """The first of equal copies, laid out as the operand was.

    Not free, though a slice moves nothing: the two are no views of each other, since a result that was rebuilt as a
    tensor of its own has other strides.
    """
    value = node.args[0].meta["val"]  # type: ignore[union-attr]
    if is_dense(value):
        back = calls(first_copy, tuple(value.shape), value.stride())
        yield Inverse(node.args[0], (node,), back, True, rule="first copy")  # type: ignore[arg-type]


def first_copy(expanded: Tensor, shape: tuple[int, ...], strides: tuple[int, ...]) -> Tensor:
    """Return the tensor of `shape` that was expanded, with `strides`."""
    value = expanded[(0,) * (expanded.dim() - len(shape))]
    for dim, size in enumerate(shape):
        value = value.narrow(dim, 0, size)
    return laid_out(value, strides)


@inverts(aten.clone.default)
def clone_inverse(node: fx.Node, _: WitnessWriter) -> Iterator[Inverse]:
    """A copy in the operand's own order of elements."""
    value = node.args[0].meta["val"]  # type: ignore[union-attr]
    if is_dense(value):
        yield Inverse(node.args[0], (node,), calls(laid_out, value.stride()), True, rule="copy")  # type: ignore[arg-type]


@inverts(aten.cat.default)
def cat_inverse(node: fx.Node, _: WitnessWriter) -> Iterator[Inverse]:
    """Each operand is a slice of the result: free where it has the operand's strides, else copied into them.

    A slice does not give the whole back, so that it never counts as a view of one class with the result.
    """
    operands, dim = list(node.args[0]), node.args[1] if len(node.args) > 1 else 0  # type: ignore[arg-type]
    if any(operand.meta["val"].dim() != node.meta["val"].dim() for operand in operands):
        return
    sizes = [operand.meta["val"].shape[dim] for operand in operands]
    ends = list(accumulate(sizes))
    for operand, size, end in zip(operands, sizes, ends, strict=True):
        yield from _part(node, operand, aten.slice.Tensor, dim, end - size, end)


@inverts(aten.stack.default)
def stack_inverse(node: fx.Node, _: WitnessWriter) -> Iterator[Inverse]:
    """Each operand is selected from the result."""
    operands, dim = list(node.args[0]), node.args[1] if len(node.args) > 1 else 0  # type: ignore[arg-type]
    for place, operand in enumerate(operands):
        yield from _part(node, operand, aten.select.int, dim, place)


@inverts(aten.split.Tensor, aten.split_with_sizes.default)
def split_inverse(node: fx.Node, _: WitnessWriter) -> Iterator[Inverse]:
    """The operand is all of its parts in a row."""
    dim = node.args[2] if len(node.args) > 2 else 0
    yield from _whole(node, aten.cat.default, dim)


@inverts(aten.unbind.int)
def unbind_inverse(node: fx.Node, _: WitnessWriter) -> Iterator[Inverse]:
    """The operand is all of its parts in a stack."""
    dim = node.args[1] if len(node.args) > 1 else 0
    yield from _whole(node, aten.stack.default, dim)


def _part(node: fx.Node, operand: fx.Node, target: Any, *place: Any) -> Iterator[Inverse]:
    """Yield an operand that `target(result, *place)` takes from the result."""
    value = operand.meta["val"]
    if value.dtype != node.meta["val"].dtype or not is_dense(value):
        return
    in_place = target(node.meta["val"], *place).stride() == value.stride()
    emit = calls(target, *place) if in_place else _then_laid_out(calls(target, *place), value)
    yield Inverse(operand, (node,), emit, True, in_place, "part")


def _whole(node: fx.Node, target: Any, dim: Any) -> Iterator[Inverse]:
    """Yield the operand of a split, which `target(parts, dim)` puts together; none where a part has no user."""
    operand: fx.Node = node.args[0]  # type: ignore[assignment]
    parts = {user.args[1]: user for user in node.users if user.target is operator.getitem}
    value = operand.meta["val"]
    if len(parts) != len(node.meta["val"]) or not is_dense(value):
        return

    def emit(graph: fx.Graph, tails: Sequence[fx.Node]) -> fx.Node:
        return graph.call_function(target, (list(tails), dim))

    whole = emit if value.is_contiguous() else _then_laid_out(emit, value)
    yield Inverse(operand, tuple(parts[place] for place in sorted(parts)), whole, True, rule="all parts")  # type: ignore[type-var]


def _then_laid_out(emit: Emit, value: Tensor) -> Emit:
    """Return an `Emit` that gives what `emit` made the strides of `value`."""
    strides = value.stride()

    def emit_both(graph: fx.Graph, tails: Sequence[fx.Node]) -> fx.Node:
        return graph.call_function(laid_out, (emit(graph, tails), strides))

    return emit_both
