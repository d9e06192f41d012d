"""The `sound` ruleset: labels that are claims about an executable inverse.

It counts every node with a tensor result (or a write) that depends on the model's inputs. Not counted are inputs,
attributes, sizes, values computed from static ones alone, the parts of operators with several results, and the
output; they carry S verdicts that say why.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Hashable
from dataclasses import replace
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

# Importing a family fills the registry.
from bwsk_fx.rules import (
    activation,  # noqa: F401
    affine,  # noqa: F401
    attention,  # noqa: F401
    casts,  # noqa: F401
    comparisons,  # noqa: F401
    complex_numbers,  # noqa: F401
    convolution,  # noqa: F401
    distance,  # noqa: F401
    elementary,  # noqa: F401
    elementwise,  # noqa: F401
    factories,  # noqa: F401
    indexing,  # noqa: F401
    integers,  # noqa: F401
    linalg,  # noqa: F401
    lookup,  # noqa: F401
    loss,  # noqa: F401
    masked,  # noqa: F401
    normalization,  # noqa: F401
    padding,  # noqa: F401
    pairs,  # noqa: F401
    pooling,  # noqa: F401
    powers,  # noqa: F401
    products,  # noqa: F401
    recurrent,  # noqa: F401
    reduction,  # noqa: F401
    resampling,  # noqa: F401
    rounding,  # noqa: F401
    scans,  # noqa: F401
    shape,  # noqa: F401
    softmax,  # noqa: F401
    solving,  # noqa: F401
    sorting,  # noqa: F401
    special,  # noqa: F401
    spectral,  # noqa: F401
    windowed_fourier,  # noqa: F401
    writing,  # noqa: F401
)
from bwsk_fx.rules.composition import compose
from bwsk_fx.rules.random import is_random
from bwsk_fx.rules.registry import Call, judge
from bwsk_fx.verdict import NOTHING, OPERATOR, Label, Verdict


def verdict(call: Call) -> Verdict:
    """Return the verdict of one node."""
    outside = uncounted(call)
    if outside is not None:
        return outside
    if not call.operands:
        return _nothing_to_erase("random values have no dynamic operand", counted=True)
    return judge(call) or compose(call)


def is_dynamic(call: Call) -> bool:
    """Whether a node's value depends on the inputs or on chance; `call.dynamic` holds for what comes before it."""
    node = call.node
    if node.op in ("placeholder", "get_attr", "output"):
        return node.op == "placeholder"
    writes = node.target is operator.setitem
    return (writes or has_tensor(node)) and (bool(call.operands) or is_random(call))


def dynamic_nodes(graph_module: fx.GraphModule) -> set[fx.Node]:
    """Return the nodes of a captured graph whose values depend on the inputs or on chance."""
    dynamic: set[fx.Node] = set()
    for node in graph_module.graph.nodes:
        if is_dynamic(call_at(graph_module, node, dynamic)):
            dynamic.add(node)
    return dynamic


def call_at(
    graph_module: fx.GraphModule,
    node: fx.Node,
    dynamic: Collection[fx.Node],
    memory: dict[Hashable, Any] | None = None,
) -> Call:
    """Return a node as rules see it.

    Args:
        graph_module: The graph.
        node: The node.
        dynamic: The dynamic nodes before it.
        memory: What the calls of one graph share.
    """
    module = graph_module.get_submodule(str(node.target)) if node.op == "call_module" else None
    return Call(node, module, dynamic, {} if memory is None else memory)


def has_tensor(node: fx.Node) -> bool:
    """Whether a node's value is or holds a tensor."""
    return any(isinstance(leaf, torch.Tensor) for leaf in pytree.tree_leaves(node.meta.get("val")))


def uncounted(call: Call) -> Verdict | None:
    """Return the verdict of a node that is no operator on dynamic tensors, else None."""
    node = call.node
    if node.op == "placeholder":
        return _nothing_to_erase("an input of the model")
    if node.op == "output" or isinstance(node.target, type):
        return _nothing_to_erase("it hands results over")
    if node not in call.dynamic:
        return _nothing_to_erase("static: parameters, buffers, constants and sizes are always at hand")
    if node.target is operator.getitem and not isinstance(node.args[0].meta["val"], torch.Tensor):  # type: ignore[union-attr]
        return _nothing_to_erase("one of the results of the node before")
    return None


def _nothing_to_erase(why: str, counted: bool = False) -> Verdict:
    return replace(_STRUCTURE, rationale=f"structure: {why}", counted=counted)


_STRUCTURE = Verdict(Label.S, NOTHING, None, OPERATOR, "structure", "structure", counted=False)
