"""Calls of a joint graph that change nothing: dropped before planning, since each costs a launch and a value."""

from __future__ import annotations

import torch
from torch import fx

from bwsk_fx.planning.views import is_view

aten = torch.ops.aten


def drop_no_ops(graph: fx.Graph) -> None:
    """Let the users of a copy, a detour or a view that changes nothing read the original.

    Nothing in a joint graph writes into a tensor, so that a copy is as good as the original. What the graph returns
    stays as it is, since the caller may write into it.
    """
    for node in graph.nodes:
        original = _original(node) if node.op == "call_function" else None
        if original is not None and not _is_returned(node):
            node.replace_all_uses_with(original)
    graph.eliminate_dead_code()


def _original(node: fx.Node) -> fx.Node | None:
    """Return an earlier node with the value, sizes and strides of `node`."""
    operand = node.args[0] if node.args else None
    if not isinstance(operand, fx.Node):
        return None
    if node.target is aten.t.default and operand.target is aten.t.default:
        return operand.args[0]  # type: ignore[return-value]
    if node.target is aten.view.default and operand.target is aten.view.default:
        _shorten(node, operand)
    unchanged = node.target in (aten.clone.default, aten.view.default, aten.detach.default, aten.alias.default)
    return node.args[0] if unchanged and _looks_alike(node, node.args[0]) else None  # type: ignore[return-value, arg-type]


def _shorten(outer: fx.Node, inner: fx.Node) -> None:
    """View the original instead of a view of it; only contiguous tensors take every view."""
    original = inner.args[0]
    if isinstance(original, fx.Node) and original.meta["val"].is_contiguous():
        outer.update_arg(0, original)


def _looks_alike(node: fx.Node, other: fx.Node) -> bool:
    one, another = node.meta["val"], other.meta["val"]
    return one.shape == another.shape and one.stride() == another.stride()


def _is_returned(node: fx.Node) -> bool:
    """Whether the node, or a view of it, is an output of the graph."""
    return any(user.op == "output" or (is_view(user) and _is_returned(user)) for user in node.users)
