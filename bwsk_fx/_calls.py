"""Calls of torch functions, as nodes of a graph name them."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from bwsk_fx.errors import CaptureError

_OPERATORS = {
    "__getitem__": operator.getitem,
    "__setitem__": operator.setitem,
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "div": operator.truediv,
    "__add__": operator.add,
    "__sub__": operator.sub,
    "__mul__": operator.mul,
    "__truediv__": operator.truediv,
    "matmul": operator.matmul,
    "__matmul__": operator.matmul,
    "neg": operator.neg,
}


def set_grad_mode(enabled: bool) -> bool:
    """Switch gradients on or off, as a node of a graph, and return whether they were on before."""
    before = torch.is_grad_enabled()
    torch.set_grad_enabled(enabled)
    return before


fx.has_side_effect(set_grad_mode)


def only_moves(func: Callable, args: tuple, kwargs: dict[str, Any], result: Any) -> bool:
    """Whether a call is `tensor.to(device)` that changes nothing; recording it would pin the graph to a device."""
    target = (*args[1:], *kwargs.values())
    to_device = func is torch.Tensor.to and all(isinstance(item, (torch.device, str, bool)) for item in target)
    return to_device and result is args[0]


def require_recordable(func: Callable) -> None:
    """Check that a graph can hold a call.

    Raises:
        CaptureError: It cannot.
    """
    name = getattr(func, "__name__", "")
    if name == "__set__" and func.__self__ is torch.Tensor.data:  # type: ignore[attr-defined]
        raise CaptureError("a tensor's .data is set, which is not recorded; write into it with copy_ under no_grad")
    if name == "_pack_padded_sequence":
        raise CaptureError(
            "the sizes of packed sequences depend on data; give the recurrent module padded tensors and mask its result"
        )
    if func is torch.autograd.grad:
        raise CaptureError(
            "torch.autograd.grad is called in the forward pass, which would differentiate through regions; call it in "
            "a module without children, or let is_leaf name the module"
        )


def call_of(func: Callable, args: tuple) -> tuple[str, Any, tuple]:
    """Name a torch function the way people write it: operator, method, attribute or function."""
    name = getattr(func, "__name__", "")
    if name == "__get__":
        return "call_function", getattr, (args[0], func.__self__.__name__)  # type: ignore[attr-defined]
    # These two go by the names of what they wrap, in a module that has no such function.
    if func is torch.Tensor.__pow__:
        return "call_function", operator.pow, args
    if func is torch.Tensor.__ipow__:
        return "call_method", "pow_", args
    if getattr(torch.Tensor, name, None) is not func:
        return "call_function", func, args
    if name in _OPERATORS and len(args) == (1 if name == "neg" else 3 if name == "__setitem__" else 2):
        return "call_function", _OPERATORS[name], args
    return "call_method", name, args
