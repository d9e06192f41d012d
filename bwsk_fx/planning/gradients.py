"""Gradients that tracing takes apart, put back together."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import fx
from torch.fx import subgraph_rewriter

aten = torch.ops.aten


def fuse_gradients(joint: fx.GraphModule) -> None:
    """Turn the gradients of SiLU and Mish back into the fused operators that eager execution runs.

    Both have a composite kernel beside those of devices, and AOTAutograd's functionalization takes the composite one:
    seven elementwise calls in place of one, with other last bits.
    """
    for pattern, fused in ((_silu_backward, aten.silu_backward.default), (_mish_backward, aten.mish_backward.default)):
        for match in subgraph_rewriter.replace_pattern_with_filters(joint, pattern, _graph_of(fused)):
            for node in match.replacements:
                node.meta = dict(match.nodes_map[match.anchor].meta)


def _graph_of(target: Callable) -> fx.Graph:
    graph = fx.Graph()
    gradient, operand = graph.placeholder("gradient"), graph.placeholder("operand")
    graph.output(graph.call_function(target, (gradient, operand)))
    return graph


def _one_minus(value: torch.Tensor) -> torch.Tensor:
    ones = aten.fill.Scalar(aten.empty_like.default(value, memory_format=torch.preserve_format), 1)
    return aten.sub.Tensor(ones, value)


def _silu_backward(gradient: torch.Tensor, operand: torch.Tensor) -> torch.Tensor:
    sigmoid = aten.sigmoid.default(operand)
    inner = aten.add.Scalar(aten.mul.Tensor(operand, _one_minus(sigmoid)), 1)
    return aten.mul.Tensor(gradient, aten.mul.Tensor(sigmoid, inner))


def _mish_backward(gradient: torch.Tensor, operand: torch.Tensor) -> torch.Tensor:
    tanh = aten.tanh.default(aten.softplus.default(operand))
    sigmoid = aten.sigmoid.default(operand)
    inner = aten.mul.Tensor(aten.mul.Tensor(operand, sigmoid), _one_minus(aten.mul.Tensor(tanh, tanh)))
    return aten.mul.Tensor(gradient, aten.add.Tensor(tanh, inner))
