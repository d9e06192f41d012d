"""One call outside any graph, as a rule sees it: for certification, decomposition and tests."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from bwsk_fx.rules.registry import Call

Target = Callable[..., Any] | nn.Module | str


def run_target(target: Target, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Call a module, a function, or the method that a text names."""
    if isinstance(target, str):
        return getattr(args[0], target)(*args[1:], **kwargs)
    return target(*args, **kwargs)


def call_of(
    target: Target,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    value: Any,
    dynamic: Collection[int] | None = None,
    names: Mapping[int, str] | None = None,
) -> Call:
    """Return the `Call` of one executed call.

    Args:
        target: A module, a function, or the name of a method.
        args: Positional arguments, tensors in any nesting among them; fake ones will do.
        kwargs: Keyword arguments.
        value: What the call returned.
        dynamic: Identities (`id`) of the tensors that are dynamic; all by default.
        names: Names of their nodes by identity; `operand_0`, `operand_1` and so on by default.
    """
    graph = fx.Graph()
    nodes: dict[int, fx.Node] = {}
    module = target if isinstance(target, nn.Module) else None

    def as_node(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        if id(leaf) not in nodes:
            nodes[id(leaf)] = graph.placeholder((names or {}).get(id(leaf), f"operand_{len(nodes)}"))
            nodes[id(leaf)].meta["val"] = leaf
        return nodes[id(leaf)]

    node_args, node_kwargs = pytree.tree_map(as_node, (tuple(args), dict(kwargs)))
    if module is not None:
        node = graph.call_module("call", node_args, node_kwargs)
    elif isinstance(target, str):
        node = graph.call_method(target, node_args, node_kwargs)
    else:
        node = graph.call_function(target, node_args, node_kwargs)  # type: ignore[arg-type]
    node.meta["val"] = value
    operands = {node for key, node in nodes.items() if dynamic is None or key in dynamic}
    return Call(node, module, {*operands, node} if operands else operands)
