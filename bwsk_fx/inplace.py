"""In-place operators of a captured graph: what they write into, and when writing elsewhere comes to the same.

A region is traced as a function of its inputs, and cannot write into them. Where nobody reads an input again once a
member of the region has written into it, the member may as well return a tensor of its own.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable

import torch
from torch import fx

from bwsk_fx import _torch_private as private


def written_operand(node: fx.Node, graph_module: fx.GraphModule) -> fx.Node | None:
    """Return the operand that a node writes into; None if it writes into none."""
    operand = node.args[0] if node.args else None
    if not isinstance(operand, fx.Node):
        return None
    if node.op == "call_method":
        name = str(node.target)
        return operand if name.endswith("_") and not name.endswith("__") else None
    if node.op == "call_module":
        return operand if getattr(graph_module.get_submodule(str(node.target)), "inplace", False) else None
    name = getattr(node.target, "__name__", "")
    if node.target is operator.setitem or (name.endswith("_") and not name.endswith("__")):
        return operand
    return operand if _flag(node) is True else None


def _flag(node: fx.Node) -> object:
    """Return the argument `inplace` of a function of `torch.nn.functional`, given by name or by place."""
    if "inplace" in node.kwargs or len(node.args) < 2:
        return node.kwargs.get("inplace")
    try:
        return inspect.signature(node.target).bind(*node.args, **node.kwargs).arguments.get("inplace")  # type: ignore[arg-type]
    except (TypeError, ValueError):  # a builtin, which has no such argument
        return None


def shares_memory(one: fx.Node, other: fx.Node) -> bool:
    """Whether two values are the same tensor, or views of one."""
    return _memory(one) is not None and _memory(one) == _memory(other)


def is_read_again(node: fx.Node, operand: fx.Node) -> bool:
    """Whether anybody sees that `node` has written into `operand`, but for those who read the result of `node`."""
    aliases = [other for other in node.graph.nodes if other < node and shares_memory(other, operand)]
    return any(alias.op in ("placeholder", "get_attr") or any(node < user for user in alias.users) for alias in aliases)


def copied_out_of_place(graph: fx.Graph, node: fx.Node, at: Callable[[fx.Node], fx.Node]) -> fx.Node:
    """Append a node to `graph` that gives the result of an in-place one, and leaves its operand as it is."""
    operand: fx.Node = node.args[0]  # type: ignore[assignment]
    name = str(node.target)
    if node.op == "call_method" and hasattr(torch.Tensor, name[:-1]) and _keeps_dtype(node):
        copy = graph.node_copy(node, at)
        copy.target = name[:-1]
        return copy
    clone = graph.call_method("clone", (at(operand),))
    clone.meta = dict(operand.meta)
    return graph.node_copy(node, lambda other: clone if other is operand else at(other))


def _memory(node: fx.Node) -> int | None:
    value = node.meta.get("val")
    return private.storage_key(value) if isinstance(value, torch.Tensor) else None


def _keeps_dtype(node: fx.Node) -> bool:
    """Whether the operands alone decide on the dtype that the operand in front has."""
    values = (operand.meta.get("val") for operand in node.all_input_nodes)
    return len({value.dtype for value in values if isinstance(value, torch.Tensor)}) == 1
