"""Entry points of PyTorch that no `TorchFunctionMode` sees, redirected while a model is recorded."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import sympy
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import CheckpointFunction

from bwsk_fx import _torch_private as private
from bwsk_fx.errors import CaptureError

ModuleCall = Callable[[Callable, nn.Module, tuple, dict[str, Any]], Any]
Branch = Callable[[sympy.Basic, bool | int], None]
Read = Callable[[nn.Module, str], None]
Event = Callable[[], None]


@contextmanager
def intercepted(
    on_module: ModuleCall,
    on_branch: Branch,
    on_read: Read,
    is_opaque: Callable[[], bool],
    on_hooks: Event,
    on_untraceable: Event,
) -> Iterator[None]:
    """Send module calls and branches to the recorder, and refuse what a graph would silently lose.

    Args:
        on_module: Receives the original `nn.Module.__call__`, the module, and its arguments.
        on_branch: Receives a symbolic expression that Python code turned into a plain value, and that value.
        on_read: Receives a module and the name of an attribute that is read and is no method or property.
        is_opaque: Whether what runs now is recorded as a whole, so that anything goes.
        on_hooks: Called when hooks on saved tensors are put on, as checkpointing does, that a graph loses.
        on_untraceable: Called when what runs as a whole does something that a trace of it would not repeat.
    """
    with (
        _modules(on_module),
        _branches(on_branch),
        _attributes(on_read),
        _autograd_functions(is_opaque, on_untraceable),
        _saved_tensor_hooks(lambda: (on_untraceable if is_opaque() else on_hooks)()),
        _autocast(is_opaque),
    ):
        yield


@contextmanager
def _replaced(owner: type, name: str, replacement: Any) -> Iterator[None]:
    original = owner.__dict__[name]
    setattr(owner, name, replacement)
    try:
        yield
    finally:
        setattr(owner, name, original)


def _modules(on_module: ModuleCall) -> Any:
    original = nn.Module.__call__

    def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return on_module(original, module, args, kwargs)

    return _replaced(nn.Module, "__call__", call)


@contextmanager
def _attributes(on_read: Read) -> Iterator[None]:
    plain = object.__getattribute__

    def read(module: nn.Module, name: str) -> Any:
        value = plain(module, name)
        if name in plain(module, "__dict__"):
            on_read(module, name)
        return value

    nn.Module.__getattribute__ = read  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        del nn.Module.__getattribute__


@contextmanager
def _branches(on_branch: Branch) -> Iterator[None]:
    def announcing(original: Callable) -> Callable:
        def convert(value: Any) -> Any:
            expr = value.node.expr  # before: the conversion itself may make the symbol a constant
            result = original(value)
            on_branch(expr, result)
            return result

        return convert

    with ExitStack() as stack:
        for owner, name in ((torch.SymBool, "__bool__"), (torch.SymInt, "__int__"), (torch.SymInt, "__index__")):
            stack.enter_context(_replaced(owner, name, announcing(owner.__dict__[name])))
        yield


def _autograd_functions(is_opaque: Callable[[], bool], on_untraceable: Event) -> Any:
    def on_call(function: type) -> None:
        # Those of torch.nn carry backward hooks and that of a checkpoint (before 2.13) its inputs: neither computes.
        carries = function.__module__.startswith("torch.nn.") or _is_of_checkpoints(function)
        if not is_opaque() and not carries:
            raise CaptureError(_refusal(function))
        # A backward pass of the user's may do what no trace shows: set the random state, or leave PyTorch.
        if function is CheckpointFunction or not function.__module__.startswith("torch."):
            on_untraceable()

    return private.autograd_functions_announced(on_call)


def _is_of_checkpoints(function: type) -> bool:
    return function.__module__ == CheckpointFunction.__module__ and function is not CheckpointFunction


def _refusal(function: type) -> str:
    if function is CheckpointFunction:
        return (
            "torch.utils.checkpoint with use_reentrant=True is called, which a graph cannot record; switch "
            "checkpointing off (gradient_checkpointing_disable() in transformers), since plans recompute by themselves"
        )
    return (
        f"the autograd function {function.__qualname__} is called outside a leaf module, and a graph of torch "
        "calls would lose its backward pass; let is_leaf name the module that calls it"
    )


def _saved_tensor_hooks(on_enter: Event) -> Any:
    original = saved_tensors_hooks.__enter__

    def enter(hooks: saved_tensors_hooks) -> None:
        on_enter()
        return original(hooks)

    return _replaced(saved_tensors_hooks, "__enter__", enter)


def _autocast(is_opaque: Callable[[], bool]) -> Any:
    original = torch.autocast.__enter__

    def enter(context: torch.autocast) -> Any:
        if not is_opaque():
            raise CaptureError(
                "autocast is switched outside a leaf module, which a graph of torch calls does not record; let "
                "is_leaf name the module that switches it"
            )
        return original(context)

    return _replaced(torch.autocast, "__enter__", enter)
