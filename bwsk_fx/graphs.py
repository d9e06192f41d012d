"""Graph modules that share everything but their graph."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

from torch import fx, nn

from bwsk_fx import _torch_private as private

_MEMBERS = ("_modules", "_parameters", "_buffers")


def with_graph(original: fx.GraphModule, graph: fx.Graph, modules: Mapping[str, nn.Module]) -> fx.GraphModule:
    """Return a graph module that runs `graph` on the very modules, parameters and buffers of `original`.

    Mode, metadata and forward pre-hooks come along; the `state_dict` keys and their order stay.

    Args:
        original: The graph module to share with.
        graph: The new graph.
        modules: Further modules that it calls, by name; they own no parameters or buffers.
    """
    root = nn.Module()
    _share(original, root)
    root._modules.update(modules)
    result = fx.GraphModule(root, graph, class_name=type(original).__name__)
    # fx copies what the graph calls, under bare modules on the way; take the original tree instead.
    _share(root, result)
    result._non_persistent_buffers_set = set(original._non_persistent_buffers_set)
    result._forward_pre_hooks.update(original._forward_pre_hooks)
    result._forward_pre_hooks_with_kwargs.update(original._forward_pre_hooks_with_kwargs)
    private.after_deepcopy(result).extend(private.after_deepcopy(original))
    result.training = original.training
    result.meta.update(original.meta)
    return result


def before_each_call(graph_module: fx.GraphModule, hook: Callable[..., Any]) -> None:
    """Register a forward pre-hook with keyword arguments of which deep copies of the graph module get a deep copy.

    PyTorch's own forward pre-hooks are lost when a graph module is copied.
    """

    def register(module: fx.GraphModule) -> None:
        module.register_forward_pre_hook(copy.deepcopy(hook), with_kwargs=True)

    graph_module.register_forward_pre_hook(hook, with_kwargs=True)
    private.after_deepcopy(graph_module).append(register)


def _share(source: nn.Module, target: nn.Module) -> None:
    for kind in _MEMBERS:
        getattr(target, kind).clear()
        getattr(target, kind).update(getattr(source, kind))
