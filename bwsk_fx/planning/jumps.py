"""Operators that jump: where a rounding error in an operand becomes a wrong branch, and not a small error.

A rebuilt value may differ from the original in its last bits. Continuous operators pass that on as it is. Comparisons,
indices, signs and rounded numbers do not: the zeros of a ReLU come back as 1e-8, and count as positive. Whatever jumps
reads original values, bit for bit.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

from bwsk_fx.planning.cost import is_intensive
from bwsk_fx.rules.targets import operator_name

_STEPS = frozenset(
    {
        *("sign", "sgn", "floor", "ceil", "round", "trunc", "frac", "fmod", "remainder", "floor_divide"),
        *("heaviside", "copysign", "nextafter", "threshold", "hardshrink"),
    }
)
# They decide by a forward value which part of a gradient passes.
_BRANCHES = frozenset(
    {
        *("threshold_backward", "leaky_relu_backward", "hardtanh_backward", "hardsigmoid_backward"),
        *("hardswish_backward", "hardshrink_backward", "softshrink_backward", "elu_backward"),
        *("_prelu_kernel_backward", "rrelu_with_noise_backward"),
    }
)
# They use how an operand looks, and not what is in it.
_SHAPES = frozenset(
    {"empty_like", "zeros_like", "ones_like", "full_like", "new_empty", "new_zeros", "new_ones", "new_full"}
)


def jumps(node: fx.Node) -> bool:
    """Whether the least change of a floating-point operand may change a result, or a gradient, by much."""
    if node.op != "call_function":
        return False
    name = operator_name(node.target)
    if name in _STEPS or name in _BRANCHES or _divides_to_whole(node):
        return True
    if name in _SHAPES or is_intensive(node):
        return False
    operands = [leaf for operand in node.all_input_nodes for leaf in _tensors(operand)]
    return any(map(_is_continuous, operands)) and not all(map(_is_continuous, _tensors(node)))


def _divides_to_whole(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.kwargs.get("rounding_mode") is not None


def _tensors(node: fx.Node) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(node.meta.get("val")) if isinstance(leaf, Tensor)]


def _is_continuous(tensor: Tensor) -> bool:
    return tensor.dtype.is_floating_point or tensor.dtype.is_complex
