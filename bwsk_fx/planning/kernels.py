"""What a node of a planned graph launches: its ATen calls on fake values, for cost models to weigh."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bwsk_fx.planning.sizes import as_numbers
from bwsk_fx.planning.views import moves_no_data

aten = torch.ops.aten
_QUESTIONS = frozenset({aten.sym_size, aten.sym_stride, aten.sym_numel, aten.sym_storage_offset})


@dataclass(frozen=True)
class KernelCall:
    """One ATen call on fake tensors.

    Attributes:
        target: The operator.
        args: Positional arguments, tensors as fake ones.
        kwargs: Keyword arguments, likewise.
        result: What it returns, likewise.
    """

    target: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    result: Any

    def tensors(self) -> list[Tensor]:
        """Return the tensors that it reads and writes."""
        leaves = tree_leaves((self.args, dict(self.kwargs), self.result))
        return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def kernel_calls(node: fx.Node) -> list[KernelCall]:
    """Return the ATen calls of a node that compute something; views and parts of tuples launch nothing.

    A node that calls a Python function of tensors (a witness, or an inverse) launches what that function calls.
    Symbolic sizes are the numbers that they were traced for.
    """
    if node.op != "call_function" or not callable(node.target):
        return []
    args, kwargs = as_numbers(fake_arguments(node))
    if isinstance(node.target, torch._ops.OpOverload):
        result = as_numbers(node.meta.get("val"))
        return [] if launches_nothing(node.target) else [KernelCall(node.target, args, kwargs, result)]
    if not any(isinstance(leaf, Tensor) for leaf in tree_leaves((args, kwargs))):
        return []
    with fake_mode_of(args, kwargs), _Recorder() as recorder:
        node.target(*args, **kwargs)
    return recorder.calls


def launches_nothing(target: Any) -> bool:
    """Whether an operator only describes a tensor anew, or only asks about one (its device, a size)."""
    asks = getattr(target, "namespace", "") == "prim" or getattr(target, "overloadpacket", None) in _QUESTIONS
    return asks or moves_no_data(target)


def fake_arguments(node: fx.Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return a node's arguments with recorded values in place of nodes."""
    return fx.node.map_arg((node.args, node.kwargs), lambda operand: operand.meta["val"])


def fake_mode_of(*trees: Any) -> AbstractContextManager[Any]:
    """Return the fake mode of the first fake tensor in `trees`; a context that does nothing without one."""
    modes = (leaf.fake_mode for leaf in tree_leaves(trees) if hasattr(leaf, "fake_mode"))
    return next(modes, nullcontext())


def fill_in_values(nodes: Sequence[fx.Node]) -> None:
    """Give each call without a recorded value its own, computed on the fake values of its operands."""
    for node in nodes:
        if node.op == "call_function" and "val" not in node.meta:
            args, kwargs = fake_arguments(node)
            with fake_mode_of(args, kwargs):
                node.meta["val"] = node.target(*args, **kwargs)  # type: ignore[operator]


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[KernelCall] = []

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if not launches_nothing(func):
            self.calls.append(KernelCall(func, args, kwargs or {}, result))
        return result
