"""Which ATen operators move no data."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

_NAMES: tuple[str, ...] = (
    "view",
    "_unsafe_view",
    "t",
    "transpose",
    "permute",
    "unsqueeze",
    "squeeze",
    "expand",
    "detach",
    "alias",
)
_NAMES += ("slice", "select", "split", "split_with_sizes")
_VIEWS = frozenset(getattr(torch.ops.aten, name) for name in _NAMES)


def moves_no_data(target: Any) -> bool:
    """Whether the results of an operator share the memory of its operand."""
    return getattr(target, "overloadpacket", None) in _VIEWS or getattr(target, "is_view", False)


def is_view(node: fx.Node) -> bool:
    """Whether the node's results share the memory of its operand; the parts that it returns count as well."""
    if node.target is operator.getitem:
        return is_view(node.all_input_nodes[0])
    return moves_no_data(node.target)


def base_of(node: fx.Node) -> fx.Node:
    """Return what a view is a view of, parts of a split included."""
    while is_view(node):
        node = node.all_input_nodes[0]
    return node
