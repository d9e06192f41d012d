"""Inverses of views and casts: exact, and most of them free."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import fx

from bwsk_fx.rules.inverse import Inverse, WitnessWriter, calls, inverts, view_back

aten = torch.ops.aten


@inverts(aten.view.default, aten._unsafe_view.default, aten.reshape.default)
def view(node: fx.Node, _: WitnessWriter) -> Iterator[Inverse]:
    """A view of all elements goes back to the operand's sizes, where the operand is contiguous."""
    operand = node.args[0].meta["val"]  # type: ignore[union-attr]
    if operand.is_contiguous():
        yield view_back(node, aten.view.default, list(operand.shape))


@inverts(aten.t.default, aten.detach.default, aten.alias.default)
def self_inverse(node: fx.Node, _: WitnessWriter) -> Iterator[Inverse]:
    """Doing it twice changes nothing."""
    yield view_back(node, node.target)  # type: ignore[arg-type]


@inverts(aten.transpose.int)
def transpose(node: fx.Node, _: WitnessWriter) -> Iterator[Inverse]:
    """Swapping two dimensions again restores them."""
    yield view_back(node, aten.transpose.int, *node.args[1:])


@inverts(aten.permute.default)
def permute(node: fx.Node, _: WitnessWriter) -> Iterator[Inverse]:
    """The inverse permutation restores the order."""
    dims = [dim % len(node.args[1]) for dim in node.args[1]]  # type: ignore[union-attr, operator, arg-type]
    yield view_back(node, aten.permute.default, [dims.index(dim) for dim in range(len(dims))])


@inverts(aten.unsqueeze.default)
def unsqueeze(node: fx.Node, _: WitnessWriter) -> Iterator[Inverse]:
    """Dropping the new dimension restores the operand."""
    yield view_back(node, aten.squeeze.dim, node.args[1])


@inverts(aten._to_copy.default)
def widening_cast(node: fx.Node, _: WitnessWriter) -> Iterator[Inverse]:
    """A cast that loses no bit is undone by the cast back."""
    operand, result = node.args[0].meta["val"], node.meta["val"]  # type: ignore[union-attr]
    if widens(operand.dtype, result.dtype) and operand.device == result.device:
        back = calls(aten._to_copy.default, dtype=operand.dtype)
        yield Inverse(node.args[0], (node,), back, True, rule="widening cast")  # type: ignore[arg-type]


def widens(narrow: torch.dtype, wide: torch.dtype) -> bool:
    """Whether every finite value of `narrow` is a value of `wide`."""
    if not (narrow.is_floating_point and wide.is_floating_point):
        return False
    small, large = torch.finfo(narrow), torch.finfo(wide)
    return large.eps <= small.eps and large.max >= small.max and large.tiny <= small.tiny
